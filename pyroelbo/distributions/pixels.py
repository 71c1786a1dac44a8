"""Observation models for pixels: discretized logistic, and the densities behind L1 and L2 distortions."""

from __future__ import annotations

import torch
from pyro.distributions import Laplace, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

__all__ = ["DiscretizedLogistic", "l1_density", "l2_density"]


class DiscretizedLogistic(TorchDistribution):
    """A logistic distribution rounded to the integers 0 … levels-1; the end levels include the tails.

    P(y) = σ((y + ½ - loc)/scale) - σ((y - ½ - loc)/scale), with -∞ for the lower end at 0 and +∞ for the
    upper at the top, so that the probabilities sum to one. ``loc`` and ``scale`` are in grey levels.
    ``log_prob`` is ln σ(a) + ln σ(-b) + ln(1 - e^(b-a)), which is accurate where the difference of
    the two sigmoids would cancel.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equation 2.
    """

    arg_constraints = {  # noqa: RUF012 (torch's own convention)
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        if levels < 2:
            raise ValueError(f"levels: expected at least 2 grey levels, got {levels}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> DiscretizedLogistic:
        return DiscretizedLogistic(
            self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.levels, False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """ln P(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        below = (value - 0.5 - self.loc) / self.scale
        above = (value + 0.5 - self.loc) / self.scale
        inside = torch.log(-torch.expm1(-1 / self.scale))
        lower_end, upper_end = value <= 0, value >= self.levels - 1
        left = torch.where(upper_end, torch.zeros_like(above), logsigmoid(above))
        right = torch.where(lower_end, torch.zeros_like(below), logsigmoid(-below))
        return left + right + torch.where(lower_end | upper_end, torch.zeros_like(inside), inside)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
        return (self.loc + self.scale * (u.log() - (-u).log1p())).round().clamp(0, self.levels - 1)


def l2_density(center: Tensor, weight: float | Tensor) -> Normal:
    """The density e^(-½·weight·(y - center)²)/Z, a Gaussian with σ² = 1/weight and Z = (2π/weight)^½ per
    dimension.

    Its log probability keeps the constant, so that it belongs to a bound on ln p(y).
    """
    return Normal(center, torch.as_tensor(weight, dtype=center.dtype, device=center.device).rsqrt())


def l1_density(center: Tensor, weight: float | Tensor) -> Laplace:
    """The density e^(-weight·|y - center|)/Z, a Laplace with scale b = 1/weight and Z = 2b per dimension."""
    return Laplace(center, torch.as_tensor(weight, dtype=center.dtype, device=center.device).reciprocal())

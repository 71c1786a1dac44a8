"""Observation models for pixels: densities rounded to grey levels, and those behind L1 and L2 distortions."""

from __future__ import annotations

import math

import torch
from pyro.distributions import Laplace, Normal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyroelbo.numerics import logsumexp

__all__ = [
    "DiscretizedLaplace",
    "DiscretizedLogistic",
    "DiscretizedLogistics",
    "DiscretizedNormal",
    "l1_density",
    "l2_density",
]

_UNIFORM = 1e-6  # share of the uniform distribution in a mixture of logistics


class _Discretized(TorchDistribution):
    """A density of location and scale rounded to the integers low … low+levels-1; the end levels include the
    tails (abstract: ``log_prob``, ``_quantile``)."""

    arg_constraints = {  # noqa: RUF012 (torch's own convention)
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        levels: int = 256,
        validate_args: bool | None = None,
        low: int = 0,
    ) -> None:
        if levels < 2:
            raise ValueError(f"levels: expected at least 2 grey levels, got {levels}")
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels, self.low = levels, low
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def _high(self) -> int:
        return self.low + self.levels - 1

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.integer_interval(self.low, self._high)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Discretized:
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return type(self)(loc, scale, self.levels, False, self.low)

    def _edges(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The standardized edges of a level's interval, and whether the lower and the upper is infinite."""
        if self._validate_args:
            self._validate_sample(value)
        below = (value - 0.5 - self.loc) / self.scale
        above = (value + 0.5 - self.loc) / self.scale
        return below, above, value <= self.low, value >= self._high

    def _quantile(self, u: Tensor) -> Tensor:
        """The quantile of the standard density at u in (0, 1)."""
        raise NotImplementedError

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps)
        drawn = (self.loc + self.scale * self._quantile(u)).round().clamp(self.low, self._high)
        return drawn + 0.0  # -0 becomes 0


class DiscretizedLogistic(_Discretized):
    """A logistic distribution rounded to the integers low … low+levels-1; the end levels include the tails.

    P(y) = σ((y + ½ - loc)/scale) - σ((y - ½ - loc)/scale), with -∞ for the lower end at ``low`` and +∞ for
    the upper at the top, so that the probabilities sum to one. ``loc`` and ``scale`` are in grey levels.
    ``log_prob`` is ln σ(a) + ln σ(-b) + ln(1 - e^(b-a)), which is accurate where the difference of
    the two sigmoids would cancel.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equation 2.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """ln P(value), in nats, of the broadcast shape."""
        below, above, lower_end, upper_end = self._edges(value)
        inside = torch.log(-torch.expm1(-1 / self.scale))
        left = torch.where(upper_end, torch.zeros_like(above), logsigmoid(above))
        right = torch.where(lower_end, torch.zeros_like(below), logsigmoid(-below))
        return left + right + torch.where(lower_end | upper_end, torch.zeros_like(inside), inside)

    def _quantile(self, u: Tensor) -> Tensor:
        return u.log() - (-u).log1p()


class DiscretizedNormal(_Discretized):
    """A normal distribution rounded to the integers low … low+levels-1; the end levels include the tails.

    P(y) = Φ(a) - Φ(b) with a = (y + ½ - loc)/scale and b = (y - ½ - loc)/scale, infinite at the ends: the L2
    distortion as a probability. ``loc`` and ``scale`` are in grey levels. ``log_prob`` is
    ln Φ(a) + ln(1 - Φ(b)/Φ(a)), mirrored where a + b > 0, so that far levels keep their probability; in
    float64 whatever the parameters' dtype, as in float32 the derivative of ln Φ is wrong beyond some hundred
    deviations.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """ln P(value), in nats, of the broadcast shape."""
        below, above, lower_end, upper_end = self._edges(value)
        dtype, ends = below.dtype, lower_end | upper_end
        below, above = below.double(), above.double()
        end = torch.special.log_ndtr(torch.where(lower_end, above, -below))
        mirrored = below + above > 0
        high = torch.where(mirrored, -below, above).masked_fill(ends, 1.0)
        low = torch.where(mirrored, -above, below).masked_fill(ends, 0.0)
        log_high = torch.special.log_ndtr(high)
        inside = log_high + torch.log(-torch.expm1(torch.special.log_ndtr(low) - log_high))
        return torch.where(ends, end, inside).to(dtype)

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.special.ndtri(u)


class DiscretizedLaplace(_Discretized):
    """A Laplace distribution rounded to the integers low … low+levels-1; the end levels include the tails.

    P(y) = F(a) - F(b) with a = (y + ½ - loc)/scale and b = (y - ½ - loc)/scale, infinite at the ends: the L1
    distortion as a probability. ``loc`` and ``scale`` are in grey levels. With d = |y - loc|/scale and
    w = 1/scale, ``log_prob`` is -(d - w/2) - ln 2 + ln(1 - e^-w) for d ≥ w/2, and else the logarithm of
    1 - ½ e^-(w/2 + d) - ½ e^-(w/2 - d).
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """ln P(value), in nats, of the broadcast shape."""
        below, above, lower_end, upper_end = self._edges(value)
        half = 0.5 / self.scale
        distance = (0.5 * (below + above)).abs()
        outside = distance >= half
        far = half - distance - math.log(2) + torch.log(-torch.expm1(-2 * half))
        near = torch.where(outside, torch.zeros_like(distance), distance)
        within = torch.log(-0.5 * (torch.expm1(-half - near) + torch.expm1(near - half)))
        end = _log_cdf(torch.where(lower_end, above, -below))
        return torch.where(lower_end | upper_end, end, torch.where(outside, far, within))

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.where(u < 0.5, (2 * u).log(), -(2 - 2 * u).log())


def _log_cdf(x: Tensor) -> Tensor:
    """ln F(x) of the standard Laplace distribution."""
    return torch.where(x < 0, x.clamp(max=0) - math.log(2), torch.log1p(-0.5 * torch.exp(-x.clamp(min=0))))


class DiscretizedLogistics(TorchDistribution):
    """A mixture of M discretized logistics on the integers 0 … levels-1, and a uniform share of 1e-6.

    P(y) = (1 - 1e-6) Σ_m softmax(logits)_m P_m(y) + 1e-6 / levels, P_m a :class:`DiscretizedLogistic` of
    ``loc_m`` and ``scale_m``; all three parameters are [*B, M]. ``log_prob`` continues to numbers between the
    integers, so that it has a derivative in y. No value costs more than 13.8 nats + ln levels.

    Source: Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, equation 2.
    """

    arg_constraints = {  # noqa: RUF012 (torch's own convention)
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    has_enumerate_support = True

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        levels: int = 256,
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.scale = broadcast_all(logits, loc, scale)
        self.levels = levels
        self._parts = DiscretizedLogistic(self.loc, self.scale, levels, False)
        super().__init__(self.loc.shape[:-1], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """E[y], [*B], of the logistics before they are rounded and cut."""
        return (self.logits.softmax(-1) * self.loc).sum(-1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> DiscretizedLogistics:
        shape = (*batch_shape, self.loc.shape[-1])
        logits, loc, scale = (x.expand(shape) for x in (self.logits, self.loc, self.scale))
        return DiscretizedLogistics(logits, loc, scale, self.levels, False)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln P(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        inside = logsumexp(self.logits.log_softmax(-1) + self._parts.log_prob(value.unsqueeze(-1)), -1)
        rest = inside.new_tensor(math.log(_UNIFORM / self.levels))
        return torch.logaddexp(inside + math.log1p(-_UNIFORM), rest)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = self._extended_shape(sample_shape)
        logits, loc, scale = (x.expand(*shape, -1) for x in (self.logits, self.loc, self.scale))
        which = torch.distributions.Categorical(logits=logits).sample().unsqueeze(-1)
        loc, scale = (x.gather(-1, which).squeeze(-1) for x in (loc, scale))
        y = DiscretizedLogistic(loc, scale, self.levels, False).sample()
        rare = torch.rand(shape, device=y.device) < _UNIFORM
        return torch.where(rare, torch.randint(self.levels, shape, device=y.device).to(y.dtype), y)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """The values 0 … levels-1, [levels, 1, …], or [levels, *B] with ``expand``."""
        values = torch.arange(self.levels, dtype=self.loc.dtype, device=self.loc.device)
        values = values.reshape(-1, *[1] * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values


def l2_density(center: Tensor, weight: float | Tensor) -> Normal:
    """The density e^(-½·weight·(y - center)²)/Z, a Gaussian with σ² = 1/weight and Z = (2π/weight)^½ per
    dimension.

    Its log probability keeps the constant, so that it belongs to a bound on ln p(y).
    """
    return Normal(center, torch.as_tensor(weight, dtype=center.dtype, device=center.device).rsqrt())


def l1_density(center: Tensor, weight: float | Tensor) -> Laplace:
    """The density e^(-weight·|y - center|)/Z, a Laplace with scale b = 1/weight and Z = 2b per dimension."""
    return Laplace(center, torch.as_tensor(weight, dtype=center.dtype, device=center.device).reciprocal())

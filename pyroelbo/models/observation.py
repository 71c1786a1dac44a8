"""Likelihoods of pixels given a network's output, shared by all image models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.distributions.pixels import (
    DiscretizedLaplace,
    DiscretizedLogistic,
    DiscretizedNormal,
    l1_density,
    l2_density,
)
from pyroelbo.numerics import whole_number

__all__ = ["LIKELIHOODS", "Coins", "Pixels"]

# name: (network outputs per pixel, given the number of grey levels; kinds of data)
LIKELIHOODS: dict[str, tuple[Callable[[int], int], tuple[str, ...]]] = {
    "bernoulli": (lambda levels: 1, ("binary",)),
    "discretized_logistic": (lambda levels: 1, ("bytes",)),
    "categorical": (lambda levels: levels, ("bytes",)),
    "discretized_normal": (lambda levels: 1, ("bytes",)),
    "discretized_laplace": (lambda levels: 1, ("bytes",)),
    "l2": (lambda levels: 1, ("grey", "vectors")),
    "l1": (lambda levels: 1, ("grey", "vectors")),
}

# Weights of an L2 or L1 distortion of pixels in [0, 1], at the start of training.
_WEIGHTS = {"l2": 100.0, "l1": 10.0, "discretized_normal": 100.0, "discretized_laplace": 10.0}


class Coins(dist.Bernoulli):
    """Bernoulli variables whose values may have any dtype."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value if value.is_floating_point() else value.to(self.logits.dtype))


class Pixels(nn.Module):
    """p(y | x) of ``dims`` pixels from a network's output ``x`` [*, outputs]; event shape [dims].

    ``likelihood`` is ``bernoulli`` (0 or 1); ``discretized_logistic``, ``discretized_normal``,
    ``discretized_laplace`` or ``categorical`` (integers 0 … levels-1); or ``l2`` or ``l1`` (real pixels;
    normalized Gaussian and Laplace densities). The logistic's scale, in grey levels, is one learned number
    for all pixels; so is the ``weight`` of an L2 or L1 distortion, unless it is given: of pixels in [0, 1],
    σ² = 1/weight and b = 1/weight, also where they are rounded to grey levels (``discretized_normal`` and
    ``discretized_laplace``). ``log_weight`` is its logarithm.

    The center of a discretized density is (levels - 1)(½ + x/4), not kept in the range: only a center below 0
    makes level 0 near certain, since the end levels have the tails, and its gradient does not vanish there.
    """

    def __init__(
        self, dims: int, likelihood: str = "bernoulli", levels: int = 256, weight: float | None = None
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: expected one of {tuple(LIKELIHOODS)}, got {likelihood!r}")
        if weight is not None and likelihood not in _WEIGHTS:
            raise ValueError(
                f"weight: expected None for likelihood={likelihood!r}, got {weight!r}; only "
                f"{', '.join(map(repr, _WEIGHTS))} have one"
            )
        self.dims, self.likelihood, self.levels = dims, likelihood, levels
        per_pixel, kinds = LIKELIHOODS[likelihood]
        self.integers = "bytes" in kinds
        if self.integers:
            whole_number("levels", levels, 2, "grey levels")
        self.per_pixel = per_pixel(levels)
        starts = _WEIGHTS | {"discretized_logistic": levels / 10}
        if weight is not None:
            self.register_buffer("log_weight", torch.tensor(math.log(weight)))
        elif likelihood in starts:
            self.register_parameter("log_weight", nn.Parameter(torch.tensor(math.log(starts[likelihood]))))

    @property
    def outputs(self) -> int:
        """Number of network outputs per datum."""
        return self.dims * self.per_pixel

    def distribution(self, x: Tensor) -> dist.TorchDistribution:
        """p(y | x), event shape [dims]."""
        if self.likelihood == "bernoulli":
            return Coins(logits=x).to_event(1)
        if self.likelihood == "categorical":
            return dist.Categorical(logits=x.unflatten(-1, (self.dims, self.levels))).to_event(1)
        if self.integers:
            return self._rounded(x).to_event(1)
        density = l2_density if self.likelihood == "l2" else l1_density
        return density(x, self.log_weight.exp()).to_event(1)

    def constant(self, y: Tensor, rows: int = 1000, steps: int = 300) -> Tensor:
        """Outputs [outputs] that suit data y [N, D] best if all data share them: by ``steps`` of Adam on the
        first ``rows``. A decoder whose biases start there need not take the mean from its codes.
        """
        y = y[:rows]
        with torch.enable_grad():
            x = torch.zeros(self.outputs, device=y.device, requires_grad=True)
            adam = torch.optim.Adam([x], 0.05)
            for _ in range(steps):
                (x.grad,) = torch.autograd.grad(-self.distribution(x).log_prob(y).mean(), x)
                adam.step()
        return x.detach()

    def _rounded(self, x: Tensor) -> dist.TorchDistribution:
        top = self.levels - 1
        center = top * (0.5 + 0.25 * x)
        if self.likelihood == "discretized_logistic":
            return DiscretizedLogistic(center, self.log_weight.exp(), self.levels)
        if self.likelihood == "discretized_normal":
            return DiscretizedNormal(center, top * (-0.5 * self.log_weight).exp(), self.levels)
        return DiscretizedLaplace(center, top * (-self.log_weight).exp(), self.levels)

    def check(self, y: Tensor, model: str) -> None:
        """Raise ValueError, naming the ``model``, unless y is [B, dims]."""
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(
                f"y: expected shape [B, {self.dims}] (flattened images) for this {model}, got "
                f"{tuple(y.shape)}"
            )

    def center(self) -> Center:
        """Module that maps such pixels to [-1, 1]."""
        return Center(self.levels - 1 if self.integers else 1)

    def mean(self, distribution: Any) -> Tensor:
        """E[y | x], [*, dims]; of discretized densities the center, which may lie outside of the range."""
        p = distribution.base_dist
        if self.likelihood == "categorical":
            return p.probs @ torch.arange(self.levels, dtype=p.probs.dtype, device=p.probs.device)
        return p.loc if self.integers else p.mean

    def mean_image(self, distribution: Any) -> Tensor:
        """E[y | x], scaled to [0, 1], [*, dims]."""
        mean = self.mean(distribution)
        return (mean / (self.levels - 1) if self.integers else mean).clamp(0, 1)


class Center(nn.Module):
    """Maps pixels in [0, top] to [-1, 1], an encoder's input."""

    def __init__(self, top: float) -> None:
        super().__init__()
        self.top = top

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels of any dtype in [-1, 1], of the ``dtype`` of the network's parameters."""
        return 2 * y.to(dtype) / self.top - 1

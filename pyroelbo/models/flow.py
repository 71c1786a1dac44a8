"""Normalizing flows: exact densities trained by cross-entropy, and a bound for integers by dequantization."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.numerics import whole_number
from pyroelbo.pair import PLATE, ExactPair, Pair
from pyroelbo.priors import FlowPrior

__all__ = ["DequantizedFlow", "Flow"]


class Flow(ExactPair):
    """p(y) = N(f(y); 0, I) |det f'(y)| with an invertible f, for real data [B, D]: a pair without latents.

    The guide is empty, so the ELBO is ln p(y) with zero variance, and training minimizes the cross-entropy
    E_Pop[-ln p(y)]. All arguments are those of :class:`~pyroelbo.priors.FlowPrior`. Densities depend on the
    data's unit: scaling y by a adds -D ln a to ln p(y).

    Part: ``generator``. Raises ValueError for data that are not [B, D]. There is no posterior (TypeError).

    Source: Rezende and Mohamed (2015); Durkan et al. (2019).
    """

    exact_guide = False  # type: ignore[assignment]  # nothing is drawn; Trace_ELBO is the exact objective

    def __init__(
        self,
        dims: int,
        kind: str = "coupling",
        layers: int = 6,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
    ) -> None:
        super().__init__()
        self.generator = FlowPrior(dims, kind, layers, hidden, bins)
        self.dims = dims

    def initialize(self, y: Tensor) -> Flow:
        """Set the mean and scale to those of data [N, D]; returns self."""
        self.generator.standardize(_checked(y, self.dims, "Flow"))
        return self

    def model(self, y: Tensor) -> None:
        _checked(y, self.dims, "Flow")
        with pyro.plate(PLATE, len(y)):
            pyro.sample("y", self.generator(), obs=y)

    def guide(self, y: Tensor) -> None:
        pass

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y), [B], in nats; float64 without gradients."""
        y = _checked(y, self.dims, "Flow")
        if torch.is_grad_enabled():
            return self.generator().log_prob(y)
        return copy.deepcopy(self.generator).double()().log_prob(y.double())

    def posterior(self, y: Tensor) -> Any:
        raise TypeError("a Flow has no latents, so there is no posterior and no EM; train it with fit")

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.loc.new_zeros(n, self.dims)


class DequantizedFlow(Pair):
    """A flow's density integrated over unit cells, for integers 0 … levels-1: P(y) = ∫_[y, y+1) p(z) dz.

    The latent z has the flow's density, and y = ⌊z⌋ (the first and last level include the tails). The guide
    q(z | y) is uniform on the cell, without parameters, so the ELBO E_u ln p(y + u) is uniform
    dequantization, and IWAE tightens it. Data [B, D]. Part: ``generator``. Raises ValueError for data that
    are not [B, D].

    Args:
        dims: number of dimensions D.
        levels: number of grey levels.
        kind, layers, hidden, bins: those of :class:`~pyroelbo.priors.FlowPrior`.

    Source: Theis, van den Oord and Bethge (2016), equation 7; Ho et al. (2019) for its reading as an ELBO.
    """

    def __init__(
        self,
        dims: int,
        levels: int = 256,
        kind: str = "coupling",
        layers: int = 6,
        hidden: Sequence[int] = (128, 128),
        bins: int = 8,
    ) -> None:
        super().__init__()
        whole_number("levels", levels, 2, "grey levels")
        self.generator = FlowPrior(dims, kind, layers, hidden, bins)
        self.dims, self.levels = dims, levels
        with torch.no_grad():
            self.generator.loc.fill_(levels / 2)
            self.generator.log_scale.fill_(math.log(levels / 4))

    def initialize(self, y: Tensor) -> DequantizedFlow:
        """Set the mean and scale to those of dequantized data [N, D]; returns self."""
        y = _checked(y, self.dims, "DequantizedFlow").to(self.generator.loc)
        self.generator.standardize(y + torch.rand_like(y))
        return self

    def model(self, y: Tensor) -> None:
        _checked(y, self.dims, "DequantizedFlow")
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", self.generator())
            pyro.sample("y", _Cell(z.floor().clamp(0, self.levels - 1), self.levels), obs=y)

    def guide(self, y: Tensor) -> None:
        y = y.to(self.generator.loc.dtype)
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", _InCell(y, y + 1).to_event(1))

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.loc.new_zeros(n, self.dims)


class _InCell(dist.Uniform):
    """Uniform on [low, high), even if rounding would yield ``high``."""

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return torch.minimum(super().rsample(sample_shape), torch.nextafter(self.high, self.low))


class _Cell(dist.Delta):
    """Point mass on a vector of grey levels."""

    def __init__(self, v: Tensor, levels: int) -> None:
        self.levels = levels
        super().__init__(v, event_dim=1)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.levels - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Cell:
        return _Cell(self.v.expand(*batch_shape, *self.event_shape), self.levels)


def _checked(y: Tensor, dims: int, name: str) -> Tensor:
    if y.dim() != 2 or y.shape[-1] != dims:
        raise ValueError(f"y: expected shape [B, {dims}] for this {name}, got {tuple(y.shape)}")
    return y

"""The small modules that a chain is made of: each gives the distribution of one site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP

__all__ = ["GaussianLink", "PixelLink", "TopDownLink", "bounded", "join", "normal"]


class GaussianLink(nn.Module):
    """N(μ(x), diag s(x)²), x of ``inputs[0]`` numbers: a generator link, or a bottom-up encoder link.

    ``center`` is a module that maps what is seen to what the network takes (pixels to [-1, 1]).
    """

    def __init__(
        self, takes: int, out: int, hidden: Sequence[int] = (), center: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.inputs, self.out, self.center = (takes,), out, center
        self.network = MLP((takes, *hidden, 2 * out))

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        return normal(self.network(x if self.center is None else self.center(x)))


class TopDownLink(nn.Module):
    """q(z_l | z_{l+1}, y) = N(μ, diag s²) of both together, z_{l+1} of ``above`` numbers (0 at the top), what
    is seen of y of ``seen``."""

    def __init__(
        self, above: int, seen: int, out: int, hidden: Sequence[int] = (), center: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.inputs, self.out, self.center = (above, seen), out, center
        self.network = MLP((above + seen, *hidden, 2 * out))

    def forward(self, state: Tensor | None, seen: Tensor, p: Any) -> dist.TorchDistribution:
        seen = seen if self.center is None else self.center(seen)
        return normal(self.network(seen if state is None else join(state, seen)))


class PixelLink(nn.Module):
    """p(y | z_1) of pixels: a network, and one of the likelihoods of :class:`~pyroelbo.models.observation.Pixels`."""

    def __init__(self, network: nn.Module, pixels: Pixels, takes: int | None = None) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels
        self.inputs = () if takes is None else (takes,)

    def forward(self, state: Tensor) -> dist.TorchDistribution:
        return self.pixels.distribution(self.network(state))


def normal(x: Tensor) -> dist.TorchDistribution:
    """N(μ, diag s²) from x = (μ, r) [*, 2d], event shape [d]: ln s = 5 tanh(r / 5), which keeps s within e^±5."""
    loc, raw = x.chunk(2, -1)
    return dist.Normal(loc, bounded(raw).exp()).to_event(1)


def bounded(raw: Tensor) -> Tensor:
    """5 tanh(raw / 5): the identity near zero, within ±5 (Vahdat and Kautz, 2020, soft clamp)."""
    return 5 * torch.tanh(raw / 5)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Both along the last dimension, leading ones broadcast: [*, m], [*, n] to [*, m + n]."""
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*lead, -1), b.expand(*lead, -1)], -1)

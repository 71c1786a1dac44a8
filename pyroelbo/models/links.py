"""Links of a chain: small modules, each of which returns the distribution of one site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyroelbo import encoders
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP, bounded, join

__all__ = ["LOG_SCALE", "BottomUpLink", "GaussianLink", "PixelLink", "TopDownLink", "normal"]

LOG_SCALE = 5.0  # log scales of links stay within ± this, softly


class GaussianLink(nn.Module):
    """N(μ(x), diag s(x)²) of a network of x, ``inputs`` numbers: a generator link, or a bottom-up encoder
    link."""

    def __init__(self, inputs: int, out: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.inputs, self.out = (inputs,), out
        self.network = MLP((inputs, *hidden, 2 * out))

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        return normal(self.network(x))


class BottomUpLink(nn.Module):
    """q(z_l | z_{l-1}) of ``out`` numbers, from a network of ``inputs`` numbers.

    ``center`` maps these to the network's input (pixels to [-1, 1]); ``encoder`` is the family of q, a name
    of :data:`~pyroelbo.encoders.ENCODERS` or a callable.
    """

    def __init__(
        self,
        inputs: int,
        out: int,
        hidden: Sequence[int] = (),
        center: nn.Module | None = None,
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        super().__init__()
        self.inputs, self.out, self.center = (inputs,), out, center
        self.family = encoders.build(encoder, out, LOG_SCALE)
        self.network = MLP((inputs, *hidden, self.family.num_inputs))

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        seen = x if self.center is None else self.center(x, self.network[0].weight.dtype)
        return self.family(self.network(seen))


class TopDownLink(nn.Module):
    """q(z_l | z_{l+1}, y) of ``out`` numbers, from a network of z_{l+1} and of y or features of y.

    Args:
        above: number of units of z_{l+1}; 0 at the top.
        seen: number of units of y, or of its features.
        out: number of units of z_l.
        hidden: widths of the network's hidden layers.
        center: module applied to y before the network (pixels to [-1, 1]).
        encoder: family of q, a name of :data:`~pyroelbo.encoders.ENCODERS` or a callable.
    """

    def __init__(
        self,
        above: int,
        seen: int,
        out: int,
        hidden: Sequence[int] = (),
        center: nn.Module | None = None,
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        super().__init__()
        self.inputs, self.out, self.center = (above, seen), out, center
        self.family = encoders.build(encoder, out, LOG_SCALE)
        self.network = MLP((above + seen, *hidden, self.family.num_inputs))

    def forward(self, state: Tensor | None, seen: Tensor, p: Any) -> dist.TorchDistribution:
        seen = seen if self.center is None else self.center(seen, self.network[0].weight.dtype)
        return self.family(self.network(seen if state is None else join(state, seen)))


class PixelLink(nn.Module):
    """p(y | z_1) of pixels: a network and a likelihood of :class:`~pyroelbo.models.observation.Pixels`."""

    def __init__(self, network: nn.Module, pixels: Pixels, inputs: int | None = None) -> None:
        super().__init__()
        self.network, self.pixels = network, pixels
        self.inputs = () if inputs is None else (inputs,)

    def forward(self, state: Tensor) -> dist.TorchDistribution:
        return self.pixels.distribution(self.network(state))


def normal(x: Tensor) -> dist.TorchDistribution:
    """N(μ, diag s²) from x = (μ, r) [*, 2d], event shape [d]: ln s = 5 tanh(r / 5), which keeps s within
    e^±5."""
    loc, raw = x.chunk(2, -1)
    return dist.Normal(loc, bounded(raw, LOG_SCALE).exp()).to_event(1)

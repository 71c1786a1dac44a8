"""Chains of discrete latents on images: sigmoid belief nets and discrete VAEs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.models.hierarchy import ImageChain, check_widths
from pyroelbo.models.links import PixelLink
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP
from pyroelbo.numerics import positive_count, positive_shape

__all__ = ["DiscreteVAE", "SigmoidBeliefNet"]


class DiscreteVAE(ImageChain):
    """p(z_N) Π_l p(z_l | z_{l+1}) p(y | z_1) with layers of discrete latents, encoded bottom-up; sites
    "z_1" … "z_N".

    A layer of d latents is d Bernoullis (``values=2``, z_l [d] of 0 and 1) or d categoricals (z_l [d,
    values], one-hot), independent given the layer above, or below in the encoder. There is no pathwise
    gradient: train with an estimator for discrete latents, ``fit(objective="rloo", particles=4)`` (see
    docs/discrete.md). ``evidence.exact`` sums over all values of few latents.

    Parts: ``prior`` (a learned factorized one), ``generator``, ``encoder``. Data [B, D], flat.

    Args:
        shape: number of pixels, or their shape.
        latent: number of latents of each layer, from the bottom.
        hidden: widths of the hidden layers of every network, the encoder's order; () for linear maps.
        values: number of values of a latent.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.

    Raises ValueError for fewer than two values. Source: Mnih and Gregor (2014); Jang et al. (2017) for
    categoricals.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: Sequence[int] = (200,),
        hidden: Sequence[int] = (200, 200),
        values: int = 2,
        likelihood: str = "bernoulli",
        levels: int = 256,
    ) -> None:
        shape = positive_shape(shape)
        dims = math.prod(shape)
        check_widths("latent", latent)
        positive_count("values", values, "number of values")
        if values < 2:
            raise ValueError(f"values: expected at least 2, got {values}")
        pixels = Pixels(dims, likelihood, levels)
        sizes = [d * (1 if values == 2 else values) for d in latent]
        back = tuple(reversed(tuple(hidden)))
        flat = [] if values == 2 else [nn.Flatten(-2)]
        decoder = nn.Sequential(*flat, *MLP((sizes[0], *back, pixels.outputs)))
        super().__init__(
            _Factorized(latent[-1], values),
            [
                DiscreteLink(above, d, values, back, flatten=values > 2)
                for above, d in zip(sizes[1:], latent[:-1], strict=True)
            ],
            PixelLink(decoder, pixels, sizes[0]),
            [
                DiscreteLink(dims, latent[0], values, hidden, pixels.center()),
                *(
                    DiscreteLink(below, d, values, hidden, flatten=values > 2)
                    for below, d in zip(sizes[:-1], latent[1:], strict=True)
                ),
            ],
            event=(dims,),
        )
        self.shape = shape
        self.levels = levels


class SigmoidBeliefNet(DiscreteVAE):
    """Layers of Bernoulli units with linear maps between them, both ways.

    Args:
        shape: number of pixels, or their shape.
        latent: number of units of each layer, from the bottom.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.

    Source: Neal (1992).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: Sequence[int] = (200,),
        likelihood: str = "bernoulli",
        levels: int = 256,
    ) -> None:
        super().__init__(shape, latent, (), 2, likelihood, levels)


class DiscreteLink(nn.Module):
    """Independent latents of ``values`` values from a network of ``inputs`` numbers (one-hot latents are
    flattened); ``center`` maps pixels to the network's input."""

    def __init__(
        self,
        inputs: int,
        latent: int,
        values: int,
        hidden: Sequence[int] = (),
        center: nn.Module | None = None,
        flatten: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.out = (inputs,), latent * (1 if values == 2 else values)
        self.values, self.center, self.flatten = values, center, flatten
        self.network = MLP((inputs, *hidden, self.out))

    def forward(self, x: Tensor) -> Any:
        if self.center is not None:
            x = self.center(x, self.network[0].weight.dtype)
        return _discrete(self.network(x.flatten(-2) if self.flatten else x), self.values)


class _Factorized(nn.Module):
    """p(z_N): independent latents with learned logits."""

    def __init__(self, latent: int, values: int) -> None:
        super().__init__()
        self.values, self.out = values, latent * (1 if values == 2 else values)
        self.logits = nn.Parameter(0.1 * torch.randn(self.out))

    def forward(self) -> Any:
        return _discrete(self.logits, self.values)


def _discrete(logits: Tensor, values: int) -> Any:
    if values == 2:
        return dist.Bernoulli(logits=logits).to_event(1)
    return dist.OneHotCategorical(logits=logits.unflatten(-1, (-1, values))).to_event(1)

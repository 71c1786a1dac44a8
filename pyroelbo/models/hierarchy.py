"""Hierarchies of Gaussian latents on images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyroelbo import encoders, priors
from pyroelbo.models.chain import Chain
from pyroelbo.models.links import BottomUpLink, GaussianLink, PixelLink, TopDownLink
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP
from pyroelbo.numerics import positive_shape

__all__ = ["Hierarchy", "ImageChain", "check_widths"]


class ImageChain(Chain):
    """A chain on flat images [B, D] (abstract): adds reconstructions and initialization."""

    @property
    def pixels(self) -> Pixels:
        return self.generator.observation.pixels  # type: ignore[return-value]

    def check(self, y: Tensor) -> None:
        self.pixels.check(y, type(self).__name__)

    @torch.no_grad()
    def reconstruct(self, y: Tensor) -> Tensor:
        """E[y | z_1, …], scaled to [0, 1], [B, D], for one draw of the encoder per datum."""
        drawn = poutine.trace(self.guide).get_trace(y)
        model = poutine.trace(poutine.replay(self.model, trace=drawn)).get_trace(y)
        return self.pixels.mean_image(model.nodes["y"]["fn"])

    @torch.no_grad()
    def initialize(self, y: Tensor) -> ImageChain:
        """Initialize the prior, if it starts from data, from data [N, D]: from y itself, or bottom-up from
        draws of z_{N-1}, which the top of the encoder is given; returns self."""
        self.check(y)
        top: Any = getattr(self.prior, "prior", self.prior)
        if not hasattr(top, "initialize"):
            return self
        if self.order == "bottom-up":
            for link in self.encoder.links[:-1]:
                y = link(y).sample()
        top.initialize(y)
        return self


class Hierarchy(ImageChain):
    """A hierarchy of Gaussian latents on images: p(z_l | z_{l+1}) and p(y | z_1) by networks of one hidden
    layer each.

    Trained by its bound, a bottom-up hierarchy tends to leave its upper layers unused, KL(q(z_2 | z_1),
    p(z_2)) near 0; see :class:`~pyroelbo.models.Ladder`.

    Args:
        shape: number of pixels, or their shape.
        latent: number of units of each layer, from the bottom.
        hidden: units of each network's hidden layer.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        order: ``"bottom-up"``, q(z_1 | y) q(z_2 | z_1) …, or ``"top-down"``, q(z_N | y) q(z_{N-1} | z_N, y)
            ….
        prior: p(z_N), by name (:data:`~pyroelbo.priors.PRIORS`) or a :class:`~pyroelbo.priors.Prior`.
            ``vamp`` mixes the top of the encoder over pseudo-inputs: images top-down, values of z_{N-1}
            bottom-up (where q(z_N | y) is an integral).
        components: Gaussians of the prior ``mixture``, or pseudo-inputs of ``vamp``.
        encoder: family of every q, by name (:data:`~pyroelbo.encoders.ENCODERS`) or a callable.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: Sequence[int] = (8, 4),
        hidden: int = 128,
        likelihood: str = "bernoulli",
        levels: int = 256,
        order: str = "bottom-up",
        prior: str | priors.Prior = "standard",
        components: int = 50,
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        shape = positive_shape(shape)
        dims = math.prod(shape)
        check_widths("latent", latent)
        check_widths("hidden", (hidden,))
        pixels = Pixels(dims, likelihood, levels)
        wide, top, center = (hidden,), len(latent) - 1, pixels.center()

        def link(i: int) -> nn.Module:
            if order == "top-down":
                return TopDownLink(0 if i == top else latent[i + 1], dims, latent[i], wide, center, encoder)
            return BottomUpLink(latent[i - 1] if i else dims, latent[i], wide, None if i else center, encoder)

        links = [link(i) for i in range(len(latent))]
        seen = dims if order == "top-down" or not top else latent[-2]
        super().__init__(
            priors.build(prior, latent[-1], components, self.encode_top, (seen,), f"z_{len(latent)}"),
            [GaussianLink(latent[i + 1], latent[i], wide) for i in range(top)],
            PixelLink(MLP((latent[0], hidden, pixels.outputs)), pixels, latent[0]),
            links,
            event=(dims,),
            order=order,
        )
        self.shape = shape


def check_widths(name: str, widths: Sequence[int]) -> None:
    """Raise ValueError, naming the layer, unless ``widths`` are positive integers."""
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise ValueError(f"{name}: expected a width for each layer, such as ({widths!r},), got {widths!r}")
    if not widths:
        raise ValueError(f"{name}: expected at least one layer, got none")
    for layer, width in enumerate(widths, 1):
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(
                f"{name}: expected a positive width for each layer, got {width!r} for layer {layer}"
            )

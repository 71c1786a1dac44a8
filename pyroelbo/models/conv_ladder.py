"""Convolutional ladders: groups of latent maps at several resolutions, along one top-down path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import priors
from pyroelbo.models.hierarchy import ImageChain
from pyroelbo.models.links import LOG_SCALE, PixelLink, normal
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import Conv, ConvCell, bounded, doubled
from pyroelbo.numerics import image_shape, positive_count

__all__ = ["ConvLadder", "MapFeatures", "MapMerge"]


class ConvLadder(ImageChain):
    """A ladder of latent maps at resolutions 1, 1/2, 1/4, …; z_1 is the finest. Data [B, H·W], flat images.

    Bottom-up, residual cells compute features at each resolution. Top-down, the path h is an image of
    features: p(z_l | h) is Gaussian with a cell on h, then h ← cell(h + z_l), doubled in size after the last
    group of a resolution. q(z_l | h, d_l) = N(μ_p + s_p·Δ, (s_p·r)²) with Δ and ln r from a cell on h and
    d_l, initially near 0. Residual branches are scaled by 1/√N.

    H and W must be even at every resolution but the coarsest; ValueError names the resolution that cannot be
    halved. Train with ``fit(..., clip_norm=..., skip_norm=...)``.

    Args:
        shape: height and width of the images.
        groups: number of latent groups at each resolution, finest first.
        latent: number of maps of a group.
        channels: number of features of the path.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        dropout: probability of dropout in all cells.
        prior: p(z_N) over the top maps as one vector, row by row: by name (:data:`~pyroelbo.priors.PRIORS`)
            or a :class:`~pyroelbo.priors.Prior` of latent · height · width numbers at the coarsest
            resolution.
        components: Gaussians of the prior ``mixture``, or pseudo-inputs of ``vamp``.

    Sources: Vahdat and Kautz (2020), section 3; Child (2021), section 3.
    """

    def __init__(
        self,
        shape: Sequence[int],
        groups: Sequence[int] = (2, 2, 1),
        latent: int = 2,
        channels: int = 32,
        likelihood: str = "bernoulli",
        levels: int = 256,
        dropout: float = 0.0,
        prior: str | priors.Prior = "standard",
        components: int = 50,
    ) -> None:
        shape = image_shape(shape)
        sizes = _resolutions(shape, groups)
        positive_count("latent", latent, "number of maps")
        positive_count("channels", channels, "number of maps")
        pixels = Pixels(math.prod(shape), likelihood, levels)
        where = [r for r, count in enumerate(groups) for _ in range(count)]  # the resolution of each layer
        cell = {"gain": len(where) ** -0.5, "dropout": dropout}
        small = [min(size) < 3 for size in sizes]

        cells = [{**cell, "small": small[r]} for r in where]
        doubles = [layer > 0 and where[layer - 1] != r for layer, r in enumerate(where)]
        top, size = len(where) - 1, (latent, *sizes[-1])
        start = priors.build(
            prior, math.prod(size), components, self.encode_top, (pixels.dims,), f"z_{len(where)}"
        )
        super().__init__(
            TopMap(start, size, channels, doubles[top], cells[top]),
            [MapLink(latent, channels, doubles[i], cells[i]) for i in range(top)],
            PixelLink(_Image(channels, pixels, cell), pixels),
            [
                *(MapMerge(latent, channels, cells[i]) for i in range(top)),
                TopMerge(latent, channels, cells[top]),
            ],
            event=(pixels.dims,),
            order="top-down",
            features=MapFeatures(shape, groups, channels, pixels.center(), small, cell),
        )
        self.shape = shape


def _resolutions(shape: tuple[int, ...], groups: Sequence[int]) -> list[tuple[int, ...]]:
    """Height and width at each resolution; raises ValueError, naming a resolution that cannot be halved."""
    if not groups or any(isinstance(g, bool) or not isinstance(g, int) or g < 1 for g in groups):
        raise ValueError(f"groups: expected a positive number for each resolution, got {tuple(groups)}")
    sizes = [shape]
    for r in range(1, len(groups)):
        height, width = sizes[-1]
        if height % 2 or width % 2:
            raise ValueError(
                f"groups: expected at most {r} resolutions for images of {shape[0]}x{shape[1]}, got "
                f"{len(groups)}; "
                f"resolution {r} cannot halve {height}x{width}"
            )
        sizes.append((height // 2, width // 2))
    return sizes


class MapFeatures(nn.Module):
    """Flat images to (d_1, …, d_N), maps of ``channels`` features, finest first."""

    def __init__(
        self,
        shape: tuple[int, ...],
        groups: Sequence[int],
        channels: int,
        center: nn.Module,
        small: Sequence[bool],
        cell: dict[str, Any],
    ) -> None:
        super().__init__()
        self.shape, self.groups, self.center = shape, tuple(groups), center
        self.stem = Conv(1, channels)
        self.halvings = nn.ModuleList(Conv(channels, channels, stride=2) for _ in groups[1:])
        self.cells = nn.ModuleList(
            ConvCell(channels, channels, small=small[r], **cell)
            for r, n in enumerate(groups)
            for _ in range(n)
        )

    def forward(self, y: Tensor) -> list[Tensor]:
        x = self.stem(self.center(y, self.stem.weight.dtype).unflatten(-1, (1, *self.shape)))
        seen: list[Tensor] = []
        for r, count in enumerate(self.groups):
            x = x if r == 0 else self.halvings[r - 1](x)
            for _ in range(count):
                x = self.cells[len(seen)](x)
                seen.append(x)
        return seen


class MapPath(nn.Module):
    """h ← cell(h + W z_l), doubled in size before a finer resolution (abstract)."""

    def __init__(self, latent: int, channels: int, doubles: bool, cell: dict[str, Any]) -> None:
        super().__init__()
        self.doubles = doubles
        self.inwards = Conv(latent, channels, 1)
        self.cell = ConvCell(channels, channels, **cell)

    def move(self, state: Tensor, z: Tensor) -> Tensor:
        new = self.cell(state + self.inwards(z))
        return doubled(new) if self.doubles else new


class MapLink(MapPath):
    """p(z_l | h) = N(μ, diag s²) of a cell on h, and the path after z_l."""

    def __init__(self, latent: int, channels: int, doubles: bool, cell: dict[str, Any]) -> None:
        super().__init__(latent, channels, doubles, cell)
        self.head = ConvCell(channels, 2 * latent, **cell)

    def forward(self, state: Tensor) -> dist.TorchDistribution:
        loc, raw = self.head(state).chunk(2, -3)
        return dist.Normal(loc, bounded(raw, LOG_SCALE).exp()).to_event(3)


class TopMap(MapPath):
    """p(z_N) over maps of ``size`` [c, H, W] as one vector, and the start of the path from them."""

    def __init__(
        self, prior: priors.Prior, size: tuple[int, ...], channels: int, doubles: bool, cell: dict[str, Any]
    ) -> None:
        super().__init__(size[0], channels, doubles, cell)
        self.prior, self.size, self.out = prior, size, prior.dims
        self.start = nn.Parameter(torch.zeros(channels, *size[1:]))

    def forward(self) -> dist.TorchDistribution:
        return self.prior()

    def move(self, state: None, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().move(self.start, z.unflatten(-1, self.size))


class TopMerge(nn.Module):
    """q(z_N | d) = N(Δ, r²) over the maps as one vector, Δ and ln r from a cell on d_N, initially near 0."""

    def __init__(self, latent: int, channels: int, cell: dict[str, Any]) -> None:
        super().__init__()
        self.seen = Conv(channels, channels, 1)
        self.cell = ConvCell(channels, channels, **cell)
        self.head = Conv(channels, 2 * latent, 1)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, state: None, seen: Tensor, p: Any) -> dist.TorchDistribution:
        return normal(self.head(self.cell(self.seen(seen))).flatten(-3))


class MapMerge(TopMerge):
    """q(z_l | h, d) = N(μ_p + s_p·Δ, (s_p·r)²), Δ and ln r from a cell on h and d."""

    def __init__(self, latent: int, channels: int, cell: dict[str, Any]) -> None:
        super().__init__(latent, channels, cell)
        self.path = Conv(channels, channels, 1)

    def forward(self, state: Tensor, seen: Tensor, p: Any) -> dist.TorchDistribution:  # type: ignore[override]
        shift, raw = self.head(self.cell(self.seen(seen) + self.path(state))).chunk(2, -3)
        base = p.base_dist
        return dist.Normal(
            base.loc + base.scale * shift, base.scale * bounded(raw, LOG_SCALE).exp()
        ).to_event(3)


class _Image(nn.Module):
    """Features [*, C, H, W] to the outputs of flat pixels, [*, H·W·per_pixel]."""

    def __init__(self, channels: int, pixels: Pixels, cell: dict[str, Any]) -> None:
        super().__init__()
        self.cell, self.head = ConvCell(channels, channels, **cell), Conv(channels, pixels.per_pixel, 1)

    def forward(self, state: Tensor) -> Tensor:
        return torch.movedim(self.head(self.cell(state)), -3, -1).flatten(-3)

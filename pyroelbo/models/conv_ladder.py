"""Convolutional ladders: many groups of latent maps at several resolutions, along one top-down path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo.models.markov import ImageChain, PixelLink, bounded
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import Conv, ConvCell
from pyroelbo.numerics import positive_count

__all__ = ["ConvLadder"]


class ConvLadder(ImageChain):
    """A ladder of latent maps: ``groups[r]`` of them at resolution 1/2^r, ``latent`` maps each; z_1 is the finest.

    Bottom-up, residual cells make features at each resolution, halved between them. Top-down, the path is an
    image of ``channels`` features: p(z_l | h) = N of a cell on h; h ← cell(h + z_l), doubled in size behind the
    last group of a resolution; q(z_l | h, d_l) = N(μ_p + s_p·Δ, (s_p·r)²) with Δ and ln r from a cell on h and
    d_l, almost zero at the start. Cells stand on the path with a gain of 1/√N.

    Data are flat images [B, H·W]; H and W must be even at every resolution but the coarsest. ValueError
    names the resolution that cannot be halved. Train with ``fit(..., clip_norm=..., skip_norm=...)``.

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
    ) -> None:
        if isinstance(shape, int) or len(shape) != 2:
            raise ValueError(f"shape takes (height, width), got {shape}")
        sizes = _resolutions(tuple(shape), groups)
        positive_count("latent", latent, "number of maps")
        positive_count("channels", channels, "number of maps")
        pixels = Pixels(math.prod(shape), likelihood, levels)
        where = [r for r, count in enumerate(groups) for _ in range(count)]  # the resolution of each layer
        cell = {"gain": len(where) ** -0.5, "dropout": dropout}
        small = [min(size) < 3 for size in sizes]

        def link(layer: int) -> nn.Module:
            r = where[layer]
            doubled = layer > 0 and where[layer - 1] != r
            kind = MapLink if layer + 1 < len(where) else TopMap
            return kind(sizes[r], latent, channels, doubled, {**cell, "small": small[r]})

        links = [link(layer) for layer in range(len(where))]
        super().__init__(
            links[-1],
            links[:-1],
            PixelLink(_Image(channels, pixels, cell), pixels),
            [
                MapMerge(latent, channels, layer + 1 < len(where), {**cell, "small": small[r]})
                for layer, r in enumerate(where)
            ],
            event=(pixels.dims,),
            order="top-down",
            features=_Features(tuple(shape), groups, channels, pixels.center(), small, cell),
        )
        self.shape = tuple(shape)

    @classmethod
    def for_data(cls, train: Tensor | None, shape: Sequence[int], levels: int, **settings) -> ConvLadder:
        return cls(shape, levels=levels, **settings)


def _resolutions(shape: tuple[int, ...], groups: Sequence[int]) -> list[tuple[int, ...]]:
    """The sizes at each resolution; ValueError, naming the one that cannot be halved."""
    if not groups or any(isinstance(g, bool) or not isinstance(g, int) or g < 1 for g in groups):
        raise ValueError(f"groups takes a positive number of groups for each resolution, got {tuple(groups)}")
    sizes = [shape]
    for r in range(1, len(groups)):
        height, width = sizes[-1]
        if height % 2 or width % 2:
            raise ValueError(
                f"resolution {r}: images of {height}x{width} (from {shape[0]}x{shape[1]}) cannot be halved for it: "
                f"groups={tuple(groups)} asks for {len(groups)} resolutions, at most {r} fit"
            )
        sizes.append((height // 2, width // 2))
    return sizes


class _Features(nn.Module):
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
        x = self.stem(self.center(y).unflatten(-1, (1, *self.shape)))
        seen: list[Tensor] = []
        for r, count in enumerate(self.groups):
            x = x if r == 0 else self.halvings[r - 1](x)
            for _ in range(count):
                x = self.cells[len(seen)](x)
                seen.append(x)
        return seen


class MapLink(nn.Module):
    """p(z_l | h) = N of a cell on h, and h ← cell(h + W z_l), doubled in size where the next link is finer."""

    def __init__(
        self, size: tuple[int, ...], latent: int, channels: int, doubled: bool, cell: dict[str, Any]
    ) -> None:
        super().__init__()
        self.doubled = doubled
        self.head = ConvCell(channels, 2 * latent, **cell)
        self.inwards = Conv(latent, channels, 1)
        self.cell = ConvCell(channels, channels, **cell)

    def forward(self, state: Tensor) -> dist.TorchDistribution:
        return maps(self.head(state))

    def move(self, state: Tensor | None, z: Tensor) -> Tensor:
        inwards = self.inwards(z)
        new = self.cell(inwards if state is None else state + inwards)
        if not self.doubled:
            return new
        flat = F.interpolate(new.reshape(-1, *new.shape[-3:]), scale_factor=2.0, mode="nearest")
        return flat.reshape(*new.shape[:-3], *flat.shape[1:])


class TopMap(MapLink):
    """p(z_N) = N(0, I) over maps, and the path that begins with them."""

    def __init__(
        self, size: tuple[int, ...], latent: int, channels: int, doubled: bool, cell: dict[str, Any]
    ) -> None:
        super().__init__(size, latent, channels, doubled, cell)
        del self.head
        self.register_buffer("loc", torch.zeros(latent, *size))
        self.start = nn.Parameter(torch.zeros(channels, *size))

    def forward(self, state: None = None) -> dist.TorchDistribution:
        return dist.Normal(self.loc, 1.0).to_event(3)

    def move(self, state: Tensor | None, z: Tensor) -> Tensor:
        return super().move(self.start, z)


class MapMerge(nn.Module):
    """q(z_l | h, d) = N(μ_p + s_p·Δ, (s_p·r)²), Δ and ln r from a cell on both; at the top there is no h."""

    def __init__(self, latent: int, channels: int, path: bool, cell: dict[str, Any]) -> None:
        super().__init__()
        self.seen = Conv(channels, channels, 1)
        self.path = Conv(channels, channels, 1) if path else None
        self.cell = ConvCell(channels, channels, **cell)
        self.head = Conv(channels, 2 * latent, 1)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, state: Tensor | None, seen: Tensor, p: Any) -> dist.TorchDistribution:
        both = self.seen(seen) if self.path is None else self.seen(seen) + self.path(state)
        shift, raw = self.head(self.cell(both)).chunk(2, -3)
        base = p.base_dist
        return dist.Normal(base.loc + base.scale * shift, base.scale * bounded(raw).exp()).to_event(3)


def maps(x: Tensor) -> dist.TorchDistribution:
    """N(μ, diag s²) over maps from x = (μ, r) [*, 2c, H, W], event shape [c, H, W]."""
    loc, raw = x.chunk(2, -3)
    return dist.Normal(loc, bounded(raw).exp()).to_event(3)


class _Image(nn.Module):
    """Features [*, C, H, W] to the numbers of flat pixels, [*, H·W·per pixel]."""

    def __init__(self, channels: int, pixels: Pixels, cell: dict[str, Any]) -> None:
        super().__init__()
        self.cell, self.head = ConvCell(channels, channels, **cell), Conv(channels, pixels.per_pixel, 1)

    def forward(self, state: Tensor) -> Tensor:
        return torch.movedim(self.head(self.cell(state)), -3, -1).flatten(-3)

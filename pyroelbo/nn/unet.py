"""A UNet of images with a time: residual blocks at several resolutions, attention at the coarsest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroelbo.nn.denoisers import Attend, Condition, start_small
from pyroelbo.numerics import positive_count

__all__ = ["UNet"]


class UNet(nn.Module):
    """Flat images z [*, H·W] at times [*] in [0, 1] to [*, H·W, outputs].

    Each resolution has ``layers`` residual blocks down and ``layers`` + 1 up, joined by skip connections;
    blocks are shifted by features of the time, and of the label if there are
    ``classes``; the coarsest resolution attends over all its places. Halving
    is a strided convolution, doubling the nearest neighbour and a convolution. Outputs start near 0.

    Args:
        shape: (height, width).
        outputs: numbers per pixel.
        width: channels at full resolution.
        layers: residual blocks of each resolution.
        dropout: probability of dropout in the blocks.
        growth: channels of each resolution, in units of ``width``, full resolution first.
        classes: number of labels, if it is told one beside the time.

    Raises ValueError for sides that cannot be halved ``len(growth)`` - 1 times.

    Source: Ronneberger, Fischer and Brox (2015); Ho, Jain and Abbeel (2020), appendix B.
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int = 1,
        width: int = 32,
        layers: int = 1,
        dropout: float = 0.0,
        growth: Sequence[int] = (1, 2, 2),
        classes: int | None = None,
    ) -> None:
        super().__init__()
        positive_count("layers", layers, "number of blocks")
        if len(shape) != 2:
            raise ValueError(f"shape: expected (height, width) for a UNet, got {tuple(shape)}")
        halvings = len(growth) - 1
        if any(side % 2**halvings or side < 2**halvings for side in shape):
            raise ValueError(
                f"shape: expected sides that are multiples of {2**halvings}, to be halved {halvings} times, "
                f"got {tuple(shape)}: pad the images, or give fewer entries of growth"
            )
        positive_count("width", width, "number of channels")
        if width % 4:
            raise ValueError(f"width: expected a multiple of 4, the attention's heads, got {width}")
        self.shape, self.condition = tuple(shape), Condition(True, classes)
        time = 4 * width
        self.when = nn.Sequential(
            nn.Linear(self.condition.size, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU()
        )
        self.inwards = nn.Conv2d(1, width, 3, padding=1)
        sizes, kept = [g * width for g in growth], [width]
        self.downwards, self.coarser = nn.ModuleList(), nn.ModuleList()
        channels = width
        for i, size in enumerate(sizes):
            blocks = nn.ModuleList()
            for _ in range(layers):
                blocks.append(_Block(channels, size, time, dropout))
                channels = size
                kept.append(size)
            self.downwards.append(blocks)
            if i < halvings:
                self.coarser.append(nn.Conv2d(size, size, 3, stride=2, padding=1))
                kept.append(size)
        self.middle = nn.ModuleList(_Block(channels, channels, time, dropout) for _ in range(2))
        self.attend = Attend(channels, dropout=dropout)
        self.upwards, self.finer = nn.ModuleList(), nn.ModuleList()
        for i, size in enumerate(reversed(sizes)):
            blocks = nn.ModuleList()
            for _ in range(layers + 1):
                blocks.append(_Block(channels + kept.pop(), size, time, dropout))
                channels = size
            self.upwards.append(blocks)
            if i < halvings:
                self.finer.append(
                    nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(size, size, 3, padding=1))
                )
        self.norm, self.outwards = nn.GroupNorm(1, channels), nn.Conv2d(channels, outputs, 3, padding=1)
        start_small(self.outwards)

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        when = (
            self.when(self.condition(time, labels))
            .expand(*z.shape[:-1], -1)
            .reshape(math.prod(z.shape[:-1]), -1)
        )
        x = self.inwards(z.reshape(-1, 1, *self.shape))
        kept = [x]
        for i, blocks in enumerate(self.downwards):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, when)
                kept.append(x)
            if i < len(self.coarser):
                x = self.coarser[i](x)
                kept.append(x)
        x = self.middle[0](x, when)
        x = self.attend(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(-1, x.shape[-2:])
        x = self.middle[1](x, when)
        for i, blocks in enumerate(self.upwards):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(torch.cat([x, kept.pop()], 1), when)
            if i < len(self.finer):
                x = self.finer[i](x)
        out = self.outwards(nn.functional.silu(self.norm(x)))
        return out.flatten(2).transpose(1, 2).reshape(*z.shape, -1)


class _Block(nn.Module):
    def __init__(self, a: int, b: int, time: int, dropout: float) -> None:
        super().__init__()
        self.before, self.between = nn.GroupNorm(1, a), nn.GroupNorm(1, b)
        self.first, self.last = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, b, 3, padding=1)
        self.when, self.dropout = nn.Linear(time, 2 * b), nn.Dropout(dropout)
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        start_small(self.last)

    def forward(self, x: Tensor, when: Tensor) -> Tensor:
        act = nn.functional.silu
        scale, shift = self.when(when)[..., None, None].chunk(2, 1)
        hidden = self.between(self.first(act(self.before(x)))) * (1 + scale) + shift
        return self.skip(x) + self.last(self.dropout(act(hidden)))

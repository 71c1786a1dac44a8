"""The discrete latents of a datum as one vector of integers, and proposals that change one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.layout import LatentSite

__all__ = ["Lattice", "is_discrete"]


def is_discrete(site: LatentSite) -> bool:
    return site.num_values is not None or site.support is None or site.support.is_discrete


class Lattice:
    """Maps the discrete latents {site: [K, *plates, B, *event]} to k [K, B, D], LongTensor, and back.

    A one-hot vector is one coordinate, the place of its one. ``moves`` is the number of coordinates that
    :meth:`propose` may change: those with at least two values that can be combined with any others (labels of
    a chain can, the cells of a parse chart cannot).
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self._sites: dict[str, tuple[torch.Size, int, int | None]] = {}
        self._types: dict[str, torch.dtype] = {}
        starts: list[int] = []
        sizes: list[int] = []
        movable: list[int] = []
        self.dims = 0
        for name, site in evaluator.latents.items():
            if not is_discrete(site):
                continue
            shape = torch.Size((*site.plate_shape, *site.event_shape))
            start, size = _range(site.support) if site.free else (0, 1)
            values = None
            if _base(site.support) is constraints.one_hot:
                shape, values, start = shape[:-1], shape[-1], 0
                size = values if site.free else 1
            self._sites[name] = shape, len(site.plate_shape), values
            count = shape.numel()
            starts += [start] * count
            sizes += [size] * count
            if size != 1:
                movable += range(self.dims, self.dims + count)
            self.dims += count
        self._start, self._size, self._movable = (
            torch.tensor(x, dtype=torch.long) for x in (starts, sizes, movable)
        )
        self.moves = len(movable)

    def to_vector(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents to k [K, B, D]."""
        pieces = []
        for name, (_, plates, values) in self._sites.items():
            value = latents[name].movedim(1 + plates, 1)
            self._types[name] = value.dtype
            value = value if values is None else value.argmax(-1)
            pieces.append(value.reshape(*value.shape[:2], -1).long())
        if pieces:
            return torch.cat(pieces, -1)
        name, value = next(iter(latents.items()))
        plates = len(self._evaluator.latents[name].plate_shape)
        return torch.zeros(len(value), value.shape[1 + plates], 0, dtype=torch.long, device=value.device)

    def to_latents(self, k: Tensor) -> dict[str, Tensor]:
        """k [K, B, D] to latents, in their own dtypes."""
        latents, start = {}, 0
        for name, (shape, plates, values) in self._sites.items():
            piece = k[..., start : start + shape.numel()].reshape(*k.shape[:-1], *shape)
            if values is not None:  # by comparison, which reads no value and can be recorded
                piece = piece[..., None] == torch.arange(values, device=piece.device)
            start += shape.numel()
            latents[name] = piece.movedim(1, 1 + plates).to(self._types[name])
        return latents

    def propose(self, k: Tensor) -> Tensor:
        """k with one random coordinate of each particle changed: to another of finitely many values,
        uniformly, or, if there is no last value, up or down by 1, 2, 4, 8 or 16.

        Symmetric: the move back has the same probability. Steps below the first value stay.
        """
        shape = (*k.shape[:-1], 1)
        start, size, movable = (x.to(k.device) for x in (self._start, self._size, self._movable))
        index = movable[torch.randint(self.moves, shape, device=k.device)]
        start, size, value = start[index], size[index], k.gather(-1, index)
        other = 1 + (torch.rand(shape, device=k.device) * (size - 1).clamp_min(1)).long()
        other = other.minimum((size - 1).clamp_min(1))
        cyclic = start + (value - start + other) % size.clamp_min(1)
        sign = 2 * torch.randint(2, shape, device=k.device) - 1
        walk = value + sign * 2 ** torch.randint(5, shape, device=k.device)
        walk = torch.where(walk < start, value, walk)
        return k.scatter(-1, index, torch.where(size > 0, cyclic, walk))


def _base(support: Any) -> Any:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _range(support: Any) -> tuple[int, int]:
    """First value and number of values of each coordinate: 0 if there is no last value, 1 if it must not be
    changed."""
    support = _base(support)
    if support is constraints.boolean:
        return 0, 2
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is None or not support.is_discrete:
        return 0, 1
    low = torch.as_tensor(low).reshape(-1)
    high = None if high is None else torch.as_tensor(high).reshape(-1)
    if bool((low != low[0]).any()) or (high is not None and bool((high != high[0]).any())):
        return 0, 1
    return int(low[0]), 0 if high is None else int(high[0] - low[0]) + 1

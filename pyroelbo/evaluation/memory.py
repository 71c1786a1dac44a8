"""How much one pass over particles and data may hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["LargestTensor", "cells", "cut"]

# Bytes of the largest intermediate tensor of one pass; a pass holds a few tensors of that size.
BUDGET = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest floating tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


def cells(elements: float, device: torch.device, dtype: torch.dtype) -> int:
    """Number of (particle, datum) pairs in one pass, if each takes ``elements`` numbers of the largest
    tensor."""
    numbers = BUDGET.get(device.type, BUDGET["cpu"]) // dtype.itemsize
    return max(1, int(numbers / elements))


def cut(particles: int, size: int, cells: int, sliceable: bool) -> Iterator[tuple[slice, int]]:
    """Cut [particles, B] into passes ``(rows, particles)`` of at most ``cells`` pairs; rows are the outer
    loop.

    A batch that is not ``sliceable`` keeps all its rows in every pass.
    """
    rows = max(1, min(size, cells // max(1, min(particles, cells)))) if sliceable else size
    step = max(1, min(particles, cells // rows))
    for start in range(0, size, rows):
        for done in range(0, particles, step):
            yield slice(start, min(start + rows, size)), min(step, particles - done)

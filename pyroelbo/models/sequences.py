"""Padded sequences: which steps count, and evaluation in groups of similar length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["captured", "check_lengths", "each_group", "unpadded", "within"]

_WASTE = 0.1  # padding allowed in a group, relative to its steps
_STEPS = 2000  # padding that costs less than another group


def captured() -> bool:
    """Whether operations are watched, as they are while a graph is captured: then no shape may depend on
    lengths."""
    return torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack() > 0


def within(x: Tensor, lengths: Tensor | None) -> Tensor:
    """BoolTensor [B, T]: which steps of x [B, T, ...] lie within their sequences; all of them without
    ``lengths``."""
    time = torch.arange(x.shape[1], device=x.device)
    return (time < (len(time) if lengths is None else lengths[:, None])).expand(x.shape[:2])


def check_lengths(lengths: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless there is one length in [1, T] for each sequence of x [B, T, ...]."""
    if lengths is None:
        return
    if lengths.shape != x.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"lengths: expected {len(x)} integers, one per sequence, got {lengths.dtype} of shape "
            f"{tuple(lengths.shape)}"
        )
    if captured():  # the structures check them again
        return
    bad = (lengths < 1) | (lengths > x.shape[1])
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"lengths: expected integers in [1, {x.shape[1]}], got {int(lengths[row])} at index [{row}]"
        )


def each_group(
    run: Callable[[Tensor, Tensor | None, Tensor], tuple[Tensor, dict[str, Any]]],
    y: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, dict[str, Any]]:
    """``run(y, lengths, rows)`` on groups of sequences of similar length without their common padding: the
    values [*R, B] in the order of ``y``, and the sum of the statistics.

    The cost is that of the sequences, not that of the padded rectangle, which captured graphs keep.
    """
    if lengths is None or captured():
        return run(y, lengths, torch.arange(len(y), device=y.device))
    parts, total, order = [], None, []
    for rows, longest in _groups(lengths):
        value, found = run(y[rows, :longest], lengths[rows], rows)
        parts.append(value)
        order.append(rows)
        total = found if total is None else {k: total[k] + v for k, v in found.items()}
    assert total is not None
    return torch.cat(parts, -1)[..., torch.cat(order).argsort()], total


def unpadded(y: Tensor, lengths: Tensor | None = None) -> list[tuple[Tensor, ...]]:
    """The batch in groups of sequences of similar length, each cut to its longest."""
    if lengths is None:
        return [(y,)]
    return [(y[rows, :longest], lengths[rows]) for rows, longest in _groups(lengths)]


def _groups(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of similar length with the longest of each group, split where padding would cost more than a new
    group."""
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    cuts, first, steps = [], 0, 0
    for i, size in enumerate(sizes):
        waste = sizes[first] * (i + 1 - first) - steps - size
        if waste > max(_WASTE * (steps + size), _STEPS):
            cuts.append(i)
            first, steps = i, 0
        steps += size
    return list(zip(order.tensor_split(cuts), (sizes[i] for i in [0, *cuts]), strict=True))

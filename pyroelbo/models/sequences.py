"""Padded sequences: which steps count, and evaluation in groups of similar length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["captured", "check_lengths", "each_group", "within"]

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
    order = lengths.argsort(descending=True, stable=True)
    parts, total = [], None
    for rows in _groups(order, lengths[order].tolist()):
        longest = int(lengths[rows[0]])
        value, found = run(y[rows, :longest], lengths[rows], rows)
        parts.append(value)
        total = found if total is None else {k: total[k] + v for k, v in found.items()}
    assert total is not None
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(parts, -1)[..., back], total


def _groups(order: Tensor, lengths: list[int]) -> list[Tensor]:
    """Successive rows of ``order``, whose ``lengths`` fall, split where padding would cost more than a new
    group."""
    cuts, first, steps = [], 0, 0
    for i, length in enumerate(lengths):
        waste = lengths[first] * (i + 1 - first) - steps - length
        if waste > max(_WASTE * (steps + length), _STEPS):
            cuts.append(i)
            first, steps = i, 0
        steps += length
    return list(order.tensor_split(cuts))

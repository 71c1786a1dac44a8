"""Checks of the arguments of structures, with messages that name the argument and the first bad index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["check_finite_or_minus_inf", "check_integers", "check_lengths", "first_index", "refuse_outside"]


def first_index(bad: Tensor) -> str:
    """The first true entry of ``bad``, as an index to print in an error."""
    return str(tuple(bad.nonzero()[0].tolist()))


def check_finite_or_minus_inf(**arguments: Tensor) -> None:
    """Refuse NaN and +inf among log potentials or logits, naming the argument and the offending index; and integers."""
    for name, value in arguments.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} is of dtype {value.dtype}: it takes floating-point numbers")
    # a sum is one pass without a temporary; only where it looks bad are the numbers looked at one by one
    total = 0.0
    for value in arguments.values():
        total += value.sum().item()
    if total < math.inf:
        return
    for name, value in arguments.items():
        bad = value.isnan() | (value == math.inf)
        if bad.any():
            got, index = value[bad][0].item(), first_index(bad)
            raise ValueError(f"{name} has {got} at index {index}: it takes finite numbers and -inf")


def check_integers(name: str, value: Tensor) -> None:
    """Refuse labels or lengths of another kind."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} is of dtype {value.dtype}: it takes integers")


def check_lengths(lengths: Tensor, longest: int) -> None:
    """Refuse lengths outside 1..longest, naming the offending index."""
    check_integers("lengths", lengths)
    bad = (lengths < 1) | (lengths > longest)
    if bad.any():
        raise ValueError(
            f"lengths has {lengths[bad][0].item()} at index {first_index(bad)}: "
            f"it takes integers from 1 to {longest}"
        )


def refuse_outside(value: Tensor, bad: Tensor, event: int, where: str) -> None:
    """ValueError for the first value that ``bad``, which broadcasts against its batch dimensions, marks."""
    shape = torch.broadcast_shapes(bad.shape, value.shape[: value.dim() - event])
    bad, value = bad.expand(shape), value.expand(shape + value.shape[value.dim() - event :])
    if bool(bad.any()):
        raise ValueError(f"y has {value[bad][0].tolist()} at index {first_index(bad)}: outside {where}")

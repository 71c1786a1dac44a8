"""Checks of arguments. Messages name the argument, what it expects, what it got, and the first bad index."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "check_finite_or_minus_inf",
    "check_index",
    "check_integers",
    "check_lengths",
    "first_index",
    "refuse_outside",
    "refuse_transforms",
]


def first_index(bad: Tensor) -> str:
    """The index of the first true entry of ``bad``, as printed in an error."""
    return str(bad.nonzero()[0].tolist())


def check_finite_or_minus_inf(**arguments: Tensor) -> None:
    """Refuse integers, NaN and +inf among log potentials or logits."""
    for name, value in arguments.items():
        if not value.is_floating_point():
            raise ValueError(f"{name}: expected floating-point numbers, got dtype {value.dtype}")
    # a sum is one pass without a temporary; entries are checked one by one only if it is not finite
    total = 0.0
    for value in arguments.values():
        total += value.sum().item()
    if total < math.inf:
        return
    for name, value in arguments.items():
        bad = value.isnan() | (value == math.inf)
        if bad.any():
            got, index = value[bad][0].item(), first_index(bad)
            raise ValueError(f"{name}: expected finite numbers or -inf, got {got} at index {index}")


def check_integers(name: str, value: Tensor) -> None:
    """Refuse labels or lengths that are not integers."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: expected integers, got dtype {value.dtype}")


def check_index(name: str, index: Tensor, low: int, high: int) -> None:
    """Refuse integers outside [low, high], naming the first one."""
    bad = (index < low) | (index > high)
    if bad.any():
        got = index[bad][0].item()
        raise ValueError(
            f"{name}: expected integers in [{low}, {high}], got {got} at index {first_index(bad)}"
        )


def check_lengths(lengths: Tensor, longest: int) -> None:
    """Refuse lengths that are no integers in [1, longest]."""
    check_integers("lengths", lengths)
    check_index("lengths", lengths, 1, longest)


def refuse_outside(value: Tensor, bad: Tensor, event: int, where: str) -> None:
    """Raise ValueError for the first value with ``bad``, which broadcasts against the batch dimensions of
    ``value``.
    """
    shape = torch.broadcast_shapes(bad.shape, value.shape[: value.dim() - event])
    bad, value = bad.expand(shape), value.expand(shape + value.shape[value.dim() - event :])
    if bool(bad.any()):
        raise ValueError(
            f"y: expected values in {where}, got {value[bad][0].tolist()} at index {first_index(bad)}"
        )


def refuse_transforms(**arguments: Tensor) -> None:
    """Refuse tensors inside torch.func transforms and forward-mode derivatives, which kernels cannot read."""
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return
    for name, value in arguments.items():
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None
        if wrapped or dual:
            raise NotImplementedError(
                f"{name}: expected a plain tensor, got one inside torch.func (vmap, grad, ...); give the "
                "distribution a batch dimension instead of vmap, and use torch.autograd"
            )

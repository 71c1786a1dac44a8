"""Sums of exponentials that are right at minus infinity, units of information, and counts."""

from __future__ import annotations

import math
import operator
import re
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "agree",
    "bits_per_dim",
    "duration",
    "effective_sample_size",
    "holds_float64",
    "image_shape",
    "log_mean_exp",
    "log_softmax",
    "logsumexp",
    "nats_to_bits",
    "positive_count",
    "positive_shape",
    "whole_number",
]


_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


def duration(text: str, name: str = "budget") -> float:
    """Seconds of a time such as ``"90s"``, ``"10min"`` or ``"2h"``; ValueError, naming the argument, for
    anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text) if isinstance(text, str) else None
    if found is None or found[2] not in _SECONDS or float(found[1]) == 0:
        raise ValueError(f"{name}: expected a time such as '90s', '10min' or '2h', got {text!r}")
    return float(found[1]) * _SECONDS[found[2]]


def holds_float64(device: torch.device) -> bool:
    """Whether tensors on a device can be float64 (those on Apple's GPUs cannot)."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def positive_count(name: str, value: Any, what: str = "number") -> int:
    """``value`` if it is a positive integer; ValueError, naming the argument, otherwise."""
    if not _is_whole(value, 1):
        raise ValueError(f"{name}: expected a positive {what}, got {value!r}")
    return value


def whole_number(name: str, value: Any, least: int, what: str) -> int:
    """``value`` if it is an integer of at least ``least``; ValueError, naming the argument, otherwise."""
    if not _is_whole(value, least):
        raise ValueError(f"{name}: expected a whole number of at least {least} {what}, got {value!r}")
    return value


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def positive_shape(shape: Any) -> tuple[int, ...]:
    """The shape of a datum, a number of coordinates or the sides of an image, as a tuple; ValueError unless
    it is of positive integers."""
    try:
        found = tuple(operator.index(s) for s in ((shape,) if isinstance(shape, Integral) else shape))
    except TypeError:
        found = ()
    if not found or isinstance(shape, bool) or min(found) < 1:
        raise ValueError(f"shape: expected a positive number of coordinates, or sides, got {shape!r}")
    return found


def image_shape(shape: Any) -> tuple[int, ...]:
    """:func:`positive_shape` of an image, (height, width); ValueError for other numbers of sides."""
    found = positive_shape(shape)
    if len(found) != 2:
        raise ValueError(f"shape: expected (height, width), got {shape}")
    return found


def logsumexp(x: Tensor, dim: int | tuple[int, ...] = -1, keepdim: bool = False) -> Tensor:
    """ln Σ exp(x) over ``dim``: where every term is -inf the value is -inf and the gradient is zero.

    ``torch.logsumexp`` has NaN gradients there, which spread through a dynamic program even if the cell is
    not used. The gradient elsewhere is the softmax; NaN in gives NaN out. Cost: O(x.numel()).
    """
    peak = x.detach().amax(dim, keepdim=True)
    peak = torch.where(peak.isinf(), torch.zeros_like(peak), peak)
    total = (x - peak).exp().sum(dim, keepdim=True)
    empty = total == 0
    value = torch.where(empty, total.new_tensor(-math.inf), torch.where(empty, 1.0, total).log() + peak)
    return value if keepdim else value.squeeze(dim)


def log_softmax(logits: Tensor) -> Tensor:
    """Log softmax over the last dimension, uniform for a row of -inf."""
    dead = (logits == -math.inf).all(-1, keepdim=True)
    return torch.where(dead, torch.zeros_like(logits), logits).log_softmax(-1)


def log_mean_exp(log_w: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """ln (1/K) Σ_k w_k over ``dim`` and its standard error, both in nats.

    The standard error is the delta method's, sd(w) / (√K · mean(w)); it is NaN for K = 1 and where all
    weights are zero. Weights are scaled by their maximum first, so they may have any size.

    Source: Owen (2013), *Monte Carlo theory, methods and examples*, section 2.8.
    """
    count = log_w.shape[dim]
    value = logsumexp(log_w, dim) - math.log(count)
    if count == 1:
        return value, torch.full_like(value, math.nan)
    ratio = (log_w - value.unsqueeze(dim)).exp()
    return value, ratio.std(dim) / math.sqrt(count)


def effective_sample_size(log_w: Tensor, dim: int = 0) -> Tensor:
    """Kish's effective number of draws, (Σ w)² / Σ w², between 1 and K; NaN where all weights are zero."""
    return (2 * logsumexp(log_w, dim) - logsumexp(2 * log_w, dim)).exp()


def nats_to_bits(nats):
    """Nats to bits: division by ln 2, of tensors, arrays or numbers."""
    return nats / math.log(2.0)


def bits_per_dim(log_prob, dims: float):
    """-log₂ p per dimension, from ``log_prob`` in nats and the number of dimensions of one datum."""
    return -nats_to_bits(log_prob) / dims


def agree(a: Tensor, b: Tensor, rtol: float, atol: float) -> bool:
    """Whether two tensors are equal up to a tolerance, in the wider of their dtypes; NaN equals NaN."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return torch.allclose(a.to(wide), b.to(wide), rtol=rtol, atol=atol, equal_nan=True)

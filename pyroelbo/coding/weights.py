"""A pair's parameters as part of a code: their identity, and their size at low precision."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor

from pyroelbo.pair import Pair

__all__ = ["PRECISIONS", "fingerprint", "quantized", "size"]

PRECISIONS = ("float16", "int8")


def fingerprint(pair: Pair) -> str:
    """SHA-256 of all parameters and buffers, their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(pair.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def size(pair: Pair, precision: str | None = None) -> int:
    """Bytes of all parameters and buffers as they are, or at a ``precision`` of :func:`quantized`."""
    tensors = pair.state_dict().values()
    if precision is None:
        return sum(t.numel() * t.element_size() for t in tensors)
    return sum(_bytes(t, precision) for t in tensors)


@torch.no_grad()
def quantized(pair: Pair, precision: str) -> Pair:
    """A copy whose floating parameters and buffers are rounded to ``float16``, or matrices to ``int8`` with a
    float16 scale for each row and vectors to float16. Their dtype is kept."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {PRECISIONS}, got {precision!r}")
    rounded = copy.deepcopy(pair)
    for tensor in rounded.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(_int8(tensor) if _by_rows(tensor, precision) else tensor.half())
    return rounded


def _by_rows(tensor: Tensor, precision: str) -> bool:
    return precision == "int8" and tensor.dim() > 1


def _int8(tensor: Tensor) -> Tensor:
    rows = tensor.flatten(1)
    scale = (rows.abs().amax(-1, keepdim=True) / 127).half().to(rows).clamp_min(1e-7)
    return ((rows / scale).round().clamp(-127, 127) * scale).reshape(tensor.shape)


def _bytes(tensor: Tensor, precision: str) -> int:
    if not tensor.is_floating_point():
        return tensor.numel() * tensor.element_size()
    return tensor.numel() + 2 * len(tensor) if _by_rows(tensor, precision) else 2 * tensor.numel()

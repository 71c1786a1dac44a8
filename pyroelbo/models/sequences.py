"""What models of padded sequences and of Gaussian data ask of them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_dtype", "check_lengths", "within"]


def within(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which steps of x [B, T, ...] lie in their sequences, BoolTensor [B, T]: all of them without ``lengths``."""
    time = torch.arange(x.shape[1], device=x.device)
    return (time < (len(time) if lengths is None else lengths[:, None])).expand(x.shape[:2])


def check_lengths(lengths: Tensor | None, x: Tensor) -> None:
    """ValueError for lengths that are not one for each sequence of x [B, ...]."""
    if lengths is not None and lengths.shape != x.shape[:1]:
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}: it takes [{len(x)}]")


def check_dtype(y: Tensor, parameter: Tensor) -> None:
    """ValueError for data of another type than the parameters."""
    if y.dtype != parameter.dtype:
        raise ValueError(
            f"y is a {y.dtype} tensor and the parameters are {parameter.dtype}: convert one, y.to(dtype) or pair.to(dtype)"
        )

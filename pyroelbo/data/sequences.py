"""Lists of sequences as padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["sequences"]


def sequences(items: Sequence[Any], name: str = "items") -> tuple[Tensor, Tensor]:
    """A list of sequences [T_i, ...] of any lengths as one batch ``(y, lengths)``: y [B, T, ...] padded with
    the last step of each, lengths a LongTensor [B].

    ``items`` are tensors, arrays or lists of numbers, with the same shape after the first dimension; floats
    get torch's default dtype, integers and bools become int64. :class:`~pyroelbo.models.HMM` and
    :class:`~pyroelbo.models.StateSpace` accept the result as data, and evaluate sequences of similar length
    together, so that padding is not paid for in ``fit_em``, in evaluation, and in ``fit`` with
    ``objective="evidence"`` (``"elbo"`` draws padded paths). Raises ValueError, naming the item, for empty
    sequences and shapes that differ.
    """
    if isinstance(items, (str, bytes, Tensor, np.ndarray)) or not len(items):
        raise ValueError(f"{name}: expected a list of at least one sequence, got a {type(items).__name__}")
    rows = [_row(item, f"{name}[{i}]") for i, item in enumerate(items)]
    event = rows[0].shape[1:]
    for i, row in enumerate(rows):
        if row.shape[1:] != event:
            raise ValueError(
                f"{name}[{i}]: expected steps of shape {tuple(event)}, as {name}[0], got "
                f"{tuple(row.shape[1:])}"
            )
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    y = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row), *event)]) for row in rows])
    return y, lengths


def _row(item: Any, name: str) -> Tensor:
    try:
        row = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected a sequence of numbers, got {type(item).__name__}: {error}"
        ) from error
    if row.dim() == 0 or not len(row):
        raise ValueError(f"{name}: expected a sequence of at least one step, got shape {tuple(row.shape)}")
    return row.to(torch.get_default_dtype() if row.is_floating_point() else torch.int64)

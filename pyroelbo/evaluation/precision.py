"""Evaluation in float64, whatever the type of a pair's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyroelbo.batch import Batch
from pyroelbo.pair import Pair

__all__ = ["double", "in_double"]


class _DoubleParams(Messenger):
    """Casts the values of ``pyro.param`` statements."""

    def _pyro_post_param(self, msg: Any) -> None:
        if msg["value"] is not None and msg["value"].is_floating_point():
            msg["value"] = msg["value"].double()


@contextmanager
def in_double(pair: Pair) -> Iterator[None]:
    """Context manager in which the pair's parameters and buffers, and torch's default type, are float64.

    What is called exact may not cancel: float32 loses hundreds of nats where a covariance is nearly singular,
    or data lie far from zero. The numbers are rounded to float32 once, in the parameters, and never after.
    Parameters are restored bit for bit.
    """
    held = [t for t in (*pair.parameters(), *pair.buffers()) if t.is_floating_point()]
    saved = [(t, t.data) for t in held if t.dtype != torch.float64]
    before = torch.get_default_dtype()
    try:
        for tensor, data in saved:
            tensor.data = data.double()
        torch.set_default_dtype(torch.float64)
        with _DoubleParams():
            yield
    finally:
        torch.set_default_dtype(before)
        for tensor, data in saved:
            tensor.data = data


def double(batch: Batch) -> Batch:
    """The batch with its floating parts in float64."""

    def cast(part: Tensor) -> Tensor:
        return part.double() if part.is_floating_point() else part

    if isinstance(batch, dict):
        return {k: cast(v) for k, v in batch.items()}
    return tuple(map(cast, batch)) if isinstance(batch, tuple) else cast(batch)

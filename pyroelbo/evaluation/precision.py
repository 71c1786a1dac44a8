"""Evaluation in float64, whatever the type of a pair's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyroelbo import batch as batches
from pyroelbo import numerics
from pyroelbo.batch import Batch
from pyroelbo.pair import Pair

__all__ = ["double", "in_double"]


class _DoubleParams(Messenger):
    """Casts the values of ``pyro.param`` statements, on a device."""

    def __init__(self, place: torch.device) -> None:
        super().__init__()
        self.place = place

    def _pyro_post_param(self, msg: Any) -> None:
        if msg["value"] is not None:
            msg["value"] = _double(msg["value"].to(self.place))


@contextmanager
def in_double(pair: Pair) -> Iterator[torch.device]:
    """Context manager in which the pair's parameters and buffers, and torch's default type, are float64; it
    gives the device that they are on, the CPU if theirs has no float64.

    What is called exact may not cancel: float32 loses hundreds of nats where a covariance is nearly singular,
    or data lie far from zero. The numbers are rounded to float32 once, in the parameters, and never after.
    Parameters are restored bit for bit.
    """
    before, place = torch.get_default_dtype(), pair.device
    if numerics.holds_float64(place):
        exchange: Any = _doubled(pair)
    else:
        place = torch.device("cpu")
        exchange = _copied(pair, place)
    try:
        torch.set_default_dtype(torch.float64)
        with exchange, _DoubleParams(place):
            yield place
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _doubled(pair: Pair) -> Iterator[None]:
    """Context manager in which parameters and buffers hold float64."""
    held = [t for t in (*pair.parameters(), *pair.buffers()) if t.is_floating_point()]
    saved = [(t, t.data) for t in held if t.dtype != torch.float64]
    try:
        for tensor, data in saved:
            tensor.data = data.double()
        yield
    finally:
        for tensor, data in saved:
            tensor.data = data


@contextmanager
def _copied(pair: Pair, place: torch.device) -> Iterator[None]:
    """Context manager in which the modules hold copies of their parameters and buffers on another device."""
    saved = [
        (held, name, tensor)
        for module in pair.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    copies: dict[int, Tensor] = {}
    try:
        for held, name, tensor in saved:
            if id(tensor) not in copies:  # a tied parameter stays one
                copy = _double(tensor.detach().to(place))
                copies[id(tensor)] = nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy
            held[name] = copies[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for held, name, tensor in saved:
            held[name] = tensor  # type: ignore[assignment]


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def double(batch: Batch) -> Batch:
    """The batch with its floating parts in float64."""

    return batches.change(lambda part: part.double() if part.data.is_floating_point() else part, batch)

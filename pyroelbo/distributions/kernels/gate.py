"""The one gate through which compiled kernels are entered (needs numba).

Compiled code does not check indices: a length or label out of range would read and write foreign memory.
Python therefore calls a kernel only as a :class:`Kernel`, which passes it the memory of tensors, and each
kernel first states what it expects of its arguments, whatever the validation setting:

- ``expect_contiguous(...)``: C-contiguous arrays; checked when the kernel is compiled, free afterwards;
- ``expect_shapes(condition)``: sizes that match, O(1);
- ``expect_index(name, index, low, high)``: 64-bit integers in [low, high], O(size of the index).

A call costs about a microsecond more than without. With ``NUMBA_BOUNDSCHECK=1`` every single access is
checked, those by vectors included (see ``simd``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from numba import njit, types
from numba.core import event
from numba.core.errors import TypingError
from numba.extending import overload
from torch import Tensor

__all__ = [
    "REORDER",
    "Kernel",
    "compiled",
    "expect_contiguous",
    "expect_index",
    "expect_shapes",
    "inlined",
    "kernel",
]

# NaN and infinity keep their meaning; only the order of a sum is free
REORDER = frozenset({"contract", "reassoc", "nsz"})
compiled = njit(cache=True, fastmath=set(REORDER))
# for what is called at every step: a call costs tens of nanoseconds
inlined = njit(cache=True, fastmath=set(REORDER), forceinline=True)


class _Notice(event.Listener):
    """Tells, once in a process, that kernels are being compiled: the first call would else seem to hang."""

    told = False

    def on_start(self, event: Any) -> None:
        dispatcher = event.data["dispatcher"]
        if not self.told and dispatcher.py_func.__module__.startswith(__package__):
            self.told = True
            logging.getLogger(__package__).warning(
                "compiling kernels for their first use, which takes up to two minutes; later runs load them "
                "from NUMBA_CACHE_DIR or __pycache__"
            )

    def on_end(self, event: Any) -> None:
        pass


event.register("numba:compile", _Notice())


class Kernel:
    """A compiled function that Python may call, with tensors, NamedTuples of tensors, NumPy arrays and
    numbers.

    Raises ValueError, before anything is read or written, for an index out of range (naming the argument) and
    for arrays that do not match.
    """

    def __init__(self, function: Callable, fastmath: Any) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__
        self._run = njit(cache=True, fastmath=fastmath)(function)

    def __call__(self, *arguments: Any) -> Any:
        try:
            return self._run(*[_memory(x) for x in arguments])
        except ValueError as error:
            if len(error.args) == 5:
                name, low, high, got, at = error.args
                raise ValueError(
                    f"{name}: expected integers in [{low}, {high}], got {got} at index [{at}]"
                ) from None
            if not error.args:
                shapes = [tuple(x.shape) for x in arguments if hasattr(x, "shape")]
                raise ValueError(f"{self.name}: expected arrays of matching shapes, got {shapes}") from None
            raise


def kernel(function: Callable | None = None, *, fastmath: Any = REORDER) -> Any:
    """Decorator: compile a function, and let Python enter it through the gate."""
    if function is None:
        return functools.partial(kernel, fastmath=fastmath)
    return Kernel(function, fastmath if isinstance(fastmath, bool) else set(fastmath))


def _memory(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().numpy() if x.requires_grad else x.numpy()
    if isinstance(x, tuple):
        return type(x)._make(map(_memory, x))  # type: ignore[attr-defined]
    return x


def expect_contiguous(*arrays: Any) -> None:
    """Refuse to compile for arrays that are not C-contiguous; NamedTuples of arrays may be among them."""


@overload(expect_contiguous)
def _(*arrays):
    flat = arrays[0].types if len(arrays) == 1 and isinstance(arrays[0], types.BaseTuple) else arrays
    for x in flat:
        for part in x.types if isinstance(x, types.BaseTuple) else (x,):
            if not (isinstance(part, types.Array) and part.layout == "C"):
                raise TypingError(f"expected C-contiguous arrays, got {part}")
    return lambda *arrays: None


@compiled
def expect_shapes(condition):
    """Refuse arrays that do not match."""
    if not condition:
        raise ValueError


@compiled
def expect_index(name, index, low, high):
    """Refuse an array of 64-bit integers with an entry outside [low, high]."""
    flat = index.reshape(-1)
    for i in range(flat.size):
        if flat[i] < low or flat[i] > high:
            raise ValueError(name, low, high, flat[i], i)

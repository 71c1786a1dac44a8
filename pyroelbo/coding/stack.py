"""The stack of an entropy coder, and the protocol of what pushes onto it and pops off it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

__all__ = ["Codec", "Impossible", "Stack", "Underflow", "models"]

_LEAST = np.array([0, 1], np.uint32)  # the smallest stack that loses nothing when popped


class Underflow(RuntimeError):
    """More bits were popped than the stack held."""


class Impossible(ValueError):
    """A symbol of probability zero: its index in the array, ``place``, and its ``site`` and ``row`` in a
    chunk of data."""

    site: str | None = None
    row = 0

    def __init__(self, value: Any, place: tuple[int, ...]) -> None:
        super().__init__(f"expected values of positive probability, got {value:.6g} at index {place}")
        self.value, self.place = value, place


def models() -> Any:
    """``constriction.stream``; ImportError, with the remedy, without the package."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError("codes need constriction: pip install 'pyroelbo[coding]'") from error
    return constriction.stream


class Stack:
    """Bits, last in, first out: an ANS coder of 64-bit state and 24-bit probabilities (``constriction``).

    ``words`` are its initial content, uint32, the last one not zero and at least two of them; by default the
    smallest stack. :meth:`pop` is the exact inverse of :meth:`push` and the other way round, as long as the
    stack holds enough; :class:`Underflow` otherwise. ``lowest`` is the least number of bits that it held, and
    ``seconds`` the time spent in the coder.

    Source: Duda (2009); Bamler (2022) for the implementation.
    """

    def __init__(self, words: np.ndarray = _LEAST) -> None:
        if len(words) < 2 or words[-1] == 0:
            raise ValueError("words: expected at least two, the last one not zero")
        self._coder = models().stack.AnsCoder(np.ascontiguousarray(words, np.uint32))
        self.lowest, self.seconds = self.bits, 0.0

    @property
    def bits(self) -> int:
        return self._coder.num_valid_bits()

    def words(self) -> np.ndarray:
        """The whole content, from the bottom, as the constructor takes it."""
        return self._coder.get_compressed()

    def __len__(self) -> int:
        """The number of words."""
        return self._coder.num_words()

    def push(self, symbols: np.ndarray, model: Any, *parameters: np.ndarray) -> None:
        """Push an array of symbols, so that :meth:`pop` returns them in their order."""
        start = time.perf_counter()
        self._coder.encode_reverse(symbols, model, *parameters)
        self.seconds += time.perf_counter() - start

    def pop(self, model: Any, *parameters: np.ndarray) -> np.ndarray:
        """As many symbols as the parameters have rows."""
        start = time.perf_counter()
        symbols = self._coder.decode(model, *parameters)
        self.seconds += time.perf_counter() - start
        # a state that could not be refilled: the coder itself would go on with zeros
        if self._coder.num_words() < 2:
            raise Underflow("the stack holds too few bits")
        self.lowest = min(self.lowest, self.bits)
        return symbols


class Codec(ABC):
    """Turns values into bits on a stack and back.

    ``pop`` undoes ``push``: afterwards value and stack are what they were. Codecs are composed by pushing the
    parts of a value in the reverse of the order in which they are popped. Pushing costs -log₂ p(value) bits,
    p the codec's distribution, and popping from random bits draws a value from p.
    """

    @abstractmethod
    def push(self, stack: Stack, value: Any) -> None:
        """Raises :class:`Impossible` for a value of probability zero, before the stack is changed by it."""

    @abstractmethod
    def pop(self, stack: Stack) -> Any: ...

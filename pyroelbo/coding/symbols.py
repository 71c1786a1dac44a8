"""Codecs of independent integers: arrays of one distribution for each entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pyroelbo.coding.stack import Codec, Impossible, Stack, models

__all__ = ["Bernoullis", "Constants", "Counts", "Gaussians", "Tables", "Uniforms"]

_LEAST = 2.0**-24  # probability of any symbol in the coder


def _flat(x: np.ndarray, kind: type) -> np.ndarray:
    return np.ascontiguousarray(x.reshape(-1), kind)


def _refuse(value: np.ndarray, wrong: np.ndarray) -> None:
    """:class:`Impossible` at the first entry that is ``wrong``."""
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise Impossible(float(value[place]), place)


def _whole(value: np.ndarray, low: int, high: int) -> np.ndarray:
    """Integers in [low, high], as they are or as floating numbers; :class:`Impossible` for others."""
    _refuse(value, ~((value >= low) & (value <= high) & (value == np.floor(value))))
    return value.astype(np.int64)


class Constants(Codec):
    """Values that are known: no bits."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value

    def push(self, stack: Stack, value: np.ndarray) -> None:
        _refuse(value, value != self.value)

    def pop(self, stack: Stack) -> np.ndarray:
        return self.value


class Bernoullis(Codec):
    """0 or 1 with probabilities ``zero`` and ``one``, of any shape, which need not be normalized."""

    def __init__(self, zero: np.ndarray, one: np.ndarray) -> None:
        total = zero + one
        if not ((zero >= 0) & (one >= 0) & (total > 0) & np.isfinite(total)).all():  # NaN too
            raise ValueError("expected probabilities, got NaN, negative numbers, or both zero")
        # the coder would give 2^-24 to what is impossible, and nothing to what float64 rounds to zero
        self._free = (zero > 0) & (one > 0)
        self._sure = one > 0
        self._p = np.clip(one[self._free] / total[self._free], _LEAST, 1 - _LEAST)

    def push(self, stack: Stack, value: np.ndarray) -> None:
        symbols = _whole(value, 0, 1)
        _refuse(value, ~self._free & (symbols != self._sure))
        stack.push(_flat(symbols[self._free], np.int32), models().model.Bernoulli(perfect=False), self._p)

    def pop(self, stack: Stack) -> np.ndarray:
        value = self._sure.astype(np.int64)
        value[self._free] = stack.pop(models().model.Bernoulli(perfect=False), self._p)
        return value


class Tables(Codec):
    """``low`` + k with probability ``probs[..., k]``, [*, V]; rows need not be normalized."""

    def __init__(self, probs: np.ndarray, low: int = 0) -> None:
        if not (probs >= 0).all() or not np.isfinite(probs).all() or not probs.any(-1).all():
            raise ValueError("expected probabilities, got NaN, negative numbers, or none above zero")
        self.low, self.shape = low, probs.shape[:-1]
        self._probs = np.ascontiguousarray(probs.reshape(-1, probs.shape[-1]), np.float64)
        # the coder would give 2^-24 to what is impossible: rows are coded by what is possible in them
        self._possible = self._probs > 0
        self._order = None
        if not self._possible.all():
            self._order = np.argsort(~self._possible, axis=-1, kind="stable")
            self._probs = np.take_along_axis(self._probs, self._order, -1)

    def _groups(self) -> Iterator[tuple[Any, np.ndarray]]:
        """Rows with the same number of possible symbols, and their probabilities."""
        number = self._possible.sum(-1)
        for width in np.unique(number).tolist():
            if width > 1:
                at = slice(None) if self._order is None else np.flatnonzero(number == width)
                yield at, np.ascontiguousarray(self._probs[at, :width])

    def push(self, stack: Stack, value: np.ndarray) -> None:
        symbols = _whole(value, self.low, self.low + self._probs.shape[-1] - 1).reshape(-1) - self.low
        if self._order is not None:
            possible = np.take_along_axis(self._possible, symbols[:, None], -1)[:, 0]
            _refuse(value, ~possible.reshape(value.shape))
            symbols = np.take_along_axis(self._order.argsort(-1), symbols[:, None], -1)[:, 0]
        for at, probs in reversed(list(self._groups())):
            stack.push(_flat(symbols[at], np.int32), models().model.Categorical(perfect=False), probs)

    def pop(self, stack: Stack) -> np.ndarray:
        symbols = np.zeros(len(self._probs), np.int64)
        for at, probs in self._groups():
            symbols[at] = stack.pop(models().model.Categorical(perfect=False), probs)
        if self._order is not None:
            symbols = np.take_along_axis(self._order, symbols[:, None], -1)[:, 0]
        return self.low + symbols.reshape(self.shape)


class Uniforms(Codec):
    """0 … size - 1 with equal probabilities, ``size`` an array of numbers up to 2^24 - 1; 0 if that is 1."""

    def __init__(self, size: np.ndarray) -> None:
        self.size = size

    def push(self, stack: Stack, value: np.ndarray) -> None:
        _refuse(value, (value < 0) | (value >= self.size))
        free = self.size > 1
        stack.push(_flat(value[free], np.int32), models().model.Uniform(), _flat(self.size[free], np.int32))

    def pop(self, stack: Stack) -> np.ndarray:
        free = self.size > 1
        found = np.zeros(self.size.shape, np.int64)
        found[free] = stack.pop(models().model.Uniform(), _flat(self.size[free], np.int32))
        return found


class Counts(Codec):
    """0, 1, 2, … without end: the first ``V - 1`` from a table of probabilities [*, V], whose last column
    stands for all others; those follow in Elias's gamma code of what is beyond the table.

    Source: Elias (1975).
    """

    def __init__(self, probs: np.ndarray) -> None:
        self._table, self._beyond = Tables(probs), probs.shape[-1] - 1

    def push(self, stack: Stack, value: np.ndarray) -> None:
        value = _whole(value, 0, 2**53)
        for excess in reversed((value[value >= self._beyond] - self._beyond + 1).tolist()):
            digits = [int(d) for d in f"{excess:b}"]
            unary = [0] * (len(digits) - 1) + [1]
            self._coins(len(unary) + len(digits) - 1).push(stack, np.array(unary + digits[1:]))
        self._table.push(stack, np.minimum(value, self._beyond))

    def pop(self, stack: Stack) -> np.ndarray:
        value = self._table.pop(stack).astype(np.int64)
        for place in np.argwhere(value == self._beyond):
            length = 0
            while self._coins(1).pop(stack)[0] == 0:
                length += 1
            digits = self._coins(length).pop(stack)
            value[tuple(place)] += int("1" + "".join(map(str, digits)), 2) - 1
        return value

    @staticmethod
    def _coins(number: int) -> Bernoullis:
        return Bernoullis(np.ones(number), np.ones(number))


class Gaussians(Codec):
    """Integers of rounded Gaussians N(mean, std²), restricted to [low, high]; all four of one shape.

    Every integer of a range gets at least 2^-24. For a guide, whose draws are popped, that is too much: a
    draw far from the mean would spoil the datum's code. With ``narrow``, the range is therefore cut to about
    6 to 12 standard deviations on either side of the mean.
    """

    def __init__(
        self, mean: np.ndarray, std: np.ndarray, low: np.ndarray, high: np.ndarray, narrow: bool = False
    ) -> None:
        if not np.isfinite(mean).all() or not (np.isfinite(std) & (std > 0)).all():
            raise ValueError("expected finite means and positive standard deviations")
        self.mean, self.std = mean, std
        if narrow:
            # powers of two, so that there are few ranges
            half = np.exp2(np.ceil(np.log2(6 * np.minimum(std, 1e9) + 1))).astype(np.int64)
            half = np.minimum(half, (high - low) // 2)
            center = np.clip(np.rint(np.clip(mean, low, high)).astype(np.int64), low + half, high - half)
            self.shift, self.low, self.high = center, -half, half
        else:
            self.shift, self.low, self.high = np.zeros_like(low), low, high

    def _groups(self) -> Iterator[tuple[np.ndarray, int, int]]:
        """The entries of each range."""
        ranges, group = np.unique(np.stack([self.low, self.high]).reshape(2, -1), axis=1, return_inverse=True)
        for i, (low, high) in enumerate(ranges.T.tolist()):
            yield np.flatnonzero(group.reshape(-1) == i), low, high

    def _model(self, at: np.ndarray, low: int, high: int) -> tuple[Any, np.ndarray, np.ndarray]:
        mean = _flat(self.mean - self.shift, np.float64)[at]
        return models().model.QuantizedGaussian(low, high), mean, _flat(self.std, np.float64)[at]

    def push(self, stack: Stack, value: np.ndarray) -> None:
        symbols = value - self.shift
        _refuse(value, (symbols < self.low) | (symbols > self.high))
        for at, low, high in reversed(list(self._groups())):
            if high > low:
                stack.push(_flat(symbols, np.int32)[at], *self._model(at, low, high))

    def pop(self, stack: Stack) -> np.ndarray:
        symbols = self.low.reshape(-1).copy()
        for at, low, high in self._groups():
            if high > low:
                symbols[at] = stack.pop(*self._model(at, low, high))
        return symbols.reshape(self.mean.shape) + self.shift

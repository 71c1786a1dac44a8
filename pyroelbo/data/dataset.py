"""Data sets: splits of one kind of data, and the kinds that models are built for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyroelbo.batch import Batch

__all__ = ["KINDS", "Dataset", "Kind"]


@dataclass(frozen=True)
class Kind:
    """What a batch of some kind of data is: ``about`` says it, ``parts`` names its tensors (the last may be
    missing where it is ``lengths``), ``steps(*batch)`` [B] counts the steps of each datum, with ``dims``
    numbers each. Data of a ``discrete`` kind have probabilities, others densities."""

    about: str
    discrete: bool
    parts: tuple[str, ...] = ("y",)
    steps: Callable[..., Tensor] = lambda y: torch.ones(len(y), dtype=torch.long)


def _within(y: Tensor, lengths: Tensor | None = None) -> Tensor:
    return torch.full((len(y),), y.shape[1]) if lengths is None else lengths


def _padded(y: Tensor) -> Tensor:
    return (y >= 0).sum(-1)


# One row a kind. A model says in models/registry.py which it takes; data/views.py shows one kind as another.
KINDS: dict[str, Kind] = {
    "binary": Kind("pictures (or rows) of 0 and 1: y [B, D]", True),
    "bytes": Kind("pictures (or rows) of integers 0 … levels-1: y [B, D]", True),
    "grey": Kind("pictures of grey levels in [0, 1], as densities: y [B, D]", False),
    "vectors": Kind("rows of real numbers: y [B, D]", False),
    "symbols": Kind("sequences of symbols 0 … levels-1: y [B, T], lengths", True, ("y", "lengths"), _within),
    "series": Kind("sequences of real vectors: y [B, T, D], lengths", False, ("y", "lengths"), _within),
    "counts": Kind("sequences of vectors of counts: y [B, T, D], lengths", True, ("y", "lengths"), _within),
    "strings": Kind("strings of symbols: y [B, L], padded with -1", True, ("y",), _padded),
    "sentences": Kind(
        "sentences of two words or more: y [B, L], padded with -1",
        True,
        ("y",),
        _padded,
    ),
    "labelled": Kind(
        "sequences of vectors with labels 1 … levels: x [B, T, D], y [B, L] padded with -1, lengths of x",
        True,
        ("x", "y", "lengths"),
        lambda x, y, lengths=None: _padded(y),
    ),
}


@dataclass(frozen=True)
class Dataset:
    """Batches of one kind by split, and what a model must know of them.

    ``dataset["train"]`` is a batch: a tensor, or a tuple in the order of ``KINDS[kind].parts``. The splits
    may be left out (``splits={}``): :meth:`describe` gives all the rest, which a run stores.

    Args:
        name: as on the command line.
        kind: a key of :data:`KINDS`.
        shape: of one datum, or of one step of a sequence: (8, 8), (13,), () for symbols.
        splits: batches named "train" and, perhaps, "valid" and "test".
        levels: number of symbols, grey levels or labels; 0 for real numbers.
        steps: length of the longest sequence; 1 for what is none.
        names: of the symbols (words, characters) or of the columns.
        labels: classes [N] by split, for colours in figures.
        loc, scale: mean and scale of each coordinate that were taken from real data, y = (raw - loc) / scale.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    splits: Mapping[str, Batch]
    levels: int = 0
    steps: int = 1
    names: tuple[str, ...] = ()
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    loc: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")

    def __getitem__(self, split: str) -> Batch:
        if split not in self.splits:
            raise ValueError(f"split: expected one of {', '.join(self.splits)} of {self.name}, got {split!r}")
        return self.splits[split]

    @property
    def about(self) -> Kind:
        """The row of its kind."""
        return KINDS[self.kind]

    @property
    def dims(self) -> int:
        """Numbers of one datum, or of one step of a sequence."""
        return math.prod(self.shape)

    def describe(self) -> dict[str, Any]:
        """All but splits and labels, as JSON; ``Dataset.described`` reads it."""
        plain = {key: getattr(self, key) for key in _STORED}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def described(cls, content: Mapping[str, Any]) -> Dataset:
        """A data set without splits, from what :meth:`describe` gave; ValueError for anything else."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        for key, kind in _STORED.items():
            value = plain.get(key)
            each = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) != (key in _MANY) or not all(type(x) is kind for x in each):
                raise ValueError(f"data: expected {key} of {kind.__name__}, got {value!r:.80}")
        if plain.keys() != _STORED.keys():
            raise ValueError(f"data: expected {', '.join(_STORED)}, got {', '.join(plain)}"[:200])
        found = cls(splits={}, **plain)
        sizes = (*found.shape, found.levels, found.steps, found.dims)
        if not all(0 <= size <= _LARGEST for size in sizes):
            raise ValueError(f"data: expected sizes of at most {_LARGEST}, got {sizes}"[:200])
        return found


# The fields that a run stores, of these types; some are lists.
_STORED = {"name": str, "kind": str, "shape": int, "levels": int, "steps": int} | {
    "names": str,
    "loc": float,
    "scale": float,
}
_MANY = ("shape", "names", "loc", "scale")
_LARGEST = 10**7

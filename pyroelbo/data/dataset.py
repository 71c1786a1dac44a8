"""Data sets: splits of one kind of data, and the kinds that models are built for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroelbo.batch import Batch, call

__all__ = ["KINDS", "Dataset", "Kind"]


@dataclass(frozen=True)
class Kind:
    """What a batch of some kind of data is.

    Args:
        about: says it in a line.
        discrete: whether data have probabilities; others have densities.
        parts: the names of its tensors; ``lengths`` at the end may be missing.
        steps: ``steps(*batch)`` [B] counts the steps of each datum.
        units: whether numbers have units of their own; they are standardized for training.
        symbols: whether a step is one symbol, and not ``dims`` numbers.
    """

    about: str
    discrete: bool
    parts: tuple[str, ...] = ("y",)
    steps: Callable[..., Tensor] = lambda y: torch.ones(len(y), dtype=torch.long)
    units: bool = False
    symbols: bool = False


def _within(y: Tensor, lengths: Tensor | None = None) -> Tensor:
    return torch.full((len(y),), y.shape[1]) if lengths is None else lengths


def _padded(y: Tensor) -> Tensor:
    return (y >= 0).sum(-1)


# One row a kind. A model says in models/registry.py which it takes; data/views.py shows one kind as another.
KINDS: dict[str, Kind] = {
    "binary": Kind("pictures (or rows) of 0 and 1: y [B, D]", True),
    "bytes": Kind("pictures (or rows) of integers 0 … levels-1: y [B, D]", True),
    "grey": Kind("pictures of grey levels in [0, 1], as densities: y [B, D]", False),
    "colour": Kind("pictures of red, green and blue 0 … 255, as bytes: y [B, H·W·3]", True),
    "superpixels": Kind(
        "colour pictures in pieces: luma x and superpixels [B, H, W], parents [B, N] of a tree of them, "
        "chroma y [B, H, W, 2]",
        True,
        ("x", "superpixels", "parents", "y"),
        lambda x, superpixels, parents, y: torch.ones(len(y), dtype=torch.long),
    ),
    "vectors": Kind("rows of real numbers: y [B, D]", False, units=True),
    "symbols": Kind(
        "sequences of symbols 0 … levels-1: y [B, T], lengths", True, ("y", "lengths"), _within, symbols=True
    ),
    "series": Kind(
        "sequences of real vectors: y [B, T, D], lengths", False, ("y", "lengths"), _within, units=True
    ),
    "counts": Kind("sequences of vectors of counts: y [B, T, D], lengths", True, ("y", "lengths"), _within),
    "strings": Kind("strings of symbols: y [B, L], padded with -1", True, ("y",), _padded, symbols=True),
    "sentences": Kind(
        "sentences of two words or more: y [B, L], padded with -1",
        True,
        ("y",),
        _padded,
        symbols=True,
    ),
    "formula": Kind("a propositional formula (DIMACS), seen to hold: y [B] of ones", True),
    "labelled": Kind(
        "sequences of vectors with labels 1 … levels: x [B, T, D], y [B, L] padded with -1, lengths of x",
        True,
        ("x", "y", "lengths"),
        lambda x, y, lengths=None: _padded(y),
        symbols=True,
    ),
}


@dataclass(frozen=True)
class Dataset:
    """Batches of one kind by split, and what a model must know of them.

    ``dataset["train"]`` is a batch: a tensor, or a tuple in the order of :attr:`parts`. The splits
    may be left out (``splits={}``): :meth:`describe` gives all the rest, which a run stores.

    Args:
        name: as on the command line.
        kind: a key of :data:`KINDS`.
        shape: of one datum, or of one step of a sequence: (8, 8), (13,), (128, 128, 3), () for symbols.
        splits: batches named "train" and, perhaps, "valid" and "test".
        levels: number of symbols, grey levels or labels; 0 for real numbers.
        steps: length of the longest sequence; 1 for what is none.
        names: of the symbols (words, characters) or of the columns; the clauses of a formula.
        labels: classes [N] by split, for colours in figures and for :meth:`conditional`.
        loc, scale: of each coordinate of standardized data, y = (raw - loc) / scale; () for raw ones.
        light: whether large values of pictures are light, as in photographs; else they are ink on paper.
        classes: number of classes of data given their class, whose batches begin with it; 0 for other data.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    splits: Mapping[str, Any]
    levels: int = 0
    steps: int = 1
    names: tuple[str, ...] = ()
    labels: Mapping[str, Tensor] = field(default_factory=dict)
    loc: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    light: bool = False
    classes: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")

    def __getitem__(self, split: str) -> Any:
        if split not in self.splits:
            raise ValueError(f"split: expected one of {', '.join(self.splits)} of {self.name}, got {split!r}")
        return self.splits[split]

    @property
    def about(self) -> Kind:
        """The row of its kind."""
        return KINDS[self.kind]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of a batch's tensors."""
        return ("class", *self.about.parts) if self.classes else self.about.parts

    @property
    def title(self) -> str:
        """Its name, without the folder of a file."""
        return Path(self.name).name

    @property
    def dims(self) -> int:
        """Numbers of one datum, or of one step of a sequence."""
        return math.prod(self.shape)

    def standardized(self, like: Dataset | None = None) -> Dataset:
        """Real data in units of the training split's standard deviations (of constant coordinates: 1), or as
        the data set ``like``; data without units as they are."""
        if not self.about.units or (like is not None and not like.scale):
            return self
        if like is None:
            seen = _steps_of(self["train"]).double()
            spread = seen.std(0, correction=0)
            found = replace(
                self,
                loc=tuple(seen.mean(0).tolist()),
                scale=tuple(torch.where(spread > 0, spread, 1.0).tolist()),
            )
        else:
            found = replace(self, loc=like.loc, scale=like.scale)
        return replace(found, splits={k: found._scaled(batch) for k, batch in self.splits.items()})

    def conditional(self) -> Dataset:
        """The data given their classes, for conditional pairs: batches (labels, y), labels in 0 … classes-1.

        Raises ValueError for data without a class for each datum, or whose batches are more than y."""
        labels, splits = self.labels, self.splits
        if self.parts != ("y",) or not splits or any(s not in labels for s in splits):
            raise ValueError(
                f"conditional: expected data with a class for each datum, got {self.title}, {self.kind}"
                + ("" if self.labels else " without classes")
            )
        every = torch.cat([labels[s] for s in splits])
        if bool((every < 0).any()):
            raise ValueError(f"conditional: expected classes from 0 on, got {int(every.min())}")
        if len(every) <= int(every.max()):
            raise ValueError(
                f"conditional: expected classes numbered 0, 1, …, got {int(every.max())} "
                f"among {len(every)} data"
            )
        given = {s: (labels[s].long(), y) for s, y in splits.items()}
        return replace(self, splits=given, classes=int(every.max()) + 1)

    def _scaled(self, batch: Any) -> Any:
        y, *rest = batch if isinstance(batch, tuple) else (batch,)
        scaled = ((y.double() - y.new_tensor(self.loc).double()) / y.new_tensor(self.scale).double()).to(y)
        return (scaled, *rest) if rest else scaled

    def raw(self, y: Tensor) -> Tensor:
        """Standardized numbers [..., D] in the data's own units."""
        return y * y.new_tensor(self.scale) + y.new_tensor(self.loc) if self.scale else y

    def numbers(self, batch: Batch) -> float:
        """The mean number of symbols, or of other numbers, that a datum consists of."""
        return float(self._steps(batch).double().mean()) * (1 if self.about.symbols else self.dims)

    def log_scale(self, batch: Batch) -> Tensor:
        """ln |d raw / d y| of each datum of a standardized batch, [B], in nats: Σ ln scale over its
        coordinates and steps. A density in the data's own units is lower by it."""
        return self._steps(batch).double() * sum(map(math.log, self.scale))

    def _steps(self, batch: Batch) -> Tensor:
        """The number of steps of each datum, [B]."""
        return call(self.about.steps, batch[1] if self.classes else batch)  # type: ignore[index]

    def describe(self) -> dict[str, Any]:
        """All but splits and labels, as JSON; ``Dataset.described`` reads it."""
        plain = {key: getattr(self, key) for key in _STORED}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def described(cls, content: Mapping[str, Any]) -> Dataset:
        """A data set without splits, from what :meth:`describe` gave; ValueError for anything else."""
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        plain = {"light": False, "classes": 0} | plain  # which the first runs did not store
        for key, kind in _STORED.items():
            value = plain.get(key)
            each = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) != (key in _MANY) or not all(type(x) is kind for x in each):
                raise ValueError(f"data: expected {key} of {kind.__name__}, got {value!r:.80}")
        if plain.keys() != _STORED.keys():
            raise ValueError(f"data: expected {', '.join(_STORED)}, got {', '.join(plain)}"[:200])
        found = cls(splits={}, **plain)
        sizes = (*found.shape, found.levels, found.steps, found.dims, found.classes)
        if not all(0 <= size <= _LARGEST for size in sizes):
            raise ValueError(f"data: expected sizes of at most {_LARGEST}, got {sizes}"[:200])
        if {len(found.loc), len(found.scale)} - {0, found.dims} or not all(x > 0 for x in found.scale):
            raise ValueError(f"data: expected {found.dims} positive scales or none, got {found.scale}"[:200])
        return found


def _steps_of(batch: Any) -> Tensor:
    """All rows, or all steps within the lengths of sequences, [N, D]."""
    y, *rest = batch if isinstance(batch, tuple) else (batch,)
    if rest:
        return y[torch.arange(y.shape[1]) < rest[0][:, None]]
    return y.flatten(0, -2)


# The fields that a run stores, of these types; some are lists.
_STORED = {"name": str, "kind": str, "shape": int, "levels": int, "steps": int} | {
    "names": str,
    "loc": float,
    "scale": float,
    "light": bool,
    "classes": int,
}
_MANY = ("shape", "names", "loc", "scale")
_LARGEST = 10**7

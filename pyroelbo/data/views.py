"""Data of one kind seen as another: a table of pairs of kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from pyroelbo.data.dataset import Dataset

__all__ = ["VIEWS", "view", "views"]


def _grey(data: Dataset) -> Dataset:
    return _each(data, "grey", lambda y: y / (data.levels - 1), levels=0)


def _binary(data: Dataset) -> Dataset:
    return _each(data, "binary", lambda y: (y > (data.levels - 1) / 2).to(y.dtype), levels=2)


def _each(data: Dataset, kind: str, change: Callable[[Tensor], Tensor], **fields: object) -> Dataset:
    splits = {name: change(batch) for name, batch in data.splits.items()}  # type: ignore[arg-type]
    return replace(data, kind=kind, splits=splits, **fields)  # type: ignore[arg-type]


# (kind of the data, kind to see them as): how. Grey levels become 0 and 1 by a threshold at one half.
VIEWS: dict[tuple[str, str], Callable[[Dataset], Dataset]] = {
    ("bytes", "grey"): _grey,
    ("bytes", "binary"): _binary,
}


def views(kind: str) -> tuple[str, ...]:
    """The kinds that data of this kind can be seen as, their own first."""
    return (kind, *(there for here, there in VIEWS if here == kind))


def view(data: Dataset, kinds: Sequence[str]) -> Dataset:
    """The data as the first of ``kinds`` that they can be seen as; ValueError, naming both, for none."""
    for kind in kinds:
        if kind in views(data.kind):
            return data if kind == data.kind else VIEWS[data.kind, kind](data)
    raise ValueError(f"data: expected {' or '.join(kinds)}, got {data.name}, {data.kind}")

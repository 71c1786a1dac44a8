"""Data of one kind seen as another: a table of pairs of kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyroelbo.data.dataset import Dataset
from pyroelbo.data.superpixels import segmented

__all__ = ["VIEWS", "view", "views"]


def view(data: Dataset, kinds: Sequence[str], model: str | None = None) -> Dataset:
    """The data as the first of ``kinds`` that they can be seen as; ValueError, with the reasons, for none.
    ``model`` is what needs them, for the message."""
    reasons = []
    for kind in kinds:
        if kind == data.kind:
            return data
        try:
            if (data.kind, kind) in VIEWS:
                return VIEWS[data.kind, kind](data)
        except ValueError as error:
            reasons.append(f"not as {kind}: {error}")
    told = f" ({'; '.join(reasons)})" if reasons else ""
    wanted = " or ".join(kinds) + (f" for {model}" if model else "")
    raise ValueError(f"data: expected {wanted}, got {data.title}, {data.kind}{told}")


def views(kind: str) -> tuple[str, ...]:
    """The kinds that data of this kind may be seen as, their own first."""
    return (kind, *(there for here, there in VIEWS if here == kind))


def _each(data: Dataset, kind: str, change: Callable[[Any], Any], **fields: Any) -> Dataset:
    return replace(data, kind=kind, splits={k: change(v) for k, v in data.splits.items()}, **fields)


def _real(y: Tensor) -> Tensor:
    return y.to(torch.get_default_dtype())


def _grey(data: Dataset) -> Dataset:
    return _each(data, "grey", lambda y: _real(y) / (data.levels - 1), levels=0)


def _threshold(data: Dataset) -> Dataset:
    return _each(data, "binary", lambda y: _real(y > (data.levels - 1) / 2), levels=2)


def _row_by_row(data: Dataset) -> Dataset:
    if len(data.shape) != 2:
        raise ValueError(f"expected pictures of two dimensions, got {data.shape}")
    steps, dims = data.shape
    return _each(data, "counts", lambda y: y.reshape(-1, steps, dims).long(), shape=(dims,), steps=steps)


def _flat(kind: str) -> Callable[[Dataset], Dataset]:
    """Sequences of one length as rows or pictures of the ``kind``."""

    def change(data: Dataset) -> Dataset:
        first = next(iter(data.splits.values()), torch.zeros(0, data.steps))
        if not isinstance(first, Tensor) or not all(len(b[0]) == data.steps for b in data.splits.values()):
            raise ValueError("expected sequences of one length")
        if kind == "binary" and data.levels > 2:
            raise ValueError(f"expected 0 and 1, got values up to {data.levels - 1}")
        if kind == "grey":
            low = min(float(y.min()) for y in data.splits.values())
            high = max(float(y.max()) for y in data.splits.values())
            if low < 0 or high > 1:
                raise ValueError(f"expected grey levels in [0, 1], got {low:.4g} to {high:.4g}")
        levels = max(data.levels, 2) if kind in ("bytes", "binary") else 0
        shape = (data.steps, *data.shape)
        light = kind in ("bytes", "grey")  # 255 is white in a file of pictures
        return _each(
            data, kind, lambda y: _real(y).flatten(1), shape=shape, levels=levels, steps=1, light=light
        )

    return change


def _coins(data: Dataset) -> Dataset:
    for y in data.splits.values():
        other = y[(y != 0) & (y != 1)]
        if len(other):
            raise ValueError(f"expected 0 and 1, got {float(other[0]):.4g}")
    return replace(data, kind="binary", levels=2, names=())


def _with_lengths(data: Dataset) -> Dataset:
    for split, y in data.splits.items():
        empty = (y < 0).all(-1).nonzero()
        if len(empty):
            raise ValueError(
                f"expected sequences of one symbol or more, got none in row {int(empty[0])} of {split}"
            )
    return _each(data, "symbols", lambda y: (y.clamp_min(0), (y >= 0).sum(-1)))


def _padded(kind: str) -> Callable[[Dataset], Dataset]:
    def change(data: Dataset) -> Dataset:
        def padded(batch: Any) -> Tensor:
            y, lengths = batch if isinstance(batch, tuple) else (batch, torch.tensor(batch.shape[1]))
            rows = torch.where(torch.arange(y.shape[1]) < lengths[..., None], y, -1)
            return pad(rows, (0, data.steps - y.shape[1]), value=-1)

        strings = _each(data, "strings", padded)
        return strings if kind == "strings" else _sentences(strings)

    return change


def _sentences(data: Dataset) -> Dataset:
    """Strings with spaces word by word, others symbol by symbol."""
    if " " in data.names:
        data = _words(data)
    for split, y in data.splits.items():
        short = ((y >= 0).sum(-1) < 2).nonzero()
        if len(short):
            raise ValueError(
                f"expected sentences of two words or more, got fewer in row {int(short[0])} of {split}"
            )
    return replace(data, kind="sentences")


def _words(data: Dataset) -> Dataset:
    texts = {
        split: ["".join(data.names[i] for i in row if i >= 0).split() for row in y.tolist()]
        for split, y in data.splits.items()
    }
    words = tuple(sorted({word for split in texts.values() for row in split for word in row}))
    number = {word: i for i, word in enumerate(words)}
    steps = max((len(row) for split in texts.values() for row in split), default=data.steps)
    splits = {
        split: torch.tensor([[number[w] for w in row] + [-1] * (steps - len(row)) for row in rows])
        for split, rows in texts.items()
    }
    return replace(data, splits=splits, names=words, levels=len(words), steps=steps)


def _unlabelled(data: Dataset) -> Dataset:
    splits = {k: (b[0], b[2]) if len(b) > 2 else b[0] for k, b in data.splits.items()}
    return replace(data, kind="series", splits=splits, levels=0)


# (kind of the data, kind to see them as): how; ValueError says why these data cannot be.
VIEWS: dict[tuple[str, str], Callable[[Dataset], Dataset]] = {
    ("bytes", "binary"): _threshold,  # at one half
    ("bytes", "grey"): _grey,
    ("bytes", "counts"): _row_by_row,
    ("colour", "superpixels"): segmented,
    ("vectors", "binary"): _coins,
    ("symbols", "binary"): _flat("binary"),
    ("symbols", "bytes"): _flat("bytes"),
    ("symbols", "vectors"): _flat("vectors"),
    ("symbols", "strings"): _padded("strings"),
    ("symbols", "sentences"): _padded("sentences"),
    ("counts", "binary"): _flat("binary"),
    ("counts", "bytes"): _flat("bytes"),
    ("counts", "series"): lambda data: _each(data, "series", _real_steps, levels=0),
    ("series", "grey"): _flat("grey"),
    ("strings", "symbols"): _with_lengths,
    ("strings", "sentences"): _sentences,
    ("sentences", "symbols"): _with_lengths,
    ("sentences", "strings"): lambda data: replace(data, kind="strings"),
    ("labelled", "series"): _unlabelled,
}


def _real_steps(batch: Any) -> Any:
    return (_real(batch[0]), batch[1]) if isinstance(batch, tuple) else _real(batch)

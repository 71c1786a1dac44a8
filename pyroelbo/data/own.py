"""A user's own file as a data set: arrays (npy, npz), tables (csv), lines of text (txt), formulas
(cnf), folders of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pyroelbo import batch as batches
from pyroelbo.batch import Batch, as_batch
from pyroelbo.data.colour import pictures, read_folder
from pyroelbo.data.dataset import Dataset
from pyroelbo.data.formulas import formula_set, read_dimacs
from pyroelbo.data.text import strings
from pyroelbo.files import read_arrays, read_lines, read_table

__all__ = ["FORMATS", "held_out", "read"]

SPLITS = ("train", "valid", "test")


def read(path: Path, columns: Sequence[str] = ()) -> Dataset:
    """The data set in a file; what its arrays hold follows from their shape and dtype.

    ========== ======================= ============================================
    array      of real numbers         of integers
    ========== ======================= ============================================
    [N, D]     ``vectors``             ``symbols``; padded with -1, ``strings``
    [N, T, D]  ``series``              ``counts`` (also pictures of integer levels)
    [N,H,W,3]                          ``colour``, of uint8
    ========== ======================= ============================================

    An npz file has an array ``train`` and may have ``valid`` and ``test``; ``lengths`` [N] of padded
    sequences (``valid_lengths``, ``test_lengths``); ``labels``: classes [N], or the labels [N, L] from 1 on,
    padded with -1, that make series ``labelled`` (``valid_labels``, …). The lines of a txt file are
    ``strings`` of its characters; a csv file has a header and is a table of real numbers, of ``columns`` if
    they are given. A cnf file (DIMACS) is a ``formula``. A folder holds ``colour`` pictures, cut to the
    middle that all have. Where there is no test split, a fifth of ten rows or more is held out, and a tenth
    as valid split, drawn by seed 0.

    Raises ValueError, naming file, array, row and column, for missing or other than finite numbers and for
    shapes that do not fit; OSError for a file that cannot be read.
    """
    ending = path.suffix.lower()
    if path.is_dir() and not columns:
        y, size = read_folder(path)
        return pictures(str(path), held_out(y), size)
    if ending not in FORMATS:
        raise ValueError(f"data: expected a file named {', '.join('*' + f for f in FORMATS)}, got {path}")
    if columns and ending != ".csv":
        raise ValueError(f"columns: expected none for a {ending} file, got {','.join(columns)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return FORMATS[ending](path, columns)


def _table(path: Path, columns: Sequence[str]) -> Dataset:
    names, values = read_table(path, columns)
    rows = as_batch(values, "train")
    return Dataset(str(path), "vectors", (len(names),), held_out(rows), names=names)


def _lines(path: Path, columns: Sequence[str]) -> Dataset:
    y, alphabet = strings(read_lines(path))
    return Dataset(
        str(path), "strings", (), held_out(y), len(alphabet), y.shape[1], tuple(map(str, alphabet))
    )


def _arrays(path: Path, columns: Sequence[str]) -> Dataset:
    found = read_arrays(path)
    known = [f"{s}{part}" for part in ("", "_lengths", "_labels") for s in SPLITS]
    arrays = {{"lengths": "train_lengths", "labels": "train_labels"}.get(k, k): v for k, v in found.items()}
    extra = sorted(set(arrays) - set(known))
    if extra or "train" not in arrays:
        what = f"got {extra[0]!r}" if extra else f"got no 'train' but {', '.join(sorted(found))}"
        raise ValueError(f"{path}: expected arrays named train, valid, test, lengths, labels, {what}")
    try:
        if arrays["train"].ndim == 4:
            return _colours(str(path), arrays)
        return _dataset(str(path), {k: _tensor(v, k) for k, v in arrays.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _formula(path: Path, columns: Sequence[str]) -> Dataset:
    return formula_set(str(path), read_dimacs(path))


FORMATS: dict[str, Callable[[Path, Sequence[str]], Dataset]] = {
    ".npy": _arrays,
    ".npz": _arrays,
    ".csv": _table,
    ".txt": _lines,
    ".cnf": _formula,
}


def _colours(name: str, arrays: Mapping[str, np.ndarray]) -> Dataset:
    for split, y in arrays.items():
        if split not in SPLITS or y.shape[1:] != arrays["train"].shape[1:] or y.shape[3] != 3 or not y.size:
            raise ValueError(f"{split}: expected pictures [N, H, W, 3], all of one size, got {y.shape}")
        if y.dtype != np.uint8:
            raise ValueError(f"{split}: expected pictures of uint8, 0 … 255, got {y.dtype}")
    splits = {s: torch.from_numpy(arrays[s]).flatten(1) for s in SPLITS if s in arrays}
    return pictures(name, held_out(splits["train"], splits), arrays["train"].shape[1:3])


def _tensor(values: np.ndarray, name: str) -> Tensor:
    if values.ndim == 0:
        raise ValueError(f"{name}: expected rows of data, got a single number")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        place = np.argwhere(~np.isfinite(values))[0].tolist()
        raise ValueError(f"{name}: expected finite numbers, got {values[tuple(place)]} at {place}")
    found = as_batch(values, name)
    assert isinstance(found, Tensor)
    if not found.numel():
        raise ValueError(f"{name}: expected at least one number a row, got shape {values.shape}")
    return found if found.is_floating_point() else found.long()


def _dataset(name: str, arrays: Mapping[str, Tensor]) -> Dataset:
    train = arrays["train"]
    labelled = arrays.get("train_labels", train).dim() == 2 and "train_labels" in arrays
    splits = {s: arrays[s] for s in SPLITS if s in arrays}
    least = min(int(y.min()) if y.numel() else 0 for y in splits.values())
    kind = _kind(train, least, labelled, "train_lengths" in arrays)
    real = kind in ("vectors", "series", "labelled")
    for split, y in splits.items():
        if y.dim() != train.dim() or y.shape[2:] != train.shape[2:]:
            raise ValueError(f"{split}: expected rows as train's {tuple(train.shape)}, got {tuple(y.shape)}")
        if y.is_floating_point() != train.is_floating_point():
            raise ValueError(f"{split}: expected {train.dtype}, as train, got {y.dtype}")
        splits[split] = y.to(torch.get_default_dtype()) if real else y
    if kind == "vectors" and len({y.shape[1] for y in splits.values()}) > 1:
        raise ValueError(f"valid, test: expected {train.shape[1]} columns, as train")
    if kind == "strings":
        wide = max(y.shape[1] for y in splits.values())
        splits = {s: pad(y, (0, wide - y.shape[1]), value=-1) for s, y in splits.items()}
    whole, labels = _parts(splits, arrays, labelled)
    levels = 0 if real else 1 + max(int(y.max()) for y in splits.values())
    if labelled:
        levels = max(int(arrays[f"{s}_labels"].max()) for s in splits)
    steps = 1 if kind == "vectors" else max(y.shape[1] for y in splits.values())
    shape = () if kind in ("symbols", "strings") else tuple(train.shape[1 if kind == "vectors" else 2 :])
    cut = held_out(whole["train"], whole)
    if labels:
        labels = held_out(labels["train"], labels)
    return Dataset(name, kind, shape, cut, levels, steps, labels=labels)  # type: ignore[arg-type]


def _kind(y: Tensor, least: int, labelled: bool, lengths: bool) -> str:
    """The kind of an array, by its shape, its dtype and its smallest value."""
    whole = not y.is_floating_point()
    if labelled and y.dim() == 3:
        return "labelled"
    if y.dim() == 2 and not lengths:
        if whole and least == -1 and not bool(((y[:, :-1] < 0) & (y[:, 1:] >= 0)).any()):
            return "strings"
        return "symbols" if whole and least >= 0 else "vectors"
    if y.dim() == 2 and whole and least >= 0:
        return "symbols"
    if y.dim() == 3 and not labelled:
        return "counts" if whole and least >= 0 else "series"
    raise ValueError(
        f"train: expected [N, D], [N, T, D] or, with lengths, symbols [N, T] of at least 0, or pictures [N, "
        f"H, W, 3], got {y.dtype} of shape {tuple(y.shape)}"
    )


def _parts(
    splits: Mapping[str, Tensor], arrays: Mapping[str, Tensor], labelled: bool
) -> tuple[dict[str, Batch], dict[str, Tensor]]:
    """Batches with their lengths and, for ``labelled`` series, labels; and the classes of the others."""
    whole: dict[str, Batch] = {}
    classes: dict[str, Tensor] = {}
    for split, y in splits.items():
        lengths, labels = (arrays.get(f"{split}_{part}") for part in ("lengths", "labels"))
        for part, has in (("lengths", lengths), ("labels", labels)):
            if (has is None) != (f"train_{part}" not in arrays):
                raise ValueError(f"{split}_{part}: expected them for all splits or for none")
            if has is not None and (len(has) != len(y) or has.is_floating_point()):
                raise ValueError(
                    f"{split}_{part}: expected {len(y)} integers, one per row, got {has.dtype} of shape "
                    f"{tuple(has.shape)}"
                )
        if lengths is not None:
            _check_lengths(lengths, y, split)
        if labelled:
            _check_labels(labels, split)
            whole[split] = (y, labels) if lengths is None else (y, labels, lengths)  # type: ignore[assignment]
            continue
        whole[split] = y if lengths is None else (y, lengths)
        if labels is not None:
            classes[split] = labels
    return whole, classes


def _check_lengths(lengths: Tensor, y: Tensor, split: str) -> None:
    bad = (lengths < 1) | (lengths > y.shape[1]) if lengths.dim() == 1 else torch.ones(1).bool()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{split}_lengths: expected one of 1 … {y.shape[1]} per row, got {lengths[row].tolist()} in row "
            f"{row}"
        )


def _check_labels(labels: Any, split: str) -> None:
    late = (labels[:, :-1] < 0) & (labels[:, 1:] >= 0)
    wrong = (labels == 0).any(-1) | (labels < -1).any(-1) | late.any(-1) | (labels[:, 0] < 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{split}_labels: expected labels from 1 on, then -1, got {labels[row].tolist()} in row {row}"
        )


def held_out(rows: Batch, splits: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``splits`` with the held-out ones that they lack, cut from ``rows``: a fifth as test, a tenth as valid
    split, drawn by seed 0; none of less than ten rows, or where there is a test split."""
    size = batches.size(rows)
    known: dict[str, Any] = dict(splits or {"train": rows})
    if "test" in known or size < 10:
        return known
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    test, valid = size // 5, 0 if "valid" in known else size // 10
    cuts = order.split([size - test - valid, valid, test])
    return {s: batches.rows(rows, cut) if len(cut) else known[s] for s, cut in zip(SPLITS, cuts, strict=True)}

"""Batches: a tensor (or PackedSequence), or a tuple or dict of them whose first dimensions agree, passed on
as ``model(*batch)`` or ``model(**batch)``; and the minibatches of a training set."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

__all__ = [
    "Batch",
    "Minibatches",
    "as_batch",
    "call",
    "change",
    "contiguous",
    "dense",
    "fingerprint",
    "length",
    "parts",
    "repeat",
    "rows",
    "same_memory",
    "size",
    "to",
]

Batch: TypeAlias = "Tensor | tuple[Tensor, ...] | dict[str, Tensor]"


def as_batch(data: Any, name: str = "data", scope: str = "datum") -> Batch:
    """A batch from tensors, arrays or numeric pandas frames: floating ones get torch's default dtype, integer
    and bool ones keep theirs. Absent parts of a tuple or dict are None. The parts of a ``"joint"`` batch may
    have any shapes, and be numbers.

    Raises TypeError for other types, ValueError for an empty set, parts of different lengths, or floating
    parts with NaN or infinite entries; each names the part.
    """
    if isinstance(data, dict):
        batch: Batch = {str(k): _part(v, f"{name}[{k!r}]", scope) for k, v in data.items()}
    elif isinstance(data, (tuple, list)) and not isinstance(data, (torch.Size, PackedSequence)):
        batch = tuple(_part(v, f"{name}[{i}]", scope) for i, v in enumerate(data))
    else:
        batch = _tensor(data, name, scope)
    named = parts(batch, name)
    if not named:
        raise ValueError(f"{name}: expected at least one tensor, got none in a {type(data).__name__}")
    for label, part in named.items():
        if scope != "joint" and part.data.dim() == 0:
            raise ValueError(
                f"{label}: expected a first dimension that runs over the data, got a single number"
            )
        if length(part) == 0:
            raise ValueError(f"{label}: expected at least one row, got shape {tuple(part.data.shape)}")
    lengths = {label: length(part) for label, part in named.items()}
    if len(set(lengths.values())) > 1 and scope != "joint":
        raise ValueError(
            f"{name}: expected parts with the same first dimension, got lengths {lengths} (an "
            'evaluation with scope="joint" takes any)'
        )
    for label, part in named.items():
        part = dense(part)
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            row = int((~torch.isfinite(part)).reshape(length(part), -1).any(-1).nonzero()[0])
            raise ValueError(
                f"{label}: expected finite entries, got NaN or infinite ones, the first in row {row}: clean "
                f"the data, or replace "
                "entries that a mask leaves out by any value"
            )
    return batch


def _part(value: Any, name: str, scope: str) -> Any:
    return value if value is None else _tensor(value, name, scope)


def _tensor(value: Any, name: str, scope: str) -> Tensor:
    if isinstance(value, (Tensor, PackedSequence)):
        if isinstance(value, Tensor) and not value.is_floating_point():
            _warn_of_rounding(value, name)
        return value  # type: ignore[return-value]
    if scope == "joint" and isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if hasattr(value, "to_numpy") and hasattr(value, "index"):  # a frame or a series of pandas
        value = _frame(value, name)
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "fiub":
            raise TypeError(f"{name}: expected numbers, got an array of {value.dtype}")
        kind = _WIDER.get(value.dtype.newbyteorder("="), value.dtype.newbyteorder("="))
        tensor = torch.from_numpy(np.require(value, kind, ["C", "W"]))
        _warn_of_rounding(tensor, name)
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
    raise TypeError(
        f"{name}: expected a tensor, a numpy array, a pandas frame, or a tuple or dict of them, got "
        f"{type(value).__name__}"
    )


def _warn_of_rounding(x: Tensor, name: str) -> None:
    """Warn where torch's default dtype cannot hold numbers: integers beyond its exact range, or columns far
    from zero for their spread."""
    dtype = torch.get_default_dtype()
    if dtype == torch.float64 or not x.numel() or x.dtype == torch.bool or x.is_complex():
        return
    step, largest = torch.finfo(dtype).eps, 0.0
    if x.is_floating_point():
        wide = x.double().reshape(len(x), -1) if x.dim() else x.double().reshape(1, 1)
        tops = wide.abs().amax(0)
        lost = (step / 2 * tops > 1e-3 * wide.std(0, correction=0)) & (wide != wide[:1]).any(0)
        if bool(lost.any()):
            largest = float(tops[lost].max())
    elif torch.iinfo(x.dtype).max > 2 / step:  # bytes need not be looked at
        found = max(abs(int(x.min())), abs(int(x.max())))
        largest = float(found) if found > 2 / step else 0.0
    if largest:
        warnings.warn(
            f"{name}: numbers as large as {largest:.4g} are rounded in {dtype}: subtract "
            "their mean, or compute in float64 (torch.set_default_dtype(torch.float64), pair.double())",
            stacklevel=2,
        )


# dtypes of numpy that torch lacks, or computes little with
_WIDER: dict[Any, Any] = {np.dtype(name): np.dtype(np.int64) for name in ("u2", "u4", "u8")}
_WIDER[np.dtype(np.longdouble)] = np.dtype(np.float64)


def _frame(frame: Any, name: str) -> np.ndarray:
    """The numbers of a pandas frame [N, D] or series [N]; errors name column and row."""
    found = []
    for label, column in frame.items() if frame.ndim == 2 else [(frame.name, frame)]:
        kind = getattr(column.dtype, "kind", "O")
        if kind not in _COLUMNS:
            raise TypeError(f"{name}: expected columns of numbers, got {column.dtype} in column {label!r}")
        missing = column.isna().to_numpy()
        if missing.any():
            row = frame.index[int(missing.argmax())]
            raise ValueError(f"{name}: expected numbers, got a missing one in row {row!r}, column {label!r}")
        found.append(column.to_numpy(_COLUMNS[kind]))
    if not found:
        raise ValueError(f"{name}: expected at least one column, got none")
    return np.stack(found, -1) if frame.ndim == 2 else found[0]


_COLUMNS = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}


def parts(batch: Batch, name: str = "data") -> dict[str, Tensor]:
    """The tensors of a batch, by the names used in messages; absent parts are left out."""
    if isinstance(batch, dict):
        named: dict[str, Any] = {f"{name}[{k!r}]": v for k, v in batch.items()}
    elif _several(batch):
        named = {f"{name}[{i}]": v for i, v in enumerate(batch)}
    else:
        named = {name: batch}
    return {label: part for label, part in named.items() if part is not None}


def _several(batch: Any) -> bool:
    return isinstance(batch, tuple) and not isinstance(batch, PackedSequence)


def change(fn: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with every part changed by ``fn``; absent ones stay so."""

    def changed(part: Any) -> Any:
        return part if part is None else fn(part)

    if isinstance(batch, dict):
        return {k: changed(v) for k, v in batch.items()}
    return tuple(map(changed, batch)) if _several(batch) else changed(batch)


def dense(part: Any) -> Tensor:
    """A part as one tensor: a PackedSequence padded, its rows first."""
    return pad_packed_sequence(part, batch_first=True)[0] if isinstance(part, PackedSequence) else part


def length(part: Any) -> int:
    """Number of rows of a part; 1 of a number."""
    if isinstance(part, PackedSequence):
        return int(part.batch_sizes[0])
    return len(part) if part.dim() else 1


def size(batch: Batch) -> int:
    """Number of data in the batch."""
    return length(next(iter(parts(batch).values())))


def rows(batch: Batch, index: Any) -> Batch:
    """The rows ``index`` (a slice or a LongTensor) of every part."""

    def take(part: Any) -> Any:
        if not isinstance(part, PackedSequence):
            return part[index]
        padded, lengths = pad_packed_sequence(part, batch_first=True)
        return pack_padded_sequence(padded[index], lengths[index], batch_first=True, enforce_sorted=False)

    return change(take, batch)


def contiguous(batch: Batch) -> Batch:
    """The batch with every part in one block of memory, rows first."""
    return change(lambda t: t if isinstance(t, PackedSequence) else t.contiguous(), batch)


def same_memory(a: Any, b: Tensor) -> bool:
    """Whether ``a`` is a view of all entries of ``b``, of any shape."""
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def fingerprint(batch: Batch) -> str:
    """A checksum of all entries of a batch."""
    total = 0
    for part in parts(batch).values():
        total = zlib.crc32(dense(part).detach().cpu().contiguous().numpy().tobytes(), total)
    return f"{total:08x}"


def repeat(batch: Batch, times: int) -> Batch:
    """The batch repeated ``times`` times along the first dimension."""
    return rows(batch, torch.arange(size(batch)).repeat(times))


def to(batch: Batch, device: torch.device | str) -> Batch:
    return change(lambda t: t.to(device, non_blocking=True), batch)


def call(fn: Callable, batch: Batch) -> Any:
    """``fn(y)``, ``fn(*batch)`` or ``fn(**batch)``."""
    if isinstance(batch, dict):
        return fn(**batch)
    return fn(*batch) if _several(batch) else fn(batch)


class Minibatches:
    """Minibatches of tensors, a Dataset or a DataLoader; an epoch's order depends on the seed and its number
    only.
    """

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.loader = data if isinstance(data, DataLoader) else None
        self.dataset = data if isinstance(data, Dataset) and self.loader is None else None
        self.tensors = None
        self.steps: int | None
        if isinstance(data, IterableDataset):
            raise TypeError(
                "data: expected a tensor, a map-style Dataset or a DataLoader, got an IterableDataset: wrap "
                "it in a DataLoader"
            )
        if self.loader is not None:
            try:
                self.steps = len(self.loader)
            except TypeError:
                self.steps = None
            self.size = None
            if self.steps == 0:
                raise ValueError("data: expected at least one batch, got an empty DataLoader")
            return
        if self.dataset is None:
            self.tensors = as_batch(data, "data")
            self.size = size(self.tensors)
        else:
            self.size = len(self.dataset)  # type: ignore[arg-type]
            if self.size == 0:
                raise ValueError("data: expected at least one row, got an empty Dataset")
        self.steps = math.ceil(self.size / batch_size)

    @property
    def whole(self) -> bool:
        """Whether one batch holds all data."""
        return self.steps == 1

    def fingerprint(self) -> str | int | None:
        """A checksum of data in memory, the number of rows of a Dataset, None for a DataLoader."""
        return self.size if self.tensors is None else fingerprint(self.tensors)

    def first(self) -> Batch:
        """The first batch of epoch 0; random streams are left as they were."""
        with torch.random.fork_rng(devices=[]):
            return next(self.epoch(0))

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        if self.loader is not None:
            for i, batch in enumerate(self.loader):
                if i >= skip:
                    yield as_batch(batch)
            return
        assert self.size is not None
        # A single batch keeps its order: a guide may hold parameters for each datum.
        order = torch.arange(self.size)
        if not self.whole:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
            order = torch.randperm(self.size, generator=generator)
        yield from self._take(order, skip)

    def in_order(self) -> Iterator[Batch]:
        """All batches in the order of the data (a DataLoader has its own)."""
        if self.size is None:
            yield from self.epoch(0)
        else:
            yield from self._take(torch.arange(self.size))

    def _take(self, order: Tensor, skip: int = 0) -> Iterator[Batch]:
        for index in order.split(self.batch_size)[skip:]:
            if self.tensors is not None:
                yield rows(self.tensors, index)
            else:
                assert self.dataset is not None
                yield as_batch(default_collate([self.dataset[int(i)] for i in index]))

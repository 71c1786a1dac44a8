"""Batches, and data to train on: the digits that ship inside scikit-learn, benchmark files by path, or the
user's own.

A *batch* is a tensor, a tuple of tensors or a dict of tensors whose first dimensions agree; it is passed on
as ``model(*batch)`` or ``model(**batch)``. Nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

__all__ = [
    "Batch",
    "Minibatches",
    "as_batch",
    "call",
    "load",
    "parts",
    "repeat",
    "rows",
    "size",
    "strings",
    "to",
    "windows",
]

Batch: TypeAlias = "Tensor | tuple[Tensor, ...] | dict[str, Tensor]"


def as_batch(data: Any, name: str = "data") -> Batch:
    """A batch from tensors or arrays: floating arrays take torch's default dtype, integer and bool ones keep
    theirs.

    Raises TypeError for what is no tensor or array and ValueError for an empty set, parts of different
    lengths, or floating parts with NaN or infinite entries; each names the part.
    """
    if isinstance(data, dict):
        batch: Batch = {str(k): _tensor(v, f"{name}[{k!r}]") for k, v in data.items()}
    elif isinstance(data, (tuple, list)) and not isinstance(data, torch.Size):
        batch = tuple(_tensor(v, f"{name}[{i}]") for i, v in enumerate(data))
    else:
        batch = _tensor(data, name)
    named = parts(batch, name)
    if not named:
        raise ValueError(f"{name} is an empty {type(data).__name__}: it takes at least one tensor")
    for label, part in named.items():
        if part.dim() == 0:
            raise ValueError(f"{label} is a single number: its first dimension must run over the data")
        if len(part) == 0:
            raise ValueError(f"{label} is empty, shape {tuple(part.shape)}: it takes at least one row")
    lengths = {label: len(part) for label, part in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"the parts of {name} have different lengths: {lengths}; all must share their first dimension"
        )
    for label, part in named.items():
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            row = int(
                (~torch.isfinite(part))
                .flatten(1 if part.dim() > 1 else 0)
                .reshape(len(part), -1)
                .any(-1)
                .nonzero()[0]
            )
            raise ValueError(
                f"{label} has NaN or infinite entries, the first in row {row}: clean or mask them first"
            )
    return batch


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "fiub":
            raise TypeError(f"{name} is an array of {value.dtype}: it takes numbers")
        tensor = torch.from_numpy(np.ascontiguousarray(value))
        return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
    raise TypeError(
        f"{name} is a {type(value).__name__}: it takes a tensor, a numpy array, or a tuple or dict of them"
    )


def parts(batch: Batch, name: str = "data") -> dict[str, Tensor]:
    """The tensors of a batch under names fit for messages."""
    if isinstance(batch, dict):
        return {f"{name}[{k!r}]": v for k, v in batch.items()}
    if isinstance(batch, tuple):
        return {f"{name}[{i}]": v for i, v in enumerate(batch)}
    return {name: batch}


def _map(fn: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    if isinstance(batch, dict):
        return {k: fn(v) for k, v in batch.items()}
    return tuple(map(fn, batch)) if isinstance(batch, tuple) else fn(batch)


def size(batch: Batch) -> int:
    """Number of data in the batch."""
    return len(next(iter(parts(batch).values())))


def rows(batch: Batch, index: Any) -> Batch:
    """The rows ``index`` (a slice or a LongTensor) of every part."""
    return _map(lambda t: t[index], batch)


def same_memory(a: Any, b: Tensor) -> bool:
    """Whether ``a`` is a view of all the numbers of ``b``, whatever its shape."""
    return isinstance(a, Tensor) and a.data_ptr() == b.data_ptr() and a.numel() == b.numel()


def fingerprint(batch: Batch) -> str:
    """A checksum of all numbers of a batch, to tell other data of the same size."""
    total = 0
    for part in parts(batch).values():
        total = zlib.crc32(part.detach().cpu().contiguous().numpy().tobytes(), total)
    return f"{total:08x}"


def repeat(batch: Batch, times: int) -> Batch:
    """The whole batch ``times`` times, one after the other."""
    return _map(lambda t: t.repeat(times, *[1] * (t.dim() - 1)), batch)


def to(batch: Batch, device: torch.device | str) -> Batch:
    return _map(lambda t: t.to(device, non_blocking=True), batch)


def call(fn: Callable, batch: Batch) -> Any:
    """``fn(y)``, ``fn(*batch)`` or ``fn(**batch)``."""
    if isinstance(batch, dict):
        return fn(**batch)
    return fn(*batch) if isinstance(batch, tuple) else fn(batch)


class Minibatches:
    """Minibatches of tensors, a Dataset or a DataLoader; the order of an epoch depends on the seed and its
    number alone."""

    def __init__(self, data: Any, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self.loader = data if isinstance(data, DataLoader) else None
        self.dataset = data if isinstance(data, Dataset) and self.loader is None else None
        self.tensors = None
        self.steps: int | None
        if isinstance(data, IterableDataset):
            raise TypeError(
                "data is an IterableDataset: wrap it in a DataLoader, which brings its own batches"
            )
        if self.loader is not None:
            try:
                self.steps = len(self.loader)
            except TypeError:
                self.steps = None
            self.size = None
            if self.steps == 0:
                raise ValueError("data is a DataLoader without batches")
            return
        if self.dataset is None:
            self.tensors = as_batch(data, "data")
            self.size = size(self.tensors)
        else:
            self.size = len(self.dataset)  # type: ignore[arg-type]
            if self.size == 0:
                raise ValueError("data is an empty Dataset")
        self.steps = math.ceil(self.size / batch_size)

    @property
    def whole(self) -> bool:
        """Whether one batch holds all data."""
        return self.steps == 1

    def fingerprint(self) -> str | int | None:
        """A checksum of data in memory, the number of rows of a Dataset, None for a DataLoader."""
        return self.size if self.tensors is None else fingerprint(self.tensors)

    def first(self) -> Batch:
        """A batch to look at; the stream of an epoch is not touched."""
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
        """All batches in the data's own order (a DataLoader's is its own)."""
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


# --------------------------------------------------------------------------------------------- data sets


def _digits(root: Path | None) -> dict[str, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'pyroelbo[images]'") from error
    x = torch.from_numpy(load_digits().images).reshape(-1, 64).to(torch.get_default_dtype()) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = x[order]
    return {"train": x[:1297], "valid": x[1297:1497], "test": x[1497:]}


def _binarized_mnist(root: Path | None) -> dict[str, Tensor]:
    with np.load(_find(root, "binarized_mnist.npz"), allow_pickle=False) as file:
        return {
            split: torch.from_numpy(np.unpackbits(file[split], axis=1)[:, :784]).to(torch.get_default_dtype())
            for split in ("train", "valid", "test")
        }


def _grey(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.reshape(len(values), -1)).to(torch.get_default_dtype()) / 255


def _mnist(root: Path | None) -> dict[str, Tensor]:
    with np.load(_find(root, "mnist.npz"), allow_pickle=False) as file:
        train, test = _grey(file["train_x"]), _grey(file["test_x"])
    return {"train": train[:-10000], "valid": train[-10000:], "test": test}


def _omniglot(root: Path | None) -> dict[str, Tensor]:
    with np.load(_find(root, "omniglot_28_area.npz"), allow_pickle=False) as file:
        train, test = _grey(file["background"]), _grey(file["evaluation"])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return {"train": train[order[:-1928]], "valid": train[order[-1928:]], "test": test}


def _freyfaces(root: Path | None) -> dict[str, Tensor]:
    with np.load(_find(root, "freyfaces.npz"), allow_pickle=False) as file:
        x = _grey(file["x"])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return {"train": x[:1565], "valid": x[1565:1765], "test": x[1765:]}


_SETS: dict[str, tuple[Callable[[Path | None], dict[str, Tensor]], tuple[int, ...], int]] = {
    # loader, shape of one datum, number of grey levels (16 steps of the digits, 255 of the others)
    "digits": (_digits, (8, 8), 17),
    "binarized_mnist": (_binarized_mnist, (28, 28), 2),
    "mnist": (_mnist, (28, 28), 256),
    "omniglot": (_omniglot, (28, 28), 256),
    "freyfaces": (_freyfaces, (28, 20), 256),
}

NAMES = tuple(_SETS)


def _find(root: Path | None, name: str) -> Path:
    folder = root or Path(os.environ.get("PYROELBO_DATA", ""))
    path = folder / name
    if root is None and "PYROELBO_DATA" not in os.environ:
        raise FileNotFoundError(
            f"{name} is not part of the package: say where it lies by data_dir=, or set PYROELBO_DATA"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    return path


def load(name: str, *, form: str = "grey", root: str | Path | None = None) -> dict[str, Tensor]:
    """The splits ``{"train", "valid", "test"}`` of a data set of images, each [N, D], in row-major order.

    ``form`` says what a pixel is: ``grey`` in [0, 1]; ``binary`` 0 or 1, by threshold at one half; ``bytes``
    the integer grey level, 0 … levels(name) - 1. ``digits`` (scikit-learn's 1,797 digits of 8x8; shuffled
    once and split 1297/200/300) needs no file; ``binarized_mnist``, ``mnist``, ``omniglot`` and ``freyfaces``
    are read from ``root`` or ``$PYROELBO_DATA``. Raises ValueError for unknown names, FileNotFoundError where
    the file is missing.
    """
    if name not in _SETS:
        raise ValueError(f"unknown data set {name!r}: there are {', '.join(NAMES)}")
    splits = _SETS[name][0](None if root is None else Path(root))
    if form == "grey":
        return splits
    if form == "binary":
        return {k: (v > 0.5).to(v.dtype) for k, v in splits.items()}
    if form == "bytes":
        top = levels(name) - 1
        return {k: (v * top).round() for k, v in splits.items()}
    raise ValueError(f"form takes 'grey', 'binary' or 'bytes', got {form!r}")


def labels(name: str, *, root: str | Path | None = None) -> dict[str, Tensor]:
    """The classes 0 … 9 of the splits of ``digits`` or ``mnist``, LongTensors [N] in the order of
    :func:`load`."""
    if name == "digits":
        from sklearn.datasets import load_digits

        y = torch.from_numpy(load_digits().target).long()
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
        return {"train": y[:1297], "valid": y[1297:1497], "test": y[1497:]}
    if name == "mnist":
        with np.load(_find(None if root is None else Path(root), "mnist.npz"), allow_pickle=False) as file:
            train, test = torch.from_numpy(file["train_y"]).long(), torch.from_numpy(file["test_y"]).long()
        return {"train": train[:-10000], "valid": train[-10000:], "test": test}
    raise ValueError(f"{name!r} has no classes here: 'digits' and 'mnist' have")


def shape(name: str) -> tuple[int, ...]:
    """Height and width of one image of the data set."""
    return _SETS[name][1]


def levels(name: str) -> int:
    """Number of grey levels of the data set."""
    return _SETS[name][2]


def windows(
    text: str | bytes, length: int, alphabet: str | bytes | None = None, name: str = "text"
) -> tuple[Tensor, str | bytes]:
    """Text cut into rows of ``length`` symbols, LongTensor [N, length], and the alphabet that numbers them.

    The alphabet is the sorted symbols of the text, unless given; the rest of the text is left out. ValueError,
    naming the symbol and its place, for one that the alphabet lacks, and for a text shorter than a row.
    """
    alphabet = _alphabet(text) if alphabet is None else alphabet
    codes = _codes(text, alphabet, name)
    if not isinstance(length, int) or length < 1 or len(text) < length:
        raise ValueError(f"length takes 1 to the {len(text)} symbols of {name}, got {length!r}")
    rows = len(codes) // length
    return torch.tensor(codes[: rows * length]).reshape(rows, length), alphabet


def strings(
    texts: Sequence[str | bytes],
    length: int | None = None,
    alphabet: str | bytes | None = None,
    name: str = "texts",
) -> tuple[Tensor, str | bytes]:
    """Texts of varying length as rows, LongTensor [N, length] padded with -1, and the alphabet that numbers their
    symbols: as :class:`~pyroelbo.models.Strings` and grammars take them.

    ``length`` is that of the longest text, and the alphabet the sorted symbols of all, unless given. ValueError, naming
    the text, the symbol and its place, for a symbol that the alphabet lacks, for a text longer than ``length``, and for
    no texts.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"{name} is one {type(texts).__name__}: it takes a list of them (one text is cut by windows)"
        )
    if not len(texts):
        raise ValueError(f"{name} is empty: it takes at least one text")
    kinds = {type(text).__name__ for text in texts}
    if kinds not in ({"str"}, {"bytes"}):
        raise TypeError(f"{name} holds {' and '.join(sorted(kinds))}: it takes all str, or all bytes")
    if alphabet is None:
        alphabet = _alphabet(type(texts[0])().join(texts))  # type: ignore[arg-type]
    codes = [_codes(text, alphabet, f"{name}[{i}]") for i, text in enumerate(texts)]
    longest = max(range(len(codes)), key=lambda i: len(codes[i]))
    length = max(len(codes[longest]), 1) if length is None else length
    if len(codes[longest]) > length:
        raise ValueError(
            f"{name}[{longest}] has {len(codes[longest])} symbols: length={length} is too short for it"
        )
    return torch.tensor([row + [-1] * (length - len(row)) for row in codes]), alphabet


def _alphabet(text: str | bytes) -> str | bytes:
    return bytes(sorted(set(text))) if isinstance(text, bytes) else "".join(sorted(set(text)))


def _codes(text: str | bytes, alphabet: str | bytes, name: str) -> list[int]:
    if isinstance(text, bytes) != isinstance(alphabet, bytes):
        raise TypeError(
            f"{name} is {type(text).__name__} and alphabet {type(alphabet).__name__}: take one kind for both"
        )
    number: dict[Any, int] = {symbol: i for i, symbol in enumerate(alphabet)}
    try:
        return [number[symbol] for symbol in text]
    except KeyError:
        place = next(i for i, symbol in enumerate(text) if symbol not in number)
        raise ValueError(
            f"{name} has {text[place : place + 1]!r} at place {place}, which the alphabet of {len(alphabet)} symbols lacks"
        ) from None


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels in [0, 1] drawn as coin flips with these probabilities: *stochastic* binarization, a fresh set
    each call."""
    return torch.bernoulli(x, generator=generator)

"""Image data sets: the digits that ship with scikit-learn, and benchmark files read from a path. Nothing is
downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyroelbo.files import read_npz

__all__ = ["NAMES", "binarize", "labels", "levels", "load", "shape"]


def _digits(root: Path | None) -> dict[str, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits ship with scikit-learn: pip install 'pyroelbo[images]'") from error
    x = torch.from_numpy(load_digits().images).reshape(-1, 64).to(torch.get_default_dtype()) / 16
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x = x[order]
    return {"train": x[:1297], "valid": x[1297:1497], "test": x[1497:]}


def _binarized_mnist(root: Path | None) -> dict[str, Tensor]:
    rows = ("u", (None, 98))
    file = read_npz(_find(root, "binarized_mnist.npz"), dict.fromkeys(("train", "valid", "test"), rows))
    return {
        split: torch.from_numpy(np.unpackbits(packed, axis=1)[:, :784]).to(torch.get_default_dtype())
        for split, packed in file.items()
    }


def _grey(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.reshape(len(values), -1)).to(torch.get_default_dtype()) / 255


def _mnist(root: Path | None) -> dict[str, Tensor]:
    images = ("u", (None, 28, 28))
    file = read_npz(_find(root, "mnist.npz"), {"train_x": images, "test_x": images})
    train, test = _grey(file["train_x"]), _grey(file["test_x"])
    return {"train": train[:-10000], "valid": train[-10000:], "test": test}


def _omniglot(root: Path | None) -> dict[str, Tensor]:
    images = ("u", (None, 28, 28))
    file = read_npz(_find(root, "omniglot_28_area.npz"), {"background": images, "evaluation": images})
    train, test = _grey(file["background"]), _grey(file["evaluation"])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    return {"train": train[order[:-1928]], "valid": train[order[-1928:]], "test": test}


def _freyfaces(root: Path | None) -> dict[str, Tensor]:
    x = _grey(read_npz(_find(root, "freyfaces.npz"), {"x": ("u", (None, 28, 20))})["x"])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return {"train": x[:1565], "valid": x[1565:1765], "test": x[1765:]}


_SETS: dict[str, tuple[Callable[[Path | None], dict[str, Tensor]], tuple[int, ...], int]] = {
    # loader, shape of one datum, number of grey levels
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
            f"{name}: expected its folder as data_dir= or in $PYROELBO_DATA, got neither; it is not part "
            "of the package"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _row(name: str) -> tuple[Callable[[Path | None], dict[str, Tensor]], tuple[int, ...], int]:
    if name not in _SETS:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name[:80]!r}")
    return _SETS[name]


def load(name: str, *, form: str = "grey", root: str | Path | None = None) -> dict[str, Tensor]:
    """The splits ``{"train", "valid", "test"}`` of a data set of images, each [N, D], in row-major order.

    ``form`` is that of a pixel: ``grey`` in [0, 1]; ``binary`` 0 or 1, thresholded at one half; ``bytes`` the
    integer grey level, 0 … levels(name) - 1. ``digits`` (scikit-learn's 1,797 digits of 8x8, shuffled once
    and split 1297/200/300) needs no file; ``binarized_mnist``, ``mnist``, ``omniglot`` and ``freyfaces`` are
    read from ``root`` or ``$PYROELBO_DATA``. Raises ValueError for unknown names, FileNotFoundError for
    missing files.
    """
    splits = _row(name)[0](None if root is None else Path(root))
    if form == "grey":
        return splits
    if form == "binary":
        return {k: (v > 0.5).to(v.dtype) for k, v in splits.items()}
    if form == "bytes":
        top = levels(name) - 1
        return {k: (v * top).round() for k, v in splits.items()}
    raise ValueError(f"form: expected 'grey', 'binary' or 'bytes', got {form!r}")


def labels(name: str, *, root: str | Path | None = None) -> dict[str, Tensor]:
    """The classes 0 … 9 of the splits of ``digits`` or ``mnist``, LongTensors [N] in the order of
    :func:`load`."""
    if name == "digits":
        from sklearn.datasets import load_digits

        y = torch.from_numpy(load_digits().target).long()
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
        return {"train": y[:1297], "valid": y[1297:1497], "test": y[1497:]}
    if name == "mnist":
        classes = ("u", (None,))
        path = _find(None if root is None else Path(root), "mnist.npz")
        file = read_npz(path, {"train_y": classes, "test_y": classes})
        train, test = (torch.from_numpy(file[k]).long() for k in ("train_y", "test_y"))
        return {"train": train[:-10000], "valid": train[-10000:], "test": test}
    raise ValueError(f"name: expected 'digits' or 'mnist', which have classes, got {name!r}")


def shape(name: str) -> tuple[int, ...]:
    """Height and width of one image of the data set."""
    return _row(name)[1]


def levels(name: str) -> int:
    """Number of grey levels of the data set."""
    return _row(name)[2]


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stochastic binarization: Bernoulli draws with probabilities ``x`` in [0, 1], different at each call."""
    return torch.bernoulli(x, generator=generator)

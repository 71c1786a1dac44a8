"""Image data sets: the digits that ship with scikit-learn, and benchmark files read from a path. Nothing is
downloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroelbo.data.colour import photographs
from pyroelbo.data.dataset import Dataset
from pyroelbo.files import read_npz

__all__ = ["binarize", "binarized_mnist", "digits", "freyfaces", "mnist", "omniglot", "patches"]


def digits(root: Path | None) -> Dataset:
    """scikit-learn's 1,797 digits of 8x8 in 17 grey levels, shuffled once and split 1297/200/300."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits ship with scikit-learn: pip install 'pyroelbo[images]'") from error
    found = load_digits()
    x = torch.from_numpy(found.images).reshape(-1, 64).to(torch.get_default_dtype())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cuts = {"train": order[:1297], "valid": order[1297:1497], "test": order[1497:]}
    return _pictures("digits", (8, 8), 17, _rows(x, cuts), _rows(torch.from_numpy(found.target), cuts))


def patches(root: Path | None) -> Dataset:
    """5,552 squares of 16x16 of six photographs of scikit-image (camera, brick, grass, gravel, coins, moon)
    in 256 grey levels, split 4552/500/500 at random: neighbours may lie in two splits."""
    found, rows = photographs(), []
    for name in ("camera", "brick", "grass", "gravel", "coins", "moon"):
        picture = getattr(found, name)()
        height, width = (side // 16 for side in picture.shape)
        squares = picture[: 16 * height, : 16 * width].reshape(height, 16, width, 16)
        rows.append(squares.swapaxes(1, 2).reshape(-1, 256))
    x = _bytes(np.concatenate(rows))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cuts = {"train": order[:-1000], "valid": order[-1000:-500], "test": order[-500:]}
    return _pictures("patches", (16, 16), 256, _rows(x, cuts), light=True)


def binarized_mnist(root: Path | None) -> Dataset:
    """Static binarized MNIST, 50,000, 10,000 and 10,000 images of 28x28, from ``binarized_mnist.npz``."""
    rows = ("u", (None, 98))
    file = read_npz(_find(root, "binarized_mnist.npz"), dict.fromkeys(("train", "valid", "test"), rows))
    splits = {
        split: torch.from_numpy(np.unpackbits(packed, axis=1)[:, :784]).to(torch.get_default_dtype())
        for split, packed in file.items()
    }
    return Dataset("binarized_mnist", "binary", (28, 28), splits, 2)


def mnist(root: Path | None) -> Dataset:
    """MNIST, 28x28 in 256 grey levels, from ``mnist.npz``; the last 10,000 training images are "valid"."""
    pictures, classes = ("u", (None, 28, 28)), ("u", (None,))
    file = read_npz(
        _find(root, "mnist.npz"),
        {"train_x": pictures, "test_x": pictures, "train_y": classes, "test_y": classes},
    )
    cuts = {"train": slice(None, -10000), "valid": slice(-10000, None)}
    splits = _rows(_bytes(file["train_x"]), cuts) | {"test": _bytes(file["test_x"])}
    train, test = (torch.from_numpy(file[k]).long() for k in ("train_y", "test_y"))
    return _pictures("mnist", (28, 28), 256, splits, _rows(train, cuts) | {"test": test})


def omniglot(root: Path | None) -> Dataset:
    """Omniglot, 28x28 by area averaging, from ``omniglot_28_area.npz``; 1,928 of the background characters
    are "valid"."""
    pictures = ("u", (None, 28, 28))
    path = _find(root, "omniglot_28_area.npz")
    file = read_npz(path, {"background": pictures, "evaluation": pictures})
    train, test = _bytes(file["background"]), _bytes(file["evaluation"])
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    splits = {"train": train[order[:-1928]], "valid": train[order[-1928:]], "test": test}
    return _pictures("omniglot", (28, 28), 256, splits)


def freyfaces(root: Path | None) -> Dataset:
    """Frey's faces, 28x20 in 256 grey levels, from ``freyfaces.npz``, split 1565/200/200 at random."""
    x = _bytes(read_npz(_find(root, "freyfaces.npz"), {"x": ("u", (None, 28, 20))})["x"])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cuts = {"train": order[:1565], "valid": order[1565:1765], "test": order[1765:]}
    return _pictures("freyfaces", (28, 20), 256, _rows(x, cuts), light=True)


def _bytes(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.reshape(len(values), -1)).to(torch.get_default_dtype())


def _rows(x: Tensor, cuts: Mapping[str, Any]) -> dict[str, Tensor]:
    return {split: x[rows] for split, rows in cuts.items()}


def _pictures(
    name: str, shape: tuple[int, int], levels: int, splits: Any, labels: Any = (), light: bool = False
) -> Dataset:
    return Dataset(name, "bytes", shape, splits, levels, labels=dict(labels), light=light)


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


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Stochastic binarization: Bernoulli draws with probabilities ``x`` in [0, 1], different at each call."""
    return torch.bernoulli(x, generator=generator)

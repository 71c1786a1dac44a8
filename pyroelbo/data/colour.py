"""Colour pictures: the reversible transform to luma and chroma, the scenes that ship with scikit-image, and
pictures of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroelbo.data.dataset import Dataset
from pyroelbo.files import PICTURES, read_picture

__all__ = ["SCENES", "from_ycocg", "photographs", "pictures", "read_folder", "scenes", "to_ycocg"]

SCENES = ("chelsea", "coffee", "rocket", "retina", "ihc", "hubble", "motorcycle", "astronaut")
_SIDE = 128


def to_ycocg(rgb: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    """Luma [*] in 0 … 255 and chroma (Co, Cg) [*, 2] in -255 … 255, int32, of integer pictures [*, 3] in 0 …
    255.

    Co = R - B, t = B + ⌊Co/2⌋, Cg = G - t, Y = t + ⌊Cg/2⌋: :func:`from_ycocg` undoes it bit for bit, so
    probabilities of chroma given luma are probabilities of colours given luma. Raises ValueError for other
    shapes, dtypes and values. Source: Malvar and Sullivan (2003), YCoCg-R.
    """
    rgb = torch.as_tensor(rgb)
    if rgb.dim() < 1 or rgb.shape[-1] != 3 or rgb.is_floating_point() or rgb.dtype == torch.bool:
        raise ValueError(f"rgb: expected integers [*, 3], got {rgb.dtype} of shape {tuple(rgb.shape)}")
    if rgb.numel() and (int(rgb.min()) < 0 or int(rgb.max()) > 255):
        raise ValueError(f"rgb: expected 0 … 255, got {int(rgb.min())} … {int(rgb.max())}")
    red, green, blue = rgb.to(torch.int32).unbind(-1)  # bytes would wrap around
    orange = red - blue
    t = blue + (orange >> 1)
    leaf = green - t
    return t + (leaf >> 1), torch.stack([orange, leaf], -1)


def from_ycocg(luma: Tensor, chroma: Tensor) -> Tensor:
    """The pictures [*, 3], int32, of luma [*] and chroma [*, 2]; draws of chroma may lie outside 0 … 255."""
    orange, leaf = chroma.to(torch.int32).unbind(-1)
    t = luma.to(torch.int32) - (leaf >> 1)
    blue = t - (orange >> 1)
    return torch.stack([blue + orange, leaf + t, blue], -1)


def pictures(name: str, splits: dict[str, Tensor], size: Sequence[int]) -> Dataset:
    """The data set of kind ``colour`` of bytes [N, H·W·3]; ValueError where no picture has a colour."""
    train = splits["train"].unflatten(-1, (-1, 3))
    if bool((train == train[..., :1]).all()):
        raise ValueError(f"{name}: expected colours, got grey pictures: red, green and blue agree everywhere")
    return Dataset(name, "colour", (*size, 3), splits, 256)


def scenes(root: Path | None) -> Dataset:
    """Eight photographs of scikit-image in 128x128: reduced by averaging squares of whole pixels, and cut to
    the middle. "train" are the first seven of :data:`SCENES`, "test" the astronaut."""
    found = photographs()
    files = {"retina": "retina.jpg", "hubble": "hubble_deep_field.jpg", "rocket": "rocket.jpg"}
    files["motorcycle"] = "motorcycle_left.png"
    folder = Path(found.__file__).parent
    rows = [_reduced(read_picture(folder / files.get(name, f"{name}.png"))) for name in SCENES]
    y = torch.from_numpy(np.stack(rows)).flatten(1)
    return pictures("scenes", {"train": y[:-1], "test": y[-1:]}, (_SIDE, _SIDE))


def photographs() -> Any:
    """The module ``skimage.data``; ImportError, with the remedy, without scikit-image."""
    try:
        import skimage.data as found
    except ImportError as error:
        raise ImportError("the photographs ship with scikit-image: pip install 'pyroelbo[images]'") from error
    return found


def _reduced(picture: np.ndarray) -> np.ndarray:
    """[128, 128, 3]: each pixel the rounded mean of a square of pixels."""
    each = min(picture.shape[:2]) // _SIDE
    cut = _middle(picture, (_SIDE * each, _SIDE * each)).astype(np.int64)
    total = cut.reshape(_SIDE, each, _SIDE, each, 3).sum((1, 3))
    return ((total + each * each // 2) // (each * each)).astype(np.uint8)


def _middle(picture: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    top, left = ((has - keep) // 2 for has, keep in zip(picture.shape, size, strict=False))
    return picture[top : top + size[0], left : left + size[1]]


def read_folder(path: Path) -> tuple[Tensor, tuple[int, int]]:
    """The pictures in a folder in the order of their names, bytes [N, H·W·3], and (H, W); pictures of
    different sizes are cut to the middle H x W that all have.

    Raises ValueError, naming the file, for grey pictures and damaged files, and for a folder without
    pictures.
    """
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{path}: expected pictures named {', '.join('*' + e for e in PICTURES)}, got none")
    rows = [read_picture(file) for file in files]
    size = tuple(min(row.shape[i] for row in rows) for i in range(2))
    y = torch.from_numpy(np.stack([_middle(row, size) for row in rows])).flatten(1)
    return y, size  # type: ignore[return-value]

"""Strings of handwritten digits, column by column, with their labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pyroelbo.data.dataset import Dataset
from pyroelbo.data.images import digits
from pyroelbo.data.views import view

__all__ = ["digit_strings"]

_LONGEST = 6
_COUNTS = {"train": 3000, "valid": 200, "test": 500}


def digit_strings(root: Path | None) -> Dataset:
    """Strings of 2 … 6 of scikit-learn's digits, joined with gaps of 0 … 2 columns: x [B, T, 8] is a
    column of pixels a step, y [B, 6] the digits plus 1 (padded with -1), lengths those of x. The images of
    each split are its own; 3000, 200 and 500 strings, drawn by seeds 0, 1 and 2."""
    images = view(digits(root), ("grey",))
    splits = {
        split: _joined(images[split], images.labels[split], count, seed)  # type: ignore[arg-type]
        for seed, (split, count) in enumerate(_COUNTS.items())
    }
    steps = max(x.shape[1] for x, _, _ in splits.values())
    names = ("", *"0123456789")  # of the labels; 0 is the blank
    return Dataset("digit_strings", "labelled", (8,), splits, 10, steps, names)


def _joined(images: Tensor, classes: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    columns, labels = [], []
    for _ in range(count):
        chosen = draw(0, len(images), int(draw(2, _LONGEST + 1)))
        pieces = []
        for image in images[chosen]:
            used = image.view(8, 8).t()  # a row per column of pixels
            ink = used.sum(1).nonzero()
            gap = used.new_zeros(int(draw(0, 3)), 8)
            pieces += [used[int(ink[0]) : int(ink[-1]) + 1], gap]  # digits may touch
        columns.append(torch.cat(pieces))
        labels.append(classes[chosen] + 1)  # 0 is the blank
    lengths = torch.tensor([len(c) for c in columns])
    y = pad_sequence([*labels, labels[0].new_zeros(_LONGEST)], batch_first=True, padding_value=-1)[:-1]
    return pad_sequence(columns, batch_first=True), y, lengths

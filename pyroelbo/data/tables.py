"""scikit-learn's tables as vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pyroelbo.data.dataset import Dataset
from pyroelbo.data.own import held_out

__all__ = ["table"]


def table(name: str) -> Callable[[Path | None], Dataset]:
    """The loader of the table that scikit-learn calls ``load_NAME``; a fifth of its rows are "test"."""

    def load(root: Path | None) -> Dataset:
        try:
            import sklearn.datasets
        except ImportError as error:
            raise ImportError(f"{name} ships with scikit-learn: pip install 'pyroelbo[images]'") from error
        found = getattr(sklearn.datasets, f"load_{name}")()
        y = torch.from_numpy(found.data).to(torch.get_default_dtype())
        splits = held_out((y, torch.from_numpy(found.target).long()))
        names = tuple(str(column).removesuffix(" (cm)") for column in found.feature_names)
        return Dataset(
            name,
            "vectors",
            (y.shape[1],),
            {split: batch[0] for split, batch in splits.items()},  # type: ignore[index]
            names=names,
            labels={split: batch[1] for split, batch in splits.items()},  # type: ignore[index]
        )

    return load

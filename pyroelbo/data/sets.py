"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pyroelbo.data import images
from pyroelbo.data.dataset import Dataset
from pyroelbo.data.views import view

__all__ = ["NAMES", "load"]

# name: loader, given the folder of files. The first ones need none.
_SETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": images.digits,
    "binarized_mnist": images.binarized_mnist,
    "mnist": images.mnist,
    "omniglot": images.omniglot,
    "freyfaces": images.freyfaces,
}

NAMES = tuple(_SETS)


def load(name: str, kind: str | None = None, *, root: str | Path | None = None) -> Dataset:
    """A data set by name, as it is or seen as another ``kind`` of :data:`~pyroelbo.data.KINDS`.

    Images are rows [N, D] in row-major order. ``digits`` needs no file; ``binarized_mnist``, ``mnist``,
    ``omniglot`` and ``freyfaces`` are read from ``root`` or ``$PYROELBO_DATA``. Raises ValueError for unknown
    names and kinds, FileNotFoundError for missing files.
    """
    if name not in _SETS:
        raise ValueError(f"name: expected one of {', '.join(NAMES)}, got {name[:80]!r}")
    found = _SETS[name](None if root is None else Path(root))
    return found if kind is None else view(found, (kind,))

"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from pyroelbo.data import colour, formulas, handwriting, images, own, sources, tables
from pyroelbo.data.dataset import Dataset
from pyroelbo.data.views import view

__all__ = ["NAMES", "load"]

# name: loader, given the folder of files. Only those that read files need one.
_SETS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": images.digits,
    "iris": tables.table("iris"),
    "wine": tables.table("wine"),
    "breast_cancer": tables.table("breast_cancer"),
    "words": sources.words,
    "expressions": sources.expressions,
    "docstrings": sources.docstrings,
    "digit_strings": handwriting.digit_strings,
    "scenes": colour.scenes,
    "patches": images.patches,
    "map_colouring": formulas.map_colouring,
    "binarized_mnist": images.binarized_mnist,
    "mnist": images.mnist,
    "omniglot": images.omniglot,
    "freyfaces": images.freyfaces,
}

NAMES = tuple(_SETS)


def load(
    data: str | Path,
    kind: str | None = None,
    *,
    columns: Sequence[str] = (),
    root: str | Path | None = None,
) -> Dataset:
    """A data set by name, or from a file of one's own, as it is or seen as another ``kind`` of
    :data:`~pyroelbo.data.KINDS`.

    Files are ``*.npy``, ``*.npz``, ``*.csv`` (of which ``columns`` may be chosen), ``*.txt`` and ``*.cnf``,
    or a folder of pictures, see :func:`pyroelbo.data.own.read`. Images are rows [N, D] in row-major order.
    ``binarized_mnist``, ``mnist``, ``omniglot`` and ``freyfaces`` are read from ``root`` or
    ``$PYROELBO_DATA``; the others ship with Python, scikit-learn and scikit-image, or are made. Raises
    ValueError for unknown names and kinds and for files that cannot be used, FileNotFoundError for missing
    files.
    """
    folder = str(data) not in _SETS and Path(data).is_dir()
    if folder or Path(data).suffix.lower() in own.FORMATS:
        found = own.read(Path(data).absolute(), columns)
    elif str(data) not in _SETS:
        files = ", ".join("*" + ending for ending in own.FORMATS)
        raise ValueError(
            f"data: expected one of {', '.join(NAMES)}, or a file {files}, or a folder of pictures, got "
            f"{str(data)[-200:]!r}"
        )
    else:
        found = _SETS[str(data)](None if root is None else Path(root))
    if kind is not None:
        found = view(found, (kind,))
    return found

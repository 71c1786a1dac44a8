"""Data: image data sets by name, and texts or sequences of your own as padded rows."""

from pyroelbo.data.images import NAMES, binarize, labels, levels, load, shape
from pyroelbo.data.sequences import sequences
from pyroelbo.data.text import strings, windows

__all__ = ["NAMES", "binarize", "labels", "levels", "load", "sequences", "shape", "strings", "windows"]

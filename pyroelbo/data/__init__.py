"""Data to train on: data sets of images by name, and a user's own texts as rows."""

from pyroelbo.data.images import NAMES, binarize, labels, levels, load, shape
from pyroelbo.data.text import strings, windows

__all__ = ["NAMES", "binarize", "labels", "levels", "load", "shape", "strings", "windows"]

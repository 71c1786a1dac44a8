"""Data: sets by name, their kinds, and texts or sequences of your own as padded rows."""

from pyroelbo.data.colour import SCENES, from_ycocg, to_ycocg
from pyroelbo.data.dataset import KINDS, Dataset, Kind
from pyroelbo.data.images import binarize
from pyroelbo.data.sequences import sequences
from pyroelbo.data.sets import NAMES, load
from pyroelbo.data.superpixels import superpixels
from pyroelbo.data.text import strings, windows
from pyroelbo.data.views import VIEWS, view, views

__all__ = [
    "KINDS",
    "NAMES",
    "SCENES",
    "VIEWS",
    "Dataset",
    "Kind",
    "binarize",
    "from_ycocg",
    "load",
    "sequences",
    "strings",
    "superpixels",
    "to_ycocg",
    "view",
    "views",
    "windows",
]

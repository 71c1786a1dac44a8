"""A gallery of programs as Pyro's users write them, with ln p(y) of each by means outside the library."""

from tests.programs import globals, hierarchies, idioms, latents, mixtures, others, regressions, sequences
from tests.programs.base import PROGRAMS

__all__ = [
    "PROGRAMS",
    "globals",
    "hierarchies",
    "idioms",
    "latents",
    "mixtures",
    "others",
    "regressions",
    "sequences",
]

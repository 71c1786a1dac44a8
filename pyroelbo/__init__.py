"""pyroelbo: latent-variable models as Pyro model/guide pairs, and how tight their bounds are."""

import importlib
from typing import TYPE_CHECKING, Any

from pyroelbo import data, evidence
from pyroelbo._version import __version__
from pyroelbo.evaluation.local import unamortized
from pyroelbo.evidence import audit
from pyroelbo.pair import ExactPair, LatentPath, Pair, within_datum
from pyroelbo.results import Audit, Bound, Gap, Run
from pyroelbo.training.fit import fit

if TYPE_CHECKING:
    from pyroelbo import compiled, distributions, encoders, models, objectives, priors, report
    from pyroelbo.training.em import fit_em

__all__ = [
    "Audit",
    "Bound",
    "ExactPair",
    "Gap",
    "LatentPath",
    "Pair",
    "Run",
    "__version__",
    "audit",
    "compiled",
    "data",
    "distributions",
    "encoders",
    "evidence",
    "fit",
    "fit_em",
    "models",
    "objectives",
    "priors",
    "report",
    "unamortized",
    "within_datum",
]


def __getattr__(name: str) -> Any:
    # What most programs do not use is imported when it is first named.
    if name in ("compiled", "distributions", "encoders", "models", "objectives", "priors", "report"):
        return importlib.import_module(f"pyroelbo.{name}")
    if name == "fit_em":
        return importlib.import_module("pyroelbo.training.em").fit_em
    raise AttributeError(f"module 'pyroelbo' has no attribute {name!r}")

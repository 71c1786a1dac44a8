"""pyroelbo: latent-variable models as Pyro model/guide pairs, and how tight their bounds are."""

from pyroelbo import data, distributions, evidence, models
from pyroelbo._version import __version__
from pyroelbo.em import fit_em
from pyroelbo.evidence import audit
from pyroelbo.pair import ExactPair, Pair, within_datum
from pyroelbo.records import Audit, Bound, Gap, Run
from pyroelbo.train import fit

__all__ = [
    "Audit",
    "Bound",
    "ExactPair",
    "Gap",
    "Pair",
    "Run",
    "__version__",
    "audit",
    "data",
    "distributions",
    "evidence",
    "fit",
    "fit_em",
    "models",
    "within_datum",
]

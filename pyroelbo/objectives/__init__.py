"""Training objectives beside Pyro's own: each is a Pyro ``ELBO``, for ``SVI(loss=...)`` and for ``fit`` alike."""

from pyroelbo.objectives.base import Weighted_ELBO
from pyroelbo.objectives.exact import Evidence_ELBO, Exact_ELBO, Hard_ELBO
from pyroelbo.objectives.importance import IWAE_ELBO
from pyroelbo.objectives.layered import Layered_ELBO, mean_field_fault
from pyroelbo.objectives.registry import OBJECTIVES

__all__ = [
    "IWAE_ELBO",
    "OBJECTIVES",
    "Evidence_ELBO",
    "Exact_ELBO",
    "Hard_ELBO",
    "Layered_ELBO",
    "Weighted_ELBO",
    "mean_field_fault",
]

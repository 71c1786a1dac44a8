"""Training objectives beyond Pyro's own. Those of one loss are a Pyro ``ELBO``, for ``SVI(loss=...)`` and
``fit``.
"""

from pyroelbo.objectives.base import Objective, Update, Weighted_ELBO
from pyroelbo.objectives.exact import Evidence_ELBO, Exact_ELBO, Hard_ELBO
from pyroelbo.objectives.importance import IWAE_ELBO
from pyroelbo.objectives.layered import Layered_ELBO
from pyroelbo.objectives.order import mean_field_fault
from pyroelbo.objectives.registry import OBJECTIVES, build

__all__ = [
    "IWAE_ELBO",
    "OBJECTIVES",
    "Evidence_ELBO",
    "Exact_ELBO",
    "Hard_ELBO",
    "Layered_ELBO",
    "Objective",
    "Update",
    "Weighted_ELBO",
    "build",
    "mean_field_fault",
]

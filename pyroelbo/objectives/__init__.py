"""Training objectives beyond Pyro's own. Those of one loss are a Pyro ``ELBO``, for ``SVI(loss=...)`` and
``fit``.
"""

from pyroelbo.objectives.aggressive import Aggressive
from pyroelbo.objectives.base import Objective, Update, Weighted_ELBO
from pyroelbo.objectives.discrete import ESTIMATORS, Discrete_ELBO
from pyroelbo.objectives.exact import Evidence_ELBO, Exact_ELBO, Hard_ELBO
from pyroelbo.objectives.importance import IWAE_ELBO
from pyroelbo.objectives.layered import Layered_ELBO, Rate_ELBO
from pyroelbo.objectives.order import mean_field_fault
from pyroelbo.objectives.progressive import Progressive_ELBO
from pyroelbo.objectives.registry import OBJECTIVES, build
from pyroelbo.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep

__all__ = [
    "ESTIMATORS",
    "IWAE_ELBO",
    "OBJECTIVES",
    "Aggressive",
    "Discrete_ELBO",
    "Evidence_ELBO",
    "Exact_ELBO",
    "Hard_ELBO",
    "Layered_ELBO",
    "Objective",
    "Progressive_ELBO",
    "Rate_ELBO",
    "ReweightedWakeSleep",
    "Update",
    "WakeSleep",
    "Weighted_ELBO",
    "build",
    "mean_field_fault",
]

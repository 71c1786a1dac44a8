"""The objectives that ``fit`` knows by name; one row an objective."""

from __future__ import annotations

from collections.abc import Callable

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyroelbo.objectives.exact import Evidence_ELBO, Hard_ELBO
from pyroelbo.objectives.importance import IWAE_ELBO
from pyroelbo.objectives.layered import Layered_ELBO

__all__ = ["OBJECTIVES"]

OBJECTIVES: dict[str, Callable[[], ELBO]] = {
    "elbo": Trace_ELBO,
    "mean_field": TraceMeanField_ELBO,
    "layered": Layered_ELBO,
    "hard": Hard_ELBO,
    "iwae": IWAE_ELBO,
    "enum": lambda: TraceEnum_ELBO(max_plate_nesting=1),
    "evidence": Evidence_ELBO,
}

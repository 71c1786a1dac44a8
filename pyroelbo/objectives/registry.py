"""The objectives that ``fit`` knows by name; one row an objective."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

from pyroelbo.objectives.aggressive import Aggressive
from pyroelbo.objectives.base import Objective, adapt
from pyroelbo.objectives.discrete import ESTIMATORS, Discrete_ELBO
from pyroelbo.objectives.exact import Evidence_ELBO, Exact_ELBO, Hard_ELBO
from pyroelbo.objectives.importance import IWAE_ELBO
from pyroelbo.objectives.layered import Layered_ELBO
from pyroelbo.objectives.progressive import Progressive_ELBO
from pyroelbo.objectives.wake_sleep import ReweightedWakeSleep, WakeSleep, generator_of
from pyroelbo.pair import ExactPair, Pair

__all__ = ["OBJECTIVES", "build"]


def _elbo(pair: Pair, particles: int) -> ELBO:
    return Exact_ELBO() if isinstance(pair, ExactPair) and pair.exact_guide else Trace_ELBO()


def _iwae(gradient: str) -> Callable[[Pair, int], ELBO]:
    def make(pair: Pair, particles: int) -> ELBO:
        if particles < 2 and gradient != "stl":
            raise ValueError(
                f"particles: expected at least 2 for an importance-weighted objective, got {particles}: with "
                f"one draw it is 'elbo'"
            )
        return IWAE_ELBO(particles, gradient=gradient)

    return make


def _discrete(name: str) -> Callable[[Pair, int], Any]:
    return lambda pair, particles: Discrete_ELBO(name, particles)


# name: (pair, particles) -> an Objective or one of Pyro's losses
OBJECTIVES: dict[str, Callable[[Pair, int], Any]] = {
    "elbo": _elbo,
    "mean_field": lambda pair, particles: TraceMeanField_ELBO(),
    "layered": lambda pair, particles: Layered_ELBO(),
    "aggressive": lambda pair, particles: Aggressive(_elbo(pair, particles), generator_of(pair)),
    "hard": lambda pair, particles: Hard_ELBO(),
    "progressive": lambda pair, particles: Progressive_ELBO(),
    "iwae": _iwae("plain"),
    "stl": _iwae("stl"),
    "dreg": _iwae("dreg"),
    "enum": lambda pair, particles: TraceEnum_ELBO(max_plate_nesting=1),
    "evidence": lambda pair, particles: Evidence_ELBO(),
    "wake_sleep": lambda pair, particles: WakeSleep(generator_of(pair)),
    "reweighted_wake_sleep": lambda pair, particles: ReweightedWakeSleep(particles, generator_of(pair)),
    **{name: _discrete(name) for name in ESTIMATORS if name != "enumerate"},  # alone it is "enum"
}


def build(objective: Any, pair: Pair, particles: int) -> Objective:
    """The objective of this name for ``pair``, or ``objective`` itself, an :class:`Objective` or a Pyro ELBO.

    Raises ValueError for unknown names, TypeError for what is no loss that ``fit`` can train.
    """
    if not isinstance(objective, str):
        return adapt(objective)
    if objective not in OBJECTIVES:
        raise ValueError(
            f"objective: expected one of {tuple(OBJECTIVES)}, an Objective or a pyro.infer.ELBO, got "
            f"{objective!r}"
        )
    return adapt(OBJECTIVES[objective](pair, particles))

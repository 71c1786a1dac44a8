"""Choice of estimators and their sizes from a time or a number of evaluations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.annealed import ais
from pyroelbo.evidence.bounds import elbo
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.quadrature import quadrature
from pyroelbo.evidence.unconstrained import Unconstrained
from pyroelbo.numerics import duration
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["Budget"]

_MIN_DRAWS = 8  # of the smallest ELBO and IWAE worth printing
_REFERENCE_SHARE = 0.7  # of the budget
_DRAWS_SHARE = 0.9  # of what is left, the rest is for checks of the table
_QUADRATURE = {1: 10_000, 2: 110_000}  # evaluations per datum, by dimensions
_CHAIN = 3 * 5 * (16 + 8)  # evaluations per datum and temperature of AIS with its defaults
_MIN_TEMPERATURES = 20  # below which AIS is not worth its pilot
_PILOT_SHARE = 0.1  # of the time
_MAX_PILOT_DRAWS = 32_768  # in one pass
_MAX_WEIGHTS = 40_000_000  # held at once
_TRIAL = 4  # data whose reference is timed


class Budget:
    """Spends ``budget``, seconds as ``"1min"`` or evaluations as an integer, first on references, then on
    draws.

    For a time, a pilot on a few data measures evaluations per second. ValueError for anything else, and for a
    budget too small for eight draws per datum.
    """

    def __init__(self, budget: str | int, pair: Pair, batch: Batch, scope: str) -> None:
        self.budget, self.pair, self.batch, self.scope = budget, pair, batch, scope
        self.data = 1 if scope == "joint" else batches.size(batch)
        self.seconds = duration(budget) if isinstance(budget, str) else None
        self.started = time.monotonic()
        self.speed = 0.0
        self.evaluations: float
        if self.seconds is not None:
            self.speed = self._pilot(self.seconds)
            self.evaluations = self.seconds * self.speed
        elif isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(
                f"budget: expected a time such as '1min' or a number of evaluations, got {budget!r}"
            )
        else:
            self.evaluations = budget
        needed = 2 * _MIN_DRAWS * self.data
        if self.evaluations < needed:
            speed = "" if self.seconds is None else f" (some {self.speed:,.0f} a second here)"
            raise ValueError(
                f"budget: expected at least {needed:,} evaluations for any estimate of {self.data} data, got "
                f"{budget!r}, {self.evaluations:,.0f} evaluations{speed}. Give more, or fewer data"
            )

    def references(self) -> tuple[Sequence[str | Bound], list[str]]:
        """The reference to compare the bounds with, and notes on why there is no better one.

        A reference that must take all data at once is computed here; of others the cost is extrapolated from
        a few data.
        """
        notes = []
        for estimator in (exact, quadrature):
            name = estimator.__name__
            try:
                if estimator is quadrature:
                    self._check_grid()
                bound, seconds = self._trial(estimator)
            except Unavailable as reason:
                notes.append(f"no {name} value: {reason}")
                continue
            size = 1 if self.scope == "joint" else bound.value.numel()
            if size == self.data:
                return (bound,), notes
            scale = self.data / size
            if self._affords(scale * seconds, scale * bound.cost):
                return (name,), notes
            notes.append(f"no {name} value: it would take more than the budget")
        try:
            Evaluator(self.pair, self.batch, scope=self.scope).refuse_scales("AIS")
        except Unavailable as reason:
            notes.append(f"no ais value: {reason}")
            return (), notes
        each = _REFERENCE_SHARE * self.evaluations / self.data
        needed = _MIN_TEMPERATURES * _CHAIN
        if each >= needed:
            return ("ais",), notes
        notes.append(f"no AIS: {_MIN_TEMPERATURES} temperatures need {needed:,} evaluations per datum")
        return (), notes

    def _trial(self, estimator: Callable[..., Bound]) -> tuple[Bound, float]:
        """The estimator on a few data (all of them in joint scope), and its seconds."""
        few = self.batch if self.scope == "joint" else batches.rows(self.batch, slice(0, _TRIAL))
        start = time.monotonic()
        bound = estimator(self.pair, few, scope=self.scope)
        return bound, time.monotonic() - start

    def _affords(self, seconds: float, evaluations: float) -> bool:
        if self.seconds is None:
            return evaluations <= _REFERENCE_SHARE * self.evaluations
        return seconds <= _REFERENCE_SHARE * (self.seconds - (time.monotonic() - self.started))

    def _check_grid(self) -> None:
        """:class:`Unavailable` if the usual cost of a quadrature exceeds the budget: none is tried then."""
        needed = _QUADRATURE.get(Unconstrained(Evaluator(self.pair, self.batch, scope=self.scope)).dims, 0)
        if needed > _REFERENCE_SHARE * self.evaluations / self.data:
            raise Unavailable(f"it needs some {needed:,} evaluations per datum")

    def temperatures(self, names: Sequence[Any]) -> int:
        """Number of temperatures, if AIS is among the references."""
        evaluations = self.evaluations
        if self.seconds is not None:
            evaluations = self.seconds * self._gradients() if "ais" in names else 0.0
        return max(2, int(_REFERENCE_SHARE * evaluations / self.data / _CHAIN))

    def particles(self, found: Sequence[Bound]) -> int:
        """Draws per datum, of ELBO and IWAE each, that the rest of the budget allows."""
        if self.seconds is not None:
            left = _DRAWS_SHARE * (self.seconds - (time.monotonic() - self.started)) * self.speed
        else:
            left = self.evaluations - sum(b.cost for b in found)
        return int(max(_MIN_DRAWS, min(left / (2 * self.data), _MAX_WEIGHTS // self.data)))

    def note(self, particles: int, found: Sequence[Bound]) -> str:
        measured = self.seconds is not None and math.isfinite(self.speed)
        speed = f" at some {self.speed:,.0f} evaluations a second" if measured else ""
        chosen = [b.method for b in found] + [f"{particles} draws per datum for ELBO and IWAE each"]
        return f"a budget of {self.budget}{speed} chose {', '.join(chosen)}"

    def _few(self) -> Batch:
        return self.batch if self.scope == "joint" else batches.rows(self.batch, slice(0, 50))

    def _pilot(self, seconds: float) -> float:
        """Evaluations per second, from ELBOs of growing size on a few data."""
        few, particles = self._few(), _MIN_DRAWS

        def once() -> Bound:
            return elbo(self.pair, few, particles, scope=self.scope)

        try:
            once()  # costs that occur only once (building, caches) are not counted
        except Unavailable:
            return math.inf  # nothing is drawn; references are tried
        while True:
            start = time.monotonic()
            bound = once()
            now = time.monotonic()
            # Large passes, like those of the audit, so that the overhead of a call does not count.
            if now - self.started > _PILOT_SHARE * seconds or particles >= _MAX_PILOT_DRAWS:
                return bound.cost / max(now - start, 1e-9)
            particles *= 4

    def _gradients(self) -> float:
        """Evaluations per second, as AIS counts them."""
        start = time.monotonic()
        few = self._few()
        try:
            bound = ais(self.pair, few, 3, scope=self.scope, progress=False)
        except Unavailable:
            bound = ais(self.pair, few, 3, start="prior", scope=self.scope, progress=False)
        return bound.cost / max(time.monotonic() - start, 1e-9)

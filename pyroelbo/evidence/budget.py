"""What an audit can afford: estimators and their sizes from a time or a number of evaluations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.joint import view
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.annealed import ais
from pyroelbo.evidence.bounds import elbo
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.unconstrained import Unconstrained
from pyroelbo.numerics import duration
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["Budget"]

_LEAST = 8  # draws of the smallest ELBO and IWAE worth printing
_SHARE = 0.7  # of the budget that a reference may take
_QUADRATURE = {1: 10_000, 2: 110_000}  # evaluations a datum, by dimensions
_CHAIN = 3 * 5 * (16 + 8)  # evaluations a datum and temperature of AIS with its defaults
_FEWEST = 20  # temperatures below which AIS is not worth its pilot
_PILOT = 0.1  # of the time
_LARGEST = 32_768  # draws in the pilot's largest pass
_MOST = 40_000_000  # weights kept at once


class Budget:
    """Spends ``budget``, seconds as ``"1min"`` or evaluations as an integer, on references first and draws
    then.

    A pilot on a few data measures evaluations a second where the budget is a time. ValueError for what is no
    budget, and for one too small for eight draws a datum.
    """

    def __init__(self, budget: str | int, pair: Pair, batch: Batch, scope: str) -> None:
        self.budget, self.pair, self.batch, self.scope = budget, pair, batch, scope
        self.data = 1 if scope == "joint" else batches.size(batch)
        self.seconds = duration(budget) if isinstance(budget, str) else None
        self.started = time.monotonic()
        self.speed = 0.0
        if self.seconds is not None:
            self.speed = self._pilot(self.seconds)
            self.evaluations = int(self.seconds * self.speed)
        elif isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(f"budget takes a time such as '1min' or a number of evaluations, got {budget!r}")
        else:
            self.evaluations = budget
        needed = 2 * _LEAST * self.data
        if self.evaluations < needed:
            each = "" if self.seconds is None else f", some {self.speed:,.0f} evaluations a second here"
            raise ValueError(
                f"a budget of {budget!r} ({self.evaluations:,} evaluations{each}) is too small for any estimate of "
                f"{self.data} data, which takes {needed:,}: give more, or fewer data"
            )

    def references(self) -> tuple[Sequence[str], list[str]]:
        """What to hold the bounds against, and why nothing better."""
        try:
            few = self.batch if self.scope == "joint" else batches.rows(self.batch, slice(0, 1))
            exact(self.pair, few, scope=self.scope)
            return ("exact",), []
        except Unavailable as reason:
            notes = [f"no exact value: {reason}"]
        each = _SHARE * self.evaluations / self.data
        try:
            dims = Unconstrained(Evaluator(view(self.pair, self.scope), self.batch)).dims
        except Unavailable:
            dims = 0
        if dims in _QUADRATURE:
            if each >= _QUADRATURE[dims]:
                return ("quadrature",), notes
            notes.append(f"no quadrature value: it takes some {_QUADRATURE[dims]:,} evaluations a datum")
        if each >= _FEWEST * _CHAIN:
            return ("ais",), notes
        notes.append(f"no AIS: {_FEWEST} temperatures take {_FEWEST * _CHAIN:,} evaluations a datum")
        return (), notes

    def temperatures(self, names: Sequence[Any]) -> int:
        """Of AIS, where it is among the references."""
        speed = 1.0
        if "ais" in names and self.seconds is not None:
            speed = self._gradients() / self.speed
        return max(2, int(speed * _SHARE * self.evaluations / self.data / _CHAIN))

    def particles(self, found: Sequence[Bound]) -> int:
        """Draws a datum, of ELBO and IWAE each, from what is left."""
        if self.seconds is not None:
            left = (self.seconds - (time.monotonic() - self.started)) * self.speed
        else:
            left = self.evaluations - sum(b.cost for b in found)
        return max(_LEAST, min(int(left / (2 * self.data)), _MOST // self.data))

    def note(self, particles: int, found: Sequence[Bound]) -> str:
        speed = "" if self.seconds is None else f" at some {self.speed:,.0f} evaluations a second"
        chosen = [b.method for b in found] + [f"{particles} draws a datum for ELBO and IWAE each"]
        return f"a budget of {self.budget}{speed} chose {', '.join(chosen)}"

    def _few(self) -> Batch:
        return self.batch if self.scope == "joint" else batches.rows(self.batch, slice(0, 50))

    def _pilot(self, seconds: float) -> float:
        """Evaluations a second, from ELBOs of growing size on a few data."""
        few, particles = self._few(), _LEAST

        def once() -> Bound:
            try:
                return elbo(self.pair, few, particles, scope=self.scope)
            except Unavailable:
                return exact(self.pair, few, scope=self.scope)

        once()  # what happens only once (building, caches) is not counted
        while True:
            start = time.monotonic()
            bound = once()
            now = time.monotonic()
            # Large passes, as the audit's own will be: what each call costs by itself must not count.
            if now - self.started > _PILOT * seconds or particles >= _LARGEST:
                return bound.cost / max(now - start, 1e-9)
            particles *= 4

    def _gradients(self) -> float:
        """Evaluations a second that AIS counts."""
        start = time.monotonic()
        few = self._few()
        try:
            bound = ais(self.pair, few, 3, scope=self.scope, progress=False)
        except Unavailable:
            bound = ais(self.pair, few, 3, start="prior", scope=self.scope, progress=False)
        return bound.cost / max(time.monotonic() - start, 1e-9)

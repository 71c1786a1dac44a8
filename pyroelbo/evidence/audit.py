"""`audit`: the bounds of a pair on the same data, next to the best reference available."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from pyroelbo import batch as batches
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.precision import double, in_double
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evaluation.supports import support_of
from pyroelbo.evidence.annealed import ais
from pyroelbo.evidence.bounds import FEW, elbo, iwae
from pyroelbo.evidence.budget import Budget
from pyroelbo.evidence.conditional import given_globals
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.quadrature import quadrature
from pyroelbo.pair import Pair
from pyroelbo.results import Audit, Bound

__all__ = ["Contradiction", "audit"]


def _ais(pair: Pair, batch: Any, *, temperatures: int, scope: str, progress: bool) -> Bound:
    try:
        return ais(pair, batch, temperatures, scope=scope, progress=progress)
    except Unavailable as reason:
        bound = ais(pair, batch, temperatures, start="prior", scope=scope, progress=progress)
        return replace(bound, notes=(*bound.notes, f"started from the prior: {reason.reason}"))


_REFERENCES: dict[str, Callable[..., Bound]] = {
    "exact": lambda pair, batch, *, scope, **_: exact(pair, batch, scope=scope),
    "quadrature": lambda pair, batch, *, scope, **_: quadrature(pair, batch, scope=scope),
    "ais": _ais,
}
_DEFAULT = ("exact", "quadrature")
_FALSE_ALARM = 1e-9
_ROUNDING = 1e-4  # of the summed terms, within which a draw of an exact guide has ln w = ln p(y)


def audit(
    pair: Pair,
    y: Any,
    *,
    particles: int = 64,
    references: Sequence[str | Bound] | None = None,
    temperatures: int = 1000,
    scope: str = "datum",
    given: str | None = None,
    draws: int = 16,
    num_data: int | None = None,
    budget: str | int | None = None,
    progress: bool = True,
) -> Audit:
    """How tight is the bound? ELBO and IWAE next to a reference, per datum, in nats.

    A pair trained on one term of its bound a step (a diffusion) is audited
    :meth:`~pyroelbo.Pair.written_out`. By default the reference is the exact evidence if there is one, else
    quadrature for one or two continuous latent dimensions; notes say what was not possible and why.

    Args:
        pair: the pair.
        y: the batch.
        particles: draws per datum of ELBO and IWAE each.
        references: some of ``"exact"``, ``"quadrature"`` and ``"ais"``, or Bounds on the same data from
            elsewhere. Gaps are relative to the first one (AIS is a lower bound itself, so that its gaps are
            lower estimates, as a note says).
        temperatures: those of AIS.
        scope: ``"datum"``, or ``"joint"`` for the whole batch as one datum, for models with latents outside
            the data plate.
        given: ``"globals"`` for pairs with latents θ outside the data plate next to local ones: each row is
            one of E_q(θ)[ln p(y_i | θ)], not of ln p(y_i), and KL(q(θ) || p(θ)) is printed once
            (:func:`~pyroelbo.evidence.given_globals`).
        draws: draws of θ, shared by all data.
        num_data: number of all data where ``y`` is a subset, for that KL.
        budget: a time such as ``"90s"``, ``"1min"`` or ``"2h"``, or a number of model evaluations (a gradient
            counts as three). It chooses ``particles`` and ``temperatures``, and AIS if there is nothing
            better; a pilot measures the pair's speed, and a note says what was chosen.
        progress: whether to show progress.

    ``print(audit(pair, y))`` is a table. Raises :class:`~pyroelbo.evidence.Unavailable` for a reference that
    the pair does not have, ValueError for a budget too small for any estimate. Cost: 2 ``particles``
    evaluations per datum and the reference's, for each draw of θ.
    """
    if given not in (None, "globals"):
        raise ValueError(f"given: expected 'globals' or None, got {given!r}")
    if given is not None and (scope == "joint" or budget is not None):
        raise ValueError(
            "given: expected no joint scope and no budget beside it, got scope "
            f"{scope!r} and budget {budget!r}. Choose particles and draws"
        )
    batch = batches.as_batch(y, "y", scope)
    pair = pair.written_out()
    if isinstance(references, (str, Bound)):
        raise ValueError(
            f"references: expected a sequence such as ('ais',), got a {type(references).__name__}"
        )
    notes: list[str] = []
    found: list[Bound] = []
    theta = None if given is None else given_globals(pair, batch, draws, num_data=num_data)

    def measure(estimate: Callable[[Pair], Bound]) -> Bound:
        return estimate(pair) if theta is None else theta.average(estimate)

    with tqdm(total=None, bar_format="{desc}", leave=False, disable=None if progress else True) as bar:

        def tell(what: str) -> None:
            bar.set_description_str(f"audit of {pair.name}: {what}")

        plan = None
        names: Sequence[str | Bound] = _DEFAULT if references is None else references
        if budget is not None:
            tell("pilot")
            plan = Budget(budget, pair, batch, scope)
            if references is None:
                names, why = plan.references()
                notes += why
            temperatures = plan.temperatures(names)
        for name in names:
            if isinstance(name, Bound):
                _check(name, batches.size(batch), "globals" if theta is not None else scope)
                found.append(name)
                continue
            if name not in _REFERENCES:
                raise ValueError(
                    f"references: expected some of {tuple(_REFERENCES)}, or Bounds, got {name!r}"
                )
            tell(name)
            try:
                reference = functools.partial(
                    _REFERENCES[name],
                    batch=batch,
                    temperatures=temperatures,
                    scope=scope,
                    progress=progress,
                )
                found.append(measure(reference))
            except Unavailable as reason:
                if references is not None:
                    raise
                notes.append(f"no {name} value: {reason}")
            if references is None and found:
                break
        if not found:
            notes.append(
                "no reference, hence no gap: lower bounds alone do not tell their distance from ln p(y)"
            )
        elif found[0].kind == "lower":
            notes.append(f"{found[0].method} is a lower bound itself: gaps to it are lower estimates")
        if plan is not None:
            particles = plan.particles(found)
            notes.append(plan.note(particles, found))
        bounds = list(found)
        for estimator in (elbo, iwae):
            tell(f"{estimator.__name__} of {particles} draws")
            try:
                drawing = functools.partial(estimator, y=batch, particles=particles, scope=scope)
                bounds.append(measure(drawing))
            except Unavailable as reason:
                if not bounds:
                    raise
                notes.append(f"no {estimator.__name__} value: {reason}")
    anchor = found[0].method if found else None
    if theta is not None:
        notes = [theta.note, *notes, *_uncovered(theta.pairs[0], batch, scope)]
        return Audit(pair.name, tuple(bounds), anchor, tuple(notes), theta.divergence)
    _check_exact(pair, batch, scope, Audit(pair.name, tuple(bounds), anchor))
    notes += _decided_alone(bounds, found, budget)
    notes += _uncovered(pair, batch, scope)
    if scope == "joint":
        notes.insert(0, f"joint: all {batches.size(batch)} data as one datum")
    return Audit(pair.name, tuple(bounds), anchor, tuple(notes))


def _decided_alone(bounds: Sequence[Bound], references: Sequence[Bound], budget: Any) -> list[str]:
    """What to do where a single draw decides the weights and there is no reference."""
    poor = [b for b in bounds if b.ess is not None and b.draws >= 5 * FEW and bool((b.ess < FEW).any())]
    if references or not poor:
        return []
    where = "" if poor[0].scope == "joint" else " for some data"
    advice = "a larger budget" if budget else "references=('ais',), or a budget such as '1min'"
    return [
        f"{poor[0].method} is decided by a single draw{where}, and this table tells little: annealing moves "
        f"the draws to the posterior ({advice})"
    ]


def _check(bound: Bound, size: int, scope: str) -> None:
    if bound.scope != scope or bound.value.numel() != (1 if scope == "joint" else size):
        expected = "one joint value" if scope == "joint" else f"{size} values per datum"
        raise ValueError(
            f"references: expected {expected}, got {bound.method!r} with scope {bound.scope!r} and shape "
            f"{tuple(bound.value.shape)}"
        )


class Contradiction(RuntimeError):
    """An exact row that the other rows of the ``audit`` refute."""

    def __init__(self, message: str, audit: Audit) -> None:
        super().__init__(message)
        self.audit = audit


def _check_exact(pair: Pair, batch: Any, scope: str, found: Audit) -> None:
    """:class:`Contradiction` if an exact row cannot be right.

    If it is, weights w̄_i of independent draws have E Π_i w̄_i / p(y_i) = 1, so that P(Σ_i (IWAE_i - exact_i)
    > ln 1/α) ≤ α by Markov's inequality, whatever the weights' tails: α = 1e-9. With an exact guide every
    single draw has ln w = ln p(y), which shows a value that is too high as well.
    """
    exact = next((b for b in found.bounds if b.kind == "exact"), None)
    weights = next((b for b in found.bounds if b.method.startswith("iwae")), None)
    if exact is None:
        return
    if weights is not None:
        excess = weights.value.double() - exact.value.double().to(weights.value.device)
        excess = torch.where(weights.value == exact.value, 0.0, excess)  # both -inf
        if float(excess.sum()) > -math.log(_FALSE_ALARM):
            raise Contradiction(
                f"the exact evidence is contradicted: {weights.method} lies {float(excess.sum()):.4g} nats "
                f"above it, summed over {excess.numel()} data, which has a probability below {_FALSE_ALARM} "
                "if it is right. error.audit holds the rows",
                found,
            )
    if scope == "datum" and getattr(pair, "exact_guide", False):
        with torch.no_grad(), in_double(pair) as place:
            terms = Evaluator(pair, double(batches.to(batch, place))).sample(1, latents=False)
        size = sum(t[0].double().abs() for t in (*terms.log_model.values(), *terms.log_guide.values()))
        apart = (terms.log_weight[0].double() - exact.value.to(place)).abs()
        wrong = apart > _ROUNDING * (1 + size)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise Contradiction(
                "the exact evidence is contradicted: the guide is the exact posterior, and ln p(y, z) - ln "
                f"q(z | y) lies {float(apart[row]):.4g} nats from it for datum {row}. error.audit holds the "
                "rows",
                found,
            )


@torch.no_grad()
def _uncovered(pair: Pair, batch: Any, scope: str) -> list[str]:
    """A note for each site whose guide cannot draw values of the prior that may have made the datum: weights
    that stay finite do not show it."""
    try:
        evaluator = Evaluator(pair, batch, scope=scope)
        trace = evaluator.guide_trace()
        sites = {name: trace.nodes[name]["fn"] for name in evaluator.latents}
    except Unavailable:
        return []
    # The support of a finite set or of a structure's labels does not tell what has mass.
    sites = {
        name: fn
        for name, fn in sites.items()
        if type(fn).__name__ != "Delta"
        and not isinstance(fn, StructuredDistribution)
        and not getattr(fn, "has_enumerate_support", False)
    }
    if not sites:
        return []
    try:
        prior = Evaluator(pair, batch, with_guide=False, scope=scope)
    except Unavailable:
        return []
    terms = prior.sample_pass(min(64, max(1, prior.cells // prior.size)))
    seen = [term for name, term in terms.log_model.items() if name not in terms.latents]
    possible = torch.stack(seen).sum(0) > -math.inf  # elsewhere there is no posterior to miss
    notes = []
    for name, fn in sites.items():
        outside = ~support_of(fn).check(terms.latents[name])
        if scope == "datum" and evaluator.latents[name].batch_dims:
            outside = outside.flatten(outside.dim() - evaluator.latents[name].batch_dims).any(-1)
        plates = [1] * (outside.dim() - possible.dim())
        counted = possible.reshape(len(possible), *plates, *possible.shape[1:]).expand_as(outside)
        share = float((outside & counted).sum() / counted.sum().clamp_min(1))
        if share > 0:
            notes.append(
                f"the guide cannot draw {share:.0%} of the prior's values of {name!r}: ELBO, IWAE and AIS "
                "started from it miss that part, and their errors do not show it"
            )
    return notes

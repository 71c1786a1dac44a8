"""The gap of a bound, split into what the guide's family, its amortization and the estimator lose."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.local import FreeGuide, check_climb
from pyroelbo.evaluation.sites import Unavailable, refuse_infinite
from pyroelbo.evidence.bounds import averaged, count_of, iwae
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.quadrature import quadrature
from pyroelbo.numerics import positive_count
from pyroelbo.pair import Pair
from pyroelbo.results import Bound, Decomposition

__all__ = ["gap"]


def gap(
    pair: Pair,
    y: Any,
    particles: int = 1000,
    *,
    reference: Bound | None = None,
    steps: int = 300,
    learning_rate: float = 0.05,
    draws: int = 16,
) -> Decomposition:
    """ln p(y) - ELBO of each datum, split into approximation and amortization gap, in nats.

    ln p(y) - ELBO(q) = [ln p(y) - ELBO(q*)] + [ELBO(q*) - ELBO(q)]: the *approximation gap* of q*, the best
    member of the guide's family for this datum, and the *amortization gap* of the encoder against it. q* has
    the distributions of the guide's sites with separate parameters for each datum, a flow's maps included.
    They are found by Adam with path-derivative gradients, from the amortized guide and from a second start
    far from it; a note gives the number of data for which the two disagree by more than 3 standard errors and
    0.05 nats. For each datum the better of the two is chosen, by draws that are not used again. All ELBOs are
    means of fresh draws with their standard errors. The *estimator's gap* is what the importance-weighted
    bound of ``particles`` draws still loses. Optimization is never perfect, so against an exact reference the
    approximation gap is an upper estimate and the amortization gap a lower one, as the labels say.

    Args:
        pair: the pair.
        y: the batch.
        particles: draws per datum of every ELBO and of the importance-weighted bound.
        reference: a Bound on the same data, such as AIS's; by default the exact evidence, else quadrature.
        steps: steps of Adam.
        learning_rate: that of Adam.
        draws: draws per datum and step.

    Raises :class:`Unavailable` if there is no reference, and, naming the site, for guides whose parameters
    depend on their own draws, masked sites, and distributions without a known reparametrized family. Cost: 3
    · 2 · ``steps`` · ``draws`` + 5 · ``particles`` evaluations per datum.

    Source: Cremer, Li and Duvenaud (2018), section 3; Roeder, Wu and Duvenaud (2017), equation 8, for the
    gradient.
    """
    count_of(particles)
    positive_count("steps", steps)
    check_climb(draws, learning_rate)
    evaluator = Evaluator(pair, y)
    evaluator.refuse_scales("gap")
    evaluator.refuse_empty()
    family = FreeGuide(evaluator, maps=True)
    anchor = _reference(pair, evaluator) if reference is None else reference
    if anchor.value.shape != (evaluator.size,):
        raise ValueError(
            f"reference: expected shape ({evaluator.size},), one value per datum, got "
            f"{tuple(anchor.value.shape)}"
        )
    starts = [family.start(), family.second_start()]
    found = [family.climb(s, steps, draws, learning_rate) for s in starts]
    spent = 3 * 2 * steps * draws * evaluator.size
    trials = [_elbo(family, f, particles) for f in found]
    apart = (trials[0].value - trials[1].value).abs()
    error = torch.hypot(trials[0].stderr, trials[1].stderr)
    disagree = int((~(apart <= 3 * error + 0.05)).sum())
    first = trials[0].value >= trials[1].value
    best = {k: _choose(first, found[0][k], found[1][k], family.dim(k)) for k in found[0]}
    notes = (
        (f"two starts of the local optimization disagree for {disagree} of {evaluator.size} data",)
        if disagree
        else ()
    )
    local = _elbo(family, best, particles, "local", spent + 3 * particles * evaluator.size, notes)
    amortized = _elbo(family, starts[0], particles)
    refuse_infinite(amortized.value)
    return Decomposition(pair.name, anchor, local, amortized, iwae(pair, evaluator.batch, particles))


def _reference(pair: Pair, evaluator: Evaluator) -> Bound:
    reasons = []
    for find in (exact, quadrature):
        try:
            return find(pair, evaluator.batch)
        except Unavailable as reason:
            reasons.append(str(reason))
    raise Unavailable(
        f"no reference for the gap ({'; '.join(reasons)}): pass one, reference=evidence.ais(pair, y)"
    )


def _choose(first: Tensor, a: Tensor, b: Tensor, plates: int) -> Tensor:
    shape = [1] * plates + [len(first)] + [1] * (a.dim() - plates - 1)
    return torch.where(first.reshape(shape), a, b)


@torch.no_grad()
def _elbo(
    family: FreeGuide,
    free: dict[tuple[str, str], Tensor],
    particles: int,
    method: str = "elbo",
    cost: int | None = None,
    notes: tuple[str, ...] = (),
) -> Bound:
    evaluator = family.evaluator
    step = max(1, min(particles, evaluator.cells // evaluator.size))
    counts = [min(step, particles - done) for done in range(0, particles, step)]
    log_w = torch.cat([family.log_weight(free, count) for count in counts]).double()
    return averaged(method, log_w, cost=cost, notes=notes)

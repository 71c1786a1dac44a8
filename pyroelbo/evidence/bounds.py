"""Lower bounds from draws of the guide, the ELBO and the importance-weighted bound, and from the prior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroelbo.evidence.diagnostics import pareto_k_hat
from pyroelbo.joint import Joint, scoped
from pyroelbo.numerics import effective_sample_size, log_mean_exp
from pyroelbo.pair import Pair
from pyroelbo.records import Bound, Terms
from pyroelbo.terms import Evaluator

__all__ = ["draws", "elbo", "iwae", "prior_monte_carlo"]


@torch.no_grad()
def draws(pair: Pair, y: Any, particles: int = 64, *, scope: str = "datum") -> Terms:
    """``particles`` draws of the guide for each datum, with every site's log probability under model and guide,
    [K, B], in nats, unscaled but masked. Raises and costs what :func:`elbo` does."""
    if scope not in ("datum", "joint"):
        raise ValueError(f"scope takes 'datum' or 'joint', got {scope!r}")
    whole: Any = Joint(pair) if scope == "joint" else pair
    return Evaluator(whole, y).draws(count_of(particles))


@scoped
@torch.no_grad()
def elbo(pair: Pair, y: Any, particles: int = 64) -> Bound:
    """The evidence lower bound of each datum, E_q[ln p(y, z) - ln q(z | y)] ≤ ln p(y), in nats, [B].

    The mean of ``particles`` draws, with its standard error (NaN for one draw). Scales within a datum
    (subsampled inner plates, ``within_datum``) are kept: they are part of that datum's estimate. ``y`` is a
    batch: a tensor, a tuple or a dict. Raises ValueError as :class:`~pyroelbo.terms.Evaluator` says. Cost:
    ``particles`` evaluations a datum.
    """
    evaluator = Evaluator(pair, y)
    log_w = evaluator.draws(count_of(particles)).log_weight.double()
    if particles > 1:
        stderr = log_w.std(0) / math.sqrt(particles)
    else:
        stderr = torch.full_like(log_w[0], math.nan)
    cost = particles * evaluator.size
    return Bound("elbo", log_w.mean(0), stderr, "lower", draws=particles, cost=cost, notes=_outside(log_w))


@scoped
@torch.no_grad()
def iwae(pair: Pair, y: Any, particles: int = 64) -> Bound:
    """The importance-weighted bound of each datum, E ln (1/K) Σ_k p(y, z_k)/q(z_k | y) ≤ ln p(y), in nats,
    [B].

    Weights are formed per datum, unscaled. One set of K = ``particles`` draws; the standard error is the
    delta method's, ``ess`` Kish's effective number of draws, ``k_hat`` the Pareto tail index: above 0.7 the
    standard error is not to be trusted and a note says for how many data. Monotone in K; (1/K) Σ w itself is
    unbiased for p(y). Raises ValueError as :class:`~pyroelbo.terms.Evaluator` says, and for pairs with a
    scale within the datum, whose weights would be wrong.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8.
    """
    evaluator = Evaluator(pair, y)
    evaluator.refuse_scales("iwae")
    log_w = evaluator.draws(count_of(particles)).log_weight.double()
    return weighted(f"iwae-{particles}", log_w)


@scoped
@torch.no_grad()
def prior_monte_carlo(pair: Pair, y: Any, particles: int = 64) -> Bound:
    """Plain Monte Carlo from the prior, E ln (1/K) Σ_k p(y | z_k) ≤ ln p(y) with z_k ~ p(z), in nats, [B].

    Unbiased on the linear scale and hopeless in many dimensions: the draws that matter are too rare to be
    seen, and then the standard error misses them as well; ``ess`` and ``k_hat`` are there to tell. Needs no
    guide, and takes discrete latents. Raises ValueError as :func:`iwae` does. Cost: ``particles`` evaluations
    a datum.
    """
    evaluator = Evaluator(pair, y, with_guide=False)
    evaluator.refuse_scales("prior_monte_carlo")
    terms = evaluator.draws(count_of(particles))
    log_w = torch.stack([v for k, v in terms.log_model.items() if k in terms.observed]).sum(0).double()
    return weighted(f"prior-{particles}", log_w)


def weighted(
    method: str, log_w: Tensor, kind: str = "lower", cost: int | None = None, notes: tuple[str, ...] = ()
) -> Bound:
    """The bound of log weights [K, B] whose mean is p(y), or for an upper bound 1/p(y), with what tells
    whether to trust it."""
    particles, size = log_w.shape
    value, stderr = log_mean_exp(log_w)
    k_hat = pareto_k_hat(log_w)
    bad = int((k_hat > 0.7).sum())
    if bad:
        notes = (*notes, f"k-hat above 0.7 for {bad} of {size} data: their errors are not to be trusted")
    return Bound(
        method,
        -value if kind == "upper" else value,
        stderr,
        kind,
        draws=particles,
        cost=particles * size if cost is None else cost,
        ess=effective_sample_size(log_w),
        k_hat=k_hat,
        notes=notes + _outside(log_w),
    )


def _outside(log_w: Tensor) -> tuple[str, ...]:
    share = (log_w == -math.inf).double().mean()
    if share == 0:
        return ()
    return (
        f"the guide draws what the model gives probability zero, {float(share):.1%} of its draws: the ELBO is -inf",
    )


def count_of(particles: int) -> int:
    if isinstance(particles, bool) or not isinstance(particles, int) or particles < 1:
        raise ValueError(f"particles takes a positive number of draws, got {particles!r}")
    return particles

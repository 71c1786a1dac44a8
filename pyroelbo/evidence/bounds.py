"""Bounds from draws of the guide, of the prior, and of the exact posterior."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.joint import scoped, view
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.diagnostics import pareto_k_hat
from pyroelbo.numerics import effective_sample_size, log_mean_exp, positive_count
from pyroelbo.pair import ExactPair, Pair, evaluation_mode
from pyroelbo.results import Bound, Terms

__all__ = ["cubo", "draws", "elbo", "eubo", "iwae", "prior_monte_carlo"]


@torch.no_grad()
def draws(pair: Pair, y: Any, particles: int = 64, *, scope: str = "datum") -> Terms:
    """``particles`` draws of the guide for each datum, with every site's log probability under model and guide,
    [K, B], in nats, unscaled but masked. Raises and costs what :func:`elbo` does."""
    return Evaluator(view(pair, scope), y).draws(count_of(particles))


@scoped
@torch.no_grad()
def elbo(pair: Pair, y: Any, particles: int = 64) -> Bound:
    """The evidence lower bound of each datum, E_q[ln p(y, z) - ln q(z | y)] ≤ ln p(y), in nats, [B].

    The mean of ``particles`` draws, with its standard error (NaN for one draw). Scales within a datum
    (subsampled inner plates, ``within_datum``) are kept: they are part of that datum's estimate. ``y`` is a
    batch: a tensor, a tuple or a dict. Raises ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator` says. Cost:
    ``particles`` evaluations a datum.
    """
    evaluator = Evaluator(pair, y)
    log_w = evaluator.draws(count_of(particles), latents=False).log_weight.double()
    return averaged("elbo", log_w, notes=_outside(log_w))


@scoped
@torch.no_grad()
def iwae(pair: Pair, y: Any, particles: int = 64) -> Bound:
    """The importance-weighted bound of each datum, E ln (1/K) Σ_k p(y, z_k)/q(z_k | y) ≤ ln p(y), in nats,
    [B].

    Weights are formed per datum, unscaled. One set of K = ``particles`` draws; the standard error is the
    delta method's, ``ess`` Kish's effective number of draws, ``k_hat`` the Pareto tail index: above 0.7 the
    standard error is not to be trusted and a note says for how many data. Monotone in K; (1/K) Σ w itself is
    unbiased for p(y). Raises ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator` says, and for pairs with a
    scale within the datum, whose weights would be wrong.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8.
    """
    evaluator = Evaluator(pair, y)
    evaluator.refuse_scales("iwae")
    log_w = evaluator.draws(count_of(particles), latents=False).log_weight.double()
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
    terms = evaluator.draws(count_of(particles), latents=False)
    log_w = torch.stack([v for k, v in terms.log_model.items() if k in terms.observed]).sum(0).double()
    return weighted(f"prior-{particles}", log_w, source="prior")


@scoped
@torch.no_grad()
def eubo(pair: Pair, y: Any, particles: int = 64, *, draws: str = "posterior") -> Bound:
    """The evidence upper bound of each datum, E_{p(z | y)}[ln p(y, z) - ln q(z | y)] = ln p(y) + KL(p, q) ≥ ln p(y),
    in nats, [B].

    The ELBO's mirror image: it charges the guide for what it misses of the posterior. ``draws="posterior"`` takes
    exact posterior draws of an :class:`ExactPair`; ``draws="weights"`` any pair, with draws of the guide weighted
    by w, Σ w ln w / Σ w: an ``estimate``, which misses what the guide misses. The standard error is that of the
    mean over ``particles`` draws, by the delta method for weighted ones. Raises :class:`Unavailable` where there
    is no exact posterior, and as :func:`iwae` does. Cost: ``particles`` evaluations a datum.

    Source: Ji and Shen (2019), equation 4.
    """
    if draws not in ("posterior", "weights"):
        raise ValueError(f"draws takes 'posterior' or 'weights', got {draws!r}")
    if draws == "posterior" and not isinstance(pair, ExactPair):
        raise Unavailable(
            f"{type(pair).__name__} has no exact posterior: draws='weights' gives an estimate for any pair"
        )
    evaluator = Evaluator(pair, y)
    evaluator.refuse_scales("eubo")
    evaluator.refuse_auxiliary()
    cost = count_of(particles) * evaluator.size
    if draws == "weights":
        log_w = evaluator.draws(particles, latents=False).log_weight.double()
        ess, notes = effective_sample_size(log_w), _outside(log_w)
        share = log_w.softmax(0)
        finite = torch.where(share > 0, log_w, torch.zeros_like(log_w))
        value = (share * finite).sum(0)
        stderr = (share.square() * (finite - value).square()).sum(0).sqrt()
        if particles == 1:  # one draw cannot tell
            stderr = torch.full_like(stderr, math.nan)
        note = "self-normalized weights of the guide's draws: it can lie on either side of ln p(y)"
        return Bound(
            "eubo",
            value,
            stderr,
            "estimate",
            draws=particles,
            cost=cost,
            ess=ess,
            notes=(note, *notes),
        )
    latents = posterior_draws(pair, evaluator, particles)  # type: ignore[arg-type]
    log_w = evaluator.in_chunks(lambda z, rows: evaluator.terms(z, rows).log_weight, latents)
    return averaged("eubo", log_w, "upper")


@scoped
@torch.no_grad()
def cubo(pair: Pair, y: Any, particles: int = 64, order: float = 2.0) -> Bound:
    """The χ upper bound's Monte Carlo value, (1/n) ln (1/K) Σ_k w_k^n with n = ``order``, in nats, [B].

    (1/n) ln E w^n ≥ ln p(y) for n ≥ 1, but the logarithm of a mean over draws errs low, and by most where the
    weights' tails are heavy: an ``estimate`` that falls below ln p(y) as readily as above, never a bound. Its use
    is relative: far above the importance-weighted bound, it says that the weights vary. The standard error is the
    delta method's. Raises ValueError as :func:`iwae` does, and for ``order`` below 1.

    Source: Dieng, Tran, Ranganath, Paisley and Blei (2017), equation 4.
    """
    if not order >= 1:
        raise ValueError(f"order takes a number of at least 1, got {order!r}")
    evaluator = Evaluator(pair, y)
    evaluator.refuse_scales("cubo")
    log_w = evaluator.draws(count_of(particles), latents=False).log_weight.double()
    found = weighted(f"cubo-{order:g}", order * log_w, "estimate")
    note = "the logarithm of a sampled mean errs low: no upper bound"
    return replace(found, value=found.value / order, stderr=found.stderr / order, notes=(*found.notes, note))


def posterior_draws(pair: ExactPair, evaluator: Evaluator, particles: int) -> dict[str, Tensor]:
    """Exact posterior draws {site: [K, *plates, B, *event]}; :class:`Unavailable` if there are other latents."""
    if set(evaluator.latents) != {pair.latent}:
        raise Unavailable(
            f"the exact posterior is that of {pair.latent!r}, the latents {sorted(evaluator.latents)}"
        )
    site = evaluator.latents[pair.latent]
    with torch.no_grad(), evaluation_mode(pair):
        value = batches.call(pair.posterior, evaluator.batch).sample(torch.Size((particles,)))
    return {pair.latent: value.reshape(particles, *site.plate_shape, evaluator.size, *site.event_shape)}


def averaged(
    method: str, log_w: Tensor, kind: str = "lower", cost: int | None = None, notes: tuple[str, ...] = ()
) -> Bound:
    """The bound that is the mean of log weights [K, B] itself, with its standard error."""
    particles, size = log_w.shape
    if particles > 1:
        stderr = log_w.std(0) / math.sqrt(particles)
    else:
        stderr = torch.full_like(log_w[0], math.nan)
    cost = particles * size if cost is None else cost
    return Bound(method, log_w.mean(0), stderr, kind, draws=particles, cost=cost, notes=notes)


def weighted(
    method: str,
    log_w: Tensor,
    kind: str = "lower",
    cost: int | None = None,
    notes: tuple[str, ...] = (),
    *,
    source: str = "guide",
) -> Bound:
    """The bound of log weights [K, B] whose mean is p(y), or for an upper bound 1/p(y) at most, with what tells
    whether to trust it; ``source`` says what made the draws."""
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
        notes=notes + (_outside(log_w) if source == "guide" and kind != "upper" else ()),
    )


def _outside(log_w: Tensor) -> tuple[str, ...]:
    share = (log_w == -math.inf).double().mean()
    if share == 0:
        return ()
    return (
        f"the guide draws what the model gives probability zero, {float(share):.1%} of its draws: the ELBO is -inf",
    )


def count_of(particles: int) -> int:
    return positive_count("particles", particles, "number of draws")

"""Bounds from draws of the guide, the prior and the exact posterior."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.diagnostics import pareto_k_hat
from pyroelbo.numerics import effective_sample_size, log_mean_exp, positive_count
from pyroelbo.pair import ExactPair, Pair, evaluation_mode
from pyroelbo.results import Bound, Terms

__all__ = ["cubo", "elbo", "eubo", "iwae", "prior_monte_carlo", "terms"]

FEW = 2  # effective draws below which the standard error means nothing


@torch.no_grad()
def terms(pair: Pair, y: Any, particles: int = 64, *, scope: str = "datum") -> Terms:
    """Draws of the guide and every site's log probability under model and guide, [K, B], in nats.

    ``particles`` draws for each datum, unscaled but masked. Raises and costs what :func:`elbo` does.
    """
    return Evaluator(pair, y, scope=scope).sample(count_of(particles))


@torch.no_grad()
def elbo(pair: Pair, y: Any, particles: int = 64, *, scope: str = "datum") -> Bound:
    """The evidence lower bound of each datum, E_q[ln p(y, z) - ln q(z | y)] ≤ ln p(y), in nats, [B].

    The mean of ``particles`` draws with its standard error (NaN for one draw). Scales within a datum
    (subsampled inner plates, ``within_datum``) are kept: they are part of that datum's estimate. ``y`` is a
    batch: a tensor, a tuple or a dict. ``scope="joint"`` takes the whole batch as one datum. Raises
    ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator` does. Cost: ``particles`` evaluations per
    datum.
    """
    evaluator = Evaluator(pair, y, scope=scope)
    log_w = evaluator.sample(count_of(particles), latents=False).log_weight.double()
    return evaluator.finish(averaged("elbo", log_w, notes=_outside(log_w)))


@torch.no_grad()
def iwae(pair: Pair, y: Any, particles: int = 64, *, scope: str = "datum") -> Bound:
    """The importance-weighted bound of each datum, E ln (1/K) Σ_k p(y, z_k)/q(z_k | y) ≤ ln p(y), in nats,
    [B].

    Weights are formed per datum, unscaled, from one set of K = ``particles`` draws. The standard error is the
    delta method's, ``ess`` Kish's effective number of draws, ``k_hat`` the Pareto tail index: above 0.7 the
    standard error cannot be trusted, and a note gives the number of such data. The bound is monotone in K,
    and (1/K) Σ w is unbiased for p(y). Raises ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator`
    does, and :class:`Unavailable` for pairs with a scale within the datum, whose weights would be wrong.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8.
    """
    evaluator = Evaluator(pair, y, scope=scope)
    evaluator.refuse_scales("iwae")
    log_w = evaluator.sample(count_of(particles), latents=False).log_weight.double()
    return evaluator.finish(weighted(f"iwae-{particles}", log_w))


@torch.no_grad()
def prior_monte_carlo(pair: Pair, y: Any, particles: int = 64, *, scope: str = "datum") -> Bound:
    """Plain Monte Carlo from the prior, E ln (1/K) Σ_k p(y | z_k) ≤ ln p(y) with z_k ~ p(z), in nats, [B].

    Unbiased on the linear scale and useless in many dimensions: the draws that matter are too rare to occur,
    and the standard error misses them as well; ``ess`` and ``k_hat`` show it. No guide is needed and latents
    may be discrete. Raises as :func:`iwae` does. Cost: ``particles`` evaluations per datum.
    """
    evaluator = Evaluator(pair, y, with_guide=False, scope=scope)
    evaluator.refuse_scales("prior_monte_carlo")
    found = evaluator.sample(count_of(particles), latents=False)
    log_w = torch.stack([v for k, v in found.log_model.items() if k in found.observed]).sum(0).double()
    return evaluator.finish(weighted(f"prior-{particles}", log_w, source="prior"))


@torch.no_grad()
def eubo(
    pair: Pair, y: Any, particles: int = 64, *, source: str = "posterior", scope: str = "datum"
) -> Bound:
    """The evidence upper bound, E_{p(z | y)}[ln p(y, z) - ln q(z | y)] = ln p(y) + KL(p, q) ≥ ln p(y), in
    nats, [B].

    The mirror image of the ELBO: it charges the guide for the parts of the posterior that it misses.
    ``source="posterior"`` uses exact posterior draws of an :class:`ExactPair`. ``source="weights"`` works for
    any pair, with draws of the guide weighted by w, Σ w ln w / Σ w: an ``estimate``, which misses what the
    guide misses. The standard error is that of the mean over ``particles`` draws, by the delta method for
    weighted ones. Raises :class:`Unavailable` if there is no exact posterior, and as :func:`iwae` does.

    Source: Ji and Shen (2019), equation 4.
    """
    if source not in ("posterior", "weights"):
        raise ValueError(f"source: expected 'posterior' or 'weights', got {source!r}")
    if source == "posterior" and (scope == "joint" or not isinstance(pair, ExactPair)):
        raise Unavailable(
            f"{type(pair).__name__} has no exact posterior in {scope} scope: source='weights' gives an "
            "estimate for any pair"
        )
    evaluator = Evaluator(pair, y, scope=scope)
    evaluator.refuse_scales("eubo")
    evaluator.refuse_auxiliary()
    if source == "weights":
        log_w = evaluator.sample(count_of(particles), latents=False).log_weight.double()
        return evaluator.finish(_self_normalized(log_w))
    latents = posterior_draws(pair, evaluator, count_of(particles))  # type: ignore[arg-type]
    log_w = evaluator.in_chunks(lambda z, rows: evaluator.terms(z, rows).log_weight, latents)
    return evaluator.finish(averaged("eubo", log_w, "upper"))


def _self_normalized(log_w: Tensor) -> Bound:
    """Σ w ln w / Σ w of log weights [K, B]."""
    particles, size = log_w.shape
    ess, notes = effective_sample_size(log_w), _outside(log_w)
    share = log_w.softmax(0)
    finite = torch.where(share > 0, log_w, torch.zeros_like(log_w))
    value = (share * finite).sum(0)
    stderr = (share.square() * (finite - value).square()).sum(0).sqrt()
    if particles == 1:  # no spread to estimate it from
        stderr = torch.full_like(stderr, math.nan)
    note = "self-normalized weights of the guide's draws: the value may lie on either side of ln p(y)"
    return Bound(
        "eubo",
        value,
        stderr,
        "estimate",
        draws=particles,
        cost=particles * size,
        ess=ess,
        notes=(note, *notes),
    )


@torch.no_grad()
def cubo(pair: Pair, y: Any, particles: int = 64, order: float = 2.0, *, scope: str = "datum") -> Bound:
    """Monte Carlo value of the χ upper bound, (1/n) ln (1/K) Σ_k w_k^n with n = ``order``, in nats, [B].

    (1/n) ln E w^n ≥ ln p(y) for n ≥ 1, but the logarithm of a mean over draws errs low, most where the
    weights have heavy tails: this is an ``estimate`` that falls below ln p(y) as easily as above, never a
    bound. Its use is relative: a value far above the importance-weighted bound means that the weights vary.
    The standard error is the delta method's. Raises as :func:`iwae` does, and ValueError for ``order`` below
    1.

    Source: Dieng, Tran, Ranganath, Paisley and Blei (2017), equation 4.
    """
    if not order >= 1:
        raise ValueError(f"order: expected a number of at least 1, got {order!r}")
    evaluator = Evaluator(pair, y, scope=scope)
    evaluator.refuse_scales("cubo")
    log_w = evaluator.sample(count_of(particles), latents=False).log_weight.double()
    found = weighted(f"cubo-{order:g}", order * log_w, "estimate")
    note = "the logarithm of a sampled mean errs low: no upper bound"
    found = replace(found, value=found.value / order, stderr=found.stderr / order, notes=(*found.notes, note))
    return evaluator.finish(found)


def posterior_draws(pair: ExactPair, evaluator: Evaluator, particles: int) -> dict[str, Tensor]:
    """Exact posterior draws {site: [K, *plates, B, *event]}; :class:`Unavailable` if there are other
    latents."""
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
    """The mean of log weights [K, B] with its standard error, as a bound."""
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
    jackknife: bool = False,
) -> Bound:
    """The bound ln (1/K) Σ w from log weights [K, B], with its diagnostics.

    Args:
        method: name of the row.
        log_w: log weights [K, B] in nats; the mean of w is p(y), for an upper bound at most 1/p(y).
        kind: as of :class:`~pyroelbo.results.Bound`.
        cost: model evaluations, by default K · B.
        notes: notes that come first.
        source: where the draws come from, ``"guide"`` or ``"prior"``.
        jackknife: whether the standard error is the jackknife's (few draws) instead of the delta method's.
    """
    particles, size = log_w.shape
    value, stderr = log_mean_exp(log_w)
    if jackknife:
        stderr = _jackknife(log_w)
    k_hat, ess = pareto_k_hat(log_w), effective_sample_size(log_w)
    return Bound(
        method,
        -value if kind == "upper" else value,
        stderr,
        kind,
        draws=particles,
        cost=particles * size if cost is None else cost,
        ess=ess,
        k_hat=k_hat,
        notes=(
            *notes,
            *_distrust(ess, k_hat, particles),
            *(_outside(log_w) if source == "guide" and kind != "upper" else ()),
        ),
    )


def _distrust(ess: Tensor, k_hat: Tensor, particles: int) -> list[str]:
    """Notes on data whose standard errors mean little."""
    size, notes = ess.numel(), []
    alone = int((ess < FEW).sum()) if particles >= 5 * FEW else 0
    if alone:
        notes.append(
            f"effective sample size below {FEW} for {alone} of {size} data: a single draw decides their "
            "values, and their errors cannot be trusted"
        )
    bad = int((k_hat > 0.7).sum())
    if bad:
        notes.append(f"k-hat above 0.7 for {bad} of {size} data: their errors cannot be trusted")
    unknown = int(k_hat.isnan().sum())
    if unknown:
        why = "too few draws" if particles <= 20 else "their largest weights tie, or all are zero"
        notes.append(f"no k-hat for {unknown} of {size} data: {why}")
    return notes


def _jackknife(log_w: Tensor) -> Tensor:
    """Jackknife standard error of ln (1/K) Σ w over K draws, [B].

    NaN for one draw, or if one weight is all of the sum. Leaving out a dominant weight moves the logarithm by
    nats, which the delta method, at most 1, does not see. Source: Efron and Stein (1981).
    """
    count = len(log_w)
    if count == 1:
        return torch.full_like(log_w[0], math.nan)
    share = (log_w - torch.logsumexp(log_w, 0)).exp()
    without = torch.log1p(-share.clamp_max(1.0))
    return ((count - 1) * without.var(0, correction=0)).sqrt()


def _outside(log_w: Tensor) -> tuple[str, ...]:
    zero, unknown = (x.double().mean() for x in (log_w == -math.inf, log_w.isnan()))
    notes = []
    if zero:
        notes.append(
            f"{float(zero):.1%} of the guide's draws have probability zero under the model: the ELBO is -inf"
        )
    if unknown:
        notes.append(
            f"{float(unknown):.1%} of the guide's draws have no log weight (NaN): model or guide give no "
            "number there, and there is no bound"
        )
    return tuple(notes)


def count_of(particles: int) -> int:
    return positive_count("particles", particles, "number of draws")

"""The ELBO and its gap by latent site: rates and shares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import refuse_infinite
from pyroelbo.evidence.bounds import count_of
from pyroelbo.numerics import effective_sample_size, log_mean_exp, positive_count
from pyroelbo.pair import Pair
from pyroelbo.results import Bound
from pyroelbo.results.diagnostics import Estimate, SiteGaps

__all__ = ["site_gaps"]


@torch.no_grad()
def site_gaps(
    pair: Pair, y: Any, particles: int = 64, inner: int = 64, *, reference: Bound | None = None
) -> SiteGaps:
    """Per-site KL rates of a chain or hierarchy and each site's share of the gap, in nats per datum.

    By the chain rule ln p(y) - ELBO = Σ_l E_q KL(q(z_l | z_<l, y), p(z_l | z_<l, y)), where z_<l are the
    sites that the guide draws before z_l. With V_l = E_q[ln p(y, z_≤l) - ln q(z_≤l | y)] a site's share is
    V_{l-1} - V_l. V_l needs p(y, z_≤l), the sum over all later sites: it is estimated by ``inner`` importance
    weights from the guide for each of ``particles`` draws of z_≤l. Too few weights leave it low and move a
    share towards the site before; a note gives the smallest mean ESS. The shares add up to the
    importance-weighted bound of ``inner`` draws minus the ELBO; ``rest`` is the difference of a ``reference``
    on the same data (an exact Bound, say) and that bound.

    Raises :class:`Unavailable` for auxiliary sites, and ValueError as
    :class:`~pyroelbo.evaluation.evaluator.Evaluator` does and for scales within the datum. Cost:
    ``particles`` · (1 + ``inner`` · sites) evaluations per datum.
    """
    count_of(particles)
    positive_count("inner", inner, "number of draws")
    evaluator = Evaluator(pair, y)
    evaluator.refuse_scales("site_gaps")
    evaluator.refuse_empty()
    evaluator.refuse_merged("site_gaps")
    evaluator.refuse_auxiliary("it has no place in the model")
    guide, model = evaluator.traces()
    sites = tuple(k for k in guide.nodes if k in evaluator.latents)
    order = [k for k in model.nodes if k in evaluator.latents]
    kinds = {
        site: "KL" if set(order[: order.index(site)]) <= set(sites[: sites.index(site)]) else "difference"
        for site in sites
    }
    terms = evaluator.sample(particles)
    log_w = terms.log_weight.double()
    refuse_infinite(log_w)
    rates = {k: (terms.log_guide[k] - terms.log_model[k]).double() for k in sites}
    values, smallest_ess = [], math.inf
    for count in range(len(sites)):
        given = {k: terms.latents[k] for k in sites[:count]}
        weights = _inner(evaluator, given, particles, inner)
        value, _ = log_mean_exp(weights, 1)
        smallest_ess = min(smallest_ess, float(effective_sample_size(weights, 1).mean()))
        values.append(value)
    values.append(log_w)
    anchor = reference
    if anchor is not None and anchor.value.shape != (evaluator.size,):
        raise ValueError(
            f"reference: expected shape ({evaluator.size},), one value per datum, got "
            f"{tuple(anchor.value.shape)}"
        )
    top = Estimate.of(values[0])
    rest, total = Estimate(top.value * 0, top.value * 0), Estimate.of(values[0] - log_w)
    if anchor is not None:
        error = log_w.new_tensor(anchor.mean_error)
        level = anchor.value.double().to(log_w)
        rest, total = (
            Estimate(found.value, torch.hypot(found.stderr, error))
            for found in (Estimate.of(level - values[0]), Estimate.of(level - log_w))
        )
    notes = [f"shares are estimates from {inner} weights; the smallest mean ESS is {smallest_ess:.1f}"]
    if anchor is not None and anchor.kind != "exact":
        what = {"lower": "a lower bound", "upper": "an upper bound"}.get(anchor.kind, "an estimate")
        notes.append(f"{anchor.method} is {what}, and so are the rest and the total")
    return SiteGaps(
        name=pair.name,
        sites=sites,
        num_data=evaluator.size,
        reference=f"iwae-{inner}" if anchor is None else anchor.method,
        elbo=Estimate.of(log_w),
        reconstruction=Estimate.of(log_w + sum(rates.values())),
        rates={k: Estimate.of(v) for k, v in rates.items()},
        kinds=kinds,
        gaps={k: Estimate.of(values[i] - values[i + 1]) for i, k in enumerate(sites)},
        rest=rest,
        total=total,
        notes=tuple(notes),
    )


def _inner(evaluator: Evaluator, given: dict[str, Tensor], particles: int, inner: int) -> Tensor:
    """Log weights of ``inner`` draws of the sites that are not given, for each given draw: [particles, inner,
    B]."""
    if not given:
        return (
            evaluator.sample(particles * inner, latents=False)
            .log_weight.double()
            .reshape(particles, inner, -1)
        )
    given = {k: v.repeat_interleave(inner, 0) for k, v in given.items()}
    log_w = evaluator.in_chunks(lambda z, rows: evaluator.terms(z, rows).log_weight, given)
    return log_w.reshape(particles, inner, -1)

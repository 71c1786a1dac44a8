"""Whether importance weights can be trusted, and how a pair uses its latents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.masks import is_masked
from pyroelbo.evaluation.sites import Unavailable, refuse_infinite
from pyroelbo.evidence.lattice import is_discrete
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import Pair
from pyroelbo.results.diagnostics import Diagnostics, Estimate

__all__ = ["diagnostics", "pareto_k_hat"]

_HOLE = 3.0  # nats by which prior density exceeds the codes'
_CHECKS = 8  # points at which the prior is compared between data


def pareto_k_hat(log_w: Tensor) -> Tensor:
    """Tail index k of the importance weights over dimension 0: ``[K, *]`` to ``[*]``.

    A generalized Pareto distribution is fitted to the largest min(K/5, 3√K) weights, with a weakly
    informative prior that shrinks k towards 1/2. Below 1/2 the variance of the weights is finite; above 0.7
    (or 1 - 1/log10 K for few draws) the estimate and its standard error mislead. NaN if the tail has fewer
    than five weights, or ties, or all weights are zero; -inf if the largest weights lie within a thousandth
    of each other. Cost: O(K log K) per datum.

    Source: Zhang and Stephens (2009); Vehtari, Simpson, Gelman, Yao and Gabry (2024), appendix C.
    """
    draws = log_w.shape[0]
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    flat = log_w.detach().double().reshape(draws, -1)
    result = torch.full((flat.shape[1],), math.nan, dtype=torch.float64, device=flat.device)
    if tail >= 5:
        flat = flat - flat.amax(0)
        ordered = flat.sort(0).values
        excess = ordered[-tail:].exp() - ordered[-tail - 1].exp()
        # Weights within a thousandth of each other (rounding, with an exact guide) have no tail to fit.
        fit = excess[-1] > 1e-3
        # Weights of a discrete latent have few values: nothing can be fitted if a quarter of the tail ties.
        fit &= excess[int(tail / 4 + 0.5) - 1] > 0
        result[fit] = _fit_tail(excess[:, fit])
        result[excess[-1] <= 1e-3] = -math.inf
    return result.reshape(log_w.shape[1:])


def _fit_tail(x: Tensor) -> Tensor:
    """Posterior mean of k for sorted exceedances x [n, *], by Zhang and Stephens' profile quadrature over b =
    -k/sigma."""
    n = x.shape[0]
    points = 30 + int(math.sqrt(n))
    grid = 1 - (points / (torch.arange(1, points + 1, dtype=x.dtype, device=x.device) - 0.5)).sqrt()
    quartile = x[int(n / 4 + 0.5) - 1]
    b = grid[:, None] / (3 * quartile) + 1 / x[-1]
    k = torch.log1p(-b[:, None] * x).mean(1)
    profile = n * ((-b / k).log() - k - 1)
    weights = torch.softmax(profile.nan_to_num(nan=-math.inf), 0)
    best = (weights * b).sum(0)
    k_hat = torch.log1p(-best * x).mean(0)
    return (n * k_hat + 10 * 0.5) / (n + 10)


@torch.no_grad()
def diagnostics(
    pair: Pair, y: Any, draws: int = 8, *, site: str | None = None, points: int = 2000
) -> Diagnostics:
    """The aggregated posterior q(z) = (1/N) Σ_n q(z | y_n) against the prior, in nats; it is evaluated
    exactly, as a mixture.

    With ``draws`` draws z ~ q(z | y_n) for each of the N data: reconstruction E ln p(y | z), cross-entropy -E
    ln p(z), entropy -E ln q(z | y); index-code mutual information E[ln q(z | y) - ln q(z)] and KL(q(z), p) =
    E[ln q(z) - ln p(z)], whose sum is the mean KL(q(z | y), p). ``points`` draws of the prior give the mass
    of its holes, ln p(z) - ln q(z) > 3. Coordinates are split if prior and guide are products over them:
    KL(q(z), p) = KL(q(z), Π_d q(z_d)) + Σ_d KL(q(z_d), p(z_d)). All are averages of exact log densities over
    draws, hence unbiased; standard errors are those of the draws, given the data. An activity, Var_n E_q[z_d
    | y_n], is corrected for the variance of the draws.

    z is all latents together, or ``site`` alone, which must be a first one: neither its prior nor its guide
    may depend on other latents. Any guide and any prior of known density will do. Raises
    :class:`Unavailable`, naming the site, for auxiliary or masked guide sites and priors that differ between
    data (of conditional pairs), for guides that reach outside the model's support, and for models without
    latents; ValueError as
    :class:`~pyroelbo.evaluation.evaluator.Evaluator` does. Cost: N · (``draws`` · N + ``points``) densities
    of the guide and N · ``draws`` evaluations.

    Source: Hoffman and Johnson (2016); Chen, Li, Grosse and Duvenaud (2018), equation 2, for the split by
    coordinates; Burda, Grosse and Salakhutdinov (2016), section 5, for active units.
    """
    positive_count("draws", draws)
    positive_count("points", points)
    evaluator = Evaluator(pair, y)
    evaluator.refuse_empty()
    evaluator.refuse_scales("diagnostics")
    evaluator.refuse_auxiliary()
    evaluator.refuse_merged("diagnostics")
    sites = tuple(evaluator.latents) if site is None else (site,)
    if not set(sites) <= set(evaluator.latents):
        raise ValueError(f"site: expected one of {sorted(evaluator.latents)}, got {site!r}")
    terms = evaluator.sample(draws)
    _check(evaluator, sites)
    z = {name: terms.latents[name] for name in sites}
    log_q = torch.stack([terms.log_guide[name] for name in sites]).sum(0).double()
    log_p = torch.stack([terms.log_model[name] for name in sites]).sum(0).double()
    log_w = terms.log_weight.double()
    refuse_infinite(log_w)
    flat = {name: _points(evaluator, name, value) for name, value in z.items()}
    log_mix = _log_mixture(evaluator, flat).reshape(draws, evaluator.size)

    prior = Evaluator(pair, evaluator.batch, with_guide=False).sample(math.ceil(points / evaluator.size))
    fresh = {name: _points(evaluator, name, prior.latents[name])[:points] for name in sites}
    log_prior = torch.stack([prior.log_model[name] for name in sites]).sum(0).double().reshape(-1)[:points]
    excess = log_prior - _log_mixture(evaluator, fresh)
    share = (excess > _HOLE).double().mean()

    codes = [
        v.reshape(draws, evaluator.size, -1) for k, v in flat.items() if not is_discrete(evaluator.latents[k])
    ]
    split, notes = _by_coordinate(evaluator, sites, z, log_mix)
    return Diagnostics(
        name=pair.name,
        sites=sites,
        num_data=evaluator.size,
        draws=draws,
        elbo=Estimate.of(log_w),
        reconstruction=Estimate.of(log_w - log_p + log_q),
        cross_entropy=Estimate.of(-log_p),
        entropy=Estimate.of(-log_q),
        kl=Estimate.of(log_q - log_p),
        information=Estimate.of(log_q - log_mix),
        marginal_kl=Estimate.of(log_mix - log_p),
        holes=Estimate(share, (share * (1 - share) / len(excess)).sqrt()),
        activity=_activity(torch.cat(codes, -1) if codes else log_q.new_empty(draws, evaluator.size, 0)),
        unit_information=split.get("information"),
        unit_kl=split.get("kl"),
        total_correlation=split.get("total_correlation"),
        prior_draws=_side_by_side(fresh),
        prior_excess=excess,
        guide_draws=_side_by_side(flat)[:points],
        notes=notes,
    )


def _activity(z: Tensor) -> Estimate:
    """Variance over the data of E[z | y] from draws z [K, N, D], without the variance of the draws."""
    count, size = z.shape[:2]
    if count < 2 or size < 2 or z.numel() == 0:
        return Estimate(z.new_full(z.shape[2:], math.nan), z.new_full(z.shape[2:], math.nan))
    z = z.double()
    mean, noise = z.mean(0), z.var(0) / count
    value = mean.var(0) - noise.mean(0)
    spread = (mean - mean.mean(0)).square()
    error = (4 * (spread * noise).sum(0) + 2 * noise.square().sum(0)).sqrt() / (size - 1)
    return Estimate(value, error)


def _points(evaluator: Evaluator, name: str, value: Tensor) -> Tensor:
    """[K, *plates, B, *event] to [K · B, *plates, *event]."""
    plates = len(evaluator.latents[name].plate_shape)
    return value.movedim(1 + plates, 1).flatten(0, 1)


def _side_by_side(points: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.reshape(len(p), -1).double() for p in points.values()], -1)


def _check(evaluator: Evaluator, sites: tuple[str, ...]) -> None:
    """Unavailable if the sites have no density of their own under guide or prior."""
    # The guide's own masks, and those of the model.
    for trace in (evaluator.guide_trace(), evaluator.traces()[0]):
        masked = [name for name in sites if is_masked(trace.nodes[name]["mask"])]
        if masked:
            raise Unavailable(f"latent site {masked[0]!r} is masked: evaluate data without padding")
    latents = evaluator.sample_pass(min(_CHECKS, evaluator.cells)).latents
    # The same points for every datum: those drawn for the first one.
    given = {
        name: latents[name]
        .select(1 + len(evaluator.latents[name].plate_shape), 0)
        .unsqueeze(1 + len(evaluator.latents[name].plate_shape))
        .expand_as(latents[name])
        for name in sites
    }
    first, second = evaluator.terms(given), evaluator.terms(given)
    for name in sites:
        prior = first.log_model[name]
        for terms, other, what in (
            (prior, second.log_model[name], "depends on other latents: choose a first one"),
            (
                first.log_guide[name],
                second.log_guide[name],
                "depends on other latents in the guide: choose a first one",
            ),
            (
                prior,
                prior[:, :1].expand_as(prior),
                "has a prior that differs between data: there is no single one to compare with",
            ),
        ):
            if not torch.allclose(terms, other, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise Unavailable(f"latent site {name!r} {what}")


def _log_mixture(evaluator: Evaluator, points: dict[str, Tensor]) -> Tensor:
    """ln (1/N) Σ_n q(z_m | y_n) of points {site: [M, *plates, *event]}, [M], float64."""
    count, size = len(next(iter(points.values()))), evaluator.size
    # As many points as rows: each pass runs the encoder on its rows again, whatever their points.
    width = min(size, evaluator.cells, math.isqrt(evaluator.guide_cells)) if evaluator.sliceable else size
    step = max(1, evaluator.guide_cells // width)
    found = []
    for first in range(0, count, step):
        sums = []
        for start in range(0, size, width):
            rows = slice(start, min(start + width, size))
            latents = {}
            for name, value in points.items():
                axis = 1 + len(evaluator.latents[name].plate_shape)
                piece = value[first : first + step].unsqueeze(axis)
                shape = list(piece.shape)
                shape[axis] = rows.stop - rows.start
                latents[name] = piece.expand(shape)
            log_q = evaluator.log_guide(latents, rows if evaluator.sliceable else None)
            sums.append(logsumexp(log_q.double(), 1))
        found.append(logsumexp(torch.stack(sums), 0))
    return torch.cat(found) - math.log(size)


def _by_coordinate(
    evaluator: Evaluator, sites: tuple[str, ...], z: dict[str, Tensor], log_mix: Tensor
) -> tuple[dict[str, Estimate], tuple[str, ...]]:
    """Information, marginal KL and total correlation by coordinate, if both densities are products over
    coordinates."""
    if len(sites) > 1 or evaluator.latents[sites[0]].plate_shape:
        return {}, ("no split by coordinate: more than one latent site",)
    name = sites[0]
    guide, model = evaluator.traces()
    parts = [_coordinates(trace.nodes[name]["fn"]) for trace in (guide, model)]
    if parts[0] is None or parts[1] is None:
        which = "guide" if parts[0] is None else "prior"
        return {}, (f"no split by coordinate: the {which} of {name!r} is not a product over its coordinates",)
    value = z[name]
    draws, size = value.shape[:2]
    log_q, log_p = (part.log_prob(value).double().reshape(draws, size, -1) for part in parts)
    points, dims = value.flatten(0, 1), log_q.shape[-1]
    step = max(1, evaluator.cells // (size * dims))
    shape = (size, *value.shape[2:])
    mixed = []
    for piece in points.split(step):
        density = parts[0].log_prob(piece.unsqueeze(1)).double().expand(len(piece), *shape)
        mixed.append(logsumexp(density.reshape(len(piece), size, dims), 1))
    log_m = (torch.cat(mixed) - math.log(size)).reshape(draws, size, dims)
    return {
        "information": Estimate.of(log_q - log_m),
        "kl": Estimate.of(log_m - log_p),
        "total_correlation": Estimate.of(log_mix - log_m.sum(-1)),
    }, ()


def _coordinates(fn: Any) -> Any:
    """The distribution of one coordinate, batched over all, or None if coordinates depend on each other."""
    while type(fn).__name__ in ("Independent", "ExpandedDistribution"):
        fn = fn.base_dist
    return None if fn.event_shape else fn

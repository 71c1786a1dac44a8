"""Gradient estimators for guides with discrete latents, one loss for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.nn import functional as F

from pyroelbo import evidence
from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import base_of, data_frame, sample_sites
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.objectives.base import Objective, OneExpression, refuse_failing
from pyroelbo.objectives.couplings import antithetic_pair, log_odds_weight, pair_weight
from pyroelbo.objectives.terms import per_datum
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["ESTIMATORS", "Discrete_ELBO", "Estimator"]


@dataclass(frozen=True)
class Estimator:
    """What an estimator is and which sites it takes.

    Args:
        kind: the part of :class:`Discrete_ELBO` that computes it.
        families: the distributions that it takes, or None for all.
        least: the fewest particles.
        step: what divides the number of particles.
    """

    kind: str = "score"
    families: tuple[str, ...] | None = None
    least: int = 1
    step: int = 1

    def fault(self, site: Any) -> str | None:
        """What it expects instead of the distribution of a guide site; None if it takes it."""
        fn, frame = site["fn"], data_frame(site, "guide")
        if self.families is not None and (type(base_of(fn)).__name__ not in self.families or _masked(fn)):
            return f"a {' or '.join(self.families)} without a mask"
        if self.kind == "enumerate":
            inner = [
                n for i, n in enumerate(fn.batch_shape) if i != len(fn.batch_shape) + frame.dim and n > 1
            ]
            if not getattr(fn, "has_enumerate_support", False) or fn.event_shape or inner:
                return "one value of a finite set per datum"
        return None


def _masked(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        if type(fn).__name__ == "MaskedDistribution":
            return True
        fn = fn.base_dist
    return False


_VECTORS = ("Bernoulli", "OneHotCategorical")

ESTIMATORS: dict[str, Estimator] = {
    "score_function": Estimator(),  # Williams, 1992
    "baseline": Estimator(),  # Mnih and Gregor, 2014
    "rloo": Estimator(least=2),  # Kool et al., 2019
    "double_cv": Estimator("score", _VECTORS, 2),  # after Titsias and Shi, 2022
    "vimco": Estimator("vimco", least=2),  # Mnih and Rezende, 2016
    "disarm": Estimator("coupled", ("Bernoulli",), 2, 2),  # Dong et al., 2020
    # after Dimitriev and Zhou, 2021
    "coupled": Estimator("coupled", ("Bernoulli", "Categorical", "OneHotCategorical"), 2, 2),
    "enumerate": Estimator("enumerate"),
    "gumbel": Estimator("relaxed", _VECTORS),  # Jang et al., 2017
    "straight_through": Estimator("relaxed", _VECTORS),
}


class Discrete_ELBO(Objective, OneExpression, Trace_ELBO):
    """-ELBO of a guide with discrete latents, in nats; its gradient by a named estimator for each site.

    With f_k = ln p(y | z_k) + ``weight`` · (ln p(z_k) - ln q(z_k | y)) of a datum's particle k, the gradient
    for a guide's site s is

    - ``score_function``: mean over k of f_k ∇ ln q(s_k); ``baseline`` subtracts ``pair.baseline(*batch)``
      [B], which is trained along by squares; ``rloo`` subtracts the mean of the other f_j;
    - ``double_cv``: ``rloo`` of f_k - c_k · (s_k - μ), plus c_k · ∇μ, where μ = E s and c_k is the mean of
      the others' ∂f_j/∂s_j;
    - ``disarm``, ``coupled``: ½ (f(s) - f(s')) Σ_i w_i ∇ (ln q(s_i) - ln q(s'_i)) for pairs that share what
      precedes s, are antithetic at s, and draw anew what follows; w_i = q(s_i) q(s'_i) / r(s_i, s'_i), r
      their joint probability. K draws, K/2 pairs, for each such site;
    - ``enumerate``: ∇ Σ_s q(s) f(s), K draws for each value (of several sites: each combination);
    - ``vimco``: that of ln (1/K) Σ_k w_k, the importance-weighted bound, with leave-one-out baselines;
    - ``gumbel``, ``straight_through``: through a relaxation at ``temperature``: biased, and the printed loss
      is no bound. ``fit`` validates and ``audit`` evaluates with the guide itself, which is hard.

    Reparametrized sites keep pathwise gradients; all estimators but the last two are unbiased. Particles are
    one vectorized plate, terms are formed per datum, and a subsampled data plate's scale multiplies the
    result. Cost: K evaluations a datum, times the values enumerated, times the sites coupled.

    Args:
        estimator: a name for every latent that is not reparametrized, or {site: name} for each.
        num_particles: K.
        weight: the KL weight.
        temperature: of the relaxed estimators.
        options: of Pyro's ELBO.

    Raises ValueError, naming the site, for sites that an estimator does not take or that have none, and for
    combinations whose gradient would be biased.
    """

    takes_particles = True

    def __init__(
        self,
        estimator: str | Mapping[str, str] = "rloo",
        num_particles: int = 2,
        weight: float = 1.0,
        temperature: float = 0.5,
        **options: Any,
    ) -> None:
        count = positive_count("num_particles", num_particles, "number of draws")
        super().__init__(num_particles=count, vectorize_particles=True, **options)
        self._named = {"": estimator} if isinstance(estimator, str) else dict(estimator)
        for name in self._named.values():
            if name not in ESTIMATORS:
                raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {name!r}")
            row = ESTIMATORS[name]
            if count < row.least or count % row.step:
                what = "an even number" if row.step == 2 else f"at least {row.least}"
                raise ValueError(f"num_particles: expected {what} for estimator {name!r}, got {count}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        _check_together(set(self._named.values()))
        self.estimator = estimator if isinstance(estimator, str) else str(dict(sorted(self._named.items())))
        self.temperature = float(temperature)
        self._plan: _Plan | None = None
        self.scale = torch.tensor(1.0)
        self.weight = weight

    def check(self, pair: Pair, batch: Batch) -> None:
        if "baseline" in self._named.values() and not callable(getattr(pair, "baseline", None)):
            raise ValueError(
                f"estimator 'baseline': expected baseline(self, *batch) -> [B] of {pair.name}, got none: "
                "define it, or use 'rloo'"
            )
        refuse_failing(self, pair, batch, "networks that accept a leading dimension of particles")

    def validate(self, pair: Pair, y: Batch) -> Bound:
        if "vimco" in self._named.values():
            return evidence.iwae(pair, y, particles=self.num_particles)
        return super().validate(pair, y)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        plan = self._plan = self._plan or _Plan.of(guide, args, kwargs, self._named, self.num_particles)
        terms = self._terms(plan, model, guide, args, kwargs)
        if plan.sites("vimco"):
            value, surrogate = _vimco(terms, plan)
        else:
            baseline = getattr(getattr(model, "pair", None), "baseline", None)
            value, surrogate = _elbo(terms, plan, baseline and (lambda: baseline(*args, **kwargs)))
        loss = -terms.outer * surrogate.sum()
        return loss - loss.detach() - terms.outer * value.detach().sum()

    def _terms(self, plan: _Plan, model: Any, guide: Any, args: Any, kwargs: Any) -> _Terms:
        """Run guide and model once, all rows in one plate."""
        plate = pyro.plate("num_particles_vectorized", plan.rows, dim=-1 - plan.depth)
        with _Draws(plan, self.temperature):
            guide_trace = poutine.trace(plate(guide)).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(plate(model), trace=guide_trace)).get_trace(
            *args, **kwargs
        )
        guide_trace, model_trace = (prune_subsample_sites(t) for t in (guide_trace, model_trace))
        seen: Any = 0.0
        prior: Any = 0.0
        outer = 1.0

        def log_prob(name: str, site: Any, program: str) -> Tensor:
            site["unscaled_log_prob"] = _log_prob(site, name in plan.sites("relaxed"))
            return per_datum(site, data_frame(site, program), outer, program, True)

        for name, site in sample_sites(model_trace):
            frame = data_frame(site, "model")
            outer = 1.0 if frame.full_size is None else frame.full_size / frame.size
            if site["is_observed"]:
                seen = seen + log_prob(name, site, "model")
            elif name in guide_trace.nodes:
                prior = prior + log_prob(name, site, "model")
            else:
                raise ValueError(
                    f"model site {name!r}: expected a site of the same name in the guide, got none"
                )
        log_q = {name: log_prob(name, site, "guide") for name, site in sample_sites(guide_trace)}
        f = seen + self.scale * (prior - sum(log_q.values()))
        return _Terms(f, log_q, {n: guide_trace.nodes[n] for n in plan.estimator}, outer)


def _check_together(names: set[str]) -> None:
    kinds = {ESTIMATORS[n].kind for n in names}
    if "vimco" in kinds and len(kinds) > 1:
        raise ValueError("estimator: expected 'vimco' for every site or for none: its bound is another one")
    if {"coupled", "score"} <= kinds:
        raise ValueError(
            "estimator: expected pairs ('disarm', 'coupled') or score functions, got both: the members of a "
            "pair share draws and are no baselines for one another"
        )
    if len({n for n in names if ESTIMATORS[n].kind == "score"}) > 1:
        raise ValueError("estimator: expected one kind of baseline for all scored sites, got several")


@dataclass(frozen=True)
class _Plan:
    """Which estimator a site has, and what the rows of the plate are: [groups, K, values] in one dimension.

    A group are the K draws for one coupled site; the values are the combinations of the enumerated sites'.
    """

    estimator: dict[str, str]
    supports: dict[str, Tensor]  # of enumerated sites, [n, *event]
    particles: int
    depth: int  # of the programs' own plates

    @classmethod
    def of(cls, guide: Any, args: Any, kwargs: Any, named: Mapping[str, str], particles: int) -> _Plan:
        with poutine.block(), torch.random.fork_rng(), torch.no_grad():
            trace = prune_subsample_sites(poutine.trace(guide).get_trace(*args, **kwargs))
        sites = {n: s for n, s in sample_sites(trace) if not s["is_observed"]}
        absent = sorted(n for n in named if n and n not in sites)
        if absent:
            raise ValueError(f"estimator: expected sites of the guide, {sorted(sites)}, got {absent[0]!r}")
        estimator = {}
        for name, site in sites.items():
            if name in named or not site["fn"].has_rsample:
                found = named.get(name, named.get(""))
                if found is None:
                    raise ValueError(
                        f"estimator: expected a name for guide site {name!r}, a {_family(site)}, got none"
                    )
                fault = ESTIMATORS[found].fault(site)
                if fault is not None:
                    raise ValueError(
                        f"guide site {name!r}: expected {fault} for estimator {found!r}, got a "
                        f"{_family(site)}"
                    )
                estimator[name] = found
        depth = max((-f.dim for s in sites.values() for f in s["cond_indep_stack"] if f.dim), default=0)
        supports = {
            n: sites[n]["fn"].enumerate_support(expand=False).reshape(-1)
            for n, e in estimator.items()
            if ESTIMATORS[e].kind == "enumerate"
        }
        return cls(estimator, supports, particles, depth)

    def sites(self, kind: str) -> list[str]:
        return [n for n, e in self.estimator.items() if ESTIMATORS[e].kind == kind]

    @property
    def values(self) -> int:
        return math.prod(len(s) for s in self.supports.values())

    @property
    def groups(self) -> int:
        return max(1, len(self.sites("coupled")))

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.groups, self.particles, self.values

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def grouped(self, t: Tensor) -> Tensor:
        """[R, ...] as [groups, K, values, ...]."""
        return t.reshape(*self.shape, *t.shape[1:])

    def pair(self, t: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """First and second members of a group's pairs, [K/2, values, ...] of [R, ...]."""
        return self.grouped(t)[group].split(self.particles // 2)


def _family(site: Any) -> str:
    return type(base_of(site["fn"])).__name__


@dataclass(frozen=True)
class _Terms:
    """f and ln q by site [R, B], the guide's sites that have an estimator, the data plate's scale."""

    f: Tensor
    log_q: dict[str, Tensor]
    drawn: dict[str, Any]
    outer: float


class _Draws(Messenger):
    """Draws the guide's discrete latents as their estimators need them."""

    def __init__(self, plan: _Plan, temperature: float) -> None:
        super().__init__()
        self.plan, self.temperature = plan, temperature
        self.passed: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"] or type(msg["fn"]).__name__ == "_Subsample":
            return
        name, fn, plan = msg["name"], msg["fn"], self.plan
        found = plan.estimator.get(name)
        kind = ESTIMATORS[found].kind if found else "pathwise"
        if kind == "enumerate":
            value = self._enumerated(name, fn)
        elif kind == "relaxed":
            value = _relaxed(fn, self.temperature, hard=found == "straight_through")
        else:
            value = fn()
            value = value.detach() if kind != "pathwise" else value
        if plan.sites("coupled"):
            value = self._in_pairs(name, fn, value, kind == "coupled")
        if found == "double_cv" and torch.is_grad_enabled():
            value = value + 0.0 * fn.mean  # so that the slopes at the draws can be taken
        msg["value"], msg["done"] = value, True

    def _enumerated(self, name: str, fn: Any) -> Tensor:
        plan = self.plan
        before = list(plan.supports)[: list(plan.supports).index(name)]
        own = len(plan.supports[name])
        each = plan.values // math.prod(len(plan.supports[n]) for n in [*before, name])
        support = plan.supports[name]
        index = torch.arange(plan.rows, device=support.device) // each % own
        return support[index].reshape(-1, *[1] * (len(fn.batch_shape) - 1)).expand(fn.batch_shape)

    def _in_pairs(self, name: str, fn: Any, value: Tensor, coupled: bool) -> Tensor:
        """The second members copy the first until their site, where they are antithetic."""
        plan, groups = self.plan, []
        value = value.expand(fn.shape()) if value.shape != fn.shape() else value
        for group, site in enumerate(plan.sites("coupled")):
            first, second = plan.pair(value, group)
            if site == name:
                first, second = _antithetic(_base(fn), plan, group)
                self.passed.append(name)
            elif site not in self.passed:
                second = first
            groups.append(torch.cat([first, second]))
        return torch.stack(groups).reshape(value.shape)


def _probs(base: Any) -> Tensor:
    """Probabilities of the categories, [*batch, C]."""
    if type(base).__name__ == "Bernoulli":
        return torch.stack([torch.sigmoid(-base.logits), torch.sigmoid(base.logits)], -1)
    return base.probs


def _base(fn: Any) -> Any:
    """The distribution of a site's coordinates, of batch shape [*batch, *coordinates]."""
    base = base_of(fn)
    return base.expand(fn.batch_shape + base.batch_shape[len(base.batch_shape) - _events(fn, base) :])


def _events(fn: Any, base: Any) -> int:
    return len(fn.event_shape) - len(base.event_shape)


def _index(base: Any, value: Tensor) -> Tensor:
    return value.argmax(-1) if type(base).__name__ == "OneHotCategorical" else value.long()


def _antithetic(base: Any, plan: _Plan, group: int) -> tuple[Tensor, Tensor]:
    probs = plan.pair(_probs(base).detach(), group)[0]
    first, second = antithetic_pair(probs)
    if type(base).__name__ == "Categorical":
        return first, second
    if type(base).__name__ == "OneHotCategorical":
        first, second = (F.one_hot(i, probs.shape[-1]) for i in (first, second))
    return first.to(probs.dtype), second.to(probs.dtype)


def _relaxed(fn: Any, temperature: float, hard: bool) -> Tensor:
    """A relaxed draw of a Bernoulli or OneHotCategorical site, or a hard one with the relaxed one's slope."""
    base = _base(fn)
    tiny = torch.finfo(base.logits.dtype).tiny
    u = torch.rand_like(base.logits).clamp_min(tiny)
    if type(base).__name__ == "Bernoulli":
        noise = u.log() - torch.log1p(-u.clamp_max(1 - torch.finfo(u.dtype).eps))
        soft = torch.sigmoid((base.logits + noise) / temperature)
        sharp = (soft > 0.5).to(soft.dtype)
    else:
        soft = ((base.logits - (-u.log()).clamp_min(tiny).log()) / temperature).softmax(-1)
        sharp = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return sharp + soft - soft.detach() if hard else soft


def _log_prob(site: Any, relaxed: bool) -> Tensor:
    """ln p of a site's value; of a relaxed one its multilinear extension."""
    fn, value = site["fn"], site["value"]
    if not relaxed or getattr(fn, "multilinear", False):
        return fn.log_prob(value, *site["args"], **site["kwargs"])
    base = _base(fn)
    if type(base).__name__ == "Bernoulli":
        terms = value * F.logsigmoid(base.logits) + (1 - value) * F.logsigmoid(-base.logits)
    else:
        terms = (value * base.logits.log_softmax(-1)).sum(-1)
    events = _events(fn, base)
    return terms.flatten(-events).sum(-1) if events else terms


# ------------------------------------------------------------------ values and surrogates, [B] per datum


def _sum(terms: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.stack([terms[n] for n in names]).sum(0)


def _vimco(terms: _Terms, plan: _Plan) -> tuple[Tensor, Tensor]:
    """ln (1/K) Σ w and its surrogate."""
    f, k = terms.f, len(terms.f)
    bound = logsumexp(f, 0) - math.log(k)
    fixed = f.detach()
    own = torch.eye(k, dtype=torch.bool, device=f.device)[..., None]
    others = torch.where(own, 0.0, fixed).sum(1) / (k - 1)  # in place of each ln w_k
    signal = bound.detach() - (logsumexp(torch.where(own, others, fixed), 1) - math.log(k))
    return bound, bound + (signal * _sum(terms.log_q, plan.sites("vimco"))).sum(0)


def _elbo(terms: _Terms, plan: _Plan, baseline: Callable[[], Tensor] | None) -> tuple[Tensor, Tensor]:
    """The ELBO and its surrogate."""
    f = terms.f
    enumerated = plan.sites("enumerate")
    if enumerated:
        weight = _sum(terms.log_q, enumerated).exp()
        f = weight * torch.where(weight > 0, f, torch.zeros_like(f))
    f = plan.grouped(f)
    elbo = f.sum(2).mean((0, 1))
    surrogate = elbo
    scored = plan.sites("score")
    if scored:
        log_q = plan.grouped(_sum(terms.log_q, scored))
        signal, more = _signal(f, [terms.drawn[n] for n in scored], plan, plan.estimator[scored[0]], baseline)
        surrogate = surrogate + (signal * log_q).sum(2).mean((0, 1)) + more
    for group, name in enumerate(plan.sites("coupled")):
        first, second = f[group].detach().split(plan.particles // 2)
        pairs = _weighted_difference(terms.drawn[name], plan, group)
        surrogate = surrogate + 0.5 * ((first - second) * pairs).sum(1).mean(0)
    return elbo, surrogate


def _signal(
    f: Tensor, sites: list[Any], plan: _Plan, estimator: str, baseline: Callable[[], Tensor] | None
) -> tuple[Tensor, Any]:
    """What multiplies ln q of the scored sites, [1, K, values, B], and what is added to the surrogate."""
    h: Tensor = f.detach()
    more: Any = 0.0
    if estimator == "score_function":
        return h, more
    if estimator == "baseline":
        assert baseline is not None
        error = h - baseline() / plan.values
        return error.detach(), -0.5 * error.square().sum(2).mean((0, 1))
    if estimator == "double_cv" and torch.is_grad_enabled():
        slopes = torch.autograd.grad(
            f.sum(), [s["value"] for s in sites], retain_graph=True, materialize_grads=True
        )
        for site, slope in zip(sites, slopes, strict=True):
            slope = plan.grouped(slope)
            others = (slope.sum(1, keepdim=True) - slope) / (plan.particles - 1)
            mean, value = plan.grouped(site["fn"].mean), plan.grouped(site["value"].detach())
            h = h - _summed(others * (value - mean.detach()), site, len(site["fn"].event_shape))
            more = more + _summed(others * mean, site, len(site["fn"].event_shape)).sum(2).mean((0, 1))
    k = plan.particles
    return (h - h.mean(1, keepdim=True)) * (k / (k - 1)), more


def _weighted_difference(site: Any, plan: _Plan, group: int) -> Tensor:
    """Σ_i w_i (ln q(s_i) - ln q(s'_i)) over the coordinates of a group's pairs, [K/2, values, B]."""
    base, value = _base(site["fn"]), site["value"]
    log_q = plan.pair(base.log_prob(value), group)
    if type(base).__name__ == "Bernoulli":
        weight = log_odds_weight(plan.pair(base.logits, group)[0])
    else:
        weight = pair_weight(plan.pair(_probs(base), group)[0], *plan.pair(_index(base, value), group))
    return _summed(weight * (log_q[0] - log_q[1]), site, _events(site["fn"], base))


def _summed(t: Tensor, site: Any, events: int) -> Tensor:
    """Sum over a datum's plates and ``events`` event dimensions: [..., B] of [..., *plates, B, *events]."""
    if events:
        t = t.flatten(-events).sum(-1)
    depth = len(site["fn"].batch_shape) - 1
    data = t.dim() + data_frame(site, "guide").dim
    inner = [i for i in range(t.dim() - depth, t.dim()) if i != data]
    return t.sum(inner) if inner else t

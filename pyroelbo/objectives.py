"""Training objectives beside Pyro's own: each is a Pyro ``ELBO``, for ``SVI(loss=...)`` and for ``fit``
alike."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.infer.inspect import get_dependencies
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import kl_divergence

from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import ExactPair, Program
from pyroelbo.sites import check_scale, data_frame, sample_sites

__all__ = [
    "IWAE_ELBO",
    "Evidence_ELBO",
    "Exact_ELBO",
    "Hard_ELBO",
    "Layered_ELBO",
    "Weighted_ELBO",
    "mean_field_fault",
]


class Evidence_ELBO(ELBO):
    """-ln p(y), by the ``log_evidence`` of an :class:`~pyroelbo.ExactPair`, summed over the batch: no guide is run.

    With the exact posterior as guide it is the value and the gradient of :class:`Exact_ELBO`, at the cost of the
    evidence alone: for an autoregressive model one pass of its network in place of a site for every token. ``model``
    is that pair's own ``pair.model``. Raises TypeError for other models, ValueError where the evidence is that of a
    whole batch (latents outside of the data plate).
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("Evidence_ELBO draws nothing: it has no traces")

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        pair = getattr(model, "pair", None)
        if not isinstance(pair, ExactPair):
            of = f"that of a {type(pair).__name__}" if pair is not None else f"a {type(model).__name__}"
            raise TypeError(f"Evidence_ELBO takes the model of an ExactPair, got {of}: take Trace_ELBO")
        # As a program of its pair, so that SVI sees the parameters.
        value = Program(pair, type(pair).log_evidence)(*args, **kwargs)
        rows = len(next(iter((*args, *kwargs.values()))))
        if value.shape != (rows,):
            raise ValueError(
                f"Evidence_ELBO: {type(pair).__name__}.log_evidence gave shape {tuple(value.shape)} for {rows} data, it "
                "takes one number for each: take Trace_ELBO for latents outside of the data plate"
            )
        return -value.sum()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


class Exact_ELBO(Trace_ELBO):
    """-ELBO for guides that draw from the exact posterior: ln w alone is differentiated, the draws are held
    fixed.

    With q = p(z | y), ln w = ln p(y, z) - ln q(z | y) is ln p(y) whatever z was drawn, and so is its gradient
    that of ln p(y): without noise, while :class:`~pyro.infer.Trace_ELBO` adds a score term of mean zero. For
    other guides the gradient is biased: :func:`~pyroelbo.fit` takes this objective only where
    ``pair.exact_guide`` says so.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs, detach=True)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        total = sum(
            m.log_prob_sum() - g.log_prob_sum() for m, g in self._get_traces(model, guide, args, kwargs)
        )
        return -total / self.num_particles  # type: ignore[operator]

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


class Hard_ELBO(Trace_ELBO):
    """E_q[-ln p(y, z)]: the loss without the encoder's entropy, as for a code that is written down.

    For discrete z it is at least the ELBO loss, hence still an upper bound on -ln p(y), and what hard EM
    descends; for a deterministic encoder it is -ln p(y, z(y)), and equal to the ELBO loss if z is discrete.
    With Shannon's code words as z, |z| = ⌈-log₂ Pop(y)⌉, and P(z) = 2^-|z| it lies in [H, H + ln 2).
    For continuous z it is no bound (an encoder may shrink to a point), and can run to minus infinity.
    Gradients as in :class:`~pyro.infer.Trace_ELBO`: pathwise, or by the score function.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for site in guide_trace.nodes.values():
            if site["type"] == "sample":
                zero = torch.zeros_like(site["log_prob"])
                parts = ScoreParts(zero, site["score_parts"].score_function, 0)
                site.update(log_prob=zero, log_prob_sum=zero.sum(), score_parts=parts)
        return model_trace, guide_trace


class ScaleLatents(Messenger):
    """Multiplies ln p and ln q of every latent site by ``weight``, so that a loss is -E ln p(y|z) + weight · KL."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample":
            msg["scale"] = msg["scale"] * self.weight


class WrappedELBO(ELBO):
    """An ELBO made from another one (abstract), with the same particles and plates."""

    def __init__(self, inner: ELBO) -> None:
        super().__init__(
            num_particles=inner.num_particles,
            max_plate_nesting=inner.max_plate_nesting,
            vectorize_particles=inner.vectorize_particles,
        )
        self.inner = inner

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.inner._get_trace(model, guide, args, kwargs)


class Annealed(ELBO):
    """An ELBO (abstract) with a KL weight that may be set between steps; it is held in a tensor."""

    scale: Tensor

    @property
    def weight(self) -> float:
        return float(self.scale)

    @weight.setter
    def weight(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"weight takes a number of at least 0, got {value!r}")
        self.scale.fill_(value)


class Weighted_ELBO(WrappedELBO, Annealed):
    """E[-ln p(y | z)] + ``weight`` · KL: another ELBO with the latents' terms, of model and guide, scaled by
    ``weight``.

    The weight stands in the objective and never in the model, so the model's evidence can still be evaluated.
    Set ``objective.weight`` between steps to anneal. Below 1 it is no lower bound on ln p(y), above 1 a
    looser one. Any of Pyro's ELBOs may be wrapped that scores latent sites by their scale.

    Source: Higgins et al. (2017); Bowman et al. (2016) for annealing.
    """

    def __init__(self, inner: ELBO, weight: float = 1.0) -> None:
        super().__init__(inner)
        self.scale = torch.tensor(float(weight))

    def _scaled(self, program: Any) -> Any:
        handler = ScaleLatents(self.scale)

        def run(*args: Any, **kwargs: Any) -> Any:
            with handler:
                return program(*args, **kwargs)

        return run

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return super()._get_trace(self._scaled(model), self._scaled(guide), args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.loss(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.differentiable_loss(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.loss_and_grads(self._scaled(model), self._scaled(guide), *args, **kwargs)


class _Pathwise(Trace_ELBO, Annealed):
    """Its loss (abstract) is one expression of reparametrized draws, ``_differentiable_loss_particle``."""

    def __init__(self, weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.scale = torch.tensor(1.0)
        self.weight = weight

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The objective's value, a float."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def _check_pathwise(self, name: str, drawn: Any) -> None:
        if not drawn["fn"].has_rsample:
            raise ValueError(
                f"guide site {name!r} is a {type(drawn['fn']).__name__}, which is not reparametrized: "
                f"{type(self).__name__} takes pathwise gradients, use Trace_ELBO"
            )


class Layered_ELBO(_Pathwise):
    """E_q[-ln p(y | z)] + ``weight`` · Σ_l γ_l · max(``free_bits``, KL_l) over the latent sites l, in nats.

    KL_l is the mean over the batch of KL(q(z_l | …), p(z_l | …)), in closed form exactly where that is the
    bound's own term and torch knows the form, of ln q - ln p at the draw elsewhere: a site's closed form is
    its term if every latent that the model draws before it is drawn before it by the guide too (top-down
    encoders: all sites; bottom-up ones: the top site). ``free_bits`` is the number of nats that each site may
    use without being pushed down (a nat, despite the name, is 1.44 bits).
    ``balance`` sets γ_l ∝ KL_l (held fixed), with mean 1, while ``weight`` is below 1, so that sites that say
    little are pushed down less during warm-up; γ_l = 1 otherwise. With ``free_bits=0``, weight 1 the loss is
    -ELBO; otherwise an objective, no bound.

    ``fit(objective="layered")`` takes it as it stands; ``fit(objective=Layered_ELBO(free_bits=0.5), kl_weight=...)``
    anneals its weight. Raises ValueError, naming the site, for latents that are not reparametrized.

    Sources: Kingma et al. (2016), equation 15 (free bits); Vahdat and Kautz (2020), appendix A (balancing).
    """

    def __init__(
        self, free_bits: float = 0.0, balance: bool = False, weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        if not free_bits >= 0:
            raise ValueError(f"free_bits takes a number of nats of at least 0, got {free_bits!r}")
        self.free_bits, self.balance = float(free_bits), balance

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        loss: Any = 0.0
        terms = []
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if name in guide_trace.nodes and not site["is_observed"]:
                terms.append(self._term(name, site, guide_trace.nodes[name], model_trace, guide_trace))
            else:
                loss = loss - site["log_prob_sum"]
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                loss = loss + site["log_prob_sum"]
        if terms:
            sums, means, floors = (torch.stack(part) for part in zip(*terms, strict=True))
            # A sampled term may be negative, and counts as it is where nothing is free.
            kls = torch.where(means > self.free_bits, sums, floors) if self.free_bits else sums
            if self.balance:
                share = means.detach().clamp_min(0) + 1e-6
                share = share / share.mean()
                kls = kls * torch.where(self.scale < 1, share, torch.ones_like(share))
            loss = loss + self.scale * kls.sum()
        return loss.detach(), loss

    def _term(
        self, name: str, site: Any, drawn: Any, model: Any, guide: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A site's KL summed with its scale, its mean for one datum (unscaled), and the sum if that mean were
        ``free_bits``."""
        self._check_pathwise(name, drawn)
        kl = None
        if not _drawn_later(name, model, guide):
            with suppress(NotImplementedError):  # torch does not know every form
                kl = kl_divergence(drawn["fn"], site["fn"])
        if kl is None:
            kl = drawn["fn"].log_prob(drawn["value"]) - site["fn"].log_prob(site["value"])
        scale, mask = drawn["scale"], drawn["mask"]
        counted = scale_and_mask(torch.ones_like(kl), 1.0, mask)
        mean = scale_and_mask(kl, 1.0, mask).sum() / counted.sum().clamp_min(1)
        floor = scale_and_mask(self.free_bits * counted, scale).sum()
        return scale_and_mask(kl, scale, mask).sum(), mean, floor


class IWAE_ELBO(_Pathwise):
    """-Σ_b ln (1/K) Σ_k w_kb: minus the importance-weighted bound of K = ``num_particles`` draws of the guide, in nats.

    ln w_kb = ln p(y_b | z_kb) + ``weight`` · (ln p(z_kb) - ln q(z_kb | y_b)), for each datum of the plate "data", whose
    scale (subsampling) multiplies the bound and never the weights. The draws come as one vectorized plate, so that what
    does not stand on them (features of y) is computed once. With ``weight`` 1 it is a lower bound on ln p(y), at least
    the ELBO and monotone in K; K = 1 is the ELBO. A generator trained by it may leave to the weights what the guide
    cannot follow; the guide's own gradient loses against its noise as K grows (Rainforth et al., 2018), so take few
    draws, or take it for a last phase.

    Raises ValueError, naming the site, for latents that are not reparametrized or that the guide lacks, sites outside
    the data plate, and scales other than the plate's own, which would enter the weights. Cost: K evaluations a datum.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8.
    """

    def __init__(self, num_particles: int = 5, weight: float = 1.0, **options: Any) -> None:
        count = positive_count("num_particles", num_particles, "number of draws")
        super().__init__(weight, num_particles=count, vectorize_particles=True, **options)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        log_w: Any = 0.0
        outer = 1.0
        for name, site in sample_sites(model_trace):
            frame = data_frame(site, "model")
            outer = 1.0 if frame.full_size is None else frame.full_size / frame.size
            log_p = self._per_datum(site, frame, outer, "model")
            if site["is_observed"]:
                log_w = log_w + log_p
                continue
            if name not in guide_trace.nodes:
                raise ValueError(
                    f"model site {name!r} is missing in the guide: its draws would have no weight"
                )
            drawn = guide_trace.nodes[name]
            self._check_pathwise(name, drawn)
            log_w = log_w + self.scale * (log_p - self._per_datum(drawn, frame, outer, "guide"))
        for name, site in sample_sites(guide_trace):
            if name not in model_trace.nodes:
                frame = data_frame(site, "guide")
                log_w = log_w - self.scale * self._per_datum(site, frame, outer, "guide")
        particles = self.num_particles
        bound = log_w if particles == 1 else logsumexp(log_w, 0) - math.log(particles)
        # Of all particles' sum Trace_ELBO takes the mean.
        loss = -outer * particles * bound.sum()
        return loss.detach(), loss

    def _per_datum(self, site: Any, frame: Any, outer: float, program: str) -> Tensor:
        """ln p of one site, unscaled but masked, [K, B] (K = 1: [B])."""
        scale = site["scale"]
        if isinstance(scale, Tensor) or not math.isclose(scale, outer, rel_tol=1e-5):
            check_scale(site, program)
            raise ValueError(
                f"{program} site {site['name']!r} has a scale within the datum, which would enter its weights: "
                "IWAE_ELBO takes whole data, Trace_ELBO estimates of them"
            )
        terms = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
        keep = {terms.dim() + frame.dim} | ({0} if self.num_particles > 1 else set())
        inner = [i for i in range(terms.dim()) if i not in keep]
        return terms.sum(inner) if inner else terms


def _latents(trace: Any) -> list[str]:
    return [
        k
        for k, s in trace.nodes.items()
        if s["type"] == "sample" and not s["is_observed"] and type(s["fn"]).__name__ != "_Subsample"
    ]


def _drawn_later(name: str, model: Any, guide: Any) -> list[str]:
    """Latents that the model draws before ``name`` and the guide after it."""
    before, drawn = _latents(model), _latents(guide)
    later = set(drawn[drawn.index(name) + 1 :])
    return [k for k in before[: before.index(name)] if k in later]


def mean_field_fault(model: Any, guide: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why :class:`~pyro.infer.TraceMeanField_ELBO` would be no bound for this pair; None if it is its bound.

    It puts KL(q(z_l | …), p(z_l | …)) in closed form, at drawn values of what both stand on. Where the model's
    z_l stands on a z_k that the guide draws *from* z_l, z_l and z_k depend on each other given what is drawn,
    and the number belongs to another guide: it may lie on either side of the ELBO. The order of sites alone
    does not tell; where it differs, Pyro's provenance does.
    """
    traced = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.trace(poutine.replay(model, trace=traced)).get_trace(*args, **kwargs)
    suspects = {k: _drawn_later(k, replayed, traced) for k in _latents(replayed) if k in traced.nodes}
    if not any(suspects.values()):
        return None
    above = get_dependencies(model, args, kwargs)["prior_dependencies"]
    stands_on = {k: set(v) for k, v in get_dependencies(guide, args, kwargs)["prior_dependencies"].items()}
    for site in traced.nodes:  # in the order of drawing, so one pass closes the relation
        if site in stands_on:
            stands_on[site] |= set().union(*(stands_on[k] for k in stands_on[site] if k != site), ())
    for site, later in suspects.items():
        for other in later:
            if other in above[site] and site in stands_on[other]:
                return (
                    f"the model draws {site!r} from {other!r} and the guide {other!r} from {site!r}: the closed-form KL of "
                    f"{site!r} is not this bound's term, as the two depend on each other. Take objective='elbo' or "
                    "'layered', which samples it, or a top-down guide"
                )
    return None

"""The importance-weighted bound as a training objective."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyroelbo import evidence
from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import data_frame, sample_sites
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.objectives.base import Pathwise, refuse_failing
from pyroelbo.objectives.terms import per_datum
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["GRADIENTS", "IWAE_ELBO"]

GRADIENTS = ("plain", "stl", "dreg")


class IWAE_ELBO(Pathwise):
    """-Σ_b ln (1/K) Σ_k w_kb: minus the importance-weighted bound of K = ``num_particles`` draws of the
    guide, in nats.

    ln w_kb = ln p(y_b | z_kb) + ``weight`` · (ln p(z_kb) - ln q(z_kb | y_b)), for each datum of the plate
    "data", whose subsampling scale multiplies the bound and never the weights. The particles are one
    vectorized plate, so what does not depend on them (features of y) is computed once. With ``weight`` 1 it
    is a lower bound on ln p(y), at least the ELBO and monotone in K; K = 1 is the ELBO. The signal-to-noise
    ratio of the guide's gradient falls as K grows (Rainforth et al., 2018): use few particles, or use it as a
    last phase.

    Its ``gradient`` for the guide is one of

    - ``plain``: that of the loss;
    - ``stl``: without the score of ln q, whose mean is zero for K = 1; biased for K > 1 (Roeder, Wu and
      Duvenaud, 2017);
    - ``dreg``: doubly reparametrized, unbiased, Σ_k w̄_k² ∂ ln w_k / ∂z_k · dz_k/dφ with normalized weights w̄;
      its signal-to-noise ratio does not fall as K grows (Tucker et al., 2019).

    Where q is the posterior, the last two are zero for every draw. They hold the guide's parameters fixed
    inside ln q only, also along chains of latents; what a generator shares with the guide keeps its gradient
    in ln p. Cost: K evaluations a datum, and another pass of the guide for ``stl`` and ``dreg``.

    Raises ValueError, naming the site, for latents that are not reparametrized or that the guide lacks, sites
    outside the data plate, scales other than the plate's own, which would enter the weights, and guides whose
    parameters cannot be held fixed.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8.
    """

    takes_particles = True

    def __init__(
        self, num_particles: int = 5, weight: float = 1.0, gradient: str = "plain", **options: Any
    ) -> None:
        count = positive_count("num_particles", num_particles, "number of draws")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: expected one of {GRADIENTS}, got {gradient!r}")
        super().__init__(weight, num_particles=count, vectorize_particles=True, **options)
        self.gradient = gradient

    def check(self, pair: Pair, batch: Batch) -> None:
        refuse_failing(self, pair, batch, "networks that accept a leading dimension of particles")

    def validate(self, pair: Pair, y: Batch) -> Bound:
        return evidence.iwae(pair, y, particles=self.num_particles)

    def _get_traces(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        self._held = _modules_of(model, guide)
        return super()._get_traces(model, guide, args, kwargs)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        if self.gradient == "plain":
            return super()._get_trace(model, guide, args, kwargs)
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        self._share: dict[str, Any] = {}
        latents = [n for n, _ in sample_sites(prune_subsample_sites(drawn))]
        for name in latents:
            site = drawn.nodes[name]
            self._check_pathwise(name, site)
            site["value"] = self._entering(site)
        with _Fixed(), _held_fixed(self._held):
            fixed = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(*args, **kwargs)
        self._check_fixed(fixed.nodes[latents[0]])
        model_trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
        traces = [prune_subsample_sites(t) for t in (model_trace, fixed)]
        for trace in traces:
            trace.compute_log_prob()
        return tuple(traces)

    def _entering(self, site: Any) -> Tensor:
        """A draw as ln w reads it: with ``dreg`` the gradient that comes back is multiplied by w̄."""
        value = site["value"].view_as(site["value"])
        if self.gradient == "stl" or self.num_particles == 1 or not value.requires_grad:
            return value
        depth, frame = len(site["fn"].batch_shape), data_frame(site, "guide")
        shape = [1] * value.dim()
        shape[0], shape[depth + frame.dim] = self.num_particles, frame.size
        share = self._share
        value.register_hook(lambda slope: slope * share["w"].reshape(shape))
        return value

    def _check_fixed(self, site: Any) -> None:
        """Refuse a guide whose density at its first site depends on more than its draw."""
        if site["fn"].log_prob(site["value"].detach()).requires_grad:
            raise ValueError(
                f"guide site {site['name']!r}: expected parameters of modules or of pyro.param, which "
                f"gradient={self.gradient!r} holds fixed, got others: use gradient='plain'"
            )

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        log_w: Any = 0.0
        outer, particles = 1.0, self.num_particles
        for name, site in sample_sites(model_trace):
            frame = data_frame(site, "model")
            outer = 1.0 if frame.full_size is None else frame.full_size / frame.size
            log_p = per_datum(site, frame, outer, "model", particles > 1)
            if site["is_observed"]:
                log_w = log_w + log_p
                continue
            if name not in guide_trace.nodes:
                raise ValueError(
                    f"model site {name!r}: expected a site of the same name in the guide, got none"
                )
            drawn = guide_trace.nodes[name]
            self._check_pathwise(name, drawn)
            log_w = log_w + self.scale * (log_p - per_datum(drawn, frame, outer, "guide", particles > 1))
        for name, site in sample_sites(guide_trace):
            if name not in model_trace.nodes:
                frame = data_frame(site, "guide")
                log_w = log_w - self.scale * per_datum(site, frame, outer, "guide", particles > 1)
        if self.gradient == "dreg" and particles > 1:
            self._share["w"] = log_w.detach().softmax(0)
        bound = log_w if particles == 1 else logsumexp(log_w, 0) - math.log(particles)
        # Trace_ELBO divides the sum over particles by their number.
        loss = -outer * particles * bound.sum()
        return loss.detach(), loss


class _Fixed(Messenger):
    """Detaches what ``pyro.param`` returns."""

    def _pyro_post_param(self, msg: Any) -> None:
        msg["value"] = msg["value"].detach()


def _modules_of(*programs: Any) -> list[nn.Module]:
    """The modules whose parameters programs may read."""
    owners = []
    for program in programs:
        owners += [program, getattr(program, "pair", None), getattr(program, "__self__", None)]
    return [m for owner in owners if isinstance(owner, nn.Module) for m in owner.modules()]


@contextmanager
def _held_fixed(modules: list[nn.Module]) -> Iterator[None]:
    """Context manager in which the modules' parameters are constants."""
    before = [(m._parameters, dict(m._parameters)) for m in modules]
    try:
        for parameters, own in before:
            for name, p in own.items():
                parameters[name] = p if p is None else p.detach()  # type: ignore[assignment]
        with warnings.catch_warnings():  # pyro.module remarks on each
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            yield
    finally:
        for parameters, own in reversed(before):
            parameters.update(own)

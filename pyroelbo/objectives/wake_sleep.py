"""Wake-sleep and reweighted wake-sleep: the generator and the encoder have a loss of their own each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo import evidence
from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import data_frame, sample_sites
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.objectives.base import Objective, OneExpression, Update
from pyroelbo.objectives.exact import Exact_ELBO
from pyroelbo.objectives.terms import per_datum
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["ReweightedWakeSleep", "WakeSleep", "generator_of"]


class _Half(OneExpression, ELBO):
    """A loss of one differentiable expression (abstract)."""

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no pair of traces: use its differentiable_loss")


class _Sleep(_Half):
    """-E ln q(z | y) over (z, y) drawn from the model, as many as there are data in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, int] | None = None

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.observed is None:
            self.observed = _observed(model.pair, kwargs or args)
        with torch.no_grad():
            trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        parts = [*args, *kwargs.values()]
        for name, i in self.observed.items():
            parts[i] = trace.nodes[name]["value"].reshape(parts[i].shape).to(parts[i].dtype)
        kwargs = dict(zip(kwargs, parts[len(args) :], strict=True))
        guided = poutine.trace(poutine.replay(guide, trace=trace))
        return -prune_subsample_sites(guided.get_trace(*parts[: len(args)], **kwargs)).log_prob_sum()


def _observed(pair: Pair, batch: Batch) -> dict[str, int]:
    """The part of the batch that each observed site observes, in the order of its memory."""
    found = pair._observed_parts(batch)
    tensors = list(batches.parts(batch).values())
    for name, (i, view) in found.items():
        same = view.shape == tensors[i].shape and view.stride() == tensors[i].stride()
        if not same and not view.is_contiguous():
            raise ValueError(
                f"observed site {name!r}: expected a part of the batch as it is, or reshaped, got another "
                "view (a transposed one?), which dreams would scramble"
            )
    return {name: i for name, (i, _) in found.items()}


class _Reweighted(_Half):
    """-Σ_b ln (1/K) Σ_k w_kb; its gradient is that of ln p alone, or -Σ_k w̄_k ∇ ln q(z_k) for the encoder."""

    def __init__(self, num_particles: int, encoder: bool = False) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=True)
        self.encoder = encoder
        self.max_plate_nesting: float

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.max_plate_nesting == math.inf:
            with poutine.block(), torch.random.fork_rng(), torch.no_grad():
                trace = poutine.trace(guide).get_trace(*args, **kwargs)
            frames = [f.dim for _, s in sample_sites(trace) for f in s["cond_indep_stack"] if f.dim]
            self.max_plate_nesting = max((-d for d in frames), default=0)
        k = self.num_particles
        plate = pyro.plate("num_particles_vectorized", k, dim=-1 - int(self.max_plate_nesting))
        guide_trace = poutine.trace(plate(guide)).get_trace(*args, **kwargs)
        guide_trace.detach_()
        replayed = poutine.replay(plate(model), trace=guide_trace)
        model_trace = poutine.trace(replayed).get_trace(*args, **kwargs)
        outer, sums = 1.0, []
        for program, trace in (("model", model_trace), ("guide", guide_trace)):
            trace = prune_subsample_sites(trace)
            trace.compute_log_prob()
            total: Any = 0.0
            for _, site in sample_sites(trace):
                frame = data_frame(site, program)
                outer = 1.0 if frame.full_size is None else frame.full_size / frame.size
                total = total + per_datum(site, frame, outer, program, True)
            sums.append(total)
        log_p, log_q = sums
        fixed = (log_p - log_q).detach()
        bound = logsumexp(fixed, 0) - math.log(k)
        surrogate = (fixed.softmax(0) * (log_q if self.encoder else log_p)).sum()
        return -outer * (bound.sum() + surrogate - surrogate.detach())


class WakeSleep(Objective):
    """The generator by -E_q ln p(y, z) on data, the encoder by -E_p ln q(z | y) on dreams (y, z) ~ p.

    Two losses a step, each with its own parts of the pair. The encoder minimizes E KL(p(z | y), q(z | y))
    over the *model's* data, so together they descend no common bound; any latents will do, and there is no
    score term. ``fit`` prints minus the ELBO (``loss_wake``) and -ln q of the dreams (``loss_sleep``).

    Raises ValueError for pairs without a part ``encoder``, whose guide reads other parts, or that cannot be
    simulated. Source: Hinton, Dayan, Frey and Neal (1995).
    """

    weightable = False

    def __init__(self, generator: tuple[str, ...], encoder: tuple[str, ...] = ("encoder",)) -> None:
        self.generator, self.encoder = tuple(generator), tuple(encoder)

    def updates(self) -> Mapping[str, Update]:
        return {"wake": Update(Exact_ELBO(), self.generator), "sleep": Update(_Sleep(), self.encoder)}

    def check(self, pair: Pair, batch: Batch) -> None:
        _check_sides(self, pair, batch)
        pair.simulate(1, like=batch)


class ReweightedWakeSleep(WakeSleep):
    """The generator by the importance-weighted bound, the encoder by -Σ_k w̄_k ln q(z_k | y) on data.

    Weights are formed per datum from K = ``num_particles`` draws of the guide; nothing is differentiated
    through draws or weights, so any latents will do. Its bound is validated as IW-K.

    Raises ValueError as :class:`WakeSleep`. Source: Bornschein and Bengio (2015); Le et al. (2019).
    """

    takes_particles = True

    def __init__(
        self, num_particles: int, generator: tuple[str, ...], encoder: tuple[str, ...] = ("encoder",)
    ) -> None:
        super().__init__(generator, encoder)
        self.num_particles = positive_count("num_particles", num_particles, "number of draws")
        if num_particles < 2:
            raise ValueError(f"num_particles: expected at least 2 to be weighted, got {num_particles}")

    def updates(self) -> Mapping[str, Update]:
        k = self.num_particles
        return {
            "wake": Update(_Reweighted(k), self.generator),
            "encoder": Update(_Reweighted(k, encoder=True), self.encoder),
        }

    def check(self, pair: Pair, batch: Batch) -> None:
        _check_sides(self, pair, batch)

    def validate(self, pair: Pair, y: Batch) -> Bound:
        return evidence.iwae(pair, y, particles=self.num_particles)


def generator_of(pair: Pair) -> tuple[str, ...]:
    """The parts of a pair but ``encoder``."""
    names = {n.split(".")[0].removesuffix("_unconstrained") for n, _ in pair.named_parameters()}
    return tuple(sorted(names - {"encoder"}))


def _check_sides(objective: WakeSleep, pair: Pair, batch: Batch) -> None:
    """Refuse pairs without the parts, or whose guide reads the generator's."""
    for name in (*objective.generator, *objective.encoder):
        pair.part(name)
    with torch.random.fork_rng():
        trace = prune_subsample_sites(batches.call(poutine.trace(pair.guide).get_trace, batch))
    trace.detach_()
    log_q = trace.log_prob_sum()
    theirs = {n: p for part in objective.generator for n, p in pair.part(part).items()}
    if theirs and log_q.requires_grad:
        found = torch.autograd.grad(log_q, list(theirs.values()), allow_unused=True)
        shared = [n for n, g in zip(theirs, found, strict=True) if g is not None]
        if shared:
            raise ValueError(
                f"objective: expected a guide whose parameters are all in the part 'encoder', got "
                f"{pair.name}, whose guide reads {shared[0]!r}: the two sides of wake-sleep "
                "share no parameters"
            )

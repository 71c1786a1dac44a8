"""Joint evaluation: the whole batch as one datum, for models whose latents stand outside the data plate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import constraints

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.evaluator import Evaluator, LargestTensor, LatentSite, View
from pyroelbo.evaluation.sites import check_sites, sample_sites, sites_beyond
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["Joint", "scoped", "view"]


class JointEvaluator(Evaluator):
    """The :class:`~pyroelbo.evaluation.evaluator.Evaluator` of one datum that is the whole batch: size 1, latents [K, 1,
    *batch, *event].

    Latents may stand anywhere, inside the data plate, outside, or without any plate, as batch dimensions of
    their own. Particles come as a vectorized plate outside all others where that gives what one particle at a
    time gives, else as a loop. Every site must be there in full: any scale is refused.
    """

    def __init__(self, pair: Joint, batch: Any, *, with_guide: bool = True) -> None:
        self.pair = pair  # type: ignore[assignment]
        self.batch = batches.to(batches.as_batch(batch, "y"), pair.device)
        self.size, self.sliceable, self.scaled_site = 1, False, None
        self.with_guide = with_guide
        with torch.no_grad(), self._quiet():
            self._learn(self.batch)

    def _learn(self, few: Batch) -> None:
        guide, model = self._plain_traces(few)
        check_sites(guide, model, self.with_guide)
        self._refuse_points(guide, model, few)
        depth = 1
        for program, trace in (("guide", guide), ("model", model)):
            for name, site in sample_sites(trace):
                frames = [-f.dim for f in site["cond_indep_stack"] if f.dim is not None]
                depth = max([depth, len(site["fn"].batch_shape), *frames])
                for frame in site["cond_indep_stack"]:
                    if frame.full_size is not None and frame.full_size != frame.size:
                        raise ValueError(
                            f"{program} site {name!r} sees {frame.size} of the plate {frame.name!r}'s {frame.full_size}: a "
                            f"joint bound takes all of them at once"
                        )
                scale = torch.as_tensor(site["scale"]).double()
                if "within_datum" in site or bool((scale != 1).any()):
                    raise ValueError(
                        f"{program} site {name!r} is scaled by {float(scale.mean()):.4g}, so what would be computed is "
                        "no bound. Put KL annealing into the objective (fit(..., kl_weight=...))"
                    )
        self.depth = depth
        self.observed = frozenset(k for k, s in sample_sites(model) if s["is_observed"])
        self.beyond = sites_beyond(guide, model)
        self._guide_sites = frozenset(k for k, _ in sample_sites(guide))
        self._batch_dims: dict[str, int] = {}
        self.latents = {}
        for name, site in sample_sites(model):
            if name in self.observed:
                continue
            fn = site["fn"]
            plates = len(fn.batch_shape)
            self._batch_dims[name] = plates
            self.latents[name] = replace(
                LatentSite.of(name, fn, ()),
                event_shape=torch.Size((*fn.batch_shape, *fn.event_shape)),
                support=constraints.independent(fn.support, plates) if plates else fn.support,
            )
        self.strategy, self._elements = self._choose(few)

    def _choose(self, probe: Batch) -> tuple[str, float]:
        with LargestTensor() as counter:
            self._draw(probe, 1, "loop")
        plain = float(counter.numel)
        try:
            with LargestTensor() as counter:
                guide, model = self._traces(probe, 2, "plate", None, self.with_guide)
                together = [
                    self._terms(t, probe, 2, "plate", p) for t, p in ((guide, "guide"), (model, "model"))
                ]
            alone = [self._again(guide, model, i) for i in range(2)]
            for found, which in zip(together, (0, 1), strict=True):
                for name, value in found.items():
                    again = torch.cat([a[which][name] for a in alone])
                    if not torch.allclose(value, again, rtol=1e-3, atol=1e-3, equal_nan=True):
                        return "loop", plain
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return "loop", plain
        return "plate", counter.numel / 2

    def _again(self, guide: Any, model: Any, i: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The terms of particle i of vectorized traces, run alone."""
        plain_guide, plain_model = self._plain_traces(self.batch)

        def given(trace: Any, plain: Any) -> dict[str, Tensor]:
            return {
                name: site["value"].reshape(-1, *plain.nodes[name]["value"].shape)[i % len(site["value"])]
                for name, site in sample_sites(trace)
                if name not in self.observed and type(site["fn"]).__name__ != "Delta"
            }

        alone = poutine.Trace()
        latents = given(model, plain_model)
        if self.with_guide:
            program = poutine.condition(self.pair.guide, data=given(guide, plain_guide))
            alone = prune_subsample_sites(batches.call(poutine.trace(program).get_trace, self.batch))
            latents = {name: alone.nodes[name]["value"] for name in self.latents}
        program = poutine.condition(self.pair.model, data=latents)
        trace = prune_subsample_sites(batches.call(poutine.trace(program).get_trace, self.batch))
        return (
            self._terms(alone, self.batch, 1, "loop", "guide"),
            self._terms(trace, self.batch, 1, "loop", "model"),
        )

    def _take(self, rows: Any) -> Batch:
        return self.batch

    def _terms(
        self, trace: Any, batch: Batch, particles: int, strategy: str, program: str, mask_latents: bool = True
    ) -> dict[str, Tensor]:
        terms = {}
        for name, site in sample_sites(trace):
            log_prob = self._log_prob(name, site, batch, program, mask_latents)
            declared = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
            full = [declared.get(d, 1) for d in range(min([*declared, -1]), 0)]
            log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, tuple(full)))
            lead = particles if strategy == "plate" and log_prob.dim() > self.depth else 1
            terms[name] = log_prob.reshape(lead, -1).sum(1, keepdim=True).expand(particles, 1)
        return terms

    def _fold(self, value: Tensor, site: LatentSite, batch: Batch, particles: int, strategy: str) -> Tensor:
        return value.reshape(-1, 1, *site.event_shape).expand(particles, 1, *site.event_shape)

    def _unfold(self, value: Tensor, site: LatentSite, particles: int, strategy: str) -> Tensor:
        if strategy == "loop":
            return value[0, 0]
        gap = self.depth - self._batch_dims[site.name]
        return value.reshape(particles, *[1] * gap, *site.event_shape)


class Joint(View):
    """A pair whose whole batch is one datum."""

    evaluator = JointEvaluator

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pair, name)


def view(pair: Pair, scope: str) -> Any:
    """The pair as an evaluator of this ``scope`` takes it, ``"datum"`` or ``"joint"``."""
    if scope not in ("datum", "joint"):
        raise ValueError(f"scope takes 'datum' or 'joint', got {scope!r}")
    return Joint(pair) if scope == "joint" else pair


def scoped(estimator: Callable[..., Bound]) -> Callable[..., Bound]:
    """Give an estimator of ``ln p(y)`` per datum the keyword ``scope``: with ``"joint"`` the whole batch is one
    datum."""

    @functools.wraps(estimator)
    def run(pair: Any, y: Any, *arguments: Any, scope: str = "datum", **options: Any) -> Bound:
        bound = estimator(view(pair, scope), y, *arguments, **options)
        if scope == "datum":
            return bound
        parts: dict[str, Any] = {"scope": "joint"}
        for name in ("value", "stderr", "ess", "k_hat", "resolution"):
            part = getattr(bound, name)
            parts[name] = None if part is None else part.reshape(())
        return replace(bound, **parts)

    return run

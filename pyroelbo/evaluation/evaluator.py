"""Per-datum log probabilities of a pair, by site: many particles in one pass, unscaled but masked."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation import memory
from pyroelbo.evaluation.elimination import FactorGraph, depends_on_finite
from pyroelbo.evaluation.layout import LatentSite, Layout
from pyroelbo.evaluation.masks import log_prob_of, masked
from pyroelbo.evaluation.memory import LargestTensor
from pyroelbo.evaluation.probes import (
    LatentReads,
    check_factors,
    check_masks,
    coupled_latents,
    coupled_site,
    moving_supports,
)
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import (
    Unavailable,
    check_observation,
    data_frame,
    inner_plates,
    is_one,
    is_point,
    sample_sites,
    unenumerable,
)
from pyroelbo.evaluation.strategies import Joint, Loop, Plate, Repeat, Strategy
from pyroelbo.evaluation.supports import movable
from pyroelbo.numerics import agree
from pyroelbo.pair import Pair
from pyroelbo.results import Bound, Terms

__all__ = ["Evaluator"]

# What a program may raise under a strategy that does not suit it.
_UNSUITED = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)
_AGREE = 1e-3  # relative and absolute tolerance between a strategy and one particle at a time


class Evaluator:
    """Evaluates a pair on one batch: :meth:`sample` draws from the guide, :meth:`terms` evaluates given
    latents.

    With ``scope="datum"`` every row of the batch is a datum. With ``scope="joint"`` the whole batch is a
    single datum: ``size`` is 1, latents are [K, 1, *batch, *event] and may stand anywhere, inside the data
    plate, outside, or without any plate.

    ``layout`` holds what is known of the pair's sites, ``strategy`` how particles are run: as a vectorized
    plate where the pair's networks allow it; where they refuse the extra dimension (``Conv2d`` does), or give
    other numbers with it, with the data repeated along the batch; else one at a time, which ``notes`` then
    explain. Each strategy is checked on a few rows against one particle at a time. Everything runs in
    evaluation mode.

    Finite latents that the model marks ``infer={"enumerate": "parallel"}`` and the guide leaves out are
    summed within each particle, as ``TraceEnum_ELBO`` does, unless ``summing`` is False: the weight is that
    of the others, ln Σ_k p(y, z, k) - ln q(z | y).

    Raises ValueError, naming the site, for: sites outside the data plate, scales other than the data plate's
    own subsampling and those marked :class:`~pyroelbo.pair.within_datum` (any scale in joint scope), latent
    sites of one program that the other lacks, a data plate whose size is not the batch's, batch dimensions
    that no plate declares, relaxed guides of discrete latents.
    """

    def __init__(
        self,
        pair: Pair,
        batch: Any,
        *,
        with_guide: bool = True,
        scope: str = "datum",
        summing: bool = True,
    ) -> None:
        if scope not in ("datum", "joint"):
            raise ValueError(f"scope: expected 'datum' or 'joint', got {scope!r}")
        self.pair = pair
        self.batch: Batch = batches.to(batches.as_batch(batch, "y", scope), pair.device)
        self.size = 1 if scope == "joint" else batches.size(self.batch)
        self.scope = scope
        self.notes: tuple[str, ...] = ()
        self.programs = Programs(pair, with_guide, summing, whole=scope == "joint")
        self.merged: frozenset[str] = frozenset()
        self._check_values = True
        # Pairs that differ in given values only share what was found once.
        known = getattr(pair, "_layouts", {})
        key = (with_guide, summing, scope, self.size)
        if key not in known:
            with torch.no_grad(), self.programs.quiet():
                self.layout, self.strategy, self._elements = self._look()
                with _same_random_numbers(self.batch):
                    self._probe()
            known[key] = self.layout, self.strategy, self._elements, self.merged, self.notes
        self.layout, self.strategy, self._elements, self.merged, self.notes = known[key]

    # ------------------------------------------------------------------------------------------ public

    @property
    def latents(self) -> Mapping[str, LatentSite]:
        return self.layout.latents

    @property
    def observed(self) -> frozenset[str]:
        return self.layout.observed

    @property
    def auxiliary(self) -> frozenset[str]:
        """Guide sites that the model lacks: given latents do not fix them."""
        return self.layout.auxiliary

    @property
    def sliceable(self) -> bool:
        """Whether rows of the batch can be evaluated alone."""
        return self.layout.sliceable

    def sample_pass(self, particles: int, rows: slice | None = None) -> Terms:
        """Terms of ``particles`` draws from the guide for each datum (of ``rows``), in one pass."""
        with self.programs.quiet():
            return self._terms(self._rows(rows), particles)

    def sample(self, particles: int, *, latents: bool = True) -> Terms:
        """Terms of ``particles`` draws from the guide for each datum, in as many passes as memory demands.

        Without ``latents`` the result does not hold the draws: those of a thousand sites would fill the
        memory that the passes save.
        """
        by_rows: dict[int, list[Terms]] = {}
        for rows, count in self.chunks(particles):
            part = self.sample_pass(count, rows)
            by_rows.setdefault(rows.start, []).append(part if latents else replace(part, latents={}))
        blocks = [self._concatenated(block, 0) for block in by_rows.values()]
        return self._concatenated(blocks, 1)

    def terms(self, latents: Mapping[str, Tensor], rows: slice | Tensor | None = None) -> Terms:
        """Terms of given latents {site: [K, *plates, B, *event]} under model and guide, differentiable in
        them."""
        with self.programs.quiet():
            parts = [self._terms(self._rows(rows), len_of(z), z) for z in self._passes(latents)]
        return self._concatenated(parts, 0)

    def log_joint(self, latents: Mapping[str, Tensor], rows: slice | Tensor | None = None) -> Tensor:
        """ln p(y, z) of given latents {site: [K, *plates, B, *event]}, [K, B], differentiable in them.

        Latents that ``poutine.mask`` leaves out keep their prior here: it integrates to one, so that the
        integral over all latents is p(y). The terms of :meth:`sample` leave them out of model and guide.
        """
        batch, found = self._rows(rows), []
        with self.programs.quiet():
            for part in self._passes(latents):
                _, model = self._traces(batch, len_of(part), part, with_guide=False)
                log_model = self._by_site(model, batch, len_of(part), "model", mask_latents=False)
                found.append(Terms(log_model, {}, self._observed_terms(log_model), {}).log_joint)
        return torch.cat(found)

    def log_guide(self, latents: Mapping[str, Tensor], rows: slice | Tensor | None = None) -> Tensor:
        """ln q(z | y) of given latents {site: [K, *plates, B, *event]}, all of the guide's or its first ones,
        under each datum's guide, [K, B]. The model is not run."""
        batch, found = self._rows(rows), []
        for part in self._passes(latents):
            count = len_of(part)
            given = {k: self.strategy.unfold(v, self.latents[k]) for k, v in part.items()}
            with self.programs.quiet():
                repeated = self.strategy.batch(batch, count)
                trace = self.programs.guide(repeated, given, wrap=self.strategy.wrap(count))
                log_guide = self._by_site(trace, batch, count, "guide")
            found.append(Terms({}, {k: log_guide[k] for k in part}, self.observed, {}).log_proposal)
        return torch.cat(found)

    def traces(self) -> tuple[Any, Any]:
        """Traces of guide and model on the whole batch, one draw."""
        with self.programs.quiet():
            return self.programs.traces(self.batch)

    def guide_trace(self) -> Any:
        """A trace of the guide on the whole batch, one draw."""
        with self.programs.quiet():
            return self.programs.guide(self.batch)

    @property
    def cells(self) -> int:
        """Number of (particle, datum) pairs in one pass."""
        return memory.cells(self._elements, self.pair.device, self.layout.dtype)

    @functools.cached_property
    def guide_cells(self) -> int:
        """Number of (point, datum) pairs in one pass of :meth:`log_guide`."""
        rows = slice(0, 3) if self.sliceable else None
        with torch.no_grad():
            latents = self.sample_pass(16, rows).latents
            with LargestTensor() as counter:
                self.log_guide(latents, rows)
        return max(1, int(self.cells * self._elements * 16 * min(3, self.size) / counter.numel))

    def chunks(self, particles: int) -> Iterator[tuple[slice, int]]:
        """Cut [particles, B] into passes ``(rows, particles)`` that fit in memory; rows are the outer
        loop."""
        return memory.cut(particles, self.size, self.cells, self.sliceable)

    def in_chunks(
        self,
        what: Callable[[dict[str, Tensor], slice | None], Tensor],
        latents: Mapping[str, Tensor],
    ) -> Tensor:
        """``what(latents, rows)`` [k, b] of given latents {site: [K, *plates, B, *event]}, in as many passes
        as memory demands: [K, B], in float64."""
        by_rows: dict[int, list[Tensor]] = {}
        for rows, count in self.chunks(len_of(latents)):
            done = sum(map(len, by_rows.setdefault(rows.start, [])))
            piece = {
                k: v[done : done + count].narrow(
                    1 + len(self.latents[k].plate_shape), rows.start, rows.stop - rows.start
                )
                for k, v in latents.items()
            }
            by_rows[rows.start].append(what(piece, rows if self.sliceable else None).double())
        return torch.cat([torch.cat(block) for block in by_rows.values()], 1)

    def finish(self, bound: Bound) -> Bound:
        """The bound in this evaluation's scope (one value for a joint one), with the evaluator's notes."""
        parts: dict[str, Any] = {"scope": self.scope, "notes": (*bound.notes, *self.notes)}
        for name in ("value", "stderr", "ess", "k_hat", "resolution") if self.scope == "joint" else ():
            part = getattr(bound, name)
            parts[name] = None if part is None else part.reshape(())
        return replace(bound, **parts)

    def refuse_empty(self) -> None:
        """:class:`Unavailable` for a model without latents."""
        if not self.latents:
            raise Unavailable("the model has no latents: its log probability is exact, and elbo gives it")

    def refuse_auxiliary(self, why: str = "q(z | y) has no density then", remedy: str = "") -> None:
        """:class:`Unavailable`, naming the site and saying why, for guide sites that the model lacks."""
        if self.auxiliary:
            raise Unavailable(f"guide site {min(self.auxiliary)!r} is auxiliary, {why}", remedy)

    def refuse_scales(self, method: str) -> None:
        """:class:`Unavailable` where a site carries a scale within its datum: importance weights and sums
        over latents would be wrong with it."""
        if self.layout.scaled_site is not None:
            raise Unavailable(
                f"site {self.layout.scaled_site!r} carries a scale within its datum (a subsampled inner "
                f"plate or within_datum): its ELBO is an estimate of a sum, and {method}'s weights would be "
                "wrong. Evaluate the whole datum"
            )

    def refuse_merged(self, method: str) -> None:
        """:class:`Unavailable` where a latent's term cannot be told from a sum over finite ones."""
        if self.merged:
            raise Unavailable(
                f"latent site {min(self.merged)!r} depends on latents that are summed out, so that it has no "
                f"term of its own, which {method} needs"
            )

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Context manager that disables value-dependent checks, so that operations can be recorded: the data
        are assumed valid, and a latent outside the model's support may have NaN instead of -inf."""
        self._check_values = False
        try:
            yield
        finally:
            self._check_values = True

    # ------------------------------------------------------------------------------------------ inside

    def _look(self) -> tuple[Layout, Strategy, float]:
        """Layout, strategy, and elements of the largest tensor per particle and datum."""
        # Not by its attribute: Pyro would rename a guide that has run by itself.
        guide = dict(self.pair.named_children()).get("encoder")
        if self.programs.with_guide and _without_parameters(guide):
            try:
                batches.call(self.pair.guide, self.batch)  # it takes its plates' sizes from its first batch
            except RuntimeError as error:
                if all(frame.size != -1 for frame in getattr(guide, "_prototype_frames", {}).values()):
                    raise
                raise ValueError(
                    "guide: expected a size of every plate, since an automatic guide makes them anew, got a "
                    "plate without one. Write pyro.plate(name, len(y))"
                ) from error
        if self.scope == "joint":
            return self._choose(self._joint_layout(), self.batch)
        few = batches.rows(self.batch, slice(0, 3))
        try:
            layout = Layout.of(self.programs, few, "datum", sliceable=True)
            if layout.guessed and self.size > 2:
                Layout.of(self.programs, batches.rows(self.batch, slice(0, 2)), "datum")  # three by chance?
            return self._choose(layout, few)
        except _UNSUITED:
            # Tied to its whole batch, by a mask or a plate of a fixed size; or an error that
            # the batch raises again.
            return self._choose(Layout.of(self.programs, self.batch, "datum"), self.batch)

    def _joint_layout(self) -> Layout:
        try:
            return Layout.of(self.programs, self.batch, "joint")
        except _UNSUITED:
            # Plates that subsample a data set of which the batch is a part are refused by name.
            plain = Programs(self.pair, self.programs.with_guide, self.programs.summing)
            Layout.of(plain, self.batch, "joint")
            raise

    def _probe(self) -> None:
        """Refuse masked latents that are in use, and data that depend on one another."""
        blocks = [slice(*rows) for rows in sorted({(r.start, r.stop) for r, _ in self.chunks(1)})]
        if self.layout.masked:
            for rows in blocks:
                check_masks(self.programs, self._rows(rows))
        if self.scope == "joint":
            return
        few = self._rows(_unlike(self.batch) if self.sliceable else None)
        tries = 1 if self.strategy.most is None else 4  # a branch on latents may go the same way by chance
        found = itertools.chain(
            (coupled_site(self.programs, few, self.layout.dim) for _ in range(tries)),
            (coupled_latents(self.programs, self._rows(rows), self.layout.dim) for rows in blocks),
        )
        site = next((s for s in found if s is not None), None)
        if site is not None:
            Layout.of(
                self.programs, self.batch, "datum"
            )  # a plate as long as the few rows by chance is refused
            raise ValueError(
                f"model site {site!r}: the term of a datum depends on other data of the batch (a centring, a "
                'sum over the batch?), so there is no evidence per datum, only a joint one, scope="joint"'
            )

    def _choose(self, layout: Layout, probe: Batch) -> tuple[Layout, Strategy, float]:
        """The first strategy that gives on ``probe`` what one particle at a time gives."""
        self.layout = layout
        if layout.summed:
            self._check_sums(probe)
        first: list[Strategy] = (
            [Joint(layout)] if layout.scope == "joint" else [Plate(layout), Repeat(layout)]
        )
        size, reasons = 1 if layout.scope == "joint" else batches.size(probe), []
        for self.strategy in first:
            with LargestTensor() as counter:
                reason = self._differs(probe)
            if reason is None:
                return layout, self.strategy, counter.numel / (2 * size)
            reasons.append(f"{type(self.strategy).__name__.lower()}: {reason}")
        self.strategy = Joint(layout, vectorized=False) if layout.scope == "joint" else Loop(layout)
        self.notes = (f"particles run one at a time, which is slow ({'; '.join(reasons)})",)
        with LargestTensor() as counter:
            self._terms(probe, 1)
        return layout, self.strategy, counter.numel / size

    def _differs(self, probe: Batch) -> str | None:
        """Why two particles under the strategy are not what one particle at a time gives; None where they
        are."""
        try:
            traces = self._traces(probe, 2)
            together = [
                self._by_site(t, probe, 2, p) for t, p in zip(traces, ("guide", "model"), strict=True)
            ]
            vectorized, self.strategy = self.strategy, self._alone()
            try:
                alone = [self._again(probe, traces, vectorized, i) for i in range(2)]
            finally:
                self.strategy = vectorized
        except _UNSUITED as error:
            return f"{type(error).__name__}, {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
        for found, which in zip(together, (0, 1), strict=True):
            if any(found.keys() != a[which].keys() for a in alone):
                return "other dependence on enumerated latents"
            for name, value in found.items():
                again = torch.cat([a[which][name] for a in alone])
                if not agree(value, again, rtol=_AGREE, atol=_AGREE):
                    return f"other log probabilities at site {name!r}"
        return None

    def _alone(self) -> Strategy:
        return Joint(self.layout, vectorized=False) if self.layout.scope == "joint" else Loop(self.layout)

    def _again(
        self, probe: Batch, traces: tuple[Any, Any], vectorized: Strategy, index: int
    ) -> list[dict[str, Tensor]]:
        """Guide and model terms of one particle of vectorized traces, run alone."""
        if self.programs.with_guide:
            drawn = {k: s for k, s in sample_sites(traces[0]) if not s["is_observed"]}
        else:
            drawn = {k: traces[1].nodes[k] for k in self.latents}
        values = {
            name: vectorized.one(site["value"], site, 2, index)
            for name, site in drawn.items()
            if not is_point(site["fn"])
        }
        with LatentReads(values) as watch:
            again = self.programs.again(probe, values, around=self._enumerating)
        if watch.read:
            raise RuntimeError("the program reads a latent's value (a Python branch?)")
        return [self._by_site(t, probe, 1, p) for t, p in zip(again, ("guide", "model"), strict=True)]

    def _rows(self, rows: slice | Tensor | None) -> Batch:
        return self.batch if rows is None or self.scope == "joint" else batches.rows(self.batch, rows)

    def _passes(self, latents: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Given latents by as many particles as the strategy takes in a pass."""
        if self.strategy.most is None:
            return [latents]
        return [{k: v[i : i + 1] for k, v in latents.items()} for i in range(len_of(latents))]

    def _terms(self, batch: Batch, particles: int, latents: Mapping[str, Tensor] | None = None) -> Terms:
        """Terms of given latents or of draws from the guide."""
        if self.strategy.most is not None and particles > self.strategy.most:
            return self._concatenated([self._terms(batch, self.strategy.most) for _ in range(particles)], 0)
        guide, model = self._traces(batch, particles, latents)
        log_model = self._by_site(model, batch, particles, "model")
        log_guide = self._by_site(guide, batch, particles, "guide") if self.layout.guide_sites else {}
        log_guide, log_model = self._split(log_guide, log_model)
        if not log_guide:
            log_guide = {"(none)": torch.zeros_like(next(iter(log_model.values())))}
        size = self._size(batch)
        nodes = {**guide.nodes, **model.nodes}
        values = {
            k: self.strategy.fold(nodes[k]["value"], site, particles, size)
            for k, site in self.latents.items()
        }
        return Terms(log_model, log_guide, self._observed_terms(log_model), values)

    def _split(
        self, guide: dict[str, Tensor], model: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Terms of guide and model as they are compared."""
        return guide, model

    def _size(self, batch: Batch) -> int:
        return 1 if self.scope == "joint" else batches.size(batch)

    def _traces(
        self,
        batch: Batch,
        particles: int,
        latents: Mapping[str, Tensor] | None = None,
        with_guide: bool | None = None,
    ) -> tuple[Any, Any]:
        """Guide and model traces of one pass; given latents are evaluated, else the guide draws them."""
        given = None
        if latents is not None:
            given = {k: self.strategy.unfold(v, self.latents[k]) for k, v in latents.items()}
        batch, wrap = self.strategy.batch(batch, particles), self.strategy.wrap(particles)
        drawing = self.programs.with_guide if with_guide is None else with_guide
        if self.layout.summed and not drawing and len(given or ()) < len(self.latents):
            # The prior's draws follow draws of the finite latents, which are summed after that.
            _, plain = self.programs.traces(batch, given, wrap=wrap, with_guide=False)
            given = {k: plain.nodes[k]["value"] for k in self.latents}
        return self.programs.traces(batch, given, wrap=wrap, around=self._enumerating, with_guide=with_guide)

    def _enumerating(self, model: Callable) -> Callable:
        """The model with its finite latents enumerated, left of the plates and of that of particles."""
        if not self.layout.summed:
            return model

        def marks(site: Any) -> dict[str, Any]:
            # Longer rows than those of the layout may have further sites of its kind.
            marked = site["infer"].get("enumerate") == "parallel" and site["name"] not in self.latents
            return {"enumerate": "parallel" if marked else None, "num_samples": None}

        return poutine.enum(
            poutine.infer_config(model, config_fn=marks), first_available_dim=-2 - self.layout.depth
        )

    def _check_sums(self, probe: Batch) -> None:
        """Refuse a model that gives other log probabilities when its finite latents are enumerated."""
        _, plain = self.programs.traces(probe)
        given = {k: plain.nodes[k]["value"] for k in self.latents}
        try:
            trace = self.programs.model(probe, given, around=self._enumerating)
            log_probs = {k: log_prob_of(s, latent=_is_summed(s)) for k, s in sample_sites(trace)}
        except _UNSUITED as error:
            raise unenumerable(error) from error
        tables = {k for k, p in log_probs.items() if depends_on_finite(trace.nodes[k], p)}
        scaled = [k for k in tables if not is_one(_own_scale(trace.nodes[k]))]
        if scaled:
            raise Unavailable(
                f"site {min(scaled)!r} carries a scale within its datum and depends on latents that are "
                "summed out: the logarithm of a sum has no such estimate. Evaluate the whole datum"
            )
        check_factors(self.programs, probe, trace, log_probs, given)
        self.merged = frozenset(tables & self.latents.keys())

    def _by_site(
        self, trace: Any, batch: Batch, particles: int, program: str, mask_latents: bool = True
    ) -> dict[str, Tensor]:
        """Log probability of each site, unscaled but masked, summed to [K, B]; those that depend on latents
        that are summed out have one term together."""
        terms, tables, size = {}, {}, self._size(batch)
        for name, site in sample_sites(trace):
            known = name in self.layout.shapes or site["is_observed"] or _is_summed(site)
            if program == "model" and not known:
                raise ValueError(
                    f"model site {name!r}: expected the same latents for all rows, got one that some rows "
                    "lack. Pad the rows to one length, and mask"
                )
            log_prob = self._log_prob(name, site, batch, program, mask_latents)
            if self.layout.summed and depends_on_finite(site, log_prob):
                if self.scope == "datum":
                    data_frame(site, program)
                tables[name] = log_prob
            else:
                terms[name] = self.strategy.total(log_prob, site, program, particles, size)
        return {**terms, **self._summed(trace, tables, particles, size)} if tables else terms

    def _summed(
        self, trace: Any, tables: Mapping[str, Tensor], particles: int, size: int
    ) -> dict[str, Tensor]:
        """ln Σ_k of a product of tables over the values k of finite latents, [K, B].

        It is ln p(y | z) of the sites that depend on k, where no latent z does; else ln p(z) of those is
        split off.
        """
        kept = self.strategy.kept(particles, size)
        total = FactorGraph.of(trace, tables, kept).log_partition().reshape(-1, size).expand(particles, size)
        if not self.merged:
            return {self._sum: total}
        own = {k: t for k, t in tables.items() if k in self.merged or _is_summed(trace.nodes[k])}
        prior = FactorGraph.of(trace, own, kept).log_partition().reshape(-1, size).expand(particles, size)
        return {
            self._sum_prior: prior,
            self._sum: torch.where(prior == -math.inf, 0.0, total - prior),
        }

    @functools.cached_property
    def _sum(self) -> str:
        """The name of the term of the sites that depend on latents that are summed out."""
        names = sorted(self.layout.summed)
        return f"Σ {names[0]}" if len(names) == 1 else f"Σ {names[0]} … {names[-1]}"

    @property
    def _sum_prior(self) -> str:
        return f"{self._sum}, prior"

    def _observed_terms(self, log_model: Mapping[str, Tensor]) -> frozenset[str]:
        """The terms that are none of the prior's."""
        prior = {*self.latents, self._sum_prior} if self.layout.summed else self.latents.keys()
        return frozenset(log_model.keys() - prior)

    def _log_prob(self, name: str, site: Any, batch: Batch, program: str, mask_latents: bool) -> Tensor:
        """The log probability of a traced site, unscaled but for its own datum's scale, and masked."""
        if self._check_values and site["is_observed"] and name in self.observed:
            moving = movable(site["fn"]) and name in self._moving
            check_observation(site, batch, self.scope, support=not moving)
        summed = _is_summed(site)
        latent, beyond = name in self.latents or summed, (program, name) in self.layout.beyond
        try:
            log_prob = log_prob_of(site, latent=True)
        except RuntimeError as error:
            if latent and beyond and not bool(site["fn"].support.check(site["value"]).all()):
                other = "guide" if program == "model" else "model"
                raise Unavailable(
                    f"the {other} draws values that latent site {name!r} cannot take in the {program}: "
                    f"{error}"
                ) from error
            raise
        checked = self._check_values and program == "model"
        if latent and (beyond or (checked and bool(log_prob.isnan().any()))):
            # Neither NaN nor a formula's value outside its range (an exponential's is finite below zero).
            log_prob = torch.where(site["fn"].support.check(site["value"]), log_prob, -math.inf)
        scale = _own_scale(site)
        log_prob = log_prob if is_one(scale) else log_prob * scale
        # A masked latent that is summed out keeps its prior.
        counted = not latent or (mask_latents and not summed)
        return masked(log_prob, site["mask"]) if counted else log_prob

    @functools.cached_property
    def _moving(self) -> frozenset[str]:
        """Observed sites whose support depends on latents: an observation outside it has probability 0."""
        with _same_random_numbers(self.batch):
            return moving_supports(self.programs, self.batch)

    def _concatenated(self, parts: list[Terms], dim: int) -> Terms:
        """Terms side by side, along particles (0) or data (1)."""
        if len(parts) == 1:
            return parts[0]

        def joined(field: str) -> dict[str, Tensor]:
            terms = [getattr(t, field) for t in parts]
            names = dict.fromkeys(k for t in terms for k in t)
            # Rows that are shorter than those of other passes lack their last sites.
            nothing = [torch.zeros_like(next(iter(t.values()))) for t in terms]
            return {
                k: torch.cat([t.get(k, zero) for t, zero in zip(terms, nothing, strict=True)], dim)
                for k in names
            }

        latents = {
            k: torch.cat([t.latents[k] for t in parts], 0 if dim == 0 else 1 + len(site.plate_shape))
            for k, site in self.latents.items()
            if k in parts[0].latents
        }
        observed = frozenset().union(*(t.observed for t in parts))
        return Terms(joined("log_model"), joined("log_guide"), observed, latents)


def _is_summed(site: Any) -> bool:
    """Whether a traced latent is enumerated."""
    return site["infer"].get("_enumerate_dim") is not None


def _without_parameters(guide: Any) -> bool:
    """Whether an automatic guide has yet to make its parameters, from the first batch that it is given."""
    if isinstance(guide, GuideMessenger):
        return isinstance(guide, nn.Module) and next(guide.parameters(), None) is None
    return isinstance(guide, AutoGuide) and guide.prototype_trace is None


@contextmanager
def _same_random_numbers(batch: Batch) -> Iterator[None]:
    """Context manager that leaves the states of the random number generators as they were."""
    devices = {t.data.device for t in batches.parts(batch).values() if t.is_cuda}
    with torch.random.fork_rng(devices=devices):
        yield


def _unlike(batch: Batch, rows: int = 3, most: int = 1000) -> Tensor:
    """Indices of the first row and of others, first of those that differ from it."""
    whole = map(batches.dense, batches.parts(batch).values())
    parts = [t[:most].reshape(min(most, len(t)), -1) for t in whole]
    differs = torch.stack([(t != t[:1]).any(1) for t in parts]).any(0)
    differs[0] = True
    return differs.long().argsort(descending=True, stable=True)[:rows]


def _own_scale(site: Any) -> Any:
    """The scale of a site within its datum."""
    return site.get("within_datum", 1.0) * inner_plates(site)


def len_of(latents: Mapping[str, Tensor]) -> int:
    """Number of particles."""
    return len(next(iter(latents.values())))

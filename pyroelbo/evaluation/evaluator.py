"""Per-datum log probabilities of a pair: many particles in one pass, unscaled but masked, every site by
name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import (
    POINT,
    Unavailable,
    base_of,
    check_observation,
    check_scale,
    check_sites,
    data_frame,
    inner_plates,
    is_one,
    is_point,
    sample_sites,
    sites_beyond,
)
from pyroelbo.pair import PLATE, Pair, evaluation_mode, unregistered
from pyroelbo.results import Terms

__all__ = ["Evaluator"]

# Bytes that the largest intermediate tensor of one pass may take; a pass holds a few of that size.
_BUDGET = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


@dataclass(frozen=True)
class LatentSite:
    """A latent site as the model declares it: event shape, plate shape left of the data plate, and support.

    ``free`` says whether every combination of the coordinates' values is possible; those of a structure (a
    parse) constrain one another.
    """

    name: str
    event_shape: torch.Size
    plate_shape: tuple[int, ...]
    support: Any
    has_enumerate_support: bool
    free: bool

    @classmethod
    def of(cls, name: str, fn: Any, plates: tuple[int, ...]) -> LatentSite:
        return cls(
            name,
            torch.Size(fn.event_shape),
            plates,
            fn.support,
            bool(getattr(fn, "has_enumerate_support", False)),
            bool(getattr(base_of(fn), "free_labels", True)),
        )

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)

    @property
    def dims(self) -> int:
        """Numbers in one datum's value."""
        return math.prod(self.event_shape) * math.prod(self.plate_shape)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.numel())
        return out


class View:
    """A pair that brings an evaluator of another kind (abstract)."""

    evaluator: type[Evaluator]


class Evaluator:
    """Evaluates a pair on one batch, per datum: ``draw(K)``, ``score(latents)``, and their chunks by memory.

    Particles come as a vectorized plate where the pair's networks allow it; where they refuse the extra
    dimension (``Conv2d`` does), or give other numbers with it, the data are repeated along the batch; the
    last resort is a loop. Which one is right is *checked* on a few rows against one particle at a time, not
    assumed. Everything runs in evaluation mode.

    Raises ValueError, naming the site, for: sites outside the data plate, scales other than the data plate's
    own subsampling and those marked :class:`~pyroelbo.pair.within_datum`, latent sites of one program that
    the other lacks, a data plate whose size is not the batch's, batch dimensions that no plate declares,
    relaxed guides of discrete latents.
    """

    def __new__(cls, pair: Pair | View, *_: Any, **__: Any) -> Evaluator:
        return object.__new__(pair.evaluator if isinstance(pair, View) else cls)

    _checks = True

    def __init__(self, pair: Pair, batch: Any, *, with_guide: bool = True) -> None:
        self.pair = pair
        self.batch: Batch = batches.to(batches.as_batch(batch, "y"), pair.device)
        self.size = batches.size(self.batch)
        self.with_guide = with_guide
        self.scaled_site: str | None = None
        with torch.no_grad(), self._quiet():
            encoder = getattr(pair, "encoder", None)
            if with_guide and isinstance(encoder, AutoGuide) and encoder.prototype_trace is None:
                batches.call(encoder, self.batch)  # it takes its plates' sizes from its first batch
            try:
                self._learn(batches.rows(self.batch, slice(0, 3)))
                self.sliceable = True
            except (RuntimeError, ValueError, IndexError, AssertionError):
                # A pair that is tied to its whole batch (a mask or a plate of its own size) is looked at whole.
                self._learn(self.batch)
                self.sliceable = False

    # ------------------------------------------------------------------------------------------ public

    def draw(self, particles: int, rows: slice | None = None) -> Terms:
        """Terms of ``particles`` draws from the guide for each datum (of ``rows``), in one pass."""
        batch = self._take(rows)
        with self._quiet():
            return self._draw(batch, particles, self.strategy)

    def score(self, latents: Mapping[str, Tensor], rows: slice | Tensor | None = None) -> Tensor:
        """ln p(y, z) of given latents {site: [K, *plates, B, *event]}, [K, B], differentiable in them.

        Latents that ``poutine.mask`` leaves out keep their prior here: it integrates to one, so that the
        integral over all latents is p(y); the terms of :meth:`draw` leave them out of model and guide alike.
        """
        batch = self._take(rows)
        particles = len(next(iter(latents.values())))
        if self.strategy == "loop" and particles > 1:
            return torch.cat(
                [self.score({s: v[k : k + 1] for s, v in latents.items()}, rows) for k in range(particles)]
            )
        with self._quiet():
            _, model = self._traces(batch, particles, self.strategy, dict(latents), with_guide=False)
            terms = self._terms(model, batch, particles, self.strategy, "model", mask_latents=False)
        return Terms(terms, {}, self.observed, {}).log_joint

    def terms(self, latents: Mapping[str, Tensor], rows: slice | Tensor | None = None) -> Terms:
        """Terms of given latents {site: [K, *plates, B, *event]} under model and guide, differentiable in
        them."""
        batch = self._take(rows)
        particles = len(next(iter(latents.values())))
        if self.strategy == "loop" and particles > 1:
            alone = [
                self.terms({s: v[k : k + 1] for s, v in latents.items()}, rows) for k in range(particles)
            ]
            return _concatenate(alone, 0, self)
        with self._quiet():
            return self._draw(batch, particles, self.strategy, dict(latents))

    def score_guide(self, latents: Mapping[str, Tensor], rows: slice | Tensor | None = None) -> Tensor:
        """ln q(z | y) of given latents {site: [K, *plates, B, *event]}, all of the guide's or its first ones,
        under each datum's guide, [K, B]. The model is not run."""
        batch = self._take(rows)
        particles = len(next(iter(latents.values())))
        if self.strategy == "loop" and particles > 1:
            return torch.cat(
                [
                    self.score_guide({s: v[k : k + 1] for s, v in latents.items()}, rows)
                    for k in range(particles)
                ]
            )
        guide = self.pair.guide
        if self.strategy == "plate":
            guide = pyro.plate("_particles", particles, dim=-1 - self.depth)(guide)
        given = {k: self._unfold(v, self.latents[k], particles, self.strategy) for k, v in latents.items()}
        with self._quiet():
            batch_in = batches.repeat(batch, particles) if self.strategy == "repeat" else batch
            trace = batches.call(poutine.trace(poutine.condition(guide, data=given)).get_trace, batch_in)
            terms = self._terms(prune_subsample_sites(trace), batch, particles, self.strategy, "guide")
        return Terms({}, {k: terms[k] for k in latents}, self.observed, {}).log_proposal

    def traces(self) -> tuple[Any, Any]:
        """Traces of guide and model on the whole batch, one draw."""
        with self._quiet():
            return self._plain_traces(self.batch)

    def guide_trace(self) -> Any:
        """A trace of the guide on the whole batch, one draw."""
        with self._quiet():
            return prune_subsample_sites(batches.call(poutine.trace(self.pair.guide).get_trace, self.batch))

    @property
    def auxiliary(self) -> frozenset[str]:
        """Guide sites that the model lacks: given latents do not fix them."""
        return self._guide_sites - frozenset(self.latents) - self.observed

    @property
    def cells(self) -> int:
        """How many (particle, datum) pairs one pass may hold."""
        budget = _BUDGET.get(self._device().type, _BUDGET["cpu"]) // torch.get_default_dtype().itemsize
        return max(1, int(budget / self._elements))

    @functools.cached_property
    def guide_cells(self) -> int:
        """How many (point, datum) pairs one pass of :meth:`score_guide` may hold."""
        rows = slice(0, 3) if self.sliceable else None
        with torch.no_grad():
            latents = self.draw(16, rows).latents
            with LargestTensor() as counter:
                self.score_guide(latents, rows)
        return max(1, int(self.cells * self._elements * 16 * min(3, self.size) / counter.numel))

    def chunks(self, particles: int) -> Iterator[tuple[slice, int]]:
        """Cut [particles, B] into passes ``(rows, particles)`` that fit in memory; rows are the outer
        loop."""
        cells = self.cells
        rows = max(1, min(self.size, cells // max(1, min(particles, cells)))) if self.sliceable else self.size
        step = max(1, min(particles, cells // rows))
        for start in range(0, self.size, rows):
            for done in range(0, particles, step):
                yield slice(start, min(start + rows, self.size)), min(step, particles - done)

    def draws(self, particles: int, *, latents: bool = True) -> Terms:
        """Like :meth:`draw`, chunked by memory; the result is whole. Without ``latents`` it does not hold them: those
        of a thousand sites would fill the memory that the chunks save."""
        by_rows: dict[int, list[Terms]] = {}
        for rows, count in self.chunks(particles):
            part = self.draw(count, rows)
            by_rows.setdefault(rows.start, []).append(part if latents else replace(part, latents={}))
        blocks = [_concatenate(block, 0, self) for block in by_rows.values()]
        return _concatenate(blocks, 1, self)

    def in_chunks(
        self,
        what: Callable[[dict[str, Tensor], slice | None], Tensor],
        latents: Mapping[str, Tensor],
    ) -> Tensor:
        """``what(latents, rows)`` [k, b] of given latents {site: [K, *plates, B, *event]}, chunked by memory; the
        result is whole, [K, B], in float64."""
        by_rows: dict[int, list[Tensor]] = {}
        for rows, count in self.chunks(len(next(iter(latents.values())))):
            done = sum(map(len, by_rows.setdefault(rows.start, [])))
            piece = {
                k: v[done : done + count].narrow(
                    1 + len(self.latents[k].plate_shape), rows.start, rows.stop - rows.start
                )
                for k, v in latents.items()
            }
            by_rows[rows.start].append(what(piece, rows if self.sliceable else None).double())
        return torch.cat([torch.cat(block) for block in by_rows.values()], 1)

    def refuse_empty(self) -> None:
        """:class:`Unavailable` for a model without latents."""
        if not self.latents:
            raise Unavailable("the model has no latents: its log probability is exact, and elbo gives it")

    def refuse_auxiliary(self, why: str = "q(z | y) has no density then") -> None:
        """:class:`Unavailable`, naming the site and saying why, for guide sites that the model lacks."""
        if self.auxiliary:
            raise Unavailable(f"guide site {min(self.auxiliary)!r} is auxiliary: {why}")

    def refuse_scales(self, method: str) -> None:
        """:class:`Unavailable` where a site carries a scale within its datum, which importance weights and sums over
        latents cannot have."""
        if self.scaled_site is not None:
            raise Unavailable(
                f"site {self.scaled_site!r} carries a scale within its datum (a subsampled inner plate or within_datum): "
                f"its ELBO is an estimate of a sum, and {method}'s weights would be wrong. Evaluate the whole datum"
            )

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Within this no value is looked at, so that the operations can be recorded: data are taken to have been
        checked, and a latent outside the model's support may have NaN for -inf."""
        self._checks = False
        try:
            yield
        finally:
            self._checks = True

    # ------------------------------------------------------------------------------------------ inside

    def _take(self, rows: slice | Tensor | None) -> Batch:
        return self.batch if rows is None else batches.rows(self.batch, rows)

    def _device(self) -> torch.device:
        return next(iter(batches.parts(self.batch).values())).device

    def _quiet(self):
        return _Stack(evaluation_mode(self.pair), unregistered(), pyro.validation_enabled(False))

    def _learn(self, few: Batch) -> None:
        """Learn sites and plates, refuse what is no bound, and find how particles can be run."""
        guide, model = self._plain_traces(few)
        check_sites(guide, model, self.with_guide)
        self._refuse_points(guide, model, few)
        self.latents: dict[str, LatentSite] = {}
        depth, frames = 1, []
        for program, trace in (("guide", guide), ("model", model)):
            for name, site in sample_sites(trace):
                frame = data_frame(site, program)
                if frame.size != batches.size(few):
                    raise ValueError(
                        f"the plate {PLATE!r} holds {frame.size} data at {program} site "
                        f"{name!r}, the batch {batches.size(few)} rows: "
                        f"write pyro.plate({PLATE!r}, len(y)), or give subsample_size=len(y) where it is subsampled"
                    )
                frames.append(frame.dim)
                depth = max([depth, *(-f.dim for f in site["cond_indep_stack"] if f.dim is not None)])
                scaled = check_scale(site, program)
                self.scaled_site = self.scaled_site or (name if scaled else None)
        self.observed = frozenset(k for k, s in sample_sites(model) if s["is_observed"])
        self.beyond = sites_beyond(guide, model)
        if set(frames) != {-1}:
            raise ValueError(f"the plate {PLATE!r} must stand at dim=-1, got dim {sorted(set(frames))}")
        self.depth = depth
        self._guide_sites = frozenset(k for k, _ in sample_sites(guide))
        for name, site in sample_sites(model):
            if name not in self.observed:
                fn = site["fn"]
                plates = tuple(fn.batch_shape[:-1])
                while plates and plates[0] == 1:
                    plates = plates[1:]
                self.latents[name] = LatentSite.of(name, fn, plates)
        self.strategy, self._elements = self._choose(few)

    def _refuse_points(self, guide: Any, model: Any, few: Batch) -> None:
        """Refuse continuous latents that a guide, an automatic one, sets to the same value in every draw."""
        names = [
            name
            for name, site in sample_sites(guide)
            if name in model.nodes and is_point(site["fn"]) and not is_point(model.nodes[name]["fn"])
        ]
        names = [n for n in names if self.with_guide and not model.nodes[n]["fn"].support.is_discrete]
        if names:
            again = batches.call(poutine.trace(self.pair.guide).get_trace, few)
            for name in names:
                if torch.equal(guide.nodes[name]["value"], again.nodes[name]["value"]):
                    raise ValueError(POINT.format(name))

    def _plain_traces(self, batch: Batch) -> tuple[Any, Any]:
        if self.with_guide:
            guide = batches.call(poutine.trace(self.pair.guide).get_trace, batch)
            model = batches.call(poutine.trace(poutine.replay(self.pair.model, trace=guide)).get_trace, batch)
        else:
            guide = poutine.Trace()
            model = batches.call(poutine.trace(self.pair.model).get_trace, batch)
        return prune_subsample_sites(guide), prune_subsample_sites(model)

    def _choose(self, probe: Batch) -> tuple[str, float]:
        """The first strategy that gives, on a few rows, what one particle at a time gives; and elements per
        particle and datum."""
        n = batches.size(probe)
        for strategy in ("plate", "repeat"):
            try:
                with LargestTensor() as counter:
                    terms = self._draw(probe, 2, strategy)
                alone = [
                    self._draw(probe, 1, "loop", {k: v[i : i + 1] for k, v in terms.latents.items()})
                    for i in range(2)
                ]
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                continue
            if all(
                torch.allclose(
                    getattr(terms, part),
                    torch.cat([getattr(a, part) for a in alone]),
                    rtol=1e-3,
                    atol=1e-3,
                    equal_nan=True,
                )
                for part in ("log_joint", "log_proposal")
            ):
                return strategy, counter.numel / (2 * n)
        with LargestTensor() as counter:
            self._draw(probe, 1, "loop")
        return "loop", counter.numel / n

    def _draw(
        self, batch: Batch, particles: int, strategy: str, latents: dict[str, Tensor] | None = None
    ) -> Terms:
        if strategy == "loop" and particles > 1:
            return _concatenate([self._draw(batch, 1, "loop") for _ in range(particles)], 0, self)
        guide, model = self._traces(batch, particles, strategy, latents, self.with_guide)
        log_model = self._terms(model, batch, particles, strategy, "model")
        log_guide = self._terms(guide, batch, particles, strategy, "guide") if self._guide_sites else {}
        if not log_guide:
            log_guide = {"(none)": torch.zeros_like(next(iter(log_model.values())))}
        values = {
            k: self._fold(model.nodes[k]["value"], site, batch, particles, strategy)
            for k, site in self.latents.items()
        }
        return Terms(log_model, log_guide, self.observed, values)

    def _traces(
        self, batch: Batch, particles: int, strategy: str, latents: dict[str, Tensor] | None, with_guide: bool
    ) -> tuple[Any, Any]:
        """Guide and model traces; given latents are scored, else the guide draws them."""
        model, guide = self.pair.model, self.pair.guide
        batch_in = batches.repeat(batch, particles) if strategy == "repeat" else batch
        if strategy == "plate":
            plate = pyro.plate("_particles", particles, dim=-1 - self.depth)
            model, guide = plate(model), plate(guide)
        if latents is not None:
            given = {k: self._unfold(v, self.latents[k], particles, strategy) for k, v in latents.items()}
            model, guide = poutine.condition(model, data=given), poutine.condition(guide, data=given)
        guide_trace = poutine.Trace()
        if with_guide:
            guide_trace = batches.call(poutine.trace(guide).get_trace, batch_in)
            model = poutine.replay(model, trace=guide_trace)
        model_trace = batches.call(poutine.trace(model).get_trace, batch_in)
        return prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)

    def _terms(
        self, trace: Any, batch: Batch, particles: int, strategy: str, program: str, mask_latents: bool = True
    ) -> dict[str, Tensor]:
        """Log probability of each site, unscaled but masked, summed to [K, B]."""
        n = batches.size(batch)
        terms = {}
        for name, site in sample_sites(trace):
            frame = data_frame(site, program)
            expected = n * particles if strategy == "repeat" else n
            if frame.size != expected:
                raise ValueError(
                    f"the plate {PLATE!r} holds {frame.size} data at {program} site {name!r}, expected {expected}"
                )
            log_prob = self._log_prob(name, site, batch, program, mask_latents)
            shape = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
            full = [shape.get(d, 1) for d in range(min([*shape, -log_prob.dim(), -1]), 0)]
            for axis, (have, declared) in enumerate(zip(log_prob.shape[::-1], full[::-1], strict=False)):
                if have not in (1, declared):
                    raise ValueError(
                        f"{program} site {name!r} has a batch dimension of size {have} at dim "
                        f"{-1 - axis}, where its plates declare "
                        f"{declared}: declare the dimension as an event with .to_event(), or add a plate"
                    )
            log_prob = log_prob.expand(full)
            if strategy == "plate":
                lead = log_prob.dim() - 1 - self.depth
                log_prob = log_prob.reshape(particles if lead >= 0 else 1, -1, n).sum(1)
                terms[name] = log_prob.expand(particles, n)
            else:
                terms[name] = log_prob.reshape(-1, expected).sum(0).reshape(-1, n)
        return terms

    def _log_prob(self, name: str, site: Any, batch: Batch, program: str, mask_latents: bool) -> Tensor:
        """The log probability of a traced site, unscaled but for its own datum's scale, and masked."""
        if self._checks and site["is_observed"] and name in self.observed:
            check_observation(site, batch)
        latent, beyond = name in self.latents, (program, name) in self.beyond
        try:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        except RuntimeError as error:
            if latent and beyond and not bool(site["fn"].support.check(site["value"]).all()):
                other = "guide" if program == "model" else "model"
                raise Unavailable(
                    f"the {other} draws values that latent site {name!r} cannot take in the {program}: {error}"
                ) from error
            raise
        checked = self._checks and program == "model"
        if latent and (beyond or (checked and bool(log_prob.isnan().any()))):
            log_prob = _zero_outside(site, log_prob)
        scale = site.get("within_datum", 1.0) * inner_plates(site)
        log_prob = log_prob if is_one(scale) else log_prob * scale
        return _mask(log_prob, site["mask"]) if mask_latents or name not in self.latents else log_prob

    def _fold(self, value: Tensor, site: LatentSite, batch: Batch, particles: int, strategy: str) -> Tensor:
        """A traced value as [K, *plates, B, *event]."""
        n = batches.size(batch)
        shape = (*site.plate_shape, n, *site.event_shape)
        if strategy == "plate":
            return value.reshape(-1, *shape).expand(particles, *shape) if value.numel() else value
        if strategy == "loop":
            return value.reshape(1, *shape)
        value = value.reshape(*site.plate_shape, particles, n, *site.event_shape)
        return value.movedim(len(site.plate_shape), 0)

    def _unfold(self, value: Tensor, site: LatentSite, particles: int, strategy: str) -> Tensor:
        """[K, *plates, B, *event] as the programs want it; the inverse of :meth:`_fold`."""
        if strategy == "plate":
            gap = self.depth - 1 - len(site.plate_shape)
            return value.reshape(particles, *[1] * gap, *value.shape[1:])
        if strategy == "loop":
            return value[0]
        k = len(site.plate_shape)
        value = value.movedim(0, k)
        return value.reshape(*value.shape[:k], -1, *site.event_shape)


class _Stack:
    """Several context managers as one, entered anew each time."""

    def __init__(self, *managers: Any) -> None:
        self.managers = managers

    def __enter__(self) -> None:
        for manager in self.managers:
            manager.__enter__()

    def __exit__(self, *error: Any) -> None:
        for manager in reversed(self.managers):
            manager.__exit__(*error)


def _zero_outside(site: Any, log_prob: Tensor) -> Tensor:
    """-inf, neither NaN nor a formula's value out of its range (an exponential's is finite below zero), where the
    guide draws what the model's latent cannot be."""
    inside = site["fn"].support.check(site["value"])
    return torch.where(inside, log_prob, -math.inf)


def _mask(log_prob: Tensor, mask: Any) -> Tensor:
    if mask is None or mask is True:
        return log_prob
    if mask is False:
        return torch.zeros_like(log_prob)
    return torch.where(mask, log_prob, log_prob.new_zeros(()))


def _concatenate(terms: list[Terms], dim: int, evaluator: Evaluator) -> Terms:
    if len(terms) == 1:
        return terms[0]

    def joined(field: str) -> dict[str, Tensor]:
        return {k: torch.cat([getattr(t, field)[k] for t in terms], dim) for k in getattr(terms[0], field)}

    latents = {
        k: torch.cat([t.latents[k] for t in terms], 0 if dim == 0 else 1 + len(site.plate_shape))
        for k, site in evaluator.latents.items()
        if k in terms[0].latents
    }
    return Terms(joined("log_model"), joined("log_guide"), terms[0].observed, latents)

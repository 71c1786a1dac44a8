"""Sequential Monte Carlo: lower bounds on the evidence of chains, by particles that are resampled along the
way."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo import batch as batches
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.bounds import count_of
from pyroelbo.numerics import effective_sample_size, log_mean_exp, positive_count
from pyroelbo.pair import LatentPath, Pair, evaluation_mode, unregistered
from pyroelbo.results import Bound

__all__ = ["smc"]


@torch.no_grad()
def smc(
    pair: Pair,
    y: Any,
    particles: int = 64,
    filters: int = 8,
    *,
    proposal: str = "guide",
    threshold: float = 0.5,
    scope: str = "datum",
    progress: bool = True,
) -> Bound:
    """Lower bound on ln p(y) of each datum by a particle filter, in nats, [B].

    Latents are drawn one after the other, and each step multiplies a particle's weight by its probability
    under the model over that under the proposal. If the effective number of particles of a datum falls below
    ``threshold`` · ``particles``, they are resampled by their weights (systematically) and all get the mean
    weight: the mean weight at the end, Ẑ, is unbiased for p(y) whenever and however often that happens. E ln
    (1/F) Σ_f Ẑ_f ≤ ln p(y) over F independent filters, whose spread gives the standard error (the delta
    method's); for one filter it is NaN and the value is the filtering objective FIVO. ``ess`` sums the
    filters' smallest effective numbers of particles.

    A pair whose path is one site follows its :meth:`~pyroelbo.Pair.latent_path`; otherwise its latent sites
    are the steps, in the guide's order, and a term of the model enters as soon as all latents before it are
    drawn. That runs both programs once per step: N latents cost ``particles`` · ``filters`` · N evaluations
    per datum, a chain ``particles`` · ``filters``. An exact guide needs no filter: it looks ahead, and
    resampling by the past alone loses that; ``proposal="prior"`` or :func:`iwae` is tighter there.

    Args:
        pair: the pair.
        y: the batch.
        particles: particles of each filter, per datum.
        filters: number F of independent filters.
        proposal: ``"guide"``, or ``"prior"`` for the bootstrap filter.
        threshold: share of the particles, in [0, 1]; 0 never resamples, which is importance sampling.
        scope: ``"datum"``, or ``"joint"`` for the whole batch as one datum.
        progress: whether to show a progress bar.

    Raises :class:`Unavailable` for a pair with a single latent site and no path, and for auxiliary sites of
    the guide; ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator` does and for scales within the
    datum.

    Source: Del Moral (2004), section 7.4, for unbiasedness; Doucet and Johansen (2009), section 3.5, for the
    weights after adaptive resampling; Maddison et al. (2017) for FIVO.
    """
    count_of(particles)
    positive_count("filters", filters)
    if proposal not in ("guide", "prior"):
        raise ValueError(f"proposal: expected 'guide' or 'prior', got {proposal!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a share of the particles in [0, 1], got {threshold!r}")
    evaluator = Evaluator(pair, y, with_guide=proposal == "guide", scope=scope)
    evaluator.refuse_scales("SMC")
    evaluator.refuse_auxiliary(remedy="use proposal='prior'")
    evaluator.refuse_merged("a filter")
    totals: dict[int, list[Tensor]] = {}
    smallest: dict[int, list[Tensor]] = {}
    cost = 0
    with tqdm(unit="step", disable=None if progress else True) as bar, evaluation_mode(pair), unregistered():
        bar.set_description(f"SMC of {pair.name}: lower bound on ln p(y) of {evaluator.size} data")
        for rows in {rows.start: rows for rows, _ in evaluator.chunks(particles)}.values():
            # Whole filters in a pass, even if a single one does not fit in memory.
            some = max(1, evaluator.cells // (particles * (rows.stop - rows.start)))
            for done in range(0, filters, some):
                walk = _walk(pair, evaluator, rows if evaluator.sliceable else None, proposal)
                log_z, least = _filter(walk, particles, min(some, filters - done), threshold, bar)
                totals.setdefault(rows.start, []).append(log_z)
                smallest.setdefault(rows.start, []).append(least)
                cost += walk.cost
    log_z = torch.cat([torch.cat(block) for block in totals.values()], 1)
    ess = torch.cat([torch.cat(block) for block in smallest.values()], 1).sum(0)
    value, stderr = log_mean_exp(log_z)
    dead = int((log_z == -math.inf).any(0).sum())
    notes = (f"all particles of a filter died for {dead} of {evaluator.size} data",) if dead else ()
    draws = particles * filters
    bound = Bound(f"smc-{particles}", value, stderr, "lower", draws=draws, cost=cost, ess=ess, notes=notes)
    return evaluator.finish(bound)


def _filter(walk: _Walk, particles: int, groups: int, threshold: float, bar: tqdm) -> tuple[Tensor, Tensor]:
    """ln Ẑ of each of ``groups`` filters and the smallest effective number of particles, both [F, B]."""
    log_w = torch.zeros(())
    least = torch.zeros(())
    for t in range(walk.length):
        log_w = log_w + walk.step(t, particles * groups).double().unflatten(0, (groups, particles))
        ess = effective_sample_size(log_w, 1).nan_to_num(nan=0.0)
        least = torch.minimum(least, ess) if t else ess
        bar.update()
        poor = ess < threshold * particles
        if t < walk.length - 1 and bool(poor.any()):
            walk.select(_ancestors(log_w, poor))
            log_w = _reset(log_w, poor)
    return log_mean_exp(log_w, 1)[0], least


def _reset(log_w: Tensor, poor: Tensor) -> Tensor:
    """The weights after resampling: their mean where resampling took place. log_w [F, K, B], poor [F, B]."""
    mean, _ = log_mean_exp(log_w, 1)
    return torch.where(poor.unsqueeze(1), mean.unsqueeze(1), log_w)


def _ancestors(log_w: Tensor, poor: Tensor) -> Tensor:
    """Ancestor of each particle, [F · K, B]: a systematic draw by the weights [F, K, B] where ``poor`` [F,
    B], else the particle itself."""
    groups, particles, size = log_w.shape
    peak = log_w.amax(1, keepdim=True)
    weight = (log_w - torch.where(peak.isinf(), torch.zeros_like(peak), peak)).exp().movedim(1, -1)
    # If all weights are zero any ancestor is right: the weight stays zero.
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, torch.ones_like(weight))
    edges = weight.cumsum(-1)
    edges = edges / edges[..., -1:]
    comb = torch.rand(groups, size, 1, dtype=edges.dtype, device=edges.device)
    comb = (comb + torch.arange(particles, device=edges.device)) / particles
    index = torch.searchsorted(edges, comb, right=True).clamp_max(particles - 1)
    stay = torch.arange(particles, device=edges.device)
    index = torch.where(poor.unsqueeze(-1), index, stay).movedim(-1, 1)
    first = particles * torch.arange(groups, device=edges.device)
    return (index + first[:, None, None]).reshape(groups * particles, size)


class _Walk(ABC):
    """Particles on their way along a chain (abstract)."""

    length: int
    cost: int = 0

    @abstractmethod
    def step(self, t: int, particles: int) -> Tensor:
        """Draw the latents of step t; the log increment of each particle's weight, [K, B]."""

    @abstractmethod
    def select(self, index: Tensor) -> None:
        """Let each particle follow the one that index [K, B] names."""


def _walk(pair: Pair, evaluator: Evaluator, rows: slice | None, proposal: str) -> _Walk:
    batch = evaluator.batch if rows is None else batches.rows(evaluator.batch, rows)
    # In joint scope the batch is one datum, and the paths of several data are not its path.
    chain = batches.call(pair.latent_path, batch) if evaluator.size == batches.size(evaluator.batch) else None
    if chain is not None:
        return _Path(chain, batches.size(batch), proposal)
    if not evaluator.latents:
        raise Unavailable(f"{type(pair).__name__} has no latents to filter: its log probability is exact")
    if len(evaluator.latents) < 2:
        raise Unavailable(
            f"{type(pair).__name__} has one latent site, {next(iter(evaluator.latents))!r}, and no "
            "latent_path(self, *batch) that says how to draw it step by step: a filter would be importance "
            "sampling, iwae"
        )
    return _Sites(evaluator, rows, proposal)


class _Path(_Walk):
    """Along a path that is one site, as the pair's :class:`LatentPath` says."""

    def __init__(self, chain: LatentPath, size: int, proposal: str) -> None:
        self.chain, self.size, self.proposal = chain, size, proposal
        self.length = chain.length
        self.past: Tensor | None = None

    def step(self, t: int, particles: int) -> Tensor:
        shape = torch.Size((particles, self.size))
        prior = self.chain.prior(t, self.past)
        if self.proposal == "guide":
            guide = self.chain.guide(t, self.past)
            z = guide.expand(shape).sample()
            log_w = prior.log_prob(z) - guide.log_prob(z)
        else:
            z = prior.expand(shape).sample()
            log_w = torch.zeros(shape, device=z.device)
        log_w = log_w + self.chain.emission(t, z)
        self.past = z
        if t == 0:
            self.cost += shape.numel()
        if self.chain.lengths is not None:
            log_w = torch.where(t < self.chain.lengths, log_w, torch.zeros_like(log_w))
        return log_w

    def select(self, index: Tensor) -> None:
        assert self.past is not None
        wide = index.reshape(*index.shape, *[1] * (self.past.dim() - 2))
        self.past = self.past.gather(0, wide.expand_as(self.past))


class _Sites(_Walk):
    """Along latents that have a site each: the programs are run anew with those drawn so far."""

    def __init__(self, evaluator: Evaluator, rows: slice | None, proposal: str) -> None:
        self.evaluator, self.rows, self.proposal = evaluator, rows, proposal
        self.length = len(evaluator.latents)
        self.order: list[str] = []
        self.drawn: dict[str, Tensor] = {}
        self.counted: set[str] = set()

    def step(self, t: int, particles: int) -> Tensor:
        if self.drawn:
            terms = self.evaluator.terms(self.drawn, self.rows)
        else:
            terms = self.evaluator.sample_pass(particles, self.rows)
            source = terms.log_guide if self.proposal == "guide" else terms.log_model
            self.order = [k for k in source if k in self.evaluator.latents]
        self.drawn[self.order[t]] = terms.latents[self.order[t]]
        log_w = torch.zeros_like(terms.log_joint)
        for name, term in terms.log_model.items():
            latent = name in self.evaluator.latents
            if latent and name not in self.drawn:
                break  # what follows may look at a latent that is not drawn yet
            if name in self.counted:
                continue
            self.counted.add(name)
            if not latent:
                log_w = log_w + term
            elif self.proposal == "guide":
                log_w = log_w + _difference(term, terms.log_guide[name])
        self.cost += log_w.numel()
        return log_w

    def select(self, index: Tensor) -> None:
        for name, value in self.drawn.items():
            plates = len(self.evaluator.latents[name].plate_shape)
            lead = index.reshape(len(index), *[1] * plates, index.shape[1])
            wide = lead.reshape(*lead.shape, *[1] * (value.dim() - lead.dim()))
            self.drawn[name] = value.gather(0, wide.expand_as(value))


def _difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(log_p == -math.inf, log_p, log_p - log_q)

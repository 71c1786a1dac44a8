"""Sums over the finite latents of any pair: all of them, or those beside continuous ones."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.evaluation.elimination import FactorGraph
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.finite import EnumerableVectors
from pyroelbo.evaluation.masks import ModelMasks, log_prob_of
from pyroelbo.evaluation.probes import check_factors
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import Unavailable, data_frame, sample_sites, unenumerable
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import PLATE, Pair, evaluation_mode, traced, unregistered

__all__ = ["enumerate_latents", "log_evidence_of_all", "log_evidence_of_each"]

_MAX_ASSIGNMENTS = 2**20
_AT_ONCE = 2**18  # values of two sites times data


def enumerate_latents(
    pair: Pair, batch: batches.Batch, *, scope: str = "datum", depth: int | None = None
) -> tuple[FactorGraph, int]:
    """The factors of ln p(y, z) of a pair all of whose latents are finite and discrete, and the depth of its
    plates; its sum is [B], or [] in joint scope. The depth of an earlier graph of the same pair skips the
    checks.

    Raises :class:`Unavailable` for continuous latents, ValueError for scales, which are not part of the
    joint, for data that depend on one another, and for a model whose factors are not its log probabilities:
    one that branches on a latent in Python sees all values at once.
    """
    if depth is None:
        evaluator = _finite_latents(pair, batch, scope)
        depth = evaluator.layout.depth
        few = batches.rows(batch, slice(0, 3)) if evaluator.sliceable else batch
        with torch.random.fork_rng(devices=[]):
            trace, factors = _enumerated(pair, few, depth)
            programs = Programs(pair, with_guide=False)
            with programs.quiet():
                check_factors(programs, few, trace, factors, {})
    trace, factors = _enumerated(pair, batch, depth)
    if scope == "datum":
        for _, site in sample_sites(trace):
            data_frame(site, "model")
    kept = {PLATE: batches.size(batch)} if scope == "datum" else {}
    return FactorGraph.of(trace, factors, kept), depth


def log_evidence_of_each(pair: Pair, batch: batches.Batch) -> tuple[Tensor, int]:
    """ln p(y) of each datum, [B], by eliminating one latent after the other, and the number of states summed
    over; in blocks of data where single latents have very many values.

    Raises as :func:`enumerate_latents`.
    """
    evaluator, size = _finite_latents(pair, batch, "datum"), batches.size(batch)
    counts = sorted(site.num_values or 1 for site in evaluator.latents.values())
    widest = math.prod(counts[-2:])  # a factor may join the two sites of most values
    step = max(1, _AT_ONCE // widest) if evaluator.sliceable else size
    values, states, depth = [], 0, None
    for start in range(0, size, step):
        rows = slice(start, min(start + step, size))
        block = batch if step >= size else batches.rows(batch, rows)
        graph, depth = enumerate_latents(pair, block, depth=depth)
        values.append(graph.log_partition())
        states += graph.states * (rows.stop - rows.start)
    return torch.cat(values), states


def log_evidence_of_all(pair: Pair, batch: batches.Batch) -> tuple[Tensor, int]:
    """ln p(y) of the whole batch by summing over every assignment of all its finite latents, and the number
    of assignments; for data that depend on one another.

    Raises :class:`Unavailable` for continuous latents and for more than a million assignments.
    """
    evaluator = _finite_latents(pair, batch, "joint")
    with EnumerableVectors():
        trace = evaluator.traces()[1]
    supports = {k: trace.nodes[k]["fn"].enumerate_support(expand=False) for k in evaluator.latents}
    shapes = {k: trace.nodes[k]["fn"].batch_shape for k in evaluator.latents}
    radix = [len(supports[k]) for k in evaluator.latents for _ in range(shapes[k].numel())]
    count = math.prod(radix)
    if count > _MAX_ASSIGNMENTS:
        raise Unavailable(
            f"the latents of all data have {Decimal(count):.1e} joint values: summing over them one by one "
            f"is limited to {_MAX_ASSIGNMENTS:,}"
        )
    device = next(iter(supports.values())).device
    step, totals = max(1, evaluator.cells), []
    for first in range(0, count, step):
        code = torch.arange(first, min(first + step, count), device=device)
        latents = {}
        for name, site in evaluator.latents.items():
            digits = []
            for _ in range(shapes[name].numel()):
                digits.append(code % len(supports[name]))
                code = code // len(supports[name])
            index = torch.stack(digits, -1) if digits else code.new_zeros(len(code), 1)
            values = supports[name].reshape(len(supports[name]), -1)[index]
            latents[name] = values.reshape(len(values), 1, *site.event_shape)
        totals.append(logsumexp(evaluator.log_joint(latents).double(), 0))
    return logsumexp(torch.cat(totals), 0), count


def _finite_latents(pair: Pair, batch: batches.Batch, scope: str) -> Evaluator:
    evaluator = Evaluator(pair, batch, with_guide=False, summing=False, scope=scope)
    for name, site in evaluator.latents.items():
        if site.num_values is None:
            raise Unavailable(f"latent site {name!r} has no finite set of values to sum over")
        if site.num_values > _MAX_ASSIGNMENTS:
            raise Unavailable(
                f"latent site {name!r} has {Decimal(site.num_values):.1e} values: a sum over them is limited "
                f"to {_MAX_ASSIGNMENTS:,}"
            )
    evaluator.refuse_scales("enumeration")
    return evaluator


def _enumerated(pair: Pair, batch: batches.Batch, depth: int) -> tuple[Any, dict[str, Tensor]]:
    """A trace of the model with all its latents enumerated, and the log probability of each site."""
    program = EnumerableVectors()(ModelMasks()(pair.model))
    model = poutine.enum(config_enumerate(program, default="parallel"), first_available_dim=-1 - depth)
    with evaluation_mode(pair), unregistered(), pyro.validation_enabled(False):
        try:
            trace = prune_subsample_sites(traced(model, batch))
            return trace, {k: log_prob_of(s, latent=not s["is_observed"]) for k, s in sample_sites(trace)}
        except (RuntimeError, IndexError, TypeError, AssertionError) as error:
            raise unenumerable(error) from error

"""Sums over the finite latents of any pair, by eliminating one after the other in log space."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.masks import ModelMasks, is_masked
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import Unavailable, sample_sites
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import PLATE, Pair, evaluation_mode, unregistered

__all__ = ["FactorGraph", "enumerate_latents", "log_evidence_of_all"]

_MAX_ASSIGNMENTS = 2**20
_ASSIGNMENTS = 4  # at which factors are compared with the model, and two more


@dataclass(frozen=True)
class FactorGraph:
    """ln p(y, z) as a sum of ``factors``, one per site: tables over the finite latents that the site depends
    on.

    The factors are differentiable in the pair's parameters; ``states`` counts the entries of all latents'
    tables, ``depth`` the dimensions of the plates.
    """

    factors: tuple[Tensor, ...]
    size: int
    states: int
    plates: tuple[frozenset[str], ...]
    latents: frozenset[str]
    data: str
    depth: int

    def log_partition(self, factors: Sequence[Tensor] | None = None, *, largest: bool = False) -> Tensor:
        """ln Σ_z exp(Σ factors), [B]; with ``largest`` the maximum over z instead of the sum.

        Its gradient with respect to the factors are their posterior marginals (or the maximizing entries).
        Cost: that of eliminating the latents one after the other; for chains and trees, their dynamic
        program.
        """
        grouped: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for plates, own, factor in zip(self.plates, self.factors, factors or self.factors, strict=True):
            factor._pyro_dims = own._pyro_dims  # type: ignore[attr-defined]
            grouped.setdefault(plates, []).append(factor)
        # A plate of one datum leaves no dimension, so its size is given.
        ring = _LogSpace(largest, {self.data: self.size})
        with pyro.validation_enabled(False):
            total = contract_to_tensor(
                grouped, set(self.latents), target_ordinal=frozenset({self.data}), ring=ring
            )
        return total.reshape(-1).expand(self.size)


def enumerate_latents(pair: Pair, batch: batches.Batch, depth: int | None = None) -> FactorGraph:
    """The factors of ln p(y, z) of a pair all of whose latents are finite and discrete; ``depth`` is that of
    an earlier graph of the same pair, and skips the checks.

    Raises :class:`Unavailable` for continuous latents, ValueError for scales, which are not part of the
    joint, for data that depend on one another, and for a model whose factors are not its log probabilities:
    one that branches on a latent in Python sees all values at once.
    """
    if depth is None:
        evaluator = _finite_latents(pair, batch, "datum")
        depth = evaluator.layout.depth
        few = batches.rows(batch, slice(0, 3)) if evaluator.sliceable else batch
        _check_factors(pair, few, depth)
    return _graph(pair, batch, depth)[0]


def log_evidence_of_all(pair: Pair, batch: batches.Batch) -> tuple[Tensor, int]:
    """ln p(y) of the whole batch by summing over every assignment of all its finite latents, and the number
    of assignments; for data that depend on one another, and latents outside the data plate.

    Raises :class:`Unavailable` for continuous latents and for more than a million assignments.
    """
    evaluator = _finite_latents(pair, batch, "joint")
    trace = evaluator.traces()[1]
    supports = {k: trace.nodes[k]["fn"].enumerate_support(expand=False) for k in evaluator.latents}
    shapes = {k: trace.nodes[k]["fn"].batch_shape for k in evaluator.latents}
    radix = [len(supports[k]) for k in evaluator.latents for _ in range(shapes[k].numel())]
    count = math.prod(radix)
    if count > _MAX_ASSIGNMENTS:
        raise Unavailable(
            f"the latents of all data have {float(count):.1e} joint values: summing over them one by one is "
            f"limited to {_MAX_ASSIGNMENTS:,}"
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
    evaluator = Evaluator(pair, batch, with_guide=False, scope=scope)
    continuous = [k for k, site in evaluator.latents.items() if not site.has_enumerate_support]
    if continuous:
        raise Unavailable(f"latent site {continuous[0]!r} has no finite set of values to sum over")
    evaluator.refuse_scales("enumeration")
    return evaluator


def _graph(pair: Pair, batch: batches.Batch, depth: int) -> tuple[FactorGraph, Any]:
    """The factors, and the enumerated trace that they are from."""
    program = ModelMasks()(pair.model)
    model = poutine.enum(config_enumerate(program, default="parallel"), first_available_dim=-1 - depth)
    with evaluation_mode(pair), unregistered(), pyro.validation_enabled(False):
        trace = prune_subsample_sites(batches.call(poutine.trace(model).get_trace, batch))
        for site in trace.nodes.values():
            if site["type"] == "sample":
                site["scale"] = 1.0
        trace.compute_log_prob()
        trace.pack_tensors()
    factors, plates = [], []
    latents: set[str] = set()
    states = 1
    for _, site in sample_sites(trace):
        plates.append(
            frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        )
        # A masked latent sums to one, so only observations are masked.
        factor = site["packed"]["log_prob" if site["is_observed"] else "unscaled_log_prob"]
        factors.append(factor)
        if site["infer"].get("_enumerate_dim") is not None:
            latents |= set(factor._pyro_dims)
            states += site["value"].numel()
    latents -= set(trace.plate_to_symbol.values())
    graph = FactorGraph(
        tuple(factors),
        batches.size(batch),
        states,
        tuple(plates),
        frozenset(latents),
        trace.plate_to_symbol[PLATE],
        depth,
    )
    return graph, trace


def _check_factors(pair: Pair, batch: batches.Batch, depth: int) -> None:
    """ValueError, naming the site, if a factor at some assignment is not what the model gives there."""
    with torch.random.fork_rng(devices=[]):
        graph, trace = _graph(pair, batch, depth)
        programs = Programs(pair, with_guide=False)
        with programs.quiet():
            drawn = [programs.traces(batch)[1] for _ in range(_ASSIGNMENTS)]
            values = [{k: s["value"] for k, s in sample_sites(t) if not s["is_observed"]} for t in drawn]
            for end in (0, -1):
                values.append({k: _support_of(trace, k)[end].expand_as(v) for k, v in values[0].items()})
            for latents in values:
                plain = programs.model(batch, latents)
                for factor, (name, site) in zip(graph.factors, sample_sites(plain), strict=True):
                    expected = site["fn"].log_prob(site["value"])
                    if name not in latents and is_masked(site["mask"]):
                        expected = torch.where(torch.as_tensor(site["mask"]), expected, 0.0)
                    found = _at(factor, trace, latents)
                    found, expected = torch.broadcast_tensors(found, expected)
                    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-4):
                        raise ValueError(
                            f"model site {name!r}: enumeration gives other log probabilities than the model "
                            "run at the same values (a Python branch on a latent, a sum over a plate?). "
                            "Write branches with torch.where"
                        )


def _support_of(trace: Any, name: str) -> Tensor:
    """The values of a finite latent, [S, *event]."""
    fn = trace.nodes[name]["fn"]
    support = fn.enumerate_support(expand=False)
    return support.reshape(len(support), *fn.event_shape)


def _at(factor: Tensor, trace: Any, latents: Mapping[str, Tensor]) -> Tensor:
    """Entries of a packed factor at given latents, over the plates' dimensions, right-aligned."""
    dims = {trace.plate_to_symbol[f.name]: f for _, s in sample_sites(trace) for f in s["cond_indep_stack"]}
    index: list[Tensor] = []
    for symbol, size in zip(factor._pyro_dims, factor.shape, strict=True):  # type: ignore[attr-defined]
        if symbol in dims:
            index.append(torch.arange(size, device=factor.device).reshape(-1, *[1] * (-1 - dims[symbol].dim)))
            continue
        name = next(k for k, s in sample_sites(trace) if s["infer"].get("_enumerate_symbol") == symbol)
        support, value = _support_of(trace, name), latents[name]
        events = support.dim() - 1
        support = support.reshape(len(support), *[1] * (value.dim() - events), *support.shape[1:])
        same = value == support
        index.append((same.flatten(-events).all(-1) if events else same).long().argmax(0))
    return factor[tuple(index)] if index else factor


class _LogSpace(LogRing):
    """Sums of products term by term in log space: nothing underflows, however different the terms are."""

    def __init__(self, largest: bool, sizes: dict[str, int]) -> None:
        super().__init__(dim_to_size=sizes)
        self.largest = largest

    def sumproduct(self, terms: list[Any], dims: set[str]) -> Tensor:
        terms = list(terms)
        for dim in list(dims):
            # Eliminate the latent with the smallest resulting table first.
            dim = min(dims, key=lambda d: (_table(terms, d), d))
            dims = dims - {dim}
            joined = packed.broadcast_all(*(t for t in terms if dim in t._pyro_dims))
            names = joined[0]._pyro_dims
            position = names.index(dim)
            table: Any = sum(joined[1:], joined[0])
            summed: Any = table.amax(position) if self.largest else logsumexp(table, position)
            summed._pyro_dims = names.replace(dim, "")
            terms = [t for t in terms if dim not in t._pyro_dims] + [summed]
        joined = packed.broadcast_all(*terms)
        total: Any = sum(joined[1:], joined[0])
        total._pyro_dims = joined[0]._pyro_dims
        return total


def _table(terms: list[Any], dim: str) -> int:
    sizes: dict[str, int] = {}
    for term in terms:
        if dim in term._pyro_dims:
            sizes.update(zip(term._pyro_dims, term.shape, strict=True))
    total = 1
    for size in sizes.values():
        total *= size
    return total

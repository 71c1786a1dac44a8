"""Sums over the finite latents of any pair, by eliminating one after the other in log space."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import PLATE, Pair, evaluation_mode, unregistered

__all__ = ["FactorGraph", "enumerate_latents"]


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

    Raises :class:`Unavailable` for continuous latents, and ValueError for scales, which are not part of the
    joint.
    """
    if depth is None:
        evaluator = Evaluator(pair, batch, with_guide=False)
        continuous = [k for k, site in evaluator.latents.items() if not site.has_enumerate_support]
        if continuous:
            raise Unavailable(f"latent site {continuous[0]!r} has no finite set of values to sum over")
        evaluator.refuse_scales("enumeration")
        depth = evaluator.layout.depth
    model = poutine.enum(config_enumerate(pair.model, default="parallel"), first_available_dim=-1 - depth)
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
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
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
    return FactorGraph(
        tuple(factors),
        batches.size(batch),
        states,
        tuple(plates),
        frozenset(latents),
        trace.plate_to_symbol[PLATE],
        depth,
    )


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

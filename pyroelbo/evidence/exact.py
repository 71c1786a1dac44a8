"""The evidence exactly: closed form or dynamic program where the pair has one, else enumeration of finite
latents."""

from __future__ import annotations

from collections import OrderedDict
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

from pyroelbo import data as batches
from pyroelbo.evidence.bounds import refuse_scales
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import PLATE, ExactPair, Pair, evaluation_mode, unregistered
from pyroelbo.records import Bound
from pyroelbo.terms import Evaluator, Unavailable

__all__ = ["exact"]


@torch.no_grad()
def exact(pair: Pair, y: Any) -> Bound:
    """ln p(y) of each datum, [B], in nats: ``pair.log_evidence`` for an :class:`ExactPair`, else by
    enumeration.

    Enumeration works for any pair all of whose latents are finite and discrete: their sum is taken in log
    space by eliminating one latent after the other, so that chains and trees cost what their dynamic program
    costs. Raises :class:`Unavailable` for continuous latents.
    """
    batch = batches.to(batches.as_batch(y, "y"), pair.device)
    if isinstance(pair, ExactPair):
        with evaluation_mode(pair), unregistered():
            value = batches.call(pair.log_evidence, batch)
        if value.shape != (batches.size(batch),):
            raise ValueError(
                f"{type(pair).__name__}.log_evidence gave shape {tuple(value.shape)} for "
                f"{batches.size(batch)} data: it must give [B]"
            )
        cost = batches.size(batch)
    else:
        value, cost = _enumerate(pair, batch)
    return Bound("exact", value.double(), torch.zeros_like(value.double()), "exact", cost=cost)


def _enumerate(pair: Pair, batch: batches.Batch) -> tuple[Tensor, int]:
    evaluator = Evaluator(pair, batch, with_guide=False)
    continuous = [k for k, site in evaluator.latents.items() if not site.has_enumerate_support]
    if continuous:
        raise Unavailable(f"latent site {continuous[0]!r} has no finite set of values to sum over")
    refuse_scales(evaluator, "enumeration")
    model = poutine.enum(
        config_enumerate(pair.model, default="parallel"), first_available_dim=-1 - evaluator.depth
    )
    with evaluation_mode(pair), unregistered(), pyro.validation_enabled(False):
        trace = prune_subsample_sites(batches.call(poutine.trace(model).get_trace, batch))
        for site in trace.nodes.values():
            if site["type"] == "sample":
                site["scale"] = 1.0
        trace.compute_log_prob()
        trace.pack_tensors()
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    latents: set[str] = set()
    states = 1
    for site in trace.nodes.values():
        if site["type"] != "sample":
            continue
        plates = frozenset(trace.plate_to_symbol[f.name] for f in site["cond_indep_stack"] if f.vectorized)
        # A masked latent still sums to one, so only observations are masked.
        factor = site["packed"]["log_prob" if site["is_observed"] else "unscaled_log_prob"]
        factors.setdefault(plates, []).append(factor)
        if site["infer"].get("_enumerate_dim") is not None:
            latents |= set(factor._pyro_dims)
            states += site["value"].numel()
    latents -= set(trace.plate_to_symbol.values())
    symbol = trace.plate_to_symbol[PLATE]
    with pyro.validation_enabled(False):
        total = contract_to_tensor(factors, latents, target_ordinal=frozenset({symbol}), ring=_LogSpace())
    return total.reshape(-1).expand(evaluator.size), evaluator.size * states


class _LogSpace(LogRing):
    """Sums of products term by term in log space: nothing underflows, however far apart the terms are."""

    def sumproduct(self, terms: list[Any], dims: set[str]) -> Tensor:
        terms = list(terms)
        for dim in list(dims):
            # The latent whose elimination makes the smallest table goes first.
            dim = min(dims, key=lambda d: (_table(terms, d), d))
            dims = dims - {dim}
            joined = packed.broadcast_all(*(t for t in terms if dim in t._pyro_dims))
            names = joined[0]._pyro_dims
            position = names.index(dim)
            summed: Any = logsumexp(sum(joined[1:], joined[0]), position)
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

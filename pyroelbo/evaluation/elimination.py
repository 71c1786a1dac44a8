"""Sums over finite latents by eliminating one after the other, term by term in log space."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.ops import packed
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from torch import Tensor

from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.numerics import logsumexp

__all__ = ["FactorGraph", "depends_on_finite"]

_LARGEST = 2**28  # entries of a table


def depends_on_finite(site: Any, log_prob: Tensor) -> bool:
    """Whether the log probability of a site of an enumerated trace varies with the enumerated latents."""
    return any(
        -dim <= log_prob.dim() and log_prob.shape[dim] > 1 for dim in site["infer"].get("_dim_to_id", ())
    )


@dataclass(frozen=True)
class FactorGraph:
    """Σ ``factors``, a log probability as tables over finite latents, one per site, in the plates of each.

    ``latents`` are the symbols of the tables' dimensions that are summed over, ``kept`` symbol and size of
    the plates that the sum keeps; over other plates the tables are multiplied. ``states`` counts the entries
    of all latents' tables.
    """

    factors: tuple[Tensor, ...]
    plates: tuple[frozenset[str], ...]
    latents: frozenset[str]
    kept: tuple[tuple[str, int], ...]
    states: int

    @classmethod
    def of(cls, trace: Any, log_probs: Mapping[str, Tensor], kept: Mapping[str, int]) -> FactorGraph:
        """The graph of some sites of an enumerated trace, given their log probabilities; ``kept`` are names
        and sizes of plates.

        Raises :class:`Unavailable`, naming the site, for dimensions that no plate declares.
        """
        trace.symbolize_dims()
        factors, plates, latents, states = [], [], set(), 0
        for name, log_prob in log_probs.items():
            site = trace.nodes[name]
            frames = [f for f in site["cond_indep_stack"] if f.vectorized]
            sizes = {f.dim: f.size for f in frames}
            full = [sizes.get(dim, 1) for dim in range(min([*sizes, -1]), 0)]
            try:
                wide = log_prob.expand(torch.broadcast_shapes(log_prob.shape, tuple(full)))
                factors.append(packed.pack(wide[...], site["infer"]["_dim_to_symbol"]))
            except (RuntimeError, ValueError) as error:
                raise Unavailable(
                    f"model site {name!r}: expected batch dimensions of plates and enumerated latents only, "
                    f"got shape {tuple(log_prob.shape)}. Declare the others as events with .to_event(), or "
                    "add plates"
                ) from error
            plates.append(frozenset(trace.plate_to_symbol[f.name] for f in frames))
            if "_enumerate_symbol" in site["infer"]:
                latents.add(site["infer"]["_enumerate_symbol"])
                states += site["value"].numel()
        symbols = tuple((trace.plate_to_symbol.get(name, ""), size) for name, size in kept.items())
        return cls(tuple(factors), tuple(plates), frozenset(latents), symbols, states)

    def log_partition(self, factors: Sequence[Tensor] | None = None, *, largest: bool = False) -> Tensor:
        """ln Σ_z exp(Σ factors), of the kept plates' sizes; with ``largest`` the maximum over z instead of
        the sum.

        Its gradient with respect to the factors are their posterior marginals (or the maximizing entries).
        Raises :class:`Unavailable` for plates that are not nested in one another. Cost: that of eliminating
        the latents one after the other; for chains and trees, their dynamic program.
        """
        grouped: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for plates, own, factor in zip(self.plates, self.factors, factors or self.factors, strict=True):
            factor._pyro_dims = own._pyro_dims  # type: ignore[attr-defined]
            grouped.setdefault(plates, []).append(factor)
        target = frozenset(symbol for symbol, _ in self.kept if symbol)
        try:
            with pyro.validation_enabled(False):
                total = contract_to_tensor(
                    grouped,
                    set(self.latents),
                    target_ordinal=target,
                    # A plate of one element leaves no dimension, so that its size is given.
                    ring=_LogSpace(largest, {symbol: size for symbol, size in self.kept if symbol}),
                )
        except NotImplementedError as error:
            raise Unavailable(f"the sum over the finite latents is no dynamic program: {error}") from error
        dims = total._pyro_dims
        order = [dims.index(symbol) for symbol, _ in self.kept if symbol in dims and symbol]
        shape = [total.shape[dims.index(s)] if s and s in dims else 1 for s, _ in self.kept]
        return total.permute(order).reshape(shape).expand([size for _, size in self.kept])


class _LogSpace(LogRing):
    """Sums of products term by term in log space: nothing underflows, however different the terms are."""

    def __init__(self, largest: bool, sizes: dict[str, int]) -> None:
        super().__init__(dim_to_size=sizes)
        self.largest = largest

    def sumproduct(self, terms: Iterable[Any], dims: Iterable[str]) -> Any:
        """The latent with the smallest resulting table is eliminated first."""
        left = dict(enumerate(terms))
        count = itertools.count(len(left))
        holders = {d: {i for i, t in left.items() if d in t._pyro_dims} for d in sorted(dims)}
        cost = {d: _entries(left[i] for i in held) for d, held in holders.items()}
        while cost:
            dim = min(cost, key=lambda d: (cost[d], d))
            if cost.pop(dim) > _LARGEST:
                raise Unavailable(
                    "the sum over the finite latents needs a table of more than "
                    f"{_LARGEST:,} entries: write chains with pyro.markov, or fewer values"
                )
            held = holders.pop(dim)
            table = _product([left.pop(i) for i in sorted(held)])
            names, position = table._pyro_dims, table._pyro_dims.index(dim)
            summed: Any = table.amax(position) if self.largest else logsumexp(table, position)
            summed._pyro_dims = names.replace(dim, "")
            fresh = next(count)
            left[fresh] = summed
            for other in names:
                if other in holders:
                    holders[other] = (holders[other] - held) | {fresh}
                    cost[other] = _entries(left[i] for i in holders[other])
        return _product(list(left.values()))


def _product(terms: list[Any]) -> Any:
    """The product of packed terms, their sum in log space, the smallest first."""
    total, *others = sorted(terms, key=lambda t: t.numel())
    for term in others:
        mine, theirs = packed.broadcast_all(total, term)
        total = mine + theirs
        total._pyro_dims = mine._pyro_dims
    return total


def _entries(terms: Iterable[Any]) -> int:
    """Entries of the product of packed terms."""
    sizes: dict[str, int] = {}
    for term in terms:
        sizes.update(zip(term._pyro_dims, term.shape, strict=True))
    return math.prod(sizes.values())

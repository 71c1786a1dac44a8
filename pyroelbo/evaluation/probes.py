"""Checks that run a pair again with other values: masked entries in use, data that depend on one another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.elimination import FactorGraph, depends_on_finite
from pyroelbo.evaluation.masks import event_mask, is_masked, log_prob_of
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import is_point, sample_sites
from pyroelbo.evaluation.supports import movable, same_bounds, support_of
from pyroelbo.numerics import agree

__all__ = [
    "LatentReads",
    "check_factors",
    "check_masks",
    "coupled_latents",
    "coupled_site",
    "moving_supports",
]

_TRIES = 4  # other values of an entry that are tried
_ASSIGNMENTS = 4  # at which enumerated log probabilities are compared with the model, and two more


class LatentReads(TorchDispatchMode):
    """Whether a program reads given latents, or what is computed from them, as Python numbers (``read``).

    A branch on a latent (``if k.sum() > 0``) is right for one particle of a datum at a time only: a
    vectorized pass takes one branch for all particles.
    """

    _READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)

    def __init__(self, latents: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.read = False
        self._from_latents = {id(v): v for v in latents.values()}  # held, so that no id is used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.arg_tree_leaves(*args, **(kwargs or {}))
        if any(id(a) in self._from_latents for a in flat):
            self.read |= func in self._READS
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._from_latents[id(tensor)] = tensor
        return out


def check_masks(programs: Programs, batch: Batch) -> None:
    """ValueError, naming the sites, if a masked entry of a latent is in use: if other terms of the model,
    which are not masked, change with it.

    Entries are redrawn from the prior, or set to the values of a finite support, and the model is run again.
    """
    guide, model = programs.traces(batch)
    latents = _latents(model)
    for name, site in latents.items():
        if event_mask(site["fn"]) is not None:
            raise ValueError(
                f"model site {name!r}: expected a mask over plates, got one inside the event. Write "
                "d.to_event(...).mask(m), or poutine.mask over a plate"
            )
    # A latent that is summed out keeps its prior where it is masked.
    summed = programs.summed(guide, model)
    unused = {name: (s["mask"], s["fn"].event_dim) for name, s in latents.items() if name not in summed}
    unused = {name: found for name, found in unused.items() if is_masked(found[0])}
    _check_auxiliary(guide, unused)
    for name, site in sample_sites(guide):
        # A structure may ignore entries of an event (steps beyond a length) that the guide then masks.
        mask = event_mask(site["fn"])
        if name in latents and mask is not None:
            unused[name] = (mask, 0)
    values = {name: site["value"] for name, site in latents.items()}
    for name, (mask, event_dim) in unused.items():
        for other in _others(programs, batch, name, latents[name]):
            mixed = {**values, name: _where(mask, values[name], other, event_dim)}
            moved = _moved(programs, batch, values, mixed)
            if moved == name:
                raise ValueError(
                    f"guide site {name!r} masks entries inside its event that the model's prior counts: "
                    "remove the mask, or let the model's distribution ignore them"
                )
            if moved is not None:
                raise ValueError(
                    f"site {moved!r} depends on entries of latent site {name!r} that are masked: the "
                    f"evidence of a latent in use needs its prior. Mask {moved!r} there too, or remove the "
                    "mask"
                )


def _latents(model: Any) -> dict[str, Any]:
    return {k: s for k, s in sample_sites(model) if not s["is_observed"]}


def _check_auxiliary(guide: Any, masked: Mapping[str, Any]) -> None:
    """Refuse an automatic guide that draws all latents from one site: the term of a masked entry is part of
    it."""
    auxiliary = [k for k, s in sample_sites(guide) if s["infer"].get("is_auxiliary")]
    for name in masked:
        alone = f"{name}_unconstrained" in auxiliary
        if auxiliary and not alone and name in guide.nodes and is_point(guide.nodes[name]["fn"]):
            raise ValueError(
                f"guide site {auxiliary[0]!r}: expected a separate site for {name!r}, which is masked in the "
                "model. Use AutoNormal, or write the guide"
            )


def _others(programs: Programs, batch: Batch, name: str, site: Any) -> Iterator[Tensor]:
    """Other values of a latent, in the shape of its present one."""
    value, fn = site["value"], site["fn"]
    if fn.has_enumerate_support:
        support = fn.enumerate_support(expand=False)
        for other in support[: 2 * _TRIES]:
            yield other.expand_as(value)
        return
    prior = Programs(programs.pair, with_guide=False)
    for _ in range(_TRIES):
        yield prior.traces(batch)[1].nodes[name]["value"].expand_as(value)


def _where(mask: Any, value: Tensor, other: Tensor, event_dim: int) -> Tensor:
    if isinstance(mask, bool):
        return value if mask else other
    return torch.where(mask.reshape((*mask.shape, *[1] * event_dim)), value, other)


def _live_terms(programs: Programs, batch: Batch, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log probabilities of the model's sites at given latents, zero where masked; the model's own random
    numbers (the indices of a subsampled plate) are the same in every call."""
    torch.manual_seed(0)
    terms = {}
    for name, site in sample_sites(programs.model(batch, latents)):
        if site["mask"] is not False:
            terms[name] = log_prob_of(site)
    return terms


def _moved(
    programs: Programs, batch: Batch, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> str | None:
    """A site of the model whose term differs between two values of the latents."""
    one, other = (_live_terms(programs, batch, latents) for latents in (before, after))
    for name, term in one.items():
        if not agree(term, other[name], rtol=1e-5, atol=1e-6):
            return name
    return None


def _prior_draws(prior: Programs, batch: Batch) -> dict[str, Any] | None:
    """The latent sites of the model, drawn from the prior; None if the prior refuses to be drawn from, as a
    grammar does whose sentences outgrow the batch's length."""
    try:
        return _latents(prior.traces(batch)[1])
    except ValueError:
        return None


def coupled_site(programs: Programs, batch: Batch, plate: int) -> str | None:
    """A site of the model whose term for one datum, along the dimension ``plate``, changes with other rows or
    their latents; None if there is none.

    A centring over the batch (``k - k.mean(-1)``, ``obs=y - y.mean(0)``) couples the data: they have no
    evidence of their own. For the first and the last datum, the other rows are replaced by copies of it, with
    other latents (other values of finite ones), and its terms are compared.
    """
    size = batches.size(batch)
    if size < 2:
        return None
    prior = Programs(programs.pair, with_guide=False)
    sites = _prior_draws(prior, batch)
    if sites is None:
        return None
    values = {name: _filled(site, 0) for name, site in sites.items()}
    before = _live_terms(programs, batch, values)
    for row in (0, size - 1):
        copies = batches.rows(batch, torch.full((size,), row))
        fresh = _prior_draws(prior, copies)
        if fresh is None:
            return None
        if fresh.keys() != values.keys():
            continue  # the sites follow the rows (a longest sequence)
        other = {}
        for name, value in values.items():
            new = _filled(fresh[name], -1)
            if new.shape != value.shape:
                return None  # the shape follows the rows (a longest sequence): nothing to compare
            dim = value.dim() - sites[name]["fn"].event_dim + plate
            kept = torch.arange(size).reshape(-1, *[1] * (value.dim() - 1 - dim)) == row
            other[name] = torch.where(kept, value, new)
        after = _live_terms(programs, copies, other)
        for name, term in before.items():
            own, moved = term.select(plate, row), after[name].select(plate, row)
            if not agree(own, moved, rtol=1e-4, atol=1e-5):
                return name
    return None


def coupled_latents(programs: Programs, batch: Batch, plate: int) -> str | None:
    """A site of the model whose term for one datum, along the dimension ``plate``, changes with the latents
    of another row, however few such rows there are (an index of groups that are as many as the data); None
    if there is none.

    Two draws of all latents are mixed by each binary digit of the row's number: any two rows differ in some
    digit, and a datum's terms must be those of the draw that it has. Cost: 2 + log2 B evaluations of a datum.
    """
    rows = torch.arange(batches.size(batch))
    prior = Programs(programs.pair, with_guide=False)
    drawn = [sites for sites in (_prior_draws(prior, batch) for _ in range(2)) if sites is not None]
    if len(drawn) < 2:
        return None
    dims = {name: plate - site["fn"].event_dim for name, site in drawn[0].items()}
    both = [{name: _filled(site, -i) for name, site in sites.items()} for i, sites in enumerate(drawn)]
    if any(value.shape != both[1][name].shape for name, value in both[0].items()):
        return None
    alone = [_live_terms(programs, batch, latents) for latents in both]
    for digit in range((len(rows) - 1).bit_length()):
        second = (rows >> digit) & 1 == 1

        def chosen(name: str, values: list[dict[str, Tensor]], dim: int, second: Tensor = second) -> Tensor:
            shape = (-1, *[1] * (-1 - dim))
            return torch.where(
                second.to(values[0][name].device).reshape(shape), values[1][name], values[0][name]
            )

        mixed = {name: chosen(name, both, dim) for name, dim in dims.items()}
        for name, term in _live_terms(programs, batch, mixed).items():
            if not agree(term, chosen(name, alone, plate), rtol=1e-4, atol=1e-5):
                return name
    return None


def moving_supports(programs: Programs, batch: Batch) -> frozenset[str]:
    """The observed sites whose support differs between two values of the latents (a Uniform's whose end is
    one)."""
    prior = Programs(programs.pair, with_guide=False)
    drawn = [sites for sites in (_prior_draws(prior, batch) for _ in range(2)) if sites is not None]
    if len(drawn) < 2:
        return frozenset()
    values = [{name: _filled(site, -i) for name, site in sites.items()} for i, sites in enumerate(drawn)]
    first, second = (programs.model(batch, latents) for latents in values)
    return frozenset(
        name
        for name, site in sample_sites(first)
        if site["is_observed"]
        and movable(site["fn"])
        and not same_bounds(support_of(site["fn"]), support_of(second.nodes[name]["fn"]))
    )


def _filled(site: Any, which: int) -> Tensor:
    """A latent's draw, or the first (0) or last (-1) of its values for all entries if they are finitely
    many."""
    if not site["fn"].has_enumerate_support:
        return site["value"]
    return site["fn"].enumerate_support(expand=False)[which].expand_as(site["value"])


def check_factors(
    programs: Programs,
    batch: Batch,
    trace: Any,
    log_probs: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> None:
    """ValueError, naming the site, if the ``log_probs`` of an enumerated trace are not what the model gives
    at some values of its finite latents; the other latents are ``given``."""
    finite = [name for name, site in sample_sites(trace) if "_enumerate_dim" in site["infer"]]
    alone = Programs(programs.pair, with_guide=False)
    drawn = [alone.traces(batch, given)[1] for _ in range(_ASSIGNMENTS)]
    values = [{name: t.nodes[name]["value"] for name in finite} for t in drawn]
    values += [
        {name: _support_of(trace, name)[end].expand_as(v) for name, v in values[0].items()} for end in (0, -1)
    ]
    tables = {name: p for name, p in log_probs.items() if depends_on_finite(trace.nodes[name], p)}
    tables = dict(zip(tables, FactorGraph.of(trace, tables, {}).factors, strict=True))
    for latents in values:
        for name, site in sample_sites(programs.model(batch, {**given, **latents})):
            expected = log_prob_of(site, latent=name in finite)
            found = _at(tables[name], trace, latents) if name in tables else log_probs[name]
            found, expected = torch.broadcast_tensors(found, expected)
            if not agree(found, expected, rtol=1e-4, atol=1e-4):
                raise ValueError(
                    f"model site {name!r}: enumeration gives other log probabilities than the model run at "
                    "the same values (a Python branch on a latent, a sum over a plate?). Write branches with "
                    "torch.where, and indices with pyro.ops.indexing.Vindex"
                )


def _support_of(trace: Any, name: str) -> Tensor:
    """The values of a finite latent, [S, *event]."""
    fn = trace.nodes[name]["fn"]
    support = fn.enumerate_support(expand=False)
    return support.reshape(len(support), *fn.event_shape)


def _at(factor: Tensor, trace: Any, latents: Mapping[str, Tensor]) -> Tensor:
    """Entries of a packed factor at given latents, over the plates' dimensions, right-aligned."""
    frames = [f for _, s in sample_sites(trace) for f in s["cond_indep_stack"] if f.vectorized]
    dims = {trace.plate_to_symbol[f.name]: f for f in frames}
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

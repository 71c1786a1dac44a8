"""What is learned of a pair by looking at it once: latent sites, plates, supports, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.finite import num_values
from pyroelbo.evaluation.masks import event_mask, is_masked
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import (
    POINT,
    base_of,
    check_joint,
    check_scale,
    check_sites,
    data_frame,
    is_point,
    sample_sites,
    sites_beyond,
)
from pyroelbo.evaluation.supports import support_of
from pyroelbo.pair import PLATE

__all__ = ["LatentSite", "Layout"]


@dataclass(frozen=True)
class LatentSite:
    """A latent site as the model declares it.

    ``event_shape`` is the shape of one datum's event and ``plate_shape`` that of the plates left of the data
    plate. Plates right of it count as part of the event, ``batch_dims`` of them; so does every batch
    dimension in a joint evaluation. ``num_values`` counts the values of one event, None if they cannot be
    enumerated. ``free`` says whether every combination of the coordinates' values is possible; those of a
    structure (a parse) constrain one another.
    """

    name: str
    event_shape: torch.Size
    plate_shape: tuple[int, ...]
    support: Any
    num_values: int | None
    free: bool
    batch_dims: int = 0
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, name: str, fn: Any, dtype: torch.dtype, dim: int | None) -> LatentSite:
        """The site of a data plate at ``dim``, or of a joint evaluation (None)."""
        shape = tuple(fn.batch_shape)
        plates, inner = ((), shape) if dim is None else (shape[:dim], shape[len(shape) + dim + 1 :])
        while plates and plates[0] == 1:
            plates = plates[1:]
        support = constraints.independent(support_of(fn), len(inner)) if inner else support_of(fn)
        event = torch.Size((*inner, *fn.event_shape))
        return cls(name, event, plates, support, *_values(fn), len(inner), dtype)

    @property
    def event_dim(self) -> int:
        return len(self.event_shape)


def _values(fn: Any) -> tuple[int | None, bool]:
    """How many values can be enumerated, and whether all combinations of coordinates are possible."""
    return num_values(fn), bool(getattr(base_of(fn), "free_labels", True))


@dataclass(frozen=True)
class Layout:
    """The sites of a pair and how they are laid out over plates.

    ``dim`` is the dimension of the data plate (-1 in joint scope), ``depth`` the number of plate
    dimensions, ``beyond`` the (program, site) whose latents may be evaluated outside their support,
    ``scaled_site`` a site with a scale within its datum, ``shapes`` the shape of each site's value for one
    particle of the probed batch. ``drawn`` are the sites that the guide draws, auxiliary ones included. A
    pair that is not ``sliceable`` is tied to its whole batch (by a mask or a plate of a fixed size).
    ``masked`` says whether a latent has a mask in the model or inside the guide's event. ``guessed`` says
    that a plate was taken for that of the data by its length. ``summed`` are latent sites of the model that
    are summed out within each particle, and none of the ``latents``.
    """

    scope: str
    latents: Mapping[str, LatentSite]
    drawn: Mapping[str, LatentSite]
    observed: frozenset[str]
    guide_sites: frozenset[str]
    beyond: frozenset[tuple[str, str]]
    shapes: Mapping[str, torch.Size]
    dim: int
    depth: int
    scaled_site: str | None = None
    sliceable: bool = False
    masked: bool = False
    guessed: bool = False
    dtype: torch.dtype = torch.float32
    summed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, programs: Programs, batch: Batch, scope: str, sliceable: bool = False) -> Layout:
        """Run both programs once and refuse, naming the site, what has no bound of this ``scope``."""
        programs.pair.model.check(batch)
        guide, model = programs.traces(batch)
        summed = programs.summed(guide, model)
        check_sites(guide, model, programs.with_guide, summed)
        _refuse_points(programs, guide, model, batch)
        both = [("guide", *s) for s in sample_sites(guide)] + [("model", *s) for s in sample_sites(model)]
        scaled = dim = None  # the dimension of the data plate
        if scope == "joint":
            for program, _, site in both:
                check_joint(site, program)
            depth = max([1, *(len(site["fn"].batch_shape) for _, _, site in both), *_depths(both)])
        else:
            dim, scaled = _check_plates(both, batch)
            depth = max([1, *_depths(both)])
        observed = frozenset(k for k, s in sample_sites(model) if s["is_observed"])
        latents = {
            k: LatentSite.of(k, s["fn"], s["value"].dtype, dim)
            for k, s in sample_sites(model)
            if k not in observed and k not in summed
        }
        return cls(
            scope,
            MappingProxyType(latents),
            MappingProxyType(_drawn(guide, latents, dim)),
            observed,
            frozenset(k for k, _ in sample_sites(guide)),
            sites_beyond(guide, model),
            MappingProxyType({name: _shape(site["value"]) for _, name, site in both}),
            dim or -1,
            depth,
            scaled,
            sliceable,
            any(_masks(guide, model, latents)),
            any(site.get("guessed_plate") for _, _, site in both),
            _dtype(programs, both),
            summed,
        )

    @property
    def auxiliary(self) -> frozenset[str]:
        """Guide sites that the model lacks: given latents do not fix them."""
        return self.guide_sites - frozenset(self.latents) - self.observed


def _drawn(guide: Any, latents: Mapping[str, LatentSite], dim: int | None) -> dict[str, LatentSite]:
    """What the guide draws: its auxiliary sites, and the latents that are not set to a function of them."""
    sites = {k: s for k, s in sample_sites(guide) if not s["is_observed"] and not is_point(s["fn"])}
    return {k: latents.get(k) or LatentSite.of(k, s["fn"], s["value"].dtype, dim) for k, s in sites.items()}


def _masks(guide: Any, model: Any, latents: Mapping[str, LatentSite]) -> Iterator[bool]:
    for name in latents:
        for trace in (guide, model):
            if name in trace.nodes:
                site = trace.nodes[name]
                yield is_masked(site["mask"]) or event_mask(site["fn"]) is not None


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, Tensor) else torch.Size()


def _dtype(programs: Programs, both: list[tuple[str, str, Any]]) -> torch.dtype:
    """The widest floating type of the parameters and the sites' values."""
    tensors = list(programs.pair.parameters()) + [site["value"] for _, _, site in both]
    kinds = {t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
    return functools.reduce(torch.promote_types, kinds) if kinds else torch.get_default_dtype()


def _depths(both: list[tuple[str, str, Any]]) -> list[int]:
    return [-f.dim for _, _, site in both for f in site["cond_indep_stack"] if f.dim is not None]


def _check_plates(both: list[tuple[str, str, Any]], batch: Batch) -> tuple[int, str | None]:
    """Refuse sites outside the data plate and scales over it; the plate's dimension, and the first site with
    a scale within its datum."""
    scaled, size = None, batches.size(batch)
    dims: dict[int, str] = {}
    for program, name, site in both:
        frame = data_frame(site, program)
        if frame.size != size:
            remedy = f"Write pyro.plate({PLATE!r}, len(y)), or give subsample_size=len(y) if it is subsampled"
            if any(
                frame.size in part.shape[1:2] for part in map(batches.dense, batches.parts(batch).values())
            ):
                remedy = (
                    "If the data run along the second dimension of y, pass Pair.of(..., data_dim=1) and "
                    "y.movedim(1, 0), which has them first"
                )
            raise ValueError(
                f"the plate {PLATE!r}: expected {size} data, the batch's rows, got {frame.size} at {program} "
                f"site {name!r}. {remedy}"
            )
        dims.setdefault(frame.dim, f"{program} site {name!r}")
        if check_scale(site, program):
            scaled = scaled or name
    if len(dims) > 1:
        where = ", ".join(f"{dim} at {site}" for dim, site in sorted(dims.items()))
        raise ValueError(f"the plate {PLATE!r}: expected one dimension at all sites, got {where}")
    return next(iter(dims)), scaled


def _refuse_points(programs: Programs, guide: Any, model: Any, batch: Batch) -> None:
    """Refuse continuous latents that a guide, an automatic one, sets to the same value in every draw."""
    names = [
        name
        for name, site in sample_sites(guide)
        if name in model.nodes and is_point(site["fn"]) and not is_point(model.nodes[name]["fn"])
    ]
    names = [n for n in names if programs.with_guide and not model.nodes[n]["fn"].support.is_discrete]
    if names:
        again = programs.guide(batch)
        for name in names:
            if torch.equal(guide.nodes[name]["value"], again.nodes[name]["value"]):
                raise ValueError(POINT.format(name))

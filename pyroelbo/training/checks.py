"""What `fit` refuses before training starts, and what it learns from one run of the pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.batch import Batch, Minibatches
from pyroelbo.evaluation.probes import check_masks
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import check_observation, check_support, observed_part, observed_support
from pyroelbo.objectives.base import Update
from pyroelbo.pair import PLATE, Pair, traced

__all__ = ["parameters_of", "probe", "trainable"]


def probe(pair: Pair, batch: Batch, loader: Minibatches) -> tuple[dict[str, Tensor], int | None]:
    """Run the pair once, with checks: its trainable leaves by name, and the full size of a subsampled data
    plate.

    Raises ValueError, naming site or argument, for programs that cannot be run on ``batch``, sites that one
    program lacks, masked latents that are in use, data outside a site's support, no data plate, and global
    sites that minibatches would count repeatedly.
    """
    frozen = [p for p in pair.parameters() if not p.requires_grad]
    with poutine.trace(param_only=True) as captured:
        guide, model = _run_once(pair, batch)
    for p in frozen:
        p.requires_grad_(False)  # which Pyro's store has set, if modules register their parameters
    sites = {k: s for k, s in model.nodes.items() if s["type"] == "sample"}
    drawn = {k: s for k, s in guide.nodes.items() if s["type"] == "sample"}
    _check_sites(sites, drawn)
    programs = Programs(pair)
    with torch.random.fork_rng(), torch.no_grad(), programs.quiet():
        check_masks(programs, batch)
    for site in sites.values():
        if site["is_observed"]:
            check_observation(site, batch)
            _check_all(site, batch, loader)
    full = _full_size(sites, loader)
    leaves: dict[str, Tensor] = dict(pair.named_parameters())
    known = {id(p) for p in leaves.values()}
    for name, site in captured.trace.nodes.items():
        leaf = site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
        if id(leaf) not in known and leaf.is_leaf and leaf.requires_grad:
            leaves[name] = leaf
            known.add(id(leaf))
    if not leaves:
        exact = ", whose guide is exact as it is" if getattr(pair, "exact_guide", False) else ""
        raise ValueError(f"pair: expected parameters to train, got none in {pair.name}{exact}")
    return leaves, full


def _run_once(pair: Pair, batch: Batch) -> tuple[Any, Any]:
    """Traces of guide and model on ``batch``, the guide with validation."""
    pair.model.check(batch)
    with torch.no_grad(), pyro.validation_enabled(True):
        try:
            guide = traced(pair.guide, batch)
            with pyro.validation_enabled(False):
                model = traced(poutine.replay(pair.model, trace=guide), batch)
        except RuntimeError as error:
            shapes = {k: (tuple(v.shape), str(v.dtype)) for k, v in batches.parts(batch, "batch").items()}
            raise ValueError(
                f"data: expected a batch that {pair.name} can be run on, got shapes and types {shapes}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return prune_subsample_sites(guide), prune_subsample_sites(model)


def _check_sites(sites: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    latent = {k: s for k, s in sites.items() if not s["is_observed"]}
    for name, site in drawn.items():
        if name not in latent and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide site {name!r} is missing in the model, whose latent sites are {sorted(latent)}"
            )
    for name, site in latent.items():
        if name not in drawn and not site["infer"].get("enumerate"):
            raise ValueError(f"model site {name!r} is missing in the guide, which draws {sorted(drawn)}")
    if len(latent) == len(sites):
        raise ValueError("the model observes nothing: its last sites must be pyro.sample(..., obs=y)")


def _full_size(sites: Mapping[str, Any], loader: Minibatches) -> int | None:
    """The full size of the data plate where it is subsampled; ValueError where minibatches would be wrong."""
    frames = [f for s in sites.values() for f in s["cond_indep_stack"] if f.name == PLATE]
    if not frames:
        raise ValueError(
            f'the model has no plate {PLATE!r}: write `with pyro.plate("{PLATE}", len(y)):` around the '
            f"sites of one datum"
        )
    frame = frames[0]
    full = frame.size if frame.full_size is None else frame.full_size
    subsampled = full != frame.size
    outside = [k for k, s in sites.items() if not any(f.name == PLATE for f in s["cond_indep_stack"])]
    if outside and not subsampled and not loader.whole:
        raise ValueError(
            f"site {outside[0]!r} stands outside the plate {PLATE!r} and would be counted once a "
            "minibatch: declare the full size, "
            f'pyro.plate("{PLATE}", N, subsample_size=len(y)), or train on one batch of all data (batch_size)'
        )
    return full if subsampled else None


def _check_all(site: Any, batch: Batch, loader: Minibatches) -> None:
    """Check a whole part of the data, where it is in memory, against the support of the site that observes
    it.
    """
    name = observed_part(site, batch)
    if name is None or loader.tensors is None:
        return
    whole = batches.parts(loader.tensors)[name].reshape(-1, *site["value"].shape[1:])
    support = observed_support(site["fn"])
    try:
        support.check(whole[:1])
    except RuntimeError:
        return  # the support's bounds differ by datum
    check_support(site["name"], type(site["fn"]).__name__, support, whole)


def trainable(pair: Pair, leaves: dict[str, Tensor], freeze: Sequence[str]) -> dict[str, Tensor]:
    """The leaves that require gradients and belong to no frozen part; ValueError for unknown parts or if none
    is left.
    """
    frozen = {id(p) for name in freeze for p in pair.part(name).values()}
    trained = {k: p for k, p in leaves.items() if id(p) not in frozen and p.requires_grad}
    if not trained:
        raise ValueError(f"freeze: expected to leave parameters to train, got {tuple(freeze)}")
    return trained


def parameters_of(
    updates: Mapping[str, Update], pair: Pair, trained: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The trained parameters of each update; updates without any are left out. ValueError where two share
    one.
    """
    owners: dict[str, str] = {}
    found = {}
    for name, update in updates.items():
        if update.parts is None:
            own = trained
        else:
            members = {id(p) for part in update.parts for p in pair.part(part).values()}
            own = {k: p for k, p in trained.items() if id(p) in members}
        for key in own:
            if key in owners:
                raise ValueError(
                    f"objective: expected updates with parts of their own, got {key!r} in {owners[key]!r} "
                    f"and {name!r}"
                )
            owners[key] = name
        if own:
            found[name] = own
    if not found:
        raise ValueError(
            f"objective: expected updates of trainable parameters, got {list(updates)}, all frozen"
        )
    return found

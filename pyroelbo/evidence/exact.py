"""The exact evidence: a closed form or dynamic program if the pair has one, else enumeration of finite
latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.evaluation.enumeration import (
    enumerate_latents,
    log_evidence_of_all,
    log_evidence_of_each,
)
from pyroelbo.evaluation.precision import double, in_double
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.pair import ExactPair, Pair, evaluation_mode, unregistered
from pyroelbo.results import Bound

__all__ = ["exact"]


@torch.no_grad()
def exact(pair: Pair, y: Any, *, scope: str = "datum") -> Bound:
    """ln p(y) of each datum, [B], in nats: ``pair.log_evidence`` of an :class:`ExactPair`, else by
    enumeration.

    Enumeration works for any pair all of whose latents are finite and discrete: they are summed in log space
    by eliminating one latent after the other, so that chains and trees cost what their dynamic program costs.
    With ``scope="joint"`` the value is ln p(y) of the whole batch: what ``log_evidence`` returns as one
    number, or the sum over data; latents outside the data plate are eliminated too. Where that is no dynamic
    program (data that depend on one another), the values of all latents are summed one by one. Everything is
    computed in float64, whatever the type of parameters and data, on the CPU if their device has no float64.
    Raises :class:`Unavailable` for continuous
    latents, and for more than a million values one by one.
    """
    if scope not in ("datum", "joint"):
        raise ValueError(f"scope: expected 'datum' or 'joint', got {scope!r}")
    batch = batches.as_batch(y, "y", scope)
    size = batches.size(batch)
    with in_double(pair) as place:
        batch = double(batches.to(batch, place))
        if not isinstance(pair, ExactPair):
            value, cost = _enumerated(pair, batch, scope)
        else:
            with evaluation_mode(pair), unregistered():
                value, cost = batches.call(pair.log_evidence, batch), size
    if isinstance(pair, ExactPair) and value.shape != (size,) and (scope == "datum" or value.shape != ()):
        raise ValueError(
            f"{type(pair).__name__}.log_evidence: expected shape ({size},)"
            f"{' or one number' if scope == 'joint' else ''}, got {tuple(value.shape)}"
        )
    value = value.double().sum() if scope == "joint" else value.double()
    return Bound("exact", value, torch.zeros_like(value), "exact", scope, cost=cost)


def _enumerated(pair: Pair, batch: batches.Batch, scope: str) -> tuple[Tensor, int]:
    """ln p(y) by eliminating one latent after the other; where that is no dynamic program, a joint value of
    data that depend on one another by summing over the values of all latents together."""
    if scope == "datum":
        return log_evidence_of_each(pair, batch)
    try:
        graph, _ = enumerate_latents(pair, batch, scope=scope)
        return graph.log_partition(), batches.size(batch) * graph.states
    except ValueError as error:
        try:
            return log_evidence_of_all(pair, batch)
        except Unavailable as reason:
            raise reason from error

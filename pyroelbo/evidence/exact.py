"""The evidence exactly: closed form or dynamic program where the pair has one, else enumeration of finite
latents."""

from __future__ import annotations

from typing import Any

import torch

from pyroelbo import data as batches
from pyroelbo.enumeration import enumerate_latents
from pyroelbo.pair import ExactPair, Pair, evaluation_mode, unregistered
from pyroelbo.records import Bound

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
        graph = enumerate_latents(pair, batch)
        value, cost = graph.log_partition(), graph.size * graph.states
    return Bound("exact", value.double(), torch.zeros_like(value.double()), "exact", cost=cost)

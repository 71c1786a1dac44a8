"""Antithetic pairs of discrete draws, and the weights that keep their gradients unbiased."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["antithetic_pair", "log_odds_weight", "pair_weight"]

_INDEPENDENT = 0.1  # share of independent pairs: it bounds the weights by its inverse


def antithetic_pair(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Two indices [*S] with marginals ``probs`` [*S, C] that are seldom equal.

    a is the category at t, b that at 2 c_k - t (modulo 1), where t is uniform and c_k the start of a random
    category on the cumulative scale; for two categories that is (u, 1 - u). Of more than two categories, one
    pair in ten is independent, so that every two categories can meet.
    """
    starts = probs.double().cumsum(-1) - probs.double()
    t = torch.rand_like(starts[..., 0])
    if probs.shape[-1] == 2:
        reflected = 1 - t
    else:
        centre = torch.randint(probs.shape[-1], (*probs.shape[:-1], 1), device=probs.device)
        mirrored = torch.remainder(2 * starts.gather(-1, centre)[..., 0] - t, 1.0)
        reflected = torch.where(torch.rand_like(t) < _INDEPENDENT, torch.rand_like(t), mirrored)
    return _category(starts, t), _category(starts, reflected)


def _category(starts: Tensor, t: Tensor) -> Tensor:
    return (starts[..., 1:] <= t[..., None]).sum(-1)


def pair_weight(probs: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """q(a) q(b) / r(a, b) [*S] for the pairs of :func:`antithetic_pair`, r their joint probability.

    For any function f, E ½ (f(a) - f(b)) w (∇ ln q(a) - ∇ ln q(b)) = ∇ E f. Cost: O(C).
    """
    q = probs.detach().double()
    starts = q.cumsum(-1) - q
    length = [q.gather(-1, i[..., None]) for i in (a, b)]
    start = [starts.gather(-1, i[..., None]) for i in (a, b)]
    centres = torch.zeros_like(start[0]) if q.shape[-1] == 2 else starts
    # where b's arc, mirrored, begins on a's: overlap of two arcs of the circle
    gap = torch.remainder(2 * centres - start[1] - length[1] - start[0], 1.0)
    end = gap + length[1]
    overlap = (torch.minimum(length[0], end) - gap).clamp_min(0)
    overlap = overlap + torch.minimum(length[0], end - 1).clamp_min(0)
    ratio = (overlap / (length[0] * length[1])).mean(-1)
    share = 0.0 if q.shape[-1] == 2 else _INDEPENDENT
    return (1 / (share + (1 - share) * ratio)).to(probs.dtype)


def log_odds_weight(logits: Tensor) -> Tensor:
    """:func:`pair_weight` of two categories, σ(\\|logits\\|), without a quotient of small numbers."""
    return F.logsigmoid(logits.detach().abs()).exp()

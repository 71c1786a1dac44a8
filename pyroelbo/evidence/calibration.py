"""Simulation-based calibration: ranks of simulated latents among the guide's draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.numerics import positive_count
from pyroelbo.pair import Pair
from pyroelbo.results.diagnostics import Calibration

__all__ = ["calibration"]

_MAX_BINS, _MIN_PER_BIN = 20, 10


@torch.no_grad()
def calibration(
    pair: Pair, num_data: int = 1000, draws: int = 99, *, given: tuple[Tensor, ...] = (), like: Any = None
) -> Calibration:
    """Ranks of simulated latents among the guide's draws: uniform if the guide is the exact posterior.

    ``pair.simulate`` draws (z, y) from the generator; for each y the guide draws z_1 … z_L, L = ``draws``. If
    q(z | y) = p(z | y), then z is exchangeable with them, and the rank of any f(z, y) among f(z_l, y) is
    uniform on 0 … L. The quantities are the coordinates of all latents (those that never vary are left out)
    and the log joint ln p(y, z), which also detects a guide that ignores the data: the prior itself ranks
    every coordinate uniformly. Ties, as of discrete latents, are broken at random, which keeps uniformity
    exact. The p values are those of the chi-square test in bins of equal size, at most 20, with ten data or
    more each. The result shows how a guide errs on data of the model, not on yours. ``given`` and ``like``
    are those of :meth:`~pyroelbo.Pair.simulate`.

    Raises :class:`Unavailable` for a model without latents, ValueError for too few data or draws to make two
    bins, and as
    :class:`~pyroelbo.evaluation.evaluator.Evaluator` does. Cost: ``num_data`` · (2 ``draws`` + 1)
    evaluations.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018); Modrák et al. (2023) for the log joint.
    """
    positive_count("num_data", num_data)
    positive_count("draws", draws)
    most = min(_MAX_BINS, num_data // _MIN_PER_BIN)
    bins = max((b for b in range(2, most + 1) if (draws + 1) % b == 0), default=1)
    if bins < 2:
        raise ValueError(
            f"num_data, draws: expected at least two bins of {_MIN_PER_BIN} data with equally many ranks, "
            f"got {num_data} data and {draws} draws. Use at least 20 data, and a number of draws such as 99"
        )
    latents, batch = pair.simulate(num_data, *given, like=like)
    evaluator = Evaluator(pair, batch)
    evaluator.refuse_empty()
    evaluator.refuse_scales("calibration")
    guessed = evaluator.sample(draws).latents
    names, ranks, everything = [], [], {}
    for name, site in evaluator.latents.items():
        true = latents[name].reshape(1, *site.plate_shape, evaluator.size, *site.event_shape)
        both = torch.cat([true.to(guessed[name].dtype), guessed[name]])
        everything[name] = both
        flat = both.movedim(1 + len(site.plate_shape), 1).reshape(draws + 1, evaluator.size, -1)
        for d in range(flat.shape[-1]):
            if bool((flat[..., d] != flat[0, 0, d]).any()):
                names.append(name if flat.shape[-1] == 1 else f"{name}[{d}]")
                ranks.append(_rank(flat[..., d].double(), 0.0))
    log_joint = evaluator.in_chunks(evaluator.log_joint, everything)
    names.append("log joint")
    # The same point may be rounded differently elsewhere in a pass.
    tolerance = (
        100
        * torch.finfo(evaluator.layout.dtype).eps
        * (1 + float(log_joint.abs().nan_to_num(posinf=0).max()))
    )
    ranks.append(_rank(log_joint, tolerance))
    table = torch.stack(ranks, 1)
    counts = torch.stack([torch.bincount(r * bins // (draws + 1), minlength=bins) for r in table.T])
    expected = num_data / bins
    square = (counts - expected).square().sum(1).double() / expected
    p_values = torch.special.gammaincc(torch.full_like(square, (bins - 1) / 2), square / 2)
    return Calibration(pair.name, tuple(names), draws, table, counts, p_values)


def _rank(values: Tensor, tolerance: float) -> Tensor:
    """Rank of values[0] among the others [L, N], ties within ``tolerance`` broken at random, [N]."""
    true, others = values[0], values[1:]
    below = (others < true - tolerance).sum(0)
    ties = ((others - true).abs() <= tolerance).sum(0)
    return below + (
        torch.rand(len(true), device=true.device, dtype=torch.float64) * (ties + 1)
    ).long().clamp_max(ties)

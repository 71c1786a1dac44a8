"""Learning-rate schedules by name, one row a schedule, and warm-ups of the KL weight."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "Schedule", "warmup"]

Schedule = Callable[[float], float]

# name: (number of epochs) -> factor on the learning rate as a function of the epoch, a float
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "constant": lambda epochs: lambda epoch: 1.0,
    "cosine": lambda epochs: lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))),
}


def warmup(epochs: float, period: float | None = None) -> Schedule:
    """A KL weight that rises from 0 to 1 over ``epochs`` and stays there; with a ``period`` (in epochs) it
    begins anew after each. For ``fit(kl_weight=warmup(5, period=10))``.

    Source: Bowman et al. (2016); Fu, Li, Liu, Gao, Celikyilmaz and Carin (2019) for cycles.
    """
    if not epochs > 0:
        raise ValueError(f"epochs: expected a positive number, got {epochs!r}")
    if period is not None and not period >= epochs:
        raise ValueError(f"period: expected at least the {epochs} epochs of the rise, got {period!r}")
    return lambda epoch: min(1.0, (epoch if period is None else epoch % period) / epochs)

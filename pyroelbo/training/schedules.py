"""Learning-rate schedules by name; one row a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "Schedule"]

Schedule = Callable[[float], float]

# name: (number of epochs) -> factor on the learning rate as a function of the epoch, a float
SCHEDULES: dict[str, Callable[[int], Schedule]] = {
    "constant": lambda epochs: lambda epoch: 1.0,
    "cosine": lambda epochs: lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0))),
}

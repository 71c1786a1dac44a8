"""Update rules by name, and what their steps share: gradients in memory order, moving averages of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPTIMIZERS", "aligned", "averaging"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def averaging(decay: float, clock: Any) -> Any:
    """The weight of the newest parameters in their moving average at step ``clock`` = 1, 2, …: 1 - decay, but 9/(9 + clock)
    as long as that is more, so that the first parameters are soon forgotten (after t steps their share is below (9/t)⁹,
    where decay^t would still be 0.45 after 800 steps of 0.999).

    A float for a number, a tensor for a tensor.
    """
    early = 9 / (9 + clock)
    return early.clamp(min=1 - decay) if isinstance(early, Tensor) else max(1 - decay, early)


def aligned(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter. Torch's fused optimizers on the CPU take that for granted, and
    would else give every number another's update; convolutions do hand back gradients in another order."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)

"""A training step in eager torch, and several updates in one step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyroelbo.optim import Reduction, TrainingStep, UpdateRule
from pyroelbo.runs import group

__all__ = ["EagerStep", "UpdateSequence"]


class EagerStep(TrainingStep):
    """:class:`~pyroelbo.optim.TrainingStep` on eager gradients of ``objective.differentiable_loss(model,
    guide, *batch)``.

    Gradients are taken for ``parameters`` only: no backward pass is spent on others. ``rule`` are fields of
    :class:`~pyroelbo.optim.UpdateRule`.
    """

    def __init__(
        self,
        objective: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        parameters: Mapping[str, Tensor],
        *,
        lr: float = 1e-3,
        buffers: Mapping[str, Tensor] | None = None,
        reduce: Reduction | None = None,
        **rule: Any,
    ) -> None:
        super().__init__(parameters, UpdateRule(**rule), lr, buffers, reduce)
        self.objective, self._model, self._guide = objective, model, guide

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        torch.clear_autocast_cache()  # a caller's autocast keeps casts of the weights of the previous step
        loss = self.objective.differentiable_loss(self._model, self._guide, *args, **kwargs)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        found = zip(self.parameters, gradients, strict=True)
        self.update({name: g for name, g in found if g is not None})
        return loss.detach()


class UpdateSequence:
    """Updates by name, one after another, each with a loss and parameters of its own: one step of training.

    ``times[name]`` repeats an update within the step. ``sequence(*batch)`` returns the losses before each
    (last) update, [number of updates]. The other members merge those of the updates.
    """

    def __init__(self, updates: Mapping[str, TrainingStep], times: Mapping[str, int]) -> None:
        self.updates, self.times = dict(updates), dict(times)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        losses = []
        for name, update in self.updates.items():
            for _ in range(self.times[name]):
                loss = update(*args, **kwargs)
            losses.append(loss)
        return torch.stack(losses)

    @property
    def lr(self) -> float:
        return next(iter(self.updates.values())).lr

    @lr.setter
    def lr(self, value: float) -> None:
        for update in self.updates.values():
            update.lr = value

    @property
    def averages(self) -> dict[str, Tensor]:
        return {k: v for update in self.updates.values() for k, v in update.averages.items()}

    @property
    def skipped(self) -> int:
        return sum(int(update.skipped) for update in self.updates.values())

    def state_dict(self) -> dict[str, Tensor]:
        """The updates' states, each under the update's name."""
        return {f"{n}/{k}": v for n, update in self.updates.items() for k, v in update.state_dict().items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`; ValueError for the state of other updates."""
        for name, update in self.updates.items():
            update.load_state_dict(group(tensors, f"{name}/"))

"""One training step in eager torch, with the face of :class:`~pyroelbo.compiled.CompiledStep`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyroelbo.optim import OPTIMIZERS, aligned, averaging
from pyroelbo.runs import group

__all__ = ["EagerStep"]


class EagerStep:
    """loss ← objective; θ ← optimizer(θ, clip(∇loss)); θ̄ ← (1 - a)·θ̄ + a·θ, a by :func:`averaging`.

    ``step(*batch)`` returns the loss before the update, a detached tensor []. Gradients are taken for ``parameters`` alone:
    others that the loss reaches stay as they are, and no backward pass is spent on them. Where the whole gradient is longer
    than ``skip_norm``, or not finite, parameters and optimizer stay as they are, and ``skipped`` counts it. ``buffers``, by
    name, are averaged as the parameters are.
    """

    def __init__(
        self,
        objective: Any,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        parameters: Mapping[str, Tensor],
        *,
        optimizer: str = "adam",
        lr: float = 1e-3,
        clip_norm: float | None = None,
        skip_norm: float | None = None,
        ema: float | None = None,
        buffers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.objective, self._model, self._guide = objective, model, guide
        self.parameters = dict(parameters)
        self._leaves = list(self.parameters.values())
        self._optimizer = OPTIMIZERS[optimizer](self._leaves, lr=lr, fused=True)
        self._clip_norm, self._skip_norm, self._ema = clip_norm, skip_norm, ema
        self.skipped = torch.zeros(())
        self._clock = 0
        self._averaged = {} if ema is None else {**self.parameters, **(buffers or {})}
        self.averages = {n: t.detach().clone() for n, t in self._averaged.items()}

    @property
    def lr(self) -> float:
        return self._optimizer.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for settings in self._optimizer.param_groups:
            settings["lr"] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        torch.clear_autocast_cache()  # under a caller's autocast it holds casts of the weights of the step before
        loss = self.objective.differentiable_loss(self._model, self._guide, *args, **kwargs)
        gradients = torch.autograd.grad(loss, self._leaves, allow_unused=True)
        for leaf, gradient in zip(self._leaves, gradients, strict=True):
            leaf.grad = None if gradient is None else aligned(gradient, leaf)
        take = True
        if self._clip_norm is not None or self._skip_norm is not None:
            most = math.inf if self._clip_norm is None else self._clip_norm
            norm = nn.utils.clip_grad_norm_(self._leaves, most, foreach=True)
            take = self._skip_norm is None or bool(norm <= self._skip_norm)
        if take:
            self._optimizer.step()
        else:
            self.skipped += 1
        for leaf in self._leaves:
            leaf.grad = None
        self._clock += int(take)
        if self._ema is not None:
            weight = averaging(self._ema, self._clock)
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averages.values()), list(self._averaged.values()), weight)
        return loss.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """Optimizer and averages as one flat dict of tensors."""
        state = self._optimizer.state_dict()["state"]
        flat = {
            f"{k}.{i}": v for i, values in state.items() for k, v in values.items() if isinstance(v, Tensor)
        }
        flat |= {"skipped": self.skipped} if self._skip_norm is not None else {}
        flat |= {"clock": torch.tensor(self._clock)} if self.averages else {}
        return flat | {f"ema.{n}": v for n, v in self.averages.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state_dict`; ValueError for averages of other parameters."""
        averages = group(tensors, "ema.")
        if averages.keys() != self.averages.keys():
            odd = sorted(averages.keys() ^ self.averages.keys())[0]
            raise ValueError(f"tensors: the average of {odd!r} is missing or unknown")
        # Checkpoints of before there was a clock have Adam's.
        self._clock = int(tensors.get("clock", tensors.get("step.0", 0)))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key == "skipped":
                self.skipped.copy_(value)
            elif key != "clock" and not key.startswith("ema."):
                name, index = key.rsplit(".", 1)
                state.setdefault(int(index), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        with torch.no_grad():
            for name, average in self.averages.items():
                average.copy_(averages[name])

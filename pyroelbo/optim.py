"""The parameter update of eager and compiled training steps: rule, state, clipping, averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["OPTIMIZERS", "TrainingStep", "UpdateRule", "aligned", "averaging"]

# The state that each optimizer keeps for a parameter.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum",),
}

_FUSED = {"adam": torch._fused_adam_, "adamw": torch._fused_adamw_}

Reduction = Callable[[list[Tensor]], list[Tensor]]


def averaging(decay: float, clock: Any) -> Any:
    """Weight of the newest parameters in their moving average at step ``clock`` = 1, 2, …

    max(1 - decay, 9/(9 + clock)): the initial parameters are forgotten quickly (after t steps their share is
    below (9/t)⁹, where decay^t is still 0.45 after 800 steps of 0.999). A float for a number, a tensor for a
    tensor.
    """
    early = 9 / (9 + clock)
    return early.clamp(min=1 - decay) if isinstance(early, Tensor) else max(1 - decay, early)


def aligned(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient in the memory order of its parameter.

    Torch's fused CPU optimizers ignore strides and would apply each entry's update to another entry;
    convolutions return gradients in another memory order.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


@dataclass(frozen=True)
class UpdateRule:
    """How a gradient changes the parameters.

    Args:
        optimizer: "adam", "adamw" or "sgd", with the formulas of torch.optim.
        betas: decay rates of adam's and adamw's two moment estimates.
        eps: added to the root of the second moment.
        weight_decay: L2 for adam and sgd, decoupled for adamw; None is torch's default, 0.01 for adamw, else
            0.
        momentum: of sgd.
        nesterov: Nesterov momentum, of sgd.
        clip_norm: bound on the Euclidean norm of the whole gradient, or None.
        skip_norm: a step whose gradient is longer than this, or not finite, is left out (Child, 2021); or
            None.
        ema: decay of the moving average of the parameters, or None.

    Raises ValueError, naming the field, for values out of range.
    Sources: Kingma and Ba (2015), algorithm 1; Loshchilov and Hutter (2019), algorithm 2.
    """

    optimizer: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | None = None
    momentum: float = 0.0
    nesterov: bool = False
    clip_norm: float | None = None
    skip_norm: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer: expected one of {tuple(OPTIMIZERS)}, got {self.optimizer!r}")
        for name in ("clip_norm", "skip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: expected a positive number or None, got {value!r}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1) or None, got {self.ema!r}")
        if self.nesterov and self.momentum <= 0:
            raise ValueError(f"nesterov: expected a positive momentum with it, got {self.momentum!r}")

    @property
    def decay(self) -> float:
        """The weight decay in force."""
        if self.weight_decay is not None:
            return self.weight_decay
        return 0.01 if self.optimizer == "adamw" else 0.0

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state kept for each parameter."""
        return OPTIMIZERS[self.optimizer] if self.optimizer != "sgd" or self.momentum else ()


class TrainingStep(ABC):
    """loss ← objective; θ ← optimizer(θ, clip(∇loss)); θ̄ ← (1 - a)·θ̄ + a·θ, a by :func:`averaging`
    (abstract).

    ``step(*batch)`` returns the loss before the update, a detached tensor []. Only ``parameters`` change;
    others that the loss depends on stay as they are. A parameter without a gradient is not updated. All
    parameters share one clock. ``buffers`` (BatchNorm's running statistics), by name, are averaged like the
    parameters.

    ``reduce`` is called with the list of gradients between the backward pass and clipping, and returns the
    gradients to use: the place to average over processes.

    ``averages`` are the moving averages by name (empty without ``rule.ema``), ``skipped`` counts the steps
    left out. The state's layout does not depend on the subclass. Memory: two tensors a parameter for adam,
    one for sgd with momentum, one more with ``ema``.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rule: UpdateRule,
        lr: float,
        buffers: Mapping[str, Tensor] | None,
        reduce: Reduction | None,
    ) -> None:
        if not parameters:
            raise ValueError("parameters: expected a mapping from names to leaf tensors, got none")
        for name, p in parameters.items():
            if not (isinstance(p, Tensor) and p.is_leaf and p.requires_grad):
                raise ValueError(f"parameters[{name!r}]: expected a leaf tensor that requires a gradient")
        self.parameters, self.rule, self.reduce = dict(parameters), rule, reduce
        first = next(iter(self.parameters.values()))
        exact = torch.float32 if first.device.type == "mps" else torch.float64
        self._clock = torch.zeros((), device=first.device, dtype=torch.float32)
        self._lr = torch.zeros((), device=first.device, dtype=exact)
        self.lr = lr
        self.skipped = torch.zeros((), device=first.device, dtype=torch.float32)
        self._slots = {
            slot: {n: torch.zeros_like(p, requires_grad=False) for n, p in self.parameters.items()}
            for slot in rule.slots
        }
        self._buffers = {} if rule.ema is None or buffers is None else dict(buffers)
        averaged = {} if rule.ema is None else {**self.parameters, **self._buffers}
        self.averages = {n: t.detach().clone() for n, t in averaged.items()}

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step on a batch: the loss before the update, a detached tensor []."""

    @property
    def lr(self) -> float:
        """The learning rate; assigning writes it into a tensor, so that no graph is retraced."""
        return float(self._lr)

    @lr.setter
    def lr(self, value: float) -> None:
        if not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"lr: expected a non-negative number, got {value!r}")
        self._lr.fill_(value)

    def update(self, gradients: Mapping[str, Tensor]) -> None:
        """Apply the rule to gradients by parameter name, and average the buffers."""
        self._apply(gradients)
        self._average_buffers()

    @torch.no_grad()
    def _apply(self, gradients: Mapping[str, Tensor]) -> None:
        names = list(gradients)
        found = list(gradients.values())
        found = found if self.reduce is None else self.reduce(found)
        norm = skip = None
        if found and (self.rule.clip_norm is not None or self.rule.skip_norm is not None):
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
        if norm is not None and self.rule.skip_norm is not None:
            skip = (~(norm <= self.rule.skip_norm)).float()
        if norm is not None and self.rule.clip_norm is not None:
            found = torch._foreach_mul(found, (self.rule.clip_norm / (norm + 1e-6)).clamp(max=1.0))  # type: ignore[assignment]
        self._fused_update([self.parameters[n] for n in names], found, self._state_of(names), skip)

    def _state_of(self, names: list[str]) -> list[Tensor]:
        """Clock, learning rate, then the slots and averages of the named parameters, slot by slot."""
        state = [self._clock, self._lr]
        for slot in (*self._slots.values(), *([self.averages] if self.averages else [])):
            state += [slot[name] for name in names]
        return state

    @staticmethod
    def _split(state: list[Tensor], size: int) -> list[list[Tensor]]:
        """The slots in what :meth:`_state_of` gave for ``size`` parameters."""
        return [state[2 + i * size : 2 + (i + 1) * size] for i in range((len(state) - 2) // max(size, 1))]

    def _fused_update(
        self, params: list[Tensor], gradients: list[Tensor], state: list[Tensor], skip: Tensor | None
    ) -> None:
        """The update after clipping, by torch's fused kernels, which do nothing where ``skip`` is 1."""
        rule = self.rule
        clock, lr = state[:2]
        slots = self._split(state, len(params))
        gradients = [aligned(g, p) for g, p in zip(gradients, params, strict=True)]
        clock.add_(1 if skip is None else 1 - skip)
        if skip is not None:
            self.skipped.add_(skip)
        rate: Any = lr.float() if lr.is_cuda else lr.item()  # the CUDA kernels read a float32
        if rule.optimizer == "sgd":
            torch._fused_sgd_(
                params,
                gradients,
                slots[0] if rule.momentum else [],
                weight_decay=rule.decay,
                momentum=rule.momentum,
                lr=rate,
                dampening=0.0,
                nesterov=rule.nesterov,
                maximize=False,
                is_first_step=False,
                found_inf=skip,
            )
        else:
            _FUSED[rule.optimizer](
                params,
                gradients,
                slots[0],
                slots[1],
                [],
                [clock] * len(params),
                lr=rate,
                beta1=rule.betas[0],
                beta2=rule.betas[1],
                weight_decay=rule.decay,
                eps=rule.eps,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )
        if rule.ema is not None:
            self._average(slots[-1], params)

    def _average_buffers(self) -> None:
        if self._buffers:
            self._average([self.averages[name] for name in self._buffers], list(self._buffers.values()))

    @torch.no_grad()
    def _average(self, averages: list[Tensor], tensors: list[Tensor]) -> None:
        newest = averaging(self.rule.ema or 0.0, self._clock.to(self._lr.dtype))
        if newest.is_cuda:  # nothing waits for the device
            torch._foreach_lerp_(averages, tensors, [newest.to(t.dtype) for t in tensors])
        else:
            torch._foreach_lerp_(averages, tensors, newest.item())

    def state_dict(self) -> dict[str, Tensor]:
        """The step's state as one flat dict of copied tensors: "step", "lr", "exp_avg.NAME", "ema.NAME", …"""
        return {name: t.detach().clone() for name, t in self._named_state()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values of :meth:`state_dict` back in place; ValueError where names or shapes differ."""
        own = dict(self._named_state())
        if own.keys() != tensors.keys():
            odd = sorted(own.keys() ^ tensors.keys())[0]
            raise ValueError(f"tensors: expected the keys of state_dict(), got {odd!r} missing or unknown")
        for name, t in own.items():
            if t.shape != tensors[name].shape:
                raise ValueError(
                    f"tensors[{name!r}]: expected shape {tuple(t.shape)}, got {tuple(tensors[name].shape)}"
                )
        with torch.no_grad():
            for name, t in own.items():
                t.copy_(tensors[name])

    def _named_state(self) -> list[tuple[str, Tensor]]:
        named = [("step", self._clock), ("lr", self._lr)]
        if self.rule.skip_norm is not None:
            named.append(("skipped", self.skipped))
        for slot, tensors in (*self._slots.items(), ("ema", self.averages)):
            named += [(f"{slot}.{name}", t) for name, t in tensors.items()]
        return named

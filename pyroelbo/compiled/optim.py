"""A Pyro optimizer that steps all parameters at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["FusedOptim"]


class FusedOptim(PyroOptim):
    """A drop-in for ``pyro.optim.PyroOptim``: one torch optimizer for all parameters.

    ``FusedOptim(torch.optim.Adam, {"lr": 1e-3})``. ``optim_args`` may be a function of the parameter's name
    that returns such a dict, and ``clip_args`` is PyroOptim's (its norms are per parameter). Torch's fused
    kernels are used where the optimizer has them. As in Pyro, a parameter that is in the step's trace without
    a gradient is stepped with a zero gradient if it has had one before, and is skipped otherwise; one that
    returns to the store, as after ``scope()``, goes on with its state. Gradients are released after the step.
    ``get_state`` and ``set_state`` use PyroOptim's format, by parameter name, so that each can read the
    other's; ``load`` reads tensors and plain values only. ``optimizer`` is the torch optimizer (None before
    the first step), for schedulers or for setting ``param_groups[i]["lr"]``.
    """

    def __init__(
        self,
        optim_constructor: Callable[..., torch.optim.Optimizer],
        optim_args: dict[str, Any] | Callable[..., dict[str, Any]],
        clip_args: dict[str, Any] | Callable[..., dict[str, Any]] | None = None,
    ):
        if not (inspect.isclass(optim_constructor) and issubclass(optim_constructor, torch.optim.Optimizer)):
            raise TypeError(
                f"optim_constructor: expected a class such as torch.optim.Adam, got {optim_constructor!r}"
            )
        if not (callable(optim_args) or isinstance(optim_args, dict)):
            raise TypeError(
                f"optim_args: expected a dict or a function of a name, got {type(optim_args).__name__}"
            )
        super().__init__(optim_constructor, optim_args, clip_args)
        self._can_fuse = "fused" in inspect.signature(optim_constructor).parameters
        self.optimizer: torch.optim.Optimizer | None = None
        self._known: dict[Tensor, str] = {}
        self._trained: set[Tensor] = set()
        self._left = WeakTensorKeyDictionary()  # the states of parameters that another took the name of

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step every parameter in ``params`` that has a gradient, or has had one in an earlier step."""
        known = self._known
        params = list(params)
        new = [p for p in params if p not in known]
        if new:
            self._admit(new)
        for p in params:
            if p.grad is None:
                p.grad = torch.zeros_like(p) if p in self._trained else None
            elif p not in self._trained:
                self._trained.add(p)
                self._start_momentum(p)
        if self.pt_clip_args:
            for p in params:
                if p.grad is not None and self.grad_clip[p] is not None:
                    self.grad_clip[p](p)
        absent = []
        if len(params) != len(known):
            given = set(params)
            absent = [(p, p.grad) for p in known if p not in given]
        for p, _ in absent:
            p.grad = None
        if self.optimizer is not None:  # None before the first parameter: a program may have none at all
            self.optimizer.step(*args, **kwargs)
        for p in params:
            p.grad = None
        for p, gradient in absent:
            p.grad = gradient

    def _admit(self, new: list[Tensor]) -> None:
        names = pyro.get_param_store()._param_to_name
        new.sort(key=lambda p: names.get(p, ""))
        replaced = {names[p] for p in new if p in names}
        for p in [p for p, name in self._known.items() if name in replaced and names.get(p) != name]:
            self._forget(p)
        for p in new:
            self._known[p] = names.get(p, "")
            self.grad_clip[p] = self._get_grad_clip(p) if self.pt_clip_args else None
        groups: dict[str, dict[str, Any]] = {}
        for p in new:
            options = dict(self._get_optim_args(p))
            if self._can_fuse and not options.get("foreach") and not options.get("differentiable"):
                options.setdefault("fused", _fusable(p) and not options.get("dampening"))
            groups.setdefault(repr(sorted(options.items())), {**options, "params": []})["params"].append(p)
        for group in groups.values():
            if self.optimizer is None:
                options = {k: v for k, v in group.items() if k != "params"}
                self.optimizer = self.pt_optim_constructor(group["params"], **options)
            else:
                self._join(group)
        for p in new:
            if p in self._left:
                self._trained.add(p)
                self.optimizer.state[p] = self._left.pop(p)  # type: ignore[union-attr]
            waiting = self._state_waiting_to_be_consumed.pop(self._known[p], None)
            if waiting is not None:
                self._restore(p, waiting)

    def _start_momentum(self, p: Tensor) -> None:
        """Start the momentum at 0: torch's fused SGD fails where only some parameters have one yet."""
        assert self.optimizer is not None
        if not isinstance(self.optimizer, torch.optim.SGD) or self.optimizer.state[p]:
            return
        for group in self.optimizer.param_groups:
            if group["momentum"] and group.get("fused") and any(q is p for q in group["params"]):
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def _join(self, group: dict[str, Any]) -> None:
        assert self.optimizer is not None
        for existing in self.optimizer.param_groups:
            if all(existing.get(k) == v for k, v in group.items() if k != "params"):
                existing["params"].extend(group["params"])
                return
        self.optimizer.add_param_group(group)

    def _forget(self, p: Tensor) -> None:
        del self._known[p]
        self.grad_clip.pop(p, None)
        assert self.optimizer is not None
        state = self.optimizer.state.pop(p, {})
        if p in self._trained:
            self._trained.discard(p)
            self._left[p] = state
        for group in self.optimizer.param_groups:
            group["params"] = [q for q in group["params"] if q is not p]

    def _restore(self, p: Tensor, saved: dict[str, Any]) -> None:
        assert self.optimizer is not None
        for value in saved["state"].values():
            self.optimizer.state[p] = {
                k: v.detach().clone().to(p.device) if isinstance(v, Tensor) else v for k, v in value.items()
            }
        for group in self.optimizer.param_groups:
            if any(q is p for q in group["params"]):
                group.update(
                    {
                        k: v
                        for k, v in saved["param_groups"][0].items()
                        if k not in ("params", "fused", "foreach")
                    }
                )

    def get_state(self) -> dict[str, Any]:
        """Optimizer state by parameter name: {name: {"state": {0: ...}, "param_groups": [...]}}."""
        state: dict[str, Any] = {}
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            plain = {k: v for k, v in group.items() if k != "params"}
            for p in group["params"]:
                value = {
                    k: v.detach().clone() if isinstance(v, Tensor) else v
                    for k, v in self.optimizer.state.get(p, {}).items()  # type: ignore[union-attr]
                }
                state[self._known[p]] = {
                    "state": {0: value} if value else {},
                    "param_groups": [{**plain, "params": [0]}],
                }
        return state

    def set_state(self, state_dict: dict[str, Any]) -> None:
        """Load the state of ``get_state``; parameters not seen yet get theirs at their first step."""
        super().set_state(state_dict)
        for p, name in self._known.items():
            waiting = self._state_waiting_to_be_consumed.pop(name, None)
            if waiting is not None:
                self._restore(p, waiting)

    def load(self, filename: str, map_location: Any = None) -> None:
        """Read a file of ``save``; only tensors and plain values are loaded, anything else is refused."""
        with open(filename, "rb") as file:
            self.set_state(torch.load(file, map_location=map_location, weights_only=True))


def _fusable(p: Tensor) -> bool:
    return p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps", "xpu")

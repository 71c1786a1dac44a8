"""A captured loss: its graph, where its inputs live, and when it is valid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, NamedTuple

import pyro
import torch
import torch.fx as fx
from torch import Tensor

from pyroelbo.compiled.eager import FLOATS, Place
from pyroelbo.compiled.environment import Environment, at
from pyroelbo.compiled.interception import Read

__all__ = ["Change", "Plan"]

_CELL = type((lambda x: lambda: x)(0).__closure__[0])  # type: ignore[index]


class Change(NamedTuple):
    """What has changed, and the line that reads it if a graph might follow it."""

    what: str
    where: str | None = None


class Guards:
    """Values that Python code read while the loss was traced: the graph holds while they are the same."""

    def __init__(self) -> None:
        self.tensors: fx.GraphModule | None = None
        self.expected: list[Tensor] = []
        self.reads: list[Read] = []
        self.numbers: list[tuple[Callable[[Sequence[float]], Any], Any]] = []

    def failed(self, inputs: Sequence[Tensor], numbers: Sequence[float]) -> Change | None:
        """What the first changed value is, or None where all hold."""
        for expression, result in self.numbers:
            if expression(numbers) != result:
                return Change("a comparison of a Python number")
        if self.tensors is not None:
            with torch.no_grad():
                found = self.tensors(*inputs)
            for t, expected, read in zip(found, self.expected, self.reads, strict=True):
                if not torch.equal(t, expected):
                    what = f"the value of a tensor that Python code reads at {read.where}"
                    return Change(what, None if read.compared else read.where)
        return None

    def lines(self) -> set[str]:
        """The lines whose values are guards."""
        return {read.where for read in self.reads if not read.compared}


class Plan:
    """A captured loss: ``graph(*data, *state) -> [loss, *gradients]``, and where its inputs live.

    ``data`` are the tensor arguments and then one 0-dim float64 tensor for each lifted Python float. State
    are the parameters, buffers and other tensors that the model reads; each call looks them up again in the
    param store or where the model finds them, so replaced tensors are followed. ``read`` are the lifted
    floats whose value the graph holds as a constant all the same.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        num_data: int,
        state: list[Tensor],
        leaves: list[int],
        sites: list[str],
        environment: Environment,
        floats: Sequence[float] = (),
        lifted: Sequence[Place | int] = (),
    ):
        self.graph = graph
        self.num_data = num_data
        self.leaves = leaves
        self.sites = sites
        self.environment = environment
        self.guards = Guards()
        self.lifted = list(lifted)
        self.read: set[int] = set()
        self._floats = [None if i in self.lifted else v for i, v in enumerate(floats)]
        names = {id(t): name for name, t in pyro.get_param_store()._params.items()}
        self._stored = [names[id(t)] for t in state if id(t) in names]
        self._placed = [environment.tensors[id(t)] for t in state if self._kind(t, names, environment) == 1]
        self._fixed = [t for t in state if self._kind(t, names, environment) == 2]
        self._cells = [place[0] for place in self._placed if place[1] is None and isinstance(place[0], _CELL)]
        self._mapped = [place for place in self._placed if not isinstance(place[0], _CELL)]
        # A parameter may be replaced in its module and not in the store, or the other way round.
        self._elsewhere = [
            (i, container, key)
            for i, t in enumerate(state[: len(self._stored)])
            for tensor, container, key in environment.spots
            if tensor is t
        ]
        self._constraints = [pyro.get_param_store()._constraints[name] for name in self._stored]
        self._shapes = [_layout(t) for t in state]
        self._pointers = [t.data_ptr() for t in state]
        self._last = list(state)
        self._trained = [t.requires_grad for t in state]
        self.labels = [
            names.get(id(t)) or environment.tensor_names.get(id(t)) or f"a tensor of shape {tuple(t.shape)}"
            for t in state
        ]
        self._device = next((t.device for t in state), torch.device("cpu"))

    @property
    def guarded(self) -> bool:
        """True where inputs may fit and the graph still not be valid for their values."""
        return self.guards.tensors is not None or bool(self.guards.numbers)

    @staticmethod
    def _kind(t: Tensor, names: dict[int, str], environment: Environment) -> int:
        return 0 if id(t) in names else 1 if id(t) in environment.tensors else 2

    @classmethod
    def order(cls, free: list[Tensor], environment: Environment) -> list[Tensor]:
        """The state in the order in which ``state`` looks it up."""
        names = {id(t): name for name, t in pyro.get_param_store()._params.items()}

        def rank(t: Tensor) -> tuple[int, int]:
            kind = cls._kind(t, names, environment)
            return kind, int(kind == 1 and isinstance(environment.tensors[id(t)][0], _CELL))

        return sorted(free, key=rank)

    def current(self, floats: Sequence[float]) -> bool:
        """True while no Python value that the graph holds as a constant has changed."""
        return self.environment.holds() and self.changed_float(floats) is None

    def changed_float(self, floats: Sequence[float]) -> int | None:
        """The index of the first float argument that differs from the graph's constant, or None."""
        for i, value in enumerate(self._floats):
            if value is not None and value != floats[i] and not (value != value and floats[i] != floats[i]):
                return i
        return None

    def numbers(self, floats: Sequence[float]) -> list[float] | None:
        """The lifted floats as they are now, or None where one is no float any more."""
        try:
            now = [floats[p] if isinstance(p, int) else p.get() for p in self.lifted]
        except (KeyError, IndexError, ValueError):
            return None
        return now if all(type(v) in FLOATS for v in now) else None

    def number_tensors(self, numbers: Sequence[float]) -> list[Tensor]:
        return [torch.tensor(v, dtype=torch.float64, device=self._device) for v in numbers]

    def state(self) -> list[Tensor] | None:
        """The tensors as they are now, or None where one is gone or has another layout than at capture."""
        try:
            store = pyro.get_param_store()
            now = [store._params[name] for name in self._stored]
            constraints = [store._constraints[name] for name in self._stored]
            if not all(map(_alike, constraints, self._constraints)):
                return None
            if any(at(container, key) is not now[i] for i, container, key in self._elsewhere):
                return None
            now += [container[key] for container, key in self._mapped]
            now += [cell.cell_contents for cell in self._cells]
        except (KeyError, IndexError, ValueError):
            return None
        now += self._fixed
        try:
            pointers = [t.data_ptr() for t in now]
            trained = [t.requires_grad for t in now]
        except (AttributeError, RuntimeError):  # not a tensor any more, or one without storage
            return None
        if trained != self._trained:  # frozen or thawed in place
            return None
        if pointers != self._pointers or not all(map(is_, now, self._last)):
            if [_layout(t) for t in now] != self._shapes:
                return None
            self._pointers, self._last = pointers, now
        return now

    def mutable(self) -> list[Tensor]:
        """The state that a run may write: everything but the trained leaves."""
        now = self.state() or []
        leaves = set(self.leaves)
        return [t for i, t in enumerate(now) if i not in leaves]

    def output_name(self, i: int) -> str:
        """What output ``i`` of a check is: the loss, then the gradients, then the mutable state."""
        if i == 0:
            return "the loss"
        if i <= len(self.leaves):
            return f"the gradient of {self.labels[self.leaves[i - 1]]!r}"
        leaves = set(self.leaves)
        rest = [label for k, label in enumerate(self.labels) if k not in leaves]
        return f"the buffer {rest[i - 1 - len(self.leaves)]!r}"


def _alike(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and repr(a) == repr(b))


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype, t.device

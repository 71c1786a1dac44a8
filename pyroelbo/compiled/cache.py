"""Captured and built graphs by the structure of a call, and the rules for when one may run."""

from __future__ import annotations

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from pyroelbo.compiled import build as _build
from pyroelbo.compiled.capture import capture
from pyroelbo.compiled.eager import FLOATS, Call, Place, autocasting, restored
from pyroelbo.compiled.environment import Environment, Untraceable
from pyroelbo.compiled.plan import Change, Plan
from pyroelbo.compiled.verify import Mismatch, verify

__all__ = ["CompileWarning", "Counters", "Graph", "GraphCache"]

_RECHECKS = frozenset(10**k for k in range(1, 12))
_MAX_MISSES = 20
_MAX_NEW = 64
_MAX_FAILURES = 3


class CompileWarning(UserWarning):
    """A loss runs in eager mode, or without Inductor, and the message says why."""


@dataclass
class Counters:
    """What a compiled loss has done: ``compiled_calls`` and ``eager_calls`` count evaluations, ``captures``
    traces through Pyro, ``compiles`` Inductor builds, ``checks`` comparisons with eager, ``fallbacks`` the
    structures that stay eager. Times are in seconds; ``eager_time`` and ``compiled_time`` are one call's."""

    compiled_calls: int = 0
    eager_calls: int = 0
    captures: int = 0
    compiles: int = 0
    checks: int = 0
    fallbacks: int = 0
    capture_time: float = 0.0
    compile_time: float = 0.0
    eager_time: float = math.nan
    compiled_time: float = math.nan
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        spent = self.capture_time + self.compile_time
        text = (
            f"{self.compiled_calls} compiled and {self.eager_calls} eager calls, {self.captures} captures"
            f" ({self.capture_time:.1f} s), {self.compiles} builds ({self.compile_time:.1f} s),"
            f" {self.fallbacks} fallbacks"
        )
        saved = self.eager_time - self.compiled_time
        if saved > 0 and spent > 0:
            text += f"; pays off after {math.ceil(spent / saved)} calls"
        return text


class Graph:
    """One captured, verified and built loss for one structure of input."""

    def __init__(self, plan: Plan, runner: Callable[..., list], constrained: frozenset[str]):
        self.plan = plan
        self.runner = runner
        self.constrained = constrained
        self.checked = runner
        self.calls = 0
        self.lost = False
        self.copies: tuple[int, ...] | None = None

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            if autocasting():
                with torch.autocast(inputs[0].device.type if inputs else "cpu", enabled=False):
                    outputs = list(self.runner(*inputs))
            else:
                outputs = list(self.runner(*inputs))
            if self.copies is None:
                self.copies = _shared(outputs, inputs)
            for i in self.copies:
                outputs[i] = outputs[i].clone()
        self.calls += 1
        return outputs


def _shared(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[int, ...]:
    taken = {t.untyped_storage().data_ptr() for t in inputs}
    copies = []
    for i, t in enumerate(outputs):
        pointer = t.untyped_storage().data_ptr()
        if pointer in taken:
            copies.append(i)
        taken.add(pointer)
    return tuple(copies)


class Signature(NamedTuple):
    """The structure of a call as a hashable key, its tensors, and its Python floats, both in order."""

    key: Any
    tensors: list[Tensor]
    floats: list[float]


def signature(args: tuple, kwargs: dict) -> Signature:
    """Floats enter the key by type alone: each graph says whether it holds their values as constants.

    Unhashable arguments count by identity; their contents are watched as part of the environment.
    """
    if not kwargs and all(type(a) is Tensor for a in args):
        flat: list[Any] = list(args)
        spec: Any = None
    else:
        flat, spec = pytree.tree_flatten((args, kwargs))
    key: list[Any] = [spec, torch.get_default_dtype()]
    if torch.is_autocast_enabled("cpu"):
        key.append(torch.get_autocast_dtype("cpu"))
    tensors, floats = [], []
    for x in flat:
        if isinstance(x, Tensor):
            key.append((x.shape, x.dtype, x.device, x.requires_grad))
            tensors.append(x if x.layout is not torch.strided or x.is_contiguous() else x.contiguous())
            if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
                key.append(torch.get_autocast_dtype("cuda"))
        elif type(x) in FLOATS:
            key.append(type(x))
            floats.append(x)
        else:
            key.append((type(x), x if _hashable(x) else id(x)))
    return Signature(tuple(key), tensors, floats)


def _hashable(x: Any) -> bool:
    try:
        hash(x)
    except TypeError:
        return False
    return True


@dataclass
class _Pending:
    """What the model could see in the last eager call of a structure, and the floats seen to change since."""

    environment: Environment
    floats: list[float]
    misses: int = 0
    stable: int = 0


class GraphCache:
    """Graphs by structure, at most ``max_graphs`` of them; shared by the loss and the whole step.

    With ``patient`` the first call of a structure runs in eager mode, and a graph is built at the second.
    """

    def __init__(
        self, loss: Any, backend: str, max_graphs: int, options: dict[str, Any] | None, patient: bool
    ):
        if backend not in ("inductor", "eager"):
            raise ValueError(
                f"backend: expected 'inductor' or 'eager' (the captured graph, op by op), got {backend!r}"
            )
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs: expected a positive integer, got {max_graphs!r}")
        self.loss = loss
        self.backend = backend
        self.max_graphs = max_graphs
        self.options = dict(options or {})
        self.patient = patient
        self.counters = Counters()
        self.graphs: dict[Any, list[Graph]] = {}
        self.given_up: set[Any] = set()
        self._failures: dict[Any, int] = {}
        self._pending: OrderedDict[Any, _Pending] = OrderedDict()
        # Places, arguments and lines with a number that has changed, and which of them a graph cannot follow.
        self._varying: dict[Any, list[Place | int | str]] = {}
        self._constant: dict[Any, list[Place | int | str]] = {}
        self._new = 0
        self._evictions = 0
        self._said: set[str] = set()

    def lookup(self, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict):
        """The graph for this call with its data and state, or None where eager has to run."""
        structure = signature(args, kwargs)
        key = (kind, model, guide, structure.key)
        try:
            graphs = self.graphs.get(key, ())
        except TypeError as error:
            self.give_up((kind, id(model), id(guide)), f"the model or guide is not hashable ({error})")
            return None
        failed = None
        for graph in graphs:
            plan = graph.plan
            if not plan.current(structure.floats):
                continue
            state, numbers = plan.state(), plan.numbers(structure.floats)
            if state is None and self.patient and not graph.lost:
                graph.lost = True  # as after pyro.clear_param_store(): eager makes the parameters anew
                return None
            if state is None or numbers is None:
                continue
            graph.lost = False
            data = structure.tensors + plan.number_tensors(numbers) if numbers else structure.tensors
            if plan.guarded:
                failed = plan.guards.failed([*data, *state], numbers)
                if failed is not None:
                    continue
            if graph.calls in _RECHECKS and not self._recheck(graph, key, args, kwargs):
                return None
            return graph, data, state
        if key in self.given_up or (kind, model, guide) in self.given_up:
            return None
        return self._miss(key, structure, args, kwargs, failed)

    def _miss(self, key: Any, structure: Signature, args: tuple, kwargs: dict, failed: Change | None):
        pending = self._pending.get(key)
        if self.patient and not self._settled(key, pending, structure.floats):
            return None
        if failed is not None and failed.where is not None:
            self._lift(key, failed.where)
        changed = failed.what if failed is not None else self._vary(key, structure.floats)
        if not self._room(key, changed, pending):
            return None
        try:
            graph = self._lifting(key, Call(self.loss, key[0], key[1], key[2], args, kwargs))
        except (Untraceable, Mismatch) as error:
            self._fail(key, str(error))
            return None
        state, numbers = graph.plan.state(), graph.plan.numbers(structure.floats)
        if state is None or numbers is None:
            self.give_up(key, "its state does not outlive the call")
            return None
        self._pending.pop(key, None)
        lines = {place for place in self._varying.get(key, ()) if isinstance(place, str)}
        followed = lines - graph.plan.guards.lines()
        older = [g for g in self.graphs.get(key, ()) if followed.isdisjoint(g.plan.guards.lines())]
        self.graphs[key] = [*older, graph]
        return graph, structure.tensors + graph.plan.number_tensors(numbers), state

    def _settled(self, key: Any, pending: _Pending | None, floats: list[float]) -> bool:
        """True where the model sees the same values as in the last call, up to floats that can be lifted."""
        if pending is None:
            self._new += 1
            if self._new == _MAX_NEW:
                self.give_up(
                    key,
                    "every call has another structure; define model and guide once, and keep shapes fixed",
                )
            return False
        self._new = 0
        for i, (before, now) in enumerate(zip(pending.floats, floats, strict=True)):
            if before != now:
                self._lift(key, i)
        for container, attribute in pending.environment.differences():
            self._lift_place(key, pending.environment, Place(container, attribute))
        if pending.environment.holds() or pending.environment.forgive() is None:
            pending.stable += 1
            return True
        pending.misses += 1
        pending.stable = 0
        if pending.misses > _MAX_MISSES:
            changed = pending.environment.changed()
            self.give_up(key, f"the Python value {changed!r} changes from call to call; keep it in a tensor")
        return False

    def _lift(self, key: Any, place: Place | int | str) -> None:
        if place not in self._varying.setdefault(key, []):
            self._varying[key].append(place)

    def _lift_place(self, key: Any, environment: Environment, place: Place) -> bool:
        """Note that the value at ``place`` has changed; False where it is not a float both times."""
        try:
            before, now = environment.value_before(place.container, place.key), place.get()
        except (KeyError, IndexError, ValueError, StopIteration):
            return False
        if (
            type(before) not in FLOATS
            or type(now) is not type(before)
            or place in self._constant.get(key, ())
        ):
            return False
        self._lift(key, place)
        environment.release(place.container, place.key)
        return True

    def _vary(self, key: Any, floats: list[float]) -> str | None:
        """Compare with the newest graph: lift floats that have changed since, and drop graphs that hold them
        as constants. The name of another changed value, or None."""
        known = self.graphs.get(key)
        if not known:
            return None
        plan = known[-1].plan
        i = plan.changed_float(floats)
        found = plan.environment.difference()
        name = None if i is None else f"argument {i}"
        lifted = False
        if i is not None and i not in self._constant.get(key, ()):
            lifted = True
            self._lift(key, i)
        elif found is not None and found[1] is not None:
            name = found[0]
            lifted = self._lift_place(key, plan.environment, Place(found[1], found[2]))
        elif found is not None:
            name = found[0]
        if lifted:
            del self.graphs[key]
            return None
        return name

    def _room(self, key: Any, changed: str | None, pending: _Pending | None) -> bool:
        """True where one more graph may be built; stale ones are dropped, each after twice as many calls."""
        if sum(map(len, self.graphs.values())) < self.max_graphs:
            return True
        stale = [
            (k, g)
            for k, graphs in self.graphs.items()
            for g in graphs
            if k[:3] == key[:3] and not g.plan.environment.holds()
        ]
        if stale and pending is not None:
            if pending.stable < 10 * 2**self._evictions:
                return False
            k, graph = stale[0]
            self.graphs[k].remove(graph)
            self._evictions += 1
            return True
        if changed is not None:
            self.give_up(key, f"{_quoted(changed)} keeps changing; keep it in a tensor")
        else:
            self.give_up(
                key, f"more than max_graphs={self.max_graphs} structures (shapes, dtypes, modes) were seen"
            )
        return False

    def _lifting(self, key: Any, call: Call) -> Graph:
        """A graph that follows the varying numbers, or holds them as constants where that fails."""
        constant = self._constant.setdefault(key, [])
        lifted = [p for p in self._varying.get(key, ()) if p not in constant]
        if not lifted:
            return self.make(call, ())
        try:
            graph = self.make(call, lifted)
        except (Untraceable, Mismatch):
            constant += lifted
            return self.make(call, ())
        constant += [graph.plan.lifted[i] for i in graph.plan.read]
        constant += [line for line in graph.plan.guards.lines() if line in lifted]
        return graph

    def remember(self, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> None:
        """After an eager run: note what the model could see, so that the next call may be captured."""
        if not self.patient or (self._new >= _MAX_NEW and self._new % _MAX_NEW):
            return
        structure = signature(args, kwargs)
        key = (kind, model, guide, structure.key)
        if key in self.given_up or key[:3] in self.given_up:
            return
        others = [x for x in pytree.tree_leaves((args, kwargs)) if not isinstance(x, Tensor)]
        before = self._pending.pop(key, None)
        if before is not None and before.stable and before.environment.holds():
            self._pending[key] = before
            before.floats = structure.floats
            return
        try:
            environment = Environment([model, guide, self.loss, *others])
        except Untraceable as error:
            self._fail(key, str(error))
            return
        for place in self._varying.get(key, ()):
            if isinstance(place, Place):
                environment.release(place.container, place.key)
        misses = before.misses if before is not None else 0
        self._pending[key] = _Pending(environment, structure.floats, misses)
        while len(self._pending) > 2 * self.max_graphs:
            self._pending.popitem(last=False)

    def make(self, call: Call, lifted: Any) -> Graph:
        """Capture, check against eager, build, check the build."""
        start = time.perf_counter()
        if not self.patient:
            call.materialize()
        followed = [p for p in lifted if isinstance(p, str)]
        plan = capture(call, [p for p in lifted if not isinstance(p, str)], followed)
        self.counters.captures += 1
        verify(plan, call, plan.graph, thorough=True)
        if not plan.environment.holds():
            changed = plan.environment.forgive()
            if changed is not None:
                plan.environment.restore()
                raise Untraceable(f"running the model changes the Python value {changed!r}")
        self.counters.checks += 1
        self.counters.capture_time += time.perf_counter() - start
        data = self._data(plan, call)
        runner = self.build(plan, data, lambda runner: verify(plan, call, runner))
        store = pyro.get_param_store()
        real = torch.distributions.constraints.real
        plan.sites = [name for name in plan.sites if name in store]
        graph = Graph(plan, runner, frozenset(n for n in plan.sites if store._constraints[n] is not real))
        graph.checked = self.checked(plan, runner)
        self._time(graph, call)
        return graph

    def _data(self, plan: Plan, call: Call) -> list[Tensor]:
        return [*call.tensors, *plan.number_tensors(plan.numbers(call.floats) or [])]

    def inputs(self, plan: Plan, data: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        """The inputs of the built graph."""
        return [*data, *state]

    def checked(self, plan: Plan, runner: Callable[..., list]) -> Callable[..., list]:
        """What later comparisons with eager run: the loss and its gradients."""
        return runner

    def inside_handlers(self) -> bool:
        """True, after a warning, where an outer Pyro handler would change what the model does."""
        for handler in _PYRO_STACK:
            if not (isinstance(handler, TraceMessenger) and handler.param_only):
                self.warn(
                    f"falling back to eager: the loss is called inside the handler {type(handler).__name__},"
                    " which a graph would not see"
                )
                return True
        return False

    def build(self, plan: Plan, data: list[Tensor], check: Callable[[Callable[..., list]], None]):
        """The Inductor build of a plan, or its captured graph where Inductor cannot build it."""
        return self.attempt(plan.graph, self.inputs(plan, data, plan.state() or []), check)

    def attempt(
        self, graph: torch.fx.GraphModule, inputs: list[Tensor], check: Callable[[Callable[..., list]], None]
    ) -> Callable[..., list]:
        """Inductor's build of ``graph`` if it builds and passes ``check``, else ``graph`` and a warning."""
        if self.backend == "eager":
            return graph
        start = time.perf_counter()
        try:
            runner = self._built(graph, inputs, check)
        except Mismatch as error:
            self.warn(f"Inductor's build is not used, the captured graph is: {error}")
            return graph
        except Exception as error:
            self.warn(_build.build_failure(error))
            return graph
        finally:
            self.counters.compile_time += time.perf_counter() - start
        self.counters.compiles += 1
        self.counters.checks += 1
        return runner

    def _built(self, graph: torch.fx.GraphModule, inputs: list[Tensor], check: Any) -> Callable[..., list]:
        try:
            runner = _build.repairing_inductor(graph, inputs, self.options)
            check(runner)
        except Mismatch:
            if len(_build.draws(graph)) < 2:
                raise
            # To save memory Inductor may have drawn in another order.
            options = {"reorder_for_peak_memory": False, **self.options}
            runner = _build.repairing_inductor(graph, inputs, options)
            check(runner)
        return runner

    def _time(self, graph: Graph, call: Call) -> None:
        from pyroelbo.compiled.verify import cases, reference

        case = next(iter(cases(graph.plan, call, False)))
        start = time.perf_counter()
        reference(graph.plan, call, case)
        self.counters.eager_time = time.perf_counter() - start
        data, state = self._data(graph.plan, call), graph.plan.state() or []
        inputs = self.inputs(graph.plan, data, state)
        with restored(inputs[len(data) :]):
            start = time.perf_counter()
            graph(inputs)[0].sum().item()
            self.counters.compiled_time = time.perf_counter() - start

    def _recheck(self, graph: Graph, key: Any, args: tuple, kwargs: dict) -> bool:
        graph.calls += 1
        try:
            verify(graph.plan, Call(self.loss, key[0], key[1], key[2], args, kwargs), graph.checked)
        except Mismatch as error:
            self.graphs.pop(key, None)
            self.give_up(
                key,
                f"after {graph.calls - 1} compiled calls the model no longer does what it did at capture,"
                f" although no value that it can see has changed: {error}."
                " Results since the last comparison may be wrong",
            )
            return False
        self.counters.checks += 1
        graph.plan.environment.forgive()
        return True

    def _fail(self, key: Any, reason: str) -> None:
        """Give up a structure, and after three of them the whole program."""
        self.give_up(key, reason)
        self._failures[key[:3]] = self._failures.get(key[:3], 0) + 1
        if self._failures[key[:3]] == _MAX_FAILURES:
            self.given_up.add(key[:3])

    def give_up(self, key: Any, reason: str) -> None:
        if key in self.given_up:
            return
        self.given_up.add(key)
        self._pending.pop(key, None)
        self.counters.fallbacks += 1
        self.counters.reasons.append(reason)
        self.warn(f"falling back to eager: {reason}")

    def warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"{type(self.loss).__name__}: {message}", CompileWarning, stacklevel=4)


def _quoted(name: str) -> str:
    return name if name.startswith(("the value", "a comparison")) else f"the Python value {name!r}"

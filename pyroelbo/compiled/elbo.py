"""A Pyro loss that runs as one compiled graph."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from pyroelbo.compiled import capture as _capture
from pyroelbo.compiled.environment import Environment
from pyroelbo.optim import aligned

__all__ = ["CompileWarning", "CompiledELBO", "Counters"]


class CompileWarning(UserWarning):
    """A loss runs in eager mode, or without Inductor, and the message says why."""


@dataclass
class Counters:
    """What a compiled loss has done: ``compiled_calls`` and ``eager_calls`` count evaluations, ``captures``
    traces through Pyro, ``compiles`` Inductor builds, ``checks`` comparisons with eager, ``fallbacks`` the
    structures given up. Times are in seconds; ``eager_time`` and ``compiled_time`` are one call's."""

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

    def __init__(self, plan: _capture.Plan, runner: Callable[..., list], constrained: frozenset[str]):
        self.plan = plan
        self.runner = runner
        self.constrained = constrained
        self.checked = runner
        self.calls = 0
        self.lost = False
        self.copies: tuple[int, ...] | None = None

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            if _capture.autocasting():
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


def signature(args: tuple, kwargs: dict) -> tuple[Any, list[Tensor]]:
    """A hashable description of a call's structure, and its tensors in order."""
    if not kwargs and all(type(a) is Tensor for a in args):
        flat: list[Any] = list(args)
        spec: Any = None
    else:
        flat, spec = pytree.tree_flatten((args, kwargs))
    key: list[Any] = [spec, torch.get_default_dtype()]
    if torch.is_autocast_enabled("cpu"):
        key.append(torch.get_autocast_dtype("cpu"))
    data = []
    for x in flat:
        if isinstance(x, Tensor):
            key.append((x.shape, x.dtype, x.device, x.requires_grad))
            data.append(x if x.is_contiguous() else x.contiguous())
            if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
                key.append(torch.get_autocast_dtype("cuda"))
        else:
            key.append((type(x), x))
    return tuple(key), data


class GraphCache:
    """Graphs by structure, at most ``max_graphs`` of them; shared by the loss and the whole step."""

    def __init__(
        self, loss: Any, backend: str, max_graphs: int, options: dict[str, Any] | None, patient: bool
    ):
        if backend not in ("inductor", "eager"):
            raise ValueError(
                f"backend: got {backend!r}, takes 'inductor' or 'eager' (the captured graph, op by op)"
            )
        if not isinstance(max_graphs, int) or max_graphs < 1:
            raise ValueError(f"max_graphs: got {max_graphs!r}, takes a positive integer")
        self.loss = loss
        self.backend = backend
        self.max_graphs = max_graphs
        self.options = dict(options or {})
        self.patient = patient
        self.counters = Counters()
        self.graphs: dict[Any, list[Graph]] = {}
        self.given_up: set[Any] = set()
        self._pending: dict[Any, Environment] = {}
        self._misses: dict[Any, int] = {}
        self._said: set[str] = set()

    def lookup(self, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict):
        """The graph for this call with its data and state, or None where eager has to run."""
        try:
            structure, data = signature(args, kwargs)
            key = (kind, model, guide, structure)
            graphs = self.graphs.get(key, ())
        except TypeError as error:
            self.warn(
                f"an argument cannot be part of a graph's key ({error}); pass tensors or hashable values"
            )
            return None
        for graph in graphs:
            if graph.plan.environment.holds():
                state = graph.plan.state()
                if state is None and self.patient and not graph.lost:
                    graph.lost = True  # as after pyro.clear_param_store(): eager makes the parameters anew
                    return None
                if state is not None:
                    graph.lost = False
                    if graph.calls in _RECHECKS and not self._recheck(graph, key, data, args, kwargs):
                        return None
                    return graph, data, state
        if key in self.given_up:
            return None
        return self._miss(key, data, args, kwargs)

    def _miss(self, key: Any, data: list[Tensor], args: tuple, kwargs: dict):
        kind, model, guide, _ = key
        total = sum(map(len, self.graphs.values()))
        pending = self._pending.get(key)
        if self.patient and (pending is None or not (pending.holds() or pending.forgive() is None)):
            self._misses[key] = self._misses.get(key, 0) + 1
            if self._misses[key] > 20 and pending is not None:
                self.give_up(
                    key,
                    f"the Python value {pending.changed()!r} changes from call to call; keep it in a tensor",
                )
            elif len(self._misses) > 64 * self.max_graphs:
                self.give_up(key, "every call has another structure")
                self._misses.clear()
            return None
        known = self.graphs.get(key)
        changed = known[-1].plan.environment.changed() if known else None
        if total >= self.max_graphs and changed is not None:
            self.give_up(key, f"the Python value {changed!r} keeps changing; keep it in a tensor")
            return None
        if total >= self.max_graphs:
            self.give_up(
                key, f"more than max_graphs={self.max_graphs} structures (shapes, dtypes, modes) were seen"
            )
            return None
        self._pending.pop(key, None)
        try:
            graph = self.make(kind, model, guide, data, args, kwargs)
        except (_capture.Untraceable, _capture.Mismatch) as error:
            self.give_up(key, str(error))
            return None
        state = graph.plan.state()
        if state is None:
            self.give_up(key, "its state does not outlive the call")
            return None
        self.graphs.setdefault(key, []).append(graph)
        return graph, data, state

    def remember(self, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> None:
        """After an eager run: note what the model could see, so that the next call may be captured."""
        if not self.patient:
            return
        key = (kind, model, guide, signature(args, kwargs)[0])
        if key not in self.given_up:
            others = [x for x in pytree.tree_leaves((args, kwargs)) if not isinstance(x, Tensor)]
            self._pending[key] = Environment([model, guide, self.loss, *others])

    def make(self, kind: str, model: Any, guide: Any, data: list[Tensor], args: tuple, kwargs: dict) -> Graph:
        """Capture, check against eager, build, check the build."""
        if any(t.requires_grad for t in data):
            raise _capture.Untraceable("an argument requires a gradient; only parameters are differentiated")
        start = time.perf_counter()
        if not self.patient:
            _capture.materialize(self.loss, kind, model, guide, args, kwargs)
        plan = _capture.capture(self.loss, kind, model, guide, args, kwargs)
        self.counters.captures += 1
        eager = self._eager(plan, kind, model, guide, args, kwargs)
        _capture.verify(plan, plan.graph, data, eager)
        if not plan.environment.holds():
            changed = plan.environment.forgive()
            if changed is not None:
                raise _capture.Untraceable(f"running the model changes the Python value {changed!r}")
        self.counters.checks += 1
        self.counters.capture_time += time.perf_counter() - start
        runner = self.build(plan, data, eager)
        store = pyro.get_param_store()
        real = torch.distributions.constraints.real
        sites = [name for name in plan.sites if name in store]
        plan.sites = sites
        graph = Graph(plan, runner, frozenset(n for n in sites if store._constraints[n] is not real))
        graph.checked = self.checked(plan, runner)
        self._time(graph, data, eager)
        return graph

    def inputs(self, plan: _capture.Plan, data: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        """What the built graph takes."""
        return [*data, *state]

    def checked(self, plan: _capture.Plan, runner: Callable[..., list]) -> Callable[..., list]:
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

    def build(self, plan: _capture.Plan, data: list[Tensor], eager: Any) -> Callable[..., list]:
        """The Inductor build of a plan, or its captured graph where Inductor cannot build it."""
        inputs = self.inputs(plan, data, plan.state() or [])
        return self.attempt(plan.graph, inputs, lambda runner: _capture.verify(plan, runner, data, eager))

    def attempt(
        self, graph: torch.fx.GraphModule, inputs: list[Tensor], check: Callable[[Callable[..., list]], None]
    ) -> Callable[..., list]:
        """Inductor's build of ``graph`` if it builds and passes ``check``, else ``graph`` and a warning."""
        if self.backend == "eager":
            return graph
        start = time.perf_counter()
        try:
            runner = _inductor(graph, inputs, self.options)
            check(runner)
        except _capture.Mismatch as error:
            self.warn(f"Inductor's build is not used, the captured graph is: {error}")
            return graph
        except Exception as error:
            self.warn(_build_failure(error))
            return graph
        finally:
            self.counters.compile_time += time.perf_counter() - start
        self.counters.compiles += 1
        self.counters.checks += 1
        return runner

    def _eager(self, plan: _capture.Plan, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict):
        def eager(seed: int) -> list[Tensor | None]:
            return _capture.reference(self.loss, kind, model, guide, args, kwargs, plan, seed)

        return eager

    def _time(self, graph: Graph, data: list[Tensor], eager: Any) -> None:
        start = time.perf_counter()
        eager(20)
        self.counters.eager_time = time.perf_counter() - start
        inputs = self.inputs(graph.plan, data, graph.plan.state() or [])
        with _capture.restored(inputs[len(data) :]):
            start = time.perf_counter()
            graph(inputs)[0].sum().item()
            self.counters.compiled_time = time.perf_counter() - start

    def _recheck(self, graph: Graph, key: Any, data: list[Tensor], args: tuple, kwargs: dict) -> bool:
        kind, model, guide, _ = key
        graph.calls += 1
        try:
            _capture.verify(
                graph.plan, graph.checked, data, self._eager(graph.plan, kind, model, guide, args, kwargs)
            )
        except _capture.Mismatch as error:
            self.graphs.pop(key, None)
            self.give_up(
                key, f"after {graph.calls - 1} calls the model no longer does what it did at capture: {error}"
            )
            return False
        self.counters.checks += 1
        graph.plan.environment.forgive()
        return True

    def give_up(self, key: Any, reason: str) -> None:
        self.given_up.add(key)
        self.counters.fallbacks += 1
        self.counters.reasons.append(reason)
        self.warn(f"falling back to eager: {reason}")

    def warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"{type(self.loss).__name__}: {message}", CompileWarning, stacklevel=4)


_RECHECKS = frozenset(10**k for k in range(1, 12))


def _inductor(
    graph: torch.fx.GraphModule, inputs: list[Tensor], options: dict[str, Any]
) -> Callable[..., list]:
    """Inductor's build, with libraries in its cache that cannot be loaded compiled anew, each once.

    The compiler writes them where they are looked for, and any file there is taken for a whole one: what a process
    killed while it compiled has left would keep all later ones from that graph.
    """
    torn: set[str] = set()
    while True:
        try:
            return _capture.inductor(graph, inputs, options)
        except Exception as error:
            path = _unloadable(error)
            if path is None or path in torn:
                raise
            torn.add(path)
            with suppress(FileNotFoundError):
                os.remove(path)


def _unloadable(error: BaseException) -> str | None:
    """The library in Inductor's cache that ``error`` says could not be loaded."""
    from torch._inductor.codecache import cache_dir

    inner: Any = error
    while inner is not None:
        path = inner.path if isinstance(inner, ImportError) else None
        if path and Path(path).resolve().is_relative_to(Path(cache_dir()).resolve()):
            return path
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    return None


def _build_failure(error: BaseException) -> str:
    inner: Any = error
    while inner is not None and type(inner).__name__ not in ("InvalidCxxCompiler", "CppCompileError"):
        inner = getattr(inner, "inner_exception", None) or inner.__cause__
    if type(inner).__name__ == "InvalidCxxCompiler":
        return (
            "no working C++ compiler was found, which Inductor needs on the CPU (install g++ or set CXX);"
            " the captured graph runs operation by operation instead"
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"Inductor failed ({lines[0]}); the captured graph runs operation by operation instead"


class CompiledELBO(ELBO):
    """A Pyro loss, with its gradients, as one compiled graph: the same numbers, without Pyro's Python time.

    ::

        svi = SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1e-3}), CompiledELBO(Trace_ELBO()))

    ``loss`` is any Pyro ELBO with ``loss_and_grads`` or ``differentiable_loss``. The first call of each
    structure (shapes, dtypes, devices, train/eval modes, Python values that the model reads) runs in eager
    mode. The second captures the loss through Pyro's handlers, compares it with eager under equal seeds,
    builds it with Inductor and compares again; further comparisons follow after 10, 100, 1000, ... calls.
    Draws come from torch's generators in eager's order, so a seed gives eager's draws. Parameters, buffers
    and tensors that the model closes over are inputs of the graph.

    What cannot be one static graph (samplers and control flow that look at values, models that change Python
    numbers as they run, more than ``max_graphs`` structures) runs in eager mode, after one ``CompileWarning``
    that names the site or value. Pyro's validation of arguments happens only in the eager runs.

    :param backend: "inductor", or "eager": the captured graph run operation by operation, without a compiler.
    :param max_graphs: bound on the graphs kept; each further structure stays eager.
    :param options: Inductor options for the build, for instance ``{"triton.cudagraphs": True}``.

    Losses are in nats, summed over the batch as Pyro does. ``counters`` tells calls, captures, builds and
    fallbacks; printed, also after how many calls the time to compile is paid back. Inductor keeps its builds
    on disk, so that a second process builds faster. Cost beside the graph: O(parameters + Python values that
    the model can see), tens of microseconds for a small model.
    """

    def __init__(
        self,
        loss: Any,
        *,
        backend: str = "inductor",
        max_graphs: int = 8,
        options: dict[str, Any] | None = None,
    ):
        if not (hasattr(loss, "loss_and_grads") or hasattr(loss, "differentiable_loss")):
            raise TypeError(f"loss: got {type(loss).__name__}, takes an ELBO such as pyro.infer.Trace_ELBO()")
        super().__init__()
        self.wrapped = loss
        self._cache = GraphCache(loss, backend, max_graphs, options, patient=True)

    @property
    def counters(self) -> Counters:
        return self._cache.counters

    def _get_trace(self, model, guide, args, kwargs):
        return self.wrapped._get_trace(model, guide, args, kwargs)

    def _evaluate(
        self, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict
    ) -> tuple[Any, list[tuple[Tensor, Tensor]]] | None:
        cache = self._cache
        if _PYRO_STACK and cache.inside_handlers():
            cache.counters.eager_calls += 1
            return None
        found = cache.lookup(kind, model, guide, args, kwargs)
        if found is None:
            cache.counters.eager_calls += 1
            return None
        graph, data, state = found
        outputs = graph([*data, *state])
        cache.counters.compiled_calls += 1
        if _PYRO_STACK:
            _announce(graph)
        if math.isnan(value := outputs[0].item()):
            warnings.warn("Encountered NaN: loss", UserWarning, stacklevel=3)
        return (value if kind != "differentiable" else outputs[0]), _gradients(graph, outputs, state)

    def loss(self, model, guide, *args, **kwargs):
        """The loss alone, without gradients."""
        found = self._evaluate("loss", model, guide, args, kwargs)
        if found is not None:
            return found[0]
        value = self.wrapped.loss(model, guide, *args, **kwargs)
        self._remember("loss", model, guide, args, kwargs)
        return value

    def loss_and_grads(self, model, guide, *args, **kwargs):
        """The loss as a float; adds the gradients to each parameter's ``.grad``, as Pyro's losses do."""
        found = self._evaluate("grads", model, guide, args, kwargs) if torch.is_grad_enabled() else None
        if found is None:
            value = _capture.evaluate(self.wrapped, "grads", model, guide, args, kwargs)
            self._remember("grads", model, guide, args, kwargs)
            return value if isinstance(value, tuple) else torch_item(value)
        value, pairs = found
        for leaf, g in pairs:
            if leaf.grad is None:
                leaf.grad = aligned(g, leaf)
            else:
                leaf.grad.add_(g)
        return value

    def differentiable_loss(self, model, guide, *args, **kwargs):
        """The loss as a tensor whose ``backward`` hands out the gradients that the graph has computed."""
        if torch.is_grad_enabled():
            found = self._evaluate("differentiable", model, guide, args, kwargs)
            if found is not None:
                value, pairs = found
                return _Attached.apply(value, [g for _, g in pairs], *(leaf for leaf, _ in pairs))
        if not hasattr(self.wrapped, "differentiable_loss"):
            raise NotImplementedError(
                f"{type(self.wrapped).__name__} has no differentiable_loss; use it through pyro.infer.SVI"
            )
        value = self.wrapped.differentiable_loss(model, guide, *args, **kwargs)
        self._remember("differentiable", model, guide, args, kwargs)
        return value

    def _remember(self, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> None:
        with suppress(TypeError):
            self._cache.remember(kind, model, guide, args, kwargs)


def _gradients(graph: Graph, outputs: list[Tensor], state: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(state[i], g) for i, g in zip(graph.plan.leaves, outputs[1:], strict=True)]


def _announce(graph: Graph) -> None:
    store = pyro.get_param_store()
    params = store._params
    for handler in _PYRO_STACK:
        nodes = handler.trace
        for name in graph.plan.sites:
            value = params[name]
            if name in graph.constrained:
                value = store[name]
            else:
                value.unconstrained = ref(value)
            if name not in nodes.nodes:
                nodes.add_node(
                    name, name=name, type="param", value=value, fn=None, args=(), kwargs={}, infer={}
                )


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *leaves):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, upstream):
        return None, None, *(g * upstream for g in ctx.gradients)

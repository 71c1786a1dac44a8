"""A Pyro loss that runs as one compiled graph."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from typing import Any
from weakref import ref

import pyro
import torch
from pyro.infer import ELBO
from pyro.infer.util import torch_item
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyroelbo.compiled.cache import Counters, Graph, GraphCache
from pyroelbo.compiled.eager import evaluate, gradient_hooks
from pyroelbo.optim import aligned

__all__ = ["CompiledELBO"]


class CompiledELBO(ELBO):
    """A Pyro loss with its gradients as one compiled graph: the same numbers, without Pyro's Python time.

    ::

        svi = SVI(model, guide, FusedOptim(torch.optim.Adam, {"lr": 1e-3}), CompiledELBO(Trace_ELBO()))

    The first call of each structure (shapes, dtypes, devices, train/eval modes, Python values that the model
    reads) runs in eager mode. The second captures the loss through Pyro's handlers, compares it with eager,
    builds it with Inductor and compares again; further comparisons follow after 10, 100, 1000, ... calls.
    Draws come from torch's generators in eager's order, so a seed gives eager's draws. Parameters, buffers
    and tensors that the model closes over are inputs of the graph. Python floats that change between calls
    become inputs; other Python values, and values of tensors that Python code reads, are guards.

    What cannot be one static graph (samplers and control flow that depend on random draws, models that change
    Python values as they run or draw from other generators, more than ``max_graphs`` structures) runs in
    eager mode, after one ``CompileWarning`` that names the site, line or value. Pyro validates arguments in
    eager calls only. All other attributes are those of the wrapped loss.

    Args:
        loss: a Pyro ELBO with ``loss_and_grads`` or ``differentiable_loss``; its values are in nats.
        backend: "inductor", or "eager": the captured graph run operation by operation, without a compiler.
        max_graphs: most graphs kept; each further structure stays eager.
        options: Inductor options for the build, for instance ``{"triton.cudagraphs": True}``.

    ``counters`` counts calls, captures, builds and fallbacks; printed, it also says after how many calls the
    time to compile is paid back. Inductor keeps its builds on disk, so a second process builds faster. Cost
    besides the graph: O(parameters + Python values that the model can see), tens of microseconds for a small
    model.
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
            raise TypeError(
                f"loss: expected an ELBO such as pyro.infer.Trace_ELBO(), got {type(loss).__name__}"
            )
        object.__setattr__(self, "wrapped", loss)
        object.__setattr__(self, "_cache", GraphCache(loss, backend, max_graphs, options, patient=True))

    def __getattr__(self, name: str) -> Any:
        if name in ("wrapped", "_cache"):  # not there yet, as in copy.copy
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)

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
            value = evaluate(self.wrapped, "grads", model, guide, args, kwargs)
            self._remember("grads", model, guide, args, kwargs)
            return value if isinstance(value, tuple) else torch_item(value)
        value, pairs = found
        for leaf, g in pairs:
            if gradient_hooks(leaf):
                torch.autograd.backward([leaf], [aligned(g, leaf)])
            elif leaf.grad is None:
                leaf.grad = aligned(g, leaf)
            else:
                leaf.grad.add_(g)
        return value

    def differentiable_loss(self, model, guide, *args, **kwargs):
        """The loss as a tensor; its ``backward`` returns the gradients that the graph has computed."""
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

"""Eager evaluation of a loss, with everything that it changes put back."""

from __future__ import annotations

import pickle
import random
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils import _pytree as pytree

from pyroelbo.compiled.environment import Environment, Untraceable

FLOATS = (float, np.float64)

__all__ = [
    "FLOATS",
    "Call",
    "Place",
    "autocasting",
    "evaluate",
    "gradient_hooks",
    "quiet",
    "restored",
    "rewind_sources",
    "source_states",
    "unhooked",
]


def evaluate(loss: Any, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict) -> Any:
    """Run the loss as Pyro would: ``kind`` is "loss" (the value alone), "grads" (as SVI does) or
    "differentiable" (as a torch loop does)."""
    if kind == "loss":
        with torch.no_grad():
            return loss.loss(model, guide, *args, **kwargs)
    if kind == "grads" and hasattr(loss, "loss_and_grads"):
        return loss.loss_and_grads(model, guide, *args, **kwargs)
    if hasattr(loss, "differentiable_loss"):
        value = loss.differentiable_loss(model, guide, *args, **kwargs)
        if not isinstance(value, Tensor):  # of a model without sites
            return value
        if value.requires_grad:
            value.backward()
        return value.detach()
    return loss.loss_and_grads(model, guide, *args, **kwargs)


@dataclass(frozen=True)
class Place:
    """Where a Python value lives: an item of a dict or list, or a closure cell (``key`` is None)."""

    container: Any
    key: Any

    def get(self) -> Any:
        return self.container.cell_contents if self.key is None else self.container[self.key]

    def set(self, value: Any) -> None:
        if self.key is None:
            self.container.cell_contents = value
        else:
            self.container[self.key] = value

    @contextmanager
    def holding(self, value: Any) -> Iterator[None]:
        before = self.get()
        self.set(value)
        try:
            yield
        finally:
            self.set(before)


class Call:
    """One call of a loss. ``tensors`` and ``floats`` are its arguments of these types, in order."""

    def __init__(self, loss: Any, kind: str, model: Any, guide: Any, args: tuple, kwargs: dict):
        self.loss, self.kind, self.model, self.guide = loss, kind, model, guide
        self._flat, self._spec = pytree.tree_flatten((args, kwargs))
        for x in self._flat:
            if isinstance(x, Tensor) and x.layout is not torch.strided:
                raise Untraceable(f"an argument is a tensor of layout {x.layout}, which has no strides")
        self.tensors = [x.detach().contiguous() for x in self._flat if isinstance(x, Tensor)]
        self.floats = [x for x in self._flat if type(x) in FLOATS]
        self.objects = [x for x in self._flat if not isinstance(x, Tensor)]
        self.roots = [model, guide, loss, *self.objects]

    def evaluate(
        self, tensors: Sequence[Tensor], floats: Sequence[Any], placed: Sequence[tuple[Place, Any]] = ()
    ) -> Any:
        """Run the loss on other tensors and floats, with other values in ``placed``."""
        tensor, number = iter(tensors), iter(floats)
        flat = [
            next(tensor) if isinstance(x, Tensor) else next(number) if type(x) in FLOATS else x
            for x in self._flat
        ]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        with ExitStack() as stack:
            for place, value in placed:
                stack.enter_context(place.holding(value))
            return evaluate(self.loss, self.kind, self.model, self.guide, args, kwargs)

    def materialize(self) -> None:
        """Run once so that lazily made parameters exist; everything else is put back."""
        seen = [t for t in Environment(self.roots).kept if isinstance(t, Tensor)]
        store = pyro.get_param_store()
        gradients = [(t, t.grad) for t in (*seen, *store._params.values()) if t.is_leaf]
        before = set(store._params)
        values = [t for t in seen if not t.requires_grad]
        with restored(values), unhooked(seen), quiet(), _FirstValues() as first:
            self.evaluate(self.tensors, self.floats)
            made = [name for name in store._params if name not in before]
        for name in made:
            if name in first.entries:
                store._params[name] = first.entries[name]
                store._param_to_name[first.entries[name]] = name
                first.entries[name].grad = None
        for t, g in gradients:
            t.grad = g


class _FirstValues(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Tensor] = {}

    def _pyro_post_param(self, msg) -> None:
        self.entries.setdefault(msg["name"], msg["value"].unconstrained())


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager that ignores warnings: the user's own eager call has already shown them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def restored(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore, on exit, the values of ``tensors``, the param store's entries and all global random states.

    The tensors get no new version: the caller may have saved them for a backward pass of his own.
    """
    store = pyro.get_param_store()
    caching = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached cast of a weight would be a constant of the graph
    torch.clear_autocast_cache()
    entries, names = dict(store._params), dict(store._param_to_name)
    saved = [t.detach().clone() for t in tensors]
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_autocast_cache_enabled(caching)
        store._params.clear()
        store._params.update(entries)
        store._param_to_name.clear()
        store._param_to_name.update(names)
        with torch.no_grad():
            for t, value in zip(tensors, saved, strict=True):
                if not torch.equal(t, value):
                    t.data.copy_(value)


@contextmanager
def unhooked(tensors: Iterable[Any]) -> Iterator[None]:
    """Disable the gradient hooks of the leaves among ``tensors`` and in the param store."""
    leaves = {id(t): t for t in tensors if isinstance(t, Tensor) and t.is_leaf}
    leaves |= {id(t): t for t in pyro.get_param_store()._params.values() if t.is_leaf}
    saved = [(hooks, dict(hooks)) for t in leaves.values() for hooks in gradient_hooks(t)]
    for hooks, _ in saved:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, entries in saved:
            hooks.update(entries)


def gradient_hooks(leaf: Tensor) -> list[dict]:
    """The non-empty dicts of hooks that a backward pass would run at ``leaf``."""
    return [h for h in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks) if h]


def source_states(environment: Environment) -> list[tuple[str, bytes]]:
    """The states of all random number generators that torch's seed does not set."""
    states = [
        ("Python's random module", pickle.dumps(random.getstate())),
        ("numpy.random", pickle.dumps(np.random.get_state())),
    ]
    for source in environment.sources:
        if isinstance(source, random.Random):
            state: Any = source.getstate()
        elif isinstance(source, torch.Generator):
            state = source.get_state().numpy()
        elif isinstance(source, np.random.Generator):
            state = source.bit_generator.state
        else:
            state = source.get_state()
        states.append((f"a private {type(source).__module__}.{type(source).__name__}", pickle.dumps(state)))
    return states


def rewind_sources(environment: Environment, states: list[tuple[str, bytes]]) -> None:
    """Put back the states of the environment's generators, as ``source_states`` gave them."""
    first = len(states) - len(environment.sources)
    for source, (_, saved) in zip(environment.sources, states[first:], strict=True):
        state = pickle.loads(saved)
        if isinstance(source, random.Random):
            source.setstate(state)
        elif isinstance(source, torch.Generator):
            source.set_state(torch.from_numpy(state))
        elif isinstance(source, np.random.Generator):
            source.bit_generator.state = state
        else:
            source.set_state(state)


def autocasting() -> bool:
    """True inside ``torch.autocast`` for the CPU or CUDA."""
    return torch.is_autocast_enabled("cpu") or (
        torch.cuda.is_available() and torch.is_autocast_enabled("cuda")
    )

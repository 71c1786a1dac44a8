"""The Python values that a model can see, and a cheap test that none of them has changed."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterable
from functools import partial
from operator import is_
from typing import Any

from torch import Tensor, nn

__all__ = ["Environment"]

_SCALARS = (int, float, complex, bool, str, bytes, type(None))
_LIBRARIES = {"torch", "pyro", "numpy", "opt_einsum", "scipy"} | sys.stdlib_module_names
_MODULE_PARTS = {"_parameters", "_buffers", "_modules", "_pyro_context", "_non_persistent_buffers_set"}
_MAX_EDGES = 50_000
_MAX_ITEMS = 2_000


def _library(name: str | None) -> bool:
    return name is None or name.split(".")[0] in _LIBRARIES or name.startswith("pyroelbo.compiled")


class Environment:
    """What the code of ``roots`` (callables, modules, objects) can read: scalars, objects and tensors.

    A compiled graph holds the Python numbers of the moment it was captured. This walk collects every
    attribute, closure cell, referenced global, default and container item that is reachable from the roots
    without entering the libraries, so that a change is seen before a stale graph runs. Tensors are kept
    apart (``tensors``: id to place): they are inputs of the graph, not constants.

    Not seen: values inside C extensions and slots, containers beyond 2,000 items (identity and length only).
    Cost of ``holds``: about 50 ns a value.
    """

    def __init__(self, roots: Iterable[Any]):
        self._edges: list[tuple[Any, Any]] = []
        self._cells: list[Any] = []
        self._values: list[Any] = []
        self._cell_values: list[Any] = []
        self._names: list[str] = []
        self._cell_names: list[str] = []
        self._sizes: list[tuple[Any, int, str]] = []
        self.tensors: dict[int, tuple[Any, Any]] = {}
        self.tensor_names: dict[int, str] = {}
        self._kept: list[Any] = []
        self._seen: set[int] = set()
        self._todo: list[tuple[Any, str]] = [
            (root, getattr(root, "__name__", type(root).__name__)) for root in roots
        ]
        while self._todo and len(self._edges) < _MAX_EDGES:
            self._visit(*self._todo.pop())
        del self._todo, self._seen

    def _edge(self, container: Any, key: Any, value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            self.tensors.setdefault(id(value), (container, key))
            self.tensor_names.setdefault(id(value), name)
            self._kept.append(value)
            return
        self._edges.append((container, key))
        self._values.append(value)
        self._names.append(name)
        if not isinstance(value, _SCALARS):
            self._todo.append((value, name))

    def _visit(self, thing: Any, name: str) -> None:
        if id(thing) in self._seen or isinstance(thing, (*_SCALARS, Tensor)):
            return
        self._seen.add(id(thing))
        self._kept.append(thing)
        if isinstance(thing, nn.Module):
            self._module(thing, name)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, name)
        elif isinstance(thing, types.MethodType):
            self._todo += [(thing.__self__, name.rpartition(".")[0] or name), (thing.__func__, name)]
        elif isinstance(thing, partial):
            self._todo += [(thing.func, name), (thing.args, name), (thing.keywords, name)]
        elif isinstance(thing, (staticmethod, classmethod)):
            self._todo.append((thing.__func__, name))
        elif isinstance(thing, property):
            self._todo.append((thing.fget, name))
        elif isinstance(thing, dict):
            self._items(thing, thing.items(), name)
        elif isinstance(thing, list):
            self._items(thing, enumerate(thing), name)
        elif isinstance(thing, (tuple, set, frozenset)):
            for i, value in enumerate(thing):
                if isinstance(value, Tensor):
                    self.tensor_names.setdefault(id(value), f"{name}[{i}]")
                else:
                    self._todo.append((value, f"{name}[{i}]"))
        elif isinstance(thing, type):
            self._class(thing)
        elif isinstance(thing, types.ModuleType):
            pass
        elif type(thing).__name__ != "Trace" and hasattr(thing, "__dict__"):
            for key, value in list(vars(thing).items()):
                self._edge(vars(thing), key, value, f"{name}.{key}")
            self._todo.append((type(thing), name))

    def _items(self, container: Any, items: Iterable[tuple[Any, Any]], name: str) -> None:
        self._sizes.append((container, len(container), name))
        if len(container) <= _MAX_ITEMS:
            for key, value in list(items):
                self._edge(container, key, value, f"{name}[{key!r}]")

    def _module(self, module: nn.Module, name: str) -> None:
        own = vars(module)
        for part in ("_parameters", "_buffers", "_modules"):
            for key, value in own[part].items():
                self._edge(own[part], key, value, f"{name}.{key}")
        builtin = type(module).__module__.startswith("torch.nn.modules.")
        for key, value in list(own.items()):
            if key in _MODULE_PARTS or (builtin and key != "training" and not isinstance(value, float)):
                continue
            if "_hooks" in key or key.startswith("_backward") or key == "_is_full_backward_hook":
                if isinstance(value, dict):
                    self._sizes.append((value, len(value), f"{name}.{key}"))
                continue
            self._edge(own, key, value, f"{name}.{key}")
        self._class(type(module))

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if _library(base.__module__) or (id(base) in self._seen and base is not cls):
                continue
            self._seen.add(id(base))
            space = vars(base)
            for key, value in list(space.items()):
                if not (key.startswith("__") and key not in ("__call__", "__init__")):
                    self._edge(space, key, value, f"{base.__name__}.{key}")

    def _function(self, function: types.FunctionType, name: str) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._todo.append((wrapped, name))
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if isinstance(value, Tensor):
                self.tensors.setdefault(id(value), (cell, None))
                self.tensor_names.setdefault(id(value), free)
                self._kept.append(value)
                continue
            self._cells.append(cell)
            self._cell_values.append(value)
            self._cell_names.append(free)
            self._todo.append((value, free))
        self._todo += [(value, name) for value in function.__defaults__ or ()]
        self._todo += [(value, name) for value in (function.__kwdefaults__ or {}).values()]
        if _library(function.__module__):
            return
        space = function.__globals__
        names = _code_names(function.__code__)
        for key in names:
            value = space.get(key)
            if key not in space or (isinstance(value, type) and _library(value.__module__)):
                continue
            if isinstance(value, types.ModuleType):
                if not _library(value.__name__):
                    inner = vars(value)
                    for attribute in names & inner.keys():
                        if not isinstance(inner[attribute], types.ModuleType):
                            self._edge(inner, attribute, inner[attribute], f"{key}.{attribute}")
            elif not (isinstance(value, types.FunctionType) and _library(value.__module__)):
                self._edge(space, key, value, key)

    def holds(self) -> bool:
        """True while every value is the same object or an equal scalar, and no container grew or shrank."""
        return self.changed() is None

    def changed(self) -> str | None:
        """The name of the first value that differs, or None."""
        try:
            now = [container[key] for container, key in self._edges]
            cells = [cell.cell_contents for cell in self._cells]
        except (KeyError, IndexError, ValueError):
            return self._missing()
        if not all(map(is_, now, self._values)):
            name = _differs(self._values, now, self._names)
            if name is not None:
                return name
        if not all(map(is_, cells, self._cell_values)):
            name = _differs(self._cell_values, cells, self._cell_names)
            if name is not None:
                return name
        for container, size, name in self._sizes:
            if len(container) != size:
                return name
        return None

    def forgive(self) -> str | None:
        """Take over objects that a run of the model has replaced; the name of a replaced *scalar*, or None.

        A module that stores its last activations, or a guide that makes its plates anew, is harmless; one
        that counts its calls is not, since a compiled call does not run its Python code.
        """
        for i in range(len(self._edges) - 1, -1, -1):
            container, key = self._edges[i]
            try:
                now = container[key]
            except (KeyError, IndexError):
                now = _MISSING
            old = self._values[i]
            if now is old or _same(old, now):
                continue
            if isinstance(old, _SCALARS) and isinstance(now, _SCALARS) and old is not None:
                return self._names[i]
            del self._edges[i], self._values[i], self._names[i]
        self._sizes = [entry for entry in self._sizes if len(entry[0]) == entry[1]]
        return self.changed()

    def _missing(self) -> str:
        for (container, key), name in zip(self._edges, self._names, strict=True):
            try:
                container[key]
            except (KeyError, IndexError):
                return name
        return "a closure variable"


_MISSING = object()


def _code_names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _code_names(constant)
    return names


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float) and math.isnan(old):
        return math.isnan(new)
    if isinstance(old, _SCALARS) and type(old) is type(new):
        return old == new
    return isinstance(old, (types.MethodType, types.BuiltinMethodType)) and old == new


def _differs(old: list[Any], now: list[Any], names: list[str]) -> str | None:
    for i, (before, after) in enumerate(zip(old, now, strict=True)):
        if before is not after:
            if not _same(before, after):
                return names[i]
            old[i] = after
    return None

"""The Python values that a model can see, and a cheap test that none of them has changed."""

from __future__ import annotations

import array
import contextvars
import functools
import math
import os
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from operator import getitem, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Environment", "Untraceable"]


class Untraceable(RuntimeError):
    """The loss cannot become one static graph; the message says why and where."""


_SCALARS = (int, float, complex, bool, str, bytes, type(None), np.generic)
_LIBRARIES = {"torch", "pyro", "numpy", "opt_einsum", "scipy"} | sys.stdlib_module_names
_MODULE_PARTS = {"_parameters", "_buffers", "_modules", "_pyro_context", "_non_persistent_buffers_set"}
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HOOKS = {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"}
_BUILTINS = (dict, list, deque, tuple, set, frozenset)
# Modules of the standard library whose objects hold values of their users in attributes.
_HOLDERS = {"argparse", "collections", "configparser", "types", "weakref", "_thread", "_threading_local"}
_MAX_EDGES = 50_000
_MAX_ITEMS = 2_000
_MAX_BYTES = 2**20
_SAMPLED = 4_096
_INSTALLED = {"site-packages", "dist-packages"}  # in whatever environments are on the path


def _top(name: str | None) -> str:
    return (name or "builtins").partition(".")[0]


@functools.cache
def _installed(package: str) -> bool:
    """True for packages of the standard library, the numerical libraries and those in site-packages."""
    if package in _LIBRARIES:
        return True
    module = sys.modules.get(package)
    files = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(_INSTALLED & set(os.path.realpath(file).split(os.sep)) for file in files if file)


def _packaged(module: str | None) -> bool:
    """True for code that is not the user's: of installed packages, and of this one."""
    return _top(module) == "pyroelbo" or _installed(_top(module))


def _caches(thing: Any) -> bool:
    """True for objects that keep tensors for themselves: those of packages, and all transforms."""
    return isinstance(thing, torch.distributions.Transform) or _packaged(type(thing).__module__)


class Environment:
    """What the code of ``roots`` (callables, modules, objects) can read: scalars, objects and tensors.

    A compiled graph holds the Python numbers of the moment it was captured. This walk collects every
    attribute, slot, closure cell, referenced global, default and container item that is reachable from the
    roots, so that a change is seen before a stale graph runs. Objects, closures and containers are walked
    first, then the globals that their code names. Code of installed packages is entered only for packages
    that define a module or function among the roots' own objects, never for torch, pyro, numpy or scipy;
    of other packages it watches the scalars and small containers that the model's code names.
    Iterators are refused where the code calls ``next``.
    Tensors are kept apart (``tensors``: id to place): they are inputs of the graph, not constants. Where one
    is at several places, they must go on to hold one and the same tensor.
    ``spots`` are all places of tensors, ``sources`` the random number generators in sight.

    Raises ``Untraceable`` beyond 50,000 values. Not seen: values inside C extensions, and changes in place of
    numpy arrays over 1 MiB that leave 4,096 evenly spaced elements as they are.
    Cost of ``holds``: about 70 ns a value, and one comparison per numpy array.
    """

    def __init__(self, roots: Iterable[Any]):
        self._holders: list[Any] = []
        self._keys: list[Any] = []
        self._values: list[Any] = []
        self._names: list[str] = []
        self._cells: list[Any] = []
        self._cell_values: list[Any] = []
        self._cell_names: list[str] = []
        self._slots: list[tuple[Any, str, Any, str]] = []
        self._sized: list[Any] = []
        self._sizes: list[int] = []
        self._size_names: list[str] = []
        self._empty: list[dict] = []
        self._sets: list[tuple[Any, frozenset, str]] = []
        self._arrays: list[tuple[Any, Any, str]] = []
        self._spaces: dict[int, type] = {}
        self._iterators: list[str] = []
        self._advances = False
        self._twins: list[tuple[tuple[Any, Any], tuple[Any, Any], str]] = []
        self.spots: list[tuple[Tensor, Any, Any]] = []
        self.tensors: dict[int, tuple[Any, Any]] = {}
        self.tensor_names: dict[int, str] = {}
        self.sources: list[Any] = []
        self.kept: list[Any] = []
        self._own: set[str] = set()
        self._libraries: set[int] = set()  # ids of the containers and cells that packages keep for themselves
        self._seen: set[int] = set()
        self._near: deque[tuple[Any, str]] = deque()
        self._code: list[tuple[Any, str]] = []
        for root in roots:
            self._near.append((root, getattr(root, "__name__", type(root).__name__)))
        while self._near or self._code:
            near = bool(self._near)
            thing, name = self._near.popleft() if near else self._code.pop()
            self._visit(thing, name, near)
            if len(self._keys) > _MAX_EDGES:
                raise Untraceable(
                    f"the model can see more than {_MAX_EDGES:,} Python values, among them {name!r};"
                    " keep large objects out of its attributes and globals"
                )
        if self._iterators and self._advances:
            raise Untraceable(
                f"the model can take the next item of the iterator {self._iterators[0]!r}, which a compiled"
                " call would not do; take it outside, and keep it in a tensor"
            )
        del self._near, self._code, self._seen

    def _edge(self, container: Any, key: Any, value: Any, name: str) -> None:
        if id(container) in self._libraries and isinstance(value, _BUILTINS):
            self._libraries.add(id(value))
        if isinstance(value, Tensor):
            self._tensor(value, (container, key), name)
            return
        self._holders.append(container)
        self._keys.append(key)
        self._values.append(value)
        self._names.append(name)
        self._later(value, name)

    def _tensor(self, value: Tensor, place: tuple[Any, Any], name: str) -> None:
        first = self.tensors.setdefault(id(value), place)
        if first is not place:
            self._twins.append((place, first, name))
        self.spots.append((value, *place))
        self.tensor_names.setdefault(id(value), name)
        self.kept.append(value)

    def _later(self, value: Any, name: str) -> None:
        if not isinstance(value, _SCALARS):
            self._near.append((value, name))

    def _foreign(self, module: str | None) -> bool:
        package = _top(module)
        if package == "pyroelbo" and module is not None and module.startswith("pyroelbo.compiled"):
            return True
        return package in _LIBRARIES or (package not in self._own and _installed(package))

    def _walked(self, function: types.FunctionType) -> bool:
        """False for code of packages; functions made by ``exec`` may have no module."""
        return function.__module__ in (None, "builtins") or not self._foreign(function.__module__)

    def _visit(self, thing: Any, name: str, near: bool) -> None:
        if isinstance(thing, type):
            if near:
                self._code.append((thing, name))
            else:
                self._class(thing)
            return
        if id(thing) in self._seen or isinstance(thing, (*_SCALARS, Tensor)):
            return
        self._seen.add(id(thing))
        self.kept.append(thing)
        if isinstance(thing, (nn.Module, types.FunctionType)):
            owner = type(thing) if isinstance(thing, nn.Module) else thing
            if near:
                self._own.add(_top(owner.__module__))
        if isinstance(thing, nn.Module):
            self._module(thing, name)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, name)
        elif isinstance(thing, types.MethodType):
            self._near += [(thing.__self__, name.rpartition(".")[0] or name), (thing.__func__, name)]
        elif isinstance(thing, functools.partial):
            self._near += [(thing.func, name), (thing.args, name), (thing.keywords, name)]
        elif isinstance(thing, (staticmethod, classmethod)):
            self._near.append((thing.__func__, name))
        elif isinstance(thing, property):
            self._later(thing.fget, name)
        elif isinstance(thing, types.ModuleType):
            self._namespace(thing, name)
        elif isinstance(thing, _BUILTINS):
            if isinstance(thing, dict):
                self._items(thing, thing.items(), name)
            elif isinstance(thing, (list, deque)):
                self._items(thing, enumerate(thing), name)
            else:
                self._members(thing, name)
            if type(thing) not in _BUILTINS:
                self._object(thing, name)
        elif isinstance(thing, np.ndarray):
            self._array(thing, name)
        elif isinstance(thing, (array.array, bytearray, contextvars.ContextVar)):
            self._arrays.append((thing, _fingerprint(thing), name))
        elif isinstance(thing, types.MappingProxyType):
            self._items(thing, thing.items(), name)
        elif isinstance(thing, types.BuiltinMethodType):
            self._later(thing.__self__, name)
        elif isinstance(thing, weakref.ref):
            self._later(thing(), name)
        elif _iterates(thing):
            self._iterators.append(name)
        elif isinstance(thing, (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)):
            self.sources.append(thing)
        else:
            self._object(thing, name)

    def _members(self, thing: Any, name: str) -> None:
        if isinstance(thing, set):
            self._sets.append((thing, frozenset(thing), name))
        for i, value in enumerate(thing):
            if isinstance(value, Tensor):
                self.tensor_names.setdefault(id(value), f"{name}[{i}]")
            else:
                self._later(value, f"{name}[{i}]")

    def _array(self, array: np.ndarray, name: str) -> None:
        if array.dtype.hasobject:
            self._later(array.ravel().tolist(), name)
            return
        self._arrays.append((array, _fingerprint(array), name))

    def _object(self, thing: Any, name: str) -> None:
        cls = type(thing)
        if cls.__name__ == "Trace":
            return
        if _top(cls.__module__) in sys.stdlib_module_names and cls.__module__ not in _HOLDERS:
            self._later(getattr(thing, "__wrapped__", None), name)  # of functools.lru_cache
            return
        own = getattr(thing, "__dict__", None)
        if cls.__module__ not in _HOLDERS and _caches(thing):
            self._libraries |= {id(thing), id(own)}
        if isinstance(own, dict):
            self._size(own, name)
            for key, value in list(own.items()):
                self._edge(own, key, value, f"{name}.{key}")
        for base in cls.__mro__:
            slots = vars(base).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else tuple(slots):
                if not slot.startswith("__") and not self._foreign(base.__module__) and hasattr(thing, slot):
                    value = getattr(thing, slot)
                    self._slots.append((thing, slot, value, f"{name}.{slot}"))
                    if isinstance(value, Tensor):
                        self.tensor_names.setdefault(id(value), f"{name}.{slot}")
                    else:
                        self._later(value, f"{name}.{slot}")
        self._code.append((cls, name))

    def _items(self, container: Any, items: Iterable[tuple[Any, Any]], name: str) -> None:
        self._size(container, name)
        for key, value in list(items):
            self._edge(container, key, value, f"{name}[{key!r}]" if isinstance(key, _SCALARS) else name)

    def _size(self, container: Any, name: str) -> None:
        self._sized.append(container)
        self._sizes.append(len(container))
        self._size_names.append(name)

    def _module(self, module: nn.Module, name: str) -> None:
        own = vars(module)
        if _caches(module):
            self._libraries |= {id(own), *(id(own[part]) for part in _REGISTRIES)}
        for part in _REGISTRIES:
            for key, value in own[part].items():
                self._edge(own[part], key, value, f"{name}.{key}")
        builtin = type(module).__module__.startswith("torch.nn.modules.")
        for container in (own, own["_modules"]) if builtin else (own, *(own[part] for part in _REGISTRIES)):
            self._size(container, name)
        for key, value in list(own.items()):
            if key in _HOOKS:
                self._hooks(value, f"{name}.{key}")
                continue
            if "_hooks" in key or key.startswith("_backward") or key == "_is_full_backward_hook":
                continue
            if key in _MODULE_PARTS or (builtin and key != "training" and not isinstance(value, float)):
                continue
            self._edge(own, key, value, f"{name}.{key}")
        self._code.append((type(module), name))

    def _hooks(self, hooks: dict, name: str) -> None:
        if hooks:
            self._items(hooks, hooks.items(), name)
        else:
            self._empty.append(hooks)

    def _class(self, cls: type) -> None:
        for base in cls.__mro__:
            if id(base) in self._seen:
                continue
            self._seen.add(id(base))
            if self._foreign(base.__module__):
                continue
            self.kept.append(base)
            space = vars(base)
            self._spaces[id(space)] = base
            self._size(space, base.__name__)
            for key, value in list(space.items()):
                if not key.startswith("__") or isinstance(value, types.FunctionType):
                    self._edge(space, key, value, f"{base.__name__}.{key}")

    def _function(self, function: types.FunctionType, name: str) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self._near.append((wrapped, name))
        for free, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                continue
            if function.__module__ not in (None, "builtins") and _packaged(function.__module__):
                self._libraries.add(id(cell))
            if isinstance(value, Tensor):
                self._tensor(value, (cell, None), free)
                continue
            self._cells.append(cell)
            self._cell_values.append(value)
            self._cell_names.append(free)
            self._later(value, free)
        for default in function.__defaults__ or ():
            self._later(default, name)
        if function.__kwdefaults__:
            self._later(function.__kwdefaults__, name)
        if self._walked(function):
            self._globals(function)

    def _globals(self, function: types.FunctionType) -> None:
        space, names = function.__globals__, _code_names(function.__code__)
        by_name = names if names.isdisjoint(("getattr", "globals")) else names | _words(function.__code__)
        if "globals" in names:
            names = by_name
        self._advances |= not names.isdisjoint(("next", "__next__"))
        if not names.isdisjoint(("environ", "getenv")):
            self._later(os.environ._data, "os.environ")  # type: ignore[attr-defined]
        modules = []
        for key in names:
            if key in space:
                value = space[key]
            else:
                value = sys.modules.get(key)  # of an import inside the function
            if isinstance(value, types.ModuleType):
                modules.append((value, key))
            elif key in space:
                self._global(space, key, value, key)
        seen = set()
        while modules:
            module, name = modules.pop()
            if _top(module.__name__) in _LIBRARIES or module in seen:
                continue
            seen.add(module)
            foreign, inner = self._foreign(module.__name__), vars(module)
            for attribute in by_name & inner.keys():
                value = inner[attribute]
                if isinstance(value, types.ModuleType):
                    modules.append((value, f"{name}.{attribute}"))
                elif not foreign or _small(value):
                    self._global(inner, attribute, value, f"{name}.{attribute}")

    def _namespace(self, module: types.ModuleType, name: str) -> None:
        """A module that is the value of an attribute or a variable: its code may be asked for any name."""
        if not self._foreign(module.__name__):
            for key, value in list(vars(module).items()):
                if not key.startswith("__") and not isinstance(value, types.ModuleType):
                    self._global(vars(module), key, value, f"{name}.{key}")

    def _global(self, space: dict[str, Any], key: str, value: Any, name: str) -> None:
        if isinstance(value, types.ModuleType):
            return
        if isinstance(value, types.FunctionType) and not self._walked(value):
            return
        if isinstance(value, type) and self._foreign(value.__module__):
            return
        self._edge(space, key, value, name)

    def holds(self) -> bool:
        """True while every value is the same object or an equal scalar, and no container grew or shrank."""
        return self.changed() is None

    def changed(self) -> str | None:
        """The name of the first value that differs, or None."""
        place = self.difference()
        return None if place is None else place[0]

    def difference(self) -> tuple[str, Any, Any] | None:
        """The first value that differs as (name, container or cell, key), or None."""
        try:
            same = all(map(is_, map(getitem, self._holders, self._keys), self._values))
            cells = [cell.cell_contents for cell in self._cells]
        except (KeyError, IndexError, ValueError):
            return self._missing(), None, None
        if not same:
            i = _differs(self._values, list(map(at, self._holders, self._keys)))
            if i is not None:
                return self._names[i], self._holders[i], self._keys[i]
        if not all(map(is_, cells, self._cell_values)):
            i = _differs(self._cell_values, cells)
            if i is not None:
                return self._cell_names[i], self._cells[i], None
        if list(map(len, self._sized)) != self._sizes:
            return next(n for n, c, k in self._containers() if len(c) != k), None, None
        if any(self._empty):
            return "a module's hooks", None, None
        for place, first, name in self._twins:
            if at(*place) is not at(*first):
                return name, None, None
        return self._rare() if self._slots or self._sets or self._arrays else None

    def differences(self) -> list[tuple[Any, Any]]:
        """The places of all items and closure cells that differ."""
        edges = zip(self._holders, self._keys, self._values, strict=True)
        cells = zip(self._cells, self._cell_values, strict=True)
        places = [*edges, *((cell, None, value) for cell, value in cells)]
        found = [(c, k, old, at(c, k)) for c, k, old in places]
        return [(c, k) for c, k, old, now in found if now is not old and not _same(old, now)]

    def _rare(self) -> tuple[str, Any, Any] | None:
        for thing, slot, value, name in self._slots:
            now = getattr(thing, slot, _MISSING)
            if now is not value and not _same(value, now):
                return name, None, None
        for members, before, name in self._sets:
            if members != before:
                return name, None, None
        for values, fingerprint, name in self._arrays:
            if fingerprint != _fingerprint(values):
                return name, None, None
        return None

    def stored(self) -> str | None:
        """The name of a place where a run of the model has left other tensors, or None.

        The user may read it after each call, which a graph would not renew. Packages keep caches so, for
        themselves.
        """
        spots = [(container, key, t, self.tensor_names[id(t)]) for t, container, key in self.spots]
        edges = zip(self._holders, self._keys, self._values, self._names, strict=True)
        for container, key, old, name in (*spots, *edges):
            if id(container) not in self._libraries:
                now = at(container, key)
                if now is not old and _holds_tensors(now):
                    return name
        return None

    def forgive(self) -> str | None:
        """Accept objects that a run of the model has replaced; the name of a changed *value*, or None.

        A guide that makes its plates anew is harmless; a module that counts its calls is not, since a
        compiled call does not run its Python code.
        """
        replaced = []
        for i in range(len(self._keys) - 1, -1, -1):
            now, old = at(self._holders[i], self._keys[i]), self._values[i]
            if now is old or _same(old, now):
                continue
            if isinstance(old, _SCALARS) and isinstance(now, _SCALARS) and old is not None:
                return self._names[i]
            replaced.append(i)
        for name, container, size in self._containers():
            if len(container) > size and isinstance(container, (list, deque)):
                return name
        for i in replaced:
            self._drop(i)
        self._twins = [twin for twin in self._twins if at(*twin[0]) is at(*twin[1])]
        kept = [entry for entry in self._containers() if len(entry[1]) == entry[2]]
        self._size_names, self._sized, self._sizes = (
            (list(part) for part in zip(*kept, strict=True)) if kept else ([], [], [])
        )
        return self.changed()

    def restore(self) -> None:
        """Put back what a run that is refused has changed, so that eager goes on as if it had not been."""
        for container, size in zip(self._sized, self._sizes, strict=True):
            if isinstance(container, (list, deque)):
                while len(container) > size:
                    container.pop()
        for i, value in enumerate(self._values):
            if at(self._holders[i], self._keys[i]) is not value:
                self._put(self._holders[i], self._keys[i], value)
        for tensor, container, key in self.spots:
            if at(container, key) is tensor:
                continue
            if isinstance(container, types.CellType):
                container.cell_contents = tensor
            else:
                self._put(container, key, tensor)
        for cell, value in zip(self._cells, self._cell_values, strict=True):
            cell.cell_contents = value
        for thing, slot, value, _ in self._slots:
            if getattr(thing, slot, _MISSING) is not value:
                setattr(thing, slot, value)

    def _put(self, container: Any, key: Any, value: Any) -> None:
        owner = self._spaces.get(id(container))
        if owner is not None:
            setattr(owner, key, value)
        elif not isinstance(container, types.MappingProxyType):
            container[key] = value

    def _containers(self) -> list[tuple[str, Any, int]]:
        return list(zip(self._size_names, self._sized, self._sizes, strict=True))

    def release(self, container: Any, key: Any) -> None:
        """Stop watching an item of a container, or a closure cell (``key`` is None)."""
        if key is None:
            i = next((i for i, cell in enumerate(self._cells) if cell is container), None)
            if i is not None:
                del self._cells[i], self._cell_values[i], self._cell_names[i]
            return
        for i in range(len(self._keys) - 1, -1, -1):
            if self._holders[i] is container and self._keys[i] == key:
                self._drop(i)

    def _drop(self, i: int) -> None:
        del self._holders[i], self._keys[i], self._values[i], self._names[i]

    def value_before(self, container: Any, key: Any) -> Any:
        """The value seen at that place when this environment was made."""
        if key is None:
            return next(v for c, v in zip(self._cells, self._cell_values, strict=True) if c is container)
        watched = zip(self._holders, self._keys, self._values, strict=True)
        return next(v for c, k, v in watched if c is container and k == key)

    def _missing(self) -> str:
        for container, key, name in zip(self._holders, self._keys, self._names, strict=True):
            try:
                container[key]
            except (KeyError, IndexError):
                return name
        return "a closure variable"


_MISSING = object()


def at(container: Any, key: Any) -> Any:
    """What is at a place: an item of a container, or the content of a closure cell (``key`` is None)."""
    try:
        return container.cell_contents if isinstance(container, types.CellType) else container[key]
    except (KeyError, IndexError, ValueError):
        return _MISSING


def _holds_tensors(value: Any) -> bool:
    """True for tensors, and for containers and distributions of tensors."""
    if isinstance(value, torch.distributions.Distribution):
        value = vars(value)
    if isinstance(value, _BUILTINS):
        return any(map(_holds_tensors, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _small(value: Any) -> bool:
    """True for what is watched in installed packages: scalars and small containers."""
    return isinstance(value, _SCALARS) or (isinstance(value, (dict, list)) and len(value) <= _MAX_ITEMS)


def _iterates(thing: Any) -> bool:
    """True for generators and for iterators of Python itself."""
    return isinstance(thing, Iterator) and type(thing).__module__ in ("builtins", "itertools")


def _fingerprint(values: Any) -> Any:
    if isinstance(values, contextvars.ContextVar):
        return values.get(None)
    if not isinstance(values, np.ndarray):
        return bytes(values)
    if values.nbytes > _MAX_BYTES:
        step = max(1, values.size // _SAMPLED)
        return values.shape, values.dtype, values.reshape(-1)[::step].tobytes()
    return values.shape, values.dtype, values.tobytes()


def _code_names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*map(_code_names, _inner(code)))


def _words(code: types.CodeType) -> set[str]:
    """The strings in a function's code that may be names of attributes."""
    own = {c for c in code.co_consts if isinstance(c, str) and c.isidentifier()}
    return own.union(*map(_words, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float) and math.isnan(old):
        return math.isnan(new)
    if isinstance(old, _SCALARS) and type(old) is type(new):
        return old == new
    return isinstance(old, (types.MethodType, types.BuiltinMethodType)) and old == new


def _differs(old: list[Any], now: list[Any]) -> int | None:
    for i, (before, after) in enumerate(zip(old, now, strict=True)):
        if before is not after:
            if not _same(before, after):
                return i
            old[i] = after
    return None

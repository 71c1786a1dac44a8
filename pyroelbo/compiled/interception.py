"""What runs around Pyro while a loss is traced: functions that would read values keep them in the graph."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro.infer import ELBO
from pyro.ops.provenance import ProvenanceTensor, detach_provenance
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from pyroelbo.compiled import eager
from pyroelbo.compiled.environment import Untraceable
from pyroelbo.compiled.number import Number, Numbers, lowered

__all__ = [
    "FRESH",
    "Census",
    "Interception",
    "LastSite",
    "Read",
    "internal",
    "place",
    "static_pyro",
    "unread",
]

FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
_INTERNAL = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, pyro.__file__, __file__)
)
_STANDARD = (contextlib.__file__, functools.__file__)
_GENERATED = ("<frozen", "<eval_with_key", "<__array_function__")


def internal(path: str) -> bool:
    """True for source files of torch, Pyro and this package."""
    return path.startswith((*_INTERNAL, *_GENERATED)) or path in _STANDARD


def place(frame: FrameType | None) -> str:
    """``file:line`` of the innermost user code below the traced loss, else of the library code."""
    last = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if not internal(path):
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        if path == eager.__file__:
            return last
        if not path.startswith((_INTERNAL[-1], *_GENERATED)) and path not in _STANDARD:
            last = last or f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return last


class Census(TorchDispatchMode):
    """Collects the tensors that a run reads and did not make, and which tensors no guard could check.

    The value of a tensor can be a guard only where it follows from the inputs: ``tainted`` names, by storage,
    those that depend on a random draw or on a tensor that the run has changed in place. ``ranges`` says of
    each ``one_hot`` whether a guard can check its classes. ``unguarded`` are the places where Python code
    makes a number of such a value, with the reason: the trace has to keep it in the graph. ``readers`` are
    the modules of all such code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.free: dict[int, Tensor] = {}
        self._made: Any = WeakIdKeyDictionary()
        self._tainted: dict[int, tuple[str, Any]] = {}  # with the storage, so that its address is not reused
        self._free_storages: set[int] = set()
        self.ranges: list[bool] = []
        self.unguarded: dict[str, str] = {}
        self.readers: dict[int, dict[str, Any]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.arg_tree_leaves(*args, **kwargs)
        given = [x for x in leaves if isinstance(x, Tensor)]
        if func not in FRESH:
            for x in given:
                if x not in self._made and id(x) not in self.free:
                    self.free[id(x)] = x
                    self._free_storages.add(_storage(x))
        self._refuse(func, leaves)
        out = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        for x in made:
            if id(x) not in self.free:
                self._made[x] = True
        self._spread(func, given, made, args)
        return out

    def _refuse(self, func: Any, leaves: list[Any]) -> None:
        for x in leaves:
            if isinstance(x, torch.Generator) and x is not torch.default_generator:
                raise Untraceable(
                    f"the model draws from a torch.Generator of its own at {place(sys._getframe(2))};"
                    " draw from torch's global generator"
                )
        if func.overloadpacket is torch.ops.aten.index:
            masks = (torch.bool, torch.uint8)
            dynamic = any(isinstance(x, Tensor) and x.dtype in masks for x in leaves[1:])
        else:
            dynamic = torch.Tag.dynamic_output_shape in func.tags
        if dynamic:
            raise Untraceable(
                f"the shape of {func.overloadpacket.__name__}'s result depends on values of tensors,"
                f" {place(sys._getframe(2))}"
            )

    def _spread(self, func: Any, given: list[Tensor], made: list[Tensor], args: tuple) -> None:
        taint = next(filter(None, map(self.taint, given)), None)
        if torch.Tag.nondeterministic_seeded in func.tags:
            taint = "depends on a random draw"
        written = func._schema.is_mutable
        for x in made:
            if taint is not None:
                self._taint(x, taint)
        if written:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                for x in pytree.tree_leaves(value):
                    if isinstance(x, Tensor):
                        if _storage(x) in self._free_storages:
                            self._taint(x, "depends on a tensor that the model changes in place")
                        elif taint is not None:
                            self._taint(x, taint)

    def _taint(self, t: Tensor, reason: str) -> None:
        self._tainted[_storage(t)] = reason, t.untyped_storage()

    def taint(self, t: Tensor) -> str | None:
        """Why the value of ``t`` cannot be a guard, or None."""
        return self._tainted.get(_storage(t), (None,))[0]


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


class Read(NamedTuple):
    """A tensor whose value Python code has asked for: ``tensor`` in the graph, where, and its index among the
    numbers of the graph if the code got one of these instead of the value. ``compared`` says that the tensor
    is the outcome of a comparison of such numbers."""

    tensor: Tensor
    where: str
    number: int | None = None
    compared: bool = False


class Interception(TorchFunctionMode):
    """Keeps the numbers of Pyro's loss code in the graph, and collects gradients.

    ``reads`` are the tensors whose values other Python code asked for: the graph holds while they are equal.
    ``.item()`` at the places ``followed`` gives a number of the graph instead (of ``numbers``).
    """

    def __init__(
        self,
        census: Census | None = None,
        ranges: Iterable[bool] = (),
        followed: Iterable[str] = (),
        numbers: Numbers | None = None,
    ) -> None:
        super().__init__()
        self._census = census
        self._ranges = iter(ranges)
        self._followed, self._numbers = frozenset(followed), numbers
        self.gradients: dict[Tensor, Tensor] = {}
        self.reads: list[Read] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _Selection in types and func is not Tensor.__setitem__:
            args, kwargs = pytree.tree_map_only(_Selection, _Selection.made, (args, kwargs))
        if func is Tensor.backward:
            return self._backward(args[0], *args[1:], **kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            return self._index(func, args)
        if func in _FACTORIES:
            return self._factory(func, args, kwargs)
        if func is torch.nn.functional.one_hot:
            return self._one_hot(*args, **kwargs)
        if func in (Tensor.item, Tensor.__bool__) and not isinstance(args[0], Number):
            kept = _kept_in_graph(func, args[0], sys._getframe(1))
            if kept is not None:
                return kept
        reader = _READERS.get(func)
        if reader is not None:
            return self._read(func, reader(*args, **kwargs), args, kwargs, sys._getframe(1))
        if func is Tensor.__deepcopy__:
            return args[0].detach().clone().requires_grad_(args[0].requires_grad)
        if func is Tensor.detach and isinstance(args[0], ProvenanceTensor):
            return detach_provenance(args[0]).detach()
        if any(isinstance(x, Number) for x in pytree.arg_tree_leaves(*args, **kwargs)):
            return lowered(func, args, kwargs)
        return func(*args, **kwargs)

    def _read(self, func: Any, seen: Tensor, args: tuple, kwargs: dict, frame: FrameType) -> Any:
        seen = detach_provenance(seen)
        if self._census is not None:
            seen.detach()  # tolist and numpy read memory without an operation that the census would see
            taint = self._census.taint(seen)
            if taint is not None:
                if func not in _NUMBERS:
                    raise Untraceable(unread(taint, place(frame)))
                self._census.unguarded[place(frame)] = taint
            if not internal(frame.f_code.co_filename):
                self._census.readers[id(frame.f_globals)] = frame.f_globals
            return func(*args, **kwargs)
        where, number = place(frame), None
        try:
            with _disable_current_modes():
                out = func(*args, **kwargs)
            if self._numbers is not None and func is Tensor.item and where in self._followed and _exact(out):
                number, out = len(self._numbers.values), self._numbers.observe(out, seen.detach().double())
        finally:  # a constructor in C++ tries one conversion after another
            self.reads.append(Read(seen.detach().clone(), where, number))
        return out.copy() if isinstance(out, np.ndarray) else out

    def _number(self, t: Any) -> Any:
        return self._read(Tensor.item, t, (t,), {}, sys._getframe(2)) if _integer(t) else t

    def _index(self, func: Any, args: tuple) -> Any:
        index = args[1]
        if func is Tensor.__getitem__ and _integer(index):
            return args[0][index.reshape(1)].squeeze(0)  # torch would ask for the number behind the index
        if isinstance(index, slice):
            index = slice(*map(self._number, (index.start, index.stop, index.step)))
        elif isinstance(index, tuple):
            index = tuple(
                slice(*map(self._number, (i.start, i.stop, i.step)))
                if isinstance(i, slice)
                else self._number(i)
                for i in index
            )
        if _masks(index, args[0]):
            if func is Tensor.__getitem__:
                return _Selection.of(args[0], index)
            if isinstance(args[2], _Selection):
                return args[2].write_to(args[0], index)
        value = tuple(x._tensor if isinstance(x, Number) else x for x in args[2:])
        return func(args[0], index, *pytree.tree_map_only(_Selection, _Selection.made, value))

    def _factory(self, func: Any, args: tuple, kwargs: dict) -> Any:
        place_of_data = _FACTORIES[func]
        named = dict(zip(("data", "dtype", "device"), args[place_of_data:], strict=False)) | kwargs
        values = named.get("data", named.get("obj"))
        leaves = _leaves(values)
        if isinstance(values, Tensor) or not any(isinstance(x, (Tensor, Number)) for x in leaves):
            return func(*args, **kwargs)
        dtype = named.get("dtype") or functools.reduce(torch.promote_types, map(_dtype, leaves))
        device = named.get("device") or (args[0].device if place_of_data else torch.get_default_device())
        out = _stacked(values, dtype).to(device)
        return out.requires_grad_() if named.get("requires_grad") else out

    def _one_hot(self, tensor: Tensor, num_classes: int = -1) -> Tensor:
        if num_classes == -1:
            highest = tensor.max()
            num_classes = 1 + int(self._read(Tensor.item, highest, (highest,), {}, sys._getframe(2)))
        valid = ((tensor >= 0) & (tensor < num_classes)).all()
        if self._census is not None:
            self._census.ranges.append(self._census.taint(valid) is None)
        elif next(self._ranges, False):  # classes that do not depend on a draw: out of range, eager raises
            self._read(Tensor.__bool__, valid, (valid,), {}, sys._getframe(2))
        return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()

    def _backward(self, root, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        leaves, seen, todo = [], set(), [root.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.append(node.variable)
            todo.extend(parent for parent, _ in node.next_functions)
        found = torch.autograd.grad(
            root, leaves, gradient, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
        for leaf, g in zip(leaves, found, strict=True):
            if g is not None:
                self.gradients[leaf] = self.gradients[leaf] + g if leaf in self.gradients else g


class _Selection(Tensor):
    """``source[mask]``, not made yet: ``x[mask] = source[mask]`` needs no shape that depends on values."""

    source: Tensor
    mask: Tensor
    versions: tuple[int, int]

    @staticmethod
    def of(source: Tensor, mask: Tensor) -> _Selection:
        with _disable_current_modes():
            found = torch.empty(0).as_subclass(_Selection)
        found.source, found.mask, found.versions = source, mask, (source._version, mask._version)
        return found

    def made(self) -> Tensor:
        return self.source[self.mask]

    def write_to(self, x: Tensor, mask: Tensor) -> None:
        now = self.source._version, self.mask._version
        if mask is not self.mask or now != self.versions or x.shape != self.source.shape:
            x[mask] = self.made()
        else:
            x.copy_(torch.where(mask, self.source, x))


def _masks(index: Any, x: Tensor) -> bool:
    return (
        isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() > 0 and index.shape == x.shape
    )


def _kept_in_graph(func: Any, t: Tensor, frame: FrameType) -> Any:
    """The answer to ``.item()`` and ``bool()`` in a loss's own code, or None for all other code."""
    module = frame.f_globals.get("__name__", "")
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    own = module.startswith("pyro.infer.") or isinstance(first, ELBO)
    if func is Tensor.item and own:
        value = detach_provenance(t).detach()
        return value.double() if value.is_floating_point() and value.device.type != "mps" else value
    if func is Tensor.__bool__ and module == "pyro.infer.util":
        return True  # Dice: the masked product of ``static_pyro`` covers the other branch
    return None


def unread(taint: str, where: str) -> str:
    """The reason to refuse a graph whose Python code depends on such a value."""
    return f"Python code asks for the value of a tensor that {taint}, {where}"


def _exact(value: Any) -> bool:
    """True for numbers that a float64 tensor can carry."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _integer(index: Any) -> bool:
    return isinstance(index, Tensor) and not index.dim() and index.dtype in (torch.int64, torch.int32)


def _same(t: Tensor, *_: Any, **__: Any) -> Tensor:
    return t


# Reads whose result may stay a number of the graph.
_NUMBERS = (Tensor.item, Tensor.__int__, Tensor.__float__)

# What a guard has to compare where Python code reads a tensor.
_READERS: dict[Any, Callable[..., Tensor]] = {
    Tensor.item: _same,
    Tensor.tolist: _same,
    Tensor.numpy: _same,
    Tensor.__array__: _same,
    Tensor.__dlpack__: _same,
    Tensor.__float__: _same,
    Tensor.__complex__: _same,
    Tensor.__bool__: lambda t: t.bool(),
    torch.is_nonzero: lambda t: t.bool(),
    Tensor.__int__: lambda t: t.long(),
    Tensor.__index__: lambda t: t.long(),
    Tensor.__contains__: lambda t, element: (t == element).any(),
    torch.equal: lambda a, b: (a == b).all() if a.shape == b.shape else torch.zeros(()),
    torch.allclose: lambda a, b, *args, **kwargs: torch.isclose(a, b, *args, **kwargs).all(),
}
_READERS[Tensor.equal] = _READERS[torch.equal]
_READERS[Tensor.allclose] = _READERS[torch.allclose]

# The position of the data among the arguments.
_FACTORIES = {
    torch.tensor: 0,
    torch.as_tensor: 0,
    torch.asarray: 0,
    torch.scalar_tensor: 0,
    Tensor.new_tensor: 1,
}


def _leaves(x: Any) -> list[Any]:
    return [leaf for v in x for leaf in _leaves(v)] if isinstance(x, (list, tuple)) else [x]


def _dtype(x: Any) -> torch.dtype:
    if isinstance(x, (Tensor, Number)):
        return x.dtype
    return torch.tensor(x).dtype


def _stacked(x: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Number):
        return x._tensor.to(dtype)
    if isinstance(x, Tensor):
        return detach_provenance(x).detach().to(dtype).reshape(())
    if isinstance(x, (list, tuple)) and x:
        parts = [_stacked(v, dtype) for v in x]
        return torch.stack([part.to(parts[0].device) for part in parts])
    return torch.tensor(x, dtype=dtype)


class LastSite(Messenger):
    """Remembers the name of the last sample site, for error messages."""

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None

    def _pyro_sample(self, msg) -> None:
        self.name = msg["name"]


def _masked_dot(x: Tensor, y: Tensor) -> Tensor:
    y = torch.where(x > 0, y, torch.zeros_like(y))
    return x * y if x.dim() == 0 else torch.tensordot(x, y, dims=x.dim())


def _tril_matrix_to_vec(mat: Tensor, diag: int = 0) -> Tensor:
    row, column = torch.tril_indices(mat.shape[-1], mat.shape[-1], diag, device=mat.device)
    return mat[..., row, column]


def _vec_to_tril_matrix(vec: Tensor, diag: int = 0) -> Tensor:
    n = next(n for n in itertools.count(max(1, -diag)) if _tril_size(n, diag) >= vec.shape[-1])
    row, column = torch.tril_indices(n, n, diag, device=vec.device)
    mat = vec.new_zeros(*vec.shape[:-1], n, n)
    mat[..., row, column] = vec
    return mat


def _tril_size(n: int, diag: int) -> int:
    return sum(max(0, min(n, i + 1 + diag)) for i in range(n))


@contextmanager
def static_pyro() -> Iterator[None]:
    """Context manager that disables value-dependent steps of Pyro and torch, so that they can be traced."""
    import pyro.infer.util
    import pyro.util
    from torch.distributions import Distribution, transforms

    patches: list[tuple[Any, str, Any]] = [
        (pyro.infer.util, "_fulldot", _masked_dot),
        (pyro.util, "torch_isnan", lambda x: False),
        # A distribution keeps the validation setting that was on when it was made.
        (Distribution, "_validate_sample", lambda self, value: None),
        # The sampler and density of LKJ select a triangle by a mask.
        (transforms, "tril_matrix_to_vec", _tril_matrix_to_vec),
        (transforms, "vec_to_tril_matrix", _vec_to_tril_matrix),
    ]
    before = [getattr(owner, name) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        for (owner, name, _), value in zip(patches, before, strict=True):
            setattr(owner, name, value)

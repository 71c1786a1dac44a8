"""Python numbers as 0-dim tensors of a graph that still promote like Python numbers."""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Number", "Numbers", "shadowed"]

Expression = Callable[[Sequence[float]], Any]


class Numbers:
    """The numbers of one trace that are tensors of its graph, and what Python code asked about their values.

    The first are the lifted floats ``values``; ``observe`` adds what Python code reads from tensors.
    ``guards`` are (expression, result) of comparisons of lifted floats that the code branched on, ``asked``
    those of other numbers, as a tensor and the indices of its numbers. ``read`` are the indices of numbers
    whose value left the graph, which have to stay constants.
    """

    def __init__(self, values: Sequence[float], tensors: Sequence[Tensor]):
        self.values: list[Any] = []
        self.guards: list[tuple[Expression, Any]] = []
        self.asked: list[tuple[Any, frozenset[int]]] = []
        self.read: set[int] = set()
        self.inputs = [self.observe(v, t) for v, t in zip(values, tensors, strict=True)]
        self.lifted = len(self.values)

    def observe(self, value: Any, tensor: Tensor) -> Number:
        """A new number that the float64 ``tensor`` carries in the graph."""
        i = len(self.values)
        self.values.append(value)
        return _number(self, value, tensor, operator.itemgetter(i), frozenset([i]))


class Number:
    """A float, the 0-dim float64 tensor that carries it in a graph, and the expression that made it.

    Arithmetic with Python numbers gives ``Number``; torch functions get the tensor in the dtype that a Python
    number would have there. Comparisons become guards. Anything else reads the value, which
    makes it a constant. ``isinstance`` takes it for the number that it stands for.
    """

    def __init__(self, owner: Numbers, value: float, tensor: Tensor, make: Expression, parts: frozenset[int]):
        self._owner, self._value, self._tensor, self._make, self._parts = owner, value, tensor, make, parts

    @property  # type: ignore[misc]
    def __class__(self):
        return type(self._value)

    @property
    def dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if isinstance(self._value, float) else torch.int64

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return lowered(func, args, kwargs or {})

    def _read(self) -> Any:
        self._owner.read |= self._parts
        return self._value

    def cast(self, kind: type) -> Any:
        """``int(self)`` or ``float(self)`` as a number of the graph."""
        if kind is int and not abs(self._value) < 2**53:
            return int(self._read())
        make, tensor = self._make, self._tensor.trunc() if kind is int else self._tensor
        return _number(self._owner, kind(self._value), tensor, lambda values: kind(make(values)), self._parts)

    def _with(self, op: Callable[..., Any], other: Any, flipped: bool) -> Any:
        if isinstance(other, Tensor):
            function = getattr(torch, op.__name__.replace("truediv", "div"))
            return function(other, self) if flipped else function(self, other)
        if not isinstance(other, (int, float, Number)):
            return NotImplemented
        left, right = (_parts(other), _parts(self)) if flipped else (_parts(self), _parts(other))
        if op is operator.truediv and right.indices and max(right.indices) < self._owner.lifted:
            self._owner.guards.append((lambda values: right.make(values) == 0, right.value == 0))

        def make(values):
            return op(left.make(values), right.make(values))

        value, tensor = op(left.value, right.value), op(left.tensor, right.tensor)
        return _number(self._owner, value, tensor, make, left.indices | right.indices)

    def _ask(self, op: Callable[..., bool], other: Any) -> Any:
        if isinstance(other, Tensor):
            return getattr(torch, op.__name__)(self, other)
        if not isinstance(other, (int, float, Number)):
            return NotImplemented
        right = _parts(other)
        result = op(self._value, right.value)
        indices = self._parts | right.indices
        if max(indices) >= self._owner.lifted:
            self._owner.asked.append((op(self._tensor, right.tensor), indices))
            return result
        self._owner.guards.append((lambda values: op(self._make(values), right.make(values)), result))
        return result

    def _unary(self, op: Callable[..., Any]) -> Number:
        make = self._make
        return _number(
            self._owner, op(self._value), op(self._tensor), lambda values: op(make(values)), self._parts
        )

    def __neg__(self):
        return self._unary(operator.neg)

    def __pos__(self):
        return self

    def __abs__(self):
        return self._unary(operator.abs)

    def __bool__(self):
        return self._ask(operator.ne, 0.0)

    def __eq__(self, other):
        return self._ask(operator.eq, other)

    def __ne__(self, other):
        return self._ask(operator.ne, other)

    def __hash__(self):
        return hash(self._read())

    def __float__(self):
        return self._read()

    def __int__(self):
        return int(self._read())

    def __repr__(self):
        return repr(self._read())

    def __format__(self, spec):
        return format(self._read(), spec)

    def __round__(self, digits=None):
        return round(self._read(), digits)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._read(), name)


class Integer(Number):
    """A :class:`Number` that stands for an int; as an index or a length it is a constant."""

    def __index__(self) -> int:
        return self._read()


def _number(owner: Numbers, value: Any, tensor: Tensor, make: Expression, parts: frozenset[int]) -> Number:
    return (Integer if isinstance(value, int) else Number)(owner, value, tensor, make, parts)


class _Parts(NamedTuple):
    value: Any
    tensor: Any
    make: Expression
    indices: frozenset[int]


def _parts(x: Any) -> _Parts:
    if isinstance(x, Number):
        return _Parts(x._value, x._tensor, x._make, x._parts)
    return _Parts(x, x, lambda values: x, frozenset())


def _plain(x: Any) -> Any:
    return x._read() if isinstance(x, Number) else x


def _install() -> None:
    for name in ("add", "sub", "mul", "truediv", "pow"):
        op = getattr(operator, name)
        setattr(Number, f"__{name}__", lambda self, other, op=op: self._with(op, other, False))
        setattr(Number, f"__r{name}__", lambda self, other, op=op: self._with(op, other, True))
    for name in ("lt", "le", "gt", "ge"):
        op = getattr(operator, name)
        setattr(Number, f"__{name}__", lambda self, other, op=op: self._ask(op, other))
    for name, op in (("floordiv", operator.floordiv), ("mod", operator.mod), ("divmod", divmod)):
        setattr(Number, f"__{name}__", lambda self, other, op=op: op(self._read(), _plain(other)))
        setattr(Number, f"__r{name}__", lambda self, other, op=op: op(_plain(other), self._read()))
    for op in (math.floor, math.ceil, math.trunc):
        setattr(Number, f"__{op.__name__}__", lambda self, op=op: op(self._read()))


_install()

_ELEMENTWISE = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        *(
            "add",
            "sub",
            "subtract",
            "rsub",
            "mul",
            "multiply",
            "div",
            "divide",
            "true_divide",
            "pow",
            "float_power",
        ),
        *("lt", "le", "gt", "ge", "eq", "ne", "less", "greater", "maximum", "minimum", "where", "lerp"),
        *("clamp", "clip", "broadcast_tensors", "xlogy", "logaddexp", "atan2", "copysign"),
        *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
        *(
            "__rdiv__",
            "__div__",
            "__pow__",
            "__rpow__",
            "__lt__",
            "__le__",
            "__gt__",
            "__ge__",
            "__eq__",
            "__ne__",
        ),
        *("add_", "sub_", "mul_", "div_", "__iadd__", "__isub__", "__imul__", "__itruediv__", "fill_"),
        *("exp", "log", "sqrt", "sigmoid", "tanh", "abs", "neg", "square", "log1p", "expm1", "reciprocal"),
        *("masked_fill", "masked_fill_"),
    )
    if hasattr(owner, name)
}

_FULL = {torch.full, torch.full_like, Tensor.new_full}


def _tensors(parts: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for x in parts:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list)):
            found += _tensors(x)
    return found


def lowered(func: Any, args: tuple, kwargs: dict) -> Any:
    """``func`` with every ``Number`` replaced: by its tensor if elementwise, otherwise by its value."""
    if func in _FULL:
        found = [x for x in (*args, *kwargs.values()) if isinstance(x, Number)]
        if len(found) == 1:
            zero = type(found[0]._value)(0)
            plain = [zero if x is found[0] else x for x in args]
            named = {k: zero if x is found[0] else x for k, x in kwargs.items()}
            return func(*plain, **named).fill_(found[0]._tensor)
    others = _tensors((*args, *kwargs.values()))

    def dtype(x: Number) -> torch.dtype:
        like = type(x._value)(1)
        return functools.reduce(
            torch.promote_types, [torch.result_type(t, like) for t in others] or [x.dtype]
        )

    def walk(x: Any) -> Any:
        if isinstance(x, Number):
            return x._tensor.to(dtype(x)) if func in _ELEMENTWISE else x._read()
        return type(x)(walk(v) for v in x) if type(x) in (tuple, list) else x

    return func(*walk(args), **{k: walk(v) for k, v in kwargs.items()})


class _Shadow(type):
    """Stands in for ``int`` or ``float`` in a module's globals: calls keep a ``Number`` in the graph."""

    kind: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            x = args[0].item() if isinstance(args[0], Tensor) else args[0]
            if isinstance(x, Number):
                return x.cast(cls.kind)
        return cls.kind(*args, **kwargs)

    def __instancecheck__(cls, x: Any) -> bool:
        return isinstance(x, cls.kind)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.kind)


_SHADOWS = {kind.__name__: _Shadow(kind.__name__, (), {"kind": kind}) for kind in (int, float)}


@contextmanager
def shadowed(modules: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Context manager: in these modules ``int(x)`` and ``float(x)`` keep a ``Number`` in the graph."""
    changed = [
        (space, name, space.get(name))
        for space in modules
        for name in _SHADOWS
        if space.get(name, getattr(builtins, name)) is getattr(builtins, name)
    ]
    for space, name, _ in changed:
        space[name] = _SHADOWS[name]
    try:
        yield
    finally:
        for space, name, before in changed:
            if before is None:
                del space[name]
            else:
                space[name] = before

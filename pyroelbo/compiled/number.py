"""Python floats as 0-dim inputs of a graph that still promote like Python numbers."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Number", "Numbers"]

Expression = Callable[[Sequence[float]], Any]


class Numbers:
    """The lifted floats of one trace: what Python code asked about their values.

    ``guards`` are (expression, result, where): comparisons that the code branched on. ``read`` are the
    indices of floats whose value left the graph, which have to stay constants.
    """

    def __init__(self, values: Sequence[float], tensors: Sequence[Tensor]):
        self.values = list(values)
        self.guards: list[tuple[Expression, Any]] = []
        self.read: set[int] = set()
        self.inputs = [
            Number(self, v, t, operator.itemgetter(i), frozenset([i]))
            for i, (v, t) in enumerate(zip(values, tensors, strict=True))
        ]


class Number:
    """A float, the 0-dim float64 tensor that carries it in a graph, and the expression that made it.

    Arithmetic with Python numbers gives ``Number``; torch functions get the tensor in the dtype that a Python
    float would have there. Comparisons become guards. Anything else reads the value, which makes it a
    constant.
    """

    def __init__(self, owner: Numbers, value: float, tensor: Tensor, make: Expression, parts: frozenset[int]):
        self._owner, self._value, self._tensor, self._make, self._parts = owner, value, tensor, make, parts

    @property
    def dtype(self) -> torch.dtype:
        return torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return self._tensor.device

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return lowered(func, args, kwargs or {})

    def _read(self) -> float:
        self._owner.read |= self._parts
        return self._value

    def _with(self, op: Callable[..., Any], other: Any, flipped: bool) -> Any:
        if isinstance(other, Tensor):
            function = getattr(torch, op.__name__.replace("truediv", "div"))
            return function(other, self) if flipped else function(self, other)
        if not isinstance(other, (int, float, Number)):
            return NotImplemented
        left, right = (_parts(other), _parts(self)) if flipped else (_parts(self), _parts(other))

        def make(values):
            return op(left.make(values), right.make(values))

        value, tensor = op(left.value, right.value), op(left.tensor, right.tensor)
        return Number(self._owner, value, tensor, make, left.indices | right.indices)

    def _ask(self, op: Callable[..., bool], other: Any) -> Any:
        if isinstance(other, Tensor):
            return getattr(torch, op.__name__)(self, other)
        if not isinstance(other, (int, float, Number)):
            return NotImplemented
        right = _parts(other)
        result = op(self._value, right.value)
        self._owner.guards.append((lambda values: op(self._make(values), right.make(values)), result))
        return result

    def _unary(self, op: Callable[..., Any]) -> Number:
        make = self._make
        return Number(
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


class _Parts(NamedTuple):
    value: Any
    tensor: Any
    make: Expression
    indices: frozenset[int]


def _parts(x: Any) -> _Parts:
    if isinstance(x, Number):
        return _Parts(x._value, x._tensor, x._make, x._parts)
    return _Parts(x, x, lambda values: x, frozenset())


def _install() -> None:
    for name in ("add", "sub", "mul", "truediv", "pow"):
        op = getattr(operator, name)
        setattr(Number, f"__{name}__", lambda self, other, op=op: self._with(op, other, False))
        setattr(Number, f"__r{name}__", lambda self, other, op=op: self._with(op, other, True))
    for name in ("lt", "le", "gt", "ge"):
        op = getattr(operator, name)
        setattr(Number, f"__{name}__", lambda self, other, op=op: self._ask(op, other))
    for name in ("floordiv", "mod", "divmod"):
        method = getattr(float, f"__{name}__")
        setattr(Number, f"__{name}__", lambda self, other, m=method: m(self._read(), float(other)))
        other = getattr(float, f"__r{name}__")
        setattr(Number, f"__r{name}__", lambda self, other, m=other: m(self._read(), float(other)))
    for name in ("floor", "ceil", "trunc"):
        method = getattr(float, f"__{name}__")
        setattr(Number, f"__{name}__", lambda self, m=method: m(self._read()))


_install()
numbers.Real.register(Number)

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
            plain = [0.0 if x is found[0] else x for x in args]
            named = {k: 0.0 if x is found[0] else x for k, x in kwargs.items()}
            return func(*plain, **named).fill_(found[0]._tensor)
    dtype = torch.get_default_dtype()
    others = _tensors((*args, *kwargs.values()))
    if others:
        dtype = functools.reduce(torch.promote_types, (torch.result_type(t, 1.0) for t in others))

    def walk(x: Any) -> Any:
        if isinstance(x, Number):
            return x._tensor.to(dtype) if func in _ELEMENTWISE else x._read()
        return type(x)(walk(v) for v in x) if type(x) in (tuple, list) else x

    return func(*walk(args), **{k: walk(v) for k, v in kwargs.items()})

"""Vectors of eight floats inside numba's compiled functions; LLVM maps them to what the processor has.

Numba's own loops are vectorized one by one, from memory to memory, which leaves short rows scalar. Sums that
stay in registers need the vector as a type. Arrays are contiguous, ``offset`` counts entries of the flat array,
and nobody checks bounds.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

__all__ = [
    "LANES",
    "add",
    "convert",
    "fill",
    "greater",
    "largest",
    "lesser",
    "load",
    "multiply_add",
    "scalar",
    "store",
    "total",
]

LANES = 8
_FLAGS = ("contract", "reassoc", "nsz")


class _Vector(types.Type):
    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_data_type(), LANES))


def _place(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> tuple[Any, int]:
    data = context.make_array(array_type)(context, builder, array).data
    scalar = context.get_data_type(array_type.dtype)
    place = builder.gep(data, [offset])
    size = context.get_abi_sizeof(scalar)
    return builder.bitcast(place, ir.VectorType(scalar, LANES).as_pointer()), size


def _spread(context: Any, builder: Any, vector: _Vector, scalar: Any) -> Any:
    kind = context.get_value_type(vector)
    lane = ir.Constant(ir.IntType(32), 0)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, lane)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), mask)


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """Eight entries from ``offset`` on."""

    def code(context, builder, signature, arguments):
        place, size = _place(context, builder, signature.args[0], *arguments)
        return builder.load(place, align=size)

    return _Vector(array.dtype)(array, types.intp), code


@intrinsic
def scalar(typing: Any, array: Any, offset: Any) -> Any:
    """The entry at ``offset``."""

    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load(builder.gep(data, [arguments[1]]))

    return array.dtype(array, types.intp), code


@intrinsic
def convert(typing: Any, vector: Any, like: Any) -> Any:
    """The vector in the precision of the array ``like``, which is no lower."""

    def code(context, builder, signature, arguments):
        kind = context.get_value_type(signature.return_type)
        return builder.fpext(arguments[0], kind) if arguments[0].type != kind else arguments[0]

    return _Vector(like.dtype)(vector, like), code


@intrinsic
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write a vector to ``offset`` and the following."""

    def code(context, builder, signature, arguments):
        place, size = _place(context, builder, signature.args[0], *arguments[:2])
        builder.store(arguments[2], place, align=size)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def fill(typing: Any, scalar: Any) -> Any:
    """A vector of eight times ``scalar``."""

    def code(context, builder, signature, arguments):
        return _spread(context, builder, signature.return_type, arguments[0])

    return _Vector(scalar)(scalar), code


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c."""

    def code(context, builder, signature, arguments):
        x, y, z = arguments
        return builder.fadd(builder.fmul(x, y, flags=_FLAGS), z, flags=_FLAGS)

    return a(a, b, c), code


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=_FLAGS)

    return a(a, b), code


def _chosen(sign: str) -> Any:
    def choose(typing, a, b):
        def code(context, builder, signature, arguments):
            x, y = arguments
            return builder.select(builder.fcmp_ordered(sign, x, y), x, y)

        return a(a, b), code

    return choose


# b where either is NaN
greater = intrinsic(_chosen(">"))
lesser = intrinsic(_chosen("<"))


def _folded(combine: Any) -> Any:
    def fold(typing, vector):
        def code(context, builder, signature, arguments):
            x = arguments[0]
            undefined, half = ir.Constant(x.type, ir.Undefined), LANES
            while half > 1:
                half //= 2
                order = [(i + half) % LANES for i in range(LANES)]
                mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), order)
                x = combine(builder, x, builder.shuffle_vector(x, undefined, mask))
            return builder.extract_element(x, ir.Constant(ir.IntType(32), 0))

        return vector.dtype(vector), code

    return intrinsic(fold)


total = _folded(lambda builder, x, y: builder.fadd(x, y, flags=_FLAGS))
largest = _folded(lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))

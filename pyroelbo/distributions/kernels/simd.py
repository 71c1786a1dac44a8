"""Vectors of eight floats inside compiled kernels; LLVM maps them to what the processor has (needs numba).

Numba vectorizes loop by loop, from memory to memory, which leaves short rows scalar. Sums that stay in
registers need the vector as a type. Arrays are contiguous, and ``offset`` counts entries of the flat array.
Accesses go
through raw pointers: bounds are checked only if numba's own are, that is with ``NUMBA_BOUNDSCHECK=1``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

__all__ = [
    "LANES",
    "WIDE",
    "add",
    "convert",
    "expect",
    "fill",
    "first_equal",
    "greater",
    "largest",
    "lesser",
    "load",
    "multiply_add",
    "scalar",
    "store",
    "store_halves",
    "tile",
    "total",
]

LANES = 8
# vectors of four rows of sums that fit into the processor's registers
WIDE = 4 if binding.get_host_cpu_features().get("avx512f") else 2
_FLAGS = ("contract", "reassoc", "nsz")


class _Vector(types.Type):
    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Vector({dtype})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_data_type(), LANES))


def _flat(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, entries: int) -> Any:
    """A pointer to ``offset``, from which ``entries`` are about to be read or written."""
    view = context.make_array(array_type)(context, builder, array)
    if config.BOUNDSCHECK:
        end = builder.add(offset, ir.Constant(offset.type, entries))
        before = builder.icmp_signed("<", offset, ir.Constant(offset.type, 0))
        beyond = builder.icmp_signed(">", end, view.nitems)
        with builder.if_then(builder.or_(before, beyond), likely=False):
            context.call_conv.return_user_exc(builder, IndexError, ("vector access out of bounds",))
    return builder.gep(view.data, [offset])


def _load(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    scalar = context.get_data_type(array_type.dtype)
    place = _flat(context, builder, array_type, array, offset, LANES)
    place = builder.bitcast(place, ir.VectorType(scalar, LANES).as_pointer())
    return builder.load(place, align=context.get_abi_sizeof(scalar))


def _scalar(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    return builder.load(_flat(context, builder, array_type, array, offset, 1))


def _store(context: Any, builder: Any, array_type: Any, array: Any, offset: Any, vector: Any) -> None:
    scalar = context.get_data_type(array_type.dtype)
    place = _flat(context, builder, array_type, array, offset, LANES)
    place = builder.bitcast(place, ir.VectorType(scalar, LANES).as_pointer())
    builder.store(vector, place, align=context.get_abi_sizeof(scalar))


def _spread(context: Any, builder: Any, vector: _Vector, scalar: Any) -> Any:
    kind = context.get_value_type(vector)
    lane = ir.Constant(ir.IntType(32), 0)
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, lane)
    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), mask)


def _multiply_add(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return builder.fadd(builder.fmul(x, y, flags=_FLAGS), z, flags=_FLAGS)


def _larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y, flags=("nnan", "nsz")), x, y)


def _larger_sum(builder: Any, x: Any, y: Any, z: Any) -> Any:
    return _larger(builder, builder.fadd(x, y, flags=_FLAGS), z)


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """Eight entries from ``offset`` on."""

    def code(context, builder, signature, arguments):
        return _load(context, builder, signature.args[0], *arguments)

    return _Vector(array.dtype)(array, types.intp), code


@intrinsic
def scalar(typing: Any, array: Any, offset: Any) -> Any:
    """The entry at ``offset``."""

    def code(context, builder, signature, arguments):
        return _scalar(context, builder, signature.args[0], *arguments)

    return array.dtype(array, types.intp), code


@intrinsic
def convert(typing: Any, vector: Any, like: Any) -> Any:
    """The vector in the dtype of the array ``like``, of the same or a higher precision."""

    def code(context, builder, signature, arguments):
        kind = context.get_value_type(signature.return_type)
        return builder.fpext(arguments[0], kind) if arguments[0].type != kind else arguments[0]

    return _Vector(like.dtype)(vector, like), code


@intrinsic
def store(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """Write a vector to ``offset`` and the following."""

    def code(context, builder, signature, arguments):
        _store(context, builder, signature.args[0], *arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def store_halves(typing: Any, array: Any, offset: Any, vector: Any) -> Any:
    """``store`` in two halves: entries of a vector as long as a cache line are slow to read soon after."""

    def code(context, builder, signature, arguments):
        data, offset, value = arguments
        half = LANES // 2
        scalar = context.get_data_type(signature.args[0].dtype)
        place = _flat(context, builder, signature.args[0], data, offset, LANES)
        for lower in (0, half):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), half), [lower + i for i in range(half)])
            part = builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), mask)
            there = builder.gep(place, [ir.Constant(offset.type, lower)])
            there = builder.bitcast(there, ir.VectorType(scalar, half).as_pointer())
            builder.store(part, there, align=context.get_abi_sizeof(scalar))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def expect(typing: Any, array: Any, offset: Any) -> Any:
    """Prefetch the line at ``offset``, soon to be written; it may lie outside the array."""

    def code(context, builder, signature, arguments):
        kind = signature.args[0]
        data = context.make_array(kind)(context, builder, arguments[0]).data
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        builder.call(prefetch, [place, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), code


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
        return _multiply_add(builder, *arguments)

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


@intrinsic
def first_equal(typing: Any, a: Any, b: Any) -> Any:
    """The first lane in which both are equal, ``LANES`` if there is none."""

    def code(context, builder, signature, arguments):
        same = builder.bitcast(builder.fcmp_ordered("==", *arguments), ir.IntType(LANES))
        return builder.zext(builder.cttz(same, ir.Constant(ir.IntType(1), 0)), ir.IntType(64))

    return types.intp(a, b), code


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


@intrinsic(prefer_literal=True)
def tile(
    typing: Any,
    kind: Any,
    height: Any,
    width: Any,
    count: Any,
    x: Any,
    x_at: Any,
    y: Any,
    y_at: Any,
    out: Any,
    out_at: Any,
) -> Any:
    """out[r, c] = Σ_k x[r, k] · y[k, c] for k < ``count``, with all sums in registers.

    ``kind``, ``height`` and ``width`` are literal: r < ``height``, c < 8 ``width``. "sum" is as above, "onto"
    adds to what is in ``out``, "best" is max_k (x + y) instead. ``x_at`` is (offset, row stride, k stride),
    ``y_at`` and ``out_at`` are (offset, row stride).
    """
    best, onto = kind.literal_value == "best", kind.literal_value == "onto"
    rows, vectors = height.literal_value, width.literal_value
    # several chains of sums, so that one need not wait for the other
    ways = max(1, 4 // (rows * vectors))

    def code(context, builder, signature, arguments):
        _, _, _, _, type_x, _, type_y, _, type_out, _ = signature.args
        count, x, x_at, y, y_at, out, out_at = arguments[3:]
        at, across, along = cgutils.unpack_tuple(builder, x_at, 3)
        (place, stride), (to, step) = (cgutils.unpack_tuple(builder, t, 2) for t in (y_at, out_at))
        vector = context.get_value_type(_Vector(type_y.dtype))
        combine = _larger_sum if best else _multiply_add

        def plus(value, factor, times):
            return builder.add(value, builder.mul(factor, ir.Constant(value.type, times)))

        def cell(r, v):
            return builder.add(plus(to, step, r), ir.Constant(to.type, v * LANES))

        def initial(r, v, way):
            if onto and way == 0:
                return _load(context, builder, type_out, out, cell(r, v))
            return ir.Constant(vector, [-float("inf") if best else 0.0] * LANES)

        cells = [(r, v) for r in range(rows) for v in range(vectors)]
        sums = {
            (r, v, way): cgutils.alloca_once_value(builder, initial(r, v, way))
            for r, v in cells
            for way in range(ways)
        }

        def extend(k, way):
            row = builder.add(place, builder.mul(k, stride))
            there = builder.add(at, builder.mul(k, along))
            given = [
                _load(context, builder, type_y, y, builder.add(row, ir.Constant(row.type, v * LANES)))
                for v in range(vectors)
            ]
            for r in range(rows):
                one = _scalar(context, builder, type_x, x, plus(there, across, r))
                factor = _spread(context, builder, _Vector(type_y.dtype), one)
                for v in range(vectors):
                    total = sums[r, v, way]
                    builder.store(combine(builder, factor, given[v], builder.load(total)), total)

        full = builder.lshr(count, ir.Constant(count.type, ways.bit_length() - 1))
        step_of = ir.Constant(count.type, ways)
        with cgutils.for_range(builder, full) as loop:
            for way in range(ways):
                first = builder.mul(loop.index, step_of)
                extend(builder.add(first, ir.Constant(count.type, way)), way)
        if ways > 1:
            rest, one = builder.mul(full, step_of), ir.Constant(count.type, 1)
            with cgutils.for_range_slice(builder, rest, count, one) as (k, _):
                extend(k, 0)
        for r, v in cells:
            value = builder.load(sums[r, v, 0])
            for way in range(1, ways):
                other = builder.load(sums[r, v, way])
                value = _larger(builder, value, other) if best else builder.fadd(value, other, flags=_FLAGS)
            _store(context, builder, type_out, out, cell(r, v), value)
        return context.get_dummy_value()

    number = types.intp
    pair, triple = types.UniTuple(number, 2), types.UniTuple(number, 3)
    return types.void(kind, height, width, number, x, triple, y, pair, out, pair), code

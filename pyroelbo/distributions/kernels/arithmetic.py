"""Exponentials, layouts and products of matrices inside compiled kernels (needs numba).

Matrices that are read as vectors are "laid out": ``[S, padded]``, with S columns rounded up to whole vectors,
in panels of ``panel`` columns one after the other, each of them row by row:

    panel 0: row 0, row 1, ..., row S-1 | panel 1: row 0, ..., row S-1 | ...   (the last may be narrower)

What lies beyond column S is zero (-inf for "best"). Addresses are offsets into the flat array.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types
from numba.extending import overload

from pyroelbo.distributions.kernels.gate import REORDER, compiled
from pyroelbo.distributions.kernels.simd import (
    LANES,
    WIDE,
    add,
    fill,
    greater,
    largest,
    load,
    multiply_add,
    scalar,
    tile,
)

__all__ = [
    "PIECE",
    "aligned",
    "exp_laid_out",
    "exp_of",
    "exponential",
    "exponentials",
    "laid_out",
    "multiply",
    "narrow",
]

PIECE = 4096  # numbers processed at a time, so that they stay in the cache
_LINE = 64  # bytes of a cache line


@compiled
def aligned(rows, columns, like):
    """An uninitialized array [rows, columns] that starts on a cache line.

    A vector that straddles two lines is slow to read entry by entry soon after it was written.
    """
    raw = np.empty(rows * columns + _LINE // like.itemsize, like.dtype)
    skip = (-raw.ctypes.data % _LINE) // like.itemsize
    return raw[skip : skip + rows * columns].reshape(rows, columns)


def exponential(x, spare):
    """x = exp(x) in place for x <= 0, vectorized by the compiler; zero below the normal range."""


# no reordering: adding and subtracting a large number, which rounds, must not be simplified away
@overload(exponential, jit_options={"fastmath": {"contract", "nsz"}})
def _(x, spare):
    if x.dtype == types.float32:
        low32, magic32 = np.float32(-87.0), np.float32(12582912.0)
        high32, rest32 = np.float32(0.693359375), np.float32(-2.12194440e-4)
        rate32, one32, zero32 = np.float32(1.4426950408889634), np.float32(1), np.float32(0)
        c2, c3, c4 = np.float32(1 / 2), np.float32(1 / 6), np.float32(1 / 24)
        c5, c6, c7 = np.float32(1 / 120), np.float32(1 / 720), np.float32(1 / 5040)

        def run32(x, spare):
            bits, shift = x.view(np.int32), spare.view(np.int32)
            for j in range(x.shape[0]):
                ok = x[j] > low32
                y = x[j] if ok else low32
                z = y * rate32 + magic32
                n = z - magic32
                r = (y - n * high32) - n * rest32
                p = ((((((c7 * r + c6) * r + c5) * r + c4) * r + c3) * r + c2) * r + one32) * r + one32
                spare[j] = z if ok else magic32
                x[j] = p if ok else zero32
            for j in range(x.shape[0]):
                bits[j] += shift[j] << np.int32(23)

        return run32

    low, magic = -708.0, 6755399441055744.0
    high, rest = 6.93145751953125e-1, 1.42860682030941723212e-6
    rate = 1.4426950408889634
    c = tuple(1.0 / math.factorial(n) for n in range(13))

    def run(x, spare):
        bits, shift = x.view(np.int64), spare.view(np.int64)
        for j in range(x.shape[0]):
            ok = x[j] > low
            y = x[j] if ok else low
            z = y * rate + magic
            n = z - magic
            r = (y - n * high) - n * rest
            p = ((((c[12] * r + c[11]) * r + c[10]) * r + c[9]) * r + c[8]) * r + c[7]
            p = ((((p * r + c[6]) * r + c[5]) * r + c[4]) * r + c[3]) * r + c[2]
            p = (p * r + 1.0) * r + 1.0
            spare[j] = z if ok else magic
            x[j] = p if ok else 0.0
        for j in range(x.shape[0]):
            bits[j] += shift[j] << 52

    return run


@compiled
def exponentials(x, spare):
    """``exponential`` of a long flat array, piece by piece."""
    for start in range(0, x.shape[0], PIECE):
        piece = x[start : start + PIECE]
        exponential(piece, spare[: piece.shape[0]])


@compiled
def _top(x):
    """The largest entry of a flat array, 0 if all are -inf; undefined if one is NaN."""
    top, whole = x[0], x.shape[0] - x.shape[0] % (2 * LANES)
    if whole:
        tops, others = load(x, 0), load(x, LANES)
        for j in range(2 * LANES, whole, 2 * LANES):
            tops, others = greater(load(x, j), tops), greater(load(x, j + LANES), others)
        top = largest(greater(tops, others))
    for j in range(whole, x.shape[0]):
        top = max(top, x[j])
    return top if top != -math.inf else x.dtype.type(0)


@compiled
def _below(x, top, out):
    """out = x - top for flat arrays; returns the sum, NaN only if an entry is, since none is positive."""
    one = out.dtype.type(1)
    differences = one * 0
    for j in range(x.shape[0]):
        value = one * x[j] - out.dtype.type(top)
        out[j] = value
        differences += value
    return differences


@compiled
def exp_of(x, out, spare):
    """out = exp(x - top) for flat arrays; returns top, the largest (0 if all are -inf, NaN if one is)."""
    top, differences = _top(x), 0.0
    for start in range(0, x.shape[0], PIECE):
        piece = out[start : start + PIECE]
        differences += _below(x[start : start + PIECE], top, piece)
        exponential(piece, spare[: piece.shape[0]])
    return math.nan if differences != differences else float(top)


@compiled
def _copied(matrices, u, workspace, panel):
    size, padded = matrices.shape[-1], workspace.shape[1]
    flat = workspace.reshape(-1)
    for start in range(0, padded, panel):
        width, stride = min(panel, size - start), min(panel, padded - start)
        for i in range(size):
            at = start * size + i * stride
            given, row = matrices[u, i, start : start + width], flat[at : at + width]
            for j in range(width):
                row[j] = given[j]
    return workspace


@compiled
def laid_out(matrices, u, workspace, panel):
    """``matrices[u]`` laid out: copied to ``workspace``, S rows or more of padded columns, or itself if it
    is laid out already.
    """
    if matrices.shape[-1] == workspace.shape[1] and panel >= workspace.shape[1]:
        return matrices[u]
    return _copied(matrices, u, workspace, panel)


@compiled
def exp_laid_out(matrix, workspace, panel, spare):
    """``exp_of`` of a matrix [S,S], laid out in ``workspace``; returns the top."""
    size, padded = matrix.shape[0], workspace.shape[1]
    flat, top, differences = workspace.reshape(-1), _top(matrix.reshape(-1)), 0.0
    for start in range(0, padded, panel):
        width, stride = min(panel, size - start), min(panel, padded - start)
        some = max(1, PIECE // stride)
        for first in range(0, size, some):
            rows = min(some, size - first)
            piece = flat[start * size + first * stride : start * size + (first + rows) * stride]
            for i in range(rows):
                given, row = matrix[first + i, start : start + width], spare[i * stride : (i + 1) * stride]
                for j in range(width):
                    row[j] = given[j]
                row[width:] = -math.inf
            differences += _below(spare[: piece.shape[0]], top, piece)
            exponential(piece, spare[: piece.shape[0]])
    return math.nan if differences != differences else float(top)


def multiply(kind, height, shape, x, x_at, y, y_at, out, out_at):
    """out[r, c] = Σ_k x[r, k] · y[k, c] for ``shape`` = (rows, k's); see ``simd.tile`` for ``kind``.

    Rows go ``height`` (a literal 1 or 4) at a time: rows rounded up to it are read and written.

    Args:
        x_at: offset, row stride and k stride of ``x``.
        y_at: offset and panel width of ``y``, which is laid out.
        out_at: offset and number of columns (whole vectors) of ``out``.
    """


@overload(multiply, prefer_literal=True, jit_options={"fastmath": set(REORDER), "forceinline": True})
def _(kind, height, shape, x, x_at, y, y_at, out, out_at):
    how, tall = kind.literal_value, height.literal_value

    def run(kind, height, shape, x, x_at, y, y_at, out, out_at):
        rows, count = shape
        at, across, along = x_at
        place, panel = y_at
        to, columns = out_at
        for r in range(0, rows, tall):
            left, there = (at + r * across, across, along), to + r * columns
            for start in range(0, columns, panel):
                j, end = start, min(start + panel, columns)
                shift, stride = place + start * (count - 1), end - start
                while j + WIDE * LANES <= end:
                    tile(how, tall, WIDE, count, x, left, y, (shift + j, stride), out, (there + j, columns))
                    j += WIDE * LANES
                if j + 2 * LANES <= end:
                    tile(how, tall, 2, count, x, left, y, (shift + j, stride), out, (there + j, columns))
                    j += 2 * LANES
                if j < end:
                    tile(how, tall, 1, count, x, left, y, (shift + j, stride), out, (there + j, columns))

    return run


def narrow(kind, count, x, at, y):
    """Two vectors, Σ_k x[at + k] · y[k, c] for k < ``count``, c < 2 ``LANES``; see ``simd.tile`` for
    ``kind``.

    ``count`` is rounded up to a multiple of four: entries beyond it must add nothing.
    """


@overload(narrow, prefer_literal=True, jit_options={"fastmath": set(REORDER), "forceinline": True})
def _(kind, count, x, at, y):
    best = kind.literal_value == "best"
    empty = -math.inf if best else 0.0

    def run(kind, count, x, at, y):
        left = fill(y.dtype.type(empty))
        # two chains of sums, so that one need not wait for the other
        right, other_left, other_right = left, left, left
        for k in range(0, count, 4):
            place = 2 * LANES * k
            for i in range(0, 4, 2):
                one, two = fill(scalar(x, at + k + i)), fill(scalar(x, at + k + i + 1))
                a, b = load(y, place), load(y, place + LANES)
                c, d = load(y, place + 2 * LANES), load(y, place + 3 * LANES)
                if best:
                    left, right = greater(add(one, a), left), greater(add(one, b), right)
                    other_left, other_right = (
                        greater(add(two, c), other_left),
                        greater(add(two, d), other_right),
                    )
                else:
                    left, right = multiply_add(one, a, left), multiply_add(one, b, right)
                    other_left, other_right = (
                        multiply_add(two, c, other_left),
                        multiply_add(two, d, other_right),
                    )
                place += 4 * LANES
        if best:
            return greater(left, other_left), greater(right, other_right)
        return add(left, other_left), add(right, other_right)

    return run

"""The compiled E-step of Gaussian mixtures (needs numba): data go by in blocks that stay in the cache."""

from __future__ import annotations

import math

import numpy as np

from pyroelbo.distributions.kernels.arithmetic import PIECE, aligned, compiled, exponentials, multiply
from pyroelbo.distributions.kernels.simd import (
    LANES,
    add,
    fill,
    first_equal,
    greater,
    largest,
    load,
    multiply_add,
    store,
    total,
)

__all__ = ["LANES", "share_out"]

# so many numbers are held at a time
_ROOM = 1 << 15


@compiled
def _describe(x, dims, diagonal, phi, at):
    """Products of coordinates from phi[at] on, in the order of ``mixture._Features``, and the coordinates themselves."""
    if diagonal:
        for d in range(dims):
            phi[at + d] = x[d] * x[d]
        at += dims
    else:
        none = fill(x.dtype.type(0))
        for first in range(0, dims, LANES):
            for second in range(first, dims, LANES):
                width = min(LANES, dims - second)
                for d in range(first, min(first + LANES, dims)):
                    if width == LANES:
                        store(phi, at, multiply_add(fill(x[d]), load(x, second), none))
                    else:
                        for e in range(width):
                            phi[at + e] = x[d] * x[second + e]
                    at += width
    for d in range(dims):
        phi[at + d] = x[d]


@compiled
def _normalize(share, rows, size, hard, spare, peak, norm, counts):
    """Rows of ``share``, R mixtures of ``size`` numbers each, become shares of one; ``peak`` and ``norm [R,rows]`` give
    the logarithm of what they were shares of.
    """
    columns = counts.shape[0]
    none = fill(share.dtype.type(0))
    flat = share.reshape(-1)
    for i in range(rows):
        for r in range(columns // size):
            at = i * columns + r * size
            tops = load(flat, at)
            for j in range(at + LANES, at + size, LANES):
                tops = greater(load(flat, j), tops)
            top = largest(tops)
            peak[r, i], norm[r, i] = top, 1.0
            if hard:
                chosen = size
                for j in range(0, size, LANES):
                    lane = first_equal(load(flat, at + j), fill(top))
                    if lane < LANES and chosen == size:
                        chosen = j + lane
                    store(flat, at + j, none)
                if chosen < size:
                    flat[at + chosen] = 1.0
            else:
                shift = fill(-top)
                for j in range(at, at + size, LANES):
                    store(flat, j, add(load(flat, j), shift))
    if not hard:
        exponentials(flat[: rows * columns], spare)
    for i in range(rows):
        for r in range(columns // size):
            at = i * columns + r * size
            sums = none
            for j in range(at, at + size, LANES):
                sums = add(sums, load(flat, j))
            whole = total(sums)
            if not hard:
                norm[r, i] = whole
            # where a score is no number, neither are the sums: exponentials alone would hide it
            inverse = fill(share.dtype.type(1) / whole if whole > 0 else share.dtype.type(math.nan))
            for j in range(0, size, LANES):
                value = multiply_add(load(flat, at + j), inverse, none)
                store(flat, at + j, value)
                store(counts, r * size + j, add(load(counts, r * size + j), value))


@compiled
def share_out(y, center, weights, constant, size, diagonal, hard, peak, norm, counts, sums, most):
    """One pass over ``y [N,D]``: scores φ(y - center) · ``weights [F,C]`` + ``constant [C]``, C being R mixtures of ``size``
    numbers, whole vectors; adds up the shares in ``counts [C]``, and their products with φ in ``sums [C,≥F]``, whole
    vectors too; ``most [D]`` is the largest square of each coordinate. See ``_normalize`` for the rest.
    """
    rows, dims = y.shape
    features, columns = weights.shape
    wide = sums.shape[1]
    some = min(rows + 3, max(64, _ROOM // max(wide, columns))) // 4 * 4
    # so many rows of weights stay in the cache while all rows of data pass
    many = max(4, _ROOM // columns)
    phi, share = aligned(some, wide, sums), aligned(some, columns, sums)
    # what is taken along beyond the last row and feature is finite
    phi[:] = 0
    share[:] = 0
    x, spare = np.zeros(dims + LANES), np.empty(PIECE)
    for start in range(0, rows, some):
        count = min(some, rows - start)
        for i in range(count):
            for d in range(dims):
                x[d] = y[start + i, d] - center[d]
                most[d] = max(most[d], x[d] * x[d])
            _describe(x, dims, diagonal, phi[i], 0)
            share[i] = constant
        tall = (count + 3) // 4 * 4
        for f in range(0, features, many):
            each = min(many, features - f)
            multiply("onto", 4, tall, each, phi, f, wide, 1, weights, f * columns, columns, columns, share, 0)
        part = slice(start, start + count)
        _normalize(share, count, size, hard, spare, peak[:, part], norm[:, part], counts)
        multiply("onto", 4, columns, count, share, 0, 1, columns, phi, 0, wide, wide, sums, 0)

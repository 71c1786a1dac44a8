"""The E-step of Gaussian mixtures (needs numba): the data pass in blocks that stay in the cache.

N data of D coordinates; R mixtures of M components, C = R · (M rounded up to whole vectors of LANES)
F features φ(y): products of coordinates, in the order of ``mixture._Features``, then the coordinates

y         [N, D]
center    [D]       subtracted from y
weights   [F, C]    a component's log weight is φ(y - center) · weights + constant
constant  [C]       -inf in the padding
peak      [R, N]    filled: the largest log weight of each mixture
norm      [R, N]    filled: Σ_m exp(log weight - peak); 1 if ``hard``
counts    [C]       updated in place: sums over the data of the responsibilities
sums      [C, >=F]  updated in place, whole vectors: sums of responsibilities times features
square    [D]       updated in place: the largest square of each coordinate of y - center
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pyroelbo.distributions.kernels.arithmetic import PIECE, aligned, exponentials, multiply
from pyroelbo.distributions.kernels.gate import compiled, expect_contiguous, expect_shapes, kernel
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

__all__ = ["LANES", "Statistics", "e_step"]

_BLOCK = 1 << 15  # numbers held at a time


class Statistics(NamedTuple):
    """What ``e_step`` fills and updates, see the module's diagram."""

    peak: np.ndarray
    norm: np.ndarray
    counts: np.ndarray
    sums: np.ndarray
    square: np.ndarray


@compiled
def _describe(x, dims, diagonal, phi, at):
    """Fill the features of one datum from phi[at] on."""
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
def _products(dims):
    """How many products of coordinates ``_describe`` fills: whole blocks of a symmetric matrix."""
    count = 0
    for first in range(0, dims, LANES):
        count += min(LANES, dims - first) * (dims - first)
    return count


@compiled
def _peak(flat, at, size):
    """The largest of a mixture's log weights."""
    tops = load(flat, at)
    for j in range(at + LANES, at + size, LANES):
        tops = greater(load(flat, j), tops)
    return largest(tops)


@compiled
def _mark_peak(flat, at, size, top):
    """Replace a mixture's log weights by 1 at the first that is ``top`` and 0 elsewhere."""
    chosen = size
    for j in range(0, size, LANES):
        lane = first_equal(load(flat, at + j), fill(top))
        if lane < LANES and chosen == size:
            chosen = j + lane
        store(flat, at + j, fill(flat.dtype.type(0)))
    if chosen < size:
        flat[at + chosen] = 1.0


@compiled
def _normalize(log_weight, rows, size, hard, spare, peak, norm, counts):
    """The first ``rows`` of ``log_weight`` become responsibilities, in place; ``peak`` and ``norm [R,rows]``
    are filled.
    """
    columns = counts.shape[0]
    none = fill(log_weight.dtype.type(0))
    flat = log_weight.reshape(-1)
    for i in range(rows):
        for r in range(columns // size):
            at = i * columns + r * size
            top = _peak(flat, at, size)
            peak[r, i], norm[r, i] = top, 1.0
            if hard:
                _mark_peak(flat, at, size, top)
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
            # if a log weight is NaN, so are the sums: exponentials alone would hide it
            inverse = fill(flat.dtype.type(1) / whole if whole > 0 else flat.dtype.type(math.nan))
            for j in range(0, size, LANES):
                value = multiply_add(load(flat, at + j), inverse, none)
                store(flat, at + j, value)
                store(counts, r * size + j, add(load(counts, r * size + j), value))


@kernel
def e_step(y, center, weights, constant, size, diagonal, hard, out):
    """One pass over the data for mixtures of ``size`` components (whole vectors); updates ``out``."""
    expect_contiguous(y, center, weights, constant, out)
    rows, dims = y.shape
    features, columns = weights.shape
    expect_shapes(size > 0 and size % LANES == 0 and columns % size == 0 and dims > 0)
    expect_shapes(
        center.shape == out.square.shape == (dims,) and constant.shape == out.counts.shape == (columns,)
    )
    expect_shapes(out.peak.shape == out.norm.shape == (columns // size, rows))
    wide = out.sums.shape[1]
    expect_shapes(out.sums.shape[0] == columns and wide >= features and wide % LANES == 0)
    products = dims if diagonal else _products(dims)
    expect_shapes(features == products + dims)
    some = min(rows + 3, max(64, _BLOCK // max(wide, columns))) // 4 * 4
    # rows of weights that stay in the cache while all rows of data pass
    many = max(4, _BLOCK // columns)
    # what is computed along with the last row and feature must be finite
    phi, log_weight = aligned(some, wide, out.sums), aligned(some, columns, out.sums)
    phi[:] = 0
    log_weight[:] = 0
    x, spare = np.zeros(dims + LANES), np.empty(PIECE)
    for start in range(0, rows, some):
        count = min(some, rows - start)
        for i in range(count):
            for d in range(dims):
                x[d] = y[start + i, d] - center[d]
                out.square[d] = max(out.square[d], x[d] * x[d])
            _describe(x, dims, diagonal, phi[i], 0)
            log_weight[i] = constant
        tall = (count + 3) // 4 * 4
        for f in range(0, features, many):
            part = (f * columns, columns)
            each = min(many, features - f)
            multiply("onto", 4, (tall, each), phi, (f, wide, 1), weights, part, log_weight, (0, columns))
        now = slice(start, start + count)
        _normalize(log_weight, count, size, hard, spare, out.peak[:, now], out.norm[:, now], out.counts)
        # responsibilities transposed times features
        multiply(
            "onto", 4, (columns, count), log_weight, (0, 1, columns), phi, (0, wide), out.sums, (0, wide)
        )

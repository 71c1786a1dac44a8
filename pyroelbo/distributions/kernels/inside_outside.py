"""Inside and outside passes of binary grammars, sentence by sentence (needs numba).

    B sentences of L words; n nonterminals, wide = n rounded up to whole vectors of LANES, zero beyond n
    G in {1, B} grammars (shared by the batch or not); slot = n · wide

    left         [L, B, L+1, wide]  left[i, b, w]: inside weights of the span of width w from word i on
    right        [L, B, L+1, wide]  right[j, b, L-w]: the same of the span of width w up to word j
    left_scale   [L, B, L+1]        logarithm of the scale of left
    right_scale  [L, B, L+1]        the same of right
    inverse      [L, B, L+1]        what the weights in left were multiplied by
    factor       [L, B, L+1, wide]  weights of the spans themselves, or empty
    top          [L, B, L+1]        logarithm of the scale of factor, or empty
    two          [L-1, B, n]        inside: weights of spans of two words; outside: their gradients
    leaf_left    [L, B, n, wide]    a leaf on the left turns its right sibling into the parent
    leaf_right   [L, B, n, wide]    a leaf on the right turns its left sibling into the parent
    inner        [G, slot, wide]    inside: from (left, right) to the parent
                 [G, n, n, wide]    outside: from the parent to (left, right)
    lengths      [B]                in 1..L; spans beyond a length are padding: never filled

All charts are updated in place. With i the first and j the last word, the splits of a span go by the width u
of the left part: left parts left[i, b, u] and right parts right[j, b, L-w+u] both lie in a row, in the same
order. A span of width w has its place at [i, w] in ``by_left`` and ``via_left``, at [j, L-w] in ``by_right``
and ``via_right``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pyroelbo.distributions.kernels.arithmetic import exponential, multiply
from pyroelbo.distributions.kernels.gate import (
    compiled,
    expect_contiguous,
    expect_index,
    expect_shapes,
    kernel,
)
from pyroelbo.distributions.kernels.simd import LANES, fill, load, multiply_add, store

__all__ = ["LANES", "Charts", "Downward", "Gradients", "Upward", "inside", "outside"]

_PAIRS = 1 << 16  # numbers of pairs of labels held at a time


class Charts(NamedTuple):
    """Inside weights and their scales, see the module's diagram."""

    left: np.ndarray
    right: np.ndarray
    left_scale: np.ndarray
    right_scale: np.ndarray
    inverse: np.ndarray
    factor: np.ndarray


class Upward(NamedTuple):
    """What ``inside`` reads: ``inner`` is scaled by exp(-base [G]); ``possible`` is like ``factor``, or
    empty.
    """

    two: np.ndarray
    leaf_left: np.ndarray
    leaf_right: np.ndarray
    inner: np.ndarray
    base: np.ndarray
    top: np.ndarray
    possible: np.ndarray
    lengths: np.ndarray


class Downward(NamedTuple):
    """What ``outside`` reads: matrices from the parent, ``inner`` to (left, right) and ``transposed`` to
    (right, left); ``posterior [B,n]`` of the root; a sentence whose expected number of ``nodes [B]`` is off
    by more than ``slack [B]`` is not reliable; ``grad [B]``.
    """

    leaf_left: np.ndarray
    leaf_right: np.ndarray
    inner: np.ndarray
    transposed: np.ndarray
    posterior: np.ndarray
    lengths: np.ndarray
    nodes: np.ndarray
    slack: np.ndarray
    grad: np.ndarray


class Gradients(NamedTuple):
    """What ``outside`` fills: ``reliable [B]`` (true on entry where the inside pass was), ``spans [B,L,L,n]``
    (unless empty), ``two``, ``to_left`` and ``to_right [L,B,n,wide]`` by the leaves' matrices, and, times
    ``grad`` and added up, ``total [G,n,slot]`` by ``inner``.
    """

    reliable: np.ndarray
    spans: np.ndarray
    two: np.ndarray
    to_left: np.ndarray
    to_right: np.ndarray
    total: np.ndarray


class Splits(NamedTuple):
    """Scratch for the splits of a span: ``relative[0]``, the relative scale of each; the left or right parts
    times it, in rows; and sums over splits of ``pairs`` of nonterminals, [n, wide] for each span of a chunk.
    """

    relative: np.ndarray
    left: np.ndarray
    right: np.ndarray
    pairs: np.ndarray


@compiled
def _splits_for(size, wide, n, spans, like):
    """Scratch for ``spans`` at a time; rows read beyond the last, four at a time, are zero."""
    parts = np.zeros((2, size + 4, wide), like.dtype)
    pairs = np.zeros(spans * n * wide + 4 * wide, like.dtype)
    return Splits(np.empty((2, size), like.dtype), parts[0], parts[1], pairs)


@compiled
def _scaled(x, at, factor, out, to, wide):
    """One row of ``out`` is ``factor`` times one of ``x``."""
    none = fill(x.dtype.type(0))
    for k in range(0, wide, LANES):
        store(out, to + k, multiply_add(load(x, at + k), fill(factor), none))


@compiled
def _split(charts, b, i, w, n, splits, s):
    """Fill ``relative``, the right parts and the pairs of span s of a chunk: sentence b's of width w at word
    i; returns the scale.
    """
    size, rows, cells, wide = charts.left.shape
    relative, j = splits.relative, i + w - 1
    peak = -math.inf
    for u in range(1, w):
        relative[0, u] = charts.left_scale[i, b, u] + charts.right_scale[j, b, size - w + u]
        peak = max(peak, relative[0, u])
    if peak == -math.inf:
        peak = 0.0
    for u in range(1, w):
        relative[0, u] -= relative.dtype.type(peak)
    exponential(relative[0, 1:w], relative[1, 1:w])
    if w > 3:
        for u in range(2, w - 1):
            at = ((j * rows + b) * cells + size - w + u) * wide
            _scaled(charts.right, at, relative[0, u], splits.right, (u - 2) * wide, wide)
        # rows that go four at a time meet zeros beyond the last
        splits.right[w - 3 : w] = 0
        at = ((i * rows + b) * cells + 2) * wide
        left, right = (at, 1, wide), (0, wide)
        to = (s * n * wide, wide)
        multiply("sum", 4, (n, w - 3), charts.left, left, splits.right, right, splits.pairs, to)
    return peak


@compiled
def _add_leaves(charts, given, b, i, w, splits, child, value, s):
    """Add to row s of ``value`` the two splits of a span that cut off one word, from the left or from the
    right.
    """
    size, rows, cells, wide = charts.left.shape
    n, j, relative = given.two.shape[2], i + w - 1, splits.relative
    if w == 2:
        value[s, :n] = given.two[i, b]
        return
    at, to = ((j * rows + b) * cells + size - w + 1) * wide, (s * wide, wide)
    _scaled(charts.right, at, relative[0, 1], child, 0, wide)
    y_at = ((i * rows + b) * n * wide, wide)
    multiply("onto", 1, (1, n), child, (0, 0, 1), given.leaf_left, y_at, value, to)
    at = ((i * rows + b) * cells + w - 1) * wide
    _scaled(charts.left, at, relative[0, w - 1], child, 0, wide)
    y_at = ((j * rows + b) * n * wide, wide)
    multiply("onto", 1, (1, n), child, (0, 0, 1), given.leaf_right, y_at, value, to)


@compiled
def _enter(charts, given, b, i, w, peak, value, s, limits):
    """Enter row s of ``value``, rescaled, in the charts; returns whether an entry may have underflowed."""
    size, rows, cells, wide = charts.left.shape
    threshold, smallest, boolean = limits
    n, j, kind = given.two.shape[2], i + w - 1, charts.left.dtype.type
    if charts.factor.shape[0] > 0:
        peak += given.top[i, b, w]
        for k in range(n):
            value[s, k] *= charts.factor[i, b, w, k]
    largest, broken, doubtful = kind(0), False, False
    for k in range(n):
        if boolean:
            value[s, k] = kind(1) if value[s, k] > 0 else kind(0)
        elif value[s, k] < threshold and (given.possible.shape[0] == 0 or given.possible[i, b, w, k] > 0):
            doubtful = True
        largest = max(largest, value[s, k])
        broken |= value[s, k] != value[s, k]
    if broken:
        largest = kind(math.nan)
    charts.inverse[i, b, w] = kind(1) / largest if largest >= smallest else kind(1)
    at = ((i * rows + b) * cells + w) * wide
    _scaled(value, s * wide, charts.inverse[i, b, w], charts.left, at, wide)
    charts.right[j, b, size - w] = charts.left[i, b, w]
    charts.left_scale[i, b, w] = peak + (-math.inf if largest == 0 else math.log(largest))
    charts.right_scale[j, b, size - w] = charts.left_scale[i, b, w]
    return doubtful


@compiled
def _fit(charts, lengths):
    """Whether the charts match."""
    size, rows, cells, wide = charts.left.shape
    return (
        size > 0
        and cells == size + 1
        and wide % LANES == 0
        and charts.right.shape == charts.left.shape
        and charts.left_scale.shape == charts.right_scale.shape == charts.inverse.shape == (size, rows, cells)
        and (charts.factor.shape[0] == 0 or charts.factor.shape == charts.left.shape)
        and lengths.shape == (rows,)
    )


@kernel
def inside(charts, given, threshold, smallest, boolean, doubtful):
    """Fills the charts for widths from two on, and ``doubtful [B]``: whether a possible weight is below
    ``threshold``.

    Weights of which the largest is below ``smallest`` are not rescaled; ``boolean`` replaces positive ones by
    one.
    """
    expect_contiguous(charts, given, doubtful)
    size, rows, _, wide = charts.left.shape
    n, lengths, inner = given.two.shape[2], given.lengths, given.inner
    groups = inner.shape[0]
    expect_shapes(_fit(charts, lengths) and 0 < n <= wide and doubtful.shape == (rows,))
    expect_shapes(given.two.shape == (size - 1, rows, n) and inner.shape == (groups, n * wide, wide))
    expect_shapes(given.leaf_left.shape == given.leaf_right.shape == (size, rows, n, wide))
    expect_shapes(groups in (1, rows) and given.base.shape == (groups,))
    expect_shapes(charts.factor.shape[0] == 0 or given.top.shape == charts.inverse.shape)
    expect_shapes(given.possible.shape[0] == 0 or given.possible.shape == charts.left.shape)
    expect_index("lengths", lengths, 1, size)
    splits, child = _splits_for(size, wide, n, 4, charts.left), np.zeros(wide, charts.left.dtype)
    slot = n * wide
    value, peaks = np.zeros((4, wide), charts.left.dtype), np.zeros(4)
    limits = (threshold, smallest, boolean)
    for b in range(rows):
        g = b if groups > 1 else 0
        for w in range(2, lengths[b] + 1):
            for begin in range(0, lengths[b] - w + 1, 4):
                some = min(4, lengths[b] - w + 1 - begin)
                value[:] = 0
                for s in range(some):
                    peaks[s] = given.base[g] + _split(charts, b, begin + s, w, n, splits, s)
                    _add_leaves(charts, given, b, begin + s, w, splits, child, value, s)
                if w > 3:
                    x_at, y_at = (0, slot, 1), (g * slot * wide, wide)
                    multiply("onto", 4, (some, slot), splits.pairs, x_at, inner, y_at, value, (0, wide))
                for s in range(some):
                    if _enter(charts, given, b, begin + s, w, peaks[s], value, s, limits):
                        doubtful[b] = True


class Flow(NamedTuple):
    """Gradients of one sentence on the way down: ``raw [chunk, wide]`` by the products of a chunk's spans,
    ``by_left`` and ``by_right`` by entries of the charts, ``via_left`` and ``via_right`` by what a cut-off
    leaf's sibling gives; ``back`` and ``back_transposed`` by pairs of nonterminals; ``summed [n, slot]`` by
    the rules; ``square`` scratch.
    """

    raw: np.ndarray
    by_left: np.ndarray
    by_right: np.ndarray
    via_left: np.ndarray
    via_right: np.ndarray
    back: np.ndarray
    back_transposed: np.ndarray
    summed: np.ndarray
    square: np.ndarray


@compiled
def _flow_for(size, wide, n, chunk, like):
    # rows are read and written four at a time, beyond the last one
    lines, dtype = size + 3, like.dtype
    spans, slot = np.zeros((4, size, lines, wide), dtype), n * wide
    back = np.zeros((2, chunk * slot), dtype)
    return Flow(
        np.zeros((chunk, wide), dtype),
        spans[0],
        spans[1],
        spans[2],
        spans[3],
        back[0],
        back[1],
        np.zeros((n + 3, slot), dtype),
        np.zeros((n + 3, wide), dtype),
    )


@compiled
def _leave(charts, given, b, i, w, flow, s, out):
    """Row s of ``flow.raw`` from the gradients of a span's entries; returns its expected number of nodes."""
    size, n, j = charts.left.shape[0], out.two.shape[2], i + w - 1
    found = 0.0
    for k in range(n):
        value, grad = charts.left[i, b, w, k], flow.by_left[i, w, k] + flow.by_right[j, size - w, k]
        if value > 0:
            if w == given.lengths[b]:
                grad += given.posterior[b, k] / value
        else:
            grad = charts.left.dtype.type(0)
        found += grad * value
        if out.spans.shape[0] > 0:
            out.spans[b, i, j, k] = grad * value
        flow.raw[s, k] = grad * charts.inverse[i, b, w]
        if charts.factor.shape[0] > 0:
            flow.raw[s, k] *= charts.factor[i, b, w, k]
    if w == 2:
        out.two[i, b] = flow.raw[s, :n]
    return found


@compiled
def _spread(charts, given, b, i, w, splits, flow, s):
    """Hand row s of ``flow.raw`` down to the parts of a span."""
    size, rows, cells, wide = charts.left.shape
    n, lines, j, relative = given.posterior.shape[1], flow.by_left.shape[1], i + w - 1, splits.relative
    slot = n * wide
    _split(charts, b, i, w, n, splits, s)
    here, there = (i * lines + w) * wide, (j * lines + size - w) * wide
    _scaled(flow.raw, s * wide, relative[0, 1], flow.via_left, here, wide)
    _scaled(flow.raw, s * wide, relative[0, w - 1], flow.via_right, there, wide)
    y_at, to = ((i * rows + b) * slot, wide), (there + wide, wide)
    multiply("onto", 1, (1, n), flow.via_left, (here, 0, 1), given.leaf_left, y_at, flow.by_right, to)
    y_at, to = ((j * rows + b) * slot, wide), (here - wide, wide)
    multiply("onto", 1, (1, n), flow.via_right, (there, 0, 1), given.leaf_right, y_at, flow.by_left, to)
    if w > 3:
        for u in range(2, w - 1):
            at = ((i * rows + b) * cells + u) * wide
            _scaled(charts.left, at, relative[0, u], splits.left, (u - 2) * wide, wide)
        splits.left[w - 3 : w] = 0
        x_at, y_at = (0, wide, 1), (s * slot, wide)
        to = ((i * lines + 2) * wide, wide)
        multiply("onto", 4, (w - 3, n), splits.right, x_at, flow.back_transposed, y_at, flow.by_left, to)
        to = (there + 2 * wide, wide)
        multiply("onto", 4, (w - 3, n), splits.left, x_at, flow.back, y_at, flow.by_right, to)


@compiled
def _to_leaves(charts, b, length, flow, out):
    """Gradients by the leaves' matrices."""
    size, rows, cells, wide = charts.left.shape
    n, lines = out.two.shape[2], flow.by_left.shape[1]
    left, right, square, to = charts.left, charts.right, flow.square, (0, wide)
    for i in range(length):
        at = (((min(i + 1, size - 1) * rows + b) * cells + 2) * wide, 1, wide)
        count, y_at = max(0, length - i - 2), ((i * lines + 3) * wide, wide)
        multiply("sum", 4, (n, count), left, at, flow.via_left, y_at, square, to)
        out.to_left[i, b] = square[:n]
        at = (((max(i - 1, 0) * rows + b) * cells + size - i) * wide, 1, wide)
        count, y_at = max(0, i - 1), ((i * lines + size - i - 1) * wide, wide)
        multiply("sum", 4, (n, count), right, at, flow.via_right, y_at, square, to)
        out.to_right[i, b] = square[:n]


@kernel
def outside(charts, given, out):
    """Gradients of each sentence's ln Z; an unreliable sentence adds nothing to ``out.total``."""
    expect_contiguous(charts, given, out)
    size, rows, _, wide = charts.left.shape
    n, lengths = out.two.shape[2], given.lengths
    slot, groups = n * wide, given.inner.shape[0]
    expect_shapes(_fit(charts, lengths) and 0 < n <= wide and groups in (1, rows))
    expect_shapes(given.leaf_left.shape == given.leaf_right.shape == (size, rows, n, wide))
    expect_shapes(given.inner.shape == given.transposed.shape == (groups, n, n, wide))
    expect_shapes(given.posterior.shape == (rows, n) and out.two.shape == (size - 1, rows, n))
    expect_shapes(given.nodes.shape == given.slack.shape == given.grad.shape == out.reliable.shape == (rows,))
    expect_shapes(out.spans.shape[0] == 0 or out.spans.shape == (rows, size, size, n))
    expect_shapes(out.to_left.shape == out.to_right.shape == (size, rows, n, wide))
    expect_shapes(out.total.shape == (groups, n, slot))
    expect_index("lengths", lengths, 1, size)
    chunk = max(4, min(16, _PAIRS // slot // 4 * 4))
    splits, flow = (
        _splits_for(size, wide, n, chunk, charts.left),
        _flow_for(size, wide, n, chunk, charts.left),
    )
    for b in range(rows):
        length, found = lengths[b], 0.0
        place = ((b if groups > 1 else 0) * n * slot, slot)
        flow.by_left[:] = 0
        flow.by_right[:] = 0
        flow.summed[:] = 0
        for w in range(length, 1, -1):
            for begin in range(0, length - w + 1, chunk):
                some = min(chunk, length - w + 1 - begin)
                for s in range(some):
                    found += _leave(charts, given, b, begin + s, w, flow, s, out)
                if w == 2:
                    continue
                if w > 3:
                    x_at, to = (0, wide, 1), (0, slot)
                    multiply("sum", 4, (some, n), flow.raw, x_at, given.inner, place, flow.back, to)
                    multiply(
                        "sum", 4, (some, n), flow.raw, x_at, given.transposed, place, flow.back_transposed, to
                    )
                for s in range(some):
                    _spread(charts, given, b, begin + s, w, splits, flow, s)
                if w > 3:
                    x_at, to = (0, 1, wide), (0, slot)
                    multiply("onto", 4, (n, some), flow.raw, x_at, splits.pairs, to, flow.summed, to)
        _to_leaves(charts, b, length, flow, out)
        out.reliable[b] &= abs(found - given.nodes[b]) <= given.slack[b]
        if out.reliable[b]:
            own, g = charts.left.dtype.type(given.grad[b]), b if groups > 1 else 0
            for k in range(n):
                for m in range(slot):
                    out.total[g, k, m] += own * flow.summed[k, m]

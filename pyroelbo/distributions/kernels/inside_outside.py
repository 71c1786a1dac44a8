"""Compiled loops of the inside and outside passes, one sentence after the other (needs numba).

Charts and scales are those of ``_inside_outside.Chart``, with labels rounded up to whole vectors, "wide"; what lies beyond
the labels is zero.
"""

from __future__ import annotations

import math

import numpy as np

from pyroelbo.distributions.kernels.arithmetic import compiled, exponential, multiply
from pyroelbo.distributions.kernels.simd import LANES, fill, load, multiply_add, store

__all__ = ["LANES", "inside", "outside"]

# so many numbers of pairs of labels are held at a time
_ROOM = 1 << 16


@compiled
def _scaled(x, at, factor, out, to, wide):
    """One row of ``out`` is ``factor`` times one of ``x``."""
    none = fill(x.dtype.type(0))
    for k in range(0, wide, LANES):
        store(out, to + k, multiply_add(load(x, at + k), fill(factor), none))


@compiled
def _split(left, right, left_scale, right_scale, b, i, w, n, share, ahead, pairs, to):
    """Splits of sentence b's span of width w from i on, by the width of their left part: fills the relative scale
    ``share[0]`` of each, ``ahead`` with the right parts times it, and from ``to`` on ``pairs`` of two
    nonterminals, [n, wide]; returns the scale.
    """
    size, rows, cells, wide = left.shape
    j = i + w - 1
    peak = -math.inf
    for u in range(1, w):
        share[0, u] = left_scale[i, b, u] + right_scale[j, b, size - w + u]
        peak = max(peak, share[0, u])
    if peak == -math.inf:
        peak = 0.0
    for u in range(1, w):
        share[0, u] -= share.dtype.type(peak)
    exponential(share[0, 1:w], share[1, 1:w])
    if w > 3:
        for u in range(2, w - 1):
            at = ((j * rows + b) * cells + size - w + u) * wide
            _scaled(right, at, share[0, u], ahead, (u - 2) * wide, wide)
        # whoever takes four rows at once meets zeros beyond the last
        ahead[w - 3 : w] = 0
        at = ((i * rows + b) * cells + 2) * wide
        multiply("sum", 4, n, w - 3, left, at, 1, wide, ahead, 0, wide, wide, pairs, to)
    return peak


@compiled
def inside(
    two,
    leaf_left,
    leaf_right,
    inner,
    base,
    factor,
    top,
    possible,
    lengths,
    threshold,
    smallest,
    boolean,
    left,
    right,
    left_scale,
    right_scale,
    inverse,
    doubtful,
):
    """Fills the charts. ``two [L-1,B,n]`` are the weights of spans of two words, ``inner [G,n·wide,wide]`` those of
    rules with two nonterminals, times exp(-``base [G]``); ``factor``, ``top`` and ``possible`` may be empty.
    """
    size, rows, cells, wide = left.shape
    n = two.shape[2]
    kind = left.dtype.type
    share, child = np.empty((2, size), left.dtype), np.zeros(wide, left.dtype)
    ahead = np.zeros((size + 4, wide), left.dtype)
    slot = n * wide
    pairs = np.zeros(4 * slot + 4 * wide, left.dtype)
    value, peaks = np.zeros((4, wide), left.dtype), np.zeros(4)
    for b in range(rows):
        g = b if inner.shape[0] > 1 else 0
        for w in range(2, lengths[b] + 1):
            for begin in range(0, lengths[b] - w + 1, 4):
                some = min(4, lengths[b] - w + 1 - begin)
                value[:] = 0
                for s in range(some):
                    i = begin + s
                    j = i + w - 1
                    peaks[s] = base[g] + _split(
                        left, right, left_scale, right_scale, b, i, w, n, share, ahead, pairs, s * slot
                    )
                    if w == 2:
                        value[s, :n] = two[i, b]
                        continue
                    at, place = ((j * rows + b) * cells + size - w + 1) * wide, (i * rows + b) * slot
                    _scaled(right, at, share[0, 1], child, 0, wide)
                    multiply("onto", 1, 1, n, child, 0, 0, 1, leaf_left, place, wide, wide, value, s * wide)
                    at, place = ((i * rows + b) * cells + w - 1) * wide, (j * rows + b) * slot
                    _scaled(left, at, share[0, w - 1], child, 0, wide)
                    multiply("onto", 1, 1, n, child, 0, 0, 1, leaf_right, place, wide, wide, value, s * wide)
                if w > 3:
                    multiply(
                        "onto", 4, some, slot, pairs, 0, slot, 1, inner, g * slot * wide, wide, wide, value, 0
                    )
                for s in range(some):
                    i = begin + s
                    j = i + w - 1
                    peak = peaks[s]
                    if factor.shape[0] > 0:
                        peak += top[i, b, w]
                        for k in range(n):
                            value[s, k] *= factor[i, b, w, k]
                    largest, broken = kind(0), False
                    for k in range(n):
                        if boolean:
                            value[s, k] = kind(1) if value[s, k] > 0 else kind(0)
                        elif value[s, k] < threshold and (possible.shape[0] == 0 or possible[i, b, w, k] > 0):
                            doubtful[b] = True
                        largest = max(largest, value[s, k])
                        broken |= value[s, k] != value[s, k]
                    if broken:
                        largest = kind(math.nan)
                    inverse[i, b, w] = kind(1) / largest if largest >= smallest else kind(1)
                    _scaled(
                        value, s * wide, inverse[i, b, w], left, ((i * rows + b) * cells + w) * wide, wide
                    )
                    right[j, b, size - w] = left[i, b, w]
                    left_scale[i, b, w] = peak + (-math.inf if largest == 0 else math.log(largest))
                    right_scale[j, b, size - w] = left_scale[i, b, w]


@compiled
def outside(
    left,
    right,
    left_scale,
    right_scale,
    inverse,
    factor,
    leaf_left,
    leaf_right,
    inner,
    turned,
    posterior,
    lengths,
    nodes,
    slack,
    grad,
    reliable,
    spans,
    two,
    to_left,
    to_right,
    total,
):
    """Gradients of each sentence's ln Z by ``spans`` (unless empty), by raw spans of ``two`` words, by the leaves'
    matrices, and, times ``grad``, by the rules with two nonterminals: ``total [G,n,n·wide]``.

    Matrices go from the parent here: ``leaf_left``, ``leaf_right [L,B,n,wide]``, ``inner [G,n,n·wide]`` (left, right),
    ``turned`` (right, left). A sentence whose expected number of ``nodes`` is off by more than ``slack`` is not
    ``reliable``, and leaves nothing in ``total``.
    """
    size, rows, cells, wide = left.shape
    n = two.shape[2]
    slot = n * wide
    chunk = max(4, min(16, _ROOM // slot // 4 * 4))
    # rows that are taken beyond the last, four at a time
    lines = cells + 2
    share = np.empty((2, size), left.dtype)
    ahead, behind = np.zeros((size + 4, wide), left.dtype), np.zeros((size + 4, wide), left.dtype)
    raw = np.zeros((chunk, wide), left.dtype)
    pairs = np.zeros(chunk * slot + 4 * wide, left.dtype)
    back, back_turned = np.zeros(chunk * slot, left.dtype), np.zeros(chunk * slot, left.dtype)
    square = np.zeros((n + 3, wide), left.dtype)
    summed = np.zeros((n + 3, slot), left.dtype)
    by_left, by_right = np.zeros((size, lines, wide), left.dtype), np.zeros((size, lines, wide), left.dtype)
    via_left, via_right = np.zeros((size, lines, wide), left.dtype), np.zeros((size, lines, wide), left.dtype)
    for b in range(rows):
        g = b if inner.shape[0] > 1 else 0
        length, found = lengths[b], 0.0
        by_left[:] = 0
        by_right[:] = 0
        summed[:] = 0
        for w in range(length, 1, -1):
            for begin in range(0, length - w + 1, chunk):
                some = min(chunk, length - w + 1 - begin)
                for s in range(some):
                    i = begin + s
                    j = i + w - 1
                    for k in range(n):
                        value, flow = left[i, b, w, k], by_left[i, w, k] + by_right[j, size - w, k]
                        if value > 0:
                            if w == length:
                                flow += posterior[b, k] / value
                        else:
                            flow = left.dtype.type(0)
                        found += flow * value
                        if spans.shape[0] > 0:
                            spans[b, i, j, k] = flow * value
                        raw[s, k] = flow * inverse[i, b, w]
                        if factor.shape[0] > 0:
                            raw[s, k] *= factor[i, b, w, k]
                    if w == 2:
                        two[i, b] = raw[s, :n]
                if w == 2:
                    continue
                if w > 3:
                    place = g * n * slot
                    multiply("sum", 4, some, n, raw, 0, wide, 1, inner, place, slot, slot, back, 0)
                    multiply("sum", 4, some, n, raw, 0, wide, 1, turned, place, slot, slot, back_turned, 0)
                for s in range(some):
                    i = begin + s
                    j = i + w - 1
                    _split(left, right, left_scale, right_scale, b, i, w, n, share, ahead, pairs, s * slot)
                    here, there = (i * lines + w) * wide, (j * lines + size - w) * wide
                    _scaled(raw, s * wide, share[0, 1], via_left, here, wide)
                    _scaled(raw, s * wide, share[0, w - 1], via_right, there, wide)
                    place = (i * rows + b) * slot
                    multiply(
                        "onto",
                        1,
                        1,
                        n,
                        via_left,
                        here,
                        0,
                        1,
                        leaf_left,
                        place,
                        wide,
                        wide,
                        by_right,
                        there + wide,
                    )
                    place = (j * rows + b) * slot
                    multiply(
                        "onto",
                        1,
                        1,
                        n,
                        via_right,
                        there,
                        0,
                        1,
                        leaf_right,
                        place,
                        wide,
                        wide,
                        by_left,
                        here - wide,
                    )
                    if w > 3:
                        for u in range(2, w - 1):
                            at = ((i * rows + b) * cells + u) * wide
                            _scaled(left, at, share[0, u], behind, (u - 2) * wide, wide)
                        behind[w - 3 : w] = 0
                        place, to = s * slot, (i * lines + 2) * wide
                        multiply(
                            "onto",
                            4,
                            w - 3,
                            n,
                            ahead,
                            0,
                            wide,
                            1,
                            back_turned,
                            place,
                            wide,
                            wide,
                            by_left,
                            to,
                        )
                        to = there + 2 * wide
                        multiply(
                            "onto", 4, w - 3, n, behind, 0, wide, 1, back, place, wide, wide, by_right, to
                        )
                if w > 3:
                    multiply("onto", 4, n, some, raw, 0, 1, wide, pairs, 0, slot, slot, summed, 0)
        for i in range(length):
            at, place = ((min(i + 1, size - 1) * rows + b) * cells + 2) * wide, (i * lines + 3) * wide
            multiply(
                "sum", 4, n, max(0, length - i - 2), left, at, 1, wide, via_left, place, wide, wide, square, 0
            )
            to_left[i, b] = square[:n]
            at, place = (
                ((max(i - 1, 0) * rows + b) * cells + size - i) * wide,
                (i * lines + size - i - 1) * wide,
            )
            multiply("sum", 4, n, max(0, i - 1), right, at, 1, wide, via_right, place, wide, wide, square, 0)
            to_right[i, b] = square[:n]
        reliable[b] &= abs(found - nodes[b]) <= slack[b]
        if reliable[b]:
            own = left.dtype.type(grad[b])
            for k in range(n):
                for m in range(slot):
                    total[g, k, m] += own * summed[k, m]

"""Compiled loops of the chain recursions; imported only where numba is installed.

Arrays: ``weight [B,T,S]`` and ``transition [A,U,S,S]`` (from, to) hold exponentials, A in {1, B} and U in
{1, T-1}. Rows are sequences. Where they share their transitions, four go together, so that a matrix is read
once for four of them; this beats BLAS on such thin products.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

# NaN and infinity keep their meaning; only the order of a sum is free
_compile = njit(cache=True, fastmath={"contract", "reassoc", "nsz"})
_compile_max = njit(cache=True, fastmath={"nnan", "nsz"})


@_compile
def shift(x, out, peak):
    """out = x - peak with the row's largest finite entry as peak (0 where the whole row is -inf)."""
    for n in range(x.shape[0]):
        top = x[n, 0]
        for j in range(1, x.shape[1]):
            top = max(top, x[n, j])
        if top == -math.inf:
            top = x.dtype.type(0)
        peak[n] = top
        for j in range(x.shape[1]):
            out[n, j] = x[n, j] - top


@_compile
def _step1(x, matrix, y):
    size = x.shape[0]
    for j in range(size):
        y[j] = 0
    i = 0
    while i + 3 < size:
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(size):
            y[j] += (a * matrix[i, j] + b * matrix[i + 1, j]) + (c * matrix[i + 2, j] + d * matrix[i + 3, j])
        i += 4
    while i < size:
        a = x[i]
        for j in range(size):
            y[j] += a * matrix[i, j]
        i += 1


@_compile
def _step4(x, matrix, y):
    size = x.shape[1]
    y[:] = 0
    y0, y1, y2, y3 = y[0], y[1], y[2], y[3]
    i = 0
    while i + 3 < size:
        a0, b0, c0, d0 = x[0, i], x[0, i + 1], x[0, i + 2], x[0, i + 3]
        a1, b1, c1, d1 = x[1, i], x[1, i + 1], x[1, i + 2], x[1, i + 3]
        a2, b2, c2, d2 = x[2, i], x[2, i + 1], x[2, i + 2], x[2, i + 3]
        a3, b3, c3, d3 = x[3, i], x[3, i + 1], x[3, i + 2], x[3, i + 3]
        r0, r1, r2, r3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        for j in range(size):
            p, q, r, s = r0[j], r1[j], r2[j], r3[j]
            y0[j] += (a0 * p + b0 * q) + (c0 * r + d0 * s)
            y1[j] += (a1 * p + b1 * q) + (c1 * r + d1 * s)
            y2[j] += (a2 * p + b2 * q) + (c2 * r + d2 * s)
            y3[j] += (a3 * p + b3 * q) + (c3 * r + d3 * s)
        i += 4
    while i < size:
        r0 = matrix[i]
        a0, a1, a2, a3 = x[0, i], x[1, i], x[2, i], x[3, i]
        for j in range(size):
            p = r0[j]
            y0[j] += a0 * p
            y1[j] += a1 * p
            y2[j] += a2 * p
            y3[j] += a3 * p
        i += 1


@_compile
def _absorb(moved, weight, floor, out):
    """out = normalized max(moved · weight, floor); returns its sum and its least entry before
    normalization.
    """
    total = moved[0] * 0
    least = moved[0] * weight[0]
    for j in range(moved.shape[0]):
        value = max(moved[j] * weight[j], floor)
        moved[j] = value
        total += value
        least = min(least, value)
    if total > 0:
        inverse = 1 / total
        for j in range(moved.shape[0]):
            out[j] = moved[j] * inverse
    return total, least


@_compile
def forward(initial, transition, weight, lengths, floor, keep, alpha, scale, total, least):
    """Scaled forward pass: fills ``total [B]`` (the log of the sum), ``least [B]``; with ``keep`` alpha and
    scale.

    ``alpha [B,T,S]`` sums to one at each time, ``scale [B,T]`` holds the sums divided out. ``floor`` lifts
    every entry from below at each step, which makes the result an upper bound.
    """
    rows, _, size = weight.shape
    shared = transition.shape[0] == 1
    still = transition.shape[1] == 1
    width = 4 if shared and size >= 16 else 1
    lowest = weight.dtype.type(floor)
    previous = np.zeros((4, size), weight.dtype)
    moved = np.zeros((4, size), weight.dtype)
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        longest = lengths[start:stop].max()
        product = np.ones(4)
        for b in range(start, stop):
            total[b] = 0.0
            least[b] = math.inf
        for t in range(longest):
            if t == 0:
                for b in range(start, stop):
                    moved[b - start] = initial[b if initial.shape[0] > 1 else 0]
            else:
                matrix = transition[0 if shared else start, 0 if still else t - 1]
                if stop - start > 1:
                    _step4(previous, matrix, moved)
                else:
                    _step1(previous[0], matrix, moved[0])
            for b in range(start, stop):
                r = b - start
                if t >= lengths[b]:
                    continue
                s, low = _absorb(moved[r], weight[b, t], lowest, previous[r])
                least[b] = min(least[b], low)
                if s == 0:
                    previous[r] = 0
                if keep:
                    scale[b, t] = s
                    alpha[b, t] = previous[r]
                product[r] *= s
                if not (1e-200 < product[r] < 1e200):
                    total[b] += math.log(product[r]) if product[r] > 0 else -math.inf
                    product[r] = 1.0
        for b in range(start, stop):
            total[b] += math.log(product[b - start])


@_compile
def backward(turned, weight, lengths, alpha, scale, gamma, flow):
    """Scaled backward pass: ``gamma [B,T,S]`` posterior of each state, ``flow [B,T,S]`` = weight · beta /
    scale.

    ``turned`` is the transition transposed (to, from). The posterior of a step into time t is
    alpha[t-1] · transition · flow[t]; flow[0] is zero, and both are zero beyond the sequences.
    """
    rows, steps, size = weight.shape
    shared = turned.shape[0] == 1
    still = turned.shape[1] == 1
    width = 4 if shared and size >= 16 else 1
    beta = np.zeros((4, size), weight.dtype)
    out = np.zeros((4, size), weight.dtype)
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        for t in range(steps - 1, -1, -1):
            for b in range(start, stop):
                r = b - start
                if t >= lengths[b]:
                    gamma[b, t] = 0
                    flow[b, t] = 0
                    out[r] = 0
                    continue
                if t == lengths[b] - 1:
                    beta[r] = 1
                inverse = 1 / scale[b, t] if t > 0 and scale[b, t] > 0 else scale[b, t] * 0
                for j in range(size):
                    gamma[b, t, j] = alpha[b, t, j] * beta[r, j]
                    value = weight[b, t, j] * beta[r, j] * inverse
                    out[r, j] = value
                    flow[b, t, j] = value
            if t > 0:
                matrix = turned[0 if shared else start, 0 if still else t - 1]
                if stop - start > 1:
                    _step4(out, matrix, beta)
                else:
                    _step1(out[0], matrix, beta[0])


@_compile
def draw(turned, alpha, lengths, uniform, z):
    """Backward sampling from the filter: ``z [N,B,T]`` by inversion of ``uniform [N,B,T]``; 0 beyond the
    sequences.
    """
    draws, rows, steps = z.shape
    size = alpha.shape[2]
    weight = np.empty(size, alpha.dtype)
    for n in range(draws):
        for b in range(rows):
            last = lengths[b] - 1
            for t in range(last + 1, steps):
                z[n, b, t] = 0
            for t in range(last, -1, -1):
                total = alpha[b, t, 0] * 0
                if t < last:
                    row = turned[
                        b if turned.shape[0] > 1 else 0, t if turned.shape[1] > 1 else 0, z[n, b, t + 1]
                    ]
                    for j in range(size):
                        weight[j] = alpha[b, t, j] * row[j]
                        total += weight[j]
                else:
                    for j in range(size):
                        weight[j] = alpha[b, t, j]
                        total += weight[j]
                mark = uniform[n, b, t] * total
                running = total * 0
                chosen = 0
                for j in range(size):
                    if weight[j] > 0:
                        running += weight[j]
                        chosen = j
                        if running > mark:
                            break
                z[n, b, t] = chosen


@_compile_max
def _best1(x, matrix, y):
    size = x.shape[0]
    y[:] = -math.inf
    i = 0
    while i + 3 < size:
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(size):
            u = max(a + matrix[i, j], b + matrix[i + 1, j])
            v = max(c + matrix[i + 2, j], d + matrix[i + 3, j])
            y[j] = max(y[j], max(u, v))
        i += 4
    while i < size:
        a = x[i]
        for j in range(size):
            y[j] = max(y[j], a + matrix[i, j])
        i += 1


@_compile_max
def viterbi(initial, transition, turned, observation, lengths, delta, z):
    """A best path ``z [B,T]`` in log space. Only scores are kept, the arguments are found again on the way
    back.
    """
    rows, steps, size = observation.shape
    moved = np.empty(size, observation.dtype)
    for b in range(rows):
        a = b if transition.shape[0] > 1 else 0
        for t in range(lengths[b]):
            if t == 0:
                moved[:] = initial[b if initial.shape[0] > 1 else 0]
            else:
                _best1(delta[b, t - 1], transition[a, t - 1 if transition.shape[1] > 1 else 0], moved)
            top = moved[0] + observation[b, t, 0]
            for j in range(size):
                moved[j] += observation[b, t, j]
                top = max(top, moved[j])
            if top > -math.inf:
                for j in range(size):
                    moved[j] -= top
            delta[b, t] = moved
        for t in range(lengths[b], steps):
            z[b, t] = 0
        for t in range(lengths[b] - 1, -1, -1):
            best = -math.inf
            chosen = 0
            for i in range(size):
                value = delta[b, t, i]
                if t < lengths[b] - 1:
                    value += turned[a, t if turned.shape[1] > 1 else 0, z[b, t + 1], i]
                if value > best:
                    best = value
                    chosen = i
            z[b, t] = chosen

"""Compiled loops of the chain recursions; imported only where numba is installed.

Log potentials come as in ``_recursions``; weights and ``powers [A,U,S,S]`` (from, to) are their
exponentials, divided by the largest of each time or matrix. Where sequences share their transitions, four go
together, so that a matrix is read once for four of them; this beats BLAS on such thin products.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

# NaN and infinity keep their meaning; only the order of a sum is free
_ORDER = {"contract", "reassoc", "nsz"}
_compile = njit(cache=True, fastmath=_ORDER)
_compile_max = njit(cache=True, fastmath={"nnan", "nsz"})
_PIECE = 4096


def _exponential(x, spare):
    """x = exp(x) in place for x <= 0, in a form that compilers turn into vector code; zero below the normal
    range.
    """


# no free order here: rounding by adding and subtracting a large number must not be simplified away
@overload(_exponential, jit_options={"fastmath": {"contract", "nsz"}})
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


@_compile
def _powers(x, out, spare):
    """out = exp(x - top) for flat arrays; returns top, the largest entry (0 where all is -inf, NaN where one
    is).
    """
    top = x[0]
    broken = False
    for j in range(x.shape[0]):
        top = max(top, x[j])
        broken |= x[j] != x[j]
    if broken:
        return math.nan
    if top == -math.inf:
        out[:] = 0
        return 0.0
    for j in range(x.shape[0]):
        out[j] = out.dtype.type(x[j]) - out.dtype.type(top)
    for start in range(0, x.shape[0], _PIECE):
        piece = out[start : start + _PIECE]
        _exponential(piece, spare[: piece.shape[0]])
    return float(top)


# views cost more than a short row: the helpers take whole arrays and places in them
@_compile
def _step1(x, matrices, a, u, y):
    """First row of y = first row of x times a matrix."""
    size = x.shape[1]
    for j in range(size):
        y[0, j] = 0
    i = 0
    while i + 3 < size:
        p, q, r, s = x[0, i], x[0, i + 1], x[0, i + 2], x[0, i + 3]
        for j in range(size):
            y[0, j] += (p * matrices[a, u, i, j] + q * matrices[a, u, i + 1, j]) + (
                r * matrices[a, u, i + 2, j] + s * matrices[a, u, i + 3, j]
            )
        i += 4
    while i < size:
        p = x[0, i]
        for j in range(size):
            y[0, j] += p * matrices[a, u, i, j]
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
def _absorb(moved, r, weight, at, floor, out):
    """Row r of out = normalized max(moved · weight, floor); returns its sum and least entry before that."""
    total = moved[r, 0] * 0
    least = moved[r, 0] * weight[at]
    for j in range(moved.shape[1]):
        value = max(moved[r, j] * weight[at + j], floor)
        moved[r, j] = value
        total += value
        least = min(least, value)
    if total > 0:
        inverse = 1 / total
        for j in range(moved.shape[1]):
            out[r, j] = moved[r, j] * inverse
    return total, least


@_compile
def _weights(observation, out, spare):
    """out = exp(observation - top) where top is the largest of each row; returns the sum of the tops."""
    steps, size = observation.shape
    offset = 0.0
    for t in range(steps):
        top = observation[t, 0]
        broken = False
        for j in range(size):
            top = max(top, observation[t, j])
            broken |= observation[t, j] != observation[t, j]
        if broken:
            offset = math.nan
        elif top > -math.inf:
            offset += top
        else:
            top = observation.dtype.type(0)
        for j in range(size):
            out[t * size + j] = out.dtype.type(observation[t, j]) - out.dtype.type(top)
    for start in range(0, steps * size, _PIECE):
        piece = out[start : min(start + _PIECE, steps * size)]
        _exponential(piece, spare[: piece.shape[0]])
    return offset


@_compile
def forward(initial, transition, observation, lengths, floor, keep, powers, alpha, scale, total, least):
    """Scaled forward pass: fills ``powers``, ``total [B]`` (ln Z), ``least [B]``; with ``keep`` all arrays.

    ``alpha [B,T,S]`` sums to one at each time, ``scale [B,T]`` holds the sums divided out, ``least`` the
    least entry met. ``floor`` lifts every entry from below at each step, which makes the result an upper
    bound.
    """
    rows, _, size = observation.shape
    shared = transition.shape[0] == 1
    still = transition.shape[1] == 1
    width = 4 if shared and size >= 16 else 1
    kind = powers.dtype.type
    lowest = kind(floor)
    spare = np.empty(_PIECE, powers.dtype)
    tops = np.zeros((transition.shape[0], transition.shape[1]))
    for a in range(transition.shape[0]):
        for u in range(transition.shape[1]):
            tops[a, u] = _powers(transition[a, u].reshape(-1), powers[a, u].reshape(-1), spare)
    first = np.empty((initial.shape[0], size), powers.dtype)
    first_tops = np.zeros(initial.shape[0])
    for b in range(initial.shape[0]):
        first_tops[b] = _powers(initial[b], first[b], spare)
    chunk = max(1, _PIECE // size)
    weight = np.empty(width * chunk * size, powers.dtype)
    previous = np.zeros((4, size), powers.dtype)
    moved = np.zeros((4, size), powers.dtype)
    product = np.ones(4)
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        longest = lengths[start:stop].max()
        for b in range(start, stop):
            a = 0 if shared else b
            product[b - start] = 1.0
            total[b] = first_tops[b if initial.shape[0] > 1 else 0]
            if still:
                total[b] += (lengths[b] - 1) * tops[a, 0]
            else:
                total[b] += tops[a, : lengths[b] - 1].sum()
            least[b] = math.inf
        for begin in range(0, longest, chunk):
            end = min(begin + chunk, longest)
            for b in range(start, stop):
                if begin < lengths[b]:
                    at = (b - start) * chunk * size
                    last = min(end, lengths[b])
                    total[b] += _weights(
                        observation[b, begin:last], weight[at : at + (last - begin) * size], spare
                    )
            for t in range(begin, end):
                if t == 0:
                    for b in range(start, stop):
                        moved[b - start] = first[b if initial.shape[0] > 1 else 0]
                else:
                    a, u = 0 if shared else start, 0 if still else t - 1
                    if stop - start > 1:
                        _step4(previous, powers[a, u], moved)
                    else:
                        _step1(previous, powers, a, u, moved)
                for b in range(start, stop):
                    if t >= lengths[b]:
                        continue
                    r = b - start
                    at = (r * chunk + t - begin) * size
                    s, low = _absorb(moved, r, weight, at, lowest, previous)
                    least[b] = min(least[b], low)
                    if s == 0:
                        previous[r] = 0
                    if keep:
                        scale[b, t] = s
                        for j in range(size):
                            alpha[b, t, j] = previous[r, j]
                    product[r] *= s
                    if not (1e-200 < product[r] < 1e200):
                        total[b] += math.log(product[r]) if product[r] > 0 else -math.inf
                        product[r] = 1.0
        for b in range(start, stop):
            total[b] += math.log(product[b - start])
            if keep:
                alpha[b, lengths[b] :] = 0
                scale[b, lengths[b] :] = 1


@_compile
def evidence(initial, transition, observation, lengths, floor, like):
    """ln Z of each row and the least entry met, in the precision of ``like``; nothing is kept."""
    total, least = np.empty(observation.shape[0]), np.empty(observation.shape[0])
    powers = np.empty(transition.shape, like.dtype)
    alpha, scale = np.empty((0, 0, 0), like.dtype), np.empty((0, 0), like.dtype)
    forward(initial, transition, observation, lengths, floor, False, powers, alpha, scale, total, least)
    return total, least


@_compile
def backward(turned, observation, lengths, alpha, scale, gamma, flow):
    """Scaled backward pass: fills the posterior ``gamma`` of each state, ``flow`` = weight · beta / scale.

    ``turned`` is ``powers`` transposed (to, from). The posterior of a step into time t is
    alpha[t-1] · powers · flow[t]; flow[0] is zero, and both are zero beyond the sequences. The weights
    are computed once more, which costs less than memory to keep them.
    """
    rows, steps, size = observation.shape
    shared = turned.shape[0] == 1
    still = turned.shape[1] == 1
    width = 4 if shared and size >= 16 else 1
    chunk = max(1, _PIECE // size)
    weight = np.empty(width * chunk * size, turned.dtype)
    spare = np.empty(_PIECE, turned.dtype)
    beta = np.zeros((4, size), turned.dtype)
    out = np.zeros((4, size), turned.dtype)
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        for begin in range((steps - 1) // chunk * chunk, -1, -chunk):
            for b in range(start, stop):
                if begin < lengths[b]:
                    last = min(begin + chunk, lengths[b])
                    at = (b - start) * chunk * size
                    _weights(observation[b, begin:last], weight[at : at + (last - begin) * size], spare)
            for t in range(min(begin + chunk, steps) - 1, begin - 1, -1):
                for b in range(start, stop):
                    r = b - start
                    if t >= lengths[b]:
                        for j in range(size):
                            gamma[b, t, j] = 0
                            flow[b, t, j] = 0
                            out[r, j] = 0
                        continue
                    if t == lengths[b] - 1:
                        for j in range(size):
                            beta[r, j] = 1
                    at = (r * chunk + t - begin) * size
                    inverse = 1 / scale[b, t] if t > 0 and scale[b, t] > 0 else scale[b, t] * 0
                    for j in range(size):
                        value = weight[at + j] * beta[r, j] * inverse
                        gamma[b, t, j] = alpha[b, t, j] * beta[r, j]
                        out[r, j] = value
                        flow[b, t, j] = value
                if t > 0:
                    a, u = 0 if shared else start, 0 if still else t - 1
                    if stop - start > 1:
                        _step4(out, turned[a, u], beta)
                    else:
                        _step1(out, turned, a, u, beta)


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

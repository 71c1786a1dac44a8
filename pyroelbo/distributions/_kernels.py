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

from pyroelbo.distributions._vectors import (
    LANES,
    WIDE,
    add,
    convert,
    fill,
    greater,
    largest,
    lesser,
    load,
    multiply_add,
    store,
    tile,
    total,
)

# NaN and infinity keep their meaning; only the order of a sum is free
_ORDER = {"contract", "reassoc", "nsz"}
compiled = njit(cache=True, fastmath=_ORDER)
_compile_max = njit(cache=True, fastmath={"nnan", "nsz"})
_PIECE = 4096


def exponential(x, spare):
    """x = exp(x) in place for x <= 0, in a form that compilers turn into vector code; zero below the normal
    range.
    """


# no free order here: rounding by adding and subtracting a large number must not be simplified away
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
        exponential(piece, spare[: piece.shape[0]])
    return float(top)


def multiply(kind, height, rows, count, x, at, across, along, y, place, panel, columns, out, to):
    """out[to + r·columns + c] = Σ_k x[at + r·across + k·along] · y[k, c], for k < ``count``; see ``_vectors.tile`` for ``kind``.

    ``out`` has ``columns``, whole vectors; rows go by ``height``, a literal 1 or 4. ``y`` lies from ``place`` on, as
    panels of ``panel`` columns one after the other.
    """


@overload(multiply, prefer_literal=True, jit_options={"fastmath": _ORDER, "forceinline": True})
def _(kind, height, rows, count, x, at, across, along, y, place, panel, columns, out, to):
    how, tall = kind.literal_value, height.literal_value

    def run(kind, height, rows, count, x, at, across, along, y, place, panel, columns, out, to):
        for r in range(0, rows, tall):
            here, there = at + r * across, to + r * columns
            for start in range(0, columns, panel):
                j, end = start, min(start + panel, columns)
                shift, stride = place + start * (count - 1), end - start
                while j + WIDE * LANES <= end:
                    tile(
                        how,
                        tall,
                        WIDE,
                        count,
                        x,
                        here,
                        across,
                        along,
                        y,
                        shift + j,
                        stride,
                        out,
                        there + j,
                        columns,
                    )
                    j += WIDE * LANES
                if j + 2 * LANES <= end:
                    tile(
                        how,
                        tall,
                        2,
                        count,
                        x,
                        here,
                        across,
                        along,
                        y,
                        shift + j,
                        stride,
                        out,
                        there + j,
                        columns,
                    )
                    j += 2 * LANES
                if j < end:
                    tile(
                        how,
                        tall,
                        1,
                        count,
                        x,
                        here,
                        across,
                        along,
                        y,
                        shift + j,
                        stride,
                        out,
                        there + j,
                        columns,
                    )

    return run


@compiled
def _copied(matrices, a, u, room, panel):
    size, padded = room.shape
    flat = room.reshape(-1)
    for start in range(0, padded, panel):
        width, stride = min(panel, size - start), min(panel, padded - start)
        for i in range(size):
            for j in range(width):
                flat[start * size + i * stride + j] = matrices[a, u, i, start + j]
    return room


@compiled
def _laid_out(matrices, a, u, room, panel):
    """A matrix with columns up to whole vectors, in panels of ``panel`` columns: in ``room`` unless it lies so."""
    if room.shape[0] == room.shape[1] and panel >= room.shape[0]:
        return matrices[a, u]
    return _copied(matrices, a, u, room, panel)


@compiled
def _absorb(moved, r, weight, at, floor, out, low):
    """Row r of out = max(moved · weight, floor), whose sum is returned; row r of low keeps the least seen."""
    padded = moved.shape[1]
    none = fill(moved.dtype.type(0))
    sums = none
    for j in range(r * padded, (r + 1) * padded, LANES):
        value = multiply_add(load(moved, j), load(weight, at + j - r * padded), none)
        # NaN stays: it is not below the floor
        value = greater(fill(floor), value)
        store(low, j, lesser(value, load(low, j)))
        store(out, j, value)
        sums = add(sums, value)
    return total(sums)


@compiled
def _weights(observation, out, spare):
    """out = exp(observation - top) where top is the largest of each row; returns the sum of the tops."""
    steps, size = observation.shape
    offset = 0.0
    differences = fill(out.dtype.type(0))
    for t in range(steps):
        at = t * size
        # the last vector of a row reaches back, rows shorter than one go by entries
        tail = size - LANES
        top = observation[t, 0]
        if tail < 0:
            for j in range(size):
                top = max(top, observation[t, j])
        else:
            tops = load(observation, at + tail)
            for j in range(0, tail, LANES):
                tops = greater(load(observation, at + j), tops)
            top = largest(tops)
        if top == -math.inf:
            top = observation.dtype.type(0)
        offset += top
        if tail < 0:
            for j in range(size):
                out[at + j] = out.dtype.type(observation[t, j]) - out.dtype.type(top)
                if out[at + j] != out[at + j]:
                    offset = math.nan
        else:
            shift = fill(-out.dtype.type(top))
            for k in range(0, size, LANES):
                j = at + min(k, tail)
                value = add(convert(load(observation, j), out), shift)
                store(out, j, value)
                differences = add(differences, value)
    # none is positive, so that their sum is NaN only where one is
    if total(differences) != total(differences):
        offset = math.nan
    for start in range(0, steps * size, _PIECE):
        piece = out[start : min(start + _PIECE, steps * size)]
        exponential(piece, spare[: piece.shape[0]])
    return offset


@compiled
def forward(initial, transition, observation, lengths, floor, keep, powers, alpha, scale, log_z, least):
    """Scaled forward pass: fills ``log_z [B]``, ``least [B]``; with ``keep`` all arrays, ``powers`` among them.

    ``alpha [B,T,S]`` is what the sums ``scale [B,T]`` leave, one in the end; ``least`` is the least entry
    met. ``floor`` lifts every entry from below at each step, which makes the result an upper bound.
    """
    rows, _, size = observation.shape
    shared = transition.shape[0] == 1
    still = transition.shape[1] == 1
    width = 4 if shared else 1
    padded = -(-size // LANES) * LANES
    kind = powers.dtype.type
    lowest = kind(floor)
    # a sum is divided out only where it leaves these bounds, and at the end; an upper one far from 1 would let
    # a step that is lost below the smallest number count beside entries as small as those trusted
    fewest, most = (1e-2, 10.0) if powers.itemsize == 4 else (1e-20, 10.0)
    spare = np.empty(_PIECE, powers.dtype)
    tops = np.zeros((transition.shape[0], transition.shape[1]))
    for a in range(transition.shape[0]):
        for u in range(transition.shape[1] if keep or not still else 0):
            tops[a, u] = _powers(transition[a, u].reshape(-1), powers[a, u].reshape(-1), spare)
    first = np.zeros((initial.shape[0], padded), powers.dtype)
    first_tops = np.zeros(initial.shape[0])
    for b in range(initial.shape[0]):
        first_tops[b] = _powers(initial[b], first[b, :size], spare)
    chunk = max(1, _PIECE // size)
    # vectors read beyond a row; what they find there meets a zero, and must be finite
    stride = chunk * size + LANES
    weight = np.zeros(width * stride, powers.dtype)
    previous = np.zeros((4, padded), powers.dtype)
    moved = np.zeros((4, padded), powers.dtype)
    low = np.zeros((4, padded), powers.dtype)
    room = np.zeros((size, padded), powers.dtype)
    panel = WIDE * LANES if still else padded
    product = np.ones(4)
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        longest = lengths[start:stop].max()
        low[:] = math.inf
        if keep or not still:
            matrix = (
                _laid_out(powers, 0 if shared else start, 0, room, panel) if powers.shape[1] > 0 else room
            )
        elif start == 0 or not shared:
            room[:] = -math.inf
            matrix = _copied(transition, start, 0, room, panel)
            tops[start, 0] = _powers(room.reshape(-1), room.reshape(-1), spare)
        for b in range(start, stop):
            a = 0 if shared else b
            product[b - start] = 1.0
            log_z[b] = first_tops[b if initial.shape[0] > 1 else 0]
            if still:
                log_z[b] += (lengths[b] - 1) * tops[a, 0]
            else:
                log_z[b] += tops[a, : lengths[b] - 1].sum()
        for begin in range(0, longest, chunk):
            end = min(begin + chunk, longest)
            for b in range(start, stop):
                if begin < lengths[b]:
                    at = (b - start) * stride
                    last = min(end, lengths[b])
                    stop_at = at + (last - begin) * size
                    log_z[b] += _weights(observation[b, begin:last], weight[at:stop_at], spare)
                    weight[stop_at : stop_at + LANES] = 0
            for t in range(begin, end):
                if t == 0:
                    for b in range(start, stop):
                        moved[b - start] = first[b if initial.shape[0] > 1 else 0]
                else:
                    if t > 1 and not still:
                        matrix = _laid_out(powers, 0 if shared else start, t - 1, room, panel)
                    if stop - start > 1:
                        multiply(
                            "sum", 4, 4, size, previous, 0, padded, 1, matrix, 0, panel, padded, moved, 0
                        )
                    else:
                        multiply(
                            "sum", 1, 1, size, previous, 0, padded, 1, matrix, 0, panel, padded, moved, 0
                        )
                for b in range(start, stop):
                    if t >= lengths[b]:
                        continue
                    r = b - start
                    at = r * stride + (t - begin) * size
                    s = _absorb(moved, r, weight, at, lowest, previous, low)
                    divided = t == lengths[b] - 1 or not (fewest < s < most)
                    if divided:
                        if s > 0:
                            inverse = kind(1) / s
                            for j in range(padded):
                                previous[r, j] *= inverse
                        product[r] *= s
                        # times the least sum that is trusted it must not leave the normal range
                        if not (1e-15 < product[r] < 1e200):
                            log_z[b] += math.log(product[r]) if product[r] != 0 else -math.inf
                            product[r] = 1.0
                    if keep:
                        scale[b, t] = s if divided else kind(1)
                        if size < LANES:
                            for j in range(size):
                                alpha[b, t, j] = previous[r, j]
                        else:
                            for k in range(0, size, LANES):
                                j = min(k, size - LANES)
                                store(
                                    alpha, (b * alpha.shape[1] + t) * size + j, load(previous, r * padded + j)
                                )
        for b in range(start, stop):
            log_z[b] += math.log(product[b - start])
            least[b] = low[b - start, :size].min()
            if keep:
                alpha[b, lengths[b] :] = 0
                scale[b, lengths[b] :] = 1


@compiled
def evidence(initial, transition, observation, lengths, floor, like):
    """ln Z of each row and the least entry met, in the precision of ``like``; nothing is kept."""
    log_z, least = np.empty(observation.shape[0]), np.empty(observation.shape[0])
    powers = np.empty(transition.shape, like.dtype)
    alpha, scale = np.empty((0, 0, 0), like.dtype), np.empty((0, 0), like.dtype)
    forward(initial, transition, observation, lengths, floor, False, powers, alpha, scale, log_z, least)
    return log_z, least


@compiled
def backward(turned, observation, lengths, alpha, scale, grad, gamma, flow, count):
    """Scaled backward pass: fills the posterior ``gamma`` of each state, and what steps are made of, times
    ``grad [B]``.

    With flow = weight · beta / scale the posterior of a step into time t is alpha[t-1] · powers · flow[t].
    Either ``count [C,S,S]``, zero on entry, gets the sum of alpha[t-1] · flow[t] over time, C being 1 for the sum
    over rows or B; or, where C is 0, ``flow [B,T,S]`` is filled: zero at the first step and beyond the sequences.
    ``turned`` is ``powers`` transposed (to, from). The weights are computed once more, which costs less than
    memory to keep them.
    """
    rows, steps, size = observation.shape
    shared = turned.shape[0] == 1
    still = turned.shape[1] == 1
    width = 4 if shared else 1
    padded = -(-size // LANES) * LANES
    chunk = max(1, _PIECE // size)
    weight = np.empty(width * chunk * size, turned.dtype)
    spare = np.empty(_PIECE, turned.dtype)
    beta = np.zeros((4, padded), turned.dtype)
    out = np.zeros((4, padded), turned.dtype)
    room = np.zeros((size, padded), turned.dtype)
    panel = WIDE * LANES if still else padded
    fused = count.shape[0] > 0
    # rows and columns beyond the states collect what nobody reads
    ahead = np.zeros((width * chunk, padded) if fused else (1, padded), turned.dtype)
    sums = np.zeros((-(-size // 4) * 4 if fused else 0, padded), turned.dtype)
    kind = turned.dtype.type
    none, tail = fill(kind(0)), size - LANES
    for start in range(0, rows, width):
        stop = min(start + width, rows)
        matrix = _laid_out(turned, 0 if shared else start, 0, room, panel) if turned.shape[1] > 0 else room
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
                            out[r, j] = 0
                            if not fused:
                                flow[b, t, j] = 0
                        continue
                    if t == lengths[b] - 1:
                        for j in range(size):
                            beta[r, j] = 1
                    at = (r * chunk + t - begin) * size
                    inverse = kind(1) / scale[b, t] if t > 0 and scale[b, t] > 0 else kind(0)
                    place, own = (r * chunk + t - begin) * padded, kind(grad[b])
                    if tail < 0:
                        for j in range(size):
                            gamma[b, t, j] = alpha[b, t, j] * beta[r, j] * own
                            out[r, j] = weight[at + j] * beta[r, j] * inverse
                            if fused:
                                ahead[r * chunk + t - begin, j] = out[r, j] * own
                            else:
                                flow[b, t, j] = out[r, j] * own
                        continue
                    factor, times, row = fill(inverse), fill(own), (b * steps + t) * size
                    for k in range(0, size, LANES):
                        j = min(k, tail)
                        coming = load(beta, r * padded + j)
                        share = multiply_add(load(alpha, row + j), coming, none)
                        store(gamma, row + j, multiply_add(share, times, none))
                        value = multiply_add(load(weight, at + j), multiply_add(coming, factor, none), none)
                        store(out, r * padded + j, value)
                        if fused:
                            store(ahead, place + j, multiply_add(value, times, none))
                        else:
                            store(flow, row + j, multiply_add(value, times, none))
                if t > 0:
                    if not still:
                        matrix = _laid_out(turned, 0 if shared else start, t - 1, room, panel)
                    if stop - start > 1:
                        multiply("sum", 4, 4, size, out, 0, padded, 1, matrix, 0, panel, padded, beta, 0)
                    else:
                        multiply("sum", 1, 1, size, out, 0, padded, 1, matrix, 0, panel, padded, beta, 0)
            if fused:
                for b in range(start, stop):
                    if begin < lengths[b]:
                        t, r = max(begin, 1), b - start
                        each = min(begin + chunk, lengths[b]) - t
                        if count.shape[0] > 1:
                            sums[:] = 0
                        at, place = (b * steps + t - 1) * size, (r * chunk + t - begin) * padded
                        multiply(
                            "onto", 4, size, each, alpha, at, 1, size, ahead, place, padded, padded, sums, 0
                        )
                        if count.shape[0] > 1:
                            for i in range(size):
                                for j in range(size):
                                    count[b, i, j] += sums[i, j]
    if count.shape[0] == 1:
        count[0] += sums[:size, :size]


@compiled
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
def viterbi(initial, transition, turned, observation, lengths, z):
    """A best path ``z [B,T]`` in log space. Only scores are kept, the arguments are found again on the way
    back.
    """
    rows, steps, size = observation.shape
    padded = -(-size // LANES) * LANES
    kind = observation.dtype.type
    room = np.full((size, padded), -math.inf, observation.dtype)
    panel = WIDE * LANES if transition.shape[1] == 1 else padded
    moved = np.full(padded, -math.inf, observation.dtype)
    delta = np.empty(steps * padded, observation.dtype)
    seen = np.zeros(steps * size + LANES, observation.dtype)
    value = np.empty(size, observation.dtype)
    none, tail = fill(kind(-math.inf)), size - LANES
    for b in range(rows):
        a = b if transition.shape[0] > 1 else 0
        matrix = _laid_out(transition, a, 0, room, panel) if transition.shape[1] > 0 else room
        seen[: steps * size] = observation[b].reshape(-1)
        top = kind(0)
        for t in range(lengths[b]):
            if t == 0:
                moved[:size] = initial[b if initial.shape[0] > 1 else 0]
            else:
                if t > 1 and transition.shape[1] > 1:
                    matrix = _laid_out(transition, a, t - 1, room, panel)
                multiply(
                    "best", 1, 1, size, delta, (t - 1) * padded, 0, 1, matrix, 0, panel, padded, moved, 0
                )
            # a step late, so that nobody waits for the largest
            shift, tops = fill(-top), fill(kind(-math.inf))
            for j in range(0, padded, LANES):
                score = add(load(moved, j), add(load(seen, t * size + j), shift))
                store(delta, t * padded + j, score)
                tops = greater(score, tops)
            top = largest(tops)
            if top == -math.inf:
                top = kind(0)
        for t in range(lengths[b], steps):
            z[b, t] = 0
        for t in range(lengths[b] - 1, -1, -1):
            # after the last step nothing is added, all else comes from the matrix
            onward, last = z[b, min(t + 1, lengths[b] - 1)], t == lengths[b] - 1
            u = t if turned.shape[1] > 1 else 0
            best = kind(-math.inf)
            if tail < 0 or last:
                for i in range(size):
                    value[i] = delta[t * padded + i] + (kind(0) if last else turned[a, u, onward, i])
                    best = max(best, value[i])
            else:
                tops, at = none, ((a * turned.shape[1] + u) * size + onward) * size
                for k in range(0, size, LANES):
                    i = min(k, tail)
                    score = add(load(delta, t * padded + i), load(turned, at + i))
                    store(value, i, score)
                    tops = greater(score, tops)
                best = largest(tops)
            chosen = 0
            while chosen < size - 1 and value[chosen] != best:
                chosen += 1
            z[b, t] = chosen

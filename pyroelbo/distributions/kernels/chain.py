"""Compiled loops of the chain recursions; imported only where numba is installed.

Log potentials come as in ``_forward_backward``; weights and ``powers [A,U,S,S]`` (from, to) are their
exponentials, divided by the largest of each time or matrix. Where sequences share their transitions, four go
together, so that a matrix is read once for four of them; this beats BLAS on such thin products.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pyroelbo.distributions.kernels.arithmetic import (
    PIECE,
    aligned,
    compiled,
    exponentials,
    laid_out,
    multiply,
    narrow,
    powers_laid_out,
    powers_of,
)
from pyroelbo.distributions.kernels.simd import (
    LANES,
    WIDE,
    add,
    convert,
    expect,
    fill,
    greater,
    largest,
    lesser,
    load,
    multiply_add,
    store,
    store_halves,
    total,
)

# weights of a group of rows are kept for its way back up to so many
_KEPT = 1 << 20
# times the least sum that is trusted the product of sums must not leave the normal range
_LEAST_PRODUCT, _MOST_PRODUCT = 1e-15, 1e200


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
    exponentials(out[: steps * size], spare)
    return offset


class _Room(NamedTuple):
    """Arrays of a group of up to four rows: ``weight``, chunks of weights one row after the other, and rows of whole
    vectors. What lies beyond the states is zero.
    """

    weight: np.ndarray
    spare: np.ndarray
    moved: np.ndarray
    previous: np.ndarray
    low: np.ndarray
    matrix: np.ndarray


@compiled
def room_for(group, chunk, size, padded, like):
    """Room for a group of rows of ``size`` states in ``padded`` columns, and for the weights of ``chunk`` steps."""
    # vectors read beyond a row; what they find there meets a zero, and must be finite
    weight = aligned(group, chunk * size + 2 * LANES, like).reshape(-1)
    weight[:] = 0
    # one after the other: what is written must not lie a multiple of a page from what is read
    rows = aligned(12 + size + 3, padded, like)
    rows[:] = 0
    return _Room(weight, aligned(1, PIECE, like)[0], rows[:4], rows[4:8], rows[8:12], rows[12 : 12 + size])


@compiled
def _chunk(steps, size):
    return min(max(1, PIECE // size), steps)


@compiled
def layout_of(transition, observation):
    """How many rows go together, to how many columns they are filled up, and in what panels matrices lie."""
    rows, _, size = observation.shape
    group = 4 if transition.shape[0] == 1 and rows > 1 else 1
    still = transition.shape[1] == 1
    padded = -(-size // LANES) * LANES
    # one row of few states stays in registers
    lone = group == 1 and still and size <= 2 * LANES
    if lone:
        padded = 2 * LANES
    return group, padded, WIDE * LANES if still else padded, lone


@compiled
def _started(initial, padded, spare):
    """exp(initial - top) in rows of whole vectors, and the tops."""
    first = np.zeros((initial.shape[0], padded), spare.dtype)
    tops = np.zeros(initial.shape[0])
    for b in range(initial.shape[0]):
        tops[b] = powers_of(initial[b], first[b, : initial.shape[1]], spare)
    return first, tops


@compiled
def _all_powers(transition, powers, spare):
    tops = np.zeros((transition.shape[0], transition.shape[1]))
    for a in range(transition.shape[0]):
        for u in range(transition.shape[1]):
            tops[a, u] = powers_of(transition[a, u].reshape(-1), powers[a, u].reshape(-1), spare)
    return tops


@compiled
def _lone(begin, end, length, first, matrix, size, floor, fewest, most, product, room, alpha, scale):
    """The steps of ``_filter`` for one row of up to two vectors; returns the sums divided out, and logarithms
    of such.
    """
    kind = matrix.dtype.type
    none, lowest = fill(kind(0)), fill(kind(floor))
    previous, weight, keep = room.previous, room.weight, alpha.size > 0
    low0, low1 = load(room.low, 0), load(room.low, LANES)
    offset = 0.0
    for t in range(begin, end):
        if t == 0:
            value0, value1 = load(first, 0), load(first, LANES)
        else:
            value0, value1 = narrow("sum", size, previous, 0, matrix)
        at = (t - begin) * size
        # NaN stays: it is not below the floor
        value0 = greater(lowest, multiply_add(value0, load(weight, at), none))
        value1 = greater(lowest, multiply_add(value1, load(weight, at + LANES), none))
        low0, low1 = lesser(value0, low0), lesser(value1, low1)
        s = total(add(value0, value1))
        divided = t == length - 1 or not (fewest < s < most)
        if divided:
            if s > 0:
                inverse = fill(kind(1) / s)
                value0, value1 = multiply_add(value0, inverse, none), multiply_add(value1, inverse, none)
            product *= s
            if not (_LEAST_PRODUCT < product < _MOST_PRODUCT):
                offset += math.log(product) if product != 0 else -math.inf
                product = 1.0
        store_halves(previous, 0, value0)
        store_halves(previous, LANES, value1)
        if keep:
            scale[0, t] = s if divided else kind(1)
            # the next row covers what a vector leaves beyond this one
            if t * size + 2 * LANES <= alpha.size:
                store(alpha, t * size, value0)
                if size > LANES:
                    store(alpha, t * size + LANES, value1)
            else:
                for j in range(size):
                    alpha[0, t, j] = previous[0, j]
    store(room.low, 0, low0)
    store(room.low, LANES, low1)
    return product, offset


@compiled
def _filter(
    first,
    first_tops,
    matrix,
    powers,
    tops,
    observation,
    lengths,
    layout,
    floor,
    room,
    alpha,
    scale,
    log_z,
    least,
):
    """The scaled forward pass of a group of rows, which all arrays are cut to; ``powers [U,S,S]`` and their ``tops``
    are those of the group, ``matrix`` is laid out where U is 1.
    """
    group, padded, panel, lone = layout
    rows, size = observation.shape[0], observation.shape[2]
    stride = room.weight.shape[0] // group
    chunk = (stride - 2 * LANES) // size
    weight, spare, moved, previous, low = room.weight, room.spare, room.moved, room.previous, room.low
    still, keep = tops.shape[0] == 1, alpha.shape[0] > 0
    kind = weight.dtype.type
    lowest = kind(floor)
    # a sum is divided out only where it leaves these bounds, and at the end; an upper one far from 1 would let
    # a step that is lost below the smallest number count beside entries as small as those trusted
    fewest, most = (1e-2, 10.0) if weight.itemsize == 4 else (1e-20, 10.0)
    product = np.ones(rows)
    low[:] = math.inf
    longest = lengths.max()
    for r in range(rows):
        log_z[r] = first_tops[min(r, first.shape[0] - 1)]
        log_z[r] += (lengths[r] - 1) * tops[0] if still else tops[: lengths[r] - 1].sum()
    for begin in range(0, longest, chunk):
        end = min(begin + chunk, longest)
        for r in range(rows):
            if begin < lengths[r]:
                at = r * stride
                last = min(end, lengths[r])
                stop_at = at + (last - begin) * size
                log_z[r] += _weights(observation[r, begin:last], weight[at:stop_at], spare)
                weight[stop_at : stop_at + 2 * LANES] = 0
        if lone:
            product[0], offset = _lone(
                begin, end, longest, first, matrix, size, floor, fewest, most, product[0], room, alpha, scale
            )
            log_z[0] += offset
            continue
        for t in range(begin, end):
            if t == 0:
                for r in range(rows):
                    moved[r] = first[min(r, first.shape[0] - 1)]
            else:
                if not still:
                    matrix = laid_out(powers, t - 1, room.matrix, panel)
                if rows > 1:
                    multiply("sum", 4, 4, size, previous, 0, padded, 1, matrix, 0, panel, padded, moved, 0)
                else:
                    multiply("sum", 1, 1, size, previous, 0, padded, 1, matrix, 0, panel, padded, moved, 0)
            for r in range(rows):
                if t >= lengths[r]:
                    continue
                at = r * stride + (t - begin) * size
                s = _absorb(moved, r, weight, at, lowest, previous, low)
                divided = t == lengths[r] - 1 or not (fewest < s < most)
                if divided:
                    if s > 0:
                        inverse = kind(1) / s
                        for j in range(padded):
                            previous[r, j] *= inverse
                    product[r] *= s
                    if not (_LEAST_PRODUCT < product[r] < _MOST_PRODUCT):
                        log_z[r] += math.log(product[r]) if product[r] != 0 else -math.inf
                        product[r] = 1.0
                if keep:
                    scale[r, t] = s if divided else kind(1)
                    if size < LANES:
                        for j in range(size):
                            alpha[r, t, j] = previous[r, j]
                    else:
                        for k in range(0, size, LANES):
                            j = min(k, size - LANES)
                            store(alpha, (r * alpha.shape[1] + t) * size + j, load(previous, r * padded + j))
    for r in range(rows):
        log_z[r] += math.log(product[r])
        least[r] = low[r, :size].min()
        if keep:
            alpha[r, lengths[r] :] = 0
            scale[r, lengths[r] :] = 1


@compiled
def forward(initial, transition, observation, lengths, floor, powers, alpha, scale, log_z, least):
    """Scaled forward pass: fills ``log_z [B]``, ``least [B]``, and all that is kept; returns the least of ``least``.

    ``alpha [B,T,S]`` is what the sums ``scale [B,T]`` leave, one in the end; ``least`` is the least entry
    met. ``floor`` lifts every entry from below at each step, which makes the result an upper bound. Where ``alpha`` and
    ``scale`` have no rows, nothing is kept; ``powers`` then need not be filled.
    """
    rows, steps, size = observation.shape
    shared, still = transition.shape[0] == 1, transition.shape[1] == 1
    layout = layout_of(transition, observation)
    group, padded, panel, _ = layout
    room = room_for(group, _chunk(steps, size), size, padded, powers)
    keep = alpha.shape[0] > 0
    first, first_tops = _started(initial, padded, room.spare)
    if keep or not still:
        tops = _all_powers(transition, powers, room.spare)
    else:
        tops = np.zeros((transition.shape[0], 1))
    matrix = room.matrix
    for start in range(0, rows, group):
        a, part = 0 if shared else start, slice(start, min(start + group, rows))
        if still and (start == 0 or not shared):
            if keep:
                matrix = laid_out(powers[a], 0, room.matrix, panel)
            else:
                tops[a, 0] = powers_laid_out(transition[a, 0], room.matrix, panel, room.spare)
        own = part if initial.shape[0] > 1 else slice(0, 1)
        _filter(
            first[own],
            first_tops[own],
            matrix,
            powers[a],
            tops[a],
            observation[part],
            lengths[part],
            layout,
            floor,
            room,
            alpha[part],
            scale[part],
            log_z[part],
            least[part],
        )
    return least.min() if rows else math.inf


@compiled
def evidence(initial, transition, observation, lengths, floor, log_z, least, like):
    """``forward`` in the precision of ``like``; nothing is kept."""
    still = transition.shape[1] == 1
    powers = np.empty((transition.shape[0], 0, 0, 0) if still else transition.shape, like.dtype)
    alpha, scale = np.empty((0, 0, 0), like.dtype), np.empty((0, 0), like.dtype)
    return forward(initial, transition, observation, lengths, floor, powers, alpha, scale, log_z, least)


@compiled
def _smoother(
    turned,
    matrix,
    observation,
    lengths,
    layout,
    known,
    room,
    alpha,
    scale,
    grad,
    gamma,
    flow,
    count,
    ahead,
    sums,
):
    """The scaled backward pass of a group of rows, which all arrays are cut to, ``turned`` to [U,S,S]. ``room.weight``
    has the weights where they are ``known``. ``ahead`` is a chunk's flow; see ``backward``.
    """
    group, padded, panel, _ = layout
    rows, steps, size = observation.shape
    weight, beta, out = room.weight, room.moved, room.previous
    still, fused = turned.shape[0] == 1, sums.shape[0] > 0
    kind = weight.dtype.type
    none, tail = fill(kind(0)), size - LANES
    stride, chunk = weight.shape[0] // group, _chunk(steps, size)
    beta[:] = 0
    out[:] = 0
    for begin in range((steps - 1) // chunk * chunk, -1, -chunk):
        end, base = min(begin + chunk, steps), 0 if known else begin
        for r in range(rows):
            if begin < lengths[r] and not known:
                at = r * stride
                last = min(end, lengths[r])
                _weights(observation[r, begin:last], weight[at : at + (last - begin) * size], room.spare)
        for t in range(end - 1, begin - 1, -1):
            for r in range(rows):
                if t >= lengths[r]:
                    for j in range(size):
                        gamma[r, t, j] = 0
                        out[r, j] = 0
                        if not fused:
                            flow[r, t, j] = 0
                    continue
                if t == lengths[r] - 1:
                    for j in range(size):
                        beta[r, j] = 1
                at, place = r * stride + (t - base) * size, (r * chunk + t - begin) * padded
                inverse = kind(1) / scale[r, t] if t > 0 and scale[r, t] > 0 else kind(0)
                own = kind(grad[r])
                if tail < 0:
                    for j in range(size):
                        gamma[r, t, j] = alpha[r, t, j] * beta[r, j] * own
                        out[r, j] = weight[at + j] * beta[r, j] * inverse
                        if fused:
                            ahead[r * chunk + t - begin, j] = out[r, j] * own
                        else:
                            flow[r, t, j] = out[r, j] * own
                    continue
                factor, times, row = fill(inverse), fill(own), (r * steps + t) * size
                for k in range(0, size, LANES):
                    j = min(k, tail)
                    coming = load(beta, r * padded + j)
                    share = multiply_add(load(alpha, row + j), coming, none)
                    store(gamma, row + j, multiply_add(share, times, none))
                    expect(gamma, row + j - 2 * size)
                    value = multiply_add(load(weight, at + j), multiply_add(coming, factor, none), none)
                    store(out, r * padded + j, value)
                    if fused:
                        store(ahead, place + j, multiply_add(value, times, none))
                    else:
                        store(flow, row + j, multiply_add(value, times, none))
            if t > 0:
                if not still:
                    matrix = laid_out(turned, t - 1, room.matrix, panel)
                if rows > 1:
                    multiply("sum", 4, 4, size, out, 0, padded, 1, matrix, 0, panel, padded, beta, 0)
                else:
                    multiply("sum", 1, 1, size, out, 0, padded, 1, matrix, 0, panel, padded, beta, 0)
        if fused:
            for r in range(rows):
                if begin < lengths[r]:
                    t = max(begin, 1)
                    each = min(end, lengths[r]) - t
                    if count.shape[0] > 0:
                        sums[:] = 0
                    at, place = (r * steps + t - 1) * size, (r * chunk + t - begin) * padded
                    multiply("onto", 4, size, each, alpha, at, 1, size, ahead, place, padded, padded, sums, 0)
                    if count.shape[0] > 0:
                        for i in range(size):
                            for j in range(size):
                                count[r, i, j] += sums[i, j]


@compiled
def _collected(count, group, steps, size, padded):
    """Room for a chunk's flow, and for the sum of counts; rows and columns beyond the states collect what nobody
    reads.
    """
    fused = count.shape[0] > 0
    ahead = np.zeros((group * _chunk(steps, size) if fused else 1, padded), count.dtype)
    return ahead, np.zeros((-(-size // 4) * 4 if fused else 0, padded), count.dtype)


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
    layout = layout_of(turned, observation)
    group, padded, panel, _ = layout
    room = room_for(group, _chunk(steps, size), size, padded, turned)
    ahead, sums = _collected(count, group, steps, size, padded)
    matrix, apart = room.matrix, count.shape[0] > 1
    for start in range(0, rows, group):
        a, part = 0 if turned.shape[0] == 1 else start, slice(start, min(start + group, rows))
        if turned.shape[1] == 1:
            matrix = laid_out(turned[a], 0, room.matrix, panel)
        _smoother(
            turned[a],
            matrix,
            observation[part],
            lengths[part],
            layout,
            False,
            room,
            alpha[part],
            scale[part],
            grad[part],
            gamma[part],
            flow[part],
            count[part] if apart else count[:0],
            ahead,
            sums,
        )
    if count.shape[0] == 1:
        count[0] += sums[:size, :size]


@compiled
def smooth(initial, transition, observation, lengths, powers, gamma, count, log_z, least):
    """``forward`` and ``backward`` of chains whose steps are alike (U = 1), group after group, so that what is kept stays
    in the cache: fills ``powers``, ``gamma [B,T,S]``, ``count``, ``log_z [B]`` and ``least [B]``; returns the least of it.
    """
    rows, steps, size = observation.shape
    shared = transition.shape[0] == 1
    layout = layout_of(transition, observation)
    group, padded, panel, _ = layout
    known = group * steps * size <= _KEPT
    room = room_for(group, steps if known else _chunk(steps, size), size, padded, powers)
    first, first_tops = _started(initial, padded, room.spare)
    tops = _all_powers(transition, powers, room.spare)
    ahead, sums = _collected(count, group, steps, size, padded)
    turned = np.empty((1, size, size), powers.dtype)
    alpha, scale = np.empty((group, steps, size), powers.dtype), np.empty((group, steps), powers.dtype)
    back, grad = aligned(size, padded, powers), np.ones(group, powers.dtype)
    back[:] = 0
    for start in range(0, rows, group):
        a, part = 0 if shared else start, slice(start, min(start + group, rows))
        if start == 0 or not shared:
            turned[0] = powers[a, 0].T
            ahead_matrix = laid_out(powers[a], 0, room.matrix, panel)
            back_matrix = laid_out(turned, 0, back, panel)
        own, mine = part if initial.shape[0] > 1 else slice(0, 1), slice(0, part.stop - part.start)
        _filter(
            first[own],
            first_tops[own],
            ahead_matrix,
            powers[a],
            tops[a],
            observation[part],
            lengths[part],
            layout,
            0.0,
            room,
            alpha[mine],
            scale[mine],
            log_z[part],
            least[part],
        )
        _smoother(
            turned,
            back_matrix,
            observation[part],
            lengths[part],
            layout,
            known,
            room,
            alpha[mine],
            scale[mine],
            grad[mine],
            gamma[part],
            gamma[:0],
            count[part],
            ahead,
            sums,
        )
    return least.min() if rows else math.inf

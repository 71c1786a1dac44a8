"""Scaled forward and backward passes over chains (needs numba).

    B sequences, T steps, S states; I, A in {1, B} (shared by the batch or not), U in {1, T-1} (the same at
    every step or not)

    initial         [I, S]        log potentials
    transition      [A, U, S, S]  log potentials (from, to)
    observation     [B, T, S]     log potentials
    lengths         [B]           in 1..T; steps at and beyond a length are padding: never read
    exp_transition  [A, U, S, S]  filled: exp(transition - top), top being the largest entry of each matrix
    alpha           [B, T, S]     filled: filtered weights, divided by scale; zero in the padding
    scale           [B, T]        filled: what alpha was divided by; 1 in the padding
    gamma           [B, T, S]     filled: posterior of each state; zero in the padding
    log_z           [B]           filled
    min_alpha       [B]           filled: the smallest entry of alpha before division

Sequences that share their transitions are processed in groups of four, so that a matrix is read once for four
of them; this beats BLAS on such thin products. Rows of a workspace have ``padded`` columns, S rounded up to
whole vectors of LANES; what lies beyond S is zero, and stays so. Time is processed in chunks, whose weights
exp(observation - top) are computed at once:

    workspace.weight    [group · stride]  row r of the group: chunk · S weights at r · stride, then zeros
    workspace.previous  [4, padded]       alpha of the last step; in the backward pass what goes back a step
    workspace.moved     [4, padded]       the product with the matrix; updated in place
    workspace.matrix    [S + 3, padded]   the matrix, laid out (see ``arithmetic``), then rows of zeros
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from pyroelbo.distributions.kernels.arithmetic import (
    PIECE,
    aligned,
    exp_laid_out,
    exp_of,
    exponentials,
    laid_out,
    multiply,
    narrow,
)
from pyroelbo.distributions.kernels.gate import (
    compiled,
    expect_contiguous,
    expect_index,
    expect_shapes,
    inlined,
    kernel,
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

__all__ = ["backward", "evidence", "forward", "smooth"]

_KEPT_WEIGHTS = 1 << 20  # up to this size the weights of a group are kept for the backward pass
# the product of the sums divided out is kept as a number while it is within these bounds, then as a logarithm
_MIN_PRODUCT, _MAX_PRODUCT = 1e-15, 1e200


class Layout(NamedTuple):
    """``group`` sequences at a time, ``padded`` columns, panels of ``panel`` columns; ``single``: one narrow
    row.
    """

    group: int
    padded: int
    panel: int
    single: bool


class Workspace(NamedTuple):
    """Arrays for one group, see the module's diagram; ``spare`` and ``min_alpha`` are scratch and running
    minima.
    """

    weight: np.ndarray
    spare: np.ndarray
    moved: np.ndarray
    previous: np.ndarray
    min_alpha: np.ndarray
    matrix: np.ndarray


class Group(NamedTuple):
    """The inputs of one group: ``first`` is exp(initial - first_top), ``exp_transition [U,S,S]`` with ``top
    [U]``.
    """

    first: np.ndarray
    first_top: np.ndarray
    exp_transition: np.ndarray
    top: np.ndarray
    observation: np.ndarray
    lengths: np.ndarray


class Filtered(NamedTuple):
    """The outputs of the forward pass; ``alpha`` and ``scale`` without rows if they are not kept."""

    alpha: np.ndarray
    scale: np.ndarray
    log_z: np.ndarray
    min_alpha: np.ndarray


class Smoothed(NamedTuple):
    """The outputs of the backward pass: either ``flow`` or ``counts`` is without rows."""

    gamma: np.ndarray
    flow: np.ndarray
    counts: np.ndarray


class Counts(NamedTuple):
    """``flow [group · chunk, padded]`` of a chunk and ``total [S rounded up to 4, padded]``: rows and columns
    beyond S collect what is never read. Without rows if counts are not wanted.
    """

    flow: np.ndarray
    total: np.ndarray


@compiled
def layout_of(transition, observation):
    rows, _, size = observation.shape
    group = 4 if transition.shape[0] == 1 and rows > 1 else 1
    homogeneous = transition.shape[1] == 1
    padded = -(-size // LANES) * LANES
    # one row of few states stays in registers
    single = group == 1 and homogeneous and size <= 2 * LANES
    if single:
        padded = 2 * LANES
    return Layout(group, padded, WIDE * LANES if homogeneous else padded, single)


@compiled
def workspace_for(layout, chunk, size, like):
    """A workspace for rows of ``size`` states, and for the weights of ``chunk`` steps, in the dtype of
    ``like``.
    """
    # vectors read beyond a row; what they find there meets a zero, and must be finite
    weight = aligned(layout.group, chunk * size + 2 * LANES, like).reshape(-1)
    weight[:] = 0
    # in this order: what is written must not lie a multiple of a page from what is read
    rows = aligned(12 + size + 3, layout.padded, like)
    rows[:] = 0
    return Workspace(weight, aligned(1, PIECE, like)[0], rows[:4], rows[4:8], rows[8:12], rows[12:])


@compiled
def _chunk(steps, size):
    return min(max(1, PIECE // size), steps)


@compiled
def _weights(observation, out, spare):
    """out = exp(observation - top), top being the largest of each row [S]; returns the sum of the tops."""
    steps, size = observation.shape
    offset = 0.0
    differences = fill(out.dtype.type(0))
    for t in range(steps):
        at = t * size
        # the last vector of a row reaches back; rows shorter than a vector go entry by entry
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
    # none is positive, so that their sum is NaN only if one is
    if total(differences) != total(differences):
        offset = math.nan
    exponentials(out[: steps * size], spare)
    return offset


@compiled
def _chunk_weights(group, begin, end, layout, workspace):
    """Fill ``workspace.weight`` for steps ``begin`` to ``end`` of each row; returns the tops' sums [4]."""
    rows, _, size = group.observation.shape
    weight, lengths, offsets = workspace.weight, group.lengths, np.zeros(4)
    for r in range(rows):
        if begin < lengths[r]:
            at = r * (weight.shape[0] // layout.group)
            last = min(end, lengths[r])
            stop = at + (last - begin) * size
            offsets[r] = _weights(group.observation[r, begin:last], weight[at:stop], workspace.spare)
            weight[stop : stop + 2 * LANES] = 0
    return offsets


@compiled
def _first(initial, padded, spare):
    """exp(initial - top) in rows of whole vectors [I, padded], and the tops [I]."""
    first = np.zeros((initial.shape[0], padded), spare.dtype)
    tops = np.zeros(initial.shape[0])
    for b in range(initial.shape[0]):
        tops[b] = exp_of(initial[b], first[b, : initial.shape[1]], spare)
    return first, tops


@compiled
def _exp_transitions(transition, exp_transition, spare):
    """Fill ``exp_transition``; returns the tops [A, U]."""
    tops = np.zeros((transition.shape[0], transition.shape[1]))
    for a in range(transition.shape[0]):
        for u in range(transition.shape[1]):
            tops[a, u] = exp_of(transition[a, u].reshape(-1), exp_transition[a, u].reshape(-1), spare)
    return tops


@compiled
def _sums_kept(like):
    """A sum within these bounds is not divided out. An upper bound far from 1 would let a step that is lost
    below the smallest number count beside entries as small as those trusted.
    """
    return (1e-2, 10.0) if like.itemsize == 4 else (1e-20, 10.0)


@inlined
def _absorb(moved, r, weight, at, floor, previous, min_alpha):
    """Row r of ``previous`` = max(moved · weight, floor); returns its sum, and updates the minima."""
    padded = moved.shape[1]
    none = fill(moved.dtype.type(0))
    sums = none
    for j in range(r * padded, (r + 1) * padded, LANES):
        value = multiply_add(load(moved, j), load(weight, at + j - r * padded), none)
        # NaN stays: it is not below the floor
        value = greater(fill(floor), value)
        store(min_alpha, j, lesser(value, load(min_alpha, j)))
        store(previous, j, value)
        sums = add(sums, value)
    return total(sums)


@inlined
def _keep(previous, r, t, alpha):
    """alpha[r, t] = row r of ``previous``, without its padding."""
    size, padded = alpha.shape[2], previous.shape[1]
    if size < LANES:
        for j in range(size):
            alpha[r, t, j] = previous[r, j]
    else:
        for k in range(0, size, LANES):
            j = min(k, size - LANES)
            store(alpha, (r * alpha.shape[1] + t) * size + j, load(previous, r * padded + j))


@compiled
def _filter_single(begin, end, group, matrix, floor, product, workspace, out):
    """Steps ``begin`` to ``end`` of a single row of up to two vectors; returns the product of the sums
    divided out, and the logarithms of earlier ones.
    """
    size, length = group.observation.shape[2], group.lengths[0]
    kind = matrix.dtype.type
    none, lowest = fill(kind(0)), fill(kind(floor))
    min_sum, max_sum = _sums_kept(matrix)
    previous, weight, alpha = workspace.previous, workspace.weight, out.alpha
    keep = alpha.size > 0
    min0, min1 = load(workspace.min_alpha, 0), load(workspace.min_alpha, LANES)
    offset = 0.0
    for t in range(begin, end):
        if t == 0:
            value0, value1 = load(group.first, 0), load(group.first, LANES)
        else:
            value0, value1 = narrow("sum", size, previous, 0, matrix)
        at = (t - begin) * size
        # NaN stays: it is not below the floor
        value0 = greater(lowest, multiply_add(value0, load(weight, at), none))
        value1 = greater(lowest, multiply_add(value1, load(weight, at + LANES), none))
        min0, min1 = lesser(value0, min0), lesser(value1, min1)
        s = total(add(value0, value1))
        divided = t == length - 1 or not (min_sum < s < max_sum)
        if divided:
            if s > 0:
                inverse = fill(kind(1) / s)
                value0, value1 = multiply_add(value0, inverse, none), multiply_add(value1, inverse, none)
            product *= s
            if not (_MIN_PRODUCT < product < _MAX_PRODUCT):
                offset += math.log(product) if product != 0 else -math.inf
                product = 1.0
        store_halves(previous, 0, value0)
        store_halves(previous, LANES, value1)
        if keep:
            out.scale[0, t] = s if divided else kind(1)
            # the next row overwrites what a vector leaves beyond this one
            if t * size + 2 * LANES <= alpha.size:
                store(alpha, t * size, value0)
                if size > LANES:
                    store(alpha, t * size + LANES, value1)
            else:
                for j in range(size):
                    alpha[0, t, j] = previous[0, j]
    store(workspace.min_alpha, 0, min0)
    store(workspace.min_alpha, LANES, min1)
    return product, offset


# NamedTuples are unpacked before a loop over time, and only arrays passed on within: their references are
# counted
@compiled
def _filter(group, matrix, layout, floor, workspace, out):
    """The scaled forward pass of a group; ``matrix`` is laid out if U is 1."""
    first, first_top, exp_transition, top, observation, lengths = group
    weight, _, moved, previous, min_alpha, _ = workspace
    alpha, scale, log_z, _ = out
    rows, _, size = observation.shape
    stride = weight.shape[0] // layout.group
    padded, panel = layout.padded, layout.panel
    chunk = (stride - 2 * LANES) // size
    homogeneous, keep, kind = top.shape[0] == 1, alpha.shape[0] > 0, weight.dtype.type
    lowest, product = kind(floor), np.ones(rows)
    min_sum, max_sum = _sums_kept(weight)
    min_alpha[:] = math.inf
    longest = lengths.max()
    for r in range(rows):
        log_z[r] = first_top[min(r, first.shape[0] - 1)]
        log_z[r] += (lengths[r] - 1) * top[0] if homogeneous else top[: lengths[r] - 1].sum()
    for begin in range(0, longest, chunk):
        end = min(begin + chunk, longest)
        offsets = _chunk_weights(group, begin, end, layout, workspace)
        for r in range(rows):
            log_z[r] += offsets[r]
        if layout.single:
            product[0], offset = _filter_single(begin, end, group, matrix, floor, product[0], workspace, out)
            log_z[0] += offset
            continue
        for t in range(begin, end):
            if t == 0:
                for r in range(rows):
                    moved[r] = first[min(r, first.shape[0] - 1)]
            else:
                if not homogeneous:
                    matrix = laid_out(exp_transition, t - 1, workspace.matrix, panel)
                x_at, y_at, to = (0, padded, 1), (0, panel), (0, padded)
                if rows > 1:
                    multiply("sum", 4, (4, size), previous, x_at, matrix, y_at, moved, to)
                else:
                    multiply("sum", 1, (1, size), previous, x_at, matrix, y_at, moved, to)
            for r in range(rows):
                if t >= lengths[r]:
                    continue
                s = _absorb(moved, r, weight, r * stride + (t - begin) * size, lowest, previous, min_alpha)
                divided = t == lengths[r] - 1 or not (min_sum < s < max_sum)
                if divided:
                    if s > 0:
                        inverse = kind(1) / s
                        for j in range(padded):
                            previous[r, j] *= inverse
                    product[r] *= s
                    if not (_MIN_PRODUCT < product[r] < _MAX_PRODUCT):
                        log_z[r] += math.log(product[r]) if product[r] != 0 else -math.inf
                        product[r] = 1.0
                if keep:
                    scale[r, t] = s if divided else kind(1)
                    _keep(previous, r, t, alpha)
    for r in range(rows):
        log_z[r] += math.log(product[r])
        out.min_alpha[r] = min_alpha[r, :size].min()
        if keep:
            alpha[r, lengths[r] :] = 0
            scale[r, lengths[r] :] = 1


@compiled
def fit(initial_shape, transition, observation, lengths):
    """Whether the shapes of the inputs match, see the module's diagram."""
    rows, steps, size = observation.shape
    return (
        steps > 0
        and size > 0
        and initial_shape[0] in (1, rows)
        and initial_shape[1] == size
        and transition.shape[0] in (1, rows)
        and transition.shape[1] in (1, steps - 1)
        and transition.shape[2] == size
        and transition.shape[3] == size
        and lengths.shape[0] == rows
    )


@compiled
def _forward(initial, transition, observation, lengths, floor, exp_transition, out):
    rows, steps, size = observation.shape
    shared, homogeneous = transition.shape[0] == 1, transition.shape[1] == 1
    layout = layout_of(transition, observation)
    workspace = workspace_for(layout, _chunk(steps, size), size, exp_transition)
    keep = out.alpha.shape[0] > 0
    first, first_top = _first(initial, layout.padded, workspace.spare)
    if keep or not homogeneous:
        tops = _exp_transitions(transition, exp_transition, workspace.spare)
    else:
        tops = np.zeros((transition.shape[0], 1))
    matrix = workspace.matrix
    for start in range(0, rows, layout.group):
        a, part = 0 if shared else start, slice(start, min(start + layout.group, rows))
        if homogeneous and (start == 0 or not shared):
            if keep:
                matrix = laid_out(exp_transition[a], 0, workspace.matrix, layout.panel)
            else:
                tops[a, 0] = exp_laid_out(transition[a, 0], workspace.matrix, layout.panel, workspace.spare)
        own = part if initial.shape[0] > 1 else slice(0, 1)
        group = Group(
            first[own], first_top[own], exp_transition[a], tops[a], observation[part], lengths[part]
        )
        mine = Filtered(out.alpha[part], out.scale[part], out.log_z[part], out.min_alpha[part])
        _filter(group, matrix, layout, floor, workspace, mine)
    return out.min_alpha.min() if rows else math.inf


@kernel
def forward(initial, transition, observation, lengths, floor, exp_transition, alpha, scale, log_z, min_alpha):
    """Scaled forward pass: fills all that follow ``floor``; returns the smallest of ``min_alpha``.

    ``floor`` lifts every entry from below at each step, which makes the result an upper bound.
    """
    expect_contiguous(
        initial, transition, observation, lengths, exp_transition, alpha, scale, log_z, min_alpha
    )
    rows, steps, _ = observation.shape
    expect_shapes(fit(initial.shape, transition, observation, lengths))
    expect_shapes(exp_transition.shape == transition.shape and alpha.shape == observation.shape)
    expect_shapes(scale.shape == (rows, steps) and log_z.shape == min_alpha.shape == (rows,))
    expect_index("lengths", lengths, 1, steps)
    out = Filtered(alpha, scale, log_z, min_alpha)
    return _forward(initial, transition, observation, lengths, floor, exp_transition, out)


@kernel
def evidence(initial, transition, observation, lengths, floor, log_z, min_alpha, like):
    """``forward`` in the dtype of ``like``, which keeps neither weights nor scales."""
    expect_contiguous(initial, transition, observation, lengths, log_z, min_alpha, like)
    expect_shapes(fit(initial.shape, transition, observation, lengths))
    expect_shapes(log_z.shape == min_alpha.shape == lengths.shape)
    expect_index("lengths", lengths, 1, observation.shape[1])
    homogeneous = transition.shape[1] == 1
    exp_transition = np.empty((transition.shape[0], 0, 0, 0) if homogeneous else transition.shape, like.dtype)
    out = Filtered(np.empty((0, 0, 0), like.dtype), np.empty((0, 0), like.dtype), log_z, min_alpha)
    return _forward(initial, transition, observation, lengths, floor, exp_transition, out)


@inlined
def _back_row(alpha, beta, weight, gamma, back, flow, at, factors, size):
    """gamma = alpha · beta · own, back = weight · beta · inverse, and flow = back · own for one row of flat
    arrays.

    ``at`` are the offsets of alpha and gamma, of beta and back, of weight, and of flow; ``factors`` are
    inverse, own.
    """
    row, line, place, to = at
    inverse, own = factors
    none, tail = fill(alpha.dtype.type(0)), size - LANES
    if tail < 0:
        for j in range(size):
            gamma[row + j] = alpha[row + j] * beta[line + j] * own
            back[line + j] = weight[place + j] * beta[line + j] * inverse
            flow[to + j] = back[line + j] * own
        return
    factor, times = fill(inverse), fill(own)
    for k in range(0, size, LANES):
        j = min(k, tail)
        coming = load(beta, line + j)
        joint = multiply_add(load(alpha, row + j), coming, none)
        store(gamma, row + j, multiply_add(joint, times, none))
        expect(gamma, row + j - 2 * size)
        value = multiply_add(load(weight, place + j), multiply_add(coming, factor, none), none)
        store(back, line + j, value)
        store(flow, to + j, multiply_add(value, times, none))


@compiled
def _add_counts(begin, end, group, layout, alpha, out, counts):
    """Add a chunk's expected steps to ``out.counts``, or to ``counts.total`` if the batch shares it."""
    rows, steps, size = group.observation.shape
    padded, chunk, apart = layout.padded, _chunk(steps, size), out.counts.shape[0] > 0
    for r in range(rows):
        if begin < group.lengths[r]:
            t = max(begin, 1)
            each = min(end, group.lengths[r]) - t
            if apart:
                counts.total[:] = 0
            before, now = ((r * steps + t - 1) * size, 1, size), ((r * chunk + t - begin) * padded, padded)
            multiply("onto", 4, (size, each), alpha, before, counts.flow, now, counts.total, (0, padded))
            if apart:
                for i in range(size):
                    for j in range(size):
                        out.counts[r, i, j] += counts.total[i, j]


@compiled
def _smoother(group, matrix, layout, known, workspace, kept, grad, out, counts):
    """The scaled backward pass of a group, whose ``exp_transition`` is transposed here; ``workspace.weight``
    has the weights of all steps if they are ``known``.
    """
    exp_transition, lengths, weight = group.exp_transition, group.lengths, workspace.weight
    rows, steps, size = group.observation.shape
    beta, back, alpha, scale, gamma = workspace.moved, workspace.previous, kept.alpha, kept.scale, out.gamma
    homogeneous, fused = exp_transition.shape[0] == 1, counts.total.shape[0] > 0
    padded, panel = layout.padded, layout.panel
    flat_alpha, flat_beta, flat_gamma = alpha.reshape(-1), beta.reshape(-1), gamma.reshape(-1)
    flat_back, kind = back.reshape(-1), weight.dtype.type
    flat_flow = counts.flow.reshape(-1) if fused else out.flow.reshape(-1)
    stride, chunk = weight.shape[0] // layout.group, _chunk(steps, size)
    beta[:] = 0
    back[:] = 0
    longest = lengths.max()
    for r in range(rows):
        gamma[r, lengths[r] :] = 0
        if not fused:
            out.flow[r, lengths[r] :] = 0
    for begin in range((longest - 1) // chunk * chunk, -1, -chunk):
        end = min(begin + chunk, longest)
        if not known:
            _chunk_weights(group, begin, end, layout, workspace)
        for t in range(end - 1, begin - 1, -1):
            for r in range(rows):
                if t >= lengths[r]:
                    continue
                if t == lengths[r] - 1:
                    for j in range(size):
                        beta[r, j] = 1
                row, place = (r * steps + t) * size, r * stride + (t - (0 if known else begin)) * size
                inverse = kind(1) / scale[r, t] if t > 0 and scale[r, t] > 0 else kind(0)
                at = (row, r * padded, place, (r * chunk + t - begin) * padded if fused else row)
                factors = (inverse, kind(grad[r]))
                _back_row(flat_alpha, flat_beta, weight, flat_gamma, flat_back, flat_flow, at, factors, size)
            if t > 0:
                if not homogeneous:
                    matrix = laid_out(exp_transition, t - 1, workspace.matrix, panel)
                x_at, y_at, to = (0, padded, 1), (0, panel), (0, padded)
                if rows > 1:
                    multiply("sum", 4, (4, size), back, x_at, matrix, y_at, beta, to)
                else:
                    multiply("sum", 1, (1, size), back, x_at, matrix, y_at, beta, to)
        if fused:
            _add_counts(begin, end, group, layout, alpha, out, counts)


@compiled
def _counts_for(count, layout, steps, size):
    fused = count.shape[0] > 0
    flow = np.zeros((layout.group * _chunk(steps, size) if fused else 1, layout.padded), count.dtype)
    return Counts(flow, np.zeros((-(-size // 4) * 4 if fused else 0, layout.padded), count.dtype))


@kernel
def backward(transposed, observation, lengths, alpha, scale, grad, gamma, flow, count):
    """Scaled backward pass: fills the posterior ``gamma`` of each state, and what steps are made of, times
    ``grad [B]``.

    With flow = weight · beta / scale the posterior of a step into time t is alpha[t-1] · exp_transition ·
    flow[t]. Either ``count [C,S,S]``, zero on entry, gets the sum of alpha[t-1] · flow[t] over time, C being
    1 (the sum over the batch) or B; or, if C is 0, ``flow [B,T,S]`` is filled: zero at the first step and in
    the padding. ``transposed [A,U,S,S]`` is ``exp_transition`` (to, from). The weights are computed once
    more, which costs less than the memory to keep them.
    """
    expect_contiguous(transposed, observation, lengths, alpha, scale, grad, gamma, flow, count)
    rows, steps, size = observation.shape
    expect_shapes(fit((rows, size), transposed, observation, lengths))
    expect_shapes(alpha.shape == gamma.shape == observation.shape and scale.shape == (rows, steps))
    expect_shapes(grad.shape == (rows,) and count.shape[0] in (0, 1, rows))
    if count.shape[0] > 0:
        expect_shapes(count.shape[1] == size and count.shape[2] == size)
    else:
        expect_shapes(flow.shape == observation.shape)
    expect_index("lengths", lengths, 1, steps)
    layout = layout_of(transposed, observation)
    workspace = workspace_for(layout, _chunk(steps, size), size, transposed)
    counts = _counts_for(count, layout, steps, size)
    matrix, apart = workspace.matrix, count.shape[0] > 1
    none = np.empty((0, 0), alpha.dtype)
    no_top = np.empty(0)
    for start in range(0, rows, layout.group):
        a, part = 0 if transposed.shape[0] == 1 else start, slice(start, min(start + layout.group, rows))
        if transposed.shape[1] == 1:
            matrix = laid_out(transposed[a], 0, workspace.matrix, layout.panel)
        group = Group(none, no_top, transposed[a], no_top, observation[part], lengths[part])
        kept = Filtered(alpha[part], scale[part], no_top, no_top)
        out = Smoothed(gamma[part], flow[part], count[part] if apart else count[:0])
        _smoother(group, matrix, layout, False, workspace, kept, grad[part], out, counts)
    if count.shape[0] == 1:
        count[0] += counts.total[:size, :size]


@kernel
def smooth(initial, transition, observation, lengths, exp_transition, gamma, count, log_z, min_alpha):
    """``forward`` and ``backward`` of homogeneous chains (U = 1), group after group, so that what is kept
    stays in the cache: fills all that follow ``lengths``, ``count [B,S,S]`` being zero on entry; returns the
    smallest of ``min_alpha``.
    """
    expect_contiguous(
        initial, transition, observation, lengths, exp_transition, gamma, count, log_z, min_alpha
    )
    rows, steps, size = observation.shape
    expect_shapes(fit(initial.shape, transition, observation, lengths) and transition.shape[1] == 1)
    expect_shapes(exp_transition.shape == transition.shape and gamma.shape == observation.shape)
    expect_shapes(count.shape == (rows, size, size) and log_z.shape == min_alpha.shape == (rows,))
    expect_index("lengths", lengths, 1, steps)
    shared = transition.shape[0] == 1
    layout = layout_of(transition, observation)
    known = layout.group * steps * size <= _KEPT_WEIGHTS
    workspace = workspace_for(layout, steps if known else _chunk(steps, size), size, exp_transition)
    first, first_top = _first(initial, layout.padded, workspace.spare)
    tops = _exp_transitions(transition, exp_transition, workspace.spare)
    counts = _counts_for(count, layout, steps, size)
    dtype = exp_transition.dtype
    transposed, grad = np.empty((1, size, size), dtype), np.ones(layout.group, dtype)
    alpha, scale = np.empty((layout.group, steps, size), dtype), np.empty((layout.group, steps), dtype)
    back = aligned(size, layout.padded, exp_transition)
    back[:] = 0
    for start in range(0, rows, layout.group):
        a, part = 0 if shared else start, slice(start, min(start + layout.group, rows))
        if start == 0 or not shared:
            transposed[0] = exp_transition[a, 0].T
            ahead_matrix = laid_out(exp_transition[a], 0, workspace.matrix, layout.panel)
            back_matrix = laid_out(transposed, 0, back, layout.panel)
        own, mine = part if initial.shape[0] > 1 else slice(0, 1), slice(0, part.stop - part.start)
        group = Group(
            first[own], first_top[own], exp_transition[a], tops[a], observation[part], lengths[part]
        )
        kept = Filtered(alpha[mine], scale[mine], log_z[part], min_alpha[part])
        _filter(group, ahead_matrix, layout, 0.0, workspace, kept)
        reverse = Group(first[own], first_top[own], transposed, tops[a], observation[part], lengths[part])
        out = Smoothed(gamma[part], gamma[:0], count[part])
        _smoother(reverse, back_matrix, layout, known, workspace, kept, grad[mine], out, counts)
    return min_alpha.min() if rows else math.inf

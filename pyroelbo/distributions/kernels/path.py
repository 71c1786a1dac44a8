"""Paths of a chain: exact samples and a best path (needs numba).

    transposed  [A, U, S, S]         transition (to, from): weights in ``draw``, log potentials in ``viterbi``
    alpha       [B, T, S]            filtered weights, of any scale at each step
    lengths     [B]                  in 1..T; steps at and beyond a length are padding, 0 in paths
    uniform     [N, B, T]            numbers in [0, 1)
    z           [N, B, T] or [B, T]  filled

Other letters, groups and workspaces are those of ``chain``; columns beyond S are -inf in ``viterbi``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pyroelbo.distributions.kernels.arithmetic import aligned, laid_out, multiply, narrow
from pyroelbo.distributions.kernels.chain import fit, layout_of, workspace_for
from pyroelbo.distributions.kernels.gate import (
    expect_contiguous,
    expect_index,
    expect_shapes,
    inlined,
    kernel,
)
from pyroelbo.distributions.kernels.simd import (
    LANES,
    add,
    fill,
    first_equal,
    greater,
    largest,
    load,
    scalar,
    store,
)

__all__ = ["draw", "viterbi"]

# potentials are no NaN here
_MAX = frozenset({"nnan", "nsz"})
_compiled_max = njit(cache=True, fastmath=set(_MAX))
_inlined_max = njit(cache=True, fastmath=set(_MAX), forceinline=True)


@inlined
def _choose(weight, uniform):
    """The first index at which the running sum of weights exceeds ``uniform`` times their sum."""
    total = weight[0] * 0
    for j in range(weight.shape[0]):
        total += weight[j]
    mark = uniform * total
    running = total * 0
    chosen = 0
    for j in range(weight.shape[0]):
        if weight[j] > 0:
            running += weight[j]
            chosen = j
            if running > mark:
                break
    return chosen


@kernel
def draw(transposed, alpha, lengths, uniform, z):
    """Backward sampling from the filter, by inversion of ``uniform``: fills ``z [N,B,T]``."""
    expect_contiguous(transposed, alpha, lengths, uniform, z)
    draws, rows, steps = z.shape
    size = alpha.shape[2]
    expect_shapes(fit((rows, size), transposed, alpha, lengths) and alpha.shape[1] == steps)
    expect_shapes(uniform.shape == z.shape)
    expect_index("lengths", lengths, 1, steps)
    weight = np.empty(size, alpha.dtype)
    for n in range(draws):
        for b in range(rows):
            a, last = b if transposed.shape[0] > 1 else 0, lengths[b] - 1
            for t in range(last + 1, steps):
                z[n, b, t] = 0
            for t in range(last, -1, -1):
                if t < last:
                    row = transposed[a, t if transposed.shape[1] > 1 else 0, z[n, b, t + 1]]
                    for j in range(size):
                        weight[j] = alpha[b, t, j] * row[j]
                else:
                    for j in range(size):
                        weight[j] = alpha[b, t, j]
                z[n, b, t] = _choose(weight, uniform[n, b, t])


@_compiled_max
def _best_log_weights(first, matrix, transition, seen, longest, layout, workspace, delta):
    """Fills ``delta [4, T·padded]``: for each row of a group the log weight of the best path to each state at
    each time, up to a number that all states of a time share. ``seen`` are the rows' observations, each with
    padding.
    """
    group, padded, panel, single = layout
    size, kind, far = transition.shape[-1], delta.dtype.type, delta.shape[1]
    moved, stride, tops = workspace.moved, seen.shape[1], np.zeros(4, delta.dtype)
    for t in range(longest):
        if t == 0:
            for r in range(group):
                moved[r] = first[min(r, first.shape[0] - 1)]
        elif single:
            left, right = narrow("best", size, delta, (t - 1) * padded, matrix)
            store(moved, 0, left)
            store(moved, LANES, right)
        else:
            if transition.shape[0] > 1:
                matrix = laid_out(transition, t - 1, workspace.matrix, panel)
            before = ((t - 1) * padded, far, 1)
            if group > 1:
                multiply("best", 4, (4, size), delta, before, matrix, (0, panel), moved, (0, padded))
            else:
                multiply("best", 1, (1, size), delta, before, matrix, (0, panel), moved, (0, padded))
        for r in range(group):
            # one step late, so that no step waits for the largest
            top = tops[r] if tops[r] > -math.inf else kind(0)
            shift, highest = fill(-top), fill(kind(-math.inf))
            for j in range(0, padded, LANES):
                value = add(load(moved, r * padded + j), add(load(seen, r * stride + t * size + j), shift))
                store(delta, r * far + t * padded + j, value)
                highest = greater(value, highest)
            tops[r] = largest(highest)


@_inlined_max
def _onward(delta, place, transposed, at, last):
    """Log weights of paths to a state and on from it; nothing is added after the last step."""
    value = load(delta, place)
    return value if last else add(value, load(transposed, at))


@_inlined_max
def _best_state(delta, place, transposed, at, last, size):
    """The first state of largest ``_onward``; ``at`` is the row of ``transposed``, flat."""
    kind, tail, chosen = delta.dtype.type, size - LANES, size - 1
    if tail < 0:
        best = kind(-math.inf)
        for i in range(size):
            value = scalar(delta, place + i) + (kind(0) if last else scalar(transposed, at + i))
            if value > best or i == 0:
                best, chosen = value, i
        return chosen
    tops = fill(kind(-math.inf))
    for k in range(0, size, LANES):
        i = min(k, tail)
        tops = greater(_onward(delta, place + i, transposed, at + i, last), tops)
    best = fill(largest(tops))
    for k in range(0, size, LANES):
        i = min(k, tail)
        lane = first_equal(_onward(delta, place + i, transposed, at + i, last), best)
        chosen = min(chosen, i + lane if lane < LANES else chosen)
    return chosen


@kernel(fastmath=_MAX)
def viterbi(initial, transition, transposed, observation, lengths, z):
    """A best path, in log space: fills ``z [B,T]``. Only log weights are kept; their arguments are found
    again on the way back.
    """
    expect_contiguous(initial, transition, transposed, observation, lengths, z)
    rows, steps, size = observation.shape
    expect_shapes(fit(initial.shape, transition, observation, lengths) and z.shape == (rows, steps))
    expect_shapes(transposed.shape == transition.shape)
    expect_index("lengths", lengths, 1, steps)
    layout = layout_of(transition, observation)
    padded = layout.padded
    workspace = workspace_for(layout, 0, size, observation)
    workspace.matrix[:] = -math.inf
    first = np.full((initial.shape[0], padded), -math.inf, observation.dtype)
    first[:, :size] = initial
    delta = aligned(layout.group, steps * padded, observation)
    # vectors read beyond a row
    seen = np.zeros((layout.group, steps * size + 2 * LANES), observation.dtype)
    matrix, shared, homogeneous = workspace.matrix, transition.shape[0] == 1, transition.shape[1] == 1
    for start in range(0, rows, layout.group):
        a, stop = 0 if shared else start, min(start + layout.group, rows)
        for b in range(start, stop):
            seen[b - start, : steps * size] = observation[b].reshape(-1)
            for t in range(lengths[b], steps):
                z[b, t] = 0
        if homogeneous:
            matrix = laid_out(transition[a], 0, workspace.matrix, layout.panel)
        own = slice(start, stop) if initial.shape[0] > 1 else slice(0, 1)
        longest = lengths[start:stop].max()
        _best_log_weights(first[own], matrix, transition[a], seen, longest, layout, workspace, delta)
        for t in range(longest - 1, -1, -1):
            for b in range(start, stop):
                if t < lengths[b]:
                    # after the last step nothing is added, what is read then does not matter
                    onward, last = z[b, min(t + 1, lengths[b] - 1)], t == lengths[b] - 1
                    place = (b - start) * steps * padded + t * padded
                    u = a * transition.shape[1] + (0 if homogeneous else min(t, transition.shape[1] - 1))
                    at = 0 if last else (u * size + onward) * size
                    z[b, t] = _best_state(delta, place, transposed, at, last, size)

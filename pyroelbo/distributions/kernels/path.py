"""Compiled loops that choose paths of a chain: samples and the best one (needs numba)."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pyroelbo.distributions.kernels.arithmetic import aligned, compiled, laid_out, multiply, narrow
from pyroelbo.distributions.kernels.chain import layout_of, room_for
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

_compile_max = njit(cache=True, fastmath={"nnan", "nsz"})


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
def _best_scores(first, matrix, transition, seen, longest, size, layout, room, delta):
    """Fills ``delta [4, T·padded]``: for each row of a group the score of the best way to each state at each time, up to
    a number that all states of a time share.
    """
    group, padded, panel, lone = layout
    kind, far = delta.dtype.type, delta.shape[1]
    moved, stride, tops = room.moved, seen.shape[1], np.zeros(4, delta.dtype)
    for t in range(longest):
        if t == 0:
            for r in range(group):
                moved[r] = first[min(r, first.shape[0] - 1)]
        elif lone:
            left, right = narrow("best", size, delta, (t - 1) * padded, matrix)
            store(moved, 0, left)
            store(moved, LANES, right)
        else:
            if transition.shape[0] > 1:
                matrix = laid_out(transition, t - 1, room.matrix, panel)
            at = (t - 1) * padded
            if group > 1:
                multiply("best", 4, 4, size, delta, at, far, 1, matrix, 0, panel, padded, moved, 0)
            else:
                multiply("best", 1, 1, size, delta, at, far, 1, matrix, 0, panel, padded, moved, 0)
        for r in range(group):
            # a step late, so that nobody waits for the largest
            top = tops[r] if tops[r] > -math.inf else kind(0)
            shift, highest = fill(-top), fill(kind(-math.inf))
            for j in range(0, padded, LANES):
                score = add(load(moved, r * padded + j), add(load(seen, r * stride + t * size + j), shift))
                store(delta, r * far + t * padded + j, score)
                highest = greater(score, highest)
            tops[r] = largest(highest)


@_compile_max
def _onward(delta, place, turned, at, last):
    """Scores of ways to a state and on from it; nothing is added after the last step."""
    score = load(delta, place)
    return score if last else add(score, load(turned, at))


@_compile_max
def viterbi(initial, transition, turned, observation, lengths, z):
    """A best path ``z [B,T]`` in log space. Only scores are kept, the arguments are found again on the way
    back.
    """
    rows, steps, size = observation.shape
    layout = layout_of(transition, observation)
    group, padded, panel, _ = layout
    kind = observation.dtype.type
    room = room_for(group, 0, size, padded, observation)
    room.matrix[:] = -math.inf
    first = np.full((initial.shape[0], padded), -math.inf, observation.dtype)
    first[:, :size] = initial
    delta = aligned(group, steps * padded, observation)
    # vectors read beyond a row
    seen = np.zeros((group, steps * size + 2 * LANES), observation.dtype)
    none, tail, far = fill(kind(-math.inf)), size - LANES, steps * padded
    matrix, shared, still = room.matrix, transition.shape[0] == 1, turned.shape[1] == 1
    for start in range(0, rows, group):
        a, stop = 0 if shared else start, min(start + group, rows)
        for b in range(start, stop):
            seen[b - start, : steps * size] = observation[b].reshape(-1)
            for t in range(lengths[b], steps):
                z[b, t] = 0
        if still:
            matrix = laid_out(transition[a], 0, room.matrix, panel)
        own = slice(start, stop) if initial.shape[0] > 1 else slice(0, 1)
        longest = lengths[start:stop].max()
        _best_scores(first[own], matrix, transition[a], seen, longest, size, layout, room, delta)
        for t in range(longest - 1, -1, -1):
            for b in range(start, stop):
                if t >= lengths[b]:
                    continue
                # after the last step nothing is added, all else comes from the matrix
                onward, last = z[b, min(t + 1, lengths[b] - 1)], t == lengths[b] - 1
                u, place = 0 if still else t, (b - start) * far + t * padded
                at = ((a * turned.shape[1] + u) * size + onward) * size
                chosen = size - 1
                if tail < 0:
                    best = kind(-math.inf)
                    for i in range(size):
                        score = scalar(delta, place + i) + (kind(0) if last else turned[a, u, onward, i])
                        if score > best or i == 0:
                            best, chosen = score, i
                    z[b, t] = chosen
                    continue
                tops = none
                for k in range(0, size, LANES):
                    i = min(k, tail)
                    tops = greater(_onward(delta, place + i, turned, at + i, last), tops)
                best = fill(largest(tops))
                for k in range(0, size, LANES):
                    i = min(k, tail)
                    lane = first_equal(_onward(delta, place + i, turned, at + i, last), best)
                    chosen = min(chosen, i + lane if lane < LANES else chosen)
                z[b, t] = chosen

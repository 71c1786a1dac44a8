"""Alpha-beta recursion over CTC alignments, in numbers of unlimited range (needs numba).

    B targets, T frames, C symbols, L labels; a target of n labels has 2n + 1 states, its labels and the blank
    before, between and after them

    log_probs       [B, T, C]
    targets         [B, L]     labels in [0, C), then -1 (padding)
    input_lengths   [B]        in 1..T; frames at and beyond a length are padding: never read
    target_lengths  [B]        in 0..L
    value           [B]        filled
    occupancy       [B, T, C]  zero on entry, filled with the gradient if wanted; else without frames

A number is m · 2^(256 e) with m in [2^-128, 2^128), or m = 0. The relative precision is float64's everywhere
and nothing underflows, so that neither a second pass in log space nor any exponential beyond one for each
frame and symbol is needed. State s has column s + 2 of ``a``: the two columns before it are zero, which
spares a test.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from pyroelbo.distributions.kernels.gate import expect_contiguous, expect_index, expect_shapes, kernel

__all__ = ["alpha_beta"]

_UP, _DOWN = 2.0**256, 2.0**-256
_HIGH, _LOW = 2.0**128, 2.0**-128
_LOG_BASE = 256 * math.log(2.0)
_ZERO = -1e300  # the exponent of zero
_compiled = njit(cache=True)
_inlined = njit(cache=True, inline="always")


class Lattice(NamedTuple):
    """The states of one target: the place in ``used`` of each one's symbol, whether it may be entered over
    the blank before it, and the distinct symbols. ``slot [C]`` is scratch: -1, or a symbol's place in
    ``used``.
    """

    place: np.ndarray
    skips: np.ndarray
    used: np.ndarray
    slot: np.ndarray


class Numbers(NamedTuple):
    """Numbers of unlimited range: m and e of frames' probabilities p, of alpha, and of beta times p."""

    p_m: np.ndarray
    p_e: np.ndarray
    a_m: np.ndarray
    a_e: np.ndarray
    b_m: np.ndarray
    b_e: np.ndarray


@_inlined
def _add(m0, e0, m1, e1):
    if e0 == e1:
        return m0 + m1, e0
    if e0 > e1:
        return (m0 + m1 * _DOWN, e0) if e0 == e1 + 1 else (m0, e0)
    return (m0 * _DOWN + m1, e1) if e1 == e0 + 1 else (m1, e1)


@_inlined
def _normalize(m, e):
    if m >= _HIGH:
        return m * _DOWN, e + 1
    if m < _LOW:
        if m == 0.0:
            return 0.0, _ZERO
        return m * _UP, e - 1
    return m, e


@_compiled
def _enter_target(target, states, blank, lattice):
    """Fill the lattice of one target; returns how many distinct symbols it has."""
    place, skips, used, slot = lattice
    count = 1
    used[0] = blank
    slot[blank] = 0
    for s in range(states):
        place[s] = 0
        skips[s] = False
        if s % 2 == 1:
            c = target[s // 2]
            if slot[c] < 0:
                slot[c] = count
                used[count] = c
                count += 1
            place[s] = slot[c]
            skips[s] = s > 1 and target[s // 2 - 1] != c
    return count


@_compiled
def _probabilities(log_probs, length, used, p_m, p_e):
    """Fill ``p`` with the exponentials of the used symbols at each frame."""
    for t in range(length):
        for u in range(used.shape[0]):
            x = np.float64(log_probs[t, used[u]])
            if x == -np.inf:
                p_m[t, u], p_e[t, u] = 0.0, _ZERO
            else:
                k = np.rint(x / _LOG_BASE)
                rest = min(max(x - k * _LOG_BASE, -_LOG_BASE), _LOG_BASE)  # inexact if |x| exceeds 1e17
                p_m[t, u], p_e[t, u] = math.exp(rest), k


@_compiled
def _forward(length, states, lattice, numbers):
    """Fill ``a``; returns m and e of the sum over all alignments."""
    p_m, p_e, a_m, a_e, _, _ = numbers
    for s in range(states + 2):
        a_m[0, s], a_e[0, s] = 0.0, _ZERO
    for s in range(min(2, states)):
        u = lattice.place[s]
        a_m[0, s + 2], a_e[0, s + 2] = p_m[0, u], p_e[0, u]
    for t in range(1, length):
        first = max(0, states - 2 * (length - t))
        last = min(states, 2 * t + 2)
        for s in range(first + 2):
            a_m[t, s], a_e[t, s] = 0.0, _ZERO
        for s in range(last, states):
            a_m[t, s + 2], a_e[t, s + 2] = 0.0, _ZERO
        for s in range(first, last):
            m, e = _add(a_m[t - 1, s + 2], a_e[t - 1, s + 2], a_m[t - 1, s + 1], a_e[t - 1, s + 1])
            if lattice.skips[s]:
                m, e = _add(m, e, a_m[t - 1, s], a_e[t - 1, s])
            u = lattice.place[s]
            m, e = _normalize(m * p_m[t, u], e + p_e[t, u])
            a_m[t, s + 2], a_e[t, s + 2] = m, e
    m, e = a_m[length - 1, states + 1], a_e[length - 1, states + 1]
    if states > 1:
        m, e = _add(m, e, a_m[length - 1, states], a_e[length - 1, states])
    return _normalize(m, e)


@_compiled
def _backward(length, states, z, lattice, numbers, occupancy):
    """Fill ``occupancy [T,C]`` of the used symbols, ``z`` being m and e of the sum over all alignments."""
    p_m, p_e, a_m, a_e, b_m, b_e = numbers
    count = lattice.used.shape[0]
    z_m, z_e = z
    inverse = 1.0 / z_m
    sums = np.empty(count)
    # b holds beta times the frame's probability, so that a step needs one product a state
    for t in range(length - 1, -1, -1):
        first = max(0, states - 2 * (length - t))
        last = min(states, 2 * t + 2)
        sums[:] = 0.0
        for s in range(states if t == length - 1 else last):
            if t == length - 1:
                m, e = (1.0, 0.0) if s >= states - 2 else (0.0, _ZERO)
            else:
                m, e = _add(b_m[s], b_e[s], b_m[s + 1], b_e[s + 1])
                if s + 2 < states and lattice.skips[s + 2]:
                    m, e = _add(m, e, b_m[s + 2], b_e[s + 2])
            u = lattice.place[s]
            if s >= first and s < last:
                d = a_e[t, s + 2] + e - z_e
                product = a_m[t, s + 2] * m * inverse
                if d == 0:
                    sums[u] += product
                elif d == -1:
                    sums[u] += product * _DOWN
                elif d == 1:
                    sums[u] += product * _UP
            b_m[s], b_e[s] = _normalize(m * p_m[t, u], e + p_e[t, u])
        b_m[states], b_e[states] = 0.0, _ZERO
        for u in range(count):
            occupancy[t, lattice.used[u]] = sums[u]


@kernel(fastmath=False)
def alpha_beta(log_probs, targets, input_lengths, target_lengths, blank, value, occupancy, with_gradient):
    """Fill ``value`` with ln Σ_alignments Π_t p_t and, ``with_gradient``, ``occupancy`` with its gradient."""
    expect_contiguous(log_probs, targets, input_lengths, target_lengths, value, occupancy)
    batch, steps, symbols = log_probs.shape
    expect_shapes(targets.shape[0] == batch and 0 <= blank < symbols)
    expect_shapes(input_lengths.shape == target_lengths.shape == value.shape == (batch,))
    expect_shapes(not with_gradient or occupancy.shape == log_probs.shape)
    expect_index("lengths", input_lengths, 1, steps)
    expect_index("target_lengths", target_lengths, 0, targets.shape[1])
    expect_index("y", targets, -1, symbols - 1)
    for b in range(batch):
        expect_index("y", targets[b, : target_lengths[b]], 0, symbols - 1)
    longest, most = 2 * targets.shape[1] + 1, targets.shape[1] + 1
    place, skips = np.empty(longest, np.int64), np.empty(longest, np.bool_)
    all_used, slot = np.empty(most, np.int64), np.full(symbols, -1, np.int64)
    numbers = Numbers(
        np.empty((steps, most)),
        np.empty((steps, most)),
        np.empty((steps, longest + 2)),
        np.empty((steps, longest + 2)),
        np.empty(longest + 2),
        np.empty(longest + 2),
    )
    for b in range(batch):
        length, labels = input_lengths[b], target_lengths[b]
        states = 2 * labels + 1
        count = _enter_target(targets[b], states, blank, Lattice(place, skips, all_used, slot))
        lattice = Lattice(place, skips, all_used[:count], slot)
        _probabilities(log_probs[b], length, lattice.used, numbers.p_m, numbers.p_e)
        z_m, z_e = _forward(length, states, lattice, numbers)
        value[b] = math.log(z_m) + z_e * _LOG_BASE if z_m > 0.0 else -np.inf
        if with_gradient and z_m > 0.0:
            _backward(length, states, (z_m, z_e), lattice, numbers, occupancy[b])
        for u in range(count):
            slot[all_used[u]] = -1

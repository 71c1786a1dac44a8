"""Alpha-beta recursion over alignments in numbers of unlimited range, compiled (needs numba).

A number is m·2^(256 e) with m in [2^-128, 2^128) or m = 0: relative precision is float64's everywhere and
nothing underflows, so neither a rescue in log space nor any exponential beyond one per frame and symbol is
needed.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

UP = 2.0**256
DOWN = 2.0**-256
HIGH = 2.0**128
LOW = 2.0**-128
LOG_BASE = 256 * math.log(2.0)
NEVER = -1e300


@njit(cache=True, inline="always")
def _add(m0, e0, m1, e1):
    if e0 == e1:
        return m0 + m1, e0
    if e0 > e1:
        return (m0 + m1 * DOWN, e0) if e0 == e1 + 1 else (m0, e0)
    return (m0 * DOWN + m1, e1) if e1 == e0 + 1 else (m1, e1)


@njit(cache=True, inline="always")
def _normalize(m, e):
    if m >= HIGH:
        return m * DOWN, e + 1
    if m < LOW:
        if m == 0.0:
            return 0.0, NEVER
        return m * UP, e - 1
    return m, e


@njit(cache=True)
def alpha_beta(log_probs, targets, input_lengths, target_lengths, blank, value, occupancy, with_gradient):
    """Fill ``value`` [B] with ln Σ_alignments Π_t p_t and ``occupancy`` [B,T,C] (zero on entry) with its
    gradient.
    """
    batch, steps, symbols = log_probs.shape
    longest = 2 * targets.shape[1] + 1
    index = np.empty(longest, np.int64)
    skips = np.empty(longest, np.bool_)
    slot = np.full(symbols, -1, np.int64)
    used = np.empty(targets.shape[1] + 1, np.int64)
    p_m = np.empty((steps, used.size))
    p_e = np.empty((steps, used.size))
    a_m = np.empty((steps, longest + 2))
    a_e = np.empty((steps, longest + 2))
    b_m = np.empty(longest + 2)
    b_e = np.empty(longest + 2)
    share = np.empty(used.size)
    for b in range(batch):
        length, labels = input_lengths[b], target_lengths[b]
        states = 2 * labels + 1
        if length == 0:
            value[b] = 0.0 if labels == 0 else -np.inf
            continue
        count = 1
        used[0] = blank
        slot[blank] = 0
        for s in range(states):
            index[s] = 0
            skips[s] = False
            if s % 2 == 1:
                c = targets[b, s // 2]
                if slot[c] < 0:
                    slot[c] = count
                    used[count] = c
                    count += 1
                index[s] = slot[c]
                skips[s] = s > 1 and targets[b, s // 2 - 1] != c
        for t in range(length):
            for u in range(count):
                x = np.float64(log_probs[b, t, used[u]])
                if x == -np.inf:
                    p_m[t, u], p_e[t, u] = 0.0, NEVER
                else:
                    k = np.rint(x / LOG_BASE)
                    rest = min(max(x - k * LOG_BASE, -LOG_BASE), LOG_BASE)  # inexact where |x| exceeds 1e17
                    p_m[t, u], p_e[t, u] = math.exp(rest), k
        # Column s + 2 holds state s: the two columns before it spare the borders a test.
        for s in range(states + 2):
            a_m[0, s], a_e[0, s] = 0.0, NEVER
        for s in range(min(2, states)):
            a_m[0, s + 2], a_e[0, s + 2] = p_m[0, index[s]], p_e[0, index[s]]
        for t in range(1, length):
            first = max(0, states - 2 * (length - t))
            last = min(states, 2 * t + 2)
            for s in range(first + 2):
                a_m[t, s], a_e[t, s] = 0.0, NEVER
            for s in range(last, states):
                a_m[t, s + 2], a_e[t, s + 2] = 0.0, NEVER
            for s in range(first, last):
                m, e = _add(a_m[t - 1, s + 2], a_e[t - 1, s + 2], a_m[t - 1, s + 1], a_e[t - 1, s + 1])
                if skips[s]:
                    m, e = _add(m, e, a_m[t - 1, s], a_e[t - 1, s])
                u = index[s]
                m, e = _normalize(m * p_m[t, u], e + p_e[t, u])
                a_m[t, s + 2], a_e[t, s + 2] = m, e
        m, e = a_m[length - 1, states + 1], a_e[length - 1, states + 1]
        if states > 1:
            m, e = _add(m, e, a_m[length - 1, states], a_e[length - 1, states])
        z_m, z_e = _normalize(m, e)
        value[b] = math.log(z_m) + z_e * LOG_BASE if z_m > 0.0 else -np.inf
        if with_gradient and z_m > 0.0:
            inverse = 1.0 / z_m
            # b_ holds beta times this frame's probability, so that the step needs one product a state.
            for t in range(length - 1, -1, -1):
                first = max(0, states - 2 * (length - t))
                last = min(states, 2 * t + 2)
                share[:count] = 0.0
                for s in range(states if t == length - 1 else last):
                    if t == length - 1:
                        m, e = (1.0, 0.0) if s >= states - 2 else (0.0, NEVER)
                    else:
                        m, e = _add(b_m[s], b_e[s], b_m[s + 1], b_e[s + 1])
                        if s + 2 < states and skips[s + 2]:
                            m, e = _add(m, e, b_m[s + 2], b_e[s + 2])
                    u = index[s]
                    if s >= first and s < last:
                        d = a_e[t, s + 2] + e - z_e
                        product = a_m[t, s + 2] * m * inverse
                        if d == 0:
                            share[u] += product
                        elif d == -1:
                            share[u] += product * DOWN
                        elif d == 1:
                            share[u] += product * UP
                    b_m[s], b_e[s] = _normalize(m * p_m[t, u], e + p_e[t, u])
                b_m[states], b_e[states] = 0.0, NEVER
                for u in range(count):
                    occupancy[b, t, used[u]] = share[u]
        for u in range(count):
            slot[used[u]] = -1

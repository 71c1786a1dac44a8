"""Kalman filter in square-root form, and its adjoint (needs numba). All arithmetic is in float64.

    B sequences of T steps; H hidden dimensions, O observed; G in {1, B} (parameters shared by the batch or
    not); U in {1, T-1} and W in {1, T} (the same at every step or not)

    start    [G, H]        spread [G, H, H]      mean and covariance of the first state
    move     [G, U, H, H]  drift  [G, U, H]      noise [G, U, H, H]   of the transition
    read     [G, W, O, H]  offset [G, W, O]      error [G, W, O, O]   of the observation
    lengths  [B]           in 1..T; steps at and beyond a length are padding: neither read nor filled

Covariances do not depend on the data: a batch that shares its parameters shares their recursion. If
parameters are the same at every step it stops at its fixed point, ``settled``, where a step changes less than
its own rounding does. With S^½ the lower triangular factor of S, a step rotates

    [ error^½  read P^½ ]      [ S^½            0   ]
    [ 0        P^½      ]  to  [ P read' S^-½'  V^½ ]   (S: innovations, P: predicted, V: filtered)

and then [ move V^½  noise^½ ] to [ P^½  0 ] of the next step. Squares of large and small numbers are never
added: a start of standard deviation 1e6 before sensors of .05 loses 8 digits instead of 16.

Source: Kaminski, Bryson and Schmidt (1971); Morf and Kailath (1975).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from pyroelbo.distributions.kernels.gate import (
    expect_contiguous,
    expect_index,
    expect_shapes,
    kernel,
)

__all__ = ["Covariances", "Parameters", "States", "kalman_adjoint", "kalman_filter"]

# the rounding of a step of the covariance, relative
_ROUNDING = 16 * 2.0**-52
# sums in any order, so that they vectorize; infinities and NaN stay right
_SUMS = frozenset({"contract", "reassoc"})
_compiled = njit(cache=True)
_compiled_sums = njit(cache=True, fastmath=set(_SUMS))
_inlined = njit(cache=True, fastmath=set(_SUMS), forceinline=True)


class Parameters(NamedTuple):
    """The parameters of a chain, see the module's diagram; for the adjoint, their gradients."""

    start: np.ndarray
    spread: np.ndarray
    move: np.ndarray
    drift: np.ndarray
    noise: np.ndarray
    read: np.ndarray
    offset: np.ndarray
    error: np.ndarray


class Covariances(NamedTuple):
    """Filled up to ``settled [G]``: P and V, the covariances of predicted and filtered states [G,T,H,H];
    ``gain`` [G,T,H,O]; ``whiten`` = S^-½ [G,T,O,O], S being the covariance of the innovations; ``white_read``
    = S^-½ read [G,T,O,H]; ``rest`` = I - gain read [G,T,H,H]; and ``log_det`` of S [G,T].
    """

    predicted: np.ndarray
    filtered: np.ndarray
    gain: np.ndarray
    whiten: np.ndarray
    white_read: np.ndarray
    rest: np.ndarray
    log_det: np.ndarray
    settled: np.ndarray


class States(NamedTuple):
    """Filled: predicted means [B,T,H], innovations [B,T,O], and ``residual`` = S^-1 innovation [B,T,O]."""

    mean: np.ndarray
    innovation: np.ndarray
    residual: np.ndarray


@_compiled_sums
def _mm(x, y, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = 0.0
        for k in range(x.shape[1]):
            s = x[i, k]
            for j in range(out.shape[1]):
                out[i, j] += s * y[k, j]


@_compiled_sums
def _mmt(x, y, out):
    """out = x · y'."""
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            s = 0.0
            for k in range(x.shape[1]):
                s += x[i, k] * y[j, k]
            out[i, j] = s


@_compiled
def _same(x, y):
    """Whether two positive semidefinite matrices differ by no more than a step's rounding, in any units."""
    for i in range(x.shape[0]):
        for k in range(i + 1):
            apart = x[i, k] - y[i, k]
            if not apart * apart <= _ROUNDING * _ROUNDING * x[i, i] * x[k, k]:
                return False
    return True


@_compiled
def _subtract(scale, x, out):
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            out[i, k] -= scale * x[i, k]


@_compiled
def _transpose(x, out):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[j, i] = x[i, j]


@_compiled
def _add_symmetric(x, y, out):
    """out = symmetric part of x, plus y."""
    for i in range(x.shape[0]):
        for j in range(i + 1):
            s = 0.5 * (x[i, j] + x[j, i])
            out[i, j] = s + y[i, j]
            out[j, i] = s + y[j, i]


@_compiled
def _cholesky(s, out):
    """The lower triangular factor of a positive semidefinite matrix; NaN if it is not."""
    for j in range(s.shape[0]):
        pivot = s[j, j]
        for k in range(j):
            pivot -= out[j, k] * out[j, k]
        if abs(pivot) <= s.shape[0] * 2.0**-52 * s[j, j]:
            pivot = 0.0
        root = math.sqrt(pivot) if pivot >= 0.0 else math.nan
        out[j, j] = root
        for i in range(j):
            out[i, j] = 0.0
        for i in range(j + 1, s.shape[0]):
            x = s[i, j]
            for k in range(j):
                x -= out[i, k] * out[j, k]
            out[i, j] = 0.0 if root == 0.0 else x / root


@_compiled_sums
def _triangularize(x):
    """Rotate the rows of x in place, x · Q, to a lower triangular matrix of nonnegative diagonal
    (Householder).
    """
    rows, columns = x.shape
    for i in range(rows):
        beyond = 0.0
        for j in range(i + 1, columns):
            beyond += x[i, j] * x[i, j]
        first = x[i, i]
        flip = first < 0.0
        if beyond > 0.0:
            norm = math.sqrt(first * first + beyond)
            head = first + norm if first >= 0.0 else first - norm
            rate = 2.0 / (head * head + beyond)
            for r in range(i + 1, rows):
                s = x[r, i] * head
                for j in range(i + 1, columns):
                    s += x[r, j] * x[i, j]
                s *= rate
                x[r, i] -= s * head
                for j in range(i + 1, columns):
                    x[r, j] -= s * x[i, j]
            flip = first >= 0.0
            x[i, i] = -norm if flip else norm
            for j in range(i + 1, columns):
                x[i, j] = 0.0
        if flip:
            for r in range(i, rows):
                x[r, i] = -x[r, i]


@_compiled
def _invert_triangle(x, out):
    """out = inverse of the lower triangular matrix x[:O,:O]; returns 2 ln det, NaN unless its diagonal is
    positive.
    """
    n, log_det = out.shape[0], 0.0
    for j in range(n):
        if not x[j, j] > 0.0:
            return math.nan
        log_det += math.log(x[j, j])
        for i in range(j):
            out[i, j] = 0.0
        out[j, j] = 1.0 / x[j, j]
        for i in range(j + 1, n):
            s = 0.0
            for k in range(j, i):
                s -= x[i, k] * out[k, j]
            out[i, j] = s / x[i, i]
    return 2.0 * log_det


@_compiled
def _update(t, root, read, error_root, found, scratch):
    """One step of the filter: fills ``found`` at t from ``root`` = P^½; ``root`` becomes V^½."""
    hidden, observed = root.shape[0], read.shape[0]
    seen, below = scratch
    _mm(read, root, seen)
    pre = below[: observed + hidden, : observed + hidden]
    for i in range(observed):
        for k in range(observed):
            pre[i, k] = error_root[i, k]
        for k in range(hidden):
            pre[i, observed + k] = seen[i, k]
    for i in range(hidden):
        for k in range(observed):
            pre[observed + i, k] = 0.0
        for k in range(hidden):
            pre[observed + i, observed + k] = root[i, k]
    _triangularize(pre)
    found.log_det[t] = _invert_triangle(pre, found.whiten[t])
    corner, rest = pre[observed:, :observed], found.rest[t]
    _mm(corner, found.whiten[t], found.gain[t])
    _mm(found.whiten[t], read, found.white_read[t])
    _mm(corner, found.white_read[t], rest)
    for i in range(hidden):
        for k in range(hidden):
            rest[i, k] = (1.0 if i == k else 0.0) - rest[i, k]
            root[i, k] = pre[observed + i, observed + k]
    _mmt(root, root, found.filtered[t])


@_compiled
def _predict(root, move, noise_root, below):
    """``root`` = V^½ becomes P^½ of the next step."""
    hidden = root.shape[0]
    pre = below[:hidden, : 2 * hidden]
    _mm(move, root, pre[:, :hidden])
    for i in range(hidden):
        for k in range(hidden):
            pre[i, hidden + k] = noise_root[i, k]
    _triangularize(pre)
    for i in range(hidden):
        for k in range(hidden):
            root[i, k] = pre[i, k]


@_compiled
def _filter_covariances(g, p, steps, found):
    """Fill the covariances of one group; returns the last step that they have."""
    hidden, observed = p.start.shape[1], p.offset.shape[2]
    move, noise, read, error = p.move[g], p.noise[g], p.read[g], p.error[g]
    fixed = move.shape[0] == 1 and noise.shape[0] == 1 and read.shape[0] == 1 and error.shape[0] == 1
    root, noise_root, error_root = (
        np.empty((hidden, hidden)),
        np.empty((hidden, hidden)),
        np.empty((observed, observed)),
    )
    wide = max(observed + hidden, 2 * hidden)
    seen, below = np.empty((observed, hidden)), np.empty((wide, wide))
    scratch = (seen, below)
    _cholesky(p.spread[g], root)
    found.predicted[0] = p.spread[g]
    for t in range(steps):
        if t < error.shape[0]:
            _cholesky(error[t], error_root)
        _update(t, root, read[min(t, read.shape[0] - 1)], error_root, found, scratch)
        if t + 1 < steps:
            if t < noise.shape[0]:
                _cholesky(noise[t], noise_root)
            _predict(root, move[min(t, move.shape[0] - 1)], noise_root, below)
            _mmt(root, root, found.predicted[t + 1])
            if fixed and _same(found.predicted[t + 1], found.predicted[t]):
                return t
    return steps - 1


@_inlined
def _observe(row, t, y, g, p, found, states):
    """Fill the innovation and its residual of one step; returns its quadratic form."""
    u, w = min(t, found.settled[g]), min(t, p.read.shape[1] - 1)
    observed, hidden = p.read.shape[2], p.read.shape[3]
    innovation, residual = states.innovation[row, t], states.residual[row, t]
    whiten = found.whiten[g, u]
    for i in range(observed):
        x = y[row, t, i] - p.offset[g, w, i]
        for k in range(hidden):
            x -= p.read[g, w, i, k] * states.mean[row, t, k]
        innovation[i] = x
        residual[i] = 0.0
    square = 0.0
    for i in range(observed):
        x = 0.0
        for k in range(i + 1):
            x += whiten[i, k] * innovation[k]
        square += x * x
        for k in range(i + 1):
            residual[k] += whiten[i, k] * x
    return square


@_inlined
def _advance(row, t, g, p, found, states, filtered):
    """Fill the predicted mean of step t + 1."""
    hidden, observed = p.read.shape[3], p.read.shape[2]
    u, a = min(t, found.settled[g]), min(t, p.move.shape[1] - 1)
    for i in range(hidden):
        x = states.mean[row, t, i]
        for k in range(observed):
            x += found.gain[g, u, i, k] * states.innovation[row, t, k]
        filtered[i] = x
    for i in range(hidden):
        x = p.drift[g, a, i]
        for k in range(hidden):
            x += p.move[g, a, i, k] * filtered[k]
        states.mean[row, t + 1, i] = x


@_compiled
def _group(found, g):
    return Covariances(
        found.predicted[g],
        found.filtered[g],
        found.gain[g],
        found.whiten[g],
        found.white_read[g],
        found.rest[g],
        found.log_det[g],
        found.settled,
    )


@_compiled
def _fit(p, groups, rows, steps):
    """Whether parameters (or their gradients) match one another."""
    hidden, observed = p.start.shape[1], p.offset.shape[2]
    turns, looks = p.move.shape[1], p.read.shape[1]
    return (
        steps > 0
        and groups in (1, rows)
        and p.start.shape[0] == groups
        and p.spread.shape == (groups, hidden, hidden)
        and turns in (1, steps - 1)
        and p.move.shape == p.noise.shape == (groups, turns, hidden, hidden)
        and p.drift.shape == (groups, turns, hidden)
        and looks in (1, steps)
        and p.read.shape == (groups, looks, observed, hidden)
        and p.offset.shape == (groups, looks, observed)
        and p.error.shape == (groups, looks, observed, observed)
    )


@_compiled
def _filled_fit(found, states, groups, rows, steps):
    hidden, observed = states.mean.shape[2], states.innovation.shape[2]
    return (
        found.predicted.shape == found.filtered.shape == found.rest.shape == (groups, steps, hidden, hidden)
        and found.gain.shape == (groups, steps, hidden, observed)
        and found.whiten.shape == (groups, steps, observed, observed)
        and found.white_read.shape == (groups, steps, observed, hidden)
        and found.log_det.shape == (groups, steps)
        and found.settled.shape == (groups,)
        and states.mean.shape == (rows, steps, hidden)
        and states.innovation.shape == states.residual.shape == (rows, steps, observed)
    )


@kernel(fastmath=_SUMS)
def kalman_filter(y, lengths, parameters, value, states, found):
    """Fill ln p(y) ``value [B]`` of ``y [B,T,O]``, the states, and the covariances up to ``settled``."""
    expect_contiguous(y, lengths, parameters, value, states, found)
    rows, steps, observed = y.shape
    groups = parameters.start.shape[0]
    expect_shapes(_fit(parameters, groups, rows, steps) and _filled_fit(found, states, groups, rows, steps))
    expect_shapes(states.innovation.shape == y.shape and lengths.shape == value.shape == (rows,))
    expect_shapes(
        parameters.offset.shape[2] == observed and parameters.start.shape[1] == states.mean.shape[2]
    )
    expect_index("lengths", lengths, 1, steps)
    filtered = np.empty(parameters.start.shape[1])
    for g in range(groups):
        found.settled[g] = _filter_covariances(g, parameters, steps, _group(found, g))
    for row in range(rows):
        g = row if groups > 1 else 0
        total = -0.5 * lengths[row] * observed * math.log(2.0 * math.pi)
        states.mean[row, 0] = parameters.start[g]
        for t in range(lengths[row]):
            square = _observe(row, t, y, g, parameters, found, states)
            total -= 0.5 * (square + found.log_det[g, min(t, found.settled[g])])
            if t + 1 < lengths[row]:
                _advance(row, t, g, parameters, found, states, filtered)
        value[row] = total


class Precisions(NamedTuple):
    """What the future adds to the precision of the filtered (``after``) and of the predicted state
    (``before``) [T,H,H], at ``slot [T+1]`` of each step.
    """

    after: np.ndarray
    before: np.ndarray
    slot: np.ndarray


@_compiled
def _adjoint_covariances(g, move, steps, found, out):
    """Fill the precisions of one group."""
    hidden = move.shape[2]
    at, jt = np.empty((hidden, hidden)), np.empty((hidden, hidden))
    x, z, w = np.empty_like(at), np.empty_like(at), np.empty_like(at)
    after, before, slot, settled = out.after, out.before, out.slot, found.settled[g]
    unchanged = False
    for t in range(steps - 1, -1, -1):
        if unchanged and t >= settled:
            slot[t] = slot[t + 1]
            continue
        slot[t] = t
        u = min(t, settled)
        after[t] = 0.0
        if t + 1 < steps:
            ao = move[g, min(t, move.shape[1] - 1)]
            _transpose(ao, at)
            _mm(at, before[slot[t + 1]], x)
            _mm(x, ao, after[t])
        white, rest = found.white_read[g, u], found.rest[g, u]
        for i in range(hidden):
            for k in range(hidden):
                s = 0.0
                for o in range(white.shape[0]):
                    s += white[o, i] * white[o, k]
                x[i, k] = s
        _transpose(rest, jt)
        _mm(jt, after[t], w)
        _mm(w, rest, z)
        _add_symmetric(z, x, before[t])
        unchanged = t + 1 < steps and _same(before[t], before[slot[t + 1]])


class Shared(NamedTuple):
    """Products of a step's matrices that all rows share."""

    move_v: np.ndarray  # move V
    n_move_v: np.ndarray  # N move V, N being the next step's precision
    gain: np.ndarray  # gain'
    gain_n: np.ndarray  # gain' N
    innovation: np.ndarray  # gain' N gain + S^-1
    read: np.ndarray  # gain' N V - gain'


@_compiled
def _share(g, t, last, move, found, precisions, out):
    """Fill the products of step t."""
    u, now = min(t, found.settled[g]), precisions.slot[t]
    whiten, observed = found.whiten[g, u], found.whiten.shape[2]
    _mm(move[g, min(t, move.shape[1] - 1)], found.filtered[g, u], out.move_v)
    if not last:
        _mm(precisions.before[precisions.slot[t + 1]], out.move_v, out.n_move_v)
    _transpose(found.gain[g, u], out.gain)
    _mm(out.gain, precisions.after[now], out.gain_n)
    _mm(out.gain_n, found.gain[g, u], out.innovation)
    for i in range(observed):
        for k in range(observed):
            for o in range(observed):
                out.innovation[i, k] += whiten[o, i] * whiten[o, k]
    _mm(out.gain_n, found.filtered[g, u], out.read)
    _subtract(1.0, out.gain, out.read)


@_compiled
def _add_shared(g, t, last, mass, precisions, shared, grads):
    """Add the products of step t, ``mass`` times, to the gradients."""
    a, w = min(t, grads.move.shape[1] - 1), min(t, grads.read.shape[1] - 1)
    if not last:
        _subtract(mass, shared.n_move_v, grads.move[g, a])
        _subtract(0.5 * mass, precisions.before[precisions.slot[t + 1]], grads.noise[g, a])
    _subtract(0.5 * mass, shared.innovation, grads.error[g, w])
    _subtract(-mass, shared.read, grads.read[g, w])


class Backward(NamedTuple):
    """The score of each row's predicted state [B,H], updated step by step, and two vectors of scratch [H]."""

    score: np.ndarray
    up: np.ndarray
    total: np.ndarray


class Kept(NamedTuple):
    """What the adjoint reads of the parameters and of the filter."""

    move: np.ndarray
    read: np.ndarray
    states: States
    found: Covariances


@_compiled
def _back_through(rows, g, t, last, weight, kept, shared, back, grads, by_y):
    """Gradients by the step from t to t + 1 (none at the ``last``) and by the observation at t."""
    # Fields are read once: in the loops each access would count references.
    r, up, total = back.score, back.up, back.total
    gain, predicted, settled = kept.found.gain, kept.found.predicted, kept.found.settled[g]
    mean, innovation, residual = kept.states.mean, kept.states.innovation, kept.states.residual
    by_drift, by_move, by_noise = grads.drift, grads.move, grads.noise
    by_offset, by_error, by_read = grads.offset, grads.error, grads.read
    u, a, w = min(t, settled), min(t, kept.move.shape[1] - 1), min(t, kept.read.shape[1] - 1)
    move, read, move_v = kept.move[g, a], kept.read[g, w], shared.move_v
    observed, hidden = read.shape
    for row in rows:
        share = weight[row]
        for i in range(hidden):
            s = mean[row, t, i]
            for k in range(observed):
                s += gain[g, u, i, k] * innovation[row, t, k]
            total[i] = s
            up[i] = 0.0
        if not last:
            for k in range(hidden):
                s = r[row, k]
                by_drift[g, a, k] += share * s
                for i in range(hidden):
                    up[i] += move[k, i] * s
                    total[i] += move_v[k, i] * s
            for i in range(hidden):
                s = share * r[row, i]
                for k in range(hidden):
                    by_move[g, a, i, k] += s * total[k]
                    by_noise[g, a, i, k] += 0.5 * s * r[row, k]
        for i in range(observed):
            s = residual[row, t, i]
            for k in range(hidden):
                s -= gain[g, u, k, i] * up[k]
            by_y[row, t, i] = s
            by_offset[g, w, i] += share * s
        for i in range(observed):
            s = by_y[row, t, i]
            for k in range(observed):
                by_error[g, w, i, k] += 0.5 * share * s * by_y[row, t, k]
            for k in range(hidden):
                up[k] += read[i, k] * s
        for i in range(hidden):
            r[row, i] = up[i]
        for i in range(hidden):
            s = mean[row, t, i]
            for k in range(hidden):
                s += predicted[g, u, i, k] * up[k]
            total[i] = share * s
        for i in range(observed):
            for k in range(hidden):
                by_read[g, w, i, k] += by_y[row, t, i] * total[k]
            by_y[row, t, i] *= -share


@kernel(fastmath=_SUMS)
def kalman_adjoint(weight, lengths, kept, grads, by_y):
    """Add the gradients of Σ weight · ln p(y) to ``grads``, and fill ``by_y [B,T,O]``; all zero on entry.

    With r and N the mean and precision of the score of each predicted state, all gradients are products of
    these: no inverse but that of the innovations is needed (de Jong 1989; Koopman and Shephard 1992).
    """
    expect_contiguous(weight, lengths, kept.move, kept.read, kept.states, kept.found, grads, by_y)
    rows, steps, hidden = kept.states.mean.shape
    groups, observed = kept.move.shape[0], kept.read.shape[2]
    expect_shapes(_fit(grads, groups, rows, steps))
    expect_shapes(_filled_fit(kept.found, kept.states, groups, rows, steps))
    expect_shapes(grads.move.shape == kept.move.shape and grads.read.shape == kept.read.shape)
    expect_shapes(grads.start.shape[1] == hidden and kept.states.innovation.shape == by_y.shape)
    expect_shapes(kept.read.shape[2] == by_y.shape[2] and weight.shape == lengths.shape == (rows,))
    expect_index("lengths", lengths, 1, steps)
    expect_index("settled", kept.found.settled, 0, steps - 1)
    square, wide = np.empty((2, hidden, hidden)), np.empty((3, observed, hidden))
    shared = Shared(square[0], square[1], wide[0], wide[1], np.empty((observed, observed)), wide[2])
    precisions = Precisions(
        np.empty((steps, hidden, hidden)), np.empty((steps, hidden, hidden)), np.empty(steps + 1, np.int64)
    )
    r = np.zeros((rows, hidden))
    back = Backward(r, np.empty(hidden), np.empty(hidden))
    together = groups == 1 and np.all(lengths == lengths[0])
    for unit in range(1 if together else rows):
        g = unit if groups > 1 else 0
        some = np.arange(rows) if together else np.arange(unit, unit + 1)
        mass, length, slot = weight[some].sum(), lengths[unit], precisions.slot
        _adjoint_covariances(g, kept.move, length, kept.found, precisions)
        for t in range(length - 1, -1, -1):
            last, now = t + 1 == length, slot[t]
            # between its two fixed points everything is as it was one step later
            if not (
                t + 2 < length and t >= kept.found.settled[g] and now == slot[t + 1] and now == slot[t + 2]
            ):
                _share(g, t, last, kept.move, kept.found, precisions, shared)
            _add_shared(g, t, last, mass, precisions, shared, grads)
            _back_through(some, g, t, last, weight, kept, shared, back, grads, by_y)
        _subtract(0.5 * mass, precisions.before[slot[0]], grads.spread[g])
        for row in some:
            for i in range(hidden):
                grads.start[g, i] += weight[row] * r[row, i]
                for k in range(hidden):
                    grads.spread[g, i, k] += 0.5 * weight[row] * r[row, i] * r[row, k]

"""Kalman filter and its adjoint, compiled (needs numba).

Covariances do not depend on the data: a batch that shares its parameters shares their recursion. Where
parameters stay the same it is not continued past its fixed point, that is when a step changes less than its
own rounding does.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

NOISE = 4 * 2.0**-52
SUMS = {"contract", "reassoc"}  # sums in any order, so that they vectorize; infinities and NaN stay right


@njit(cache=True, fastmath=SUMS)
def _mm(x, y, out):
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = 0.0
        for k in range(x.shape[1]):
            s = x[i, k]
            for j in range(out.shape[1]):
                out[i, j] += s * y[k, j]


@njit(cache=True)
def _same(x, y):
    """Whether two positive semidefinite matrices differ by no more than one step's rounding, in any units."""
    for i in range(x.shape[0]):
        for k in range(i + 1):
            apart = x[i, k] - y[i, k]
            if not apart * apart <= NOISE * NOISE * x[i, i] * x[k, k]:
                return False
    return True


@njit(cache=True)
def _subtract(scale, x, out):
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            out[i, k] -= scale * x[i, k]


@njit(cache=True)
def _transpose(x, out):
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[j, i] = x[i, j]


@njit(cache=True)
def _add_symmetric(x, y, out):
    """out = symmetric part of x, plus y."""
    for i in range(x.shape[0]):
        for j in range(i + 1):
            s = 0.5 * (x[i, j] + x[j, i])
            out[i, j] = s + y[i, j]
            out[j, i] = s + y[j, i]


@njit(cache=True)
def _invert(s, low, out):
    """Inverse of a positive definite matrix by its Cholesky factor; returns ln det, NaN where there is no
    factor.
    """
    n = s.shape[0]
    log_det = 0.0
    for j in range(n):
        pivot = s[j, j]
        for k in range(j):
            pivot -= low[j, k] * low[j, k]
        if not pivot > 0.0:
            return np.nan
        log_det += math.log(pivot)
        root = math.sqrt(pivot)
        low[j, j] = root
        for i in range(j + 1, n):
            x = s[i, j]
            for k in range(j):
                x -= low[i, k] * low[j, k]
            low[i, j] = x / root
    for j in range(n):  # the factor's inverse, in place
        low[j, j] = 1.0 / low[j, j]
        for i in range(j + 1, n):
            x = 0.0
            for k in range(j, i):
                x -= low[i, k] * low[k, j]
            low[i, j] = x / low[i, i]
    for i in range(n):
        for j in range(i + 1):
            x = 0.0
            for k in range(i, n):
                x += low[k, i] * low[k, j]
            out[i, j] = x
            out[j, i] = x
    return log_det


@njit(cache=True)
def _filter_covariances(p0, a, q, c, r, steps, fixed, p, v, gain, inverse, j, log_det):
    """Fill predicted p, filtered v, gain, inverse innovation covariance, I - gain c; returns the last step
    that they have.
    """
    hidden, observed = p0.shape[0], r.shape[1]
    cp, s = np.empty((observed, hidden)), np.empty((observed, observed))
    low = np.zeros((observed, observed))
    ct, pct, kr = (np.empty((hidden, observed)), np.empty((hidden, observed)), np.empty((hidden, observed)))
    at, jt, kt = np.empty_like(p0), np.empty_like(p0), np.empty_like(cp)
    x, z, w = np.empty_like(p0), np.empty_like(p0), np.empty_like(p0)
    p[0] = p0
    for t in range(steps):
        co, ro = c[min(t, c.shape[0] - 1)], r[min(t, r.shape[0] - 1)]
        _transpose(co, ct)
        _mm(co, p[t], cp)
        _mm(cp, ct, s)
        _add_symmetric(s, ro, s)
        log_det[t] = _invert(s, low, inverse[t])
        _transpose(cp, pct)
        _mm(pct, inverse[t], gain[t])
        _mm(gain[t], co, j[t])
        for i in range(hidden):
            for k in range(hidden):
                j[t, i, k] = (1.0 if i == k else 0.0) - j[t, i, k]
        _transpose(j[t], jt)
        _transpose(gain[t], kt)
        _mm(j[t], p[t], x)  # Joseph's form keeps v positive where the noise is small against p
        _mm(x, jt, z)
        _mm(gain[t], ro, kr)
        _mm(kr, kt, x)
        _add_symmetric(z, x, v[t])
        if t + 1 < steps:
            ao, qo = a[min(t, a.shape[0] - 1)], q[min(t, q.shape[0] - 1)]
            _transpose(ao, at)
            _mm(ao, v[t], x)
            _mm(x, at, w)
            _add_symmetric(w, qo, z)
            if fixed and _same(z, p[t]):
                return t
            p[t + 1] = z
    return steps - 1


@njit(cache=True, fastmath=SUMS)
def kalman_filter(
    y,
    lengths,
    m0,
    p0,
    a,
    b,
    q,
    c,
    d,
    r,
    value,
    mean,
    error,
    residual,
    p,
    v,
    gain,
    inverse,
    j,
    log_det,
    settled,
):
    """Fill ln p(y) [B]; predicted means, errors, weighted errors [B,T,.]; covariances [G,T,.,.] up to the
    step ``settled``.

    Parameters are [G,...] with G = 1 (shared by the batch) or B; a, b, q [G,1 or T-1,...], c, d, r [G,1 or
    T,...].
    """
    batch, steps, observed = y.shape
    hidden = m0.shape[1]
    groups = m0.shape[0]
    fixed = a.shape[1] == 1 and c.shape[1] == 1
    filtered = np.empty(hidden)
    for g in range(groups):
        settled[g] = _filter_covariances(
            p0[g], a[g], q[g], c[g], r[g], steps, fixed, p[g], v[g], gain[g], inverse[g], j[g], log_det[g]
        )
    for row in range(batch):
        g = row if groups > 1 else 0
        total = -0.5 * lengths[row] * observed * math.log(2.0 * math.pi)
        for i in range(hidden):
            mean[row, 0, i] = m0[g, i]
        for t in range(lengths[row]):
            u, tc, ta = min(t, settled[g]), min(t, c.shape[1] - 1), min(t, a.shape[1] - 1)
            for i in range(observed):
                x = y[row, t, i] - d[g, tc, i]
                for k in range(hidden):
                    x -= c[g, tc, i, k] * mean[row, t, k]
                error[row, t, i] = x
            for i in range(hidden):
                x = mean[row, t, i]
                for k in range(observed):
                    x += gain[g, u, i, k] * error[row, t, k]
                filtered[i] = x
            square = 0.0
            for i in range(observed):
                x = 0.0
                for k in range(observed):
                    x += inverse[g, u, i, k] * error[row, t, k]
                residual[row, t, i] = x
                square += x * error[row, t, i]
            total -= 0.5 * (square + log_det[g, u])
            if t + 1 < lengths[row]:
                for i in range(hidden):
                    x = b[g, ta, i]
                    for k in range(hidden):
                        x += a[g, ta, i, k] * filtered[k]
                    mean[row, t + 1, i] = x
        value[row] = total


@njit(cache=True)
def _adjoint_covariances(a, c, steps, settled, gain, inverse, j, after, before, slot):
    """Fill N, the precision that the future adds, of the filtered and of the predicted state, at ``slot``
    of each step.
    """
    hidden, observed = gain.shape[1], gain.shape[2]
    at, jt = np.empty((hidden, hidden)), np.empty((hidden, hidden))
    ct, weighted = np.empty((hidden, observed)), np.empty((hidden, observed))
    x, z, w = np.empty_like(at), np.empty_like(at), np.empty_like(at)
    still = False
    for t in range(steps - 1, -1, -1):
        if still and t >= settled:
            slot[t] = slot[t + 1]
            continue
        slot[t] = t
        u = min(t, settled)
        after[t] = 0.0
        if t + 1 < steps:
            ao = a[min(t, a.shape[0] - 1)]
            _transpose(ao, at)
            _mm(at, before[slot[t + 1]], x)
            _mm(x, ao, after[t])
        co = c[min(t, c.shape[0] - 1)]
        _transpose(co, ct)
        _mm(ct, inverse[u], weighted)
        _mm(weighted, co, x)
        _transpose(j[u], jt)
        _mm(jt, after[t], w)
        _mm(w, j[u], z)
        _add_symmetric(z, x, before[t])
        still = t + 1 < steps and _same(before[t], before[slot[t + 1]])


@njit(cache=True, fastmath=SUMS)
def kalman_adjoint(
    weight,
    lengths,
    a,
    c,
    mean,
    error,
    residual,
    p,
    v,
    gain,
    inverse,
    j,
    settled,
    gm0,
    gp0,
    ga,
    gb,
    gq,
    gc,
    gd,
    gr,
    gy,
):
    """Add the gradients of Σ weight·ln p(y) to the g arrays, zero on entry.

    With r and N the score's mean and precision of each predicted state, all gradients are products of
    these: no inverse but that of the innovations is needed (de Jong 1989; Koopman and Shephard 1992).
    """
    batch, steps, hidden = mean.shape
    observed = residual.shape[2]
    shared = p.shape[0] == 1 and np.all(lengths == lengths[0])
    after, before = np.empty((steps, hidden, hidden)), np.empty((steps, hidden, hidden))
    slot = np.empty(steps + 1, np.int64)
    av, x = np.empty((hidden, hidden)), np.empty((hidden, hidden))
    kt, kn = np.empty((observed, hidden)), np.empty((observed, hidden))
    oo, oh = np.empty((observed, observed)), np.empty((observed, hidden))
    r, vector = np.zeros((batch, hidden)), np.empty(hidden)
    filtered, up, u = np.empty(hidden), np.empty(hidden), np.empty(observed)
    for unit in range(1 if shared else batch):
        g = unit if p.shape[0] > 1 else 0
        rows = np.arange(batch) if shared else np.arange(unit, unit + 1)
        mass = weight[rows].sum()
        length = lengths[unit]
        _adjoint_covariances(a[g], c[g], length, settled[g], gain[g], inverse[g], j[g], after, before, slot)
        for t in range(length - 1, -1, -1):
            ta, tc, at = min(t, a.shape[1] - 1), min(t, c.shape[1] - 1), min(t, settled[g])
            ao, co, now = a[g, ta], c[g, tc], slot[t]
            # between its two fixed points everything stays as it was one step later
            if not (t + 2 < length and t >= settled[g] and now == slot[t + 1] and now == slot[t + 2]):
                _mm(ao, v[g, at], av)
                if t + 1 < length:
                    _mm(before[slot[t + 1]], av, x)
                _transpose(gain[g, at], kt)
                _mm(kt, after[now], kn)
                _mm(kn, gain[g, at], oo)
                _mm(kn, v[g, at], oh)
            if t + 1 < length:
                _subtract(mass, x, ga[g, ta])
                _subtract(0.5 * mass, before[slot[t + 1]], gq[g, ta])
            _subtract(0.5 * mass, oo, gr[g, tc])
            _subtract(0.5 * mass, inverse[g, at], gr[g, tc])
            _subtract(mass, kt, gc[g, tc])
            _subtract(-mass, oh, gc[g, tc])
            for row in rows:
                w = weight[row]
                for i in range(hidden):
                    s = mean[row, t, i]
                    for k in range(observed):
                        s += gain[g, at, i, k] * error[row, t, k]
                    filtered[i] = s
                    up[i] = 0.0
                    vector[i] = 0.0
                if t + 1 < length:
                    for k in range(hidden):
                        s = r[row, k]
                        gb[g, ta, k] += w * s
                        for i in range(hidden):
                            up[i] += ao[k, i] * s
                            vector[i] += av[k, i] * s
                    for i in range(hidden):
                        s = w * r[row, i]
                        for k in range(hidden):
                            ga[g, ta, i, k] += s * (filtered[k] + vector[k])
                            gq[g, ta, i, k] += 0.5 * s * r[row, k]
                for i in range(observed):
                    s = residual[row, t, i]
                    for k in range(hidden):
                        s -= gain[g, at, k, i] * up[k]
                    u[i] = s
                    gy[row, t, i] -= w * s
                    gd[g, tc, i] += w * s
                for i in range(observed):
                    for k in range(observed):
                        gr[g, tc, i, k] += 0.5 * w * u[i] * u[k]
                    for k in range(hidden):
                        up[k] += co[i, k] * u[i]
                for i in range(hidden):
                    r[row, i] = up[i]
                for i in range(hidden):
                    s = mean[row, t, i]
                    for k in range(hidden):
                        s += p[g, at, i, k] * up[k]
                    vector[i] = w * s
                for i in range(observed):
                    for k in range(hidden):
                        gc[g, tc, i, k] += u[i] * vector[k]
        _subtract(0.5 * mass, before[slot[0]], gp0[g])
        for row in rows:
            for i in range(hidden):
                gm0[g, i] += weight[row] * r[row, i]
                for k in range(hidden):
                    gp0[g, i, k] += 0.5 * weight[row] * r[row, i] * r[row, k]

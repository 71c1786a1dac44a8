"""The Rauch-Tung-Striebel smoother of linear-Gaussian chains (needs numba). All arithmetic is in float64.

    B sequences of T steps, H hidden dimensions; G in {1, B}; parameters, states, covariances as in ``kalman``

    gain  [G, T, H, H]  own [G, T, H, H]   z_t = gain_t z_{t+1} + shift_t + N(0, own_t)
    shift [B, T, H]                        given y; at the last step of a sequence gain is zero

With P the covariance of a predicted and V that of a filtered state, gain_t = V_t move' P_{t+1}^-1, and own_t
is a sum of squares of V_t^½ and noise^½: nothing is subtracted from a large covariance.

Source: Rauch, Tung and Striebel (1965); the sum of squares after Joseph's form of the filter.
"""

from __future__ import annotations

import numpy as np

from pyroelbo.distributions.kernels.gate import (
    compiled,
    expect_contiguous,
    expect_index,
    expect_shapes,
    kernel,
)
from pyroelbo.distributions.kernels.kalman import (
    _cholesky,
    _filled_fit,
    _fit,
    _group,
    _mm,
    _mmt,
    _predict,
    _same,
    _update,
)

__all__ = ["conditionals", "spread", "sweep"]


@compiled
def _solve(root, right, out):
    """out = (root root')^-1 right, transposed, for a lower triangular root; NaN where it is singular."""
    size = root.shape[0]
    for c in range(right.shape[1]):
        for i in range(size):
            x = right[i, c]
            for k in range(i):
                x -= root[i, k] * out[c, k]
            out[c, i] = x / root[i, i] if root[i, i] > 0.0 else np.nan
        for i in range(size - 1, -1, -1):
            x = out[c, i]
            for k in range(i + 1, size):
                x -= root[k, i] * out[c, k]
            out[c, i] = x / root[i, i]


@compiled
def _gains(g, p, steps, found, gain, own):
    """Fill the gains and covariances of one group, and ``found`` again, at every step."""
    hidden, observed = p.start.shape[1], p.offset.shape[2]
    move, noise, read, error = p.move[g], p.noise[g], p.read[g], p.error[g]
    fixed = move.shape[0] == 1 and noise.shape[0] == 1 and read.shape[0] == 1 and error.shape[0] == 1
    root, before, noise_root, x, z, rest = np.empty((6, hidden, hidden))
    error_root = np.empty((observed, observed))
    wide = max(observed + hidden, 2 * hidden)
    below = np.empty((wide, wide))
    scratch = (np.empty((observed, hidden)), below)
    _cholesky(p.spread[g], root)
    settled = steps - 1
    for t in range(steps - 1):
        a = min(t, move.shape[0] - 1)
        if t < error.shape[0]:
            _cholesky(error[t], error_root)
        if t < noise.shape[0]:
            _cholesky(noise[t], noise_root)
        _update(t, root, read[min(t, read.shape[0] - 1)], error_root, found, scratch)
        before[:] = root
        _predict(root, move[a], noise_root, below)
        _mm(move[a], found.filtered[t], x)
        _solve(root, x, gain[t])
        _mm(gain[t], move[a], z)
        for i in range(hidden):
            for k in range(hidden):
                z[i, k] = (1.0 if i == k else 0.0) - z[i, k]
        _mm(z, before, x)
        _mmt(x, x, own[t])
        _mm(gain[t], noise_root, x)
        _mmt(x, x, rest)
        for i in range(hidden):
            for k in range(hidden):
                own[t, i, k] += rest[i, k]
        _mmt(root, root, x)
        if fixed and _same(x, found.predicted[t]):
            settled = t
            break
    for t in range(settled + 1, steps):
        gain[t], own[t] = gain[settled], own[settled]
        found.filtered[t], found.gain[t] = found.filtered[settled], found.gain[settled]
    if settled == steps - 1:
        if steps <= error.shape[0]:
            _cholesky(error[steps - 1], error_root)
        _update(steps - 1, root, read[min(steps, read.shape[0]) - 1], error_root, found, scratch)
        gain[steps - 1], own[steps - 1] = 0.0, found.filtered[steps - 1]


@kernel
def conditionals(lengths, parameters, states, found, gain, own, shift):
    """Fill gain, own and shift (zero in the padding) from what the filter has filled; covariances of filtered
    states and the filter's gains are then filled at every step."""
    expect_contiguous(lengths, parameters, states, found, gain, own, shift)
    rows, steps, hidden = shift.shape
    groups = parameters.start.shape[0]
    expect_shapes(_fit(parameters, groups, rows, steps) and _filled_fit(found, states, groups, rows, steps))
    expect_shapes(gain.shape == own.shape == (groups, steps, hidden, hidden) and lengths.shape == (rows,))
    expect_shapes(parameters.start.shape[1] == hidden == states.mean.shape[2])
    expect_shapes(parameters.offset.shape[2] == states.innovation.shape[2])
    expect_index("lengths", lengths, 1, steps)
    for g in range(groups):
        _gains(g, parameters, steps, _group(found, g), gain[g], own[g])
    innovation, mean, filtering = states.innovation, states.mean, found.gain
    for row in range(rows):
        g, last = row if groups > 1 else 0, lengths[row] - 1
        for t in range(last + 1):
            for i in range(hidden):
                x = mean[row, t, i]
                for k in range(innovation.shape[2]):
                    x += filtering[g, t, i, k] * innovation[row, t, k]
                if t < last:
                    for k in range(hidden):
                        x -= gain[g, t, i, k] * mean[row, t + 1, k]
                shift[row, t, i] = x
        shift[row, last + 1 :] = 0.0


@kernel
def sweep(gain, shift, z):
    """Fill z_t = gain_t z_{t+1} + shift_t ``[R,T,H]``, backwards; ``gain [B,T,H,H]`` is that of each B rows
    in turn."""
    expect_contiguous(gain, shift, z)
    rows, steps, hidden = z.shape
    given = gain.shape[0]
    expect_shapes(shift.shape == z.shape and gain.shape == (given, steps, hidden, hidden))
    expect_shapes(given > 0 and steps > 0)
    for row in range(rows):
        b = row % given
        z[row, steps - 1] = shift[row, steps - 1]
        for t in range(steps - 2, -1, -1):
            for i in range(hidden):
                x = shift[row, t, i]
                for k in range(hidden):
                    x += gain[b, t, i, k] * z[row, t + 1, k]
                z[row, t, i] = x


@kernel
def spread(gain, own, covariance):
    """Fill C_t = gain_t C_{t+1} gain_t' + own_t ``[B,T,H,H]``, backwards."""
    expect_contiguous(gain, own, covariance)
    rows, steps, hidden = covariance.shape[:3]
    expect_shapes(gain.shape == own.shape == covariance.shape == (rows, steps, hidden, hidden))
    expect_shapes(steps > 0)
    x, z = np.empty((2, hidden, hidden))
    for row in range(rows):
        covariance[row, steps - 1] = own[row, steps - 1]
        for t in range(steps - 2, -1, -1):
            _mm(gain[row, t], covariance[row, t + 1], x)
            _mmt(x, gain[row, t], z)
            for i in range(hidden):
                for k in range(hidden):
                    covariance[row, t, i, k] = 0.5 * (z[i, k] + z[k, i]) + own[row, t, i, k]

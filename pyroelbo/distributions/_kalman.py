"""Kalman filters and smoothers of linear-Gaussian chains: compiled, in torch, and as a parallel scan."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pyro.distributions import MultivariateNormal
from pyro.ops.gaussian import (
    gaussian_tensordot,
    matrix_and_mvn_to_gaussian,
    mvn_to_gaussian,
    sequential_gaussian_tensordot,
)
from torch import Tensor

from pyroelbo.distributions.checks import check_lengths
from pyroelbo.distributions.kernels.dispatch import kernels


class Parameters(NamedTuple):
    """z_1 ~ N(start, spread); z' = move z + drift + N(0, noise); y = read z + offset + N(0, error)."""

    start: Tensor  # [*B, H]
    spread: Tensor  # [*B, H, H]
    move: Tensor  # [*B, 1 or T-1, H, H]
    drift: Tensor  # [*B, 1 or T-1, H]
    noise: Tensor  # [*B, 1 or T-1, H, H]
    read: Tensor  # [*B, 1 or T, O, H]
    offset: Tensor  # [*B, 1 or T, O]
    error: Tensor  # [*B, 1 or T, O, O]


class Filtered(NamedTuple):
    """p(z_t | y_1..y_t) and p(z_t | y_1..y_{t-1}): means [*B,T,H] and covariances [*B,T,H,H]."""

    mean: Tensor
    covariance: Tensor
    predicted_mean: Tensor
    predicted_covariance: Tensor


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def inside(lengths: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=lengths.device) < lengths[..., None]


class Roots(NamedTuple):
    """Lower triangular roots of covariances: of innovations [*B,T,O,O] and of predicted states [*B,T,H,H]."""

    innovation: Tensor
    predicted: Tensor


def _lower(x: Tensor) -> Tensor:
    """The lower triangular matrix L of positive diagonal with L L' = x x'."""
    root = torch.linalg.qr(x.mT).R.mT
    return root * root.diagonal(0, -1, -2).sign().unsqueeze(-2)


def filtered(p: Parameters, y: Tensor) -> tuple[Filtered, Roots]:
    """Kalman's filter in square-root form, as in ``kernels.kalman``, in plain torch."""
    observed = y.shape[-1]
    mean, root = p.start, torch.linalg.cholesky(p.spread)
    noise_root, error_root = torch.linalg.cholesky(p.noise), torch.linalg.cholesky(p.error)
    found: list[tuple[Tensor, ...]] = []
    for t in range(y.shape[-2]):
        u = min(t, p.read.shape[-3] - 1), min(t, p.offset.shape[-2] - 1), min(t, p.error.shape[-3] - 1)
        read, offset, error = p.read[..., u[0], :, :], p.offset[..., u[1], :], error_root[..., u[2], :, :]
        if t:
            u = min(t, p.move.shape[-3]) - 1, min(t, p.drift.shape[-2]) - 1, min(t, p.noise.shape[-3]) - 1
            move = p.move[..., u[0], :, :]
            mean = apply(move, mean) + p.drift[..., u[1], :]
            root = _lower(_beside(move @ root, noise_root[..., u[2], :, :]))
        predicted, ahead = mean, root
        above = _beside(error, read @ root)
        below = _beside(torch.zeros_like((read @ root).mT), root)
        both = _lower(torch.cat(_expanded(above, below), -2))
        innovation, corner = both[..., :observed, :observed], both[..., observed:, :observed]
        root = both[..., observed:, observed:]
        apart = (y[..., t, :] - offset - apply(read, mean)).unsqueeze(-1)
        mean = mean + (corner @ torch.linalg.solve_triangular(innovation, apart, upper=False)).squeeze(-1)
        found.append((mean, root @ root.mT, predicted, ahead @ ahead.mT, innovation, ahead))
    shape = y.shape[:-2]
    columns = list(zip(*found, strict=True))
    vectors = [torch.stack([x.expand(*shape, *x.shape[-1:]) for x in columns[i]], -2) for i in (0, 2)]
    matrices = [torch.stack([x.expand(*shape, *x.shape[-2:]) for x in columns[i]], -3) for i in (1, 3, 4, 5)]
    return Filtered(vectors[0], matrices[0], vectors[1], matrices[1]), Roots(*matrices[2:])


def _expanded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the batch dimensions that they broadcast to."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """[a b], with broadcast batch dimensions."""
    return torch.cat(_expanded(a, b), -1)


def _in_steps(y: Tensor, lengths: Tensor, p: Parameters) -> Tensor:
    past, roots = filtered(p, y)
    mean = apply(p.read, past.predicted_mean) + p.offset
    each = MultivariateNormal(mean, scale_tril=roots.innovation, validate_args=False).log_prob(y)
    return torch.where(inside(lengths, y.shape[-2]), each, 0.0).sum(-1)


def _scan(y: Tensor, lengths: Tensor, p: Parameters) -> Tensor:
    """ln p(y) by Pyro's parallel scan over Gaussian factors, in float64; factors in the padding are constant.

    The scan works with precisions, which cannot represent a diffuse start together with precise observations:
    then the sequential filter is used.
    """
    dtype, steps = y.dtype, y.shape[-2]
    y, p = y.double(), Parameters(*(x.double() for x in p))
    with torch.no_grad():
        sizes = torch.cat([torch.linalg.eigvalsh(x).flatten() for x in (p.spread, p.noise, p.error)])
        uneven = not sizes.max() < 1e6 * sizes.min()
    if uneven:
        return _in_steps(y, lengths, p).to(dtype)
    read = matrix_and_mvn_to_gaussian(p.read.mT, MultivariateNormal(p.offset, p.error)).condition(y)
    read = read.expand(y.shape[:-1])
    within = inside(lengths, steps).to(y.dtype)
    read.log_normalizer = read.log_normalizer * within
    read.info_vec = read.info_vec * within[..., None]
    read.precision = read.precision * within[..., None, None]
    first = mvn_to_gaussian(MultivariateNormal(p.start, p.spread)).expand(y.shape[:-2]) + read[..., 0]
    if steps > 1:
        hidden = p.start.shape[-1]
        moves = matrix_and_mvn_to_gaussian(p.move.mT, MultivariateNormal(p.drift, p.noise))
        moves = moves.expand((*y.shape[:-2], steps - 1)) + read[..., 1:].event_pad(left=hidden)
        first = gaussian_tensordot(first, sequential_gaussian_tensordot(moves), hidden)
    return first.event_logsumexp().to(dtype)


def log_evidence(y: Tensor, lengths: Tensor, p: Parameters, constant: Tensor | None) -> Tensor:
    if kernels("kalman", y) is None:
        check_lengths(lengths, y.shape[-2])
        value = _scan(y, lengths, p)
    else:
        value = _LogEvidence.apply(y, lengths, *p)
    return value if constant is None else value + constant


class _Run(NamedTuple):
    """What the compiled filter was given, flat, and what it has filled."""

    counts: Tensor
    parameters: Any
    full: list
    value: Tensor
    states: Any
    found: Any


def _compiled_filter(run: Any, y: Tensor, lengths: Tensor, p: Parameters) -> _Run:
    rank = lengths.dim()
    shared = all(n == 1 for x in p for n in x.shape[:rank])
    batch = (1,) * rank if shared else lengths.shape
    turns = max(p.move.shape[rank], p.drift.shape[rank], p.noise.shape[rank])
    looks = max(p.read.shape[rank], p.offset.shape[rank], p.error.shape[rank])
    times = ((), (), (turns,), (turns,), (turns,), (looks,), (looks,), (looks,))
    full = [(*batch, *time, *x.shape[rank + len(time) :]) for x, time in zip(p, times, strict=True)]
    flat = run.Parameters(
        *(
            x.detach().double().expand(shape).reshape(-1, *shape[rank:]).contiguous()
            for x, shape in zip(p, full, strict=True)
        )
    )
    steps, observed = y.shape[-2:]
    rows, groups, hidden = lengths.numel(), len(flat.start), p.start.shape[-1]

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64)

    value = new(rows)
    states = run.States(new(rows, steps, hidden), new(rows, steps, observed), new(rows, steps, observed))
    found = run.Covariances(
        predicted=new(groups, steps, hidden, hidden),
        filtered=new(groups, steps, hidden, hidden),
        gain=new(groups, steps, hidden, observed),
        whiten=new(groups, steps, observed, observed),
        white_read=new(groups, steps, observed, hidden),
        rest=new(groups, steps, hidden, hidden),
        log_det=new(groups, steps),
        settled=torch.empty(groups, dtype=torch.long),
    )
    data = y.detach().double().reshape(-1, steps, observed).contiguous()
    counts = lengths.reshape(-1).contiguous()
    run.kalman_filter(data, counts, flat, value, states, found)
    return _Run(counts, flat, full, value, states, found)


class _LogEvidence(torch.autograd.Function):
    """The compiled filter and its adjoint, in float64; second derivatives are those of Pyro's scan."""

    @staticmethod
    def forward(ctx, y, lengths, *parameters):
        run: Any = kernels("kalman", y)
        done = _compiled_filter(run, y, lengths, Parameters(*parameters))
        ctx.full = done.full
        ctx.kept = done.counts, run.Kept(done.parameters.move, done.parameters.read, done.states, done.found)
        ctx.save_for_backward(y, lengths, *parameters)
        return done.value.view(lengths.shape).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        y, lengths, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = [x for x in (y, *parameters) if x.requires_grad]
            # A chain of one step does not move.
            value = _scan(y, lengths, Parameters(*parameters))
            exact = torch.autograd.grad(
                value, wanted, grad, create_graph=True, allow_unused=True, materialize_grads=True
            )
            found = iter(exact)
            back = [next(found) if x.requires_grad else None for x in (y, *parameters)]
            return back[0], None, *back[1:]
        run: Any = kernels("kalman", y)
        counts, kept = ctx.kept
        rank = lengths.dim()
        shapes = ((shape[:rank].numel(), *shape[rank:]) for shape in map(torch.Size, ctx.full))
        grads = run.Parameters(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))
        by_y = torch.zeros(lengths.numel(), *y.shape[-2:], dtype=torch.float64)
        weight = grad.detach().double().reshape(-1).contiguous()
        run.kalman_adjoint(weight, counts, kept, grads, by_y)
        back = [
            g.view(shape).sum_to_size(x.shape).to(x.dtype)
            for g, shape, x in zip(grads, ctx.full, parameters, strict=True)
        ]
        return by_y.view(y.shape).to(y.dtype), None, *back


class Conditionals(NamedTuple):
    """z_t = gain_t z_{t+1} + shift_t + N(0, own_t) given y; gain is zero at the last z_t of a sequence."""

    gain: Tensor  # [*B, T, H, H]
    shift: Tensor  # [*B, T, H]
    own: Tensor  # [*B, T, H, H]


def _plain(*tensors: Tensor) -> bool:
    """Whether nothing is differentiated."""
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def conditionals(p: Parameters, y: Tensor, lengths: Tensor) -> Conditionals:
    """The posterior backwards in time (Rauch, Tung and Striebel, 1965)."""
    steps, hidden = y.shape[-2], p.start.shape[-1]
    last = torch.arange(steps, device=lengths.device) >= lengths[..., None] - 1
    run: Any = kernels("smoother", y)
    if run is not None and _plain(y, *p):
        flat, size = _compiled_filter(kernels("kalman", y), y, lengths, p), (steps, hidden, hidden)
        groups = len(flat.parameters.start)
        gain, own = (torch.empty(groups, *size, dtype=torch.float64) for _ in range(2))
        shift = torch.empty_like(flat.states.mean)
        run.conditionals(flat.counts, flat.parameters, flat.states, flat.found, gain, own, shift)
        zero, filtered_own, edge = (
            torch.zeros(()),
            flat.found.filtered,
            last.reshape(-1, steps)[..., None, None],
        )
        both = torch.where(edge, zero.to(gain), gain), torch.where(edge, filtered_own, own)
        gain, own = (x.view(*lengths.shape, *size).to(y.dtype) for x in both)
        return Conditionals(gain, shift.view(*lengths.shape, steps, hidden).to(y.dtype), own)
    past, roots = filtered(p, y)
    if steps == 1:
        return Conditionals(torch.zeros_like(past.covariance), past.mean, past.covariance)
    v = past.covariance[..., :-1, :, :]
    gain = torch.cholesky_solve(p.move @ v, roots.predicted[..., 1:, :, :]).mT
    gain = torch.cat([gain, torch.zeros_like(gain[..., :1, :, :])], -3)
    gain = torch.where(last[..., None, None], 0.0, gain)
    move, noise = (
        x if x.shape[-3] == 1 else torch.cat([x, x[..., -1:, :, :]], -3) for x in (p.move, p.noise)
    )
    ahead = torch.cat([past.predicted_mean[..., 1:, :], past.mean[..., -1:, :]], -2)
    rest = torch.eye(hidden, dtype=v.dtype, device=v.device) - gain @ move
    own = rest @ past.covariance @ rest.mT + gain @ noise @ gain.mT
    return Conditionals(gain, past.mean - apply(gain, ahead), (own + own.mT) / 2)


def sweep(gain: Tensor, shift: Tensor) -> Tensor:
    """z_t = gain_t z_{t+1} + shift_t, ``[*S,*B,T,H]``, for gain ``[*B,T,H,H]``."""
    run: Any = kernels("smoother", shift)
    if run is not None and _plain(gain, shift):
        steps, hidden = shift.shape[-2:]
        flat = shift.detach().double().reshape(-1, steps, hidden).contiguous()
        out = torch.empty_like(flat)
        given = gain.detach().double().reshape(-1, steps, hidden, hidden).contiguous()
        run.sweep(given, flat, out)
        return out.view(shift.shape).to(shift.dtype)
    z = [shift[..., -1, :]]
    for t in range(shift.shape[-2] - 2, -1, -1):
        z.append(apply(gain[..., t, :, :], z[-1]) + shift[..., t, :])
    return torch.stack(z[::-1], -2)


def spread(gain: Tensor, own: Tensor) -> Tensor:
    """C_t = gain_t C_{t+1} gain_t' + own_t, ``[*B,T,H,H]``."""
    run: Any = kernels("smoother", own)
    if run is not None and _plain(gain, own):
        size = own.shape[-3:]
        flat = [x.detach().double().reshape(-1, *size).contiguous() for x in (gain, own)]
        out = torch.empty_like(flat[1])
        run.spread(*flat, out)
        return out.view(own.shape).to(own.dtype)
    found = [own[..., -1, :, :]]
    for t in range(own.shape[-3] - 2, -1, -1):
        back = gain[..., t, :, :]
        found.append(back @ found[-1] @ back.mT + own[..., t, :, :])
    return torch.stack(found[::-1], -3)

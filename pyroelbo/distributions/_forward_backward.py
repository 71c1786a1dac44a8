"""Forward and backward passes over chains: scaled recursions with error detection, and exact ones in log
space.

A scaled recursion works with exponentials, normalized at each step. It silently loses a path whose share of
the mass falls below the smallest number, which is wrong if that path overtakes later or is the only one.
Therefore

1. the smallest entry is recorded: if none came near the smallest number at any step, nothing was lost but
rounding; 2. otherwise the recursion is repeated in float64 with every entry lifted to at least 1e-290, an
upper bound that
   includes everything that could have been lost; if both agree, nothing that matters was lost;
3. the sequences still in doubt are computed in log space.

Shapes are flat: ``initial [I,S]``, ``transition [A,U,S,S]``, ``observation [B,T,S]``, ``lengths [B]``, with I
and A in {1, B}, U in {1, T-1}. The compiled kernels (``kernels/chain.py``, ``kernels/path.py``) do the work
if they apply; each function has the same in plain torch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyroelbo.distributions.checks import check_lengths
from pyroelbo.distributions.kernels.dispatch import kernels
from pyroelbo.distributions.semiring import choose
from pyroelbo.numerics import logsumexp

__all__ = [
    "Problem",
    "Solution",
    "best_path",
    "draw_paths",
    "expectations",
    "log_partition",
    "smoothed",
    "solve",
]

# fresh memory costs more than the arithmetic on it: the flow of a backward pass goes in pieces of this size
_PIECE = 1 << 17
# up to this many states the compiled kernel adds up the counts of steps itself
_MAX_COUNTED_STATES = 128
# nothing was lost if no entry of alpha was smaller
_TRUSTED_ALPHA = {torch.float32: 1e-28, torch.float64: 1e-290}
_LIKE = {dtype: torch.empty(0, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def _rows_together(steps: int, states: int) -> int:
    return max(4, _PIECE // (steps * states) // 4 * 4)


class Problem(NamedTuple):
    """Log potentials of a batch of chains, in the flat shapes of the module's docstring."""

    initial: Tensor
    transition: Tensor
    observation: Tensor
    lengths: Tensor

    def take(self, rows: Tensor) -> Problem:
        def pick(x: Tensor) -> Tensor:
            return x if x.shape[0] == 1 else x[rows]

        return Problem(pick(self.initial), pick(self.transition), self.observation[rows], self.lengths[rows])


class Expected(NamedTuple):
    """Gradients of Σ_b grad_b ln Z_b with respect to the three potentials."""

    initial: Tensor
    transition: Tensor
    observation: Tensor


class Scaled(NamedTuple):
    """A scaled forward pass; the problem's transition is ``exp_transition``, its exponential.

    ``alpha [B,T,S]`` and ``scale [B,T]`` are empty unless kept.
    """

    problem: Problem
    alpha: Tensor
    scale: Tensor
    log_z: Tensor

    def take(self, rows: Tensor) -> Scaled:
        return Scaled(self.problem.take(rows), self.alpha[rows], self.scale[rows], self.log_z[rows])

    def expected(self, grad: Tensor | None, apart: bool, workspace: Tensor | None) -> Expected:
        _, exp_transition, observation, lengths = self.problem
        rows, steps, states = observation.shape
        transposed, homogeneous = _transpose(exp_transition), exp_transition.shape[1] == 1
        weight = exp_transition.new_ones(rows) if grad is None else grad.to(exp_transition.dtype)
        fits = workspace is not None and workspace.dtype == self.alpha.dtype and workspace.is_contiguous()
        gamma = workspace if workspace is not None and fits else torch.empty_like(self.alpha)
        if homogeneous and 1 < states <= _MAX_COUNTED_STATES and kernels("chain", observation) is not None:
            count = exp_transition.new_zeros(rows if apart else 1, states, states)
            flow = exp_transition.new_empty(0, 0, 0)
            _backward(transposed, observation, lengths, self.alpha, self.scale, weight, gamma, flow, count)
            return Expected(gamma[:, 0].clone(), count.unsqueeze(1).mul_(exp_transition), gamma)
        counts: list[Tensor] = []
        group = _rows_together(steps, states)
        flow, none = (
            exp_transition.new_empty(min(group, rows), steps, states),
            exp_transition.new_empty(0, 0, 0),
        )
        for start in range(0, rows, group):
            part = slice(start, min(start + group, rows))
            alpha, out = self.alpha[part], flow[: part.stop - start]
            mine = transposed if len(transposed) == 1 else transposed[part]
            given = observation[part], lengths[part], alpha, self.scale[part], weight[part]
            _backward(mine, *given, gamma[part], out, none)
            if not homogeneous and apart:
                count = alpha[:, :-1, :, None] * out[:, 1:, None, :]
            elif not homogeneous:
                count = (alpha[:, :-1].permute(1, 2, 0) @ out[:, 1:].transpose(0, 1)).unsqueeze(0)
            elif apart:
                count = (alpha[:, :-1].transpose(1, 2) @ out[:, 1:]).unsqueeze(1)
            else:
                # flow is zero at each first step, so that rows may follow one another without a seam
                count = (alpha.reshape(-1, states)[:-1].T @ out.view(-1, states)[1:])[None, None]
            counts.append(count if apart or not counts else count + counts.pop())
        count = counts[0] if len(counts) == 1 else torch.cat(counts)
        return Expected(gamma[:, 0].clone(), count.mul_(exp_transition), gamma)

    def draw(self, uniform: Tensor) -> Tensor:
        _, transition, _, lengths = self.problem
        run = kernels("path", self.alpha)
        if run is None:
            return _draw(self.alpha.log(), transition.log(), lengths, uniform)
        z = torch.empty(uniform.shape, dtype=torch.long)
        run.draw(_transpose(transition), self.alpha, lengths, uniform, z)
        return z


class Smoothed(NamedTuple):
    """Both scaled passes in one: the posterior ``gamma [B,T,S]`` of each state, and the expected ``counts
    [B,S,S]`` of each step; callers may overwrite both.
    """

    gamma: Tensor
    counts: Tensor
    log_z: Tensor

    def take(self, rows: Tensor) -> Smoothed:
        return Smoothed(*(x[rows] for x in self))

    def expected(self, grad: Tensor | None, apart: bool, workspace: Tensor | None) -> Expected:
        gamma, count = self.gamma, self.counts
        if grad is not None:
            weight = grad.to(gamma.dtype)[:, None, None]
            gamma, count = gamma.mul_(weight), count.mul_(weight)
        return Expected(
            gamma[:, 0].clone(), (count if apart else count.sum(0, keepdim=True)).unsqueeze(1), gamma
        )


def _softmax(log_weight: Tensor) -> Tensor:
    """Normalized weights over the last dimension, all 0 if all are -inf."""
    peak = log_weight.amax(-1, keepdim=True)
    weight = (log_weight - torch.where(peak == -math.inf, 0.0, peak)).exp()
    return weight / weight.sum(-1, keepdim=True).clamp(min=1.0)


class Exact(NamedTuple):
    """A forward pass in log space: ``alpha [B,T,S]`` is the log weight of all prefixes that end in a
    state."""

    problem: Problem
    alpha: Tensor
    log_z: Tensor

    def expected(self, grad: Tensor | None, apart: bool, workspace: Tensor | None) -> Expected:
        _, transition, observation, lengths = self.problem
        rows, steps, _ = observation.shape
        possible = self.log_z > -math.inf
        weight = torch.where(possible, 1.0 if grad is None else grad.to(observation.dtype), 0.0)
        gamma = torch.zeros_like(observation)
        count = observation.new_zeros(rows, *transition.shape[1:])
        beta = torch.zeros_like(observation[:, 0])
        for t in range(steps - 1, -1, -1):
            used = torch.where(lengths > t, weight, 0.0)[:, None]
            beta = torch.where((lengths == t + 1)[:, None], 0.0, beta)
            # normalized at each step: log Z - alpha - beta has few digits left if potentials are large
            gamma[:, t] = _softmax(self.alpha[:, t] + beta) * used
            if t > 0:
                u = min(t - 1, transition.shape[1] - 1)
                ahead = torch.where((lengths > t)[:, None], observation[:, t] + beta, -math.inf)
                onward = transition[:, u] + ahead[:, None]
                pair = _softmax((self.alpha[:, t - 1, :, None] + onward).flatten(1)).view(onward.shape)
                count[:, u] += pair * used[..., None]
                beta = logsumexp(onward, -1)
        if not apart:
            count = count.sum(0, keepdim=True)
        return Expected(gamma[:, 0].clone(), count, gamma)

    def draw(self, uniform: Tensor) -> Tensor:
        return _draw(self.alpha, self.problem.transition, self.problem.lengths, uniform)


# which rows were done by which pass; None means all
Passes = list[tuple[Tensor | None, Scaled | Smoothed | Exact]]


class Solution(NamedTuple):
    """ln Z of each sequence, and the forward passes behind it."""

    log_z: Tensor
    passes: Passes


def _shared(problem: Problem) -> Problem:
    """Replace a transition that is one matrix expanded to all rows by that matrix."""
    step = problem.transition
    return problem._replace(transition=step[:1]) if len(step) > 1 and step.stride(0) == 0 else problem


def _precisions(problem: Problem) -> tuple[torch.dtype, ...]:
    """The dtypes to try, in order. With few states float64 costs no more than float32."""
    observation = problem.observation
    wide = observation.shape[-1] > 16 and observation.dtype != torch.float64
    return (torch.float32, torch.float64) if wide else (torch.float64,)


def solve(problem: Problem, keep: bool, smooth: bool = False) -> Solution:
    """ln Z of each sequence; with ``keep`` also what samples and gradients need, or with ``smooth`` the
    posterior at once, if that is faster. O(B·T·S²) time, O(B·T·S) memory.
    """
    problem = _shared(problem)
    smooth = smooth and _smooths(problem)
    log_z: Tensor | None = None
    passes: Passes = []
    pending: Tensor | None = None
    for dtype in _precisions(problem):
        part = problem if pending is None else problem.take(pending)
        scaled, min_alpha, smallest = _smooth(part, dtype) if smooth else _forward(part, dtype, 0.0, keep)
        limit = _TRUSTED_ALPHA[dtype]
        if smallest >= limit:
            return _finish(log_z, passes, pending, scaled)
        trusted = min_alpha >= limit
        if dtype == torch.float64:
            rows = (~trusted).nonzero().squeeze(-1)
            upper = _forward(part.take(rows), dtype, limit, False)[0].log_z
            lower = scaled.log_z[rows]
            trusted[rows] = (lower > -math.inf) & (upper - lower <= 1e-12 * lower.abs().clamp(min=1.0))
            if bool(trusted.all()):
                return _finish(log_z, passes, pending, scaled)
        good = trusted.nonzero().squeeze(-1)
        if len(good):
            log_z = torch.empty_like(min_alpha, dtype=torch.float64) if log_z is None else log_z
            rows = good if pending is None else pending[good]
            log_z[rows] = scaled.log_z[good]
            passes.append((rows, scaled.take(good) if keep else scaled))
        left = (~trusted).nonzero().squeeze(-1)
        pending = left if pending is None else pending[left]
    assert pending is not None
    return _finish(log_z, passes, pending, _exact(problem.take(pending), keep))


def _finish(
    log_z: Tensor | None, passes: list, rows: Tensor | None, last: Scaled | Smoothed | Exact
) -> Solution:
    if rows is None or log_z is None:
        return Solution(last.log_z, [(None, last)])
    log_z[rows] = last.log_z
    return Solution(log_z, [*passes, (rows, last)])


def _transpose(transition: Tensor) -> Tensor:
    return transition.transpose(-1, -2).contiguous()


def _within(x: Tensor, lengths: Tensor) -> Tensor:
    """Σ over the first ``lengths`` entries of each row."""
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(inside, x, 0.0).sum(-1)


def _exponential(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(x - peak) in ``dtype``, and the peaks over the last dimension, 0 if all are -inf."""
    peak = x.amax(-1, keepdim=True)
    peak = torch.where(peak == -math.inf, torch.zeros_like(peak), peak)
    return (x.to(dtype) - peak.to(dtype)).exp_(), peak.squeeze(-1).double()


def _forward(problem: Problem, dtype: torch.dtype, floor: float, keep: bool) -> tuple[Scaled, Tensor, float]:
    """The scaled forward pass in ``dtype``, the smallest entry of alpha in each row, and in all rows;
    ``floor`` lifts every entry from below.
    """
    initial, transition, observation, lengths = problem
    rows, steps, states = observation.shape
    run = kernels("chain", observation)
    if run is not None:
        given = initial.contiguous(), transition.contiguous(), observation.contiguous(), lengths
        found = np.empty((2, rows))
        if keep:
            exp_transition = torch.empty(transition.shape, dtype=dtype)
            alpha = torch.empty((rows, steps, states), dtype=dtype)
            scale = torch.empty((rows, steps), dtype=dtype)
            smallest = run.forward(*given, floor, exp_transition, alpha, scale, *found)
        else:
            exp_transition = alpha = scale = _LIKE[dtype]
            smallest = run.evidence(*given, floor, *found, _LIKE[dtype])
        log_z, min_alpha = torch.from_numpy(found[0]), torch.from_numpy(found[1])
        done = Scaled(Problem(initial, exp_transition, observation, lengths), alpha, scale, log_z)
        return done, min_alpha, smallest
    check_lengths(lengths, steps)
    first, top_first = _exponential(initial, dtype)
    exp_transition, tops = _exponential(transition.flatten(2), dtype)
    exp_transition = exp_transition.view(transition.shape)
    weight, top_weight = _exponential(observation, dtype)
    offset = _within(top_weight, lengths) + top_first
    offset = offset + (tops[:, 0] * (lengths - 1) if tops.shape[1] == 1 else _within(tops, lengths - 1))
    alphas, scales, minima = [], [], []
    alpha = first
    for t in range(steps):
        if t > 0:
            step = exp_transition[:, min(t - 1, exp_transition.shape[1] - 1)]
            alpha = alpha @ step[0] if step.shape[0] == 1 else (alpha.unsqueeze(-2) @ step).squeeze(-2)
        alpha = (alpha * weight[:, t]).clamp_(min=floor)
        minima.append(alpha.amin(-1))
        scales.append(alpha.sum(-1))
        alpha = alpha / scales[-1].clamp(min=torch.finfo(alpha.dtype).tiny).unsqueeze(-1)
        if keep:
            alphas.append(alpha)
    inside = torch.arange(steps, device=weight.device) < lengths[:, None]
    scale = torch.where(inside, torch.stack(scales, 1), 1.0)
    min_alpha = torch.where(inside, torch.stack(minima, 1).double(), math.inf).amin(-1)
    kept = torch.stack(alphas, 1) * inside.unsqueeze(-1) if keep else weight.new_empty(0, 0, 0)
    log_z = scale.double().log().sum(-1) + offset
    smallest = min_alpha.min().item() if rows else math.inf
    done = Scaled(Problem(initial, exp_transition, observation, lengths), kept, scale, log_z)
    return done, min_alpha, smallest


def _smooths(problem: Problem) -> bool:
    """Whether to run both passes group by group, so that what the first keeps stays in the cache: only if the
    counts of a sequence need no more memory than its states.
    """
    _, steps, states = problem.observation.shape
    few = problem.transition.shape[1] == 1 and 1 < states <= min(_MAX_COUNTED_STATES, steps)
    return few and kernels("chain", problem.observation) is not None


def _smooth(problem: Problem, dtype: torch.dtype) -> tuple[Smoothed, Tensor, float]:
    """As ``_forward``, with the posterior."""
    initial, transition, observation, lengths = problem
    rows, _, states = observation.shape
    exp_transition = torch.empty(transition.shape, dtype=dtype)
    gamma = torch.empty(observation.shape, dtype=dtype)
    count, found = torch.zeros((rows, states, states), dtype=dtype), np.empty((2, rows))
    given = initial.contiguous(), transition.contiguous(), observation.contiguous(), lengths
    run: Any = kernels("chain", observation)
    smallest = run.smooth(*given, exp_transition, gamma, count, *found)
    log_z, min_alpha = torch.from_numpy(found[0]), torch.from_numpy(found[1])
    return Smoothed(gamma, count.mul_(exp_transition[:, 0]), log_z), min_alpha, smallest


def _backward(
    transposed: Tensor,
    observation: Tensor,
    lengths: Tensor,
    alpha: Tensor,
    scale: Tensor,
    grad: Tensor,
    gamma: Tensor,
    flow: Tensor,
    count: Tensor,
) -> None:
    """Fills the posterior ``gamma [B,T,S]`` of each state, and the flow or the counts; see
    ``kernels.chain.backward``.
    """
    run = kernels("chain", observation)
    if run is not None:
        given = transposed, observation.contiguous(), lengths, alpha, scale, grad, gamma, flow, count
        run.backward(*given)
        return
    weight = _exponential(observation, transposed.dtype)[0]
    flow[:, 0] = 0
    beta = torch.ones_like(weight[:, 0])
    for t in range(weight.shape[1] - 1, -1, -1):
        beta = torch.where((lengths == t + 1).unsqueeze(-1), 1.0, beta)
        gamma[:, t] = alpha[:, t] * beta
        if t > 0:
            out = torch.where((lengths > t).unsqueeze(-1), weight[:, t] * beta / scale[:, t, None], 0.0)
            flow[:, t] = out
            step = transposed[:, min(t - 1, transposed.shape[1] - 1)]
            beta = out @ step[0] if step.shape[0] == 1 else (out.unsqueeze(-2) @ step).squeeze(-2)
    for filled in (gamma, flow):
        filled *= grad[:, None, None]


def _exact(problem: Problem, keep: bool) -> Exact:
    problem = Problem(problem[0].double(), problem[1].double(), problem[2].double(), problem[3])
    initial, transition, observation, lengths = problem
    alpha = initial + observation[:, 0]
    kept = [alpha]
    for t in range(1, observation.shape[1]):
        step = transition[:, min(t - 1, transition.shape[1] - 1)]
        moved = logsumexp(alpha.unsqueeze(-1) + step, -2) + observation[:, t]
        alpha = torch.where((lengths > t).unsqueeze(-1), moved, alpha)
        if keep:
            kept.append(alpha)
    return Exact(problem, torch.stack(kept, 1) if keep else alpha, logsumexp(alpha, -1))


def _draw(alpha: Tensor, transition: Tensor, lengths: Tensor, uniform: Tensor) -> Tensor:
    """Backward sampling from log filters: ``[N,B,T]`` by inversion of uniform numbers of that shape."""
    steps = alpha.shape[1]
    rows = torch.arange(alpha.shape[0], device=alpha.device)
    uniform = uniform.to(alpha.dtype)
    z = torch.zeros(uniform.shape, dtype=torch.long, device=alpha.device)
    for t in range(steps - 1, -1, -1):
        weight = alpha[:, t].expand(len(uniform), -1, -1)
        if t + 1 < steps:
            step = transition[:, min(t, transition.shape[1] - 1)]
            into = step[rows if step.shape[0] > 1 else 0 * rows, :, z[..., t + 1]]
            weight = torch.where((lengths > t + 1).unsqueeze(-1), weight + into, weight)
        z[..., t] = torch.where(lengths > t, choose(weight, uniform[..., t]), 0)
    return z


def draw_paths(solution: Solution, uniform: Tensor) -> Tensor:
    """Exact samples ``[N,B,T]`` of a kept solution, by inversion of ``uniform [N,B,T]``."""
    z = torch.empty(uniform.shape, dtype=torch.long, device=uniform.device)
    for rows, done in solution.passes:
        assert not isinstance(done, Smoothed)
        if rows is None:
            return done.draw(uniform)
        z[:, rows] = done.draw(uniform[:, rows].contiguous())
    return z


def best_path(problem: Problem) -> Tensor:
    """A most probable path ``[B,T]``, the first among ties at each step. O(B·T·S²) time, O(B·T·S) memory."""
    initial, transition, observation, lengths = problem
    rows, steps, _ = observation.shape
    transposed = _transpose(transition)
    run = kernels("path", observation)
    if run is not None:
        z = torch.empty(rows, steps, dtype=torch.long)
        arrays = [x.contiguous() for x in (initial, transition, transposed, observation, lengths)]
        run.viterbi(*arrays, z)
        return z
    check_lengths(lengths, steps)
    z = torch.zeros(rows, steps, dtype=torch.long, device=observation.device)
    delta = [initial + observation[:, 0]]
    for t in range(1, steps):
        step = transposed[:, min(t - 1, transposed.shape[1] - 1)]
        delta.append((delta[-1].unsqueeze(-2) + step).amax(-1) + observation[:, t])
    each = torch.arange(rows, device=observation.device)
    for t in range(steps - 1, -1, -1):
        log_weight = delta[t].expand_as(observation[:, 0])
        if t + 1 < steps:
            step = transposed[:, min(t, transposed.shape[1] - 1)]
            into = step[0 if step.shape[0] == 1 else each, z[:, t + 1]]
            log_weight = torch.where((lengths > t + 1).unsqueeze(-1), log_weight + into, log_weight)
        z[:, t] = torch.where(lengths > t, log_weight.argmax(-1), 0)
    return z


def expectations(
    problem: Problem, passes: Passes, grad: Tensor | None, workspace: Tensor | None = None
) -> Expected:
    """The gradient of Σ_b grad_b ln Z_b in closed form, in the shapes of the potentials; None is all ones.

    ``workspace [B,T,S]`` may be used for the states' part.
    """
    potentials, count = problem[:3], problem.observation.shape[0]
    apart = problem.transition.shape[0] == count
    if not count:
        return Expected(*(torch.zeros_like(x) for x in problem[:3]))
    if grad is not None and bool((grad == 1).all()):
        grad = None
    total: list[Tensor] = []
    for rows, done in passes:
        given = grad if rows is None or grad is None else grad[rows]
        found = done.expected(given, apart, workspace if rows is None else None)
        parts = [
            (x if potential.shape[0] == count or x.shape[0] == 1 else x.sum(0, keepdim=True)).to(
                potential.dtype
            )
            for x, potential in zip(found, potentials, strict=True)
        ]
        if rows is None:
            return Expected(*parts)
        total = total or [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in potentials]
        for out, part in zip(total, parts, strict=True):
            if len(out) < count:
                out += part
            else:
                out[rows] = part
    return Expected(*total)


def smoothed(problem: Problem) -> Expected:
    """``expectations`` of a problem whose potentials all have B rows, a few sequences at a time to save
    memory.
    """
    rows, steps, states = problem.observation.shape
    group = _rows_together(steps, states)
    if rows <= group or problem.transition.shape[1] > 1 or _smooths(problem):
        return expectations(problem, solve(problem, keep=True, smooth=True).passes, None)
    found = Expected(*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in problem[:3]))
    for start in range(0, rows, group):
        part = slice(start, start + group)
        some = Problem(*(x[part] for x in problem))
        workspace = found.observation[part]
        for out, x in zip(
            found, expectations(some, solve(some, keep=True).passes, None, workspace), strict=True
        ):
            if out[part].data_ptr() != x.data_ptr():
                out[part] = x
    return found


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, initial, transition, observation, lengths, solution):
        problem = Problem(initial, transition, observation, lengths)
        if solution is None:
            solution = solve(problem, keep=True, smooth=True)
        ctx.passes = solution.passes
        ctx.save_for_backward(initial, transition, observation, lengths)
        return solution.log_z.to(observation.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        # results may be overwritten by the caller: a second call needs a new solution
        passes, ctx.passes = ctx.passes, None
        if passes is None:
            passes = solve(Problem(*ctx.saved_tensors), keep=True, smooth=True).passes
        return *_Expected.apply(*ctx.saved_tensors, grad, passes), None, None


class _Expected(torch.autograd.Function):
    """The gradient of ln Z in closed form; its own derivatives by autograd through the exact scan."""

    @staticmethod
    def forward(ctx, initial, transition, observation, lengths, grad, passes):
        ctx.save_for_backward(initial, transition, observation, lengths, grad)
        return expectations(Problem(initial, transition, observation, lengths), passes, grad)

    @staticmethod
    def backward(ctx, *above):
        initial, transition, observation, lengths, grad = ctx.saved_tensors
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            # views, since one input may be computed from another
            inputs = [
                x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_()
                for x in (initial, transition, observation, grad)
            ]
            log_z = _exact(Problem(inputs[0], inputs[1], inputs[2], lengths), False).log_z.to(grad.dtype)
            first = torch.autograd.grad(
                log_z, inputs[:3], inputs[3], create_graph=True, materialize_grads=True
            )
            used = [(x, g) for x, g in zip(first, above, strict=True) if x.requires_grad]
            outputs, weights = zip(*used, strict=True)
            second = torch.autograd.grad(
                outputs, inputs, weights, materialize_grads=True, create_graph=further
            )
        return *second[:3], None, second[3], None


def log_partition(problem: Problem, solution: Solution | None = None) -> Tensor:
    """ln Z ``[B]``, with derivatives of any order; ``solution`` may hold a kept forward pass."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in problem[:3]):
        return _LogPartition.apply(*problem, solution)
    return (solution or solve(problem, keep=False)).log_z.to(problem.observation.dtype)

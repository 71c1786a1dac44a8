"""Linear-Gaussian state-space models: the evidence, the filter, and the posterior over state sequences."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from pyro.ops.gaussian import (
    gaussian_tensordot,
    matrix_and_mvn_to_gaussian,
    mvn_to_gaussian,
    sequential_gaussian_tensordot,
)
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions.checks import check_lengths, first_index
from pyroelbo.distributions.kernels.dispatch import loops
from pyroelbo.distributions.structured import independent_normal

__all__ = ["Filtered", "GaussianChain", "LinearGaussianChain"]


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


class LinearGaussianChain(TorchDistribution):
    """p(y) of z_1 ~ initial, z_{t+1} = A_t z_t + transition_noise, y_t = C_t z_t + observation_noise.

    ``initial``, ``transition_noise`` and ``observation_noise`` are Gaussians (``MultivariateNormal``, or
    ``Normal(...).to_event(1)``) of batch shapes ``[*B]``, ``[*B]`` or ``[*B,T-1]``, ``[*B]`` or ``[*B,T]``,
    with means as they please; ``transition_matrix`` is ``[*B,H,H]`` or ``[*B,T-1,H,H]`` (to, from),
    ``observation_matrix [*B,O,H]`` or ``[*B,T,O,H]``. Values are ``[*B,T,O]``; ``lengths [*B]`` shortens
    sequences: what lies beyond is ignored, and zero in samples. A coordinate that is NaN is missing: it is
    integrated over, the step's others count. Sampling needs a known T: from ``num_steps`` or a parameter that
    varies in time.

    ``log_prob(y)`` is the evidence, ``posterior(y)`` the ``GaussianChain`` of states given y.
    Cost: O(B·T·H²) and, once for a batch that shares its parameters and misses nothing, O(T·(H + O)³), also for
    the gradient.
    Source: Kalman (1960); the score by the recursion of de Jong (1989), Koopman and Shephard (1992).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        initial: Any,
        transition_matrix: Tensor,
        transition_noise: Any,
        observation_matrix: Tensor,
        observation_noise: Any,
        num_steps: int | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        gaussians = {
            "initial": initial,
            "transition_noise": transition_noise,
            "observation_noise": observation_noise,
        }
        moments = {name: _moments(name, x) for name, x in gaussians.items()}
        if lengths is not None and not isinstance(lengths, Tensor):
            raise ValueError(f"lengths is a {type(lengths).__name__}: it takes a LongTensor [*B]")
        rank = len(initial.batch_shape)
        hidden, observed = initial.event_shape[-1], observation_noise.event_shape[-1]
        known = {} if num_steps is None else {"num_steps": num_steps}
        if (
            transition_matrix.shape[-2:] != (hidden, hidden)
            or observation_matrix.shape[-2:] != (observed, hidden)
            or transition_noise.event_shape != (hidden,)
        ):
            raise ValueError(
                f"got initial of event shape {tuple(initial.event_shape)}, transition_matrix "
                f"{tuple(transition_matrix.shape)}, transition_noise of event shape "
                f"{tuple(transition_noise.event_shape)}, observation_matrix {tuple(observation_matrix.shape)}, "
                f"observation_noise of event shape "
                f"{tuple(observation_noise.event_shape)}: they take [H], [H,H], [H], [O,H] and [O]"
            )

        def timed(name: str, x: Tensor, own: int, extra: int) -> Tensor:
            if x.dim() == rank + own:
                return x.unsqueeze(rank)
            if x.dim() != rank + own + 1:
                raise ValueError(
                    f"{name} has {x.dim() - own} dimensions before its own: it takes [*B] or [*B,T]"
                )
            known[name] = x.shape[rank] + extra
            return x

        (start, spread), (drift, noise), (offset, error) = moments.values()
        self.parameters = Parameters(
            start,
            spread,
            timed("transition_matrix", transition_matrix, 2, 1),
            timed("transition_noise", drift, 1, 1),
            timed("transition_noise", noise, 2, 1),
            timed("observation_matrix", observation_matrix, 2, 0),
            timed("observation_noise", offset, 1, 0),
            timed("observation_noise", error, 2, 0),
        )
        if len(set(known.values())) > 1:
            raise ValueError(f"the number of steps differs: {known}")
        self.num_steps = next(iter(known.values()), None)
        shapes = [x.shape[:rank] for x in self.parameters]
        batch_shape = torch.broadcast_shapes(*shapes, *([] if lengths is None else [lengths.shape]))
        self.lengths = None if lengths is None else lengths.expand(batch_shape)
        self.parameters = _padded(self.parameters, len(batch_shape) - rank)
        # a size of one stands for "any" where torch checks a value's shape
        event_shape = torch.Size((self.num_steps or 1, observed))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args:
            for name in ("transition_matrix", "observation_matrix"):
                matrix = transition_matrix if name == "transition_matrix" else observation_matrix
                if not matrix.isfinite().all():
                    raise ValueError(f"{name} is not finite at index {first_index(~matrix.isfinite())}")
            if lengths is not None and self.num_steps is not None:
                check_lengths(lengths, self.num_steps)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, 2)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> LinearGaussianChain:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.parameters = _padded(self.parameters, len(new._batch_shape) - len(self._batch_shape))
        if self.lengths is not None:
            new.lengths = self.lengths.expand(new._batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The evidence ln p(y), ``[*sample, *B]``."""
        new, value, lengths, constant = self._aligned(value)
        return _log_evidence(value, lengths, new.parameters, constant)

    def posterior(self, y: Tensor) -> GaussianChain:
        """p(z | y), a ``GaussianChain`` whose ``log_partition`` is ln p(y)."""
        new, y, lengths, constant = self._aligned(y)
        return GaussianChain(new.parameters, y, lengths, constant, validate_args=self._validate_args)

    def filter(self, y: Tensor) -> Filtered:
        """The states' distributions given the past, with and without the present. Cost: O(T) steps."""
        new, y, _, _ = self._aligned(y)
        return _filtered(new.parameters, y)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``[*sample, *B, T, O]``, differentiable in the parameters."""
        if self.num_steps is None:
            raise ValueError("num_steps is None: sampling from a homogeneous chain takes the number of steps")
        p, steps = self.parameters, self.num_steps
        shape = torch.Size(sample_shape) + self.batch_shape
        root = torch.linalg.cholesky(p.noise)
        z = [p.start + _apply(torch.linalg.cholesky(p.spread), _normal(p.start, shape, p.start.shape[-1:]))]
        for t in range(steps - 1):
            u = min(t, p.move.shape[-3] - 1)
            shock = _apply(
                root[..., min(t, root.shape[-3] - 1), :, :], _normal(p.start, shape, z[0].shape[-1:])
            )
            drift = p.drift[..., min(t, p.drift.shape[-2] - 1), :]
            z.append(_apply(p.move[..., u, :, :], z[-1]) + drift + shock)
        noise = _normal(p.start, shape, (steps, self.event_shape[-1]))
        y = _apply(p.read, torch.stack(z, -2)) + p.offset + _apply(torch.linalg.cholesky(p.error), noise)
        return y if self.lengths is None else torch.where(_within(self.lengths, steps)[..., None], y, 0.0)

    def _aligned(self, value: Tensor) -> tuple[LinearGaussianChain, Tensor, Tensor, Tensor | None]:
        """This distribution, the value and its lengths, all with the same number of batch dimensions; and what
        missing coordinates add to ln p(y), where there are any.
        """
        if value.dim() < 2 or value.shape[-1] != self.event_shape[-1] or not value.shape[-2]:
            raise ValueError(
                f"y has shape {tuple(value.shape)}: it takes [*B,T,{self.event_shape[-1]}] with T > 0"
            )
        steps = value.shape[-2]
        if self.num_steps is not None and steps != self.num_steps:
            raise ValueError(f"y has {steps} steps in shape {tuple(value.shape)}: it takes {self.num_steps}")
        # integers, and data in a lower precision than the parameters', are taken as the parameters are
        value = value.to(
            functools.reduce(torch.promote_types, (x.dtype for x in self.parameters), value.dtype)
        )
        shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        new = self.expand(shape)
        lengths = torch.full(shape, steps, device=value.device) if new.lengths is None else new.lengths
        value = value.expand(*shape, *value.shape[-2:])
        if self.lengths is not None:
            value = torch.where(_within(lengths, steps)[..., None], value, 0.0)
        if self._validate_args:
            check_lengths(lengths, steps)
            bad = value.isinf()
            if bad.any():
                raise ValueError(
                    f"y has {value[bad][0].item()} at index {first_index(bad)}: it takes finite numbers, and NaN "
                    "where one is missing"
                )
        missing = value.isnan()
        if not missing.any():
            return new, value, lengths, None
        new.parameters = _without(new.parameters, missing)
        constant = 0.5 * math.log(2 * math.pi) * missing.sum((-1, -2), dtype=value.dtype)
        return new, torch.where(missing, 0.0, value), lengths, constant


class GaussianChain(TorchDistribution):
    """p(z | y) of a linear-Gaussian chain: z_T ~ N, then z_t given z_{t+1} backwards in time.

    Values are ``[*B,T,H]``; what lies beyond ``lengths`` is zero in samples and ignored. ``mean``,
    ``variance`` and ``covariance`` are the smoother's, ``lagged`` is Cov(z_t, z_{t+1}); ``log_partition``
    is ln p(y). All are differentiable in the parameters and in y.

    Cost: O(B·T·(H + O)³), T steps one after another. Source: Rauch, Tung, Striebel (1965).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        parameters: Parameters,
        y: Tensor,
        lengths: Tensor,
        constant: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.parameters, self.y, self.lengths, self.constant = parameters, y, lengths, constant
        event_shape = torch.Size((y.shape[-2], parameters.start.shape[-1]))
        super().__init__(y.shape[:-2], event_shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, 2)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GaussianChain:
        parameters = _padded(self.parameters, len(batch_shape) - len(self.batch_shape))
        y = self.y.expand(*batch_shape, *self.y.shape[-2:])
        constant = None if self.constant is None else self.constant.expand(batch_shape)
        return GaussianChain(parameters, y, self.lengths.expand(batch_shape), constant, self._validate_args)

    @functools.cached_property
    def log_partition(self) -> Tensor:
        """ln p(y), ``[*B]``."""
        return _log_evidence(self.y, self.lengths, self.parameters, self.constant)

    @functools.cached_property
    def _backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """z_t = matrix_t z_{t+1} + shift_t + N(0, covariance_t); the last z_t of a sequence depends on
        none.
        """
        p, past = self.parameters, _filtered(self.parameters, self.y)
        steps, hidden = self.event_shape
        last = torch.arange(steps, device=self.lengths.device) >= self.lengths[..., None] - 1
        if steps == 1:
            return torch.zeros_like(past.covariance), past.mean, past.covariance
        v, ahead = past.covariance[..., :-1, :, :], past.predicted_covariance[..., 1:, :, :]
        gain = torch.linalg.solve(ahead, p.move @ v).transpose(-1, -2)
        gain = torch.cat([gain, torch.zeros_like(gain[..., :1, :, :])], -3)
        gain = torch.where(last[..., None, None], 0.0, gain)
        move, noise = (
            x if x.shape[-3] == 1 else torch.cat([x, x[..., -1:, :, :]], -3) for x in (p.move, p.noise)
        )
        next_mean = torch.cat([past.predicted_mean[..., 1:, :], past.mean[..., -1:, :]], -2)
        rest = torch.eye(hidden, dtype=v.dtype, device=v.device) - gain @ move
        covariance = rest @ past.covariance @ rest.mT + gain @ noise @ gain.mT
        return gain, past.mean - _apply(gain, next_mean), (covariance + covariance.mT) / 2

    def _run(self, shocks: Tensor) -> Tensor:
        gain, _, _ = self._backward
        z = [shocks[..., -1, :]]
        for t in range(self.event_shape[0] - 2, -1, -1):
            z.append(_apply(gain[..., t, :, :], z[-1]) + shocks[..., t, :])
        return torch.where(
            _within(self.lengths, self.event_shape[0])[..., None], torch.stack(z[::-1], -2), 0.0
        )

    @functools.cached_property
    def mean(self) -> Tensor:  # type: ignore[override]
        """E z_t, ``[*B,T,H]``; also the mode."""
        return self._run(self._backward[1])

    @property
    def mode(self) -> Tensor:
        return self.mean

    @functools.cached_property
    def covariance(self) -> Tensor:
        """Cov z_t, ``[*B,T,H,H]``."""
        gain, _, own = self._backward
        found = [own[..., -1, :, :]]
        for t in range(self.event_shape[0] - 2, -1, -1):
            back = gain[..., t, :, :]
            found.append(back @ found[-1] @ back.mT + own[..., t, :, :])
        within = _within(self.lengths, self.event_shape[0])[..., None, None]
        return torch.where(within, torch.stack(found[::-1], -3), 0.0)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self.covariance.diagonal(0, -1, -2)

    @property
    def lagged(self) -> Tensor:
        """Cov(z_t, z_{t+1}), ``[*B,T-1,H,H]``."""
        return self._backward[0][..., :-1, :, :] @ self.covariance[..., 1:, :, :]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Exact draws ``[*sample, *B, T, H]``, differentiable."""
        _, shift, covariance = self._backward
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = _normal(shift, shape, self.event_shape)
        return self._run(shift + _apply(torch.linalg.cholesky(covariance), noise))

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(z | y), ``[*sample, *B]``."""
        gain, shift, covariance = self._backward
        value = torch.where(_within(self.lengths, self.event_shape[0])[..., None], value, 0.0)
        ahead = torch.cat([value[..., 1:, :], torch.zeros_like(value[..., :1, :])], -2)
        each = MultivariateNormal(_apply(gain, ahead) + shift, covariance, validate_args=False).log_prob(
            value
        )
        return torch.where(_within(self.lengths, self.event_shape[0]), each, 0.0).sum(-1)

    def entropy(self) -> Tensor:
        """H(p(z | y)), ``[*B]``."""
        each = MultivariateNormal(self._backward[1], self._backward[2], validate_args=False).entropy()
        return torch.where(_within(self.lengths, self.event_shape[0]), each, 0.0).sum(-1)


def _moments(name: str, gaussian: Any) -> tuple[Tensor, Tensor]:
    if isinstance(gaussian, torch.distributions.MultivariateNormal):
        return gaussian.loc, gaussian.covariance_matrix
    base = independent_normal(gaussian)
    if base is not None:
        return base.loc, torch.diag_embed(base.scale.square())
    raise ValueError(
        f"{name} is a {type(gaussian).__name__}: it takes a MultivariateNormal or Normal(...).to_event(1)"
    )


def _padded(p: Parameters, dims: int) -> Parameters:
    return Parameters(*(x.reshape((1,) * dims + x.shape) for x in p))


def _without(p: Parameters, missing: Tensor) -> Parameters:
    """Missing coordinates ``[*B,T,O]`` made to say nothing: each is noise of its own around zero, of variance one."""
    apart = missing[..., :, None] | missing[..., None, :]
    own = torch.diag_embed(missing.to(p.error.dtype))
    return p._replace(
        read=torch.where(missing[..., None], 0.0, p.read),
        offset=torch.where(missing, 0.0, p.offset),
        error=torch.where(apart, own, p.error),
    )


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _normal(like: Tensor, batch: Sequence[int], event: Sequence[int]) -> Tensor:
    return torch.randn((*batch, *event), dtype=like.dtype, device=like.device)


def _within(lengths: Tensor, steps: int) -> Tensor:
    return torch.arange(steps, device=lengths.device) < lengths[..., None]


def _filtered(p: Parameters, y: Tensor) -> Filtered:
    """Kalman's filter in plain torch; Joseph's form keeps covariances positive where the noise is small."""
    identity = torch.eye(p.start.shape[-1], dtype=p.start.dtype, device=p.start.device)
    mean, covariance = p.start, p.spread
    found: list[tuple[Tensor, ...]] = []
    for t in range(y.shape[-2]):
        u = min(t, p.read.shape[-3] - 1), min(t, p.offset.shape[-2] - 1), min(t, p.error.shape[-3] - 1)
        read, offset, error = p.read[..., u[0], :, :], p.offset[..., u[1], :], p.error[..., u[2], :, :]
        if t:
            u = min(t, p.move.shape[-3]) - 1, min(t, p.drift.shape[-2]) - 1, min(t, p.noise.shape[-3]) - 1
            move = p.move[..., u[0], :, :]
            mean = _apply(move, found[-1][0]) + p.drift[..., u[1], :]
            covariance = move @ found[-1][1] @ move.mT + p.noise[..., u[2], :, :]
        seen = read @ covariance
        gain = torch.linalg.solve(seen @ read.mT + error, seen).mT
        rest = identity - gain @ read
        filtered = mean + _apply(gain, y[..., t, :] - offset - _apply(read, mean))
        left = rest @ covariance @ rest.mT + gain @ error @ gain.mT
        found.append((filtered, (left + left.mT) / 2, mean, covariance))
    shape = y.shape[:-2]
    means, covariances, predicted, ahead = zip(*found, strict=True)
    vectors = (torch.stack([x.expand(*shape, *x.shape[-1:]) for x in xs], -2) for xs in (means, predicted))
    matrices = (torch.stack([x.expand(*shape, *x.shape[-2:]) for x in xs], -3) for xs in (covariances, ahead))
    (mean, predicted_mean), (covariance, predicted_covariance) = vectors, matrices
    return Filtered(mean, covariance, predicted_mean, predicted_covariance)


_kernels: Any = functools.partial(loops, "kalman")


def _in_steps(y: Tensor, lengths: Tensor, p: Parameters) -> Tensor:
    past = _filtered(p, y)
    mean = _apply(p.read, past.predicted_mean) + p.offset
    covariance = p.read @ past.predicted_covariance @ p.read.mT + p.error
    each = MultivariateNormal(mean, covariance, validate_args=False).log_prob(y)
    return torch.where(_within(lengths, y.shape[-2]), each, 0.0).sum(-1)


def _scan(y: Tensor, lengths: Tensor, p: Parameters) -> Tensor:
    """ln p(y) by Pyro's parallel scan over Gaussian factors; what lies beyond a length says nothing.

    The scan works with precisions, which cannot hold a vague start beside precise observations: then the
    filter takes the steps one after another. Arithmetic is in float64.
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
    within = _within(lengths, steps).to(y.dtype)
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


def _log_evidence(y: Tensor, lengths: Tensor, p: Parameters, constant: Tensor | None) -> Tensor:
    if y.device.type != "cpu" or _kernels() is None:
        value = _scan(y, lengths, p)
    else:
        value = _LogEvidence.apply(y, lengths, *p)
    return value if constant is None else value + constant


class _LogEvidence(torch.autograd.Function):
    """The compiled filter, in float64, and its adjoint; second derivatives are those of Pyro's scan."""

    @staticmethod
    def forward(ctx, y, lengths, *parameters):
        p = Parameters(*parameters)
        rank = lengths.dim()
        shared = all(n == 1 for x in p for n in x.shape[:rank])
        batch = (1,) * rank if shared else lengths.shape
        turns = max(p.move.shape[rank], p.drift.shape[rank], p.noise.shape[rank])
        looks = max(p.read.shape[rank], p.offset.shape[rank], p.error.shape[rank])
        times = ((), (), (turns,), (turns,), (turns,), (looks,), (looks,), (looks,))
        own = [x.shape[rank + len(time) :] for x, time in zip(p, times, strict=True)]
        full = [(*batch, *time, *size) for time, size in zip(times, own, strict=True)]
        flat = [
            x.detach().double().expand(shape).reshape(-1, *shape[rank:]).contiguous().numpy()
            for x, shape in zip(p, full, strict=True)
        ]
        steps, observed = y.shape[-2:]
        rows, groups, hidden = lengths.numel(), len(flat[0]), p.start.shape[-1]

        def room(*shape: int):
            return torch.empty(shape, dtype=torch.float64).numpy()

        value = room(rows)
        means, errors, residuals = room(rows, steps, hidden), *(room(rows, steps, observed) for _ in range(2))
        sizes = (
            (hidden, hidden),
            (hidden, hidden),
            (hidden, observed),
            (observed, observed),
            (hidden, hidden),
        )
        covariances = [room(groups, steps, *size) for size in sizes]
        settled = torch.empty(groups, dtype=torch.long).numpy()
        data = y.detach().double().reshape(-1, steps, observed).contiguous().numpy()
        counts = lengths.reshape(-1).contiguous().numpy()
        start, spread, move, drift, noise, read, offset, error = flat
        _kernels().kalman_filter(
            data, counts, start, spread, move, drift, noise, read, offset, error,
            value, means, errors, residuals, *covariances, room(groups, steps), settled,
        )  # fmt: skip
        ctx.kept = counts, move, read, means, errors, residuals, *covariances, settled
        ctx.shapes = full, [x.shape for x in flat]
        ctx.save_for_backward(y, lengths, *parameters)
        return torch.from_numpy(value).view(lengths.shape).to(y.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        y, lengths, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = [x for x in (y, *parameters) if x.requires_grad]
            exact = torch.autograd.grad(
                _scan(y, lengths, Parameters(*parameters)), wanted, grad, create_graph=True
            )
            found = iter(exact)
            back = [next(found) if x.requires_grad else None for x in (y, *parameters)]
            return back[0], None, *back[1:]
        full, flat = ctx.shapes
        grads = [torch.zeros(shape, dtype=torch.float64) for shape in flat]
        by_y = torch.zeros(lengths.numel(), *y.shape[-2:], dtype=torch.float64)
        weight = grad.detach().double().reshape(-1).contiguous().numpy()
        _kernels().kalman_adjoint(weight, *ctx.kept, *(x.numpy() for x in grads), by_y.numpy())
        back = [
            g.view(shape).sum_to_size(x.shape).to(x.dtype)
            for g, shape, x in zip(grads, full, parameters, strict=True)
        ]
        return by_y.view(y.shape).to(y.dtype), None, *back

"""Linear-Gaussian state-space models: evidence, filter, and posterior over state sequences."""

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

from pyroelbo.distributions.checks import check_lengths, first_index, refuse_transforms
from pyroelbo.distributions.kernels.dispatch import kernels
from pyroelbo.distributions.structured import cached_until_changed, independent_normal

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
    with any means; ``transition_matrix`` is ``[*B,H,H]`` or ``[*B,T-1,H,H]`` (to, from),
    ``observation_matrix [*B,O,H]`` or ``[*B,T,O,H]``. Values are ``[*B,T,O]``; ``lengths [*B]`` are those of
    padded sequences: the padding is ignored, and zero in samples. A coordinate that is NaN is missing, and
    integrated over; the others of its step count. Sampling needs ``num_steps``, or a parameter that varies in
    time.

    ``log_prob(y)`` is the evidence, and ``posterior(y)`` the ``GaussianChain`` of states given y. Covariances
    are kept as square roots, so that a diffuse ``initial`` costs half the digits of its spread, not all.
    Cost: O(B·T·H²), and O(T·(H + O)³) once for a batch that shares its parameters and has no missing values,
        also for
    the gradient.
    Source: Kalman (1960); Kaminski, Bryson and Schmidt (1971) for square roots; gradients by the recursion of
        de Jong
    (1989), Koopman and Shephard (1992).

    Args:
        initial: a Gaussian of batch shape ``[*B]`` and event shape ``[H]``.
        transition_matrix: ``[*B,H,H]`` or ``[*B,T-1,H,H]`` (to, from).
        transition_noise: a Gaussian of batch shape ``[*B]`` or ``[*B,T-1]`` and event shape ``[H]``.
        observation_matrix: ``[*B,O,H]`` or ``[*B,T,O,H]``.
        observation_noise: a Gaussian of batch shape ``[*B]`` or ``[*B,T]`` and event shape ``[O]``.
        num_steps: T; needed only for sampling from a homogeneous chain.
        lengths: LongTensor ``[*B]`` of values in 1..T.
        validate_args: whether to check the arguments' values.
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
            raise ValueError(f"lengths: expected a LongTensor [*B], got a {type(lengths).__name__}")
        refuse_transforms(transition_matrix=transition_matrix, observation_matrix=observation_matrix)
        rank = len(initial.batch_shape)
        hidden, observed = initial.event_shape[-1], observation_noise.event_shape[-1]
        known = {} if num_steps is None else {"num_steps": num_steps}
        if (
            transition_matrix.shape[-2:] != (hidden, hidden)
            or observation_matrix.shape[-2:] != (observed, hidden)
            or transition_noise.event_shape != (hidden,)
        ):
            raise ValueError(
                "initial, transition_matrix, transition_noise, observation_matrix, observation_noise: "
                "expected (event) "
                f"shapes [H], [H,H], [H], [O,H] and [O], got {tuple(initial.event_shape)}, "
                f"{tuple(transition_matrix.shape)}, {tuple(transition_noise.event_shape)}, "
                f"{tuple(observation_matrix.shape)} and {tuple(observation_noise.event_shape)}"
            )

        def timed(name: str, x: Tensor, own: int, extra: int) -> Tensor:
            if x.dim() == rank + own:
                return x.unsqueeze(rank)
            if x.dim() != rank + own + 1:
                raise ValueError(
                    f"{name}: expected batch shape [*B] or [*B,T], got {x.dim() - own} batch dimensions"
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
            raise ValueError(f"num_steps: expected the same number of steps everywhere, got {known}")
        self.num_steps = next(iter(known.values()), None)
        shapes = [x.shape[:rank] for x in self.parameters]
        batch_shape = torch.broadcast_shapes(*shapes, *([] if lengths is None else [lengths.shape]))
        self.lengths = None if lengths is None else lengths.expand(batch_shape)
        self.parameters = _padded(self.parameters, len(batch_shape) - rank)
        # size one means "any" when torch checks the shape of a value
        event_shape = torch.Size((self.num_steps or 1, observed))
        super().__init__(batch_shape, event_shape, validate_args=validate_args)
        if self._validate_args:
            for name in ("transition_matrix", "observation_matrix"):
                matrix = transition_matrix if name == "transition_matrix" else observation_matrix
                if not matrix.isfinite().all():
                    bad = first_index(~matrix.isfinite())
                    raise ValueError(f"{name}: expected finite numbers, got others at index {bad}")
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
        """Filtered and predicted distributions of the states. Cost: O(T) steps."""
        new, y, _, _ = self._aligned(y)
        return _filtered(new.parameters, y)[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples ``[*sample, *B, T, O]``, differentiable in the parameters."""
        if self.num_steps is None:
            raise ValueError(
                "num_steps: expected the number of steps for sampling from a homogeneous chain, got None"
            )
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
        """This distribution, the value and its lengths with the same batch dimensions, and the constant to
        add to ln p(y) for missing coordinates, if any.
        """
        if value.dim() < 2 or value.shape[-1] != self.event_shape[-1] or not value.shape[-2]:
            raise ValueError(
                f"y: expected shape [*B,T,{self.event_shape[-1]}] with T > 0, got {tuple(value.shape)}"
            )
        refuse_transforms(y=value)
        steps = value.shape[-2]
        if self.num_steps is not None and steps != self.num_steps:
            raise ValueError(f"y: expected {self.num_steps} steps, got {steps} in shape {tuple(value.shape)}")
        # integers, and data of lower precision, are cast to the parameters' dtype
        value = value.to(
            functools.reduce(torch.promote_types, (x.dtype for x in self.parameters), value.dtype)
        )
        shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        new = self.expand(shape)
        lengths = torch.full(shape, steps, device=value.device) if new.lengths is None else new.lengths
        value = value.expand(*shape, *value.shape[-2:])
        if self.lengths is not None:
            value = torch.where(_within(lengths, steps)[..., None], value, 0.0)
        check_lengths(lengths, steps)
        if self._validate_args:
            bad = value.isinf()
            if bad.any():
                raise ValueError(
                    f"y: expected finite numbers, or NaN for missing ones, got {value[bad][0].item()} at "
                    f"index "
                    f"{first_index(bad)}"
                )
        missing = value.isnan()
        if not missing.any():
            return new, value, lengths, None
        new.parameters = _without(new.parameters, missing)
        constant = 0.5 * math.log(2 * math.pi) * missing.sum((-1, -2), dtype=value.dtype)
        return new, torch.where(missing, 0.0, value), lengths, constant


class GaussianChain(TorchDistribution):
    """p(z | y) of a linear-Gaussian chain: z_T ~ N, then z_t given z_{t+1} backwards in time.

    Values are ``[*B,T,H]``; the padding beyond ``lengths`` is ignored, and zero in samples. ``mean``,
    ``variance`` and ``covariance`` are the smoother's, ``lagged`` is Cov(z_t, z_{t+1}), and ``log_partition``
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

    def _sources(self) -> tuple[Tensor, ...]:
        return (*self.parameters, self.y)

    @cached_until_changed
    def log_partition(self) -> Tensor:
        """ln p(y), ``[*B]``."""
        return _log_evidence(self.y, self.lengths, self.parameters, self.constant)

    @cached_until_changed
    def _backward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gain, shift and covariance of z_t = gain_t z_{t+1} + shift_t + N(0, covariance_t); gain is zero at
        the last z_t.
        """
        p, (past, roots) = self.parameters, _filtered(self.parameters, self.y)
        steps, hidden = self.event_shape
        last = torch.arange(steps, device=self.lengths.device) >= self.lengths[..., None] - 1
        if steps == 1:
            return torch.zeros_like(past.covariance), past.mean, past.covariance
        v = past.covariance[..., :-1, :, :]
        gain = torch.cholesky_solve(p.move @ v, roots.predicted[..., 1:, :, :]).mT
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

    @cached_until_changed
    def mean(self) -> Tensor:  # type: ignore[override]
        """E z_t, ``[*B,T,H]``, which is also the mode."""
        return self._run(self._backward[1])

    @property
    def mode(self) -> Tensor:
        return self.mean

    @cached_until_changed
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
        """Exact samples ``[*sample, *B, T, H]``, differentiable."""
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
        f"{name}: expected a MultivariateNormal or Normal(...).to_event(1), got a {type(gaussian).__name__}"
    )


def _padded(p: Parameters, dims: int) -> Parameters:
    return Parameters(*(x.reshape((1,) * dims + x.shape) for x in p))


def _without(p: Parameters, missing: Tensor) -> Parameters:
    """Replace missing coordinates ``[*B,T,O]`` by independent standard noise."""
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


class _Roots(NamedTuple):
    """Lower triangular roots of covariances: of innovations [*B,T,O,O] and of predicted states [*B,T,H,H]."""

    innovation: Tensor
    predicted: Tensor


def _lower(x: Tensor) -> Tensor:
    """The lower triangular matrix L of positive diagonal with L L' = x x'."""
    root = torch.linalg.qr(x.mT).R.mT
    return root * root.diagonal(0, -1, -2).sign().unsqueeze(-2)


def _filtered(p: Parameters, y: Tensor) -> tuple[Filtered, _Roots]:
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
            mean = _apply(move, mean) + p.drift[..., u[1], :]
            root = _lower(_beside(move @ root, noise_root[..., u[2], :, :]))
        predicted, ahead = mean, root
        above = _beside(error, read @ root)
        below = _beside(torch.zeros_like((read @ root).mT), root)
        both = _lower(torch.cat(_expanded(above, below), -2))
        innovation, corner = both[..., :observed, :observed], both[..., observed:, :observed]
        root = both[..., observed:, observed:]
        apart = (y[..., t, :] - offset - _apply(read, mean)).unsqueeze(-1)
        mean = mean + (corner @ torch.linalg.solve_triangular(innovation, apart, upper=False)).squeeze(-1)
        found.append((mean, root @ root.mT, predicted, ahead @ ahead.mT, innovation, ahead))
    shape = y.shape[:-2]
    columns = list(zip(*found, strict=True))
    vectors = [torch.stack([x.expand(*shape, *x.shape[-1:]) for x in columns[i]], -2) for i in (0, 2)]
    matrices = [torch.stack([x.expand(*shape, *x.shape[-2:]) for x in columns[i]], -3) for i in (1, 3, 4, 5)]
    return Filtered(vectors[0], matrices[0], vectors[1], matrices[1]), _Roots(*matrices[2:])


def _expanded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the batch dimensions that they broadcast to."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """[a b], with broadcast batch dimensions."""
    return torch.cat(_expanded(a, b), -1)


def _in_steps(y: Tensor, lengths: Tensor, p: Parameters) -> Tensor:
    past, roots = _filtered(p, y)
    mean = _apply(p.read, past.predicted_mean) + p.offset
    each = MultivariateNormal(mean, scale_tril=roots.innovation, validate_args=False).log_prob(y)
    return torch.where(_within(lengths, y.shape[-2]), each, 0.0).sum(-1)


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
    if kernels("kalman", y) is None:
        check_lengths(lengths, y.shape[-2])
        value = _scan(y, lengths, p)
    else:
        value = _LogEvidence.apply(y, lengths, *p)
    return value if constant is None else value + constant


class _LogEvidence(torch.autograd.Function):
    """The compiled filter and its adjoint, in float64; second derivatives are those of Pyro's scan."""

    @staticmethod
    def forward(ctx, y, lengths, *parameters):
        run: Any = kernels("kalman", y)
        p = Parameters(*parameters)
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
        ctx.kept = counts, run.Kept(flat.move, flat.read, states, found)
        ctx.full = full
        ctx.save_for_backward(y, lengths, *parameters)
        return value.view(lengths.shape).to(y.dtype)

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

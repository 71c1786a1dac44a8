"""Linear-Gaussian state-space models: evidence, filter, and posterior over state sequences."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions._kalman import (
    Conditionals,
    Filtered,
    Parameters,
    apply,
    conditionals,
    filtered,
    inside,
    log_evidence,
    spread,
    sweep,
)
from pyroelbo.distributions.checks import check_lengths, first_index, refuse_transforms
from pyroelbo.distributions.structured import cached_until_changed, independent_normal

__all__ = ["Filtered", "GaussianChain", "LinearGaussianChain"]


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
        return log_evidence(value, lengths, new.parameters, constant)

    def posterior(self, y: Tensor) -> GaussianChain:
        """p(z | y), a ``GaussianChain`` whose ``log_partition`` is ln p(y)."""
        new, y, lengths, constant = self._aligned(y)
        return GaussianChain(new.parameters, y, lengths, constant, validate_args=self._validate_args)

    def filter(self, y: Tensor) -> Filtered:
        """Filtered and predicted distributions of the states. Cost: O(T) steps."""
        new, y, _, _ = self._aligned(y)
        return filtered(new.parameters, y)[0]

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples ``[*sample, *B, T, O]``, differentiable in the parameters."""
        if self.num_steps is None:
            raise ValueError(
                "num_steps: expected the number of steps for sampling from a homogeneous chain, got None"
            )
        p, steps = self.parameters, self.num_steps
        shape = torch.Size(sample_shape) + self.batch_shape
        root = torch.linalg.cholesky(p.noise)
        z = [p.start + apply(torch.linalg.cholesky(p.spread), _normal(p.start, shape, p.start.shape[-1:]))]
        for t in range(steps - 1):
            u = min(t, p.move.shape[-3] - 1)
            shock = apply(
                root[..., min(t, root.shape[-3] - 1), :, :], _normal(p.start, shape, z[0].shape[-1:])
            )
            drift = p.drift[..., min(t, p.drift.shape[-2] - 1), :]
            z.append(apply(p.move[..., u, :, :], z[-1]) + drift + shock)
        noise = _normal(p.start, shape, (steps, self.event_shape[-1]))
        y = apply(p.read, torch.stack(z, -2)) + p.offset + apply(torch.linalg.cholesky(p.error), noise)
        return y if self.lengths is None else torch.where(inside(self.lengths, steps)[..., None], y, 0.0)

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
            value = torch.where(inside(lengths, steps)[..., None], value, 0.0)
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
        return log_evidence(self.y, self.lengths, self.parameters, self.constant)

    @cached_until_changed
    def _backward(self) -> Conditionals:
        return conditionals(self.parameters, self.y, self.lengths)

    def _run(self, shocks: Tensor) -> Tensor:
        within = inside(self.lengths, self.event_shape[0])[..., None]
        return torch.where(within, sweep(self._backward.gain, torch.where(within, shocks, 0.0)), 0.0)

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
        within = inside(self.lengths, self.event_shape[0])[..., None, None]
        return torch.where(within, spread(gain, own), 0.0)

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
        return self._run(shift + apply(torch.linalg.cholesky(covariance), noise))

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(z | y), ``[*sample, *B]``."""
        gain, shift, covariance = self._backward
        value = torch.where(inside(self.lengths, self.event_shape[0])[..., None], value, 0.0)
        ahead = torch.cat([value[..., 1:, :], torch.zeros_like(value[..., :1, :])], -2)
        each = MultivariateNormal(apply(gain, ahead) + shift, covariance, validate_args=False).log_prob(value)
        return torch.where(inside(self.lengths, self.event_shape[0]), each, 0.0).sum(-1)

    def entropy(self) -> Tensor:
        """H(p(z | y)), ``[*B]``."""
        each = MultivariateNormal(self._backward[1], self._backward[2], validate_args=False).entropy()
        return torch.where(inside(self.lengths, self.event_shape[0]), each, 0.0).sum(-1)


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


def _normal(like: Tensor, batch: Sequence[int], event: Sequence[int]) -> Tensor:
    return torch.randn((*batch, *event), dtype=like.dtype, device=like.device)

"""Linear chains and hidden Markov models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions._recursions import Problem, Solution, best_path, draw_paths, log_partition, solve
from pyroelbo.distributions.structured import (
    StructuredDistribution,
    check_finite_or_minus_inf,
    check_lengths,
)
from pyroelbo.semiring import Semiring

__all__ = ["ChainParts", "LinearChain"]


class ChainParts(NamedTuple):
    """The parts of a chain: first states, steps (from, to), and states at each time."""

    initial: Tensor
    transition: Tensor
    observation: Tensor


class LinearChain(StructuredDistribution):
    """p(z) = exp( initial[z_1] + Σ_{t<T} transition_t[z_t, z_{t+1}] + Σ_t observation_t[z_t] ) / Z.

    ``initial [*B,S]``, ``transition [*B,S,S]`` (from, to; the same at every step) or ``[*B,T-1,S,S]``, and
    ``observation [*B,T,S]``: unnormalized log potentials, -inf allowed; rank(*B) = initial.dim() - 1, and
    batch sizes broadcast. ``lengths [*B]`` shortens sequences: labels beyond are 0 in samples, ignored in
    ``log_prob``. Values are LongTensors ``[*B,T]``. Parts are a ``ChainParts`` in the potentials' shapes;
    with one transition matrix for all steps, its part is the (expected) count of each step.

    Cost: O(B·T·S²) time, O(B·T·S) memory, also for the gradient. Source: Rabiner (1989), Lafferty et al.
    (2001).
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        observation: Tensor,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch_rank = initial.dim() - 1
        steps, states = observation.shape[-2:]
        self.homogeneous = transition.dim() == batch_rank + 2
        step_shape = (states, states) if self.homogeneous else (steps - 1, states, states)
        if (
            observation.dim() != batch_rank + 2
            or initial.shape[-1] != states
            or transition.shape[batch_rank:] != step_shape
            or steps < 1
        ):
            raise ValueError(
                f"got initial {tuple(initial.shape)}, transition {tuple(transition.shape)}, observation "
                f"{tuple(observation.shape)}: they take [*B,S], [*B,S,S] or [*B,T-1,S,S], and [*B,T,S]"
            )
        shapes = [initial.shape[:-1], transition.shape[:batch_rank], observation.shape[:-2]]
        if lengths is not None:
            shapes.append(lengths.shape)
        batch_shape = torch.broadcast_shapes(*shapes)
        self._solution: Solution | None = None
        self.lengths = lengths if lengths is None else lengths.expand(batch_shape)
        super().__init__(
            ChainParts(initial, transition, observation), batch_shape, (steps,), validate_args=validate_args
        )
        if self._validate_args:
            check_finite_or_minus_inf(initial=initial, transition=transition, observation=observation)
            if lengths is not None:
                check_lengths(lengths, steps)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self._states - 1), 1)

    @property
    def _states(self) -> int:
        return self.potentials[0].shape[-1]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> LinearChain:
        new: Any = super().expand(batch_shape)
        new._solution = None
        if self.lengths is not None:
            new.lengths = self.lengths.expand(new.batch_shape)
        return new

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        initial, transition, observation = parts
        alpha = semiring.mul(initial, observation[..., 0, :])
        for t in range(1, self.event_shape[0]):
            step = transition if self.homogeneous else transition[..., t - 1, :, :]
            moved = semiring.mul(semiring.dot(alpha.unsqueeze(-1), step, -2), observation[..., t, :])
            alpha = (
                moved if self.lengths is None else torch.where((t < self.lengths)[..., None], moved, alpha)
            )
        return semiring.sum(alpha, -1)

    # ---- the fast recursions, in flat shapes

    def _flat(self, parts: tuple[Tensor, ...]) -> Problem:
        rank, rows = len(self.batch_shape), self.batch_shape.numel()

        def flat(x: Tensor, whole: bool = False) -> Tensor:
            event = x.shape[rank:]
            if not whole and x.shape[:rank].numel() == 1:
                return x.reshape(1, *event)
            return x.expand(*self.batch_shape, *event).reshape(rows, *event)

        initial, transition, observation = parts
        if self.homogeneous:
            transition = transition.unsqueeze(-3)
        if self.lengths is None:
            lengths = torch.full((rows,), self.event_shape[0], device=observation.device)
        else:
            lengths = self.lengths.reshape(rows)
        return Problem(flat(initial), flat(transition), flat(observation, whole=True), lengths)

    def _log_partition(self, parts: tuple[Tensor, ...]) -> Tensor:
        solution = self._solution if parts is self.potentials else None
        return log_partition(self._flat(parts), solution).reshape(self.batch_shape)

    def _mode(self) -> Tensor:
        return best_path(self._flat(self.potentials)).reshape(self.batch_shape + self.event_shape)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        if self._solution is None:
            self._solution = solve(self._flat(self.potentials), keep=True)
        flat = (sample_shape.numel(), self.batch_shape.numel(), *self.event_shape)
        uniform = torch.rand(flat, dtype=torch.float64, device=self.potentials[0].device)
        return draw_paths(self._solution, uniform).reshape(self._extended_shape(sample_shape))

    def _inside(self, like: Tensor) -> Tensor:
        """[*B, T] ones where a step lies within its sequence."""
        time = torch.arange(self.event_shape[0], device=like.device)
        if self.lengths is None:
            return torch.ones_like(time, dtype=like.dtype)
        return (time < self.lengths.unsqueeze(-1)).to(like.dtype)

    def to_parts(self, z: Tensor) -> ChainParts:
        dtype, states = self.potentials[0].dtype, self._states
        at = F.one_hot(z, states).to(dtype) * self._inside(self.potentials[0])[..., None]
        if self.homogeneous:
            moves = at[..., :-1, :].transpose(-1, -2) @ at[..., 1:, :]
        else:
            moves = at[..., :-1, :, None] * at[..., 1:, None, :]
        return ChainParts(at[..., 0, :], moves, at)

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[2].argmax(-1)

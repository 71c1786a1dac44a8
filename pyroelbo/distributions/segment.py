"""Semi-Markov chains: segments with durations."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions.checks import check_finite_or_minus_inf, check_lengths
from pyroelbo.distributions.semiring import Semiring
from pyroelbo.distributions.structured import StructuredDistribution, batch_shape

__all__ = ["SegmentParts", "SemiMarkov"]


class SegmentParts(NamedTuple):
    """Parts of a segmentation: first state, transitions, durations, states, and segment starts."""

    initial: Tensor
    transition: Tensor
    duration: Tensor
    observation: Tensor
    start: Tensor


class SemiMarkov(StructuredDistribution):
    """Sequences cut into segments of one state and at most D steps each, with

    p(z) ∝ exp( initial[s_1] + Σ_k transition[s_k, s_{k+1}] + Σ_k duration[s_k, d_k - 1]
                + Σ_t observation[t, state at t] + Σ_k start[time where k starts, s_k] ).

    ``initial [*B,S]``, ``transition [*B,S,S]`` (from, to; a segment may be followed by one of the same state
    unless it is -inf), ``duration [*B,S,D]``, ``observation [*B,T,S]``, ``start [*B,T,S]`` (zero where not
    given; its marginals are the probabilities of boundaries): unnormalized log potentials; rank(*B) =
    initial.dim() - 1, and batch sizes broadcast. ``lengths [*B]`` shortens sequences. Values are LongTensors
    ``[*B,T]`` in 0..2S-1: the state, plus S where a segment starts; 0 beyond the length. Parts are
    ``SegmentParts`` in the potentials' shapes.

    Cost: O(B·T·S·(S + D)). Source: Sarawagi and Cohen (2004); Yu (2010) for the recursion over ages.
    """

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        duration: Tensor,
        observation: Tensor,
        start: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        rank = initial.dim() - 1
        states, steps = initial.shape[-1], (0, 0, *observation.shape)[-2]
        if start is None:
            start = torch.zeros((), dtype=observation.dtype, device=observation.device).expand(
                observation.shape
            )
        if (
            transition.shape[rank:] != (states, states)
            or duration.shape[rank:-1] != (states,)
            or observation.shape[rank:] != (steps, states)
            or start.shape[rank:] != (steps, states)
            or 0 in (steps, states, duration.shape[-1])
        ):
            shapes = [tuple(x.shape) for x in (initial, transition, duration, observation, start)]
            raise ValueError(
                "initial, transition, duration, observation, start: expected shapes [*B,S], [*B,S,S], "
                "[*B,S,D], "
                "[*B,T,S] and [*B,T,S], got {}, {}, {}, {} and {}".format(*shapes)
            )
        parts = SegmentParts(initial, transition, duration, observation, start)
        batch = batch_shape(rank, [x.shape[:rank] for x in parts], lengths)
        self.lengths = None if lengths is None else lengths.expand(batch)
        super().__init__(parts, batch, (steps,), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(**parts._asdict())
        if lengths is not None:
            check_lengths(lengths, steps)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, 2 * self._states - 1), 1)

    @property
    def _states(self) -> int:
        return self.potentials[0].shape[-1]

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        initial, transition, duration, observation, start = parts
        longest = duration.shape[-1]
        lasting = duration.transpose(-1, -2)
        total: Tensor | None = None
        entering, aged = initial, None
        for t in range(self.event_shape[0]):
            # aged[..., d, s]: all prefixes whose running segment, of state s, started d steps ago
            young = semiring.mul(entering, start[..., t, :]).unsqueeze(-2)
            if aged is not None:
                young, older = _align(young, aged[..., : longest - 1, :])
                young = torch.cat([young, older], -2)
            aged = semiring.mul(young, observation[..., t, None, :])
            ended = semiring.dot(aged, lasting[..., : aged.shape[-2], :], -2)
            if total is None or self.lengths is None:
                total = ended
            else:
                total = torch.where((t < self.lengths).unsqueeze(-1), ended, total)
            entering = semiring.dot(ended.unsqueeze(-1), transition, -2)
        assert total is not None
        return semiring.sum(total, -1)

    def _ages(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which steps are within ``lengths``, which start a segment, and the age of the running segment."""
        time = torch.arange(self.event_shape[0], device=z.device)
        inside = time < (self.event_shape[0] if self.lengths is None else self.lengths.unsqueeze(-1))
        begins = (z >= self._states) & inside
        return inside, begins, time - torch.where(begins, time, -1).cummax(-1).values

    def to_parts(self, z: Tensor) -> SegmentParts:
        like, longest = self.potentials[0], self.potentials[2].shape[-1]
        inside, begins, age = self._ages(z)
        state = F.one_hot(z % self._states, self._states).to(like.dtype) * inside.unsqueeze(-1)
        starts = state * begins.unsqueeze(-1)
        moves = state[..., :-1, :].transpose(-1, -2) @ starts[..., 1:, :]
        beyond = F.pad(begins | ~inside, (0, 1), value=True)[..., 1:]
        ends = (beyond & inside).to(like.dtype)
        spans = F.one_hot(age.clamp(0, longest - 1), longest).to(like.dtype) * ends.unsqueeze(-1)
        return SegmentParts(starts[..., 0, :], moves, state.transpose(-1, -2) @ spans, state, starts)

    def log_weight(self, value: Tensor) -> Tensor:
        """The unnormalized log weight; -inf unless the labels are segments of at most D steps each."""
        inside, begins, age = self._ages(value)
        state = value % self._states
        broken = (state[..., 1:] != state[..., :-1]) & ~begins[..., 1:] & inside[..., 1:]
        late = (age >= self.potentials[2].shape[-1]) & inside
        broken = broken.any(-1) | late.any(-1) | ~begins[..., 0]
        return torch.where(broken, -math.inf, super().log_weight(value))

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        state, starts = parts[3], parts[4]
        return state.argmax(-1) + self._states * (starts.sum(-1) > 0.5).long()


def _align(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast the leading dimensions, so that both can be concatenated along -2."""
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return a.expand(*lead, *a.shape[-2:]), b.expand(*lead, *b.shape[-2:])

"""Linear chains and hidden Markov models."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions._forward_backward import (
    Problem,
    Solution,
    best_path,
    draw_paths,
    expectations,
    log_partition,
    smoothed,
    solve,
)
from pyroelbo.distributions.checks import (
    check_finite_or_minus_inf,
    check_lengths,
    first_index,
    refuse_outside,
    refuse_transforms,
)
from pyroelbo.distributions.semiring import Semiring
from pyroelbo.distributions.structured import (
    StructuredDistribution,
    any_support,
    batch_shape,
    log_prob_within,
    versions,
    within_support,
)
from pyroelbo.numerics import log_softmax, logsumexp
from pyroelbo.pair import Stepwise

__all__ = ["HMM", "ChainParts", "LinearChain"]


class ChainParts(NamedTuple):
    """Parts of a chain: first state, transitions (from, to), and the state at each step."""

    initial: Tensor
    transition: Tensor
    observation: Tensor


class LinearChain(StructuredDistribution):
    """p(z) = exp( initial[z_1] + Σ_{t<T} transition_t[z_t, z_{t+1}] + Σ_t observation_t[z_t] ) / Z.

    ``initial [*B,S]``, ``transition [*B,S,S]`` (from, to; the same at every step) or ``[*B,T-1,S,S]``, and
    ``observation [*B,T,S]``: unnormalized log potentials, -inf allowed; rank(*B) = initial.dim() - 1, and
    batch sizes broadcast. ``lengths [*B]`` are those of padded sequences: labels in the padding are 0 in
    samples and ignored in ``log_prob``. Values are LongTensors ``[*B,T]``. Parts are a ``ChainParts`` in the
    potentials' shapes; with one transition matrix for all steps, its part is the (expected) count of each
    transition.

    Cost: O(B·T·S²) time, O(B·T·S) memory, also for the gradient. Source: Rabiner (1989), Lafferty et al.
    (2001).
    """

    free_labels = True

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        observation: Tensor,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        batch_rank = initial.dim() - 1
        steps, states = (0, 0, *observation.shape)[-2:]
        self.homogeneous = transition.dim() == batch_rank + 2
        step_shape = (states, states) if self.homogeneous else (steps - 1, states, states)
        if (
            observation.dim() != batch_rank + 2
            or initial.shape[-1] != states
            or transition.shape[batch_rank:] != step_shape
            or not steps
            or not states
        ):
            raise ValueError(
                "initial, transition, observation: expected shapes [*B,S], [*B,S,S] or [*B,T-1,S,S], and "
                "[*B,T,S], got "
                f"{tuple(initial.shape)}, {tuple(transition.shape)} and {tuple(observation.shape)}; "
                f"potentials shared "
                "by the batch have batch size 1, as transition[None]"
            )
        refuse_transforms(initial=initial, transition=transition, observation=observation)
        shapes = initial.shape[:-1], transition.shape[:batch_rank], observation.shape[:-2]
        batch = batch_shape(batch_rank, shapes, lengths)
        self._solution: Solution | None = None
        self._solved_at: tuple[int, ...] | None = None
        self.lengths = lengths if lengths is None else lengths.expand(batch)
        super().__init__(
            ChainParts(initial, transition, observation), batch, (steps,), validate_args=validate_args
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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_solution": None}

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

    # ---- fast recursions, in flat shapes

    def _flat(self, parts: tuple[Tensor, ...]) -> Problem:
        rank, rows = len(self._batch_shape), self._batch_shape.numel()

        def flat(x: Tensor, whole: bool = False) -> Tensor:
            if rank == 1 and (not whole or x.shape[0] == rows):
                return x
            event = x.shape[rank:]
            if not whole and x.shape[:rank].numel() == 1:
                return x.reshape(1, *event)
            return x.expand(*self.batch_shape, *event).reshape(rows, *event)

        initial, transition, observation = parts
        if initial.dtype != observation.dtype or transition.dtype != observation.dtype:
            wide = torch.promote_types(
                torch.promote_types(initial.dtype, transition.dtype), observation.dtype
            )
            initial, transition, observation = initial.to(wide), transition.to(wide), observation.to(wide)
        if self.homogeneous:
            transition = transition.unsqueeze(-3)
        if self.lengths is None:
            lengths = torch.full((rows,), self.event_shape[0], device=observation.device)
        else:
            lengths = self.lengths.reshape(rows).long().contiguous()
        return Problem(flat(initial), flat(transition), flat(observation, whole=True), lengths)

    def _log_partition(self, parts: tuple[Tensor, ...]) -> Tensor:
        solution = self._kept_solution() if parts is self.potentials else None
        value = log_partition(self._flat(parts), solution)
        return value if len(self._batch_shape) == 1 else value.view(self._batch_shape)

    def _kept_solution(self) -> Solution | None:
        """The forward pass that sampling has kept, unless potentials have changed since."""
        solved_at = self._solved_at
        return self._solution if solved_at and solved_at == versions(*self.potentials) else None

    def _kept(self) -> Solution:
        solution = self._kept_solution()
        if solution is None:
            self._solution = solution = solve(self._flat(self.potentials), keep=True)
            self._solved_at = versions(*self.potentials)
        return solution

    def _marginals(self) -> ChainParts:
        parts = self._full(self.potentials)
        full = self._flat(parts)
        kept = self._kept_solution()
        found = smoothed(full) if kept is None else expectations(full, kept.passes, None)
        return ChainParts(*(x.view(y.shape) for x, y in zip(found, parts, strict=True)))

    def _mode(self) -> Tensor:
        return best_path(self._flat(self.potentials)).reshape(self.batch_shape + self.event_shape)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        flat = (sample_shape.numel(), self.batch_shape.numel(), *self.event_shape)
        uniform = torch.rand(flat, dtype=torch.float64, device=self.potentials[0].device)
        return draw_paths(self._kept(), uniform).reshape(self._extended_shape(sample_shape))

    def conditionals(self) -> tuple[Tensor, Tensor]:
        """ln p(z_1) [*B,S] and ln p(z_{t+1} | z_t) [*B,T-1,S,S] (from, to). Rows of states that no path
        visits, and
        rows in the padding, are meaningless. Cost: one backward pass."""
        initial, transition, observation = self._full(self.potentials)
        after = torch.zeros_like(observation[..., 0, :])
        rows = []
        for t in range(self.event_shape[0] - 1, 0, -1):
            step = transition if self.homogeneous else transition[..., t - 1, :, :]
            joint = step + (observation[..., t, :] + after).unsqueeze(-2)
            rows.append(log_softmax(joint))
            before = logsumexp(joint, -1)
            if self.lengths is not None:
                before = torch.where((t < self.lengths).unsqueeze(-1), before, torch.zeros_like(before))
            after = before
        states = self._states
        moves = (
            torch.stack(rows[::-1], -3) if rows else initial.new_zeros(*self.batch_shape, 0, states, states)
        )
        return log_softmax(initial + observation[..., 0, :] + after), moves

    def stepwise(self) -> Stepwise | None:
        """The path state by state, without ``lengths``; None with them."""
        if self.lengths is not None:
            return None
        rows = self.batch_shape.numel()
        first, moves = (x.reshape(rows, *x.shape[len(self.batch_shape) :]) for x in self.conditionals())
        every = torch.arange(rows, device=first.device)

        def logits(state: tuple[int, Tensor | None]) -> Tensor:
            place, z = state
            return first if z is None else moves[every, place - 1, z]

        return Stepwise(
            lambda n: (0, None),
            lambda state: Categorical(logits=logits(state)),
            lambda state, z: (state[0] + 1, z),
        )

    def _inside(self, like: Tensor) -> Tensor:
        """[*B, T], 1 for steps within ``lengths`` and 0 in the padding."""
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


class HMM(TorchDistribution):
    """A hidden Markov model: p(y) = Σ_z p(z_1) Π_t p(z_{t+1} | z_t) Π_t p(y_t | z_t).

    ``initial [*B,S]``, ``transition [*B,S,S]`` (from, to) or ``[*B,T-1,S,S]`` are logits, normalized inside
    over the last dimension; -inf is allowed, except for a whole row. ``emission`` is any Pyro distribution of
    batch shape ``[*B,S]``, or ``[*B,T,S]`` if it varies in time; vector observations need ``.to_event``.
    Values are ``[*B,T,*event]``. ``lengths [*B]`` are those of padded sequences: the padding is ignored, and
    zero in samples. A value outside the support of one state has log probability -inf there; outside that of
    all states it is an error. A step with a NaN is missing, and summed over. Sampling needs ``num_steps``, or
    a transition or an emission that varies in time.

    ``log_prob(y)`` is the evidence, and ``posterior(y)`` the chain of states given y, whose log partition it
    is.
    Cost: O(B·T·S²) time, O(B·T·S) memory, also for the gradient; sampling draws all S emissions at each step.
    Source: Rabiner (1989).

    Args:
        initial: logits of the first state, ``[*B,S]``.
        transition: logits (from, to), ``[*B,S,S]`` or ``[*B,T-1,S,S]``.
        emission: a distribution of batch shape ``[*B,S]`` or ``[*B,T,S]``.
        num_steps: T; needed only for sampling from a homogeneous chain.
        lengths: LongTensor ``[*B]`` of values in 1..T.
        validate_args: whether to check the arguments' values.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        emission: Any,
        num_steps: int | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not hasattr(emission, "log_prob"):
            raise ValueError(
                f"emission: expected a distribution of batch shape [*B,S], got a {type(emission).__name__}"
            )
        if lengths is not None and not isinstance(lengths, Tensor):
            raise ValueError(f"lengths: expected a LongTensor [*B], got a {type(lengths).__name__}")
        refuse_transforms(initial=initial, transition=transition)
        rank, states = initial.dim() - 1, initial.shape[-1]
        homogeneous = transition.dim() == rank + 2
        rest = len(emission.batch_shape) - rank
        if (
            transition.shape[-2:] != (states, states)
            or not (homogeneous or transition.dim() == rank + 3)
            or rest not in (1, 2)
            or emission.batch_shape[-1] != states
        ):
            raise ValueError(
                "initial, transition, emission: expected [*B,S], [*B,S,S] or [*B,T-1,S,S], and batch shape "
                "[*B,S] or "
                f"[*B,T,S], got {tuple(initial.shape)}, {tuple(transition.shape)} and "
                f"{tuple(emission.batch_shape)}"
            )
        extra = 0 if lengths is None else max(0, lengths.dim() - rank)
        if extra:
            initial, transition, emission = _lead(extra, initial, transition, emission)
            rank += extra
        known = {} if num_steps is None else {"num_steps": num_steps}
        if not homogeneous:
            known["transition"] = transition.shape[rank] + 1
        if rest == 2:
            known["emission"] = emission.batch_shape[rank]
        if len(set(known.values())) > 1:
            raise ValueError(f"num_steps: expected the same number of steps everywhere, got {known}")
        self.num_steps = next(iter(known.values()), None)
        self.initial, self.transition, self.emission = initial, transition, emission
        shapes = [initial.shape[:rank], transition.shape[:rank], emission.batch_shape[:rank]]
        batch_shape = torch.broadcast_shapes(*shapes, *([] if lengths is None else [lengths.shape]))
        self.lengths = None if lengths is None else lengths.expand(batch_shape)
        # size one means "any" when torch checks the shape of a value
        event_shape = (self.num_steps or 1, *emission.event_shape)
        super().__init__(batch_shape, torch.Size(event_shape), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(initial=initial, transition=transition)
            for name, logits in (("initial", initial), ("transition", transition)):
                empty = (logits == -math.inf).all(-1)
                if empty.any():
                    raise ValueError(
                        f"{name}: expected a finite logit in every row, got -inf throughout row "
                        f"{first_index(empty)}"
                    )
        if lengths is not None and self.num_steps is not None:
            check_lengths(lengths, self.num_steps)

    @property
    def support(self) -> Any:
        return constraints.independent(any_support(self.emission), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> HMM:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        extra = len(new._batch_shape) - len(self.batch_shape)
        new.initial, new.transition, new.emission = _lead(extra, self.initial, self.transition, self.emission)
        if self.lengths is not None:
            new.lengths = self.lengths.expand(new._batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """The evidence ln p(y), ``[*sample, *B]``. Sequences of similar ``lengths`` are computed together,
        without the padding of longer ones.
        """
        steps = self._check_value(value)
        buckets = self._buckets(value, steps)
        if len(buckets) < 2:
            return self.posterior(value).log_partition
        found = [self._rows(rows, longest).log_prob(value[rows, :longest]) for rows, longest in buckets]
        order = torch.cat([rows for rows, _ in buckets])
        return torch.cat(found)[order.argsort()]

    def _buckets(self, value: Tensor, steps: int) -> list[tuple[Tensor, int]]:
        """Rows to be computed together, each with their largest length; none if one bucket does as well."""
        lengths, rank = self.lengths, len(self.batch_shape)
        shared = all(n == 1 for n in self.emission.batch_shape[:-1])
        if lengths is None or rank != 1 or not shared or value.shape[:1] != self.batch_shape:
            return []
        if value.dim() != 1 + len(self.event_shape):
            return []
        check_lengths(lengths, steps)
        sorted_lengths, order = lengths.sort(descending=True)
        ends, known = [], sorted_lengths.tolist()
        longest = known[0] if known else 0
        for i, length in enumerate(known):
            # a bucket costs some hundred microseconds: about what the padding of so many numbers does
            if length < 0.8 * longest and (longest - length) * (len(known) - i) * self._states > 1 << 14:
                ends.append(i)
                longest = length
        starts = [0, *ends]
        parts = order.tensor_split(ends)
        return [(rows, known[start]) for rows, start in zip(parts, starts, strict=True) if len(rows)]

    def _rows(self, rows: Tensor, longest: int) -> HMM:
        """The distribution of some rows of the batch, cut to ``longest`` steps."""
        assert self.lengths is not None

        def pick(x: Tensor) -> Tensor:
            x = x if x.shape[0] == 1 else x[rows]
            return x[:, : longest - 1] if x.dim() == 4 else x

        initial, transition = pick(self.initial), pick(self.transition)
        return HMM(initial, transition, self.emission, longest, self.lengths[rows], self._validate_args)

    def posterior(self, value: Tensor) -> LinearChain:
        """p(z | y), a ``LinearChain`` over state sequences whose ``log_partition`` is ln p(y)."""
        steps = self._check_value(value)
        own = value.shape[: value.dim() - len(self.event_shape)]
        value = value.reshape((1,) * (len(self.batch_shape) - len(own)) + value.shape)
        observation = self._observation(value)
        pad = (1,) * (observation.dim() - 2 - len(self.batch_shape))
        initial, transition = _normalize(self.initial), _normalize(self.transition)
        lengths = self.lengths
        if lengths is not None:
            check_lengths(lengths, steps)
        if self._validate_args:
            check_finite_or_minus_inf(**{"the emission's log probability of y": observation})
        chain = LinearChain(
            initial.reshape(pad + initial.shape),
            transition.reshape(pad + transition.shape),
            observation,
            lengths if lengths is None else lengths.reshape(pad + lengths.shape),
            validate_args=False,
        )
        chain._validate_args = self._validate_args
        return chain.expand(torch.broadcast_shapes(observation.shape[:-2], self.batch_shape))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples ``[*sample, *B, T, *event]``."""
        with torch.no_grad():
            z = self.prior.sample(sample_shape)
            rank, event = len(self.batch_shape), len(self.emission.event_shape)
            varying = len(self.emission.batch_shape) - rank == 2
            lead = self.emission.batch_shape[rank:]
            emission = self.emission.expand((*self.batch_shape, *lead))
            if varying:
                every = emission.sample(torch.Size(sample_shape))
            else:
                every = emission.sample(torch.Size((*sample_shape, z.shape[-1])))
                every = every.movedim(len(sample_shape), len(sample_shape) + rank)
            index = z.reshape(*z.shape, 1, *(1,) * event)
            index = index.expand(*z.shape, 1, *every.shape[z.dim() + 1 :])
            y = every.gather(z.dim(), index).squeeze(z.dim())
            if self.lengths is not None:
                inside = torch.arange(z.shape[-1], device=z.device) < self.lengths.unsqueeze(-1)
                y = torch.where(inside.reshape(inside.shape + (1,) * event), y, torch.zeros_like(y))
            return y

    @property
    def prior(self) -> LinearChain:
        """p(z): the chain of states without observations."""
        if self.num_steps is None:
            raise ValueError(
                "num_steps: expected the number of steps for sampling from a homogeneous HMM, got None"
            )
        initial = _normalize(self.initial)
        flat = initial.new_zeros(()).expand(*initial.shape[:-1], self.num_steps, initial.shape[-1])
        chain = LinearChain(initial, _normalize(self.transition), flat, self.lengths, self._validate_args)
        return chain.expand(self.batch_shape)

    def _check_value(self, value: Tensor) -> int:
        axis = -len(self.event_shape)
        if value.dim() < -axis or value.shape[value.dim() + axis + 1 :] != self.emission.event_shape:
            raise ValueError(
                f"y: expected shape [*B,T] and then {tuple(self.event_shape[1:])}, got {tuple(value.shape)}"
            )
        steps = value.shape[axis]
        if self.num_steps is not None and steps != self.num_steps:
            raise ValueError(f"y: expected {self.num_steps} steps, got {steps} in shape {tuple(value.shape)}")
        if steps == 0:
            raise ValueError(f"y: expected at least one step, got shape {tuple(value.shape)}")
        return steps

    def _observation(self, value: Tensor) -> Tensor:
        """ln p(y_t | state), ``[*sample, *B, T, S]``; zero for missing steps and in the padding."""
        event = len(self.emission.event_shape)
        skipped: Tensor | None = None
        if value.is_floating_point():
            skipped = value.isnan()
            skipped = skipped.flatten(value.dim() - event).any(-1) if event else skipped
        if self.lengths is not None:
            outside = torch.arange(value.shape[-1 - event], device=value.device) >= self.lengths.unsqueeze(-1)
            skipped = outside if skipped is None else skipped | outside
        if skipped is not None and not bool(skipped.any()):
            skipped = None
        if skipped is not None:
            shape = torch.broadcast_shapes(skipped.shape, value.shape[: value.dim() - event])
            skipped = skipped.expand(shape)
            value = value.expand(shape + value.shape[value.dim() - event :])
            packed = self._packed(value, skipped)
            if packed is not None:
                return packed
            present = value[~skipped]
            stand_in = present[0] if len(present) else self.emission.sample().flatten(0, -1 - event)[0]
            value = torch.where(skipped.reshape(shape + (1,) * event), stand_in.to(value.dtype), value)
        result = self._emission_log_prob(value, skipped)
        return result if skipped is None else torch.where(skipped.unsqueeze(-1), 0.0, result)

    def _packed(self, value: Tensor, skipped: Tensor) -> Tensor | None:
        """``_observation`` computed for the present steps alone; None unless all share one emission."""
        event = len(self.emission.event_shape)
        if any(n > 1 for n in self.emission.batch_shape[:-1]) or bool(skipped.all()):
            return None
        present = value[~skipped]
        each = present.unsqueeze(-1 - event)
        if self._validate_args and within_support(self.emission, each) is not None:
            return None
        found = _by_products(self.emission, present)
        found = log_prob_within(self.emission, each, None) if found is None else found
        found = found.reshape(-1, self._states)
        return found.new_zeros(*skipped.shape, self._states).index_put((~skipped,), found)

    @property
    def _states(self) -> int:
        return self.initial.shape[-1]

    def _emission_log_prob(self, value: Tensor, skipped: Tensor | None) -> Tensor:
        event, rank = len(self.emission.event_shape), len(self.batch_shape)
        homogeneous = len(self.emission.batch_shape) == rank + 1
        # time becomes a sample dimension, at the front
        moved = homogeneous and rank > 0
        each = (value.movedim(value.dim() - event - 1, 0) if moved else value).unsqueeze(-1 - event)
        good = within_support(self.emission, each) if self._validate_args else None
        if good is not None:
            bad = ~good.any(-1)
            bad = bad.movedim(0, -1) if moved else bad
            bad = bad if skipped is None else bad & ~skipped
            refuse_outside(value, bad, event, "the emission's support")
        products = _by_products(self.emission, value) if homogeneous and good is None else None
        if products is not None:
            return products
        result = log_prob_within(self.emission, each, good)
        return result.movedim(0, -2) if moved else result


def _by_products(emission: Any, value: Tensor) -> Tensor | None:
    """ln p(y_t | state) as a matrix product, for vectors of D Bernoulli or Poisson variables of batch shape
    [*B,S]; None for other emissions. Needs D times less memory than ``log_prob``.
    """
    base = getattr(emission, "base_dist", None)
    if len(emission.event_shape) != 1:
        return None
    if isinstance(base, torch.distributions.Bernoulli):
        slope = base.logits
        constant, own = F.logsigmoid(-slope), None
    elif isinstance(base, torch.distributions.Poisson):
        slope = base.rate.log()
        constant, own = -base.rate, torch.lgamma(value + 1).sum(-1, keepdim=True)
    else:
        return None
    if not bool(slope.detach().isfinite().all()):
        return None
    total = value.to(slope.dtype) @ slope.mT + constant.sum(-1).unsqueeze(-2)
    return total if own is None else total - own


def _lead(extra: int, initial: Tensor, transition: Tensor, emission: Any) -> tuple[Tensor, Tensor, Any]:
    """All three with ``extra`` leading batch dimensions of size one."""
    pad = (1,) * extra
    return (
        initial.reshape(pad + initial.shape),
        transition.reshape(pad + transition.shape),
        emission.expand(pad + emission.batch_shape) if extra else emission,
    )


def _normalize(logits: Tensor) -> Tensor:
    """Log softmax over the last dimension; a row of -inf stays -inf."""
    total = logsumexp(logits, -1, keepdim=True)
    return logits - torch.where(total == -math.inf, torch.zeros_like(total), total)

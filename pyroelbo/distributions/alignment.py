"""Connectionist temporal classification: the sum over all alignments of a target with its input."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions.checks import (
    check_finite_or_minus_inf,
    check_index,
    check_lengths,
    first_index,
    refuse_transforms,
)
from pyroelbo.distributions.grammar import check_padded, without_padding
from pyroelbo.distributions.kernels.dispatch import kernels
from pyroelbo.distributions.semiring import Log, Semiring, choose
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.distributions.structured import batch_shape as shape_of

__all__ = ["CTC", "Alignment", "AlignmentParts"]


class AlignmentParts(NamedTuple):
    """Parts of an alignment: the symbol at each frame."""

    emission: Tensor


class Alignment(StructuredDistribution):
    """p(z) = exp( Σ_t emission_t[z_t] ) / Z over paths z that collapse to ``target``: repeats are merged,
    then blanks removed.

    ``emission [*B,T,C]``: log potentials, -inf allowed; ``target [*B,L]``, padded with -1; ``lengths [*B]``
    of the inputs; rank(*B) = emission.dim() - 2, batch sizes broadcast. Values are LongTensors ``[*B,T]``,
    the symbol of each frame (0 and ignored beyond ``lengths``). The marginals are each frame's distribution
    over symbols.

    Cost: O(B·T·L) time and memory. Source: Graves et al. (2006), *Connectionist temporal classification*.
    """

    lengths: Tensor

    def __init__(
        self,
        emission: Tensor,
        target: Tensor,
        lengths: Tensor | None = None,
        blank: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        refuse_transforms(emission=emission)
        steps = emission.shape[-2]
        batch_shape = torch.broadcast_shapes(emission.shape[:-2], target.shape[:-1])
        if lengths is None:
            lengths = torch.full(batch_shape, steps, device=emission.device)
        batch_shape = torch.broadcast_shapes(batch_shape, lengths.shape)
        if len(batch_shape) != emission.dim() - 2:
            raise ValueError(
                "emission, target, lengths: expected shapes [*B,T,C], [*B,L] and [*B] with the same number "
                "of batch "
                f"dimensions, got {tuple(emission.shape)}, {tuple(target.shape)} and {tuple(lengths.shape)}"
            )
        self.blank = blank
        target = target if target.shape[-1] else F.pad(target, (0, 1), value=-1)
        self.target = target.expand(*batch_shape, target.shape[-1])
        self.lengths = lengths.expand(batch_shape)
        super().__init__(AlignmentParts(emission), batch_shape, (steps,), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(emission=emission)
            check_lengths(lengths, steps)

    @property
    def support(self) -> Any:
        symbols = self.potentials[0].shape[-1]
        return constraints.independent(constraints.integer_interval(0, symbols - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Alignment:
        new: Any = super().expand(batch_shape)
        new.target = self.target.expand(*new.batch_shape, self.target.shape[-1])
        return new

    def _frame(self) -> dict[str, Tensor]:
        own = {"target": without_padding(self.target), "blank": torch.tensor(self.blank)}
        return {**super()._frame(), **own}

    def _lattice(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Symbols of the 2L+1 states [*B,S], and ln 0 or ln 1 for entering a state over the blank before it,
        and for ending in it.
        """
        check_lengths(self.lengths, self.event_shape[0])
        check_index("y", self.target, -1, self.potentials[0].shape[-1] - 1)
        count = (self.target >= 0).sum(-1, keepdim=True)
        shape = self.target.shape[:-1]
        symbol = torch.full((*shape, 2 * self.target.shape[-1] + 1), self.blank, device=self.target.device)
        symbol[..., 1::2] = torch.where(self.target >= 0, self.target, self.blank)
        state = torch.arange(symbol.shape[-1], device=symbol.device)
        skip = F.pad(symbol[..., 2:] != symbol[..., :-2], (2, 0)) & (state % 2 == 1)
        end = (state == 2 * count) | (state == 2 * count - 1)
        return symbol, _log_indicator(skip, dtype), _log_indicator(end, dtype)

    def _at_states(self, emission: Tensor, symbol: Tensor) -> Tensor:
        symbol = symbol.unsqueeze(-2)
        shape = torch.broadcast_shapes(emission.shape[:-1], (*symbol.shape[:-2], self.event_shape[0]))
        return emission.expand(*shape, -1).gather(-1, symbol.expand(*shape, symbol.shape[-1]))

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        symbol, skip, end = self._lattice(parts[0].dtype)
        states = torch.arange(end.shape[-1], device=end.device)
        move, start = (
            semiring.lift(_log_indicator(x, end.dtype).expand_as(end)) for x in (states > 0, states < 2)
        )
        skip, end = semiring.lift(skip), semiring.lift(end)
        emission = self._at_states(parts[0], symbol)
        alpha = semiring.mul(start, emission[..., 0, :])
        for t in range(1, self.event_shape[0]):
            ways = [alpha, semiring.mul(alpha.roll(1, -1), move), semiring.mul(alpha.roll(2, -1), skip)]
            moved = semiring.mul(semiring.sum(torch.stack(ways, -1), -1), emission[..., t, :])
            alpha = torch.where((t < self.lengths)[..., None], moved, alpha)
        return semiring.sum(semiring.mul(alpha, end), -1)

    def to_parts(self, z: Tensor) -> AlignmentParts:
        emission = self.potentials[0]
        symbols = emission.shape[-1]
        used = F.one_hot(z.clamp(0, symbols - 1), symbols).to(emission.dtype)
        return AlignmentParts(used * self._within[..., None])

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0].argmax(-1)

    def log_weight(self, value: Tensor) -> Tensor:
        """The unnormalized log weight of a path; -inf if it does not collapse to the target."""
        given, wanted = collapse(value, self._within, self.blank), self.target
        width = max(given.shape[-1], wanted.shape[-1])
        given, wanted = (F.pad(x, (0, width - x.shape[-1]), value=-1) for x in (given, wanted))
        return torch.where((given == wanted).all(-1), super().log_weight(value), -math.inf)

    @property
    def _within(self) -> Tensor:
        return torch.arange(self.event_shape[0], device=self.lengths.device) < self.lengths[..., None]

    # ---- fast versions

    def _log_partition(self, parts: tuple[Tensor, ...]) -> Tensor:
        (emission,) = parts
        emission = emission.expand(*self.batch_shape, *emission.shape[-2:])
        return _LogPartition.apply(emission, self, lambda x: self._answer((x,), Log()))

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        """Backward sampling: each step in proportion to the forward weights."""
        symbol, skip, end = self._lattice(torch.float64)
        alpha = _alpha(self._at_states(self.potentials[0].detach().double(), symbol), skip)
        shape = sample_shape + self.batch_shape
        rows = [
            torch.arange(n, device=end.device).view(-1, *(1,) * (len(shape) - 1 - d))
            for d, n in enumerate(shape)
        ][len(sample_shape) :]
        z = torch.zeros(*shape, self.event_shape[0], dtype=torch.long, device=end.device)
        state = torch.zeros(shape, dtype=torch.long, device=end.device)
        for t in range(self.event_shape[0] - 1, -1, -1):
            # a move of 0, 1 or 2 states; the last frame chooses any that ends
            sources = [(*rows, torch.full_like(state, t), (state - d).clamp(min=0)) for d in range(3)]
            ways = torch.stack([alpha[source] for source in sources], -1)
            ways[..., 1] += _log_indicator(state > 0, ways.dtype)
            at = (*rows, state)
            ways[..., 2] += skip[at]
            before = state - choose(ways, torch.rand(shape, dtype=ways.dtype, device=end.device))
            last = (alpha[..., t, :] + end).expand(*shape, -1)
            ending = choose(last, torch.rand(shape, dtype=last.dtype, device=end.device))
            state = torch.where(self.lengths - 1 > t, before, state)
            state = torch.where(self.lengths - 1 == t, ending, state)
            at = (*rows, state)
            z[..., t] = torch.where(t < self.lengths, symbol[at], 0)
        return z


def _log_indicator(condition: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(condition, 0.0, -math.inf).to(dtype)


def collapse(path: Tensor, within: Tensor, blank: int) -> Tensor:
    """Merge repeats, then remove blanks and padding; the result is padded with -1 to the path's length."""
    path, within = torch.broadcast_tensors(path, within)
    kept = (path != blank) & within
    kept[..., 1:] &= path[..., 1:] != path[..., :-1]
    place = torch.where(kept, kept.cumsum(-1) - 1, path.shape[-1])
    return path.new_full((*path.shape[:-1], path.shape[-1] + 1), -1).scatter(-1, place, path)[..., :-1]


def _alpha(emission: Tensor, skip: Tensor) -> Tensor:
    """ln Σ over paths to each state at each frame, including its emission: [*B, T, S]."""
    alpha = torch.full_like(emission, -math.inf)
    alpha[..., 0, :2] = emission[..., 0, :2]
    for t in range(1, emission.shape[-2]):
        before, now = alpha[..., t - 1, :], alpha[..., t, :]
        now.copy_(before)
        now[..., 1:] = torch.logaddexp(before[..., 1:], before[..., :-1])
        now[..., 2:] = torch.logaddexp(now[..., 2:], before[..., :-2] + skip[..., 2:])
        now += emission[..., t, :]
    return alpha


def _alpha_beta(q: Alignment, emission: Tensor) -> tuple[Tensor, Tensor]:
    """ln Z and its gradient by ``emission`` in plain torch, in float64."""
    symbol, skip, end = q._lattice(torch.float64)
    emitted = q._at_states(emission.double(), symbol)
    alpha = _alpha(emitted, skip)
    final = (q.lengths - 1)[..., None, None].expand(*q.batch_shape, 1, emitted.shape[-1])
    value = (alpha.gather(-2, final).squeeze(-2) + end).logsumexp(-1)
    occupied = torch.full_like(emitted, -math.inf)
    after = end
    for t in range(emitted.shape[-2] - 1, -1, -1):
        beta = after.clone()
        beta[..., :-1] = torch.logaddexp(beta[..., :-1], after[..., 1:])
        beta[..., :-2] = torch.logaddexp(beta[..., :-2], after[..., 2:] + skip[..., 2:])
        beta = torch.where((t < q.lengths - 1)[..., None], beta, end)
        occupied[..., t, :] = alpha[..., t, :] + beta
        after = beta + emitted[..., t, :]
    # normalized at each frame: ln Z - alpha - beta has few digits left if potentials are large
    peak = occupied.amax(-1, keepdim=True)
    posterior = (occupied - torch.where(peak == -math.inf, 0.0, peak)).exp()
    posterior = posterior / posterior.sum(-1, keepdim=True).clamp(min=1.0)
    used = q._within & (value > -math.inf)[..., None]
    posterior = torch.where(used[..., None], posterior, 0.0)
    index = symbol.unsqueeze(-2).expand(posterior.shape)
    return value, torch.zeros_like(emission, dtype=posterior.dtype).scatter_add_(-1, index, posterior)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, emission, q, exact):
        run = kernels("alignment", emission)
        if run is None:
            value, occupancy = _alpha_beta(q, emission)
        else:
            flat = emission.reshape(-1, *emission.shape[-2:]).contiguous()
            target = q.target.reshape(-1, q.target.shape[-1]).contiguous()
            lengths = q.lengths.reshape(-1).contiguous()
            value = flat.new_empty(len(flat), dtype=torch.float64)
            needed = emission.requires_grad
            occupancy = torch.zeros_like(flat) if needed else flat[:, :0]
            counts = (target >= 0).sum(-1)
            run.alpha_beta(flat, target, lengths, counts, q.blank, value, occupancy, needed)
            value = value.view(q.batch_shape)
            occupancy = occupancy.view_as(emission) if needed else occupancy
        ctx.exact = exact
        ctx.save_for_backward(emission, occupancy.to(emission.dtype))
        return value.to(emission.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        emission, occupancy = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *torch.autograd.grad(ctx.exact(emission), emission, grad, create_graph=True), None, None
        return grad[..., None, None] * occupancy, None, None


class CTC(TorchDistribution):
    """p(y) = Σ_paths Π_t softmax(logits_t)[path_t] over the paths that collapse to y: repeats are merged,
    then blanks removed.

    ``logits [*B,T,C]`` are normalized inside, -inf allowed; ``lengths [*B]`` are the inputs'; ``blank`` is
    the index of the blank; rank(*B) = logits.dim() - 2. ``y`` is a LongTensor ``[*B,L]``, padded with -1,
    possibly all of it. A target that no path collapses to has log probability -inf and a zero gradient.
    ``sample`` pads to T. ``posterior(y)`` is an ``Alignment``.

    Cost: O(B·T·(C + L)). Source: Graves et al. (2006), *Connectionist temporal classification*.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self, logits: Tensor, lengths: Tensor | None = None, blank: int = 0, validate_args: bool | None = None
    ) -> None:
        refuse_transforms(logits=logits)
        steps, symbols = logits.shape[-2:]
        batch_shape = logits.shape[:-2]
        if lengths is not None:
            batch_shape = shape_of(logits.dim() - 2, [batch_shape], lengths)
        if len(batch_shape) != logits.dim() - 2 or not 0 <= blank < symbols:
            raise ValueError(
                "logits, lengths, blank: expected shapes [*B,T,C] and [*B], and a symbol in [0, C), got "
                f"{tuple(logits.shape)}, {getattr(lengths, 'shape', None)} and {blank}"
            )
        self.lengths, self.blank = lengths, blank
        super().__init__(batch_shape, torch.Size((steps,)), validate_args=validate_args)
        peak = logits.amax(-1)
        if self._validate_args:
            check_finite_or_minus_inf(logits=logits)
            if (peak == -math.inf).any():
                raise ValueError(
                    f"logits: expected a finite logit at every frame, got none at index "
                    f"{first_index(peak == -math.inf)}"
                )
        if lengths is not None:
            check_lengths(lengths, steps)
        self.log_probs = torch.where((peak == -math.inf)[..., None], -math.inf, logits.log_softmax(-1))

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-1, self.log_probs.shape[-1] - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CTC:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.log_probs = self.log_probs.expand(*new._batch_shape, *self.log_probs.shape[-2:])
        if self.lengths is not None:
            new.lengths = self.lengths.expand(new._batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(y), ``[*sample, *B]``; -inf if no path collapses to y."""
        return self.posterior(without_padding(value)).log_partition

    def posterior(self, y: Tensor) -> Alignment:
        """p(path | y); its ``log_partition`` is ln p(y)."""
        steps, symbols = self.log_probs.shape[-2:]
        try:
            shape = torch.broadcast_shapes(y.shape[:-1], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"y: expected shape [*B,L] with *B = {tuple(self.batch_shape)}, got {tuple(y.shape)}"
            ) from None
        lengths = torch.full((), steps, device=y.device) if self.lengths is None else self.lengths
        if self._validate_args:
            check_padded("y", y, symbols)
            if (y == self.blank).any():
                raise ValueError(
                    f"y: expected no blank, got {self.blank} at index {first_index(y == self.blank)}"
                )
            long = (y >= 0).sum(-1) > lengths
            if long.any():
                raise ValueError(
                    f"y: expected targets no longer than their input, got a longer one at index "
                    f"{first_index(long)}"
                )
        emission = self.log_probs.expand(*shape, steps, symbols)
        target = y.expand(*shape, y.shape[-1])
        path = Alignment(emission, target, lengths.expand(shape), self.blank, validate_args=False)
        path._validate_args = self._validate_args
        return path

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Targets ``[*sample, *B, T]``, padded with -1: independent symbols at each frame, collapsed."""
        steps, symbols = self.log_probs.shape[-2:]
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            log_probs = self.log_probs.expand(*shape, symbols)
            path = choose(log_probs, torch.rand(shape, dtype=log_probs.dtype, device=log_probs.device))
            within = torch.arange(steps, device=path.device)
            lengths = steps if self.lengths is None else self.lengths[..., None]
            return collapse(path, (within < lengths).expand(shape), self.blank)

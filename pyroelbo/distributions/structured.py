"""The base of all distributions over structures: one dynamic program answers every question."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import register_kl

from pyroelbo.semiring import KBest, Log, Max, Relative, Sample, Semiring

__all__ = [
    "StructuredDistribution",
    "broadcast",
    "check_finite_or_minus_inf",
    "check_integers",
    "check_lengths",
    "first_index",
]


def broadcast(*shapes: torch.Size) -> torch.Size:
    """``torch.broadcast_shapes``, which takes its time, with a short way for shapes of one dimension."""
    if all(len(shape) == 1 for shape in shapes):
        sizes = {shape[0] for shape in shapes} - {1}
        if len(sizes) <= 1:
            return torch.Size(sizes or (1,))
    return torch.broadcast_shapes(*shapes)


def first_index(bad: Tensor) -> str:
    """The first true entry of ``bad``, as an index to print in an error."""
    return str(tuple(bad.nonzero()[0].tolist()))


def check_finite_or_minus_inf(**arguments: Tensor) -> None:
    """Refuse NaN and +inf among log potentials or logits, naming the argument and the offending index; and integers."""
    for name, value in arguments.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} is of dtype {value.dtype}: it takes floating-point numbers")
    # a sum is one pass without a temporary; only where it looks bad are the numbers looked at one by one
    with torch.no_grad():
        total = sum(value.sum().item() for value in arguments.values())
    if total < math.inf:
        return
    for name, value in arguments.items():
        bad = value.isnan() | (value == math.inf)
        if bad.any():
            got, index = value[bad][0].item(), first_index(bad)
            raise ValueError(f"{name} has {got} at index {index}: it takes finite numbers and -inf")


def check_integers(name: str, value: Tensor) -> None:
    """Refuse labels or lengths of another kind."""
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} is of dtype {value.dtype}: it takes integers")


def check_lengths(lengths: Tensor, longest: int) -> None:
    """Refuse lengths outside 1..longest, naming the offending index."""
    check_integers("lengths", lengths)
    bad = (lengths < 1) | (lengths > longest)
    if bad.any():
        raise ValueError(
            f"lengths has {lengths[bad][0].item()} at index {first_index(bad)}: "
            f"it takes integers from 1 to {longest}"
        )


class StructuredDistribution(TorchDistribution):
    """p(z) = exp(Σ_parts potential) / Z over structures z, given by the log potentials of their parts.

    A subclass hands its log potentials over as a tuple (best a ``NamedTuple``) of tensors ``[*B, ...]``, each
    with rank(*B) leading batch dimensions that broadcast to ``batch_shape``, and writes three methods:

    - ``_forward(parts, semiring)``: the total over all structures, ``[*B]``, of lifted potentials;
    - ``to_parts(z)``: how often ``z`` uses each part, a tuple in the potentials' shapes;
    - ``from_parts(parts)``: the compact integer labels of such an indicator, its inverse.

    All else follows, batched and differentiable, in nats. A structure of weight zero has a true -inf, and
    gradients are finite; where no structure has weight, ``log_partition`` is -inf and the marginals are zero.
    A speed-critical subclass may override ``_log_partition``, ``_marginals``, ``_mode``, ``_draw``; results
    stay the same.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False
    free_labels: ClassVar[bool] = False  # whether every combination of labels is a structure

    def __init__(
        self,
        potentials: tuple[Tensor, ...],
        batch_shape: Sequence[int],
        event_shape: Sequence[int],
        validate_args: bool | None = None,
    ) -> None:
        self.potentials = potentials
        self._cache: dict[str, Tensor] = {}
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=validate_args)

    @abstractmethod
    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        """The total, ``[*B]``, of lifted log potentials; address dimensions from the right only."""

    @abstractmethod
    def to_parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """How often each structure in ``z [*sample, *B, *event]`` uses each part."""

    @abstractmethod
    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The labels ``[*sample, *B, *event]`` of indicators as ``to_parts`` makes them."""

    # ---- questions

    @property
    def log_partition(self) -> Tensor:
        """ln Z, ``[*B]``. Cost: one forward pass; computed once for each distribution."""
        if "log_partition" not in self._cache:
            value = self._log_partition(self.potentials)
            if value.shape != self.batch_shape:
                value = value.expand(self.batch_shape)
            if not torch.is_grad_enabled() and any(x.requires_grad for x in self.potentials):
                return value
            self._cache["log_partition"] = value
        return self._cache["log_partition"]

    @property
    def marginals(self) -> tuple[Tensor, ...]:
        """The expected use of each part, in the potentials' shapes with full batch: the gradient of ln Z."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in self.potentials)):
            return self._marginals()
        # a potential that needs no gradient still has marginals
        parts = self._like(
            x if x.requires_grad else x.detach().requires_grad_() for x in self._full(self.potentials)
        )
        return self._gradient(self._log_partition(parts), parts, create_graph=True)

    def expected_parts(self, *, hard: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ln Z ``[*B]`` and the expected use of each part, summed over all that share a potential; no gradients.

        The parts have the potentials' own shapes: one that the batch shares (size 1 there) gets the whole
        batch's counts, which are then never held apart. With ``hard`` the best structure stands for all: its
        log weight, and its parts. These are the E-steps of EM and of hard EM.
        """
        if hard:
            with torch.no_grad():
                z = self.mode
                used = zip(self.to_parts(z), self.potentials, strict=True)
                return self.score(z), self._like(n.sum_to_size(x.shape) for n, x in used)
        with torch.enable_grad():
            leaves = self._like(x.detach().requires_grad_() for x in self.potentials)
            value = self._log_partition(leaves)
            return value.detach().expand(self.batch_shape), self._gradient(value, leaves)

    @property
    def mode(self) -> Tensor:
        """A structure of largest probability, LongTensor ``[*B, *event]``."""
        with torch.no_grad():
            return self._mode()

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` most probable structures, ``[k, *B, *event]``, and their log probabilities ``[k, *B]``.

        Where there are fewer, the log probability is -inf and the labels mean nothing. Cost: k backward
        passes.
        """
        semiring = KBest(k)
        with torch.enable_grad():
            parts = self._leaves()
            scores = self._forward(self._lift(parts, semiring), semiring)
            rows = [self._gradient(s, parts, retain_graph=True) for s in scores]
        z = torch.stack([self.from_parts(row) for row in rows])
        with torch.no_grad():
            return z, _minus_inf_aware(scores.detach(), self.log_partition)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Exact draws, LongTensor ``[*sample, *B, *event]``."""
        if self._validate_args:
            impossible = self.log_partition == -math.inf
            if impossible.any():
                raise ValueError(
                    f"no structure has positive probability at batch index {first_index(impossible)}"
                )
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(z), ``[*sample, *B]``; -inf for a structure of weight zero."""
        if self._validate_args:
            check_integers("z", value)
            low, high = self.support.base_constraint.lower_bound, self.support.base_constraint.upper_bound
            bad = (value < low) | (value > high)
            if bad.any():
                raise ValueError(
                    f"z has {value[bad][0].item()} at index {first_index(bad)}: it takes integers from {low} to {high}"
                )
            self._validate_sample(value)
        return _minus_inf_aware(self.score(value.long()), self.log_partition)

    def score(self, value: Tensor) -> Tensor:
        """The unnormalized log weight of ``z``: ln p(z) + ln Z."""
        total: Any = 0.0
        for count, potential in zip(self.to_parts(value), self.potentials, strict=True):
            term = torch.where(count > 0, potential, 0.0) * count
            kept = term.dim() - (potential.dim() - len(self.batch_shape))
            total = total + term.flatten(kept).sum(-1)
        return total

    def entropy(self) -> Tensor:
        """H(p) = -E ln p(z), ``[*B]``."""
        semiring = Relative(-1.0, 0.0)
        return self._answer(self._lift(self.potentials, semiring), semiring)

    def cross_entropy(self, other: StructuredDistribution) -> Tensor:
        """-E_p ln q(z), ``[*B]``, q being ``other``, of the same structure; +inf where q lacks a z of p."""
        return self._versus(other, Relative(0.0, -1.0))

    def kl_divergence(self, other: StructuredDistribution) -> Tensor:
        """KL(p, q), ``[*B]``, a sum of local ones; ``torch.distributions.kl_divergence`` comes here too."""
        return self._versus(other, Relative(1.0, -1.0))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> StructuredDistribution:
        """The same distribution for a larger batch; nothing is copied."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new._cache = {k: v.expand(new._batch_shape) for k, v in self._cache.items()}
        pad = len(new._batch_shape) - len(self._batch_shape)
        new.potentials = self._like(x.reshape((1,) * pad + x.shape) for x in self.potentials)
        return new

    def __getstate__(self) -> dict[str, Any]:
        # a copy or a pickle computes anew: results may hang on a graph, which neither takes along
        return {**self.__dict__, "_cache": {}}

    # ---- what a fast subclass replaces

    def _log_partition(self, parts: tuple[Tensor, ...]) -> Tensor:
        return self._answer(self._lift(parts, Log()), Log())

    def _marginals(self) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            parts = self._leaves()
            return self._gradient(self._log_partition(parts), parts)

    def _mode(self) -> Tensor:
        return self._by_gradient(self._leaves(), Max())

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        return self._by_gradient(self._leaves(sample_shape), Sample())

    # ---- plumbing

    def _like(self, tensors) -> tuple[Tensor, ...]:
        make = getattr(self.potentials, "_make", tuple)
        return make(tensors)

    def _full(self, parts: tuple[Tensor, ...], sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        batch = len(self.batch_shape)
        return self._like(x.expand(*sample_shape, *self.batch_shape, *x.shape[batch:]) for x in parts)

    def _leaves(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        parts = self._full(self.potentials, sample_shape)
        return self._like(x.detach().requires_grad_() for x in parts)

    def _lift(self, parts: tuple[Tensor, ...], semiring: Semiring) -> tuple[Tensor, ...]:
        return self._like(semiring.lift(x) for x in parts)

    def _answer(self, lifted: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        value = semiring.unlift(self._forward(lifted, semiring))
        return value.expand(self.batch_shape) if value.dim() <= len(self.batch_shape) else value

    def _gradient(self, total: Tensor, parts: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
        return self._like(
            torch.autograd.grad(total.sum(), parts, allow_unused=True, materialize_grads=True, **options)
        )

    def _by_gradient(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        with torch.enable_grad():
            used = self._gradient(self._forward(self._lift(parts, semiring), semiring), parts)
        return self.from_parts(used)

    def _versus(self, other: StructuredDistribution, semiring: Relative) -> Tensor:
        if type(self) is not type(other) or self.event_shape != other.event_shape:
            raise ValueError(
                f"other is a {type(other).__name__} of event shape {tuple(other.event_shape)}: "
                f"it takes a {type(self).__name__} of event shape {tuple(self.event_shape)}"
            )
        batch = torch.broadcast_shapes(self.batch_shape, other.batch_shape)
        p, q = self.expand(batch), other.expand(batch)
        pairs = zip(p._full(p.potentials), q._full(q.potentials), strict=True)
        return p._answer(p._like(semiring.lift(x, y) for x, y in pairs), semiring)


def _minus_inf_aware(score: Tensor, log_partition: Tensor) -> Tensor:
    possible = score > -math.inf
    value = torch.where(possible, score, 0.0) - torch.where(possible, log_partition, 0.0)
    return torch.where(possible, value, -math.inf)


@register_kl(StructuredDistribution, StructuredDistribution)
def _kl_structured(p: StructuredDistribution, q: StructuredDistribution) -> Tensor:
    return p.kl_divergence(q)

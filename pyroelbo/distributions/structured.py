"""Base class of distributions over structures: one dynamic program answers every query."""

from __future__ import annotations

import copy
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints, register_kl

from pyroelbo.distributions.checks import check_index, check_integers, first_index
from pyroelbo.distributions.semiring import KBest, Log, Max, Relative, Sample, Semiring
from pyroelbo.numerics import positive_count

__all__ = [
    "StructuredDistribution",
    "any_support",
    "batch_shape",
    "broadcast",
    "cached_until_changed",
    "independent_normal",
    "log_prob_within",
    "versions",
    "within_support",
]


def broadcast(*shapes: torch.Size) -> torch.Size:
    """``torch.broadcast_shapes``, faster for shapes of one dimension."""
    if all(len(shape) == 1 for shape in shapes):
        sizes = {shape[0] for shape in shapes} - {1}
        if len(sizes) <= 1:
            return torch.Size(sizes or (1,))
    return torch.broadcast_shapes(*shapes)


def batch_shape(rank: int, shapes: Sequence[torch.Size], lengths: Tensor | None) -> torch.Size:
    """The shape ``*B`` of ``rank`` dimensions that potentials and ``lengths`` broadcast to; ValueError for
    others.
    """
    if lengths is not None and not isinstance(lengths, Tensor):
        raise ValueError(f"lengths: expected a LongTensor [*B], got a {type(lengths).__name__}")
    try:
        shape = broadcast(*shapes, *(() if lengths is None else (lengths.shape,)))
    except RuntimeError:
        sizes = {"potentials": [tuple(x) for x in shapes], "lengths": getattr(lengths, "shape", None)}
        raise ValueError(f"batch shapes: expected shapes that broadcast, got {sizes}") from None
    if len(shape) != rank:
        raise ValueError(
            f"lengths: expected shape [*B] with {rank} batch dimensions, as the potentials have, got "
            f"{tuple(shape)}; "
            "add a batch dimension to each potential by x[None]"
        )
    return shape


def versions(*tensors: Tensor) -> tuple[int, ...] | None:
    """Counters that change when a tensor is changed in place; None if one is an inference tensor, without
    counter.
    """
    if any(x.is_inference() for x in tensors):
        return None
    return tuple(x._version for x in tensors)


class cached_until_changed:
    """A cached property, recomputed after a tensor of ``self._sources()`` was changed in place, and in
    another grad mode.
    """

    def __init__(self, function: Callable) -> None:
        self._function, self._key, self.__doc__ = function, f"_kept_{function.__name__}", function.__doc__

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self
        at = versions(*instance._sources())
        mode = at, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        kept = instance.__dict__.get(self._key)
        if kept is None or at is None or kept[0] != mode:
            kept = instance.__dict__[self._key] = mode, self._function(instance)
        return kept[1]


def within_support(components: Any, value: Tensor) -> Tensor | None:
    """Which components (last batch dimension, of size one in ``value``) have each value in their support;
    None for all.
    """
    if not value.numel():
        return None
    good = components.support.check(value)
    return None if good.dim() != value.dim() - len(components.event_shape) or bool(good.all()) else good


def log_prob_within(components: Any, value: Tensor, good: Tensor | None) -> Tensor:
    """ln p(value | component), -inf where ``good`` (from ``within_support``) is false."""
    event = len(components.event_shape)
    if not value.numel():  # torch's sums over events fail on empty tensors
        return torch.zeros(
            broadcast(value.shape[: value.dim() - event], components.batch_shape), device=value.device
        )
    if good is None:
        return _log_prob(components, value)
    with torch.no_grad():
        stand_in = components.sample().to(value.dtype)
    safe = torch.where(good.reshape(good.shape + (1,) * event), value, stand_in)
    return torch.where(good, _log_prob(components, safe), -math.inf)


def independent_normal(distribution: Any) -> torch.distributions.Normal | None:
    """The base of ``Normal(...).to_event(1)``; None for any other distribution."""
    base = distribution.base_dist if isinstance(distribution, torch.distributions.Independent) else None
    return (
        base if isinstance(base, torch.distributions.Normal) and len(distribution.event_shape) == 1 else None
    )


def _log_prob(components: Any, value: Tensor) -> Tensor:
    """``components.log_prob(value)``. For independent Normals without gradients it is summed coordinate by
    coordinate, in place, which is ten times faster than with temporaries of all coordinates.
    """
    base = independent_normal(components)
    if base is None:
        return components.log_prob(value)
    loc, scale = base.loc, base.scale
    shape = torch.broadcast_shapes(value.shape[:-1], loc.shape[:-1])
    tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (value, loc, scale))
    if tracked or shape.numel() < 1 << 12 or not value.dtype == loc.dtype == scale.dtype:
        return components.log_prob(value)
    if components._validate_args:
        components._validate_sample(value)
    value, loc, rate = (x.movedim(-1, 0).contiguous() for x in (value, loc, scale.reciprocal()))
    total, part = value.new_zeros(shape), value.new_empty(shape)
    for y, mean, own in zip(value, loc, rate, strict=True):
        torch.sub(y, mean, out=part).mul_(own)
        total.addcmul_(part, part, value=-0.5)
    return total.sub_(scale.log().sum(-1) + 0.5 * len(loc) * math.log(2 * math.pi))


class _AnySupport(constraints.Constraint):
    def __init__(self, each: Any, event_dim: int) -> None:
        self.each, self.event_dim, self.is_discrete = each, event_dim, each.is_discrete

    def check(self, value: Tensor) -> Tensor:
        return self.each.check(value.unsqueeze(-1 - self.event_dim)).any(-1)


def any_support(components: Any) -> Any:
    """The union of the components' supports."""
    base = components.support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    apart = any(isinstance(x, Tensor) and x.dim() for x in vars(base).values())
    return _AnySupport(components.support, len(components.event_shape)) if apart else components.support


class StructuredDistribution(TorchDistribution):
    """p(z) = exp(Σ_parts potential) / Z over structures z, given by the log potentials of their parts.

    A subclass passes its log potentials as a tuple (preferably a ``NamedTuple``) of tensors ``[*B, ...]``,
    each with rank(*B) leading batch dimensions that broadcast to ``batch_shape``, and implements three
    methods:

    - ``_forward(parts, semiring)``: the total over all structures, ``[*B]``, of lifted potentials;
    - ``to_parts(z)``: how often ``z`` uses each part, a tuple in the potentials' shapes;
    - ``from_parts(parts)``: its inverse, the compact integer labels of such an indicator.

    Everything else is derived from these, batched and differentiable, in nats. A structure of weight zero has
    log probability -inf, and gradients stay finite; if no structure has positive weight, ``log_partition`` is
    -inf and the marginals are zero. A speed-critical subclass may override ``_log_partition``,
    ``_marginals``, ``_mode`` and ``_draw`` with equivalent, faster versions.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False
    free_labels: ClassVar[bool] = False  # whether every combination of labels is a valid structure
    lengths: Tensor | None = None  # ``[*B]``, for structures shorter than the event

    def __init__(
        self,
        potentials: tuple[Tensor, ...],
        batch_shape: Sequence[int],
        event_shape: Sequence[int],
        validate_args: bool | None = None,
    ) -> None:
        self.potentials = potentials
        self._cache: dict[str, Tensor] = {}
        self._cached_at: tuple[int, ...] | None = None
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=validate_args)

    @abstractmethod
    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        """The total, ``[*B]``, of lifted log potentials; dimensions must be addressed from the right."""

    @abstractmethod
    def to_parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """How often each structure in ``z [*sample, *B, *event]`` uses each part."""

    @abstractmethod
    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The labels ``[*sample, *B, *event]`` of indicators as returned by ``to_parts``."""

    # ---- queries

    @property
    def log_partition(self) -> Tensor:
        """ln Z, ``[*B]``. Cost: one forward pass, then cached."""
        if "log_partition" not in self._cache or self._changed():
            value = self._log_partition(self.potentials)
            if value.shape != self.batch_shape:
                value = value.expand(self.batch_shape)
            if not torch.is_grad_enabled() and any(x.requires_grad for x in self.potentials):
                return value
            if value.is_inference():  # autograd would refuse it later
                return value
            self._cache["log_partition"] = value
            self._cached_at = versions(*self.potentials)
        return self._cache["log_partition"]

    def _changed(self) -> bool:
        """Whether potentials were changed in place since results were cached."""
        return self._cached_at is None or self._cached_at != versions(*self.potentials)

    @property
    def marginals(self) -> tuple[Tensor, ...]:
        """The expected use of each part, in the potentials' shapes with full batch: the gradient of ln Z."""
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in self.potentials)):
            return self._marginals()
        parts = self._tracked()
        return self._gradient(self._log_partition(parts), parts, create_graph=True)

    def expected_parts(
        self, *, hard: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """ln Z ``[*B]`` and the expected use of each part, without gradients: the E-step of EM.

        The parts have the potentials' own shapes: a potential shared by the batch (size 1 there) gets the
        counts of the whole batch, in which ``weights`` ``[*B]`` count each datum so many times. With
        ``hard``, the log weight of the best structure and its parts: the E-step of hard EM.
        """
        if hard:
            with torch.no_grad():
                z = self.mode
                log_weight = self.log_weight(z)
                # an impossible datum has no counts
                used = (torch.where(_beside(log_weight > -math.inf, n), n, 0.0) for n in self.to_parts(z))
                if weights is not None:
                    used = (n * _beside(weights, n).to(n) for n in used)
                pairs = zip(used, self.potentials, strict=True)
                return log_weight, self._like(n.sum_to_size(x.shape) for n, x in pairs)
        with torch.enable_grad():
            leaves = self._like(x.detach().requires_grad_() for x in self.potentials)
            value = self._log_partition(leaves).expand(self.batch_shape)
            counted = value if weights is None else value * weights.to(value)
            return value.detach(), self._gradient(counted, leaves)

    @property
    def mode(self) -> Tensor:
        """A most probable structure, LongTensor ``[*B, *event]``."""
        with torch.no_grad():
            return self._mode()

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """The ``k`` most probable structures, ``[k, *B, *event]``, and their log probabilities ``[k, *B]``.

        If there are fewer, the log probability is -inf and the labels are meaningless. The log probabilities
        are differentiable. Cost: k backward passes.
        """
        semiring = KBest(positive_count("k", k, "integer"))
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in self.potentials)
        with torch.enable_grad():
            parts = self._tracked() if tracked else self._leaves()
            log_weights = self._forward(self._lift(parts, semiring), semiring)
            rows = [self._gradient(s, parts, retain_graph=True) for s in log_weights]
        z = torch.stack([self.from_parts(row) for row in rows])
        return z, _minus_inf_aware(log_weights if tracked else log_weights.detach(), self.log_partition)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Exact samples, LongTensor ``[*sample, *B, *event]``; ValueError if no structure has positive
        probability.
        """
        if self._validate_args:
            impossible = self.log_partition == -math.inf
            if impossible.any():
                raise ValueError(
                    f"no structure has positive probability at batch index {first_index(impossible)}"
                )
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Not supported: structures are summed over by ``log_partition``, not listed."""
        raise NotImplementedError(
            f"{type(self).__name__} has too many values to enumerate: sample it, or sum over it by "
            f"log_partition"
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(z), ``[*sample, *B]``; -inf for a structure of weight zero."""
        check_integers("z", value)
        low, high = self.support.base_constraint.lower_bound, self.support.base_constraint.upper_bound
        check_index("z", value, low, high)
        if self._validate_args and value.numel():  # torch's check fails on empty tensors
            self._validate_sample(value)
        return _minus_inf_aware(self.log_weight(value.long()), self.log_partition)

    def log_weight(self, value: Tensor) -> Tensor:
        """The unnormalized log weight of ``z``: ln p(z) + ln Z."""
        total: Any = 0.0
        for count, potential in zip(self.to_parts(value), self.potentials, strict=True):
            term = torch.where(count > 0, potential, 0.0) * count
            kept = term.dim() - (potential.dim() - len(self.batch_shape))
            total = total + term.flatten(kept).sum(-1)
        return total

    def entropy(self) -> Tensor:
        """H(p) = -E ln p(z), ``[*B]``, in float64, as are ``cross_entropy`` and ``kl_divergence``."""
        return self._relative(self.potentials, None, Relative(-1.0, 0.0))

    def cross_entropy(self, other: StructuredDistribution) -> Tensor:
        """-E_p ln q(z), ``[*B]``, with q = ``other`` over the same structures; +inf if q(z) = 0 for some z of
        p.
        """
        return self._versus(other, Relative(0.0, -1.0))

    def kl_divergence(self, other: StructuredDistribution) -> Tensor:
        """KL(p || q), ``[*B]``, as a sum of local ones; ``torch.distributions.kl_divergence`` calls it."""
        return self._versus(other, Relative(1.0, -1.0))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> StructuredDistribution:
        """The same distribution with a larger batch shape, without copies."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new._cache = {k: v.expand(new._batch_shape) for k, v in self._cache.items()}
        pad = len(new._batch_shape) - len(self._batch_shape)
        new.potentials = self._like(x.reshape((1,) * pad + x.shape) for x in self.potentials)
        if self.lengths is not None:
            new.lengths = self.lengths.expand(new._batch_shape)
        return new

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles recompute: cached results may be attached to a graph, which is not copied
        return {**self.__dict__, "_cache": {}}

    # ---- may be overridden for speed

    def _log_partition(self, parts: tuple[Tensor, ...]) -> Tensor:
        value = self._answer(self._lift(parts, Log()), Log())
        # if no structure has weight, no part has: independent pieces know only their own sums
        return torch.where(value == -math.inf, -math.inf, value)

    def _marginals(self) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            parts = self._leaves()
            return self._gradient(self._log_partition(parts), parts)

    def _mode(self) -> Tensor:
        return self._by_gradient(self._leaves(), Max())

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        return self._by_gradient(self._leaves(sample_shape), Sample())

    # ---- internals

    def _like(self, tensors) -> tuple[Tensor, ...]:
        make = getattr(self.potentials, "_make", tuple)
        return make(tensors)

    def _full(self, parts: tuple[Tensor, ...], sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        batch = len(self.batch_shape)
        return self._like(x.expand(*sample_shape, *self.batch_shape, *x.shape[batch:]) for x in parts)

    def _leaves(self, sample_shape: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        parts = self._full(self.potentials, sample_shape)
        return self._like(x.detach().requires_grad_() for x in parts)

    def _tracked(self) -> tuple[Tensor, ...]:
        """Parts for a gradient that is itself differentiable, including those that do not require grad."""
        full = self._full(self.potentials)
        return self._like(x if x.requires_grad else x.detach().requires_grad_() for x in full)

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

    def _frame(self) -> dict[str, Tensor]:
        """The tensors that define the set of structures, by the argument's name."""
        if self.lengths is not None:
            return {"lengths": self.lengths}
        device = self.potentials[0].device
        return {"lengths": torch.full(self.batch_shape, self.event_shape[0], device=device)}

    def _versus(self, other: StructuredDistribution, semiring: Relative) -> Tensor:
        if type(self) is not type(other) or self.event_shape != other.event_shape:
            raise ValueError(
                f"other: expected a {type(self).__name__} of event shape {tuple(self.event_shape)}, got a "
                f"{type(other).__name__} of event shape {tuple(other.event_shape)}"
            )
        names = getattr(self.potentials, "_fields", range(len(self.potentials)))
        for name, x, y in zip(names, self.potentials, other.potentials, strict=True):
            wanted, got = (tuple(a.shape[len(d.batch_shape) :]) for a, d in ((x, self), (y, other)))
            if wanted != got:
                raise ValueError(
                    f"other: expected {name} of event shape {wanted}, as here, got {got}; expand a "
                    f"potential shared "
                    "by all steps to one for each step"
                )
        p, q = (d.expand(torch.broadcast_shapes(self.batch_shape, other.batch_shape)) for d in (self, other))
        if self._validate_args:
            mine, theirs = p._frame(), q._frame()
            for name, x in mine.items():
                y = theirs[name]
                if x.shape != y.shape:
                    raise ValueError(
                        f"other: expected {name} of shape {tuple(x.shape)}, as here, got {tuple(y.shape)}"
                    )
                if not torch.equal(x, y):
                    bad = x != y
                    raise ValueError(
                        f"other: expected {name} {x[bad][0].item()} at index {first_index(bad)}, as here, "
                        f"for the same "
                        f"structures, got {y[bad][0].item()}"
                    )
        return p._relative(p._full(p.potentials), q._full(q.potentials), semiring)

    def _relative(
        self, parts: tuple[Tensor, ...], others: tuple[Tensor, ...] | None, semiring: Relative
    ) -> Tensor:
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in (*parts, *(others or ()))))
        # errors of the steps add up with the same sign over a long chain
        wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
        pairs = zip(parts, others or (None,) * len(parts), strict=True)
        lifted = self._like(semiring.lift(x.to(wide), y if y is None else y.to(wide)) for x, y in pairs)
        return self._answer(lifted, semiring).to(dtype)


def _beside(batch: Tensor, x: Tensor) -> Tensor:
    """``batch [*B]`` with trailing dimensions of size one, to broadcast against ``x``."""
    return batch.reshape(batch.shape + (1,) * (x.dim() - batch.dim()))


def _minus_inf_aware(log_weight: Tensor, log_partition: Tensor) -> Tensor:
    possible = log_weight > -math.inf
    value = torch.where(possible, log_weight, 0.0) - torch.where(possible, log_partition, 0.0)
    return torch.where(possible, value, -math.inf)


@register_kl(StructuredDistribution, StructuredDistribution)
def _kl_structured(p: StructuredDistribution, q: StructuredDistribution) -> Tensor:
    return p.kl_divergence(q)

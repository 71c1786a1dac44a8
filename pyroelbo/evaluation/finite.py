"""Latents of finitely many values: a value of a set, or a vector of such values."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent

from pyroelbo.distributions import StructuredDistribution

__all__ = ["EnumerableVectors", "listed", "num_values", "vectors_of"]


def num_values(fn: Any) -> int | None:
    """How many values one event of a distribution can take; None for infinitely many, or where that is
    unknown. A distribution may say it in ``num_values``."""
    if getattr(fn, "num_values", None) is not None:
        return fn.num_values
    if getattr(fn, "has_enumerate_support", False):
        return len(fn.enumerate_support(expand=False))
    if isinstance(fn, Independent):
        each = num_values(fn.base_dist)
        dims = fn.base_dist.batch_shape[len(fn.base_dist.batch_shape) - fn.reinterpreted_batch_ndims :]
        return None if each is None else each ** math.prod(dims)
    if _labelled(fn):
        return len(_labels(fn)) ** math.prod(fn.event_shape)
    return None


def vectors_of(values: int, count: int, device: torch.device) -> Tensor:
    """Every vector of ``count`` integers 0 … values-1, [values^count, count], the last one changing first."""
    return torch.cartesian_prod(*[torch.arange(values, device=device)] * count).reshape(-1, count)


def listed(values: Tensor, fn: Any, expand: bool) -> Tensor:
    """Values of a distribution's event as its ``enumerate_support`` gives them, [V, 1, …, 1, *event] or
    [V, *B, *event]."""
    values = values.reshape(-1, *[1] * len(fn.batch_shape), *fn.event_shape)
    return values.expand(-1, *fn.batch_shape, *fn.event_shape) if expand else values


def _labelled(fn: Any) -> bool:
    """Whether a structure's values are all combinations of its labels (beyond a length there are none)."""
    return isinstance(fn, StructuredDistribution) and fn.free_labels and fn.lengths is None


def _labels(fn: Any) -> Tensor:
    each = fn.support.base_constraint
    return torch.arange(each.lower_bound, each.upper_bound + 1, device=fn.potentials[0].device)


class EnumerableVectors(Messenger):
    """Lets latents that are vectors of finite values (``Bernoulli(...).to_event(1)``, the labels of a tree)
    be enumerated."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        vectors = isinstance(fn, (Independent, StructuredDistribution))
        if not msg["is_observed"] and vectors and num_values(fn) is not None:
            msg["fn"] = _Enumerable(fn)


class _Enumerable(TorchDistribution):
    """An Independent over finite sets, or a structure of free labels, whose support is the product of its
    coordinates'."""

    has_enumerate_support = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any) -> None:
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, base_dist.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Enumerable:
        return _Enumerable(self.base_dist.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base_dist.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(value)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every value, [S, 1, …, 1, *event], the last coordinate changing first."""
        own, event = self._each()
        count = math.prod(self.event_shape[: len(self.event_shape) - len(event)])
        return listed(own[vectors_of(len(own), count, own.device)], self, expand)

    def _each(self) -> tuple[Tensor, torch.Size]:
        """The values of a coordinate, and the shape of one."""
        if not isinstance(self.base_dist, Independent):
            return _labels(self.base_dist), torch.Size()
        inner = self.base_dist.base_dist
        if isinstance(inner, Independent):
            inner = _Enumerable(inner)
        own = inner.enumerate_support(expand=False)
        return own.reshape(len(own), *inner.event_shape), inner.event_shape

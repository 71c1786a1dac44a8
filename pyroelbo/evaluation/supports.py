"""Supports as they are: those that distributions declare, corrected where the declaration is wrong."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import MaskedDistribution, SineBivariateVonMises, SineSkewed, VonMises
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent, MixtureSameFamily, constraints

__all__ = [
    "circular",
    "is_circular",
    "movable",
    "same_bounds",
    "spread",
    "support_of",
    "within_circle",
]


class _Circular(constraints.Constraint):
    """Angles in [-π, π], the two ends being one point."""

    def check(self, value: Tensor) -> Tensor:
        return value.abs() <= math.pi * (1 + 4 * torch.finfo(value.dtype).eps)

    def __repr__(self) -> str:
        return "Circular()"


circular = _Circular()

# Declared as real by torch and Pyro: their densities are periodic and integrate to one over [-π, π] only.
_ANGLES = (VonMises, SineBivariateVonMises, SineSkewed)


def support_of(fn: Any) -> Any:
    """The support of a distribution; of a mixture, that of its components.

    Raises NotImplementedError as ``fn.support`` does.
    """
    if isinstance(fn, (MaskedDistribution, ExpandedDistribution)):
        return support_of(fn.base_dist)
    if isinstance(fn, Independent):
        return constraints.independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, MixtureSameFamily):
        return support_of(fn.component_distribution)
    if isinstance(fn, _ANGLES):
        return constraints.independent(circular, fn.event_dim) if fn.event_dim else circular
    support = fn.support
    if type(support) is type(constraints.unit_interval) and _infinite(support.upper_bound):
        # A generalized Pareto's; the map onto an interval is not one onto a half-line.
        return (
            constraints.real
            if _infinite(support.lower_bound)
            else constraints.greater_than(support.lower_bound)
        )
    return support


def spread(fn: Any, value: Tensor) -> Tensor:
    """A value over all batch dimensions of its distribution, enumerated ones too, as supports that differ
    between them take it."""
    shape = torch.Size((*fn.batch_shape, *fn.event_shape))
    return value.expand(torch.broadcast_shapes(value.shape, shape)) if value.dim() < len(shape) else value


def movable(fn: Any) -> bool:
    """Whether the support of a distribution has bounds that are tensors."""
    try:
        return _has_tensors(support_of(fn))
    except (AttributeError, NotImplementedError):
        return False


def _has_tensors(constraint: Any) -> bool:
    parts = vars(constraint).values()
    return any(
        isinstance(part, Tensor) or (isinstance(part, constraints.Constraint) and _has_tensors(part))
        for part in parts
    )


def same_bounds(mine: Any, theirs: Any) -> bool:
    """Whether two supports of one site, of two draws, are the same."""
    if isinstance(mine, constraints.Constraint):
        pairs = zip(vars(mine).values(), vars(theirs).values(), strict=True)
        return type(mine) is type(theirs) and all(same_bounds(*pair) for pair in pairs)
    return torch.equal(mine, theirs) if isinstance(mine, Tensor) else bool(mine == theirs)


def _infinite(bound: Any) -> bool:
    return bool(torch.as_tensor(bound).isinf().all())


def is_circular(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is circular


def within_circle(support: Any) -> bool:
    """Whether a support lies within [-π, π]."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is circular:
        return True
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if low is None or high is None:
        return False
    limit = math.pi * (1 + 1e-6)
    return bool((torch.as_tensor(low) >= -limit).all() and (torch.as_tensor(high) <= limit).all())

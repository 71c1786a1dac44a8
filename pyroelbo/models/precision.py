"""Numerics of closed forms: float64 in evaluation and EM, regressions on singular statistics, floors of
scales."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["Floor", "exact", "exact_dtype", "regress"]


def exact_dtype(x: Tensor) -> torch.dtype:
    """float64 if gradients are off, as in evaluation and EM; the dtype of ``x`` if a training loss
    differentiates it.

    Differences of large terms, as in a quadratic form, lose all digits in float32.
    """
    return x.dtype if torch.is_grad_enabled() else torch.float64


def exact(x: Tensor) -> Tensor:
    """``x`` in :func:`exact_dtype`."""
    return x.to(exact_dtype(x))


def regress(square: Tensor, cross: Tensor) -> Tensor:
    """W [D, L] that solves W · square = cross, for a symmetric positive semidefinite ``square`` [L, L] and
    ``cross`` [D, L]; one of the solutions if ``square`` is singular."""
    size = square.diagonal().clamp_min(0).sqrt()
    unit = torch.where(size > 0, size, 1.0)  # so that small is small in each coordinate's own unit
    inverse = torch.linalg.pinv(square / (unit[:, None] * unit), hermitian=True)
    return (cross / unit) @ inverse / unit


class Floor:
    """Holds variances above (``floor`` · unit)², with one warning until :meth:`reset`."""

    def __init__(self, floor: float) -> None:
        if not floor > 0:
            raise ValueError(f"floor: expected a positive scale, got {floor}")
        self.floor, self.warned = floor, False

    def reset(self) -> None:
        self.warned = False

    def log_scale(self, name: str, variance: Tensor, unit: Tensor) -> Tensor:
        """½ ln of ``variance``, held at the floor relative to the variances ``unit`` (where these are 0, to
        their mean, or to 1)."""
        some = unit[unit > 0]
        unit = torch.where(unit > 0, unit, some.mean() if some.numel() else 1.0)
        least = self.floor**2 * unit
        if not self.warned and bool((variance < least).any()):
            self.warned = True
            share = float((variance / unit).min().clamp_min(0).sqrt())
            warnings.warn(
                f"the scale of the {name} noise fell to {share:.1e} of the data's and is held at "
                f"floor={self.floor:g}; a "
                "coordinate is constant or determined by the others: drop it, or use fewer latent dimensions"
            )
        return 0.5 * variance.maximum(least).log()

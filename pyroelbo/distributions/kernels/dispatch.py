"""Where compiled loops may be used: one rule for all structures. Without numba results stay the same."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["compilable", "loops"]


@functools.cache
def loops(name: str) -> ModuleType | None:
    """The module ``name`` of compiled loops in this package, where numba is installed."""
    try:
        return importlib.import_module(f"pyroelbo.distributions.kernels.{name}")
    except ImportError:
        return None


def compilable(x: Tensor) -> bool:
    """Whether compiled loops take the numbers of ``x``."""
    return x.is_cpu and x.dtype in (torch.float32, torch.float64)

"""When compiled kernels are used: one rule for all structures. Results do not depend on it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["kernels"]


@functools.cache
def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f"pyroelbo.distributions.kernels.{name}")
    except ImportError:
        return None


def kernels(name: str, x: Tensor) -> ModuleType | None:
    """The compiled kernels of file ``name``; None without numba, and unless ``x`` is float32 or float64 on
    the CPU.
    """
    return _load(name) if x.is_cpu and x.dtype in (torch.float32, torch.float64) else None

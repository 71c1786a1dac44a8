"""How K particles of a pair are run in one pass: in a plate, along the batch, one at a time, or over a joint
batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.layout import LatentSite, Layout
from pyroelbo.evaluation.sites import data_frame
from pyroelbo.pair import PLATE

__all__ = ["Joint", "Loop", "Plate", "Repeat", "Strategy"]


_PARTICLES = "_particles"  # the name of their plate


class Strategy(ABC):
    """Runs K particles of B data in one pass (abstract): how programs, data and values are shaped for it, and
    back.

    ``most`` limits the particles of a pass.
    """

    most: int | None = None

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def wrap(self, particles: int) -> Callable[[Callable], Callable]:
        """What encloses each program."""
        return lambda program: program

    def batch(self, batch: Batch, particles: int) -> Batch:
        """The data that the programs are given."""
        return batch

    @abstractmethod
    def fold(self, value: Tensor, site: LatentSite, particles: int, size: int) -> Tensor:
        """A traced value as [K, *plates, B, *event]."""

    @abstractmethod
    def unfold(self, value: Tensor, site: LatentSite) -> Tensor:
        """[K, *plates, B, *event] as the programs expect it; the inverse of :meth:`fold`."""

    @abstractmethod
    def total(self, log_prob: Tensor, site: Any, program: str, particles: int, size: int) -> Tensor:
        """The log probability of a traced site, summed over its plates to [K, B]."""

    @abstractmethod
    def kept(self, particles: int, size: int) -> dict[str, int]:
        """Names and sizes of the plates that a sum over finite latents keeps, [K · B] in all."""

    @abstractmethod
    def one(self, value: Tensor, site: Any, particles: int, index: int) -> Tensor:
        """Particle ``index`` of a traced value, in the shape that one particle alone has."""


class _PerDatum(Strategy):
    def _expanded(self, log_prob: Tensor, site: Any, program: str, expected: int) -> Tensor:
        """The log probability over all of the site's plates, summed over those right of the data plate;
        ValueError for dimensions that no plate declares."""
        name, frame = site["name"], data_frame(site, program)
        if frame.size != expected:
            raise ValueError(
                f"the plate {PLATE!r}: expected {expected} data, got {frame.size} at {program} site {name!r}"
            )
        shape = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
        full = [shape.get(d, 1) for d in range(min([*shape, -log_prob.dim(), -1]), 0)]
        for axis, (have, declared) in enumerate(zip(log_prob.shape[::-1], full[::-1], strict=False)):
            if have not in (1, declared):
                raise ValueError(
                    f"{program} site {name!r}: expected {declared} at batch dim {-1 - axis}, as its plates "
                    f"declare, got {have}. Declare the dimension as an event with .to_event(), or add a plate"
                )
        log_prob = log_prob.expand(full)
        return log_prob.sum(tuple(range(-self.inner, 0))) if self.inner else log_prob

    @property
    def inner(self) -> int:
        """Number of plate dimensions right of the data plate."""
        return -1 - self.layout.dim


class Plate(_PerDatum):
    """Particles as a vectorized plate left of all others."""

    def wrap(self, particles: int) -> Callable[[Callable], Callable]:
        return pyro.plate(_PARTICLES, particles, dim=-1 - self.layout.depth)

    def fold(self, value: Tensor, site: LatentSite, particles: int, size: int) -> Tensor:
        shape = (*site.plate_shape, size, *site.event_shape)
        return value.reshape(-1, *shape).expand(particles, *shape) if value.numel() else value

    def unfold(self, value: Tensor, site: LatentSite) -> Tensor:
        gap = self.layout.depth - 1 - len(site.plate_shape) - site.batch_dims
        return value.reshape(len(value), *[1] * gap, *value.shape[1:])

    def total(self, log_prob: Tensor, site: Any, program: str, particles: int, size: int) -> Tensor:
        log_prob = self._expanded(log_prob, site, program, size)
        lead = log_prob.dim() - 1 - (self.layout.depth - self.inner)
        log_prob = log_prob.reshape(particles if lead >= 0 else 1, -1, size).sum(1)
        return log_prob.expand(particles, size)

    def kept(self, particles: int, size: int) -> dict[str, int]:
        return {_PARTICLES: particles, PLATE: size}

    def one(self, value: Tensor, site: Any, particles: int, index: int) -> Tensor:
        return _one(value, self.layout.shapes[site["name"]], index)


class Repeat(_PerDatum):
    """The data repeated along the batch, for networks that refuse a further dimension (``Conv2d`` does)."""

    def batch(self, batch: Batch, particles: int) -> Batch:
        return batches.repeat(batch, particles) if particles > 1 else batch

    def fold(self, value: Tensor, site: LatentSite, particles: int, size: int) -> Tensor:
        value = value.reshape(*site.plate_shape, particles, size, *site.event_shape)
        return value.movedim(len(site.plate_shape), 0)

    def unfold(self, value: Tensor, site: LatentSite) -> Tensor:
        k = len(site.plate_shape)
        value = value.movedim(0, k)
        return value.reshape(*value.shape[:k], -1, *site.event_shape)

    def total(self, log_prob: Tensor, site: Any, program: str, particles: int, size: int) -> Tensor:
        log_prob = self._expanded(log_prob, site, program, size * particles)
        return log_prob.reshape(-1, size * particles).sum(0).reshape(-1, size)

    def kept(self, particles: int, size: int) -> dict[str, int]:
        return {PLATE: particles * size}

    def one(self, value: Tensor, site: Any, particles: int, index: int) -> Tensor:
        axis = value.dim() - site["fn"].event_dim - 1 - self.inner
        return value.unflatten(axis, (particles, -1)).select(axis, index)


class Loop(Repeat):
    """One particle at a time: the last resort."""

    most = 1


class Joint(Strategy):
    """The whole batch as one datum, particles as a plate left of all others or one at a time."""

    def __init__(self, layout: Layout, vectorized: bool = True) -> None:
        super().__init__(layout)
        self.vectorized = vectorized
        self.most = None if vectorized else 1

    def wrap(self, particles: int) -> Callable[[Callable], Callable]:
        if not self.vectorized:
            return super().wrap(particles)
        return pyro.plate(_PARTICLES, particles, dim=-1 - self.layout.depth)

    def fold(self, value: Tensor, site: LatentSite, particles: int, size: int) -> Tensor:
        return value.reshape(-1, 1, *site.event_shape).expand(particles, 1, *site.event_shape)

    def unfold(self, value: Tensor, site: LatentSite) -> Tensor:
        if not self.vectorized:
            return value[0, 0]
        gap = self.layout.depth - site.batch_dims
        return value.reshape(len(value), *[1] * gap, *site.event_shape)

    def total(self, log_prob: Tensor, site: Any, program: str, particles: int, size: int) -> Tensor:
        declared = {f.dim: f.size for f in site["cond_indep_stack"] if f.dim is not None}
        full = [declared.get(d, 1) for d in range(min([*declared, -1]), 0)]
        log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, tuple(full)))
        lead = particles if self.vectorized and log_prob.dim() > self.layout.depth else 1
        return log_prob.reshape(lead, -1).sum(1, keepdim=True).expand(particles, 1)

    def kept(self, particles: int, size: int) -> dict[str, int]:
        return {_PARTICLES: particles} if self.vectorized else {}

    def one(self, value: Tensor, site: Any, particles: int, index: int) -> Tensor:
        return _one(value, self.layout.shapes[site["name"]], index)


def _one(value: Tensor, shape: torch.Size, index: int) -> Tensor:
    """Particle ``index`` of a value whose leading dimension, if there are more numbers than in ``shape``, is
    theirs."""
    value = value.reshape(-1, *shape)
    return value[index % len(value)]

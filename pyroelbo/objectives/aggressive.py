"""Several updates of the encoder for each of the generator's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyroelbo.batch import Batch
from pyroelbo.numerics import positive_count
from pyroelbo.objectives.base import Objective, Update, adapt
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["Aggressive"]


class Aggressive(Objective):
    """``times`` updates of the encoder, then one of the generator, in each training step, all by the loss
    ``inner``.

    A generator that learns faster than its encoder can make the latents useless before they are used:
    posterior collapse. The encoder's updates are made on the step's batch, with fresh draws; as a first phase
    of training, a second ``fit`` follows with ``inner`` alone. KL weight, bound and refusals are those of
    ``inner``. Cost: ``times`` + 1 evaluations a step.

    Raises ValueError for pairs without a part of these names. Source: He, Spokoyny, Neubig and
    Berg-Kirkpatrick (2019), where each of the encoder's updates has a batch of its own.
    """

    def __init__(
        self, inner: Any, generator: tuple[str, ...], encoder: tuple[str, ...] = ("encoder",), times: int = 5
    ) -> None:
        self.inner = adapt(inner)
        self.generator, self.encoder = tuple(generator), tuple(encoder)
        self.times = positive_count("times", times, "number of updates")
        self.takes_particles, self.weightable = self.inner.takes_particles, self.inner.weightable

    @property
    def scale(self) -> Tensor | None:  # type: ignore[override]
        return self.inner.scale

    def weighted(self, weight: float) -> Objective:
        return Aggressive(self.inner.weighted(weight), self.generator, self.encoder, self.times)

    def updates(self) -> Mapping[str, Update]:
        loss: Any = self.inner
        return {"encoder": Update(loss, self.encoder, self.times), "generator": Update(loss, self.generator)}

    def check(self, pair: Pair, batch: Batch) -> None:
        for name in (*self.generator, *self.encoder):
            pair.part(name)
        self.inner.check(pair, batch)

    def validate(self, pair: Pair, y: Batch) -> Bound:
        return self.inner.validate(pair, y)

    def describe(self) -> str:
        return f"Aggressive({self.inner.describe()}, times={self.times})"

"""Evaluation in the coordinates of a guide that makes its latents from auxiliary draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyroelbo.batch import Batch
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.layout import LatentSite

__all__ = ["GuideSpace"]


class GuideSpace(Evaluator):
    """An :class:`~pyroelbo.evaluation.evaluator.Evaluator` whose latents are those that the guide draws.

    An automatic guide draws auxiliary numbers a and sets z = T(a), an invertible map. Then p(y, T(a)) |dT/da|
    and q(a) are densities of a with the integral p(y) and 1: ln |dT/da| is minus what the point masses at z
    count, and is added to the model's term of z. For a guide without auxiliary sites nothing changes.
    """

    @property
    def latents(self) -> Mapping[str, LatentSite]:
        return self.layout.drawn if self.auxiliary else self.layout.latents

    def _split(
        self, guide: dict[str, Tensor], model: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        made = [name for name in guide if name not in self.latents]
        drawn = {name: term for name, term in guide.items() if name in self.latents}
        return drawn, {**model, **{name: model.get(name, 0.0) - guide[name] for name in made}}

    def _traces(
        self,
        batch: Batch,
        particles: int,
        latents: Mapping[str, Tensor] | None = None,
        with_guide: bool | None = None,
    ) -> tuple[Any, Any]:
        if latents is None or not self.auxiliary:
            return super()._traces(batch, particles, latents, with_guide)
        given = {k: self.strategy.unfold(v, self.latents[k]) for k, v in latents.items()}
        repeated, wrap = self.strategy.batch(batch, particles), self.strategy.wrap(particles)
        return self.programs.again(repeated, given, wrap=wrap, around=self._enumerating)

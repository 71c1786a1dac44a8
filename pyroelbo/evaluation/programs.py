"""Running a pair's model and guide: in evaluation mode, traced, with given values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
from pyro import poutine
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyroelbo.batch import Batch
from pyroelbo.evaluation.masks import ModelMasks
from pyroelbo.evaluation.sites import Unavailable, summed_sites
from pyroelbo.pair import Pair, evaluation_mode, traced, unregistered

__all__ = ["Programs"]

Wrap = Callable[[Callable], Callable]


def _as_it_is(program: Callable) -> Callable:
    return program


class Programs:
    """The model of a pair and, ``with_guide``, its guide. Every trace of an evaluation is taken here.

    ``wrap`` encloses each program, for instance in a plate of particles; ``around`` the model
    alone. With ``summing``, finite latents that are marked so and that the guide leaves out are summed.
    ``whole`` runs plates that subsample over all their elements instead.
    """

    def __init__(
        self, pair: Pair, with_guide: bool = True, summing: bool = True, whole: bool = False
    ) -> None:
        self.pair = pair
        self.with_guide = with_guide
        self.summing = summing
        self.whole = whole

    def summed(self, guide: Any, model: Any) -> frozenset[str]:
        """The latent sites of two traces that are summed out."""
        return summed_sites(guide, model) if self.summing else frozenset()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode, without ``pyro.param`` statements for registered parameters and without
        validation."""
        with evaluation_mode(self.pair), unregistered(), pyro.validation_enabled(False):
            yield

    def _trace(self, program: Callable, batch: Batch) -> Any:
        with _whole_plates() if self.whole else nullcontext():
            return traced(program, batch)

    def traces(
        self,
        batch: Batch,
        latents: Mapping[str, Tensor] | None = None,
        *,
        wrap: Wrap = _as_it_is,
        around: Wrap = _as_it_is,
        with_guide: bool | None = None,
    ) -> tuple[Any, Any]:
        """Traces of guide and model, the model replayed on the guide's draws. Given ``latents`` are evaluated
        in both programs instead of drawn. Without a guide its trace is empty."""
        guide, model = (wrap(ModelMasks()(p)) for p in (self.pair.guide, self.pair.model))
        model = around(model)
        if latents is not None:
            guide, model = (poutine.condition(p, data=latents) for p in (guide, model))
        drawn = poutine.Trace()
        if self.with_guide if with_guide is None else with_guide:
            drawn = self._trace(guide, batch)
            seen = self._trace(poutine.replay(model, trace=drawn), batch)
        else:
            try:
                seen = self._trace(model, batch)
            except NotImplementedError as error:  # as an ImproperUniform, which only a guide can draw
                reason = str(error).partition("\n")[0]
                raise Unavailable(
                    f"the model's latents cannot be sampled from their prior: {reason}"
                ) from error
        return prune_subsample_sites(drawn), prune_subsample_sites(seen)

    def again(
        self,
        batch: Batch,
        values: Mapping[str, Tensor],
        *,
        wrap: Wrap = _as_it_is,
        around: Wrap = _as_it_is,
    ) -> tuple[Any, Any]:
        """Traces of guide and model with given ``values``, those of the guide's auxiliary sites included."""
        drawn = poutine.Trace()
        if not self.with_guide:
            return drawn, self.model(batch, values, around=around)
        guide = poutine.condition(wrap(ModelMasks()(self.pair.guide)), data=values)
        drawn = self._trace(guide, batch)
        for name in values:
            drawn.nodes[name]["is_observed"] = False  # a model is replayed on draws only
        program = poutine.replay(around(wrap(ModelMasks()(self.pair.model))), trace=drawn)
        seen = self._trace(program, batch)
        return prune_subsample_sites(drawn), prune_subsample_sites(seen)

    def model(self, batch: Batch, latents: Mapping[str, Tensor], *, around: Wrap = _as_it_is) -> Any:
        """A trace of the model alone, at given latents."""
        program = poutine.condition(around(ModelMasks()(self.pair.model)), data=latents)
        return prune_subsample_sites(self._trace(program, batch))

    def guide(
        self, batch: Batch, latents: Mapping[str, Tensor] | None = None, *, wrap: Wrap = _as_it_is
    ) -> Any:
        """A trace of the guide alone, with its own masks."""
        program = wrap(ModelMasks()(self.pair.guide))
        if latents is not None:
            program = poutine.condition(program, data=latents)
        return prune_subsample_sites(self._trace(program, batch))


@contextmanager
def _whole_plates() -> Iterator[None]:
    """Context manager in which a plate of ``size`` and ``subsample_size`` has all its elements.

    Pyro draws a plate's indices when the plate is made, before any handler sees how many there are to be.
    """
    drawn = SubsampleMessenger._subsample

    def whole(
        name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any
    ) -> Any:
        return drawn(name, size, None if subsample is None else subsample_size, subsample, *rest)

    SubsampleMessenger._subsample = staticmethod(whole)  # type: ignore[assignment]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(drawn)  # type: ignore[method-assign]

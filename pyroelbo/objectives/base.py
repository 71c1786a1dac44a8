"""What objectives are made of: wrapped losses, KL weights, and pathwise losses of one expression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Annealed", "Pathwise", "PerDatum", "ScaleLatents", "Weighted_ELBO", "WrappedELBO"]


class ScaleLatents(Messenger):
    """Multiplies ln p and ln q of every latent site by ``weight``, so that a loss is -E ln p(y|z) + weight · KL."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and type(msg["fn"]).__name__ != "_Subsample":
            msg["scale"] = msg["scale"] * self.weight


class WrappedELBO(ELBO):
    """An ELBO made from another one (abstract), with the same particles and plates."""

    def __init__(self, inner: ELBO) -> None:
        super().__init__(
            num_particles=inner.num_particles,
            max_plate_nesting=inner.max_plate_nesting,
            vectorize_particles=inner.vectorize_particles,
        )
        self.inner = inner

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return self.inner._get_trace(model, guide, args, kwargs)


class PerDatum(WrappedELBO):
    """Another ELBO divided by ``count(rows)``, so that its loss is nats per datum whatever the batch's size."""

    def __init__(self, inner: ELBO, count: Callable[[int], float]) -> None:
        super().__init__(inner)
        self.count = count

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        rows = len(next(iter((*args, *kwargs.values()))))
        return self.inner.differentiable_loss(model, guide, *args, **kwargs) / self.count(rows)


class Annealed(ELBO):
    """An ELBO (abstract) with a KL weight that may be set between steps; it is held in a tensor."""

    scale: Tensor

    @property
    def weight(self) -> float:
        return float(self.scale)

    @weight.setter
    def weight(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"weight takes a number of at least 0, got {value!r}")
        self.scale.fill_(value)


class Weighted_ELBO(WrappedELBO, Annealed):
    """E[-ln p(y | z)] + ``weight`` · KL: another ELBO with the latents' terms, of model and guide, scaled by
    ``weight``.

    The weight stands in the objective and never in the model, so the model's evidence can still be evaluated.
    Set ``objective.weight`` between steps to anneal. Below 1 it is no lower bound on ln p(y), above 1 a
    looser one. Any of Pyro's ELBOs may be wrapped that scores latent sites by their scale.

    Source: Higgins et al. (2017); Bowman et al. (2016) for annealing.
    """

    def __init__(self, inner: ELBO, weight: float = 1.0) -> None:
        super().__init__(inner)
        self.scale = torch.tensor(float(weight))

    def _scaled(self, program: Any) -> Any:
        handler = ScaleLatents(self.scale)

        def run(*args: Any, **kwargs: Any) -> Any:
            with handler:
                return program(*args, **kwargs)

        return run

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return super()._get_trace(self._scaled(model), self._scaled(guide), args, kwargs)

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.loss(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.differentiable_loss(self._scaled(model), self._scaled(guide), *args, **kwargs)

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Any:
        return self.inner.loss_and_grads(self._scaled(model), self._scaled(guide), *args, **kwargs)


class Pathwise(Trace_ELBO, Annealed):
    """Its loss (abstract) is one expression of reparametrized draws, ``_differentiable_loss_particle``."""

    def __init__(self, weight: float, **options: Any) -> None:
        super().__init__(**options)
        self.scale = torch.tensor(1.0)
        self.weight = weight

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The objective's value, a float."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def _check_pathwise(self, name: str, drawn: Any) -> None:
        if not drawn["fn"].has_rsample:
            raise ValueError(
                f"guide site {name!r} is a {type(drawn['fn']).__name__}, which is not reparametrized: "
                f"{type(self).__name__} takes pathwise gradients, use Trace_ELBO"
            )

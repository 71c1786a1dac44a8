"""Training objectives beside Pyro's own: each is a Pyro ``ELBO``, for ``SVI(loss=...)`` and for ``fit``
alike."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["Exact_ELBO", "Hard_ELBO", "Weighted_ELBO"]


class Exact_ELBO(Trace_ELBO):
    """-ELBO for guides that draw from the exact posterior: ln w alone is differentiated, the draws are held
    fixed.

    With q = p(z | y), ln w = ln p(y, z) - ln q(z | y) is ln p(y) whatever z was drawn, and so is its gradient
    that of ln p(y): without noise, while :class:`~pyro.infer.Trace_ELBO` adds a score term of mean zero. For
    other guides the gradient is biased: :func:`~pyroelbo.fit` takes this objective only where
    ``pair.exact_guide`` says so.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs, detach=True)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        total = sum(
            m.log_prob_sum() - g.log_prob_sum() for m, g in self._get_traces(model, guide, args, kwargs)
        )
        return -total / self.num_particles  # type: ignore[operator]

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


class Hard_ELBO(Trace_ELBO):
    """E_q[-ln p(y, z)]: the loss without the encoder's entropy, as for a code that is written down.

    For discrete z it is at least the ELBO loss, hence still an upper bound on -ln p(y), and what hard EM
    descends; for a deterministic encoder it is -ln p(y, z(y)), and equal to the ELBO loss if z is discrete.
    With Shannon's code words as z, |z| = ⌈-log₂ Pop(y)⌉, and P(z) = 2^-|z| it lies in [H, H + ln 2).
    For continuous z it is no bound (an encoder may shrink to a point), and can run to minus infinity.
    Gradients as in :class:`~pyro.infer.Trace_ELBO`: pathwise, or by the score function.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for site in guide_trace.nodes.values():
            if site["type"] == "sample":
                zero = torch.zeros_like(site["log_prob"])
                parts = ScoreParts(zero, site["score_parts"].score_function, 0)
                site.update(log_prob=zero, log_prob_sum=zero.sum(), score_parts=parts)
        return model_trace, guide_trace


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


class Weighted_ELBO(WrappedELBO):
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

    @property
    def weight(self) -> float:
        return float(self.scale)

    @weight.setter
    def weight(self, value: float) -> None:
        if not value >= 0:
            raise ValueError(f"weight takes a number of at least 0, got {value!r}")
        self.scale.fill_(value)

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

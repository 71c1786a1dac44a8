"""Objectives for pairs whose evidence or posterior is exact, and the hard ELBO."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyroelbo.pair import ExactPair, Program

__all__ = ["Evidence_ELBO", "Exact_ELBO", "Hard_ELBO"]


class Evidence_ELBO(ELBO):
    """-ln p(y), by the ``log_evidence`` of an :class:`~pyroelbo.ExactPair`, summed over the batch: no guide is run.

    With the exact posterior as guide it is the value and the gradient of :class:`Exact_ELBO`, at the cost of the
    evidence alone: for an autoregressive model one pass of its network in place of a site for every token. ``model``
    is that pair's own ``pair.model``. Raises TypeError for other models, ValueError where the evidence is that of a
    whole batch (latents outside of the data plate).
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("Evidence_ELBO draws nothing: it has no traces")

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        pair = getattr(model, "pair", None)
        if not isinstance(pair, ExactPair):
            of = f"that of a {type(pair).__name__}" if pair is not None else f"a {type(model).__name__}"
            raise TypeError(f"Evidence_ELBO takes the model of an ExactPair, got {of}: take Trace_ELBO")
        # As a program of its pair, so that SVI sees the parameters.
        value = Program(pair, type(pair).log_evidence)(*args, **kwargs)
        rows = len(next(iter((*args, *kwargs.values()))))
        if value.shape != (rows,):
            raise ValueError(
                f"Evidence_ELBO: {type(pair).__name__}.log_evidence gave shape {tuple(value.shape)} for {rows} data, it "
                "takes one number for each: take Trace_ELBO for latents outside of the data plate"
            )
        return -value.sum()

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


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

"""Objectives for pairs with exact evidence or posterior, and the hard ELBO."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.infer import ELBO, Trace_ELBO
from pyro.infer.enum import get_importance_trace
from torch import Tensor

from pyroelbo import evidence
from pyroelbo.batch import Batch
from pyroelbo.objectives.base import Objective, OneExpression
from pyroelbo.pair import ExactPair, Pair, Program
from pyroelbo.results import Bound

__all__ = ["Evidence_ELBO", "Exact_ELBO", "Hard_ELBO"]


class Evidence_ELBO(Objective, OneExpression, ELBO):
    """-ln p(y), by the ``log_evidence`` of an :class:`~pyroelbo.ExactPair`, summed over the batch; no guide
    is run.

    With the exact posterior as guide it has the value and gradient of :class:`Exact_ELBO` at the cost of the
    evidence alone: for an autoregressive model one network pass instead of a site for every token. ``model``
    must be that pair's own ``pair.model``. Raises TypeError for other models, ValueError where the evidence
    is that of a whole batch (latents outside the data plate).
    """

    weightable = False
    scales_subsamples = False

    def check(self, pair: Pair, batch: Batch) -> None:
        if not isinstance(pair, ExactPair):
            raise TypeError(
                f"objective 'evidence': expected an ExactPair, got {type(pair).__name__}: use 'elbo'"
            )

    def validate(self, pair: Pair, y: Batch) -> Bound:
        return evidence.exact(pair, y)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("Evidence_ELBO draws nothing: it has no traces")

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        pair = getattr(model, "pair", None)
        if not isinstance(pair, ExactPair):
            of = f"that of a {type(pair).__name__}" if pair is not None else f"a {type(model).__name__}"
            raise TypeError(f"model: expected the model of an ExactPair, got {of}: use Trace_ELBO")
        # As a program of its pair, so that SVI sees the parameters.
        value = Program(pair, type(pair).log_evidence)(*args, **kwargs)
        rows = len(next(iter((*args, *kwargs.values()))))
        if value.shape != (rows,):
            raise ValueError(
                f"{type(pair).__name__}.log_evidence: expected shape ({rows},), got {tuple(value.shape)}: "
                f"use Trace_ELBO "
                "for latents outside the data plate"
            )
        return -value.sum()


class Exact_ELBO(Objective, OneExpression, Trace_ELBO):
    """-ELBO for guides that draw from the exact posterior: only ln w is differentiated, the draws are held
    fixed.

    With q = p(z | y), ln w = ln p(y, z) - ln q(z | y) equals ln p(y) for every draw z, and its gradient is
    the gradient of ln p(y), without noise; :class:`~pyro.infer.Trace_ELBO` adds a score term of mean zero.
    For other guides the gradient is biased: :func:`~pyroelbo.fit` uses this objective only where
    ``pair.exact_guide`` is true.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        return get_importance_trace("flat", self.max_plate_nesting, model, guide, args, kwargs, detach=True)

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        total = sum(
            m.log_prob_sum() - g.log_prob_sum() for m, g in self._get_traces(model, guide, args, kwargs)
        )
        return -total / self.num_particles  # type: ignore[operator]


class Hard_ELBO(Objective, Trace_ELBO):
    """E_q[-ln p(y, z)]: the loss without the guide's entropy, the expected description length of (y, z).

    For discrete z it is at least the ELBO loss, hence an upper bound on -ln p(y), and what hard EM minimizes;
    for a deterministic guide it is -ln p(y, z(y)), equal to the ELBO loss if z is discrete. With Shannon's
    code words as z, of |z| = ⌈-log₂ Pop(y)⌉ bits for a data distribution Pop with entropy H, and P(z) =
    2^-|z|, it lies in [H, H + ln 2). For continuous z it is no bound (a guide may shrink to a point) and can
    diverge to minus infinity. Gradients as in :class:`~pyro.infer.Trace_ELBO`: pathwise or by the score
    function.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        model_trace, guide_trace = super()._get_trace(model, guide, args, kwargs)
        for site in guide_trace.nodes.values():
            if site["type"] == "sample":
                zero = torch.zeros_like(site["log_prob"])
                parts = ScoreParts(zero, site["score_parts"].score_function, 0)
                site.update(log_prob=zero, log_prob_sum=zero.sum(), score_parts=parts)
        return model_trace, guide_trace

"""E- and M-steps of `fit_em`: a pair's own, those of several starts side by side, and by gradients."""

from __future__ import annotations

import copy
import dataclasses
import math
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.evaluation.enumeration import Unavailable, enumerate_latents
from pyroelbo.pair import ExactPair, Pair

__all__ = ["ClosedForm", "ClosedSteps", "GradientSteps", "StackedSteps", "Statistics", "state_of"]

Statistics = dict[str, Any]


@runtime_checkable
class ClosedForm(Protocol):
    """What a pair defines for an M-step in closed form.

    A pair may also have ``initialize(*batch)``, a random start from data, used by restarts (with a choice of
    starts if it has an argument ``start``); ``log_prior()``, the log density of its parameters (MAP: the
    objective is the evidence of all data plus this); and ``least_data``, the smallest number of data that it
    can be fitted to. Where ``stacks(*batch)`` is true, restarts run side by side: parameters then have a
    leading dimension R, one entry a start, and these methods return ln p(y) as [R, B], the log prior as [R],
    and statistics with a leading R.
    """

    def e_step(self, *batch: Tensor, hard: bool) -> tuple[Tensor, Statistics]:
        """ln p(y) per datum, [B], and the batch's expected sufficient statistics by name: tensors or other
        values with ``+`` and ``* number``. With ``hard`` the posterior is replaced by its mode z*: ln p(y,
        z*), and the statistics of z*. Runs without gradients.
        """
        ...

    def m_step(self, statistics: Statistics) -> None:
        """Set the parameters to the maximum of the expected log joint."""
        ...


def state_of(pair: Pair) -> dict[str, Tensor]:
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}


class ClosedSteps:
    """E- and M-steps defined by the pair."""

    def __init__(self, pair: Any, hard: bool) -> None:
        self.pair, self.hard = pair, hard

    @torch.no_grad()
    def expect(self, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, Statistics]:
        more = {} if weights is None else {"weights": weights}
        if more and "weights" not in signature(self.pair.e_step).parameters:
            raise TypeError(
                f"weights: expected a pair whose e_step has an argument weights, got {self.pair.name}"
            )

        def e_step(*parts: Any, **named: Any) -> Any:
            return self.pair.e_step(*parts, hard=self.hard, **more, **named)

        return batches.call(e_step, batch)

    @staticmethod
    def add(a: Statistics, b: Statistics) -> Statistics:
        return {k: a[k] + b[k] for k in a}

    @torch.no_grad()
    def maximize(self, statistics: Statistics) -> None:
        self.pair.m_step(statistics)


class StackedSteps(ClosedSteps):
    """The same for a copy of the pair whose parameters hold several starts along a leading dimension."""

    def __init__(self, pair: Any, hard: bool, starts: int) -> None:
        super().__init__(copy.deepcopy(pair), hard)
        for x in state_of(self.pair).values():
            x.data = x.data.expand(starts, *x.shape).clone()

    def keep(self, rows: list[int], statistics: Statistics) -> Statistics:
        """Keep only the starts in ``rows``."""
        for x in state_of(self.pair).values():
            x.data = x.data[rows]

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows]
            fields = {f.name: getattr(value, f.name)[rows] for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)

        return {k: kept(v) for k, v in statistics.items()}


class GradientSteps:
    """E-steps by marginals of the potentials of ln p(y, z); M-steps that maximize
    Σ marginal · potential = E_q ln p(y, z) by L-BFGS from the current parameters.
    """

    def __init__(self, pair: Pair, hard: bool, steps: int, frozen: frozenset[int]) -> None:
        self.pair, self.hard, self.steps = pair, hard, steps
        self.depth: int | None = None
        self.parameters = [p for p in pair.parameters() if id(p) not in frozen]
        if not self.parameters:
            raise ValueError("freeze: expected to leave parameters to fit, got none")

    def expect(
        self, batch: Batch, weights: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Batch, tuple[Tensor, ...]]]]:
        value, used = self._expect(batch, weights)
        return value, [(batch, used)]

    def _expect(self, batch: Batch, weights: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Log evidence [B], and the expected counts of each potential."""
        if not isinstance(self.pair, ExactPair):
            graph = self._graph(batch)
            with torch.enable_grad():
                leaves = tuple(f.detach().requires_grad_() for f in graph.factors)
                value = graph.log_partition(leaves, largest=self.hard)
                counted = value if weights is None else value * weights.to(value)
                used = torch.autograd.grad(counted.sum(), leaves, allow_unused=True, materialize_grads=True)
            return value.detach(), used
        posterior = batches.call(self.pair.posterior, batch)
        if isinstance(posterior, StructuredDistribution):
            return posterior.expected_parts(hard=self.hard, weights=weights)
        with torch.no_grad():
            (joint,) = self._potentials(batch)
            value, share = joint.logsumexp(-1), joint.softmax(-1)
            if self.hard:
                best = joint.argmax(-1, keepdim=True)
                value, share = joint.amax(-1), torch.zeros_like(joint).scatter_(-1, best, 1.0)
            return value, (share if weights is None else share * weights.to(share)[:, None],)

    @staticmethod
    def add(a: list, b: list) -> list:
        return a + b

    def _graph(self, batch: Batch) -> Any:
        try:
            graph, self.depth = enumerate_latents(self.pair, batch, depth=self.depth)
        except Unavailable as error:
            raise TypeError(
                f"pair: expected an exact posterior or finite latents, got {self.pair.name}: {error}. Train "
                f"it with fit"
            ) from error
        return graph

    def _potentials(self, batch: Batch) -> tuple[Tensor, ...]:
        if not isinstance(self.pair, ExactPair):
            return self._graph(batch).factors
        posterior = batches.call(self.pair.posterior, batch)
        if isinstance(posterior, StructuredDistribution):
            return posterior.potentials
        if not isinstance(posterior, torch.distributions.Categorical):
            remedy = "freeze nothing" if hasattr(self.pair, "m_step") else "define e_step and m_step"
            raise TypeError(
                f"{self.pair.name}.posterior: expected a structured or categorical posterior for M-steps by "
                f"gradients, got {type(posterior).__name__}: {remedy}"
            )
        return (posterior.logits + batches.call(self.pair.log_evidence, batch)[:, None],)

    def _expected_log_joint(self, statistics: list) -> Tensor:
        total: Any = 0.0
        for batch, used in statistics:
            for weight, potential in zip(used, self._potentials(batch), strict=True):
                total = total + (torch.where(weight > 0, potential, 0.0) * weight).sum()
        return total

    def maximize(self, statistics: list) -> None:
        optimizer = torch.optim.LBFGS(
            self.parameters, max_iter=self.steps, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )
        count = sum(batches.size(batch) for batch, _ in statistics)
        best, kept = math.inf, [p.detach().clone() for p in self.parameters]

        def loss() -> Tensor:
            nonlocal best, kept
            with torch.enable_grad():
                value = -self._expected_log_joint(statistics) / count
                gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
            value = value.detach()
            if -math.inf < float(value) < best:
                best, kept = float(value), [p.detach().clone() for p in self.parameters]
            return value

        optimizer.step(loss)
        with torch.no_grad():  # a line search may end at a worse point, or diverge where there is no maximum
            torch._foreach_copy_(self.parameters, kept)

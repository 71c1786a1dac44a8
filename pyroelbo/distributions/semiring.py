"""Semirings: the algebras in which a structure's ``_forward`` is evaluated, one for each query.

A semiring holds *values*, tensors of log weights, perhaps with one extra leading dimension; ``lift`` makes a
value of a log potential. A dynamic program addresses dimensions from the right (negative ``dim``), so that
the leading one passes through; it writes the semiring's one as ``lift`` of zeros, its zero as ``lift`` of
-inf. ``torch.where``, ``stack``, ``cat``, indexing and ``expand`` on values are allowed under the same rule.

Structures are found by autograd: the gradient of the total with respect to the log potentials is the expected
number of times each part is used (Log), or an indicator of the parts of one structure (Max, Sample, KBest).

Source: Goodman (1999), *Semiring parsing*; Li and Eisner (2009) for the expectation semirings.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pyroelbo.numerics import logsumexp

__all__ = ["KBest", "Log", "Max", "Relative", "Sample", "Semiring", "choose"]


class Semiring(ABC):
    """Sums and products of values; see the module's text for what a value is."""

    def lift(self, potential: Tensor) -> Tensor:
        """The value of a log potential."""
        return potential

    def unlift(self, value: Tensor) -> Tensor:
        """The result that a total represents."""
        return value

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        """The product of two values, broadcasting as usual."""
        return a + b

    @abstractmethod
    def sum(self, value: Tensor, dim: int) -> Tensor:
        """The sum over one dimension, given from the right."""

    def dot(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        """``sum(mul(a, b), dim)``: an inner product, or a matrix product after unsqueezing."""
        return self.sum(self.mul(a, b), dim)


class Log(Semiring):
    """ln Σ exp: the log partition; its gradient is the marginals."""

    def sum(self, value: Tensor, dim: int) -> Tensor:
        return logsumexp(value, dim)


class Max(Semiring):
    """The largest log weight; its gradient is the indicator of one best structure (the first among ties)."""

    def sum(self, value: Tensor, dim: int) -> Tensor:
        return value.max(dim).values


def choose(log_weight: Tensor, uniform: Tensor, dim: int = -1) -> Tensor:
    """An index along ``dim`` with probability ∝ exp(log_weight), by inversion of ``uniform``.

    An entry of weight zero is never chosen unless all weights are zero.
    """
    peak = log_weight.amax(dim, keepdim=True)
    total = (log_weight - torch.where(peak.isinf(), torch.zeros_like(peak), peak)).exp().cumsum(dim)
    last = total.narrow(dim, total.shape[dim] - 1, 1)
    mark = (
        torch.minimum(uniform.unsqueeze(dim), uniform.new_tensor(1 - torch.finfo(uniform.dtype).eps)) * last
    )
    return (total <= mark).sum(dim).clamp_(max=total.shape[dim] - 1)


class _SampledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, dim):
        ctx.save_for_backward(value)
        ctx.dim = dim
        return logsumexp(value, dim)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (value,) = ctx.saved_tensors
        index = choose(value, torch.rand_like(grad), ctx.dim).unsqueeze(ctx.dim)
        return torch.zeros_like(value).scatter_(ctx.dim, index, grad.unsqueeze(ctx.dim)), None


class Sample(Semiring):
    """The log partition; its gradient is the indicator of a structure sampled in proportion to its weight."""

    def sum(self, value: Tensor, dim: int) -> Tensor:
        return _SampledSum.apply(value, dim)


class KBest(Semiring):
    """The k largest log weights, in order, along a leading dimension; -inf if there are fewer."""

    def __init__(self, k: int) -> None:
        self.k = k

    def lift(self, potential: Tensor) -> Tensor:
        rest = potential.new_full((self.k - 1, *potential.shape), -math.inf)
        return torch.cat([potential.unsqueeze(0), rest])

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) + b.unsqueeze(0)).flatten(0, 1).topk(self.k, 0).values

    def sum(self, value: Tensor, dim: int) -> Tensor:
        return value.movedim(dim, 0).flatten(0, 1).topk(self.k, 0).values


class Relative(Semiring):
    """E_p[ a·ln p + b·ln q ] of normalized p and q, exactly and without cancellation.

    A value stacks three tensors: p's log weight, q's, and the expectation e inside this substructure. For a
    sum with fractions p_i and q_i, the expectation is Σ_i p_i (e_i + a ln p_i + b ln q_i). The entropy has a
    = -1, b = 0; the cross-entropy a = 0, b = -1; the KL divergence a = 1, b = -1, as a sum of local ones, so
    that nearly equal distributions lose no digits.
    """

    def __init__(self, a: float, b: float) -> None:
        self.a, self.b = a, b

    def lift(self, potential: Tensor, other: Tensor | None = None) -> Tensor:
        return torch.stack([potential, potential if other is None else other, torch.zeros_like(potential)])

    def unlift(self, value: Tensor) -> Tensor:
        return torch.where(value[0] == -math.inf, 0.0, value[2])

    def sum(self, value: Tensor, dim: int) -> Tensor:
        log_p, log_q, inner = value.unbind(0)
        sum_p, sum_q = logsumexp(log_p, dim), logsumexp(log_q, dim)
        used = log_p > -math.inf
        fraction = _minus(log_p, sum_p.unsqueeze(dim), used)
        p = torch.where(used, fraction.exp(), 0.0)
        term = torch.where(used, inner, 0.0) + self.a * fraction
        if self.b:
            both = used & (log_q > -math.inf)
            log_fraction = _minus(log_q, sum_q.unsqueeze(dim), both)
            term = term + self.b * torch.where(used & ~both, -math.inf, log_fraction)
        # a fraction that underflows to zero contributes nothing, even times inf; an infinite term has no
        # gradient,
        # since later steps may still exclude it
        finite = (p > 0) & term.isfinite()
        expected = torch.where(
            finite, p * torch.where(finite, term, 0.0), torch.where(p > 0, term, 0.0).detach()
        )
        return torch.stack([sum_p, sum_q, expected.sum(dim)])


def _minus(x: Tensor, total: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x, 0.0) - torch.where(where, total, 0.0)

"""Codecs of Pyro distributions: whatever has independent coordinates, or can be had one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro.distributions import Categorical, MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Independent, constraints
from torch.nn.functional import logsigmoid, one_hot

from pyroelbo.coding.stack import Codec, Impossible, Stack
from pyroelbo.coding.symbols import Bernoullis, Constants, Counts, Gaussians, Tables
from pyroelbo.evaluation.sites import is_point
from pyroelbo.evaluation.supports import support_of
from pyroelbo.pair import Stepwise, Summed

__all__ = ["Grid", "Sequential", "a_component", "codec_of", "is_discrete", "is_gaussian"]

LOSS = 1e-3  # nats that rounding may cost a coordinate, to leading order
_WIDEST = 2**20  # values of a coordinate on a grid
_LONGEST = 4096  # columns of a table
_TINY = 1e-30  # for probabilities above 0; the coder's least is 2^-24


@dataclass(frozen=True)
class Grid:
    """The values of a continuous latent that are coded: multiples of 2^-exponent in [low, high], with an
    exponent for each coordinate of the event (an array of its shape).

    Rounding z to spacing δ costs about (δ/s)²/24 nats of reconstruction where the posterior has standard
    deviation s: the log density is rounded with error variance δ²/12 and curvature 1/s².
    """

    exponents: np.ndarray
    low: int
    high: int

    @classmethod
    def of(cls, mean: Tensor, std: Tensor) -> Grid:
        """The grid for q(z | y) with these means and standard deviations [*, *event] of many data (rows
        first), with spacings that cost :data:`LOSS` nats a coordinate, and ±8 standard deviations of room."""
        if not bool(std.isfinite().all() and (std > 0).all() and mean.isfinite().all()):
            raise ValueError("expected finite means and positive standard deviations")
        low = math.floor(float((mean - 8 * std).min()))
        high = math.ceil(float((mean + 8 * std).max()))
        spacing = (24 * LOSS / std.pow(-2).mean(0)).sqrt()
        finest = math.log2(_WIDEST / max(1, high - low))
        exponents = (-spacing.log2()).ceil().clamp(-20, math.floor(finest))
        return cls(exponents.cpu().numpy().astype(np.int64), low, high)

    @property
    def uniform(self) -> Grid:
        """The grid with the smallest spacing for all coordinates."""
        return replace(self, exponents=np.full_like(self.exponents, self.exponents.max()))

    def at(self, coordinate: int) -> Grid:
        """The grid of one coordinate of a vector."""
        return replace(self, exponents=self.exponents[coordinate])

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest multiple, arrays of the event's shape."""
        unit = np.exp2(self.exponents)
        low, high = np.floor(self.low * unit), np.ceil(self.high * unit)
        return low.astype(np.int64), np.maximum(high, low + 1).astype(np.int64)


class _Tensors(Codec):
    """Tensors of a ``dtype`` by a codec of arrays; with ``exponents``, multiples of 2^-exponent."""

    def __init__(self, codec: Codec, dtype: torch.dtype, exponents: np.ndarray | None = None) -> None:
        self.codec, self.dtype, self.exponents = codec, dtype, exponents

    def push(self, stack: Stack, value: Tensor) -> None:
        array = value.detach().cpu().numpy()
        if self.exponents is not None:
            array = np.rint(np.ldexp(array.astype(np.float64), self.exponents)).astype(np.int64)
        self.codec.push(stack, array)

    def pop(self, stack: Stack) -> Tensor:
        array = self.codec.pop(stack)
        if self.exponents is not None:
            array = np.ldexp(array.astype(np.float64), -self.exponents)
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.dtype)


class Sequential(Codec):
    """Vectors [n, T] coordinate by coordinate. Pushing runs the same operations as popping, so that both
    compute the same numbers; ``rows`` are coded, those beyond, zeros, only computed.

    Cost: one step per coordinate in either direction, and memory for all their tables.
    """

    def __init__(
        self,
        steps: Stepwise,
        shape: tuple[int, int],
        dtype: torch.dtype,
        grid: Grid | None = None,
        rows: int | None = None,
    ) -> None:
        self.steps, self.shape, self.dtype, self.grid = steps, shape, dtype, grid
        self.rows = shape[0] if rows is None else rows

    def _codec(self, state: Any, place: int) -> Codec:
        fn, grid = self.steps.distribution(state), self.grid and self.grid.at(place)
        return codec_of(fn, self.dtype, grid, rows=self.rows)

    def _order(self) -> Tensor | None:
        return None if self.steps.order is None else self.steps.order(self.shape[0]).cpu()

    def push(self, stack: Stack, value: Tensor) -> None:
        order = self._order()
        value = value if order is None else value.gather(-1, order)
        state, codecs = self.steps.begin(self.shape[0]), []
        for t in range(self.shape[1]):
            codecs.append(self._codec(state, t))
            if t + 1 < self.shape[1]:
                state = self.steps.append(state, value[:, t])
        for t in reversed(range(self.shape[1])):
            try:
                codecs[t].push(stack, value[: self.rows, t])
            except Impossible as error:
                (row,) = error.place
                raise Impossible(error.value, (row, t if order is None else int(order[row, t]))) from None

    def pop(self, stack: Stack) -> Tensor:
        order = self._order()
        value = torch.zeros(self.shape, dtype=self.dtype)
        state = self.steps.begin(self.shape[0])
        for t in range(self.shape[1]):
            value[: self.rows, t] = self._codec(state, t).pop(stack)
            if t + 1 < self.shape[1]:
                state = self.steps.append(state, value[:, t])
        return value if order is None else torch.zeros_like(value).scatter(-1, order, value)


class _OneHot(Codec):
    """Vectors of one 1 and zeros, by the codec of its place; what follows the first ``rows`` is zero."""

    def __init__(self, codec: Codec, symbols: int, dtype: torch.dtype, rows: int | None) -> None:
        self.codec, self.symbols, self.dtype, self.rows = codec, symbols, dtype, rows

    def push(self, stack: Stack, value: Tensor) -> None:
        place = value.argmax(-1)
        wrong = (value != one_hot(place, self.symbols))[: self.rows].any(-1).nonzero()
        if len(wrong):
            raise Impossible(float(value[tuple(wrong[0])].sum()), tuple(wrong[0].tolist()))
        self.codec.push(stack, place)

    def pop(self, stack: Stack) -> Tensor:
        value = one_hot(self.codec.pop(stack), self.symbols).to(self.dtype)
        if self.rows is not None:
            value[self.rows :] = 0
        return value


class _Summed(Codec):
    """A mixture p(z) = Σ_m p(m) p(z | m) by bits-back: pushing z pops m from p(m | z), so that the cost is
    -log₂ p(z) without any gap."""

    def __init__(
        self, summed: Summed, dtype: torch.dtype, grid: Grid | None, narrow: bool, rows: int | None
    ) -> None:
        self.summed = summed
        self._options = (dtype, grid, narrow, rows)

    def _given(self, m: Tensor) -> Codec:
        dtype, grid, narrow, rows = self._options
        return codec_of(self.summed.given(m), dtype, grid, narrow=narrow, rows=rows)

    def _component(self, fn: Any) -> Codec:
        return codec_of(fn, torch.long, rows=self._options[-1])

    def push(self, stack: Stack, value: Tensor) -> None:
        m = self._component(self.summed.posterior(value)).pop(stack)
        self._given(m).push(stack, value)
        self._component(self.summed.prior).push(stack, m)

    def pop(self, stack: Stack) -> Tensor:
        m = self._component(self.summed.prior).pop(stack)
        value = self._given(m).pop(stack)
        self._component(self.summed.posterior(value)).push(stack, m)
        return value


class _Reshaped(Codec):
    """A codec of vectors [n, T] for values of another shape."""

    def __init__(self, codec: Sequential, shape: torch.Size) -> None:
        self.codec, self.shape = codec, shape

    def push(self, stack: Stack, value: Tensor) -> None:
        self.codec.push(stack, value.reshape(self.codec.shape))

    def pop(self, stack: Stack) -> Tensor:
        return self.codec.pop(stack).reshape(self.shape)


def codec_of(
    fn: Any, dtype: torch.dtype, grid: Grid | None = None, *, narrow: bool = False, rows: int | None = None
) -> Codec:
    """The codec of values of a distribution, tensors of its whole shape and of a ``dtype``.

    Discrete distributions are coded by tables of their probabilities, continuous ones on a ``grid``,
    Gaussians directly and others by differences of their cdf; distributions with a method ``stepwise``
    coordinate by coordinate, those with a method ``summed`` with the component as one more latent; point
    masses cost nothing. ``rows`` codes the first rows only.

    Raises ValueError for distributions whose coordinates depend on one another, and for continuous ones
    without a grid. ``narrow`` as for :class:`Gaussians`.
    """
    steps = fn.stepwise() if hasattr(fn, "stepwise") else None
    if steps is not None:
        if getattr(fn, "one_hot", False):
            *shape, symbols = fn.shape()
            size = (fn.batch_shape.numel(), shape[-1])
            codes = _Reshaped(Sequential(steps, size, torch.long, grid, rows), torch.Size(shape))
            return _OneHot(codes, symbols, dtype, rows)
        shape = (fn.batch_shape.numel(), fn.event_shape.numel())
        return _Reshaped(Sequential(steps, shape, dtype, grid, rows), fn.shape())
    if hasattr(fn, "summed"):
        return _Summed(fn.summed(), dtype, grid, narrow, rows)
    if is_point(fn):
        return _Tensors(Constants(_array(fn.sample(), fn.shape(), rows)), dtype)
    if isinstance(_unwrapped(fn), torch.distributions.OneHotCategorical):
        base = _unwrapped(fn)
        place = _discrete(Categorical(logits=base.logits), fn.shape()[:-1], torch.long, rows)
        return _OneHot(_Tensors(place, torch.long), base.event_shape[0], dtype, rows)
    base = _coordinate(fn)
    if is_discrete(base):
        return _Tensors(_discrete(base, fn.shape(), dtype, rows), dtype)
    if grid is None:
        raise ValueError(
            f"expected a discrete distribution, got a {type(base).__name__}: a density is no probability. "
            "Use a likelihood of integers, such as bernoulli, categorical or discretized_logistic"
        )
    low, high = (np.broadcast_to(x, fn.shape()) for x in grid.bounds())
    if isinstance(base, torch.distributions.Normal):
        unit = np.exp2(grid.exponents)
        mean, std = (_array(x, fn.shape()) * unit for x in (base.loc, base.scale))
        gaussians = Gaussians(mean[:rows], std[:rows], low[:rows], high[:rows], narrow)
        return _Tensors(gaussians, dtype, grid.exponents)
    return _Tensors(_on_grid(base, fn.shape(), grid, rows), dtype, grid.exponents)


def is_discrete(fn: Any) -> bool:
    """Whether a distribution is one of integers."""
    if isinstance(_unwrapped(fn), torch.distributions.OneHotCategorical):
        return True
    return bool(getattr(_coordinate(fn).support, "is_discrete", False))


def is_gaussian(fn: Any) -> bool:
    """Whether a distribution, or each component of a mixture, has independent Gaussian coordinates."""
    return isinstance(_unwrapped(a_component(fn)), torch.distributions.Normal)


def a_component(fn: Any) -> Any:
    """A component of a mixture, drawn at random for each datum; any other distribution itself."""
    summed = fn.summed() if hasattr(fn, "summed") else None
    return fn if summed is None else summed.given(summed.prior.sample())


def _unwrapped(fn: Any) -> Any:
    while isinstance(fn, (Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn


def _coordinate(fn: Any) -> Any:
    """The distribution of a single coordinate; ValueError where they depend on one another."""
    base = _unwrapped(fn)
    if isinstance(base, MaskedDistribution):
        raise ValueError("expected a distribution without a mask: code whole data")
    if len(base.event_shape):
        raise ValueError(
            f"expected independent coordinates, got a {type(base).__name__}: its coordinates depend on one "
            "another. Choose a factorized family (encoder='diagonal', prior='standard'), or give the "
            "distribution a method stepwise()"
        )
    return base


def _array(x: Tensor, shape: torch.Size, rows: int | None = None) -> np.ndarray:
    return x.detach().double().expand(shape)[:rows].cpu().numpy()


def _discrete(base: Any, shape: torch.Size, dtype: torch.dtype, rows: int | None) -> Codec:
    support = support_of(base)
    if support is constraints.boolean:
        logits = getattr(base, "logits", None)
        if logits is None:  # of a mixture
            zero, one = (_exp(base.log_prob(torch.tensor(float(v)))) for v in (0, 1))
        else:
            zero, one = _exp(logsigmoid(-logits.double())), _exp(logsigmoid(logits.double()))
        return Bernoullis(_array(zero, shape, rows), _array(one, shape, rows))
    high = getattr(support, "upper_bound", None)
    if high is not None:
        low, high = (torch.as_tensor(x) for x in (support.lower_bound, high))
        return Tables(_probabilities(base, int(low.min()), int(high.max()), shape, rows), int(low.min()))
    # beyond some deviations the probabilities of counts are too small for a table
    top = float((base.mean + 8 * base.variance.sqrt()).max()) + 8
    probs = _probabilities(base, 0, min(int(top), _LONGEST), shape, rows)
    rest = np.clip(1 - probs.sum(-1, keepdims=True), 1e-7, None)
    return Counts(np.concatenate([probs, rest], -1))


def _probabilities(base: Any, low: int, high: int, shape: torch.Size, rows: int | None) -> np.ndarray:
    """Probabilities of ``low`` … ``high``, [*shape, V]; zero outside the support."""
    values = torch.arange(low, high + 1).reshape(-1, *[1] * len(base.batch_shape))
    inside = support_of(base).check(values)
    if not bool(inside.all()):
        within = values.expand(inside.shape)
        values = torch.where(inside, within, torch.where(inside, within, high).amin(0))
    probs = torch.where(inside, _exp(base.log_prob(values)), 0.0)
    return _array(probs.movedim(0, -1), torch.Size((*shape, high - low + 1)), rows)


def _exp(log_p: Tensor) -> Tensor:
    """Probabilities, float64, of logarithms: zero for -inf alone, not where e^x underflows."""
    return torch.where(log_p == -math.inf, 0.0, log_p.double().exp().clamp_min(_TINY))


def _on_grid(base: Any, shape: torch.Size, grid: Grid, rows: int | None) -> Tables:
    """Probabilities of the cells of a grid with one exponent, by differences of the cdf."""
    exponent = int(grid.exponents.max())
    low, high = (int(x.max()) for x in grid.bounds())
    support = support_of(base)
    for name, of in (("lower_bound", max), ("upper_bound", min)):
        bound = getattr(support, name, None)
        if bound is not None:
            edge = float(torch.as_tensor(bound).double().max()) * 2.0**exponent
            inner = math.floor(edge) + 1 if of is max else math.ceil(edge) - 1
            low, high = (of(low, inner), high) if of is max else (low, of(high, inner))
    if not 0 < high - low < _LONGEST:
        raise ValueError(
            f"expected at most {_LONGEST} values on the grid of a {type(base).__name__}, got {high - low}: "
            "use a Gaussian"
        )
    edges = (torch.arange(low, high + 2, dtype=torch.float64) - 0.5) * 2.0**-exponent
    inside = base.cdf(edges[1:-1].reshape(-1, *[1] * len(base.batch_shape))).double()
    ends = inside.new_zeros(1, *inside.shape[1:]), inside.new_ones(1, *inside.shape[1:])
    probs = torch.cat([ends[0], inside, ends[1]]).diff(dim=0).clamp_min(_TINY)
    return Tables(_array(probs.movedim(0, -1), torch.Size((*shape, high - low + 1)), rows), low)

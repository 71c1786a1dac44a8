"""Invertible maps with tractable Jacobians, and the distributions that they make of Gaussian noise.

Every map works in both directions, ``to_noise(x, context)`` and ``from_noise(e, context)``, each returning
the value [*, d] and ln |det| of its own Jacobian [*]. Maps hold parameters but no state: nothing of a call is
kept, so they can be copied, pickled and compiled after use. ``context`` [*, c] conditions a map on c numbers;
leading dimensions broadcast.

Sources: Dinh, Krueger and Bengio (2015) for couplings; Papamakarios, Pavlakou and Murray (2017) for masked
autoregressive maps; Durkan, Bekasov, Murray and Papamakarios (2019) for the splines.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from pyroelbo.nn import MLP, bounded, join, masked_mlp
from pyroelbo.numerics import positive_count

__all__ = [
    "KINDS",
    "Coupling",
    "FlowDistribution",
    "MaskedMap",
    "Reversed",
    "SplineFlow",
    "VectorDistribution",
    "spline",
]

KINDS = ("coupling", "autoregressive")
BOUND = 5.0  # splines act on [-BOUND, BOUND]
_MIN_PIECE = 1e-3  # smallest width and height of a piece, as a share of the interval, and smallest slope
_LOG_SCALE = 7.0  # log scales of affine maps stay within ± this


def spline(x: Tensor, pieces: Sequence[Tensor], inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Monotone rational-quadratic spline of [-5, 5] onto itself, the identity outside.

    ``pieces`` are unnormalized widths and heights [*, bins] and inner log slopes [*, bins - 1] for every
    number of ``x`` [*]. Returns the value at x and ln of the derivative there; with ``inverse``, those of the
    inverse map.

    Source: Durkan et al. (2019), equations 4 to 8.
    """
    widths, heights, slopes = pieces
    bins = widths.shape[-1]

    def knots(pieces: Tensor) -> tuple[Tensor, Tensor]:
        size = 2 * BOUND * (_MIN_PIECE + (1 - _MIN_PIECE * bins) * pieces.softmax(-1))
        return size, pad(size[..., :-1].cumsum(-1), (1, 0)) - BOUND

    width, left = knots(widths)
    height, low = knots(heights)
    # zero gives slope one
    slope = pad(_MIN_PIECE + softplus(slopes + math.log(math.expm1(1 - _MIN_PIECE))), (1, 1), value=1.0)
    inside = x.abs() < BOUND
    at = torch.where(inside, x, 0.0)
    starts = low if inverse else left
    index = (starts[..., 1:] <= at.unsqueeze(-1)).sum(-1, keepdim=True)
    w, h, x0, y0, d0 = (t.gather(-1, index).squeeze(-1) for t in (width, height, left, low, slope))
    d1 = slope.gather(-1, index + 1).squeeze(-1)
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        rise = at - y0
        a, b, c = h * (s - d0) + rise * bend, h * d0 - rise * bend, -s * rise
        t = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
        value = x0 + t * w
    else:
        t = (at - x0) / w
        value = y0 + h * (s * t.square() + d0 * t * (1 - t)) / (s + bend * t * (1 - t))
    curve = d1 * t.square() + 2 * s * t * (1 - t) + d0 * (1 - t).square()
    log_slope = 2 * s.log() + curve.log() - 2 * (s + bend * t * (1 - t)).log()
    log_slope = -log_slope if inverse else log_slope
    return torch.where(inside, value, x), torch.where(inside, log_slope, 0.0)


class _SplineMap(nn.Module):
    """An affine map and a spline of each coordinate behind the first ``kept``, whose parameters a network
    computes from the other coordinates and the context (abstract)."""

    def __init__(self, dims: int, kept: int, bins: int) -> None:
        super().__init__()
        self.dims, self.kept, self.bins = dims, kept, bins

    @property
    def per_coordinate(self) -> int:
        """Numbers that the network gives for one coordinate."""
        return 3 * self.bins + 1

    @abstractmethod
    def _parameters_of(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The network's output [*, d - kept, per_coordinate]."""

    def _read(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        shift, log_scale, *pieces = self._parameters_of(x, context).split(
            (1, 1, self.bins, self.bins, self.bins - 1), -1
        )
        return shift.squeeze(-1), bounded(log_scale.squeeze(-1), _LOG_SCALE), pieces

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, log_scale, pieces = self._read(x, context)
        moved = (x[..., self.kept :] - shift) * (-log_scale).exp()
        moved, log_slope = spline(moved, pieces)
        return torch.cat([x[..., : self.kept], moved], -1), (log_slope - log_scale).sum(-1)

    @abstractmethod
    def from_noise(self, e: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def _undo(self, e: Tensor, given: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inverse where ``given`` holds the coordinates that the parameters depend on."""
        shift, log_scale, pieces = self._read(given, context)
        moved, log_slope = spline(e[..., self.kept :], pieces, inverse=True)
        moved = shift + log_scale.exp() * moved
        return torch.cat([e[..., : self.kept], moved], -1), (log_slope + log_scale).sum(-1)


class Coupling(_SplineMap):
    """Moves the second half of the coordinates given the first: one pass of an MLP in either direction.

    Raises ValueError for fewer than two coordinates.
    """

    def __init__(self, dims: int, hidden: Sequence[int], bins: int = 8, context: int = 0) -> None:
        if dims < 2:
            raise ValueError(f"dims: expected at least 2 for a coupling, which splits them, got {dims}")
        super().__init__(dims, dims // 2, bins)
        self.network: Any = MLP((self.kept + context, *hidden, self.per_coordinate * (dims - self.kept)))
        _scale_down(self.network[-1])

    def _parameters_of(self, x: Tensor, context: Tensor | None) -> Tensor:
        given = x[..., : self.kept]
        out = self.network(given if context is None else join(given, context))
        return out.reshape(*x.shape[:-1], -1, self.per_coordinate)

    def from_noise(self, e: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._undo(e, e, context)


class MaskedMap(_SplineMap):
    """Moves every coordinate given those before it: one pass of a masked network to the noise, ``dims``
    passes back."""

    def __init__(self, dims: int, hidden: Sequence[int], bins: int = 8, context: int = 0) -> None:
        super().__init__(dims, 0, bins)
        self.network: Any = masked_mlp(dims, hidden, self.per_coordinate, context)
        _scale_down(self.network.layers[-1])

    def _parameters_of(self, x: Tensor, context: Tensor | None) -> Tensor:
        out = self.network(x) if context is None else self.network(x, context)
        return out.transpose(-1, -2).reshape(*x.shape[:-1], -1, self.per_coordinate)

    def from_noise(self, e: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self._undo(e, e, context)
        for _ in range(
            1, self.dims
        ):  # after d passes the first d coordinates are right, whatever the others are
            x, log_det = self._undo(e, x, context)
        return x, log_det


def _scale_down(last: Any) -> None:
    """Start near the identity, where splines of standard noise belong."""
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(0.1)


class SplineFlow(nn.Module):
    """``layers`` spline maps one after the other, with the coordinates' order permuted before each.

    ``to_noise(x)`` is e = f_L(… f_1(x)) and ``from_noise(e)`` its inverse; both also return ln |det| of their
    own Jacobian. Cost: one pass of each network in either direction, ``dims`` passes from noise for
    ``autoregressive``.

    Args:
        dims: number of coordinates; at least 2 for ``coupling``.
        kind: ``"coupling"`` (:class:`Coupling`) or ``"autoregressive"`` (:class:`MaskedMap`).
        layers: number of maps.
        hidden: widths of each map's network.
        bins: pieces of each spline on [-5, 5].
        context: number of conditioning numbers, 0 for none.
    """

    def __init__(
        self,
        dims: int,
        kind: str = "coupling",
        layers: int = 4,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
        context: int = 0,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        positive_count("layers", layers, "whole number")
        if not (isinstance(bins, int) and 2 <= bins < 1 / _MIN_PIECE):
            raise ValueError(f"bins: expected 2 to {1 / _MIN_PIECE - 1:.0f} pieces of a spline, got {bins!r}")
        self.dims, self.context = dims, context
        make: Callable[..., _SplineMap] = Coupling if kind == "coupling" else MaskedMap
        self.maps: Any = nn.ModuleList(make(dims, hidden, bins, context) for _ in range(layers))
        order = torch.Generator().manual_seed(0)
        for i in range(layers):
            flip = torch.arange(dims).flip(0)
            self.register_buffer(
                f"order_{i}", flip if dims < 4 or i % 2 else torch.randperm(dims, generator=order)
            )

    def _order(self, i: int) -> Tensor:
        return getattr(self, f"order_{i}")

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(())
        for i, part in enumerate(self.maps):
            x, log_slope = part.to_noise(x[..., self._order(i)], context)
            log_det = log_det + log_slope
        return x, log_det

    def from_noise(self, e: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = e.new_zeros(())
        for i in reversed(range(len(self.maps))):
            e, log_slope = self.maps[i].from_noise(e, context)
            e, log_det = e[..., self._order(i).argsort()], log_det + log_slope
        return e, log_det


class Reversed(nn.Module):
    """A flow whose two directions have changed places: of an autoregressive one, draws in one pass of each
    network and densities in ``dims`` passes (an inverse autoregressive flow).

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016).
    """

    def __init__(self, flow: SplineFlow) -> None:
        super().__init__()
        self.flow, self.dims, self.context = flow, flow.dims, flow.context

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.from_noise(x, context)

    def from_noise(self, e: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.flow.to_noise(e, context)


class VectorDistribution(TorchDistribution):
    """A distribution of real vectors whose expanded batch dimensions share its parameters (abstract)."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``[*sample, *B, d]``."""
        return self.rsample(sample_shape)


class FlowDistribution(VectorDistribution):
    """p(z) of z = loc + exp(log_scale) · f⁻¹(e), e ~ N(0, I): with x = (z - loc) / exp(log_scale),

        ln p(z) = ln N(f(x); 0, I) + ln |det f'(x)| - Σ_d log_scale_d.

    ``flow`` is f (:class:`SplineFlow` or :class:`Reversed`); ``loc`` and ``log_scale`` are [*B, d], and
    ``context`` [*B, c]; event shape [d]. Draws are reparametrized. ``expand`` adds batch dimensions, which
    share the parameters.
    """

    has_rsample = True

    def __init__(
        self,
        flow: SplineFlow | Reversed,
        loc: Tensor,
        log_scale: Tensor,
        context: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.flow, self.loc, self.log_scale, self.context = flow, loc, log_scale, context
        batch = torch.broadcast_shapes(loc.shape[:-1], log_scale.shape[:-1])
        batch = batch if context is None else torch.broadcast_shapes(batch, context.shape[:-1])
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        x = (value - self.loc) * (-self.log_scale).exp()
        e, log_det = self.flow.to_noise(x, self.context)
        log_det = log_det - self.log_scale.sum(-1)
        log_prob = log_det - 0.5 * (e.square().sum(-1) + self.event_shape[0] * math.log(2 * math.pi))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparametrized draws ``[*sample, *B, d]``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        e = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        x, _ = self.flow.from_noise(e, self.context)
        return self.loc + self.log_scale.exp() * x

"""Mixtures of any distribution, and the E-step of Gaussian ones."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyroelbo.distributions.checks import check_finite_or_minus_inf, first_index, refuse_outside
from pyroelbo.distributions.kernels.dispatch import kernels
from pyroelbo.distributions.semiring import choose
from pyroelbo.distributions.structured import any_support, independent_normal, log_prob_within, within_support
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import Summed

__all__ = ["DiagonalMixture", "GaussianStatistics", "Mixture"]

LANES = 8  # coordinates of a block of features, as many as the compiled kernels take at once
BLOCK = 2**18  # numbers held at a time, so that they stay in the cache


@dataclass(frozen=True)
class GaussianStatistics:
    """Expected sufficient statistics of M Gaussians: ``count [M]``, ``mean [M,D]``, and ``scatter``.

    ``scatter [M,D,D]``, or its diagonal ``[M,D]``, is Σ_n r_nm (y_n - mean_m)(y_n - mean_m)'; scatter /
    count is the covariance of the M-step. All may have dimensions in front. The statistics of two parts of
    the data add up with ``+``; ``*`` weighs them.

    Source: Dempster, Laird, Rubin (1977); Chan, Golub, LeVeque (1979) for ``+``.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def weighted(cls, y: Tensor, responsibilities: Tensor, diagonal: bool = True) -> GaussianStatistics:
        """Those of data ``y [N,D]`` with ``responsibilities [*R,N,M]`` of M components, in float64. Cost:
        O(N·M·D),
        full O(N·M·D²)."""
        found = []
        y, shape = y.double(), responsibilities.shape[:-2] + responsibilities.shape[-1:]
        rows = responsibilities.double().mT.reshape(-1, len(y))
        for r in rows.split(max(1, BLOCK // y.numel())):
            count = r.sum(-1)
            mean = (r @ y) / torch.where(count > 0, count, 1.0)[:, None]
            apart = y - mean[:, None]
            weighted = r[..., None] * apart
            found.append((count, mean, (weighted * apart).sum(1) if diagonal else weighted.mT @ apart))
        return cls(*(torch.cat(x).view(*shape, *x[0].shape[1:]) for x in zip(*found, strict=True)))

    def __add__(self, other: GaussianStatistics) -> GaussianStatistics:
        count = self.count + other.count
        fraction = torch.where(count > 0, other.count / count, 0.0)
        apart, weight = other.mean - self.mean, (self.count * fraction)[..., None]
        if self.scatter.dim() == self.mean.dim():
            product = weight * apart.square()
        else:
            product = (weight * apart)[..., None] * apart[..., None, :]
        mean = self.mean + fraction[..., None] * apart
        return GaussianStatistics(count, mean, self.scatter + other.scatter + product)

    def __mul__(self, weight: float) -> GaussianStatistics:
        """Those of data that count ``weight`` times each."""
        return GaussianStatistics(self.count * weight, self.mean, self.scatter * weight)


class Mixture(TorchDistribution):
    """p(y) = Σ_m softmax(logits)_m p_m(y): M components of any one kind of distribution.

    ``logits [*B,M]`` are normalized inside, -inf allowed; ``components`` has batch shape ``[*B,M]``
    (broadcast) and any event shape. ``posterior(y)`` is the Categorical over components, the
    responsibilities. A value outside the support of one component has log probability -inf there; outside
    that of all components it is an error.

    Cost: O(M) evaluations. Source: Pearson (1894); Dempster, Laird, Rubin (1977).
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, components: Any, validate_args: bool | None = None) -> None:
        if not components.batch_shape or components.batch_shape[-1] not in (1, logits.shape[-1]):
            raise ValueError(
                "logits, components: expected shape and batch shape [*B,M], got "
                f"{tuple(logits.shape)} and {tuple(components.batch_shape)}"
            )
        shape = torch.broadcast_shapes(logits.shape, components.batch_shape)
        peak = logits.amax(-1)
        self.components = components if components.batch_shape == shape else components.expand(shape)
        super().__init__(shape[:-1], components.event_shape, validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(logits=logits)
            if (peak == -math.inf).any():
                raise ValueError(
                    f"logits: expected a finite logit, got none at batch index "
                    f"{first_index(peak == -math.inf)}"
                )
        self.logits = logits.log_softmax(-1).expand(shape)

    @property
    def support(self) -> Any:
        return any_support(self.components)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Mixture:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        shape = (*batch_shape, self.logits.shape[-1])
        new.logits, new.components = self.logits.expand(shape), self.components.expand(shape)
        return new

    def _joint(self, y: Tensor) -> Tensor:
        event = self.event_dim
        if self._validate_args and y.shape[y.dim() - event :] != self.event_shape:
            raise ValueError(
                f"y: expected shape [*B] and then {tuple(self.event_shape)}, got {tuple(y.shape)}"
            )
        each = y.unsqueeze(-1 - event)
        try:
            return self.logits + log_prob_within(self.components, each, None)
        except ValueError:  # the value is outside one component's support, perhaps inside another's
            good = within_support(self.components, each)
            if good is None:
                raise
        if self._validate_args:
            refuse_outside(y, ~good.any(-1), event, "the support of a component")
        return self.logits + log_prob_within(self.components, each, good)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(y), ``[*sample, *B]``."""
        return logsumexp(self._joint(value))

    def posterior(self, y: Tensor) -> Any:
        """p(m | y), a Categorical of batch shape ``[*sample, *B]``.

        A datum of probability zero has no posterior: ValueError, or, without validation, the prior.
        """
        joint = self._joint(y)
        impossible = joint.amax(-1, keepdim=True) == -math.inf
        if self._validate_args and impossible.any():
            raise ValueError(
                f"y: expected data of positive probability, got zero at index "
                f"{first_index(impossible[..., 0])}"
            )
        return dist.Categorical(logits=torch.where(impossible, self.logits, joint), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples ``[*sample, *B, *event]``."""
        with torch.no_grad():
            every = self.components.sample(torch.Size(sample_shape))
            shape = self._extended_shape(torch.Size(sample_shape))
            batch = shape[: len(shape) - self.event_dim]
            logits = self.logits.expand(*batch, -1)
            which = choose(logits, torch.rand(batch, dtype=logits.dtype, device=logits.device))
            index = which.view(*batch, 1, *(1,) * self.event_dim).expand(*batch, 1, *self.event_shape)
            return every.gather(len(batch), index).squeeze(len(batch))

    def expected_statistics(self, y: Tensor, *, hard: bool = False) -> tuple[Tensor, GaussianStatistics]:
        """One E-step over data ``y [N,D]``: ln p(y_n) ``[*R,N]`` and the components' expected statistics,
        without gradients.

        For Gaussian components, full (``MultivariateNormal``) or diagonal (``Normal(...).to_event(1)``); a
        batch ``*R`` of mixtures, of at most one dimension, shares the data. With ``hard`` each datum belongs
        to its best component, and the first result is ln p(y_n, m). Arithmetic is in float64. Cost:
        O(R·N·M·D²), diagonal O(R·N·M·D).
        """
        gaussian = _moments(self.components)
        if gaussian is None or len(self.batch_shape) > 1:
            raise ValueError(
                "components: expected Gaussians with at most one batch dimension, got "
                f"{type(self.components).__name__} with batch shape {tuple(self.batch_shape)}"
            )
        if y.dim() != 2 or not len(y) or y.shape[1:] != self.event_shape:
            wanted = tuple(self.event_shape)
            raise ValueError(f"y: expected shape [N,D] with N > 0 and D of {wanted}, got {tuple(y.shape)}")
        with torch.no_grad():
            evidence, statistics, error = self._by_features(y, *gaussian, hard)
            if not error < 1e-9:
                evidence, statistics = self._by_component(y, gaussian[1].dim() == gaussian[0].dim(), hard)
            return evidence.to(torch.promote_types(y.dtype, self.logits.dtype)), statistics

    def _by_features(self, y, mean, precision, log_det, hard):
        """Quadratic forms as inner products with y y', and a bound on their rounding error."""
        center = y[: BLOCK // y.shape[-1]].mean(0, dtype=torch.float64)
        shape, logits = mean.shape, self.logits.reshape(-1)
        lead, count, dims = shape[:-2], len(logits), shape[-1]
        mean, log_det = mean.reshape(count, dims) - center, log_det.reshape(count)
        precision = precision.reshape(count, *precision.shape[len(shape) - 1 :])
        features = _Features(dims, diagonal=precision.dim() == 2)
        linear = precision * mean if features.diagonal else (precision @ mean[..., None]).squeeze(-1)
        weights = torch.cat([features.fold(precision), linear], -1)
        constant = log_det - 0.5 * ((linear * mean).sum(-1) + dims * math.log(2 * math.pi)) + logits
        run = kernels("mixture", y)
        e_step = _e_step if run is None else functools.partial(_compiled_e_step, run)
        evidence, total, sums, square = e_step(y, center, weights, constant, shape[-2], features, hard)
        average = sums[:, -dims:] / torch.where(total > 0, total, 1.0)[:, None]
        second = features.unfold(sums)
        outer = average.square() if features.diagonal else average[:, :, None] * average[:, None, :]
        scatter = second - total.view(-1, *(1,) * (outer.dim() - 1)) * outer
        # NaN if a sum is
        error = torch.finfo(torch.float64).eps * dims * square.sum() * precision.abs().amax() + 0 * sums.sum()
        found = (x.view(*lead, shape[-2], *x.shape[1:]) for x in (total, average + center, scatter))
        return evidence.view(*lead, len(y)), GaussianStatistics(*found), error

    def _by_component(self, y, diagonal, hard):
        if self.batch_shape:
            alone = [self._one(r)._by_component(y, diagonal, hard) for r in range(self.batch_shape[0])]
            found = zip(*((v.count, v.mean, v.scatter) for _, v in alone), strict=True)
            return torch.stack([v for v, _ in alone]), GaussianStatistics(*map(torch.stack, found))
        joint = self._joint(y).double()
        if hard:
            evidence, best = joint.max(-1)
            responsibilities = torch.zeros_like(joint).scatter_(-1, best[:, None], 1.0)
        else:
            evidence = logsumexp(joint)
            posterior = (joint - evidence[:, None]).exp()
            responsibilities = torch.where(evidence[:, None] > -math.inf, posterior, 0.0)
        return evidence, GaussianStatistics.weighted(y, responsibilities, diagonal)

    def _one(self, row: int) -> Mixture:
        """One mixture of a batch of Gaussian ones."""
        c = self.components
        if isinstance(c, torch.distributions.MultivariateNormal):
            return Mixture(
                self.logits[row], dist.MultivariateNormal(c.loc[row], scale_tril=c.scale_tril[row])
            )
        base = c.base_dist
        return Mixture(self.logits[row], dist.Normal(base.loc[row], base.scale[row]).to_event(1))


class DiagonalMixture(TorchDistribution):
    """p(z) = Σ_m softmax(logits)_m N(z; loc_m, diag scale_m²): one mixture of M Gaussians shared by the
    batch.

    ``logits [M]``, ``loc [M,D]``, ``scale [M,D]``; event shape ``[D]``. Batch dimensions come from ``expand``
    and share the components, so that all quadratic forms are one matrix product, as a prior of many
    components or an aggregated posterior needs. Products are computed in float64 (float32 on devices without
    it) around the mean of ``loc``, with an error of 1e-16 times the largest squared distance in units of
    ``scale``. Cost: O(M·D) multiplications per datum, no [.., M, D] tensor. Raises ValueError for shapes that
    do not match.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector
    has_rsample = False

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        if loc.dim() != 2 or loc.shape != scale.shape or logits.shape != loc.shape[:1]:
            raise ValueError(
                "logits, loc, scale: expected shapes [M], [M,D] and [M,D], got "
                f"{tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(scale.shape)}"
            )
        self.logits, self.loc, self.scale = logits.log_softmax(-1), loc, scale
        super().__init__(torch.Size(), loc.shape[1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiagonalMixture:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_components(self, value: Tensor) -> Tensor:
        """ln softmax(logits)_m + ln N(value; loc_m, scale_m), ``[*, M]``."""
        exact = torch.float32 if self.loc.device.type == "mps" else torch.float64
        center = self.loc.detach().mean(0)
        x, mean = (value - center).to(exact), (self.loc - center).to(exact)
        precision = self.scale.to(exact).square().reciprocal()
        weights = torch.cat([-0.5 * precision, precision * mean], -1)
        constant = -0.5 * (precision * mean.square()).sum(-1) - self.scale.to(exact).log().sum(-1)
        constant = constant + self.logits - 0.5 * self.event_shape[0] * math.log(2 * math.pi)
        return (torch.cat([x * x, x], -1) @ weights.t() + constant).to(self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = logsumexp(self.log_components(value))
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def summed(self) -> Summed:
        """The mixture with its component as a latent."""
        return Summed(
            dist.Categorical(logits=self.logits.expand(*self.batch_shape, -1)),
            lambda m: dist.Normal(self.loc[m], self.scale[m]).to_event(1),
            lambda z: dist.Categorical(logits=self.log_components(z)),
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Samples ``[*sample, *B, D]``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        which = choose(
            self.logits.expand(*shape[:-1], -1),
            torch.rand(shape[:-1], dtype=self.loc.dtype, device=self.loc.device),
        )
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc[which] + self.scale[which] * noise


class _Features:
    """Distinct products of coordinates, as blocks of a symmetric matrix, then the coordinates themselves."""

    def __init__(self, dims: int, diagonal: bool) -> None:
        self.dims, self.diagonal = dims, diagonal
        cuts = [slice(i, min(i + LANES, dims)) for i in range(0, dims, LANES)]
        self.blocks = [(a, b) for i, a in enumerate(cuts) for b in cuts[i:]]

    def fold(self, precision: Tensor) -> Tensor:
        """Weights of the products in -½ y' precision y."""
        if self.diagonal:
            return -0.5 * precision
        parts = [(-0.5 if a == b else -1.0) * precision[:, a, b].flatten(1) for a, b in self.blocks]
        return torch.cat(parts, -1)

    def fill(self, block: Tensor, y: Tensor, center: Tensor) -> Tensor:
        x = torch.sub(y, center, out=block[:, -self.dims :])
        if self.diagonal:
            torch.mul(x, x, out=block[:, : self.dims])
            return block
        at = 0
        for a, b in self.blocks:
            left, right = x[:, a, None], x[:, None, b]
            size = left.shape[1] * right.shape[2]
            torch.mul(left, right, out=block[:, at : at + size].view(len(y), left.shape[1], right.shape[2]))
            at += size
        return block

    def unfold(self, sums: Tensor) -> Tensor:
        if self.diagonal:
            return sums[:, : self.dims]
        square = sums.new_empty(len(sums), self.dims, self.dims)
        at = 0
        for a, b in self.blocks:
            size = (a.stop - a.start) * (b.stop - b.start)
            block = sums[:, at : at + size].view(len(sums), a.stop - a.start, -1)
            square[:, a, b], square[:, b, a] = block, block.mT
            at += size
        return square


def _e_step(y, center, weights, constant, size, features, hard):
    """Of R mixtures of ``size`` components: ln p(y) ``[R,N]``, the sums over the data of responsibilities
    ``[R·M]`` and of their products with the features ``[R·M,F]``, and the largest square of each coordinate
    ``[D]``.
    """
    count, dims = len(constant), y.shape[-1]
    rows = max(64, BLOCK // max(count, weights.shape[-1]))
    block = y.new_empty(min(rows, len(y)), weights.shape[-1], dtype=torch.float64)
    sums, total, square = torch.zeros_like(weights), weights.new_zeros(count), weights.new_zeros(dims)
    evidence = y.new_empty(count // size, len(y), dtype=torch.float64)
    for part, out in zip(y.split(rows), evidence.split(rows, -1), strict=True):
        phi = features.fill(block[: len(part)], part, center)
        square = torch.maximum(square, phi[:, -dims:].square().amax(0))
        flat = torch.addmm(constant[:, None].double(), weights, phi.t())
        responsibilities = flat.view(-1, size, len(part))
        peak = responsibilities.amax(-2, keepdim=True)
        if hard:
            best = responsibilities.argmax(-2, keepdim=True)
            out.copy_(peak.squeeze(-2))
            responsibilities.zero_().scatter_(-2, best, 1.0)
        else:
            norm = responsibilities.sub_(peak).exp_().sum(-2, keepdim=True)
            torch.add(norm.log().squeeze(-2), peak.squeeze(-2), out=out)
            responsibilities /= norm
        total += flat.sum(-1)
        sums.addmm_(flat, phi)
    return evidence, total, sums, square


def _compiled_e_step(run, y, center, weights, constant, size, features, hard):
    """``_e_step`` by the compiled kernel ``run.e_step``."""

    def whole(n):
        return -(-n // run.LANES) * run.LANES

    groups, width = len(constant) // size, weights.shape[-1]
    transposed = weights.new_zeros(width, groups, whole(size))
    transposed[..., :size] = weights.t().view(width, groups, size)
    start = weights.new_full((groups, whole(size)), -math.inf)
    start[:, :size] = constant.view(groups, size)
    out = run.Statistics(
        peak=weights.new_empty(groups, len(y)),
        norm=weights.new_empty(groups, len(y)),
        counts=weights.new_zeros(groups * whole(size)),
        sums=weights.new_zeros(groups * whole(size), whole(width)),
        square=weights.new_zeros(y.shape[-1]),
    )
    given = y.contiguous(), center.contiguous(), transposed.flatten(1), start.flatten()
    run.e_step(*given, whole(size), features.diagonal, hard, out)
    total = out.counts.view(groups, -1)[:, :size].flatten()
    sums = out.sums.view(groups, whole(size), -1)[:, :size, :width].reshape(groups * size, width)
    return out.peak.add_(out.norm.log_()), total, sums, out.square


def _moments(components: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Mean, precision (a matrix or its diagonal) and ½ ln det(precision) in float64; None if not Gaussian."""
    if isinstance(components, torch.distributions.MultivariateNormal):
        scale = components.scale_tril.double()
        log_det = -scale.diagonal(0, -1, -2).log().sum(-1)
        return components.loc.double(), torch.cholesky_inverse(scale), log_det
    base = independent_normal(components)
    if base is not None:
        mean, scale = base.loc.double(), base.scale.double()
        return mean, scale.square().reciprocal(), -scale.log().sum(-1)
    return None

"""Emissions of finite latents: S distributions of one kind, their sufficient statistics and M-steps."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo.distributions.mixture import GaussianStatistics
from pyroelbo.models.kmeans import k_means
from pyroelbo.models.observation import Coins
from pyroelbo.models.precision import exact, exact_dtype
from pyroelbo.numerics import positive_count

__all__ = [
    "EMISSIONS",
    "AnyGaussian",
    "Bernoulli",
    "Categorical",
    "Emission",
    "FullGaussian",
    "Gaussian",
    "Poisson",
    "log_shares",
]

LOG_RANGE = 30.0  # log odds and log rates stay within ± this, where every log probability is finite
_BLOCK = 2**22  # numbers held at once when no gradient is needed


def log_shares(counts: Tensor, smoothing: float, before: Tensor) -> Tensor:
    """ln of normalized ``counts + smoothing`` over the last dimension, the M-step of a categorical; rows
    whose counts are all zero keep their values ``before``."""
    counts = counts + smoothing
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts.log() - total.log(), before.log_softmax(-1)).to(before.dtype)


class Emission(nn.Module):
    """p(y | z) for z in 0 … S-1 (abstract). ``smoothing`` = a is the pseudo-count of a conjugate prior, with
    which the M-step is MAP.

    Parameters may have a leading dimension R, one entry per start of EM; the starts share the data, and
    statistics and :meth:`log_prior` get the same dimension.
    """

    event: tuple[int, ...]
    starts: tuple[str, ...] = ("random",)

    def __init__(self, states: int, dims: int, smoothing: float) -> None:
        super().__init__()
        positive_count("components", states)
        positive_count("dims", dims)
        if not smoothing >= 0:
            raise ValueError(f"smoothing: expected a pseudo-count of at least 0, got {smoothing!r}")
        self.states, self.dims, self.smoothing = states, dims, smoothing

    @abstractmethod
    def distribution(self, z: Any = None, dtype: torch.dtype | None = None) -> Any:
        """p(y | z) of batch shape [S], or of the shape of the index ``z``, with parameters of ``dtype``."""

    @abstractmethod
    def log_prob(self, y: Tensor) -> Tensor:
        """ln p(y_n | z = s) of data ``y [N, *event]``, ``[*R, N, S]``; in float64 without gradients."""

    @abstractmethod
    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        """Expected sufficient statistics, in float64, of data ``y [N, *event]`` with responsibilities
        ``share [*R, N, S]``."""

    @abstractmethod
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Set the parameters to the maximum of the expected log likelihood plus :meth:`log_prior`."""

    def check(self, y: Tensor) -> None:
        """Raise ValueError for data outside the support."""
        good = self.distribution().support.check(y)
        if not bool(good.all()):
            first = int((~good).nonzero()[0])
            raise ValueError(
                f"y: expected values in the support of a {type(self).__name__}, got {y[first].tolist()} at "
                "index "
                f"[{first}]"
            )

    def initialize(self, y: Tensor, start: str | None = None) -> None:
        """Initialize from data [N, *event], as one of ``starts``; by default the first of them."""
        start = start or self.starts[0]
        if start not in self.starts:
            raise ValueError(
                f"start: expected one of {self.starts} for a {type(self).__name__}, got {start!r}"
            )
        self.check(y)
        self._initialize(y, start)

    @abstractmethod
    def _initialize(self, y: Tensor, start: str) -> None: ...

    @abstractmethod
    def log_prior(self) -> Tensor:
        """The log density [*R] of the parameters, up to a constant, of which ``smoothing`` is the
        pseudo-count."""

    def blank(self, *shape: int) -> Tensor:
        """Data of the right shape and dtype whose values do not matter."""
        return next(self.parameters()).new_zeros(*shape, *self.event)

    @staticmethod
    def _at(parameter: Tensor, z: Any, dtype: torch.dtype | None) -> Tensor:
        return (parameter if z is None else parameter[z]).to(dtype or parameter.dtype)


class Categorical(Emission):
    """p(y = v | z) = softmax(logits_z)_v over ``dims`` symbols; y is a LongTensor. Prior Dirichlet(1 + a)."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, dims, smoothing)
        self.event = ()
        self.logits = nn.Parameter(0.1 * torch.randn(states, dims))

    def distribution(self, z: Any = None, dtype: torch.dtype | None = None) -> Any:
        return dist.Categorical(logits=self._at(self.logits, z, dtype))

    def log_prob(self, y: Tensor) -> Tensor:
        return exact(self.logits).log_softmax(-1)[..., y].mT

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        on = share.new_zeros(*share.shape[:-2], self.dims, self.states, dtype=torch.float64)
        return {"on": on.index_add_(-2, y, share.double()).mT}

    def m_step(self, statistics: dict[str, Any]) -> None:
        self.logits.copy_(log_shares(statistics["on"], self.smoothing, self.logits))

    def _initialize(self, y: Tensor, start: str) -> None:
        drawn = dist.Dirichlet(torch.ones_like(self.logits)).sample()
        frequent = torch.bincount(y, minlength=self.dims) / len(y)
        self.logits.copy_((0.5 * frequent + 0.5 * drawn).log())

    def log_prior(self) -> Tensor:
        return (
            self.smoothing * self.logits.log_softmax(-1).sum((-1, -2))
            if self.smoothing
            else self.logits.new_zeros(self.logits.shape[:-2])
        )

    def blank(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.logits.device)


class Bernoulli(Emission):
    """p(y | z) = Π_d Bernoulli(y_d; σ(log_odds_zd)), y in {0, 1}^D. Prior Beta(1 + a, 1 + a); log odds stay
    within ±30.

    Two matrix products a pass, O(N·S·D) without a tensor [N, S, D].
    """

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, dims, smoothing)
        self.event = (dims,)
        self.log_odds = nn.Parameter(torch.randn(states, dims))

    def distribution(self, z: Any = None, dtype: torch.dtype | None = None) -> Any:
        return Coins(logits=self._at(self.log_odds, z, dtype)).to_event(1)

    def log_prob(self, y: Tensor) -> Tensor:
        log_odds = exact(self.log_odds)
        y = y.to(log_odds.dtype)
        # two products of terms of one sign, so that nothing cancels
        return y @ F.logsigmoid(log_odds).mT + (1 - y) @ F.logsigmoid(-log_odds).mT

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        share = share.double()
        return {"on": share.mT @ y.double(), "count": share.sum(-2)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        on, count = statistics["on"], statistics["count"][..., None]
        odds = (on + self.smoothing).log() - (count - on).clamp_min(0).add(self.smoothing).log()
        odds = torch.where(count + self.smoothing > 0, odds.clamp(-LOG_RANGE, LOG_RANGE), self.log_odds)
        self.log_odds.copy_(odds)

    def _initialize(self, y: Tensor, start: str) -> None:
        rows = y[torch.randint(len(y), (self.states,), device=y.device)].to(self.log_odds.dtype)
        mean = y.to(self.log_odds.dtype).mean(0)
        self.log_odds.copy_(torch.logit(0.7 * mean + 0.2 * rows + 0.05))

    def log_prior(self) -> Tensor:
        sum_of_logs = F.logsigmoid(self.log_odds) + F.logsigmoid(-self.log_odds)
        return self.smoothing * sum_of_logs.sum((-1, -2))


class Poisson(Emission):
    """p(y | z) = Π_d Poisson(y_d; rate_zd), counts y [.., D]. Prior Gamma(1 + a, a); log rates stay above
    -30."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, dims, smoothing)
        self.event = (dims,)
        self.log_rate = nn.Parameter(0.5 * torch.randn(states, dims))

    def distribution(self, z: Any = None, dtype: torch.dtype | None = None) -> Any:
        return dist.Poisson(self._at(self.log_rate, z, dtype).exp()).to_event(1)

    def log_prob(self, y: Tensor) -> Tensor:
        log_rate = exact(self.log_rate)
        y = y.to(log_rate.dtype)
        own = torch.lgamma(y + 1).sum(-1, keepdim=True)
        return y @ log_rate.mT - log_rate.exp().sum(-1).unsqueeze(-2) - own

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        share = share.double()
        return {"total": share.mT @ y.double(), "count": share.sum(-2)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        a, count = self.smoothing, statistics["count"][..., None]
        rate = ((statistics["total"] + a).log() - (count + a).log()).clamp_min(-LOG_RANGE)
        self.log_rate.copy_(torch.where(count + a > 0, rate, self.log_rate))

    def _initialize(self, y: Tensor, start: str) -> None:
        mean = y.to(self.log_rate.dtype).mean(0) + 0.1
        self.log_rate.copy_(mean.log() + 0.5 * torch.randn_like(self.log_rate))

    def log_prior(self) -> Tensor:
        return self.smoothing * (self.log_rate - self.log_rate.exp()).sum((-1, -2))


class AnyGaussian(Emission):
    """p(y | z) = N(loc_z, covariance_z) (abstract). No standard deviation falls below ``floor`` · ``unit``,
    in any direction: without a floor the likelihood of a component on a single datum is unbounded.

    ``unit`` [D] is 1 until :meth:`initialize` sets it to the data's standard deviations, so that the floor is
    relative to the data. ``smoothing`` = a adds a data of variance ``spread``² to each covariance's scatter:
    MAP under an inverse Gamma or inverse Wishart prior, -a/2 [ln det Σ + spread² tr Σ⁻¹].
    """

    starts = ("k-means", "random")
    diagonal: bool
    unit: Tensor

    def __init__(
        self, states: int, dims: int, floor: float = 1e-3, smoothing: float = 0.0, spread: float = 1.0
    ) -> None:
        super().__init__(states, dims, smoothing)
        for name, value in (("floor", floor), ("spread", spread)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive scale, got {value}")
        self.event, self.floor, self.spread = (dims,), floor, spread
        self.loc = nn.Parameter(torch.randn(states, dims))
        self.register_buffer("unit", torch.ones(dims))
        self.warned = False

    @property
    def least(self) -> Tensor:
        """The smallest standard deviations, ``floor`` · ``unit`` [*R, 1, D], in float64."""
        return self.floor * self.unit.double().unsqueeze(-2)

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Covariances [*R, S, D, D], or their diagonals [*R, S, D]."""

    @abstractmethod
    def _set(self, variance: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Set the parameters to these variances except where ``keep [*R, S]``; returns which [*R, S] were
        held at the floor, and the smallest standard deviation [*R, S] of each in units of ``unit``."""

    def log_prob(self, y: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and (products := self._by_products(y)) is not None:
            return products
        stack = (slice(None), None) if self.loc.dim() > 2 else None
        p = self.distribution(stack, exact_dtype(self.loc))
        if torch.is_grad_enabled():
            return p.log_prob(y.unsqueeze(-2))
        blocks = y.split(max(1, _BLOCK // self.loc.numel()))
        return torch.cat([p.log_prob(block.double().unsqueeze(-2)) for block in blocks], -2)

    def _by_products(self, y: Tensor) -> Tensor | None:
        """:meth:`log_prob` by matrix products in float64; None if they would lose more than 1e-9."""
        return None

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"moments": GaussianStatistics.weighted(y, share, self.diagonal)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        moments: GaussianStatistics = statistics["moments"]
        count = moments.count + self.smoothing
        seen = count > 0
        prior = self.smoothing * self.spread**2
        scatter = moments.scatter + (
            prior if self.diagonal else prior * torch.eye(self.dims).to(moments.mean)
        )
        count = torch.where(seen, count, 1.0)[..., None]
        held, smallest = self._set(scatter / (count if self.diagonal else count[..., None]), ~seen)
        if bool(held.any()) and not self.warned:
            self.warned = True
            state, value = int(held.nonzero()[0, -1]), float(smallest[held][0])
            warnings.warn(
                f"component {state}: its scale fell to {value:.1e} of the data's and is held at "
                f"floor={self.floor:g}; use "
                "fewer components, drop constant coordinates, or set smoothing="
            )
        self.loc.copy_(torch.where(moments.count[..., None] > 0, moments.mean, self.loc))

    def _initialize(self, y: Tensor, start: str) -> None:
        """Means at data and the variance of all data; or cluster centres and the variance within clusters."""
        y = y.double()
        spread = y.std(0, correction=int(len(y) > 1))
        some = spread[spread > 0]
        # a constant coordinate has the unit of the others
        unit = torch.where(spread > 0, spread, some.mean() if len(some) else 1.0)
        self.unit.copy_(unit)
        self.warned = False
        variance = unit.square() if self.diagonal else unit.square().diag()
        if start == "random":
            self.loc.copy_(y[torch.randperm(len(y))[: self.states].to(y.device)])
        else:
            centres, label, rows = k_means(y, self.states)
            self.loc.copy_(centres)
            apart = rows - centres[label]
            # with a little of the whole, so that clusters of one datum have a width
            within = apart.square().mean(0) if self.diagonal else apart.T @ apart / len(apart)
            variance = within + 1e-2 * variance
        nowhere = torch.zeros(self.states, dtype=torch.bool, device=y.device)
        self._set(variance.expand_as(self.variance), nowhere)

    def log_prior(self) -> Tensor:
        variance, weight = self.variance, -0.5 * self.smoothing
        if not self.smoothing:
            return self.loc.new_zeros(self.loc.shape[:-2])
        if self.diagonal:
            return weight * (variance.log() + self.spread**2 / variance).sum((-1, -2))
        root = torch.linalg.cholesky(variance)
        trace = torch.cholesky_inverse(root).diagonal(0, -1, -2).sum((-1, -2))
        log_det = 2 * root.diagonal(0, -1, -2).log().sum((-1, -2))
        return weight * (log_det + self.spread**2 * trace)


class Gaussian(AnyGaussian):
    """Diagonal covariances: scale = exp(log_scale) + ``floor`` · ``unit``."""

    diagonal = True

    def __init__(self, states: int, dims: int, *options: float) -> None:
        super().__init__(states, dims, *options)
        self.log_scale = nn.Parameter(torch.zeros(states, dims))

    @property
    def scale(self) -> Tensor:
        return self._scale(self.log_scale)

    def _scale(self, log_scale: Tensor) -> Tensor:
        return log_scale.exp() + self.least.to(log_scale.dtype)

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def distribution(self, z: Any = None, dtype: torch.dtype | None = None) -> Any:
        scale = self._scale(self.log_scale.to(dtype or self.log_scale.dtype))
        return dist.Normal(self._at(self.loc, z, dtype), self._at(scale, z, dtype)).to_event(1)

    def _by_products(self, y: Tensor) -> Tensor | None:
        loc, scale = self.loc.double(), self._scale(self.log_scale.double())
        center = loc.mean(-2, keepdim=True)
        x, loc, precision = y.double() - center, loc - center, scale.square().reciprocal()
        most = (x.square().amax(-2) * precision.amax(-2)).sum(-1).amax()  # bounds every term
        if not most * torch.finfo(torch.float64).eps * self.dims < 1e-9:
            return None
        constant = scale.log().sum(-1) + 0.5 * (precision * loc.square()).sum(-1)
        weights = torch.cat([-0.5 * precision, precision * loc], -1)
        log_prob = torch.cat([x.square(), x], -1) @ weights.mT - constant.unsqueeze(-2)
        return log_prob - 0.5 * self.dims * math.log(2 * math.pi)

    def _set(self, variance: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        scale = variance.clamp_min(0).sqrt()
        smallest = 1e-6 * self.least
        excess = scale - self.least
        held = ~keep & (excess < smallest).any(-1)
        log_scale = excess.maximum(smallest).log()
        self.log_scale.copy_(torch.where(keep[..., None], self.log_scale.double(), log_scale))
        return held, (scale / self.unit.double().unsqueeze(-2)).amin(-1)


class FullGaussian(AnyGaussian):
    """Full covariances: L Lᵀ + ``floor``² diag(``unit``²), L the lower triangle of ``root``."""

    diagonal = False

    def __init__(self, states: int, dims: int, *options: float) -> None:
        super().__init__(states, dims, *options)
        self.root = nn.Parameter(torch.eye(dims).repeat(states, 1, 1))

    @property
    def variance(self) -> Tensor:
        return self._variance(self.root)

    def _variance(self, root: Tensor) -> Tensor:
        root = root.tril()
        return root @ root.mT + self.least.square().diag_embed().to(root)

    def distribution(self, z: Any = None, dtype: torch.dtype | None = None) -> Any:
        # in float64: in float32 a floor of 1e-3 would be lost
        scale = torch.linalg.cholesky(self._variance(self.root.double()))
        dtype = dtype or self.loc.dtype
        return dist.MultivariateNormal(self._at(self.loc, z, dtype), scale_tril=self._at(scale, z, dtype))

    def _set(self, variance: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        unit = self.unit.double().unsqueeze(-2)
        floor = (1 + 1e-6) * self.floor**2
        # in units of the data, where the floor is a multiple of the identity
        scaled = variance / (unit.unsqueeze(-1) * unit.unsqueeze(-2))
        excess = scaled - floor * torch.eye(self.dims).to(variance)
        root, failed = torch.linalg.cholesky_ex(excess)
        held, smallest = ~keep & (failed > 0), torch.full(keep.shape, math.sqrt(floor)).to(variance)
        if bool(held.any()):
            # the best covariance with eigenvalues above the floor lifts those that are not
            values, vectors = torch.linalg.eigh(excess[held])
            smallest[held] = (values.amin(-1) + floor).clamp_min(0).sqrt()
            lifted = vectors * values.clamp_min(0).sqrt()[:, None, :]
            root[held] = torch.linalg.qr(lifted.mT).R.mT
        root = unit.unsqueeze(-1) * root
        self.root.copy_(torch.where(keep[..., None, None], self.root.double(), root))
        return held, smallest


EMISSIONS: dict[str, type[Emission]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "gaussian": Gaussian,
    "full_gaussian": FullGaussian,
}

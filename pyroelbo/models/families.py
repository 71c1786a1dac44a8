"""Emissions of finite latents: S distributions of one family, their sufficient statistics and M-steps."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo.distributions.mixture import GaussianStatistics
from pyroelbo.models.kmeans import k_means

__all__ = [
    "FAMILIES",
    "AnyGaussian",
    "Bernoulli",
    "Categorical",
    "Family",
    "FullGaussian",
    "Gaussian",
    "Poisson",
    "log_shares",
]

_LEAST = 30.0  # log-odds and log rates stay within ±30, where every log probability is still finite


def log_shares(counts: Tensor, smoothing: float, before: Tensor) -> Tensor:
    """ln of normalized ``counts + smoothing`` over the last dimension, the M-step of a categorical; a row
    without any count stays what it was ``before``."""
    counts = counts + smoothing
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts.log() - total.log(), before.log_softmax(-1)).to(before.dtype)


class Family(nn.Module):
    """p(y | z) for z in 0 … S-1 (abstract). ``smoothing`` = a is a conjugate prior's pseudo-count: the M-step
    is then MAP.

    Parameters may have one more dimension R in front, one start of EM each, which share the data: statistics
    and :meth:`log_prior` then have it too.
    """

    event: tuple[int, ...]
    starts: tuple[str, ...] = ("random",)

    def __init__(self, states: int, smoothing: float) -> None:
        super().__init__()
        if states < 1:
            raise ValueError(f"components takes a positive number, got {states}")
        if not smoothing >= 0:
            raise ValueError(f"smoothing takes a pseudo-count of at least 0, got {smoothing!r}")
        self.states, self.smoothing = states, smoothing

    @abstractmethod
    def distribution(self, z: Any = None) -> Any:
        """p(y | z) of batch shape [S], or what index ``z`` makes of it."""

    @abstractmethod
    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        """Expected sufficient statistics of data ``y [N, *event]`` whose z is s with weight ``share [*R, N, S]``."""

    @abstractmethod
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Set the parameters to the maximum of the expected log likelihood plus :meth:`log_prior`."""

    def initialize(self, y: Tensor, start: str | None = None) -> None:
        """A start from data [N, *event]: one of ``starts``, the first of them by default."""
        start = start or self.starts[0]
        if start not in self.starts:
            raise ValueError(f"start takes one of {self.starts} for a {type(self).__name__}, got {start!r}")
        good = self.distribution().support.check(y)
        if not bool(good.all()):
            raise ValueError(
                f"y has {y[~good][0].tolist()}, which no {type(self).__name__} gives: outside its support"
            )
        self._initialize(y, start)

    @abstractmethod
    def _initialize(self, y: Tensor, start: str) -> None: ...

    @abstractmethod
    def log_prior(self) -> Tensor:
        """The log density [*R], up to a constant, that ``smoothing`` stands for."""

    def blank(self, *shape: int) -> Tensor:
        """Data of the right shape and kind whose values do not matter."""
        return next(self.parameters()).new_zeros(*shape, *self.event)

    @staticmethod
    def _at(parameter: Tensor, z: Any) -> Tensor:
        return parameter if z is None else parameter[z]


class Categorical(Family):
    """p(y = v | z) = softmax(logits_z)_v over ``dims`` symbols; y is a LongTensor. Prior Dirichlet(1 + a)."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, smoothing)
        self.dims, self.event = dims, ()
        self.logits = nn.Parameter(0.1 * torch.randn(states, dims))

    def distribution(self, z: Any = None) -> Any:
        return dist.Categorical(logits=self._at(self.logits, z))

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        on = share.new_zeros(*share.shape[:-2], self.dims, self.states)
        return {"on": on.index_add_(-2, y, share).mT}

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


class _Coins(dist.Bernoulli):
    """Bernoulli variables whose values may be bools or integers too."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value if value.is_floating_point() else value.to(self.logits.dtype))


class Bernoulli(Family):
    """p(y | z) = Π_d Bernoulli(y_d; σ(log_odds_zd)), y in {0, 1}^D. Prior Beta(1 + a, 1 + a); log-odds stay
    within ±30."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, smoothing)
        self.dims, self.event = dims, (dims,)
        self.log_odds = nn.Parameter(torch.randn(states, dims))

    def distribution(self, z: Any = None) -> Any:
        return _Coins(logits=self._at(self.log_odds, z)).to_event(1)

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"on": share.mT @ y.to(share.dtype), "count": share.sum(-2)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        on, count = statistics["on"], statistics["count"][..., None]
        odds = (on + self.smoothing).log() - (count - on).clamp_min(0).add(self.smoothing).log()
        odds = torch.where(count + self.smoothing > 0, odds.clamp(-_LEAST, _LEAST), self.log_odds)
        self.log_odds.copy_(odds)

    def _initialize(self, y: Tensor, start: str) -> None:
        rows = y[torch.randint(len(y), (self.states,), device=y.device)].to(self.log_odds.dtype)
        mean = y.to(self.log_odds.dtype).mean(0)
        self.log_odds.copy_(torch.logit(0.7 * mean + 0.2 * rows + 0.05))

    def log_prior(self) -> Tensor:
        sum_of_logs = F.logsigmoid(self.log_odds) + F.logsigmoid(-self.log_odds)
        return self.smoothing * sum_of_logs.sum((-1, -2))


class Poisson(Family):
    """p(y | z) = Π_d Poisson(y_d; rate_zd), counts y [.., D]. Prior Gamma(1 + a, a); log rates stay above
    -30."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, smoothing)
        self.dims, self.event = dims, (dims,)
        self.log_rate = nn.Parameter(0.5 * torch.randn(states, dims))

    def distribution(self, z: Any = None) -> Any:
        return dist.Poisson(self._at(self.log_rate, z).exp()).to_event(1)

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"total": share.mT @ y.to(share.dtype), "count": share.sum(-2)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        a, count = self.smoothing, statistics["count"][..., None]
        rate = ((statistics["total"] + a).log() - (count + a).log()).clamp_min(-_LEAST)
        self.log_rate.copy_(torch.where(count + a > 0, rate, self.log_rate))

    def _initialize(self, y: Tensor, start: str) -> None:
        mean = y.to(self.log_rate.dtype).mean(0) + 0.1
        self.log_rate.copy_(mean.log() + 0.5 * torch.randn_like(self.log_rate))

    def log_prior(self) -> Tensor:
        return self.smoothing * (self.log_rate - self.log_rate.exp()).sum((-1, -2))


class AnyGaussian(Family):
    """p(y | z) = N(loc_z, covariance_z) (abstract). No variance falls below ``floor``², in any direction: a component
    on a single datum would otherwise have no upper end. The M-step warns where one is held there.

    ``smoothing`` = a adds a data of variance ``spread``² to each covariance's scatter: MAP, under an inverse
    Gamma or inverse Wishart prior, -a/2 [ln det Σ + spread² tr Σ⁻¹].
    """

    starts = ("k-means", "random")
    diagonal: bool

    def __init__(
        self, states: int, dims: int, floor: float = 1e-3, smoothing: float = 0.0, spread: float = 1.0
    ) -> None:
        super().__init__(states, smoothing)
        for name, value in (("floor", floor), ("spread", spread)):
            if not value > 0:
                raise ValueError(f"{name} takes a positive scale, got {value}")
        self.dims, self.event, self.floor, self.spread = dims, (dims,), floor, spread
        self.loc = nn.Parameter(torch.randn(states, dims))

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Covariances [*R, S, D, D], or their diagonals [*R, S, D]."""

    @abstractmethod
    def _set(self, variance: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Take the parameters of these variances but where ``keep [*R, S]`` says; which [*R, S] were held at the floor,
        and the least variance [*R, S] of each."""

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
        held, least = self._set(scatter / (count if self.diagonal else count[..., None]), ~seen)
        if bool(held.any()):
            state, value = held.nonzero()[0, -1], float(least[held][0])
            warnings.warn(
                f"the scale of component {int(state)} ran to {max(value, 0.0) ** 0.5:.1e} and is held at floor={self.floor}: "
                "too few different data for so many components, or a constant coordinate (smoothing= would keep it off)"
            )
        self.loc.copy_(torch.where(moments.count[..., None] > 0, moments.mean, self.loc))

    def _initialize(self, y: Tensor, start: str) -> None:
        """Means at different data, variances those of all data; or centres of clusters and the variance
        within them."""
        spread = y.std(0) if len(y) > 1 else torch.ones_like(y[0])
        spread = spread.clamp_min(max(0.05, 2 * self.floor))
        variance = spread.square() if self.diagonal else spread.square().diag()
        if start == "random":
            self.loc.copy_(y[torch.randperm(len(y))[: self.states].to(y.device)])
        else:
            centres, label, rows = k_means(y, self.states)
            self.loc.copy_(centres)
            apart = rows - centres[label]
            # a little of the whole, so that clusters of one datum keep a width
            within = apart.square().mean(0) if self.diagonal else apart.T @ apart / len(apart)
            variance = within + 1e-2 * variance
        self._set(variance.double().expand_as(self.variance), torch.zeros(self.states, dtype=torch.bool))

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
    """Diagonal covariances: scale = exp(log_scale) + ``floor``."""

    diagonal = True

    def __init__(self, states: int, dims: int, *options: float) -> None:
        super().__init__(states, dims, *options)
        self.log_scale = nn.Parameter(torch.zeros(states, dims))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp() + self.floor

    @property
    def variance(self) -> Tensor:
        return self.scale.square()

    def distribution(self, z: Any = None) -> Any:
        return dist.Normal(self._at(self.loc, z), self._at(self.scale, z)).to_event(1)

    def _set(self, variance: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        excess = variance.clamp_min(0).sqrt() - self.floor
        least = 1e-6 * self.floor
        held = ~keep & (excess < least).any(-1)
        self.log_scale.copy_(torch.where(keep[..., None], self.log_scale, excess.clamp_min(least).log()))
        return held, variance.amin(-1)


class FullGaussian(AnyGaussian):
    """Full covariances: L Lᵀ + ``floor``² I, L the lower triangle of ``root``."""

    diagonal = False

    def __init__(self, states: int, dims: int, *options: float) -> None:
        super().__init__(states, dims, *options)
        self.root = nn.Parameter(torch.eye(dims).repeat(states, 1, 1))

    @property
    def variance(self) -> Tensor:
        root = self.root.tril()
        return root @ root.mT + self.floor**2 * torch.eye(self.dims).to(root)

    def distribution(self, z: Any = None) -> Any:
        root = self.root.double().tril()  # in float32 a floor of 1e-3 would already be lost
        variance = root @ root.mT + self.floor**2 * torch.eye(self.dims).to(root)
        scale = torch.linalg.cholesky(variance).to(self.loc.dtype)
        return dist.MultivariateNormal(self._at(self.loc, z), scale_tril=self._at(scale, z))

    def _set(self, variance: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        floor = (1 + 1e-6) * self.floor**2
        excess = variance - floor * torch.eye(self.dims).to(variance)
        root, failed = torch.linalg.cholesky_ex(excess)
        held, least = ~keep & (failed > 0), torch.full(keep.shape, floor).to(variance)
        if bool(held.any()):
            # the best covariance with eigenvalues above the floor lifts those that are not
            values, vectors = torch.linalg.eigh(excess[held])
            least[held] = values.amin(-1) + floor
            lifted = vectors * values.clamp_min(0).sqrt()[:, None, :]
            root[held] = torch.linalg.qr(lifted.mT).R.mT
        self.root.copy_(torch.where(keep[..., None, None], self.root, root))
        return held, least


FAMILIES: dict[str, type[Family]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "gaussian": Gaussian,
    "full_gaussian": FullGaussian,
}

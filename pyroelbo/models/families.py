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

__all__ = ["FAMILIES", "Bernoulli", "Categorical", "Family", "Gaussian", "Poisson", "log_shares"]

_LEAST = 30.0  # log-odds and log rates stay within ±30, where every log probability is still finite


def log_shares(counts: Tensor, smoothing: float, before: Tensor) -> Tensor:
    """ln of normalized ``counts + smoothing`` over the last dimension, the M-step of a categorical; a row
    without any count stays what it was ``before``."""
    counts = counts + smoothing
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts.log() - total.log(), before.log_softmax(-1)).to(before.dtype)


class Family(nn.Module):
    """p(y | z) for z in 0 … S-1 (abstract). ``smoothing`` = a is a conjugate prior's pseudo-count: the M-step
    is then MAP."""

    event: tuple[int, ...]

    def __init__(self, states: int, smoothing: float) -> None:
        super().__init__()
        if not smoothing >= 0:
            raise ValueError(f"smoothing takes a pseudo-count of at least 0, got {smoothing!r}")
        self.states, self.smoothing = states, smoothing

    @abstractmethod
    def distribution(self, z: Tensor | None = None) -> Any:
        """p(y | z) of batch shape [S], or of the shape of ``z``."""

    @abstractmethod
    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        """Expected sufficient statistics of data ``y [N, *event]`` whose z is s with weight ``share [N, S]``."""

    @abstractmethod
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Set the parameters to the maximum of the expected log likelihood plus :meth:`log_prior`."""

    @abstractmethod
    def initialize(self, y: Tensor) -> None:
        """A random start from data [N, *event]."""

    @abstractmethod
    def log_prior(self) -> Tensor:
        """The log density, up to a constant, that ``smoothing`` stands for."""

    def blank(self, *shape: int) -> Tensor:
        """Data of the right shape and kind whose values do not matter."""
        return next(self.parameters()).new_zeros(*shape, *self.event)

    @staticmethod
    def _at(parameter: Tensor, z: Tensor | None) -> Tensor:
        return parameter if z is None else parameter[z]


class Categorical(Family):
    """p(y = v | z) = softmax(logits_z)_v over ``dims`` symbols; y is a LongTensor. Prior Dirichlet(1 + a)."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, smoothing)
        self.dims, self.event = dims, ()
        self.logits = nn.Parameter(0.1 * torch.randn(states, dims))

    def distribution(self, z: Tensor | None = None) -> Any:
        return dist.Categorical(logits=self._at(self.logits, z))

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"on": share.new_zeros(self.dims, self.states).index_add_(0, y, share).t()}

    def m_step(self, statistics: dict[str, Any]) -> None:
        self.logits.copy_(log_shares(statistics["on"], self.smoothing, self.logits))

    def initialize(self, y: Tensor) -> None:
        drawn = dist.Dirichlet(torch.ones_like(self.logits)).sample()
        frequent = torch.bincount(y, minlength=self.dims) / len(y)
        self.logits.copy_((0.5 * frequent + 0.5 * drawn).log())

    def log_prior(self) -> Tensor:
        return (
            self.smoothing * self.logits.log_softmax(-1).sum()
            if self.smoothing
            else self.logits.new_zeros(())
        )

    def blank(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=self.logits.device)


class Bernoulli(Family):
    """p(y | z) = Π_d Bernoulli(y_d; σ(log_odds_zd)), y in {0, 1}^D. Prior Beta(1 + a, 1 + a); log-odds stay
    within ±30."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, smoothing)
        self.dims, self.event = dims, (dims,)
        self.log_odds = nn.Parameter(torch.randn(states, dims))

    def distribution(self, z: Tensor | None = None) -> Any:
        return dist.Bernoulli(logits=self._at(self.log_odds, z)).to_event(1)

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"on": share.t() @ y.to(share.dtype), "count": share.sum(0)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        on, count = statistics["on"], statistics["count"][:, None]
        odds = (on + self.smoothing).log() - (count - on).clamp_min(0).add(self.smoothing).log()
        odds = torch.where(count + self.smoothing > 0, odds.clamp(-_LEAST, _LEAST), self.log_odds)
        self.log_odds.copy_(odds)

    def initialize(self, y: Tensor) -> None:
        rows = y[torch.randint(len(y), (self.states,), device=y.device)].to(self.log_odds.dtype)
        mean = y.to(self.log_odds.dtype).mean(0)
        self.log_odds.copy_(torch.logit(0.7 * mean + 0.2 * rows + 0.05))

    def log_prior(self) -> Tensor:
        sum_of_logs = F.logsigmoid(self.log_odds) + F.logsigmoid(-self.log_odds)
        return self.smoothing * sum_of_logs.sum()


class Poisson(Family):
    """p(y | z) = Π_d Poisson(y_d; rate_zd), counts y [.., D]. Prior Gamma(1 + a, a); log rates stay above
    -30."""

    def __init__(self, states: int, dims: int, smoothing: float = 0.0) -> None:
        super().__init__(states, smoothing)
        self.dims, self.event = dims, (dims,)
        self.log_rate = nn.Parameter(0.5 * torch.randn(states, dims))

    def distribution(self, z: Tensor | None = None) -> Any:
        return dist.Poisson(self._at(self.log_rate, z).exp()).to_event(1)

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"total": share.t() @ y.to(share.dtype), "count": share.sum(0)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        a, count = self.smoothing, statistics["count"][:, None]
        rate = ((statistics["total"] + a).log() - (count + a).log()).clamp_min(-_LEAST)
        self.log_rate.copy_(torch.where(count + a > 0, rate, self.log_rate))

    def initialize(self, y: Tensor) -> None:
        mean = y.to(self.log_rate.dtype).mean(0) + 0.1
        self.log_rate.copy_(mean.log() + 0.5 * torch.randn_like(self.log_rate))

    def log_prior(self) -> Tensor:
        return self.smoothing * (self.log_rate - self.log_rate.exp()).sum()


class Gaussian(Family):
    """p(y | z) = N(loc_z, diag scale_z²), scale = exp(log_scale) + ``floor``: a component on a single datum
    would otherwise have no upper end. The M-step warns where a scale is held at its floor."""

    def __init__(self, states: int, dims: int, floor: float = 1e-3) -> None:
        super().__init__(states, 0.0)
        if not floor > 0:
            raise ValueError(f"floor takes a positive scale, got {floor}")
        self.dims, self.event, self.floor = dims, (dims,), floor
        self.loc = nn.Parameter(torch.randn(states, dims))
        self.log_scale = nn.Parameter(torch.zeros(states, dims))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp() + self.floor

    def distribution(self, z: Tensor | None = None) -> Any:
        return dist.Normal(self._at(self.loc, z), self._at(self.scale, z)).to_event(1)

    def statistics(self, share: Tensor, y: Tensor) -> dict[str, Any]:
        return {"moments": GaussianStatistics.weighted(y, share)}

    def m_step(self, statistics: dict[str, Any]) -> None:
        moments: GaussianStatistics = statistics["moments"]
        used = moments.count[:, None] > 0
        scale = (moments.scatter / torch.where(used, moments.count[:, None], 1.0)).clamp_min(0).sqrt()
        excess = scale - self.floor
        held = used & (excess < 1e-6 * self.floor)
        if bool(held.any()):
            state, coordinate = held.nonzero()[0].tolist()
            warnings.warn(
                f"the scale of component {state} in coordinate {coordinate} ran to {float(scale[held][0]):.1e} and is held "
                f"at floor={self.floor}: too few different data for so many components, or a constant coordinate"
            )
        self.loc.copy_(torch.where(used, moments.mean, self.loc))
        self.log_scale.copy_(torch.where(used, excess.clamp_min(1e-6 * self.floor).log(), self.log_scale))

    def initialize(self, y: Tensor) -> None:
        """Means at different data, scales those of all data."""
        self.loc.copy_(y[torch.randperm(len(y))[: self.states].to(y.device)])
        spread = y.std(0) if len(y) > 1 else torch.ones_like(y[0])
        self.log_scale.copy_(
            spread.clamp_min(max(0.05, 2 * self.floor)).sub(self.floor).log().expand_as(self.log_scale)
        )

    def log_prior(self) -> Tensor:
        return self.loc.new_zeros(())


FAMILIES: dict[str, type[Family]] = {
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
    "gaussian": Gaussian,
}

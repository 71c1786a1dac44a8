"""Finite mixtures: one finite latent, so evidence and posterior are sums over the components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.models.families import AnyGaussian, Bernoulli, Family, FullGaussian, Gaussian, log_shares
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["BernoulliMixture", "GaussianMixture"]


class _Mixture(ExactPair):
    """p(z) = Categorical(π) over M components, p(y | z) of one family (abstract). Data [B, D]."""

    def __init__(self, generator: Family, guide: str) -> None:
        super().__init__()
        if guide not in ("exact", "encoder"):
            raise ValueError(f"guide takes 'exact' or 'encoder', got {guide!r}")
        self.components, self.dims = generator.states, generator.event[0]
        self.generator = generator
        self.generator.register_parameter("logits", nn.Parameter(0.1 * torch.randn(self.components)))
        self.encoder = nn.Linear(self.dims, self.components) if guide == "encoder" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    @property
    def least_data(self) -> int:
        """Number of data below which EM is refused."""
        return self.components

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y has shape {tuple(y.shape)}: this mixture takes [B, {self.dims}]")
        return y if y.is_floating_point() else y.to(self.generator.logits.dtype)

    @property
    def mixture(self) -> ped.Mixture:
        """p(y), the sum over components; of batch shape [R, 1] where parameters are stacked."""
        stack = (slice(None), None) if self.generator.logits.dim() > 1 else None
        logits = self.generator.logits
        return ped.Mixture(logits if stack is None else logits[stack], self.generator.distribution(stack))

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(self._check(y))):
            z = pyro.sample("z", dist.Categorical(logits=self.generator.logits))
            pyro.sample("y", self.generator.distribution(z), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y := self._check(y))):
            pyro.sample(
                "z", self.posterior(y) if self.encoder is None else dist.Categorical(logits=self.encoder(y))
            )

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln Σ_z π_z p(y | z), [B], in nats."""
        return self.mixture.log_prob(self._check(y))

    def posterior(self, y: Tensor) -> dist.Categorical:
        return self.mixture.posterior(self._check(y))

    def e_step(self, y: Tensor, hard: bool = False) -> tuple[Tensor, dict[str, Any]]:
        """ln p(y) [B] (``hard``: ln p(y, z*)) and the statistics of :meth:`m_step`."""
        y = self._check(y)
        if isinstance(self.generator, AnyGaussian):
            mixture = ped.Mixture(self.generator.logits, self.generator.distribution())
            evidence, moments = mixture.expected_statistics(y, hard=hard)
            return evidence, {"share": moments.count, "moments": moments}
        mixture = self.mixture
        evidence, posterior = mixture.log_prob(y), mixture.posterior(y)
        share = posterior.probs
        if hard:
            best, at = posterior.logits.max(-1, keepdim=True)
            share = torch.zeros_like(share).scatter_(-1, at, 1.0)
            evidence = evidence + best.squeeze(-1)
        return evidence, {"share": share.sum(-2), **self.generator.statistics(share, y)}

    def stacks(self, y: Tensor) -> bool:
        """Whether parameters may be stacked, one start of EM each, and are the faster for it."""
        return isinstance(self.generator, AnyGaussian) or y.numel() * self.components < 2**18

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Weights and component parameters that maximize the expected log joint."""
        g = self.generator
        g.logits.copy_(log_shares(statistics["share"], g.smoothing, g.logits))
        g.m_step(statistics)

    def log_prior(self) -> Tensor:
        g = self.generator
        weights = g.smoothing * g.logits.log_softmax(-1).sum(-1) if g.smoothing else 0.0
        return g.log_prior() + weights

    @torch.no_grad()
    def initialize(self, y: Tensor, start: str | None = None) -> None:
        """A start drawn from data, with equal weights: components at the centres of ``"k-means"`` (the default of
        Gaussian ones), or ``"random"``, at data drawn at random."""
        if len(y := self._check(y)) < self.components:
            raise ValueError(f"{self.components} components take at least as many data, got {len(y)}")
        self.generator.initialize(y, start)
        self.generator.logits.zero_()

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.blank(n)

    @classmethod
    def for_data(cls, train: Tensor | None, shape: Sequence[int], levels: int, **settings: Any) -> Any:
        pair = cls(math.prod(shape), **settings)  # type: ignore[call-arg]
        if train is not None:
            pair.initialize(train)
        return pair


class GaussianMixture(_Mixture):
    """p(z) = Categorical(π) over M components, p(y | z) = N(loc_z, Σ_z). Data [B, D].

    ln p(y) = logsumexp_z [ln π_z + ln N(y; loc_z, Σ_z)] and p(z | y) are the responsibilities.
    ``covariance`` is ``"diagonal"`` or ``"full"``. ``guide="exact"`` draws from the responsibilities;
    ``"encoder"`` is an amortized linear-softmax guide q(z | y). No variance ever falls below ``floor``², in any
    direction: without one the likelihood of a component on a single datum has no upper end. ``smoothing`` = a
    makes EM MAP, with a pseudo-counts for every weight and a pseudo-data of variance ``spread``² for every
    covariance (inverse Gamma or inverse Wishart).

    Parts: ``generator`` (logits [M], loc [M, D], log_scale [M, D] or root [M, D, D]), ``encoder`` (amortized only).
    Cost: O(B·M·D), full O(B·M·D² + M·D³), an epoch of EM too. Source: Dempster, Laird, Rubin (1977).
    """

    form = "grey"

    def __init__(
        self,
        dims: int,
        components: int = 10,
        covariance: str = "diagonal",
        guide: str = "exact",
        floor: float = 1e-3,
        smoothing: float = 0.0,
        spread: float = 1.0,
    ) -> None:
        if covariance not in ("diagonal", "full"):
            raise ValueError(f"covariance takes 'diagonal' or 'full', got {covariance!r}")
        family = Gaussian if covariance == "diagonal" else FullGaussian
        super().__init__(family(components, dims, floor, smoothing, spread), guide)


class BernoulliMixture(_Mixture):
    """p(z) = Categorical(π) over M components, p(y | z) = Π_d Bernoulli(y_d; σ(log_odds_zd)). Data [B, D], 0 or 1.

    ``guide`` as for :class:`GaussianMixture`; ``smoothing`` is a pseudo-count on each outcome (MAP under
    Beta(1 + a, 1 + a), Dirichlet(1 + a)). Parts: ``generator`` (logits [M], log_odds [M, D]),
    ``encoder`` (amortized only). Cost: O(B·M·D).
    """

    form = "binary"

    def __init__(self, dims: int, components: int = 10, guide: str = "exact", smoothing: float = 0.0) -> None:
        super().__init__(Bernoulli(components, dims, smoothing), guide)

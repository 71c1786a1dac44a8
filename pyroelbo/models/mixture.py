"""Finite mixtures: one finite latent, so evidence and posterior are sums over the components."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.models.families import Bernoulli, Family, Gaussian, log_shares
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["BernoulliMixture", "GaussianMixture"]


class _Mixture(ExactPair):
    """p(z) = Categorical(π) over M components, p(y | z) of one family (abstract). Data [B, D]."""

    def __init__(self, generator: Family, guide: str) -> None:
        super().__init__()
        if guide not in ("exact", "encoder"):
            raise ValueError(f"guide takes 'exact' or 'encoder', got {guide!r}")
        self.components, self.dims = generator.states, generator.event[0]
        if self.components < 1:
            raise ValueError(f"components takes a positive number, got {self.components}")
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
        return y

    @property
    def mixture(self) -> ped.Mixture:
        """p(y), the sum over components."""
        return ped.Mixture(self.generator.logits, self.generator.distribution())

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(self._check(y))):
            z = pyro.sample("z", dist.Categorical(logits=self.generator.logits))
            pyro.sample("y", self.generator.distribution(z), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
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
        mixture = self.mixture
        if not hard and isinstance(self.generator, Gaussian):
            evidence, moments = mixture.expected_statistics(self._check(y))
            return evidence, {"share": moments.count, "moments": moments}
        posterior = mixture.posterior(self._check(y))
        joint = mixture.log_prob(y)[:, None] + posterior.logits
        share = F.one_hot(joint.argmax(-1), self.components).to(joint.dtype) if hard else posterior.probs
        evidence = joint.amax(-1) if hard else mixture.log_prob(y)
        return evidence, {"share": share.sum(0), **self.generator.statistics(share, y)}

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Weights and component parameters that maximize the expected log joint."""
        g = self.generator
        g.logits.copy_(log_shares(statistics["share"], g.smoothing, g.logits))
        g.m_step(statistics)

    def log_prior(self) -> Tensor:
        g = self.generator
        weights = g.smoothing * g.logits.log_softmax(0).sum() if g.smoothing else 0.0
        return g.log_prior() + weights

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        """A random start: equal weights, components at data drawn at random."""
        if len(self._check(y)) < self.components:
            raise ValueError(f"{self.components} components take at least as many data, got {len(y)}")
        self.generator.logits.zero_()
        self.generator.initialize(y)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.blank(n)

    @classmethod
    def for_data(cls, train: Tensor | None, shape: Sequence[int], levels: int, **settings: Any) -> Any:
        pair = cls(math.prod(shape), **settings)  # type: ignore[call-arg]
        if train is not None:
            pair.initialize(train)
        return pair


class GaussianMixture(_Mixture):
    """p(z) = Categorical(π) over M components, p(y | z) = N(loc_z, diag scale_z²). Data [B, D].

    ln p(y) = logsumexp_z [ln π_z + ln N(y; loc_z, diag scale_z²)] and p(z | y) are the responsibilities.
    ``guide="exact"`` draws from them; ``"encoder"`` is an amortized linear-softmax guide q(z | y). A scale
    never falls below ``floor``: without one the likelihood of a component on a single datum has no upper end.

    Parts: ``generator`` (logits [M], loc [M, D], log_scale [M, D]), ``encoder`` (amortized only).
    Cost: O(B·M·D), an epoch of EM too. Source: Dempster, Laird, Rubin (1977).
    """

    form = "grey"

    def __init__(self, dims: int, components: int = 10, guide: str = "exact", floor: float = 1e-3) -> None:
        super().__init__(Gaussian(components, dims, floor), guide)


class BernoulliMixture(_Mixture):
    """p(z) = Categorical(π) over M components, p(y | z) = Π_d Bernoulli(y_d; σ(log_odds_zd)). Data [B, D], 0 or 1.

    ``guide`` as for :class:`GaussianMixture`; ``smoothing`` is a pseudo-count on each outcome (MAP under
    Beta(1 + a, 1 + a), Dirichlet(1 + a)). Parts: ``generator`` (logits [M], log_odds [M, D]),
    ``encoder`` (amortized only). Cost: O(B·M·D).
    """

    form = "binary"

    def __init__(self, dims: int, components: int = 10, guide: str = "exact", smoothing: float = 0.0) -> None:
        super().__init__(Bernoulli(components, dims, smoothing), guide)

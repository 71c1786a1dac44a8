"""Mixtures: finite latents whose evidence is a sum over components."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.models.emissions import AnyGaussian, Bernoulli, Emission, FullGaussian, Gaussian, log_shares
from pyroelbo.models.precision import exact
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["BernoulliMixture", "GaussianMixture"]


class _Mixture(ExactPair):
    """p(z) = Categorical(π) over M components, p(y | z) an :class:`Emission` (abstract). Data [B, D]."""

    def __init__(self, generator: Emission, guide: str) -> None:
        super().__init__()
        if guide not in ("exact", "encoder"):
            raise ValueError(f"guide: expected 'exact' or 'encoder', got {guide!r}")
        self.components, self.dims = generator.states, generator.event[0]
        self.generator = generator
        self.generator.register_parameter("logits", nn.Parameter(0.1 * torch.randn(self.components)))
        self.encoder = nn.Linear(self.dims, self.components) if guide == "encoder" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    @property
    def least_data(self) -> int:
        """Smallest number of data that EM accepts."""
        return self.components

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y: expected shape [B, {self.dims}], got {tuple(y.shape)}")
        return y if y.is_floating_point() else y.to(self.generator.logits.dtype)

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(self._check(y))):
            z = pyro.sample("z", dist.Categorical(logits=self.generator.logits))
            pyro.sample("y", self.generator.distribution(z), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y := self._check(y))):
            if self.encoder is None:
                pyro.sample("z", self.posterior(y))
            else:
                logits = self.encoder(y.to(self.encoder.weight.dtype))
                pyro.sample("z", dist.Categorical(logits=logits))

    def _log_joint(self, y: Tensor) -> Tensor:
        """ln p(y, z), [*R, B, M], in nats."""
        y = self._check(y)
        if torch.distributions.Distribution._validate_args:
            self.generator.check(y)
        return exact(self.generator.logits).log_softmax(-1).unsqueeze(-2) + self.generator.log_prob(y)

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln Σ_z π_z p(y | z), [B], in nats; float64 without gradients."""
        if isinstance(self.generator, AnyGaussian) and not torch.is_grad_enabled():
            return self.e_step(y)[0]  # by products of coordinates
        return logsumexp(self._log_joint(y))

    def posterior(self, y: Tensor) -> dist.Categorical:
        """p(z | y), the responsibilities."""
        return dist.Categorical(logits=self._log_joint(y), validate_args=False)

    @torch.no_grad()
    def e_step(
        self, y: Tensor, hard: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """ln p(y) [B] (``hard``: ln p(y, z*)) and the statistics of :meth:`m_step`, in float64.

        ``weights`` [B] count each datum so many times in the statistics.
        """
        y = self._check(y)
        if isinstance(self.generator, AnyGaussian) and weights is None:
            g = self.generator
            mixture = ped.Mixture(g.logits.double(), g.distribution(dtype=torch.float64))
            evidence, moments = mixture.expected_statistics(y, hard=hard)
            return evidence.double(), {"share": moments.count, "moments": moments}
        joint = self._log_joint(y)
        if hard:
            evidence, at = joint.max(-1)
            share = torch.zeros_like(joint).scatter_(-1, at.unsqueeze(-1), 1.0)
        else:
            evidence, share = logsumexp(joint), joint.softmax(-1)
        if weights is not None:
            share = share * weights.to(share).unsqueeze(-1)
        return evidence, {"share": share.sum(-2), **self.generator.statistics(share, y)}

    def stacks(self, y: Tensor) -> bool:
        """Whether several starts of EM with stacked parameters are faster than one after the other."""
        return isinstance(self.generator, AnyGaussian) or y.numel() * self.components < 2**18

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Weights and component parameters that maximize the expected log joint (plus :meth:`log_prior`)."""
        g = self.generator
        g.logits.copy_(log_shares(statistics["share"], g.smoothing, g.logits))
        g.m_step(statistics)

    def log_prior(self) -> Tensor:
        """The log density of the parameters, up to a constant, of which ``smoothing`` is the pseudo-count."""
        g = self.generator
        weights = g.smoothing * g.logits.log_softmax(-1).sum(-1) if g.smoothing else 0.0
        return g.log_prior() + weights

    @torch.no_grad()
    def initialize(self, y: Tensor, start: str | None = None) -> None:
        """Initialize from data with equal weights: Gaussian components at the centres of ``"k-means"`` (their
        default) or at ``"random"`` data, Bernoulli ones near random data."""
        if len(y := self._check(y)) < self.components:
            raise ValueError(f"y: expected at least {self.components} data, one per component, got {len(y)}")
        self.generator.initialize(y, start)
        self.generator.logits.zero_()

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.blank(n)


class GaussianMixture(_Mixture):
    """p(z) = Categorical(π) over M components, p(y | z) = N(loc_z, Σ_z). Data [B, D].

    ln p(y) = logsumexp_z [ln π_z + ln N(y; loc_z, Σ_z)], and p(z | y) are the responsibilities.

    Parts: ``generator`` (logits [M], loc [M, D], log_scale [M, D] or root [M, D, D]; buffer unit [D]),
        ``encoder``
    (amortized only). Cost: O(B·M·D), full O(B·M·D² + M·D³), per epoch of EM too.

    Args:
        dims: D.
        components: M.
        covariance: ``"diagonal"`` or ``"full"``.
        guide: ``"exact"`` draws from the responsibilities; ``"encoder"`` is an amortized q(z | y), the
            softmax of a linear map.
        floor: smallest standard deviation in any direction, relative to the data's from :meth:`initialize` on
            (``fit_em`` with a start from data); without a floor the likelihood of a component on a single
            datum is unbounded.
        smoothing: a; EM becomes MAP with a pseudo-counts for every weight and a pseudo-data of variance
            ``spread``² for every covariance (inverse Gamma or inverse Wishart).
        spread: scale of the pseudo-data.

    Source: Dempster, Laird, Rubin (1977).
    """

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
            raise ValueError(f"covariance: expected 'diagonal' or 'full', got {covariance!r}")
        emission = Gaussian if covariance == "diagonal" else FullGaussian
        super().__init__(emission(components, dims, floor, smoothing, spread), guide)


class BernoulliMixture(_Mixture):
    """p(z) = Categorical(π) over M components, p(y | z) = Π_d Bernoulli(y_d; σ(log_odds_zd)). Data [B, D], 0
    or 1, of any dtype.

    ``guide`` as for :class:`GaussianMixture`; ``smoothing`` is a pseudo-count of each outcome (MAP under
    Beta(1 + a, 1 + a), Dirichlet(1 + a)). Parts: ``generator`` (logits [M], log_odds [M, D]), ``encoder``
    (amortized only). Cost: O(B·M·D), two matrix products.
    """

    def __init__(self, dims: int, components: int = 10, guide: str = "exact", smoothing: float = 0.0) -> None:
        super().__init__(Bernoulli(components, dims, smoothing), guide)

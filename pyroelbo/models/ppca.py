"""Probabilistic principal components and factor analysis: the linear Gaussian model whose evidence and posterior are closed
forms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.models.sequences import check_dtype
from pyroelbo.nn import LinearNormal
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["PPCA"]


class PPCA(ExactPair):
    """p(z) = N(0, I), p(y | z) = N(W z + μ, Ψ), so p(y) = N(μ, W Wᵀ + Ψ). Data [B, D].

    ``noise="shared"`` is probabilistic PCA, Ψ = σ² I; ``"diagonal"`` is factor analysis, Ψ = diag σ_d². With
    M = I + Wᵀ Ψ⁻¹ W the posterior is N(M⁻¹ Wᵀ Ψ⁻¹ (y - μ), M⁻¹). ``guide="exact"`` draws from it;
    ``"mean_field"`` is an amortized Gaussian with diagonal covariance, linear in y, which cannot follow the
    posterior's correlations. The M-step holds every σ at ``floor`` or above, and says so.

    Parts: ``generator`` (weight [D, L], loc [D], log_scale [] or [D]), ``encoder`` (mean-field only).
    Cost: O(B·D·L + L³).

    Source: Tipping and Bishop (1999), equations 6, 7, 14 and 15; Rubin and Thayer (1982) for EM.
    """

    form = "grey"

    def __init__(
        self,
        dims: int,
        latent: int = 2,
        guide: str = "exact",
        noise: str = "shared",
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        if noise not in ("shared", "diagonal"):
            raise ValueError(f"noise takes 'shared' or 'diagonal', got {noise!r}")
        if not floor > 0:
            raise ValueError(f"floor takes a positive scale, got {floor}")
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide takes 'exact' or 'mean_field', got {guide!r}")
        if not 1 <= latent <= dims:
            raise ValueError(f"latent takes 1 to {dims} dimensions for data of {dims}, got {latent}")
        self.dims, self.latent_dims, self.noise, self.floor = dims, latent, noise, floor
        self.generator = nn.Module()
        self.generator.register_parameter(
            "weight", nn.Parameter(torch.randn(dims, latent) / math.sqrt(latent))
        )
        self.generator.register_parameter("loc", nn.Parameter(torch.zeros(dims)))
        self.generator.register_parameter(
            "log_scale", nn.Parameter(torch.zeros(() if noise == "shared" else dims))
        )
        self.encoder: LinearNormal | None = None
        if guide == "mean_field":
            self.encoder = LinearNormal(dims, latent)

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y has shape {tuple(y.shape)}: this PPCA takes [B, {self.dims}]")
        check_dtype(y, self.generator.loc)
        return y

    def model(self, y: Tensor) -> None:
        self._check(y)
        g = self.generator
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", dist.Normal(g.loc.new_zeros(self.latent_dims), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ g.weight.T + g.loc, g.log_scale.exp()).to_event(1), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            if self.encoder is None:
                pyro.sample("z", self.posterior(y))
            else:
                pyro.sample("z", self.encoder.distribution(y).to_event(1))

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln N(y; μ, W Wᵀ + σ² I), [B], in nats."""
        g = self.generator
        noise = (2 * g.log_scale).exp().expand(self.dims)
        return dist.LowRankMultivariateNormal(g.loc, g.weight, noise).log_prob(self._check(y))

    def posterior(self, y: Tensor) -> dist.MultivariateNormal:
        mean, covariance = self._moments(y)
        return dist.MultivariateNormal(mean, scale_tril=torch.linalg.cholesky(covariance))

    def _moments(self, y: Tensor) -> tuple[Tensor, Tensor]:
        g = self.generator
        read = g.weight.T * (-2 * g.log_scale).exp()
        root = torch.linalg.cholesky(torch.eye(self.latent_dims).to(read) + read @ g.weight)
        mean = torch.cholesky_solve(read @ (self._check(y) - g.loc).T, root).T
        return mean, torch.cholesky_inverse(root)

    def e_step(self, y: Tensor, hard: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) at the posterior's mean) and the statistics of :meth:`m_step`."""
        mean, covariance = self._moments(y)
        evidence = self.log_evidence(y)
        if hard:
            evidence = evidence + self.posterior(y).log_prob(mean)
        code = torch.cat([mean, torch.ones_like(mean[:, :1])], -1).double()
        square = code.T @ code
        if not hard:
            square[:-1, :-1] += len(y) * covariance.double()
        y = y.double()
        return evidence, {"cross": y.T @ code, "square": square, "power": y.square().sum(0)}

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Tensor]) -> None:
        """Regress the data on their codes: weight, loc and noise that maximize the expected log joint."""
        cross, square = statistics["cross"], statistics["square"]
        g, count = self.generator, square[-1, -1]
        weight = torch.linalg.solve(square, cross.T).T
        variance = (statistics["power"] - (weight * cross).sum(-1)) / count
        variance = variance.mean() if self.noise == "shared" else variance
        if bool((variance < self.floor**2).any()):
            warnings.warn(
                f"a noise variance ran to {float(variance.min()):.1e} and is held at floor² = {self.floor**2:.1e}: "
                "a coordinate is constant, or explained by the others in full"
            )
        g.weight.copy_(weight[:, :-1])
        g.loc.copy_(weight[:, -1])
        g.log_scale.copy_(0.5 * variance.clamp_min(self.floor**2).log())

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        """A random start: a random weight of the data's size, their mean, and their spread as noise."""
        g, spread = self.generator, self._check(y).std(0, correction=int(len(y) > 1)).clamp_min(1e-3)
        g.loc.copy_(y.mean(0))
        g.log_scale.copy_(spread.mean().log() if self.noise == "shared" else spread.log())
        g.weight.normal_().mul_(spread.mean() / math.sqrt(self.latent_dims))

    @torch.no_grad()
    def solve(self, y: Tensor) -> PPCA:
        """Set the maximum likelihood parameters in closed form from the covariance's eigenvectors; returns
        self. For shared noise only (ValueError)."""
        if self.noise != "shared":
            raise ValueError("noise='diagonal' has no closed form: use fit_em")
        mean = self._check(y).mean(0)
        values, vectors = torch.linalg.eigh((y - mean).T @ (y - mean) / len(y))
        noise = values[: -self.latent_dims].mean() if self.latent_dims < self.dims else values[0] * 1e-3
        noise = noise.clamp_min(1e-8)
        self.generator.loc.copy_(mean)
        self.generator.weight.copy_(
            vectors[:, -self.latent_dims :] * (values[-self.latent_dims :] - noise).clamp_min(0).sqrt()
        )
        self.generator.log_scale.copy_(0.5 * noise.log())
        return self

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.loc.new_zeros(n, self.dims)

    @classmethod
    def for_data(cls, train: Tensor | None, shape: Sequence[int], levels: int, **settings) -> PPCA:
        pair = cls(math.prod(shape), **settings)
        if train is not None:
            pair.initialize(train)
        return pair

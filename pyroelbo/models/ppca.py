"""Probabilistic principal components: the linear Gaussian model whose evidence and posterior are closed
forms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.pair import PLATE, ExactPair

__all__ = ["PPCA"]


class PPCA(ExactPair):
    """p(z) = N(0, I), p(y | z) = N(W z + μ, σ² I), so p(y) = N(μ, W Wᵀ + σ² I). Data [B, D].

    With M = Wᵀ W + σ² I the posterior is N(M⁻¹ Wᵀ (y - μ), σ² M⁻¹). ``guide="exact"`` draws from it;
    ``"mean_field"`` is an amortized Gaussian with diagonal covariance, linear in y, which cannot follow the
    posterior's correlations.

    Parts: ``generator`` (weight [D, L], loc [D], log_scale), ``encoder`` (mean-field only). Cost: O(B·D·L +
    L³).

    Source: Tipping and Bishop (1999), equations 6, 7, 14 and 15.
    """

    form = "grey"

    def __init__(self, dims: int, latent: int = 2, guide: str = "exact") -> None:
        super().__init__()
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide takes 'exact' or 'mean_field', got {guide!r}")
        if not 1 <= latent <= dims:
            raise ValueError(f"latent takes 1 to {dims} dimensions for data of {dims}, got {latent}")
        self.dims, self.latent_dims = dims, latent
        self.generator = nn.Module()
        self.generator.register_parameter(
            "weight", nn.Parameter(torch.randn(dims, latent) / math.sqrt(latent))
        )
        self.generator.register_parameter("loc", nn.Parameter(torch.zeros(dims)))
        self.generator.register_parameter("log_scale", nn.Parameter(torch.zeros(())))
        self.encoder: nn.Module | None = None
        if guide == "mean_field":
            self.encoder = nn.Linear(dims, latent)
            self.encoder.register_parameter("log_scale", nn.Parameter(torch.zeros(latent)))

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y has shape {tuple(y.shape)}: this PPCA takes [B, {self.dims}]")
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
                pyro.sample("z", dist.Normal(self.encoder(y), self.encoder.log_scale.exp()).to_event(1))

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln N(y; μ, W Wᵀ + σ² I), [B], in nats."""
        g = self.generator
        noise = (2 * g.log_scale).exp().expand(self.dims)
        return dist.LowRankMultivariateNormal(g.loc, g.weight, noise).log_prob(self._check(y))

    def posterior(self, y: Tensor) -> dist.MultivariateNormal:
        g = self.generator
        noise = (2 * g.log_scale).exp()
        inner = g.weight.T @ g.weight + noise * torch.eye(
            self.latent_dims, dtype=noise.dtype, device=noise.device
        )
        root = torch.linalg.cholesky(inner)
        mean = torch.cholesky_solve(g.weight.T @ (self._check(y) - g.loc).T, root).T
        return dist.MultivariateNormal(
            mean, scale_tril=torch.linalg.cholesky(noise * torch.cholesky_inverse(root))
        )

    @torch.no_grad()
    def solve(self, y: Tensor) -> PPCA:
        """Set the maximum likelihood parameters in closed form from the covariance's eigenvectors; returns
        self."""
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
            with torch.no_grad():
                pair.generator.loc.copy_(train.mean(0))
                pair.generator.log_scale.copy_(train.std(0).mean().clamp_min(1e-3).log())
                pair.generator.weight.mul_(train.std(0).mean())
        return pair

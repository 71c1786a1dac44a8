"""Probabilistic PCA and factor analysis: linear Gaussian models with closed-form evidence and posterior."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.models.precision import Floor, exact, regress
from pyroelbo.nn import LinearNormal
from pyroelbo.numerics import positive_count
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["PPCA"]


class PPCA(ExactPair):
    """p(z) = N(0, I), p(y | z) = N(W z + μ, Ψ), so p(y) = N(μ, W Wᵀ + Ψ). Data [B, D].

    With M = I + Wᵀ Ψ⁻¹ W, the posterior is N(m, M⁻¹), m = M⁻¹ Wᵀ Ψ⁻¹ (y - μ), and with the residual
    r = y - μ - W m the evidence is a sum of terms of one sign, -½ [D ln 2π + ln det Ψ + ln det M + rᵀ Ψ⁻¹ r +
    mᵀ m].

    ``noise="shared"`` has a closed-form maximum, :meth:`solve`; EM reaches the same one, slowly if the data's
    scale is far from the initial one.

    Parts: ``generator`` (weight [D, L], loc [D], log_scale [] or [D]), ``encoder`` (mean-field only).
    Cost: O(B·D·L + D·L²).

    Args:
        dims: D.
        latent: L.
        guide: ``"exact"`` draws from the posterior; ``"mean_field"`` is an amortized Gaussian with diagonal
            covariance, linear in y, which cannot represent the posterior's correlations.
        noise: ``"shared"``, Ψ = σ² I, is probabilistic PCA; ``"diagonal"``, Ψ = diag σ_d², is factor
            analysis.
        floor: smallest σ that the M-step and :meth:`solve` accept, relative to the data's standard deviation.

    Source: Tipping and Bishop (1999), equations 6, 7, 14 and 15; Rubin and Thayer (1982) for EM.
    """

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
            raise ValueError(f"noise: expected 'shared' or 'diagonal', got {noise!r}")
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide: expected 'exact' or 'mean_field', got {guide!r}")
        for name, value in (("dims", dims), ("latent", latent)):
            positive_count(name, value, "number of dimensions")
        if latent > dims:
            raise ValueError(f"latent: expected at most {dims} dimensions, those of the data, got {latent}")
        self.dims, self.latent_dims, self.noise, self.floor = dims, latent, noise, Floor(floor)
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
            raise ValueError(f"y: expected shape [B, {self.dims}], got {tuple(y.shape)}")
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
                pyro.sample("z", self.encoder.distribution(y.to(self.encoder.weight.dtype)).to_event(1))

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln N(y; μ, W Wᵀ + Ψ), [B], in nats; float64 without gradients."""
        return self._solved(y)[0]

    def posterior(self, y: Tensor) -> dist.MultivariateNormal:
        """p(z | y), in the parameters' dtype."""
        _, mean, root = self._solved(y)
        inverse = torch.linalg.inv(root)
        scale = torch.linalg.cholesky(inverse @ inverse.mT)
        like = self.generator.loc
        return dist.MultivariateNormal(mean.to(like.dtype), scale_tril=scale.to(like.dtype))

    def _solved(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The evidence [B], the posterior means [B, L] and R [L, L] with M = Rᵀ R, in float64 without
        gradients.

        R is from a QR decomposition of (Ψ^-½ W, I), which does not square the condition number.
        """
        g, size = self.generator, self.latent_dims
        weight, loc = exact(g.weight), exact(g.loc)
        log_scale = exact(g.log_scale).expand(self.dims)
        scale = log_scale.exp()
        eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
        q, root = torch.linalg.qr(torch.cat([weight / scale[:, None], eye]))
        apart = (self._check(y) - loc) / scale
        mean = torch.linalg.solve_triangular(root, q[: self.dims].mT @ apart.mT, upper=True).mT
        rest = apart - mean @ (weight / scale[:, None]).mT
        log_det = log_scale.sum() + root.diagonal().abs().log().sum()
        power = rest.square().sum(-1) + mean.square().sum(-1)
        return -0.5 * (power + self.dims * math.log(2 * math.pi)) - log_det, mean, root

    @torch.no_grad()
    def e_step(
        self, y: Tensor, hard: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) at the posterior's mean) and the statistics of :meth:`m_step`,
        in float64. ``weights`` [B] count each datum so many times in the statistics."""
        evidence, mean, root = self._solved(y)
        if hard:
            # ln p(z* | y) at the mode
            log_det = root.diagonal().abs().log().sum()
            evidence = evidence + log_det - 0.5 * self.latent_dims * math.log(2 * math.pi)
        weight = torch.ones(len(y), 1).to(mean) if weights is None else weights.to(mean)[:, None]
        code, y = torch.cat([mean, torch.ones_like(mean[:, :1])], -1), y.to(mean)
        square = (weight * code).T @ code
        if not hard:
            inverse = torch.linalg.inv(root)
            square[:-1, :-1] += weight.sum() * (inverse @ inverse.mT)
        power = (weight * y.square()).sum(0)
        return evidence, {"cross": (weight * y).T @ code, "square": square, "power": power}

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Tensor]) -> None:
        """Regress the data on their codes: weight, loc and noise that maximize the expected log joint."""
        cross, square = statistics["cross"], statistics["square"]
        g, count = self.generator, square[-1, -1]
        weight = regress(square, cross)
        variance = (statistics["power"] - (weight * cross).sum(-1)) / count
        unit = statistics["power"] / count - (cross[:, -1] / count).square()
        if self.noise == "shared":
            variance, unit = variance.mean(), unit.mean()
        g.weight.copy_(weight[:, :-1])
        g.loc.copy_(weight[:, -1])
        g.log_scale.copy_(self.floor.log_scale("observation", variance, unit))

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        """Initialize from data [N, D]: the maximum for shared noise, of standardized coordinates for diagonal
        noise, with a random perturbation of a tenth of the noise."""
        mean, unit = self._spread(y)
        values, vectors, noise = self._principal((y.double() - mean) / unit)
        size = self.latent_dims
        weight = vectors[:, -size:] * (values[-size:] - noise).clamp_min(0).sqrt()
        weight = weight + 0.1 * noise.sqrt() * torch.randn_like(weight)
        self.floor.reset()
        self._set(mean, unit[:, None] * weight, unit * noise.sqrt())

    @torch.no_grad()
    def solve(self, y: Tensor) -> PPCA:
        """Set the maximum likelihood parameters for data [N, D] in closed form, from the covariance's
        eigenvectors; returns self. Raises ValueError for diagonal noise. Source: Tipping and Bishop (1999),
        equations 7 and 8."""
        if self.noise != "shared":
            raise ValueError("noise: expected 'shared' for a closed form, got 'diagonal'; use fit_em")
        mean, unit = self._spread(y)
        values, vectors, noise = self._principal(y.double() - mean)
        size = self.latent_dims
        weight = vectors[:, -size:] * (values[-size:] - noise).clamp_min(0).sqrt()
        self._set(mean, weight, noise.sqrt() * torch.ones_like(unit))
        return self

    def _spread(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and, for diagonal noise, standard deviations [D] of the data (constant coordinates: the
        others' mean)."""
        y = self._check(y).double()
        spread = y.std(0, correction=0)
        some = spread[spread > 0]
        spread = torch.where(spread > 0, spread, some.mean() if len(some) else 1.0)
        return y.mean(0), torch.ones_like(spread) if self.noise == "shared" else spread

    def _principal(self, apart: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues and -vectors of the covariance of centred data, and the noise variance, floored."""
        values, vectors = torch.linalg.eigh(apart.T @ apart / len(apart))
        size = self.latent_dims
        noise = values[:-size].mean() if size < self.dims else values[0] * 1e-3
        least = self.floor.floor**2 * values.mean()
        return values, vectors, noise.maximum(torch.where(least > 0, least, self.floor.floor**2))

    def _set(self, loc: Tensor, weight: Tensor, scale: Tensor) -> None:
        g = self.generator
        g.loc.copy_(loc)
        g.weight.copy_(weight)
        g.log_scale.copy_(scale.log().mean() if self.noise == "shared" else scale.log())

    @torch.no_grad()
    def reconstruct(self, y: Tensor) -> Tensor:
        """E[y | z] at the posterior's mean, cut to [0, 1], [B, D]."""
        return self._decoded(self.posterior(y).mean)

    @torch.no_grad()
    def latent_plane(self, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        return (self.posterior(y).mean, self._decoded) if self.latent_dims == 2 else None

    def _decoded(self, z: Tensor) -> Tensor:
        return (z @ self.generator.weight.T + self.generator.loc).clamp(0, 1)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.loc.new_zeros(n, self.dims)

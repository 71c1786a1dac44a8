"""The Gaussian mixture: one finite latent, so evidence and posterior are sums over its components."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.pair import PLATE, ExactPair

__all__ = ["GaussianMixture"]


class GaussianMixture(ExactPair):
    """p(z) = Categorical(π) over M components, p(y | z) = N(loc_z, diag scale_z²). Data [B, D].

    ln p(y) = logsumexp_z [ln π_z + ln N(y; loc_z, diag scale_z²)] and p(z | y) are the responsibilities.
    ``guide="exact"`` draws from them; ``"encoder"`` is an amortized linear-softmax guide q(z | y). A scale
    never falls below ``floor``: without one the likelihood of a component on a single datum has no upper end.

    Parts: ``generator`` (logits [M], loc [M, D], log_scale [M, D]), ``encoder`` (amortized only). Cost:
    O(B·M·D).
    """

    form = "grey"

    def __init__(self, dims: int, components: int = 10, guide: str = "exact", floor: float = 1e-3) -> None:
        super().__init__()
        if guide not in ("exact", "encoder"):
            raise ValueError(f"guide takes 'exact' or 'encoder', got {guide!r}")
        if components < 1:
            raise ValueError(f"components takes a positive number, got {components}")
        if not floor > 0:
            raise ValueError(f"floor takes a positive scale, got {floor}")
        self.dims, self.components, self.floor = dims, components, floor
        self.generator = nn.Module()
        self.generator.register_parameter("logits", nn.Parameter(torch.zeros(components)))
        self.generator.register_parameter("loc", nn.Parameter(torch.randn(components, dims)))
        self.generator.register_parameter("log_scale", nn.Parameter(torch.zeros(components, dims)))
        self.encoder = nn.Linear(dims, components) if guide == "encoder" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _scale(self) -> Tensor:
        return self.generator.log_scale.exp() + self.floor

    def _log_joint(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y has shape {tuple(y.shape)}: this mixture takes [B, {self.dims}]")
        component = dist.Normal(self.generator.loc, self._scale()).to_event(1)
        return torch.log_softmax(self.generator.logits, 0) + component.log_prob(y.unsqueeze(-2))

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.generator.logits))
            pyro.sample("y", dist.Normal(self.generator.loc[z], self._scale()[z]).to_event(1), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            pyro.sample(
                "z", self.posterior(y) if self.encoder is None else dist.Categorical(logits=self.encoder(y))
            )

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln Σ_z π_z N(y; loc_z, diag scale_z²), [B], in nats."""
        return self._log_joint(y).logsumexp(-1)

    def posterior(self, y: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=self._log_joint(y))

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.loc.new_zeros(n, self.dims)

    @classmethod
    def for_data(cls, train: Tensor | None, shape: Sequence[int], levels: int, **settings) -> GaussianMixture:
        pair = cls(math.prod(shape), **settings)
        if train is not None:
            if len(train) < pair.components:
                raise ValueError(f"{pair.components} components take at least as many data, got {len(train)}")
            with torch.no_grad():
                pair.generator.loc.copy_(train[torch.randperm(len(train))[: pair.components]])
                pair.generator.log_scale.copy_(
                    train.std(0).clamp_min(0.05).log().expand_as(pair.generator.log_scale)
                )
        return pair

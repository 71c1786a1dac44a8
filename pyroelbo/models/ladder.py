"""Ladder (top-down) VAEs: deterministic features bottom-up, one shared path top-down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyroelbo import encoders, priors
from pyroelbo.models.hierarchy import ImageChain, check_widths
from pyroelbo.models.links import LOG_SCALE, PixelLink, normal
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import Dense, bounded, join
from pyroelbo.numerics import positive_shape

__all__ = ["Ladder"]

MERGES = ("network", "precision")
NETWORKS = ("mlp", "gated")


class Ladder(ImageChain):
    """A top-down hierarchy on images: q(z_N | y) … q(z_1 | z_{>1}, y) along the generator's own path.

    Bottom-up, y → d_1 → … → d_N are deterministic features. Top-down, the path h carries all draws so far:
    p(z_l | z_{>l}) is Gaussian with a linear map of h, then h ← cell(h, z_l). The encoder follows the same
    path, sharing its cells, and adds d_l.

    Args:
        shape: number of pixels, or their shape.
        latent: number of units of each layer, from the bottom.
        hidden: widths of features and path at each layer, from the bottom.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        merge: ``"network"``, z_l = μ_p + s_p·u with u ~ N(Δ, r²) from a network of (h, d_l), initially near
            N(0, I), so that training starts near KL 0; or ``"precision"``, the normalized product of p and a
            Gaussian N(m, v²) of d_l: precision 1/s_p² + 1/v², mean weighted by precisions.
        network: cells, ``"mlp"`` (SiLU) or ``"gated"`` at twice the cost, see :class:`~pyroelbo.nn.Dense`.
        norm: normalization in cells, ``batch``, ``layer`` or ``none``.
        dropout: probability of dropout in all cells.
        noise: probability of dropout of the pixels that the encoder sees, in training alone.
        prior: p(z_N), by name (:data:`~pyroelbo.priors.PRIORS`) or a :class:`~pyroelbo.priors.Prior`.
        components: Gaussians of the prior ``mixture``, or pseudo-inputs of ``vamp``.
        encoder: family of every u, by name (:data:`~pyroelbo.encoders.ENCODERS`) or a callable;
            ``merge="network"``.

    Sources: Sønderby et al. (2016), equations 16 to 20; Vahdat and Kautz (2020), section 3.2; Child (2021).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: Sequence[int] = (16, 8, 4),
        hidden: Sequence[int] = (128, 64, 64),
        likelihood: str = "bernoulli",
        levels: int = 256,
        merge: str = "network",
        network: str = "mlp",
        norm: str = "batch",
        dropout: float = 0.0,
        noise: float = 0.0,
        prior: str | priors.Prior = "standard",
        components: int = 50,
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        shape = positive_shape(shape)
        dims = math.prod(shape)
        check_widths("latent", latent)
        check_widths("hidden", hidden)
        if len(hidden) != len(latent):
            raise ValueError(
                f"hidden: expected a width for each of the {len(latent)} layers of latent={tuple(latent)}, "
                f"got {tuple(hidden)}"
            )
        if merge not in MERGES:
            raise ValueError(f"merge: expected one of {MERGES}, got {merge!r}")
        if network not in NETWORKS:
            raise ValueError(f"network: expected one of {NETWORKS}, got {network!r}")
        if merge == "precision" and encoder != "diagonal":
            raise ValueError(
                "encoder: expected 'diagonal' with merge='precision', a product of Gaussians, got "
                f"{encoder!r}"
            )
        pixels = Pixels(dims, likelihood, levels)
        cell = {"norm": norm, "dropout": dropout, "gated": network == "gated"}
        depth = len(latent)
        top = priors.build(prior, latent[-1], components, self.encode_top, (dims,), f"z_{depth}")
        links = [PathLink(hidden[i + 1], latent[i], hidden[i], cell) for i in range(depth - 1)]
        if merge == "network":
            merges: list[nn.Module] = [
                NetworkMerge(hidden[i + 1] if i + 1 < depth else 0, hidden[i], latent[i], cell, encoder)
                for i in range(depth)
            ]
        else:
            merges = [PrecisionMerge(hidden[i], latent[i]) for i in range(depth)]
        super().__init__(
            TopLink(top, latent[-1], hidden[-1], cell),
            links,
            PixelLink(
                nn.Sequential(Dense(hidden[0], hidden[0], **cell), nn.Linear(hidden[0], pixels.outputs)),
                pixels,
            ),
            merges,
            event=(dims,),
            order="top-down",
            features=Features(dims, hidden, pixels.center(), noise, cell),
        )
        self.shape = shape


class Features(nn.Module):
    """y → (d_1, …, d_N): each layer is a cell on the one below, followed by a residual cell."""

    def __init__(
        self, dims: int, hidden: Sequence[int], center: nn.Module, noise: float, cell: dict[str, Any]
    ) -> None:
        super().__init__()
        sizes = (dims, *hidden)
        self.center, self.noise = center, nn.Dropout(noise)
        self.layers = nn.ModuleList(
            nn.Sequential(Dense(a, b, **cell), Dense(b, b, **cell)) for a, b in itertools.pairwise(sizes)
        )

    def forward(self, y: Tensor) -> list[Tensor]:
        x, seen = self.noise(self.center(y, self.layers[0][0].linear.weight.dtype)), []
        for layer in self.layers:
            x = layer(x)
            seen.append(x)
        return seen


class TopLink(nn.Module):
    """p(z_N), and the start of the path from z_N."""

    def __init__(self, prior: nn.Module, out: int, hidden: int, cell: dict[str, Any]) -> None:
        super().__init__()
        self.out, self.prior = out, prior
        self.cell = Dense(out, hidden, **cell)

    def forward(self) -> dist.TorchDistribution:
        return self.prior()

    def move(self, state: None, z: Tensor) -> Tensor:
        return self.cell(z)


class PathLink(nn.Module):
    """p(z_l | h) = N(μ, diag s²) of a linear map of h, and h ← cell(h, z_l)."""

    def __init__(self, state: int, out: int, hidden: int, cell: dict[str, Any]) -> None:
        super().__init__()
        self.out = out
        self.head = nn.Linear(state, 2 * out)
        self.cell = nn.Sequential(Dense(state + out, hidden, **cell), Dense(hidden, hidden, **cell))

    def forward(self, state: Tensor) -> dist.TorchDistribution:
        return normal(self.head(state))

    def move(self, state: Tensor, z: Tensor) -> Tensor:
        return self.cell(join(state, z))


class NetworkMerge(nn.Module):
    """q(z_l | h, d) of z_l = μ_p + s_p·u, with u of the family ``encoder`` from a network of (h, d); at the
    top z_N = u, whatever the prior."""

    def __init__(
        self,
        state: int,
        seen: int,
        out: int,
        cell: dict[str, Any],
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        super().__init__()
        self.out, self.family = out, encoders.build(encoder, out, LOG_SCALE)
        self.cell = Dense(state + seen, seen, **cell)
        self.head = nn.Linear(seen, self.family.num_inputs)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, state: Tensor | None, seen: Tensor, p: Any) -> dist.TorchDistribution:
        if state is None:
            return self.family(self.head(self.cell(seen)))
        return self.family(self.head(self.cell(join(state, seen))), p.base_dist)


class PrecisionMerge(nn.Module):
    """q(z_l | h, d) ∝ p(z_l | h) · N(z_l; m(d), v(d)²); at the top N(0, I) stands for p."""

    def __init__(self, seen: int, out: int) -> None:
        super().__init__()
        self.out = out
        self.head = nn.Linear(seen, 2 * out)

    def forward(self, state: Tensor | None, seen: Tensor, p: Any) -> dist.TorchDistribution:
        loc, raw = self.head(seen).chunk(2, -1)
        center, precision = (0.0, 1.0) if state is None else (p.base_dist.loc, p.base_dist.scale.pow(-2))
        found = (-2 * bounded(raw, LOG_SCALE)).exp()
        total = precision + found
        return dist.Normal((precision * center + found * loc) / total, total.rsqrt()).to_event(1)

"""A style-based generator and its inverter, trained together by their bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo import priors
from pyroelbo.batch import Batch
from pyroelbo.models.conv_ladder import MapFeatures, MapMerge
from pyroelbo.models.hierarchy import ImageChain
from pyroelbo.models.links import PixelLink, normal
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP, ConvCell, ModulatedConv, doubled
from pyroelbo.numerics import image_shape, positive_count

__all__ = ["StyleVAE"]

_DRAWS = 4096  # of the mean style


class StyleVAE(ImageChain):
    """A style-based generator with its inverter. Data [B, H·W], flat images.

    Generator: z_N ~ p(z_N) becomes a style w by a mapping network. A learned constant of the coarsest size
    passes through convolutions modulated by w, each followed by noise, h ← φ(h + c·z_l + b), and is doubled
    in size between scales. The noise maps z_{N-1} (coarsest) … z_1 (finest), [1, H_l, W_l] with p = N(0, I),
    are latents like any other: the encoder inverts them too.

    Inverter, top-down: q(z_N | y) = N(μ, diag s²) of the coarsest features of y, q(z_l | z_{>l}, y) = N(Δ,
    r²) of the generator's features and those of y at that scale, initially near N(0, I). The loss -E ln p(y,
    z) + E ln q(z | y) is a cross-entropy; there is no adversary.

    ``shape`` must be a multiple of 2^(scales - 1), what the coarsest size reaches by doubling; ValueError
    names the shape and the scales that it allows.

    Args:
        shape: height and width of the images.
        scales: number of sizes, each half the finer one.
        layers: modulated convolutions, and noise maps, of each scale.
        latent: number of units of z_N.
        width: number of units of the style and of the mapping network's layers.
        mapping: number of layers of the mapping network.
        channels: number of features of generator and encoder.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        prior: p(z_N), by name (:data:`~pyroelbo.priors.PRIORS`) or a :class:`~pyroelbo.priors.Prior`.
        components: Gaussians of the prior ``mixture``, or pseudo-inputs of ``vamp``.

    Sources: Karras, Laine and Aila (2019); Karras et al. (2020); McAllester (2023), VAEs, "Degrees of
    Freedom".
    """

    def __init__(
        self,
        shape: Sequence[int],
        scales: int = 3,
        layers: int = 1,
        latent: int = 32,
        width: int = 64,
        mapping: int = 2,
        channels: int = 32,
        likelihood: str = "bernoulli",
        levels: int = 256,
        prior: str | priors.Prior = "standard",
        components: int = 50,
    ) -> None:
        shape = image_shape(shape)
        for name, count in (("scales", scales), ("layers", layers), ("mapping", mapping)):
            positive_count(name, count, "number")
        for name, count in (("latent", latent), ("width", width), ("channels", channels)):
            positive_count(name, count, "number of units")
        sizes = _sizes(shape, scales)
        pixels = Pixels(math.prod(shape), likelihood, levels)
        where = [r for r in range(scales) for _ in range(layers)]  # the scale of each noise map, finest first
        small = [min(size) < 3 for size in sizes]
        cell = {"gain": len(where) ** -0.5}
        start = priors.build(
            prior, latent, components, self.encode_top, (pixels.dims,), f"z_{len(where) + 1}"
        )
        links: list[nn.Module] = [
            NoiseLink(
                channels,
                sizes[r],
                ModulatedConv(channels, channels, width) if i else None,
                doubles=bool(i) and where[i - 1] != r,
            )
            for i, r in enumerate(where)
        ]
        super().__init__(
            StyleTop(start, sizes[-1], width, mapping, channels),
            links,
            PixelLink(_ToImage(channels, pixels.per_pixel, width), pixels),
            [
                *(NoiseMerge(1, channels, {**cell, "small": small[r]}) for r in where),
                StyleMerge(latent, sizes[-1], channels, {**cell, "small": small[-1]}),
            ],
            event=(pixels.dims,),
            order="top-down",
            features=_Features(shape, [layers] * scales, channels, pixels.center(), small, cell),
        )
        self.shape = shape

    def style(self, z: Tensor) -> Tensor:
        """The style w [*, width] of z_N [*, latent]."""
        return self.prior.mapping(z)  # type: ignore[operator]

    def mean_style(self) -> Tensor:
        """E[w] under the prior [width], the mean of 4,096 draws."""
        return self.style(self.prior().sample((_DRAWS,)).reshape(_DRAWS, -1)).mean(0)

    def observation(self, w: Tensor, noise: Sequence[Tensor]) -> dist.TorchDistribution:
        """p(y | w, noise) of a style [*, width] and the noise maps [*, 1, H_l, W_l], coarsest first; event
        shape [H·W]."""
        state = self.prior.begin(w)  # type: ignore[operator]
        for link, z in zip(reversed(self.generator.links), noise, strict=True):  # type: ignore[call-overload]
            state = link.move(state, z)
        return self.generator.observation(state)  # type: ignore[operator]

    @torch.no_grad()
    def invert(self, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The style [B, width] and noise maps, coarsest first, at the means of the encoder."""
        self.check(y)
        seen, state, p, codes = self._seen(y), None, self.prior(), []
        for layer in range(self.depth, 0, -1):
            z = self.encoder.links[layer - 1](state, seen[layer - 1], p).mean
            codes.append(z)
            if layer > 1:
                state, p = self._advance(layer, state, z, p)
        return self.style(codes[0]), codes[1:]

    @torch.no_grad()
    def interpolate(self, y: Tensor, other: Tensor, steps: int = 8) -> Tensor:
        """E[y | codes], scaled to [0, 1], [steps, B, D], on straight lines of styles and noise maps from the
        inverted ``y`` to the inverted ``other`` [B, D]."""
        w, noise = self.invert(y)
        v, others = self.invert(other)
        share = torch.linspace(0, 1, steps).to(w)
        a, b = share.view(-1, 1, 1), share.view(-1, 1, 1, 1, 1)
        between = self.observation(w.lerp(v, a), [z.lerp(u, b) for z, u in zip(noise, others, strict=True)])
        return self.pixels.mean_image(between)

    @torch.no_grad()
    def simulate(
        self, n: int, *given: Tensor, like: Batch | None = None, truncation: float = 1.0
    ) -> tuple[dict[str, Tensor], Batch]:
        """Draw n data from the generator, ``(latents, y)``, as :meth:`Pair.simulate` does.

        ``truncation`` ψ in [0, 1] moves the style to its mean, w̄ + ψ(w - w̄), and the noise maps to theirs,
        ψz: with ψ < 1 the images are more alike and their law is no longer the model's. The latents are those
        before truncation. ValueError for other ψ.
        """
        if not 0 <= truncation <= 1:
            raise ValueError(f"truncation: expected a number from 0 to 1, got {truncation!r}")
        latents, y = super().simulate(n, *given, like=like)
        if truncation < 1:
            y = self.observation(*self.truncated(latents, truncation)).sample()
        return latents, y

    @torch.no_grad()
    def truncated(self, latents: dict[str, Tensor], truncation: float) -> tuple[Tensor, list[Tensor]]:
        """The styles and noise maps, coarsest first, of ``latents`` by site, moved to their means as by
        :meth:`simulate`."""
        mean = self.mean_style()
        w = mean + truncation * (self.style(latents[self.sites[0]]) - mean)
        return w, [truncation * latents[site] for site in self.sites[1:]]


def _sizes(shape: tuple[int, ...], scales: int) -> list[tuple[int, ...]]:
    """Height and width at each scale, finest first; raises ValueError for a shape that doublings do not
    reach."""
    factor = 2 ** (scales - 1)
    if any(s < 1 or s % factor for s in shape):
        height, width = shape
        most = 1
        while not any(s % 2**most for s in shape) and min(shape) > 0:
            most += 1
        raise ValueError(
            f"shape: expected multiples of {factor}, what a coarsest size and {scales - 1} doublings reach "
            f"(scales={scales}), got {height}x{width}: use scales={most} or fewer, or pad the images"
        )
    return [tuple(s // 2**r for s in shape) for r in range(scales)]


class StyleState(NamedTuple):
    """The path of the generator: the style w [*, width] and the features h [*, C, H, W] before their
    noise."""

    w: Tensor
    h: Tensor


class StyleTop(nn.Module):
    """p(z_N), its style by the mapping network, and the first convolution of the learned constant."""

    def __init__(
        self, prior: priors.Prior, size: tuple[int, ...], width: int, mapping: int, channels: int
    ) -> None:
        super().__init__()
        self.prior, self.out = prior, prior.dims
        self.mapping = MLP((prior.dims, *[width] * mapping))
        self.start = nn.Parameter(torch.randn(channels, *size))
        self.first = ModulatedConv(channels, channels, width)

    def forward(self) -> dist.TorchDistribution:
        return self.prior()

    def begin(self, w: Tensor) -> StyleState:
        return StyleState(w, self.first(self.start, w))

    def move(self, state: None, z: Tensor) -> StyleState:
        return self.begin(self.mapping(z))


class NoiseLink(nn.Module):
    """p(z_l) = N(0, I) of a noise map of ``size``; h ← √2 · LeakyReLU(h + c·z_l + b), then the next modulated
    convolution, at twice the size with ``doubles``."""

    def __init__(
        self, channels: int, size: tuple[int, ...], following: ModulatedConv | None, doubles: bool
    ) -> None:
        super().__init__()
        self.size, self.doubles = (1, *size), doubles
        self.strength = nn.Parameter(0.3 * torch.randn(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.following = following

    def forward(self, state: StyleState) -> dist.TorchDistribution:
        return dist.Normal(state.h.new_zeros(self.size), state.h.new_ones(self.size)).to_event(3)

    def move(self, state: StyleState, z: Tensor) -> StyleState:
        h = math.sqrt(2) * F.leaky_relu(state.h + self.strength * z + self.bias, 0.2)
        if self.following is None:
            return StyleState(state.w, h)
        return StyleState(state.w, self.following(doubled(h) if self.doubles else h, state.w))


class _ToImage(nn.Module):
    """The outputs of flat pixels, [*, H·W·per_pixel], by a 1x1 convolution modulated by the style."""

    def __init__(self, channels: int, per_pixel: int, width: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(channels, per_pixel, width, kernel=1, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(per_pixel, 1, 1))

    def forward(self, state: StyleState) -> Tensor:
        return torch.movedim(self.conv(state.h, state.w) + self.bias, -3, -1).flatten(-3)


class _Features(MapFeatures):
    """The coarsest features twice: for the style as well."""

    def forward(self, y: Tensor) -> list[Tensor]:
        seen = super().forward(y)
        return [*seen, seen[-1]]


class NoiseMerge(MapMerge):
    """q(z_l | h, d) = N(Δ, r²) of a noise map, Δ and ln r from a cell on h and d."""

    def forward(self, state: StyleState, seen: Tensor, p: dist.TorchDistribution) -> dist.TorchDistribution:
        return super().forward(state.h, seen, p)


class StyleMerge(nn.Module):
    """q(z_N | y) = N(μ, diag s²), μ and ln s linear in a cell on the coarsest features, initially near 0."""

    def __init__(self, latent: int, size: tuple[int, ...], channels: int, cell: dict) -> None:
        super().__init__()
        self.out = latent
        self.cell = ConvCell(channels, channels, **cell)
        self.head = nn.Linear(channels * math.prod(size), 2 * latent)
        nn.init.normal_(self.head.weight, std=1e-3)
        nn.init.zeros_(self.head.bias)

    def forward(self, state: None, seen: Tensor, p: dist.TorchDistribution | None) -> dist.TorchDistribution:
        return normal(self.head(F.silu(self.cell(seen)).flatten(-3)))

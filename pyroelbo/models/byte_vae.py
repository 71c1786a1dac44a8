"""Byte VAEs: chains of vectors of bytes with a deterministic encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.distributions import DiscretizedLogistics
from pyroelbo.models.hierarchy import ImageChain, check_widths
from pyroelbo.models.links import PixelLink
from pyroelbo.models.observation import Center, Pixels
from pyroelbo.nn import MLP, round_straight_through
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import evaluation_mode
from pyroelbo.priors import IntegerPrior, from_integers, integer_unit, logistics

__all__ = ["ByteLink", "ByteVAE", "Reader", "RoundedLink"]

LOSSES = ("bound", "squared")
_GAIN = 4.0  # of the last weights of an encoder's link, so that its outputs start about one unit apart


class ByteVAE(ImageChain):
    """p(z_N) Π_l p(z_l | z_{l+1}) p(y | z_1), where z_l is a vector of bytes and z_{l+1} a function of z_l:
    ẑ_{l+1}(z_l), each coordinate rounded to the nearest byte. Sites "z_1" … "z_N". Data [B, D], flat.

    p(z_l | z_{l+1}) has a mixture of discretized logistics for every coordinate, and p(z_N) is autoregressive
    over the coordinates. All are probabilities of integers, so that the encoder's point mass makes the ELBO
    the hard one,

        -ELBO = -ln p(y | z_1(y)) - Σ_l ln p(z_l(y) | z_{l+1}(y)) - ln p(z_N(y)),

    the code length of (y, z_1 … z_N) in nats; nothing of it comes back, as nothing of q is random. The
    encoder is trained through the rounding, by straight-through gradients. ``evidence.exact`` and ``fit_em``
    sum over all values of few latents.

    Parts: ``prior``, ``generator``, ``encoder``.

    Args:
        shape: number of pixels, or their shape.
        latent: number of bytes of each layer, from the bottom.
        hidden: widths of the hidden layers of every network, the encoder's order.
        values: number of values of a latent, at most 256.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        components: number of logistics in a mixture.
        loss: what is trained: ``bound``, or ``squared``, ‖y - ŷ(z_1)‖² + Σ_{l<N} ‖ẑ_l - ẑ_l(z_{l+1})‖² - ln
            p(z_N), with the means of y and z_l given the layer above, the encoder's ẑ_l before rounding, and
            distances in grey levels and bytes; widths of the distributions are then learned by the bound, all
            else held fixed. Evaluation always has the bound.

    Raises ValueError for fewer than two values, more than 256, and unknown names. Source: McAllester (2023),
    TTIC 31230, Markovian VAEs.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: Sequence[int] = (8,),
        hidden: Sequence[int] = (200,),
        values: int = 256,
        likelihood: str = "bernoulli",
        levels: int = 256,
        components: int = 2,
        loss: str = "bound",
    ) -> None:
        shape = positive_shape(shape)
        dims = math.prod(shape)
        check_widths("latent", latent)
        positive_count("components", components, "number of logistics")
        if isinstance(values, bool) or not isinstance(values, int) or not 2 <= values <= 256:
            raise ValueError(f"values: expected a number from 2 to 256, got {values!r}")
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
        pixels = Pixels(dims, likelihood, levels)
        squared, wide = loss == "squared", tuple(hidden)
        back, top = tuple(reversed(wide)), len(latent) - 1
        sizes = (dims, *latent)
        decoder = Reader((latent[0], *back, pixels.outputs), values)
        super().__init__(
            IntegerPrior(latent[-1], values, components, wide or (latent[-1],)),
            [ByteLink(latent[i + 1], latent[i], back, values, components, squared) for i in range(top)],
            (SquaredPixels if squared else PixelLink)(decoder, pixels, latent[0]),
            [
                RoundedLink(
                    Reader((sizes[i], *wide, sizes[i + 1]), values, None if i else pixels.center()),
                    values,
                    squared and i < top,
                )
                for i in range(top + 1)
            ],
            event=(dims,),
        )
        self.shape = shape
        self.levels = levels

    @torch.no_grad()
    def encode(self, y: Tensor) -> tuple[Tensor, ...]:
        """The codes z_1 … z_N of data, uint8 [B, d_l] each."""
        self.check(y)
        codes: list[Tensor] = []
        with evaluation_mode(self):
            for link in self.encoder.links:  # type: ignore[union-attr]
                y = link(y).v
                codes.append(y.to(torch.uint8))
        return tuple(codes)

    @torch.no_grad()
    def decode(self, z: Tensor, layer: int = 1) -> Tensor:
        """E[y | z_1], scaled to [0, 1], [B, D], for ``z`` = z_l [B, d_l] of the ``layer`` l, integers of any
        dtype; the layers below are drawn from the generator."""
        if not 1 <= layer <= self.depth:
            raise ValueError(f"layer: expected a number from 1 to {self.depth}, got {layer!r}")
        size = self.encoder.links[layer - 1].out  # type: ignore[index]
        if z.dim() != 2 or z.shape[1] != size:
            raise ValueError(f"z: expected shape [B, {size}] for layer {layer}, got {tuple(z.shape)}")
        generator: Any = self.generator
        with evaluation_mode(self):
            for link in reversed(generator.links[: layer - 1]):
                z = link(z).sample()
            return self.pixels.mean_image(generator.observation(z))

    @torch.no_grad()
    def reconstruct(self, y: Tensor) -> Tensor:
        """E[y | z_1(y)], scaled to [0, 1], [B, D]."""
        return self.decode(self.encode(y)[0])

    @torch.no_grad()
    def initialize(self, y: Tensor) -> ByteVAE:
        """Start the biases of the last layer of p(y | z_1) with what suits all data [N, D] best, so that
        codes need not carry the mean; returns self."""
        self.check(y)
        decoder: Any = self.generator.observation.network  # type: ignore[union-attr]
        decoder.network[-1].bias.copy_(self.pixels.constant(y))
        return self


class Reader(nn.Module):
    """A network of integers 0 … values-1 as :func:`~pyroelbo.priors.from_integers` maps them, rounded first,
    since :class:`RoundedLink` may leave them unrounded in training; or of pixels, mapped by ``center``."""

    def __init__(self, sizes: Sequence[int], values: int, center: Center | None = None) -> None:
        super().__init__()
        self.inputs, self.out = (sizes[0],), sizes[-1]
        self.values, self.center, self.network = values, center, MLP(sizes)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.network[0].weight.dtype
        if self.center is None:
            seen = from_integers(round_straight_through(x.to(dtype)), self.values)
        else:
            seen = self.center(x, dtype)
        return self.network(seen)


class RoundedLink(nn.Module):
    """q(z_{l+1} | z_l), a point mass: the ``reader``'s outputs, squeezed into 0 … values-1 and rounded, with
    straight-through gradients. With ``soft`` they stay unrounded in training: whoever reads them rounds.

    An output x becomes (values-1) σ(4 u x / (values-1)), near the middle u x from it, with u the
    :func:`~pyroelbo.priors.integer_unit`.
    """

    def __init__(self, reader: Reader, values: int, soft: bool = False) -> None:
        super().__init__()
        self.inputs, self.out = reader.inputs, reader.out
        self.reader, self.values, self.soft = reader, values, soft
        with torch.no_grad():  # of layers that start narrower, those above would see a constant
            reader.network[-1].weight.mul_(_GAIN)

    def forward(self, x: Tensor) -> dist.Delta:
        top = self.values - 1
        z = top * torch.sigmoid(4 * integer_unit(self.values) / top * self.reader(x))
        return dist.Delta(z if self.soft and self.training else round_straight_through(z), event_dim=1)


class ByteLink(nn.Module):
    """p(z_l | z_{l+1}) of ``out`` independent integers 0 … values-1, each a mixture of ``components``
    discretized logistics; with ``squared``, in training, a :class:`Squared` of it.

    Args:
        inputs: number of integers of the layer above.
        out: number of integers.
        hidden: widths of the network's hidden layers.
        values: number of values of an integer.
        components: number of logistics.
        squared: whether squared distances are trained.
    """

    def __init__(
        self,
        inputs: int,
        out: int,
        hidden: Sequence[int] = (),
        values: int = 256,
        components: int = 2,
        squared: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.out, self.values, self.squared = (inputs,), out, values, squared
        self.reader = Reader((inputs, *hidden, out * 3 * components), values)
        self.log_sharpness = nn.Parameter(torch.zeros(out, 1))

    def forward(self, x: Tensor) -> TorchDistribution:
        out = self.reader(x).unflatten(-1, (self.out, -1))
        p = self._distribution(out)
        if not (self.squared and self.training):
            return p.to_event(1)
        return Squared(p.mean, self._distribution(out.detach()).to_event(1))

    def _distribution(self, out: Tensor) -> DiscretizedLogistics:
        logits, loc, sharp = out.chunk(3, -1)
        return logistics(torch.cat([logits, loc, sharp + self.log_sharpness], -1), self.values)


class SquaredPixels(PixelLink):
    """p(y | z_1) of pixels; in training, a :class:`Squared` of it."""

    def forward(self, state: Tensor) -> TorchDistribution:
        x = self.network(state)
        p = self.pixels.distribution(x)
        return Squared(self.pixels.mean(p), self.pixels.distribution(x.detach())) if self.training else p


class Squared(TorchDistribution):
    """The loss ‖v - c‖² in place of -ln p(v): ``log_prob(v)`` = -‖v - ``center``‖², [*B], of vectors v.

    Its derivatives are those of the distance, and for the parameters of ``held``, a distribution p of vectors
    whose location is detached, those of ln p(v), v rounded if it has to be an integer.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(self, center: Tensor, held: Any) -> None:
        self.center, self.held = center, held
        super().__init__(held.batch_shape, held.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return self.held.support

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Squared:
        return Squared(self.center.expand(*batch_shape, *self.event_shape), self.held.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the squared distance, [*B]."""
        seen = value.detach()
        own = self.held.log_prob(seen.round() if self.support.is_discrete else seen)
        return own - own.detach() - (value - self.center).square().sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.held.sample(sample_shape)

"""The variational autoencoder: one latent vector, an encoder and a decoder network, five pixel
likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import encoders, priors
from pyroelbo.models.observation import LIKELIHOODS, Pixels
from pyroelbo.nn import MLP, ConvDecoder, ConvEncoder, GatedMLP
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import PLATE, Pair

__all__ = ["LIKELIHOODS", "VAE"]

_FULL: dict[str, Callable[[Sequence[int]], nn.Sequential]] = {"mlp": MLP, "gated": GatedMLP}


class VAE(Pair):
    """p(z) = N(0, I), p(y | z) by a decoder, q(z | y) = N(μ(y), diag s(y)²) by an encoder. Data [B, D], flat.

    Parts: ``generator``, ``encoder``, ``prior``. With the default prior and encoder,
    KL(q, p) = ½ Σ (μ² + s² - 1 - ln s²). Raises ValueError for data that are not [B, D].

    Args:
        shape: number of pixels D, or their shape; (height, width) for ``network="conv"``.
        latent: number of latent dimensions.
        hidden: widths of the encoder's hidden layers, reversed for the decoder's; for ``conv``, the last is
            that of the layer between maps and latent.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        network: ``mlp``, ``gated`` or ``conv``.
        channels: channels of the first convolution of ``conv``.
        weight: fixed weight of the densities ``l1`` and ``l2``; learned if None.
        prior: p(z), by name (:data:`~pyroelbo.priors.PRIORS`) or a :class:`~pyroelbo.priors.Prior`.
        components: Gaussians of the prior ``mixture``, or pseudo-inputs of ``vamp``.
        encoder: family of q(z | y), by name (:data:`~pyroelbo.encoders.ENCODERS`) or a callable.

    Source: Kingma and Welling (2014); Tomczak and Welling (2018) for ``vamp`` and gated layers.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: int = 2,
        hidden: Sequence[int] = (128, 128),
        likelihood: str = "bernoulli",
        levels: int = 256,
        network: str = "mlp",
        channels: int = 32,
        weight: float | None = None,
        prior: str | priors.Prior = "standard",
        components: int = 50,
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        super().__init__()
        if network not in ("mlp", "gated", "conv"):
            raise ValueError(f"network: expected 'mlp', 'gated' or 'conv', got {network!r}")
        positive_count("latent", latent, "number of dimensions")
        if network == "conv" and not hidden:
            raise ValueError(
                "hidden: expected at least one width for network='conv', that of the layer after the maps, "
                "got ()"
            )
        self.shape = positive_shape(shape)
        self.dims, self.latent, self.levels, self.likelihood = (
            math.prod(self.shape),
            latent,
            levels,
            likelihood,
        )
        self.generator = Pixels(self.dims, likelihood, levels, weight)
        self.generator.add_module("decoder", self._decoder(network, hidden, channels))
        head = encoders.build(encoder, latent)
        if network == "conv":
            self.encoder: nn.Module = ConvEncoder(self._image(), head.num_inputs, channels, hidden[-1], head)
        else:
            self.encoder = nn.Sequential(*_FULL[network]((self.dims, *hidden, head.num_inputs)), head)
        self.prior = priors.build(prior, latent, components, self.encode, (self.dims,))

    def _decoder(self, network: str, hidden: Sequence[int], channels: int) -> nn.Module:
        if network == "conv":
            return ConvDecoder(self._image(), self.latent, self.generator.per_pixel, channels, hidden[-1])
        return _FULL[network]((self.latent, *reversed(tuple(hidden)), self.generator.outputs))

    def _image(self) -> tuple[int, int]:
        if len(self.shape) != 2:
            raise ValueError(f"shape: expected (height, width) for network='conv', got {self.shape}")
        return self.shape  # type: ignore[return-value]

    def observation(self, z: Tensor) -> dist.TorchDistribution:
        """p(y | z) of codes [*, latent], event shape [D]."""
        return self.generator.distribution(self.generator.decoder(z))

    def encode(self, y: Tensor) -> dist.TorchDistribution:
        """q(z | y), event shape [latent]."""
        self.generator.check(y, type(self).__name__)
        return self.encoder(self.generator.center()(y, self._dtype()))

    def model(self, y: Tensor) -> None:
        self.generator.check(y, type(self).__name__)
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", self.prior())
            pyro.sample("y", self.observation(z), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            self.prior.guide(pyro.sample("z", self.encode(y)))

    def mean_image(self, z: Tensor) -> Tensor:
        """E[y | z], scaled to [0, 1], [*, D]."""
        return self.generator.mean_image(self.observation(z))

    @torch.no_grad()
    def initialize(self, y: Tensor) -> VAE:
        """Initialize the prior from data [N, D] (a VampPrior's pseudo-inputs), if it starts from any; returns
        self."""
        if hasattr(self.prior, "initialize"):
            self.prior.initialize(y)
        return self

    @torch.no_grad()
    def reconstruct(self, y: Tensor) -> Tensor:
        """E[y | z] at the mean of q(z | y), scaled to [0, 1], [B, D]."""
        return self.mean_image(self.encode(y).mean)

    @torch.no_grad()
    def latent_plane(self, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        return (self.encode(y).mean, self.mean_image) if self.latent == 2 else None

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.dims, dtype=self._dtype(), device=self.device)

    def _dtype(self) -> torch.dtype:
        return next(self.generator.decoder.parameters()).dtype

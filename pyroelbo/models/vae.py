"""The variational autoencoder: a Gaussian latent, a network each way, and five kinds of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import priors
from pyroelbo.distributions.pixels import DiscretizedLogistic, l1_density, l2_density
from pyroelbo.nn import MLP, ConvDecoder, ConvEncoder, GatedMLP
from pyroelbo.pair import PLATE, Pair

__all__ = ["LIKELIHOODS", "VAE"]

# name: numbers a pixel that the decoder gives, form of the data
LIKELIHOODS: dict[str, tuple[Callable[[int], int], str]] = {
    "bernoulli": (lambda levels: 1, "binary"),
    "discretized_logistic": (lambda levels: 1, "bytes"),
    "categorical": (lambda levels: levels, "bytes"),
    "l2": (lambda levels: 1, "grey"),
    "l1": (lambda levels: 1, "grey"),
}

_FULL: dict[str, Callable[[Sequence[int]], nn.Module]] = {"mlp": MLP, "gated": GatedMLP}


class VAE(Pair):
    """p(z) = N(0, I), p(y | z) by a decoder; q(z | y) = N(μ(y), diag s(y)²) by an encoder. Data [B, D], flat.

    ``likelihood``: ``bernoulli`` (0 or 1), ``discretized_logistic`` and ``categorical`` (integers 0 …
    levels-1), ``l2`` and ``l1`` (real pixels; the Gaussian and Laplace densities with their constants). The
    logistic's scale and the densities' weight are learned, one number for all pixels; ``weight`` fixes the
    latter instead. ``network`` is ``mlp`` or ``gated`` (of widths ``hidden``) or ``conv`` (of ``channels``;
    needs ``shape`` = (height, width)). ``prior`` replaces N(0, I) by another one that is learned, by name
    (:data:`~pyroelbo.priors.PRIORS`) or as a :class:`~pyroelbo.priors.Prior`; ``components`` are the
    Gaussians of ``mixture`` or the pseudo-inputs of ``vamp``.

    Parts: ``generator``, ``encoder``, ``prior``. For N(0, I), KL(q, p) = ½ Σ (μ² + s² - 1 - ln s²). Raises
    ValueError for data that are not [B, D].

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
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood takes one of {tuple(LIKELIHOODS)}, got {likelihood!r}")
        if network not in ("mlp", "gated", "conv"):
            raise ValueError(f"network takes 'mlp', 'gated' or 'conv', got {network!r}")
        if latent < 1:
            raise ValueError(f"latent takes a positive number of dimensions, got {latent}")
        if weight is not None and likelihood not in ("l1", "l2"):
            raise ValueError(f"weight belongs to the densities 'l1' and 'l2', not to {likelihood!r}")
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.dims, self.latent, self.levels, self.likelihood = (
            math.prod(self.shape),
            latent,
            levels,
            likelihood,
        )
        per_pixel, self.form = LIKELIHOODS[likelihood]
        outputs = per_pixel(levels)
        self.generator = nn.Module()
        self.generator.add_module("decoder", self._decoder(network, hidden, channels, outputs))
        if likelihood in ("discretized_logistic", "l1", "l2"):
            start = {
                "discretized_logistic": math.log(levels / 10),
                "l1": math.log(10.0),
                "l2": math.log(100.0),
            }[likelihood]
            value = torch.tensor(start if weight is None else math.log(weight))
            if weight is None:
                self.generator.register_parameter("log_weight", nn.Parameter(value))
            else:
                self.generator.register_buffer("log_weight", value)
        if network == "conv":
            self.encoder: nn.Module = ConvEncoder(self._image(), 2 * latent, channels, hidden[-1])
        else:
            self.encoder = _FULL[network]((self.dims, *hidden, 2 * latent))
        self.prior = priors.build(prior, latent, components, self.encode, (self.dims,))

    def _decoder(self, network: str, hidden: Sequence[int], channels: int, outputs: int) -> nn.Module:
        if network == "conv":
            return ConvDecoder(self._image(), self.latent, outputs, channels, hidden[-1])
        return _FULL[network]((self.latent, *reversed(tuple(hidden)), self.dims * outputs))

    def _image(self) -> tuple[int, int]:
        if len(self.shape) != 2:
            raise ValueError(f"network='conv' needs shape=(height, width), got {self.shape}")
        return self.shape  # type: ignore[return-value]

    def _scaled(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: this VAE takes [B, {self.dims}], images flattened"
            )
        y = y.to(torch.get_default_dtype()) if not y.is_floating_point() else y
        return y / (self.levels - 1) if self.form == "bytes" else y

    def observation(self, z: Tensor) -> dist.TorchDistribution:
        """p(y | z) for codes [*, latent], with event shape [D]."""
        out = self.generator.decoder(z)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=out).to_event(1)
        if self.likelihood == "categorical":
            return dist.Categorical(logits=out.unflatten(-1, (self.dims, self.levels))).to_event(1)
        if self.likelihood == "discretized_logistic":
            center = (self.levels - 1) * torch.sigmoid(out)
            return DiscretizedLogistic(center, self.generator.log_weight.exp(), self.levels).to_event(1)
        density = l2_density if self.likelihood == "l2" else l1_density
        return density(out, self.generator.log_weight.exp()).to_event(1)

    def encode(self, y: Tensor) -> dist.TorchDistribution:
        """q(z | y), event shape [latent]."""
        loc, log_scale = self.encoder(2 * self._scaled(y) - 1).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    def model(self, y: Tensor) -> None:
        self._scaled(y)
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", self.prior())
            pyro.sample("y", self.observation(z), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", self.encode(y))

    def mean_image(self, z: Tensor) -> Tensor:
        """E[y | z] in [0, 1], [*, D], for pictures."""
        p = self.observation(z).base_dist
        if self.likelihood == "categorical":
            grey = torch.arange(self.levels, dtype=p.probs.dtype, device=p.probs.device)
            return (p.probs @ grey) / (self.levels - 1)
        if self.likelihood == "discretized_logistic":
            return p.loc / (self.levels - 1)
        return p.mean.clamp(0, 1)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.dims, dtype=self._dtype(), device=self.device)

    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    @staticmethod
    def form_of(settings: dict) -> str:
        """The form of data that a VAE of these settings takes."""
        name = settings.get("likelihood", "bernoulli")
        if name not in LIKELIHOODS:
            raise ValueError(f"likelihood takes one of {tuple(LIKELIHOODS)}, got {name!r}")
        return LIKELIHOODS[name][1]

    @classmethod
    def for_data(cls, train: Tensor | None, shape: Sequence[int], levels: int, **settings) -> VAE:
        pair = cls(shape, levels=levels, **settings)
        if train is not None:
            pair.prior.initialize(train)
        return pair

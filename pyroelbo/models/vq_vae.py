"""Autoencoders whose codes are members of a codebook: VQ-VAE, finite scalar quantization, SQ-VAE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.models.chain import SharedPath
from pyroelbo.models.codes import CodePrior
from pyroelbo.models.kmeans import k_means
from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP, Conv, ConvCell, NoisyQuantizer, ScalarQuantizer, VectorQuantizer
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import PLATE, Pair, evaluation_mode
from pyroelbo.results import CodeUsage

__all__ = ["FSQVAE", "SQVAE", "VQVAE", "standardize", "start_codebook"]

_ROWS = 500  # of a pass without gradients


class _Coded(Pair):
    """p(z) p(y | z) with G codes of K values each (abstract): an encoder network from pixels to vectors [G,
    d], a quantizer, and a decoder network from the vectors of the codes."""

    def __init__(
        self,
        quantizer: Any,
        shape: int | Sequence[int],
        positions: int,
        hidden: Sequence[int],
        likelihood: str,
        levels: int,
        network: str,
        channels: int,
        prior: str,
        one_hot: bool = False,
    ) -> None:
        super().__init__()
        self.shape = positive_shape(shape)
        self.dims, self.levels = math.prod(self.shape), levels
        self.generator, self.encoder = Pixels(self.dims, likelihood, levels), nn.Module()
        width = quantizer.width
        if network == "mlp":
            self.positions = positive_count("positions", positions, "number of codes")
            inner = self.positions * width
            encode: nn.Module = nn.Sequential(
                MLP((self.dims, *hidden, inner)), nn.Unflatten(-1, (self.positions, width))
            )
            back = reversed(tuple(hidden))
            decode: nn.Module = nn.Sequential(nn.Flatten(-2), MLP((inner, *back, self.generator.outputs)))
        elif network == "conv":
            if len(self.shape) != 2:
                raise ValueError(f"shape: expected (height, width) for network='conv', got {self.shape}")
            encode = _MapEncoder(self.shape, width, channels)
            decode = _MapDecoder(self.shape, width, self.generator.per_pixel, channels)
            self.positions = math.prod(encode.size)
        else:
            raise ValueError(f"network: expected 'mlp' or 'conv', got {network!r}")
        self.encoder.add_module("network", encode)
        self.generator.add_module("decoder", decode)
        self.quantizer = quantizer
        self.prior = CodePrior(self.positions, quantizer.codes, prior, one_hot)

    def vectors(self, y: Tensor) -> Tensor:
        """The encoder's vectors [B, G, d] before they are quantized."""
        self.generator.check(y, type(self).__name__)
        like = next(self.encoder.parameters())
        return self.encoder.network(self.generator.center()(y, like.dtype))

    def observation(self, vectors: Tensor) -> dist.TorchDistribution:
        """p(y | z) of the vectors [*, G, d] of codes, event shape [D]."""
        return self.generator.distribution(self.generator.decoder(vectors))

    def model(self, y: Tensor) -> None:
        self.generator.check(y, type(self).__name__)
        with pyro.plate(PLATE, len(y)), SharedPath(self) as shared:
            z = pyro.sample("z", self.prior())
            found = shared.path("z", z)
            vectors = self.quantizer.embed(z) if found is None else found
            pyro.sample("y", self.observation(vectors), obs=y)

    def _chosen(self, x: Tensor) -> Tensor:
        """The nearest codes [*, G] of the encoder's vectors."""
        return self.quantizer(x)[0]

    @torch.no_grad()
    def codes(self, y: Tensor) -> Tensor:
        """The codes nearest to the encoder's vectors, [B, G], integers; in evaluation mode."""
        with evaluation_mode(self):
            return torch.cat([self._chosen(self.vectors(rows)) for rows in y.split(_ROWS)])

    def usage(self, y: Tensor) -> CodeUsage:
        """How evenly the codes of data are used, all positions together; in evaluation mode, so with the
        codebook as it is."""
        count = torch.bincount(self.codes(y).reshape(-1), minlength=self.quantizer.codes)
        return CodeUsage(tuple(count.tolist()))

    @torch.no_grad()
    def initialize(self, y: Tensor) -> _Coded:
        """Scale the encoder's last layer so that the numbers of its vectors have mean 0 and variance 1 on
        data [N, D], as a decoder can tell apart, start the codebook by k-means on them, and the biases of
        the last layer of an ``mlp`` decoder with what suits all data best; returns self."""
        self.generator.check(y, type(self).__name__)
        y = y[torch.randperm(len(y))[:_MOST]].to(self.device)
        with evaluation_mode(self):
            standardize(_last(self.encoder), torch.cat([self.vectors(rows) for rows in y.split(_ROWS)]))
            if hasattr(self.quantizer, "start"):
                x = torch.cat([self.vectors(rows) for rows in y.split(_ROWS)])
                start_codebook(self.quantizer, x)
            last = _last(self.generator.decoder)
            if isinstance(last, nn.Linear):
                last.bias.copy_(self.generator.constant(y))
        return self

    @torch.no_grad()
    def reconstruct(self, y: Tensor) -> Tensor:
        """E[y | z] at the nearest codes, scaled to [0, 1], [B, D]."""
        z = self.codes(y)
        z = nn.functional.one_hot(z, self.quantizer.codes).to(self._like) if self.prior.one_hot else z
        return self.generator.mean_image(self.observation(self.quantizer.embed(z)))

    @property
    def _like(self) -> Tensor:
        return next(self.encoder.parameters())

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.dims, dtype=self._like.dtype, device=self.device)


_MOST = 20_000  # data that k-means is run on


def _last(network: nn.Module) -> Any:
    """The last layer with weights."""
    layers = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return [m for m in network.modules() if isinstance(m, layers)][-1]


@torch.no_grad()
def standardize(last: Any, x: Tensor) -> None:
    """Scale the layer ``last``, whose outputs are x [N, G, d] or flat, to mean 0 and variance 1: of a map,
    the same at all places."""
    out = x.flatten(1) if isinstance(last, nn.Linear) else x.flatten(0, 1)
    mean, scale = out.mean(0), out.std(0, correction=0).clamp_min(1e-6)
    last.bias.copy_((last.bias - mean) / scale)
    last.weight.div_(scale.reshape(-1, *[1] * (last.weight.dim() - 1)))


def start_codebook(quantizer: Any, x: Tensor) -> None:
    """Start the codebook by k-means on the vectors x [*, d]."""
    centres, label, _ = k_means(x.reshape(-1, quantizer.width), quantizer.codes)
    quantizer.start(centres, torch.bincount(label, minlength=quantizer.codes).to(centres))


class _Deterministic(_Coded):
    """Codes that the encoder computes (abstract): q(z | y) is a point mass, gradients pass straight
    through."""

    commitment = 0.0

    def guide(self, y: Tensor) -> None:
        x = self.vectors(y)
        codes, found = self.quantizer(x)
        if self.training and torch.is_grad_enabled():
            self.__dict__["_encoded"] = y, x, found  # for auxiliary_loss, in the same step
        with pyro.plate(PLATE, len(y)):
            path: dict[str, Any] = {}
            z = pyro.sample("z", dist.Delta(codes, event_dim=1), infer={"path": path})
            path.update(SharedPath.on(self, z, found))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_encoded"}


class VQVAE(_Deterministic):
    """Codes z in {0 … K-1}^G, p(z) learned, p(y | z) a decoder of their vectors e_z, and an encoder whose
    vectors x(y) [G, d] are replaced by the nearest ones of a codebook; data [B, D], flat.

    The guide is a point mass on the nearest codes, so the ELBO is ln p(z(y)) + ln p(y | z(y)), the hard one:
    a bound, whose gap is -ln p(z(y) | y). The decoder's derivative with respect to the codes' vectors is
    passed on to the encoder (straight through), and :meth:`auxiliary_loss` holds x near the codebook. The
    prior does not shape the codes: it is trained on what they are.

    ``evidence.exact`` sums over all codes where they are few (K^G up to 2^20). :meth:`usage` measures how
    evenly codes are used; ``pyroelbo compress`` codes z under p(z), then y under p(y | z).

    Parts: ``prior``, ``generator``, ``encoder``, ``quantizer`` (a parameter of it only with
    ``codebook="gradient"``). To train the prior alone on fixed codes, set ``pair.quantizer.fixed = True``,
    which stops the moving averages, and ``fit(freeze=("encoder", "generator"))``.

    Args:
        shape: number of pixels D, or their shape; (height, width) for ``network="conv"``.
        codes: K.
        width: d, numbers of a code's vector.
        positions: G, for ``network="mlp"``; convolutions have one code for each 4x4 pixels.
        hidden: widths of the encoder's hidden layers, reversed for the decoder's, of ``mlp``.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        network: ``mlp`` or ``conv``.
        channels: channels of the first convolution of ``conv``.
        codebook: ``ema`` or ``gradient``, see :class:`~pyroelbo.nn.VectorQuantizer`.
        commitment: weight of the term that holds x near its codes.
        decay: of the codebook's moving averages.
        reset: share of the mean count below which a code is moved to another place; 0 for never.
        prior: ``autoregressive``, ``factorized`` or ``uniform``, see
            :class:`~pyroelbo.models.codes.CodePrior`.

    Source: van den Oord, Vinyals and Kavukcuoglu (2017).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        codes: int = 64,
        width: int = 8,
        positions: int = 8,
        hidden: Sequence[int] = (128, 128),
        likelihood: str = "bernoulli",
        levels: int = 256,
        network: str = "mlp",
        channels: int = 32,
        codebook: str = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        reset: float = 0.1,
        prior: str = "autoregressive",
    ) -> None:
        quantizer = VectorQuantizer(codes, width, codebook, decay, reset)
        super().__init__(quantizer, shape, positions, hidden, likelihood, levels, network, channels, prior)
        if not commitment >= 0:
            raise ValueError(f"commitment: expected a number of at least 0, got {commitment!r}")
        self.commitment = commitment

    def auxiliary_loss(self, y: Tensor) -> Tensor:
        """``commitment`` · ‖x - e‖² of each datum, [B], e without derivatives, and ‖x - e‖² for a codebook by
        gradients, x without; added to the loss by :func:`~pyroelbo.fit`, part of no bound."""
        seen, x, found = self.__dict__.pop("_encoded", (None, None, None))
        if seen is not y:
            with evaluation_mode(self):  # the codebook moves with the guide's passes only
                x = self.vectors(y)
                found = self.quantizer(x)[1]
        return self.quantizer.penalty(x, found, self.commitment).sum(-1)


class FSQVAE(_Deterministic):
    """A :class:`VQVAE` without a codebook: each of the d numbers of the encoder's vectors is rounded to one
    of L_i values, K = Π L_i (:class:`~pyroelbo.nn.ScalarQuantizer`); no auxiliary loss.

    Args:
        shape: number of pixels D, or their shape; (height, width) for ``network="conv"``.
        bins: L_1 … L_d.
        positions: G, for ``network="mlp"``; convolutions have one code for each 4x4 pixels.
        hidden: widths of the encoder's hidden layers, reversed for the decoder's, of ``mlp``.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        network: ``mlp`` or ``conv``.
        channels: channels of the first convolution of ``conv``.
        prior: ``autoregressive``, ``factorized`` or ``uniform``, see
            :class:`~pyroelbo.models.codes.CodePrior`.

    Source: Mentzer, Minnen, Agustsson and Tschannen (2024).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        bins: Sequence[int] = (4, 4, 4),
        positions: int = 8,
        hidden: Sequence[int] = (128, 128),
        likelihood: str = "bernoulli",
        levels: int = 256,
        network: str = "mlp",
        channels: int = 32,
        prior: str = "autoregressive",
    ) -> None:
        quantizer = ScalarQuantizer(bins)
        super().__init__(quantizer, shape, positions, hidden, likelihood, levels, network, channels, prior)


class SQVAE(_Coded):
    """The variational VQ-VAE: codes are drawn, q(z_g = k | y) ∝ exp(-‖x_g(y) - e_k‖² / 2σ²), so that the ELBO
    has the guide's entropy; the site "z" [G, K] is one-hot.

    σ is learned: it falls as training goes on, and at 0 the guide is the point mass of :class:`VQVAE`. There
    is no other term in the loss. Train it with an estimator for discrete latents,
    ``fit(objective="straight_through")`` or ``"rloo"`` (see docs/discrete.md). Bits-back coding gets the
    entropy back.

    Parts: ``prior``, ``generator``, ``encoder``, ``quantizer``.

    Args:
        shape: number of pixels D, or their shape; (height, width) for ``network="conv"``.
        codes: K.
        width: d, numbers of a code's vector.
        positions: G, for ``network="mlp"``; convolutions have one code for each 4x4 pixels.
        hidden: widths of the encoder's hidden layers, reversed for the decoder's, of ``mlp``.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        network: ``mlp`` or ``conv``.
        channels: channels of the first convolution of ``conv``.
        prior: ``uniform``, ``factorized`` or ``autoregressive``, see
            :class:`~pyroelbo.models.codes.CodePrior`. Trained from the start, the latter two draw the encoder
            to the few codes that they know. Let them learn once the codes mean something: ``fit(pair, y,
            freeze=("prior",), ...)``, then ``fit(pair, y, ...)``.

    Source: Takida et al. (2022).
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        codes: int = 64,
        width: int = 8,
        positions: int = 8,
        hidden: Sequence[int] = (128, 128),
        likelihood: str = "bernoulli",
        levels: int = 256,
        network: str = "mlp",
        channels: int = 32,
        prior: str = "uniform",
    ) -> None:
        quantizer = NoisyQuantizer(codes, width)
        super().__init__(
            quantizer, shape, positions, hidden, likelihood, levels, network, channels, prior, one_hot=True
        )

    def encode(self, y: Tensor) -> dist.TorchDistribution:
        """q(z | y), event shape [G, K]."""
        return dist.OneHotCategorical(logits=self.quantizer(self.vectors(y))).to_event(1)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", self.encode(y))

    def _chosen(self, x: Tensor) -> Tensor:
        return self.quantizer(x).argmax(-1)


class _MapEncoder(nn.Module):
    """Flat images [*, H·W] to vectors [*, H/4 · W/4, out], rounded up."""

    def __init__(self, shape: Sequence[int], out: int, channels: int) -> None:
        super().__init__()
        self.shape, self.size = tuple(shape), tuple(math.ceil(s / 4) for s in shape)
        self.layers = nn.Sequential(
            Conv(1, channels, 3, 2), nn.SiLU(), Conv(channels, 2 * channels, 3, 2), nn.SiLU(),
            ConvCell(2 * channels, 2 * channels), nn.SiLU(), Conv(2 * channels, out, 1),
        )  # fmt: skip

    def forward(self, y: Tensor) -> Tensor:
        image = y.reshape(*y.shape[:-1], 1, *self.shape)
        return self.layers(image).flatten(-2).movedim(-2, -1)


class _MapDecoder(nn.Module):
    """Vectors [*, H/4 · W/4, width] to ``out`` numbers per pixel, [*, H·W·out]."""

    def __init__(self, shape: Sequence[int], width: int, out: int, channels: int) -> None:
        super().__init__()
        self.shape, self.size = tuple(shape), tuple(math.ceil(s / 4) for s in shape)
        self.layers = nn.Sequential(
            Conv(width, 2 * channels, 3), nn.SiLU(), ConvCell(2 * channels, 2 * channels), nn.SiLU(),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1), nn.SiLU(),
            nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, vectors: Tensor) -> Tensor:
        lead = vectors.shape[:-2]
        maps = vectors.movedim(-1, -2).reshape(-1, vectors.shape[-1], *self.size)
        image = self.layers(maps)[..., : self.shape[0], : self.shape[1]]
        return image.movedim(1, -1).reshape(*lead, -1)

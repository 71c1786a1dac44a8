"""Chains of codes from codebooks, with a deterministic encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyroelbo.models.codes import CodePrior
from pyroelbo.models.hierarchy import ImageChain, check_widths
from pyroelbo.models.links import PixelLink
from pyroelbo.models.observation import Pixels
from pyroelbo.models.vq_vae import standardize, start_codebook
from pyroelbo.nn import MLP, VectorQuantizer
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import evaluation_mode

__all__ = ["CodeLink", "CodebookLink", "VQChain"]


class VQChain(ImageChain):
    """p(z_N) Π_l p(z_l | z_{l+1}) p(y | z_1), where z_l are G_l codes of K values and z_{l+1} a function of
    z_l: vectors x_{l+1}(z_l) [G_{l+1}, d], each replaced by the nearest one of the layer's codebook. Sites
    "z_1" … "z_N", one-hot [G_l, K]. Data [B, D], flat.

    p(z_l | z_{l+1}) has independent categoricals from a network of the vectors of z_{l+1}. All latents are
    discrete and the guide is a point mass, so that the ELBO is the hard one, as of
    :class:`~pyroelbo.models.ByteVAE`. Codes are learned by what is decoded from them, straight through, and a
    codebook by moving averages. What is expected of a code from above does not shape it, as a one-hot value
    has no derivative in ln p(z_l | z_{l+1}); trained jointly, what is read of it there does, and trained
    layer by layer (:class:`~pyroelbo.objectives.Progressive_ELBO`) nothing above.

    Parts: ``prior``, ``generator``, ``encoder`` (with the codebooks). Start with :meth:`initialize`. Cost:
    O(B · Σ_l G_l · K · d) beside the networks.

    Args:
        shape: number of pixels, or their shape.
        positions: number of codes G_l of each layer, from the bottom.
        codes: number of values K of a code.
        width: d, numbers of a code's vector.
        hidden: widths of the hidden layers of every network, the encoder's order.
        likelihood: of a pixel, see :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        commitment: weight of the term that holds vectors near their codes.
        prior: ``autoregressive``, ``factorized`` or ``uniform``, see
            :class:`~pyroelbo.models.codes.CodePrior`.

    Sources: van den Oord, Vinyals and Kavukcuoglu (2017); McAllester (2022), TTIC 31230, Progressive VAEs.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        positions: Sequence[int] = (6, 3),
        codes: int = 16,
        width: int = 8,
        hidden: Sequence[int] = (200,),
        likelihood: str = "bernoulli",
        levels: int = 256,
        commitment: float = 0.25,
        prior: str = "autoregressive",
    ) -> None:
        shape = positive_shape(shape)
        dims = math.prod(shape)
        check_widths("positions", positions)
        positive_count("codes", codes, "number of values")
        positive_count("width", width, "number of features")
        if not commitment >= 0:
            raise ValueError(f"commitment: expected a number of at least 0, got {commitment!r}")
        pixels, wide = Pixels(dims, likelihood, levels), tuple(hidden)
        back, links = tuple(reversed(wide)), list[CodebookLink]()
        for size in positions:
            below = links[-1] if links else pixels.center()
            inputs = links[-1].positions * width if links else dims
            network = MLP((inputs, *wide, size * width))
            links.append(CodebookLink(_Seen(network, below), size, VectorQuantizer(codes, width)))
        observation = MLP((positions[0] * width, *back, pixels.outputs))
        super().__init__(
            CodePrior(positions[-1], codes, prior, one_hot=True),
            [
                CodeLink(MLP((above.positions * width, *back, size * codes)), above.embed, codes)
                for size, above in zip(positions, links[1:], strict=False)
            ],
            PixelLink(_Embedded(observation, links[0].embed), pixels),
            links,
            event=(dims,),
        )
        self.shape = shape
        self.levels, self.commitment = levels, commitment

    def auxiliary_loss(self, y: Tensor) -> Tensor:
        """``commitment`` · Σ_l ‖x_l - e_l‖² of each datum, [B], e without derivatives; added to the loss by
        :func:`~pyroelbo.fit`, part of no bound."""
        links: Any = self.encoder.links
        if links[0].below is not y:
            with evaluation_mode(self):  # the codebooks move with the guide's passes only
                for link in links:
                    y = link(y).v.detach()
        return sum(link.penalty(self.commitment) for link in links)

    @torch.no_grad()
    def encode(self, y: Tensor) -> tuple[Tensor, ...]:
        """The codes z_1 … z_N of data, integers [B, G_l] each."""
        self.check(y)
        codes: list[Tensor] = []
        with evaluation_mode(self):
            for link in self.encoder.links:  # type: ignore[union-attr]
                y = link(y).v
                codes.append(y.argmax(-1))
        return tuple(codes)

    @torch.no_grad()
    def initialize(self, y: Tensor) -> VQChain:
        """Layer by layer from the bottom, scale the encoder's vectors to mean 0 and variance 1 on data [N, D]
        and start the codebook by k-means on them; start the biases of the last layer of p(y | z_1) with what
        suits all data best. Returns self."""
        self.check(y)
        links: Any = self.encoder.links
        with evaluation_mode(self):
            z = y
            for link in links:
                standardize(link.reader.network[-1], link.reader(z))
                start_codebook(link.quantizer, link.vectors(z))
                z = link(z).v
        self.generator.observation.network.network[-1].bias.copy_(self.pixels.constant(y))  # type: ignore[union-attr]
        return self


class _Seen(nn.Module):
    """A network of what a layer sees of the one below: pixels, centred, or the vectors of codes."""

    def __init__(self, network: MLP, below: CodebookLink | nn.Module) -> None:
        super().__init__()
        self.network = network
        if isinstance(below, CodebookLink):
            self.embed = below.embed
        else:
            self.center = below

    def forward(self, x: Tensor) -> Tensor:
        like = self.network[0].weight
        return self.network(self.center(x, like.dtype) if hasattr(self, "center") else self.embed(x))


class _Embedded(nn.Module):
    """A network of the vectors of one-hot codes."""

    def __init__(self, network: MLP, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.embed = network, embed

    def forward(self, z: Tensor) -> Tensor:
        return self.network(self.embed(z))


class CodebookLink(nn.Module):
    """q(z_{l+1} | z_l), a point mass on ``positions`` one-hot codes, those nearest to the vectors that
    ``reader`` makes of z_l, [*, positions · d].

    Gradients pass straight through: with the codebook E [K, d], the value is onehot + (x - sg x) E⁺, so that
    the vectors z E that decoders read are those of the codes, with the derivative of x (of its part within
    the span of the codes, if they are fewer than d).
    """

    def __init__(self, reader: nn.Module, positions: int, quantizer: VectorQuantizer) -> None:
        super().__init__()
        self.reader, self.positions, self.quantizer = reader, positions, quantizer

    def vectors(self, below: Tensor) -> Tensor:
        """x [*, positions, d] before it is quantized."""
        return self.reader(below).unflatten(-1, (self.positions, self.quantizer.width))

    def embed(self, z: Tensor) -> Tensor:
        """The vectors of one-hot codes [*, positions, K], flat, [*, positions · d]."""
        return (z @ self.quantizer.codebook).flatten(-2)

    def forward(self, below: Tensor) -> dist.Delta:
        x = self.vectors(below)
        codes, found = self.quantizer(x)
        chosen = one_hot(codes, self.quantizer.codes).to(x)
        if not torch.is_grad_enabled():
            return dist.Delta(chosen, event_dim=2)
        self.__dict__["_last"] = below, x, found
        with torch.no_grad():
            inverse = torch.linalg.pinv(self.quantizer.codebook)
        return dist.Delta(chosen + (x - x.detach()) @ inverse, event_dim=2)

    @property
    def below(self) -> Tensor | None:
        """What the last pass with gradients saw."""
        return self.__dict__.get("_last", (None,))[0]

    def penalty(self, commitment: float) -> Tensor:
        """``commitment`` · ‖x - sg e‖² of that pass, summed over positions, [*]; forgets it."""
        _, x, found = self.__dict__.pop("_last")
        return self.quantizer.penalty(x, found, commitment).sum(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_last"}


class CodeLink(nn.Module):
    """p(z_l | z_{l+1}) of independent one-hot codes of ``codes`` values, from a network of the vectors
    ``embed(z_{l+1})``."""

    def __init__(self, network: MLP, embed: Callable[[Tensor], Tensor], codes: int) -> None:
        super().__init__()
        self.network, self.embed, self.codes = network, embed, codes

    def forward(self, z: Tensor) -> dist.TorchDistribution:
        logits = self.network(self.embed(z)).unflatten(-1, (-1, self.codes))
        return dist.OneHotCategorical(logits=logits).to_event(1)

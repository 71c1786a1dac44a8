"""Rate–distortion autoencoders: rounded codes with a learned prior, and a distortion as a density."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.models.observation import Pixels
from pyroelbo.nn import MLP, round_straight_through
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import PLATE, ExactPair, Lossy, Pair, Stepwise, evaluation_mode
from pyroelbo.priors import IntegerPrior, integer_unit

__all__ = ["CodePair", "RateDistortion"]

QUANTIZATIONS = ("noise", "straight_through")


class RateDistortion(Pair):
    """p(z) p(y | z) of integers z [d], and an encoder that rounds, z = round(x(y)): E[-ln p(z(y))] is the
    rate, -ln p(y | z) = D(y, ŷ(z)) + ln Z the distortion as a density.

    For ``l2`` D = ½ λ ‖y - ŷ‖² and Z = (2π/λ)^(D/2), for ``l1`` D = λ ‖y - ŷ‖_1 and Z = (2/λ)^D, λ the
    ``weight`` (of standardized vectors, or of pixels in [0, 1]). Grey levels have the probabilities of their
    discretized forms, ``discretized_normal`` and ``discretized_laplace``. A larger λ buys less distortion for
    a higher rate: minus the ELBO is rate + distortion + ln Z.

    Rounding has no derivative. In training ``noise`` adds uniform noise instead, z = x + U(-½, ½), and its
    density under the model is that of the prior's integers with such noise added, the difference of the
    prior's cdf at z ± ½: a bound of its own, with a rate like that of rounding. ``straight_through`` rounds
    and passes the derivative on. Evaluation, validation and files round: the guide is a point mass, the ELBO
    is the hard one.

    :meth:`lossy` has the codes alone: their files have the rate. Data that are discrete are also compressed
    without loss, by codes and then pixels.

    Parts: ``prior``, ``generator``, ``encoder``. Data [B, D], flat.

    Args:
        shape: number of pixels D, or their shape.
        latent: number of integers d.
        hidden: widths of the encoder's hidden layers, reversed for the decoder's; () for linear maps.
        likelihood: ``l2``, ``l1``, ``discretized_normal`` or ``discretized_laplace``, see
            :class:`~pyroelbo.models.observation.Pixels`.
        levels: number of grey levels, for integer pixels.
        weight: λ.
        quantization: ``noise`` or ``straight_through``.
        values: number of values of an integer, 0 … values-1; x is cut to that range.
        components: logistics of the prior of an integer, see :class:`~pyroelbo.priors.IntegerPrior`.

    Sources: Ballé, Laparra and Simoncelli (2017), equations 9 to 13; Theis, Shi, Cunningham and Huszár (2017)
    for the straight-through gradient.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        latent: int = 16,
        hidden: Sequence[int] = (128, 128),
        likelihood: str = "l2",
        levels: int = 256,
        weight: float = 100.0,
        quantization: str = "noise",
        values: int = 256,
        components: int = 3,
    ) -> None:
        super().__init__()
        if quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization: expected one of {QUANTIZATIONS}, got {quantization!r}")
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"weight: expected a positive number, got {weight!r}")
        self.shape = positive_shape(shape)
        self.dims, self.latent, self.levels = math.prod(self.shape), latent, levels
        self.quantization, self.values = quantization, positive_count("values", values, "number of values")
        self.generator, self.encoder = Pixels(self.dims, likelihood, levels, weight), nn.Module()
        sizes = (self.dims, *hidden, positive_count("latent", latent, "number of integers"))
        self.encoder.add_module("network", MLP(sizes))
        self.generator.add_module("decoder", MLP((*reversed(sizes[1:]), self.generator.outputs)))
        self.prior = IntegerPrior(latent, values, components)

    @property
    def weight(self) -> float:
        """λ."""
        return float(self.generator.log_weight.exp())

    def vectors(self, y: Tensor) -> Tensor:
        """x(y) [B, d] before it is rounded, within the range of the integers."""
        self.generator.check(y, type(self).__name__)
        like = next(self.encoder.parameters())
        seen = self.generator.center()(y, like.dtype) if self.generator.integers else y.to(like.dtype)
        top = self.values - 1
        x = top / 2 + integer_unit(self.values) * self.encoder.network(seen)
        return x.detach().clamp(0, top) + (x - x.detach())

    def observation(self, z: Tensor) -> dist.TorchDistribution:
        """p(y | z) of integers [*, d], event shape [D]."""
        unit = integer_unit(self.values)
        return self.generator.distribution(self.generator.decoder((z - (self.values - 1) / 2) / unit))

    @property
    def _noisy(self) -> bool:
        return self.training and self.quantization == "noise"

    def model(self, y: Tensor) -> None:
        self.generator.check(y, type(self).__name__)
        p = _Blurred(self.prior()) if self._noisy else self.prior()
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", p)
            pyro.sample("y", self.observation(z), obs=y)

    def guide(self, y: Tensor) -> None:
        x = self.vectors(y)
        if self._noisy:
            q: TorchDistribution = _Noise(x)
        else:
            q = dist.Delta(round_straight_through(x), event_dim=1)
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", q)

    # ------------------------------------------------------------------------------------ codes alone

    @torch.no_grad()
    def codes(self, y: Tensor) -> Tensor:
        """z(y), [B, d], integers."""
        return self.vectors(y).round().long()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """ŷ(z), [B, D], in the units of the data; of grey levels, within their range."""
        mean = self.generator.mean(self.observation(z.to(next(self.encoder.parameters()).dtype)))
        return mean.clamp(0, self.levels - 1) if self.generator.integers else mean

    @torch.no_grad()
    def rate(self, y: Tensor) -> Tensor:
        """-ln p(z(y)), [B], in nats."""
        with evaluation_mode(self):
            return -self.prior().log_prob(self.vectors(y).round())

    def lossy(self) -> Lossy:
        return Lossy(self.codes, self.decode, CodePair(self.prior))

    @torch.no_grad()
    def reconstruct(self, y: Tensor) -> Tensor:
        """ŷ(z(y)), scaled to [0, 1], [B, D]."""
        z = self.vectors(y).round()
        return self.generator.mean_image(self.observation(z))

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        like = next(self.encoder.parameters())
        return torch.zeros(n, self.dims, dtype=like.dtype, device=self.device)


class CodePair(ExactPair):
    """The codes of a :class:`RateDistortion` as data of their own, z [B, d] integers of any dtype: ln p(z) by
    its prior, exact, coded directly."""

    def __init__(self, prior: IntegerPrior) -> None:
        super().__init__()
        self.prior = prior

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            pyro.sample("y", self.prior(), obs=y)

    def guide(self, y: Tensor) -> None:
        """There are no latents."""

    def log_evidence(self, y: Tensor) -> Tensor:
        return self.prior().log_prob(y.to(next(self.parameters()).dtype)).double()

    def stepwise(self) -> Stepwise:
        return self.prior().stepwise()

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        first = next(self.parameters())
        return torch.zeros(n, self.prior.dims, dtype=first.dtype, device=first.device)


class _Blurred(TorchDistribution):
    """A distribution of integers plus uniform noise in (-½, ½), if its log probability continues to the
    reals as that density."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(self, base: Any) -> None:
        self.base = base
        base._validate_args = False  # between the integers
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.real_vector

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Blurred:
        return _Blurred(self.base.expand(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        return self.base.log_prob(value)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        z = self.base.sample(sample_shape)
        return z + torch.rand_like(z) - 0.5


class _Noise(TorchDistribution):
    """x + U(-½, ½) in each coordinate of x [*, d], event shape [d].

    torch's Uniform has density zero at its upper end, which rounding in float32 reaches: at x = 127 once in
    some 10^5 draws.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    has_rsample = True

    def __init__(self, x: Tensor) -> None:
        self.x = x
        super().__init__(x.shape[:-1], x.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.real_vector

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Noise:
        return _Noise(self.x.expand(*batch_shape, -1))

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        x = self.x.expand(*sample_shape, *self.x.shape)
        return x + (torch.rand_like(x) - 0.5)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 within ½ of x, up to rounding, else -inf."""
        within = ((value - self.x).detach().abs() < 0.501).all(-1)
        return torch.where(within, 0.0, -math.inf).to(value.dtype)

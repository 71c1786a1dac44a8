"""The fixed encoders of diffusion models in closed form: Gaussian noise, and uniform noise on finite
symbols."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.distributions.pixels import DiscretizedLogistic
from pyroelbo.nn import bounded, one_hot
from pyroelbo.numerics import positive_count, whole_number

__all__ = [
    "PARAMETRIZATIONS",
    "SCHEDULES",
    "VARIANCES",
    "Corruption",
    "GaussianNoise",
    "UniformNoise",
    "kept",
]

SCHEDULES = ("linear", "cosine")
PARAMETRIZATIONS = ("eps", "x0", "v")
VARIANCES = ("learned", "beta", "beta_tilde")
_SIGNAL = 0.05  # of the variance that may be left at T
_CLIP = 0.999  # largest β
_LOG_RANGE = 10.0  # a learned variance stays within e^±10 of β


def kept(schedule: str | Sequence[float] | Tensor, steps: int) -> Tensor:
    """ᾱ_0 … ᾱ_T, the share of the signal's variance that is left after t steps, float64 [T + 1]; ᾱ_0 = 1.

    ``linear``: β evenly from .1/T to min(.999, 20/T) (Ho, Jain and Abbeel, 2020, in units of T); ``cosine``:
    ᾱ_t = f(t)/f(0) with f(t) = cos²(π/2 · (t/T + s)/(1 + s)), s = .008, and β clipped at .999 (Nichol and
    Dhariwal, 2021); or β_1 … β_T themselves. Raises ValueError for β outside (0, 1), and for a schedule that
    leaves more than 5% of the signal at T, for which p(z_T) = N(0, I) is wrong.
    """
    positive_count("steps", steps, "number of steps")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES} or β_1 … β_T, got {schedule!r}")
        if steps < 2:
            raise ValueError(f"steps: expected at least 2, got {steps}")
        if schedule == "linear":
            beta = torch.linspace(0.1 / steps, min(_CLIP, 20 / steps), steps, dtype=torch.float64)
        else:
            share = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008
            level = (0.5 * math.pi * share).cos().square()
            beta = (1 - level[1:] / level[:-1]).clamp_max(_CLIP)
    else:
        beta = torch.as_tensor(schedule, dtype=torch.float64)
        if beta.shape != (steps,) or steps < 2:
            raise ValueError(f"schedule: expected {steps} numbers β_t, at least 2, got {tuple(beta.shape)}")
    wrong = ~((beta > 0) & (beta < 1))
    if bool(wrong.any()):
        step = int(wrong.nonzero()[0])
        raise ValueError(
            f"schedule: expected 0 < β_t < 1, so that ᾱ_t falls, got {float(beta[step]):.4g} at "
            f"t = {step + 1}"
        )
    left = torch.cat([beta.new_ones(1), (1 - beta).cumprod(0)])
    if float(left[-1]) > _SIGNAL:
        raise ValueError(
            f"schedule: expected at most {_SIGNAL:.0%} of the signal's variance at T, got "
            f"{float(left[-1]):.1%}: take more steps or larger β"
        )
    return left


class Corruption(nn.Module):
    """q(z_1 … z_T | y) in closed form, and how a network's outputs make p(z_{t-1} | z_t) and p(y | z_1)
    (abstract).

    Steps t are LongTensors [*], data and latents [*, D], network outputs [*, D, ``outputs``]; all
    distributions have independent dimensions, batch shape [*, D]. Raises ValueError for schedules that
    :func:`kept` refuses.
    """

    outputs: int
    """Numbers per dimension that the network gives."""

    reparametrized = False
    """Whether draws of q are differentiable in the data."""

    tables: Tensor
    """ᾱ_t, 1 - ᾱ_t, β_t and 1 - ᾱ_{t-1}, [4, T + 1]; entry 0 of the last two means nothing."""

    def __init__(self, steps: int, schedule: str | Sequence[float] | Tensor) -> None:
        super().__init__()
        left = kept(schedule, steps)
        lost = -torch.expm1(torch.cat([left.new_zeros(1), torch.log(left[1:])]))
        before = torch.cat([lost[:1], lost[:-1]])
        beta = torch.cat([left.new_zeros(1), 1 - left[1:] / left[:-1]])
        self.steps = steps
        self.register_buffer("tables", torch.stack([left, lost, beta, before]).to(torch.get_default_dtype()))

    def at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ᾱ_t, 1 - ᾱ_t, β_t and 1 - ᾱ_{t-1}, [*, 1] each."""
        left, lost, beta, before = self.tables[:, t].unsqueeze(-1).unbind(0)
        return left, lost, beta, before

    @abstractmethod
    def encode(self, y: Tensor) -> Tensor:
        """z_0 of the data."""

    @abstractmethod
    def noise(self, dims: int) -> Any:
        """The distribution, of event shape [dims], that :meth:`corrupt` takes draws of."""

    @abstractmethod
    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """A draw of q(z_t | z_0 = x), as a function of ``noise``."""

    @abstractmethod
    def forwards(self, before: Tensor, t: Tensor) -> Any:
        """q(z_t | z_{t-1})."""

    @abstractmethod
    def backwards(self, x: Tensor, z: Tensor, t: Tensor) -> Any:
        """q(z_{t-1} | z_t, z_0 = x), t ≥ 2."""

    @abstractmethod
    def marginal(self, x: Tensor, t: Tensor) -> Any:
        """q(z_t | z_0 = x)."""

    @abstractmethod
    def prior(self, dims: int) -> Any:
        """p(z_T)."""

    @abstractmethod
    def reverse(self, out: Tensor, z: Tensor, t: Tensor) -> Any:
        """p(z_{t-1} | z_t), t ≥ 2."""

    @abstractmethod
    def observation(self, out: Tensor, z: Tensor) -> Any:
        """p(y | z_1)."""

    @property
    @abstractmethod
    def support(self) -> Any:
        """The values of one dimension of y."""

    @property
    def latent_support(self) -> Any:
        """The values of one dimension of z_t."""
        return self.support


class GaussianNoise(Corruption):
    """z_t = √(1 - β_t) z_{t-1} + √β_t ε, so that q(z_t | z_0) = N(√ᾱ_t z_0, (1 - ᾱ_t) I).

    q(z_{t-1} | z_t, z_0) = N(μ̃, β̃_t I) with μ̃ = √ᾱ_{t-1} β_t/(1 - ᾱ_t) z_0 + √α_t (1 - ᾱ_{t-1})/(1 - ᾱ_t)
    z_t and β̃_t = (1 - ᾱ_{t-1})/(1 - ᾱ_t) β_t. The generator puts its estimate ẑ_0 into μ̃.

    Args:
        steps: T.
        schedule: as of :func:`kept`.
        parametrization: what the network's first output means: ``eps`` (ẑ_0 = (z_t - √(1-ᾱ_t) out)/√ᾱ_t),
            ``x0`` (out), ``v`` (√ᾱ_t z_t - √(1-ᾱ_t) out).
        variance: of p(z_{t-1} | z_t): ``learned`` (e^r β_t, per dimension, r the second output), ``beta`` or
            ``beta_tilde`` (β_1 at t = 1).
        levels: number of grey levels: data are integers 0 … levels-1, mapped to [-1, 1], and p(y | z_1) is a
            discretized logistic with the standard deviation of the reverse step. Without it data are real,
            z_0 = (y - loc)/scale, and p(y | z_1) is Gaussian.
        dims: D.

    Source: Ho, Jain and Abbeel (2020), equations 4 to 13; Salimans and Ho (2022) for ``v``.
    """

    reparametrized = True
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        steps: int,
        schedule: str | Sequence[float] | Tensor,
        parametrization: str,
        variance: str,
        levels: int | None,
        dims: int,
    ) -> None:
        super().__init__(steps, schedule)
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization: expected one of {PARAMETRIZATIONS}, got {parametrization!r}")
        if variance not in VARIANCES:
            raise ValueError(f"variance: expected one of {VARIANCES}, got {variance!r}")
        if levels is not None:
            whole_number("levels", levels, 2, "grey levels")
        self.parametrization, self.variance, self.levels = parametrization, variance, levels
        self.outputs = 2 if variance == "learned" else 1
        half = 1.0 if levels is None else (levels - 1) / 2
        self.register_buffer("loc", torch.full((dims,), 0.0 if levels is None else half))
        self.register_buffer("scale", torch.full((dims,), half))

    def encode(self, y: Tensor) -> Tensor:
        return (y.to(self.loc.dtype) - self.loc) / self.scale

    def noise(self, dims: int) -> Any:
        return dist.Normal(self.loc.new_zeros(dims), 1.0).to_event(1)

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        left, lost, _, _ = self.at(t)
        return left.sqrt() * x + lost.sqrt() * noise

    def forwards(self, before: Tensor, t: Tensor) -> Any:
        _, _, beta, _ = self.at(t)
        return dist.Normal((1 - beta).sqrt() * before, beta.sqrt())

    def backwards(self, x: Tensor, z: Tensor, t: Tensor) -> Any:
        _, lost, beta, before = self.at(t)
        return dist.Normal(self._between(x, z, t), (before / lost * beta).sqrt())

    def marginal(self, x: Tensor, t: Tensor) -> Any:
        left, lost, _, _ = self.at(t)
        return dist.Normal(left.sqrt() * x, lost.sqrt())

    def prior(self, dims: int) -> Any:
        return dist.Normal(self.loc.new_zeros(dims), 1.0)

    def reverse(self, out: Tensor, z: Tensor, t: Tensor) -> Any:
        return dist.Normal(self._between(self.estimate(out, z, t), z, t), self._scale(out, t))

    def observation(self, out: Tensor, z: Tensor) -> Any:
        first = torch.ones((), dtype=torch.long, device=z.device)
        loc = self.loc + self.scale * self.estimate(out, z, first)
        scale = self.scale * self._scale(out, first)
        if self.levels is None:
            return dist.Normal(loc, scale)
        return DiscretizedLogistic(loc, scale * (math.sqrt(3) / math.pi), self.levels, False)

    @property
    def support(self) -> Any:
        return constraints.real if self.levels is None else constraints.integer_interval(0, self.levels - 1)

    @property
    def latent_support(self) -> Any:
        return constraints.real

    def estimate(self, out: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """ẑ_0, the network's estimate of the data in its own units."""
        left, lost, _, _ = self.at(t)
        first = out[..., 0]
        if self.parametrization == "x0":
            return first
        if self.parametrization == "eps":
            return (z - lost.sqrt() * first) / left.sqrt()
        return left.sqrt() * z - lost.sqrt() * first

    def _between(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """μ̃; at t = 1 it is x."""
        left, lost, beta, before = self.at(t)
        alpha = 1 - beta
        return ((left / alpha).sqrt() * beta * x + alpha.sqrt() * before * z) / lost

    def _scale(self, out: Tensor, t: Tensor) -> Tensor:
        """Standard deviation of the reverse step."""
        _, lost, beta, before = self.at(t)
        if self.variance == "beta":
            return beta.sqrt().expand(out.shape[:-1])
        if self.variance == "beta_tilde":
            share = torch.where(before > 0, before / lost, before.new_ones(()))
            return (share * beta).sqrt().expand(out.shape[:-1])
        return beta.sqrt() * (0.5 * bounded(out[..., 1], _LOG_RANGE)).exp()


class UniformNoise(Corruption):
    """Symbols 0 … levels-1: z_t is z_{t-1} with probability 1 - β_t, else uniform.

    q(z_t | z_0) keeps z_0 with probability ᾱ_t. With the network's p̂(z_0 | z_t) = softmax(outputs),
    p(z_{t-1} | z_t) ∝ q(z_t | z_{t-1}) Σ_x q(z_{t-1} | x) p̂(x | z_t), and p(y | z_1) is the same at t = 1.

    Source: Austin, Johnson, Ho, Tarlow and van den Berg (2021), D3PM, equations 3 and 4.
    """

    def __init__(self, steps: int, schedule: str | Sequence[float] | Tensor, levels: int) -> None:
        super().__init__(steps, schedule)
        if levels < 2:
            raise ValueError(f"levels: expected at least two symbols, got {levels}")
        self.levels = self.outputs = levels

    def encode(self, y: Tensor) -> Tensor:
        return y.long()

    def noise(self, dims: int) -> Any:
        return dist.Uniform(self.tables.new_zeros(dims), 1.0).to_event(1)

    def corrupt(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        left, lost, _, _ = self.at(t)
        other = ((noise - left) / lost * self.levels).long().clamp(0, self.levels - 1)
        return torch.where(noise < left, x, other)

    def forwards(self, before: Tensor, t: Tensor) -> Any:
        _, _, beta, _ = self.at(t)
        return dist.Categorical(self._kept(before, 1 - beta))

    def backwards(self, x: Tensor, z: Tensor, t: Tensor) -> Any:
        _, _, beta, before = self.at(t)
        return dist.Categorical(self._kept(z, 1 - beta) * self._kept(x, 1 - before))

    def marginal(self, x: Tensor, t: Tensor) -> Any:
        left, _, _, _ = self.at(t)
        return dist.Categorical(self._kept(x, left))

    def prior(self, dims: int) -> Any:
        return dist.Categorical(self.tables.new_ones(dims, self.levels))

    def reverse(self, out: Tensor, z: Tensor, t: Tensor) -> Any:
        _, _, beta, before = self.at(t)
        left = (1 - before)[..., None]
        guess = left * out.softmax(-1) + (1 - left) / self.levels
        return dist.Categorical(self._kept(z, 1 - beta) * guess)

    def observation(self, out: Tensor, z: Tensor) -> Any:
        return self.reverse(out, z, torch.ones((), dtype=torch.long, device=z.device))

    @property
    def support(self) -> Any:
        return constraints.integer_interval(0, self.levels - 1)

    def _kept(self, x: Tensor, share: Tensor) -> Tensor:
        """Probabilities [*, D, levels] of x [*, D] kept with probability ``share`` [*, 1], else uniform."""
        one = one_hot(x, self.levels).to(share.dtype)
        return share[..., None] * one + ((1 - share) / self.levels)[..., None]


class NoisyChain(nn.Module):
    """A corruption and the network that undoes it: ``corruption``, ``generator``, ``dims`` and ``steps``
    (abstract). A conditional network is told the labels [*], of which z has as many."""

    corruption: Corruption
    generator: nn.Module
    dims: int
    steps: int

    def observation(self, z: Tensor, labels: Tensor | None = None) -> Any:
        """p(y | z_1), batch shape [*, D]."""
        first = torch.ones((), dtype=torch.long, device=z.device)
        return self.corruption.observation(self.output(z, first, labels), z)

    def output(self, z: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the network says of z_t [*, D] at steps t [*]: [*, D, outputs]."""
        told = {} if labels is None else {"labels": labels}
        return self.generator(z, (t / self.steps).to(self.corruption.tables.dtype), **told)


def _steps(steps: int, device: torch.device, last: int = 1) -> Tensor:
    """T, T - 1, …, ``last``."""
    return torch.arange(steps, last - 1, -1, device=device)


class _Path(TorchDistribution):
    """A distribution of chains z_T … z_1, event shape [T, D] (abstract)."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.corruption.latent_support, 2)


class Generated(_Path):
    """p(z_T) Π_{t≥2} p(z_{t-1} | z_t), given the labels [*] of a conditional network."""

    def __init__(
        self,
        pair: NoisyChain,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
        labels: Tensor | None = None,
    ) -> None:
        self.pair, self.corruption, self.labels = pair, pair.corruption, labels
        if labels is not None:
            batch_shape = torch.broadcast_shapes(batch_shape, labels.shape)
        super().__init__(batch_shape, torch.Size((pair.steps, pair.dims)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Generated:
        return Generated(self.pair, torch.Size(batch_shape), self.labels)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        c, z = self.corruption, []
        shape = torch.Size((*sample_shape, *self.batch_shape))
        z.append(c.prior(self.pair.dims).expand((*shape, self.pair.dims)).sample())
        for t in _steps(self.pair.steps, z[0].device, 2):
            z.append(c.reverse(self.pair.output(z[-1], t, self.labels), z[-1], t).sample())
        return torch.stack(z, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(z_T … z_1), in nats."""
        c, t = self.corruption, _steps(self.pair.steps, value.device, 2)
        above, labels = value[..., :-1, :], None if self.labels is None else self.labels[..., None]
        links = c.reverse(self.pair.output(above, t, labels), above, t).log_prob(value[..., 1:, :])
        top = c.prior(self.pair.dims).log_prob(value[..., 0, :])
        found = _total(links, 2) + _total(top, 1)
        return found.expand(torch.broadcast_shapes(found.shape, self.batch_shape))


class Corrupted(_Path):
    """q(z_T … z_1 | z_0 = ``x``), x [*, D], drawn from the data upwards."""

    def __init__(self, corruption: Corruption, x: Tensor) -> None:
        self.corruption, self.x = corruption, x
        event = torch.Size((corruption.steps, x.shape[-1]))
        super().__init__(x.shape[:-1], event, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Corrupted:
        return Corrupted(self.corruption, self.x.expand(*batch_shape, -1))

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.corruption.reparametrized

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        z = [self.x.expand(*sample_shape, *self.x.shape)]
        for t in reversed(_steps(self.corruption.steps, self.x.device)):
            link = self.corruption.forwards(z[-1], t)
            z.append(link.rsample() if link.has_rsample else link.sample())
        return torch.stack(z[:0:-1], -2)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln q(z_1 … z_T | y), in nats."""
        start = self.x.expand(*torch.broadcast_shapes(value.shape[:-2], self.batch_shape), -1)
        below = torch.cat([value[..., 1:, :].expand(*start.shape[:-1], -1, -1), start.unsqueeze(-2)], -2)
        t = _steps(self.corruption.steps, value.device)
        return _total(self.corruption.forwards(below, t).log_prob(value), 2)


def _total(log_prob: Tensor, dims: int) -> Tensor:
    """The sum over the last ``dims`` dimensions, of thousands of terms, in float64 without gradients."""
    dtype = log_prob.dtype if torch.is_grad_enabled() else torch.float64
    return log_prob.sum(tuple(range(-dims, 0)), dtype=dtype)

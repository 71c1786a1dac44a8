"""Diffusion in discrete time as a Markovian pair: a fixed encoder of T links and a learned generator."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.distributions.corruption import (
    Corrupted,
    Corruption,
    GaussianNoise,
    Generated,
    NoisyChain,
    UniformNoise,
)
from pyroelbo.models.rows import Rows, class_count
from pyroelbo.nn import MLPDenoiser, PerStepLinear, TokenMLP, UNet
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import PLATE, LatentPath, Pair, evaluation_mode, within_datum

__all__ = ["Diffusion", "DiffusionPair", "DiscreteDiffusion", "SampledTerms", "Share", "Spread", "WrittenOut"]

NETWORKS = ("mlp", "linear", "unet")
LOSSES = ("bound", "simple")
_HYBRID = 1e-3  # share of the bound in the simple loss


class Spread(dist.Uniform):
    """Uniform times in [0, 1], one a datum; ``coupled`` draws spread those of a batch evenly, (u + i/B) mod
    1.

    Each time is uniform either way, so that a coupled batch has the same expected loss with less variance;
    but its rows depend on one another, and standard errors over data would be wrong.

    Source: Kingma, Salimans, Poole and Ho (2021), appendix I.1.
    """

    coupled = False

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> Spread:
        new = super().expand(batch_shape, _instance)
        new.coupled = self.coupled
        return new

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        if not self.coupled or not shape:
            return super().rsample(sample_shape)
        comb = torch.arange(shape[-1], dtype=self.low.dtype, device=self.low.device) / shape[-1]
        first = torch.rand(*shape[:-1], 1, dtype=self.low.dtype, device=self.low.device)
        return (first + comb) % 1


class Share(TorchDistribution):
    """The training form's site: ``log_prob(y)`` is one term of a bound, drawn by ``time`` [*] and ``noise``
    [*, D], whose multiple over all terms has the bound as its mean.

    ``term(y, time, noise)`` [*] computes it.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(
        self, term: Callable[[Tensor, Tensor, Tensor], Tensor], support: Any, time: Tensor, noise: Tensor
    ) -> None:
        self.term, self._support, self.time, self.noise = term, support, time, noise
        super().__init__(time.shape, noise.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self._support, 1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Share:
        noise = self.noise.expand(*batch_shape, *self.event_shape)
        return Share(self.term, self._support, self.time.expand(batch_shape), noise)

    def log_prob(self, value: Tensor) -> Tensor:
        """The term, in nats."""
        return self.term(value, self.time, self.noise)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        raise NotImplementedError("one term of a bound has no draws: simulate the pair")


class SampledTerms(Rows, Pair):
    """A pair whose bound has many terms, one of which is drawn for each datum and step (abstract).

    Sites ``time`` (uniform on [0, 1]) and ``noise`` have the same distribution in model and guide, and choose
    the term; the site ``y`` is their :class:`Share`, scaled by ``terms`` with
    :class:`~pyroelbo.within_datum`. So the ELBO is unbiased, and importance weights are refused:
    :meth:`~pyroelbo.Pair.written_out` has them. In training mode the times of a batch are spread evenly; in
    evaluation they are independent.
    """

    terms: float
    spread = True
    """Whether the times of a training batch are spread evenly."""

    def term(self, y: Tensor, time: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """One term of the bound, [*] (abstract)."""
        raise NotImplementedError

    def noise_law(self) -> Any:
        """The distribution of ``noise``, of event shape [D] (abstract)."""
        raise NotImplementedError

    @property
    def support(self) -> Any:
        """The values of one dimension of y (abstract)."""
        raise NotImplementedError

    def _choices(self) -> tuple[Tensor, Tensor]:
        like = next(self.generator.parameters())
        time = Spread(like.new_zeros(()), like.new_ones(()))
        time.coupled = self.spread and self.training
        return pyro.sample("time", time), pyro.sample("noise", self.noise_law())

    def model(self, *batch: Tensor, **named: Tensor) -> None:
        y, labels = self.split(*batch, **named)
        for name, _ in self.named_children():
            getattr(self, name)  # registers it: the term is computed after the program has ended
        term = functools.partial(self.term, labels=labels)
        with pyro.plate(PLATE, len(y)):
            time, noise = self._choices()
            with within_datum(self.terms):
                pyro.sample("y", Share(term, self.support, time, noise), obs=y)

    def guide(self, *batch: Tensor, **named: Tensor) -> None:
        y, _ = self.split(*batch, **named)
        with pyro.plate(PLATE, len(y)):
            self._choices()


class DiffusionPair(NoisyChain, SampledTerms):
    """p(z_T) Π_t p(z_{t-1} | z_t) p(y | z_1) with the fixed encoder q(z_1 … z_T | y) of a
    :class:`~pyroelbo.distributions.corruption.Corruption`. Data [B, D].

    The bound is E ln p(y | z_1) - Σ_{t≥2} E KL(q(z_{t-1} | z_t, y), p(z_{t-1} | z_t)) - KL(q(z_T | y),
    p(z_T)). The pair itself is its training form: a step t is drawn for each datum, and T times its term, in
    closed form given z_t, has the bound as its mean. :meth:`written_out` is the evidence form of the same
    pair, with which importance weights, SMC and AIS are possible. One pass of the network for a term, T
    passes for a chain or a draw.

    Parts: ``generator``, the network from z [*, D] and time t/T [*] to [*, D, outputs]; with ``classes`` it
    is called with ``labels=`` [*] as well.
    """

    def __init__(
        self, corruption: Corruption, network: nn.Module, dims: int, classes: int | None = None
    ) -> None:
        super().__init__()
        self.dims, self.classes = dims, classes
        self.steps, self.terms = corruption.steps, float(corruption.steps)
        self.corruption, self.generator = corruption, network

    @property
    def support(self) -> Any:
        return self.corruption.support

    def noise_law(self) -> Any:
        return self.corruption.noise(self.dims)

    def term(self, y: Tensor, time: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """The t-th term of the bound for t = ⌈time · T⌉, with the prior's share 1/T of its KL."""
        t = (time * self.steps).ceil().long().clamp(1, self.steps)
        c, x = self.corruption, self.corruption.encode(y)
        z = c.corrupt(x, noise, t)
        return self.weigh(y, x, z, self.output(z, t, labels), t, noise) - self._top(x) / self.steps

    def weigh(self, y: Tensor, x: Tensor, z: Tensor, out: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """ln p(y | z_1) for t = 1, else -KL(q(z_{t-1} | z_t, y), p(z_{t-1} | z_t)), [*]."""
        c, late = self.corruption, t.clamp_min(2)
        first = c.observation(out, z).log_prob(y).sum(-1)
        rest = -kl_divergence(c.backwards(x, z, late), c.reverse(out, z, late)).sum(-1)
        return torch.where(t == 1, first, rest)

    def _top(self, x: Tensor) -> Tensor:
        """KL(q(z_T | y), p(z_T)), [*]."""
        last = torch.full((), self.steps, dtype=torch.long, device=x.device)
        c = self.corruption
        return kl_divergence(c.marginal(x, last), c.prior(self.dims)).sum(-1)

    @torch.no_grad()
    def by_layer(self, y: Batch, draws: int = 16) -> Tensor:
        """The bound's terms by layer, mean over data and ``draws`` of z_t: [T + 1], nats; entry 0 is E ln p(y
        | z_1), entry t - 1 is -KL of the step to z_{t-1}, entry T the prior's. They sum to the ELBO."""
        y, labels = batches.call(self.split, batches.as_batch(y, "y"))
        top = float(self._top(self.corruption.encode(y)).mean())
        found = []
        for t in range(1, self.steps + 1):
            time = torch.full((draws, len(y)), (t - 0.5) / self.steps, device=y.device)
            noise = self.noise_law().sample(time.shape)
            found.append(float(self.term(y, time, noise, labels).mean()) + top / self.steps)
        return torch.tensor([*found, -top], dtype=torch.float64)

    def written_out(self) -> WrittenOut:
        """The chain z_T … z_1 as one site, with the same parameters."""
        return WrittenOut(self)

    @torch.no_grad()
    def simulate(self, n: int, *given: Tensor, like: Any = None) -> tuple[dict[str, Tensor], Batch]:
        """Draw n data by ancestral sampling, of the labels [n] that are given if there are classes; the
        pair's own sites choose terms of a bound, and are not drawn."""
        return {}, self.written_out().simulate(n, *given, like=like)[1]


class Diffusion(DiffusionPair):
    """Gaussian diffusion in T steps (DDPM), with the bound in all its terms. Data [B, D], flat.

    z_t = √(1 - β_t) z_{t-1} + √β_t ε; see :class:`~pyroelbo.distributions.corruption.GaussianNoise` for all
    closed forms. Grey levels (``levels``) are mapped to [-1, 1], and p(y | z_1) is a discretized logistic;
    real data (``levels=None``) have densities.

    Part: ``generator``. Raises ValueError for unknown names, schedules that leave signal at T, and data that
    are not [B, D].

    Args:
        shape: number of dimensions D, or the shape of an image.
        steps: T.
        levels: number of grey levels, or None for real data.
        schedule: ``cosine``, ``linear``, or β_1 … β_T.
        parametrization: of the network, ``eps``, ``x0`` or ``v``.
        variance: of the reverse steps, ``learned``, ``beta`` or ``beta_tilde``.
        network: ``mlp``, ``unet`` (images), ``linear`` (one linear map a step), or a module from (z [*, D],
            time [*]) to [*, D, outputs].
        width: number of features of a named network.
        layers: number of its layers.
        dropout: probability of dropout in it.
        loss: what is trained: ``bound``, or ``simple``, E_t ½ ‖ε - ε̂‖², with .001 of the bound for learned
            variances alone. Evaluation always has the bound.
        classes: number of classes of a conditional pair: batches are (labels, y), bounds are on ln p(y |
            label), and ``simulate(n, labels)`` draws by class.

    Source: Ho, Jain and Abbeel (2020); Nichol and Dhariwal (2021) for learned variances.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        steps: int = 100,
        levels: int | None = 256,
        schedule: str | Sequence[float] | Tensor = "cosine",
        parametrization: str = "v",
        variance: str = "learned",
        network: str | nn.Module = "mlp",
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        loss: str = "bound",
        classes: int | None = None,
    ) -> None:
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
        classes = class_count(classes)
        shape = positive_shape(shape)
        dims = math.prod(shape)
        noise = GaussianNoise(steps, schedule, parametrization, variance, levels, dims)
        if network == "mlp":
            network = MLPDenoiser(dims, noise.outputs, width, layers, dropout, classes=classes)
        elif network == "unet":
            network = UNet(shape, noise.outputs, width, layers, dropout, classes=classes)
        elif network == "linear":
            if classes is not None:
                raise ValueError("classes: expected none for network='linear', whose maps see no label")
            network = PerStepLinear(dims, steps, noise.outputs)
        elif not isinstance(network, nn.Module):
            raise ValueError(f"network: expected one of {NETWORKS} or a module, got {network!r}")
        super().__init__(noise, network, dims, classes)
        self.shape, self.loss = shape, loss

    def weigh(self, y: Tensor, x: Tensor, z: Tensor, out: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if self.loss == "bound" or not self.training:
            return super().weigh(y, x, z, out, t, noise)
        left, lost, _, _ = self.corruption.at(t)
        error = (left / lost).sqrt() * (x - self.corruption.estimate(out, z, t))  # ε̂ - ε
        held = torch.cat([out[..., :1].detach(), out[..., 1:]], -1)
        return -0.5 * error.square().sum(-1) / self.steps + _HYBRID * super().weigh(y, x, z, held, t, noise)

    @torch.no_grad()
    def initialize(self, *batch: Tensor) -> Diffusion:
        """Set the mean and scale that z_0 has its units from to those of real data [N, D]; grey levels have
        their own. Returns self."""
        y, _ = self.split(*batch)
        c = self.corruption
        if c.levels is None:
            spread = y.std(0, correction=0)
            c.loc.copy_(y.mean(0))
            c.scale.copy_(torch.where(spread > 0, spread, 1.0))
        return self

    @torch.no_grad()
    def few_steps(self, n: int, steps: int = 20, eta: float = 0.0, labels: Tensor | None = None) -> Tensor:
        """Draws [n, D] in ``steps`` passes of the network (DDIM), in the data's units: the last ẑ_0, grey
        levels rounded; with classes those of the ``labels`` [n].

        From t to an earlier step s, z_s = √ᾱ_s ẑ_0 + √(1 - ᾱ_s - σ²) ε̂ + σ ε with σ = ``eta`` times the
        ancestral step's standard deviation. Every ``eta`` and number of steps is a sampler of its own: the
        bound is that of :meth:`simulate`'s. Source: Song, Meng and Ermon (2021), equations 12 and 16.
        """
        labels = self.labels_for(n, () if labels is None else (labels,))
        if not 1 <= positive_count("steps", steps) <= self.steps:
            raise ValueError(f"steps: expected at most T = {self.steps}, got {steps}")
        c = self.corruption
        with evaluation_mode(self):
            z = c.prior(self.dims).expand((n, self.dims)).sample()
            times = torch.linspace(self.steps, 0, steps + 1, device=z.device).round().long()
            for t, s in itertools.pairwise(times):
                left, lost, _, _ = c.at(t)
                below, rest, _, _ = c.at(s)
                x = c.estimate(self.output(z, t, labels), z, t)
                eps = (z - left.sqrt() * x) / lost.sqrt()
                noise = eta * (rest / lost * (1 - left / below)).sqrt()
                kept_noise = (rest - noise.square()).clamp_min(0).sqrt()
                z = below.sqrt() * x + kept_noise * eps + noise * torch.randn_like(z)
        y = c.loc + c.scale * z
        return y if c.levels is None else y.round().clamp(0, c.levels - 1) + 0.0  # -0 becomes 0

    @torch.no_grad()
    def strip(self, chains: Tensor, columns: int = 8, labels: Tensor | None = None) -> Tensor:
        """What the network makes of chains [n, T, D] (``written_out().simulate(n)[0]["z"]``) at ``columns``
        steps from T to 1: the expected data, [columns, n, D], in the data's units."""
        c = self.corruption
        with evaluation_mode(self):
            places = torch.linspace(0, self.steps - 1, columns, device=chains.device).round().long()
            t = self.steps - places
            z = chains[:, places].movedim(1, 0)
            x = c.estimate(self.output(z, t[:, None], labels), z, t[:, None])
        return c.loc + c.scale * x


class DiscreteDiffusion(DiffusionPair):
    """Diffusion of symbols 0 … levels-1 in T steps by uniform noise (D3PM). Data [B, D], integers of any
    dtype.

    See :class:`~pyroelbo.distributions.corruption.UniformNoise` for all closed forms. Part: ``generator``.

    Args:
        shape: number of dimensions D, or their shape.
        levels: number of symbols.
        steps: T.
        schedule: ``cosine``, ``linear``, or β_1 … β_T.
        network: ``mlp``, or a module from (z [*, D] integers, time [*]) to logits [*, D, levels].
        width: number of features of the MLP.
        layers: number of its layers.
        dropout: probability of dropout in it.
        classes: as of :class:`Diffusion`.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        levels: int = 2,
        steps: int = 100,
        schedule: str | Sequence[float] | Tensor = "cosine",
        network: str | nn.Module = "mlp",
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        shape, classes = positive_shape(shape), class_count(classes)
        dims = math.prod(shape)
        if network == "mlp":
            network = TokenMLP(dims, levels, levels, width, layers, dropout, classes=classes)
        elif not isinstance(network, nn.Module):
            raise ValueError(f"network: expected 'mlp' or a module, got {network!r}")
        super().__init__(UniformNoise(steps, schedule, levels), network, dims, classes)
        self.shape = shape


class WrittenOut(Rows, NoisyChain, Pair):
    """The evidence form of a :class:`DiffusionPair`: the latent ``z`` is the chain, [B, T, D], z_T first.

    ln p(y, z) - ln q(z | y) has no closed-form pieces, and its mean is the same ELBO. Cost: T passes of the
    network, at once for given chains.
    """

    def __init__(self, pair: DiffusionPair) -> None:
        super().__init__()
        self.corruption, self.generator = pair.corruption, pair.generator
        self.dims, self.classes, self.steps = pair.dims, pair.classes, pair.steps
        self.label = f"{pair.name}, written out"

    @property
    def name(self) -> str:
        return self.label

    def model(self, *batch: Tensor, **named: Tensor) -> None:
        y, labels = self.split(*batch, **named)
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", Generated(self, labels=labels))
            pyro.sample("y", self.observation(z[..., -1, :], labels).to_event(1), obs=y)

    def guide(self, *batch: Tensor, **named: Tensor) -> None:
        y, _ = self.split(*batch, **named)
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", Corrupted(self.corruption, self.corruption.encode(y)))

    def latent_path(self, *batch: Tensor, **named: Tensor) -> LatentPath:
        """z_T, then each q(z_{t-1} | z_t, y) and p(z_{t-1} | z_t); only the last step sees y."""
        y, labels = self.split(*batch, **named)
        c, x, steps = self.corruption, self.corruption.encode(y), self.steps

        def at(step: int) -> Tensor:
            return torch.full((), steps - step + 1, dtype=torch.long, device=y.device)

        def prior(step: int, past: Tensor | None) -> Any:
            if past is None:
                return c.prior(self.dims).to_event(1)
            return c.reverse(self.output(past, at(step), labels), past, at(step)).to_event(1)

        def guide(step: int, past: Tensor | None) -> Any:
            found = c.marginal(x, at(1)) if past is None else c.backwards(x, past, at(step))
            return found.to_event(1)

        def emission(step: int, z: Tensor) -> Tensor:
            if step < steps - 1:
                return torch.zeros(z.shape[:-1], device=z.device)
            return self.observation(z, labels).to_event(1).log_prob(y)

        return LatentPath(steps, prior, guide, emission)

    @torch.no_grad()
    def simulate(self, n: int, *given: Tensor, like: Any = None) -> tuple[dict[str, Tensor], Batch]:
        """Draw n chains and data by ancestral sampling, T passes of the network, of the labels [n] that are
        given if there are classes."""
        labels = self.labels_for(n, given, like)
        with evaluation_mode(self):
            z = Generated(self, torch.Size((n,)), labels).sample()
            y = self.observation(z[:, -1], labels).sample()
        return {"z": z}, self.joined(y.to(next(self.generator.parameters()).dtype), labels)

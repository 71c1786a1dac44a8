"""Diffusion in continuous time with a learned monotone signal-to-noise ratio."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.models.diffusion import SampledTerms
from pyroelbo.models.rows import class_count
from pyroelbo.nn import MLPDenoiser, UNet
from pyroelbo.numerics import positive_count, positive_shape, whole_number
from pyroelbo.pair import evaluation_mode
from pyroelbo.results import Bound

__all__ = ["VDM", "NoiseLevel"]

PARAMETRIZATIONS = ("v", "levels")
SCHEDULES = ("learned", "per_dimension", "linear", "cosine")
_FIRST, _LAST = -12.0, 5.0  # γ at 0 of real data, and at 1
_SPACING = 6.0  # standard deviations at t = 0 that fit between two grey levels


class NoiseLevel(nn.Module):
    """γ(t) = -ln SNR(t), from ``first`` at t = 0 to ``last`` at t = 1, and its derivative; γ rises for all
    parameters.

    γ(t) = first + (last - first) s(t): s(t) = t (``linear``); that of α = cos(π t/2) between the ends
    (``cosine``); or (g(t) - g(0))/(g(1) - g(0)) with g(t) = e^a t + Σ_j e^(v_j) σ(e^(w_j) t + b_j)
    (``learned``, and ``per_dimension`` with parameters of its own for each of the ``dims``). The ends are
    learned with every schedule.

    The bound does not depend on the interior of one schedule for all dimensions, but its estimator's variance
    does: in training that interior follows the gradient of the second moment.

    Source: Kingma, Salimans, Poole and Ho (2021), sections 3.2 and 5.1, appendix H; Sahoo et al. (2024) for a
    schedule per dimension.
    """

    def __init__(self, schedule: str, dims: int, first: float, last: float = _LAST, units: int = 16) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {schedule!r}")
        if not first < last:
            raise ValueError(f"first, last: expected a noise level that rises, got {first} and {last}")
        self.schedule = schedule
        self.first = nn.Parameter(torch.tensor(float(first)))
        self.log_range = nn.Parameter(torch.tensor(math.log(last - first)))
        own = (dims,) if schedule == "per_dimension" else ()
        if schedule in ("learned", "per_dimension"):
            self.slope = nn.Parameter(torch.zeros(own))
            self.height = nn.Parameter(torch.full((*own, units), math.log(0.1 / units)))
            self.pace = nn.Parameter(torch.full((*own, units), math.log(8.0)))
            self.start = nn.Parameter(torch.linspace(2, -10, units).expand(*own, -1).clone())

    @property
    def scalar(self) -> bool:
        """Whether all dimensions share one schedule."""
        return self.schedule != "per_dimension"

    def forward(self, time: Tensor, weights: list[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """γ(t), γ'(t) and s(t), [*, 1] or [*, D].

        With ``weights`` the gradient with respect to s and s' is multiplied by ``weights[0]`` [*], which is
        read in the backward pass.
        """
        width = self.log_range.exp()
        share, slope = self._share(time.unsqueeze(-1))
        if weights is not None and share.requires_grad:
            share, slope = share * 1.0, slope * 1.0
            for part in (share, slope):
                part.register_hook(lambda gradient: gradient * weights[0].unsqueeze(-1))
        return self.first + width * share, width * slope, share

    def _share(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """s(t) and s'(t)."""
        if self.schedule == "linear":
            return t, torch.ones_like(t)
        if self.schedule == "cosine":
            first, width = self.first.detach(), self.log_range.detach().exp()
            low, high = (first / 2).exp().atan(), ((first + width) / 2).exp().atan()
            angle = low + (high - low) * t
            level = 2 * angle.tan().log()
            return (level - first) / width, (high - low) * 4 / (2 * angle).sin() / width
        value, slope = self._monotone(t)
        (low, _), (high, _) = self._monotone(torch.zeros_like(t)), self._monotone(torch.ones_like(t))
        return (value - low) / (high - low), slope / (high - low)

    def _monotone(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """g(t) and g'(t)."""
        height, pace = self.height.exp(), self.pace.exp()
        bend = torch.sigmoid(pace * t.unsqueeze(-1) + self.start)
        value = self.slope.exp() * t + (height * bend).sum(-1)
        return value, self.slope.exp() + (height * pace * bend * (1 - bend)).sum(-1)


class VDM(SampledTerms):
    """Gaussian diffusion in continuous time. Data [B, D], flat.

    z_t = √σ(-γ(t)) x + √σ(γ(t)) ε, and the bound is E ln p(y | z_0) - KL(q(z_1 | y), N(0, I)) - ½ E_t γ'(t)
    ‖ε - ε̂(z_t, t)‖². A time is drawn for each datum, all of the bound's terms with it. Grey levels
    (``levels``) are mapped to [-1, 1] and p(y | z_0) ∝ Π q(z_0 | y); real data have p(y | z_0) = N(z_0/α_0,
    e^γ(0)). There is no chain to write out: weights are refused. Draws take ``steps`` ancestral steps.

    Parts: ``generator``, the network from (z [*, D], s(t) [*]) to [*, D, outputs]; ``encoder``, the schedule
    :class:`NoiseLevel`. Raises ValueError for data that are not [B, D].

    Args:
        shape: number of dimensions D, or the shape of an image.
        levels: number of grey levels, or None for real data.
        schedule: ``learned`` (the ends by the bound, the interior by its estimator's second moment),
            ``per_dimension`` (all by the bound), ``linear`` or ``cosine`` (only the ends are learned).
        parametrization: of the network, ``v`` (one output, v = α ε - σ x), or ``levels``: a logit for each
            grey level x_i may have given the other pixels; x̂_i is the mean of x_i under softmax(logits + ln
            q(z_i | x_i)), so that the network need not find the grid of levels in z_i by itself.
        network: ``mlp``, ``unet`` (images), or a module.
        width: number of features of a named network.
        layers: number of its layers.
        dropout: probability of dropout in it.
        fourier: exponents j of the features sin and cos of 2^j π z that the MLP gets beside z.
        steps: ancestral steps of a draw.
        classes: number of classes of a conditional pair: batches are (labels, y), bounds are on ln p(y |
            label), ``simulate(n, labels)`` draws by class, and the network is called with ``labels=`` [*].

    Source: Kingma, Salimans, Poole and Ho (2021); Dieleman et al. (2022), section 3.1, for x̂ as a mean over
    symbols.
    """

    terms = 1.0

    def __init__(
        self,
        shape: int | Sequence[int],
        levels: int | None = 256,
        schedule: str = "learned",
        network: str | nn.Module = "mlp",
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        fourier: Sequence[int] = (),
        steps: int = 200,
        classes: int | None = None,
        parametrization: str = "v",
    ) -> None:
        super().__init__()
        if parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization: expected one of {PARAMETRIZATIONS}, got {parametrization!r}")
        if parametrization == "levels" and levels is None:
            raise ValueError("parametrization: expected 'v' for real data, got 'levels'")
        self.parametrization = parametrization
        self.classes = class_count(classes)
        self.shape = positive_shape(shape)
        self.dims, self.levels = math.prod(self.shape), levels
        self.steps = positive_count("steps", steps, "number of steps")
        if levels is not None:
            whole_number("levels", levels, 2, "grey levels")
        outputs = 1 if parametrization == "v" or levels is None else levels
        if network == "mlp":
            network = MLPDenoiser(self.dims, outputs, width, layers, dropout, True, fourier, classes)
        elif network == "unet":
            network = UNet(self.shape, outputs, width, layers, dropout, classes=classes)
        elif not isinstance(network, nn.Module):
            raise ValueError(f"network: expected 'mlp', 'unet' or a module, got {network!r}")
        first = _FIRST if levels is None else 2 * math.log(2 / (levels - 1) / _SPACING)
        self.generator = network
        self.encoder = NoiseLevel(schedule, self.dims, first)
        half = 1.0 if levels is None else (levels - 1) / 2
        self.register_buffer("loc", torch.full((self.dims,), 0.0 if levels is None else half))
        self.register_buffer("scale", torch.full((self.dims,), half))

    @torch.no_grad()
    def initialize(self, *batch: Tensor) -> VDM:
        """Set the mean and scale that x has its units from to those of real data [N, D]; grey levels have
        their own. Returns self."""
        y, _ = self.split(*batch)
        if self.levels is None:
            spread = y.std(0, correction=0)
            self.loc.copy_(y.mean(0))
            self.scale.copy_(torch.where(spread > 0, spread, 1.0))
        return self

    @property
    def support(self) -> Any:
        return constraints.real if self.levels is None else constraints.integer_interval(0, self.levels - 1)

    def noise_law(self) -> Any:
        return dist.Normal(self.loc.new_zeros(self.dims), 1.0).to_event(1)

    def encode(self, y: Tensor) -> Tensor:
        """The data in the network's units."""
        return (y.to(self.loc.dtype) - self.loc) / self.scale

    def term(self, y: Tensor, time: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """All of the bound's terms, with the time integral's at one time, [*]."""
        x = self.encode(y)
        start, middle, end = self._parts(y, x, time, noise, labels)
        return start - middle - end

    def _parts(
        self, y: Tensor, x: Tensor, time: Tensor, noise: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """E ln p(y | z_0) at one draw, ½ γ'(t) ‖ε - ε̂‖², and the prior's KL, [*]."""
        first, _, _ = self.encoder(torch.zeros_like(time))
        last, _, _ = self.encoder(torch.ones_like(time))
        start = self.observation(_mix(x, noise, first), first).log_prob(y).sum(-1)
        power, log_rest = torch.sigmoid(-last), nn.functional.logsigmoid(last)
        end = 0.5 * (power * x.square() - power - log_rest).sum(-1)
        weights: list[Tensor] = []
        level, slope, share = self.encoder(time, weights if self.training and self.encoder.scalar else None)
        error = noise - self.predict(_mix(x, noise, level), level, share, time, labels)
        middle = 0.5 * (slope * error.square()).sum(-1)
        # ∂(m²/2) = m ∂m, in units of the mean of m
        weights.append(middle.detach() / middle.detach().mean().clamp_min(1e-12))
        return start, middle, end

    def predict(
        self, z: Tensor, level: Tensor, share: Tensor, time: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """ε̂, [*, D]."""
        when = share.squeeze(-1).expand(z.shape[:-1]) if self.encoder.scalar else time.expand(z.shape[:-1])
        told = {} if labels is None else {"labels": labels}
        out = self.generator(z, when.detach(), **told)
        power, rest = torch.sigmoid(-level).sqrt(), torch.sigmoid(level).sqrt()
        if self.parametrization == "v":
            return power * out[..., 0] + rest * z
        grey, near = self._grid(z, level)
        return (z - power * ((out + near).softmax(-1) * grey).sum(-1)) / rest

    def _grid(self, z: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The grey levels in the network's units, [levels], and ln q(z_i | x_i) for each up to a constant,
        [*, D, levels]."""
        grey = torch.linspace(-1, 1, self.levels or 0, dtype=z.dtype, device=z.device)
        apart = z.unsqueeze(-1) - torch.sigmoid(-level).sqrt().unsqueeze(-1) * grey
        return grey, -0.5 * apart.square() / torch.sigmoid(level).unsqueeze(-1)

    def observation(self, z: Tensor, level: Tensor) -> Any:
        """p(y | z_0), batch shape [*, D]; ``level`` = γ(0)."""
        if self.levels is None:
            alpha = torch.sigmoid(-level).sqrt()
            return dist.Normal(self.loc + self.scale * z / alpha, self.scale * (0.5 * level).exp())
        return dist.Categorical(logits=self._grid(z, level)[1])

    @torch.no_grad()
    def by_layer(self, y: Batch, draws: int = 16, bins: int = 20) -> Tensor:
        """The bound's terms, means over data and ``draws``, [bins + 2], nats: E ln p(y | z_0), minus the time
        integral in ``bins`` equal parts, minus the prior's KL. They sum to the bound."""
        y, labels = batches.call(self.split, batches.as_batch(y, "y"))
        x, found, ends = self.encode(y), [], []
        for part in range(bins):
            time = (part + torch.rand(draws, len(y), dtype=x.dtype, device=x.device)) / bins
            start, middle, end = self._parts(y, x, time, self.noise_law().sample(time.shape), labels)
            found.append(-float(middle.mean()) / bins)
            ends.append((float(start.mean()), float(end.mean())))
        start_mean, end_mean = (sum(e) / bins for e in zip(*ends, strict=True))
        return torch.tensor([start_mean, *found, -end_mean], dtype=torch.float64)

    @torch.no_grad()
    def probability_flow(self, y: Batch, steps: int = 50, draws: int = 1, probes: int | None = None) -> Bound:
        """Estimate of a lower bound on ln p(y) of *another model*, the probability flow, [B], in nats; it is
        no bound on this pair's evidence, and no reference of its gap.

        That model starts from z_1 ~ N(0, I), follows dz/dt = ½ γ'(t) σ (ε̂(z, t) - σ z) down to z_0, and has
        the same p(y | z_0). The value is the mean over ``draws`` of ln p(z_0) + ln p(y | z_0) - ln q(z_0 | y)
        with ln p(z_0) = ln N(z_1; 0, I) + ∫ div dt, by the classical Runge-Kutta method in ``steps`` equal
        steps. ``resolution`` is its difference to half as many, which says how wrong the integral is on
        either side. The divergence is exact, or with ``probes`` the mean of that many random projections
        (Hutchinson). Cost: 6 · steps passes of the network for each draw, with D (or ``probes``) backward
        passes each.

        Source: Song et al. (2021), section 4.3 and appendix D.
        """
        positive_count("draws", draws)
        if positive_count("steps", steps, "number of steps") % 2:
            raise ValueError(f"steps: expected an even number, got {steps}")
        batch, labels = batches.call(self.split, batches.as_batch(y, "y"))
        with evaluation_mode(self):
            x = self.encode(batch)
            zero = x.new_zeros(draws, len(x))
            level, _, _ = self.encoder(zero)
            inner = dist.Normal(torch.sigmoid(-level).sqrt() * x, torch.sigmoid(level).sqrt())
            z = inner.sample()
            if probes is None:
                signs = torch.eye(self.dims, dtype=z.dtype, device=z.device)[:, None, None]
            else:
                count = positive_count("probes", probes, "number of projections")
                signs = (torch.rand(count, *z.shape, device=z.device) < 0.5).to(z.dtype) * 2 - 1
                signs = signs / count**0.5
            rest = self.observation(z, level).log_prob(batch) - inner.log_prob(z)
            fine, coarse = (self._flow(z, n, labels, signs) for n in (steps, steps // 2))
        value = (fine + rest.sum(-1)).double()
        return Bound(
            "probability-flow",
            value.mean(0),
            value.std(0) / draws**0.5 if draws > 1 else torch.full_like(value[0], math.nan),
            "estimate",
            draws=draws,
            cost=6 * steps * draws * len(x),
            resolution=(fine - coarse).mean(0).abs().double(),
            notes=("of the probability flow, another model than this pair: no reference of its gap",),
        )

    def _flow(self, z: Tensor, steps: int, labels: Tensor | None, signs: Tensor) -> Tensor:
        """ln p(z_0) of the probability flow, [*]; ``signs`` [P, *, D] are the directions, whose products with
        the Jacobian add up to its divergence."""

        def slope(at: Tensor, time: float) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = at.detach().requires_grad_()
                when = torch.full(at.shape[:-1], time, dtype=at.dtype, device=at.device)
                level, rise, share = self.encoder(when)
                sigma = torch.sigmoid(level).sqrt()
                eps = self.predict(at, level, share, when, labels)
                found = 0.5 * rise * sigma * (eps - sigma * at)
                products = [
                    (torch.autograd.grad(found, at, sign.expand_as(found), retain_graph=True)[0] * sign).sum(
                        -1
                    )
                    for sign in signs
                ]
            return found.detach(), torch.stack(products).sum(0)

        total, size = z.new_zeros(z.shape[:-1]), 1 / steps
        for step in range(steps):
            t = step * size
            k1, d1 = slope(z, t)
            k2, d2 = slope(z + 0.5 * size * k1, t + 0.5 * size)
            k3, d3 = slope(z + 0.5 * size * k2, t + 0.5 * size)
            k4, d4 = slope(z + size * k3, t + size)
            z = z + size / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + size / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
        return total + dist.Normal(torch.zeros_like(z), 1.0).log_prob(z).sum(-1)

    @torch.no_grad()
    def simulate(self, n: int, *given: Tensor, like: Any = None) -> tuple[dict[str, Tensor], Batch]:
        """Draw n data by ``steps`` ancestral steps of equal length in t, of the labels [n] that are given if
        there are classes."""
        labels = self.labels_for(n, given, like)
        with evaluation_mode(self):
            z = torch.randn(n, self.dims, dtype=self.loc.dtype, device=self.loc.device)
            times = torch.linspace(1, 0, self.steps + 1, dtype=z.dtype, device=z.device)
            for upper, lower in itertools.pairwise(times):
                level, _, share = self.encoder(upper.expand(n))
                below, _, _ = self.encoder(lower.expand(n))
                eps = self.predict(z, level, share, upper.expand(n), labels)
                lost = -torch.expm1(below - level)
                ratio = (torch.sigmoid(-below) / torch.sigmoid(-level)).sqrt()
                mean = ratio * (z - lost * torch.sigmoid(level).sqrt() * eps)
                z = mean + (torch.sigmoid(below) * lost).sqrt() * torch.randn_like(z)
            y = self.observation(z, below).sample()
        return {}, self.joined(y.to(self.loc.dtype), labels)


def _mix(x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """z at noise level γ."""
    return torch.sigmoid(-level).sqrt() * x + torch.sigmoid(level).sqrt() * noise

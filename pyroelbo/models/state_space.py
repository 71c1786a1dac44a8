"""The linear-Gaussian state-space model: a chain of continuous latents, integrated by the Kalman filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.batch import Batch
from pyroelbo.models.precision import Floor, exact_dtype, regress
from pyroelbo.models.sequences import check_lengths, each_group, unpadded, within
from pyroelbo.nn import LinearNormal
from pyroelbo.numerics import positive_count
from pyroelbo.pair import PLATE, ExactPair, LatentPath

__all__ = ["StateSpace"]


class StateSpace(ExactPair):
    """z_1 ~ N(start, P), z_{t+1} = A z_t + N(0, Q), y_t = C z_t + offset + N(0, R). Batches ``y`` [B, T, D]
    or ``(y, lengths)``.

    P, Q and R are diagonal; for Q this is no restriction, as A and C are free. ``lengths [B]`` are the
    lengths of padded sequences (:func:`pyroelbo.data.sequences` pads). The latent site ``z`` is the whole
    path, [B, T, H].

    Parts: ``prior`` (start, log_start, move [H, H] (to, from), log_noise), ``generator`` (read [D, H],
    offset, log_scale), ``encoder``. Cost: O(B·T·(H + D)³).

    Args:
        dims: D.
        latent: H.
        guide: ``"exact"`` draws the path from the smoother; ``"mean_field"`` draws each step from q(z_t |
            y_t) = N(linear(y_t), diag), whose gap measures what the dynamics add to a single step.
        steps: length that :meth:`simulate` draws, unless called with ``like=``.
        floor: smallest standard deviation that the M-step accepts, relative to that of the data or latents.

    Source: Shumway and Stoffer (1982).
    """

    def __init__(
        self,
        dims: int,
        latent: int = 2,
        guide: str = "exact",
        steps: int | None = None,
        floor: float = 1e-4,
    ) -> None:
        super().__init__()
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide: expected 'exact' or 'mean_field', got {guide!r}")
        for name, value in (("dims", dims), ("latent", latent)):
            positive_count(name, value)
        self.dims, self.latent_dims, self.steps, self.floor = dims, latent, steps, Floor(floor)
        self.prior, self.generator = nn.Module(), nn.Module()
        starts = {
            "start": torch.zeros(latent),
            "log_start": torch.zeros(latent),
            "move": 0.8 * torch.eye(latent) + 0.1 * torch.randn(latent, latent),
            "log_noise": torch.zeros(latent),
        }
        for name, start in starts.items():
            self.prior.register_parameter(name, nn.Parameter(start))
        self.generator.register_parameter("read", nn.Parameter(torch.randn(dims, latent)))
        self.generator.register_parameter("offset", nn.Parameter(torch.zeros(dims)))
        self.generator.register_parameter("log_scale", nn.Parameter(torch.zeros(dims)))
        self.encoder: LinearNormal | None = None
        if guide == "mean_field":
            self.encoder = LinearNormal(dims, latent)

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        if y.dim() != 3 or y.shape[-1] != self.dims:
            raise ValueError(f"y: expected shape [B, T, {self.dims}], got {tuple(y.shape)}")
        check_lengths(lengths, y)
        return y

    def _chain(
        self, lengths: Tensor | None, blind: bool = False, dtype: torch.dtype | None = None
    ) -> ped.LinearGaussianChain:
        """p(y) with parameters of ``dtype``; if ``blind``, y does not depend on z, and its posterior is the
        prior."""
        kind: Any = dtype or self.generator.read.dtype
        one = (1,) if lengths is not None else ()

        def normal(loc: Tensor, log_scale: Tensor) -> dist.Independent:
            return dist.Normal(loc, log_scale.exp()).expand((*one, len(loc))).to_event(1)

        p = {k: v.to(kind) for k, v in self.prior.named_parameters()}
        g = {k: v.to(kind) for k, v in self.generator.named_parameters()}
        return ped.LinearGaussianChain(
            normal(p["start"], p["log_start"]),
            p["move"].expand(*one, -1, -1),
            normal(torch.zeros_like(p["start"]), p["log_noise"]),
            (torch.zeros_like(g["read"]) if blind else g["read"]).expand(*one, -1, -1),
            normal(g["offset"], g["log_scale"]),
            lengths=lengths,
        )

    def model(self, y: Tensor, lengths: Tensor | None = None) -> None:
        self._check(y, lengths)
        g = self.generator
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample(
                "z", self._chain(lengths, blind=True).posterior(torch.zeros_like(y, dtype=g.read.dtype))
            )
            emitted = dist.Normal(z @ g.read.T + g.offset, g.log_scale.exp())
            if lengths is not None:
                emitted = emitted.mask(within(y, lengths)[..., None])
            pyro.sample("y", emitted.to_event(2), obs=y)

    def guide(self, y: Tensor, lengths: Tensor | None = None) -> None:
        with pyro.plate(PLATE, len(y)):
            if self.encoder is None:
                pyro.sample("z", self.posterior(y, lengths))
                return
            local = self.encoder.distribution(y.to(self.encoder.weight.dtype))
            pyro.sample("z", local.mask(within(y, lengths)[..., None]).to_event(2))

    def unpadded(self, y: Tensor, lengths: Tensor | None = None) -> Sequence[Batch]:
        return unpadded(y, lengths)

    def log_evidence(self, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ln p(y), [B], in nats, by the Kalman filter; float64 without gradients."""
        y = self._check(y, lengths)
        dtype = exact_dtype(self.generator.read)

        def run(y: Tensor, lengths: Tensor | None, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return self._chain(lengths, dtype=dtype).log_prob(y.to(dtype)), {}

        return each_group(run, y, lengths)[0]

    def posterior(self, y: Tensor, lengths: Tensor | None = None) -> ped.GaussianChain:
        """p(z | y), a Gaussian over paths, in the parameters' dtype."""
        return self._chain(lengths).posterior(self._check(y, lengths).to(self.generator.read.dtype))

    def latent_path(self, y: Tensor, lengths: Tensor | None = None) -> LatentPath:
        p, g = self.prior, self.generator
        guide = self._smoother(y, lengths) if self.encoder is None else self._local(y)

        def prior(t: int, past: Tensor | None) -> dist.Independent:
            if past is None:
                return dist.Normal(p.start, p.log_start.exp()).to_event(1)
            return dist.Normal(past @ p.move.T, p.log_noise.exp()).to_event(1)

        def emission(t: int, z: Tensor) -> Tensor:
            return dist.Normal(z @ g.read.T + g.offset, g.log_scale.exp()).to_event(1).log_prob(y[:, t])

        return LatentPath(y.shape[1], prior, guide, emission, lengths)

    def _local(self, y: Tensor) -> Callable[[int, Tensor | None], Any]:
        assert self.encoder is not None
        loc, scale = self.encoder(y.to(self.encoder.weight.dtype)), self.encoder.log_scale.exp()
        return lambda t, past: dist.Normal(loc[:, t], scale).to_event(1)

    def _smoother(self, y: Tensor, lengths: Tensor | None) -> Callable[[int, Tensor | None], Any]:
        """q(z_t | z_{t-1}) of the exact posterior, from the means and covariances of neighbours."""
        q = self.posterior(y, lengths)
        inside = within(y, lengths)[..., None, None]
        mean = q.mean
        covariance = torch.where(inside, q.covariance, torch.eye(self.latent_dims).to(mean))
        gain = torch.linalg.solve(covariance[:, :-1], q.lagged).mT
        rest = covariance[:, 1:] - gain @ q.lagged
        root = torch.linalg.cholesky(torch.cat([covariance[:, :1], (rest + rest.mT) / 2], 1))

        def guide(t: int, past: Tensor | None) -> dist.MultivariateNormal:
            loc = mean[:, t]
            if past is not None:
                loc = loc + (gain[:, t - 1] @ (past - mean[:, t - 1]).unsqueeze(-1)).squeeze(-1)
            return dist.MultivariateNormal(loc, scale_tril=root[:, t])

        return guide

    @torch.no_grad()
    def e_step(
        self,
        y: Tensor,
        lengths: Tensor | None = None,
        hard: bool = False,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) of the most probable path) and the statistics of :meth:`m_step`,
        in float64. ``weights`` [B] count each sequence so many times in the statistics."""
        y = self._check(y, lengths)

        def run(y: Tensor, lengths: Tensor | None, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return self._expected(y, lengths, hard, None if weights is None else weights[rows])

        return each_group(run, y, lengths)

    def _expected(
        self, y: Tensor, lengths: Tensor | None, hard: bool, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y = y.double()
        q = self._chain(lengths, dtype=torch.float64).posterior(y)
        evidence = q.log_partition
        inside = within(y, lengths).double()
        if weights is not None:
            inside = inside * weights.to(inside)[:, None]
        z = q.mean
        square = z[..., :, None] * z[..., None, :]
        lagged = z[:, 1:, :, None] * z[:, :-1, None, :]
        if hard:
            evidence = evidence + q.log_prob(q.mean)
        else:
            square = square + q.covariance
            lagged = lagged + q.lagged.mT
        follows, first = inside[:, 1:, None, None], inside[:, :1]
        code = torch.cat([z, torch.ones_like(z[..., :1])], -1)
        counted = code * inside[..., None]
        whole = counted.flatten(0, 1).T @ code.flatten(0, 1)
        whole[:-1, :-1] = (square * inside[..., None, None]).sum((0, 1))
        return evidence, {
            "count": first.sum(),
            "first": (z[:, 0] * first).sum(0),
            "first_power": (square[:, 0].diagonal(0, -1, -2) * first).sum(0),
            "moves": follows.sum(),
            "from": (square[:, :-1] * follows).sum((0, 1)),
            "across": (lagged * follows).sum((0, 1)),
            "to_power": (square[:, 1:] * follows).sum((0, 1)).diagonal(),
            "square": whole,
            "cross": y.flatten(0, 1).T @ counted.flatten(0, 1),
            "power": (y.square() * inside[..., None]).sum((0, 1)),
        }

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Tensor]) -> None:
        """Regress next states on states and data on states; the residuals are the noises."""
        s, p, g = statistics, self.prior, self.generator
        steps = s["square"][-1, -1]
        size = s["square"].diagonal()[:-1] / steps  # mean squares of the states
        start = s["first"] / s["count"]
        p.start.copy_(start)
        rest = s["first_power"] / s["count"] - start.square()
        p.log_start.copy_(self.floor.log_scale("initial", rest, size))
        if s["moves"] > 0:
            move = regress(s["from"], s["across"])
            p.move.copy_(move)
            rest = s["to_power"] - (move * s["across"]).sum(-1)
            p.log_noise.copy_(self.floor.log_scale("transition", rest / s["moves"], size))
        read = regress(s["square"], s["cross"])
        g.read.copy_(read[:, :-1])
        g.offset.copy_(read[:, -1])
        rest = (s["power"] - (read * s["cross"]).sum(-1)) / steps
        unit = s["power"] / steps - (s["cross"][:, -1] / steps).square()
        g.log_scale.copy_(self.floor.log_scale("observation", rest, unit))

    @torch.no_grad()
    def initialize(self, y: Tensor, lengths: Tensor | None = None) -> None:
        """Initialize from data: states are slow, randomly rotated principal components of the standardized
        data, in the data's units, and their residuals the noise."""
        seen = self._check(y, lengths)[within(y, lengths)].double()
        p, g, size = self.prior, self.generator, self.latent_dims
        spread = seen.std(0, correction=0)
        some = spread[spread > 0]
        spread = torch.where(spread > 0, spread, some.mean() if len(some) else 1.0)
        scaled = (seen - seen.mean(0)) / spread
        values, vectors = torch.linalg.eigh(scaled.T @ scaled / len(scaled))
        read = torch.zeros(self.dims, size).to(values)
        known = min(size, self.dims)
        read[:, :known] = vectors[:, -known:] * values[-known:].clamp_min(0).sqrt()
        turn = torch.linalg.qr(torch.randn(size, size).to(read)).Q
        rest = (1 - read.square().sum(-1)).clamp_min(0.1)
        p.start.zero_()
        p.log_start.zero_()
        p.log_noise.fill_(-0.5)
        p.move.copy_(0.8 * torch.eye(size).to(read) + 0.1 * torch.randn_like(p.move))
        g.read.copy_(spread[:, None] * (read @ turn))
        g.offset.copy_(seen.mean(0))
        g.log_scale.copy_((spread * rest.sqrt()).log())
        self.floor.reset()

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        if self.steps is None:
            raise ValueError(
                "steps: expected the length to simulate, got None; set steps=, or call simulate(n, "
                "like=batch)"
            )
        return self.generator.read.new_zeros(n, self.steps, self.dims)

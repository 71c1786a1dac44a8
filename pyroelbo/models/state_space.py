"""The linear-Gaussian state-space model: a chain of continuous latents, summed by the Kalman filter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.models.sequences import check_dtype, check_lengths, within
from pyroelbo.nn import LinearNormal
from pyroelbo.pair import PLATE, ExactPair, LatentPath

__all__ = ["StateSpace"]


class StateSpace(ExactPair):
    """z_1 ~ N(start, P), z_{t+1} = A z_t + N(0, Q), y_t = C z_t + offset + N(0, R). Batches ``y`` [B, T, D] or
    ``(y, lengths)``.

    P, Q and R are diagonal; with A and C free this loses nothing for Q, which a change of basis makes
    diagonal. ``lengths [B]`` shortens sequences. The latent site ``z`` is the whole path, [B, T, H].
    ``guide="exact"`` draws it from the smoother; ``"mean_field"`` takes every step and coordinate on its own,
    q(z_t | y_t) = N(linear(y_t), diag): its gap is what the path's own dynamics tell. Every scale is held at
    ``floor`` or above by the M-step, with a warning. ``steps`` is the length that :meth:`simulate` draws.

    Parts: ``prior`` (start, log_start, move [H, H] (to, from), log_noise), ``generator`` (read [D, H],
    offset, log_scale), ``encoder``. Cost: O(B·T·(H + D)³). Source: Shumway and Stoffer (1982).
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
            raise ValueError(f"guide takes 'exact' or 'mean_field', got {guide!r}")
        if not floor > 0:
            raise ValueError(f"floor takes a positive scale, got {floor}")
        for name, value in (("dims", dims), ("latent", latent)):
            if value < 1:
                raise ValueError(f"{name} takes a positive number, got {value}")
        self.dims, self.latent_dims, self.steps, self.floor = dims, latent, steps, floor
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
            raise ValueError(f"y has shape {tuple(y.shape)}: this model takes [B, T, {self.dims}]")
        check_lengths(lengths, y)
        check_dtype(y, self.generator.offset)
        return y

    def _chain(self, lengths: Tensor | None, blind: bool = False) -> ped.LinearGaussianChain:
        """p(y); ``blind`` to the states, and then the posterior over paths is the prior."""
        p, g = self.prior, self.generator
        one = (1,) if lengths is not None else ()

        def normal(loc: Tensor, log_scale: Tensor) -> dist.Independent:
            return dist.Normal(loc, log_scale.exp()).expand((*one, len(loc))).to_event(1)

        return ped.LinearGaussianChain(
            normal(p.start, p.log_start),
            p.move.expand(*one, -1, -1),
            normal(torch.zeros_like(p.start), p.log_noise),
            (torch.zeros_like(g.read) if blind else g.read).expand(*one, -1, -1),
            normal(g.offset, g.log_scale),
            lengths=lengths,
        )

    def model(self, y: Tensor, lengths: Tensor | None = None) -> None:
        self._check(y, lengths)
        g = self.generator
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", self._chain(lengths, blind=True).posterior(torch.zeros_like(y)))
            emitted = dist.Normal(z @ g.read.T + g.offset, g.log_scale.exp())
            if lengths is not None:
                emitted = emitted.mask(within(y, lengths)[..., None])
            pyro.sample("y", emitted.to_event(2), obs=y)

    def guide(self, y: Tensor, lengths: Tensor | None = None) -> None:
        with pyro.plate(PLATE, len(y)):
            if self.encoder is None:
                pyro.sample("z", self.posterior(y, lengths))
                return
            local = self.encoder.distribution(y)
            pyro.sample("z", local.mask(within(y, lengths)[..., None]).to_event(2))

    def log_evidence(self, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ln p(y), [B], in nats, by the Kalman filter."""
        return self._chain(lengths).log_prob(self._check(y, lengths))

    def posterior(self, y: Tensor, lengths: Tensor | None = None) -> ped.GaussianChain:
        """p(z | y), a Gaussian over paths."""
        return self._chain(lengths).posterior(self._check(y, lengths))

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
        loc, scale = self.encoder(y), self.encoder.log_scale.exp()
        return lambda t, past: dist.Normal(loc[:, t], scale).to_event(1)

    def _smoother(self, y: Tensor, lengths: Tensor | None) -> Callable[[int, Tensor | None], Any]:
        """q(z_t | z_{t-1}) of the exact posterior, from the means and covariances of neighbours."""
        q = self.posterior(y, lengths)
        inside = within(y, lengths)[..., None, None]
        mean, covariance = q.mean, torch.where(inside, q.covariance, torch.eye(self.latent_dims).to(y))
        gain = torch.linalg.solve(covariance[:, :-1], q.lagged).mT
        rest = covariance[:, 1:] - gain @ q.lagged
        root = torch.linalg.cholesky(torch.cat([covariance[:, :1], (rest + rest.mT) / 2], 1))

        def guide(t: int, past: Tensor | None) -> dist.MultivariateNormal:
            loc = mean[:, t]
            if past is not None:
                loc = loc + (gain[:, t - 1] @ (past - mean[:, t - 1]).unsqueeze(-1)).squeeze(-1)
            return dist.MultivariateNormal(loc, scale_tril=root[:, t])

        return guide

    def e_step(
        self, y: Tensor, lengths: Tensor | None = None, hard: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) of the most probable path) and the statistics of :meth:`m_step`."""
        q = self.posterior(y, lengths)
        evidence = q.log_partition
        inside = within(y, lengths).double()
        z = q.mean.double()
        square = z[..., :, None] * z[..., None, :]
        lagged = z[:, 1:, :, None] * z[:, :-1, None, :]
        if hard:
            evidence = evidence + q.log_prob(q.mean)
        else:
            square = square + q.covariance.double()
            lagged = lagged + q.lagged.mT.double()
        follows = inside[:, 1:, None, None]
        code = torch.cat([z, torch.ones_like(z[..., :1])], -1) * inside[..., None]
        y = y.double() * inside[..., None]
        whole = code.flatten(0, 1).T @ code.flatten(0, 1)
        whole[:-1, :-1] = (square * inside[..., None, None]).sum((0, 1))
        return evidence, {
            "count": inside[:, :1].sum(),
            "first": z[:, 0].sum(0),
            "first_power": square[:, 0].diagonal(0, -1, -2).sum(0),
            "moves": follows.sum(),
            "from": (square[:, :-1] * follows).sum((0, 1)),
            "across": (lagged * follows).sum((0, 1)),
            "to_power": (square[:, 1:] * follows).sum((0, 1)).diagonal(),
            "square": whole,
            "cross": y.flatten(0, 1).T @ code.flatten(0, 1),
            "power": y.square().sum((0, 1)),
        }

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Tensor]) -> None:
        """Regress next states on states and data on states; the residuals are the noises."""
        s, p, g = statistics, self.prior, self.generator
        start = s["first"] / s["count"]
        p.start.copy_(start)
        p.log_start.copy_(self._log_scale("start", s["first_power"] / s["count"] - start.square()))
        if s["moves"] > 0:
            move = torch.linalg.solve(s["from"], s["across"].T).T
            p.move.copy_(move)
            rest = s["to_power"] - (move * s["across"]).sum(-1)
            p.log_noise.copy_(self._log_scale("transition", rest / s["moves"]))
        read = torch.linalg.solve(s["square"], s["cross"].T).T
        g.read.copy_(read[:, :-1])
        g.offset.copy_(read[:, -1])
        rest = (s["power"] - (read * s["cross"]).sum(-1)) / s["square"][-1, -1]
        g.log_scale.copy_(self._log_scale("observation", rest))

    def _log_scale(self, name: str, variance: Tensor) -> Tensor:
        if bool((variance < self.floor**2).any()):
            warnings.warn(
                f"a variance of the {name} noise ran to {float(variance.min()):.1e} and is held at floor² = {self.floor**2:.1e}"
            )
        return 0.5 * variance.clamp_min(self.floor**2).log()

    @torch.no_grad()
    def initialize(self, y: Tensor, lengths: Tensor | None = None) -> None:
        """A random start: slow states, a random look at them, the data's mean and spread."""
        seen = self._check(y, lengths)[within(y, lengths)]
        p, g = self.prior, self.generator
        p.start.zero_()
        p.log_start.zero_()
        p.log_noise.fill_(-0.5)
        p.move.copy_(0.8 * torch.eye(self.latent_dims) + 0.1 * torch.randn_like(p.move))
        spread = seen.std(0, correction=int(len(seen) > 1)).clamp_min(10 * self.floor)
        g.read.copy_(torch.randn_like(g.read) * spread[:, None] / self.latent_dims**0.5)
        g.offset.copy_(seen.mean(0))
        g.log_scale.copy_(spread.log())

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        if self.steps is None:
            raise ValueError("steps is None: simulating takes the length, or simulate(n, like=batch)")
        return self.generator.read.new_zeros(n, self.steps, self.dims)

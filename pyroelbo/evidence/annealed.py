"""Annealed importance sampling: lower bounds on the evidence, and upper ones where an exact posterior draw is
to be had."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo import data as batches
from pyroelbo.evidence.bounds import count_of, weighted
from pyroelbo.evidence.unconstrained import Unconstrained
from pyroelbo.joint import scoped
from pyroelbo.numerics import log_mean_exp
from pyroelbo.pair import ExactPair, Pair, evaluation_mode
from pyroelbo.records import Bound, Sandwich
from pyroelbo.terms import Evaluator, Unavailable

__all__ = ["ais", "bdmc"]

_TARGET = 0.8  # acceptance that the pilot's step sizes aim at
_PILOT = 8  # particles of the pilot
_PILOT_MOVES = 60  # the pilot's fewest transitions: with few temperatures it makes several at each


@scoped
def ais(
    pair: Pair,
    y: Any,
    temperatures: int = 1000,
    particles: int = 16,
    *,
    start: str = "guide",
    leapfrog: int = 5,
    reverse: bool = False,
    progress: bool = True,
) -> Bound:
    """Annealed importance sampling: a lower bound on ln p(y) of each datum (an upper one with ``reverse``),
    in nats, [B].

    Particles go from f_0, the guide q(z | y) or the prior, to f_1 = p(y, z) along f_β = f_0^(1-β) f_1^β, over
    ``temperatures`` values of β that are dense at both ends (a sigmoid's), with one Hamiltonian transition of
    ``leapfrog`` steps at each value in between, on the unconstrained latents, all particles and data
    together. The weight w = Π_t f_{β_t}(z_{t-1}) / f_{β_{t-1}}(z_{t-1}) has mean p(y), so that
    E ln (1/K) Σ_k w_k ≤ ln p(y). Step sizes, one per temperature and datum, are adapted in a pilot run of its
    own and then held fixed: adapted under way, the weights would be biased. The standard error is the delta
    method's over the particles; ``ess`` and ``k_hat`` are those of the weights.

    ``reverse`` runs the same chains backwards from exact posterior draws of an :class:`ExactPair`: their
    weights have mean 1/p(y), and -ln of their mean is an upper bound, on any data.

    Raises :class:`Unavailable`, naming the site, for discrete latents, for auxiliary sites of the guide, for
    densities without a gradient, and for ``reverse`` without an exact posterior; ValueError as
    :class:`~pyroelbo.terms.Evaluator` says and for scales within the datum. Cost: a gradient counts as three
    evaluations, so about 3 · temperatures · leapfrog · (particles + 8) a datum, the pilot included.

    Source: Neal (2001), equations 3 to 11; Grosse, Ghahramani and Adams (2015) for the reverse chains; Wu,
    Burda, Salakhutdinov and Grosse (2017) for the schedule.
    """
    count_of(particles)
    if reverse and not isinstance(pair, ExactPair):
        raise Unavailable(
            f"{type(pair).__name__} has no exact posterior to start from: reverse=True takes an ExactPair, and "
            "bdmc any pair that simulates"
        )
    annealer = _Annealer(pair, y, temperatures, leapfrog, start)
    bar = annealer.bar(particles, f"AIS, {'upper' if reverse else 'lower'} bound", progress)
    with bar:
        annealer.adapt(bar)
        if reverse:
            log_w = annealer.reverse(_posterior_draws(pair, annealer.evaluator, particles), bar)
        else:
            log_w = annealer.forward(particles, bar)
    return annealer.bound(log_w, reverse)


def bdmc(
    pair: Pair,
    num_data: int = 100,
    temperatures: int = 1000,
    particles: int = 16,
    *,
    start: str = "guide",
    leapfrog: int = 5,
    given: tuple[Tensor, ...] = (),
    like: Any = None,
    progress: bool = True,
) -> Sandwich:
    """Bidirectional Monte Carlo: lower and upper bounds on ln p(y) of ``num_data`` data simulated from the
    model, in nats.

    ``pair.simulate`` draws (z, y); z is then one exact draw of p(z | y). Forward AIS gives the lower bound;
    AIS run backwards from that z, by ``particles`` chains, the upper one: -ln (1/K) Σ_k 1/w_k, whose
    expectation over z and the chains is at least ln p(y). It holds for simulated data only. Chains that share
    a z are dependent, so the upper bound has no standard error of its own (NaN): errors are taken across the
    data, as ``Sandwich.mean_gap_error`` does. ``given`` and ``like`` are those of
    :meth:`~pyroelbo.Pair.simulate`.

    Raises and costs what :func:`ais` does, with twice the particles.

    Source: Grosse, Ghahramani and Adams (2015), algorithm 2.
    """
    count_of(particles)
    latents, batch = pair.simulate(num_data, *given, like=like)
    annealer = _Annealer(pair, batch, temperatures, leapfrog, start)
    size = annealer.evaluator.size
    draws = {
        name: latents[name]
        .reshape(1, *site.plate_shape, size, *site.event_shape)
        .expand(particles, *site.plate_shape, size, *site.event_shape)
        for name, site in annealer.evaluator.latents.items()
    }
    with annealer.bar(2 * particles, "BDMC", progress) as bar:
        annealer.adapt(bar)
        lower = annealer.bound(annealer.forward(particles, bar), reverse=False)
        before = annealer.cost
        log_w = annealer.reverse(draws, bar)
    value, _ = log_mean_exp(log_w)
    upper = Bound(
        f"reverse {annealer.method}",
        -value,
        torch.full_like(value, math.nan),
        "upper",
        draws=particles,
        cost=annealer.cost - before,
        notes=("valid on data simulated by the model only; its chains share one posterior draw a datum",),
    )
    return Sandwich(pair.name, lower, upper)


def _posterior_draws(pair: ExactPair, evaluator: Evaluator, particles: int) -> dict[str, Tensor]:
    if set(evaluator.latents) != {pair.latent}:
        raise Unavailable(
            f"the exact posterior is that of {pair.latent!r}, the latents {sorted(evaluator.latents)}"
        )
    site = evaluator.latents[pair.latent]
    with torch.no_grad(), evaluation_mode(pair):
        value = batches.call(pair.posterior, evaluator.batch).sample(torch.Size((particles,)))
    return {pair.latent: value.reshape(particles, *site.plate_shape, evaluator.size, *site.event_shape)}


@dataclass(frozen=True)
class _Points:
    """Particles u [K, b, D] with the two log densities [K, b] there and their gradients."""

    u: Tensor
    base: Tensor
    joint: Tensor
    base_slope: Tensor
    joint_slope: Tensor

    def density(self, beta: float) -> Tensor:
        return _no_nan((1 - beta) * self.base + beta * self.joint)

    def slope(self, beta: float) -> Tensor:
        return (1 - beta) * self.base_slope + beta * self.joint_slope

    def where(self, accept: Tensor, other: _Points) -> _Points:
        """This where ``accept``, else the other."""
        wide = accept.unsqueeze(-1)
        return _Points(
            torch.where(wide, self.u, other.u),
            torch.where(accept, self.base, other.base),
            torch.where(accept, self.joint, other.joint),
            torch.where(wide, self.base_slope, other.base_slope),
            torch.where(wide, self.joint_slope, other.joint_slope),
        )


class _Annealer:
    """The path of one batch: its densities, its fixed schedule, and the step sizes that a pilot run set."""

    def __init__(self, pair: Pair, y: Any, temperatures: int, leapfrog: int, start: str) -> None:
        if start not in ("guide", "prior"):
            raise ValueError(f"start takes 'guide' or 'prior', got {start!r}")
        if isinstance(temperatures, bool) or not isinstance(temperatures, int) or temperatures < 1:
            raise ValueError(f"temperatures takes a positive number of steps, got {temperatures!r}")
        if isinstance(leapfrog, bool) or not isinstance(leapfrog, int) or leapfrog < 1:
            raise ValueError(f"leapfrog takes a positive number of steps, got {leapfrog!r}")
        self.start, self.leapfrog = start, leapfrog
        self.evaluator = Evaluator(pair, y, with_guide=start == "guide")
        self.evaluator.refuse_scales("AIS")
        if self.evaluator.auxiliary:
            name = min(self.evaluator.auxiliary)
            raise Unavailable(
                f"guide site {name!r} is auxiliary: q(z | y) has no density then; take start='prior'"
            )
        self.space = Unconstrained(self.evaluator)
        self.betas = _schedule(temperatures)
        self.method = f"ais-{temperatures}"
        self.cost = 0
        self.moved = 0.0
        self.moves = 0
        self.scale = self.steps = torch.empty(0)
        self.pilot_moves = math.ceil(_PILOT_MOVES / max(1, temperatures - 1))

    def bar(self, particles: int, what: str, progress: bool) -> tqdm:
        """A bar over transitions of one particle of one datum."""
        each = (len(self.betas) - 2) * (particles + _PILOT * self.pilot_moves)
        work = self.evaluator.size * (each + 10 * _PILOT * (len(self.betas) > 2))
        return tqdm(total=work, desc=what, unit="move", unit_scale=True, disable=None if progress else True)

    # ------------------------------------------------------------------------------------------ runs

    def adapt(self, bar: tqdm) -> None:
        """The pilot: scales of the latents from the start's draws, then step sizes along the path."""
        scales, tables = [], []
        for rows in {rows.start: rows for rows, _ in self.evaluator.chunks(64)}.values():
            where = self._rows(rows)
            points = self._draw(_PILOT, where)
            spread = self._draw_latents(64, where).std(0)
            scale = torch.where(spread.isfinite() & (spread > 0), spread, torch.ones_like(spread))
            log_step = scale.new_full((len(scale),), math.log(0.7 * self.space.dims**-0.25))
            table = []
            for i, beta in enumerate(self.betas[1:-1]):
                for _ in range(self.pilot_moves + (10 if i == 0 else 0)):
                    points, rate = self._move(points, beta, log_step.exp(), scale, where)
                    log_step = log_step + 0.2 * (rate.nanmean(0).nan_to_num(nan=_TARGET) - _TARGET)
                    bar.update(rate.numel())
                table.append(log_step.exp())
            scales.append(scale)
            tables.append(torch.stack(table) if table else scale.new_empty(0, len(scale)))
        self.scale, self.steps = torch.cat(scales), torch.cat(tables, 1)

    def forward(self, particles: int, bar: tqdm) -> Tensor:
        """ln w of particles that start from f_0, [K, B]."""
        blocks: dict[int, list[Tensor]] = {}
        for rows, count in self.evaluator.chunks(particles):
            points = self._draw(count, self._rows(rows))
            log_w = self._anneal(points, self.betas, self.steps, rows, bar)
            blocks.setdefault(rows.start, []).append(log_w)
        return torch.cat([torch.cat(block) for block in blocks.values()], 1)

    def reverse(self, latents: dict[str, Tensor], bar: tqdm) -> Tensor:
        """ln 1/w of chains that end in the given posterior draws {site: [K, *plates, B, *event]}, run
        backwards, [K, B]."""
        u = self.space.unconstrain(latents)
        blocks: dict[int, list[Tensor]] = {}
        for rows, count in self.evaluator.chunks(len(u)):
            done = sum(len(b) for b in blocks.get(rows.start, []))
            points = self._points(u[done : done + count, rows], self._rows(rows))
            log_w = self._anneal(points, self.betas[::-1], self.steps.flip(0), rows, bar)
            blocks.setdefault(rows.start, []).append(log_w)
        return torch.cat([torch.cat(block) for block in blocks.values()], 1)

    def bound(self, log_w: Tensor, reverse: bool) -> Bound:
        """The bound of ln w [K, B] of forward chains, or of ln 1/w of reverse ones."""
        notes = []
        rate = self.moved / max(self.moves, 1)
        if self.moves and rate < 0.3:
            notes.append(f"only {rate:.0%} of the transitions were accepted: the bound may be loose")
        empty = int((log_w == -math.inf).all(0).sum())
        if empty:
            notes.append(f"all weights are zero for {empty} of {self.evaluator.size} data")
        method = f"reverse {self.method}" if reverse else self.method
        return weighted(method, log_w, "upper" if reverse else "lower", self.cost, tuple(notes))

    # ------------------------------------------------------------------------------------------ inside

    def _anneal(self, points: _Points, betas: list[float], steps: Tensor, rows: slice, bar: tqdm) -> Tensor:
        """Σ_t (β_t - β_{t-1}) ln f_1/f_0 at the particles along ``betas``, with a transition at each inner
        one, [K, b]."""
        scale, where = self.scale[rows], self._rows(rows)
        log_w = torch.zeros_like(points.base, dtype=torch.float64)
        for t in range(1, len(betas)):
            increment = (betas[t] - betas[t - 1]) * (points.joint - points.base).double()
            # A particle outside the support of either density has weight zero for good.
            log_w = _no_nan(log_w + increment)
            if t < len(betas) - 1:
                points, rate = self._move(points, betas[t], steps[t - 1, rows], scale, where)
                self.moved += float(rate.nansum())
                self.moves += int((~rate.isnan()).sum())
                bar.update(rate.numel())
        return log_w

    def _move(
        self, points: _Points, beta: float, step: Tensor, scale: Tensor, rows: slice | None
    ) -> tuple[_Points, Tensor]:
        """One Hamiltonian transition that leaves f_β invariant, and its acceptance probability [K, b], NaN
        for particles of density zero.

        Momenta are in units of ``scale`` [b, D], steps [b] jittered by a fifth against resonance.
        """
        jitter = 0.8 + 0.4 * torch.rand_like(points.base)
        pace = (step * jitter).unsqueeze(-1) * scale
        momentum = torch.randn_like(points.u)
        energy = _half_square(momentum) - points.density(beta)
        end = points
        momentum = momentum + 0.5 * pace * end.slope(beta)
        for i in range(self.leapfrog):
            end = self._points(end.u + pace * momentum, rows)
            momentum = momentum + (0.5 if i == self.leapfrog - 1 else 1.0) * pace * end.slope(beta)
        log_ratio = _log_acceptance(energy, _half_square(momentum) - end.density(beta))
        accept = torch.rand_like(log_ratio).log() < log_ratio
        rate = log_ratio.clamp_max(0.0).exp()
        return end.where(accept, points), torch.where(energy.isinf(), torch.full_like(rate, math.nan), rate)

    def _points(self, u: Tensor, rows: slice | None) -> _Points:
        self.cost += 3 * u.shape[0] * u.shape[1]
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            latents, log_det = self.space.constrain(u)
            terms = self.evaluator.terms(latents, rows)
            if self.start == "guide":
                base = terms.log_proposal
            else:
                prior = [v for k, v in terms.log_model.items() if k not in terms.observed]
                base = torch.stack(prior).sum(0)
            base, joint = base + log_det, terms.log_joint + log_det
            slopes = []
            for name, density in ((self.start, base), ("model", joint)):
                if not density.requires_grad:
                    raise Unavailable(
                        f"the density of the {name} has no gradient in its latents {list(latents)}"
                    )
                slopes.append(torch.autograd.grad(density.sum(), u, retain_graph=name != "model")[0])
        return _Points(u.detach(), _no_nan(base.detach()), _no_nan(joint.detach()), *slopes)

    @torch.no_grad()
    def _draw_latents(self, particles: int, rows: slice | None) -> Tensor:
        latents = self.evaluator.draw(particles, rows).latents
        u = self.space.unconstrain(latents)
        self.cost += u.shape[0] * u.shape[1]
        # A guide that reaches beyond the model's support: NaN has density zero everywhere below.
        return torch.where(self.space.inside(latents).unsqueeze(-1), u, torch.full_like(u, math.nan))

    def _draw(self, particles: int, rows: slice | None) -> _Points:
        return self._points(self._draw_latents(particles, rows), rows)

    def _rows(self, rows: slice) -> slice | None:
        return rows if self.evaluator.sliceable else None


def _schedule(temperatures: int) -> list[float]:
    """0 = β_0 < … < β_T = 1, a sigmoid's values at equal distances, stretched to both ends."""
    ticks = torch.linspace(-4.0, 4.0, temperatures + 1, dtype=torch.float64).sigmoid()
    return ((ticks - ticks[0]) / (ticks[-1] - ticks[0])).tolist()


def _log_acceptance(before: Tensor, after: Tensor) -> Tensor:
    """ln of the Metropolis ratio of energies before and after, -inf where the trajectory diverged."""
    return _no_nan(before - after)


def _half_square(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)


def _no_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.full_like(x, -math.inf), x)

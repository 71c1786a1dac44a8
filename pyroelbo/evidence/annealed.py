"""Annealed importance sampling: lower bounds on the evidence, and upper bounds when exact posterior samples
are available."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo.evaluation.auxiliary import GuideSpace
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.bounds import count_of, posterior_draws, weighted
from pyroelbo.evidence.lattice import Lattice
from pyroelbo.evidence.potential import Potential
from pyroelbo.evidence.unconstrained import Unconstrained
from pyroelbo.numerics import log_mean_exp, positive_count
from pyroelbo.pair import ExactPair, Pair
from pyroelbo.results import Bound, Sandwich

__all__ = ["ais", "bdmc"]

_TARGET = 0.8  # acceptance that the pilot's step sizes aim at
_NO_INVERSE = "and its value for given latents is not known", "use start='prior'"
_PILOT = 8  # particles of the pilot
_PILOT_MOVES = 60  # fewest transitions of the pilot: with few temperatures it makes several at each


def ais(
    pair: Pair,
    y: Any,
    temperatures: int = 1000,
    particles: int = 16,
    *,
    start: str = "guide",
    leapfrog: int = 5,
    reverse: bool | str = False,
    scope: str = "datum",
    progress: bool = True,
) -> Bound:
    """Annealed importance sampling: a lower bound on ln p(y) of each datum (an upper one with ``reverse``),
    in nats, [B].

    Particles move from f_0, the guide q(z | y) or the prior, to f_1 = p(y, z) along f_β = f_0^(1-β) f_1^β,
    with values of β that are dense at both ends (those of a sigmoid), all particles and data together. At
    each value in between, continuous latents make one Hamiltonian transition on the unconstrained latents;
    discrete ones make 3 · ``leapfrog`` Metropolis proposals of one coordinate each (a one-hot vector is one;
    with two values they leave it at least as often as Gibbs sampling does), and one of all latents drawn anew
    from f_0 (the only one for structures whose labels constrain one another, such as parses); mixed ones make
    both. The weight w = Π_t f_{β_t}(z_{t-1}) / f_{β_{t-1}}(z_{t-1}) has mean p(y), so that E
    ln (1/K) Σ_k w_k ≤ ln p(y). Step sizes, one per temperature and datum, are adapted in a separate pilot run
    and then fixed: adaptation during the run would bias the weights. The standard error is the jackknife's
    over the particles; ``ess`` and ``k_hat`` are those of the weights.

    ``reverse=True`` runs the same chains backwards from exact posterior draws of an :class:`ExactPair`: their
    weights have mean c/p(y), where c ≤ 1 is the probability that a draw from f_0 has p(y, z) > 0, and -ln of
    their mean is an upper bound, for any data. If f_0 draws latents that are impossible given the datum (a
    grammar's prior, trees of other lengths), it stays -ln c above ln p(y) at any number of temperatures,
    which a note states. ``reverse="chains"`` works for any pair and starts from the particles of a forward
    run, resampled by their weights and moved by as many transitions at β = 1: an ``estimate``, above ln p(y)
    only as far as the chains have reached the posterior.

    Args:
        pair: the pair.
        y: the batch.
        temperatures: number of steps of β, at least 1.
        particles: chains per datum.
        start: ``"guide"`` or ``"prior"``, f_0.
        leapfrog: leapfrog steps of a Hamiltonian transition.
        reverse: False, True or ``"chains"``.
        scope: ``"datum"``, or ``"joint"`` for the whole batch as one datum.
        progress: whether to show a progress bar.

    Raises :class:`Unavailable`, naming the site, for auxiliary sites of the guide, for continuous latents
    that a density depends on without a gradient (rounding, ``detach``), and for ``reverse=True`` without an
    exact posterior; ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator` does and for scales
    within the datum. Cost: a gradient counts as three evaluations, so about 3 · temperatures · leapfrog ·
    (particles + 8) per datum, the pilot included; as many again for discrete latents next to continuous ones;
    three times as many for chains.

    Source: Neal (2001), equations 3 to 11; Grosse, Ghahramani and Adams (2015) for the reverse chains; Wu,
    Burda, Salakhutdinov and Grosse (2017) for the schedule; Peskun (1973) and Liu (1996) for moves to other
    values only.
    """
    count_of(particles)
    if reverse not in (False, True, "chains"):
        raise ValueError(f"reverse: expected False, True or 'chains', got {reverse!r}")
    if reverse is True and (scope == "joint" or not isinstance(pair, ExactPair)):
        raise Unavailable(
            f"{type(pair).__name__} has no exact posterior to start from in {scope} scope: reverse=True "
            "expects an ExactPair, reverse='chains' any pair (an estimate), and bdmc any pair that simulates"
        )
    evaluator = GuideSpace(pair, y, with_guide=_with_guide(start), scope=scope)
    if reverse is True:
        evaluator.refuse_auxiliary(*_NO_INVERSE)
    annealer = _Annealer(evaluator, temperatures, leapfrog, start)
    if reverse == "chains" and temperatures < 2:
        raise ValueError(f"temperatures: expected at least 2 for reverse='chains', got {temperatures}")
    with annealer.bar((1 + 2 * (reverse == "chains")) * particles, progress) as bar:
        annealer.adapt(bar)
        if reverse == "chains":
            log_w, kind = annealer.reverse(*annealer.posterior_chains(particles, bar), bar), "estimate"
        elif reverse:
            exact = posterior_draws(pair, evaluator, particles)
            log_w, kind = annealer.reverse(*annealer.coordinates(exact), bar), "upper"
        else:
            log_w, kind = annealer.forward(particles, bar), "lower"
    return evaluator.finish(annealer.bound(log_w, kind))


def _with_guide(start: str) -> bool:
    if start not in ("guide", "prior"):
        raise ValueError(f"start: expected 'guide' or 'prior', got {start!r}")
    return start == "guide"


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
    """Bidirectional Monte Carlo: lower and upper bounds on ln p(y) of data simulated from the model, in nats.

    ``pair.simulate`` draws (z, y); z is then one exact draw of p(z | y). Forward AIS gives the lower bound;
    AIS run backwards from that z, by ``particles`` chains, the upper one: -ln (1/K) Σ_k 1/w_k, whose
    expectation over z and the chains is at least ln p(y). It holds for simulated data only. Chains that share
    a z are dependent, so the upper bound has no standard error (NaN): errors are computed across the data, as
    in ``Sandwich.mean_gap_error``.

    Args:
        pair: the pair.
        num_data: number of simulated data.
        temperatures: number of steps of β, at least 1.
        particles: chains per datum and direction.
        start: ``"guide"`` or ``"prior"``, f_0.
        leapfrog: leapfrog steps of a Hamiltonian transition.
        given: leading parts of a conditional batch, as for :meth:`~pyroelbo.Pair.simulate`.
        like: a batch whose shapes are used, as for :meth:`~pyroelbo.Pair.simulate`.
        progress: whether to show a progress bar.

    Raises as :func:`ais` does, at the cost of twice the particles.

    Source: Grosse, Ghahramani and Adams (2015), algorithm 2.
    """
    count_of(particles)
    latents, batch = pair.simulate(num_data, *given, like=like)
    evaluator = GuideSpace(pair, batch, with_guide=_with_guide(start))
    evaluator.refuse_auxiliary(*_NO_INVERSE)
    annealer = _Annealer(evaluator, temperatures, leapfrog, start)
    size = evaluator.size
    simulated = {
        name: latents[name]
        .reshape(1, *site.plate_shape, size, *site.event_shape)
        .expand(particles, *site.plate_shape, size, *site.event_shape)
        for name, site in evaluator.latents.items()
    }
    with annealer.bar(2 * particles, progress) as bar:
        annealer.adapt(bar)
        lower = evaluator.finish(annealer.bound(annealer.forward(particles, bar), "lower"))
        before = annealer.cost
        log_w = annealer.reverse(*annealer.coordinates(simulated), bar)
    value, _ = log_mean_exp(log_w)
    notes = ["valid only for data simulated by the model; its chains share one posterior draw per datum"]
    beyond = int((value == -math.inf).sum())
    if beyond:
        notes += (
            f"infinite for {beyond} of {size} data: the {start} cannot draw the latents that generated them",
        )
    notes += annealer.floor()
    upper = Bound(
        f"reverse {annealer.method}",
        -value,
        torch.full_like(value, math.nan),
        "upper",
        draws=particles,
        cost=annealer.cost - before,
        notes=tuple(notes),
    )
    return Sandwich(pair.name, lower, upper)


@dataclass(frozen=True)
class _Points:
    """Particles, u [K, b, D] and k [K, b, E], with both log densities [K, b] and their gradients with respect
    to u (None if no transition asked for them)."""

    u: Tensor
    k: Tensor
    base: Tensor
    joint: Tensor
    base_slope: Tensor | None
    joint_slope: Tensor | None

    def density(self, beta: float) -> Tensor:
        return _no_nan((1 - beta) * self.base + beta * self.joint)

    def slope(self, beta: float) -> Tensor:
        assert self.base_slope is not None and self.joint_slope is not None
        return (1 - beta) * self.base_slope + beta * self.joint_slope

    def where(self, accept: Tensor, other: _Points) -> _Points:
        """These particles where ``accept``, the others elsewhere."""

        def choose(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if mine is None or theirs is None:
                return None
            return torch.where(accept if mine.dim() == 2 else accept.unsqueeze(-1), mine, theirs)

        return _Points(*(choose(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))  # type: ignore[arg-type]


class _Annealer:
    """The annealing path of one batch: densities, fixed schedule, and step sizes from a pilot run."""

    def __init__(self, evaluator: Evaluator, temperatures: int, leapfrog: int, start: str) -> None:
        positive_count("temperatures", temperatures, "number of steps")
        positive_count("leapfrog", leapfrog, "number of steps")
        self.start, self.leapfrog = start, leapfrog
        self.evaluator = evaluator
        self.evaluator.refuse_scales("AIS")
        self.evaluator.refuse_empty()
        self.space = Unconstrained(self.evaluator, partial=True)
        self.lattice = Lattice(self.evaluator)
        self.potential = Potential(self.evaluator, self.space, self.lattice, start)
        self.betas = _schedule(temperatures)
        self.method = f"ais-{temperatures}"
        self.name = evaluator.pair.name
        self.cost = 0
        self.moved = 0.0
        self.moves = 0
        self.drawn = 0
        self.ruled_out = 0
        self.scale = self.steps = torch.empty(0)
        self.pilot_moves = math.ceil(_PILOT_MOVES / max(1, temperatures - 1)) if self.space.dims else 0
        if self.space.dims:
            self._refuse_flat()

    def bar(self, particles: int, progress: bool) -> tqdm:
        """Progress bar over transitions of one particle of one datum."""
        each = (len(self.betas) - 2) * (particles + _PILOT * self.pilot_moves)
        work = self.evaluator.size * (each + 10 * _PILOT * (self.pilot_moves > 0 and len(self.betas) > 2))
        return tqdm(total=work, unit="move", unit_scale=True, disable=None if progress else True)

    # ------------------------------------------------------------------------------------------ runs

    def adapt(self, bar: tqdm) -> None:
        """Pilot run: scales of the latents from draws of f_0, then step sizes along the path."""
        if not self.space.dims:
            return
        bar.set_description(f"AIS of {self.name}: step sizes")
        scales, tables = [], []
        for rows in {rows.start: rows for rows, _ in self.evaluator.chunks(64)}.values():
            where = self._rows(rows)
            points = self._draw(_PILOT, where)
            spread = self._draw_latents(64, where)[0].std(0)
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
        return self._forward(particles, bar)[0]

    def reverse(self, u: Tensor, k: Tensor, bar: tqdm) -> Tensor:
        """ln 1/w of chains that end in given posterior draws, run backwards, [K, B]."""
        bar.set_description(f"AIS of {self.name}: upper bound on ln p(y) of {u.shape[1]} data")
        blocks: dict[int, list[Tensor]] = {}
        for rows, count in self.evaluator.chunks(len(u)):
            done = sum(len(b) for b in blocks.get(rows.start, []))
            points = self._points(
                u[done : done + count, rows], k[done : done + count, rows], self._rows(rows)
            )
            _, log_w = self._anneal(points, self.betas[::-1], self.steps.flip(0), rows, bar)
            blocks.setdefault(rows.start, []).append(log_w)
        return torch.cat([torch.cat(block) for block in blocks.values()], 1)

    def coordinates(self, latents: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """u [K, B, D] and k [K, B, E] of latents {site: [K, *plates, B, *event]}."""
        return self._unconstrained(latents), self.lattice.to_vector(latents)

    def posterior_chains(self, particles: int, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Ends of a forward run, resampled by their weights, after as many transitions at β = 1."""
        log_w, u, k = self._forward(particles, bar)
        bar.set_description(f"AIS of {self.name}: chains at the posterior")
        log_w = torch.where((log_w == -math.inf).all(0), torch.zeros_like(log_w), log_w)
        index = torch.multinomial((log_w - log_w.amax(0)).exp().T, particles, replacement=True).T
        u, k = (x.gather(0, index.unsqueeze(-1).expand_as(x)) for x in (u, k))
        blocks: dict[int, list[_Points]] = {}
        for rows, count in self.evaluator.chunks(particles):
            done = sum(len(b.u) for b in blocks.get(rows.start, []))
            where = self._rows(rows)
            points = self._points(u[done : done + count, rows], k[done : done + count, rows], where)
            for _ in range(len(self.betas) - 2):
                points, rate = self._move(points, 1.0, *self._pace(-1, rows), where)
                bar.update(rate.numel())
            blocks.setdefault(rows.start, []).append(points)
        return tuple(
            torch.cat([torch.cat([getattr(p, name) for p in block]) for block in blocks.values()], 1)
            for name in ("u", "k")
        )  # type: ignore[return-value]

    def bound(self, log_w: Tensor, kind: str) -> Bound:
        """The bound of ln w [K, B] of forward chains, or of ln 1/w of reverse ones."""
        notes = []
        rate = self.moved / max(self.moves, 1)
        if self.moves and rate < 0.3:
            notes.append(f"only {rate:.0%} of the transitions were accepted: the bound may be loose")
        empty = int((log_w == -math.inf).all(0).sum())
        if empty:
            notes.append(f"all weights are zero for {empty} of {self.evaluator.size} data")
        if kind == "lower":
            return weighted(
                self.method, log_w, kind, self.cost, tuple(notes), source=self.start, jackknife=True
            )
        lost = float((log_w == -math.inf).double().mean())
        if lost:
            notes.append(
                f"{lost:.1%} of the chains start where the {self.start} has probability zero: the bound is "
                "looser"
            )
        notes += self.floor()
        if kind == "upper":
            return weighted(f"reverse {self.method}", log_w, kind, self.cost, tuple(notes), jackknife=True)
        notes.append(
            "from posterior chains, not exact draws: an upper bound only if the chains have converged"
        )
        method = f"reverse {self.method} from chains"
        above = weighted(method, log_w, "upper", self.cost, tuple(notes), jackknife=True)
        return replace(above, kind=kind)

    def floor(self) -> tuple[str, ...]:
        """A note on how far reverse chains stay above ln p(y) if f_0 draws latents with p(y, z) = 0."""
        if not self.ruled_out:
            return ()
        share = self.ruled_out / self.drawn
        nats = f"{-math.log1p(-share):.2g} nats or more" if share < 1 else "far"
        return (
            f"p(y, z) is zero for {share:.1%} of the {self.start}'s draws: the bound stays {nats} above ln "
            "p(y) on average, at any number of temperatures",
        )

    # ------------------------------------------------------------------------------------------ inside

    def _forward(self, particles: int, bar: tqdm) -> tuple[Tensor, Tensor, Tensor]:
        """ln w [K, B] of particles that start from f_0, and their final positions."""
        bar.set_description(f"AIS of {self.name}: lower bound on ln p(y) of {self.evaluator.size} data")
        blocks: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for rows, count in self.evaluator.chunks(particles):
            points = self._draw(count, self._rows(rows))
            points, log_w = self._anneal(points, self.betas, self.steps, rows, bar)
            blocks.setdefault(rows.start, []).append((log_w, points.u, points.k))
        whole = [[torch.cat(x) for x in zip(*block, strict=True)] for block in blocks.values()]
        log_w, u, k = (torch.cat(x, 1) for x in zip(*whole, strict=True))
        return log_w, u, k

    def _anneal(
        self, points: _Points, betas: list[float], steps: Tensor, rows: slice, bar: tqdm
    ) -> tuple[_Points, Tensor]:
        """Final particles and Σ_t (β_t - β_{t-1}) ln f_1/f_0 along ``betas``, [K, b], with a transition at
        each inner β."""
        where = self._rows(rows)
        log_w = torch.zeros_like(points.base, dtype=torch.float64)
        for t in range(1, len(betas)):
            increment = (betas[t] - betas[t - 1]) * (points.joint - points.base).double()
            # A particle outside the support of either density has weight zero for good.
            log_w = _no_nan(log_w + increment)
            if t < len(betas) - 1:
                step = steps[t - 1, rows] if self.space.dims else None
                points, rate = self._move(points, betas[t], step, self._scale(rows), where)
                self.moved += float(rate.nansum())
                self.moves += int((~rate.isnan()).sum())
                bar.update(rate.numel())
        return points, log_w

    def _move(
        self, points: _Points, beta: float, step: Tensor | None, scale: Tensor | None, rows: slice | None
    ) -> tuple[_Points, Tensor]:
        """Transitions that leave f_β invariant, and the acceptance probability of the Hamiltonian one [K, b].

        It is NaN for particles of density zero and if there are no continuous latents. Momenta are in units
        of ``scale`` [b, D]; steps [b] are jittered by a fifth against resonance.
        """
        rate = torch.full_like(points.base, math.nan)
        if self.space.dims:
            points, rate = self._hamiltonian(points, beta, step, scale, rows)
        if self.lattice.dims:
            points = self._metropolis(points, beta, rows)
        return points, rate

    def _hamiltonian(
        self, points: _Points, beta: float, step: Tensor | None, scale: Tensor | None, rows: slice | None
    ) -> tuple[_Points, Tensor]:
        assert step is not None and scale is not None
        if points.base_slope is None:
            points = self._points(points.u, points.k, rows)
        jitter = 0.8 + 0.4 * torch.rand_like(points.base)
        pace = (step * jitter).unsqueeze(-1) * scale
        momentum = torch.randn_like(points.u)
        energy = _half_square(momentum) - points.density(beta)
        end = points
        momentum = momentum + 0.5 * pace * end.slope(beta)
        for i in range(self.leapfrog):
            end = self._points(end.u + pace * momentum, points.k, rows)
            momentum = momentum + (0.5 if i == self.leapfrog - 1 else 1.0) * pace * end.slope(beta)
        log_ratio = _log_acceptance(energy, _half_square(momentum) - end.density(beta))
        accept = torch.rand_like(log_ratio).log() < log_ratio
        rate = log_ratio.clamp_max(0.0).exp()
        return end.where(accept, points), torch.where(energy.isinf(), torch.full_like(rate, math.nan), rate)

    def _metropolis(self, points: _Points, beta: float, rows: slice | None) -> _Points:
        """Proposals of one discrete coordinate each, then of all latents drawn from f_0."""
        for _ in range(3 * self.leapfrog if self.lattice.moves else 0):
            other = self._points(points.u, self.lattice.propose(points.k), rows, slopes=False)
            log_ratio = _log_acceptance(-points.density(beta), -other.density(beta))
            points = other.where(torch.rand_like(log_ratio).log() < log_ratio, points)
        fresh = self._draw(len(points.u), rows, slopes=False)
        log_ratio = _log_acceptance(-beta * (points.joint - points.base), -beta * (fresh.joint - fresh.base))
        return fresh.where(torch.rand_like(log_ratio).log() < log_ratio, points)

    def _points(self, u: Tensor, k: Tensor, rows: slice | None, slopes: bool = True) -> _Points:
        slopes = slopes and self.space.dims > 0
        self.cost += (3 if slopes else 1) * u.shape[0] * u.shape[1]
        base, joint, *found = self.potential(u, k, rows, slopes)
        return _Points(u, k, _no_nan(base), _no_nan(joint), *(found if slopes else (None, None)))

    @torch.no_grad()
    def _draw_latents(self, particles: int, rows: slice | None) -> tuple[Tensor, Tensor]:
        latents = self.evaluator.sample_pass(particles, rows).latents
        u, k = self.coordinates(latents)
        self.cost += u.shape[0] * u.shape[1]
        return u, k

    def _unconstrained(self, latents: dict[str, Tensor]) -> Tensor:
        if not self.space.dims:
            k = self.lattice.to_vector(latents)
            return torch.zeros(*k.shape[:2], 0, device=k.device)
        # A guide that draws outside the model's support: NaN has density zero everywhere below.
        u = self.space.unconstrain(latents)
        return torch.where(self.space.inside(latents).unsqueeze(-1), u, torch.full_like(u, math.nan))

    def _draw(self, particles: int, rows: slice | None, slopes: bool = True) -> _Points:
        points = self._points(*self._draw_latents(particles, rows), rows, slopes)
        self.drawn += points.joint.numel()
        self.ruled_out += int((points.joint == -math.inf).sum())
        return points

    def _rows(self, rows: slice) -> slice | None:
        return rows if self.evaluator.sliceable else None

    def _scale(self, rows: slice) -> Tensor | None:
        return self.scale[rows] if self.space.dims else None

    def _pace(self, t: int, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        return (self.steps[t, rows] if self.space.dims else None), self._scale(rows)

    def _refuse_flat(self) -> None:
        """Unavailable for a continuous latent that other sites depend on without a gradient."""
        rows = self._rows(slice(0, 3))
        terms = self.evaluator.sample_pass(4, rows)
        self.cost += terms.log_joint.numel()
        latents = {k: v.detach() for k, v in terms.latents.items()}

        def others(name: str, value: Tensor) -> Tensor:
            terms = self.evaluator.terms({**latents, name: value}, rows)
            self.cost += (3 if value.requires_grad else 1) * terms.log_joint.numel()
            return torch.stack([v for k, v in terms.log_model.items() if k != name]).sum(0)

        for name in self.space.names:
            reason = "has no gradient in it (rounding, argmax, detach?)"
            try:
                with torch.enable_grad():
                    here = latents[name].clone().requires_grad_()
                    rest = others(name, here)
                    total = torch.where(rest.isfinite(), rest, torch.zeros_like(rest)).sum() + 0 * here.sum()
                    (slope,) = torch.autograd.grad(total, here)
                if bool((slope != 0).any()):
                    continue
                moved = others(name, latents[name].roll(1, 0))
                finite = moved.isfinite() & rest.isfinite()
                if torch.allclose(moved[finite], rest.detach()[finite], rtol=1e-4, atol=1e-4):
                    continue
            except RuntimeError as error:
                reason = f"gives no gradient ({error})"
            raise Unavailable(
                f"the density of other sites depends on latent site {name!r} and {reason}: Hamiltonian "
                "transitions would ignore it"
            )


def _schedule(temperatures: int) -> list[float]:
    """0 = β_0 < … < β_T = 1: equidistant values of a sigmoid, stretched to both ends."""
    ticks = torch.linspace(-4.0, 4.0, temperatures + 1, dtype=torch.float64).sigmoid()
    return ((ticks - ticks[0]) / (ticks[-1] - ticks[0])).tolist()


def _log_acceptance(before: Tensor, after: Tensor) -> Tensor:
    """ln of the Metropolis ratio of two energies, -inf for diverged trajectories."""
    return _no_nan(before - after)


def _half_square(momentum: Tensor) -> Tensor:
    return 0.5 * momentum.square().sum(-1)


def _no_nan(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), torch.full_like(x, -math.inf), x)

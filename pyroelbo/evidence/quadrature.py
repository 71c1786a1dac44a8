"""Numerical integration of the evidence over one or two continuous latents, by two rules that must agree."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.unconstrained import Unconstrained
from pyroelbo.numerics import logsumexp
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["quadrature"]

_FLOOR = 20.0  # a cell this many nats below the largest one is left out of the next, finer grid
_DRAWS = 128
_NODES = 8  # effective number of Gauss–Hermite nodes below which they are too far apart
_USELESS = 1.0  # nats of disagreement beyond which it is no measure of the error


@torch.no_grad()
def quadrature(pair: Pair, y: Any, tolerance: float = 1e-4, *, scope: str = "datum") -> Bound:
    """ln ∫ p(y, z) dz of each datum over one or two continuous latent dimensions, an ``estimate`` in nats,
    [B].

    Two rules that share no nodes. An *adaptive grid*: a box around draws of prior and guide, narrowed to
    where the integrand is, then doubled until two grids agree to ``tolerance`` (a datum that has agreed is
    not refined). *Gauss–Hermite*: nodes centred on the guide's draws for the datum, recentred on the
    integrand's mean and covariance, then doubled in the same way. The value is the grid's; ``resolution`` is
    the absolute difference of the two rules plus the grid's last change. Latents with a bounded support are
    mapped to the whole line first. Raises :class:`Unavailable` for discrete latents or more than two
    dimensions, ValueError as :class:`~pyroelbo.evaluation.evaluator.Evaluator` does. Cost: some 100,000
    evaluations per datum in two dimensions, 10,000 in one.

    Source: Naylor and Smith (1982) for the recentred Gauss–Hermite rule.
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number of nats, got {tolerance!r}")
    evaluator = Evaluator(pair, y, scope=scope)
    evaluator.refuse_scales("quadrature")
    space = Unconstrained(evaluator)
    if space.dims not in (1, 2):
        raise Unavailable(f"quadrature: expected one or two latent dimensions per datum, got {space.dims}")
    work = _Integrand(space)
    prior = space.unconstrain(Evaluator(pair, y, with_guide=False, scope=scope).sample(_DRAWS).latents)
    guessed = evaluator.sample(_DRAWS).latents
    # Draws of the guide outside the support are replaced by the prior's.
    guide = torch.where(space.inside(guessed).unsqueeze(-1), space.unconstrain(guessed), prior)
    grid, change = _adaptive_grid(work, torch.cat([prior, guide]), guide, tolerance)
    hermite = _gauss_hermite(work, guide, prior, tolerance)
    resolution = (grid - hermite).abs() + change
    bad = int((~(resolution <= 1e-3)).sum())
    notes: tuple[str, ...] = ()
    if bad:
        notes += (f"the rules disagree by more than 1e-3 nats for {bad} of {evaluator.size} data",)
    # A rule that misses the mass altogether says nothing about the other one.
    unknown = resolution.isfinite() & (resolution > _USELESS)
    if bool(unknown.any()):
        notes += (f"the error is unknown for {int(unknown.sum())} of {evaluator.size} data",)
        resolution = torch.where(unknown, math.nan, resolution)
    cut = int(resolution.isinf().sum())
    if cut:
        notes += (
            f"for {cut} data probability lies closer to the boundary of the latents' support than floating "
            "point can represent: their values are too low by an unknown amount",
        )
    bound = Bound(
        "quadrature",
        grid,
        torch.zeros_like(grid),
        "estimate",
        cost=work.count + 2 * _DRAWS * evaluator.size,
        resolution=resolution,
        notes=notes,
    )
    return evaluator.finish(bound)


class _Integrand:
    """The log integrand at nodes that differ between data; counts evaluations and respects memory."""

    def __init__(self, space: Unconstrained) -> None:
        self.space = space
        self.count = 0

    def __call__(self, nodes: Tensor, index: Tensor) -> Tensor:
        """nodes [M, b, D] of the data ``index`` [b] to [M, b], float64."""
        self.count += nodes.shape[0] * nodes.shape[1]
        cells = self.space.evaluator.cells
        if not self.space.evaluator.sliceable and len(index) < self.space.evaluator.size:
            whole = nodes[:, :1].repeat(1, self.space.evaluator.size, 1)
            whole[:, index] = nodes
            everyone = torch.arange(whole.shape[1], device=index.device)
            return self(whole, everyone)[:, index]
        step, width = min(len(nodes), cells), max(1, cells // len(nodes))
        if not self.space.evaluator.sliceable:
            step, width = max(1, cells // len(index)), len(index)
        columns = []
        for first in range(0, len(index), width):
            rows = index[first : first + width]
            block = nodes[:, first : first + width]
            out = [
                self.space.density(block[m : m + step].to(self.space.dtype), rows)
                for m in range(0, len(nodes), step)
            ]
            columns.append(torch.cat(out).double())
        value = torch.cat(columns, 1)
        return value.masked_fill(self.saturated(nodes) | value.isnan(), -math.inf)

    def saturated(self, nodes: Tensor) -> Tensor:
        return self.space.saturated(nodes.to(self.space.dtype))


def _adaptive_grid(work: _Integrand, seen: Tensor, guide: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """ln of the midpoint rule's sum and its last change, [B] each; ``seen`` [M, B, D] are points that the
    first box contains."""
    seen, guide = seen.double(), guide.double()
    data, dims = seen.shape[1], seen.shape[2]
    low, high = seen.amin(0), seen.amax(0)
    margin = 0.5 * (high - low) + 1e-6
    low, high = low - margin, high + margin
    everyone = torch.arange(data, device=seen.device)
    points = 257 if dims == 1 else 33
    # Modes that no draw came near: local maxima of the coarse grid, climbed by ever finer grids around each.
    modes = _climb(work, low, high, everyone, points)
    guide = torch.cat([guide, modes])
    # Narrow the box by a coarse grid and the guide's draws, so that a spike between the nodes is not lost.
    at_guide = work(guide, everyone)
    for _ in range(12):
        nodes, step = _midpoints(low, high, points)
        f = work(nodes, everyone)
        peak = torch.maximum(f.amax(0), at_guide.amax(0))
        keep, keep_guide = f > peak - _FLOOR, at_guide > peak - _FLOOR
        new_low = torch.minimum(_hull(nodes - step, keep, -1), _hull(guide - step, keep_guide, -1))
        new_high = torch.maximum(_hull(nodes + step, keep, 1), _hull(guide + step, keep_guide, 1))
        # Where the integrand has not decayed at an edge, the box grows instead.
        width = high - low
        grown_low, grown_high = new_low < low, new_high > high
        new_low, new_high = new_low - 0.5 * width * grown_low, new_high + 0.5 * width * grown_high
        settled = ((new_high - new_low) / width > 0.6) & ~grown_low & ~grown_high
        low, high = new_low, new_high
        if bool(settled.all()):
            break
    cut = _cut_off(work, low, high, everyone, points)
    value = _midpoint_sum(work, low, high, everyone, points)
    change = torch.full_like(value, math.inf)
    open_rows = everyone
    for _ in range(4 if dims == 2 else 8):
        points = 2 * points - 1
        finer = _midpoint_sum(work, low[open_rows], high[open_rows], open_rows, points)
        change[open_rows] = (finer - value[open_rows]).abs().nan_to_num(nan=0.0)
        value[open_rows] = finer
        open_rows = everyone[change > tolerance]
        if not len(open_rows):
            break
    return value, torch.where(cut, math.inf, change)


def _on_grid(f: Tensor, points: int, dims: int) -> Tensor:
    """[points^D, b] as [b, 1, points, ...], for pooling over neighbours."""
    return f.T.reshape(-1, 1, *[points] * dims)


def _pool(x: Tensor, dims: int) -> Tensor:
    pool = torch.nn.functional.max_pool1d if dims == 1 else torch.nn.functional.max_pool2d
    return pool(x, 3, stride=1, padding=1)


def _climb(work: _Integrand, low: Tensor, high: Tensor, index: Tensor, points: int, keep: int = 8) -> Tensor:
    """The ``keep`` highest local maxima of a grid over the box, each climbed to within 1e-4 of a cell: [keep,
    B, D]."""
    dims = low.shape[-1]
    nodes, step = _midpoints(low, high, points)
    f = work(nodes, index)
    grid = _on_grid(f, points, dims)
    peaks = f.masked_fill(~(_pool(grid, dims) == grid).reshape(len(index), -1).T, -math.inf)
    chosen = peaks.topk(keep, 0).indices
    centers = torch.gather(nodes.expand(-1, len(index), -1), 0, chosen.unsqueeze(-1).expand(-1, -1, dims))
    ticks = torch.linspace(-1, 1, 9, dtype=low.dtype, device=low.device)
    offsets = torch.stack(torch.meshgrid(*[ticks] * dims, indexing="ij"), -1).reshape(1, -1, 1, dims)
    for _ in range(7):
        around = centers.unsqueeze(1) + offsets * step
        best = work(around.flatten(0, 1), index).reshape(*around.shape[:3]).argmax(1)
        centers = torch.gather(around, 1, best[:, None, :, None].expand(-1, 1, -1, dims)).squeeze(1)
        step = step / 3.5
    return centers


def _cut_off(work: _Integrand, low: Tensor, high: Tensor, index: Tensor, points: int) -> Tensor:
    """Data whose integrand has not decayed to e^-9 of its peak where floating point ends at a boundary,
    [B]."""
    dims, margin = low.shape[-1], 0.1 * (high - low)
    nodes, _ = _midpoints(low - margin, high + margin, points)
    saturated = work.saturated(nodes.expand(-1, len(index), -1))
    if not bool(saturated.any()):
        return saturated.any(0)
    f = work(nodes, index)
    near = _pool(_on_grid(saturated.to(f.dtype), points, dims), dims).reshape(len(index), -1).T > 0
    edge = f.masked_fill(~near | saturated, -math.inf).amax(0)
    return edge > f.amax(0) - 9


def _midpoints(low: Tensor, high: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Cell centres [points^D, b, D] of a grid over each datum's box, and the cell widths [b, D]."""
    step = (high - low) / points
    ticks = torch.arange(points, dtype=low.dtype, device=low.device) + 0.5
    unit = torch.stack(torch.meshgrid(*[ticks] * low.shape[-1], indexing="ij"), -1).reshape(
        -1, 1, low.shape[-1]
    )
    return low + unit * step, step


def _hull(nodes: Tensor, keep: Tensor, side: int) -> Tensor:
    """The lowest (side -1) or highest (+1) corner of the kept nodes, [b, D]; infinite where none is kept."""
    filled = nodes.where(keep.unsqueeze(-1), torch.full_like(nodes, -side * math.inf))
    return filled.amin(0) if side < 0 else filled.amax(0)


def _midpoint_sum(work: _Integrand, low: Tensor, high: Tensor, index: Tensor, points: int) -> Tensor:
    nodes, step = _midpoints(low, high, points)
    return logsumexp(work(nodes, index), 0) + step.log().sum(-1)


def _gauss_hermite(work: _Integrand, guide: Tensor, prior: Tensor, tolerance: float) -> Tensor:
    """ln of the Gauss–Hermite sum, [B].

    Around the guide's mean and as wide as the prior first, then recentred on the integrand's moments and
    refined until three sums in a row agree. A tenth of the first covariance is kept while the nodes
    resolve the integrand, so that a small mode far away is not lost.
    """
    guide, prior = guide.double(), prior.double()
    everyone = torch.arange(guide.shape[1], device=guide.device)
    mean = guide.mean(0)
    spread = torch.cat([guide, prior]) - mean
    wide = torch.einsum("mbi,mbj->bij", spread, spread) / len(spread)
    covariance = wide.clone()
    value = torch.full_like(mean[:, 0], -math.inf)
    kept = torch.full_like(value, 0.1)
    open_rows, agreed = everyone, torch.zeros_like(everyone, dtype=torch.bool)
    for points in (
        (48, 48, 64, 96, 192, 384, 768, 1536) if mean.shape[-1] == 2 else (256, 256, 512, 1024, 4096, 16384)
    ):
        nodes, terms = _hermite_terms(work, mean, covariance, open_rows, points)
        finer = logsumexp(terms, 0)
        share = (terms - finer).exp().nan_to_num(nan=0.0)
        mean[open_rows] = center = torch.einsum("mb,mbi->bi", share, nodes)
        spread = nodes - center
        # If a few nodes hold all mass the kept part must shrink, or no refinement would resolve it.
        kept[open_rows] *= torch.where(share.square().sum(0) > 1 / _NODES, 0.1, 1.0)
        moment = torch.einsum("mb,mbi,mbj->bij", share, spread, spread)
        covariance[open_rows] = moment + kept[open_rows, None, None] * wide[open_rows]
        agrees = (finer - value[open_rows]).abs() <= tolerance
        value[open_rows] = finer
        # Two agreeing sums may both miss a mode.
        settled = agrees & agreed[open_rows]
        agreed[open_rows] = agrees
        open_rows = open_rows[~settled]
        if not len(open_rows):
            break
    return value


def _hermite_terms(
    work: _Integrand, mean: Tensor, covariance: Tensor, index: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    root = _cholesky(covariance[index])
    x, log_weight = _hermite_nodes(points, mean.shape[-1], mean)
    nodes = mean[index] + math.sqrt(2.0) * torch.einsum("bij,mj->mbi", root, x)
    log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + 0.5 * mean.shape[-1] * math.log(2.0)
    return nodes, work(nodes, index) + log_weight[:, None] + log_det


def _cholesky(covariance: Tensor) -> Tensor:
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    size = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)[:, None, None]
    try:
        return torch.linalg.cholesky(covariance + 1e-9 * size * eye)
    except torch.linalg.LinAlgError as error:
        raise Unavailable("quadrature: the draws of guide and prior have no finite covariance") from error


@functools.cache
def _hermite_rule(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss–Hermite nodes, an even number, and ln(weight) + x² within eleven standard deviations, |x| < 8.

    The nodes are the zeros of the Hermite function ψ_n, first approximated by its WKB phase, then by Newton's
    method; weight·e^(x²) = 1 / Σ_{j<n} ψ_j(x)². Cost: O(n) per node, so that thousands of nodes are cheap.
    """
    turning = math.sqrt(2 * points + 1)
    grid = np.linspace(0, min(8.2, turning * (1 - 1e-9)), 20_000)
    phase = 0.5 * (grid * np.sqrt(turning**2 - grid**2) + turning**2 * np.arcsin(grid / turning))
    count = int(phase[-1] / math.pi - 0.5) + 1
    x = np.interp((np.arange(count) + 0.5) * math.pi, phase, grid)
    for _ in range(4):
        before, last, _ = _hermite_functions(points, x)
        x = x - last / (math.sqrt(2 * points) * before - x * last)
    x = np.concatenate([-x[::-1], x])
    x = x[np.abs(x) < 8]
    return x, -np.log(_hermite_functions(points, x)[2])


def _hermite_functions(n: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ψ_{n-1}(x), ψ_n(x) and Σ_{j<n} ψ_j(x)² of the orthonormal Hermite functions, by their recursion."""
    previous, current = np.zeros_like(x), np.pi**-0.25 * np.exp(-(x**2) / 2)
    total = np.zeros_like(x)
    for j in range(n):
        total += current**2
        previous, current = current, math.sqrt(2 / (j + 1)) * x * current - math.sqrt(j / (j + 1)) * previous
    return previous, current, total


def _hermite_nodes(points: int, dims: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes x [M, D] and ln(weight) + |x|², for integrals against dx."""
    x, log_w = _hermite_rule(points)
    grid = np.array(list(itertools.product(x, repeat=dims)))
    weight = np.array([sum(c) for c in itertools.product(log_w, repeat=dims)])
    return like.new_tensor(grid), like.new_tensor(weight)

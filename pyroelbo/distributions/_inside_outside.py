"""Inside and outside passes of a binary grammar as batched matrix products on scaled charts.

Every span keeps its weights relative to their maximum, and the logarithm of that maximum. What such a chart
loses by
underflow is bounded: each term of a sum loses at most the smallest number of its type, all factors being at
most one. An entry that is large against the bound is therefore right; a sentence with a smaller one is
reported, to be computed again in a wider range. The compiled kernels (``kernels/inside_outside.py``) do the
work if they apply; each function has the same in plain torch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyroelbo.distributions.checks import check_lengths
from pyroelbo.distributions.kernels.dispatch import kernels
from pyroelbo.numerics import logsumexp

__all__ = ["Chart", "inside", "outside"]


class Blocks(NamedTuple):
    """Rule weights by kinds of children, relative to their maximum; G is 1 for a grammar shared by the
    batch, else B.
    """

    inner: Tensor  # [G, N, N*N]: parent, then two nonterminals
    leaf_left: Tensor  # [G, P, N*N]: the left child, a preterminal, then right child and parent
    leaf_right: Tensor  # [G, P, N*N]: the right child, a preterminal, then left child and parent
    outer: Tensor  # [G, N*P, P]: parent and left child, then the right one, both preterminals
    peak: Tensor  # [G]


class Chart(NamedTuple):
    """Scaled inside weights: left[i, b, w] of spans starting at i, right[j, b, L - w] of those ending at j.

    Positions come first, so that all spans of one width are views that need no copy. N* is N, or N rounded up
    to whole vectors for the compiled kernels. Scales are those of leaves at width one.
    """

    left: Tensor  # [L, B, L+1, N*]
    right: Tensor  # [L, B, L+1, N*]
    left_scale: Tensor  # [L, B, L+1]
    right_scale: Tensor  # [L, B, L+1]
    inverse: Tensor  # [L, B, L+1], like left_scale: what the weights were multiplied by
    factor: Tensor  # like left: weights of the spans themselves, relative to their maximum; empty without
    leaf: Tensor  # [L, B, P]
    leaf_left: Tensor  # [L, B, N, N]: a leaf on the left turns its right sibling into the parent
    leaf_right: Tensor  # [L, B, N, N]
    half: Tensor  # [L-1, B, N*P]: the second leaf on the right turns its left sibling into the parent
    rules: Blocks
    total: Tensor  # [B]: ln Σ over trees
    posterior: Tensor  # [B, N]: of the start symbol
    reliable: Tensor  # [B]


def _scaled(log_weight: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    peak = log_weight.amax(dims, keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    return (log_weight - peak).exp(), peak


def _blocks(rules: Tensor, n: int) -> Blocks:
    peak = rules.amax((-3, -2, -1), keepdim=True)
    peak = torch.where(peak == -math.inf, 0.0, peak)

    def weight(block: Tensor) -> Tensor:
        return (block - peak).exp_()

    return Blocks(
        weight(rules[..., :n, :n]).flatten(2),
        weight(rules[..., n:, :n]).permute(0, 2, 3, 1).flatten(2),
        weight(rules[..., :n, n:]).permute(0, 3, 2, 1).flatten(2),
        weight(rules[..., n:, n:]).flatten(1, 2),
        peak.view(-1),
    )


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x [n, B, K] @ matrix [G, K, M]``; one large product where the batch shares the matrix."""
    if matrix.shape[0] == 1:
        return (x.flatten(0, 1) @ matrix[0]).view(*x.shape[:-1], matrix.shape[-1])
    return torch.bmm(x.transpose(0, 1), matrix).transpose(0, 1)


def _row(vector: Tensor, matrix: Tensor) -> Tensor:
    return (vector.unsqueeze(-2) @ matrix).squeeze(-2)


def inside(
    root: Tensor,
    rules: Tensor,
    leaves: Tensor,
    spans: Tensor | None,
    lengths: Tensor,
    *,
    possible: Tensor | None = None,
    boolean: bool = False,
) -> Chart:
    """The chart of ``root [B,N]``, ``rules [1 or B,N,N+P,N+P]``, ``leaves [B,L,P]``, ``spans [B,L,L,N]``
    log potentials.

    ``boolean`` replaces every positive weight by one; its ``left`` is the ``possible`` of a grammar with
    -inf, whose zeros are not taken for underflow.
    Cost: O(B L³ N² + B L² N³ + B L N² P) time, O(B L N (L + N + P)) memory.
    """
    batch, size, preterminals = leaves.shape
    n = root.shape[-1]
    run = kernels("inside_outside", leaves)
    wide = n if run is None else -(-n // run.LANES) * run.LANES
    new, blocks = leaves.new_zeros, _blocks(rules, n)
    leaf, leaf_scale = _scaled(leaves.transpose(0, 1).contiguous(), (-1,))
    half = _times(leaf[1:], blocks.outer.transpose(1, 2)).contiguous()
    factor, top = new(0, 0, 0, 0), new(0, 0, 0)
    if spans is not None:
        weight, peak = _scaled(spans, (-1,))
        factor, top = new(size, batch, size + 1, wide), new(size, batch, size + 1)
        for w in range(2, size + 1):
            factor[: size - w + 1, :, w, :n] = weight.diagonal(w - 1, 1, 2).permute(2, 0, 1)
            top[: size - w + 1, :, w] = peak[..., 0].diagonal(w - 1, 1, 2).T
    chart = Chart(
        left=new(size, batch, size + 1, wide),
        right=new(size, batch, size + 1, wide),
        left_scale=new(size, batch, size + 1),
        right_scale=new(size, batch, size + 1),
        inverse=new(size, batch, size + 1),
        factor=factor,
        leaf=leaf,
        leaf_left=_times(leaf, blocks.leaf_left).reshape(size, batch, n, n),
        leaf_right=_times(leaf, blocks.leaf_right).reshape(size, batch, n, n),
        half=half,
        rules=blocks,
        total=new(batch),
        posterior=new(batch, n),
        reliable=torch.ones(batch, dtype=torch.bool, device=leaves.device),
    )
    chart.left_scale[:, :, 1] = chart.right_scale[:, :, size - 1] = leaf_scale.squeeze(-1)
    two = (half.view(*half.shape[:2], n, preterminals) @ leaf[:-1].unsqueeze(-1)).squeeze(-1)
    limits = torch.finfo(leaves.dtype)
    threshold = limits.tiny * 16 * (size * n * n + 2 * preterminals * (n + preterminals)) / limits.eps
    doubtful = torch.zeros_like(chart.reliable)
    if run is None:
        check_lengths(lengths, size)
        _fill(chart, two, top, possible, lengths, threshold, boolean, doubtful)
    else:
        pad = 0, wide - n
        inner = F.pad(blocks.inner.view(-1, n, n, n), (*pad, 0, 0, 0, 0)).permute(0, 2, 3, 1)
        given = run.Upward(
            two.contiguous(),
            F.pad(chart.leaf_left, pad).contiguous(),
            F.pad(chart.leaf_right, pad).contiguous(),
            F.pad(inner.flatten(1, 2), pad).contiguous(),
            blocks.peak,
            top,
            new(0, 0, 0, 0) if possible is None else possible,
            lengths.contiguous(),
        )
        run.inside(run.Charts(*chart[:6]), given, threshold, limits.tiny, boolean, doubtful)
    whole = torch.zeros_like(lengths), torch.arange(batch, device=leaves.device), lengths
    weight = root + chart.left[..., :n][whole].log()
    total = logsumexp(weight)
    posterior = torch.where(total[:, None] > -math.inf, (weight - total[:, None]).exp(), 0.0)
    return chart._replace(
        total=total + chart.left_scale[whole], posterior=posterior.nan_to_num(0.0), reliable=~doubtful
    )


def _splits(chart: Chart, w: int) -> tuple[slice, slice, Tensor, Tensor]:
    """Spans of width w: their first and last words, the relative scales [n, B, w-1] of their splits, by the
    left part's width, and the scales [n, B] of the sums.
    """
    size = chart.left.shape[0]
    start, end = slice(0, size - w + 1), slice(w - 1, size)
    scales = chart.left_scale[start, :, 1:w] + chart.right_scale[end, :, size - w + 1 : size]
    peak = scales.amax(-1)
    peak = torch.where(peak == -math.inf, 0.0, peak)
    return start, end, (scales - peak[..., None]).exp(), peak


def _pairs(chart: Chart, w: int, relative: Tensor) -> Tensor:
    """Weights of two nonterminals below each span of width w, [n, B, N*N]."""
    size = chart.left.shape[0]
    start, end = slice(0, size - w + 1), slice(w - 1, size)
    left = chart.left[start, :, 2 : w - 1] * relative[..., 1:-1, None]
    return (left.transpose(2, 3) @ chart.right[end, :, size - w + 2 : size - 1]).flatten(2)


def _fill(
    chart: Chart,
    two: Tensor,
    top: Tensor,
    possible: Tensor | None,
    lengths: Tensor,
    threshold: float,
    boolean: bool,
    doubtful: Tensor,
) -> None:
    """``kernels.inside_outside.inside`` in plain torch."""
    size, blocks = chart.left.shape[0], chart.rules
    tiny = torch.finfo(two.dtype).tiny
    for w in range(2, size + 1):
        start, end, relative, peak = _splits(chart, w)
        value = two
        if w > 2:
            of_right = _row(relative[..., :1] * chart.right[end, :, size - w + 1], chart.leaf_left[start])
            of_left = _row(relative[..., -1:] * chart.left[start, :, w - 1], chart.leaf_right[end])
            value = of_right + of_left
        if w > 3:
            value = value + _times(_pairs(chart, w, relative), blocks.inner.transpose(1, 2))
        if chart.factor.numel():
            value, peak = value * chart.factor[start, :, w], peak + top[start, :, w]
        if boolean:
            value = (value > 0).to(value.dtype)
        else:
            within = torch.arange(w - 1, size, device=two.device)[:, None] < lengths
            small = value < threshold
            if possible is not None:
                small &= possible[start, :, w] > 0
            doubtful |= (small.any(-1) & within).any(0)
        largest = value.amax(-1)
        inverse = torch.where(largest >= tiny, largest, 1.0).reciprocal()
        scale = largest.log() + peak + blocks.peak
        chart.inverse[start, :, w] = inverse
        chart.left[start, :, w] = chart.right[end, :, size - w] = value * inverse[..., None]
        chart.left_scale[start, :, w] = chart.right_scale[end, :, size - w] = scale


def outside(
    chart: Chart, lengths: Tensor, grad: Tensor, want_spans: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of Σ_b grad[b]·total[b] by root, rules, leaves and spans, and which sentences' are reliable.

    What underflows here is missing from the expected number of spans, which is known to be length - 1. The
    gradients of an unreliable sentence are left out. Cost: about three times that of ``inside``.
    """
    size, batch, _, wide = chart.left.shape
    leaf, blocks, n = chart.leaf, chart.rules, chart.posterior.shape[-1]
    groups, p, _ = blocks.leaf_left.shape
    new, run = chart.left.new_zeros, kernels("inside_outside", chart.left)
    nodes = torch.where(chart.total > -math.inf, lengths - 1, 0)
    slack = lengths * torch.finfo(leaf.dtype).eps ** 0.75
    spans = new(batch, size, size, n) if want_spans else None
    two, total = new(max(size - 1, 0), batch, n), new(groups, n, n, wide)
    to_left, to_right = new(size, batch, n, wide), new(size, batch, n, wide)
    if run is None:
        reliable = _flow_back(chart, lengths, nodes, slack, grad, spans, two, to_left, to_right, total)
    else:
        reliable = chart.reliable.clone()
        inner = F.pad(blocks.inner.view(groups, n, n, n), (0, wide - n))
        transposed = F.pad(blocks.inner.view(groups, n, n, n).transpose(2, 3), (0, wide - n))
        leaf_left, leaf_right = (
            F.pad(x.transpose(2, 3), (0, wide - n)).contiguous() for x in (chart.leaf_left, chart.leaf_right)
        )
        given = run.Downward(
            leaf_left,
            leaf_right,
            inner.contiguous(),
            transposed.contiguous(),
            chart.posterior,
            lengths.contiguous(),
            nodes,
            slack,
            grad.to(leaf.dtype).contiguous(),
        )
        found = new(0, 0, 0, 0) if spans is None else spans
        out = run.Gradients(reliable, found, two, to_left, to_right, total.flatten(2))
        run.outside(run.Charts(*chart[:6]), given, out)
    scale = torch.where(reliable, grad, 0.0)
    two, to_left, to_right = (_weighted(x[..., :n], scale, reliable) for x in (two, to_left, to_right))
    to_left, to_right = to_left.flatten(2), to_right.flatten(2)
    rules = leaf.new_empty(groups, n, n + p, n + p)
    rules[..., :n, :n] = total[..., :n] * blocks.inner.view(groups, n, n, n)
    used = (_summed(leaf, to_left, groups) * blocks.leaf_left).view(groups, p, n, n)
    rules[..., n:, :n] = used.permute(0, 3, 1, 2)
    used = (_summed(leaf, to_right, groups) * blocks.leaf_right).view(groups, p, n, n)
    rules[..., :n, n:] = used.permute(0, 3, 2, 1)
    both = (two[..., None] * leaf[:-1, :, None, :]).flatten(2)
    rules[..., n:, n:] = (_summed(both, leaf[1:], groups) * blocks.outer).view(groups, n, p, p)
    leaves = _times(to_left, blocks.leaf_left.transpose(1, 2))
    leaves += _times(to_right, blocks.leaf_right.transpose(1, 2))
    leaves[1:] += _times(both, blocks.outer)
    leaves[:-1] += _row(two, chart.half.view(*two.shape, p))
    root = _weighted(chart.posterior[None], scale, reliable)[0]
    if spans is not None:
        spans = _weighted(spans.transpose(0, 1), scale, reliable).transpose(0, 1)
    return root, rules, (leaves * leaf).transpose(0, 1), spans, reliable


def _weighted(x: Tensor, scale: Tensor, reliable: Tensor) -> Tensor:
    """``x [n, B, ...]`` times ``scale [B]``, zero where not ``reliable``."""
    shape = (-1,) + (1,) * (x.dim() - 2)
    x = x * scale.view(shape)
    return x if reliable.all() else torch.where(reliable.view(shape), x, 0.0)


def _summed(x: Tensor, y: Tensor, groups: int) -> Tensor:
    """Σ over positions, and over the batch if it shares the grammar, of outer products: [G, K, M]."""
    if groups == 1:
        return (x.flatten(0, 1).t() @ y.flatten(0, 1)).unsqueeze(0)
    return x.permute(1, 2, 0) @ y.transpose(0, 1)


def _flow_back(
    chart: Chart,
    lengths: Tensor,
    nodes: Tensor,
    slack: Tensor,
    grad: Tensor,
    spans: Tensor | None,
    two: Tensor,
    to_left: Tensor,
    to_right: Tensor,
    total: Tensor,
) -> Tensor:
    """``kernels.inside_outside.outside`` in plain torch; returns ``reliable``."""
    size, batch, _, n = chart.left.shape
    by_left, by_right = torch.zeros_like(chart.left), torch.zeros_like(chart.right)
    via_left, via_right = torch.zeros_like(chart.left), torch.zeros_like(chart.right)
    leaf_left, leaf_right = (x.transpose(2, 3) for x in (chart.leaf_left, chart.leaf_right))
    found, raw = torch.zeros_like(chart.total), {}
    for w in range(size, 1, -1):
        start, end, relative, _ = _splits(chart, w)
        value = chart.left[start, :, w]
        g = by_left[start, :, w] + by_right[end, :, size - w]
        top = torch.where(value[0] > 0, chart.posterior / value[0], 0.0)
        g[0] += torch.where((lengths == w)[:, None], top, 0.0)
        g = torch.where(value > 0, g, 0.0)
        used = g * value
        found += used.sum((0, 2))
        if spans is not None:
            spans.diagonal(w - 1, 1, 2).copy_(used.permute(1, 2, 0))
        g = g * chart.inverse[start, :, w, None]
        raw[w] = g = g * chart.factor[start, :, w] if chart.factor.numel() else g
        if w > 2:
            first, last = g * relative[..., :1], g * relative[..., -1:]
            via_left[start, :, w], via_right[end, :, size - w] = first, last
            by_right[end, :, size - w + 1] += _row(first, leaf_left[start])
            by_left[start, :, w - 1] += _row(last, leaf_right[end])
        if w > 3:
            u, v, both = slice(2, w - 1), slice(size - w + 2, size - 1), relative[..., 1:-1, None]
            back = _times(g, chart.rules.inner).reshape(len(g), batch, n, n)
            by_left[start, :, u] += (chart.right[end, :, v] * both) @ back.transpose(2, 3)
            by_right[end, :, v] += (chart.left[start, :, u] * both) @ back
    reliable = chart.reliable & ((found - nodes).abs() <= slack)
    if size > 1:
        two.copy_(raw[2])
        to_left[:-1] = chart.left[1:, :, 2:-1].transpose(2, 3) @ via_left[:-1, :, 3:]
        to_right[1:] = chart.right[:-1, :, 1:-2].transpose(2, 3) @ via_right[1:, :, :-3]
    scale = torch.where(reliable, grad, 0.0)
    for w in range(4, size + 1):
        pairs = _pairs(chart, w, _splits(chart, w)[2])
        total += _summed(_weighted(raw[w], scale, reliable), pairs, len(total)).view(total.shape)
    return reliable

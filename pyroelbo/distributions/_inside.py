"""Inside and outside passes of a binary grammar as batched matrix products on scaled charts.

Every span keeps its weights relative to their maximum, with the logarithm of that maximum beside them. What
such a chart loses by underflow is bounded (each term of a sum loses at most the smallest number of its
type, all factors being at most one), so an entry that is large against the bound is right; a sentence with
a smaller one is reported, to be computed again in a wider range.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyroelbo.numerics import logsumexp

__all__ = ["Chart", "inside", "outside"]


class Blocks(NamedTuple):
    """Rule weights by kinds of children, relative to their maximum; G is 1 for a grammar shared by the
    batch, else B.
    """

    inner: Tensor  # [G, N, N*N]: parent, then two nonterminals
    leaf_left: Tensor  # [G, P, N*N]: the left child, a preterminal, then right child and parent
    leaf_right: Tensor  # [G, P, N*N]: the right child, a preterminal, then left child and parent
    outer: Tensor  # [G, N, P*P]: parent, then two preterminals
    peak: Tensor  # [G]


class Chart(NamedTuple):
    """Scaled inside weights: left[i, b, w] of spans starting at i, right[j, b, L - w] of those ending at j.

    Positions come first, so that all spans of one width are views that need no copy.
    """

    left: Tensor  # [L, B, L+1, N]
    right: Tensor  # [L, B, L+1, N]
    left_scale: Tensor  # [L, B, L+1]
    right_scale: Tensor  # [L, B, L+1]
    leaf: Tensor  # [L, B, P]
    leaf_scale: Tensor  # [L, B]
    leaf_left: Tensor  # [L, B, N, N]: a leaf on the left turns its right sibling into the parent
    leaf_right: Tensor  # [L, B, N, N]
    pairs: list[Tensor]  # by width, [n, B, N*N]: weights of two nonterminal children
    shares: list[
        tuple[Tensor, ...]
    ]  # by width: relative scales of splits with a left leaf, a right leaf, and neither
    slope: list[Tensor]  # by width, [n, B, N] or [n, B, 1]: the derivative of scaled by raw weights
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
        weight(rules[..., n:, n:]).flatten(2),
        peak.view(-1),
    )


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x [n, B, K] @ matrix [G, K, M]``; one large product where the batch shares the matrix."""
    if matrix.shape[0] == 1:
        return (x.flatten(0, 1) @ matrix[0]).view(*x.shape[:-1], matrix.shape[-1])
    return torch.bmm(x.transpose(0, 1), matrix).transpose(0, 1)


def _adjacent(leaf: Tensor) -> Tensor:
    """Products of the preterminals' weights of neighbours, [L-1, B, P*P]."""
    return (leaf[:-1, :, :, None] * leaf[1:, :, None, :]).flatten(2)


def inside(
    root: Tensor,
    rules: Tensor,
    leaves: Tensor,
    spans: Tensor | None,
    lengths: Tensor,
    *,
    possible: Tensor | None = None,
    boolean: bool = False,
    keep: bool = True,
) -> Chart:
    """The chart of ``root [B,N]``, ``rules [1 or B,N,N+P,N+P]``, ``leaves [B,L,P]``, ``spans [B,L,L,N]``
    log potentials.

    ``boolean`` replaces every positive weight by one; its ``left`` is the ``possible`` of a grammar with
    -inf, whose zeros are not taken for underflow. ``keep`` saves what ``outside`` needs.
    Cost: O(B L³ N² + B L² N³ + B L N² P) time, O(B L² N²) memory.
    """
    batch, size, preterminals = leaves.shape
    n = root.shape[-1]
    new = leaves.new_zeros
    blocks = _blocks(rules, n)
    leaf, leaf_scale = _scaled(leaves.transpose(0, 1).contiguous(), (-1,))
    leaf_scale = leaf_scale.squeeze(-1)
    chart = Chart(
        left=new(size, batch, size + 1, n),
        right=new(size, batch, size + 1, n),
        left_scale=new(size, batch, size + 1),
        right_scale=new(size, batch, size + 1),
        leaf=leaf,
        leaf_scale=leaf_scale,
        leaf_left=_times(leaf, blocks.leaf_left).reshape(size, batch, n, n),
        leaf_right=_times(leaf, blocks.leaf_right).reshape(size, batch, n, n),
        pairs=[leaf[:0]] * 4,
        shares=[(), (), ()],
        slope=[leaf[:0]] * 2,
        rules=blocks,
        total=new(batch),
        posterior=new(batch, n),
        reliable=torch.ones(batch, dtype=torch.bool, device=leaves.device),
    )
    smallest = torch.finfo(leaves.dtype)
    threshold = smallest.tiny * 16 * (size * n * n + 2 * preterminals * (n + preterminals)) / smallest.eps
    doubtful = torch.zeros_like(chart.reliable)
    for w in range(2, size + 1):
        count = size - w + 1
        start, end = slice(0, count), slice(w - 1, size)
        if w == 2:
            peak = leaf_scale[:-1] + leaf_scale[1:]
            value = _times(_adjacent(leaf), blocks.outer.transpose(1, 2))
        else:
            first = leaf_scale[start] + chart.right_scale[end, :, size - w + 1]
            last = leaf_scale[end] + chart.left_scale[start, :, w - 1]
            peak = torch.maximum(first, last)
            if w > 3:
                u, v = slice(2, w - 1), slice(size - w + 2, size - 1)
                scales = chart.left_scale[start, :, u] + chart.right_scale[end, :, v]
                peak = torch.maximum(peak, scales.amax(-1))
            peak = torch.where(peak == -math.inf, 0.0, peak)
            shares = [(first - peak).exp()[..., None], (last - peak).exp()[..., None]]
            of_right = (shares[0] * chart.right[end, :, size - w + 1])[..., None, :] @ chart.leaf_left[start]
            of_left = (shares[1] * chart.left[start, :, w - 1])[..., None, :] @ chart.leaf_right[end]
            value = (of_right + of_left).squeeze(-2)
            if w > 3:
                shares.append((scales - peak[..., None]).exp()[..., None])
                pairs = (chart.left[start, :, u] * shares[2]).transpose(2, 3) @ chart.right[end, :, v]
                pairs = pairs.view(count, batch, n * n)
                value = value + _times(pairs, blocks.inner.transpose(1, 2))
                if keep:
                    chart.pairs.append(pairs)
            if keep:
                chart.shares.append(tuple(shares))
        factor = None
        if spans is not None:
            factor, top = _scaled(spans.diagonal(w - 1, 1, 2).permute(2, 0, 1), (-1,))
            value, peak = value * factor, peak + top.squeeze(-1)
        if boolean:
            value = (value > 0).to(value.dtype)
        else:
            within = torch.arange(w - 1, size, device=leaves.device)[:, None] < lengths
            small = value < threshold
            if possible is not None:
                small &= possible[start, :, w] > 0
            doubtful |= (small.any(-1) & within).any(0)
        largest = value.amax(-1, keepdim=True)
        inverse = torch.where(largest >= smallest.tiny, largest, 1.0).reciprocal()
        scale = largest.log().squeeze(-1) + peak + blocks.peak
        if keep:
            chart.slope.append(inverse if factor is None else factor * inverse)
        value = value * inverse
        chart.left[start, :, w], chart.right[end, :, size - w] = value, value
        chart.left_scale[start, :, w], chart.right_scale[end, :, size - w] = scale, scale
    whole = torch.zeros_like(lengths), torch.arange(batch, device=leaves.device), lengths
    weight = root + chart.left[whole].log()
    total = logsumexp(weight)
    share = torch.where(total[:, None] > -math.inf, (weight - total[:, None]).exp(), 0.0)
    return chart._replace(
        total=total + chart.left_scale[whole], posterior=share.nan_to_num(0.0), reliable=~doubtful
    )


def outside(
    chart: Chart, lengths: Tensor, grad: Tensor, want_spans: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of Σ_b grad[b]·total[b] by root, rules, leaves and spans, and which sentences' are reliable.

    What underflows here is missing from the expected number of spans, which is known to be length - 1. The
    gradients of an unreliable sentence are left out. Cost: about three times that of ``inside``.
    """
    size, batch, _, n = chart.left.shape
    blocks = chart.rules
    grad_left, grad_right = torch.zeros_like(chart.left), torch.zeros_like(chart.right)
    raw: list[Tensor] = [chart.leaf[:0]] * (size + 1)
    via_left, via_right = torch.zeros_like(chart.left), torch.zeros_like(chart.right)
    leaf_left, leaf_right = (x.transpose(2, 3).contiguous() for x in (chart.leaf_left, chart.leaf_right))
    spans = chart.left.new_zeros(batch, size, size, n) if want_spans else None
    found = torch.zeros_like(chart.total)
    for w in range(size, 1, -1):
        count = size - w + 1
        start, end = slice(0, count), slice(w - 1, size)
        value = chart.left[start, :, w]
        g = grad_left[start, :, w] + grad_right[end, :, size - w]
        top = torch.where(value[0] > 0, chart.posterior / value[0], 0.0)
        g[0] += torch.where((lengths == w)[:, None], top, 0.0)
        g = torch.where(value > 0, g, 0.0)
        share = g * value
        found += share.sum((0, 2))
        if spans is not None:
            spans.diagonal(w - 1, 1, 2).copy_(share.permute(1, 2, 0))
        raw[w] = g = g * chart.slope[w]
        if w > 2:
            first, last = g * chart.shares[w][0], g * chart.shares[w][1]
            via_left[start, :, w], via_right[end, :, size - w] = first, last
            grad_right[end, :, size - w + 1] += (first[..., None, :] @ leaf_left[start]).squeeze(-2)
            grad_left[start, :, w - 1] += (last[..., None, :] @ leaf_right[end]).squeeze(-2)
        if w > 3:
            u, v = slice(2, w - 1), slice(size - w + 2, size - 1)
            back = _times(g, blocks.inner).reshape(count, batch, n, n)
            both = chart.shares[w][2]
            grad_left[start, :, u] += (chart.right[end, :, v] * both) @ back.transpose(2, 3)
            grad_right[end, :, v] += (chart.left[start, :, u] * both) @ back
    nodes = torch.where(chart.total > -math.inf, lengths - 1, 0)
    reliable = chart.reliable & ((found - nodes).abs() <= lengths * torch.finfo(found.dtype).eps ** 0.75)
    scale = torch.where(reliable, grad, 0.0)

    def scaled(x: Tensor, dim: int) -> Tensor:
        shape = (-1,) + (1,) * (x.dim() - 1 - dim)
        x = x * scale.view(shape)
        return x if reliable.all() else torch.where(reliable.view(shape), x, 0.0)

    to_leaf_left, to_leaf_right = torch.zeros_like(chart.leaf_left), torch.zeros_like(chart.leaf_right)
    to_leaf_left[:-1] = chart.left[1:, :, 2:-1].transpose(2, 3) @ scaled(via_left[:-1, :, 3:], 1)
    to_leaf_right[1:] = chart.right[:-1, :, 1:-2].transpose(2, 3) @ scaled(via_right[1:, :, :-3], 1)
    by_span = [scaled(x, 1) for x in raw[2:]]
    rules, leaves = _by_rules(chart, by_span, to_leaf_left.flatten(2), to_leaf_right.flatten(2))
    root = scaled(chart.posterior, 0)
    return root, rules, leaves, None if spans is None else scaled(spans, 0), reliable


def _by_rules(
    chart: Chart, raw: list[Tensor], to_leaf_left: Tensor, to_leaf_right: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by rules and leaves from those by the unscaled spans, widths 2 and up, and by the leaves'
    matrices.
    """
    blocks, leaf = chart.rules, chart.leaf
    groups, p, _ = blocks.leaf_left.shape
    n = blocks.inner.shape[1]

    def summed(x: Tensor, y: Tensor) -> Tensor:
        """Σ over positions, and over the batch where it shares the grammar, of outer products: [G, K, M]."""
        if groups == 1:
            return (x.flatten(0, 1).t() @ y.flatten(0, 1)).unsqueeze(0)
        return x.permute(1, 2, 0) @ y.transpose(0, 1)

    rules = leaf.new_zeros(groups, n, n + p, n + p)
    if len(raw) > 2:
        total = summed(raw[2], chart.pairs[4])
        for g, pairs in zip(raw[3:], chart.pairs[5:], strict=True):
            total += summed(g, pairs)
        rules[..., :n, :n] = (total * blocks.inner).view(groups, n, n, n)
    used = (summed(leaf, to_leaf_left) * blocks.leaf_left).view(groups, p, n, n)
    rules[..., n:, :n] = used.permute(0, 3, 1, 2)
    used = (summed(leaf, to_leaf_right) * blocks.leaf_right).view(groups, p, n, n)
    rules[..., :n, n:] = used.permute(0, 3, 2, 1)
    leaves = _times(to_leaf_left, blocks.leaf_left.transpose(1, 2))
    leaves += _times(to_leaf_right, blocks.leaf_right.transpose(1, 2))
    if raw:
        rules[..., n:, n:] = (summed(raw[0], _adjacent(leaf)) * blocks.outer).view(groups, n, p, p)
        both = _times(raw[0], blocks.outer).reshape(*raw[0].shape[:2], p, p)
        leaves[:-1] += (both @ leaf[1:, :, :, None]).squeeze(-1)
        leaves[1:] += (leaf[:-1, :, None, :] @ both).squeeze(-2)
    return rules, (leaves * leaf).transpose(0, 1)

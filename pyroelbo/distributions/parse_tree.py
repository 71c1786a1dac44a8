"""Distributions over labelled binary trees: the parses of a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints
from torch.utils.checkpoint import checkpoint

from pyroelbo.distributions._inside_outside import inside, outside
from pyroelbo.distributions.checks import (
    check_finite_or_minus_inf,
    check_lengths,
    refuse_transforms,
)
from pyroelbo.distributions.semiring import Log, Max, Semiring, choose
from pyroelbo.distributions.structured import StructuredDistribution, batch_shape
from pyroelbo.numerics import logsumexp

__all__ = ["ParseParts", "ParseTree"]


class ParseParts(NamedTuple):
    """Parts of a labelled binary tree: root label, rules, and labels of leaves and of inner nodes."""

    root: Tensor
    rules: Tensor
    leaves: Tensor
    spans: Tensor


class ParseTree(StructuredDistribution):
    """p(tree) = exp( root[top] + Σ_rules rules[parent, left, right] + Σ_i leaves_i[label] + Σ_nodes
    spans_ij[label] ) / Z.

    The trees are all binary trees over L words with N labels for inner nodes and P for leaves:
    ``root [*B,N]``, ``rules [*B,N,N+P,N+P]`` (labels N..N+P-1 are the leaves'), ``leaves [*B,L,P]``,
    ``spans [*B,L,L,N]`` (first and last word of the node; zeros unless given): unnormalized log potentials,
    -inf allowed, rank(*B) = root.dim() - 1, batch sizes broadcast. ``lengths [*B]`` are those of padded
    sentences. Values are LongTensor charts ``[*B,L,L]``: at (i, j) the label of the node over words i..j, -1
    if there is none. A tree has at least two leaves. Parts are ``ParseParts``: ``rules`` counts each rule's
    uses, the marginals of ``spans`` are the probabilities of labelled spans.

    Cost: O(B·(L³N² + L²N³ + L²N²P)) time, O(B·L·N·(L+N+P)) memory, also for the
    gradient.
    Source: Baker (1979), *Trainable grammars for speech recognition*; Eisner (2016) for outside by
    differentiation.
    """

    lengths: Tensor

    def __init__(
        self,
        root: Tensor,
        rules: Tensor,
        leaves: Tensor,
        spans: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        refuse_transforms(root=root, rules=rules, leaves=leaves)
        rank = root.dim() - 1
        labels = root.shape[-1]
        words, leaf_labels = leaves.shape[-2:]
        every = labels + leaf_labels
        if spans is None:
            spans = root.new_zeros(()).expand(*(1,) * rank, words, words, labels)
        if (
            leaves.dim() != rank + 2
            or rules.shape[rank:] != (labels, every, every)
            or spans.shape[rank:] != (words, words, labels)
        ):
            raise ValueError(
                "root, rules, leaves, spans: expected shapes [*B,N], [*B,N,N+P,N+P], [*B,L,P] and "
                "[*B,L,L,N], got "
                f"{tuple(root.shape)}, {tuple(rules.shape)}, {tuple(leaves.shape)} and {tuple(spans.shape)}"
            )
        parts = ParseParts(root, rules, leaves, spans)
        batch = batch_shape(rank, [x.shape[:rank] for x in parts], lengths)
        if lengths is None:
            lengths = torch.full(batch, words, device=root.device)
        self.lengths = lengths.expand(batch)
        super().__init__(parts, batch, (words, words), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(root=root, rules=rules, leaves=leaves, spans=spans)
        check_lengths(lengths, words)

    @property
    def support(self) -> Any:
        labels = self.potentials[1].shape[-1]
        return constraints.independent(constraints.integer_interval(-1, labels - 1), 2)

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        return _total(parts, self.lengths, semiring)

    # ---- trees and parts

    def to_parts(self, z: Tensor) -> ParseParts:
        root, rules, _, _ = self.potentials
        dtype, n, every = root.dtype, root.shape[-1], rules.shape[-1]
        words = self.event_shape[0]
        shape = torch.broadcast_shapes(z.shape[:-2], self.batch_shape)
        z = z.expand(*shape, words, words).reshape(-1, words, words)
        lengths = self.lengths.expand(shape).reshape(-1)
        rows = torch.arange(z.shape[0], device=z.device)
        top = F.one_hot(z[rows, 0, lengths - 1].clamp(0, n - 1), n).to(dtype)
        tree, first, split, last = branches(z)
        used = z.new_zeros(z.shape[0], n, every, every, dtype=dtype)
        labels = z[tree, first, last], z[tree, first, split], z[tree, split + 1, last]
        fits = labels[0] < n
        used.index_put_(tuple(x[fits] for x in (tree, *labels)), used.new_ones(()), accumulate=True)
        leaf = F.one_hot((z.diagonal(0, 1, 2) - n).clamp(0, every - n - 1), every - n).to(dtype)
        leaf = leaf * (torch.arange(words, device=z.device) < lengths[:, None])[..., None]
        inner = (z >= 0) & (z < n)
        node = F.one_hot(torch.where(inner, z, 0), n).to(dtype) * inner[..., None]
        return ParseParts(*(x.view(*shape, *x.shape[1:]) for x in (top, used, leaf, node)))

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        _, _, leaves, spans = parts
        z = torch.where(spans.sum(-1) > 0.5, spans.argmax(-1), -1)
        leaf = torch.where(leaves.sum(-1) > 0.5, leaves.argmax(-1) + spans.shape[-1], -1)
        z.diagonal(0, -2, -1).copy_(leaf)
        return z

    def log_weight(self, value: Tensor) -> Tensor:
        """The unnormalized log weight of a chart; -inf unless it is a tree over the whole sentence."""
        return torch.where(self._is_tree(value), super().log_weight(value), -math.inf)

    def _is_tree(self, z: Tensor) -> Tensor:
        words = self.event_shape[0]
        shape = torch.broadcast_shapes(z.shape[:-2], self.batch_shape)
        flat = z.expand(*shape, words, words).reshape(-1, words, words)
        good = is_tree(flat, self.lengths.expand(shape).reshape(-1), self.potentials[0].shape[-1])
        return good.view(shape)

    # ---- fast versions

    def _log_partition(self, parts: tuple[Tensor, ...]) -> Tensor:
        flat = self._flat(parts)
        return _LogPartition.apply(self.lengths.reshape(-1), *flat).view(self.batch_shape)

    def _flat(self, parts: tuple[Tensor, ...]) -> list[Tensor]:
        """Flatten to one batch dimension; a grammar shared by the batch keeps size 1 there."""
        rank = len(self.batch_shape)
        rules = parts[1]
        if any(size > 1 for size in rules.shape[:rank]):
            rules = rules.expand(*self.batch_shape, *rules.shape[rank:])
        rest = [
            x.expand(*self.batch_shape, *x.shape[rank:]).flatten(0, rank - 1) if rank else x[None]
            for x in parts
        ]
        rest[1] = rules.reshape(-1, *rules.shape[rank:])
        return rest

    def _mode(self) -> Tensor:
        flat = self._flat(tuple(x.detach() for x in self.potentials))
        z = _descend(flat, _charts(tuple(flat), Max()), self.lengths.reshape(-1), None)
        return z.view(*self.batch_shape, *self.event_shape)

    def _draw(self, sample_shape: torch.Size) -> Tensor:
        flat = [x.detach().double() for x in self._flat(self.potentials)]
        lengths = self.lengths.reshape(-1)
        z = _descend(flat, _log_charts(flat, lengths), lengths, sample_shape.numel())
        return z.view(*sample_shape, *self.batch_shape, *self.event_shape)


def is_tree(z: Tensor, lengths: Tensor, n: int) -> Tensor:
    """Which charts ``z [B,L,L]`` are binary trees over ``lengths`` words, inner labels below ``n``."""
    words = z.shape[-1]
    index = torch.arange(words, device=z.device)
    node = z >= 0
    leaf = index[:, None] == index
    inside_sentence = (index < lengths[:, None])[:, None, :] & (index[:, None] <= index)
    right_label = torch.where(leaf, z >= n, z < n)
    tree, first, _, last = branches(z)
    splits = torch.zeros_like(z).index_put_((tree, first, last), z.new_ones(()), accumulate=True)
    good = (~node | (inside_sentence & right_label & (leaf | (splits == 1)))).all(-1).all(-1)
    rows = torch.arange(len(z), device=z.device)
    return good & node[rows, 0, lengths - 1] & (node.sum((-1, -2)) == 2 * lengths - 1) & (lengths > 1)


def branches(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every (tree, first, split, last) such that (first, last), (first, split) and (split + 1, last) are
    nodes.
    """
    node = z >= 0
    words = z.shape[-1]
    index = torch.arange(words - 1, device=z.device)
    right = node[:, 1:, :].transpose(1, 2)
    both = node[:, :, None, :-1] & right[:, None, :, :]
    both &= node[:, :, :, None] & (index >= torch.arange(words, device=z.device)[:, None, None])
    tree, first, last, split = both.nonzero(as_tuple=True)
    within = split < last
    return tree[within], first[within], split[within], last[within]


def _charts(parts: tuple[Tensor, ...], semiring: Semiring) -> list[Tensor]:
    """Values of all spans by width: [..., L, P] for width 1, [..., L-w+1, N] for width w (entry 0 is
    unused).
    """
    _, rules, leaves, spans = parts
    n = rules.shape[-3]
    words = leaves.shape[-2]
    inner, outer = rules[..., :n, :n].flatten(-2), rules[..., n:, n:].flatten(-2)
    mixed = torch.cat([rules[..., n:, :n].flatten(-2), rules[..., :n, n:].flatten(-2)], -1)
    every = torch.cat([mixed, inner], -1)
    charts = [leaves, leaves]

    def pairs(left: Tensor, right: Tensor) -> Tensor:
        return semiring.mul(left.unsqueeze(-1), right.unsqueeze(-2)).flatten(-2)

    for w in range(2, words + 1):
        count = words - w + 1
        if w == 2:
            children, used = pairs(leaves[..., :-1, :], leaves[..., 1:, :]), outer
        else:
            rest, used = charts[w - 1], mixed if w == 3 else every
            found = [
                pairs(leaves[..., :count, :], rest[..., 1:, :]),
                pairs(rest[..., :-1, :], leaves[..., w - 1 :, :]),
            ]
            if w > 3:
                left = torch.stack([charts[u][..., :count, :] for u in range(2, w - 1)], -1)
                right = torch.stack([charts[w - u][..., u:, :] for u in range(2, w - 1)], -1)
                found.append(semiring.dot(left.unsqueeze(-2), right.unsqueeze(-3), -1).flatten(-2))
            children = torch.cat(found, -1)
        value = semiring.dot(children.unsqueeze(-2), used.unsqueeze(-3), -1)
        charts.append(semiring.mul(value, spans.diagonal(w - 1, -3, -2).transpose(-1, -2)))
    return charts


def _total(parts: tuple[Tensor, ...], lengths: Tensor, semiring: Semiring) -> Tensor:
    top = parts[0]
    for w, chart in enumerate(_charts(parts, semiring)[2:], 2):
        whole = semiring.mul(parts[0], chart[..., 0, :])
        top = whole if w == 2 else torch.where((lengths >= w)[..., None], whole, top)
    alone = torch.where(lengths > 1, 0.0, -math.inf).to(parts[0].dtype)
    return semiring.mul(semiring.sum(top, -1), semiring.lift(alone))


class _Lean(Log):
    """The log semiring, with products recomputed in the backward pass instead of kept."""

    def dot(self, a: Tensor, b: Tensor, dim: int) -> Tensor:
        return checkpoint(super().dot, a, b, dim, use_reentrant=False)


def _reliable_inside(flat: Sequence[Tensor], lengths: Tensor):
    root, rules, leaves, spans = flat
    plain = spans.numel() == 0 or (not any(spans.stride()) and not spans.flatten()[0])
    possible = None
    if any(
        x.numel() and x.amin() == -math.inf for x in ((rules, leaves) if plain else (rules, leaves, spans))
    ):
        top, steps, ends, nodes = (torch.where(x == -math.inf, x, 0.0).float() for x in flat)
        possible = inside(top, steps, ends, None if plain else nodes, lengths, boolean=True).left
    return inside(root, rules, leaves, None if plain else spans, lengths, possible=possible)


def _log_charts(flat: Sequence[Tensor], lengths: Tensor) -> list[Tensor]:
    chart = _reliable_inside(flat, lengths)
    if not chart.reliable.all():
        return _charts(tuple(flat), Log())
    words = flat[2].shape[1]
    weight = chart.left[..., : flat[0].shape[-1]]
    value = (weight.log() + chart.left_scale[..., None]).transpose(0, 1)
    return [flat[2], flat[2]] + [value[:, : words - w + 1, w] for w in range(2, words + 1)]


class _LogPartition(torch.autograd.Function):
    """ln Z by scaled charts; sentences beyond their range are recomputed in float64, and if necessary in log
    space.
    """

    @staticmethod
    def forward(ctx, lengths, *flat):
        keep = any(ctx.needs_input_grad)
        chart = _reliable_inside(flat, lengths)
        total = chart.total
        ctx.rescued = []
        bad = (~chart.reliable).nonzero()[:, 0]
        if len(bad):
            ctx.rescued.append(_rescue(bad, lengths, flat))
            total = total.index_copy(0, bad, ctx.rescued[0][2].detach().to(total.dtype))
        if keep:
            ctx.chart = chart
            ctx.save_for_backward(lengths, *flat)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        lengths, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():
            total = _total(tuple(flat), lengths, _Lean())
            wanted = [x for x in flat if x.requires_grad]
            found = iter(torch.autograd.grad(total, wanted, grad, create_graph=True))
            return None, *(next(found) if x.requires_grad else None for x in flat)
        root, rules, leaves, spans, reliable = outside(ctx.chart, lengths, grad, ctx.needs_input_grad[4])
        rescued = list(ctx.rescued)
        lost = (ctx.chart.reliable & ~reliable).nonzero()[:, 0]
        if len(lost):
            rescued.append(_rescue(lost, lengths, flat))
        for index, parts, total in rescued:
            exact = torch.autograd.grad(total, parts, grad[index].to(total.dtype), retain_graph=True)
            for whole, part in zip((root, rules, leaves, spans), exact, strict=True):
                if whole is not None:
                    rows = index if len(whole) == len(grad) else torch.zeros_like(index[:1])
                    whole.index_add_(0, rows, part.to(whole.dtype))
        return None, root, rules, leaves, spans


def _rescue(index: Tensor, lengths: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Recompute the sentences at ``index``: their potentials as leaves, and ln Z as a function of them."""
    batch = len(lengths)
    parts = [(x[index] if len(x) == batch else x).detach().double().requires_grad_() for x in flat]
    with torch.enable_grad():
        if flat[0].dtype == torch.float64:
            return index, parts, _total(tuple(parts), lengths[index], _Lean())
        return index, parts, _LogPartition.apply(lengths[index], *parts)


def _descend(flat: Sequence[Tensor], charts: list[Tensor], lengths: Tensor, draws: int | None) -> Tensor:
    """Trees from the top down, all in step: the best ones, or ``draws`` samples; [draws * B, L, L]."""
    root, rules, leaves, _ = flat
    batch, words, p = leaves.shape
    n = root.shape[-1]
    chart = leaves.new_full((batch, words + 1, words, n + p), -math.inf)
    chart[:, :-1].diagonal(0, 1, 2).copy_(F.pad(leaves, (n, 0), value=-math.inf).transpose(1, 2))
    for w in range(2, words + 1):
        chart[:, :-1, :, :n].diagonal(w - 1, 1, 2).copy_(charts[w].transpose(1, 2))

    def pick(score: Tensor) -> Tensor:
        return score.argmax(-1) if draws is None else choose(score, torch.rand_like(score[..., 0]))

    tree = torch.arange((draws or 1) * batch, device=root.device)
    sentence = tree % batch
    first, last = torch.zeros_like(tree), lengths[sentence] - 1
    label = pick(root[sentence] + chart[sentence, first, last, :n])
    z = tree.new_full((len(tree), words, words), -1)
    z[tree, first, last] = label
    while len(tree):
        split, left, right = _choose_rule(
            chart, rules, tree % batch, first, last, label, pick, draws is not None
        )
        tree = torch.cat([tree, tree])
        first, last = torch.cat([first, split + 1]), torch.cat([split, last])
        label = torch.cat([left, right])
        z[tree, first, last] = label
        wide = last > first
        tree, first, last, label = tree[wide], first[wide], last[wide], label[wide]
    return z


def _choose_rule(chart, rules, sentence, first, last, label, pick, sums):
    """Split and children's labels of nodes."""
    every, splits = chart.shape[-1], int((last - first).max())
    offset = torch.arange(splits, device=first.device)
    found = []
    room = max(1, 2**24 // (every * (every + 4 * splits)))
    for s, i, j, a in zip(*(x.split(room) for x in (sentence, first, last, label)), strict=True):
        at = i[:, None] + offset
        ends = (at < j[:, None])[..., None]
        at = at.clamp(max=chart.shape[2] - 1)
        left = chart[s[:, None], i[:, None], at]
        right = torch.where(ends, chart[s[:, None], at + 1, j[:, None]], -math.inf)
        rule = rules[s if len(rules) > 1 else torch.zeros_like(s), a]
        choice, safe = torch.zeros_like(s), torch.zeros_like(s, dtype=torch.bool)
        if sums:
            choice, safe = _choose_by_products(left, right, rule, pick)
        for rows in (~safe).nonzero()[:, 0].split(max(1, 2**24 // (splits * every * every))):
            score = left[rows].unsqueeze(-1) + rule[rows].unsqueeze(1) + right[rows].unsqueeze(-2)
            choice[rows] = pick(score.flatten(1))
        split = torch.minimum(i + choice // (every * every), j - 1)
        found.append((split, choice // every % every, choice % every))
    return (torch.cat(x) for x in zip(*found, strict=True))


def _choose_by_products(left: Tensor, right: Tensor, rule: Tensor, pick) -> tuple[Tensor, Tensor]:
    """Draw split and right label by sums over left labels, then the left label; also whether no term was
    lost.
    """
    every = rule.shape[-1]
    top, peak = left.amax(-1, keepdim=True), rule.amax((-1, -2), keepdim=True)
    top, peak = torch.where(top == -math.inf, 0.0, top), torch.where(peak == -math.inf, 0.0, peak)
    summed = (left - top).exp() @ (rule - peak).exp()
    reach = (top + right).flatten(1)
    score = summed.log().flatten(1) + reach
    lost = reach.amax(-1) + math.log(every * torch.finfo(left.dtype).tiny)
    choice = pick(score)
    split, label = choice // every, choice % every
    rows = torch.arange(len(choice), device=choice.device)
    other = pick(left[rows, split] + rule[rows, :, label])
    return (split * every + other) * every + label, logsumexp(score) > lost + 50

"""Probabilistic context-free grammars with binary rules."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions.checks import (
    check_finite_or_minus_inf,
    check_index,
    check_integers,
    first_index,
    refuse_transforms,
)
from pyroelbo.distributions.parse_tree import ParseTree, branches, is_tree
from pyroelbo.distributions.semiring import choose
from pyroelbo.numerics import logsumexp

__all__ = ["PCFG", "Derivation", "TooLong"]


class TooLong(ValueError):
    """A draw of a grammar has more words than there is room for."""


def _log_softmax(logits: Tensor, rank: int) -> Tensor:
    """Normalize over all dimensions but the first ``rank``; a row of -inf stays -inf."""
    flat = logits.flatten(rank)
    total = logsumexp(flat, keepdim=True)
    return (flat - torch.where(total == -math.inf, 0.0, total)).view(logits.shape)


def without_padding(y: Tensor) -> Tensor:
    """``y [*, L]`` without the trailing columns that are all -1."""
    used = (y.unsqueeze(0).flatten(0, -2) != -1).any(0).nonzero()
    return y[..., : int(used[-1]) + 1 if len(used) else min(1, y.shape[-1])]


def check_padded(name: str, y: Tensor, count: int) -> None:
    """Refuse labels outside [0, count), and -1 anywhere but at the end."""
    check_integers(name, y)
    bad = (y < -1) | (y >= count)
    bad[..., 1:] |= (y[..., 1:] >= 0) & (y[..., :-1] < 0)
    if bad.any():
        raise ValueError(
            f"{name}: expected integers in [0, {count - 1}], then -1 to the end, got {y[bad][0].item()} at "
            f"index "
            f"{first_index(bad)}"
        )


class PCFG(TorchDistribution):
    """p(y) = Σ_trees p(tree, y) of a probabilistic context-free grammar with binary rules and preterminals.

    N nonterminals, P preterminals, V words: ``root [*B,N]`` (start), ``rules [*B,N,N+P,N+P]`` (parent,
    left, right; softmax over the last two together) and ``preterminals [*B,P,V]`` are logits, normalized
    inside; -inf allowed. Symbols N..N+P-1 are the preterminals. ``y`` is a LongTensor ``[*B,L]``, padded
    with -1. A sentence has at least two words. ``posterior(y)`` is a ``ParseTree``: its marginals are
    expected rule counts and labelled spans.

    ``sample`` draws sentences padded to ``max_length``, and raises ValueError instead of truncating one: in a
    supercritical grammar some derivations never end. ``log_prob`` accepts any length.

    Cost: that of ``ParseTree``. Source: Baker (1979); Kim, Dyer, Rush (2019), *Compound PCFGs*.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        root: Tensor,
        rules: Tensor,
        preterminals: Tensor,
        max_length: int = 100,
        validate_args: bool | None = None,
    ) -> None:
        refuse_transforms(root=root, rules=rules, preterminals=preterminals)
        rank = root.dim() - 1
        n, p = root.shape[-1], preterminals.shape[-2]
        if preterminals.dim() != rank + 2 or rules.shape[rank:] != (n, n + p, n + p):
            raise ValueError(
                "root, rules, preterminals: expected shapes [*B,N], [*B,N,N+P,N+P] and [*B,P,V], got "
                f"{tuple(root.shape)}, {tuple(rules.shape)} and {tuple(preterminals.shape)}"
            )
        self.root = _log_softmax(root, rank)
        self.rules = _log_softmax(rules, rank + 1)
        self.preterminals = _log_softmax(preterminals, rank + 1)
        batch_shape = torch.broadcast_shapes(root.shape[:-1], rules.shape[:rank], preterminals.shape[:rank])
        super().__init__(batch_shape, torch.Size((max_length,)), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(root=root, rules=rules, preterminals=preterminals)
            closed = (root == -math.inf).all(-1)
            if closed.any():
                raise ValueError(
                    f"root: expected a finite logit, got none at batch index {first_index(closed)}"
                )

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-1, self.preterminals.shape[-1] - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PCFG:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        pad = (1,) * (len(new._batch_shape) - len(self._batch_shape))
        for name in ("root", "rules", "preterminals"):
            old = getattr(self, name)
            setattr(new, name, old.view(pad + old.shape))
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(y), ``[*sample, *B]``; -inf if no tree yields y."""
        return self.posterior(without_padding(value)).log_partition

    def posterior(self, y: Tensor) -> ParseTree:
        """p(tree | y); its ``log_partition`` is ln p(y)."""
        words = self.preterminals.shape[-1]
        check_index("y", y, -1, words - 1)
        present = y >= 0
        lengths = present.sum(-1)
        if self._validate_args:
            check_padded("y", y, words)
            if (lengths == 0).any():
                raise ValueError(
                    f"y: expected at least one word, got none at index {first_index(lengths == 0)}"
                )
        shape = torch.broadcast_shapes(y.shape[:-1], self.batch_shape)
        pad = (1,) * (len(shape) - len(self.batch_shape))
        root, rules, table = (x.view(pad + x.shape) for x in (self.root, self.rules, self.preterminals))
        token = y.clamp(min=0)
        if all(size == 1 for size in table.shape[:-2]):
            leaves = F.embedding(token, table.reshape(table.shape[-2:]).t())
        else:
            index = token.expand(*shape, -1).unsqueeze(-2).expand(*shape, table.shape[-2], -1)
            leaves = table.expand(*shape, *table.shape[-2:]).gather(-1, index).transpose(-1, -2)
        leaves = torch.where(present[..., None], leaves, 0.0)
        leaves = leaves.view((1,) * (len(shape) + 2 - leaves.dim()) + leaves.shape)
        # a sentence without words (only unvalidated) has no tree, like one of a single word
        tree = ParseTree(root, rules, leaves, lengths=lengths.clamp(min=1).expand(shape), validate_args=False)
        tree._validate_args = self._validate_args
        return tree

    @property
    def prior(self) -> Derivation:
        """p(tree): derivations without words."""
        prior = Derivation(self.root, self.rules, self.event_shape[0], validate_args=False)
        return prior.expand(self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Sentences ``[*sample, *B, max_length]``, padded with -1, by leftmost derivations."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            tree, first, last, label = _derive(self.root, self.rules, shape[:-1], shape[-1])
            leaf = first == last
            table, index = _flat_batch(self.preterminals, 2, shape[:-1])
            words = _gumbel(table[index[tree[leaf]], label[leaf] - self.root.shape[-1]])
            y = label.new_full((shape[:-1].numel(), shape[-1]), -1)
            y[tree[leaf], first[leaf]] = words
        return y.view(shape)


class Derivation(TorchDistribution):
    """p(tree) = softmax(root)[top] Π_rules softmax(rules)[parent][left, right]: trees of every size, no words
    yet.

    ``root [*B,N]`` and ``rules [*B,N,N+P,N+P]`` are logits, as in :class:`PCFG`. Values are charts, as in
    :class:`ParseTree`, ``[*B,L,L]`` with L = ``max_length``: a tree with fewer leaves fills the upper left
    corner. A chart that is not a tree has probability zero; trees with more than L leaves have the remaining
    mass, and ``sample`` raises ValueError for them. Cost: O(L³) for each chart, in bytes.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self, root: Tensor, rules: Tensor, max_length: int = 100, validate_args: bool | None = None
    ) -> None:
        rank = root.dim() - 1
        self.root, self.rules = _log_softmax(root, rank), _log_softmax(rules, rank + 1)
        batch_shape = torch.broadcast_shapes(root.shape[:-1], rules.shape[:rank])
        super().__init__(batch_shape, torch.Size((max_length, max_length)), validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-1, self.rules.shape[-1] - 1), 2)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Derivation:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(tree), ``[*sample, *B]``; -inf for a chart that is not a tree."""
        if self._validate_args:
            self._validate_sample(value)
        words, n, every = self.event_shape[0], self.root.shape[-1], self.rules.shape[-1]
        shape = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        z = value.expand(*shape, words, words).reshape(-1, words, words)
        lengths = (z.diagonal(0, 1, 2) >= 0).sum(-1)
        (root, at), (rules, of) = _flat_batch(self.root, 1, shape), _flat_batch(self.rules, 3, shape)
        tree, first, split, last = branches(z)
        parent = z[tree, first, last].clamp(max=n - 1)
        left, right = (x.clamp(max=every - 1) for x in (z[tree, first, split], z[tree, split + 1, last]))
        top = z[torch.arange(len(z), device=z.device), 0, lengths - 1].clamp(0, n - 1)
        log_prob = root[at, top].index_add(0, tree, rules[of[tree], parent, left, right])
        return torch.where(is_tree(z, lengths, n), log_prob, -math.inf).view(shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Charts ``[*sample, *B, L, L]``, by leftmost derivations; TooLong if one outgrows L."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            tree, first, last, label = _derive(self.root, self.rules, shape[:-2], shape[-1])
            z = label.new_full((shape[:-2].numel(), *shape[-2:]), -1)
            z[tree, first, last] = label
        return z.view(shape)


def _flat_batch(x: Tensor, event_dim: int, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``x`` with flat batch dimensions, and the index of its row for each element of the larger batch
    ``shape``.
    """
    batch = x.shape[: x.dim() - event_dim]
    index = torch.arange(batch.numel(), device=x.device).view(batch).expand(torch.Size(shape))
    return x.reshape(-1, *x.shape[x.dim() - event_dim :]), index.reshape(-1)


def _derive(root: Tensor, rules: Tensor, shape: torch.Size, longest: int) -> tuple[Tensor, ...]:
    """Leftmost derivations, in parallel: (tree, first, last, label) of all nodes."""
    n, every = root.shape[-1], rules.shape[-1]
    (root, at), (rules, of) = _flat_batch(root, 1, shape), _flat_batch(rules.flatten(-2), 2, shape)
    rows = torch.arange(shape.numel(), device=root.device)
    stack = rows.new_full((len(rows), 2 * longest + 1), -1)
    stack[:, 0] = _gumbel(root[at])
    height, length, waiting = torch.ones_like(rows), torch.zeros_like(rows), torch.ones_like(rows)
    nodes = []
    while len(rows):
        top = stack[rows, height[rows] - 1]
        height[rows] -= 1
        # the end of a node is on the stack below its children, as every + label * longest + first word
        ended, word, opened = top >= every, (top >= n) & (top < every), top < n
        done, code = rows[ended], top[ended] - every
        nodes.append((done, code % longest, length[done] - 1, code // longest))
        done = rows[word]
        nodes.append((done, length[done], length[done], top[word]))
        length[done] += 1
        waiting[done] -= 1
        done, label = rows[opened], top[opened]
        rule = _gumbel(rules[of[done], label])
        for above, symbol in enumerate((every + label * longest + length[done], rule % every, rule // every)):
            stack[done, height[done] + above] = symbol
        height[done] += 3
        waiting[done] += 1
        if (length + waiting > longest).any():
            raise TooLong(
                f"max_length: expected samples of at most {longest} words, got a longer one; increase "
                f"max_length, or "
                "use a grammar whose derivations end"
            )
        rows = rows[height[rows] > 0]
    return tuple(torch.cat(x) for x in zip(*nodes, strict=True))


def _gumbel(logits: Tensor) -> Tensor:
    """An index along the last dimension with probability ∝ exp(logits)."""
    return choose(logits, torch.rand_like(logits[..., 0]))

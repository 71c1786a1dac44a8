"""Conditional random fields on given trees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions.checks import check_finite_or_minus_inf, check_integers, first_index
from pyroelbo.distributions.semiring import Log, Semiring
from pyroelbo.distributions.structured import StructuredDistribution, batch_shape
from pyroelbo.numerics import log_softmax
from pyroelbo.pair import Stepwise

__all__ = ["TreeCRF", "TreeParts"]


class TreeParts(NamedTuple):
    """Parts of a labelled tree: labels of nodes, and label pairs (parent, child) of edges."""

    node: Tensor
    edge: Tensor


class TreeCRF(StructuredDistribution):
    """p(z) = exp( Σ_n node[n, z_n] + Σ_{n not a root} edge_n[z_parent(n), z_n] ) / Z on a tree, or a forest.

    ``parents [N]`` holds the parent of each node, -1 at a root, in any order, without cycles, shared by the
    batch; ``[*C,N]``, where *C are the last dimensions of *B, gives each its own tree. ``node [*B,N,S]`` and
    ``edge [*B,S,S]`` (parent, child; the same everywhere) or ``[*B,N,S,S]`` (entry n is the edge above node
    n, unused at a root): unnormalized log potentials, -inf allowed; rank(*B) = node.dim() - 2, and batch
    sizes broadcast. Values are LongTensors ``[*B,N]``, parts are ``TreeParts``; with one edge matrix its part
    is the (expected) count of each pair.

    All nodes of a depth are processed at once, those of different trees too. Cost: O(B·N·S²) in as many steps
    as the deepest tree is deep. Source: Pearl (1988), chapter 4.
    """

    free_labels = True

    def __init__(
        self, parents: Tensor, node: Tensor, edge: Tensor, validate_args: bool | None = None
    ) -> None:
        rank = node.dim() - 2
        nodes, states = (0, 0, *node.shape)[-2:]
        self.homogeneous = edge.dim() == rank + 2
        if (
            rank < 0
            or 0 in (nodes, states)
            or parents.shape[-1:] != (nodes,)
            or parents.dim() - 1 > rank
            or edge.shape[rank:] != ((states, states) if self.homogeneous else (nodes, states, states))
        ):
            raise ValueError(
                "parents, node, edge: expected shapes [N] or [*C,N], [*B,N,S], and [*B,S,S] or [*B,N,S,S], "
                f"got {tuple(parents.shape)}, {tuple(node.shape)} and {tuple(edge.shape)}"
            )
        check_integers("parents", parents)
        batch = batch_shape(rank, (node.shape[:rank], edge.shape[:rank], parents.shape[:-1]), None)
        self.parents = parents.expand(*batch[rank + 1 - parents.dim() :], nodes)
        self._levels, self._roots = _forest(self.parents)
        super().__init__(TreeParts(node, edge), batch, (nodes,), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(node=node, edge=edge)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.potentials[0].shape[-1] - 1), 1)

    def _frame(self) -> dict[str, Tensor]:
        return {**super()._frame(), "parents": self.parents}

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> TreeCRF:
        new: Any = super().expand(batch_shape)
        trees = new.batch_shape[len(new.batch_shape) + 1 - self.parents.dim() :]
        if trees != self.parents.shape[:-1]:
            new.parents = self.parents.expand(*trees, -1)
            new._levels, new._roots = _forest(new.parents)
        return new

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        *_, (_, belief, _) = self._upward(parts, semiring)
        total, trees = semiring.sum(belief, -1).unsqueeze(-1), self.parents.shape[:-1]
        if trees:
            one = self._one(semiring)[..., :1]
            total = _taken(total, one, self._roots).unflatten(-3, trees)
        return _product(total, semiring).squeeze(-1)

    def _one(self, semiring: Semiring) -> Tensor:
        shared = len(self.batch_shape) + 1 - self.parents.dim()
        states = self.potentials[0].shape[-1]
        return semiring.lift(self.potentials[0].new_zeros((1,) * (shared + 1) + (states,)))

    def _upward(
        self, parts: tuple[Tensor, ...], semiring: Semiring
    ) -> Iterator[tuple[_Level, Tensor, Tensor | None]]:
        """From the deepest level to the roots: the values of each node's labels with all that hangs below
        [..., nodes, S], and of the edges above the nodes [..., nodes, S, S], None at the roots."""
        trees, nodes = self.parents.shape[:-1], self.potentials[0].shape[-2]
        node = self._side_by_side(parts[0], 2, True)
        edge = self._side_by_side(parts[1], 3 - self.homogeneous, not self.homogeneous)
        one = self._one(semiring)
        below: Tensor | None = None
        for level in reversed(self._levels):
            belief = node[..., level.nodes, :]
            if below is not None:
                belief = semiring.mul(belief, _product(_taken(below, one, level.children), semiring))
            if level is self._levels[0]:
                yield level, belief, None
                return
            if not self.homogeneous:
                step = edge[..., level.nodes, :, :]
            else:
                step = edge[..., level.nodes // nodes, :, :] if trees else edge.unsqueeze(-3)
            yield level, belief, step
            below = semiring.dot(belief.unsqueeze(-2), step, -1)

    def conditionals(self) -> Tensor:
        """ln P(z_n | z_parent(n)), [*B,N,S,S] (parent, child); the rows of a root are all its ln P(z_n).

        Rows of labels of a parent that have probability zero are meaningless. Cost: one pass from the leaves.
        """
        trees, states = self.parents.shape[:-1], self.potentials[0].shape[-1]
        lead = self.batch_shape[: len(self.batch_shape) - len(trees)]
        nodes, rows = [], []
        for level, belief, step in self._upward(self.potentials, Log()):
            joint = belief.unsqueeze(-2) if step is None else step + belief.unsqueeze(-2)
            nodes.append(level.nodes)
            rows.append(log_softmax(joint.expand(*lead, len(level.nodes), states, states)))
        found = torch.cat(rows, -3)[..., torch.cat(nodes).argsort(), :, :]
        return found.unflatten(-3, (*trees, -1)) if trees else found

    def stepwise(self) -> Stepwise:
        """The labels node by node, parents first."""
        states, nodes = self.potentials[0].shape[-1], self.parents.shape[-1]
        depth = torch.empty(self.parents.numel(), dtype=torch.long, device=self.parents.device)
        for d, level in enumerate(self._levels):
            depth[level.nodes] = d
        order = depth.view(self.parents.shape).argsort(dim=-1, stable=True)
        order, parents = (
            x.expand(*self.batch_shape, nodes).reshape(-1, nodes) for x in (order, self.parents)
        )
        table = self.conditionals().reshape(-1, nodes, states, states)
        every = torch.arange(len(table), device=table.device)

        def logits(state: tuple[int, Tensor]) -> Tensor:
            place, labels = state
            node = order[:, place]
            return table[every, node, labels[every, parents[every, node].clamp(min=0)]]

        def append(state: tuple[int, Tensor], label: Tensor) -> tuple[int, Tensor]:
            place, labels = state
            return place + 1, labels.scatter(1, order[:, place, None], label[:, None])

        return Stepwise(
            lambda n: (0, torch.zeros_like(parents)),
            lambda state: Categorical(logits=logits(state)),
            append,
            lambda n: order,
        )

    def _side_by_side(self, x: Tensor, events: int, by_node: bool) -> Tensor:
        """Potentials of trees as those of one forest: [..., *C, N, ...] as [..., C·N, ...], or, of edges that
        are the same everywhere, [..., *C, S, S] as [..., C, S, S]."""
        trees = self.parents.shape[:-1]
        if not trees:
            return x
        lead = x.dim() - events - len(trees)
        x = x.expand(*x.shape[:lead], *trees, *x.shape[-events:])
        return x.flatten(lead, lead + len(trees) - (not by_node))

    def to_parts(self, z: Tensor) -> TreeParts:
        at = F.one_hot(z, self.potentials[0].shape[-1]).to(self.potentials[0].dtype)
        index = self.parents.clamp(min=0).unsqueeze(-1)
        at = at.expand(torch.broadcast_shapes(at.shape, (*self.parents.shape, 1)))
        above = at.take_along_dim(index.expand(*at.shape[:-1], 1), -2)
        above = above * (self.parents >= 0).to(at.dtype).unsqueeze(-1)
        if self.homogeneous:
            return TreeParts(at, above.transpose(-1, -2) @ at)
        return TreeParts(at, above.unsqueeze(-1) * at.unsqueeze(-2))

    def log_weight(self, value: Tensor) -> Tensor:
        node, edge = self.potentials
        value = value.expand(torch.broadcast_shapes(value.shape, (*self.batch_shape, node.shape[-2])))
        below = self.parents >= 0
        above = value.take_along_dim(self.parents.clamp(min=0).expand(value.shape), -1)
        pairs = above * node.shape[-1] + value
        table = edge.flatten(-2)
        if self.homogeneous:
            table = table.unsqueeze(-2).expand(*table.shape[:-1], node.shape[-2], -1)
        terms = _at(node, value) + torch.where(below, _at(table, pairs), 0.0)
        return terms.sum(-1)

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0].argmax(-1)


class _Level(NamedTuple):
    """Nodes of one depth; ``children [len(nodes), C]`` index the next level, padded with its length."""

    nodes: Tensor
    children: Tensor


def _at(table: Tensor, index: Tensor) -> Tensor:
    """table[..., n, index[..., n]], where the table's batch broadcasts."""
    return table.expand(*index.shape, -1).gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _taken(values: Tensor, one: Tensor, index: Tensor) -> Tensor:
    """values[..., index, :], and ``one`` where the index is the number of values."""
    return torch.cat([values, one.expand(*values.shape[:-2], 1, -1)], -2)[..., index, :]


def _forest(parents: Tensor) -> tuple[list[_Level], Tensor]:
    """The levels of all trees side by side, node n of tree c being c·N + n; and the places of each tree's
    roots in the first level, padded with its length."""
    nodes = parents.shape[-1]
    bad = (parents < -1) | (parents >= nodes)
    if bool(bad.any()):
        raise ValueError(
            f"parents: expected integers in [-1, {nodes - 1}], got {int(parents[bad][0])} at index "
            f"{first_index(bad)}"
        )
    trees = parents.reshape(-1, nodes)
    if not len(trees):  # an empty batch
        none = torch.zeros(0, 1, dtype=torch.long)
        return [_Level(none[:, 0], none)], none
    start = nodes * torch.arange(len(trees), device=parents.device).unsqueeze(-1)
    levels = _levels(torch.where(trees < 0, -1, trees + start).flatten().tolist(), parents.shape)
    own: list[list[int]] = [[] for _ in trees]
    for place, node in enumerate(levels[0].nodes.tolist()):
        own[node // nodes].append(place)
    widest = max(map(len, own))
    return levels, torch.tensor([row + [len(levels[0].nodes)] * (widest - len(row)) for row in own])


def _levels(parents: list[int], shape: torch.Size) -> list[_Level]:
    depth = [-1] * len(parents)
    for start in range(len(parents)):
        trail, n = [], start
        while n >= 0 and depth[n] < 0:
            trail.append(n)
            if len(trail) > len(parents):
                index = [int(i) for i in torch.unravel_index(torch.tensor(n), shape)]
                raise ValueError(f"parents: expected a tree or a forest, got a cycle through index {index}")
            n = parents[n]
        above = -1 if n < 0 else depth[n]
        for n in reversed(trail):
            above += 1
            depth[n] = above
    ranks: list[list[int]] = [[] for _ in range(max(depth) + 1)]
    for n, d in enumerate(depth):
        ranks[d].append(n)
    levels = []
    for d, nodes in enumerate(ranks):
        following = ranks[d + 1] if d + 1 < len(ranks) else []
        children: dict[int, list[int]] = {n: [] for n in nodes}
        for place, child in enumerate(following):
            children[parents[child]].append(place)
        widest = max(len(c) for c in children.values())
        rows = [c + [len(following)] * (widest - len(c)) for c in children.values()]
        levels.append(_Level(torch.tensor(nodes), torch.tensor(rows, dtype=torch.long)))
    return levels


def _product(x: Tensor, semiring: Semiring) -> Tensor:
    """The semiring product over dimension -2, in pairs."""
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        pairs = semiring.mul(x[..., :half, :], x[..., half : 2 * half, :])
        x = torch.cat([pairs, x[..., 2 * half :, :]], -2)
    return x.squeeze(-2)

"""Conditional random fields on a fixed tree."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.distributions.checks import check_finite_or_minus_inf, check_integers
from pyroelbo.distributions.semiring import Semiring
from pyroelbo.distributions.structured import StructuredDistribution, batch_shape

__all__ = ["TreeCRF", "TreeParts"]


class TreeParts(NamedTuple):
    """Parts of a labelled tree: labels of nodes, and label pairs (parent, child) of edges."""

    node: Tensor
    edge: Tensor


class TreeCRF(StructuredDistribution):
    """p(z) = exp( Σ_n node[n, z_n] + Σ_{n not a root} edge_n[z_parent(n), z_n] ) / Z on a tree, or a forest.

    ``parents [N]`` holds the parent of each node, -1 at a root, in any order, without cycles, shared by
    the batch. ``node [*B,N,S]`` and ``edge [*B,S,S]`` (parent, child; the same everywhere) or ``[*B,N,S,S]``
    (entry n is the edge above node n, unused at a root): unnormalized log potentials, -inf allowed; rank(*B)
    = node.dim() - 2, and batch sizes broadcast. Values are LongTensors ``[*B,N]``, parts are ``TreeParts``;
    with one edge matrix its part is the (expected) count of each pair.

    All nodes of a depth are processed at once. Cost: O(B·N·S²) in as many steps as the tree is deep. Source:
    Pearl (1988), chapter 4.
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
            or parents.shape != (nodes,)
            or edge.shape[rank:] != ((states, states) if self.homogeneous else (nodes, states, states))
        ):
            raise ValueError(
                "parents, node, edge: expected shapes [N], [*B,N,S], and [*B,S,S] or [*B,N,S,S], got "
                f"{tuple(parents.shape)}, {tuple(node.shape)} and {tuple(edge.shape)}"
            )
        check_integers("parents", parents)
        self.parents = parents
        self._levels = _levels(parents.tolist())
        batch = batch_shape(rank, (node.shape[:rank], edge.shape[:rank]), None)
        super().__init__(TreeParts(node, edge), batch, (nodes,), validate_args=validate_args)
        if self._validate_args:
            check_finite_or_minus_inf(node=node, edge=edge)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.potentials[0].shape[-1] - 1), 1)

    def _frame(self) -> dict[str, Tensor]:
        return {**super()._frame(), "parents": self.parents}

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        node, edge = parts
        one = semiring.lift(torch.zeros_like(self.potentials[0][..., :1, :]))
        below: Tensor | None = None
        for level in reversed(self._levels):
            belief = node[..., level.nodes, :]
            if below is not None:
                padded = torch.cat([below, one.expand(*below.shape[:-2], 1, -1)], -2)
                inside = padded[..., level.children, :]
                belief = semiring.mul(belief, _product(inside, semiring))
            if level is self._levels[0]:
                return _product(semiring.sum(belief, -1).unsqueeze(-1), semiring).squeeze(-1)
            step = edge.unsqueeze(-3) if self.homogeneous else edge[..., level.nodes, :, :]
            below = semiring.dot(belief.unsqueeze(-2), step, -1)
        raise AssertionError("a tree has a root")

    def to_parts(self, z: Tensor) -> TreeParts:
        at = F.one_hot(z, self.potentials[0].shape[-1]).to(self.potentials[0].dtype)
        above = at[..., self.parents.clamp(min=0), :] * (self.parents >= 0).to(at.dtype).unsqueeze(-1)
        if self.homogeneous:
            return TreeParts(at, above.transpose(-1, -2) @ at)
        return TreeParts(at, above.unsqueeze(-1) * at.unsqueeze(-2))

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0].argmax(-1)


class _Level(NamedTuple):
    """Nodes of one depth; ``children [len(nodes), C]`` index the next level, padded with its length."""

    nodes: Tensor
    children: Tensor


def _levels(parents: list[int]) -> list[_Level]:
    depth = [-1] * len(parents)
    for start in range(len(parents)):
        trail, n = [], start
        while n >= 0 and depth[n] < 0:
            if not -1 <= parents[n] < len(parents):
                raise ValueError(
                    f"parents: expected integers in [-1, {len(parents) - 1}], got {parents[n]} at index [{n}]"
                )
            trail.append(n)
            if len(trail) > len(parents):
                raise ValueError(f"parents: expected a tree or a forest, got a cycle through index [{n}]")
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

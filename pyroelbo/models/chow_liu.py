"""The hidden Chow-Liu tree: finite latents on a tree found in the data, each seen through a noisy symbol."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.distributions import TreeCRF
from pyroelbo.models.emissions import log_shares
from pyroelbo.models.precision import exact
from pyroelbo.numerics import positive_count, positive_shape
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["HiddenChowLiuTree", "dependence_tree"]

_MOST = 4096  # symbols of all coordinates together, whose pairs are counted
_BLOCK = 2**22  # latent states times data that are held at once when no gradient is needed


class HiddenChowLiuTree(ExactPair):
    """p(z) = p(z_r) Π_{n ≠ r} p(z_n | z_parent(n)) on a tree over the N coordinates, p(y | z) = Π_n p(y_n |
    z_n). Data [B, N].

    Each coordinate y_n in 0 … V-1 is the noisy symbol of a latent z_n in 0 … S-1; without noise this is a
    Chow-Liu tree. :meth:`initialize` finds the tree in the data (:func:`dependence_tree`); without it the
    coordinates are a chain. ln p(y) and p(z | y) come from one pass over the tree
    (:class:`~pyroelbo.distributions.TreeCRF`), and the M-step is closed: normalized expected counts. The
    latent site ``z`` is a LongTensor [B, N].

    Parts: ``prior`` (initial [S] of the root, transition [N, S, S] (parent, child), logits; the buffer
    parents [N]), ``generator`` (logits [N, S, V]). Raises ValueError for data of another shape or outside
    0 … V-1. Cost: O(B·N·S²) in as many steps as the tree is deep.

    Args:
        shape: number of coordinates N, or their shape.
        levels: number of symbols V.
        states: number of values of a latent, S.
        smoothing: a; pseudo-count of every root state, transition and symbol (MAP under Dirichlet(1 + a)).

    Source: Chow and Liu (1968); Pearl (1988), chapter 4; Choi, Tan, Anandkumar and Willsky (2011) for latent
    trees.
    """

    def __init__(
        self, shape: int | Sequence[int], levels: int = 2, states: int = 2, smoothing: float = 0.1
    ) -> None:
        super().__init__()
        shape = positive_shape(shape)
        dims = math.prod(shape)
        for name, value in (("levels", levels), ("states", states)):
            positive_count(name, value)
        if not smoothing >= 0:
            raise ValueError(f"smoothing: expected a pseudo-count of at least 0, got {smoothing!r}")
        self.dims, self.levels, self.states, self.smoothing = dims, levels, states, smoothing
        self.prior, self.generator = nn.Module(), nn.Module()
        self.prior.register_parameter("initial", nn.Parameter(0.1 * torch.randn(states)))
        self.prior.register_parameter("transition", nn.Parameter(torch.randn(dims, states, states)))
        self.prior.register_buffer("parents", torch.arange(dims) - 1)
        self.generator.register_parameter("logits", nn.Parameter(torch.randn(dims, states, levels)))

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y: expected shape [B, {self.dims}], got {tuple(y.shape)}")
        if torch.distributions.Distribution._validate_args:
            bad = (y < 0) | (y >= self.levels) | (y != y.long())
            if bool(bad.any()):
                first = tuple(bad.nonzero()[0].tolist())
                raise ValueError(
                    f"y: expected symbols 0 … {self.levels - 1}, got {y[first].item():g} at index "
                    f"{list(first)}"
                )
        return y

    def _prior_potentials(self, dtype: Any) -> tuple[Tensor, Tensor]:
        """Log potentials of the prior: nodes [N, S], zero but at the root, and edges [N, S, S]."""
        initial, move = (x.to(dtype).log_softmax(-1) for x in (self.prior.initial, self.prior.transition))
        return (self.prior.parents < 0).to(dtype)[:, None] * initial, move

    def _log_emission(self, y: Tensor) -> Tensor:
        """ln p(y_n | z_n = s), [B, N, S]."""
        logits = exact(self.generator.logits).log_softmax(-1)
        return logits.mT[torch.arange(self.dims, device=y.device), y.long()]

    def model(self, y: Tensor) -> None:
        self._check(y)
        with pyro.plate(PLATE, len(y)):
            tree = TreeCRF(self.prior.parents, *self._prior_potentials(self.prior.initial.dtype))
            z = pyro.sample("z", tree)
            seen = self.generator.logits[torch.arange(self.dims, device=y.device), z]
            pyro.sample("y", dist.Categorical(logits=seen).to_event(1), obs=y)

    def posterior(self, y: Tensor) -> TreeCRF:
        """p(z | y) on the same tree; its ``log_partition`` is ln p(y)."""
        emission = self._log_emission(self._check(y))
        node, edge = self._prior_potentials(emission.dtype)
        return TreeCRF(self.prior.parents, node + emission, edge[None])

    def _blocks(self, y: Tensor) -> tuple[Tensor, ...]:
        rows = len(y) if torch.is_grad_enabled() else max(1, _BLOCK // (self.dims * self.states))
        return y.split(rows)

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y), [B], in nats, from the leaves to the root; float64 without gradients."""
        return torch.cat([self.posterior(block).log_partition for block in self._blocks(y)])

    @torch.no_grad()
    def e_step(
        self, y: Tensor, hard: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) of the best labels) and the statistics of :meth:`m_step`, in
        float64.

        ``weights`` [B] count each datum so many times in the statistics.
        """
        values, root = [], int((self.prior.parents < 0).nonzero())
        initial = torch.zeros_like(self.prior.initial, dtype=torch.float64)
        moves, seen = (
            torch.zeros_like(x, dtype=torch.float64) for x in (self.prior.transition, self.generator.logits)
        )
        for rows in torch.arange(len(y), device=y.device).split(len(self._blocks(y)[0])):
            block, share = y[rows], None if weights is None else weights[rows]
            value, (node, edge) = self.posterior(block).expected_parts(hard=hard, weights=share)
            values.append(value)
            initial += node[:, root].sum(0)
            moves += edge[0]
            on = nn.functional.one_hot(block.long(), self.levels).to(node)
            seen += node.permute(1, 2, 0) @ on.permute(1, 0, 2)
        return torch.cat(values), {"initial": initial, "transition": moves, "seen": seen}

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Tensor]) -> None:
        """Root, transitions and emissions that maximize the expected log joint (plus :meth:`log_prior`)."""
        p, g = self.prior, self.generator
        p.initial.copy_(log_shares(statistics["initial"], self.smoothing, p.initial))
        p.transition.copy_(log_shares(statistics["transition"], self.smoothing, p.transition))
        g.logits.copy_(log_shares(statistics["seen"], self.smoothing, g.logits))

    def log_prior(self) -> Tensor:
        """The log density of the parameters, up to a constant, of which ``smoothing`` is the pseudo-count."""
        if not self.smoothing:
            return self.prior.initial.new_zeros(())
        tables = (self.prior.initial, self.prior.transition, self.generator.logits)
        return self.smoothing * torch.stack([x.double().log_softmax(-1).sum() for x in tables]).sum()

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        """The tree of the data, symbols that show their state nine times in ten (with some random
        variation), and the transitions that the data then have."""
        seen, p = self._check(y).long(), self.prior
        p.parents.copy_(dependence_tree(seen, self.levels))
        # State s shows symbol s; of more states than symbols several the same, of fewer each a range.
        few, many = sorted((self.states, self.levels))
        alike = torch.arange(many, device=y.device) * few // many
        alike = nn.functional.one_hot(alike, few).to(p.initial)
        alike = alike if self.levels < self.states else alike.T
        shown = 0.9 * alike / alike.sum(-1, keepdim=True) + 0.1 / self.levels
        shown = shown * (0.2 * torch.randn_like(self.generator.logits)).exp()
        self.generator.logits.copy_(shown.log())
        state = shown / shown.sum(-2, keepdim=True)  # of each symbol, [N, S, V]
        guessed = state.mT[torch.arange(self.dims, device=y.device), seen]  # [B, N, S]
        above = guessed[:, p.parents.clamp_min(0)]
        counts = torch.einsum("bns,bnt->nst", above, guessed)
        p.transition.copy_(torch.where((p.parents < 0)[:, None, None], 0.0, (counts + 1).log()))
        p.initial.copy_((guessed[:, p.parents < 0].sum((0, 1)) + 1).log())

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return self.generator.logits.new_zeros(n, self.dims)


def dependence_tree(y: Tensor, levels: int) -> Tensor:
    """The tree over the coordinates of ``y [B, N]``, symbols 0 … ``levels``-1, whose edges have the largest
    sum of mutual informations: ``parents`` [N], -1 at the root, a centre of the tree.

    Among trees of observed coordinates it has the largest likelihood. Raises ValueError where the pairs of
    symbols are too many to count. Cost: O(B·(N·levels)²).

    Source: Chow and Liu (1968).
    """
    size, dims = y.shape
    if dims * levels > _MOST:
        raise ValueError(
            f"y: expected at most {_MOST:,} symbols of all coordinates together, whose pairs are counted, "
            f"got {dims} x {levels}"
        )
    on = nn.functional.one_hot(y.long(), levels).flatten(1).double()
    both = (on.T @ on / size).reshape(dims, levels, dims, levels)
    own = on.mean(0).reshape(dims, levels)
    apart = own[:, :, None, None] * own
    ratio = torch.where(both > 0, both / apart.clamp_min(1e-300), 1.0)
    return _rooted_at_a_centre(_spanning_tree((both * ratio.log()).sum((1, 3))))


def _spanning_tree(weight: Tensor) -> list[list[int]]:
    """Neighbours of each node in a spanning tree of the largest total weight, by Prim's algorithm."""
    neighbours: list[list[int]] = [[] for _ in range(len(weight))]
    best, nearest = weight[0].clone(), torch.zeros(len(weight), dtype=torch.long)
    outside = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    outside[0] = False
    for _ in range(len(weight) - 1):
        new = int(torch.where(outside, best, -math.inf).argmax())
        at = int(nearest[new])
        neighbours[new].append(at)
        neighbours[at].append(new)
        outside[new] = False
        closer = (weight[new] > best).cpu()
        best, nearest = torch.maximum(best, weight[new]), torch.where(closer, new, nearest)
    return neighbours


def _rooted_at_a_centre(neighbours: list[list[int]]) -> Tensor:
    """Parents [N] of the tree whose root is in the middle of a longest path, which makes it least deep."""

    def walk(root: int) -> tuple[list[int], list[int]]:
        parents, order = [-1] * len(neighbours), [root]
        for node in order:
            for other in neighbours[node]:
                if other != parents[node]:
                    parents[other] = node
                    order.append(other)
        return parents, order

    end = walk(0)[1][-1]
    parents, order = walk(end)
    path = [order[-1]]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return torch.tensor(walk(path[len(path) // 2])[0])

"""The two densities at the ends of an annealing path and their gradients, at the speed of plain tensor
operations."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evidence.lattice import Lattice
from pyroelbo.evidence.unconstrained import Unconstrained
from pyroelbo.results import Terms

__all__ = ["Potential"]

_PATIENCE = 3  # evaluations of one shape before they are recorded
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}

Values = tuple[Tensor, Tensor, Tensor, Tensor]


class Potential:
    """ln f_0 and ln f_1 [K, b] at u [K, b, D], k [K, b, E], and their gradients with respect to u (empty
    without ``slopes``).

    Pyro's handlers take milliseconds per pass, whatever its size, and an annealing run makes thousands of
    passes of one shape over the same data. So after a few passes the operations are recorded (by
    ``make_fx``), what does not depend on u or k is computed once (an encoder's output, say), and the rest is
    replayed. A record is used only if it agrees with the programs, at the particles it was made from and at
    others; programs that branch on values, leave torch or draw random numbers are run as they are.
    """

    def __init__(self, evaluator: Evaluator, space: Unconstrained, lattice: Lattice, start: str) -> None:
        self.evaluator, self.space, self.lattice, self.start = evaluator, space, lattice, start
        self._records: dict[Any, Any] = {}

    def __call__(self, u: Tensor, k: Tensor, rows: slice | None, slopes: bool) -> Values:
        u, k = u.contiguous(), k.contiguous()  # a record holds the strides that it saw
        key = (u.shape, u.dtype, None if rows is None else (rows.start, rows.stop), slopes)
        known = self._records.get(key, 0)
        if callable(known):
            return known(u, k)
        values = self._plain(u, k, rows, slopes)
        if isinstance(known, int):
            known += 1
            self._records[key] = self._record(u, k, rows, slopes) if known == _PATIENCE else known
        return values

    def _plain(self, u: Tensor, k: Tensor, rows: slice | None, slopes: bool) -> Values:
        with torch.set_grad_enabled(slopes):
            u = u.detach().requires_grad_(slopes)
            latents, log_det = self.space.constrain(u)
            terms = self.evaluator.terms({**latents, **self.lattice.to_latents(k)}, rows)
            densities = (self._base(terms) + log_det, terms.log_joint + log_det)
            found = [u.new_empty(0), u.new_empty(0)]
            for i, density in enumerate(densities):
                if slopes and density.requires_grad:
                    found[i] = torch.autograd.grad(density.sum(), u, retain_graph=i == 0)[0]
                elif slopes:
                    found[i] = torch.zeros_like(u)
        return densities[0].detach(), densities[1].detach(), found[0], found[1]

    def _base(self, terms: Terms) -> Tensor:
        if self.start == "guide":
            return terms.log_proposal
        return torch.stack([v for k, v in terms.log_model.items() if k not in terms.observed]).sum(0)

    def _record(self, u: Tensor, k: Tensor, rows: slice | None, slopes: bool) -> Callable | None:
        """The operations of one evaluation as a function; None if they cannot be recorded."""
        state = torch.get_rng_state()
        others = 0.9 * u.roll(1, 0).roll(1, 1), k.roll(1, 0).roll(1, 1)
        for _ in range(8 if self.lattice.moves else 0):
            others = others[0], self.lattice.propose(others[1])
        try:
            with warnings.catch_warnings(), self.evaluator.unchecked():
                warnings.simplefilter("ignore")
                graph = make_fx(lambda u, k: self._plain(u, k, rows, slopes))(u, k)
            if _draws(graph):
                return None
            run = _folded(graph)
            for point in ((u, k), others):
                for mine, plain in zip(run(*point), self._plain(*point, rows, slopes), strict=True):
                    limit = _TOLERANCE.get(u.dtype, 1e-4)
                    if not torch.allclose(_clean(mine), _clean(plain), rtol=limit, atol=limit):
                        return None
        except Exception:  # whatever a program does that cannot be recorded
            return None
        finally:
            torch.set_rng_state(state)
        return run


def _draws(graph: fx.GraphModule) -> bool:
    """Whether the results depend on random numbers (the indices of a subsampled plate do not count)."""
    todo = [n for n in graph.graph.nodes if n.op == "output"]
    live = set(todo)
    while todo:
        fresh = [n for n in todo.pop().all_input_nodes if n not in live]
        live.update(fresh)
        todo += fresh
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in live)


def _clean(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, torch.zeros_like(x))


def _folded(graph: fx.GraphModule) -> Callable[[Tensor, Tensor], Values]:
    """The graph with everything that does not depend on its inputs computed once."""
    values: dict[fx.Node, Any] = {}
    moving: set[fx.Node] = set()
    with torch.no_grad():
        for node in list(graph.graph.nodes):
            if node.op == "placeholder" or any(n in moving for n in node.all_input_nodes):
                moving.add(node)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(graph)
            elif node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    for i, (node, value) in enumerate(list(values.items())):
        if node.op == "get_attr" or not any(user in moving for user in node.users):
            continue
        if not isinstance(value, Tensor):
            continue  # a tuple: its parts are folded themselves
        setattr(graph, f"_folded_{i}", value)
        with graph.graph.inserting_before(node):
            constant = graph.graph.create_node("get_attr", f"_folded_{i}")
        node.replace_all_uses_with(constant)
    graph.graph.eliminate_dead_code()
    graph.recompile()

    def run(u: Tensor, k: Tensor) -> Values:
        with torch.no_grad():
            return tuple(graph(u, k))  # type: ignore[return-value]

    return run

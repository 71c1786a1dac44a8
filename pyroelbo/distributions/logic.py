"""Distributions over the models of a propositional formula, compiled into a decision diagram."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import operator
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyroelbo.data.formulas import CNF, read_dimacs
from pyroelbo.distributions.checks import check_finite_or_minus_inf
from pyroelbo.distributions.semiring import Max, Semiring
from pyroelbo.distributions.structured import StructuredDistribution

__all__ = ["CNF", "Circuit", "Models", "ModelsParts", "compile_formula", "read_dimacs"]


_CHILD = """
import json, sys, py_d4
clauses, variables, out = json.load(sys.stdin)
compiled = py_d4.Solver(clauses, variables).compile()
open(out, "w").write(compiled.getNNFString())
"""


def compile_formula(formula: CNF, seconds: float = 60.0) -> Circuit:
    """The formula as a decision diagram, by the compiler d4 in a process of its own.

    What it returns is checked: the circuit is decomposable and deterministic, and none of its models violates
    a clause. Raises ImportError without the compiler (``pip install 'pyroelbo[logic]'``), TimeoutError after
    ``seconds``, ValueError if a check fails. Cost: up to exponential in the formula's treewidth.

    Source: Lagniez and Marquis (2017).
    """
    if any(not c for c in formula.clauses):  # the empty clause
        return Circuit(formula.variables, ["f"], [])
    if not formula.clauses:
        return Circuit(formula.variables, ["t"], [])
    if importlib.util.find_spec("py_d4") is None:
        raise ImportError("compiling a formula needs the compiler d4: pip install 'pyroelbo[logic]'")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "nnf"
        job = json.dumps([[list(c) for c in formula.clauses], formula.variables, str(out)])
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD],
                input=job,
                text=True,
                capture_output=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(
                f"compiling {formula.variables} variables and {len(formula.clauses)} clauses took more than "
                f"{seconds:g} s: give it more by seconds="
            ) from error
        if done.returncode or not out.exists():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"the compiler failed: {last}")
        circuit = Circuit.parse(formula.variables, out.read_text())
    wrong = circuit.violated(formula)
    if wrong is not None:
        raise ValueError(
            f"the compiled circuit has models that violate clause {wrong}, {formula.clauses[wrong]}"
        )
    return circuit


class _Level(NamedTuple):
    """Nodes whose children are below: edges [E, items] of products, nodes [N, edges] of sums or products."""

    edges: Tensor
    sums: Tensor
    products: Tensor


class Circuit:
    """A deterministic, decomposable circuit (d-DNNF) over variables 1 … n, made smooth.

    ``nodes`` are "o" (or), "a" (and), "t" or "f", the first being the root; ``edges`` (parent, child,
    literals) conjoin the child with literals. A child of an or-node that misses variables which its siblings
    mention leaves them free: both their values are summed over, so that counts, samples and entropies are
    those of full assignments.

    Raises ValueError for cycles, for and-nodes whose children share variables, and for or-nodes whose edges
    do not differ in a literal. Cost: O(edges · variables) once.

    Source: Darwiche and Marquis (2002).
    """

    def __init__(
        self, variables: int, nodes: Sequence[str], edges: Sequence[tuple[int, int, tuple[int, ...]]]
    ) -> None:
        self.variables = variables
        children: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in nodes]
        for parent, child, literals in edges:
            children[parent].append((child, tuple(literals)))
        order = _below_first(children)
        self.num_nodes, self.num_edges = len(order), sum(len(children[n]) for n in order)
        false, seen = self._prune(nodes, children, order)
        free = {}
        for n in order:
            if nodes[n] == "o":
                for child, literals in children[n]:
                    missing = seen[n] & ~(seen[child] | _mask(literals))
                    free[n, child, literals] = _members(missing)
        _check_deterministic(nodes, children, order)
        self._nodes, self._children, self._order, self._false = nodes, children, order, false
        rest = _members((1 << variables) - 1 & ~seen[0])
        self._arrange(nodes, children, order, false, free, rest)

    @classmethod
    def parse(cls, variables: int, text: str) -> Circuit:
        """From d4's text: lines ``o|a|t|f ID 0`` and ``PARENT CHILD LITERAL … 0``; node 1 is the root."""
        number: dict[str, int] = {}
        nodes: list[str] = []
        edges = []
        for line_number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words:
                continue
            if words[0] in "oatf":
                number[words[1]] = len(nodes)
                nodes.append(words[0])
                continue
            try:
                literals = tuple(int(w) for w in words[2:-1])
                edges.append((number[words[0]], number[words[1]], literals))
            except (KeyError, ValueError, IndexError):
                raise ValueError(
                    f"circuit, line {line_number}: expected an edge, got {line[:60]!r}"
                ) from None
            if any(x == 0 or abs(x) > variables for x in literals):
                raise ValueError(f"circuit, line {line_number}: expected literals ±1 … ±{variables}")
        if not nodes:
            raise ValueError("circuit: expected nodes, got none")
        return cls(variables, nodes, edges)

    def _prune(
        self, nodes: Sequence[str], children: list[list[tuple[int, tuple[int, ...]]]], order: list[int]
    ) -> tuple[set[int], dict[int, int]]:
        """Drop edges to what is false; which nodes are false, and the variables below each as bits."""
        false: set[int] = set()
        seen: dict[int, int] = {}
        for n in order:
            if nodes[n] == "o":
                children[n] = [e for e in children[n] if e[0] not in false and _consistent(e[1])]
                if not children[n]:
                    false.add(n)
            elif (nodes[n] == "a" and any(c in false or not _consistent(x) for c, x in children[n])) or nodes[
                n
            ] == "f":
                false.add(n)
            seen[n] = 0
            for child, literals in children[n] if n not in false else ():
                below = seen[child] | _mask(literals)
                if seen[child] & _mask(literals) or (nodes[n] == "a" and seen[n] & below):
                    shared = _members(seen[child] & _mask(literals) or seen[n] & below)[0] + 1
                    raise ValueError(
                        f"circuit: expected conjuncts without common variables, got {shared} in two"
                    )
                seen[n] |= below
        return false, seen

    def _arrange(
        self,
        nodes: Sequence[str],
        children: list[list[tuple[int, tuple[int, ...]]]],
        order: list[int],
        false: set[int],
        free: dict[Any, list[int]],
        rest: list[int],
    ) -> None:
        """Sort nodes into levels; items are 2n literals, n free variables, one, zero, then the nodes."""
        n = self.variables
        one, zero = 3 * n, 3 * n + 1
        place: dict[int, int] = {}
        level: dict[int, int] = {}
        for node in order:
            if node in false:
                place[node], level[node] = zero, 0
            elif not children[node]:
                place[node], level[node] = one, 0
            else:
                level[node] = 1 + max(level[c] for c, _ in children[node])
        ranks: list[list[int]] = [[] for _ in range(max(level.values(), default=0))]
        for node, depth in level.items():
            if depth:
                ranks[depth - 1].append(node)
        self._levels: list[_Level] = []
        size = 3 * n + 2
        for rank in ranks:
            rows: list[list[int]] = []
            own: dict[str, list[list[int]]] = {"o": [], "a": []}
            ordered = sorted(rank, key=lambda m: nodes[m] == "a")
            for node in ordered:
                edges = []
                for child, literals in children[node]:
                    items = [place[child]] if place[child] != one else []
                    items += [2 * (abs(x) - 1) + (x > 0) for x in literals]
                    items += [2 * n + v for v in free.get((node, child, literals), ())]
                    edges.append(len(rows))
                    rows.append(items)
                own[nodes[node]].append(edges)
                place[node] = size
                size += 1
            width = len(rows)
            self._levels.append(
                _Level(_padded(rows, one), _padded(own["o"], width + 1), _padded(own["a"], width))
            )
        root = [place[0], *(2 * n + v for v in rest)]
        self._root = torch.tensor(root, dtype=torch.long)

    def evaluate(self, literals: Tensor, semiring: Semiring, like: Tensor) -> Tensor:
        """The total [*B] over all models of lifted literal values [*B, n, 2] (false, true); ``like`` [*B, 1]
        is a potential that is not lifted."""
        flat = literals.flatten(-2)
        shape = (*flat.shape[:-1], 1)
        one, zero = (semiring.lift(torch.full_like(like, x)).expand(shape) for x in (0.0, -math.inf))
        items = torch.cat([flat, semiring.sum(literals, -1), one, zero], -1)
        for level in self._levels:
            edges, sums, products = (x.to(items.device) for x in level)
            value = torch.cat([_product(items[..., edges], semiring), one, zero], -1)
            parts = [items]
            if sums.numel():
                parts.append(semiring.sum(value[..., sums], -1))
            if products.numel():
                parts.append(_product(value[..., products], semiring))
            items = torch.cat(parts, -1)
        return _product(items[..., self._root.to(items.device)], semiring)

    def contains(self, z: Tensor) -> Tensor:
        """Whether assignments ``z`` [*, n] of 0 and 1 are models, [*]."""
        literal = torch.where(F.one_hot(z.long(), 2) > 0, 0.0, -math.inf)
        return self.evaluate(literal, Max(), literal[..., :1, 0]) > -math.inf

    def violated(self, formula: CNF) -> int | None:
        """The first clause that some model of the circuit violates; None if all models satisfy all.

        Cost: one pass over the edges, with a bit a clause.
        """
        every = (1 << len(formula.clauses)) - 1
        without = dict.fromkeys(range(-self.variables, self.variables + 1), every)
        for i, clause in enumerate(formula.clauses):
            for literal in clause:
                without[literal] &= ~(1 << i)  # a violated clause has no true literal
        possible: dict[int, int] = dict.fromkeys(self._false, 0)
        for n in (n for n in self._order if n not in self._false):
            kind, edges = self._nodes[n], []
            for child, literals in self._children[n]:
                edges.append(functools.reduce(operator.and_, (without[x] for x in literals), possible[child]))
            if kind == "o":
                possible[n] = functools.reduce(operator.or_, edges, 0)
            else:
                possible[n] = functools.reduce(operator.and_, edges, every)
        trivial = (i for i, clause in enumerate(formula.clauses) if not _consistent(clause))
        found = possible[0] & ~functools.reduce(operator.or_, (1 << i for i in trivial), 0)
        return _members(found)[0] if found else None


class ModelsParts(NamedTuple):
    """Parts of an assignment: which value each variable has, [*B, n, 2]."""

    literal: Tensor


class Models(StructuredDistribution):
    """p(z) = exp(Σ_i literal[i, z_i]) / Z over the models z of a formula, z_i in {0, 1}.

    ``literal [*B, n, 2]`` are log weights of false and true, -inf allowed; rank(*B) = literal.dim() - 2. With
    zeros, ln Z is the logarithm of the number of models, and p is uniform over them; with the log
    probabilities of independent variables it is the log probability that the formula holds, and p the
    posterior. Values are LongTensors [*B, n], marginals the probabilities of the literals; counts, samples,
    entropy, modes and gradients cost O(edges of the circuit) each.

    Source: Darwiche (2001); Kisa et al. (2014).
    """

    def __init__(self, circuit: Circuit, literal: Tensor, validate_args: bool | None = None) -> None:
        if literal.dim() < 2 or literal.shape[-2:] != (circuit.variables, 2):
            raise ValueError(
                f"literal: expected shape [*B, {circuit.variables}, 2] for this circuit, got "
                f"{tuple(literal.shape)}"
            )
        self.circuit = circuit
        super().__init__(
            ModelsParts(literal), literal.shape[:-2], (circuit.variables,), validate_args=validate_args
        )
        if self._validate_args:
            check_finite_or_minus_inf(literal=literal)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, 1), 1)

    def _forward(self, parts: tuple[Tensor, ...], semiring: Semiring) -> Tensor:
        return self.circuit.evaluate(parts[0], semiring, self.potentials[0][..., :1, 0])

    def log_weight(self, value: Tensor) -> Tensor:
        """Σ_i literal[i, z_i] of models, -inf of other assignments."""
        return torch.where(self.circuit.contains(value), super().log_weight(value), -math.inf)

    def to_parts(self, z: Tensor) -> ModelsParts:
        return ModelsParts(F.one_hot(z, 2).to(self.potentials[0].dtype))

    def from_parts(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[0].argmax(-1)

    def _frame(self) -> dict[str, Tensor]:
        return {}


def _mask(literals: Sequence[int]) -> int:
    bits = 0
    for x in literals:
        bits |= 1 << (abs(x) - 1)
    return bits


def _members(bits: int) -> list[int]:
    found = []
    while bits:
        low = bits & -bits
        found.append(low.bit_length() - 1)
        bits ^= low
    return found


def _consistent(literals: Sequence[int]) -> bool:
    return not any(-x in literals for x in literals)


def _below_first(children: list[list[tuple[int, tuple[int, ...]]]]) -> list[int]:
    """The nodes below the root, children before parents."""
    order: list[int] = []
    state = [0] * len(children)  # 1 while its children are visited, 2 after
    stack = [0]
    while stack:
        node = stack[-1]
        if state[node] == 0:
            state[node] = 1
            for child, _ in children[node]:
                if state[child] == 1:
                    raise ValueError(f"circuit: expected no cycle, got one through node {child}")
                if state[child] == 0:
                    stack.append(child)
        else:
            stack.pop()
            if state[node] == 1:
                state[node] = 2
                order.append(node)
    return order


def _check_deterministic(
    nodes: Sequence[str], children: list[list[tuple[int, tuple[int, ...]]]], order: list[int]
) -> None:
    """Every two edges of an or-node must contradict each other in a literal that they imply."""
    implied: dict[int, tuple[int, int]] = {}  # variables that must be true, and false, as bits
    for n in order:
        edges = []
        for child, literals in children[n]:
            true, false = (_mask([x for x in literals if (x > 0) == sign]) for sign in (True, False))
            edges.append((true | implied[child][0], false | implied[child][1]))
        if nodes[n] == "o":
            for i, (true, false) in enumerate(edges):
                if not all(true & theirs[1] or false & theirs[0] for theirs in edges[:i]):
                    raise ValueError(
                        f"circuit: expected alternatives that exclude each other, got two at node {n} that "
                        "differ in no literal"
                    )
        join = operator.and_ if nodes[n] == "o" else operator.or_
        both = zip(*edges, strict=True) if edges else ((0,), (0,))
        implied[n] = tuple(functools.reduce(join, bits) for bits in both)  # type: ignore[assignment]


def _padded(rows: list[list[int]], fill: int) -> Tensor:
    """Index lists of different lengths as one LongTensor."""
    widest = max((len(r) for r in rows), default=0)
    return torch.tensor([r + [fill] * (max(1, widest) - len(r)) for r in rows], dtype=torch.long)


def _product(x: Tensor, semiring: Semiring) -> Tensor:
    """The semiring product over the last dimension, in pairs."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        pairs = semiring.mul(x[..., :half], x[..., half : 2 * half])
        x = torch.cat([pairs, x[..., 2 * half :]], -1)
    return x.squeeze(-1)

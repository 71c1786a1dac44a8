"""Propositional formulas, and the DIMACS files that hold them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyroelbo.data.dataset import Dataset

__all__ = ["CNF", "colouring", "formula_of", "formula_set", "map_colouring", "read_dimacs"]

# regions of a map, and which lie beside which
BORDERS = (
    ("Fl", "Wa"), ("Fl", "Br"), ("Wa", "Br"), ("Wa", "Li"), ("Wa", "Lu"), ("Wa", "Na"), ("Br", "Li"),
    ("Br", "An"), ("Li", "Lu"), ("Li", "Lx"), ("Li", "An"), ("Lu", "Na"), ("Lu", "Lx"),
)  # fmt: skip


@dataclass(frozen=True)
class CNF:
    """A formula in conjunctive normal form: ``clauses`` of literals ±1 … ±``variables``.

    Raises ValueError, naming the clause, for literals of other variables and for 0.
    """

    variables: int
    clauses: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if isinstance(self.variables, bool) or not isinstance(self.variables, int) or self.variables < 1:
            raise ValueError(f"variables: expected a positive number, got {self.variables!r}")
        object.__setattr__(self, "clauses", tuple(tuple(c) for c in self.clauses))
        for i, clause in enumerate(self.clauses):
            for literal in clause:
                if literal == 0 or abs(literal) > self.variables:
                    raise ValueError(
                        f"clauses: expected literals ±1 … ±{self.variables}, got {literal} in clause {i}"
                    )

    def satisfied(self, z: Tensor) -> Tensor:
        """Whether assignments ``z`` [*, variables] of 0 and 1 satisfy every clause, [*]."""
        value, true = z.bool(), torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device)
        for clause in self.clauses:
            index = torch.tensor([abs(x) - 1 for x in clause], dtype=torch.long, device=z.device)
            sign = torch.tensor([x > 0 for x in clause], device=z.device)
            true = true & (value[..., index] == sign).any(-1)
        return true


def read_dimacs(path: str | Path) -> CNF:
    """A formula from a DIMACS file (``c`` comments, ``p cnf VARIABLES CLAUSES``, clauses that end in 0).

    Raises ValueError, naming file and line, for anything else.
    """
    path = Path(path)
    header: tuple[int, int] | None = None
    clauses: list[tuple[int, ...]] = []
    clause: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a DIMACS file, got bytes that are no text") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0] == "c":
            continue
        if words[0] == "%":  # SATLIB's files end so
            break
        where = f"{path}, line {number}"
        if words[0] == "p":
            if header is not None or len(words) != 4 or words[1] != "cnf" or not "".join(words[2:]).isdigit():
                raise ValueError(f"{where}: expected one header 'p cnf VARIABLES CLAUSES', got {line[:60]!r}")
            header = int(words[2]), int(words[3])
            continue
        if header is None:
            raise ValueError(f"{where}: expected 'p cnf VARIABLES CLAUSES' first, got {line[:60]!r}")
        for word in words:
            try:
                literal = int(word)
            except ValueError:
                raise ValueError(f"{where}: expected literals, got {word[:20]!r}") from None
            if abs(literal) > header[0]:
                raise ValueError(f"{where}: expected literals ±1 … ±{header[0]}, got {literal}")
            if literal == 0:
                clauses.append(tuple(clause))
                clause = []
            else:
                clause.append(literal)
    if header is None:
        raise ValueError(f"{path}: expected 'p cnf VARIABLES CLAUSES', got no header")
    if clause:
        raise ValueError(f"{path}: expected 0 at the end of the last clause, got none")
    if len(clauses) != header[1]:
        raise ValueError(f"{path}: expected {header[1]} clauses, as the header says, got {len(clauses)}")
    return CNF(header[0], tuple(clauses))


def formula_set(name: str, formula: CNF) -> Dataset:
    """The data set of one datum: the formula holds. Its ``names`` are the clauses."""
    clauses = tuple(" ".join(map(str, clause)) for clause in formula.clauses)
    return Dataset(name, "formula", (formula.variables,), {"train": torch.ones(1)}, names=clauses)


def formula_of(variables: int, clauses: Sequence[str]) -> CNF:
    """The formula of such a data set; ValueError for clauses that are none."""
    return CNF(variables, tuple(tuple(map(int, clause.split())) for clause in clauses))


def colouring(borders: Sequence[tuple[str, str]] = BORDERS, colours: int = 4) -> CNF:
    """The colourings of a map: variable (region, colour); each region has exactly one colour, neighbours have
    different ones."""
    regions = sorted({region for border in borders for region in border})
    number = {key: 1 + i for i, key in enumerate(itertools.product(regions, range(colours)))}
    clauses: list[tuple[int, ...]] = []
    for region in regions:
        own = [number[region, c] for c in range(colours)]
        clauses += [tuple(own), *((-a, -b) for a, b in itertools.combinations(own, 2))]
    for a, b in borders:
        clauses += [(-number[a, c], -number[b, c]) for c in range(colours)]
    return CNF(len(number), tuple(clauses))


def map_colouring(root: Path | None) -> Dataset:
    """Whether a map of eight regions can be coloured by four colours."""
    return formula_set("map_colouring", colouring())

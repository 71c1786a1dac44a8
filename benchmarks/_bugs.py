"""Bugs to plant: small changes of an expression or a statement, drawn by a seed (see ``mutants.py``)."""

from __future__ import annotations

import ast
import collections
import dataclasses
import random
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# How many of 300 bugs each package gets; kernels are compiled anew for each bug, which takes a minute.
SHARES = {
    "numerics.py": 12,
    "evaluation": 60,
    "evidence": 68,
    "objectives": 36,
    "training": 52,
    "distributions/kernels": 12,
    "distributions": 60,
}

# --- kinds of bugs ------------------------------------------------------------------------------------------

_BINARY = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_DROPPED = {
    "detach",
    "exp",
    "log",
    "abs",
    "sqrt",
    "square",
    "clamp",
    "clone",
    "double",
    "contiguous",
    "neg",
    "flip",
}
_DROPPED |= {"masked_fill", "transpose", "logical_not", "relu", "tril", "triu", "requires_grad_", "cumsum"}
_NAMES = {
    "sum": "mean",
    "mean": "sum",
    "max": "min",
    "min": "max",
    "any": "all",
    "all": "any",
    "zeros": "ones",
}
_NAMES |= {"ones": "zeros", "amax": "amin", "amin": "amax", "floor": "ceil", "ceil": "floor"}
_NAMES |= {"logsumexp": "sum", "maximum": "minimum", "minimum": "maximum", "log1p": "log", "expm1": "exp"}
# Two arguments that may change places, and builtins in which that fails at once.
_EITHER_WAY = {"max", "min", "maximum", "minimum", "logaddexp", "hypot", "broadcast_tensors", "add", "mul"}
_EITHER_WAY |= {"isinstance", "getattr", "hasattr", "setattr"}


def _binary(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return ast.BinOp(node.left, _BINARY[type(node.op)](), node.right)
    return None


def _compare(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        return ast.Compare(node.left, [_COMPARE[type(node.ops[0])]()], node.comparators)
    return None


def _constant(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, (bool, int, float)):
        return None
    value = node.value
    if isinstance(value, bool):
        return ast.Constant(not value)
    return ast.Constant(value + 1 if isinstance(value, int) or value == 0 else 2 * value)


def _negation(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        return None if isinstance(node.operand, ast.Constant) else node.operand
    return None


def _connective(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    return None


def _dropped_method(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _DROPPED:
        return node.func.value
    return None


def _other_function(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.Call):
        return None
    f = node.func
    if isinstance(f, ast.Attribute) and f.attr in _NAMES:
        return ast.Call(ast.Attribute(f.value, _NAMES[f.attr], ast.Load()), node.args, node.keywords)
    if isinstance(f, ast.Name) and f.id in ("max", "min", "any", "all"):
        return ast.Call(ast.Name(_NAMES[f.id], ast.Load()), node.args, node.keywords)
    return None


def _swapped(node: ast.AST) -> ast.AST | None:
    if (
        not isinstance(node, ast.Call)
        or len(node.args) < 2
        or any(isinstance(a, ast.Starred) for a in node.args)
    ):
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in _EITHER_WAY:
        return None
    first, second, *rest = node.args
    return ast.Call(node.func, [second, first, *rest], node.keywords)


def _dropped_keyword(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and node.keywords and node.keywords[-1].arg not in (None, "strict"):
        return ast.Call(node.func, node.args, node.keywords[:-1])
    return None


def _branches(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.IfExp):
        return ast.IfExp(node.test, node.orelse, node.body)
    return None


def _removed(node: ast.AST) -> ast.AST | None:
    if isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break)):
        return ast.Pass()
    if isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield, ast.YieldFrom)):
        return ast.Pass()
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
        return ast.Pass()
    return None


def _off_by_one(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range":
        *first, last = node.args[:2]
        shorter = ast.BinOp(last, ast.Sub(), ast.Constant(1))
        return ast.Call(node.func, [*first, shorter, *node.args[2:]], [])
    if isinstance(node, ast.Slice) and node.upper is not None:
        return ast.Slice(node.lower, ast.BinOp(node.upper, ast.Sub(), ast.Constant(1)), node.step)
    if isinstance(node, ast.Slice) and node.lower is not None:
        return ast.Slice(ast.BinOp(node.lower, ast.Add(), ast.Constant(1)), None, node.step)
    return None


KINDS: dict[str, Callable[[ast.AST], ast.AST | None]] = {
    "operator": _binary,
    "comparison": _compare,
    "constant": _constant,
    "negation": _negation,
    "connective": _connective,
    "method dropped": _dropped_method,
    "other function": _other_function,
    "arguments swapped": _swapped,
    "keyword dropped": _dropped_keyword,
    "branches swapped": _branches,
    "statement removed": _removed,
    "off by one": _off_by_one,
}


# --- where bugs go ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One bug: ``source[start:stop]`` of a file becomes ``after``; ``key`` stays when other lines move."""

    path: str
    line: int
    last: int
    kind: str
    scope: str
    before: str
    after: str
    start: int
    stop: int
    nth: int
    statement: int

    @property
    def key(self) -> str:
        return f"{self.path}:{self.scope}:{self.kind}:{self.before} -> {self.after}:{self.nth}"


def _nodes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int]]:
    """Nodes that compute (no annotations, messages and imports), their function, their statement's line."""

    def walk(node: ast.AST, scope: str, line: int) -> Iterator[tuple[ast.AST, str, int]]:
        if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.stmt):
            line = node.lineno
        yield node, scope, line
        if isinstance(node, ast.Raise) or _is_message(node):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope = f"{scope}.{node.name}".lstrip(".")
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "ctx"):
                continue
            for child in value if isinstance(value, list) else [value]:
                # zip(..., strict=True) is an assertion
                if isinstance(child, ast.AST) and getattr(child, "arg", "") != "strict":
                    yield from walk(child, scope, line)

    yield from walk(tree, "", 1)


def _is_message(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("warn", "print", "cast", "TypeVar", "getLogger")


def mutants_of(path: Path) -> list[Mutant]:
    source = path.read_text()
    offsets = [0]
    for row in source.encode().splitlines(keepends=True):
        offsets.append(offsets[-1] + len(row))
    seen: collections.Counter[tuple] = collections.Counter()
    found = []
    for node, scope, statement in _nodes(ast.parse(source)):
        for kind, change in KINDS.items():
            if not hasattr(node, "lineno") or (new := change(node)) is None:
                continue
            start = offsets[node.lineno - 1] + node.col_offset
            stop = offsets[node.end_lineno - 1] + node.end_col_offset
            before = source.encode()[start:stop].decode()
            after = ast.unparse(ast.fix_missing_locations(new))
            if not isinstance(node, (ast.stmt, ast.Slice)):
                after = f"({after})"
            one = (scope, kind, before, after)
            where = str(path.relative_to(ROOT)), node.lineno, node.end_lineno
            found.append(Mutant(*where, kind, scope, before, after, start, stop, seen[one], statement))
            seen[one] += 1
    return found


def files_of(package: str) -> list[Path]:
    place = ROOT / "pyroelbo" / package
    return [place] if place.is_file() else sorted(p for p in place.glob("*.py") if p.name != "__init__.py")


def draw(number: int, seed: int) -> list[Mutant]:
    """Each package's share, its kinds in turn, one bug a line; the packages interleaved."""
    generator = random.Random(seed)
    drawn: list[tuple[float, Mutant]] = []
    for package, share in SHARES.items():
        pools = {kind: [] for kind in KINDS}
        for path in files_of(package):
            for mutant in mutants_of(path):
                pools[mutant.kind].append(mutant)
        for pool in pools.values():
            generator.shuffle(pool)
        wanted, lines, taken = max(1, share * number // sum(SHARES.values())), set(), []
        while len(taken) < wanted and any(pools.values()):
            for pool in pools.values():
                while pool and (pool[-1].path, pool[-1].line) in lines:
                    pool.pop()
                if pool and len(taken) < wanted:
                    taken.append(pool.pop())
                    lines.add((taken[-1].path, taken[-1].line))
        drawn += [((i + generator.random()) / wanted, m) for i, m in enumerate(taken)]
    return [m for _, m in sorted(drawn, key=lambda pair: pair[0])]

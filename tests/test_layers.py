"""Imports go down the layers or stay within a package, and the three prohibitions hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pyroelbo

ROOT = Path(pyroelbo.__file__).parent

LINES = [
    {"_version", "numerics", "batch", "optim", "files"},
    {"results", "runs"},
    {"nn", "data"},
    {"flows"},
    {"pair"},
    {"distributions"},
    {"evaluation"},
    {"priors", "encoders", "compiled", "coding"},
    {"models", "evidence"},
    {"objectives"},
    {"training"},
    {"report"},
    {"cli", "__init__"},
    {"__main__"},
]
LINE = {name: i for i, names in enumerate(LINES) for name in names}
FORBIDDEN = [
    ({"objectives", "training"}, {"models"}),
    ({"report"}, set(LINE) - {"numerics", "results", "_version"}),
]


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "pyroelbo":
            names = [f"pyroelbo.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            if name.startswith("pyroelbo."):
                yield name.split(".")[1]


def violations(here, source):
    """Imports of ``here`` that are not of a line above it, nor of its own package."""
    found = []
    for there in set(imports(source)) - {here}:
        if LINE[there] >= LINE[here] or any(here in a and there in b for a, b in FORBIDDEN):
            found.append((here, there))
    return sorted(found)


def test_imports_go_down():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 10
    assert [v for f in files for v in violations(room(f), f.read_text())] == []


def test_the_check_can_fail():
    for here, there in (
        ("evidence", "models"),
        ("models", "evidence"),
        ("objectives", "models"),
        ("training", "models"),
        ("compiled", "objectives"),
        ("compiled", "training"),
        ("coding", "evidence"),
        ("priors", "compiled"),
        ("numerics", "batch"),
        ("report", "pair"),
    ):
        assert violations(here, f"def f():\n    from pyroelbo.{there} import x") == [(here, there)]
        assert violations(here, f"from pyroelbo import {there}") == [(here, there)]


def test_import_is_light():
    """What costs seconds is imported where it is used."""
    heavy = (
        "arviz",
        "matplotlib.pyplot",
        "sklearn",
        "skimage",
        "xarray",
        "pandas",
        "numba",
        "constriction",
        "torch._inductor",
        "scipy.stats",
    )
    code = (
        "import pyro, sys; before = set(sys.modules); import pyroelbo, pyroelbo.report, pyroelbo.cli; "
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

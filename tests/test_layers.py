"""Imports go down the layers or stay within a package, and the three prohibitions hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pyroelbo

ROOT = Path(pyroelbo.__file__).parent

LAYERS = [
    ["_version", "numerics", "records", "findings"],
    ["semiring", "nn", "causal", "data", "runs", "coder"],
    ["distributions", "pair", "sites", "terms", "joint", "enumeration"],
    ["priors", "objectives", "stepping", "compiled", "em", "unamortized"],
    ["models", "evidence"],
    ["train"],
    ["report"],
    ["cli", "__init__"],
]
LEVEL = {name: i for i, names in enumerate(LAYERS) for name in names}
FORBIDDEN = [
    ({"objectives", "stepping", "em", "evidence", "train", "compiled"}, {"models"}),
    ({"models"}, {"objectives", "evidence", "train"}),
    (
        {"report"},
        {n for names in LAYERS for n in names} - {"numerics", "records", "findings", "_version", "report"},
    ),
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
    found = []
    for there in set(imports(source)) - {here}:
        if LEVEL[there] > LEVEL[here] or any(here in a and there in b for a, b in FORBIDDEN):
            found.append((here, there))
    return found


def test_imports_go_down():
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 10
    assert [v for f in files for v in violations(room(f), f.read_text())] == []


def test_the_check_can_fail():
    assert violations("evidence", "from pyroelbo import models") == [("evidence", "models")]
    assert violations("numerics", "def f():\n    from pyroelbo.pair import Pair") == [("numerics", "pair")]
    assert violations("report", "from pyroelbo.pair import Pair") == [("report", "pair")]


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
        "torch._inductor",
        "scipy.stats",
    )
    code = (
        "import pyro, sys; before = set(sys.modules); import pyroelbo, pyroelbo.report, pyroelbo.cli; "
        f"print([m for m in {heavy} if m in sys.modules and m not in before])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

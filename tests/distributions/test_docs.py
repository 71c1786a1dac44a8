"""The snippets of docs/structures.md run, each on its own after the first."""

import math
import re
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

from pyroelbo import distributions

PAGE = (Path(__file__).parents[2] / "docs" / "structures.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (\w+)$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
START = "from pyroelbo import distributions as ped"


@pytest.mark.parametrize(("name", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_snippet(name, text):
    if name == "Models":
        pytest.importorskip("py_d4")
    assert hasattr(distributions, name)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f"ped.{name}(" in code
    torch.set_default_dtype(torch.float32)  # as a reader has it
    known = {"torch": torch, "dist": dist, "math": math}
    exec(f"{START}\n{code}", known)


def test_every_structure_has_a_section():
    assert START in PAGE
    families = {
        "LinearChain",
        "HMM",
        "SemiMarkov",
        "TreeCRF",
        "PCFG",
        "CTC",
        "Mixture",
        "Models",
        "LinearGaussianChain",
    }
    assert families == {name for name, _ in SECTIONS}

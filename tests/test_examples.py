"""Every example runs small, as a user would run it; one that the table lacks fails the suite."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from pyroelbo.results import Audit

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS = {
    "vae": lambda tmp: (["--smoke", "--out", str(tmp / "vae")],),
    "priors": lambda tmp: (["--smoke", "--out", str(tmp / "priors")],),
    "ppca": lambda tmp: (["--smoke"],),
    "mixture": lambda tmp: (["--smoke", "--out", str(tmp / "mixture")],),
    "model_choice": lambda tmp: (["--smoke", "--out", str(tmp / "model_choice")],),
    "compress": lambda tmp: (["--smoke", "--out", str(tmp / "compress")],),
    "hmm_letters": lambda tmp: (["--smoke"],),
    "grammar": lambda tmp: (["--smoke", "--out", str(tmp / "grammar")],),
    "ctc_digits": lambda tmp: (["--smoke", "--out", str(tmp / "ctc")],),
    "regimes": lambda tmp: (["--smoke", "--out", str(tmp / "regimes")],),
    "chorales": lambda tmp: (["--smoke"],),
    "hierarchy": lambda tmp: (["--smoke", "--out", str(tmp / "hierarchy")],),
    "byte_vae": lambda tmp: (["--smoke", "--out", str(tmp / "bytes")],),
    "progressive_vae": lambda tmp: (["--smoke", "--out", str(tmp / "progressive")],),
    "discrete_vae": lambda tmp: (["--smoke", "--out", str(tmp / "discrete")],),
    "sentence_vae": lambda tmp: (["--smoke"],),
    "rate_distortion": lambda tmp: (["--smoke", "--out", str(tmp / "rate")],),
    "vq_vae": lambda tmp: (["--smoke", "--out", str(tmp / "vq")],),
    "diffusion": lambda tmp: (["--smoke", "--out", str(tmp / "diffusion")],),
    "vdm": lambda tmp: (["--smoke", "--out", str(tmp / "vdm")],),
    "masked_diffusion": lambda tmp: (["--smoke", "--out", str(tmp / "masked")],),
    "style_vae": lambda tmp: (["--smoke", "--out", str(tmp / "style")],),
    "fixed_encoder": lambda tmp: (["--smoke", "--out", str(tmp / "fixed")],),
    "iwae": lambda tmp: (["--smoke", "--out", str(tmp / "iwae")],),
    "sat": lambda tmp: (["--smoke"],),
    "superpixel": lambda tmp: (["--smoke", "--out", str(tmp / "superpixel")],),
    "topics": lambda tmp: (["--smoke"],),
    "experts": lambda tmp: (["--smoke", "--out", str(tmp / "experts")],),
    "hidden_tree": lambda tmp: (["--smoke", "--out", str(tmp / "tree")],),
    "words": lambda tmp: (["--smoke"],),
    "your_own_pair": lambda tmp: (3,),
    "whole_audit": lambda tmp: (["--smoke", "--out", str(tmp / "whole")],),
    "audit_a_pyro_model": lambda tmp: (["--smoke", "--out", str(tmp / "schools")],),
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_example_is_missing():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_example(name, tmp_path, capsys):
    if name == "sat":
        pytest.importorskip("py_d4")
    torch.set_default_dtype(torch.float32)
    result = load(name).main(*ARGUMENTS[name](tmp_path))
    audits = result.values() if isinstance(result, dict) else [result]
    assert all(isinstance(a, Audit) for a in audits)
    assert re.search("nats per datum|one joint value, nats", capsys.readouterr().out)


@pytest.mark.slow
def test_vowels_and_consonants_part(capsys):
    torch.set_default_dtype(torch.float32)
    load("hmm_letters").main([])
    states = [
        set(re.findall(r"([a-z]):", s)) for s in capsys.readouterr().out.splitlines() if s[:5] == "state"
    ]
    assert any(set("aeiou") <= s and not s & set("bcdfgjklmnpqrsvwxz") for s in states)


def test_your_own_pair_is_short():
    assert len((EXAMPLES / "your_own_pair.py").read_text().splitlines()) < 40


@pytest.mark.slow
def test_the_demos_bounds_are_ordered(tmp_path):
    torch.set_default_dtype(torch.float32)
    result = load("vae").main(["--out", str(tmp_path / "vae")])
    elbo, iwae, quadrature = (result[m] for m in ("elbo", "iwae-64", "quadrature"))
    assert quadrature.mean >= iwae.mean - 4 * iwae.mean_error and iwae.mean >= elbo.mean
    assert quadrature.resolution.max() < 1e-3


@pytest.mark.slow
def test_the_audit_exposes_the_bad_guide(tmp_path):
    torch.set_default_dtype(torch.float32)
    results = load("audit_a_pyro_model").main(["--out", str(tmp_path)])
    gaps = {name: {g.method.split("-")[0]: g for g in r.gaps} for name, r in results.items()}
    assert gaps["a fifth as wide"]["elbo"].mean > 5 > 1 > gaps["AutoMultivariateNormal"]["elbo"].mean > 0
    # A z-test of each at 1e-6; AIS from the prior sees the evidence whatever the guide.
    assert all(abs(g["ais"].mean) < 4.9 * g["ais"].mean_error for g in gaps.values())


@pytest.mark.slow
def test_a_learned_grammar_brackets_better_than_trees_that_know_nothing(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    load("grammar").main(["--out", str(tmp_path / "grammar")])
    rows = re.findall(
        r"^(learned grammar|right-branching|random trees) .* ([0-9.]+)$", capsys.readouterr().out, re.M
    )
    scores = {name: float(score) for name, score in rows}
    assert scores["learned grammar"] > max(scores["right-branching"], scores["random trees"])


@pytest.mark.slow
def test_digits_are_read_column_by_column(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    load("ctc_digits").main(["--out", str(tmp_path / "ctc")])
    (rate,) = re.findall(r"^test +[-0-9.]+ +([0-9.]+)%$", capsys.readouterr().out, re.M)
    assert float(rate) < 10

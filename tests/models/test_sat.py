"""Satisfiability: counts as evidence, a compiled guide that is tight, a learned one that comes closer."""

import math
import random

import pyro
import pytest
import torch

from pyroelbo import audit, evidence, fit, models
from pyroelbo.cli import main
from pyroelbo.distributions import CNF
from tests.oracles import models_of

pytest.importorskip("py_d4")
pytest.importorskip("pysat")


def formula(variables, clauses, seed):
    draw = random.Random(seed)
    rows = [draw.sample(range(1, variables + 1), 3) for _ in range(clauses)]
    return CNF(variables, tuple(tuple(draw.choice((-1, 1)) * v for v in row) for row in rows))


def counted(cnf, log_weights):
    return math.log(sum(math.exp(w) for _, w, _ in models_of(cnf.clauses, log_weights.tolist())))


@pytest.mark.parametrize("weights", [0.5, [0.2, 0.9, 0.5, 0.4, 0.3, 0.6, 0.7, 0.8]])
def test_the_evidence_is_the_weighted_count_and_the_compiled_guide_is_tight(weights):
    pair, y = models.SAT(formula(8, 20, 1), weights=weights), torch.ones(3)
    expected = counted(pair.formula, pair.log_weights)
    torch.testing.assert_close(pair.log_evidence(y), torch.full((3,), expected))
    rows = {b.method: b for b in audit(pair, y, particles=8).bounds}
    torch.testing.assert_close(rows["elbo"].value, rows["exact"].value)
    torch.testing.assert_close(rows["elbo"].value, torch.full((3,), expected))


def test_the_learned_guide_stays_on_models_and_training_closes_its_gap():
    torch.manual_seed(0)
    pair, y = models.SAT(formula(9, 24, 3), "autoregressive", hidden=(32,)), torch.ones(8)
    exact = counted(pair.formula, pair.log_weights)
    before = evidence.elbo(pair, y, particles=200).value.mean()
    assert before < exact
    fit(pair, y, objective="rloo", particles=8, epochs=80, batch_size=8, learning_rate=0.03, progress=False)
    found = evidence.elbo(pair, y, particles=200)
    assert (found.value <= exact + 1e-9 + 5 * found.stderr).all()
    assert exact - found.value.mean() < 0.3 * (exact - before)


def test_the_learned_guides_probabilities_sum_to_one():
    pair, y = models.SAT(formula(6, 12, 5), "autoregressive", weights=0.3, hidden=(8,)), torch.ones(1)
    for p in pair.encoder.parameters():
        torch.nn.init.normal_(p, std=0.5)
    trace = pyro.poutine.trace(pair.guide).get_trace(y)
    q = trace.nodes["z"]["fn"]
    every = torch.tensor([z for z, _, _ in models_of(pair.formula.clauses, pair.log_weights.tolist())])
    assert float(q.log_prob(every[:, None]).exp().sum().detach()) == pytest.approx(1)
    others = torch.randint(2, (40, 1, 6))
    wrong = ~pair.formula.satisfied(others[:, 0])
    assert (q.log_prob(others)[wrong] == -math.inf).all()


def test_unsatisfiable_formulas():
    never = CNF(2, ((1, 2), (1, -2), (-1, 2), (-1, -2)))
    assert models.SAT(never).log_evidence(torch.ones(2)).tolist() == [-math.inf] * 2
    with pytest.raises(ValueError, match="expected one that can be satisfied"):
        evidence.elbo(models.SAT(never, "autoregressive"), torch.ones(1), particles=2)


def test_what_is_refused():
    cnf = CNF(2, ((1, 2),))
    with pytest.raises(ValueError, match=r"y: expected ones \[B\]"):
        models.SAT(cnf).log_evidence(torch.zeros(2))
    with pytest.raises(ValueError, match=r"weights: expected probabilities in \(0, 1\)"):
        models.SAT(cnf, weights=1.0)
    with pytest.raises(ValueError, match="guide: expected one of"):
        models.SAT(cnf, "exact")


MAP = "p cnf 4 3\n1 -2 0\n2 3 -4 0\n-1 4 0\n"  # six models


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A trained run of a formula in a file."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    (tmp_path / "f.cnf").write_text(MAP)
    assert main(["train", "sat", "--data", "f.cnf", "--out", "r", "-n", "2", "--quiet"]) == 0
    assert "f.cnf: formula of 4 variables, 3 clauses; 1 train" in capsys.readouterr().out
    return tmp_path / "r"


def test_the_command_line_counts_and_lists_models(run, capsys):
    assert main(["audit", "r", "--particles", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [s.split()[2] for s in lines if s.startswith("exact")][-1] == f"{math.log(6):.6f}"
    assert len([s for s in lines if s.startswith(("elbo", "iwae-8"))]) == 4
    assert main(["sample", "r", "-n", "100"]) == 0
    assert "v " in capsys.readouterr().out
    cnf = CNF(4, ((1, -2), (2, 3, -4), (-1, 4)))
    found = {tuple(map(int, s.split()[1:-1])) for s in (run / "samples.txt").read_text().splitlines()}
    assert all([abs(x) for x in row] == [1, 2, 3, 4] for row in found)
    assert cnf.satisfied(torch.tensor([[int(x > 0) for x in row] for row in found])).all()
    assert len(found) == 6  # one is missed with a chance below 1e-7


def test_weights_are_no_count(run, capsys):
    words = ["train", "sat", "--data", "f.cnf", "--out", "w", "-n", "1", "--quiet", "--set", "weights=0.25"]
    assert main(words) == 0
    assert main(["audit", "w", "--particles", "4"]) == 0
    printed = capsys.readouterr().out
    assert "the count of models with weight 0.25 for true" in printed and "ln(models)" not in printed


def test_without_the_compiler_the_bounds_stand_alone(run, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["audit", "r", "--particles", "8"]) == 0
    printed = capsys.readouterr().out
    assert "no exact value: compiling a formula needs the compiler d4: pip install" in printed
    assert "elbo" in printed and "\nexact" not in printed
    assert main(["sample", "r"]) == 1
    assert capsys.readouterr().err.startswith("pyroelbo: compiling a formula needs the compiler d4: pip")


def test_formulas_that_cannot_be_used_are_told_in_one_line(run, capsys):
    (run.parent / "never.cnf").write_text("p cnf 1 2\n1 0\n-1 0\n")
    (run.parent / "bad.cnf").write_text("p cnf 2 1\n\n1 3 0\n")
    train = ["train", "sat", "--out", "x", "--quiet", "--data"]
    for words, message in (
        ([*train, "never.cnf"], "one without models, as the solver proves: ln p(y) is -inf"),
        ([*train, "bad.cnf"], "bad.cnf, line 3: expected literals ±1 … ±2, got 3"),
        ([*train, "f.cnf", "--set", "guide=compiled"], "got none in SAT, whose guide is exact as it is"),
        ([*train, "iris"], "--data: expected formula for sat, got iris, vectors"),
        ([*train, "f.cnf", "--columns", "a"], "--columns: expected none for a .cnf file, got a"),
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (run.parent / "x").exists()
    (run.parent / "f.cnf").write_text(MAP.replace("-1 4", "-1 3"))
    assert main(["audit", "r"]) == 1
    assert "expected the data that the run was trained on, with names" in capsys.readouterr().err


def test_the_compiled_guide_tells_that_there_is_nothing_to_draw():
    never, y = models.SAT(CNF(1, ((1,), (-1,)))), torch.ones(1)
    for draw in (lambda: never.guide(y), lambda: never.simulate(2)):
        with pytest.raises(ValueError, match="one without models, as its decision diagram proves"):
            draw()

"""Satisfiability: counts as evidence, a compiled guide that is tight, a learned one that comes closer."""

import math
import random

import pyro
import pytest
import torch

from pyroelbo import audit, evidence, fit, models
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

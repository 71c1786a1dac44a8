"""Exact rows are exact, impossible data are impossible, and what cannot be trusted says so."""

import importlib
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import ExactPair, Pair, audit, evidence, models
from pyroelbo import distributions as ped
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.results import Terms

from ..pairs import Nonlinear

quadrature_module = importlib.import_module("pyroelbo.evidence.quadrature")


class Conjugate(ExactPair):
    """N(0, 1) -> N(z, 1) whose evidence is off by ``shift`` for the first datum."""

    def __init__(self, shift=0.0, exact_guide=False):
        super().__init__()
        self.shift = shift
        self.right = exact_guide

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def log_evidence(self, y):
        value = dist.Normal(0.0, math.sqrt(2.0)).log_prob(y)
        return value + self.shift * (torch.arange(len(y)) == 0)

    def posterior(self, y):
        return dist.Normal(0.5 * y, math.sqrt(0.5))


class Amortized(Conjugate):
    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.4 * y, 0.8))


def test_an_exact_row_that_iwae_refutes_raises_with_the_rows():
    y = torch.randn(20)
    with pytest.raises(evidence.Contradiction, match="contradicted: iwae-64 lies") as caught:
        audit(Amortized(shift=-30.0), y, progress=False)
    rows = caught.value.audit
    assert [b.method for b in rows.bounds] == ["exact", "elbo", "iwae-64"]
    assert rows["iwae-64"].mean - rows["exact"].mean == pytest.approx(1.5, abs=0.2)
    honest = audit(Amortized(), y, progress=False)
    assert honest.reference == "exact"


@pytest.mark.parametrize("shift", [0.01, -0.01, 5.0])
def test_an_exact_guide_shows_every_error_of_its_evidence(shift):
    with pytest.raises(evidence.Contradiction, match="the guide is the exact posterior.*for datum 0"):
        audit(Conjugate(shift), torch.randn(20), progress=False)
    audit(Conjugate(), torch.randn(20), progress=False)


def test_the_test_of_exact_rows_needs_no_assumption():
    """One draw in 2,000 with weight 2,000 - 1e-3, the others near nothing: z-scores trip, Markov's inequality
    does not.
    """

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.5)))
            pyro.sample("y", dist.Normal(50.0 * k, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 1 / 2000)))

    for seed in range(20):
        pyro.set_rng_seed(seed)
        assert audit(Pair.of(model, guide), torch.full((10,), 50.0), progress=False).reference == "exact"


def test_exact_evidence_is_float64_inside():
    """Nearly singular covariance in float32: 137.56 was printed where 107.94 is right."""
    torch.set_default_dtype(torch.float32)
    try:
        pyro.set_rng_seed(0)
        y = torch.randn(200, 5) @ torch.randn(5, 20)
        pair = models.PPCA(20, 6)
        pair.solve(y)
        before = {k: v.clone() for k, v in pair.state_dict().items()}
        found = evidence.exact(pair, y)
        assert all(
            torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in pair.state_dict().items()
        )
        assert torch.get_default_dtype() == torch.float32 and found.value.dtype == torch.float64
        weight, noise = pair.generator.weight.double(), (-2 * pair.generator.log_scale.double().abs()).exp()
        covariance = weight @ weight.T + noise * torch.eye(20, dtype=torch.float64)
        right = dist.MultivariateNormal(pair.generator.loc.double(), covariance).log_prob(y.double())
    finally:
        torch.set_default_dtype(torch.float64)
    torch.testing.assert_close(found.value, right.detach(), rtol=1e-6, atol=1e-4)


def test_enumerated_evidence_far_from_zero_is_float64_inside():
    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2, dtype=y.dtype)))
            loc = pyro.param("loc", torch.tensor([1000.0, 1000.2]))
            pyro.sample("y", dist.Normal(loc[k], 0.1), obs=y)

    y = torch.tensor([1000.05, 1000.3], dtype=torch.float32)
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    try:
        found = evidence.exact(Pair.of(model, lambda y: None), y).value
        loc = pyro.param("loc").detach().double()
    finally:
        torch.set_default_dtype(torch.float64)
    right = (dist.Normal(loc, 0.1).log_prob(y.double()[:, None]) - math.log(2)).logsumexp(-1)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def hmm(size):
    """Two states that emit symbol 2 never."""
    emission = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.9, 0.0]]).log().expand(size, 2, 3)
    return ped.HMM(
        torch.zeros(size, 2), torch.zeros(size, 2, 2), dist.Categorical(logits=emission), num_steps=3
    )


class Chain(ExactPair):
    def model(self, y):
        emission = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.9, 0.0]])
        with pyro.plate("data", len(y)):
            shape = torch.zeros(len(y), 3, 2)
            z = pyro.sample("z", ped.LinearChain(shape[:, 0], shape[:, 0, :, None].expand(-1, 2, 2), shape))
            pyro.sample("y", dist.Categorical(logits=emission.log()[z]).to_event(1), obs=y)

    def log_evidence(self, y):
        return hmm(len(y)).log_prob(y)

    def posterior(self, y):
        return hmm(len(y)).posterior(y)


def test_impossible_data_have_minus_infinity_in_every_row():
    y = torch.tensor([[0, 1, 0], [0, 2, 1]])
    right = evidence.exact(Chain(), y)
    assert right.value[0].isfinite() and right.value[1] == -math.inf
    for bound in (evidence.elbo(Chain(), y, 8), evidence.iwae(Chain(), y, 8)):
        torch.testing.assert_close(bound.value, right.value, rtol=0, atol=1e-10)
        assert any("probability zero under the model" in note for note in bound.notes)
    rows = audit(Chain(), y, progress=False)
    assert not any(b.value.isnan().any() for b in rows.bounds)


def test_a_zero_joint_has_weight_zero_whatever_the_guide_says():
    log_joint = torch.tensor([[0.0, -math.inf, -math.inf]])
    log_guide = torch.tensor([[0.5, -math.inf, math.nan]])
    found = Terms({"y": log_joint}, {"z": log_guide}, frozenset({"y"}), {}).log_weight
    assert found.tolist() == [[-0.5, -math.inf, -math.inf]]


def test_one_effective_draw_is_said():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 30), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 0.01), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.ones(len(y), 30), 1.0).to_event(1))

    bound = evidence.iwae(Pair.of(model, guide), torch.zeros(3), 64)
    assert bound.ess.max() < 2
    assert any("effective sample size below 2 for 3 of 3 data" in note for note in bound.notes)
    fine = evidence.iwae(Nonlinear(), torch.randn(3, 4), 64)
    assert not any("effective sample size" in note for note in fine.notes)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_pairs_own_type_decides(dims, default):
    """Float64 parameters under a float32 default, and the other way round."""
    kind = torch.float64 if default == torch.float32 else torch.float32
    pyro.clear_param_store()
    matrix = torch.randn(3, dims, dtype=kind)

    class Linear(Pair):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(matrix)
            self.shift = torch.nn.Parameter(torch.zeros(dims, dtype=kind))

        def model(self, y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(self.shift, torch.ones_like(self.shift)).to_event(1))
                pyro.sample("y", dist.Normal(z @ self.weight.T, 0.5).to_event(1), obs=y)

        def guide(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("z", dist.Normal(0.1 * y @ self.weight, torch.ones_like(self.shift)).to_event(1))

    y = torch.randn(4, 3, dtype=kind)
    torch.set_default_dtype(default)
    try:
        pair = Linear()
        found = evidence.quadrature(pair, y)
        evidence.ais(pair, y, 10, 4, progress=False)
        evidence.iwae(pair, y, 8)
        assert Evaluator(pair, y).layout.dtype == kind
    finally:
        torch.set_default_dtype(torch.float64)
    covariance = matrix.double() @ matrix.double().T + 0.25 * torch.eye(3, dtype=torch.float64)
    right = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(y.double())
    torch.testing.assert_close(found.value, right, rtol=0, atol=2e-5 if kind == torch.float32 else 1e-5)


def test_a_quadrature_whose_rules_differ_by_nats_states_no_error(monkeypatch):
    """One rule that misses the mass altogether says nothing about the other."""
    y = torch.randn(3, 4)
    right = evidence.quadrature(Nonlinear(), y)
    honest = quadrature_module._gauss_hermite

    def blind(*arguments):
        return honest(*arguments) - torch.tensor([300.0, 0.0, 0.0])

    monkeypatch.setattr(quadrature_module, "_gauss_hermite", blind)
    bound = evidence.quadrature(Nonlinear(), y)
    assert bound.resolution.isnan().tolist() == [True, False, False]
    assert "the error is unknown for 1 of 3 data" in bound.notes
    assert right.resolution.isfinite().all()

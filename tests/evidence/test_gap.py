"""Planted gaps of known size come back within three standard errors."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, evidence
from pyroelbo.models import PPCA
from pyroelbo.results import Decomposition
from tests.pairs import TABLE, Nonlinear


def within(part, truth):
    return abs(part.mean - float(truth.mean())) < 3 * part.mean_error


def diagonal_on_correlated():
    """pPCA's posterior N(m, S) and the best N(m, diag): its precisions are those of S, and the gap is
    ½ (Σ ln Λ_ii - ln det Λ) with Λ = S⁻¹, the same for every datum."""
    pair, y = PPCA(5, 3, guide="mean_field"), torch.randn(6, 5)
    posterior = pair.posterior(y)
    precision = posterior.precision_matrix.detach()
    best = dist.Normal(posterior.mean.detach(), precision.diagonal(dim1=-2, dim2=-1) ** -0.5)
    gap = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))
    return pair, y, best, gap


def with_guide(pair, loc, scale):
    """The model of the pair with a guide of these numbers."""

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return Pair.of(pair.model, guide)


def test_a_planted_family_gap():
    pair, y, best, truth = diagonal_on_correlated()
    found = evidence.gap(
        with_guide(pair, best.mean, best.scale), y, reference=evidence.exact(pair, y), steps=150
    )
    assert within(found.approximation, truth)
    assert within(found.amortization, torch.zeros(6)) and found.local.notes == ()


def test_a_planted_amortization_gap():
    """A crippled encoder in the same family, its gap KL(q, p) - KL(q*, p) in closed form."""
    pair, y, best, truth = diagonal_on_correlated()
    loc, scale = best.mean + 0.4, 1.6 * best.scale
    crippled = dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    total = dist.kl.kl_divergence(crippled, pair.posterior(y)).detach()
    found = evidence.gap(
        with_guide(pair, loc, scale), y, reference=evidence.exact(pair, y), steps=100, draws=8
    )
    assert within(found.approximation, truth)
    assert within(found.amortization, total - truth)
    assert within(found.total, total)
    assert found.labels == {
        "total": "unbiased",
        "approximation": "upper",
        "amortization": "lower",
        "estimation": "unbiased",
    }
    assert found.estimation.mean < found.total.mean and found.local.cost > found.amortized.cost


def test_a_full_family_has_no_gap():
    pair, y = PPCA(4, 2), torch.randn(3, 4)
    found = evidence.gap(pair, y, particles=50, steps=5)
    assert abs(found.total.mean) < 1e-9
    assert "approximation" in str(found) and found.to_dict()["amortization"]["label"] == "lower"


def test_starts_that_disagree_are_told():
    """Two modes: an optimum for each start, and the better one is taken."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.ones(len(y)), 4.0))
            pyro.sample("y", dist.Normal(z.abs(), 0.1), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(-y, 0.1))

    y = torch.full((40,), 0.5)
    found = evidence.gap(Pair.of(model, guide), y, particles=200, steps=60)
    assert found.reference.method == "quadrature" and found.labels["approximation"] == "estimate"
    assert "disagree" in found.local.notes[0]


def test_a_lower_reference_makes_lower_estimates():
    pair, y = Nonlinear(), torch.randn(2, 4)
    found = evidence.gap(pair, y, particles=20, steps=3, reference=evidence.iwae(pair, y, 500))
    assert isinstance(found, Decomposition) and found.labels["total"] == "lower"


def test_what_it_does_not_take():
    make, draw = TABLE["mixture-encoder"]
    with pytest.raises(evidence.Unavailable, match="'z' is a Categorical"):
        evidence.gap(make(), draw(2))
    with pytest.raises(evidence.Unavailable, match="no reference for the gap"):
        evidence.gap(Nonlinear(latent=3), torch.randn(2, 4))
    for options in ({"particles": 0}, {"steps": 0}, {"draws": 0}, {"learning_rate": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            evidence.gap(Nonlinear(), torch.randn(2, 4), **options)

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(y)), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(y, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    with pytest.raises(evidence.Unavailable, match="'b' depends on other draws"):
        evidence.gap(Pair.of(model, guide), torch.randn(2))


def test_a_guide_that_leaves_the_support_has_no_gap_to_split():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", dist.Exponential(1.0)), 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 2.0))

    with pytest.raises(evidence.Unavailable, match="the ELBO is -inf"):
        evidence.gap(Pair.of(model, guide), torch.rand(3), 50, steps=2)


def test_one_draw_tells_no_error():
    pair, y = Nonlinear(), torch.randn(2, 4)
    assert evidence.eubo(pair, y, 1, source="weights").stderr.isnan().all()
    reference = evidence.iwae(pair, y, 50)
    assert evidence.gap(pair, y, 1, steps=1, reference=reference).local.stderr.isnan().all()

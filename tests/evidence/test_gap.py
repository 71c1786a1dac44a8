"""Planted gaps of known size come back within three standard errors."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, encoders, evidence
from pyroelbo.flows import FlowDistribution, SplineFlow
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


@pytest.mark.parametrize(
    ("context", "most"), [(None, 0.02), (1, 0.25), pytest.param(0, 0.25, marks=pytest.mark.slow)]
)
def test_families_that_hold_correlations(context, most):
    """pPCA's posterior is Gaussian and correlated. A diagonal Gaussian loses half a nat on it, a full one
    nothing (context None), and a flow, each datum with maps of its own, at most a quarter of that."""
    pair, y = PPCA(4, 2, guide="mean_field"), torch.randn(3, 4)
    with torch.no_grad():
        pair.generator.weight.fill_(1.0)
    posterior = pair.posterior(y)
    precision = posterior.precision_matrix.detach()
    truth = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))
    start = torch.cat([posterior.mean.detach(), torch.zeros(3, 2)], -1)
    if context is None:
        head, x = encoders.FullEncoder(2), torch.cat([start, torch.zeros(3, 1)], -1)
    else:
        maps = SplineFlow(2, "coupling", 2, (12,), 4, context)

    def guide(y):
        with pyro.plate("data", len(y)):
            if context is None:
                q = head(x)
            else:
                q = FlowDistribution(maps, start[:, :2], start[:, 2:], torch.zeros(3, 1) if context else None)
            pyro.sample("z", q)

    reference = evidence.exact(pair, y)
    found = evidence.gap(
        Pair.of(pair.model, guide), y, reference=reference, steps=120, draws=8, learning_rate=0.1
    )
    assert found.approximation.mean < most * float(truth.mean())
    assert found.approximation.mean > -4.5 * found.approximation.mean_error  # false alarms: 3e-6


def absolute(y):
    """Two modes."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.ones(len(y), 1), 4.0).to_event(1))
        pyro.sample("y", dist.Normal(z.squeeze(-1).abs(), 0.1), obs=y)


def test_a_mixture_reaches_both_modes():
    y, head = torch.full((20,), 0.5), encoders.MixtureEncoder(1, components=2)
    with torch.no_grad():
        head.loc.copy_(torch.tensor([[-0.5], [0.5]]))

    def one(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y.unsqueeze(-1), 0.1).to_event(1))

    def two(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", head(torch.tensor([0.2, -2.0, 0.2, -2.0]).expand(len(y), 4)))

    gaps = [
        evidence.gap(Pair.of(absolute, guide), y, particles=400, steps=150).approximation.mean
        for guide in (one, two)
    ]
    # The posterior's mass left of zero is 0.484: ln 2 less 0.016 · 2 for one mode, 5e-4 for both.
    assert 0.6 < gaps[0] < 0.75 and abs(gaps[1]) < 0.03


def test_starts_that_disagree_are_told():
    """Two modes: an optimum for each start, and the better one is taken."""

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(-y.unsqueeze(-1), 0.1).to_event(1))

    y = torch.full((40,), 0.5)
    found = evidence.gap(Pair.of(absolute, guide), y, particles=200, steps=60)
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

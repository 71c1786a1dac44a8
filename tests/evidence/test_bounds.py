"""ELBO and IWAE against exact evidence; the tests of unbiasedness look at Z, not at ln Z."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyroelbo import Pair, evidence
from pyroelbo.evaluation import evaluator as terms
from pyroelbo.evaluation import layout
from pyroelbo.models import PPCA
from tests.pairs import EXACT, TABLE

Z_LIMIT = 4.9  # two-sided normal tail of 1e-6: the declared false-alarm rate of one z-test


def z_of_mean(samples, target):
    return float((samples.mean() - target) / (samples.std() / math.sqrt(len(samples))))


@pytest.mark.parametrize("name", ["ppca", "mixture"])
def test_with_the_exact_guide_the_elbo_is_the_evidence(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(20)
    exact = evidence.exact(pair, y)
    for bound in (evidence.elbo(pair, y, particles=3), evidence.iwae(pair, y, particles=3)):
        assert (bound.value - exact.value).abs().max() < 1e-9
        assert bound.stderr.max() < 1e-9
    assert exact.kind == "exact" and not exact.stderr.any()


@pytest.mark.parametrize("name", ["ppca-mean-field", "mixture-encoder"])
def test_with_another_guide_the_weights_are_unbiased_and_the_bounds_ordered(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    exact = evidence.exact(pair, y).value
    log_w = terms.Evaluator(pair, y).sample(20000).log_weight.detach()
    for i in range(len(y)):
        assert abs(z_of_mean((log_w[:, i] - exact[i]).exp(), 1.0)) < Z_LIMIT
    blocks = log_w.reshape(-1, 20, 4)
    elbo, iwae = log_w.mean(0), (blocks.logsumexp(1) - math.log(20)).mean(0)
    error = log_w.std(0) / math.sqrt(20000)
    assert (iwae < exact + Z_LIMIT * (blocks.logsumexp(1).std(0) / math.sqrt(1000))).all()
    assert (elbo < iwae).all() and (elbo + Z_LIMIT * error < exact).all()


def test_the_plates_size_does_not_enter_the_weights():
    """Sixty thousand data, a hundred of them in the batch: Pyro's RenyiELBO lies above the evidence there."""

    def plate(y):
        return pyro.plate("data", 60_000, subsample_size=len(y))

    def model(y):
        with plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with plate(y):
            pyro.sample("z", dist.Normal(0.4 * y, 0.9))

    y = math.sqrt(2) * torch.randn(100)
    pair = Pair.of(model, guide)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(y)
    bound = evidence.iwae(pair, y, particles=20000)
    assert abs(bound.mean - float(exact.mean())) < 0.01
    elbo = evidence.elbo(pair, y, particles=20000)
    gap = dist.kl.kl_divergence(dist.Normal(0.4 * y, 0.9), dist.Normal(0.5 * y, math.sqrt(0.5)))
    assert ((elbo.value - (exact - gap)).abs() < 5.5 * elbo.stderr).all()


def check_against_exact(pair, y, exact):
    bound = evidence.iwae(pair, y, particles=4000)
    assert ((bound.value - exact).abs() < 6 * bound.stderr + 1e-3).all()


def check_problem():
    def model(y):
        with pyro.plate("data", 1000, subsample_size=len(y)), poutine.mask(mask=torch.arange(5) < 4):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", 1000, subsample_size=len(y)), poutine.mask(mask=torch.arange(5) < 4):
            pyro.sample("z", dist.Normal(0.4 * y, 0.9))

    y = torch.randn(5)
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(y) * (torch.arange(5) < 4)
    return Pair.of(model, guide), y, exact


def test_masked_and_subsampled_agrees_with_exact():
    check_against_exact(*check_problem())


@pytest.mark.parametrize("bug", ["a leaked scale", "a forgotten mask", "a flipped sign"])
def test_planted_bugs_are_caught(bug, monkeypatch):
    """The test above must fail if the library makes one of these mistakes."""
    if bug == "a leaked scale":
        honest = terms.inner_plates
        monkeypatch.setattr(terms, "inner_plates", lambda site: honest(site) * 1000 / 5)
        monkeypatch.setattr(layout, "check_scale", lambda site, program: False)
    elif bug == "a forgotten mask":
        monkeypatch.setattr(terms, "masked", lambda log_prob, mask: log_prob)
    else:
        monkeypatch.setattr(terms.Terms, "log_weight", property(lambda t: t.log_joint + t.log_proposal))
    with pytest.raises((AssertionError, RuntimeError)):
        check_against_exact(*check_problem())


def test_one_draw_has_no_standard_error():
    make, draw = TABLE["own"]
    pair, y = make(), draw(3)
    assert evidence.elbo(pair, y, particles=1).stderr.isnan().all()
    assert evidence.iwae(pair, y, particles=1).stderr.isnan().all()
    with pytest.raises(ValueError, match="particles: expected a positive number"):
        evidence.elbo(pair, y, particles=0)


def test_costs_and_draws_are_counted():
    make, draw = TABLE["own"]
    bound = evidence.iwae(make(), draw(3), particles=7)
    assert (bound.method, bound.draws, bound.cost, bound.scope) == ("iwae-7", 7, 21, "datum")
    for estimator in (evidence.elbo, evidence.cubo, evidence.prior_monte_carlo):
        found = estimator(make(), draw(3), particles=7)
        assert (found.draws, found.cost) == (7, 21)


def test_a_guide_outside_the_models_support_gives_minus_infinity():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.full((len(y),), 0.5), 1.0))

    pair, y = Pair.of(model, guide), torch.rand(3)
    assert (evidence.elbo(pair, y, particles=200).value == -math.inf).all()
    bound = evidence.iwae(pair, y, particles=20000)
    normal = dist.Normal(torch.zeros(3), 1.0)
    exact = (normal.cdf(y) - normal.cdf(y - 1)).log()
    assert ((bound.value - exact).abs() < 6 * bound.stderr).all()


@pytest.mark.parametrize(
    "prior",
    [dist.Exponential(1.0), dist.Gamma(1.0, 1.0), dist.Beta(1.0, 1.0)],
    ids=lambda d: type(d).__name__,
)
def test_a_density_whose_formula_goes_on_beyond_its_support_is_zero_there(prior):
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", prior), 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    pair, y = Pair.of(model, guide), torch.tensor([0.2, 0.9])
    grid = (torch.arange(100_000) + 0.5) / 100_000 * min(float(prior.mean) * 12, 12.0)
    grid = grid[prior.support.check(grid)]
    exact = (dist.Normal(grid[:, None], 0.5).log_prob(y) + prior.log_prob(grid)[:, None]).logsumexp(0)
    exact = exact + (grid[1] - grid[0]).log()
    assert (evidence.elbo(pair, y, particles=200).value == -math.inf).all()
    for bound in (evidence.iwae(pair, y, 40_000), evidence.ais(pair, y, 4, 2000, leapfrog=2, progress=False)):
        ratio = (bound.value - exact).expm1() / ((bound.value - exact).exp() * bound.stderr)
        assert (ratio.abs() < Z_LIMIT).all()


def test_draws_outside_the_support_are_told_of_the_guide_only():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Poisson(z.relu()), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    pair, y = Pair.of(model, guide), torch.tensor([1.0, 2.0])
    for bound, told in (
        (evidence.iwae(pair, y, 200), True),
        (evidence.prior_monte_carlo(pair, y, 200), False),
        (evidence.ais(pair, y, 3, 50, progress=False), True),
        (evidence.ais(pair, y, 3, 50, start="prior", progress=False), False),
    ):
        assert any("of the guide's draws have probability zero" in note for note in bound.notes) == told


@pytest.mark.parametrize("name", ["ppca", "mixture"])
def test_draws_from_the_prior_are_unbiased(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    exact = evidence.exact(pair, y).value
    bound = evidence.prior_monte_carlo(pair, y, particles=40_000)
    assert (torch.expm1(exact - bound.value).abs() < Z_LIMIT * bound.stderr).all()
    assert (bound.method, bound.kind, bound.cost) == ("prior-40000", "lower", 160_000)


def test_draws_from_the_prior_fail_far_out():
    make, draw = TABLE["ppca"]
    pair, y = make(), 30 + draw(4)
    few = evidence.prior_monte_carlo(pair, y, particles=50)
    assert (few.value < evidence.exact(pair, y).value - 1).all() and few.ess.max() < 10


@pytest.mark.cuda
@pytest.mark.parametrize("name", EXACT)
def test_on_a_gpu(name):
    make, draw = TABLE[name]
    pair, y = make().to("cuda"), draw(8)
    exact = evidence.exact(pair, y)
    assert exact.value.is_cuda
    assert (evidence.iwae(pair, y, particles=4000).value - exact.value).abs().max() < 0.5


def test_a_guide_outside_a_densitys_domain_is_minus_infinity_not_nan():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Beta(torch.full((len(y),), 2.0), 2.0))
            pyro.sample("y", dist.Bernoulli(z.clamp(0, 1)), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.full((len(y),), 0.5), 0.5))

    pair, y = Pair.of(model, guide), torch.tensor([0.0, 1.0])
    bound = evidence.elbo(pair, y, particles=100)
    assert (bound.value == -math.inf).all() and "probability zero" in bound.notes[0]
    bound = evidence.iwae(pair, y, particles=20000)
    assert ((bound.value - math.log(0.5)).abs() < 6 * bound.stderr).all()


def test_the_upper_bound_of_posterior_draws_exceeds_by_the_reverse_divergence():
    """E_p ln w - ln p(y) = KL(p, q), in closed form for Gaussians."""
    pair, y = PPCA(5, 2, guide="mean_field"), torch.randn(4, 5)
    posterior, exact = pair.posterior(y), pair.log_evidence(y).detach()
    q = torch.distributions.MultivariateNormal(pair.encoder(y), torch.diag(pair.encoder.log_scale.exp() ** 2))
    truth = exact + torch.distributions.kl_divergence(posterior, q).detach()
    bound = evidence.eubo(pair, y, 20_000)
    assert bound.kind == "upper"
    # 8 z-scores at 5.5: false alarms 3e-7
    assert ((bound.value - truth).abs() < 5.5 * bound.stderr).all()
    weighted = evidence.eubo(pair, y, 20_000, source="weights")
    assert weighted.kind == "estimate" and "either side" in weighted.notes[0]
    assert ((weighted.value - truth).abs() < 5.5 * weighted.stderr).all()
    same = evidence.eubo(PPCA(5, 2), y, 3)
    assert same.stderr.max() < 1e-9


def test_the_chi_bound_is_only_an_estimate():
    """For q = N(0, s²) against the posterior N(0, 1) of an empty datum the second moment is known; few draws
    fall below it.
    """

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(0 * z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 0.8))

    y = torch.zeros(2000)
    pair = Pair.of(model, guide)
    constant = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0))
    # E w² = ∫ p²/q = 0.8 / sqrt(2 - 1/0.64)
    truth = constant + 0.5 * math.log(0.8 / math.sqrt(2 - 1 / 0.64))
    many = evidence.cubo(pair, y[:3], 200_000)
    few = evidence.cubo(pair, y, 2)
    assert many.kind == few.kind == "estimate" and "no upper bound" in many.notes[-1]
    assert (many.value - truth).abs().max() < 0.05
    assert few.value.mean() < constant < truth
    with pytest.raises(ValueError, match="order: expected"):
        evidence.cubo(pair, y, order=0.5)


def test_posterior_draws_are_asked_of_an_exact_pair_only():
    make, draw = TABLE["own"]
    with pytest.raises(evidence.Unavailable, match="no exact posterior"):
        evidence.eubo(make(), draw(2))
    with pytest.raises(ValueError, match="source: expected"):
        evidence.eubo(make(), draw(2), source="chains")


def test_draws_without_a_number_are_told():
    """A scale that overflows: the model's log probability is inf - inf."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z * math.inf, math.inf, validate_args=False), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    with pyro.validation_enabled(False):
        found = evidence.elbo(Pair.of(model, guide), torch.zeros(2), 4)
    assert found.value.isnan().all()
    assert any("100.0% of the guide's draws have no log weight (NaN)" in note for note in found.notes)

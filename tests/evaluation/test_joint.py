"""Joint bounds of models with latents outside the data plate, against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib import gp
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoHierarchicalNormalMessenger,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro.nn import PyroSample

from pyroelbo import ExactPair, Pair, audit, evidence
from pyroelbo.evaluation.evaluator import Evaluator
from tests.pairs import TABLE

Z_LIMIT = 4.9  # two-sided normal tail of 1e-6: the declared false-alarm rate of one z-test


def regression(x, y):
    weights = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((weights * x).sum(-1), 0.5), obs=y)


def exact_regression(x, y):
    """ln N(y; 0, x xᵀ + σ² I) and the posterior of the weights, in closed form."""
    marginal = dist.MultivariateNormal(torch.zeros(len(y)), x @ x.T + 0.25 * torch.eye(len(y)))
    covariance = torch.linalg.inv(x.T @ x / 0.25 + torch.eye(3))
    return marginal.log_prob(y), dist.MultivariateNormal(covariance @ x.T @ y / 0.25, covariance)


@pytest.fixture
def data():
    x = torch.randn(12, 3)
    return x, x @ torch.tensor([1.0, -0.5, 0.2]) + 0.5 * torch.randn(12)


def by(loc, scale_tril):
    def guide(x, y):
        pyro.sample("w", dist.MultivariateNormal(loc, scale_tril=scale_tril))

    return Pair.of(regression, guide)


def test_the_exact_posterior_gives_the_evidence_without_variance(data):
    truth, posterior = exact_regression(*data)
    pair = by(posterior.loc, posterior.scale_tril)
    for bound in (evidence.elbo(pair, data, 7, scope="joint"), evidence.iwae(pair, data, 7, scope="joint")):
        assert bound.value.shape == () and bound.scope == "joint" and bound.kind == "lower"
        assert abs(float(bound.value - truth)) < 1e-8 and float(bound.stderr) < 1e-8
    assert evidence.elbo(pair, data, 7, scope="joint").cost == 7
    with pytest.raises(ValueError, match="'w' draws a latent outside.*joint"):
        evidence.elbo(pair, data)


def test_bounds_of_another_guide(data):
    truth, posterior = exact_regression(*data)
    loc, tril = posterior.loc + 0.1, 1.4 * posterior.scale_tril
    pair = by(loc, tril)
    gap = dist.kl.kl_divergence(dist.MultivariateNormal(loc, scale_tril=tril), posterior)
    elbo = evidence.elbo(pair, data, 4000, scope="joint")
    assert abs(float(elbo.value + gap - truth)) < Z_LIMIT * float(elbo.stderr)
    for bound in (
        evidence.iwae(pair, data, 20_000, scope="joint"),
        evidence.ais(pair, data, 60, 200, scope="joint", progress=False),
        evidence.ais(pair, data, 100, 200, start="prior", scope="joint", progress=False),
        evidence.prior_monte_carlo(pair, data, 60_000, scope="joint"),
    ):
        assert abs(float(torch.expm1(truth - bound.value))) < Z_LIMIT * float(bound.stderr), bound.method


def hierarchy(y):
    """A global mean with local latents about it: y ~ N(0, 2 I + 1 1ᵀ)."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_on_a_hierarchy_with_both_kinds_of_latents(auto):
    y = torch.randn(4) + 1
    truth = dist.MultivariateNormal(torch.zeros(4), 2 * torch.eye(4) + torch.ones(4, 4)).log_prob(y)
    guide = auto(hierarchy, init_scale=0.7)
    guide(y)
    pair = Pair.of(hierarchy, guide)
    assert Evaluator(pair, y, scope="joint").strategy.vectorized
    iwae = evidence.iwae(pair, y, 60_000, scope="joint")
    assert abs(float(torch.expm1(truth - iwae.value))) < Z_LIMIT * float(iwae.stderr)
    assert float(evidence.elbo(pair, y, 500, scope="joint").value) < float(truth)
    for start in ("guide", "prior"):
        ais = evidence.ais(pair, y, 60, 100, start=start, scope="joint", progress=False)
        assert abs(float(torch.expm1(truth - ais.value))) < Z_LIMIT * float(ais.stderr), start


def coin(y):
    rate = pyro.sample("rate", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(rate), obs=y)


def beta_guide(y):
    pyro.sample("rate", dist.Beta(4.0, 4.0))


def test_one_global_dimension_by_quadrature():
    y = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])

    def ln_beta(a, b):
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    truth = ln_beta(6, 5) - ln_beta(2, 3)
    result = audit(Pair.of(coin, beta_guide), y, scope="joint", particles=500)
    assert result.reference == "quadrature" and abs(result["quadrature"].mean - truth) < 1e-6
    assert result["elbo"].scope == "joint" and result["elbo"].mean < truth
    assert "joint" in str(result) and "all 6 data as one datum" in str(result)


def test_a_pair_with_local_latents_only_sums_its_data():
    make, draw = TABLE["ppca-mean-field"]
    pair, y = make(), draw(5)
    result = audit(pair, y, scope="joint", particles=4000)
    alone = evidence.exact(pair, y)
    assert abs(result["exact"].mean - float(alone.value.sum())) < 1e-9
    elbo = evidence.elbo(pair, y, 4000)
    error = math.hypot(float(result["elbo"].stderr), float(elbo.stderr.square().sum().sqrt()))
    assert abs(float(elbo.value.sum() - result["elbo"].value)) < Z_LIMIT * error


def test_an_exact_pair_of_global_latents(data):
    class Regression(ExactPair):
        latent = "w"

        def model(self, x, y):
            regression(x, y)

        def log_evidence(self, x, y):
            return exact_regression(x, y)[0]

        def guide(self, x, y):
            pyro.sample("w", exact_regression(x, y)[1])

    result = audit(Regression(), data, scope="joint")
    assert result["exact"].kind == "exact" and abs(result["elbo"].mean - result["exact"].mean) < 1e-8


def test_undeclared_batch_dimensions_belong_to_the_joint():
    """As Pyro's own eight schools is written: no plate at all."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(1), 1.0))
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
        pyro.sample("y", dist.Normal(mean + z, 1.0), obs=y)

    def guide(y):
        pyro.sample("mean", dist.Normal(torch.zeros(1), 1.0))
        pyro.sample("z", dist.Normal(y / 2, 0.8))

    y = torch.randn(4)
    truth = dist.MultivariateNormal(torch.zeros(4), 2 * torch.eye(4) + torch.ones(4, 4)).log_prob(y)
    bound = evidence.iwae(Pair.of(model, guide), y, 40_000, scope="joint")
    assert abs(float(torch.expm1(truth - bound.value))) < Z_LIMIT * float(bound.stderr)


def test_a_model_that_refuses_particles_runs_one_at_a_time(data):
    def model(x, y):
        weights = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        assert weights.dim() == 1
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)

    truth, posterior = exact_regression(*data)

    def guide(x, y):
        pyro.sample("w", posterior)

    pair = Pair.of(model, guide)
    assert not Evaluator(pair, data, scope="joint").strategy.vectorized
    assert abs(float(evidence.iwae(pair, data, 3, scope="joint").value - truth)) < 1e-8


def test_what_is_no_joint_bound(data):
    _, posterior = exact_regression(*data)

    def guide(x, y):
        pyro.sample("w", posterior)

    def subsampled(x, y):
        weights = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 100, subsample=torch.arange(len(y))):
            pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)

    def scaled(x, y):
        with poutine.scale(scale=0.3):
            regression(x, y)

    def part(x, y):
        weights = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 100, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(x @ weights, 0.5), obs=y)

    for model in (subsampled, part):
        with pytest.raises(ValueError, match="expected all 100 elements of .* got 12: the batch must be the"):
            evidence.elbo(Pair.of(model, guide), data, scope="joint")
    with pytest.raises(ValueError, match=r"'w' is scaled by 0\.3"):
        evidence.elbo(Pair.of(scaled, guide), data, scope="joint")
    with pytest.raises(ValueError, match="scope: expected"):
        evidence.elbo(Pair.of(regression, guide), data, scope="global")


@pytest.mark.parametrize("which", ["laplace", "list"])
def test_a_point_behind_auxiliary_sites_is_refused_too(data, which):
    """Before its curvature is asked for, a Laplace guide draws its mode; in a list, others make the auxiliary
    sites.
    """

    def model(x, y):
        pyro.sample("scale", dist.Gamma(2.0, 1.0))
        regression(x, y)

    guide = AutoLaplaceApproximation(model)
    if which == "list":
        guide = AutoGuideList(model)
        guide.append(AutoNormal(poutine.block(model, hide=["w"])))
        guide.append(AutoDelta(poutine.block(model, hide=["scale"])))
    guide(*data)
    with pytest.raises(ValueError, match="point mass"):
        evidence.elbo(Pair.of(model, guide), data, scope="joint")


def test_a_point_is_no_guide_of_a_continuous_latent(data):
    guide = AutoDelta(regression)
    guide(*data)
    with pytest.raises(ValueError, match="'w': expected .*point mass"):
        evidence.elbo(Pair.of(regression, guide), data, scope="joint")


def test_a_subsampled_model_is_evaluated_on_its_full_data(data):
    def model(x, y):
        weights = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y), subsample_size=5) as i:
            assert len(i) in (5, len(y))
            pyro.sample("y", dist.Normal((weights * x[i]).sum(-1), 0.5), obs=y[i])

    truth, posterior = exact_regression(*data)
    pair = Pair.of(model, by(posterior.loc, posterior.scale_tril).guide)
    assert abs(float(evidence.iwae(pair, data, 5, scope="joint").value - truth)) < 1e-8
    trace = poutine.trace(model).get_trace(*data)
    assert trace.nodes["y"]["value"].shape == (5,)  # as before outside of evaluation


def curve(y):
    """A Gaussian process of unknown variance at seven points, which are one observation."""
    x = torch.linspace(0, 1, 7)
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    covariance = (-(x - x[:, None]).square()).exp() + 0.1 * torch.eye(7)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(7), scale[..., None, None] * covariance), obs=y)


def curve_guide(y):
    pyro.sample("scale", dist.LogNormal(0.0, 0.6))


@pytest.mark.parametrize("shape", [(7,), (1, 7)])
def test_one_observation_of_all_data(shape):
    y = torch.randn(7)
    log_scale = torch.linspace(-4, 4, 4001)
    x = torch.linspace(0, 1, 7)
    covariance = (-(x - x[:, None]).square()).exp() + 0.1 * torch.eye(7)
    density = dist.MultivariateNormal(torch.zeros(7), log_scale.exp()[:, None, None] * covariance).log_prob(y)
    truth = torch.logsumexp(density + dist.Normal(0.0, 0.5).log_prob(log_scale), 0) + math.log(8 / 4000)
    pair = Pair.of(curve, curve_guide)
    found = evidence.quadrature(pair, y.reshape(shape), scope="joint")
    assert abs(float(found.value - truth)) < 1e-6
    iwae = evidence.iwae(pair, y.reshape(shape), 5000, scope="joint")
    assert abs(float(torch.expm1(truth - iwae.value))) < Z_LIMIT * float(iwae.stderr)


def test_gaussian_processes_of_pyro():
    """Regression with a kernel's length as latent: the model knows its data, whatever the batch is."""
    x = torch.linspace(0, 1, 4)
    y = (4 * x).sin()
    kernel = gp.kernels.RBF(1, lengthscale=torch.tensor(0.5))
    process = gp.models.GPRegression(x, y, kernel, noise=torch.tensor(0.1))
    process.kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 0.3))

    def model(y):
        process.model()

    def guide(y):
        pyro.sample("kernel.lengthscale", dist.LogNormal(0.0, 0.3))

    log_length = 0.3 * torch.linspace(-8, 8, 401)
    squares = (x - x[:, None]).square() / log_length.exp()[:, None, None].square()
    covariance = (-0.5 * squares).exp() + (0.1 + process.jitter) * torch.eye(4)
    density = dist.MultivariateNormal(torch.zeros(4), covariance).log_prob(y)
    steps = dist.Normal(0.0, 0.3).log_prob(log_length)
    truth = torch.logsumexp(density + steps, 0) + math.log(0.3 * 16 / 400)
    found = evidence.iwae(Pair.of(model, guide), y, 200, scope="joint")
    assert abs(float(torch.expm1(truth - found.value))) < Z_LIMIT * float(found.stderr)


def test_parts_of_any_length_and_numbers():
    """Groups with a mean each: y ~ N(u[group], scale² I + same group)."""

    def model(y, group, u, scale):
        with pyro.plate("groups", len(u)):
            mean = pyro.sample("mean", dist.Normal(u, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean[..., group], scale), obs=y)

    def guide(y, group, u, scale):
        same = (group == torch.arange(len(u))[:, None]).double()
        variance = 1 / (1 + same.sum(-1) / scale**2)
        with pyro.plate("groups", len(u)):
            loc = variance * (u + (same * y).sum(-1) / scale**2)
            pyro.sample("mean", dist.Normal(loc, variance.sqrt()))

    group, u = torch.randint(4, (20,)), torch.randn(4)
    y = torch.randn(20)
    covariance = 0.25 * torch.eye(20) + (group == group[:, None]).double()
    truth = dist.MultivariateNormal(u[group], covariance).log_prob(y)
    for scale in (0.5, torch.tensor(0.5)):
        found = evidence.iwae(Pair.of(model, guide), (y, group, u, scale), 3, scope="joint").value
        assert abs(float(found - truth)) < 1e-9
    with pytest.raises(ValueError, match='same first dimension.*scope="joint" takes any'):
        evidence.elbo(Pair.of(model, guide), (y, group, u))


@pytest.mark.parametrize("auto", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_guides_that_run_the_model(auto):
    """They draw the latents under the model's own names, and see its observations, which are none of
    theirs."""
    y = torch.randn(4) + 1
    truth = dist.MultivariateNormal(torch.zeros(4), 2 * torch.eye(4) + torch.ones(4, 4)).log_prob(y)
    guide = auto(hierarchy, init_scale=0.7)
    guide(y)  # as it has in training
    pair = Pair.of(hierarchy, guide)
    iwae = evidence.iwae(pair, y, 40_000, scope="joint")
    assert abs(float(torch.expm1(truth - iwae.value))) < Z_LIMIT * float(iwae.stderr)
    assert float(evidence.elbo(pair, y, 500, scope="joint").value) < float(truth)
    ais = evidence.ais(pair, y, 30, 50, scope="joint", progress=False)
    assert abs(float(torch.expm1(truth - ais.value))) < Z_LIMIT * float(ais.stderr)
    loss = Trace_ELBO(num_particles=500).loss(pair.model, pair.guide, y)
    assert -loss < float(truth)


def test_a_table_that_tells_nothing_says_what_to_do(data):
    """A single draw decides the weights: without a reference, a joint table names one."""
    pair = by(torch.full((3,), 9.0), 0.1 * torch.eye(3))
    found = audit(pair, data, scope="joint", progress=False)
    assert any("references=('ais',)" in note for note in found.notes)
    found = audit(pair, data, scope="joint", references=("ais",), temperatures=20, progress=False)
    assert not any("references=('ais',)" in note for note in found.notes)

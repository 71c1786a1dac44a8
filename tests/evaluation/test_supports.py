"""What a distribution's support is, held against its density: all of torch's and Pyro's."""

import inspect
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import tensor
from torch.distributions import biject_to, constraints

from pyroelbo import Pair, audit, evidence
from pyroelbo.evaluation.masks import _both
from pyroelbo.evaluation.sites import _same, check_support
from pyroelbo.evaluation.supports import circular, is_circular, support_of, within_circle
from pyroelbo.evidence.lattice import _range

S = tensor(0.7, dtype=torch.float64)
EYE = torch.eye(2, dtype=torch.float64)
# One of each class. What has no density to be checked is named below with its reason.
CASES = {
    "AffineBeta": lambda: dist.AffineBeta(tensor(2.0), tensor(3.0), tensor(-1.0), tensor(4.0)),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(tensor(0.2), S, tensor(1.3)),
    "Bernoulli": lambda: dist.Bernoulli(tensor(0.3)),
    "Beta": lambda: dist.Beta(tensor(2.0), tensor(3.0)),
    "BetaBinomial": lambda: dist.BetaBinomial(tensor(2.0), tensor(3.0), 4),
    "Binomial": lambda: dist.Binomial(5, tensor(0.3)),
    "Categorical": lambda: dist.Categorical(tensor([0.2, 0.5, 0.3])),
    "Cauchy": lambda: dist.Cauchy(tensor(0.2), S),
    "Chi2": lambda: dist.Chi2(tensor(3.0)),
    "ContinuousBernoulli": lambda: dist.ContinuousBernoulli(tensor(0.3)),
    "Dirichlet": lambda: dist.Dirichlet(tensor([1.5, 2.0, 3.0])),
    "DirichletMultinomial": lambda: dist.DirichletMultinomial(tensor([1.5, 2.0]), 3),
    "Exponential": lambda: dist.Exponential(S),
    "FisherSnedecor": lambda: dist.FisherSnedecor(tensor(3.0), tensor(5.0)),
    "FoldedDistribution": lambda: dist.FoldedDistribution(dist.Normal(tensor(0.5), 1.0)),
    "Gamma": lambda: dist.Gamma(tensor(2.0), S),
    "GammaPoisson": lambda: dist.GammaPoisson(tensor(2.0), S),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(tensor(0.2), S, tensor(0.3)),
    "Geometric": lambda: dist.Geometric(S),
    "Gumbel": lambda: dist.Gumbel(tensor(0.2), S),
    "HalfCauchy": lambda: dist.HalfCauchy(S),
    "HalfNormal": lambda: dist.HalfNormal(S),
    "InverseGamma": lambda: dist.InverseGamma(tensor(3.0), S),
    "Kumaraswamy": lambda: dist.Kumaraswamy(tensor(2.0), tensor(3.0)),
    "LKJCholesky": lambda: dist.LKJCholesky(2, tensor(1.5)),
    "Laplace": lambda: dist.Laplace(tensor(0.2), S),
    "LogNormal": lambda: dist.LogNormal(tensor(0.2), S),
    "LogNormalNegativeBinomial": lambda: dist.LogNormalNegativeBinomial(3, tensor(0.2), S),
    "Logistic": lambda: dist.Logistic(tensor(0.2), S),
    "LogisticNormal": lambda: dist.LogisticNormal(torch.zeros(2), torch.ones(2)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(
        torch.zeros(2), EYE[:, :1], torch.ones(2)
    ),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(
        torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2)
    ),
    "Multinomial": lambda: dist.Multinomial(3, tensor([0.2, 0.5, 0.3])),
    "MultivariateNormal": lambda: dist.MultivariateNormal(torch.zeros(2), EYE),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(tensor(3.0), torch.zeros(2), EYE),
    "NegativeBinomial": lambda: dist.NegativeBinomial(3, tensor(0.3)),
    "Normal": lambda: dist.Normal(tensor(0.2), S),
    "OneHotCategorical": lambda: dist.OneHotCategorical(tensor([0.2, 0.5, 0.3])),
    "OrderedLogistic": lambda: dist.OrderedLogistic(tensor(0.3), tensor([-1.0, 0.5])),
    "Pareto": lambda: dist.Pareto(S, tensor(3.0)),
    "Poisson": lambda: dist.Poisson(S),
    "ProjectedNormal": lambda: dist.ProjectedNormal(tensor([0.5, 1.0])),
    "RelaxedBernoulli": lambda: dist.RelaxedBernoulli(tensor(0.8), tensor(0.3)),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(tensor(0.8), tensor([0.2, 0.5, 0.3])),
    "SineBivariateVonMises": lambda: dist.SineBivariateVonMises(
        tensor(0.3), tensor(-1.0), tensor(2.0), tensor(1.5), tensor(0.4)
    ),
    "SineSkewed": lambda: dist.SineSkewed(
        dist.VonMises(tensor(0.3), 2.0).expand([1]).to_event(1), tensor([0.4])
    ),
    "SkewLogistic": lambda: dist.SkewLogistic(tensor(0.2), S),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(tensor(0.2), S, tensor(1.3), tensor(0.5)),
    "SoftLaplace": lambda: dist.SoftLaplace(tensor(0.2), S),
    "StableWithLogProb": lambda: dist.StableWithLogProb(tensor(1.7), tensor(0.2), S),
    "StudentT": lambda: dist.StudentT(tensor(3.0), tensor(0.2), S),
    "Uniform": lambda: dist.Uniform(tensor(-1.0), tensor(2.0)),
    "VonMises": lambda: dist.VonMises(tensor(0.3), tensor(2.0)),
    "VonMises3D": lambda: dist.VonMises3D(tensor([0.0, 1.0, 2.0])),
    "Weibull": lambda: dist.Weibull(S, tensor(1.4)),
    "Wishart": lambda: dist.Wishart(tensor(4.0), EYE),
    "ZeroInflatedNegativeBinomial": lambda: dist.ZeroInflatedNegativeBinomial(
        3, probs=tensor(0.3), gate=tensor(0.2)
    ),
    "ZeroInflatedPoisson": lambda: dist.ZeroInflatedPoisson(S, gate=tensor(0.2)),
}
OTHERS = {
    "abstract, or made of others": (
        "Distribution TorchDistribution ExponentialFamily ExpandedDistribution Independent "
        "MaskedDistribution MaskedMixture "
        "MixtureSameFamily TransformedDistribution Rejector ZeroInflatedDistribution"
    ),
    "no density of its own": "Delta Empirical ImproperUniform Unit Stable",
    "the density of another class above": (
        "AVFMultivariateNormal OMTMultivariateNormal MixtureOfDiagNormalsSharedCovariance "
        "GaussianScaleMixture "
        "NanMaskedNormal NanMaskedMultivariateNormal OneHotCategoricalStraightThrough "
        "RelaxedBernoulliStraightThrough "
        "RelaxedOneHotCategoricalStraightThrough ExtendedBinomial ExtendedBetaBinomial LKJ LKJCorrCholesky"
    ),
    "values that no constraint describes": (
        "CoalescentTimes CoalescentTimesWithRate OneOneMatching OneTwoMatching SpanningTree "
        "TruncatedPolyaGamma"
    ),
    "whole time series": "DiscreteHMM GammaGaussianHMM GaussianHMM GaussianMRF IndependentHMM LinearHMM "
    "GroupedNormalNormal",
}


def test_the_table_has_every_distribution():
    classes = {
        name
        for name, found in vars(dist).items()
        if inspect.isclass(found) and issubclass(found, torch.distributions.Distribution)
    }
    listed = set(CASES) | {name for names in OTHERS.values() for name in names.split()}
    assert classes <= listed, sorted(classes - listed)


def fn_of(name):
    with pyro.validation_enabled(False):
        return CASES[name]()


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("name", CASES)
def test_draws_lie_in_the_support(name):
    fn = fn_of(name)
    if name in ("LogNormalNegativeBinomial", "VonMises3D"):
        pytest.skip("it has no sampler")
    assert bool(support_of(fn).check(fn.sample((200,))).all())


@pytest.mark.parametrize("name", [n for n in CASES if not fn_of(n).event_dim])
def test_densities_integrate_to_one_over_the_support(name):
    """Over u of the whole line with ln |dx/du|, by the midpoint rule; probabilities by their sum."""
    fn = fn_of(name)
    support = support_of(fn)
    if support.is_discrete:
        low = int(getattr(support, "lower_bound", 0))
        values = torch.arange(low, low + 400.0)
        values = values[support.check(values)]
        assert float(fn.log_prob(values).exp().sum()) == pytest.approx(1.0, abs=1e-6)
        return
    if is_circular(support):
        x = (torch.arange(2000) + 0.5) / 2000 * 2 * math.pi - math.pi
        total = fn.log_prob(x).exp().sum() * 2 * math.pi / 2000
    else:
        to = biject_to(support)
        # sinh spreads the nodes over heavy tails.
        t = torch.linspace(-7, 7, 40_001)
        u = t.sinh()
        x = to(u)
        log_p = fn.log_prob(x) + to.log_abs_det_jacobian(u, x) + t.cosh().log()
        # An inverse Gamma overflows to +inf below 1e-160, where there is no mass.
        total = log_p.exp().nan_to_num(nan=0.0, posinf=0.0).sum() * 14 / 40_000
    assert float(total) == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_support_is_circular_if_and_only_if_the_density_is_periodic(name):
    fn = fn_of(name)
    support = support_of(fn)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support.is_discrete or (
        support not in (constraints.real, constraints.real_vector) and not is_circular(support)
    ):
        return
    x = fn.sample((50,))
    with pyro.validation_enabled(False):
        periodic = torch.allclose(fn.log_prob(x), fn.log_prob(x + 2 * math.pi), rtol=1e-6, atol=1e-8)
    assert periodic == is_circular(support)


def test_mixtures_and_wrappers_have_their_components_support():
    angles = dist.VonMises(torch.zeros(3, 2), 1.0)
    for fn in (
        angles.to_event(1),
        angles.mask(torch.tensor(True)),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), angles),
    ):
        assert is_circular(support_of(fn))
    positive = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Gamma(torch.ones(2), 1.0))
    assert isinstance(support_of(positive), constraints.greater_than_eq)


def compass(concentration=2.0, mean=3.0):
    """An angle seen through a noisy unit vector; its mass lies across the ends of [-π, π]."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.VonMises(torch.full((len(y),), mean), concentration))
            seen = torch.stack([z.cos(), z.sin()], -1)
            pyro.sample("y", dist.Normal(seen, 0.5).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.VonMises(torch.full((len(y),), mean - 0.1), 0.7 * concentration))

    y = torch.tensor([[-1.0, 0.1], [0.9, 0.2], [-0.8, -0.5]])
    x = (torch.arange(4000) + 0.5) / 4000 * 2 * math.pi - math.pi
    seen = torch.stack([x.cos(), x.sin()], -1)[:, None]
    log_p = dist.VonMises(mean, concentration).log_prob(x)[:, None] + dist.Normal(seen, 0.5).to_event(
        1
    ).log_prob(y)
    return Pair.of(model, guide), y, torch.logsumexp(log_p, 0) + math.log(2 * math.pi / 4000)


@pytest.mark.parametrize("concentration", [0.5, 2.0, 30.0])
def test_the_evidence_of_an_angle(concentration):
    pair, y, exact = compass(concentration)
    quadrature = evidence.quadrature(pair, y)
    torch.testing.assert_close(quadrature.value, exact, rtol=0, atol=1e-5)
    assert (quadrature.resolution < 1e-4).all()
    for bound in (evidence.ais(pair, y, 60, 300, progress=False), evidence.iwae(pair, y, 4000)):
        assert ((bound.value - exact).abs() < 5 * bound.stderr + 1e-3).all()
    prior = evidence.ais(pair, y, 60, 300, start="prior", progress=False)
    assert ((prior.value - exact).abs() < 5 * prior.stderr + 1e-3).all()
    rows = audit(pair, y, progress=False)
    assert rows["elbo"].mean < float(exact.mean())


@pytest.mark.parametrize(
    "guide",
    [lambda n: dist.Normal(torch.zeros(n), 1.0), lambda n: dist.Uniform(torch.full((n,), -4.0), 4.0)],
)
def test_a_guide_on_the_line_is_refused_for_an_angle(guide):
    pair, y, _ = compass()

    def on_the_line(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", guide(len(y)))

    for estimator in (evidence.elbo, evidence.iwae, evidence.quadrature, evidence.ais):
        with pytest.raises(ValueError, match="'z': expected a circular distribution.*VonMises"):
            estimator(Pair.of(pair.model, on_the_line), y)


def test_an_automatic_guide_is_refused_for_an_angle():
    pair, y, _ = compass()
    guide = pyro.infer.autoguide.AutoNormal(pair.model)
    with pytest.raises(ValueError, match="expected a circular distribution"):
        evidence.elbo(Pair.of(pair.model, guide), y)


def test_a_guide_within_the_circle_is_fine():
    pair, y, exact = compass()

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Uniform(torch.full((len(y),), -math.pi), math.pi))

    bound = evidence.iwae(Pair.of(pair.model, guide), y, 20_000)
    assert ((bound.value - exact).abs() < 5 * bound.stderr + 1e-3).all()


def test_an_observation_outside_a_support_that_a_latent_moves_has_probability_zero():
    """A Pareto's formula is finite below its scale: with a scale of 1 or 2, only 1 can have made 1.5."""

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.02)))
            pyro.sample("y", dist.Pareto(1 + k, 2.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.3)))

    y, pair = torch.tensor([1.5, 1.7, 2.4]), Pair.of(model, guide)
    density = torch.stack([2 * scale**2 * y**-3 * (y >= scale) for scale in (1.0, 2.0)])
    expected = (0.98 * density[0] + 0.02 * density[1]).log()
    torch.testing.assert_close(evidence.exact(pair, y).value, expected)
    found = evidence.iwae(pair, y, 400)
    assert bool(((found.value - expected).abs() <= 4 * found.stderr).all())
    assert bool((evidence.elbo(pair, y, 400).value[:2] == -torch.inf).all())


def test_an_end_of_the_data_may_be_latent():
    """Uniform data under a Pareto prior of their upper end, whose guide begins below the largest."""
    y = torch.tensor([[0.5, 1.4], [0.2, 0.3], [2.5, 1.0]])

    def model(y):
        with pyro.plate("data", len(y)):
            top = pyro.sample("top", dist.Pareto(torch.ones(len(y)), 2.0))
            high = top.unsqueeze(-1).expand(*top.shape, 2)
            pyro.sample("y", dist.Uniform(0.0, high).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("top", dist.Pareto(torch.ones(len(y)), 2.0))

    pair = Pair.of(model, guide)
    expected = math.log(0.5) - 4 * y.max(-1).values.clamp_min(1.0).log()
    for found in (evidence.iwae(pair, y, 2000), evidence.quadrature(pair, y)):
        error = found.stderr if found.resolution is None else found.resolution
        assert bool(((found.value - expected).abs() <= 4 * error + 1e-3).all()), found


def test_data_beyond_fixed_ends_are_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Uniform(torch.zeros(len(y)), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    with pytest.raises(ValueError, match="(?s)'y'.*expected values in Interval.*got 2"):
        evidence.elbo(Pair.of(model, guide), tensor([0.5, 2.0]))


def test_a_multinomial_takes_its_total_from_the_data():
    """Dirichlet-multinomial counts of totals that vary; the guide is exact."""

    def model(y):
        with pyro.plate("data", len(y)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(len(y), 3)))
            pyro.sample("y", dist.Multinomial(probs=p, validate_args=False), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("p", dist.Dirichlet(1 + y))

    y = tensor([[1.0, 0.0, 2.0], [4.0, 3.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    right = torch.stack([dist.DirichletMultinomial(torch.ones(3), int(n.sum())).log_prob(n) for n in y])
    found = evidence.elbo(Pair.of(model, guide), y, 3).value
    torch.testing.assert_close(found, right, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="expected values in"):
        evidence.elbo(Pair.of(model, guide), y + 0.5)


def test_supports_are_compared_by_their_bounds():
    unit, listed = constraints.interval(0.0, 1.0), constraints.cat([constraints.real])
    assert _same(unit, constraints.interval(torch.zeros(3), 1.0))
    assert not _same(unit, constraints.interval(torch.tensor([0.0, 0.1]), 1.0))
    assert not _same(unit, constraints.interval(0.0, 2.0)) and not _same(unit, constraints.positive)
    assert _same(listed, listed) and not _same(listed, constraints.cat([constraints.real]))


def test_what_lies_within_a_circle():
    within = constraints.independent(constraints.interval(-math.pi, math.pi), 1)
    assert within_circle(within) and within_circle(constraints.independent(circular, 1))
    assert not within_circle(constraints.interval(-4.0, 3.0)) and not within_circle(constraints.real)
    assert not within_circle(constraints.interval(-3.0, 4.0)) and not within_circle(constraints.positive)
    assert is_circular(constraints.independent(circular, 1)) and not is_circular(within)
    ends = torch.tensor([-math.pi, math.pi, 3.2, -3.2])
    assert circular.check(ends).tolist() == [True, True, False, False]


def test_masks_of_two_kinds_are_joined():
    some, other = torch.tensor([True, False, True]), torch.tensor([True, True, False])
    assert _both(True, some) is some and _both(some, True) is some
    assert _both(False, some) is False and _both(some, False) is False and _both(True, False) is False
    assert _both(some, other).tolist() == [True, False, False]


@pytest.mark.parametrize(
    "support, expected",
    [
        (constraints.boolean, (0, 2)),
        (constraints.integer_interval(2, 5), (2, 4)),
        (constraints.independent(constraints.integer_interval(torch.tensor([1, 1]), 3), 1), (1, 3)),
        (constraints.nonnegative_integer, (0, 0)),
        (constraints.integer_interval(torch.tensor([0, 1]), 3), (0, 1)),
        (constraints.integer_interval(0, torch.tensor([3, 4])), (0, 1)),
        (constraints.positive, (0, 1)),
        (constraints.real, (0, 1)),
    ],
)
def test_ranges_of_discrete_coordinates(support, expected):
    assert _range(support) == expected


@pytest.mark.parametrize("values, grey", [([0.5, 1.0], True), ([0.5, 7.0], False), ([-1.0, -2.0], False)])
def test_advice_for_grey_pixels_is_given_for_grey_pixels(values, grey):
    with pytest.raises(ValueError, match="observed site 'y'") as refusal:
        check_support("y", "Bernoulli", torch.distributions.constraints.boolean, torch.tensor(values))
    assert ("Grey pixels" in str(refusal.value)) == grey

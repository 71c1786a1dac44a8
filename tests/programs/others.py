"""Conjugate textbook models, Gaussian processes, psychometrics, survival, circular and truncated data."""

import math

import numpy as np
import pyro
import pyro.contrib.gp as gp
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceGraph_ELBO, autoguide
from pyro.nn import PyroSample
from torch import nn

from tests.programs.base import Case, average, draws, gaussian, integral, program, value_of
from tests.programs.mixtures import log_dirichlet, normal

# ------------------------------------------------------------------------------------------- conjugate


@program("closed form", scope="joint")
def coin_of_unknown_fairness():
    """The first program of Pyro's tutorial on SVI: a loop over flips."""
    flips = torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0, 0, 0])

    def model(data):
        f = pyro.sample("latent_fairness", dist.Beta(10.0, 10.0))
        for i in range(len(data)):
            pyro.sample(f"obs_{i}", dist.Bernoulli(f), obs=data[i])

    def guide(data):
        a = pyro.param("alpha_q", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("beta_q", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("latent_fairness", dist.Beta(a, b))

    def reference():
        def log_beta(a, b):
            return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

        return torch.tensor(log_beta(16.0, 14.0) - log_beta(10.0, 10.0))

    return Case(model, guide, (flips,), reference)


@program("closed form", scope="joint", loss=TraceGraph_ELBO)
def weighing_by_an_unreliable_scale():
    def model(guess, measurement):
        weight = pyro.sample("weight", dist.Normal(guess, 1.0))
        return pyro.sample("measurement", dist.Normal(weight, 0.75), obs=measurement)

    def guide(guess, measurement):
        a = pyro.param("a", torch.tensor(8.5))
        b = pyro.param("b", torch.tensor(1.0), constraint=constraints.positive)
        pyro.sample("weight", dist.Normal(a, b))

    batch = (torch.tensor(8.5), torch.tensor(9.5))
    return Case(model, guide, batch, lambda: normal(batch[1], 8.5, math.sqrt(1 + 0.75**2)))


@program("closed form")
def counts_over_a_dirichlet():
    """Multinomials of one total each, with proportions of each row's own."""
    counts = torch.tensor([[3.0, 1, 0], [0, 2, 2], [1, 1, 2]])

    def model(counts):
        with pyro.plate("rows", len(counts)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("obs", dist.Multinomial(4, p), obs=counts)

    def guide(counts):
        alpha = pyro.param("alpha", counts + 0.5, constraint=constraints.positive)
        with pyro.plate("rows", len(counts)):
            pyro.sample("p", dist.Dirichlet(alpha))

    def reference():
        ways = torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
        return ways + log_dirichlet(counts, 1.0)

    return Case(model, guide, (counts,), reference)


@program("closed form")
def counts_of_varying_totals():
    """Multinomials as users write them where totals vary: total_count is only a bound for validation."""
    counts = torch.tensor([[3.0, 1, 0], [0, 2, 5], [1, 1, 0]])

    def model(counts):
        with pyro.plate("documents", len(counts)):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            total = int(counts.sum(-1).max())
            pyro.sample("obs", dist.Multinomial(total, p, validate_args=False), obs=counts)

    def guide(counts):
        alpha = pyro.param("alpha", counts + 0.5, constraint=constraints.positive)
        with pyro.plate("documents", len(counts)):
            pyro.sample("p", dist.Dirichlet(alpha))

    def reference():
        ways = torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)
        return ways + log_dirichlet(counts, 1.0)

    return Case(model, guide, (counts,), reference)


@program("closed form")
def likelihood_as_a_factor():
    """Observations enter by pyro.factor alone."""
    y = draws(4, seed=30)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("obs", -0.5 * (y - z) ** 2 - 0.5 * math.log(2 * math.pi))

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.9), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, scale))

    return Case(model, guide, (y,), lambda: normal(y, 0.0, math.sqrt(2)))


@program("closed form")
def measurement_error():
    """Two noisy readings of a latent, the outcome depends on its true value."""
    x = draws(5, 2, seed=31)
    y = draws(5, seed=32)

    def model(x, y):
        slope = pyro.param("slope", torch.tensor(0.8))
        with pyro.plate("data", len(y)):
            truth = pyro.sample("truth", dist.Normal(0.0, 1.0))
            readings = truth.unsqueeze(-1) * torch.ones(2)
            pyro.sample("x", dist.Normal(readings, 0.6).to_event(1), obs=x)
            pyro.sample("y", dist.Normal(slope * truth, 0.7), obs=y)

    def guide(x, y):
        w = pyro.param("w", torch.tensor([0.3, 0.3]))
        scale = pyro.param("scale", torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("truth", dist.Normal(w[0] * x.sum(-1) + w[1] * y, scale))

    def reference():
        b = torch.stack([torch.tensor(1.0), torch.tensor(1.0), value_of("slope")]).double()
        cov = torch.outer(b, b) + torch.diag(torch.tensor([0.36, 0.36, 0.49]))
        return torch.stack([gaussian(row, 0.0, cov) for row in torch.cat([x, y[:, None]], -1)])

    return Case(model, guide, (x, y), reference)


# ---------------------------------------------------------------------------------- Gaussian processes


INPUTS = torch.linspace(0.0, 2.0, 6).double()
OUTPUTS = torch.sin(2 * INPUTS) + 0.1 * draws(6, seed=33)


def rbf(scale, x=INPUTS):
    return torch.exp(-0.5 * (x[:, None] - x) ** 2 / scale[..., None, None] ** 2)


def gp_evidence():
    def log_f(u):
        cov = rbf(u.exp()) + 0.09 * torch.eye(6)
        return torch.stack([gaussian(OUTPUTS, 0.0, c) for c in cov]) + normal(u, 0.0, 1.0)

    return integral(log_f, (-6.0, 6.0))


@program("integral", scope="joint")
def gp_by_hand():
    """One multivariate observation of all data."""

    def model(x, y):
        scale = pyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        cov = rbf(scale, x) + 0.09 * torch.eye(len(x))
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance_matrix=cov), obs=y)

    return Case(model, autoguide.AutoNormal(model), (INPUTS, OUTPUTS), gp_evidence)


@program("integral", scope="joint")
def gp_regression_of_contrib():
    kernel = gp.kernels.RBF(1, torch.tensor(1.0), torch.tensor(1.0))
    kernel.lengthscale = PyroSample(dist.LogNormal(0.0, 1.0))
    kernel.variance = torch.tensor(1.0)
    gpr = gp.models.GPRegression(INPUTS, OUTPUTS, kernel, noise=torch.tensor(0.09), jitter=0.0)
    gpr.noise = torch.tensor(0.09)
    kernel.autoguide("lengthscale", dist.Normal)

    def model(x, y):
        gpr.set_data(x, y)
        return gpr.model()

    def guide(x, y):
        return gpr.guide()

    def reference():
        def log_f(u):
            cov = kernel.variance.detach() * rbf(u.exp()) + gpr.noise.detach() * torch.eye(6)
            return torch.stack([gaussian(OUTPUTS, 0.0, c) for c in cov]) + normal(u, 0.0, 1.0)

        return integral(log_f, (-6.0, 6.0))

    return Case(model, guide, (INPUTS, OUTPUTS), reference)


@program("closed form", scope="joint", steps=500, rate=0.05, slack=1.0, references=("ais",), temperatures=60)
def sparse_variational_gp_of_contrib():
    kernel = gp.kernels.RBF(1, torch.tensor(1.0), torch.tensor(0.8))
    likelihood = gp.likelihoods.Gaussian(torch.tensor(0.09))
    points = torch.tensor([0.2, 1.0, 1.8])
    vsgp = gp.models.VariationalSparseGP(INPUTS, OUTPUTS, kernel, points, likelihood, jitter=1e-8)

    def reference():
        """The likelihood is that of q(f): the model reads the guide's parameters and leaves its own u alone,
        so that ln p(y) is known, and is not that of the process."""
        loc, variance = vsgp(INPUTS, full_cov=False)
        spread = (variance + likelihood.variance).detach()
        return gaussian(OUTPUTS, loc.detach(), torch.diag(spread))

    def model(x, y):
        vsgp.set_data(x, y)
        return vsgp.model()

    def guide(x, y):
        return vsgp.guide()

    return Case(model, guide, (INPUTS, OUTPUTS), reference)


@program("integral", scope="joint")
def log_gaussian_cox_process():
    """A latent function at two places, counts there."""
    counts = torch.tensor([3.0, 6.0])
    tril = torch.linalg.cholesky(torch.tensor([[1.0, 0.7], [0.7, 1.0]]))

    def model(counts):
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril))
        pyro.sample("counts", dist.Poisson(f.exp()).to_event(1), obs=counts)

    def reference():
        def log_f(a, b):
            e = torch.stack([a, b], -1)
            f = e @ tril.T
            likelihood = (counts * f - f.exp() - torch.lgamma(counts + 1)).sum(-1)
            return likelihood + normal(e, 0.0, 1.0).sum(-1)

        return integral(log_f, (-7.0, 7.0), (-7.0, 7.0))

    return Case(model, autoguide.AutoMultivariateNormal(model), (counts,), reference)


# ------------------------------------------------------------------------------------- people and games


ANSWERS = (draws(4, 3, seed=34) > -0.3).double()


def item_logs(logits):
    return (ANSWERS * logits - nn.functional.softplus(logits)).sum(-1)


@program("integral", steps=300)
def item_response_of_one_parameter():
    def model(y):
        difficulty = pyro.param("difficulty", torch.tensor([-0.5, 0.0, 0.5]))
        with pyro.plate("people", len(y)):
            ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
            logits = ability.unsqueeze(-1) - difficulty
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    def reference():
        b = value_of("difficulty")
        return integral(lambda a: item_logs(a[:, None, None] - b) + normal(a, 0.0, 1.0)[:, None], (-8.0, 8.0))

    return Case(model, autoguide.AutoNormal(model), (ANSWERS,), reference)


def two_parameters(y):
    people, items = y.shape
    with pyro.plate("items", items, dim=-1):
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("people", people, dim=-2):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
        with pyro.plate("answers", items, dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=y)


def people_given(slope, difficulty):
    """ln p of each person's answers, [..., people], given the items' parameters [..., items]."""
    points, weights = np.polynomial.hermite_e.hermegauss(30)
    ability = torch.as_tensor(points)[:, None, None]
    log_w = torch.as_tensor(np.log(weights)) - 0.5 * math.log(2 * math.pi)
    logits = slope[..., None, None, :] * (ability - difficulty[..., None, None, :])
    return (item_logs(logits) + log_w[:, None]).logsumexp(-2)


def two_parameters_evidence():
    torch.manual_seed(4)
    slope = (0.5 * torch.randn(20000, 3)).exp()
    return average(people_given(slope, torch.randn(20000, 3)).sum(-1))


@program("Monte Carlo", scope="joint", steps=500, slack=1.5)
def item_response_of_two_parameters():
    return Case(two_parameters, autoguide.AutoNormal(two_parameters), (ANSWERS,), two_parameters_evidence)


@program("integral", scope="joint")
def Bradley_Terry_of_three_players():
    first, second = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 2, 2, 0, 0])
    won = torch.tensor([1.0, 1, 0, 0, 1])

    def model(first, second, won):
        with pyro.plate("players", 3):
            skill = pyro.sample("skill", dist.Normal(0.0, 1.0))
        logits = skill[..., first] - skill[..., second]
        with pyro.plate("matches", len(won)):
            pyro.sample("won", dist.Bernoulli(logits=logits), obs=won)

    def reference():
        def log_f(*skill):
            s = torch.stack(skill, -1)
            logits = s[:, first] - s[:, second]
            return (won * logits - nn.functional.softplus(logits)).sum(-1) + normal(s, 0.0, 1.0).sum(-1)

        return integral(log_f, *[(-6.0, 6.0)] * 3, nodes=60)

    return Case(model, autoguide.AutoMultivariateNormal(model), (first, second, won), reference)


@program("integral", steps=300)
def causal_effect_with_a_hidden_confounder():
    """A proxy, a treatment and an outcome share a cause (the CEVAE's graph)."""
    x, t, y = draws(5, seed=35), (draws(5, seed=36) > 0).double(), draws(5, seed=37)

    def model(x, t, y):
        w = pyro.param("w", torch.tensor([0.8, 1.0, 0.7, -0.5]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(w[0] * z, 0.8), obs=x)
            pyro.sample("t", dist.Bernoulli(logits=w[1] * z), obs=t)
            pyro.sample("y", dist.Normal(w[2] * z + w[3] * t, 0.9), obs=y)

    def guide(x, t, y):
        w = pyro.param("v", torch.tensor([0.3, 0.1, 0.3]))
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(w[0] * x + w[1] * (t - 0.5) + w[2] * y, scale))

    def reference():
        w = value_of("w")

        def log_f(z):
            z = z[:, None]
            logits = w[1] * z
            outcome = normal(x, w[0] * z, 0.8) + normal(y, w[2] * z + w[3] * t, 0.9)
            return outcome + t * logits - nn.functional.softplus(logits) + normal(z, 0.0, 1.0)

        return integral(log_f, (-8.0, 8.0))

    return Case(model, guide, (x, t, y), reference)


# ------------------------------------------------------------------------------ times, angles, bounded values


@program("closed form", scope="joint")
def survival_with_censoring():
    """Exponential times; of those still alive only the survival counts, by a second plate of Bernoullis."""
    times = torch.tensor([0.5, 1.2, 2.0, 0.3, 2.0, 0.9])
    dead = torch.tensor([1.0, 1, 0, 1, 0, 1])

    def model(times, dead):
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("patients", len(times)):
            with poutine.mask(mask=dead == 1):
                pyro.sample("death", dist.Exponential(rate), obs=times)
            with poutine.mask(mask=dead == 0):
                pyro.sample("alive", dist.Bernoulli((-rate * times).exp()), obs=1 - dead)

    def guide(times, dead):
        a = pyro.param("a", torch.tensor(4.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(5.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Gamma(a, b))

    def reference():
        a, b = 2 + dead.sum(), 2 + times.sum()
        return 2 * math.log(2) + torch.lgamma(a) - a * b.log()

    return Case(model, guide, (times, dead), reference)


@program("closed form", steps=300)
def survival_with_shared_frailty():
    """A Gamma frailty for each family multiplies the hazard of its members."""
    times = torch.tensor([[0.5, 1.2], [2.0, 0.3], [0.1, 0.2]])

    def model(times):
        hazard = pyro.param("hazard", torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("families", len(times)):
            frailty = pyro.sample("frailty", dist.Gamma(2.0, 2.0))
            rate = (hazard * frailty).unsqueeze(-1).expand(*frailty.shape, 2)
            pyro.sample("times", dist.Exponential(rate).to_event(1), obs=times)

    def guide(times):
        a = pyro.param("a", 3 * torch.ones(len(times)), constraint=constraints.positive)
        b = pyro.param("b", 3 * torch.ones(len(times)), constraint=constraints.positive)
        with pyro.plate("families", len(times)):
            pyro.sample("frailty", dist.Gamma(a, b))

    def reference():
        h, t = value_of("hazard"), times.sum(-1)
        return 2 * math.log(2) + math.lgamma(4) + 2 * h.log() - 4 * (2 + h * t).log()

    return Case(model, guide, (times,), reference)


@program("closed form", scope="joint", eager="depends on a random draw")
def mean_direction_on_the_circle():
    angles = torch.tensor([0.3, 0.8, -0.2, 1.1])

    def model(y):
        mu = pyro.sample("mu", dist.VonMises(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.VonMises(mu, 2.0), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.2))
        kappa = pyro.param("kappa", torch.tensor(4.0), constraint=constraints.positive)
        pyro.sample("mu", dist.VonMises(loc, kappa))

    def reference():
        log_i0 = lambda k: torch.special.i0e(k).log() + k  # noqa: E731
        one, two = torch.tensor(1.0), torch.tensor(2.0)
        c, s = 1 + 2 * angles.cos().sum(), 2 * angles.sin().sum()
        return log_i0(torch.hypot(c, s)) - log_i0(one) - 4 * (log_i0(two) + math.log(2 * math.pi))

    return Case(model, guide, (angles,), reference)


@program("closed form", steps=0)
def uniform_with_a_pareto_prior():
    """An upper end for each row; the guide is the prior, cut where the row's largest value is."""
    y = torch.tensor([[0.5, 1.4], [0.2, 0.3], [2.5, 1.0]])

    def model(y):
        with pyro.plate("rows", len(y)):
            top = pyro.sample("top", dist.Pareto(1.0, 2.0))
            high = top.unsqueeze(-1).expand(*top.shape, 2)
            pyro.sample("obs", dist.Uniform(0.0, high, validate_args=False).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("top", dist.Pareto(y.max(-1).values.clamp_min(1.0), 4.0))

    def reference():
        return math.log(2) - math.log(4) - 4 * y.max(-1).values.clamp_min(1.0).log()

    return Case(model, guide, (y,), reference)


@program("integral", scope="joint")
def truncated_normal_data():
    """Positive data of a normal cut at zero, its constant as a factor."""
    y = torch.tensor([0.4, 1.1, 0.2, 0.9])

    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=y)
            pyro.factor("cut", -(0.5 * torch.erfc(-loc / math.sqrt(2))).log())

    def reference():
        def log_f(loc):
            inside = (0.5 * torch.erfc(-loc / math.sqrt(2))).log()
            return normal(y, loc[:, None], 1.0).sum(-1) - len(y) * inside + normal(loc, 0.0, 1.0)

        return integral(log_f, (-8.0, 8.0))

    return Case(model, autoguide.AutoNormal(model), (y,), reference)

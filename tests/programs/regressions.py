"""Regressions and hierarchical models: one latent for all data, so that bounds are joint."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroSample
from torch import nn

from tests.programs.base import Case, average, draws, gaussian, integral, program

X = torch.linspace(-1.5, 1.5, 12).double()
Y = 0.7 - 1.2 * X + 0.4 * draws(12, seed=1)


# ------------------------------------------------------------------------------------- linear, known noise


def linear(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(a + b * x, 0.5), obs=y)


def linear_evidence():
    return gaussian(Y, 0.0, 4.0 + torch.outer(X, X) + 0.25 * torch.eye(12))


@program("closed form", scope="joint")
def linear_regression_AutoNormal():
    return Case(linear, autoguide.AutoNormal(linear), (X, Y), linear_evidence)


@program("closed form", scope="joint")
def linear_regression_AutoMultivariateNormal():
    return Case(linear, autoguide.AutoMultivariateNormal(linear), (X, Y), linear_evidence)


@program("closed form", scope="joint")
def linear_regression_AutoLowRankMultivariateNormal():
    return Case(linear, autoguide.AutoLowRankMultivariateNormal(linear), (X, Y), linear_evidence)


@program("closed form", scope="joint")
def linear_regression_AutoNormalMessenger():
    return Case(linear, autoguide.AutoNormalMessenger(linear), (X, Y), linear_evidence)


@program("closed form", scope="joint")
def linear_regression_AutoStructured():
    guide = autoguide.AutoStructured(
        linear, conditionals={"a": "normal", "b": "normal"}, dependencies={"b": {"a": "linear"}}
    )
    return Case(linear, guide, (X, Y), linear_evidence)


@program("closed form", scope="joint")
def linear_regression_AutoIAFNormal():
    return Case(linear, autoguide.AutoIAFNormal(linear), (X, Y), linear_evidence)


@program("closed form", scope="joint")
def linear_regression_AutoGuideList():
    guide = autoguide.AutoGuideList(linear)
    guide.append(autoguide.AutoNormal(poutine.block(linear, expose=["a"])))
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(linear, expose=["b"])))
    return Case(linear, guide, (X, Y), linear_evidence)


@program("closed form", scope="joint", refused="point")
def linear_regression_AutoDelta():
    return Case(linear, autoguide.AutoDelta(linear), (X, Y), linear_evidence)


class BayesianRegression(PyroModule):
    """The regression of the tutorials: a linear layer whose weights are random."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 2.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        sigma = pyro.sample("sigma", dist.Uniform(0.1, 2.0))
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
        return mean


def unknown_noise_evidence():
    def log_f(sigma):
        cov = 4.0 + torch.outer(X, X) + sigma[:, None, None] ** 2 * torch.eye(12)
        return torch.stack([gaussian(Y, 0.0, c) for c in cov]) - math.log(1.9)

    return integral(log_f, (0.1, 2.0))


@program("integral", scope="joint", steps=300)
def PyroModule_regression():
    model = BayesianRegression()
    return Case(model, autoguide.AutoDiagonalNormal(model), (X[:, None], Y), unknown_noise_evidence)


@program("closed form", scope="joint")
def regression_with_deterministic():
    def model(x, y):
        a = pyro.sample("a", dist.Normal(0.0, 2.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        slope = pyro.deterministic("slope", 2 * b)
        with pyro.plate("data", len(y)):
            mean = pyro.deterministic("mean", a + slope * x / 2)
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    return Case(model, autoguide.AutoNormal(model), (X, Y), linear_evidence)


# --------------------------------------------------------------------------------- other kinds of outcomes


def two_coefficients(log_likelihood):
    """ln ∫ of a likelihood in an intercept ~ N(0, 1) and a slope ~ N(0, 1)."""

    def log_f(a, b):
        prior = -0.5 * (a**2 + b**2) - math.log(2 * math.pi)
        return prior + log_likelihood(a[:, None] + b[:, None] * X).sum(-1)

    return lambda: integral(log_f, (-6.0, 6.0), (-6.0, 6.0), nodes=300)


def two_coefficients_prior():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    return a, b


@program("integral", scope="joint")
def logistic_regression():
    y = (Y > 0.3).double()

    def model(x, y):
        a, b = two_coefficients_prior()
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Bernoulli(logits=a + b * x), obs=y)

    def log_likelihood(eta):
        return y * eta - torch.nn.functional.softplus(eta)

    guide = autoguide.AutoMultivariateNormal(model)
    return Case(model, guide, (X, y), two_coefficients(log_likelihood))


@program("integral", scope="joint")
def Poisson_regression_with_offset():
    exposure = torch.linspace(1.0, 3.0, 12)
    counts = torch.tensor([6, 5, 7, 6, 4, 5, 3, 2, 3, 1, 1, 0]).double()

    def model(x, exposure, counts):
        a, b = two_coefficients_prior()
        with pyro.plate("counties", len(x)):
            pyro.sample("obs", dist.Poisson(exposure * (a + b * x).exp()), obs=counts)

    def log_likelihood(eta):
        rate = exposure.log() + eta
        return counts * rate - rate.exp() - torch.lgamma(counts + 1)

    guide = autoguide.AutoDiagonalNormal(model)
    return Case(model, guide, (X, exposure, counts), two_coefficients(log_likelihood))


@program("integral", scope="joint")
def robust_regression():
    y = Y.clone()
    y[3] = 4.0

    def model(x, y):
        a, b = two_coefficients_prior()
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.StudentT(3.0, a + b * x, 0.4), obs=y)

    def log_likelihood(eta):
        z = (y - eta) / 0.4
        constant = math.lgamma(2.0) - math.lgamma(1.5) - 0.5 * math.log(3 * math.pi) - math.log(0.4)
        return constant - 2.0 * torch.log1p(z**2 / 3)

    guide = autoguide.AutoMultivariateNormal(model)
    return Case(model, guide, (X, y), two_coefficients(log_likelihood))


@program("integral", scope="joint")
def ordinal_regression():
    levels = torch.tensor([2, 2, 1, 2, 1, 2, 1, 0, 1, 0, 0, 0])

    def model(x, y):
        cuts = torch.tensor([-0.8, 0.8])
        a, b = two_coefficients_prior()
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.OrderedLogistic(a + b * x, cuts), obs=y)

    def log_likelihood(eta):
        below = torch.stack(
            [torch.zeros_like(eta), (-0.8 - eta).sigmoid(), (0.8 - eta).sigmoid(), torch.ones_like(eta)]
        )
        probs = below[1:] - below[:-1]
        return torch.where(levels == 0, probs[0], torch.where(levels == 1, probs[1], probs[2])).log()

    guide = autoguide.AutoMultivariateNormal(model)
    return Case(model, guide, (X, levels), two_coefficients(log_likelihood))


@program("integral", scope="joint")
def censored_regression():
    """Values beyond a limit are known to lie beyond it (Tobit), by a factor."""
    censored = Y > 1.5
    seen = torch.where(censored, torch.full_like(Y, 1.5), Y)

    def model(x, y, censored):
        a, b = two_coefficients_prior()
        with pyro.plate("data", len(y)):
            d = dist.Normal(a + b * x, 0.5)
            with poutine.mask(mask=~censored):
                pyro.sample("obs", d, obs=y)
            pyro.factor("beyond", torch.where(censored, torch.log1p(-d.cdf(y)), torch.zeros_like(y)))

    def log_likelihood(eta):
        z = (seen - eta) / 0.5
        density = -0.5 * z**2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
        return torch.where(censored, (0.5 * torch.erfc(z / math.sqrt(2))).log(), density)

    guide = autoguide.AutoNormal(model)
    return Case(model, guide, (X, seen, censored), two_coefficients(log_likelihood))


@program("Monte Carlo", scope="joint", steps=400, slack=2.0)
def horseshoe_regression():
    x = torch.stack([X, draws(12, seed=2)], -1)

    def model(x, y):
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("covariates", 2):
            local = pyro.sample("local", dist.HalfCauchy(1.0))
            beta = pyro.sample("beta", dist.Normal(0.0, tau * local))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal((x * beta.unsqueeze(-2)).sum(-1), 0.5), obs=y)

    def reference():
        scales = torch.distributions.HalfCauchy(torch.ones(20000, 3)).sample()
        scales = scales[:, :1] * scales[:, 1:]
        cov = torch.einsum("ni,ki,mi->knm", x, scales**2, x) + 0.25 * torch.eye(12)
        return average(torch.distributions.MultivariateNormal(Y * 0, cov).log_prob(Y))

    return Case(model, autoguide.AutoNormal(model), (x, Y), reference)


@program("closed form")
def regression_with_missing_covariates():
    """Covariates that were not seen are latents, by obs_mask."""
    seen = torch.arange(12) % 5 != 2

    def model(x, seen, y):
        with pyro.plate("data", len(y)):
            value = pyro.sample("x", dist.Normal(0.0, 1.0), obs=x, obs_mask=seen)
            pyro.sample("obs", dist.Normal(0.7 - 1.2 * value, 0.5), obs=y)

    def guide(x, seen, y):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        slope = pyro.param("slope", torch.tensor(-0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("x_unobserved", dist.Normal(slope * (y - 0.7), scale))

    def normal(z, variance):
        return -0.5 * (z**2 / variance + math.log(2 * math.pi * variance))

    def reference():
        both = normal(X, 1.0) + normal(Y - 0.7 + 1.2 * X, 0.25)
        return torch.where(seen, both, normal(Y - 0.7, 1.44 + 0.25))

    return Case(model, guide, (X, seen, Y), reference)

"""Hierarchical models: eight schools, radon, batting averages, plates in plates."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide
from pyro.infer.reparam import LocScaleReparam

from tests.programs.base import Case, draws, gaussian, integral, program

EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]).double()
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]).double()


# ---------------------------------------------------------------------------------------- eight schools


def schools_evidence():
    """ln ∫ N(y | 0, 100 11ᵀ + diag(τ² + σ²)) HalfCauchy(τ | 5) dτ, with τ = 5 tan(angle)."""

    def log_f(angle):
        tau = 5 * angle.tan()
        cov = 100.0 + torch.diag_embed(tau[:, None] ** 2 + ERRORS**2)
        return torch.stack([gaussian(EFFECTS, 0.0, c) for c in cov]) + math.log(2 / math.pi)

    return integral(log_f, (0.0, math.pi / 2))


def schools(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("obs", dist.Normal(theta, sigma), obs=y)


def schools_non_centred(sigma, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("J", len(y)):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)


@program("integral", scope="joint", steps=400, slack=6.0)
def eight_schools_centred():
    return Case(schools, autoguide.AutoNormal(schools), (ERRORS, EFFECTS), schools_evidence)


@program("integral", scope="joint", steps=400)
def eight_schools_non_centred():
    guide = autoguide.AutoMultivariateNormal(schools_non_centred)
    return Case(schools_non_centred, guide, (ERRORS, EFFECTS), schools_evidence)


@program("integral", scope="joint", steps=400, references=("ais",), temperatures=100)
def eight_schools_by_AIS():
    guide = autoguide.AutoDiagonalNormal(schools_non_centred)
    return Case(schools_non_centred, guide, (ERRORS, EFFECTS), schools_evidence)


@program("integral", scope="joint", steps=400)
def eight_schools_reparametrized():
    model = poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)})
    return Case(model, autoguide.AutoNormal(model), (ERRORS, EFFECTS), schools_evidence)


@program("integral", scope="joint", steps=800, slack=1.0)
def eight_schools_learned_centring():
    model = poutine.reparam(schools, config={"theta": LocScaleReparam(shape_params=())})
    return Case(model, autoguide.AutoNormal(model), (ERRORS, EFFECTS), schools_evidence)


# ------------------------------------------------------------------------------------- groups of data


COUNTY = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
FLOOR = torch.tensor([0.0, 1, 0, 0, 0, 1, 0, 0, 1, 0]).double()
RADON = torch.tensor([1.2, 0.4, 1.0, 1.9, 2.2, 0.3, 0.9, 1.1, 0.2, 1.4]).double()


def radon(county, floor, y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 1.0))
    with pyro.plate("counties", 4):
        alpha = pyro.sample("alpha", dist.Normal(mu, tau))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(alpha[..., county] + beta * floor, 0.4), obs=y)


def radon_evidence():
    same = (COUNTY[:, None] == COUNTY).double()

    def log_f(tau):
        fixed = 4.0 + torch.outer(FLOOR, FLOOR) + 0.16 * torch.eye(len(RADON))
        prior = math.log(2) - 0.5 * tau**2 - 0.5 * math.log(2 * math.pi)
        return torch.stack([gaussian(RADON, 0.0, fixed + t**2 * same) for t in tau]) + prior

    return integral(log_f, (0.0, 8.0))


@program("integral", scope="joint", steps=400, slack=1.0)
def radon_AutoNormal():
    return Case(radon, autoguide.AutoNormal(radon), (COUNTY, FLOOR, RADON), radon_evidence)


@program("integral", scope="joint", steps=800, slack=1.0)
def radon_reparametrized_low_rank():
    model = poutine.reparam(radon, config={"alpha": LocScaleReparam(0.0)})
    guide = autoguide.AutoLowRankMultivariateNormal(model)
    return Case(model, guide, (COUNTY, FLOOR, RADON), radon_evidence)


@program("integral", scope="joint", steps=800, slack=1.0)
def radon_AutoHierarchicalNormalMessenger():
    guide = autoguide.AutoHierarchicalNormalMessenger(radon)
    return Case(radon, guide, (COUNTY, FLOOR, RADON), radon_evidence)


@program("closed form")
def random_intercepts_in_nested_plates():
    """Patients with several measurements each: the inner plate is a part of the datum."""
    y = draws(6, 1, seed=3) + 0.5 * draws(6, 4, seed=4)

    def model(y):
        mu = pyro.param("mu", torch.tensor(0.1))
        with pyro.plate("patients", y.shape[0]):
            b = pyro.sample("b", dist.Normal(mu, 1.0))
            with pyro.plate("visits", y.shape[1]):
                pyro.sample("obs", dist.Normal(b, 0.5), obs=y.T)

    def guide(y):
        w = pyro.param("w", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("patients", y.shape[0]):
            pyro.sample("b", dist.Normal(w * y.mean(-1), scale))

    def reference():
        cov = 1.0 + 0.25 * torch.eye(4)
        return torch.stack([gaussian(row, pyro.param("mu").detach(), cov) for row in y])

    return Case(model, guide, (y,), reference)


@program("integral", scope="joint", steps=400, rate=0.05)
def batting_averages_partially_pooled():
    at_bats = torch.tensor([10.0, 12, 9, 11])
    hits = torch.tensor([4.0, 3, 2, 5])

    def model(at_bats, hits):
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
        with pyro.plate("num_players", len(hits)):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(at_bats, probs=phi), obs=hits)

    def log_beta(a, b):
        return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

    def reference():
        choose = torch.lgamma(at_bats + 1) - torch.lgamma(hits + 1) - torch.lgamma(at_bats - hits + 1)

        def log_f(m, u):  # kappa = u ** -1 with density 1.5 kappa ** -2.5, times |d kappa / d u| = kappa ** 2
            kappa = 1 / u
            a, b = (m * kappa)[:, None], ((1 - m) * kappa)[:, None]
            likelihood = choose + log_beta(a + hits, b + at_bats - hits) - log_beta(a, b)
            return likelihood.sum(-1) + math.log(1.5) - 0.5 * kappa.log()

        return integral(log_f, (0.0, 1.0), (0.0, 1.0), nodes=200)

    return Case(model, autoguide.AutoMultivariateNormal(model), (at_bats, hits), reference)


@program("integral")
def kidney_cancer_counties():
    """A rate for each county with a Gamma prior, and a population as exposure: negative binomial counts."""
    population = torch.tensor([1.0, 3.0, 0.5, 6.0, 2.0])
    deaths = torch.tensor([2.0, 3.0, 0.0, 11.0, 1.0])

    def model(population, deaths):
        a = pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(1.5), constraint=constraints.positive)
        with pyro.plate("counties", len(deaths)):
            rate = pyro.sample("rate", dist.Gamma(a, b))
            pyro.sample("deaths", dist.Poisson(population * rate), obs=deaths)

    def guide(population, deaths):
        with pyro.plate("counties", len(deaths)):
            a = pyro.param("qa", deaths + 1, constraint=constraints.positive)
            b = pyro.param("qb", population + 1, constraint=constraints.positive)
            pyro.sample("rate", dist.Gamma(a, b))

    def reference():
        a, b = (pyro.param(k).detach() for k in "ab")

        def log_f(rate):
            rate = rate[:, None]
            prior = a * b.log() - torch.lgamma(a) + (a - 1) * rate.log() - b * rate
            mean = population * rate
            return prior + deaths * mean.log() - mean - torch.lgamma(deaths + 1)

        return integral(log_f, (0.0, 20.0), nodes=300)

    return Case(model, guide, (population, deaths), reference)


@program("closed form", scope="joint")
def subsampled_plate():
    """A mean of all data, of which a step sees some: a bound on less than the data."""
    y = 1.0 + draws(10, seed=5)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y), subsample_size=4) as index:
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y[index])

    return Case(model, autoguide.AutoNormal(model), (y,), lambda: gaussian(y, 0.0, 4.0 + torch.eye(10)))


@program("integral", scope="joint", steps=400, slack=1.0)
def covariance_with_LKJ_prior():
    y = draws(8, 2, seed=6) @ torch.tensor([[1.0, 0.6], [0.0, 0.8]])

    def model(y):
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
        corr = pyro.sample("corr", dist.LKJCholesky(2, 2.0))
        with pyro.plate("data", len(y)):
            tril = scale.unsqueeze(-1) * corr
            pyro.sample("obs", dist.MultivariateNormal(y.new_zeros(2), scale_tril=tril.unsqueeze(-3)), obs=y)

    def reference():
        """r has the density (1 - r²)^(η - 1) / B(1/2, η) of LKJ in two dimensions, η = 2."""
        norm = math.lgamma(0.5) + math.lgamma(2.0) - math.lgamma(2.5)

        def log_f(s, t, r):
            det = 1 - r**2
            z, w = y[:, 0] / s[:, None], y[:, 1] / t[:, None]
            square = (z**2 - 2 * r[:, None] * z * w + w**2) / det[:, None]
            likelihood = -0.5 * square.sum(-1) - len(y) * (
                s.log() + t.log() + 0.5 * det.log() + math.log(2 * math.pi)
            )
            prior = 2 * math.log(2) - 0.5 * (s**2 + t**2) - math.log(2 * math.pi)
            return likelihood + prior + det.log() - norm

        return integral(log_f, (0.05, 6.0), (0.05, 6.0), (-1.0, 1.0), nodes=60)

    return Case(model, autoguide.AutoMultivariateNormal(model), (y,), reference)

"""Idioms of Pyro: conditioning, guides made by helpers, networks with state, other losses, the forecaster."""

import math

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as transforms
import torch
from pyro import poutine
from pyro.contrib.easyguide import easy_guide
from pyro.contrib.forecast import ForecastingModel
from pyro.distributions import constraints
from pyro.infer import RenyiELBO, Trace_ELBO, autoguide
from torch import nn

from tests.programs.base import Case, draws, gaussian, integral, program, value_of
from tests.programs.latents import BINARY, VAE, bernoulli
from tests.programs.mixtures import normal

READINGS = 0.5 + draws(6, seed=40)


def level_evidence(y=READINGS):
    """y_i ~ N(mu, 1), mu ~ N(0, 4)."""
    return gaussian(y, 0.0, 4.0 + torch.eye(len(y)))


@program("closed form", scope="joint")
def conditioned_program():
    """A model that draws its data, conditioned on them from outside."""

    def draw(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            return pyro.sample("obs", dist.Normal(mu, 1.0))

    model = pyro.condition(draw, data={"obs": READINGS})
    return Case(model, autoguide.AutoNormal(model), (READINGS,), level_evidence)


@program(
    "closed form",
    scope="joint",
    loss=lambda: Trace_ELBO(4, max_plate_nesting=1, vectorize_particles=True),
)
def plate_without_a_size():
    """pyro.plate("data") alone, its size is that of what is inside."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data"):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc, scale))

    return Case(model, guide, (READINGS,), level_evidence)


@program("closed form", scope="joint")
def sequential_plate():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"obs_{i}", dist.Normal(mu, 1.0), obs=y[i])

    return Case(model, autoguide.AutoNormal(model), (READINGS,), level_evidence)


@program("closed form", scope="joint")
def parts_of_different_lengths():
    """Readings, and one prior mean as a number."""

    def model(y, prior):
        mu = pyro.sample("mu", dist.Normal(prior, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    batch = (READINGS, torch.tensor(0.0))
    return Case(model, autoguide.AutoNormal(model), batch, level_evidence)


@program("closed form", scope="joint")
def absent_argument():
    """An optional argument of the model is None."""

    def model(y, offset=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        mean = mu if offset is None else mu + offset
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    return Case(model, autoguide.AutoNormal(model), (READINGS, None), level_evidence)


@program("closed form", scope="joint")
def missing_outcomes_by_a_mask():
    seen = torch.tensor([True, True, False, True, False, True])

    def model(y, seen):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=seen):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    guide = autoguide.AutoNormal(model)
    return Case(model, guide, (READINGS, seen), lambda: level_evidence(READINGS[seen]))


@program("closed form", scope="joint", loss=lambda: RenyiELBO(alpha=0.5, num_particles=3))
def renyi_bound():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    return Case(model, autoguide.AutoNormal(model), (READINGS,), level_evidence)


@program("closed form", scope="joint")
def easy_guide_of_two_blocks():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 0.6))
            pyro.sample("obs", dist.Normal(z, 0.8), obs=y)

    @easy_guide(model)
    def guide(self, y):
        loc = pyro.param("loc", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        mu = pyro.sample("mu", dist.Normal(loc, scale))
        slope = pyro.param("slope", torch.tensor(0.4))
        width = pyro.param("width", torch.tensor(0.5), constraint=constraints.positive)
        with self.plate("data", len(y)):
            pyro.sample("z", dist.Normal(mu + slope * (y - mu), width))

    return Case(model, guide, (READINGS,), level_evidence)


@program("closed form", scope="joint", refused="point")
def laplace_approximation_before_it_is_made():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    return Case(model, autoguide.AutoLaplaceApproximation(model), (READINGS,), level_evidence)


class LocalLevel(ForecastingModel):
    """The forecaster's local level: time is a plate of the module's own."""

    def model(self, zero_data, covariates):
        scale = pyro.sample("drift_scale", dist.LogNormal(-1.0, 0.5))
        with self.time_plate:
            drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
        level = scale * drift.cumsum(-1)
        self.predict(dist.Normal(0.0, 0.8), level.unsqueeze(-1))


@program("integral", scope="joint", steps=400, slack=1.0)
def forecaster_of_a_local_level():
    y = 0.5 * draws(5, 1, seed=41).cumsum(0)
    covariates = torch.zeros(5, 0)
    model = LocalLevel()

    def reference():
        time = torch.arange(1.0, 6)

        def log_f(u):
            scale = (-1.0 + 0.5 * u).exp()[:, None, None]
            cov = scale**2 * torch.minimum(time[:, None], time) + 0.64 * torch.eye(5)
            return torch.stack([gaussian(y[:, 0], 0.0, c) for c in cov]) + normal(u, 0.0, 1.0)

        return integral(log_f, (-7.0, 7.0))

    return Case(model, autoguide.AutoNormal(model), (y, covariates), reference)


@program("integral")
def vae_with_a_flow_in_the_guide():
    net = VAE()
    flow = transforms.affine_coupling(2, [4])

    def guide(x):
        pyro.module("encoder", net.encoder)
        pyro.module("flow", flow)
        loc, log_scale = net.encoder(x).chunk(2, -1)
        base = dist.Normal(loc, log_scale.exp()).to_event(1)
        with pyro.plate("data", len(x)):
            pyro.sample("latent", dist.TransformedDistribution(base, [flow]))

    return Case(net.model, guide, (BINARY,), net.evidence)


@program("integral")
def vae_with_batch_normalization():
    """Audit looks at the networks in evaluation mode."""
    net = VAE()
    net.encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    return Case(net.model, net.guide, (BINARY,), net.evidence)


@program("integral")
def convolutional_vae():
    """Networks of images, which take no further batch dimension."""
    images = BINARY[:, None, None, :].expand(5, 1, 4, 6).clone()
    decoder = nn.Sequential(nn.Linear(1, 24), nn.Unflatten(-1, (1, 4, 6)), nn.Conv2d(1, 1, 3, padding=1))
    encoder = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(3), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def reference():
        def log_f(z):
            likelihood = bernoulli(images, decoder(z[:, None])[:, None]).sum((-1, -2, -3))
            return likelihood + normal(z, 0.0, 1.0)[:, None]

        return integral(log_f, (-7.0, 7.0), nodes=400)

    return Case(model, guide, (images,), reference)


@program("closed form", refused="relaxed")
def relaxed_categories_in_the_guide():
    """Gumbel-softmax draws in place of categories: no density of theirs is a probability."""

    def model(y):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.ones(2)))
            pyro.sample("obs", dist.Normal((k * locs).sum(-1), 1.0), obs=y)

    def guide(y):
        logits = pyro.param("logits", torch.zeros(len(y), 2))
        with pyro.plate("data", len(y)):
            temperature = torch.tensor(0.5)
            pyro.sample("k", dist.RelaxedOneHotCategoricalStraightThrough(temperature, logits=logits))

    def reference():
        return normal(READINGS[:, None], value_of("locs"), 1.0).logsumexp(-1) - math.log(2)

    return Case(model, guide, (READINGS,), reference)

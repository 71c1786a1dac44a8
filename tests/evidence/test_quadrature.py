"""Two rules against closed forms, on easy posteriors and on hard ones."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, evidence
from pyroelbo.models import PPCA, VAE
from tests.pairs import binary


def pair_of(prior, likelihood, proposal):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", prior(y))
            pyro.sample("y", likelihood(z), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", proposal(y))

    return Pair.of(model, guide)


@pytest.mark.parametrize("latent", [1, 2])
def test_agrees_with_ppca(latent):
    pair, y = PPCA(4, latent, guide="mean_field"), 2 * torch.randn(6, 4)
    bound = evidence.quadrature(pair, y)
    assert (bound.value - evidence.exact(pair, y).value).abs().max() < 1e-6
    assert bound.resolution.max() < 1e-3
    assert bound.kind == "estimate" and bound.cost > 0


def test_a_bounded_support_is_mapped_to_the_line():
    counts = pair_of(
        lambda y: dist.Gamma(torch.full_like(y, 2.0), 1.0),
        dist.Poisson,
        lambda y: dist.Gamma(1.5 + y, torch.full_like(y, 2.0)),
    )
    y = torch.tensor([0.0, 3.0, 11.0])
    exact = dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(y)
    bound = evidence.quadrature(counts, y)
    assert ((bound.value - exact).abs() <= bound.resolution + 1e-6).all() and bound.resolution.max() < 1e-3

    coin = pair_of(
        lambda y: dist.Beta(torch.full_like(y, 2.0), 3.0),
        lambda z: dist.Bernoulli(z),
        lambda y: dist.Beta(2 + y, torch.full_like(y, 3.0)),
    )
    bound = evidence.quadrature(coin, torch.tensor([0.0, 1.0]))
    assert (bound.value - torch.tensor([0.6, 0.4]).log()).abs().max() < 1e-3


@pytest.mark.parametrize("distance", [3.0, 6.0])
def test_two_modes_of_which_the_guide_knows_one(distance):
    """p(y | z) has peaks at both signs of z; the guide sits on one of them."""
    scale = 0.15
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros(len(y)), 4.0),
        lambda z: dist.Normal(z.abs(), scale),
        lambda y: dist.Normal(y, scale),
    )
    y = torch.tensor([distance, 0.5 * distance])
    exact = (2 * dist.Normal(0.0, math.hypot(4.0, scale)).log_prob(y).exp()).log()
    bound = evidence.quadrature(pair, y)
    assert (bound.value - exact).abs().max() < 1e-4
    assert bound.resolution.max() < 1e-3


def test_a_spike_between_the_coarse_nodes_is_found_through_the_guide():
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros(len(y)), 30.0),
        lambda z: dist.Normal(z, 1e-4),
        lambda y: dist.Normal(y, 1.5e-4),
    )
    y = torch.tensor([1.2345, -20.1])
    bound = evidence.quadrature(pair, y)
    assert (bound.value - dist.Normal(0.0, 30.0).log_prob(y)).abs().max() < 1e-4


def test_disagreement_is_stated_not_hidden():
    """A spike that neither prior draws nor guide come near: whatever is printed must be flagged."""
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros(len(y)), 30.0),
        lambda z: dist.Normal(z, 1e-4),
        lambda y: dist.Normal(torch.zeros(len(y)), 1.0),
    )
    bound = evidence.quadrature(pair, torch.tensor([1.2345]))
    wrong = (bound.value - dist.Normal(0.0, 30.0).log_prob(torch.tensor([1.2345]))).abs()
    assert wrong < 1e-3 or (bound.resolution > 1e-3 and bound.notes)


def test_a_vae_on_two_dimensions():
    torch.manual_seed(1)
    pair, y = VAE(12, 2, (16,)), binary(20, 12)
    bound = evidence.quadrature(pair, y)
    assert bound.resolution.max() < 1e-3
    iwae = evidence.iwae(pair, y, particles=2000)
    assert ((iwae.value - bound.value).abs() < 6 * iwae.stderr + 1e-3).all()


def test_what_it_does_not_take():
    with pytest.raises(evidence.Unavailable, match="3 dimensions"):
        evidence.quadrature(PPCA(4, 3), torch.randn(2, 4))
    discrete = pair_of(
        lambda y: dist.Categorical(torch.ones(len(y), 2)),
        lambda z: dist.Normal(z.double(), 1.0),
        lambda y: dist.Categorical(torch.ones(len(y), 2)),
    )
    with pytest.raises(evidence.Unavailable, match="'z' is discrete"):
        evidence.quadrature(discrete, torch.randn(3))
    with pytest.raises(ValueError, match="tolerance"):
        evidence.quadrature(PPCA(4, 2), torch.randn(2, 4), tolerance=0)
    uneven = pair_of(
        lambda y: dist.Uniform(torch.zeros(len(y)), 1 + torch.arange(len(y))),
        lambda z: dist.Normal(z, 1.0),
        lambda y: dist.Uniform(torch.zeros(len(y)), 1 + torch.arange(len(y))),
    )
    with pytest.raises(evidence.Unavailable, match="differs between data"):
        evidence.quadrature(uneven, torch.rand(3))

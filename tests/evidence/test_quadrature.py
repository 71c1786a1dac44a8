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


def test_draws_whose_squares_overflow_are_said_to():
    pair = pair_of(
        lambda y: dist.Normal(y.new_zeros(len(y)), 1.0),
        lambda z: dist.Normal(z, 1.0),
        lambda y: dist.Normal(y.new_zeros(len(y)), 1e200),
    )
    with pytest.raises(evidence.Unavailable, match="no finite covariance"):
        evidence.quadrature(pair, torch.tensor([1.0], dtype=torch.float64))


def test_what_it_does_not_take():
    with pytest.raises(evidence.Unavailable, match="got 3"):
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


def test_modes_that_no_draw_comes_near_are_climbed():
    """p(y | z) peaks at both square roots of y; guide and prior draws see at most one of these spikes."""
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros_like(y), 3.0),
        lambda z: dist.Normal(z**2, 1e-3),
        lambda y: dist.Normal(y.sqrt(), 1e-4),
    )
    y = torch.tensor([1.0, 2.0, 9.0])
    exact = (
        dist.Normal(0.0, 3.0).log_prob(y.sqrt()) - y.sqrt().log()
    )  # two roots, each with Jacobian 1 / (2 sqrt y)
    assert (evidence.quadrature(pair, y).value - exact).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mass_at_a_boundary_beyond_floating_point_is_flagged(dtype):
    torch.set_default_dtype(dtype)
    pair = pair_of(
        lambda y: dist.Beta(torch.full_like(y, 0.1), 0.1),
        lambda z: dist.Binomial(10, z),
        lambda y: dist.Beta(0.1 + y, 10.1 - y),
    )
    y = torch.tensor([5.0, 10.0])
    exact = dist.BetaBinomial(
        torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64), 10
    ).log_prob(y.double())
    bound = evidence.quadrature(pair, y)
    assert abs(float(bound.value[0] - exact[0])) < 1e-5 and bound.resolution[0] < 1e-3
    # At y = 10 the posterior is Beta(10.1, 0.1): e^(-u/10) of its mass lies beyond z = 1 - e^-u.
    assert float(exact[1] - bound.value[1]) > 0.01 and bound.resolution[1] == math.inf
    assert "closer to the boundary" in bound.notes[-1]


def test_a_density_that_is_infinite_at_the_boundary_is_integrated():
    pair = pair_of(
        lambda y: dist.Gamma(torch.full_like(y, 0.3), 0.5),
        dist.Poisson,
        lambda y: dist.Gamma(0.3 + y, torch.full_like(y, 1.5)),
    )
    y = torch.tensor([0.0, 3.0])
    bound = evidence.quadrature(pair, y)
    assert (
        bound.value - dist.NegativeBinomial(0.3, probs=torch.tensor(1 / 1.5)).log_prob(y)
    ).abs().max() < 1e-5


def test_masked_latents_integrate_to_one():
    def program(y, lengths, observe):
        z = torch.zeros(len(y))
        with pyro.plate("data", len(y)):
            for t in range(2):
                with pyro.poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Normal(z if observe else y[:, t] / 2, 1.0))
                    if observe:
                        pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[:, t])

    pair = Pair.of(lambda y, n: program(y, n, True), lambda y, n: program(y, n, False))
    y, lengths = torch.randn(3, 2), torch.tensor([2, 1, 0])
    one = dist.Normal(0.0, math.sqrt(2)).log_prob(y[1, 0])
    covariance = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    two = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y[0])
    value = evidence.quadrature(pair, (y, lengths)).value
    torch.testing.assert_close(value, torch.stack([two, one, torch.tensor(0.0)]), atol=1e-5, rtol=0)


def test_a_guide_that_leaves_the_support_is_no_hindrance():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(pyro.sample("z", dist.Gamma(2.0, 1.5))), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 2.0))

    y = torch.tensor([0.0, 1.0, 9.0])
    bound = evidence.quadrature(Pair.of(model, guide), y)
    exact = torch.lgamma(y + 2) - torch.lgamma(y + 1) + 2 * math.log(0.6) - y * math.log(2.5)
    assert (bound.value - exact).abs().max() < 1e-6
    assert bound.resolution.max() < 1e-4


def test_a_pair_tied_to_its_whole_batch():
    """Data are refined one by one, but such a pair is run on all of them."""

    def model(y):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
            pyro.sample("y", dist.Normal(z + z**3, 0.3), obs=y)

    def free(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z + z**3, 0.3), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 0.5))

    y = torch.tensor([0.1, 12.0, -0.5, 2.0, 40.0])
    one, other = (evidence.quadrature(Pair.of(m, guide), y, 1e-7).value for m in (model, free))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

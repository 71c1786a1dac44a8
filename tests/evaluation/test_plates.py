"""Plates as people name them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyroelbo import Pair, audit, evidence
from pyroelbo.objectives import IWAE_ELBO


def programs(name, words=5):
    """Documents of a few words each; the words have a plate of their own."""

    def model(y):
        with pyro.plate(name, len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with pyro.plate("words", words, dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y.T)

    def guide(y):
        with pyro.plate(name, len(y), dim=-1):
            pyro.sample("z", dist.Normal(y.sum(-1) / (words + 1), 1 / math.sqrt(words + 1)))

    return model, guide


def exact(y):
    covariance = torch.ones(y.shape[-1], y.shape[-1]) + torch.eye(y.shape[-1])
    return dist.MultivariateNormal(torch.zeros(y.shape[-1]), covariance).log_prob(y)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_only_plate_as_long_as_the_batch_is_that_of_the_data(size):
    y = torch.randn(size, 5)
    pair = Pair.of(*programs("documents"))
    torch.testing.assert_close(evidence.elbo(pair, y, 3).value, exact(y), rtol=0, atol=1e-10)
    torch.testing.assert_close(evidence.quadrature(pair, y).value, exact(y), rtol=0, atol=1e-5)


def test_an_inner_plate_of_the_same_length_needs_the_name():
    y = torch.randn(5, 5)
    with pytest.raises(ValueError, match=r"Pair.of\(..., plate='"):
        evidence.elbo(Pair.of(*programs("documents")), y)
    pair = Pair.of(*programs("documents"), plate="documents")
    torch.testing.assert_close(evidence.elbo(pair, y, 3).value, exact(y), rtol=0, atol=1e-10)


def test_a_plate_without_a_size_is_named_by_the_data():
    def model(y):
        with pyro.plate("rows", y.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(6)
    pair = Pair.of(model, AutoNormal(model))
    rows = audit(pair, y, progress=False)
    assert rows.reference == "quadrature"
    torch.testing.assert_close(
        rows["quadrature"].value, dist.Normal(0.0, 2**0.5).log_prob(y), rtol=0, atol=1e-5
    )
    assert not any("one at a time" in note for b in rows.bounds for note in b.notes)


def test_deterministic_sites_may_stand_anywhere():
    def model(y):
        pyro.deterministic("constant", torch.ones(3))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.deterministic("twice", 2 * z)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
        pyro.deterministic("after", z.sum() if z.dim() == 1 else z)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 2**-0.5))

    y = torch.randn(4)
    right = dist.Normal(0.0, 2**0.5).log_prob(y)
    pair = Pair.of(model, guide)
    torch.testing.assert_close(evidence.elbo(pair, y, 3).value, right, rtol=0, atol=1e-10)
    found = evidence.elbo(pair, y, 3, scope="joint").value
    torch.testing.assert_close(found, right.sum(), rtol=0, atol=1e-10)


def test_a_mixture_as_prior():
    """Two Gaussian bumps under Gaussian noise: a mixture of two Gaussians."""

    def model(y):
        with pyro.plate("data", len(y)):
            bumps = dist.Normal(torch.tensor([-2.0, 1.0]), 0.5)
            prior = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), bumps)
            z = pyro.sample("z", prior.expand([len(y)]))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 2.0))

    y = torch.randn(3)
    means = dist.Normal(torch.tensor([-2.0, 1.0]), math.sqrt(1.25)).log_prob(y[:, None])
    right = torch.logsumexp(means + torch.tensor([0.3, 0.7]).log(), -1)
    pair = Pair.of(model, guide)
    torch.testing.assert_close(evidence.quadrature(pair, y).value, right, rtol=0, atol=1e-5)
    bound = evidence.ais(pair, y, 20, 200, progress=False)
    assert ((bound.value - right).abs() < 5 * bound.stderr + 1e-3).all()


def test_training_sees_the_same_plate():
    """The importance-weighted objective forms its weights over the data plate; the guide is exact."""
    y = torch.randn(12, 5)
    pair = Pair.of(*programs("documents"))
    for objective in (IWAE_ELBO(3), Trace_ELBO()):
        assert objective.loss(pair.model, pair.guide, y) == pytest.approx(-float(exact(y).sum()), abs=1e-8)

"""Plates as people name them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal

from pyroelbo import Pair, audit, evidence
from pyroelbo.evaluation.evaluator import Evaluator
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
    """If the first site is in both; after a site in one of them alone, it is known."""
    y = torch.randn(5, 5)
    model, guide = programs("documents")
    named = Pair.of(model, guide, plate="documents")
    for pair in (Pair.of(model, guide), named):
        torch.testing.assert_close(evidence.elbo(pair, y, 3).value, exact(y), rtol=0, atol=1e-10)

    def coins(y):
        with pyro.plate("words", y.shape[1], dim=-2), pyro.plate("documents", len(y), dim=-1):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y.T)

    y = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"Pair.of\(..., plate='"):
        evidence.exact(Pair.of(coins, lambda y: None), y)
    right = torch.stack([dist.Normal(k, 1.0).log_prob(y) for k in (0.0, 1.0)], -1)
    right = (right + torch.tensor([0.7, 0.3]).log()).logsumexp(-1).sum(-1)
    found = evidence.exact(Pair.of(coins, lambda y: None, plate="documents"), y).value
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def test_a_plate_as_long_as_three_rows_is_not_the_data():
    """A pair is looked at on three rows first."""

    def model(y):
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
        with pyro.plate("documents", len(y)):
            pyro.sample("y", dist.Normal(locs.mean(-1, keepdim=True), 1.0), obs=y)

    def guide(y):
        with pyro.plate("components", 3):
            pyro.sample("locs", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'locs' draws a latent outside .* \(in \['components'\]\)"):
        evidence.elbo(Pair.of(model, guide), torch.randn(8))
    with pytest.raises(ValueError, match="outside the plate 'documents' .* Write `with pyro.plate"):
        evidence.elbo(Pair.of(model, guide, plate="documents"), torch.randn(8))


def rows_of_words(y, refuse=False):
    """The data plate left of another one; y ~ N(0, I + 1 1ᵀ) in each row."""
    with pyro.plate("rows", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        assert not refuse or z.dim() == 2
        with pyro.plate("columns", y.shape[1], dim=-1):
            c = pyro.sample("c", dist.Normal(z, 0.6))
            pyro.sample("y", dist.Normal(c, 0.8), obs=y)


def rows_guide(y):
    with pyro.plate("rows", len(y), dim=-2):
        z = pyro.sample("z", dist.Normal(y.sum(-1, keepdim=True) / (y.shape[1] + 1), 0.5))
        with pyro.plate("columns", y.shape[1], dim=-1):
            pyro.sample("c", dist.Normal(0.64 * z + 0.36 * y, 0.48))


@pytest.mark.parametrize("refuse", [False, True])
def test_the_data_plate_may_have_any_dimension(refuse):
    y = torch.randn(6, 4)
    pair = Pair.of(lambda y: rows_of_words(y, refuse), rows_guide)
    assert type(Evaluator(pair, y).strategy).__name__ == ("Repeat" if refuse else "Plate")
    latents = evidence.terms(pair, y, 7).latents
    assert {k: tuple(v.shape) for k, v in latents.items()} == {"z": (7, 6, 1), "c": (7, 6, 4)}
    bounds = [evidence.iwae(pair, y, 400 if refuse else 4000)]
    if not refuse:
        bounds.append(evidence.ais(pair, y, 10, 50, progress=False))
        loss = IWAE_ELBO(3).loss(pair.model, pair.guide, y)
        assert abs(loss + float(exact(y).sum())) < 3  # of three draws a datum
        assert not audit(pair, y, particles=20, references=(), progress=False).bounds[0].notes
    for bound in bounds:
        assert (torch.expm1(exact(y) - bound.value).abs() < 5 * bound.stderr).all(), bound.method
    if not refuse:
        joint = evidence.iwae(pair, y, 4000, scope="joint")
        assert abs(float(torch.expm1(exact(y).sum() - joint.value))) < 5 * float(joint.stderr)


def test_a_hidden_markov_model_with_sequences_left_of_tones():
    """Padded sequences at dim -2, tones at -1, as Pyro's example; TraceEnum sums each sequence alone."""
    weights = torch.linspace(0, 3, 9).reshape(3, 3).sin().mul(2).softmax(-1)
    coins = torch.linspace(0, 4, 12).reshape(3, 4).cos().mul(2).sigmoid()

    def model(y, lengths):
        tones = pyro.plate("tones", y.shape[-1], dim=-1)
        with pyro.plate("sequences", len(y), dim=-2):
            x = torch.tensor(0)
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x{t}", dist.Categorical(weights[x]), infer={"enumerate": "parallel"})
                    with tones:
                        pyro.sample(f"y{t}", dist.Bernoulli(coins[x.squeeze(-1)]), obs=y[:, t])

    def guide(y, lengths):
        pass

    y, lengths = (torch.rand(4, 3, 4) < 0.5).double(), torch.tensor([3, 1, 2, 3])
    oracle = TraceEnum_ELBO(max_plate_nesting=2)
    right = [-oracle.loss(model, guide, y[i : i + 1], lengths[i : i + 1]) for i in range(4)]
    found = evidence.exact(Pair.of(model, guide), (y, lengths))
    torch.testing.assert_close(found.value, torch.tensor(right), rtol=0, atol=1e-10)


def test_a_time_major_batch():
    def model(y, other):
        assert y.shape[0] == 2 and other.shape == (5,)
        with pyro.plate("data", y.shape[1]):
            z = torch.zeros(())
            for t in range(2):
                z = pyro.sample(f"z{t}", dist.Normal(z, 1.0))
                pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[t])

    def guide(y, other):
        with pyro.plate("data", y.shape[1]):
            for t in range(2):
                pyro.sample(f"z{t}", dist.Normal(0.5 * y[t], 0.7))

    y, other = torch.randn(5, 2), torch.zeros(5)  # the parts of a batch have the data first
    right = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]])).log_prob(y)
    found = evidence.quadrature(Pair.of(model, guide, data_dim=1), (y, other)).value
    torch.testing.assert_close(found, right, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="data_dim: expected a dimension"):
        Pair.of(model, guide, data_dim=-1)

    def turned(y):
        model(y, torch.zeros(5))

    with pytest.raises(ValueError, match=r"expected 2 data.*got 5.*Pair.of\(..., data_dim=1\)"):
        evidence.elbo(Pair.of(turned, lambda y: guide(y, None)), y.T)


def test_a_transposed_observation_is_simulated_as_such():
    def model(y):
        with pyro.plate("documents", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(100.0 * torch.arange(len(y)), 1.0))
            with pyro.plate("words", 2, dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y.T)

    pair = Pair.of(model, lambda y: None, placeholder=lambda n: torch.zeros(1, 2).expand(n, 2))
    latents, y = pair.simulate(4)
    assert (y - latents["z"].unsqueeze(-1)).abs().max() < 6


@pytest.mark.parametrize("scope", ["datum", "joint"])
def test_a_plate_without_a_size_has_that_of_its_sites(scope):
    def model(y):
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(0.5 * y, 2**-0.5))

    y = torch.randn(5)
    right = dist.Normal(0.0, 2**0.5).log_prob(y)
    found = evidence.elbo(Pair.of(model, guide), y, 3, scope=scope).value
    torch.testing.assert_close(found, right if scope == "datum" else right.sum(), rtol=0, atol=1e-10)
    assert IWAE_ELBO(2).loss(Pair.of(model, guide).model, guide, y) == pytest.approx(-float(right.sum()))
    with pytest.raises(ValueError, match="guide: expected a size of every plate"):
        evidence.elbo(Pair.of(model, AutoNormal(model)), y, scope=scope)


def test_a_scalar_observed_many_times_in_a_plate_without_a_size():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data"):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def guide(y):
        pyro.sample("mean", dist.Normal(y.sum() / (1 + len(y)), (1 + len(y)) ** -0.5))

    y = torch.randn(5)
    found = evidence.iwae(Pair.of(model, guide), y, 5, scope="joint").value
    right = dist.MultivariateNormal(torch.zeros(5), torch.eye(5) + torch.ones(5, 5)).log_prob(y)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def test_a_plate_named_by_the_data():
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


def test_guides_of_free_parameters_need_latents_and_no_mask():
    def nothing(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(len(y)), 1.0), obs=y)

    with pytest.raises(ValueError, match="the model has no latents"):
        evidence.gap(Pair.of(nothing, lambda y: None), torch.randn(3))
    keep = torch.tensor([True, True, False])

    def model(y):
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=keep):
            pyro.sample("z", dist.Normal(y, 1.0))

    with pytest.raises(ValueError, match="guide site 'z' is masked: evaluate data without padding"):
        evidence.gap(Pair.of(model, guide), torch.randn(3))

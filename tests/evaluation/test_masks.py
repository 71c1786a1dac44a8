"""Masks that differ between model and guide: the model's decide, entry by entry."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.infer.reparam import NeuTraReparam
from pyro.nn import PyroParam
from torch import nn

from pyroelbo import Pair, evidence
from pyroelbo.evaluation.masks import ModelMasks

SEEN = torch.tensor([True, True, True, False])


def missing(rate=0.2, guess=0.2):
    """Four data of one Bernoulli each, the last unseen."""

    def model(y, seen):
        with pyro.plate("data", len(y)):
            pyro.sample("c", dist.Bernoulli(torch.full((len(y),), rate)), obs=y, obs_mask=seen)

    def guide(y, seen):
        with pyro.plate("data", len(y)):
            pyro.sample("c_unobserved", dist.Bernoulli(torch.full((len(y),), guess)))

    return Pair.of(model, guide), (torch.tensor([1.0, 0.0, 1.0, 0.0]), SEEN)


def gaussian(mask_model=None, mask_guide=None, scale=0.1):
    """N(0, 1) -> N(z, .1) with masks of the latent by ``poutine.mask``."""

    def model(y):
        with pyro.plate("data", len(y)):
            with poutine.mask(mask=True if mask_model is None else mask_model):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)), poutine.mask(mask=True if mask_guide is None else mask_guide):
            pyro.sample("z", dist.Normal(y, scale))

    return Pair.of(model, guide)


def test_an_unseen_value_of_the_right_guide_gives_the_evidence_in_every_draw():
    pair, batch = missing()
    right = torch.tensor([math.log(0.2), math.log(0.8), math.log(0.2), 0.0])
    assert float(right.mean()) == pytest.approx(-0.8605, abs=5e-5)
    draws = evidence.terms(pair, batch, 50).log_weight
    torch.testing.assert_close(draws, right.expand_as(draws), rtol=0, atol=1e-12)
    for bound in (
        evidence.exact(pair, batch),
        evidence.iwae(pair, batch, 8),
        evidence.ais(pair, batch, 5, 3, progress=False),
    ):
        torch.testing.assert_close(bound.value, right, rtol=0, atol=1e-12)


def test_an_unseen_value_of_another_guide_gives_a_lower_bound():
    pair, batch = missing(guess=0.7)
    draws = evidence.terms(pair, batch, 2000).log_weight
    right = torch.tensor([math.log(0.2), math.log(0.8), math.log(0.2), 0.0])
    torch.testing.assert_close(draws[:, :3], right[:3].expand(2000, 3), rtol=0, atol=1e-12)
    # E w = 1 for the unseen entry, whose weight is p(c)/q(c).
    assert draws[:, 3].exp().mean() == pytest.approx(1.0, abs=5 * float(draws[:, 3].exp().std()) / 2000**0.5)


@pytest.mark.parametrize("hidden", [False, torch.zeros(2, dtype=torch.bool)])
def test_a_guide_that_masks_what_the_model_uses_is_counted(hidden):
    exact = float(dist.Normal(0.0, math.sqrt(1.01)).log_prob(torch.tensor(0.0)))
    assert exact == pytest.approx(-0.924, abs=5e-4)
    pair, plain, y = gaussian(mask_guide=hidden), gaussian(), torch.zeros(2)
    pyro.set_rng_seed(1)
    bound = evidence.elbo(pair, y, 400)
    pyro.set_rng_seed(1)
    assert torch.equal(bound.value, evidence.elbo(plain, y, 400).value)
    assert (bound.value < exact + 5 * bound.stderr).all()


def test_a_masked_latent_in_use_is_refused():
    seen = torch.tensor([True, False])
    for pair in (gaussian(seen, seen), gaussian(seen), gaussian(False, False)):
        for estimator in (evidence.elbo, evidence.iwae, evidence.quadrature):
            with pytest.raises(ValueError, match="'y' depends on entries of latent site 'z' that are masked"):
                estimator(pair, torch.zeros(2))


def test_a_masked_finite_latent_in_use_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.001)).mask(y > 0))
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.001)))

    y = torch.tensor([1.0, 2.0, 3.0, 4.0, -1.0])
    for estimator in (evidence.elbo, evidence.exact):
        with pytest.raises(ValueError, match="'k' that are masked"):
            estimator(Pair.of(model, guide), y)


def chain(by, forget):
    """Two steps of a padded chain; the guide may forget the padding."""

    def hide(fn, mask):
        return fn.mask(mask) if by == "distribution" else fn

    def model(y, lengths):
        before = torch.zeros(len(y))
        with pyro.plate("data", len(y)):
            for t in range(2):
                live = t < lengths
                with poutine.mask(mask=live if by == "handler" else True):
                    before = pyro.sample(f"z_{t}", hide(dist.Normal(before, 1.0), live))
                    pyro.sample(f"y_{t}", hide(dist.Normal(before, 0.5), live), obs=y[:, t])

    def guide(y, lengths):
        with pyro.plate("data", len(y)):
            for t in range(2):
                live = (t < lengths) | forget
                with poutine.mask(mask=live if by == "handler" else True):
                    pyro.sample(f"z_{t}", hide(dist.Normal(0.6 * y[:, t], 0.6), live))

    return Pair.of(model, guide)


@pytest.mark.parametrize("by", ["handler", "distribution"])
@pytest.mark.parametrize("forget", [False, True])
def test_a_padded_chain_is_right_whatever_its_guide_masks(by, forget):
    y, lengths = torch.tensor([[0.4, -0.3], [1.0, 5.0]]), torch.tensor([2, 1])
    covariance = torch.tensor([[1.0, 1.0], [1.0, 2.0]]) + 0.25 * torch.eye(2)
    truth = torch.stack(
        [
            dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y[0]),
            dist.Normal(0.0, math.sqrt(1.25)).log_prob(y[1, 0]),
        ]
    )
    pair = chain(by, forget)
    torch.testing.assert_close(evidence.quadrature(pair, (y, lengths)).value, truth, rtol=0, atol=1e-4)
    weight = evidence.terms(pair, (y, lengths), 40_000).log_weight
    ratio = (weight - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 200).all()
    assert (weight.mean(0) < truth).all()
    # A conjugate guide of the second sequence's one live step: its weight varies by that step alone.
    plain = evidence.ais(pair, (y, lengths), 30, 64, progress=False)
    assert ((plain.value - truth).abs() < 6 * plain.stderr + 1e-3).all()


def obs_mask_model(y, seen):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
        pyro.sample("y", dist.Normal(z, 0.7), obs=y, obs_mask=seen)


def test_an_automatic_guide_of_a_partly_observed_site():
    """E w = p(y), with the last datum unseen: 0."""
    pyro.clear_param_store()
    y = torch.tensor([0.3, -1.0, 0.5, 0.0])
    truth = dist.Normal(0.0, math.sqrt(1.49)).log_prob(y) * SEEN
    pair = Pair.of(obs_mask_model, AutoNormal(obs_mask_model, init_scale=1.0))
    weight = evidence.terms(pair, (y, SEEN), 40_000).log_weight.detach()
    ratio = (weight - truth).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 200).all()
    assert (weight.mean(0) < truth).all()
    torch.testing.assert_close(evidence.quadrature(pair, (y, SEEN)).value, truth, rtol=0, atol=1e-4)


def test_an_automatic_guide_of_one_site_for_all_latents_cannot_leave_some_out():
    def model(y, seen):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 0.7), obs=y, obs_mask=seen)

    pair = Pair.of(model, AutoDiagonalNormal(model))
    with pytest.raises(ValueError, match="a separate site for 'y_unobserved'"):
        evidence.elbo(pair, (torch.zeros(4), SEEN), scope="joint")


def neural_transport(inside=False):
    """N(0, 1) -> N(m, 1), its latent transported by the posterior: N(0, 1) is the right guide."""
    y = torch.tensor([0.3, -1.0, 0.5])

    def model(y):
        with pyro.plate("groups", 2) if inside else nullcontext():
            m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m.sum(), 1.0), obs=y)

    made_from = AutoDiagonalNormal(model)
    made_from(y)
    size = len(made_from.loc)
    made_from.loc = nn.Parameter((y.sum() / 4).expand(size).clone())
    made_from.scale = PyroParam(torch.full((size,), 0.5), constraints.positive)

    def guide(y):
        pyro.sample("m_shared_latent", dist.Normal(torch.zeros(size), 1.0).to_event(1))

    transported = NeuTraReparam(made_from).reparam(model)
    truth = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(y)
    return Pair.of(transported, guide), y, truth


def test_neural_transport_keeps_the_evidence():
    pair, y, truth = neural_transport()
    draws = evidence.terms(pair, y, 20, scope="joint").log_weight
    torch.testing.assert_close(draws, truth.expand_as(draws), rtol=0, atol=1e-5)
    found = evidence.quadrature(pair, y, scope="joint").value
    torch.testing.assert_close(found.reshape(()), truth, rtol=0, atol=1e-4)
    loss = Trace_ELBO()
    wrapped = [ModelMasks()(program) for program in (pair.model, pair.guide)]
    for mine in (wrapped, (pair.model, pair.guide)):  # as Pyro trains it
        assert loss.loss(*mine, y) == pytest.approx(-float(truth), abs=1e-5)


def test_neural_transport_of_a_latent_inside_a_plate_counts_its_jacobian_twice():
    pair, y, _ = neural_transport(inside=True)
    with pytest.raises(ValueError, match=r"'m': expected a first latent outside .* Audit the model without"):
        evidence.elbo(pair, y, scope="joint")


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_training_losses_take_the_same_handler(loss):
    """Pyro's losses of the wrapped programs: -ln p(y) in every draw, as the guide is right where unseen."""

    def model(y, seen):
        with pyro.plate("data", len(y)):
            pyro.sample("c", dist.Normal(torch.zeros(len(y)), 1.0), obs=y, obs_mask=seen)

    def guide(y, seen):
        with pyro.plate("data", len(y)):
            pyro.sample("c_unobserved", dist.Normal(torch.zeros(len(y)), torch.where(seen, 0.1, 1.0)))

    y = torch.tensor([0.3, -1.0, 0.5, 0.0])
    right = -float(dist.Normal(0.0, 1.0).log_prob(y[:3]).sum())
    wrapped = [ModelMasks()(program) for program in (model, guide)]
    for _ in range(5):
        assert loss().loss(*wrapped, y, SEEN) == pytest.approx(right, abs=1e-10)
    assert loss().loss(model, guide, y, SEEN) != pytest.approx(right, abs=1e-3)


def test_masks_inside_events_are_refused_in_the_model_and_checked_in_the_guide():
    def model(y, inside=None):
        with pyro.plate("data", len(y)):
            prior = dist.Normal(torch.zeros(len(y), 2), 1.0)
            prior = prior if inside is None else prior.mask(inside)
            z = pyro.sample("z", prior.to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            free = dist.Normal(torch.zeros(len(y), 2), 1.0).mask(torch.tensor([True, False]))
            pyro.sample("z", free.to_event(1))

    hidden = torch.tensor([True, False])
    with pytest.raises(ValueError, match="one inside the event"):
        evidence.elbo(Pair.of(lambda y: model(y, hidden), guide), torch.zeros(3))
    with pytest.raises(ValueError, match="'z' masks entries inside its event"):
        evidence.elbo(Pair.of(model, guide), torch.zeros(3))


def test_an_aggregated_posterior_of_masked_latents_is_refused():
    pair, batch = missing()
    with pytest.raises(evidence.Unavailable, match="latent site 'c_unobserved' is masked"):
        evidence.diagnostics(pair, batch)

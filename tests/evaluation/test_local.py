"""Free parameters for each datum reach what no encoder of the family can beat."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyroelbo import Pair, audit, evidence, fit, unamortized
from pyroelbo.encoders import ENCODERS
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models import PPCA, VAE
from tests.pairs import TABLE, Nonlinear


def test_it_starts_where_the_guide_is():
    pair, y = PPCA(5, 3, guide="mean_field"), torch.randn(6, 5)
    free, data = unamortized(pair, y)
    found = audit(free, data, particles=2000)
    before = evidence.elbo(pair, y, 2000)
    assert found.name == "PPCA, free guide" and found.reference == "exact"
    assert (
        (found["elbo"].value - before.value).abs() < 5 * torch.hypot(before.stderr, found["elbo"].stderr)
    ).all()


def family_gap(pair, y):
    """What the best diagonal Gaussian loses on pPCA's posterior: ½ (Σ ln Λ_ii - ln det Λ) nats."""
    precision = pair.posterior(y).precision_matrix.detach()
    return 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_family_starts_where_its_encoder_is(kind):
    pair, y = VAE(6, 3, (8,), encoder=kind), torch.randint(2, (4, 6)).double()
    free, data = unamortized(pair, y)
    pyro.set_rng_seed(1)
    value = evidence.iwae(free, data, 7).value
    pyro.set_rng_seed(1)
    assert (value - evidence.iwae(pair, y, 7).value).abs().max() < 1e-9
    before = dict(pair.named_parameters())
    assert all(
        torch.equal(before[k.removeprefix("generator.")], v) for k, v in free.part("generator").items()
    )
    refined, data = unamortized(pair, y, 30, draws=8)
    gain = evidence.elbo(refined, data, 500).mean - evidence.elbo(pair, y, 500).mean
    assert gain > 0.05  # of some 0.3 nats of amortization gap of an untrained encoder


@pytest.mark.parametrize("cells", [10**6, 40])
def test_refinement_ends_at_the_best_member(monkeypatch, cells):
    """Also where memory has room for a few data at a time only; data are not mixed up."""
    monkeypatch.setattr(Evaluator, "cells", cells)
    pair, y = PPCA(5, 3, guide="mean_field"), 2 * torch.randn(12, 5)
    truth, mean = family_gap(pair, y), pair.posterior(y).mean.detach()
    gaps = []
    for steps in (0, 5, 200):
        free, (index, _) = unamortized(pair, y, steps, draws=8, learning_rate=0.1)
        q = dist.Normal(free.encoder.z_loc, free.encoder.z_scale.exp()).to_event(1)
        full = dist.MultivariateNormal(q.base_dist.loc, scale_tril=torch.diag_embed(q.base_dist.scale))
        gaps.append(float(dist.kl.kl_divergence(full, pair.posterior(y)).mean().detach()))
        assert torch.equal(index, torch.arange(12))
    assert gaps[0] > gaps[1] > gaps[2] > float(truth.mean()) - 1e-9
    assert gaps[2] < float(truth.mean()) + 0.01 and (free.encoder.z_loc - mean).abs().max() < 0.2


def test_steps_of_a_full_covariance_do_not_grow_with_its_entries():
    """66 entries beside the diagonal, all of which Adam moves by its step size at first."""
    torch.manual_seed(1)
    pair, y = PPCA(16, 12), torch.randn(4, 16)
    posterior = pair.posterior(y)
    mean, tril = posterior.mean.detach(), posterior.scale_tril.detach()

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.MultivariateNormal(mean + 0.3, scale_tril=tril))

    gaps = []
    for steps in (0, 10):
        free, data = unamortized(Pair.of(pair.model, guide), y, steps, learning_rate=0.1)
        q = poutine.trace(free.guide).get_trace(*data).nodes["z"]["fn"]
        gaps.append(float(dist.kl.kl_divergence(q, posterior).mean().detach()))
    assert gaps[1] < 0.25 * gaps[0]


def test_it_reaches_the_family_gap():
    """The best diagonal Gaussian on pPCA's posterior."""
    pair, y = PPCA(5, 3, guide="mean_field"), torch.randn(30, 5)
    truth = family_gap(pair, y)
    weight = pair.generator.weight.detach().clone()
    free, data = unamortized(pair, y)
    before = evidence.exact(pair, y).mean - evidence.elbo(pair, y, 500).mean
    fit(
        free,
        data,
        epochs=150,
        batch_size=10,
        learning_rate=0.05,
        schedule="cosine",
        particles=4,
        freeze=("generator",),
        progress=False,
    )
    assert torch.equal(pair.generator.weight, weight)
    bound = evidence.elbo(free, data, 4000)
    gap = float(evidence.exact(pair, y).mean - bound.mean)
    # Stochastic gradients end a little above the optimum, never below it: 3e-3 nats were seen.
    assert float(truth.mean()) - 4.9 * bound.mean_error < gap < float(truth.mean()) + 0.02 < before


@pytest.mark.parametrize("name", ["own", "own-conv", "vae-bernoulli"])
def test_svi_moves_every_parameter_that_matters(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    free, data = unamortized(pair, y)
    start = copy.deepcopy(dict(free.named_parameters()))
    svi = SVI(free.model, free.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*data)
    moved = {k for k, v in free.named_parameters() if not torch.equal(v, start[k])}
    assert moved == {k for k in start if not k.startswith("generator.encoder")}
    part = tuple(t[[2, 0]] for t in data)
    assert evidence.iwae(free, part, 10).value.shape == (2,)


def test_dict_batches_and_sites_of_their_own_plates():
    def model(x, y):
        with pyro.plate("data", len(y)):
            with pyro.plate("time", 3):
                z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z.sum(0), 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(y)), pyro.plate("time", 3):
            pyro.sample("z", dist.Normal(x + y / 3, 0.9))

    batch = dict(zip("xy", torch.randn(2, 5), strict=True))
    pair = Pair.of(model, guide)
    free, data = unamortized(pair, batch)
    assert free.part("encoder")["encoder.z_loc"].shape == (5, 3)
    pyro.set_rng_seed(1)
    value = evidence.iwae(free, data, 7).value
    pyro.set_rng_seed(1)
    assert (value - evidence.iwae(pair, batch, 7).value).abs().max() < 1e-9
    fit(free, data, epochs=1, progress=False)


@pytest.mark.slow
def test_a_compiled_fit(tmp_path):
    pair, y = Nonlinear(), torch.randn(8, 4)
    free, data = unamortized(pair, y)
    run = fit(free, data, epochs=2, batch_size=4, compile=True, out=tmp_path / "run", progress=False)
    assert len(run.losses) == 2


def test_what_it_does_not_take():
    make, draw = TABLE["mixture-encoder"]
    with pytest.raises(evidence.Unavailable, match="'z' is a Categorical"):
        unamortized(make(), draw(2))
    free, (_, y) = unamortized(Nonlinear(), torch.randn(3, 4))
    with pytest.raises(ValueError, match="index: expected the rows of y"):
        evidence.elbo(free, (torch.zeros(3), y))
    for settings in ({"steps": -1}, {"steps": True}, {"draws": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            unamortized(Nonlinear(), y, **settings)
    with pytest.raises(IndexError):
        evidence.elbo(free, (torch.tensor([0, 1, 7]), y))

"""Latents masked in the model only: `fit` trains the bound, eager and compiled, and refuses masks of latents
in use.
"""

import functools
import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroelbo import Pair, fit
from pyroelbo.compiled import CompiledStep


def quiet(pair, y, **settings):
    return fit(pair, y, progress=False, epochs=1, batch_size=100, learning_rate=1e-12, **settings)


class Padded(Pair):
    """z_t ~ N(0, 1), y_t ~ N(z_t, 0.7) for the steps that were seen; the guide knows of no mask."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.encoder = nn.Linear(1, 1)
        with torch.no_grad():
            self.encoder.weight.fill_(1 / 1.49)
            self.encoder.bias.zero_()

    def model(self, y, seen):
        handler = pyro.poutine.mask(mask=seen.T) if self.how == "handler" else nullcontext()
        prior = dist.Normal(torch.zeros(y.T.shape), 1.0)
        with pyro.plate("data", len(y)), pyro.plate("steps", y.shape[1], dim=-2), handler:
            z = pyro.sample("z", prior.mask(seen.T) if self.how == "distribution" else prior)
            pyro.sample("y", dist.Normal(z, 0.7).mask(seen.T), obs=y.T)

    def guide(self, y, seen):
        loc = self.encoder(y.T[..., None])[..., 0]
        with pyro.plate("data", len(y)), pyro.plate("steps", y.shape[1], dim=-2):
            pyro.sample("z", dist.Normal(loc, (0.49 / 1.49) ** 0.5))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("how", ["handler", "distribution"])
def test_the_loss_is_the_evidence_of_what_was_seen(how, compile, monkeypatch):
    """The guide is the exact posterior of seen steps, so that every loss is -ln p(seen)."""
    monkeypatch.setattr("pyroelbo.compiled.CompiledStep", functools.partial(CompiledStep, backend="eager"))
    y = torch.randn(6, 4)
    seen = torch.ones(6, 4, dtype=torch.bool)
    seen[::2, 2:] = False
    truth = (dist.Normal(0.0, math.sqrt(1.49)).log_prob(y) * seen).sum() / 6
    run = quiet(Padded(how), (y, seen), compile=compile)
    assert run.losses[0] == pytest.approx(-float(truth), abs=1e-10)


def test_an_unseen_coin_leaves_the_loss():
    """Pyro's obs_mask, q the posterior of what was seen: the printed example's -ln p(y) = .8605 per datum."""
    y = torch.tensor([1.0, 0.0, 1.0, 0.0])
    seen = torch.tensor([True, True, True, False])

    class Coins(Pair):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Parameter(torch.tensor(0.2).logit())

        def model(self, y, seen):
            with pyro.plate("data", len(y)):
                pyro.sample("c", dist.Bernoulli(0.2), obs=y, obs_mask=seen)

        def guide(self, y, seen):
            with pyro.plate("data", len(y)):
                pyro.sample("c_unobserved", dist.Bernoulli(logits=self.encoder))

    truth = (2 * math.log(0.2) + math.log(0.8)) / 4
    for seed in range(3):
        run = quiet(Coins(), (y, seen), seed=seed)
        assert run.losses[0] == pytest.approx(-truth, abs=1e-10) == pytest.approx(0.8605, abs=1e-3)


def test_a_masked_latent_in_use_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            with pyro.poutine.mask(mask=torch.tensor(False)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=torch.tensor(False)):
            pyro.sample("z", dist.Normal(loc.expand(len(y)), 1.0))

    with pytest.raises(ValueError, match=r"site 'y' depends on entries of latent site 'z' that are masked"):
        quiet(Pair.of(model, guide), torch.randn(5))

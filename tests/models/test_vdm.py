"""Continuous-time diffusion: the bound of Gaussian data is tight whatever the schedule, whose interior moves
the estimator's variance alone."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pyroelbo import audit, evidence, fit, models
from pyroelbo.evidence import Unavailable
from tests.models.test_diffusion import covariance, entropy, sigma_points

FROZEN = ("generator", "encoder.first", "encoder.log_range")


class Optimal(nn.Module):
    """v of the posterior mean of N(0, s) data, at the noise level of the ``pair``'s schedule."""

    def __init__(self, s):
        super().__init__()
        self.s, self.unit = s, nn.Parameter(torch.ones(()))

    def forward(self, z, share):
        encoder = self.__dict__["pair"].encoder
        level = (encoder.first + encoder.log_range.exp() * share)[..., None, None]
        power, rest = torch.sigmoid(-level), torch.sigmoid(level)
        inner = power * self.s + rest * torch.eye(len(self.s))
        x = power.sqrt() * self.s @ torch.linalg.solve(inner, z.unsqueeze(-1))
        eps = (z.unsqueeze(-1) - power.sqrt() * x) / rest.sqrt()
        return self.unit * (power.sqrt() * eps - rest.sqrt() * x)


def optimal(schedule, s):
    pair = models.VDM(len(s), None, schedule, Optimal(s))
    pair.generator.__dict__["pair"] = pair
    return pair


@torch.no_grad()
def exact_bound(pair, s):
    """The bound's mean over N(0, s) data: quadratic in data and noise, Gauss-Legendre in time."""
    y, noise = sigma_points(s)
    time, weight = (torch.tensor(a) / 2 for a in np.polynomial.legendre.leggauss(300))
    time = (time + 0.5)[:, None].expand(-1, len(y))
    return float((copy.copy(pair).eval().term(y, time, noise.expand(300, -1, -1)).mean(1) * weight).sum())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "learned"])
def test_the_bound_of_gaussian_data_is_tight_and_the_same_for_every_schedule(schedule):
    s = covariance()
    pair = optimal(schedule, s)
    gap = (-exact_bound(pair, s) - entropy(s)) / 8
    assert gap == pytest.approx(0.000113053, abs=1e-8)  # of the ends
    time = torch.linspace(0.001, 0.999, 9).requires_grad_()
    level, slope, share = pair.encoder(time)
    (wanted,) = torch.autograd.grad(level.sum(), time)
    torch.testing.assert_close(slope[:, 0], wanted)
    assert (slope > 0).all() and (share.diff(dim=0) > 0).all()


def variance(pair, y, coupled):
    """Of the mean of a batch of 64 data's bound, over 400 draws of times and noise."""
    draws, batch = 400, 64
    time = torch.rand(draws, batch)
    if coupled:
        time = (torch.rand(draws, 1) + torch.arange(batch) / batch) % 1
    with torch.no_grad():
        noise = pair.noise_law().sample((draws, batch))
        return float(pair.eval().term(y[:batch].expand(draws, -1, -1), time, noise).mean(1).var())


def test_the_interior_is_trained_by_the_variance():
    """Cosine and uniform times against learned and spread ones: at least 10 times, and no bound moves."""
    s = covariance()
    y = torch.randn(400, 8) @ torch.linalg.cholesky(s).T
    pair = optimal("learned", s)
    before, bound = variance(pair, y, False), exact_bound(pair, s)
    fit(pair, y, epochs=30, batch_size=50, learning_rate=0.08, freeze=FROZEN, progress=False)
    assert variance(pair, y, False) < 0.7 * before  # the sampling error of each is some 7%
    assert exact_bound(pair, s) == pytest.approx(bound, abs=1e-8)
    assert variance(optimal("cosine", s), y, False) > 10 * variance(pair, y, True)


@pytest.mark.slow
def test_a_network_learns():
    s = covariance(2)
    y = 3 * torch.randn(500, 2) @ torch.linalg.cholesky(s).T + 1
    torch.manual_seed(0)
    pair = models.VDM(2, None, width=32, layers=1, steps=50).initialize(y)
    fit(pair, y, epochs=30, batch_size=50, learning_rate=1e-2, schedule="cosine", progress=False)
    bound = evidence.elbo(pair, y, 100)
    true = torch.distributions.MultivariateNormal(torch.ones(2), 9 * s).log_prob(y).mean()
    assert float(true) - 0.3 < bound.mean < float(true) + 0.1
    found = pair.layers(y, 20)
    assert found.shape == (22,) and abs(float(found.sum()) - bound.mean) < 0.3


def test_draws_have_the_moments_of_the_data():
    s = covariance(3)
    _, drawn = optimal("linear", s).simulate(4000)
    # an entry's error is at most √(2/4000) · ¼; six of them, and some for the 200 steps
    torch.testing.assert_close(torch.cov(drawn.T), s, atol=6 * 0.0056 + 0.005, rtol=0)


def test_there_is_no_chain_to_weigh():
    pair, y = models.VDM(3, 5, width=8, layers=1), torch.randint(5, (4, 3)).double()
    with pytest.raises(Unavailable, match="within its datum"):
        evidence.iwae(pair, y)
    result = audit(pair, y, particles=20, progress=False)
    assert [b.method for b in result.bounds] == ["elbo"] and "no iwae value" in str(result)


def test_grey_levels_are_told_apart_at_time_zero():
    pair, y = models.VDM(3, 17, width=8, layers=1), torch.randint(17, (200, 3))
    first, _, _ = pair.encoder(torch.zeros(200))
    z = torch.sigmoid(-first).sqrt() * pair.encode(y) + torch.sigmoid(first).sqrt() * torch.randn(200, 3)
    assert pair.observation(z, first).log_prob(y).mean() > -0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule: expected one of"),
        ({"levels": 1}, "levels: expected at least two"),
        ({"network": "unet2"}, "network: expected 'mlp', 'unet' or a module"),
        ({"steps": 0}, "steps: expected a positive number of steps"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        models.VDM(3, **settings)

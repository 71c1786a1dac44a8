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
    found = pair.by_layer(y, 20)
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
        ({"levels": 1}, "levels: expected a whole number of at least 2"),
        ({"network": "unet2"}, "network: expected 'mlp', 'unet' or a module"),
        ({"steps": 0}, "steps: expected a positive number of steps"),
        ({"parametrization": "eps"}, "parametrization: expected one of"),
        ({"parametrization": "levels", "levels": None}, "parametrization: expected 'v' for real data"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        models.VDM(3, **settings)


# ------------------------------------------------------------------------------------ probability flow


def test_the_probability_flow_of_gaussian_data():
    """Its eigendirections are scaled: z_0 ~ N(0, (α_0² s + σ_0²)/(α_1² s + σ_1²)); z-tests at 5, 1e-5 in
    all."""
    s = covariance(4)
    pair, y = optimal("learned", s), torch.randn(8, 4) @ torch.linalg.cholesky(s).T
    with torch.no_grad():
        first, last = (torch.sigmoid(-pair.encoder(t)[0]) for t in (torch.zeros(()), torch.ones(())))
        eye = torch.eye(4)
        start, end = (power * s + (1 - power) * eye for power in (first, last))
        law = torch.distributions.MultivariateNormal(torch.zeros(4), start @ torch.linalg.inv(end))
        # the mean over z_0 ~ N(α_0 y, σ_0²), whose density is that of p(y | z_0) but for α_0^D
        wanted = law.log_prob(first.sqrt() * y) + 2 * first.log()
        wanted = wanted - 0.5 * (1 - first) * law.precision_matrix.trace()
    found = pair.probability_flow(y, steps=60, draws=16)
    assert found.kind == "estimate" and "another model" in found.notes[0]
    assert (found.resolution < 5e-4).all()
    assert ((found.value - wanted).abs() < 5 * found.stderr + found.resolution).all()
    coarse = pair.probability_flow(y, steps=6)
    assert (coarse.resolution > 1e-3).all() and coarse.stderr.isnan().all()
    rough = pair.probability_flow(y, steps=20, draws=400, probes=1)
    assert ((rough.value - wanted).abs() < 5 * rough.stderr + rough.resolution).all()
    assert (rough.stderr > 2 * found.stderr / 5).all()


@pytest.mark.parametrize("settings", [{"levels": None}, {"levels": 3, "parametrization": "levels"}])
def test_the_density_of_a_flow_is_one(settings):
    """The integral of p(z_0) of a network with random weights, by the trapezoidal rule."""
    torch.manual_seed(0)
    pair = models.VDM(1, width=8, layers=1, classes=2, **settings).eval()
    for p in pair.generator.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    z = torch.linspace(-6, 6, 2001)[:, None]
    labels = torch.ones(len(z), dtype=torch.long)
    density = pair._flow(z, 40, labels, torch.ones(1, 1, 1)[0]).exp()
    assert float(torch.trapezoid(density, z[:, 0])) == pytest.approx(1, abs=2e-3)


def test_refused_flows():
    pair = models.VDM(3, 5, width=8, layers=1)
    with pytest.raises(ValueError, match="steps: expected an even number, got 7"):
        pair.probability_flow(torch.zeros(2, 3), 7)
    with pytest.raises(ValueError, match="probes: expected a positive"):
        pair.probability_flow(torch.zeros(2, 3), 4, probes=0)


# ------------------------------------------------------------------------------------- grey levels


@torch.no_grad()
def test_a_logit_for_each_level_means_the_posterior_mean():
    """With the true marginal's logits and independent pixels ε̂ is optimal: x̂ by Bayes' rule, by hand."""
    pair = models.VDM(2, 3, width=8, layers=1, parametrization="levels").eval()
    share = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    for p in pair.generator.parameters():
        p.zero_()
    pair.generator.outwards.bias.copy_(share.log().flatten())
    time, z = torch.tensor([0.4]), torch.tensor([[0.3, -0.7]])
    level, _, s = pair.encoder(time)
    alpha, sigma = torch.sigmoid(-level).sqrt(), torch.sigmoid(level).sqrt()
    x = torch.tensor([-1.0, 0.0, 1.0])
    weight = share * torch.distributions.Normal(alpha * x, sigma).log_prob(z[0, :, None]).exp()
    wanted = (z - alpha * (weight * x).sum(-1) / weight.sum(-1)) / sigma
    torch.testing.assert_close(pair.predict(z, level, s, time), wanted)


@torch.no_grad()
def test_the_bound_of_independent_levels_is_their_entropy():
    """With the true marginal's logits, by Legendre's rule in time and the trapezoidal one in noise; what is
    left is of the schedule's ends."""
    pair = models.VDM(1, 3, "linear", width=8, layers=1, parametrization="levels").eval()
    share = torch.tensor([0.5, 0.3, 0.2])
    for p in pair.generator.parameters():
        p.zero_()
    pair.generator.outwards.bias.copy_(share.log())
    time, weight = (torch.tensor(a) / 2 for a in np.polynomial.legendre.leggauss(200))
    noise = torch.linspace(-7, 7, 281)
    y = torch.arange(3.0).expand(200, 281, 3).unsqueeze(-1)
    when = (time + 0.5)[:, None, None].expand(200, 281, 3)
    terms = pair.term(y, when, noise[:, None, None].expand(200, 281, 3, 1)) @ share
    density = torch.distributions.Normal(0.0, 1.0).log_prob(noise).exp()
    bound = float(weight @ torch.trapezoid(terms * density, noise, dim=-1))
    entropy = float(-(share * share.log()).sum())
    assert 0 < -bound - entropy < 0.01

"""Sticking the landing and doubly reparametrized gradients of the importance-weighted bound."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyroelbo import Pair, fit, models
from pyroelbo.compiled import CompiledELBO
from pyroelbo.objectives import IWAE_ELBO


class Gaussians(Pair):
    """z_2 ~ N(0, 1), z_1 | z_2, y | z_1, linear and Gaussian; the bottom-up guide starts as the posterior."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Parameter(torch.tensor([0.8, 1.3]))
        # y has variance 1 + g²(1 + h²); q(z_1 | y) and q(z_2 | z_1) of the posterior
        h, g = self.generator.detach()
        v1 = 1 + h**2
        self.encoder = nn.Parameter(
            torch.stack(
                [
                    g * v1 / (1 + g**2 * v1),
                    0.5 * (v1 / (1 + g**2 * v1)).log(),
                    h / v1,
                    0.5 * (1 / v1).log(),
                ]
            )
        )

    def model(self, y):
        h, g = self.generator
        with pyro.plate("data", len(y)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(len(y)), 1.0))
            z1 = pyro.sample("z1", dist.Normal(h * z2, 1.0))
            pyro.sample("y", dist.Normal(g * z1, 1.0), obs=y)

    def guide(self, y):
        a, s, b, t = self.encoder
        with pyro.plate("data", len(y)):
            z1 = pyro.sample("z1", dist.Normal(a * y, s.exp()))
            pyro.sample("z2", dist.Normal(b * z1, t.exp()))

    def log_evidence(self, y):
        h, g = self.generator
        return dist.Normal(0.0, (1 + g**2 * (1 + h**2)).sqrt()).log_prob(y)


def slopes(pair, objective, y):
    loss = objective.differentiable_loss(pair.model, pair.guide, y)
    return torch.autograd.grad(loss, [pair.generator, pair.encoder])


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
@pytest.mark.parametrize("particles", [1, 3])
def test_under_the_posterior_the_encoders_gradient_is_zero_for_every_draw(gradient, particles):
    pair, y = Gaussians(), torch.randn(5)
    encoder = slopes(pair, IWAE_ELBO(particles, gradient=gradient), y)[1]
    torch.testing.assert_close(encoder, torch.zeros(4), atol=1e-12, rtol=0)
    plain = slopes(pair, IWAE_ELBO(particles), y)[1]
    assert plain.abs().max() > 1e-3
    exact = torch.autograd.grad(-pair.log_evidence(y).sum(), pair.generator)[0]
    found = torch.stack([slopes(pair, IWAE_ELBO(particles, gradient=gradient), y)[0] for _ in range(400)])
    z = (found.mean(0) - exact) / (found.std(0) / math.sqrt(400))
    assert z.abs().max() < 5  # two entries at 1e-6


@pytest.mark.parametrize("particles", [1, 4])
def test_dreg_has_the_plain_gradients_mean(particles):
    torch.manual_seed(1)
    pair, y = Gaussians(), torch.tensor([0.7])
    with torch.no_grad():
        pair.encoder += torch.tensor([0.3, -0.4, -0.2, 0.3])
    many = y.expand(2000)
    draws = {
        name: torch.stack(
            [torch.cat(slopes(pair, IWAE_ELBO(particles, gradient=name), many)) / 2000 for _ in range(40)]
        )
        for name in ("plain", "dreg")
    }
    error = (sum(d.var(0) for d in draws.values()) / 40).sqrt()
    z = (draws["dreg"].mean(0) - draws["plain"].mean(0)) / error
    # Student's t with at least 39 degrees of freedom at 1e-5 / 6 entries
    assert z.abs().max() < 5.6 and error.max() < 0.02
    assert draws["dreg"][:, 2:].var(0).sum() < draws["plain"][:, 2:].var(0).sum()


def test_stl_is_biased_for_several_particles_and_dreg_is_not():
    torch.manual_seed(2)
    pair, many = Gaussians(), torch.tensor([1.5]).expand(4000)
    with torch.no_grad():
        pair.encoder += torch.tensor([0.6, 0.5, 0.0, 0.5])
    means, errors = {}, {}
    for name in ("plain", "stl", "dreg"):
        draws = torch.stack([slopes(pair, IWAE_ELBO(5, gradient=name), many)[1] / 4000 for _ in range(20)])
        means[name], errors[name] = draws.mean(0), draws.std(0) / math.sqrt(20)
    assert ((means["dreg"] - means["plain"]).abs() < 6 * (errors["dreg"] + errors["plain"])).all()
    assert ((means["stl"] - means["plain"]).abs() > 6 * (errors["stl"] + errors["plain"])).any()


@pytest.mark.parametrize("name", ["stl", "dreg"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: models.VAE(6, 2, (8,), prior="vamp", components=3),
        lambda: models.Ladder(6, (3, 2), (8, 6), norm="none"),
        lambda: models.Hierarchy(6, (3, 2), 8),
    ],
)
def test_what_generator_and_guide_share_keeps_its_part_in_the_model(name, make):
    """With the draws held fixed, only ln p is differentiated, whatever parameters it reads."""
    pair, y = make().eval(), torch.bernoulli(torch.full((4, 6), 0.5))
    objective = IWAE_ELBO(1, gradient=name, max_plate_nesting=1)
    torch.manual_seed(3)
    loss = objective.differentiable_loss(pair.model, pair.guide, y)
    found = torch.autograd.grad(loss, list(pair.parameters()), allow_unused=True)
    # by hand: ln p - ln q' with q' of a copy of the parameters
    torch.manual_seed(3)
    drawn = pyro.poutine.trace(pair.guide).get_trace(y)
    twin = copy.deepcopy(pair)
    for p in twin.parameters():
        p.requires_grad_(False)
    model = pyro.poutine.trace(pyro.poutine.replay(pair.model, trace=drawn)).get_trace(y)
    fixed = pyro.poutine.trace(pyro.poutine.replay(twin.guide, trace=drawn)).get_trace(y)
    by_hand = fixed.log_prob_sum() - model.log_prob_sum()
    expected = torch.autograd.grad(by_hand, list(pair.parameters()), allow_unused=True)
    torch.testing.assert_close(loss.detach(), by_hand.detach())
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gradient", ["stl", "dreg"])
def test_they_train_eager_and_compiled(gradient):
    losses = {}
    for compiled in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        pair, y = models.VAE(6, 2, (8,)), torch.bernoulli(torch.full((8, 6), 0.5))
        loss = IWAE_ELBO(3, gradient=gradient)
        loss = CompiledELBO(loss, backend="eager") if compiled else loss
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss)
        pyro.set_rng_seed(0)
        losses[compiled] = [svi.step(y) for _ in range(5)]
        if compiled:
            assert loss.counters.compiled_calls and not loss.counters.fallbacks, loss.counters
    assert losses[True] == pytest.approx(losses[False])


def test_fit_by_name():
    pair, y = Gaussians(), torch.randn(64) * 3
    before = pair.log_evidence(y).mean()
    run = fit(pair, y, objective="dreg", particles=4, epochs=30, learning_rate=0.02, valid=y, progress=False)
    assert pair.log_evidence(y).mean() > before and "valid_iwae-4" in run.metrics[0]


def test_what_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        loc = hidden * y  # a parameter that no module and no statement declares
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    hidden = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="'z': expected parameters of modules or of pyro.param"):
        IWAE_ELBO(2, gradient="stl").differentiable_loss(model, guide, torch.randn(3))
    with pytest.raises(ValueError, match="gradient: expected one of"):
        IWAE_ELBO(2, gradient="reparam")

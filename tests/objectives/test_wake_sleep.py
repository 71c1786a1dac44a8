"""Wake-sleep and reweighted wake-sleep: gradients by enumeration, and training."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroelbo import Pair, evidence, fit, models
from pyroelbo.objectives import OBJECTIVES, ReweightedWakeSleep, WakeSleep
from tests.objectives.test_discrete import make


def slopes(pair, loss, part):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(pair.part(part).values()))])


def close(draws, exact):
    """Means of 40 batches: Student's t at 1e-4 / 80, two-sided."""
    error = draws.std(0) / math.sqrt(len(draws))
    moving = error > 1e-12
    torch.testing.assert_close(draws[0, ~moving], exact[~moving])
    assert ((draws.mean(0) - exact) / error)[moving].abs().max() < 5.7
    assert error.max() < 0.2


def test_sleep_descends_the_divergence_on_the_models_own_data():
    pair, y = make(("value", "value"))
    loss = WakeSleep(("generator", "prior")).updates()["sleep"].loss
    many = y.expand(400, -1)
    found = [
        slopes(pair, loss.differentiable_loss(pair.model, pair.guide, many), "encoder") for _ in range(40)
    ]
    # -E_p ln q by draws of y and the sum over z, with the same number of draws
    exact = []
    for _ in range(40):
        _, dreams = pair.simulate(400, like=many)
        log_q, log_w = pair.log_weights(dreams)
        posterior = (log_q + log_w).softmax(0).detach()
        exact.append(slopes(pair, -(posterior * log_q).sum(), "encoder"))
    found, exact = torch.stack(found) / 400, torch.stack(exact) / 400
    error = ((found.var(0) + exact.var(0)) / 40).sqrt()
    assert ((found.mean(0) - exact.mean(0)) / error).abs().max() < 5.7 and error.max() < 0.1


def test_reweighted_gradients_are_those_of_their_definitions():
    pair, y = make(("value", "value"))
    log_q, log_w = (t[:, 0] for t in pair.log_weights(y))
    both = (log_q[:, None] + log_q).exp().detach()  # two draws
    bound = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    share = torch.stack([log_w[:, None].expand_as(both), log_w.expand_as(both)]).softmax(0).detach()
    updates = ReweightedWakeSleep(2, ("generator", "prior")).updates()
    generator = slopes(pair, -(both * bound).sum(), "generator")
    encoder = slopes(pair, -(both * (share[0] * log_q[:, None] + share[1] * log_q)).sum(), "encoder")
    many = y.expand(500, -1)
    for name, part, exact in (("wake", "generator", generator), ("encoder", "encoder", encoder)):
        loss = updates[name].loss
        draws = [
            slopes(pair, loss.differentiable_loss(pair.model, pair.guide, many), part) / 500
            for _ in range(40)
        ]
        close(torch.stack(draws), exact)


@pytest.mark.parametrize("name, particles", [("wake_sleep", 1), ("reweighted_wake_sleep", 3)])
def test_fit_trains_both_sides(name, particles):
    pair, _ = make(("bernoulli", "bernoulli"))
    y = torch.randn(64, 3) + 2
    before = evidence.iwae(pair, y, particles=64).value.mean()
    settings = {"epochs": 40, "batch_size": 64, "learning_rate": 0.05, "progress": False}
    run = fit(pair, y, objective=name, particles=particles, valid=y, **settings)
    assert evidence.iwae(pair, y, particles=64).value.mean() > before + 1
    assert {"loss_wake", "valid_elbo" if name == "wake_sleep" else "valid_iwae-3"} <= set(run.metrics[0])


def test_pairs_whose_sides_share_parameters_are_refused():
    ladder = models.Ladder(6, (3, 2), (8, 6))
    y = torch.bernoulli(torch.full((4, 6), 0.5))
    with pytest.raises(ValueError, match="whose guide reads|no part"):
        OBJECTIVES["wake_sleep"](ladder, 1).check(ladder, y)
    pair, y = make(("value", "value"))
    with pytest.raises(ValueError, match="at least 2 to be weighted"):
        OBJECTIVES["reweighted_wake_sleep"](pair, 1)


@pytest.mark.parametrize("name", ["wake_sleep", "reweighted_wake_sleep"])
def test_a_guide_that_reads_the_generator_is_refused(name):
    class Shared(Pair):
        def __init__(self):
            super().__init__()
            self.generator, self.encoder = nn.Linear(2, 3), nn.Linear(3, 2)

        def model(self, y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(self.generator(z), 1.0).to_event(1), obs=y)

        def guide(self, y):
            with pyro.plate("data", len(y)):
                loc = self.encoder(y) + y @ self.generator.weight
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    pair, y = Shared(), torch.randn(4, 3)
    with pytest.raises(ValueError, match="whose guide reads|reads"):
        OBJECTIVES[name](pair, 2).check(pair, y)


def test_both_reweighted_losses_print_the_importance_weighted_bound():
    pair, y = make(("bernoulli", "bernoulli"))
    y, values = y.expand(4000, -1), []
    for update in ReweightedWakeSleep(3, ("generator", "prior")).updates().values():
        torch.manual_seed(0)
        loss = update.loss.differentiable_loss(pair.model, pair.guide, y)
        values.append(-float(loss.detach()) / 4000)
    assert values[0] == pytest.approx(values[1])
    bound = evidence.iwae(pair, y, particles=3).value
    assert abs(values[0] - float(bound.mean())) < 5.5 * float(bound.std()) * math.sqrt(2 / 4000)

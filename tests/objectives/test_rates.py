"""Rate targets against closed forms, inner updates of the encoder, batch-normalized means, warm-ups."""

import functools
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Normal, kl_divergence

from pyroelbo import Pair, evidence, fit, models
from pyroelbo.compiled import CompiledStep
from pyroelbo.encoders import BatchNormEncoder
from pyroelbo.objectives import Aggressive, Layered_ELBO, Rate_ELBO, build
from pyroelbo.training.schedules import warmup
from pyroelbo.training.step import EagerStep
from tests.pairs import TABLE, Nonlinear

Y = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
MASK = torch.tensor([True, True, False, False])
SIZE = 20  # of the data set that the four are drawn from


def model(y, slopes):
    with pyro.plate("data", SIZE, subsample=torch.arange(4)):
        with pyro.poutine.mask(mask=MASK):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))
        pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)


def guide(y, slopes):
    with pyro.plate("data", SIZE, subsample=torch.arange(4)):
        with pyro.poutine.mask(mask=MASK):
            pyro.sample("z", dist.Normal(slopes[0] * y, 1.0))
        pyro.sample("x", dist.Normal(slopes[1] * y, 0.5))


def rate_of(slopes):
    """KL a datum of the batch, summed over the sites where they count."""
    prior = Normal(0.0, 1.0)
    z = kl_divergence(Normal(slopes[0] * Y, 1.0), prior)[MASK].sum()
    return (z + kl_divergence(Normal(slopes[1] * Y, 0.5), prior).sum()) / 4


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.parametrize("vectorized", [False, True])
def test_the_distance_from_the_rate_is_charged_for_each_datum(share, vectorized):
    slopes = torch.tensor([0.7, 0.3], requires_grad=True)
    losses, target = [], share * float(rate_of(slopes).detach())
    settings = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    for weight in (0.5, 0.0):
        pyro.set_rng_seed(1)
        loss = Rate_ELBO(target, weight, **settings)
        losses.append(loss.differentiable_loss(model, guide, Y, slopes))
    expected = 0.5 * SIZE * (rate_of(slopes) - target).abs()
    torch.testing.assert_close(losses[0] - losses[1], expected)
    gradients = [torch.autograd.grad(v, slopes)[0] for v in (losses[0] - losses[1], expected)]
    torch.testing.assert_close(*gradients)


def test_at_weight_one_a_rate_is_a_penalty_on_the_elbo():
    slopes = torch.tensor([0.7, 0.3])
    kl = float(rate_of(slopes))
    for rate in (0.5 * kl, 2 * kl):
        losses = []
        for objective in (Rate_ELBO(rate, max_plate_nesting=1), Layered_ELBO(max_plate_nesting=1)):
            pyro.set_rng_seed(1)
            losses.append(objective.loss(model, guide, Y, slopes) / SIZE)
        assert losses[0] == pytest.approx(losses[1] + 2 * max(0, rate - kl) - rate)


@pytest.mark.parametrize(("target", "weight"), [(4.0, 1.0), (0.5, 10.0)])
def test_a_pair_is_trained_to_its_rate(target, weight):
    """From below by a weight of one; below the ELBO's own rate, 1.1 nats, by a larger one."""
    y = torch.randn(256, 4)
    pair = Nonlinear()
    settings = {"epochs": 150, "batch_size": 256, "learning_rate": 0.02, "schedule": "cosine"}
    fit(pair, y, objective=Rate_ELBO(target, weight), progress=False, **settings)
    found = evidence.diagnostics(pair, y, 64).kl
    # the sign of KL - rate flips from step to step, with ever smaller ones
    assert abs(float(found.value) - target) < 0.02 + 4 * float(found.stderr)


def test_a_rate_in_the_compiled_step_is_that_of_the_eager_one():
    y, found = torch.randn(8, 4), []
    for make, settings in ((EagerStep, {}), (CompiledStep, {"backend": "eager"})):
        torch.manual_seed(2)
        pair = Nonlinear()
        objective, leaves = Rate_ELBO(1.0), dict(pair.named_parameters())
        step = make(objective, pair.model, pair.guide, leaves, lr=0.01, **settings)
        pyro.set_rng_seed(3)
        losses = []
        for weight in (1.0, 0.5, 0.0, 2.0):
            objective.weight = weight
            losses.append(float(step(y)))
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("objective", [Rate_ELBO(1.0), Layered_ELBO(free_bits=1.0)])
def test_score_function_sites_are_named_before_training(objective, tmp_path):
    make, draw = TABLE["discrete_vae"]
    with pytest.raises(ValueError, match="guide site 'z_2': expected a reparametrized distribution, got"):
        fit(make(), draw(8), objective=objective, out=tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("rate", [-1.0, float("inf"), float("nan")])
def test_a_rate_is_a_number_of_nats(rate):
    with pytest.raises(ValueError, match="rate: expected a number of nats of at least 0"):
        Rate_ELBO(rate)


# ------------------------------------------------------------------------------------- the encoder first


def fresh():
    torch.manual_seed(5)
    return Nonlinear()


def test_an_aggressive_step_is_that_written_by_hand():
    y, ours, theirs = torch.randn(4, 4), fresh(), fresh()
    objective = Aggressive(Trace_ELBO(), ("generator",), times=3)
    settings = {"epochs": 3, "seed": 3, "batch_size": 4, "learning_rate": 0.02, "progress": False}
    run = fit(ours, y, objective=objective, kl_weight=lambda epoch: 0.5, **settings)
    optimizers = {
        part: torch.optim.Adam(getattr(theirs, part).parameters(), lr=0.02)
        for part in ("generator", "encoder")
    }
    pyro.set_rng_seed(3)
    weighted = build(Trace_ELBO(), theirs, 1).weighted(0.5)
    for _ in range(3):
        for part in ("encoder", "encoder", "encoder", "generator"):
            theirs.zero_grad()
            (weighted.differentiable_loss(theirs.model, theirs.guide, y) / 4).backward()
            optimizers[part].step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert {"loss_encoder", "loss_generator"} <= set(run.metrics[0]) and run.metrics[0]["kl_weight"] == 0.5


def test_it_is_known_by_name_and_names_missing_parts():
    y = torch.randn(8, 4)
    fit(fresh(), y, objective="aggressive", epochs=1, valid=y, progress=False)
    with pytest.raises(ValueError, match="no part 'decoder'"):
        fit(fresh(), y, objective=Aggressive(Trace_ELBO(), ("decoder",)), progress=False)
    with pytest.raises(ValueError, match="times: expected a positive number of updates, got 0"):
        Aggressive(Trace_ELBO(), ("generator",), times=0)
    make, draw = TABLE["discrete_vae"]
    inner = Aggressive(Rate_ELBO(1.0), ("generator",))
    with pytest.raises(ValueError, match="'z_2': expected a reparametrized"):
        fit(make(), draw(8), objective=inner, progress=False)


# --------------------------------------------------------------------------------- batch-normalized means


def test_normalized_means_bound_the_batchs_rate_from_below():
    encoder = BatchNormEncoder(3, spread=0.7)
    with torch.no_grad():
        encoder.shift.copy_(torch.tensor([0.2, -0.5, 0.0]))
    least = 0.5 * (3 * 0.7**2 + 0.2**2 + 0.5**2)
    for scale in (1.0, 1e-2):  # however little the network tells
        q = encoder(scale * torch.randn(500, 6))
        prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        held = least * (1 - 1e-5 / scale**2)  # up to the normalization's epsilon
        assert float(kl_divergence(q, prior).mean().detach()) >= held
    torch.testing.assert_close(q.mean.mean(0), encoder.shift.detach())


def test_bounds_are_those_of_evaluation_mode():
    torch.manual_seed(0)
    pair, y = models.VAE(6, 2, (8,), encoder="batch_norm"), TABLE["vae-bernoulli"][1](40)
    fit(pair, y, epochs=3, progress=False)
    pair.train()
    values = [evidence.elbo(pair, rows, particles=1).value for rows in (y, y[:1])]  # no batch statistics
    assert pair.training and all(torch.isfinite(v).all() for v in values)
    with torch.no_grad():
        q = pair.eval().encode(y)
        torch.testing.assert_close(pair.encode(y[:3]).mean, q.mean[:3])
        assert (pair.train().encode(y[:3]).mean - q.mean[:3]).abs().max() > 1e-3


@pytest.mark.parametrize("spread", [0.0, -1.0, float("inf")])
def test_a_spread_is_positive(spread):
    with pytest.raises(ValueError, match="spread: expected a positive number"):
        models.VAE(6, encoder=functools.partial(BatchNormEncoder, spread=spread))


# --------------------------------------------------------------------------------------------- warm-ups


def test_warmups_rise_and_begin_anew():
    assert [warmup(4)(e) for e in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert [warmup(2, period=4)(e) for e in (0, 1, 2, 3.5, 4, 5)] == [0, 0.5, 1, 1, 0, 0.5]
    for settings, message in (((0,), "epochs: expected a positive"), ((3, 2), "period: expected at least")):
        with pytest.raises(ValueError) as error:
            warmup(*settings)
        assert re.match(message, str(error.value))


def test_a_cycle_is_a_kl_weight_of_any_pair():
    pair: Pair = fresh()
    run = fit(pair, torch.randn(8, 4), kl_weight=warmup(1, period=2), epochs=4, batch_size=4, progress=False)
    assert [row["kl_weight"] for row in run.metrics] == [0.5, 1.0, 0.5, 1.0]

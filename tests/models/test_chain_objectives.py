"""Objectives on chains: free bits, balance, KL weights, and steps as one graph."""

import functools
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import MultivariateNormal

from pyroelbo import Pair, fit, models
from pyroelbo.models.chain import Chain
from pyroelbo.nn import Dense
from pyroelbo.objectives import IWAE_ELBO, Layered_ELBO
from pyroelbo.pair import unregistered
from pyroelbo.training.step import EagerStep
from tests.models.chains import Affine, Standard, ladder
from tests.pairs import binary


def kl_by_site(pair, y):
    guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    kls = [torch.distributions.kl_divergence(guide.nodes[s]["fn"], model.nodes[s]["fn"]) for s in pair.sites]
    model.compute_log_prob()
    return torch.stack([k.mean() for k in kls]), -model.nodes["y"]["log_prob"].sum()


def seeded(loss, pair, y):
    pyro.set_rng_seed(5)
    return loss.differentiable_loss(pair.model, pair.guide, y)


def test_free_bits_balance_and_weight():
    pair, y = ladder(norm="layer"), binary(5, 6)
    pyro.set_rng_seed(5)
    kl, reconstruction = (x.detach() for x in kl_by_site(pair, y))
    floor = float(kl.sort().values[:2].mean())  # between the smallest and the next
    held = kl.clamp_min(floor)
    torch.testing.assert_close(
        seeded(Layered_ELBO(floor, weight=0.5), pair, y), reconstruction + 0.5 * 5 * held.sum()
    )
    share = (kl + 1e-6) / (kl + 1e-6).mean()
    balanced = Layered_ELBO(balance=True, weight=0.5)
    torch.testing.assert_close(seeded(balanced, pair, y), reconstruction + 0.5 * 5 * (share * kl).sum())
    balanced.weight = 1.0
    torch.testing.assert_close(seeded(balanced, pair, y), reconstruction + 5 * kl.sum())
    lowest = pair.encoder.links[[2, 1, 0][int(kl.argmin())]].head.bias
    alone = Layered_ELBO(1e6)
    assert torch.autograd.grad(seeded(alone, pair, y), pair.encoder.links[2].head.bias)[0].abs().max() > 0
    pyro.set_rng_seed(5)
    assert alone.loss(pair.model, pair.guide, y) == pytest.approx(float(reconstruction) + 5 * 3e6)
    assert lowest is not None
    for bad in ({"free_bits": -1.0}, {"weight": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a number"):
            Layered_ELBO(**bad)


def test_a_sampled_term_may_be_negative():
    """A bottom-up lower layer of which its generator says more than its encoder: no KL, and not to be cut at
    0."""
    one, sharp = torch.eye(1), 0.01 * torch.eye(1)
    encoder = [Affine(torch.zeros(1, 1), torch.zeros(1), one), Affine(one, torch.zeros(1), sharp)]
    generator = [Affine(one, torch.zeros(1), sharp)]
    see = Affine(one, torch.zeros(1), one)
    chain, y = Chain(Standard(1), generator, see, encoder, event=(1,)), torch.randn(5, 1)
    pyro.set_rng_seed(5)
    guide = poutine.trace(chain.guide).get_trace(y)
    low, top = guide.nodes["z_1"], guide.nodes["z_2"]
    sampled = low["fn"].log_prob(low["value"]) - generator[0](top["value"]).log_prob(low["value"])
    assert sampled.sum() < -1
    prior = MultivariateNormal(torch.zeros(1), one)
    own = MultivariateNormal(top["fn"].loc, scale_tril=top["fn"].scale_tril)
    kl = torch.distributions.kl_divergence(own, prior)
    expected = (sampled + kl - see(low["value"]).log_prob(y)).sum()
    torch.testing.assert_close(seeded(Layered_ELBO(), chain, y), expected)


def test_a_layered_loss_keeps_scales_and_masks():
    """A data plate that stands for more data, and rows that are masked out."""
    pair, y = ladder(norm="layer"), binary(6, 6)
    whole = seeded(Layered_ELBO(0.3), pair, y)
    scaled = Pair.of(poutine.scale(pair.model, 7.0), poutine.scale(pair.guide, 7.0))
    torch.testing.assert_close(seeded(Layered_ELBO(0.3), scaled, y), 7 * whole)
    mask = torch.tensor([True, True, False, True, True, False])
    masked = Pair.of(poutine.mask(pair.model, mask), poutine.mask(pair.guide, mask))
    torch.testing.assert_close(seeded(Layered_ELBO(), masked, y), seeded(TraceMeanField_ELBO(), masked, y))


def test_a_last_batch_of_one_row_trains():
    run = fit(models.Ladder(6, (3, 2), (8, 6)), binary(9, 6), batch_size=4, epochs=2, progress=False)
    assert all(math.isfinite(loss) for loss in run.losses)


def test_fit_anneals_the_layered_weight():
    pair, y = models.Ladder(6, (3, 2), (8, 6), dropout=0.1, noise=0.1), binary(64, 6)
    objective = Layered_ELBO(free_bits=0.1, balance=True)
    run = fit(
        pair,
        y,
        objective=objective,
        kl_weight=lambda e: min(1.0, 0.1 + e),
        epochs=3,
        batch_size=16,
        progress=False,
    )
    assert [row["kl_weight"] for row in run.metrics] == pytest.approx([0.1 + 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    "objective", [Layered_ELBO(0.1, balance=True, weight=0.5), IWAE_ELBO(3, max_plate_nesting=1)]
)
def test_a_step_of_a_ladder_is_one_graph(objective):
    """Shared path, dropout, BatchNorm's buffers and an annealed objective: captured, and equal to eager;
    averages of weights and buffers as well."""
    from pyroelbo.compiled import CompiledStep

    y, steps, buffers = binary(8, 6), [], []
    with pyro.validation_enabled(False), unregistered():
        for kind in (EagerStep, functools.partial(CompiledStep, backend="eager")):
            torch.manual_seed(2)
            pair = models.Ladder(6, (3, 2), (8, 6), dropout=0.1, noise=0.1)
            pair.train()
            buffers.append({k: v for k, v in pair.named_buffers() if v.is_floating_point()})
            steps.append(
                kind(
                    objective,
                    pair.model,
                    pair.guide,
                    dict(pair.named_parameters()),
                    lr=1e-2,
                    ema=0.75,
                    buffers=buffers[-1],
                )
            )
        name = "encoder.features.layers.0.0.norm.running_var"
        expected = buffers[0][name].clone()
        for i, weight in enumerate((0.5, 1.0, 0.7)):
            objective.weight = weight
            values = []
            for step in steps:
                torch.manual_seed(i)
                values.append(step(y))
            torch.testing.assert_close(*values)
            share = max(0.25, 9 / (10 + i))
            expected = expected + share * (buffers[0][name] - expected)
    assert steps[1].counters.compiled_calls == 3
    torch.testing.assert_close(steps[0].averages, steps[1].averages)
    torch.testing.assert_close(steps[1].averages[name], expected)
    assert float((expected - buffers[0][name]).abs().max()) > 1e-4


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_a_gated_cell_is_a_product_of_a_linear_map_and_a_sigmoid(norm):
    cell, x = Dense(4, 3, norm, gated=True).eval(), torch.randn(5, 2, 4)
    value, gate = cell.norm(cell.linear(x)).split(3, -1)
    torch.testing.assert_close(cell(x), value / (1 + (-gate).exp()))
    square = Dense(4, 4, norm, gated=True).eval()
    value, gate = square.norm(square.linear(x)).split(4, -1)
    torch.testing.assert_close(square(x), x + value * torch.sigmoid(gate))

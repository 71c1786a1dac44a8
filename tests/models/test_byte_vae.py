"""Byte VAEs: the hard ELBO by plain sums, all codes by enumeration, gradients through the rounding."""

import itertools
import math

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.nn.functional import mse_loss

from pyroelbo import audit, evidence, fit, fit_em, models
from pyroelbo.models.byte_vae import Squared
from pyroelbo.objectives import Progressive_ELBO
from pyroelbo.priors import from_integers, integer_unit
from tests.pairs import binary


def few(latent=(2, 1), likelihood="bernoulli", **settings):
    torch.manual_seed(0)
    return models.ByteVAE(3, latent, (6,), 3, likelihood, **settings)


def network(reader, z, values):
    return reader.network((z - (values - 1) / 2) / max(1, math.sqrt(values) / 4))


def logistics(out, values, value):
    """ln P(value) of one integer, by differences of sigmoids, plain."""
    logits, loc, sharp = out.chunk(3)
    unit = max(1, math.sqrt(values) / 4)
    total = 1e-6 / values
    for m, weight in enumerate(logits.softmax(0)):
        center = (values - 1) / 2 + unit * (loc[m] + m - (len(loc) - 1) / 2)
        scale = unit * torch.exp(-6 * torch.tanh(sharp[m] / 6))
        low = torch.sigmoid((value - 0.5 - center) / scale) if value > 0 else 0.0
        high = torch.sigmoid((value + 0.5 - center) / scale) if value < values - 1 else 1.0
        total = total + (1 - 1e-6) * weight * (high - low)
    return torch.as_tensor(total).log()


@torch.no_grad()
def joint(pair, y, codes, values):
    """ln p(y, z_1 … z_N) of one binary datum by plain loops."""
    total = 0.0
    for layer in range(1, pair.depth):
        link, below = pair.generator.links[layer - 1], codes[layer - 1]
        out = network(link.reader, codes[layer], values).reshape(len(below), -1)
        logits, loc, sharp = out.chunk(3, -1)
        out = torch.cat([logits, loc, sharp + link.log_sharpness], -1)
        total += sum(logistics(row, values, float(v)) for row, v in zip(out, below, strict=True))
    p = torch.sigmoid(network(pair.generator.observation.network, codes[0], values))
    total += torch.where(y == 1, p, 1 - p).log().sum()
    out = pair.prior.network(from_integers(codes[-1], values))
    return total + sum(logistics(out[:, d], values, float(v)) for d, v in enumerate(codes[-1]))


@pytest.mark.parametrize(("latent", "values"), [((2,), 256), ((3, 2), 7), ((2, 3, 1), 256)])
def test_the_elbo_is_the_hard_one(latent, values):
    torch.manual_seed(0)
    pair, y = models.ByteVAE(4, latent, (6,), values, "bernoulli"), binary(5, 4)
    codes = pair.encode(y)
    assert [(c.shape, c.dtype) for c in codes] == [((5, d), torch.uint8) for d in latent]
    assert all(len(c.unique()) > 1 for c in codes)
    hard = torch.stack([joint(pair, y[i], [c[i].double() for c in codes], values) for i in range(5)])
    found = evidence.elbo(pair, y, particles=2)
    torch.testing.assert_close(found.value, hard, atol=1e-9, rtol=1e-9)
    assert found.stderr.abs().max() < 1e-12


def test_pixels_start_at_their_shares_in_the_data():
    """Without codes, the best coins are the means."""
    pair, y = few(), binary(400, 3)
    assert pair.initialize(y) is pair and not pair.pristine
    torch.nn.init.zeros_(pair.generator.observation.network.network[-1].weight)
    found = pair.decode(torch.zeros(1, 2))[0]
    torch.testing.assert_close(found, y.mean(0), atol=1e-3, rtol=0)


def test_all_codes_together_are_the_evidence():
    pair = few()
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    codes = [torch.tensor(c).double() for c in itertools.product(range(3), repeat=3)]
    by_hand = torch.stack([torch.stack([joint(pair, y, [c[:2], c[2:]], 3) for c in codes]) for y in every])
    exact = evidence.exact(pair, every)
    torch.testing.assert_close(exact.value, by_hand.logsumexp(-1), atol=1e-9, rtol=1e-9)
    assert float(exact.value.exp().sum()) == pytest.approx(1, abs=1e-9)
    result = audit(pair, every, particles=4)
    assert result["exact"].mean > result["elbo"].mean and result["elbo"].mean == result["iwae-4"].mean


def test_the_encoder_learns_through_the_rounding():
    torch.manual_seed(0)
    pair, y = models.ByteVAE(4, (3, 2), (6,), likelihood="bernoulli"), binary(5, 4)
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)
    # the same codes as a smooth map plus what rounding adds, a constant
    z, total = y, 0.0
    links = pair.markov_links()
    for encode, decode in zip(pair.encoder.links, links.generator, strict=True):
        below, top = z, encode.values - 1
        seen = 2 * below - 1 if below is y else from_integers(below, 256)
        smooth = top * torch.sigmoid(4 * integer_unit(256) / top * encode.reader.network(seen))
        z = smooth + (smooth.round() - smooth).detach()
        total = total - decode(z).log_prob(below).sum()
    total = total - links.prior().log_prob(z).sum()
    parameters = list(pair.encoder.parameters())
    for a, b in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(total, parameters), strict=True
    ):
        torch.testing.assert_close(a, b)
        assert a.any()


def test_squared_distances_are_the_lectures_loss():
    torch.manual_seed(0)
    bound = models.ByteVAE(4, (3, 2, 2), (6,), likelihood="discretized_logistic", levels=9)
    pair = models.ByteVAE(4, (3, 2, 2), (6,), likelihood="discretized_logistic", levels=9, loss="squared")
    pair.load_state_dict(bound.state_dict())
    y = torch.randint(9, (5, 4)).double()
    z, unrounded = y, [y]
    for encode in pair.encoder.links:
        soft = 255 * torch.sigmoid(16 / 255 * encode.reader(z))
        unrounded.append(soft)
        z = soft.round()
    expected = -pair.prior().log_prob(z).sum()
    x = pair.generator.observation.network(unrounded[1].round())
    expected = expected + mse_loss(4 + 2 * x, y, reduction="sum")
    for layer in (1, 2):
        p = bound.generator.links[layer - 1](unrounded[layer + 1].round()).base_dist
        expected = expected + mse_loss(unrounded[layer], p.mean, reduction="sum")
    pair.train()
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(Progressive_ELBO().differentiable_loss(pair.model, pair.guide, y), expected)
    # evaluation has the bound, of the same codes
    torch.testing.assert_close(evidence.elbo(pair, y).value, evidence.elbo(bound, y).value)
    assert all(torch.equal(a, b) for a, b in zip(pair.encode(y), bound.encode(y), strict=True))


def test_widths_learn_by_the_bound_where_squares_train_the_rest():
    torch.manual_seed(0)
    pair = models.ByteVAE(4, (3, 2), (6,), likelihood="l2", loss="squared").train()
    y = torch.rand(5, 4)
    codes = [c.double() for c in pair.encode(y)]
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)
    link, observation = pair.generator.links[0], pair.generator.observation
    widths = [link.log_sharpness, observation.pixels.log_weight]
    found = torch.autograd.grad(loss, widths, retain_graph=True)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in pair.encoder.parameters())
    pair.eval()
    own = -link(codes[1]).log_prob(codes[0]).sum() - observation(codes[0]).log_prob(y).sum()
    for a, b in zip(found, torch.autograd.grad(own, widths), strict=True):
        torch.testing.assert_close(a, b)
    assert isinstance(link.train()(codes[1]), Squared)


@pytest.mark.parametrize("loss", ["bound", "squared"])
def test_training_raises_the_bound(loss):
    torch.manual_seed(0)
    y = torch.randint(9, (3, 6)).double().repeat(10, 1)
    pair = models.ByteVAE(6, (3, 2), (16,), likelihood="discretized_logistic", levels=9, loss=loss)
    first = evidence.elbo(pair, y, particles=1).mean
    fit(pair, y, epochs=100, batch_size=30, learning_rate=1e-2, progress=False)
    assert evidence.elbo(pair, y, particles=1).mean > first + 2
    assert all(1 < len(c.unique(dim=0)) <= 3 for c in pair.encode(y))


def test_em_fits_few_codes_exactly():
    """By enumeration, without the encoder: the evidence rises to that of the population."""
    share = torch.tensor([0.4, 0.1, 0.1, 0.4])
    y = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat_interleave(
        (20 * share).long(), 0
    )
    torch.manual_seed(0)
    pair = models.ByteVAE(2, (1,), (4,), 3, "bernoulli", components=3)
    before = [p.detach().clone() for p in pair.encoder.parameters()]
    run = fit_em(pair, y, epochs=25, tolerance=0, progress=False)
    entropy = -float((share * share.log()).sum())
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(run.losses))
    assert run.losses[-1] == pytest.approx(entropy, abs=1e-3) and run.losses[0] > entropy + 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, pair.encoder.parameters(), strict=True))


def test_decoding_from_any_layer():
    pair = few((2, 1), "categorical", levels=4)
    y = torch.randint(4, (5, 3))
    low, top = pair.encode(y)
    torch.testing.assert_close(pair.decode(low), pair.reconstruct(y))
    drawn = torch.stack([pair.decode(top, 2) for _ in range(20)])
    assert drawn.shape == (20, 5, 3) and drawn.min() >= 0 and drawn.max() <= 1 and drawn.std(0).max() > 0
    latents, _ = pair.simulate(50)
    assert all(torch.equal(z, z.round()) and z.min() >= 0 and z.max() <= 2 for z in latents.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.ByteVAE(4, ()), "latent: expected at least one layer, got none"),
        (
            lambda: models.ByteVAE(4, (2, 0)),
            "latent: .* positive width for each layer, got 0 for layer 2",
        ),
        (lambda: models.ByteVAE(4, values=257), "values: expected a number from 2 to 256, got 257"),
        (lambda: models.ByteVAE(4, values=1), "values: expected a number from 2 to 256, got 1"),
        (
            lambda: models.ByteVAE(4, loss="simple"),
            r"loss: expected one of \('bound', 'squared'\), got",
        ),
        (
            lambda: models.ByteVAE(4, components=0),
            "components: expected a positive number of",
        ),
        (lambda: few().encode(torch.zeros(2, 4)), r"y: expected shape \[B, 3\] .* ByteVAE, got \(2, 4\)"),
        (lambda: few().decode(torch.zeros(2, 2), 3), "layer: expected a number from 1 to 2, got 3"),
        (lambda: few().decode(torch.zeros(2, 2), 2), r"z: expected shape \[B, 1\] for layer 2, got \(2, 2\)"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

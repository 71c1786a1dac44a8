"""Codes from a codebook: quantizers, their learning, priors over codes, and exact sums over few codes."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyroelbo import audit, coding, data, evidence, fit, models
from pyroelbo.compiled import CompiledStep
from pyroelbo.models.codes import CodePrior
from pyroelbo.nn import NoisyQuantizer, ScalarQuantizer, VectorQuantizer
from pyroelbo.objectives.base import PerDatum, adapt
from pyroelbo.pair import unregistered
from pyroelbo.results import CodeUsage
from pyroelbo.training.step import EagerStep

MAKE = {
    "vq": lambda **more: models.VQVAE(6, 3, 2, 2, (8,), **more),
    "gradient": lambda **more: models.VQVAE(6, 3, 2, 2, (8,), codebook="gradient", **more),
    "fsq": lambda **more: models.FSQVAE(6, (3, 2), 2, (8,), **more),
    "sq": lambda **more: models.SQVAE(6, 3, 2, 2, (8,), **more),
}


def pixels(n, dims=6):
    return torch.bernoulli(torch.full((n, dims), 0.4))


def all_codes(pair):
    """Every code word [K^G, G], by a plain product."""
    every = itertools.product(range(pair.quantizer.codes), repeat=pair.positions)
    return torch.tensor(list(every))


def log_joint(pair, y, z):
    """ln p(y, z) of a code word z [G] for each datum, [B], in plain steps."""
    if pair.prior.kind == "autoregressive":
        log_p = torch.zeros(())
        for t in range(len(z)):  # the network sees nothing of the codes from t on
            logits = pair.prior.network(torch.cat([z[:t], torch.zeros(len(z) - t, dtype=torch.long)]))
            log_p = log_p + logits[t].log_softmax(-1)[z[t]]
    else:
        log_p = pair.prior.logits.log_softmax(-1)[torch.arange(len(z)), z].sum()
    book = pair.quantizer
    e = torch.stack([book.codebook[k] if hasattr(book, "codebook") else book.embed(k) for k in z])
    return log_p + pair.observation(e).log_prob(y)


# ----------------------------------------------------------------------------------------- quantizers


def test_the_nearest_code_is_chosen_and_gradients_pass_straight_through():
    quantizer = VectorQuantizer(7, 3).eval()
    x = torch.randn(4, 5, 3, requires_grad=True)
    codes, found = quantizer(x)
    for place in itertools.product(range(4), range(5)):
        distance = [(x[place] - e).norm().item() for e in quantizer.codebook]
        assert codes[place] == min(range(7), key=distance.__getitem__)
    assert torch.equal(found, quantizer.codebook[codes])  # to the last bit
    assert torch.equal(found, quantizer.embed(codes))
    weight = torch.randn(4, 5, 3)
    (slope,) = torch.autograd.grad((found * weight).sum(), x)
    assert torch.equal(slope, weight)


def test_penalties_are_those_of_the_paper():
    for learn, both in (("ema", False), ("gradient", True)):
        quantizer = VectorQuantizer(4, 3, learn).eval()
        x = torch.randn(6, 3, requires_grad=True)
        codes, found = quantizer(x)
        penalty = quantizer.penalty(x, found, 0.3)
        e = quantizer.codebook[codes]
        assert torch.allclose(penalty, (1.3 if both else 0.3) * (x - e).square().sum(-1))
        (slope,) = torch.autograd.grad(penalty.sum(), x, retain_graph=True)
        assert torch.allclose(slope, 0.3 * 2 * (x - e))
        if both:
            (slope,) = torch.autograd.grad(penalty.sum(), quantizer.codebook)
            expected = torch.zeros(4, 3).index_add_(0, codes, 2 * (e - x))
            assert torch.allclose(slope, expected)


def test_moving_averages_of_the_codebook():
    quantizer = VectorQuantizer(3, 2, decay=0.9, reset=0.0)
    quantizer.start(torch.tensor([[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0]]), torch.tensor([2.0, 1.0, 1.0]))
    count, total = [1.5, 0.75, 0.75], [[0.0, 0.0], [3.75, 3.75], [-3.75, 3.75]]
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 6.0]], requires_grad=True)
    codes, found = quantizer(x)
    assert codes.tolist() == [0, 0, 1] and found[2].tolist() == [5.0, 5.0]  # the codebook before the step
    seen, sums = [2, 1, 0], [[1.0, 1.0], [4.0, 6.0], [0.0, 0.0]]
    for k in range(3):
        count[k] = 0.9 * count[k] + 0.1 * seen[k]
        total[k] = [0.9 * t + 0.1 * s for t, s in zip(total[k], sums[k], strict=True)]
    expected = torch.tensor([[t / count[k] for t in total[k]] for k in range(3)])
    assert torch.allclose(quantizer.codebook, expected)


def test_the_codebook_stands_still_in_evaluation_without_gradients_and_fixed():
    pair, y = MAKE["vq"](), pixels(20)
    before = pair.quantizer.codebook.clone()
    with torch.no_grad():
        Trace_ELBO().loss(pair.model, pair.guide, y)
    pair.eval()
    Trace_ELBO().loss_and_grads(pair.model, pair.guide, y)
    evidence.elbo(pair.train(), y, particles=2)
    pair.usage(y)
    pair.quantizer.fixed = True
    fit(pair, y, epochs=1, progress=False, freeze=("encoder", "generator"))
    assert torch.equal(pair.quantizer.codebook, before)
    pair.quantizer.fixed = False
    fit(pair, y, epochs=1, progress=False)
    assert not torch.equal(pair.quantizer.codebook, before)


def test_dead_codes_move_to_vectors_far_from_every_code():
    quantizer = VectorQuantizer(4, 2, decay=0.5, reset=0.2)
    quantizer.start(torch.tensor([[0.0, 0.0], [90.0, 0.0], [91.0, 0.0], [92.0, 0.0]]), torch.ones(4))
    common, far = torch.zeros(60, 2), torch.tensor([[10.0, 10.0], [-10.0, 10.0]]).repeat(2, 1)
    x = torch.cat([common, far]).requires_grad_()
    for _ in range(20):
        quantizer(x)
    assert len(set(quantizer.eval()(x)[0].tolist())) == 3  # what is common has one code only
    found = quantizer(x)[1]
    assert ((found - x).norm(dim=-1) < 1).all()


def test_scalar_codes_are_mixed_radix_numbers():
    quantizer = ScalarQuantizer((4, 3, 5))
    assert quantizer.codes == 60
    every = quantizer.embed(torch.arange(60))
    grids = [[-1 + 2 * i / (n - 1) for i in range(n)] for n in (4, 3, 5)]
    expected = [list(reversed(v)) for v in itertools.product(*reversed(grids))]
    assert torch.allclose(every, torch.tensor(expected))
    x = torch.randn(9, 3, requires_grad=True)
    codes, found = quantizer(x)
    assert torch.equal(found, quantizer.embed(codes))
    nearest = torch.cdist(x.tanh(), every).argmin(-1)
    assert torch.equal(codes, nearest)
    slope = torch.autograd.grad(found.sum(), x)[0]
    assert torch.allclose(slope, torch.autograd.grad(x.tanh().sum(), x)[0])


def test_noisy_codes_become_the_nearest_ones():
    noisy, x = NoisyQuantizer(5, 2), torch.randn(30, 2)
    squares = torch.cdist(x, noisy.codebook).square()
    for log_scale in (0.0, -1.0):
        with torch.no_grad():
            noisy.log_scale.fill_(log_scale)
        expected = (-squares / (2 * math.exp(2 * log_scale))).softmax(-1)
        assert torch.allclose(noisy(x).softmax(-1), expected)
    with torch.no_grad():
        noisy.log_scale.fill_(-9.0)
    assert torch.allclose(noisy(x).softmax(-1).argmax(-1), squares.argmin(-1))
    assert torch.allclose(noisy(x).softmax(-1).amax(-1), torch.ones(30))


# --------------------------------------------------------------------------------------------- priors


@pytest.mark.parametrize("kind", ["autoregressive", "factorized", "uniform"])
@pytest.mark.parametrize("one_hot", [False, True])
def test_priors_sum_to_one_and_draw_what_they_say(kind, one_hot):
    prior = CodePrior(3, 4, kind, one_hot, 8, 1)
    with torch.no_grad():
        for p in prior.parameters():
            p.add_(torch.randn(p.shape))
    p = prior()
    words = torch.tensor(list(itertools.product(range(4), repeat=3)))
    values = torch.nn.functional.one_hot(words, 4).to(torch.get_default_dtype()) if one_hot else words
    probs = p.log_prob(values).exp()
    assert torch.allclose(probs.sum(), torch.ones(()))
    drawn = p.expand(torch.Size([2])).sample((20000,))
    assert drawn.shape == (20000, 2, *p.event_shape)
    drawn = drawn.argmax(-1) if one_hot else drawn
    place = (drawn.reshape(-1, 3) * torch.tensor([16, 4, 1])).sum(-1)
    count = torch.bincount(place, minlength=64)
    # 64 counts at 5.5 standard errors of a Poisson count, 3 more for rare words: false alarm about 1e-5
    assert ((count - 40000 * probs).abs() < 5.5 * (40000 * probs).sqrt() + 3).all()


def test_a_prior_over_few_codes_lists_them():
    p = CodePrior(2, 3, width=8, layers=1)()
    assert p.num_values == 9 and p.enumerate_support(False).tolist() == [
        [i, j] for i in range(3) for j in range(3)
    ]
    assert p.expand(torch.Size([5])).enumerate_support().shape == (9, 5, 2)
    large = CodePrior(64, 512, width=8, layers=1)()
    assert not large.has_enumerate_support and large.num_values == 512**64


# --------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("prior", ["autoregressive", "factorized", "uniform"])
def test_exact_evidence_is_the_sum_over_all_code_words(name, prior):
    pair, y = MAKE[name](prior=prior), pixels(5)
    pair.eval()
    joint = torch.stack([log_joint(pair, y, z) for z in all_codes(pair)])
    exact = evidence.exact(pair, y)
    assert exact.kind == "exact" and torch.allclose(exact.value, joint.logsumexp(0), atol=1e-10)
    if name == "sq":  # the ELBO is a sum over the guide's probabilities
        q = pair.encode(y).base_dist.probs  # [B, G, K]
        words = all_codes(pair)
        weight = torch.stack([q[:, torch.arange(2), z].prod(-1) for z in words])
        bound = (weight * (joint - weight.log())).sum(0)
        sampled = evidence.elbo(pair, y, particles=4000)
        assert ((sampled.value - bound).abs() < 5 * sampled.stderr + 1e-9).all()  # 3e-6
    else:  # a point mass: no noise, and the waste is -ln p(z | y)
        z = pair.codes(y)
        bound = torch.stack([log_joint(pair, y[i : i + 1], z[i])[0] for i in range(5)])
        assert torch.allclose(evidence.elbo(pair, y, particles=2).value, bound, atol=1e-10)
    assert (bound < joint.logsumexp(0)).all()


@pytest.mark.parametrize("name", MAKE)
def test_the_model_decodes_codes_as_the_guide_handed_them_on(name):
    pair, y = MAKE[name]().eval(), pixels(4)
    drawn = poutine.trace(pair.guide).get_trace(y)
    shared = poutine.trace(poutine.replay(pair.model, trace=drawn)).get_trace(y)
    value = {"z": drawn.nodes["z"]["value"].clone()}
    alone = poutine.trace(poutine.condition(pair.model, value)).get_trace(y)
    assert torch.equal(shared.nodes["y"]["fn"].log_prob(y), alone.nodes["y"]["fn"].log_prob(y))


def test_the_auxiliary_loss_is_that_of_the_encoders_own_pass():
    pair, y = MAKE["vq"](commitment=0.7), pixels(9)
    alone = pair.eval().auxiliary_loss(y)
    x = pair.vectors(y)
    e = pair.quantizer.embed(pair.codes(y))
    assert torch.allclose(alone, 0.7 * (x - e).square().sum((-2, -1)))
    pair.train()
    pair.guide(y)
    passed = []
    pair.encoder.register_forward_hook(lambda *_: passed.append(1))
    pair.encoder.network.register_forward_hook(lambda *_: passed.append(1))
    assert torch.allclose(pair.auxiliary_loss(y), alone) and not passed
    pair.guide(y.clone())  # other data, and the codebook moves
    codebook = pair.quantizer.codebook.clone()
    again = pair.auxiliary_loss(y)
    assert passed and torch.equal(pair.quantizer.codebook, codebook)
    assert torch.allclose(again, pair.eval().auxiliary_loss(y))


def test_conv_codes_of_odd_sizes():
    y = pixels(3, 35)
    for make in (models.VQVAE, models.SQVAE):
        pair = make((5, 7), 4, 2, network="conv", channels=2)
        assert pair.positions == 4 and pair.reconstruct(y).shape == (3, 35)
        assert evidence.elbo(pair, y, particles=3).value.shape == (3,)
        assert pair.simulate(4)[1].shape == (4, 35)


# --------------------------------------------------------------------------------------------- coding


@pytest.mark.parametrize(
    ("name", "prior"), [("vq", "autoregressive"), ("fsq", "factorized"), ("sq", "autoregressive")]
)
def test_codes_and_pixels_are_compressed_to_minus_the_bound(name, prior, tmp_path):
    torch.manual_seed(3)
    pair, y = MAKE[name](prior=prior), pixels(64)
    array = y.numpy().astype(np.uint8)
    found = coding.compress(pair, array, tmp_path / "code")
    assert np.array_equal(coding.decompress(pair, tmp_path / "code"), array)
    bound = evidence.elbo(pair, y, particles=500 if name == "sq" else 1)
    # of the data coded by the pair; those of the starter have other bounds
    assert abs(found.net + bound.mean) < 0.15 * (-bound.mean)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vq", "gradient", "fsq", "sq"])
def test_trained_codes_are_evenly_used_and_a_file_has_the_length_of_the_bound(name, tmp_path):
    """On 1,000 digits held out: three of four codes in use, on average (of FSQ's, which took half as many, a
    third), and a thousandth of the bound beside the spread of the codes that a guide draws."""
    digits = data.load("digits")
    train, test = digits["train"][:597], torch.cat([digits["train"][597:], digits["test"]])
    make, settings, least = {
        "vq": (models.VQVAE, {"codes": 16}, 12),
        "gradient": (models.VQVAE, {"codes": 16, "codebook": "gradient"}, 12),
        "fsq": (models.FSQVAE, {"bins": (4, 4)}, 5.3),
        "sq": (models.SQVAE, {"codes": 16}, 12),
    }[name]
    torch.manual_seed(0)
    pair = make((8, 8), positions=3, likelihood="discretized_logistic", levels=17, **settings)
    objective = "straight_through" if name == "sq" else "elbo"
    fit(
        pair.initialize(train), train, objective=objective, epochs=60, batch_size=64, learning_rate=2e-3,
        seed=0, progress=False,
    )  # fmt: skip
    pair.eval()
    usage = pair.usage(test)
    assert usage.perplexity > least
    array = test.numpy().astype(np.uint8)
    found = coding.compress(pair, array, tmp_path / "code")
    assert np.array_equal(coding.decompress(pair, tmp_path / "code"), array)
    assert found.coded >= 700  # the others are coded without the pair
    draws = evidence.terms(pair, test[: found.coded], 16).log_weight
    spread = float((draws.var(0).sum() * (1 + 1 / 16)).sqrt()) / found.coded  # of one draw beside 16
    bound = -float(draws.mean())
    assert abs(found.net - bound) < 1e-3 * bound + 4 * spread


# ------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", MAKE)
def test_training_raises_the_bound(name):
    torch.manual_seed(0)
    patterns = pixels(4)
    y = patterns[torch.randint(4, (256,))]
    pair = MAKE[name]().initialize(y)
    before = evidence.elbo(pair, y, particles=8).mean
    objective = "straight_through" if name == "sq" else "elbo"
    fit(pair, y, epochs=25, batch_size=64, learning_rate=1e-2, objective=objective, progress=False)
    after = evidence.elbo(pair, y, particles=8).mean
    assert before + 1 < after <= -math.log(4) + 0.2  # the patterns have ln 4 nats
    usage = pair.usage(y)
    assert sum(usage.counts) == 512 and (name == "sq" or usage.perplexity > 1.5)


@pytest.mark.parametrize("name", ["vq", "gradient", "fsq"])
def test_a_compiled_step_is_an_eager_one(name):
    batches, ends = pixels(3 * 20).split(20), []
    for make in (EagerStep, lambda *parts, **more: CompiledStep(*parts, **more, backend="eager")):
        torch.manual_seed(0)
        pair = MAKE[name](reset=0.3) if name == "vq" else MAKE[name]()
        loss = PerDatum(adapt(Trace_ELBO()), float, getattr(pair, "auxiliary_loss", None))
        with unregistered():
            step = make(loss, pair.model, pair.guide, dict(pair.named_parameters()), lr=1e-2)
            losses = []
            for y in batches * 2:
                torch.manual_seed(len(losses))
                losses.append(step(y))
        ends.append({**pair.state_dict(), "losses": torch.stack(losses)})
    assert (step.counters.compiled_calls, step.counters.fallbacks) == (6, 0)
    for key, value in ends[0].items():
        assert torch.allclose(value, ends[1][key], rtol=1e-9, atol=1e-12), key


def test_usage():
    usage = CodeUsage((3, 0, 1))
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert usage.used == 2 and math.isclose(usage.perplexity, expected)
    assert "2 of 3" in str(usage) and math.isnan(CodeUsage((0, 0)).perplexity)


def test_k_means_starts_the_codebook_where_the_encoders_vectors_are():
    pair, y = models.VQVAE(6, 16, 2, 1, (8,)), pixels(500)
    pair.initialize(y)
    wide = pair.vectors(y)[:, 0]
    off = (wide - pair.quantizer.embed(pair.codes(y))[:, 0]).square().sum(-1).mean()
    assert off < 0.1 * wide.var(0).sum() and pair.usage(y).used == 16


def test_scalar_codes_start_from_standardized_numbers():
    y = pixels(400, 20)
    for more in ({"positions": 3, "hidden": (8,)}, {"network": "conv", "channels": 2}):
        pair = models.FSQVAE((4, 5), (4, 4), **more).initialize(y)
        x = pair.vectors(y)
        x = x if "positions" in more else x.flatten(0, 1)
        assert torch.allclose(x.mean(0), torch.zeros(()), atol=1e-8)
        assert torch.allclose(x.std(0, correction=0), torch.ones(()), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.VQVAE(6, codes=0), "codes: expected a positive"),
        (lambda: models.VQVAE(6, codebook="none"), "codebook: expected 'ema' or 'gradient', got 'none'"),
        (lambda: models.VQVAE(6, commitment=-1.0), "commitment: expected"),
        (lambda: models.VQVAE(6, decay=1.0), "decay, reset: expected"),
        (lambda: models.VQVAE(6, positions=0), "positions: expected a positive"),
        (lambda: models.VQVAE(6, network="rnn"), "network: expected 'mlp' or 'conv'"),
        (lambda: models.VQVAE(6, network="conv"), "height, width"),
        (lambda: models.VQVAE(6, prior="vamp"), "prior: expected one of"),
        (lambda: models.FSQVAE(6, bins=(3, 1)), "bins: expected at least two values"),
        (lambda: models.FSQVAE(6, bins=()), "bins: expected at least two values"),
        (lambda: MAKE["vq"]().codes(torch.zeros(2, 5)), r"y: expected shape \[B, 6\]"),
        (lambda: MAKE["vq"]().initialize(torch.zeros(2, 5)), r"y: expected shape \[B, 6\]"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_many_codes_are_not_summed():
    pair = models.VQVAE(6, 512, 2, 8, (8,), prior="factorized")
    with pytest.raises(evidence.Unavailable, match="values"):
        evidence.exact(pair, pixels(2))
    assert audit(pair, pixels(3), particles=2)["elbo"].kind == "lower"
    pyro.clear_param_store()


def test_a_decoder_starts_with_the_mean_of_the_data():
    y = (torch.rand(500, 6) < torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9, 0.99])).double()
    pair = models.FSQVAE(6, (4, 4), positions=2, hidden=(8,)).initialize(y)
    last = [m for m in pair.generator.decoder.modules() if isinstance(m, torch.nn.Linear)][-1]
    error = (last.bias.sigmoid() - y.mean(0)).abs()
    assert error[:-1].max() < 1e-6 and error[-1] < 0.01  # a pixel that is nearly always on takes more steps

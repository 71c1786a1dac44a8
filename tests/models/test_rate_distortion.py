"""Rate–distortion autoencoders: the bound's pieces, files of codes, the closed form of a Gaussian source."""

import math

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import nn

from pyroelbo import coding, evidence, fit, models
from pyroelbo.distributions import DiscretizedNormal
from pyroelbo.models.rate_distortion import _Noise
from pyroelbo.priors import integer_unit

LN2 = math.log(2)


def small(**more):
    return models.RateDistortion(**{"shape": 3, "latent": 2, "hidden": (8,), "weight": 4.0, **more})


class _Exact(nn.Module):
    """The probabilities of a rounded normal variable, for a prior."""

    def __init__(self, scale, values):
        super().__init__()
        self.scale, self.values = scale, values

    def forward(self):
        middle = torch.tensor([(self.values - 1) / 2])
        return DiscretizedNormal(middle, torch.tensor([self.scale]), self.values).to_event(1)


def uniform_quantizer(step, weight=1.0):
    """A pair that rounds N(0, 1) to multiples of ``step`` and codes by their exact probabilities."""
    values = 2 * math.ceil(9 / step) + 1
    pair = models.RateDistortion(1, 1, (), weight=weight, values=values)
    unit = integer_unit(values)
    with torch.no_grad():
        for layer, gain in (
            (pair.encoder.network[0], 1 / (step * unit)),
            (pair.generator.decoder[0], step * unit),
        ):
            layer.weight.fill_(gain)
            layer.bias.zero_()
    pair.prior = _Exact(1 / step, values)
    return pair.eval()


def expectations(pair):
    """Rate in bits and squared error of N(0, 1), by a fine sum."""
    y = torch.linspace(-8.5, 8.5, 200001)[:, None]
    w = torch.exp(-0.5 * y[:, 0].square())
    w = w / w.sum()
    error = (y - pair.decode(pair.codes(y))).square().sum(-1)
    return float((w * pair.rate(y)).sum()) / LN2, float((w * error).sum())


def test_a_uniform_quantizer_stays_a_quarter_bit_above_the_rate_distortion_function():
    for step in (4.0, 2.0, 1.0, 0.5, 0.25):
        rate, error = expectations(uniform_quantizer(step))
        excess = rate - 0.5 * math.log2(1 / error)
        assert excess > 0  # R(D) = ½ log₂ 1/D for D up to 1
        if step <= 0.5:  # rounding errors are uniform, and independent of what is rounded
            assert abs(error - step**2 / 12) < 1e-6
            gap = 0.5 * math.log2(math.pi * math.e / 6)  # .2546
            assert abs(excess - gap - 0.5 * math.log2(1 + step**2 / 12)) < 1e-4


@pytest.mark.parametrize("likelihood", ["l2", "l1"])
def test_the_bound_is_rate_plus_distortion_plus_ln_z(likelihood):
    pair, y = small(likelihood=likelihood).eval(), torch.randn(7, 3)
    off = y - pair.decode(pair.codes(y))
    weight = 4.0
    if likelihood == "l2":
        distortion = 0.5 * weight * off.square().sum(-1) + 1.5 * math.log(2 * math.pi / weight)
    else:
        distortion = weight * off.abs().sum(-1) + 3 * math.log(2 / weight)
    assert torch.allclose(evidence.elbo(pair, y, particles=1).value, -(pair.rate(y) + distortion))
    assert math.isclose(pair.weight, weight)


def test_the_exact_evidence_is_above_the_hard_bound():
    pair, y = small(values=5).eval(), torch.randn(4, 3)
    z = torch.cartesian_prod(torch.arange(5.0), torch.arange(5.0))
    joint = pair.prior().log_prob(z)[:, None] + pair.observation(z[:, None]).log_prob(y)
    exact = evidence.exact(pair, y).value
    assert torch.allclose(exact, joint.logsumexp(0))
    assert (evidence.elbo(pair, y, particles=1).value < exact).all()


def test_noise_in_training_is_a_density_and_evaluation_rounds():
    pair, y = small(latent=1, values=201), torch.randn(6, 3)
    with torch.no_grad():
        pair.prior.network.layers[-1].bias.normal_()
    drawn = poutine.trace(pair.guide).get_trace(y).nodes["z"]
    assert (drawn["value"] != drawn["value"].round()).any()
    fn = poutine.trace(pair.model).get_trace(y[:1]).nodes["z"]["fn"]
    z = torch.linspace(0.05, 199.95, 40001)[:, None]
    # without the tails at the ends, where the last integers' probabilities begin
    mass = torch.trapezoid(fn.log_prob(z).exp(), z[:, 0])
    assert 0.99 < mass < 1 + 1e-4
    x = torch.full((1000, 100), 126.7, dtype=torch.float32)  # where rounding reaches both ends of the noise
    noise = _Noise(x)
    for _ in range(10):
        drawn = noise.rsample()
        assert (noise.log_prob(drawn) == 0).all() and abs(float(drawn.double().mean()) - 126.7) < 0.01
    assert (noise.log_prob(x + 0.6) == -math.inf).all()
    rounded = evidence.terms(pair, y, 3).latents["z"]  # in evaluation mode
    assert torch.equal(rounded, rounded.round()) and torch.equal(rounded[0], rounded[2])
    assert torch.equal(rounded[0], pair.codes(y).to(rounded.dtype))


@pytest.mark.parametrize("quantization", ["noise", "straight_through"])
def test_the_encoder_learns_from_rate_and_distortion(quantization):
    torch.manual_seed(0)
    y = torch.randn(512, 3) @ torch.randn(3, 3)
    found = {}
    for weight in (1.0, 30.0):
        torch.manual_seed(1)
        pair = small(quantization=quantization, weight=weight, hidden=())
        fit(pair, y, epochs=15, batch_size=64, learning_rate=2e-2, progress=False)
        error = (y - pair.decode(pair.codes(y))).square().sum(-1).mean()
        found[weight] = float(pair.rate(y).mean()), float(error)
    assert found[30.0][0] > found[1.0][0] + 0.5 and found[30.0][1] < found[1.0][1]


def test_codes_alone_are_a_file_of_their_rate(tmp_path):
    pair, y = small().eval(), torch.randn(1000, 3)
    lossy = pair.lossy()
    z = lossy.encode(y)
    found = coding.compress(lossy.codes, z.numpy().astype(np.uint8), tmp_path / "z")
    restored = torch.from_numpy(coding.decompress(lossy.codes, tmp_path / "z"))
    assert torch.equal(restored.long(), z)
    assert torch.equal(lossy.decode(restored), lossy.decode(z))
    rate = float(pair.rate(y).mean())
    assert abs(found.net - rate) < 2e-3 * rate
    assert torch.allclose(evidence.exact(lossy.codes, z).value, -pair.rate(y).double())


def test_grey_levels_are_compressed_without_loss(tmp_path):
    pair = small(likelihood="discretized_normal", levels=9, weight=20.0)
    y = torch.randint(9, (64, 3))
    array = y.numpy().astype(np.uint8)
    found = coding.compress(pair, array, tmp_path / "y")
    assert np.array_equal(coding.decompress(pair, tmp_path / "y"), array)
    assert abs(found.net + evidence.elbo(pair, y.double(), particles=1).mean) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["noise", "straight_through"])
def test_a_trained_quantizer_of_a_gaussian_source_is_as_good_as_a_uniform_one(quantization):
    torch.manual_seed(0)
    y, test = torch.randn(20000, 1), torch.randn(20000, 1)
    pair = models.RateDistortion(1, 1, (), weight=400.0, quantization=quantization)
    fit(pair, y, epochs=30, batch_size=256, learning_rate=1e-2, progress=False)
    error = float((test - pair.decode(pair.codes(test))).square().mean())
    rate = float(pair.rate(test).mean()) / LN2
    # the prior is a mixture of three logistics, learned; the rate of 20,000 draws has an error of .005
    assert 0.23 < rate - 0.5 * math.log2(1 / error) < 0.30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(quantization="dither"), "quantization: expected one of"),
        (lambda: small(weight=0.0), "weight: expected a positive number"),
        (lambda: small(weight=math.inf), "weight: expected a positive number"),
        (lambda: small(latent=0), "latent: expected a positive"),
        (lambda: small(values=0), "values: expected a positive"),
        (lambda: small(likelihood="bernoulli"), "weight: expected None"),
        (lambda: small().codes(torch.zeros(2, 4)), r"y: expected shape \[B, 3\]"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

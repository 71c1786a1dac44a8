"""The style-based generator and its inverter."""

import pyro
import pytest
import torch
from pyro import poutine
from torch.nn.functional import conv2d

from pyroelbo import data, evidence, fit, models
from pyroelbo.cli import main
from pyroelbo.nn import ModulatedConv, doubled


def small(**settings):
    return models.StyleVAE((4, 6), 2, 2, 3, 8, 2, 4, **settings)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("demodulate", [True, False])
def test_a_modulated_convolution_scales_the_weights_of_each_image(kernel, demodulate):
    conv = ModulatedConv(3, 5, 4, kernel, demodulate)
    x, w = torch.randn(2, 6, 3, 4, 5), torch.randn(2, 6, 4)
    found = conv(x, w)
    for k in range(2):
        for b in range(6):
            weight = conv.weight * conv.style(w[k, b])[None, :, None, None]
            if demodulate:
                weight = weight / weight.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()
            expected = conv2d(x[k, b][None], weight, padding=kernel // 2)[0]
            torch.testing.assert_close(found[k, b], expected)


def test_demodulated_outputs_of_unit_inputs_have_unit_scale():
    conv = ModulatedConv(8, 8, 4)
    out = conv(torch.randn(400, 8, 5, 5), 10 * torch.randn(400, 4))[..., 2, 2]  # inside the padding
    # 3200 squares of nearly independent unit Gaussians: a false alarm in 1e-6 at 4.9 standard errors
    assert abs(float(out.detach().square().mean()) - 1) < 4.9 * (2 / 3200) ** 0.5


def test_doubling_repeats_pixels():
    x = torch.randn(2, 3, 1, 2, 3)
    assert torch.equal(doubled(x), x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_each_noise_map_is_a_site_of_its_scale():
    pair = small()
    assert pair.sites == ("z_5", "z_4", "z_3", "z_2", "z_1")
    latents, y = pair.simulate(3)
    shapes = [tuple(latents[s].shape) for s in pair.sites]
    assert shapes == [(3, 3), (3, 1, 2, 3), (3, 1, 2, 3), (3, 1, 4, 6), (3, 1, 4, 6)]
    assert y.shape == (3, 24)


def test_the_observation_is_the_models_and_every_noise_map_matters():
    pair = small(likelihood="l2")
    latents, y = pair.simulate(5)
    trace = poutine.trace(poutine.condition(pair.model, data=latents)).get_trace(y)
    noise = [latents[s] for s in pair.sites[1:]]
    w = pair.style(latents["z_5"])
    found = pair.observation(w, noise).log_prob(y)
    torch.testing.assert_close(found, trace.nodes["y"]["fn"].log_prob(y))
    for i in range(4):
        other = [z + 1.0 if i == j else z for j, z in enumerate(noise)]
        assert not torch.allclose(pair.observation(w, other).log_prob(y), found)


def test_inversion_takes_the_encoders_means():
    pair = small(likelihood="l2")
    _, y = pair.simulate(4)
    w, noise = pair.invert(y)
    top = poutine.trace(pair.guide).get_trace(y).nodes["z_5"]["fn"].mean
    torch.testing.assert_close(w, pair.style(top))
    codes = dict(zip(pair.sites, (top, *noise), strict=True))
    means = poutine.trace(poutine.condition(pair.guide, data=codes)).get_trace(y)
    for site in pair.sites[1:]:
        torch.testing.assert_close(codes[site], means.nodes[site]["fn"].mean)
    line = pair.interpolate(y, y.flip(0), steps=3)
    ends = pair.pixels.mean_image(pair.observation(w, noise))
    torch.testing.assert_close(line[0], ends)
    torch.testing.assert_close(line[-1], ends.flip(0))
    middle = pair.observation((w + w.flip(0)) / 2, [(z + z.flip(0)) / 2 for z in noise])
    torch.testing.assert_close(line[1], pair.pixels.mean_image(middle))


def test_truncation_moves_draws_to_the_mean_style():
    pair = small(likelihood="l2")
    with torch.no_grad():
        pair.pixels.log_weight.fill_(30.0)  # nearly no noise of pixels
    spread, latents = {}, {}
    for share in (1.0, 0.5, 0.0):
        torch.manual_seed(0)
        latents[share], y = pair.simulate(50, truncation=share)
        spread[share] = float(y.std(0).mean())
    assert spread[1.0] > spread[0.5] > 100 * spread[0.0]
    assert all(torch.equal(latents[1.0][s], latents[0.5][s]) for s in pair.sites)
    zeros = [torch.zeros_like(latents[0.0][s][0]) for s in pair.sites[1:]]
    center = pair.observation(pair.mean_style(), zeros).mean  # the mean style's error is that of 4,096 draws
    torch.testing.assert_close(y.mean(0), center.detach(), atol=0.1, rtol=0)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="truncation: expected a number from 0 to 1, got"):
            pair.simulate(2, truncation=wrong)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: models.StyleVAE((28, 30), 3),
            r"shape: expected multiples of 4, what a coarsest size and 2 doublings reach \(scales=3\), got "
            "28x30: use scales=2 or fewer, or pad the images",
        ),
        (lambda: models.StyleVAE((7, 8), 2), "got 7x8: use scales=1 or fewer"),
        (lambda: models.StyleVAE(64), r"shape: expected \(height, width\), got 64"),
        (lambda: models.StyleVAE((8, 8), 0), "scales: expected a positive number, got 0"),
        (lambda: models.StyleVAE((8, 8), layers=0), "layers: expected a positive number, got 0"),
        (lambda: models.StyleVAE((8, 8), latent=0), "latent: expected a positive number of units, got 0"),
        (
            lambda: models.build("style_vae", data.load("iris")),
            "data: expected .* for style_vae, got iris, vectors",
        ),
    ],
)
def test_what_the_generator_cannot_reach_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_generator_and_inverter_learn_together():
    """On images of two templates, the bound rises above that of the best model without latents."""
    pyro.set_rng_seed(0)
    templates = torch.tensor([[1.0, 0, 0, 1] * 4, [0.0, 1, 1, 0] * 4])
    y = templates[torch.arange(64) % 2]
    pair = models.StyleVAE((4, 4), 2, 1, 2, 8, 1, 8)
    fit(pair, y, epochs=40, batch_size=32, learning_rate=1e-2, progress=False)
    bound = evidence.elbo(pair, templates, particles=64).mean
    assert bound > -16 * 0.6931 / 2  # independent pixels reach -16 ln 2; the entropy is ln 2


def test_sample_takes_a_truncation_from_the_command_line(tmp_path, capsys):
    torch.set_default_dtype(torch.float32)
    style, plain = str(tmp_path / "style"), str(tmp_path / "vae")
    few = ["-n", "1", "--quiet", "--set"]
    assert main(["train", "style_vae", "--out", style, *few, "channels=4", "--set", "scales=2"]) == 0
    assert main(["train", "vae", "--out", plain, *few, "hidden=4"]) == 0
    assert main(["sample", style, "-n", "3", "--truncation", "0.5"]) == 0
    assert "y (3, 64)" in capsys.readouterr().out
    assert main(["sample", style, "-n", "3", "--truncation", "2"]) == 1
    assert "--truncation: expected a number from 0 to 1, got 2.0" in capsys.readouterr().err
    assert main(["sample", plain, "-n", "3", "--truncation", "0.5"]) == 1
    assert "--truncation: expected none for a VAE, got 0.5" in capsys.readouterr().err

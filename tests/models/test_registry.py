"""The registered models: constants, closed forms, shapes."""

import math
from pathlib import Path

import pytest
import torch
from torch.distributions import Laplace, MultivariateNormal, Normal

from pyroelbo import data, models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.strategies import Plate
from pyroelbo.models import PPCA, VAE, GaussianMixture
from tests.pairs import TABLE

DIGITS = data.Dataset("digits", "bytes", (8, 8), {}, 17)


@pytest.mark.parametrize("name", [n for n in TABLE if n.startswith("vae")])
def test_a_vae_decodes_and_encodes(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(5)
    z = torch.randn(3, 5, 2)
    assert pair.observation(z).batch_shape == (3, 5) and pair.observation(z).event_shape == y.shape[1:]
    image = pair.mean_image(z)
    assert image.shape == (3, 5, y.shape[1]) and image.min() >= 0 and image.max() <= 1
    assert pair.encode(y).event_shape == (2,)
    assert isinstance(Evaluator(pair, y).strategy, Plate)


def test_densities_keep_their_constants():
    z, y = torch.randn(4, 2), torch.rand(4, 6)
    for likelihood, density in (("l2", lambda m: Normal(m, 0.1)), ("l1", lambda m: Laplace(m, 0.01))):
        pair = VAE(6, 2, (8,), likelihood=likelihood, weight=100.0)
        center = pair.generator.decoder(z)
        torch.testing.assert_close(pair.observation(z).log_prob(y), density(center).log_prob(y).sum(-1))
        assert "generator.log_weight" not in dict(pair.named_parameters())


def test_rounded_distortions_weigh_pixels_in_the_unit_interval():
    z, y = torch.randn(4, 2), torch.randint(17, (4, 6)).double()
    for likelihood, density in (
        ("discretized_normal", lambda m: Normal(m, 0.1)),
        ("discretized_laplace", lambda m: Laplace(m, 0.01)),
    ):
        pair = VAE(6, 2, (8,), likelihood=likelihood, levels=17, weight=100.0)
        f = density(0.5 + 0.25 * pair.generator.decoder(z))
        above, below = f.cdf((y + 0.5) / 16), f.cdf((y - 0.5) / 16)
        expected = torch.where(y == 16, 1, above) - torch.where(y == 0, 0, below)
        torch.testing.assert_close(pair.observation(z).log_prob(y).exp(), expected.prod(-1))
        assert "generator.log_weight" not in dict(pair.named_parameters())


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "discretized_normal", "discretized_laplace"])
def test_black_can_be_certain_at_any_scale_and_a_wrong_center_is_left(likelihood):
    pixels = VAE(1, 1, (2,), likelihood=likelihood, levels=256).generator
    with torch.no_grad():
        pixels.log_weight.fill_(math.log(25.5 if likelihood == "discretized_logistic" else 10.0))
    black, white = torch.tensor([[0]]), torch.tensor([[255]])
    x = torch.tensor([[-6.0]], requires_grad=True)
    certain = pixels.distribution(x).log_prob(black)
    assert certain > -0.02  # of centers in the range -ln 2: the scale is shared with pixels that vary
    torch.testing.assert_close(pixels.distribution(-x).log_prob(white), certain)
    (slope,) = torch.autograd.grad(pixels.distribution(x).log_prob(white).sum(), x)
    assert slope > 1  # nats per unit: a sigmoid's would be some 0.02
    image = pixels.mean_image(pixels.distribution(torch.tensor([[-6.0], [0.0], [6.0]])))
    torch.testing.assert_close(image, torch.tensor([[0.0], [0.5], [1.0]]))


def test_the_encoder_sees_grey_levels_between_minus_one_and_one():
    pair = VAE(6, 2, (8,), likelihood="categorical", levels=5)
    assert pair.generator.center()(torch.full((1, 6), 4), torch.float64).max() == 1
    torch.testing.assert_close(
        pair.encode(torch.full((1, 6), 4)).mean, pair.encode(torch.full((1, 6), 4.0)).mean
    )


def test_ppca_is_the_gaussian_it_says():
    pair, y = PPCA(5, 2), torch.randn(7, 5)
    g = pair.generator
    covariance = g.weight @ g.weight.T + (2 * g.log_scale).exp() * torch.eye(5)
    torch.testing.assert_close(pair.log_evidence(y), MultivariateNormal(g.loc, covariance).log_prob(y))
    z = torch.randn(7, 2)
    joint = MultivariateNormal(torch.zeros(2), torch.eye(2)).log_prob(z) + Normal(
        z @ g.weight.T + g.loc, g.log_scale.exp()
    ).log_prob(y).sum(-1)
    torch.testing.assert_close(joint - pair.log_evidence(y), pair.posterior(y).log_prob(z))


def test_ppcas_closed_form_is_a_maximum():
    y = torch.randn(100, 5) @ torch.randn(5, 5)
    pair = PPCA(5, 2).solve(y)
    best = pair.log_evidence(y).mean()
    gradients = torch.autograd.grad(best, list(pair.parameters()))
    assert all(g.abs().max() < 1e-8 for g in gradients)


def test_mixture_is_the_sum_it_says():
    pair, y = GaussianMixture(3, 4), torch.randn(6, 3)
    g = pair.generator
    parts = [Normal(g.loc[k], g.scale[k]).log_prob(y).sum(-1) + g.logits.log_softmax(0)[k] for k in range(4)]
    torch.testing.assert_close(pair.log_evidence(y), torch.logsumexp(torch.stack(parts), 0))
    torch.testing.assert_close(pair.posterior(y).probs, torch.softmax(torch.stack(parts, -1), -1))


def test_initial_values_come_from_the_data():
    digits = data.load("digits", "grey")
    train = digits["train"]
    mixture = models.build("mixture", digits, {"components": 3})
    mixture.initialize(train, start="random")
    assert all((row == train).all(1).any() for row in mixture.generator.loc.detach())
    assert math.isfinite(float(mixture.log_evidence(train).mean().detach()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: VAE(4, likelihood="poisson"),
            r"likelihood: expected one of \('bernoulli', 'discretized_logistic', 'categorical',",
        ),
        (
            lambda: VAE(4, network="transformer"),
            "network: expected 'mlp', 'gated' or 'conv', got 'transformer'",
        ),
        (lambda: VAE(4, network="conv"), r"shape: expected \(height, width\) for network='conv', got \(4,\)"),
        (
            lambda: VAE((4, 4), 2, (), network="conv"),
            "hidden: expected at least one width for network='conv', that of the layer after the",
        ),
        (
            lambda: VAE(4, likelihood="categorical", levels=1),
            "levels: expected a whole number of at least 2 grey levels, got 1",
        ),
        (lambda: VAE(4, 0), "latent: expected a positive number of dimensions, got 0"),
        (
            lambda: VAE(4, weight=2.0),
            r"weight: expected None for likelihood='bernoulli', got 2\.0; only 'l2', 'l1', ",
        ),
        (lambda: VAE(4, 2, (0,)), "hidden: expected a positive width of each layer, got 0"),
        (lambda: PPCA(4, 5), "latent: expected at most 4 dimensions, those of the data, got 5"),
        (lambda: PPCA(4, 2, guide="flow"), "guide: expected 'exact' or 'mean_field', got 'flow'"),
        (lambda: GaussianMixture(4, 0), "components: expected a positive number, got 0"),
        (lambda: GaussianMixture(4, 2, floor=0.0), r"floor: expected a positive scale, got 0\.0"),
        (lambda: GaussianMixture(4, 2, guide="x"), "guide: expected 'exact' or 'encoder', got 'x'"),
        (
            lambda: GaussianMixture(4, 5).initialize(torch.zeros(3, 4)),
            "y: expected at least 5 data, one per component, got 3",
        ),
        (
            lambda: models.build("gan", DIGITS, {}),
            "model: expected one of vae, hierarchy, ladder, conv_ladder, style_vae, autoregressive,",
        ),
        (
            lambda: models.build("vae", DIGITS, {"depth": 2}),
            "settings: expected some of latent, hidden, likelihood, network, channels, weight,",
        ),
        (
            lambda: models.build("vae", data.Dataset("ones", "binary", (4,), {}, 2), {"likelihood": "l2"}),
            "data: expected grey or vectors for vae with likelihood=l2, got ones, binary; "
            "use likelihood=bernoulli",
        ),
        (
            lambda: models.build("ppca", data.Dataset("ones", "binary", (4,), {}, 2)),
            "data: expected grey or vectors for ppca, got ones, binary; "
            "binary are for vae, hierarchy, ladder, conv_ladder, style_vae, .*bernoulli_mixture",
        ),
        (
            lambda: models.build("vae", DIGITS, {"likelihood": "poisson"}),
            "likelihood: expected one of bernoulli, discretized_logistic, categorical, discretized_normal, "
            "discretized_laplace, l2, l1, got 'poisson'",
        ),
        (
            lambda: GaussianMixture(3).log_evidence(torch.zeros(2, 4)),
            r"y: expected shape \[B, 3\], got \(2, 4\)",
        ),
        (lambda: PPCA(3).log_evidence(torch.zeros(2, 4)), r"y: expected shape \[B, 3\], got \(2, 4\)"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def table():
    """The table of README.md: models by the kinds that they take, with the setting that a kind needs."""
    lines = [f"| model | {' | '.join(data.KINDS)} |", "|---" * (len(data.KINDS) + 1) + "|"]
    for name, row in models.REGISTRY.items():
        cells = []
        for kind in data.KINDS:
            needs = row.kinds.get(kind)
            cells.append("" if needs is None else ", ".join("/".join(v) for v in needs.values()) or "yes")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_models_and_kinds_is_up_to_date():
    wanted = table()
    assert wanted in (Path(__file__).parents[2] / "README.md").read_text(), f"README.md lacks\n{wanted}"

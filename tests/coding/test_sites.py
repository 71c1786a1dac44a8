"""Codecs of Pyro distributions."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

pytest.importorskip("constriction")
from pyroelbo import distributions as ped
from pyroelbo import encoders, models
from pyroelbo.coding import Grid, codec_of
from pyroelbo.distributions.pixels import DiscretizedLaplace, DiscretizedLogistic, DiscretizedNormal
from pyroelbo.models.autoregressive import Prefix
from pyroelbo.priors import AutoregressivePrior

from .round_trip import draw, round_trip

B, D = 6, 3


def chain():
    transition = torch.randn(B, 4, 5, 5)
    transition[..., 0, 1] = -math.inf
    return ped.LinearChain(torch.randn(B, 5), transition, torch.randn(B, 5, 5))


DISCRETE = {
    "bernoulli": lambda: dist.Bernoulli(logits=4 * torch.randn(B, D)).to_event(1),
    "bernoulli near certainty": lambda: dist.Bernoulli(logits=torch.tensor([-900.0, -50, 50, 900])),
    "categorical": lambda: dist.Categorical(logits=torch.randn(B, D, 7)).to_event(1),
    "categorical with zeros": lambda: dist.Categorical(probs=torch.eye(5) + torch.eye(5).roll(1, 0)),
    "expanded": lambda: dist.Categorical(logits=torch.randn(7)).expand([B]),
    "logistic": lambda: DiscretizedLogistic(8 * torch.rand(B, D), torch.rand(B, D) + 0.2, 9).to_event(1),
    "rounded normal": lambda: DiscretizedNormal(8 * torch.rand(B, D), torch.rand(B, D) + 0.2, 9).to_event(1),
    "rounded laplace": lambda: DiscretizedLaplace(8 * torch.rand(B, D), torch.rand(B, D) + 0.2, 9).to_event(
        1
    ),
    "binomial": lambda: dist.Binomial(torch.tensor([3.0, 9, 1]), torch.rand(3)),
    "poisson": lambda: dist.Poisson(torch.tensor([0.1, 3, 400])),
    "negative binomial": lambda: dist.NegativeBinomial(torch.tensor([2.0, 5]), torch.tensor([0.2, 0.9])),
    "geometric": lambda: dist.Geometric(torch.tensor([0.5, 0.01])),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.randn(B, 3)), dist.Categorical(logits=torch.randn(B, 3, 4))
    ),
    "one-hot": lambda: dist.OneHotCategorical(logits=torch.randn(B, D, 4)).to_event(1),
    "point": lambda: dist.Delta(torch.randn(B, D)).to_event(1),
    "prefix": lambda: Prefix(torch.randint(5, (B, 4))),
    "chain": chain,
    "tree": lambda: ped.TreeCRF(torch.tensor([2, 0, -1, 2]), torch.randn(B, 4, 3), torch.randn(B, 4, 3, 3)),
    "trees": lambda: ped.TreeCRF(
        torch.tensor([[-1, 0, 1], [1, -1, 1]]), torch.randn(B, 2, 3, 4), torch.randn(4, 4).expand(B, 2, 4, 4)
    ),
    "below zero": lambda: DiscretizedLogistic(9 * torch.randn(B, D), torch.rand(B, D) + 0.2, 9, low=-4),
}


@pytest.mark.parametrize("name", DISCRETE)
def test_discrete_values_cost_minus_log2_p(name):
    fn = DISCRETE[name]()
    values = [fn.sample() for _ in range(20)]
    ideal = -sum(float(fn.log_prob(value).sum()) for value in values) / math.log(2)
    codec = codec_of(fn, values[0].dtype)
    # both ends are rounded to bits; e^-50 is 2^-24 in the coder
    slack = 2 + 20 * (name == "bernoulli near certainty")
    assert round_trip(codec, *values) == pytest.approx(ideal, rel=1e-3, abs=slack)
    value, _ = draw(codec)
    assert value.shape == fn.shape() and bool((fn.log_prob(value) > -math.inf).all())


CONTINUOUS = {
    "normal": lambda: dist.Normal(torch.randn(B, D), torch.rand(B, D) + 0.1).to_event(1),
    "expanded": lambda: dist.Normal(torch.zeros(D), 1.0).to_event(1).expand([B]),
    "laplace": lambda: dist.Laplace(torch.randn(B, D), torch.rand(B, D) + 0.3).to_event(1),
    "log-normal": lambda: dist.LogNormal(torch.zeros(B), torch.rand(B) / 2 + 0.2),
    "gamma": lambda: dist.Gamma(torch.rand(B) + 2, torch.tensor(2.0)),
    "beta": lambda: dist.Kumaraswamy(torch.rand(B, D) + 1, torch.rand(B, D) + 1).to_event(1),
    "diagonal mixture": lambda: ped.DiagonalMixture(
        torch.randn(4), torch.randn(4, D), torch.rand(4, D) + 0.2
    ).expand([B]),
    "uniform mixture": lambda: encoders.UniformMixture(torch.randn(B, 4, D), torch.rand(B, 4, D) + 0.2),
    "autoregressive": lambda: AutoregressivePrior(D, 3, (8,))().expand([B]),
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous_values_cost_their_density_times_the_cell(name, narrow):
    fn = CONTINUOUS[name]()
    grid = Grid(np.full(tuple(fn.event_shape), 6), -8, 8)
    with torch.no_grad():
        codec = codec_of(fn, torch.float64, grid, narrow=narrow)
        values = [draw(codec, seed=seed)[0] for seed in range(20)]
        assert all(torch.equal(64 * z, (64 * z).round()) for z in values)
        ideal = sum(6 * z.numel() - float(fn.log_prob(z).sum()) / math.log(2) for z in values)
        assert round_trip(codec, *values) == pytest.approx(ideal, rel=2e-3, abs=2)


def test_the_grid_is_as_fine_as_the_posterior_asks():
    std = torch.tensor([0.02, 0.1, 1.0]).expand(50, 3)
    grid = Grid.of(torch.zeros(50, 3), std)
    spacing = 2.0**-grid.exponents
    # (δ / s)² / 24 = 1e-3, rounded down to a power of two
    ratio = np.array([0.02, 0.1, 1.0]) / spacing
    assert ((ratio >= 1 / math.sqrt(24e-3)) & (ratio < 2 / math.sqrt(24e-3))).all()
    assert grid.low <= -8 and grid.high >= 8
    with pytest.raises(ValueError, match="positive standard deviations"):
        Grid.of(torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (
            lambda: dist.MultivariateNormal(torch.zeros(2, 2), torch.eye(2)),
            "MultivariateNormal: its coordinates",
        ),
        (lambda: dist.Normal(torch.zeros(2), 1.0), "a density is no probability"),
        (lambda: dist.Bernoulli(torch.rand(2)).mask(torch.tensor([True, False])), "without a mask"),
        (lambda: models.Flow(2, layers=1, hidden=(4,)).generator().expand([2]), "FlowDistribution"),
    ],
)
def test_what_cannot_be_coded_is_refused(fn, message):
    with pytest.raises(ValueError, match=message):
        codec_of(fn(), torch.float64)


def test_a_float32_pixel_near_certainty_is_not_impossible():
    """sigmoid(20) is 1 in float32, yet 0 has probability e^-20."""
    fn = dist.Bernoulli(logits=torch.full((3,), 20.0, dtype=torch.float32))
    assert round_trip(codec_of(fn, torch.float32), torch.zeros(3, dtype=torch.float32)) < 75


def test_a_level_too_far_for_floating_point_is_not_impossible():
    """e^-922 is 0 in float64, yet the level has it; only ln p = -inf is impossible."""
    far = DiscretizedLogistic(torch.tensor([-852.0]), torch.tensor([1.2]), 256)
    assert -925 < far.log_prob(torch.tensor(255.0)) < -920
    assert round_trip(codec_of(far, torch.float64), torch.tensor([255.0])) < 25
    for fn in (
        dist.Bernoulli(logits=torch.tensor([922.0])),
        dist.Categorical(logits=torch.tensor([[0.0, 922.0]])),
    ):
        assert round_trip(codec_of(fn, torch.float64), torch.tensor([0.0])) < 25
    never = dist.Categorical(logits=torch.tensor([[0.0, -math.inf]]))
    with pytest.raises(ValueError, match="expected values of positive probability"):
        round_trip(codec_of(never, torch.float64), torch.tensor([1.0]))

"""What training refuses before it starts, and the loops that a bug could turn around."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pyroelbo import ExactPair, Pair, fit, fit_em, models
from tests.pairs import Nonlinear

Y = torch.randn(6, 4, dtype=torch.float64)


def program(*latents, observed=True):
    """Standard normal sites; the last one is observed."""

    def run(y):
        with pyro.plate("data", len(y)):
            for name in latents:
                pyro.sample(name, dist.Normal(torch.zeros(len(y)), 1.0))
            if observed:
                pyro.sample("y", dist.Normal(torch.zeros(len(y), 4), 1.0).to_event(1), obs=y)

    return run


@pytest.mark.parametrize(
    "model, guide, message",
    [
        (program("z"), program("z", observed=False), "pair: expected parameters to train, got none"),
        (program("z"), program("z", "w", observed=False), "guide site 'w' is missing in the model, whose"),
        (program("z", "w"), program("z", observed=False), "model site 'w' is missing in the guide, which"),
        (program("z", observed=False), program("z", observed=False), "the model observes nothing"),
    ],
)
def test_programs_that_cannot_be_trained(model, guide, message):
    with pytest.raises(ValueError, match=message):
        fit(Pair.of(model, guide), Y, epochs=1, progress=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seed": 1.5}, "seed: expected a whole number from 0"),
        ({"seed": True}, r"seed: expected a whole number from 0 to 2\*\*32 - 1, got True"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"seed": 2**32}, "seed: expected a whole number from 0"),
        ({"patience": 0}, "patience: expected a positive number of epochs, got 0"),
        ({"learning_rate": math.inf}, "learning_rate: expected a positive number, got inf"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive number, got 0.0"),
        ({"kl_weight": -0.1}, "kl_weight: expected a number of at least 0"),
        ({"budget": "long"}, "budget: expected a time"),
        ({"epochs": 0}, "epochs: expected a positive whole number"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(Nonlinear(), Y, **{"epochs": 1, "progress": False, **settings})


def test_the_smallest_settings_are_taken():
    began = time.perf_counter()
    run = fit(Nonlinear(), Y, epochs=1, patience=1, valid=Y, seed=2**32 - 1, kl_weight=0.0, progress=False)
    assert len(run.losses) == 1 and 0 < run.seconds <= time.perf_counter() - began


def symbols(pair, *impossible):
    """An HMM whose states never emit some symbols."""
    with torch.no_grad():
        pair.generator.logits[:, list(impossible)] = -math.inf
    return pair


def test_data_that_the_start_cannot_explain():
    y = torch.tensor([[0, 1, 0], [2, 0, 1]])
    em = {"start": "current", "impossible": "skip", "epochs": 1, "progress": False}
    with pytest.raises(ValueError, match="data: expected some rows of positive probability under the start"):
        fit_em(symbols(models.HMM(2, 3), 1, 2), y, **em)
    with pytest.raises(ValueError, match="impossible: expected data in memory for 'skip'"):
        fit_em(symbols(models.HMM(2, 3), 2), TensorDataset(y), **em)
    with pytest.warns(UserWarning, match="left out 1 of 2 rows"):
        fit_em(symbols(models.HMM(2, 3), 2), y, **em)


def test_a_start_from_data_needs_a_pair_that_has_one():
    class Plain(models.HMM):
        initialize = property()

    with pytest.raises(ValueError, match=r"start: expected a pair with initialize\(\*batch\) for 'data'"):
        fit_em(Plain(2, 3), torch.zeros(2, 3).long(), start="data", progress=False)


def test_an_interrupting_callback_ends_after_its_epoch():
    seen = []

    def stop(row):
        seen.append(row["epoch"])
        if len(seen) == 2:
            raise KeyboardInterrupt

    run = fit(Nonlinear(), Y, epochs=5, progress=False, callbacks=[stop])
    assert run.stopped == "interrupted" and len(run.losses) == len(seen) == 2


def test_the_evidence_of_a_subsampled_plate_is_averaged_over_the_batch():
    """It carries no scale, so that it is divided by the rows of a batch, not by the size of the plate."""

    class Subsampled(ExactPair):
        def __init__(self):
            super().__init__()
            self.generator = nn.Module()
            self.generator.register_parameter("loc", nn.Parameter(torch.tensor(0.3)))

        def model(self, y):
            with pyro.plate("data", 10, subsample_size=len(y)):
                z = pyro.sample("z", dist.Normal(self.generator.loc.expand(len(y)), 1.0))
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

        def log_evidence(self, y):
            return dist.Normal(self.generator.loc, math.sqrt(2)).log_prob(y)

        def posterior(self, y):
            return dist.Normal((self.generator.loc + y) / 2, math.sqrt(0.5))

    pair, y = Subsampled(), torch.randn(10)
    expected = -float(pair.log_evidence(y).detach().mean())
    run = fit(pair, y, objective="evidence", epochs=1, batch_size=5, learning_rate=1e-12, progress=False)
    assert run.losses[0] == pytest.approx(expected)

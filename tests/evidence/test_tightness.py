"""Every estimator against every evidence that can be had: bounds on their side, means on the linear scale
right.

False alarms: 1e-6 over the whole grid (see the benchmark's docstring, whose cells these are)."""

import dataclasses

import pytest
import torch

from benchmarks import tightness
from pyroelbo import distributions as ped
from pyroelbo import evidence
from tests.pairs import EXACT, TABLE

FEW = ("ppca-mean-field", "mixture-encoder", "conjugate")


@pytest.mark.parametrize("name", FEW)
def test_bounds_lie_on_their_side(name):
    rows = tightness.cells(name, 100)
    assert len(rows) >= 9 and not tightness.failures(rows)


def log_reach(pair, y):
    """ln of the probability that a grammar's prior draws a tree with as many leaves as y has words, [B]: that
    of as many words where there is but one word.
    """
    start, rules, words = pair.tables()
    lengths = ped.PCFG(start, rules, words.new_zeros(len(words), 1), max_length=pair.steps)
    return lengths.log_prob(y.clamp_max(0)).detach()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_the_whole_grid(name):
    assert not tightness.failures(tightness.cells(name, 300))


def test_a_grammars_prior_draws_other_lengths():
    """Reverse AIS from it has mean P(length)/p(y), not 1/p(y)."""
    pair, y = tightness.fitted("neural_pcfg", 60, 0)
    truth, share = evidence.exact(pair, y), log_reach(pair, y).exp()
    raw = evidence.ais(pair, y, 2, 4, leapfrog=2, start="prior", reverse=True, progress=False)
    rows = [tightness.judge("", "", raw, truth, True, mean) for mean in (share, 1.0)]
    assert all(isinstance(row["z"], float) for row in rows)
    assert tightness.failures(rows) == rows[1:]
    # what the grid draws instead, at 5 standard errors: a false alarm once in two million
    drawn = tightness.reach(pair, y, 400) - share
    assert abs(drawn.mean()) < 5 * drawn.std() / len(y) ** 0.5


def test_the_rows_that_can_be_solved_are_there():
    """A row that no reference takes is left out without a word, so the grid must not empty unseen."""
    assert len(EXACT) >= 26
    for name in ("own", "ppca"):
        make, draw = TABLE[name]
        assert tightness.reference(make(), draw(2)).method == ("quadrature" if name == "own" else "exact")


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_a_shifted_value_is_found(shift):
    """0.3 nats too high breaks the order of a lower bound; too low, the mean of an unbiased one."""
    make, draw = TABLE["ppca-mean-field"]
    pair, y = make(), draw(200)
    truth = evidence.exact(pair, y)
    bound = evidence.iwae(pair, y, 3000)
    bound = dataclasses.replace(bound, value=bound.value + shift, notes=())
    row = tightness.judge("ppca", "iwae", bound, truth, True)
    assert tightness.failures([row])
    assert row["ordered"] is (shift < 0)
    assert torch.isfinite(torch.tensor(row["z"]))

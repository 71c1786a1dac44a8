"""Codecs of arrays: inverse in both directions, as long as -log2 p, and exact about what is impossible."""

import numpy as np
import pytest

pytest.importorskip("constriction")
from pyroelbo.coding import Impossible, Stack, Underflow
from pyroelbo.coding.symbols import Bernoullis, Constants, Counts, Gaussians, Tables, Uniforms

from .round_trip import draw, random_words, round_trip

RNG = np.random.default_rng(0)


def tables(shape, symbols, zeros=0.0):
    probs = RNG.dirichlet(np.full(symbols, 0.5), shape)
    probs[RNG.random(probs.shape) < zeros] = 0
    probs[..., 0] += 1e-3
    return probs / probs.sum(-1, keepdims=True)


def gaussians(narrow):
    mean, std = RNG.normal(0, 40, (50, 6)), np.exp(RNG.normal(1, 2, (50, 6)))
    half = RNG.integers(1, 300, 6) * np.ones((50, 1), int)
    return Gaussians(mean, std, -half, half + 1, narrow)


CODECS = {
    "bernoulli": lambda: Bernoullis(*RNG.beta(0.3, 2, (2, 30, 20))),
    "bernoulli, sure": lambda: Bernoullis(np.array([0.0, 1.0, 0.5, 1e-200]), np.array([0.7, 0.0, 0.5, 1.0])),
    "table": lambda: Tables(tables((50, 4), 17)),
    "table with zeros": lambda: Tables(tables((200, 3), 6, zeros=0.6), low=-1),
    "table of one": lambda: Tables(np.ones((5, 1)), low=3),
    "uniform": lambda: Uniforms(RNG.integers(1, 2**24, 300)),
    "counts": lambda: Counts(tables((100,), 5)),
    "gaussian": lambda: gaussians(False),
    "narrow gaussian": lambda: gaussians(True),
    "constant": lambda: Constants(np.arange(5)),
    "none": lambda: Tables(np.ones((0, 3))),
}


@pytest.mark.parametrize("name", CODECS)
def test_popping_is_the_inverse_of_pushing(name):
    codec = CODECS[name]()
    for seed in range(3):
        value, _ = draw(codec, seed=seed)
        round_trip(codec, value)


def test_lengths_are_minus_log2_p():
    n = 20_000
    p = RNG.beta(0.3, 2, n)
    y = (RNG.random(n) < p).astype(int)
    probs = tables((n,), 9)
    which = np.minimum((probs.cumsum(-1) < RNG.random((n, 1))).sum(-1), 8)
    for codec, value, ideal in (
        (Bernoullis(1 - p, p), y, -np.log2(np.where(y, p, 1 - p)).sum()),
        (Bernoullis(3 - 3 * p, 3 * p), y, -np.log2(np.where(y, p, 1 - p)).sum()),
        (Tables(probs), which, -np.log2(np.take_along_axis(probs, which[:, None], -1)).sum()),
        (Uniforms(np.full(n, 1000)), which, n * np.log2(1000)),
    ):
        # 24 bits of precision, and a state of 32 to 64 bits of which the last few are rounded
        assert round_trip(codec, value) == pytest.approx(ideal, rel=3e-4, abs=3)


def test_draws_follow_the_probabilities():
    """A chi-square test of 4 degrees of freedom; false alarms: 1e-6."""
    n = 20_000
    p = np.array([0.5, 0.2, 0.0, 0.2, 0.1])
    value, _ = draw(Tables(np.tile(p, (n, 1))), words=4000)
    seen = np.bincount(value, minlength=5)
    assert seen[2] == 0
    assert ((seen - n * p)[p > 0] ** 2 / (n * p[p > 0])).sum() < 30.7


def test_a_million_symbols():
    p = RNG.beta(0.3, 2, 10**6)
    y = (RNG.random(10**6) < p).astype(int)
    assert round_trip(Bernoullis(1 - p, p), y) == pytest.approx(
        -np.log2(np.where(y, p, 1 - p)).sum(), rel=1e-4
    )


def test_counts_beyond_the_table():
    codec = Counts(np.tile([0.5, 0.49, 0.01], (4, 1)))
    round_trip(codec, np.array([0, 2, 3, 10**9]))


def test_a_gaussian_guide_stays_near_its_mean():
    """The probability of 2^-24 that every value of a range has is too much over a wide range."""
    shape = (20_000,)
    low, high = np.full(shape, -(2**19)), np.full(shape, 2**19)
    codec = Gaussians(np.full(shape, 1000.3), np.full(shape, 10.0), low, high, narrow=True)
    value, _ = draw(codec, words=8000)
    assert np.abs(value - 1000.3).max() < 130
    assert abs(value.mean() - 1000.3) < 5 * 10 / len(value) ** 0.5


@pytest.mark.parametrize(
    ("codec", "value", "place"),
    [
        (Bernoullis(np.ones((2, 2)), np.array([[1, 1], [0, 1]])), np.array([[1, 0], [1, 0]]), (1, 0)),
        (Bernoullis(np.ones(3), np.ones(3)), np.array([0, 1, 2]), (2,)),
        (Bernoullis(np.ones(3), np.ones(3)), np.array([0, 0.5, 1]), (1,)),
        (Bernoullis(np.ones(2), np.ones(2)), np.array([0, np.nan]), (1,)),
        (Tables(np.array([[0.5, 0.0, 0.5]])), np.array([1]), (0,)),
        (Tables(np.ones((2, 3))), np.array([2, -1]), (1,)),
        (Uniforms(np.array([4, 4])), np.array([3, 4]), (1,)),
        (Counts(np.ones((1, 3))), np.array([-1]), (0,)),
        (Constants(np.array([3, 4])), np.array([3, 5]), (1,)),
        (Gaussians(np.zeros(1), np.ones(1), np.array([-5]), np.array([5])), np.array([6]), (0,)),
    ],
)
def test_the_impossible_is_refused_before_the_stack_changes(codec, value, place):
    stack = Stack(random_words(20))
    with pytest.raises(Impossible) as caught:
        codec.push(stack, value)
    assert caught.value.place == place
    np.testing.assert_array_equal(stack.words(), random_words(20))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Bernoullis(np.array([x]), np.array([0.5])),
        lambda x: Tables(np.array([[0.5, x]])),
        lambda x: Gaussians(np.array([abs(x) * np.inf]), np.ones(1), np.array([0]), np.array([9])),
        lambda x: Gaussians(np.zeros(1), np.array([x]), np.array([0]), np.array([9])),
    ],
)
@pytest.mark.parametrize("x", [np.nan, np.inf, -1.0])
def test_what_is_no_distribution_is_refused(make, x):
    with pytest.raises(ValueError, match="expected"):
        make(x)


def test_an_empty_stack_is_not_zeros():
    """The coder itself would go on decoding zeros."""
    coins = Bernoullis(np.ones(100), np.ones(100))
    stack = Stack(random_words(5))
    coins.pop(stack)
    with pytest.raises(Underflow):
        coins.pop(stack)
    with pytest.raises(ValueError, match="at least two"):
        Stack(np.array([1], np.uint32))

"""Every pair of the tests' table is coded, at the length of its bound, or refused with the reason."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

pytest.importorskip("constriction")
from pyroelbo import Pair, evidence
from pyroelbo.coding import Stack, pair_codec
from pyroelbo.coding.pairs import grids_of
from tests.pairs import CONDITIONAL, TABLE

from .round_trip import random_words, round_trip

B = 4
# why a pair of the table cannot be coded
REASONS = "|".join(
    (
        "a density is no probability",
        "expected independent coordinates, got a",
        "expected a distribution without a mask",
        "expected one observed site without a mask",
        "expected terms of whole data, got a scale",
    )
)
CODED = (
    *("vae-bernoulli", "vae-logistic", "vae-categorical", "vae-conv", "vae-vamp", "vae-autoregressive"),
    *("vae-mixture-encoder", "hierarchy-bottom-up", "hierarchy-vamp", "hierarchy-top-down", "ladder"),
    *("ladder-vamp", "conv_ladder", "hmm-categorical", "hmm-bernoulli", "hmm-poisson", "hmm-mean-field"),
    *("bernoulli_mixture", "autoregressive-pixelcnn", "autoregressive-transformer", "strings", "conjugate"),
    *("masked_diffusion", "masked_diffusion-conv", "byte_vae", "byte_vae-few", "byte_vae-squared"),
    "vq_chain",
)
REFUSED = (
    *("vae-l2", "vae-flow", "vae-full-encoder", "flow", "flow-continuous", "ppca", "mixture", "hmm-gaussian"),
    *("state_space", "pcfg", "hierarchy-top-down-flow-encoder", "ladder-precision", "own", "diffusion"),
)


def make(name, rows=B):
    torch.manual_seed(3)
    new, data = TABLE[name]
    pair, y = new(), data(rows)
    with torch.no_grad():
        return pair, y.contiguous()


def codec_for(pair, y, method=None):
    grids = {} if pair.stepwise() is not None and method in (None, "direct") else grids_of(pair, [y])
    return pair_codec(pair, torch.zeros_like(y), grids, method)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_data_are_restored_or_refused(name):
    pair, y = make(name)
    try:
        codec_for(pair, y).draw(Stack(random_words(2000)))
    except ValueError as error:
        assert name not in CODED and re.search(REASONS, str(error)), error
        return
    assert name not in REFUSED
    more = pair.markov_links() is not None or name.startswith("hmm")
    methods = [None, "bits-back"] if more else [None]
    for method in methods:
        codec = codec_for(pair, y, method)
        round_trip(codec, y)
        drawn = codec.draw(Stack(random_words(2000)))
        assert drawn.shape == y.shape and drawn.dtype == y.dtype


@pytest.mark.parametrize("name", ["superpixel", "superpixel-independent", "experts-logistic"])
def test_data_given_something_cost_minus_the_elbo(name):
    """A z-test against the ELBO of other draws, at 1e-6 each, with .3 % for rounding."""
    torch.manual_seed(3)
    new, data = CONDITIONAL[name]
    pair, (*given, y) = new(), data(200)
    with torch.no_grad():
        terms = evidence.terms(pair, (*given, y), 20).log_weight
    codec = pair_codec(pair, torch.zeros_like(y), {}, given=tuple(given))
    assert codec.method == "bits-back"
    ideal = -float(terms.mean(0).sum()) / math.log(2)
    error = math.sqrt(float(terms.var(0).sum()) * (1 + 1 / 20)) / math.log(2)
    assert abs(round_trip(codec, y, words=4000) - ideal) < 4.9 * error + 0.003 * ideal
    other = tuple(part.flip(0) for part in given)
    flipped = codec.conditioned(other)
    round_trip(flipped, y.flip(0), words=4000)
    assert codec.given is not flipped.given


EXACT = ("autoregressive-pixelcnn", "autoregressive-transformer", "strings", "hmm-categorical")


@pytest.mark.parametrize("name", EXACT)
def test_exact_models_cost_minus_log2_p(name):
    pair, y = make(name, 40)
    codec = codec_for(pair, y)
    assert codec.method == "direct"
    with torch.no_grad():
        ideal = -float(pair.log_evidence(y).sum()) / math.log(2)
    assert round_trip(codec, y, y) == pytest.approx(2 * ideal, rel=1e-3, abs=1)


@pytest.mark.parametrize(
    ("name", "method"),
    [("hmm-categorical", "bits-back"), ("hmm-bernoulli", None), ("bernoulli_mixture", None)],
)
def test_an_exact_posterior_wastes_nothing(name, method):
    """ln p(y, z) - ln q(z | y) is ln p(y) for every z."""
    pair, y = make(name, 40)
    codec = codec_for(pair, y, method)
    with torch.no_grad():
        ideal = -float(pair.log_evidence(y).sum()) / math.log(2)
    assert round_trip(codec, y, y) == pytest.approx(2 * ideal, rel=1e-3, abs=1)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("vae-bernoulli", None),
        ("vae-vamp", None),
        ("vae-autoregressive", None),
        ("vae-mixture-encoder", None),
        ("hierarchy-bottom-up", "swap"),
        ("hierarchy-bottom-up", "bits-back"),
        ("ladder", None),
        ("hmm-mean-field", "bits-back"),
    ],
)
def test_the_net_length_is_minus_the_elbo(name, method):
    """A z-test against the ELBO of other draws, at 1e-6 each, with .3 % for rounding."""
    pair, y = make(name, 500)
    with torch.no_grad():
        terms = evidence.terms(pair, y, 20).log_weight
    codec = codec_for(pair, y, method)
    bits = round_trip(codec, y, y, words=4000)
    ideal = -2 * float(terms.mean(0).sum()) / math.log(2)
    # each code has one draw of ln w for a datum
    error = math.sqrt(float(terms.var(0).sum()) * (2 + 4 / 20)) / math.log(2)
    assert abs(bits - ideal) < 4.9 * error + 0.003 * ideal + 1


def test_masked_diffusion_costs_its_order_average():
    """A z-test of 2000 rows in 100 orders against all orders of other rows' draws, at 1e-6."""
    pair, y = make("masked_diffusion", 100)
    orders, every = pair.written_out(), y.repeat(20, 1)
    with torch.no_grad():
        log_w = evidence.terms(orders, y, 40).log_weight
    bits = round_trip(codec_for(pair, y), *every.split(100), words=4000)
    ideal = -20 * float(log_w.mean(0).sum()) / math.log(2)
    # one order a row in the code, the same in all chunks
    error = 20 * math.sqrt(float(log_w.var(0).sum()) * (1 + 1 / 40)) / math.log(2)
    assert abs(bits - ideal) < 4.9 * error + 1


def test_swapping_needs_the_bits_of_one_layer():
    pair, y = make("hierarchy-bottom-up")
    taken = {}
    for method in ("swap", "bits-back"):
        stack = Stack(random_words(1000))
        codec_for(pair, y, method).push(stack, y)
        taken[method] = Stack(random_words(1000)).bits - stack.lowest
    # latents of 3, 2 and 2 coordinates of some bits each
    assert taken["swap"] < 0.6 * taken["bits-back"]


@pytest.mark.parametrize("name", ["hierarchy-bottom-up", "ladder", "byte_vae", "autoregressive-pixelcnn"])
def test_the_bits_of_all_sites_are_those_of_the_code(name):
    pair, y = make(name)
    codec, stack = codec_for(pair, y), Stack(random_words(2000))
    before = stack.bits
    codec.push(stack, y)
    sites = {"y"} if name.startswith("auto") else {"y", *(f"z_{i + 1}" for i in range(pair.depth))}
    assert set(codec.bits) == sites and sum(codec.bits.values()) == stack.bits - before


@pytest.mark.parametrize("method", ["swap", "bits-back"])
def test_every_layer_of_a_deterministic_encoder_costs_its_own_term(method):
    """To .1 % of 400 data, and two bits for where the stack is read; nothing is popped."""
    pair, y = make("byte_vae", 400)
    with torch.no_grad():
        terms = evidence.terms(pair, y, 1).log_model
    codec, stack = codec_for(pair, y, method), Stack()
    codec.push(stack, y)
    for site, log_p in terms.items():
        assert codec.bits[site] == pytest.approx(-float(log_p.sum()) / math.log(2), rel=1e-3, abs=2)


def test_a_ladder_pops_all_latents_first():
    pair, y = make("ladder")
    assert pair.markov_links() is None
    with pytest.raises(ValueError, match="method: expected one of bits-back for this pair, got 'swap'"):
        codec_for(pair, y, "swap")


def test_a_datum_of_probability_zero_is_named():
    class Never(Pair):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.tensor([0.0, -math.inf]))

        def model(self, y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Bernoulli(0.5))
                pyro.sample("y", dist.Bernoulli(logits=self.logits.expand(len(z), 2)).to_event(1), obs=y)

        def guide(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("z", dist.Bernoulli(torch.full((len(y),), 0.5)))

    pair, y = Never(), torch.zeros(3, 2)
    codec = pair_codec(pair, torch.zeros(3, 2), {})
    round_trip(codec, y)
    y[2, 1] = 1
    with pytest.raises(ValueError, match="positive probability, got 1") as caught:
        codec.push(Stack(random_words(100)), y)
    assert caught.value.site == "y" and caught.value.row == 2


def test_a_model_that_feeds_its_data_forward_is_refused():
    class Fed(Pair):
        def model(self, y):
            with pyro.plate("data", len(y)):
                shifted = torch.cat([torch.zeros(len(y), 1), y[:, :-1]], 1)
                pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * shifted).to_event(1), obs=y)

        def guide(self, y):
            pass

    with pytest.raises(ValueError, match="feeds its observations forward"):
        pair_codec(Fed(), torch.zeros(8, 20), {})


def test_networks_of_another_batch_size_give_other_numbers():
    """Why a chunk has one size: pushing in one and popping in another would be garbage in most cases."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(784, 200), torch.nn.Tanh(), torch.nn.Linear(200, 784)
    ).float()
    y = torch.rand(256, 784, dtype=torch.float32)
    with torch.no_grad():
        together, alone = network(y), torch.cat([network(row) for row in y.split(1)])
    torch.testing.assert_close(together, alone)
    if np.array_equal(together.numpy(), alone.numpy()):
        pytest.skip("not on this machine")


def test_a_shorter_last_chunk():
    pair, y = make("autoregressive-transformer", 7)
    codec = codec_for(pair, y)
    round_trip(codec.part(3), y[:3])
    assert codec_for(*make("vae-bernoulli")).part(3) is None


@pytest.mark.parametrize("dim", [-1, -2])
def test_plates_within_a_datum(dim):
    """The data's plate on the right and on the left of the coordinates'; observed is a view of the data."""

    def plates(y):
        return pyro.plate("data", len(y), dim=dim), pyro.plate("coordinates", 3, dim=-3 - dim)

    def model(y):
        data, coordinates = plates(y)
        with data, coordinates:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)), obs=seen(y))

    def seen(y):
        return y.T if dim == -1 else y

    def guide(y):
        data, coordinates = plates(y)
        with data, coordinates:
            pyro.sample("z", dist.Normal(seen(y) / 3.0, 0.7))

    y = torch.randint(3, (5, 3))
    codec = codec_for(Pair.of(model, guide), y)
    round_trip(codec, y)
    y[4, 1] = 3
    with pytest.raises(ValueError, match="positive probability, got 3") as caught:
        codec.push(Stack(random_words(100)), y)
    assert caught.value.row == 4


def test_pairs_of_plain_functions():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Poisson(z.exp()), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Laplace((y + 0.5).log(), 0.3))

    y = torch.tensor([0.0, 3, 1, 50])
    round_trip(codec_for(Pair.of(model, guide), y), y)

"""The sentence VAE: all texts have probability one together, one pass and one word at a time agree, padding
and neighbours do not matter, and what is weak about a decoder is where it says."""

import itertools
import math
import re

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Normal

from pyroelbo import Pair, data, evidence, fit, models
from pyroelbo.coding import codec_of
from pyroelbo.compiled import CompiledStep
from pyroelbo.models import SentenceVAE
from pyroelbo.models.sentences import Written
from pyroelbo.nn import CausalGRU, CausalWindow
from pyroelbo.training.step import EagerStep
from tests.coding.round_trip import round_trip
from tests.pairs import texts

LENGTH, SYMBOLS = 3, 2
EVERY = torch.tensor(
    [
        [*word, *[-1] * (LENGTH - len(word))]
        for n in range(LENGTH + 1)
        for word in itertools.product(range(SYMBOLS), repeat=n)
    ]
)
MAKE = {
    "gru": lambda skip: CausalGRU(SYMBOLS + 1, 4, 2, skip),
    "window": lambda skip: CausalWindow(SYMBOLS + 1, 4, 2, skip, reach=2),
}
KINDS = list(itertools.product(MAKE, (False, True)))


def network(kind, skip):
    torch.manual_seed(3)
    made = MAKE[kind](skip)
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(2)
    return made.requires_grad_(False)


@torch.no_grad()
def by_hand(net, row, z):
    """ln p of a text by the network's steps, in plain Python."""
    cache, total = net.begin(torch.Size([1]), None if z is None else z[None]), 0.0
    for place in range(LENGTH):
        word = int(row[place])
        total += float(net.step(cache).log_softmax(-1)[0, word])
        if word < 0:
            break
        cache = net.append(cache, torch.tensor([word]))
    return total


@pytest.mark.parametrize(("kind", "skip"), KINDS)
def test_all_texts_together_have_probability_one_word_by_word(kind, skip):
    net, z = network(kind, skip), torch.randn(4, 1, 2)
    p = Written(net, z, LENGTH)
    log_p = p.log_prob(EVERY)
    assert log_p.shape == (4, len(EVERY))
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(4))
    expected = torch.tensor([[by_hand(net, row, c[0]) for row in EVERY] for c in z])
    torch.testing.assert_close(log_p, expected)
    torch.testing.assert_close(p.by_word(EVERY).sum(-1), log_p)
    assert (p.by_word(torch.tensor([[0, -1, -1]]))[..., 2] == 0).all()
    for row in ([-1, 1, -1], [0, 2, -1], [-2, -1, -1], [0, 0.5, -1]):  # no text, or none of these words
        assert (p.log_prob(torch.tensor([row])) == -math.inf).all()


@pytest.mark.parametrize(("kind", "skip"), KINDS)
def test_draws_have_these_probabilities(kind, skip):
    p = Written(network(kind, skip), torch.randn(2), LENGTH)
    drawn, n = p.sample((20_000,)), 20_000
    assert drawn.shape == (n, LENGTH)
    counts = (drawn[:, None] == EVERY).all(-1).double().sum(0)
    expected = n * p.log_prob(EVERY).exp()
    assert counts.sum() == n
    # false alarms: 15 counts beyond 5 standard errors, 1e-5 (and small counts are Poisson: 3 beside)
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 3).all()
    greedy = Written(p.network, torch.randn(3, 5, 2), LENGTH).greedy()
    assert greedy.shape == (3, 5, LENGTH)


@pytest.mark.parametrize(("kind", "skip"), KINDS)
def test_texts_are_coded_word_by_word(kind, skip):
    net, z = network(kind, skip), torch.randn(len(EVERY), 2)
    p = Written(net, z, LENGTH)
    bits = round_trip(codec_of(p, torch.long), EVERY)
    assert bits == pytest.approx(-float(p.log_prob(EVERY).sum()) / math.log(2), abs=40)  # of one word


@pytest.mark.parametrize("make", [CausalGRU, CausalWindow])
def test_without_a_context_it_is_a_language_model(make):
    torch.manual_seed(3)
    net = make(SYMBOLS + 1, 4, skip=True)
    log_p = models.Strings(LENGTH, SYMBOLS, net).log_evidence(EVERY).detach()
    assert float(log_p.exp().sum()) == pytest.approx(1)
    torch.testing.assert_close(log_p, torch.tensor([by_hand(net, row, None) for row in EVERY]))


def small(**settings):
    torch.manual_seed(1)
    return SentenceVAE(5, 3, 2, 8, **settings)


def test_the_length_of_neighbours_does_not_matter():
    pair, y = small().eval(), texts(12, 5, 3)
    together = pair.encode(y)
    z = torch.randn(12, 2)
    log_p = pair.observation(z).log_prob(y)
    for i in range(12):
        alone = pair.encode(y[i : i + 1])
        torch.testing.assert_close(alone.mean[0], together.mean[i])
        torch.testing.assert_close(pair.observation(z[i]).log_prob(y[i]), log_p[i])
    mean = pair.encode(torch.tensor([[-1] * 5])).mean  # no word at all: the stop is read
    assert torch.isfinite(mean).all()


def test_the_bound_is_the_written_sum():
    pair, y = small(), texts(6, 5, 3)
    pyro.set_rng_seed(4)
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)
    pyro.set_rng_seed(4)
    q = pair.encode(y)
    z = q.rsample()
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    expected = -(prior + pair.observation(z).log_prob(y) - q.log_prob(z)).sum()
    torch.testing.assert_close(loss, expected)


def test_evidence_of_short_texts_sums_to_one():
    """Σ_y p(y) over all texts by quadrature of the latent: the pair is a distribution over texts."""
    torch.manual_seed(0)
    pair = SentenceVAE(LENGTH, SYMBOLS, 1, 4)
    total = evidence.quadrature(pair, EVERY).value.exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_compiled_and_eager_steps_agree():
    y, steps = texts(6, 5, 3), []
    for make, settings in ((EagerStep, {}), (CompiledStep, {"backend": "eager"})):
        pair = small(skip=True)
        step = make(Trace_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), lr=0.01, **settings)
        pyro.set_rng_seed(5)
        steps.append([float(step(y)) for _ in range(4)])
    assert steps[0] == pytest.approx(steps[1], rel=1e-9)


def test_words_are_hidden_in_training_alone():
    pair, y = small(word_dropout=0.5), texts(8, 5, 3)
    p = pair.observation(torch.randn(8, 2))
    pair.eval()
    torch.testing.assert_close(p.log_prob(y), p.log_prob(y))
    assert (p.log_prob(y) == p.log_prob(y)).all()
    pair.train()
    assert (p.log_prob(y) != p.log_prob(y)).any()
    hidden = CausalGRU(4, 8, word_dropout=1.0)
    swapped = (y.clamp_min(0) + 1) % 3
    torch.testing.assert_close(hidden(swapped), hidden(y.clamp_min(0)))  # bar the start, nothing is seen
    torch.testing.assert_close(hidden.eval()(y.clamp_min(0)), hidden(y.clamp_min(0)))


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_a_window_sees_its_words_and_the_context(reach):
    net = CausalWindow(5, 6, 2, reach=reach)
    y, z = torch.randint(5, (1, 6)), torch.randn(1, 2)
    for place in range(6):
        changed = y.clone()
        changed[0, place] = (changed[0, place] + 1) % 5
        seen = (net(y, z) != net(changed, z)).any(-1)[0].nonzero().flatten().tolist()
        assert seen == list(range(place + 1, min(place + reach, 5) + 1))
    assert (net(y, z) != net(y, z + 1)).any(-1).all()


def test_pseudo_inputs_start_as_texts():
    pair, y = small(prior="vamp", components=4), texts(9, 5, 3)
    pair.prior.noise = 0.0
    pair.initialize(y)
    rows = pair.encoder.embedded(y)
    for u in pair.prior.pseudo_inputs:
        assert (u == rows).all(-1).all(-1).any()
    q = pair.prior()
    full = torch.randint(3, (1, 5))  # as long as a pseudo-input: the encoder reads both to the end
    with torch.no_grad():
        pair.prior.pseudo_inputs.copy_(pair.encoder.embedded(full).expand(4, -1, -1))
    z = torch.randn(1, 2)
    torch.testing.assert_close(pair.prior().log_prob(z), pair.encode(full).log_prob(z))
    assert q.event_shape == (2,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: small().encode(texts(2, 6, 3)),
            r"y: expected texts \[B, 5\] of at most 5 words, .* \(2, 6\)",
        ),
        (lambda: fit(small(), texts(2, 6, 3), progress=False), "y: expected texts .*of another length"),
        (
            lambda: small().encode(torch.tensor([[0, 3, -1, -1, -1]])),
            r"in \[-1, 2\], got 3 at row 0, place 1",
        ),
        (lambda: small().encode(torch.tensor([[0, -1, 1, -1, -1]])), "that string ends at place 1"),
        (lambda: small().observation(torch.zeros(2)).log_prob(torch.zeros(4)), "expected 5 tokens, got 4"),
        (lambda: small(network="lstm"), r"network: expected one of \('gru', 'window'\), got 'lstm'"),
        (lambda: SentenceVAE(0, 3), "length: expected a positive number, got 0"),
        (lambda: small(word_dropout=1.5), "word_dropout: expected a probability, got 1.5"),
        (lambda: small(network="window", reach=0), "reach: expected a positive number of tokens, got 0"),
        (
            lambda: small(prior="vamp", components=5).initialize(texts(4, 5, 3)),
            "components: expected at most one pseudo-input for each of the 4 data, got 5",
        ),
        (lambda: evidence.iwae(small(), texts(2, 5, 3), particles=0), "particles: expected a positive"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert re.search(message, str(error.value))


def test_the_command_line_builds_it_for_words():
    lines = data.Dataset("x", "sentences", (), {"train": texts(9, 5, 3)}, 3, 5)
    pair = models.build("sentence_vae", lines, {"latent": 3, "width": 8, "prior": "vamp", "components": 2})
    assert isinstance(pair, Pair) and (pair.length, pair.symbols, pair.latent) == (5, 3, 3)

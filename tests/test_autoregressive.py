"""Autoregressive chains: every prefix a site, the bound exact, one pass, the cache and the literal chain agree."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

from pyroelbo import audit, data, evidence, fit
from pyroelbo.causal import CausalTransformer, PixelCNN
from pyroelbo.models.autoregressive import Append, Autoregressive, Prefix
from pyroelbo.models.markov import Chain
from pyroelbo.objectives import Exact_ELBO
from pyroelbo.terms import Evaluator
from tests.pairs import TABLE


def pixelcnn(shape=(3, 4), symbols=3):
    torch.manual_seed(0)
    net = PixelCNN(symbols, shape, 6, 3)
    return Autoregressive(shape, symbols, "categorical", net)


def transformer(length=7, symbols=3):
    torch.manual_seed(0)
    net = CausalTransformer(symbols, length, 8, 2, 2)
    nn.init.normal_(net.places)
    nn.init.normal_(net.embed.weight)
    return Autoregressive(length, symbols, "categorical", net)


MAKE = {"pixelcnn": pixelcnn, "transformer": transformer}


def tokens(pair, n):
    return torch.randint(pair.symbols, (n, pair.length))


class First(nn.Module):
    """p(z_N): the first token."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self):
        nothing = torch.zeros(1, self.net.length, dtype=torch.long)
        return Append(nothing[0, :0], self.net(nothing)[0, 0])


class Next(First):
    """p(z_{l-1} | z_l): the network on the prefix alone, filled up with anything."""

    def __init__(self, net, filler):
        super().__init__(net)
        self.filler = filler

    def forward(self, prefix):
        rest = self.net.length - prefix.shape[-1]
        full = torch.cat([prefix, prefix.new_full((*prefix.shape[:-1], rest), self.filler)], -1)
        return Append(prefix, self.net(full)[..., prefix.shape[-1], :])


class DropLast(nn.Module):
    """q(z_l | z_{l-1}): all mass on the sequence without its last token."""

    def forward(self, below):
        return Prefix(below[..., :-1])


@pytest.mark.parametrize("filler", [0, 2])
def test_one_pass_is_the_literal_chain_site_by_site(filler):
    pair = transformer()
    net, length = pair.generator, pair.length
    literal = Chain(
        First(net),
        [Next(net, filler) for _ in range(length - 2)],
        Next(net, filler),
        [DropLast() for _ in range(length - 1)],
        event=(length,),
    )
    y = tokens(pair, 5)
    one, other = Evaluator(literal, y).draw(2), Evaluator(pair, y).draw(2)
    assert literal.sites == pair.sites and set(other.log_model) == {*pair.sites, "y"}
    for name in other.log_model:
        torch.testing.assert_close(other.log_model[name], one.log_model[name])
    for name in pair.sites:
        assert torch.equal(other.latents[name], one.latents[name].expand_as(other.latents[name]))
    torch.testing.assert_close(one.log_weight, pair.log_evidence(y).expand(2, 5))


@pytest.mark.parametrize("name", MAKE)
def test_the_bound_is_the_likelihood_and_each_site_has_its_term(name):
    pair = MAKE[name]()
    y = tokens(pair, 4)
    log_p = pair.logits(y).log_softmax(-1)
    terms = Evaluator(pair, y).draw(3)
    for t, site in enumerate((*pair.sites, "y")):
        own = log_p[:, t].gather(-1, y[:, t : t + 1])[:, 0]
        torch.testing.assert_close(terms.log_model[site], own.expand(3, 4))
    torch.testing.assert_close(terms.log_weight, pair.log_evidence(y).expand(3, 4), atol=1e-6, rtol=0)
    for loss in (Trace_ELBO(), Exact_ELBO()):
        value = loss.differentiable_loss(pair.model, pair.guide, y)
        torch.testing.assert_close(value, -pair.log_evidence(y).sum(), atol=1e-6, rtol=0)
    exact = torch.autograd.grad(pair.log_evidence(y).sum(), list(pair.parameters()))
    found = torch.autograd.grad(
        Exact_ELBO().differentiable_loss(pair.model, pair.guide, y), list(pair.parameters())
    )
    for a, b in zip(exact, found, strict=True):
        torch.testing.assert_close(a, -b)


@pytest.mark.parametrize("name", MAKE)
def test_the_probabilities_of_all_sequences_sum_to_one(name):
    pair = pixelcnn((2, 3), 2) if name == "pixelcnn" else transformer(6, 2)
    every = torch.tensor(list(itertools.product(range(2), repeat=6)))
    assert float(pair.log_evidence(every).exp().sum().detach()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", MAKE)
def test_nothing_looks_ahead_and_everything_behind_is_seen(name):
    pair = MAKE[name]() if name == "transformer" else pixelcnn((4, 5))
    y = tokens(pair, 3)
    before = pair.logits(y)
    for t in range(pair.length):
        other = y.clone()
        other[:, t] = (other[:, t] + 1) % pair.symbols
        changed = (pair.logits(other) != before).any(-1).any(0)
        assert not changed[: t + 1].any()
        assert changed[t + 1 :].all()  # no blind spot within the reach of three layers


@pytest.mark.parametrize("name", MAKE)
def test_one_token_at_a_time_gives_the_logits_of_one_pass(name):
    pair = MAKE[name]()
    y, net = tokens(pair, 6), pair.generator
    cache, found = net.begin(torch.Size([2, 3])), []
    with torch.no_grad():
        for t in range(pair.length):
            found.append(net.step(cache))
            cache = net.append(cache, y.reshape(2, 3, -1)[..., t])
    torch.testing.assert_close(torch.stack(found, -2).reshape(6, -1, pair.symbols), pair.logits(y).detach())


@pytest.mark.parametrize("name", MAKE)
def test_samples_come_from_the_model(name):
    """Pearson's test of 4,000 simulated sequences of 4 binary tokens; false-alarm rate 1e-5."""
    pair = pixelcnn((2, 2), 2) if name == "pixelcnn" else transformer(4, 2)
    latents, y = pair.simulate(4000)
    assert latents["z_1"].shape == (4000, 3) and torch.equal(latents["z_2"], y[:, :2])
    every = torch.tensor(list(itertools.product(range(2), repeat=4)))
    expected = 4000 * pair.log_evidence(every).exp().detach()
    place = (y.long() * torch.tensor([8, 4, 2, 1])).sum(-1)
    statistic = ((torch.bincount(place, minlength=16) - expected).square() / expected).sum()
    assert float(statistic) < 48.0  # chi-squared of 15 degrees beyond 48: 2.6e-5


def test_a_draw_that_is_no_prefix_has_probability_zero():
    pair = transformer()
    y = tokens(pair, 3)
    terms = Evaluator(pair, y).draw(1)
    latents = dict(terms.latents)
    latents["z_3"] = (latents["z_3"] + 1) % 3
    again = Evaluator(pair, y).terms(latents)
    assert (again.log_joint == -math.inf).all() and (again.log_guide["z_3"] == -math.inf).all()
    # Prefixes that come without the guide, from a copy, are scored by the cache and give the same numbers.
    copies = {k: v.clone() for k, v in terms.latents.items()}
    torch.testing.assert_close(Evaluator(pair, y).terms(copies).log_joint, terms.log_joint)


def test_an_autoregressive_pair_trains_and_audits():
    pair = Autoregressive((3, 3), levels=17, width=8, layers=2)
    y = data.load("digits", form="binary")["train"][:60].reshape(-1, 8, 8)[:, 2:5, 3:6].flatten(1)
    run = fit(pair, y, epochs=4, batch_size=20, progress=False)
    assert run.losses[-1] < run.losses[0]
    a = audit(pair, y[:5], particles=8)
    assert a["exact"].kind == "exact" and a["elbo"].mean == pytest.approx(a["exact"].mean, abs=1e-6)
    assert evidence.exact(pair, y[:5]).mean == pytest.approx(a["exact"].mean)


def test_replay_under_another_grad_mode_is_scored_anew():
    pair = transformer()
    y = tokens(pair, 3)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    torch.testing.assert_close(model.log_prob_sum(), pair.log_evidence(y).sum())
    assert model.log_prob_sum().requires_grad


def test_text_in_rows():
    rows, alphabet = data.windows("to be or not", 5)
    assert alphabet == " benort" and rows.shape == (2, 5)
    assert "".join(alphabet[i] for i in rows[0]) == "to be"
    again, _ = data.windows(b"to be or", 4, b"abcdefghijklmnopqrstuvwxyz ")
    assert again.tolist() == [[19, 14, 26, 1], [4, 26, 14, 17]]
    with pytest.raises(TypeError, match="take one kind"):
        data.windows("a", 1, b"a")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Autoregressive(8, likelihood="l2"), "likelihood takes 'bernoulli' or 'categorical'"),
        (lambda: Autoregressive(8), r"shape takes \(height, width\), got \(8,\)"),
        (lambda: Autoregressive((2, 2), network="lstm"), "network takes one of"),
        (lambda: Autoregressive(8, network="transformer", width=30), "width takes a multiple of heads"),
        (lambda: Autoregressive(1, network="transformer"), "at least 2 tokens"),
        (lambda: transformer().model(torch.zeros(2, 5)), r"y has shape \(2, 5\): this model takes \[B, 7\]"),
        (lambda: evidence.exact(transformer(), torch.full((2, 7), 3)).value, "takes values in"),
        (lambda: fit(transformer(), torch.full((2, 7), -1), epochs=1), "takes values in"),
        (lambda: evidence.exact(transformer(), torch.full((2, 7), 0.5)), "y holds 0.5: .* integers"),
        (
            lambda: data.windows("abc!", 2, "abc"),
            "text has '!' at place 3, which the alphabet of 3 symbols lacks",
        ),
        (lambda: data.windows(b"ab", 3), "length takes 1 to the 2 symbols of text, got 3"),
        (lambda: CausalTransformer(3, 4)(torch.zeros(1, 5).long()), "has places for 4 tokens, got 5"),
    ],
)
def test_bad_input_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_pyro_does_not_see_the_prefix_as_random():
    y = torch.arange(6).reshape(2, 3)
    with pyro.plate("data", 2):
        z = pyro.sample("z", Prefix(y[:, :2]))
    assert z.data_ptr() == y.data_ptr()
    assert (Prefix(y[:, :2]).log_prob(y[:, 1:]) == -math.inf).all()
    link = Append(torch.tensor([1]), torch.zeros(3))
    values = torch.tensor([[1.0, 2.0], [1.0, 3.0], [1.0, 0.5], [0.0, 2.0], [1.0, -1.0]])
    torch.testing.assert_close(link.log_prob(values).exp(), torch.tensor([1 / 3, 0.0, 0.0, 0.0, 0.0]))


def test_the_evidence_in_blocks_is_the_evidence(monkeypatch):
    make, draw = TABLE["autoregressive-pixelcnn"]
    pair, y = make(), draw(7)
    whole = pair.log_evidence(y)
    monkeypatch.setattr("pyroelbo.models.autoregressive._ROWS", 3)
    with torch.no_grad():
        torch.testing.assert_close(pair.log_evidence(y), whole.detach(), rtol=1e-12, atol=1e-12)
        assert pair.log_evidence(y[:0]).shape == (0,)

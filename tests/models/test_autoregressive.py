"""Autoregressive chains: every prefix a site, the bound exact, one pass, the cache and the literal chain
agree."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroelbo import audit, data, evidence, fit
from pyroelbo.compiled import CompiledELBO, CompiledStep, FusedOptim, step
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models.autoregressive import Append, Autoregressive, Prefix, Strings
from pyroelbo.models.chain import Chain
from pyroelbo.nn.causal import CausalTransformer, PixelCNN
from pyroelbo.objectives import Exact_ELBO
from pyroelbo.training.step import EagerStep
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
    one, other = Evaluator(literal, y).sample_pass(2), Evaluator(pair, y).sample_pass(2)
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
    terms = Evaluator(pair, y).sample_pass(3)
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
    terms = Evaluator(pair, y).sample_pass(1)
    latents = dict(terms.latents)
    latents["z_3"] = (latents["z_3"] + 1) % 3
    again = Evaluator(pair, y).terms(latents)
    assert (again.log_joint == -math.inf).all() and (again.log_guide["z_3"] == -math.inf).all()
    # Prefixes that come without the guide, from a copy, are scored by the cache and give the same numbers.
    copies = {k: v.clone() for k, v in terms.latents.items()}
    torch.testing.assert_close(Evaluator(pair, y).terms(copies).log_joint, terms.log_joint)


def test_an_autoregressive_pair_trains_and_audits():
    pair = Autoregressive((3, 3), levels=17, width=8, layers=2)
    y = data.load("digits", "binary")["train"][:60].reshape(-1, 8, 8)[:, 2:5, 3:6].flatten(1)
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


# ------------------------------------------------------------------------------------------ strings


def strings(length=5, symbols=3):
    torch.manual_seed(0)
    net = CausalTransformer(symbols + 1, length, 8, 2, 2)
    nn.init.normal_(net.places)
    nn.init.normal_(net.embed.weight)
    return Strings(length, symbols, net)


def every_string(length, symbols):
    """All strings of 0 to ``length`` symbols, as tuples."""
    return [s for n in range(length + 1) for s in itertools.product(range(symbols), repeat=n)]


def padded(listed, length):
    return torch.tensor([[*s, *[-1] * (length - len(s))] for s in listed])


def by_hand(pair, string):
    """ln p of one string, token by token, from the network on that string alone, and the last of it the
    stop's."""
    tokens = torch.tensor([string], dtype=torch.long)
    terms = []
    for t in range(min(len(string) + 1, pair.length)):
        filled = torch.cat([tokens[:, :t], torch.zeros(1, pair.length - t, dtype=torch.long)], 1)
        logits = pair.generator(filled)[0, t].log_softmax(-1)
        terms.append(logits[string[t]] if t < len(string) else logits[-1])
    return torch.stack(terms)


def test_the_probabilities_of_all_strings_sum_to_one():
    pair = strings(4, 2)
    listed = every_string(4, 2)
    p = pair.log_evidence(padded(listed, 4)).exp().detach()
    assert len(listed) == 31 and float(p.sum()) == pytest.approx(1, abs=1e-12)
    # The strings of up to two symbols, and what goes on: prefixes of two that do not stop.
    short = sum(float(p[i]) for i, s in enumerate(listed) if len(s) <= 2)
    tail = 0.0
    for prefix in itertools.product(range(2), repeat=2):
        terms = by_hand(pair, prefix)
        tail += float((terms[:2].sum().exp() * (1 - terms[2].exp())).detach())
    assert short + tail == pytest.approx(1, abs=1e-12) and 0.01 < tail < 0.99


def test_a_strings_bound_is_its_likelihood_in_any_padded_batch():
    pair = strings()
    listed = [(), (0,), (2, 1), (1, 1, 0, 2), (2, 0, 1, 0, 2)]
    y = padded(listed, 5)
    terms = Evaluator(pair, y).sample_pass(3)
    exact = torch.stack([by_hand(pair, s).sum() for s in listed])
    torch.testing.assert_close(pair.log_evidence(y), exact, atol=1e-10, rtol=0)
    torch.testing.assert_close(terms.log_weight, exact.expand(3, 5), atol=1e-6, rtol=0)
    for row, string in enumerate(listed):
        own = by_hand(pair, string)
        for t, site in enumerate((*pair.sites, "y")):
            found = terms.log_model[site][:, row]
            if t < len(own):
                torch.testing.assert_close(found, own[t].expand(3))
            else:
                assert (found == 0).all()  # padding, to the last bit
    # By the cache, from copies of the prefixes, as well.
    copies = {k: v.clone() for k, v in terms.latents.items()}
    torch.testing.assert_close(Evaluator(pair, y).terms(copies).log_joint, terms.log_joint)
    exact_slope = torch.autograd.grad(pair.log_evidence(y).sum(), list(pair.parameters()))
    for loss in (Trace_ELBO(), Exact_ELBO()):
        value = loss.differentiable_loss(pair.model, pair.guide, y)
        torch.testing.assert_close(value, -exact.sum())
        for a, b in zip(torch.autograd.grad(value, list(pair.parameters())), exact_slope, strict=True):
            torch.testing.assert_close(a, -b)


def test_strings_are_drawn_until_the_last_has_ended(monkeypatch):
    """Pearson's test of 4,000 strings of up to three binary symbols; false-alarm rate 1e-5."""
    pair = strings(3, 2)
    _, y = pair.simulate(4000)
    assert not y.is_floating_point()
    listed = every_string(3, 2)
    expected = 4000 * pair.log_evidence(padded(listed, 3)).exp().detach()
    values, times = y.unique(dim=0, return_counts=True)
    place = {tuple(row): i for i, row in enumerate(padded(listed, 3).tolist())}
    counts = torch.zeros(len(listed))
    for row, count in zip(values.tolist(), times.tolist(), strict=True):
        counts[place[tuple(row)]] = count
    assert float(((counts - expected).square() / expected).sum()) < 46.0  # 14 degrees beyond 46: 2.7e-5
    calls = []
    net = pair.generator
    step = net.step
    monkeypatch.setattr(net, "step", lambda cache: calls.append(1) or step(cache))
    with torch.no_grad():
        net.head.bias[-1] = 60.0  # nothing but empty strings
        y = (
            poutine.trace(poutine.uncondition(pair.model))
            .get_trace(padded([(0,)] * 50, 3))
            .nodes["y"]["value"]
        )
    assert (y == -1).all() and len(calls) == 1


def test_strings_train_compile_and_audit():
    y, alphabet = data.strings(["to", "be", "or", "not", "to", "be", "that", "is", "the", "question"])
    pair = Strings(y.shape[1], len(alphabet), width=16, layers=1)
    run = fit(pair, y, epochs=20, batch_size=5, learning_rate=0.01, progress=False)
    assert run.losses[-1] < 0.7 * run.losses[0]
    a = audit(pair, y, particles=4)
    assert a["elbo"].mean == pytest.approx(a["exact"].mean, abs=1e-6)
    step = CompiledStep(Exact_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), backend="eager")
    with pyro.validation_enabled(False):
        for _ in range(3):
            step(y)
    assert step.counters.compiled_calls == 3 and step.counters.fallbacks == 0


def test_texts_as_rows():
    y, alphabet = data.strings(["be", "", "bee"])
    assert alphabet == "be" and y.tolist() == [[0, 1, -1], [-1, -1, -1], [0, 1, 1]]
    y, _ = data.strings([b"\x00\xff"], 3, bytes(range(256)))
    assert y.tolist() == [[0, 255, -1]]
    for bad, message in (
        ("be", r"texts: expected a list of texts, got one str; windows\(\) cuts one text into rows"),
        (["a", b"a"], "texts: expected all str or all bytes, got bytes and str"),
        ([3], "texts: expected all str or all bytes, got int"),
    ):
        with pytest.raises(TypeError, match=message):
            data.strings(bad)


def test_text_in_rows():
    rows, alphabet = data.windows("to be or not", 5)
    assert alphabet == " benort" and rows.shape == (2, 5)
    assert "".join(alphabet[i] for i in rows[0]) == "to be"
    again, _ = data.windows(b"to be or", 4, b"abcdefghijklmnopqrstuvwxyz ")
    assert again.tolist() == [[19, 14, 26, 1], [4, 26, 14, 17]]
    with pytest.raises(TypeError, match="alphabet: expected str as text, got bytes"):
        data.windows("a", 1, b"a")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Autoregressive(8, likelihood="l2"),
            "likelihood: expected 'bernoulli' or 'categorical', got 'l2'",
        ),
        (
            lambda: Autoregressive(8),
            r"shape: expected \(height, width\) of images, got \(8,\); use network='transformer' for",
        ),
        (
            lambda: Autoregressive((2, 2), network="lstm"),
            r"network: expected one of \('pixelcnn', 'transformer'\) or a module, got 'lstm'",
        ),
        (
            lambda: Autoregressive(8, network="transformer", width=30),
            "width: expected a multiple of heads=4, got 30",
        ),
        (lambda: Autoregressive(8, network="transformer", width=0), "width: expected a positive number"),
        (lambda: Autoregressive((2, 2), width=0), "width: expected a positive number of channels, got 0"),
        (lambda: Autoregressive((2, 2), layers=0), "layers: expected a positive number of layers, got 0"),
        (lambda: Autoregressive(1, network="transformer"), "at least 2 tokens"),
        (lambda: transformer().model(torch.zeros(2, 5)), r"y: expected shape \[B, 7\], got \(2, 5\)"),
        (
            lambda: evidence.exact(transformer(), torch.full((2, 7), 3)).value,
            r"y: expected integers in \[0, 2\], got 3 at row 0, place 0",
        ),
        (
            lambda: fit(transformer(), torch.full((2, 7), -1), epochs=1),
            r"y: expected integers in \[0, 2\], got -1 at row 0, place 0",
        ),
        (
            lambda: evidence.exact(transformer(), torch.full((2, 7), 0.5)),
            r"y: expected integers in \[0, 2\], got 0\.5 at row 0, place 0",
        ),
        (
            lambda: evidence.exact(strings(), padded([(1,), (2, 3)], 5)),
            r"y: expected integers in \[-1, 2\], got 3 at row 1, place 1",
        ),
        (
            lambda: evidence.exact(strings(), padded([(1, -1, 2)], 5)),
            "y: expected only -1 after the first -1 of a row, got 2 at row 0, place 2; that",
        ),
        (
            lambda: fit(strings(), padded([(1,), (7,)], 5), epochs=1),
            r"y: expected integers in \[-1, 2\], got 7 at row 1, place 0",
        ),
        (
            lambda: strings().log_evidence(padded([(1,), (7,)], 5)),
            r"y: expected integers in \[-1, 2\], got 7 at row 1, place 0",
        ),
        (lambda: Strings(1, 3), "length: expected a whole number of at least 2 symbols, got 1"),
        (
            lambda: evidence.exact(strings(), padded([(1,)] * 300 + [(0, 9)], 5)),
            r"y: expected integers in \[-1, 2\], got 9 at row 300, place 1",
        ),
        (lambda: strings().model(padded([(1,)], 4)), r"y: expected shape \[B, 5\], got \(1, 4\)"),
        (lambda: Strings(5, 0), "symbols: expected a positive number of symbols, got 0"),
        (
            lambda: data.strings(["ab", "ac!"], alphabet="abc"),
            r"texts\[1\]: expected symbols of the alphabet of 3, got '!' at place 2",
        ),
        (
            lambda: data.strings(["ab", "abcd"], 3),
            r"length: expected at least 4, the symbols of texts\[1\], got 3",
        ),
        (lambda: data.strings([]), "texts: expected at least one text, got none"),
        (
            lambda: data.windows("abc!", 2, "abc"),
            "text: expected symbols of the alphabet of 3, got '!' at place 3",
        ),
        (lambda: data.windows(b"ab", 3), "length: expected 1 to 2, the symbols of text, got 3"),
        (
            lambda: CausalTransformer(3, 4)(torch.zeros(1, 5).long()),
            "tokens: expected at most 4 of them, got 5",
        ),
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
        y[5, 2] = 2
        with pytest.raises(ValueError, match=r"y: expected integers in \[0, 1\], got 2 at row 5, place 2"):
            pair.log_evidence(y)


@torch.no_grad()
def test_deep_features_tell_images_apart_at_the_start():
    """The vertical stack has no path around its gates: eight of them with torch's own start would leave
    1e-5."""
    torch.manual_seed(0)
    net = PixelCNN(2, (12, 12), 16, 8)
    vertical = horizontal = net._seen((torch.rand(32, 12, 12) < 0.5).long()).movedim(-1, 1)
    for block in net.blocks:
        vertical, horizontal = block(vertical, horizontal)
    spread = [float(x[..., 4:, 2:-2].std(0).mean()) for x in (vertical, horizontal)]
    assert 0.005 < spread[0] < 1.0 and 0.1 < spread[1] < 3.0
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
    vertical = horizontal = net._seen((torch.rand(32, 12, 12) < 0.5).long()).movedim(-1, 1)
    for block in net.blocks:
        vertical, horizontal = block(vertical, horizontal)
    assert float(vertical[..., 4:, 2:-2].std(0).mean()) < 1e-4


@pytest.mark.parametrize("which", ["eager", "graph inside", "graph outside", "two drop-ins"])
def test_convolutions_take_the_steps_of_hand_written_adam(which, monkeypatch):
    """Their gradients may come in another memory order than the weights, which fused optimizers do not look
    at."""
    y = (torch.rand(6, 12) < 0.5).double()
    monkeypatch.setattr(step, "_MOST_INSIDE", 0 if which == "graph outside" else 1000)

    def make():
        torch.manual_seed(0)
        return Autoregressive((3, 4), width=4, layers=2)

    hand, pair, expected = make(), make(), []
    adam = torch.optim.Adam(hand.parameters(), lr=0.05)
    for _ in range(4):
        adam.zero_grad()
        loss = -hand.log_evidence(y).sum()
        loss.backward()
        adam.step()
        expected.append(float(loss.detach()))
    loss, parameters = Trace_ELBO(), dict(pair.named_parameters())
    with pyro.validation_enabled(False):
        if which == "eager":
            take = EagerStep(loss, pair.model, pair.guide, parameters, lr=0.05)
        elif which == "two drop-ins":
            optim = FusedOptim(torch.optim.Adam, {"lr": 0.05})
            take = SVI(pair.model, pair.guide, optim, CompiledELBO(loss, backend="eager")).step
        else:
            take = CompiledStep(loss, pair.model, pair.guide, parameters, lr=0.05, backend="eager")
        torch.testing.assert_close([float(take(y)) for _ in range(4)], expected)

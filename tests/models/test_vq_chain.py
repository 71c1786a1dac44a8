"""Chains of codes from codebooks: bound, straight-through gradients, exact sums, layer-by-layer training."""

import copy
import itertools

import numpy as np
import pytest
import torch

from pyroelbo import coding, evidence, fit, models
from pyroelbo.objectives import Progressive_ELBO


def chain(**settings):
    torch.manual_seed(0)
    y = torch.bernoulli(torch.full((60, 6), 0.4))
    return models.VQChain(6, (2, 2), 3, 2, (8,), **settings).initialize(y), y


def log_joint(pair, y, low, top):
    """ln p(y, z_1, z_2) of code words [2], [2] in plain steps: tables of logits, and vectors by index."""
    books = [link.quantizer.codebook for link in pair.encoder.links]
    logits = pair.prior.network(torch.stack([top[0], torch.tensor(0)])).log_softmax(-1)
    prior = logits[0, top[0]] + pair.prior.network(top).log_softmax(-1)[1, top[1]]
    between = pair.generator.links[0].network(books[1][top].flatten()).reshape(2, 3).log_softmax(-1)
    pixels = pair.generator.observation.network.network(books[0][low].flatten())
    below = torch.distributions.Bernoulli(logits=pixels).log_prob(y).sum(-1)
    return prior + between[torch.arange(2), low].sum() + below


def test_the_bound_is_the_hard_one_and_all_code_words_together_are_the_evidence():
    pair, y = chain()
    y = y[:4]
    low, top = pair.encode(y)
    hard = torch.stack([log_joint(pair, row, a, b) for row, a, b in zip(y, low, top, strict=True)])
    torch.testing.assert_close(evidence.elbo(pair, y, particles=1).value, hard)
    words = [torch.tensor(w) for w in itertools.product(range(3), repeat=2)]
    every = torch.stack([log_joint(pair, y, a, b) for a in words for b in words])
    torch.testing.assert_close(evidence.exact(pair, y).value, every.logsumexp(0))


def test_codes_are_the_nearest_and_decoders_pass_their_slope_straight_through():
    pair, y = chain()
    link = pair.encoder.links[0].eval()
    x = link.vectors(y)
    z = link(y).v
    assert torch.equal(z, torch.nn.functional.one_hot(link.quantizer(x)[0], 3).to(z))  # to the last bit
    weight = torch.randn(len(y), 4)
    inner = list(link.reader.parameters())
    ours = torch.autograd.grad((link.embed(z) * weight).sum(), inner)
    theirs = torch.autograd.grad((x.flatten(-2) * weight).sum(), inner)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0


def test_commitment_holds_the_vectors_of_every_layer():
    pair, y = chain(commitment=0.5)
    fresh = copy.deepcopy(pair)
    expected, z = torch.zeros(len(y)), y
    for link in fresh.eval().encoder.links:
        x = link.vectors(z)
        codes, _ = link.quantizer(x)
        expected = expected + 0.5 * (x - link.quantizer.codebook[codes]).square().sum((-2, -1))
        z = torch.nn.functional.one_hot(codes, 3).to(x)
    torch.testing.assert_close(pair.auxiliary_loss(y), expected)
    pair.guide(y)  # its own pass, of which the penalty is
    torch.testing.assert_close(pair.auxiliary_loss(y), expected)
    pair.guide(y)
    copy.deepcopy(pair)  # what a pass left behind is no part of the state


def test_a_file_has_the_length_of_the_bound(tmp_path):
    pair, y = chain()
    array = y.numpy().astype(np.uint8)
    found = coding.compress(pair, array, tmp_path / "code")
    assert np.array_equal(coding.decompress(pair, tmp_path / "code"), array)
    assert found.coded == len(y)  # nothing is popped, so that no datum has to be coded without the pair
    assert set(found.site_bits) == {"y", "z_1", "z_2"}
    bound = -float(evidence.elbo(pair, y, particles=1).value.mean())
    assert found.net == pytest.approx(bound, abs=1.5 / len(y))  # of two bits or so in all


def state(pair, parts):
    return {k: v.clone() for k, v in pair.state_dict().items() if k.startswith(parts)}


def test_phase_one_trains_all_but_the_prior_and_phase_two_nothing_else():
    pair, y = chain()
    settings = {"epochs": 20, "batch_size": 20, "learning_rate": 0.01, "progress": False}
    before, prior = evidence.terms(pair, y, 1).log_model, state(pair, ("prior",))
    books = [link.quantizer.codebook.clone() for link in pair.encoder.links]
    fit(pair, y, objective=Progressive_ELBO(1), **settings)
    after = evidence.terms(pair, y, 1).log_model
    assert after["y"].mean() > before["y"].mean() + 0.1
    assert all(torch.equal(v, prior[k]) for k, v in state(pair, ("prior",)).items())
    assert not any(
        torch.equal(link.quantizer.codebook, book)
        for link, book in zip(pair.encoder.links, books, strict=True)
    )
    rest = state(pair, ("generator", "encoder"))
    top = evidence.terms(pair, y, 1).log_model["z_2"].mean()
    fit(pair, y, objective=Progressive_ELBO(2), **settings)
    assert all(torch.equal(v, rest[k]) for k, v in state(pair, ("generator", "encoder")).items())
    assert evidence.terms(pair, y, 1).log_model["z_2"].mean() > top + 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.VQChain(6, (2, 0)), "positions: expected a positive width for each layer, got 0"),
        (lambda: models.VQChain(6, (2,), 0), "codes: expected a positive number of values, got 0"),
        (lambda: models.VQChain(6, (2,), commitment=-1.0), "commitment: expected a number of at least 0"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""LDA: its dynamic program against the sum over all assignments of words to topics."""

import itertools
import math

import pyro
import pytest
import torch

from pyroelbo import audit, evidence, fit, models


def assigned(pair, words):
    """ln p(y) of one document by all assignments of its words to topics."""
    alpha, phi = pair.concentration, pair.log_topics.exp()
    total = []
    for z in itertools.product(range(pair.topics), repeat=len(words)):
        counts = torch.bincount(torch.tensor(z, dtype=torch.long), minlength=pair.topics)
        log_prior = (alpha + counts).lgamma().sum() - (alpha + counts).sum().lgamma()
        log_prior = log_prior - alpha.lgamma().sum() + alpha.sum().lgamma()
        total.append(log_prior + sum(phi[k, w].log() for k, w in zip(z, words, strict=True)))
    return torch.stack(total).logsumexp(0).detach()


@pytest.mark.parametrize("topics, concentration", [(1, 0.5), (2, 1.0), (3, 0.3)])
def test_the_evidence_is_the_sum_over_all_assignments(topics, concentration):
    pair = models.LDA(5, topics, 6, concentration=concentration)
    y = torch.tensor([[0, 1, 1, 4, -1, -1], [3, -1, -1, -1, -1, -1], [-1] * 6, [2, 2, -1, 0, 4, 1]])
    expected = torch.stack([assigned(pair, row[row >= 0].tolist()) for row in y])
    torch.testing.assert_close(pair.log_evidence(y), expected)


def test_the_posterior_makes_the_bound_the_evidence():
    pair = models.LDA(5, 3, 6, concentration=0.7)
    y = torch.randint(5, (4, 6))
    theta = pair.posterior(y).sample((3,))
    log_q = pair.posterior(y).log_prob(theta)
    words = (theta[..., None] * pair.log_topics.exp()).sum(-2)
    seen = words.log().gather(-1, y.expand(3, -1, -1)).sum(-1)
    prior = pyro.distributions.Dirichlet(pair.concentration).log_prob(theta)
    torch.testing.assert_close(seen + prior - log_q, pair.log_evidence(y).expand(3, -1))


def test_a_hundred_words_of_three_topics():
    pair, y = models.LDA(50, 3, 100), torch.randint(50, (3, 100))
    rows = {b.method: b for b in audit(pair, y, particles=500).bounds}
    assert (rows["iwae-500"].value < rows["exact"].value + 5 * rows["iwae-500"].stderr + 0.1).all()
    assert (rows["elbo"].value < rows["exact"].value).all()


def test_it_learns_the_topics_of_its_own_data():
    torch.manual_seed(2)
    truth = models.LDA(12, 3, 30, concentration=0.3)
    with torch.no_grad():
        truth.generator.logits.fill_(-4.0)
        for k in range(3):
            truth.generator.logits[k, 4 * k : 4 * k + 4] = 0.0
    _, y = truth.simulate(300)
    pair = models.LDA(12, 3, 30, concentration=0.3)
    before = evidence.exact(pair, y[:50]).value.mean()
    fit(pair, y, epochs=40, batch_size=50, learning_rate=0.02, progress=False)
    after, best = (evidence.exact(p, y[:50]).value.mean() for p in (pair, truth))
    assert after > before + 0.8 * (best - before)


@pytest.mark.parametrize(
    "y, message",
    [
        (torch.zeros(2, 3), "expected words as integers"),
        (torch.tensor([[0, 5]]), "expected words 0 … 4, or -1 for none, got 0 … 5"),
        (torch.tensor([[0, -2]]), "got -2 … 0"),
    ],
)
def test_what_are_no_documents(y, message):
    with pytest.raises(ValueError, match=message):
        models.LDA(5, 2).log_evidence(y)


def test_documents_without_words_have_evidence_one():
    pair = models.LDA(5, 2)
    for y in (torch.full((3, 4), -1), torch.zeros(3, 0, dtype=torch.long)):
        assert torch.equal(pair.log_evidence(y), torch.zeros(3, dtype=torch.float64))


def test_too_many_counts_are_unavailable_and_the_audit_goes_on():
    pair, y = models.LDA(9, 6, 20), torch.randint(9, (2, 20))
    with pytest.raises(ValueError, match="vectors of counts: the exact evidence is limited"):
        evidence.exact(pair, y)
    found = audit(pair, y, particles=8)
    assert {b.method for b in found.bounds} >= {"elbo", "iwae-8"} and "vectors of counts" in str(found)
    assert math.isfinite(float(found.bounds[0].value.mean()))

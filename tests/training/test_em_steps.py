"""Expected counts of M-steps by gradients, and starts that are kept."""

import math

import pytest
import torch

from pyroelbo import fit_em, models
from pyroelbo.training.em_steps import GradientSteps


@pytest.mark.parametrize("hard", [False, True])
def test_counts_of_a_finite_latent_are_its_posterior_or_its_mode(hard):
    pair, y = models.GaussianMixture(2, 3), torch.randn(5, 2)
    evidence, posterior = pair.log_evidence(y).detach(), pair.posterior(y).probs.detach()
    value, ((batch, (counts,)),) = GradientSteps(pair, hard, 5, frozenset()).expect(y)
    best = torch.nn.functional.one_hot(posterior.argmax(-1), 3).double()
    torch.testing.assert_close(counts, best if hard else posterior)
    torch.testing.assert_close(value, evidence + (posterior.amax(-1).log() if hard else 0.0))
    assert torch.equal(batch, y)


@pytest.mark.parametrize("side_by_side", [True, False])
def test_the_first_of_several_starts_is_the_current_one(side_by_side, monkeypatch):
    pair, y = models.GaussianMixture(2, 3), torch.randn(30, 2)
    if not side_by_side:
        monkeypatch.setattr(models.GaussianMixture, "stacks", lambda self, y: False)
    at_start = -float(pair.log_evidence(y).detach().mean())
    run = fit_em(pair, y, start="current", restarts=3, epochs=1, progress=False)
    assert at_start == pytest.approx(run.metrics[0]["loss"])


def test_an_m_step_that_is_never_finite_leaves_the_parameters(monkeypatch):
    pair, y = models.GaussianMixture(2, 3), torch.randn(5, 2)
    steps = GradientSteps(pair, False, 5, frozenset())
    _, statistics = steps.expect(y)
    before = [p.detach().clone() for p in pair.parameters()]
    monkeypatch.setattr(
        steps, "_expected_log_joint", lambda _: math.nan * sum(p.sum() for p in steps.parameters)
    )
    steps.maximize(statistics)
    for old, new in zip(before, pair.parameters(), strict=True):
        assert torch.equal(old, new)

"""The path that guide and model share: what is reused, and what ends its reuse."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyroelbo import models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models.chain import SharedPath
from tests.models.chains import ladder
from tests.pairs import binary


def gradients(pair, y):
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)
    return [loss.detach(), *torch.autograd.grad(loss, list(pair.parameters()))]


@pytest.mark.parametrize("merge", ["network", "precision"])
def test_the_path_that_the_guide_hands_on_is_the_models_own(merge, monkeypatch):
    pair, y = ladder(merge=merge, norm="layer"), binary(5, 6)
    handed = gradients(pair, y)
    calls = []
    original = SharedPath.path
    monkeypatch.setattr(SharedPath, "path", lambda self, *a: calls.append(original(self, *a)))
    for a, b in zip(handed, gradients(pair, y), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1 and calls[0] is not None  # it was there, and the patched model went on without
    evaluator = Evaluator(pair, y)
    terms = evaluator.sample_pass(3)
    again = evaluator.terms(terms.latents)
    torch.testing.assert_close(terms.log_weight, again.log_weight)


def test_what_the_guide_found_ends_where_a_draw_is_another():
    pair, y = ladder(norm="layer"), binary(5, 6)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
        other = {"z_3": guide.nodes["z_3"]["value"] + 1}
        mixed = poutine.condition(poutine.replay(pair.model, trace=guide), data=other)
        found = poutine.trace(mixed).get_trace(y)
        plain = {k: found.nodes[k]["value"].clone() for k in pair.sites}
        alone = poutine.trace(poutine.condition(pair.model, data=plain)).get_trace(y)
    torch.testing.assert_close(found.log_prob_sum(), alone.log_prob_sum())


@pytest.mark.parametrize("written", ["weights", "draws"])
def test_what_the_guide_found_ends_where_something_was_written_since(written):
    pair, y = ladder(norm="layer"), binary(5, 6)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
        draws = [guide.nodes[k]["value"] for k in pair.sites]
        for x in pair.generator.parameters() if written == "weights" else draws:
            x.add_(0.3)
        found = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
        plain = {k: v.clone() for k, v in zip(pair.sites, draws, strict=True)}
        alone = poutine.trace(poutine.condition(pair.model, data=plain)).get_trace(y)
    torch.testing.assert_close(found.log_prob_sum(), alone.log_prob_sum())


def test_a_detached_draw_does_not_lead_to_the_encoder():
    pair, y = ladder(norm="layer"), binary(5, 6)
    guide = poutine.trace(pair.guide).get_trace(y)
    guide.detach_()
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    found = torch.autograd.grad(model.log_prob_sum(), list(pair.encoder.parameters()), allow_unused=True)
    assert all(g is None for g in found)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    torch.autograd.grad(model.log_prob_sum(), list(pair.generator.parameters()))


def test_precisions_add():
    pair, y = ladder(merge="precision", norm="none"), binary(4, 6)
    p, seen = pair.prior(), pair.encoder.features(y)[-1]
    q = pair.encoder.links[-1](None, seen, p)
    loc, raw = pair.encoder.links[-1].head(seen).chunk(2, -1)
    own = dist.Normal(loc, (5 * torch.tanh(raw / 5)).exp())
    z = torch.randn(7, 4, 2)
    difference = q.base_dist.log_prob(z) - (p.base_dist.log_prob(z) + own.log_prob(z))
    torch.testing.assert_close(difference, difference[:1].expand(7, 4, 2))  # the same up to a constant


def test_a_network_merge_starts_at_the_prior():
    pair = models.Ladder(6, (3, 2), (8, 6))
    terms = Evaluator(pair, binary(4, 6)).sample_pass(2)
    for site in pair.sites:
        torch.testing.assert_close(terms.log_model[site], terms.log_guide[site], rtol=0, atol=0.1)

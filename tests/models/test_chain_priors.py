"""Chains on learned priors, their pictures, and the page of the docs."""

import copy
import math
import re
from pathlib import Path

import pyro
import pytest
import torch
from pyro import poutine

from pyroelbo import audit, evidence, fit, models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models.chain import Chain
from pyroelbo.objectives import Layered_ELBO
from pyroelbo.pair import unregistered
from pyroelbo.priors import PRIORS, StandardNormal
from tests.pairs import TABLE, binary


def test_the_chains_of_the_page_run():
    """The snippets of docs/chains.md: links of the library, and one more in a file of its own."""
    page = (Path(__file__).parents[2] / "docs" / "chains.md").read_text(encoding="utf-8")
    known = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, known)
    pair, heavy, y = known["pair"], known["heavy"], binary(30, 64)
    # What the new link gives is what the site has, under both programs.
    terms = Evaluator(heavy, y).sample_pass(2)
    low, top = terms.latents["z_1"], terms.latents["z_2"]
    for found, link, given in (
        (terms.log_model, heavy.generator.links[0], top),
        (terms.log_guide, heavy.encoder.links[0], y),
    ):
        loc, log_scale = link.network(given).chunk(2, -1)
        expected = -(low - loc).abs() / log_scale.exp() - log_scale - math.log(2)
        torch.testing.assert_close(found["z_1"], expected.sum(-1))
    for chain, objective in ((pair, "layered"), (heavy, "layered"), (heavy, "elbo")):
        run = fit(chain, y, epochs=2, objective=objective, progress=False)
        assert all(math.isfinite(loss) for loss in run.losses)
    torch.manual_seed(0)
    a = audit(heavy, y, particles=100)
    assert a["iwae-100"].mean > a["elbo"].mean and set(evidence.site_gaps(heavy, y).rates) == {"z_1", "z_2"}
    with pytest.raises(
        ValueError,
        match="layer 1: the generator link of z_1: expected an input of 4 numbers, the size of z_2,",
    ):
        links_, see = known["LaplaceLink"], heavy.generator.observation
        Chain(StandardNormal(4), [links_(3, 8)], see, [links_(64, 8), links_(8, 4)], event=(64,))


@pytest.mark.parametrize("name", ["hierarchy-top-down", "ladder", "ladder-precision", "conv_ladder"])
def test_pictures_of_what_is_decoded(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    picture = pair.reconstruct(y)
    assert picture.shape == y.shape and picture.min() >= 0 and picture.max() <= 1


STANDING = {
    "hierarchy": lambda prior: models.Hierarchy(16, (3, 2), 8, prior=prior, components=4),
    "hierarchy-top-down": lambda prior: models.Hierarchy(
        16, (3, 2), 8, order="top-down", prior=prior, components=4
    ),
    "ladder": lambda prior: models.Ladder(16, (3, 2), (8, 6), norm="layer", prior=prior, components=4),
    "conv_ladder": lambda prior: models.ConvLadder((4, 4), (1, 1), 1, 4, prior=prior, components=4),
}


def standing(family, prior, train=None):
    torch.manual_seed(0)
    pair = STANDING[family](prior)
    return pair if train is None else pair.initialize(train)


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.Hierarchy(16, (3, 2), 8),
        lambda: models.DiscreteVAE(16, (3, 2), (8,)),
        lambda: models.VAE(16, 2, (8,)),
    ],
)
def test_where_nothing_starts_from_data_no_numbers_are_drawn(make):
    pair, y = make(), binary(5, 16)
    before = torch.get_rng_state()
    assert pair.initialize(y) is pair and pair.pristine
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", STANDING)
def test_a_chain_may_stand_on_any_prior(family, prior):
    """The top site has the prior's own density; its term is closed where a form is known, and the draw's
    elsewhere."""
    pair, y = standing(family, prior, binary(9, 16)), binary(5, 16)
    top = getattr(pair.prior, "prior", pair.prior)
    with torch.no_grad():
        for parameter in top.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    terms = Evaluator(pair, y).sample_pass(3)
    torch.testing.assert_close(terms.log_model["z_2"], top().log_prob(terms.latents["z_2"]))
    pyro.set_rng_seed(1)
    loss = Layered_ELBO().differentiable_loss(pair.model, pair.guide, y)
    pyro.set_rng_seed(1)
    guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    expected = torch.zeros(())
    for site in pair.sites:
        q, p, z = guide.nodes[site]["fn"], model.nodes[site]["fn"], guide.nodes[site]["value"]
        closed = (family != "hierarchy" or site == "z_2") and (prior == "standard" or site == "z_1")
        term = torch.distributions.kl_divergence(q, p) if closed else q.log_prob(z) - p.log_prob(z)
        expected = expected + term.sum()
    expected = expected - model.nodes["y"]["fn"].log_prob(y).sum()
    torch.testing.assert_close(loss, expected)
    before = {k: v.detach().clone() for k, v in top.named_parameters()}
    run = fit(pair, binary(30, 16), epochs=1, objective="layered", progress=False)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert all(not torch.equal(v, before[k]) for k, v in top.named_parameters())


@pytest.mark.parametrize("family", STANDING)
def test_a_vampprior_mixes_the_top_of_the_encoder(family):
    y = binary(9, 16)
    pair = standing(family, "vamp", y)
    top = getattr(pair.prior, "prior", pair.prior)
    u, z = top.pseudo_inputs, torch.randn(7, top.dims)
    links = pair.encoder.links
    if family == "hierarchy":
        assert u.shape == (4, 3)  # of z_1, which the link of z_2 sees
        q = links[1](u)
    else:
        assert torch.cdist(u.detach(), y).amin(1).max() < 0.2  # rows of the data, with a little noise
        seen = u if family == "hierarchy-top-down" else pair.encoder.features(u)[-1]
        q = links[1](None, seen, None)
    mixed = torch.logsumexp(q.log_prob(z[:, None]), -1) - math.log(4)
    torch.testing.assert_close(top().log_prob(z), mixed)
    with pytest.raises(
        ValueError, match="components: expected at most one pseudo-input for each of the 3 data, got 4"
    ):
        standing(family, "vamp", binary(3, 16))


@pytest.mark.parametrize("family", STANDING)
def test_a_chain_on_a_vampprior_is_copied_whole_and_steps_as_one_graph(family):
    from pyroelbo.compiled import CompiledStep

    pair, y = standing(family, "vamp"), binary(8, 16)
    twin = copy.deepcopy(pair)
    assert getattr(twin.prior, "prior", twin.prior).encode.__self__ is twin
    step = CompiledStep(
        Layered_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), backend="eager"
    )
    before = [parameter.detach().clone() for parameter in pair.prior.parameters()]
    with pyro.validation_enabled(False), unregistered():
        for _ in range(3):
            step(y)
    assert step.counters.compiled_calls == 3 and step.counters.fallbacks == 0
    assert all(not torch.equal(a, b) for a, b in zip(before, pair.prior.parameters(), strict=True))


@pytest.mark.parametrize("family", STANDING)
def test_a_prior_of_another_size_is_named_with_its_layer(family):
    dims = 4 if family == "conv_ladder" else 2
    with pytest.raises(
        ValueError, match=f"expected {dims} dimensions for the latent 'z_2', got a StandardNormal of 5"
    ):
        standing(family, StandardNormal(5))
    with pytest.raises(ValueError, match="prior: expected one of .* got 'gumbel'"):
        standing(family, "gumbel")

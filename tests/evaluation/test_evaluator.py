"""Per-datum terms: unscaled but masked, the same for every way to run particles, and refusals that name the
site."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyroelbo import Pair, evidence, within_datum
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.strategies import Loop, Plate, Repeat
from tests.pairs import TABLE, Convolutional, Nonlinear

WITHOUT_LATENTS = ("flow-continuous", "density_flow")


@pytest.mark.parametrize("name", [n for n in TABLE if n not in WITHOUT_LATENTS])
def test_scores_agree_with_pyro_one_particle_at_a_time(name):
    make, draw = TABLE[name]
    pair, y = make().eval(), draw(4)
    evaluator = Evaluator(pair, y)
    terms = evaluator.sample(3)
    assert terms.log_weight.shape == (3, 4)
    torch.testing.assert_close(evaluator.log_joint(terms.latents), terms.log_joint)
    for k in range(3):
        given = {s: v[k] for s, v in terms.latents.items()}
        model = poutine.trace(poutine.condition(pair.model, given)).get_trace(y)
        guide = poutine.trace(poutine.condition(pair.guide, given)).get_trace(y)
        torch.testing.assert_close(terms.log_joint[k].sum(), model.log_prob_sum(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(terms.log_proposal[k].sum(), guide.log_prob_sum(), rtol=1e-9, atol=1e-9)


def test_networks_that_refuse_particles_get_the_data_repeated():
    assert isinstance(Evaluator(Convolutional(), torch.randn(3, 16)).strategy, Repeat)
    assert isinstance(Evaluator(Nonlinear(), torch.randn(3, 4)).strategy, Plate)


class Stubborn(Nonlinear):
    """Takes batches of one size only."""

    def model(self, y):
        with self.plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.shape == (3, 2), "three rows"
            pyro.sample("y", dist.Normal(self.generator(z), 0.5).to_event(1), obs=y)


def test_a_loop_is_the_last_resort():
    evaluator = Evaluator(Stubborn(), torch.randn(3, 4))
    assert isinstance(evaluator.strategy, Loop)
    assert evaluator.sample(5).log_weight.shape == (5, 3)
    (note,) = (n for n in evidence.iwae(Stubborn(), torch.randn(3, 4), 5).notes if "slow" in n)
    assert note.startswith("particles run one at a time") and "plate: AssertionError, three rows" in note
    assert "repeat: AssertionError, three rows" in note


def test_a_branch_on_a_latent_is_run_one_particle_at_a_time():
    """A vectorized pass takes one branch for all particles; two equal ones would not show it."""

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.999)))
            loc = torch.full((len(y),), 3.0) if bool(k.sum() > 0) else torch.zeros(len(y))
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.999)))

    pair, y = Pair.of(model, guide), torch.tensor([1.0])
    evaluator = Evaluator(pair, y)
    assert isinstance(evaluator.strategy, Loop)
    assert "reads a latent's value" in evaluator.notes[0]
    k = torch.tensor([[1.0], [0.0]])
    prior = dist.Bernoulli(0.999).log_prob(k)
    right = prior + dist.Normal(3 * k, 1.0).log_prob(y)
    torch.testing.assert_close(evaluator.log_joint({"k": k}), right)
    exact = evidence.exact(pair, y, scope="joint").value
    torch.testing.assert_close(exact, right.logsumexp((0, 1)), rtol=0, atol=1e-12)


class TwoPlates(Nonlinear):
    """Latents in two plates within a datum, and a model that refuses a further dimension."""

    def model(self, y):
        with self.plate(y):
            row, column = pyro.plate("row", 2, dim=-3), pyro.plate("column", 3, dim=-2)
            with row, column:
                prior = dist.Normal(torch.arange(3.0)[:, None], 1.0)
                z = pyro.sample("z", prior.expand([2, 3, len(y)]))
            assert z.shape[:-1] == (2, 3)
            with column:
                w = pyro.sample("w", dist.Normal(z.sum(0), torch.tensor([1.0, 2.0, 3.0])[:, None]))
            pyro.sample("y", dist.Normal(w.T[:, :2], 0.5).to_event(1), obs=y[:, :2])

    def guide(self, y):
        with self.plate(y):
            row, column = pyro.plate("row", 2, dim=-3), pyro.plate("column", 3, dim=-2)
            with row, column:
                drawn = dist.Normal(0.1 * y[:, 0], torch.tensor([[0.5], [0.7], [0.9]]))
                pyro.sample("z", drawn.expand([2, 3, len(y)]))
            with column:
                pyro.sample("w", dist.Normal(y[:, :3].T, 1.5))


def test_repeated_data_with_two_plates_within_a_datum():
    """Every term against a sum by hand, datum by datum and particle by particle."""
    pair, y = TwoPlates(), torch.randn(4, 4)
    evaluator = Evaluator(pair, y)
    assert isinstance(evaluator.strategy, Repeat)
    terms = evaluator.sample(5)
    z, w = terms.latents["z"], terms.latents["w"]
    assert z.shape == (5, 2, 3, 4) and w.shape == (5, 3, 4)
    normal = dist.Normal
    for k in range(5):
        for b in range(4):
            log_z = normal(torch.arange(3.0), 1.0).log_prob(z[k, :, :, b]).sum()
            log_w = normal(z[k, :, :, b].sum(0), torch.tensor([1.0, 2.0, 3.0])).log_prob(w[k, :, b]).sum()
            log_y = normal(w[k, :2, b], 0.5).log_prob(y[b, :2]).sum()
            log_q = normal(0.1 * y[b, 0], torch.tensor([0.5, 0.7, 0.9])).log_prob(z[k, :, :, b]).sum()
            log_q = log_q + normal(y[b, :3], 1.5).log_prob(w[k, :, b]).sum()
            torch.testing.assert_close(terms.log_model["z"][k, b], log_z)
            torch.testing.assert_close(terms.log_model["w"][k, b], log_w)
            torch.testing.assert_close(terms.log_joint[k, b], log_z + log_w + log_y)
            torch.testing.assert_close(terms.log_proposal[k, b], log_q)
    torch.testing.assert_close(evaluator.log_joint(terms.latents), terms.log_joint)
    torch.testing.assert_close(evaluator.log_guide(terms.latents), terms.log_proposal)


class Wrong(Nonlinear):
    """Runs with particles and gives something else: only a comparison finds out."""

    def model(self, y):
        with self.plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.generator(z.reshape(-1, 2)[: len(y)]), 0.5).to_event(1), obs=y)


def test_vectorization_is_checked_not_assumed():
    assert isinstance(Evaluator(Wrong(), torch.randn(3, 4)).strategy, Repeat)


def test_chunks_cover_everything(monkeypatch):
    pair, y = Nonlinear(), torch.randn(11, 4)
    evaluator = Evaluator(pair, y)
    for cells in (1, 7, 40, 10**6):
        monkeypatch.setattr(Evaluator, "cells", cells)
        seen = torch.zeros(11, dtype=torch.long)
        for rows, count in evaluator.chunks(9):
            seen[rows] += count
        assert torch.equal(seen, torch.full((11,), 9))
        terms = evaluator.sample(9)
        torch.testing.assert_close(evaluator.log_joint(terms.latents), terms.log_joint)


def padded_pair():
    """Sequences of different lengths: y [B, T], lengths [B]; a latent at every step."""

    def program(y, lengths, observe):
        mask = torch.arange(y.shape[1])[:, None] < lengths
        with pyro.plate("data", len(y)), pyro.plate("time", y.shape[1], dim=-2), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0) if observe else dist.Normal(0.5 * y.T, 0.8))
            if observe:
                pyro.sample("y", dist.Normal(z, 1.0), obs=y.T)

    return Pair.of(
        lambda y, lengths: program(y, lengths, True), lambda y, lengths: program(y, lengths, False)
    )


def test_a_padded_datum_weighs_what_its_own_steps_weigh():
    pair, y = padded_pair(), torch.randn(5, 6)
    lengths = torch.tensor([1, 2, 3, 6, 6])
    whole = evidence.elbo(pair, (y, lengths), particles=20000)
    exact = torch.stack(
        [dist.Normal(0.0, 2**0.5).log_prob(row[:n]).sum() for row, n in zip(y, lengths, strict=True)]
    )
    # KL(N(y/2, .64), N(y/2, .5)) a step is the gap.
    gap = lengths * dist.kl.kl_divergence(dist.Normal(0.0, 0.8), dist.Normal(0.0, 0.5**0.5))
    assert ((whole.value - (exact - gap)).abs() < 5.5 * whole.stderr).all()
    changed = y.clone()
    changed[0, 1:] = 1000.0
    pyro.set_rng_seed(3)
    first = evidence.elbo(pair, (y, lengths), particles=10).value
    pyro.set_rng_seed(3)
    second = evidence.elbo(pair, (changed, lengths), particles=10).value
    assert torch.equal(first, second)


def test_dropout_is_off_and_modes_are_restored():
    pair = Nonlinear()
    pair.generator = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5))
    pair.train()
    terms = Evaluator(pair, torch.randn(3, 4))
    latents = terms.sample_pass(2).latents
    assert torch.equal(terms.log_joint(latents), terms.log_joint(latents))
    assert pair.training and pair.generator[1].training


def test_a_scale_within_a_datum_is_kept_by_elbo_and_refused_by_weights():
    def model(y, marked=True):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with within_datum(3.0) if marked else poutine.scale(scale=3.0):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.7 * y, 0.5))

    pair, y = Pair.of(model, guide), torch.randn(4)
    value = evidence.elbo(pair, y, particles=4000)
    exact = 3 * (dist.Normal(0.7 * y, 1.0).log_prob(y) - 0.125) - dist.kl.kl_divergence(
        dist.Normal(0.7 * y, 0.5), dist.Normal(0.0, 1.0)
    )
    assert ((value.value - exact).abs() < 5.5 * value.stderr).all()
    weights = functools.partial(evidence.eubo, source="weights")
    for refused in (evidence.iwae, evidence.cubo, weights, evidence.prior_monte_carlo, evidence.gap):
        with pytest.raises(ValueError, match="'y' carries a scale within its datum"):
            refused(pair, y)
    unmarked = Pair.of(lambda y: model(y, marked=False), guide)
    with pytest.raises(ValueError, match=r"'y' is scaled by 3 .*kl_weight.*within_datum"):
        evidence.elbo(unmarked, y)


def test_a_subsampled_inner_plate_is_within_the_datum():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with pyro.plate("tokens", 12, subsample_size=3, dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, :3].T)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1e-9))

    y = torch.randn(4, 12)
    value = evidence.elbo(Pair.of(model, guide), y, particles=2)
    entropy = dist.Normal(0.0, 1e-9).entropy()
    expected = (
        4 * dist.Normal(0.0, 1.0).log_prob(y[:, :3]).sum(1)
        + entropy
        + dist.Normal(0.0, 1.0).log_prob(torch.zeros(()))
    )
    torch.testing.assert_close(
        value.value, expected, atol=5.0, rtol=0
    )  # one draw of the entropy term has sd 0.7
    with pytest.raises(ValueError, match="scale within its datum"):
        evidence.iwae(Pair.of(model, guide), y)


def plain_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))


def plain_model(y, z="z", size=None, scale=1.0, event=True, obs=True):
    with pyro.plate("data", size or len(y)), poutine.scale(scale=scale):
        value = pyro.sample(z, dist.Normal(torch.zeros(size or len(y)), 1.0))
        if event:
            pyro.sample("y", dist.Normal(value, 1.0), obs=y if obs else None)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (lambda y: plain_model(y, scale=0.5), plain_guide, "site 'z' is scaled by 0.5"),
        (lambda y: plain_model(y, z="w"), plain_guide, "guide site 'z' is missing in the model"),
        (plain_model, lambda y: None, "model site 'z' is missing in the guide"),
        (lambda y: plain_model(y, event=False), plain_guide, "observes nothing"),
        (
            lambda y: plain_model(torch.zeros(7)),
            lambda y: plain_guide(torch.zeros(7)),
            "expected 5 data, the batch's rows, got 7 at guide site 'z'",
        ),
    ],
)
def test_what_is_no_bound_is_refused(model, guide, message):
    with pytest.raises(ValueError, match=message):
        evidence.elbo(Pair.of(model, guide), torch.randn(5))


def test_a_global_latent_is_refused():
    def model(y):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    with pytest.raises(ValueError, match="'w' draws a latent outside the plate 'data', .*only a joint one"):
        evidence.elbo(Pair.of(model, lambda y: pyro.sample("w", dist.Normal(0.0, 1.0))), torch.randn(5))


def test_a_relaxed_guide_is_refused():
    probs = torch.tensor([0.3, 0.7])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.OneHotCategorical(probs))
            pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample(
                "z", dist.RelaxedOneHotCategoricalStraightThrough(torch.tensor(0.5), probs.expand(len(y), 2))
            )

    with pytest.raises(ValueError, match="hard counterpart"):
        evidence.elbo(Pair.of(model, guide), torch.randn(5))


@pytest.mark.parametrize(
    "prior, guess",
    [(dist.Bernoulli(0.5), dist.Normal(0.5, 1.0)), (dist.Normal(0.0, 1.0), dist.Bernoulli(0.5))],
)
def test_a_probability_over_a_density_is_refused(prior, guess):
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.sample("z", prior), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", guess)

    with pytest.raises(ValueError, match="guide site 'z' is a .*a probability over a density is no weight"):
        evidence.elbo(Pair.of(model, guide), torch.randn(5))


def test_a_guide_with_a_factor_or_another_event_shape_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def factor(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y), 2), 1.0).to_event(1))
            pyro.factor("penalty", -z.square().sum(-1), has_rsample=True)

    def narrow(y):  # it would broadcast
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), 1), 1.0).to_event(1))

    with pytest.raises(ValueError, match="guide site 'penalty' is observed"):
        evidence.elbo(Pair.of(model, factor), torch.randn(5))
    with pytest.raises(
        ValueError, match=r"guide site 'z' draws events of shape \(1,\), the model's are of shape \(2,\)"
    ):
        evidence.elbo(Pair.of(model, narrow), torch.randn(5))


def test_auxiliary_draws_that_the_latents_do_not_determine_are_refused():
    """Their weights would have the mean Σ_u p(y), not p(y)."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(y / 2 + u - 0.5, 1.0))

    with pytest.raises(
        evidence.Unavailable, match="guide site 'u' is auxiliary and the latents are no function of it"
    ):
        evidence.iwae(Pair.of(model, guide), torch.randn(5))


def test_an_automatic_guide_learns_its_size_from_the_whole_batch():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    assert evidence.elbo(Pair.of(model, AutoNormal(model)), torch.randn(7)).value.shape == (7,)


def test_a_guide_with_more_categories_than_the_model_is_refused_by_name():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("y", dist.Normal(z.to(y), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(torch.ones(9)))

    with pytest.raises(ValueError, match="values that latent site 'z' cannot take in the model"):
        evidence.elbo(Pair.of(model, guide), torch.randn(50))


def test_an_undeclared_batch_dimension_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with poutine.mask(mask=True):
                pyro.sample("y", dist.Normal(z, 1.0).expand([2, len(y)]), obs=y.expand(2, -1))

    with pytest.raises(ValueError, match=r"'y': expected .* at batch dim -2, .* got 2.*to_event"):
        evidence.elbo(Pair.of(model, plain_guide), torch.randn(5))


def test_data_outside_the_support_are_refused():
    make, _ = TABLE["vae-bernoulli"]
    with pytest.raises(ValueError, match=r"'y' \(\w+\): expected values in .*binarize"):
        evidence.elbo(make(), torch.full((3, 6), 0.5))
    with pytest.raises(ValueError, match=r"expected shape \[B, 6\]"):
        evidence.elbo(make(), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="y: expected finite entries"):
        evidence.elbo(make(), torch.full((3, 6), float("nan")))


def test_one_datum_without_its_batch_dimension_is_refused():
    make, draw = TABLE["vae-l2"]
    with pytest.raises(ValueError, match="expected shape"):
        evidence.elbo(make(), draw(3)[0])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1).expand(-1, 4), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="expected a batch of events"):
        evidence.elbo(Pair.of(model, plain_guide), torch.randn(4))


def test_draws_without_their_latents_are_the_same_draws():
    pair, y = Nonlinear(), torch.randn(7, 4)
    evaluator = Evaluator(pair, y)
    found = []
    for latents in (True, False):
        pyro.set_rng_seed(3)
        found.append(evaluator.sample(5, latents=latents))
    assert torch.equal(found[0].log_weight, found[1].log_weight)
    assert set(found[0].latents) == {"z"} and not found[1].latents


def test_a_pair_of_integers_alone_is_evaluated_in_the_default_type():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("y", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))

    evaluator = Evaluator(Pair.of(model, guide), torch.tensor([0, 1, 1]))
    assert evaluator.layout.dtype == torch.get_default_dtype()


def test_values_in_chunks_are_double():
    make, draw = TABLE["vae-bernoulli"]
    pair, y = make().float(), draw(4).float()
    evaluator = Evaluator(pair, y)
    latents = evaluator.sample_pass(3, None).latents
    assert evaluator.in_chunks(evaluator.log_joint, latents).dtype == torch.float64

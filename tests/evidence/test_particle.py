"""Particle filters against exact evidence, on the linear scale: the mean of Ẑ over filters is p(y).

False alarms: 1e-6 over all z-scores of the file together (Bonferroni)."""

import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, evidence
from pyroelbo.evaluation import memory
from pyroelbo.evidence import particle
from pyroelbo.models import HMM, StateSpace
from pyroelbo.pair import ExactPair
from tests.pairs import TABLE

NUMBERS_TESTED = 100
Z_LIMIT = -statistics.NormalDist().inv_cdf(0.5e-6 / NUMBERS_TESTED)


def z_scores(bound, exact):
    return -torch.expm1(exact - bound.value) / bound.stderr


def sites(first, following, steps, backwards=False):
    """A chain of finite states with a site each, seen through noise; the guide may go the other way."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z_0", dist.Categorical(logits=first))
            for t in range(steps):
                if t:
                    z = pyro.sample(f"z_{t}", dist.Categorical(logits=following[z]))
                pyro.sample(f"y_{t}", dist.Normal(z.to(y.dtype), 0.7), obs=y[:, t])

    def guide(y):
        with pyro.plate("data", len(y)):
            for t in reversed(range(steps)) if backwards else range(steps):
                near = -((y[:, t, None] - torch.arange(float(len(first)))) ** 2)
                pyro.sample(f"z_{t}", dist.Categorical(logits=near))

    return Pair.of(model, guide)


class Ladder(ExactPair):
    """Top-down: a path in the plane of a plate, then what hangs on it, then the datum; all Gaussian."""

    def model(self, y):
        with pyro.plate("data", len(y)):
            top = pyro.sample("top", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("pieces", 2, dim=-2):
                low = pyro.sample("low", dist.Normal(top.sum(-1), 1.0))
            pyro.sample("y", dist.Normal(low.sum(-2), 1.0), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            top = pyro.sample("top", dist.Normal(0.3 * y[:, None].expand(-1, 2), 0.9).to_event(1))
            with pyro.plate("pieces", 2, dim=-2):
                pyro.sample("low", dist.Normal(0.4 * y + 0.1 * top[..., 0], 1.0))

    def log_evidence(self, y):
        return dist.Normal(0.0, math.sqrt(1 + 2 + 4 * 2)).log_prob(y)


def sharper(pair):
    """Data that tell something of the path, so that weights vary and particles are drawn anew."""
    with torch.no_grad():
        for parameter in pair.generator.parameters():
            parameter.add_(torch.randn_like(parameter))
    return pair


def row(name):
    def make():
        pair, y = TABLE[name][0](), TABLE[name][1](3)
        if isinstance(pair, HMM):
            sharper(pair)
        elif pair.encoder is not None:
            with torch.no_grad():  # wide: the weights have a variance
                pair.encoder.weight.mul_(0.2)
                pair.encoder.log_scale.fill_(0.7)
        return pair, y, pair.log_evidence(y).detach()

    return make


def padded(make):
    def build():
        pair, y = make()
        batch = (y, torch.tensor([5, 2, 1]))
        return pair, batch, pair.log_evidence(*batch).detach()

    return build


def finite():
    first, following = torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1)
    pair, y = sites(first, following, 4), torch.randn(3, 4) + 1
    return pair, y, evidence.exact(pair, y).value


def ladder():
    pair, y = Ladder(), torch.tensor([-2.0, 0.5, 5.0])
    return pair, y, pair.log_evidence(y)


CASES = {
    "hmm": row("hmm-mean-field"),
    "hmm-exact": row("hmm-gaussian"),
    "hmm-lengths": padded(
        lambda: (sharper(HMM(3, 2, "gaussian", guide="mean_field")), torch.randn(3, 5, 2)),
    ),
    "hmm-exact-lengths": padded(lambda: (sharper(HMM(3, 2, "gaussian")), torch.randn(3, 5, 2))),
    "state_space": row("state_space-mean-field"),
    "state_space-exact": row("state_space"),
    "state_space-lengths": padded(lambda: (StateSpace(2, 2), torch.randn(3, 5, 2))),
    "sites": finite,
    "ladder": ladder,
}


def check_unbiased(make=CASES["hmm-lengths"], proposal="prior", threshold=0.9):
    pair, y, exact = make()
    bound = evidence.smc(pair, y, 4, 2000, proposal=proposal, threshold=threshold)
    assert (z_scores(bound, exact).abs() < Z_LIMIT).all()


# An exact guide's weights say how improbable the future is, and have no variance when the path is whole.
GUIDED = [(n, "guide") for n in ("hmm", "hmm-lengths", "state_space", "sites", "ladder")]


@pytest.mark.parametrize(("name", "proposal"), [*GUIDED, *((n, "prior") for n in CASES)])
def test_the_mean_over_filters_is_the_evidence(name, proposal):
    check_unbiased(CASES[name], proposal)


@pytest.mark.parametrize(
    "name", ["hmm-exact", "hmm-exact-lengths", "state_space-exact", "state_space-lengths"]
)
def test_without_resampling_an_exact_guide_gives_the_evidence(name):
    """Steps drawn from the posterior's conditionals: every particle's weight is p(y), whatever was drawn."""
    pair, y, exact = CASES[name]()
    bound = evidence.smc(pair, y, 3, 2, threshold=0.0)
    assert (bound.value - exact).abs().max() < 1e-8


def test_without_resampling_it_is_importance_sampling():
    pair, y, exact = CASES["hmm"]()
    plain, steps = evidence.iwae(pair, y, 50_000), evidence.smc(pair, y, 50, 1000, threshold=0.0)
    assert ((plain.value - steps.value).abs() < Z_LIMIT * torch.hypot(plain.stderr, steps.stderr)).all()
    assert (z_scores(steps, exact).abs() < Z_LIMIT).all()
    assert steps.cost == 3 * 50_000


def forgets_the_past(log_w, poor):
    return torch.where(poor.unsqueeze(1), 0.0, log_w)


def takes_all_back(log_w, poor):
    """Resets data that were not resampled as well."""
    mean = torch.logsumexp(log_w, 1, keepdim=True) - math.log(log_w.shape[1])
    return mean.expand_as(log_w)


def moves_nobody(log_w, poor):
    groups, particles, size = log_w.shape
    return torch.arange(groups * particles)[:, None].expand(-1, size)


def by_inverse_weights(log_w, poor):
    return HONEST_ANCESTORS(-log_w, poor)


HONEST_ANCESTORS = particle._ancestors
BUGS = {
    "increments from weights that were dropped": ("_reset", forgets_the_past),
    "weights reset without a draw": ("_reset", takes_all_back),
    "no draw": ("_ancestors", moves_nobody),
    "a draw by inverse weights": ("_ancestors", by_inverse_weights),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, planted = BUGS[bug]
    monkeypatch.setattr(particle, name, planted)
    with pytest.raises(AssertionError):
        check_unbiased(finite, threshold=0.5)


def test_ancestors_follow_the_weights():
    """Systematic draws: each particle has within one of its expected number of followers, and it is right on
    average.
    """
    log_w = torch.randn(500, 7, 2)
    log_w[:, 2] = -math.inf
    index = particle._ancestors(log_w, torch.ones(500, 2, dtype=torch.bool)).reshape(500, 7, 2)
    index = index - 7 * torch.arange(500)[:, None, None]
    followers = torch.nn.functional.one_hot(index, 7).sum(1)
    expected = 7 * log_w.softmax(1).movedim(1, -1)
    assert ((followers - expected).abs() < 1 + 1e-9).all() and (followers[..., 2] == 0).all()
    surplus = (followers - expected).reshape(-1, 7)[:, [0, 1, 3, 4, 5, 6]]
    assert (surplus.mean(0).abs() < Z_LIMIT * surplus.std(0) / math.sqrt(len(surplus))).all()
    stay = particle._ancestors(log_w, torch.zeros(500, 2, dtype=torch.bool))
    assert (stay == torch.arange(3500)[:, None]).all()


def test_resampling_tightens_a_long_chain():
    pair = sharper(sharper(sharper(HMM(4, 5, steps=60))))
    _, y = pair.simulate(20)
    exact = pair.log_evidence(y).detach()
    gaps = [
        (exact - evidence.smc(pair, y, 50, 4, proposal="prior", threshold=share).value).mean()
        for share in (0.0, 0.5)
    ]
    assert gaps[1] < 0.5 * gaps[0] and gaps[1] > -0.2


def test_a_guide_against_the_order_is_importance_sampling():
    """Terms of the model enter when all latents before them are drawn: here at the last step only."""
    first, following = torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1)
    pair, y = sites(first, following, 4, backwards=True), torch.randn(3, 4) + 1
    bound = evidence.smc(pair, y, 4, 2000, threshold=1.0)
    assert (z_scores(bound, evidence.exact(pair, y).value).abs() < Z_LIMIT).all()
    assert bound.cost == 3 * 4 * 2000 * 4


def test_a_latent_of_the_whole_batch_is_a_step_of_a_joint_filter():
    """μ, then a z for each datum around it: one number for the batch, whose evidence is Gaussian."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mean.expand(*mean.shape[:-1], len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        mean = pyro.sample("mean", dist.Normal(0.5 * y.mean(), 0.9))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y + 0.1 * mean, 0.9))

    y = torch.tensor([1.0, -0.5, 2.0])
    exact = dist.MultivariateNormal(torch.zeros(3), torch.ones(3, 3) + 2 * torch.eye(3)).log_prob(y)
    bound = evidence.smc(Pair.of(model, guide), y, 4, 3000, threshold=0.9, scope="joint")
    assert bound.scope == "joint" and bound.value.shape == ()
    assert abs(float(z_scores(bound, exact))) < Z_LIMIT


def test_one_filter_is_the_filtering_objective():
    pair, y, exact = CASES["hmm"]()
    bound = evidence.smc(pair, y, 30, 1)
    assert bound.stderr.isnan().all() and bound.kind == "lower" and (bound.value - exact).abs().max() < 3


def test_chunks_by_memory_cover_all_filters(monkeypatch):
    pair, y, exact = CASES["hmm"]()
    monkeypatch.setitem(memory.BUDGET, "cpu", 8 * 1500)
    bound = evidence.smc(pair, y, 10, 300)
    assert bound.draws == 3000 and bound.cost == 9000
    assert (z_scores(bound, exact).abs() < Z_LIMIT).all()


def test_an_impossible_observation_has_no_mass():
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Categorical(logits=apart[0]))
            b = pyro.sample("b", dist.Categorical(logits=apart[a]))
            pyro.sample("y", dist.Categorical(logits=apart[b]), obs=y)

    bound = evidence.smc(Pair.of(model, lambda y: None), torch.tensor([0, 1]), 8, 4, proposal="prior")
    assert bound.value[0] == 0 and bound.value[1] == -math.inf
    assert "died for 1 of 2 data" in bound.notes[0]


def test_what_it_does_not_take():
    make, draw = TABLE["own"]
    with pytest.raises(evidence.Unavailable, match="one latent site, 'z', and no latent_path"):
        evidence.smc(make(), draw(2))
    for options, message in (
        ({"particles": 0}, "particles: expected"),
        ({"filters": 0}, "filters: expected"),
        ({"proposal": "posterior"}, "proposal: expected"),
        ({"threshold": 1.5}, "threshold: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            evidence.smc(make(), draw(2), **options)


def test_nothing_to_filter():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(len(y)), 1.0), obs=y)

    with pytest.raises(evidence.Unavailable, match="no latents to filter"):
        evidence.smc(Pair.of(model, lambda y: None), torch.randn(3))

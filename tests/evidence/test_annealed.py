"""AIS and BDMC against exact evidence. Unbiasedness is tested on Ẑ, not on ln Ẑ: E w = p(y), and
E 1/w = 1/p(y) times the start's probability of latents that p(y, z) does not rule out."""

import math
import re
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal, AutoStructured

from pyroelbo import ExactPair, Pair, audit, evidence
from pyroelbo.evaluation import evaluator as terms
from pyroelbo.evaluation import memory
from pyroelbo.evaluation.strategies import Loop, Plate, Repeat
from pyroelbo.evidence import annealed, potential
from pyroelbo.models import PPCA
from tests.pairs import TABLE, Convolutional, Nonlinear

NUMBERS_TESTED = 100  # z-scores in this file, rounded up: together they raise 1e-6 false alarms
Z_LIMIT = -statistics.NormalDist().inv_cdf(0.5e-6 / NUMBERS_TESTED)


def z_scores(bound, exact):
    """(Ẑ - Z) / (standard error of Ẑ); for an upper bound the same of 1/Z."""
    sign = -1 if bound.kind == "upper" else 1
    return -torch.expm1(sign * (exact - bound.value)) / bound.stderr


def pair_of(prior, likelihood, proposal):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", prior(y))
            pyro.sample("y", likelihood(z), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", proposal(y))

    return Pair.of(model, guide)


def counts():
    pair = pair_of(
        lambda y: dist.Gamma(torch.full_like(y, 2.0), 1.0),
        dist.Poisson,
        lambda y: dist.LogNormal(((1 + y) / 2).log(), 0.8),
    )
    y = torch.tensor([0.0, 3.0])
    return pair, y, dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(y)


def coin():
    pair = pair_of(
        lambda y: dist.Beta(torch.full_like(y, 2.0), 3.0),
        lambda z: dist.Bernoulli(z),
        lambda y: dist.Beta(1 + y, torch.full_like(y, 2.0)),
    )
    return pair, torch.tensor([0.0, 1.0]), torch.tensor([0.6, 0.4]).log()


def masked():
    """A padded batch of another size than the plate's, with a latent for each time."""

    def model(y):
        with (
            pyro.plate("data", 1000, subsample_size=len(y)),
            pyro.plate("time", 3, dim=-2),
            poutine.mask(mask=seen),
        ):
            z = pyro.sample("z", dist.Normal(torch.zeros(3, len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y.T)

    def guide(y):
        with (
            pyro.plate("data", 1000, subsample_size=len(y)),
            pyro.plate("time", 3, dim=-2),
            poutine.mask(mask=seen),
        ):
            pyro.sample("z", dist.Normal(0.2 * y.T, 0.9))

    y = torch.randn(2, 3)
    seen = torch.tensor([[True, True], [True, False], [True, False]])
    exact = torch.where(seen, dist.Normal(0.0, math.sqrt(2)).log_prob(y.T), 0.0).sum(0)
    return Pair.of(model, guide), y, exact


def ppca():
    pair, y = PPCA(4, 2, guide="mean_field"), torch.randn(2, 4)
    return pair, y, pair.log_evidence(y).detach()


CASES = {"ppca": ppca, "counts": counts, "coin": coin, "masked": masked}


def check_unbiased(make=ppca, start="prior", **options):
    pair, y, exact = make()
    bound = evidence.ais(pair, y, 6, 3000, start=start, leapfrog=3, **options)
    assert (z_scores(bound, exact).abs() < Z_LIMIT).all()


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("name", CASES)
def test_the_weights_mean_is_the_evidence(name, start):
    check_unbiased(CASES[name], start)


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_reverse_weights_mean_is_one_over_the_evidence(start):
    check_unbiased(ppca, start, reverse=True)


class Ruled(ExactPair):
    """A latent of four values, the first of which y = 1 rules out."""

    shares = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    chances = torch.tensor([0.0, 0.2, 0.6, 0.9], dtype=torch.float64)

    def model(self, y):
        # logits keep a true -inf, which probabilities would clamp
        table = torch.stack([1 - self.chances, self.chances], -1).log()
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(self.shares))
            pyro.sample("y", dist.Categorical(logits=table[z]), obs=y)

    def joint(self, y):
        return self.shares * torch.where(y[:, None] > 0, self.chances, 1 - self.chances)

    def posterior(self, y):
        return dist.Categorical(self.joint(y))

    def log_evidence(self, y):
        return self.joint(y).sum(-1).log()

    def placeholder(self, n):
        return torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("temperatures", [1, 6])
def test_reverse_weights_lack_what_the_start_draws_in_vain(temperatures):
    """0.4 of the prior's mass where y = 1: 1/w has mean 0.6/p(y)."""
    pair, y = Ruled(), torch.tensor([0, 1])
    bound = evidence.ais(pair, y, temperatures, 3000, start="prior", leapfrog=2, reverse=True)
    kept = torch.tensor([1.0, 0.6])
    assert (z_scores(bound, pair.log_evidence(y) - kept.log()).abs() < Z_LIMIT).all()


def test_a_bound_says_how_far_above_it_must_stay():
    for reverse in (True, "chains"):
        notes = [
            evidence.ais(Ruled(), torch.tensor([y]), 6, 1000, start="prior", reverse=reverse).notes
            for y in (0, 1)
        ]
        assert not any("is zero for" in note for note in notes[0])
        (note,) = (note for note in notes[1] if "is zero for" in note)
        # of 5000 draws or more, so that 5 % are seven standard deviations
        assert abs(float(re.search(r"([\d.]+)% of the prior", note)[1]) - 40) < 5
        assert re.search(r"stays 0\.(4|5)\d* nats or more above", note)
    both = evidence.bdmc(Ruled(), 50, 6, 2, start="prior", progress=False)
    assert any("is zero for" in note for note in both.upper.notes)
    assert not any("is zero for" in note for note in both.lower.notes)


def check_steps_are_fixed():
    """The same random numbers give the same weights twice, from the step sizes that the pilot left."""
    pair, y, _ = ppca()
    annealer = annealed._Annealer(terms.Evaluator(pair, y, with_guide=False), 6, 3, "prior")
    bar = annealer.bar(8, False)
    annealer.adapt(bar)
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        runs.append(annealer.forward(8, bar))
    assert torch.equal(*runs)


def test_step_sizes_are_fixed_in_the_run():
    check_steps_are_fixed()


def wrong_sign(before, after):
    return after - before


def always(before, after):
    return torch.zeros_like(before)


def by_slope(self, points, beta, step, scale, rows):
    """Step sizes that follow each particle's own slope: detailed balance is lost."""
    return HONEST_MOVE(self, points, beta, 3 * step / (1 + points.slope(beta).norm(dim=-1)), scale, rows)


def by_acceptance(self, points, beta, step, scale, rows):
    """Step sizes that go on being adapted during the run."""
    points, rate = HONEST_MOVE(self, points, beta, step, scale, rows)
    if len(self.steps):
        self.steps = self.steps * (1 + 0.1 * (rate.nanmean(0) - 0.8))
    return points, rate


def short_path(temperatures):
    return [0.8 * i / temperatures for i in range(temperatures + 1)]


HONEST_MOVE = annealed._Annealer._move
BUGS = {
    "a wrong sign in the acceptance": ("_log_acceptance", wrong_sign, check_unbiased),
    "no rejection": ("_log_acceptance", always, check_unbiased),
    "steps by the slope": ("_move", by_slope, check_unbiased),
    "steps adapted in the run": ("_move", by_acceptance, check_steps_are_fixed),
    "a path that stops short": ("_schedule", short_path, check_unbiased),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    """The tests above must fail if the chains make one of these mistakes."""
    name, planted, check = BUGS[bug]
    monkeypatch.setattr(annealed._Annealer if name == "_move" else annealed, name, planted)
    with pytest.raises(AssertionError):
        check()


def test_one_temperature_is_importance_sampling():
    pair, y, _ = ppca()
    pyro.set_rng_seed(0)
    plain = evidence.ais(pair, y, 1, 50)
    log_w = terms.Evaluator(pair, y).sample(50_000).log_weight.detach()
    assert plain.method == "ais-1" and (plain.k_hat is not None and plain.ess.max() < 50)
    exact = log_w.exp().mean(0).log()
    assert (z_scores(evidence.ais(pair, y, 1, 20_000), exact).abs() < Z_LIMIT).all()


def test_more_temperatures_are_tighter_and_bounds_are_ordered():
    pair = PPCA(8, 4, guide="mean_field")
    _, y = pair.simulate(20)
    exact = pair.log_evidence(y).detach()
    gaps = []
    for temperatures in (2, 20):
        lower = evidence.ais(pair, y, temperatures, 8, start="prior", leapfrog=3)
        upper = evidence.ais(pair, y, temperatures, 8, start="prior", leapfrog=3, reverse=True)
        below, above = exact - lower.value, upper.value - exact
        for gap in (below, above):
            assert gap.mean() > -Z_LIMIT * gap.std() / math.sqrt(len(gap))
        gaps.append(float(below.mean()))
    assert gaps[1] < 0.5 * gaps[0]


def test_with_the_exact_guide_both_bounds_are_the_evidence():
    pair, y = PPCA(5, 2), torch.randn(6, 5)
    for reverse in (False, True):
        bound = evidence.ais(pair, y, 3, 3, leapfrog=1, reverse=reverse)
        assert (bound.value - pair.log_evidence(y)).abs().max() < 1e-9
        assert bound.kind == ("upper" if reverse else "lower")


def test_the_sandwich_of_a_ppca_closes():
    pair = PPCA(10, 5, guide="mean_field")
    sandwich = evidence.bdmc(pair, 30, temperatures=60, particles=4, leapfrog=3)
    assert abs(sandwich.mean_gap) < 0.25
    assert sandwich.mean_gap > -Z_LIMIT * sandwich.mean_gap_error
    assert (sandwich.lower.kind, sandwich.upper.kind) == ("lower", "upper")
    assert sandwich.upper.stderr.isnan().all()
    assert "only for data simulated by the model" in str(sandwich) and sandwich.to_dict()["upper"]["cost"] > 0


@pytest.mark.parametrize("name", ["own", "own-conv"])
def test_other_ways_to_run_particles(name):
    """Networks that refuse a particle dimension, and pairs that only a loop can run."""
    make, _ = TABLE[name]
    pair = make()
    _, y = pair.simulate(3)
    exact = evidence.quadrature(pair, y).value
    assert (z_scores(evidence.ais(pair, y, 4, 400, leapfrog=2), exact).abs() < Z_LIMIT).all()
    annealer = annealed._Annealer(terms.Evaluator(pair, y), 3, 1, "guide")
    assert type(annealer.evaluator.strategy) is (Repeat if isinstance(pair, Convolutional) else Plate)
    annealer.evaluator.strategy, annealer.pilot_moves = Loop(annealer.evaluator.layout), 1
    bar = annealer.bar(4, False)
    annealer.adapt(bar)
    assert annealer.forward(4, bar).shape == (4, 3)


def test_chunks_by_memory_cover_everything(monkeypatch):
    pair, y = Nonlinear(), torch.randn(5, 4)
    exact = evidence.quadrature(pair, y).value
    monkeypatch.setitem(memory.BUDGET, "cpu", 8 * 400 * 8)
    evaluator = terms.Evaluator(pair, y)
    assert len(list(evaluator.chunks(300))) >= 4
    assert (z_scores(evidence.ais(pair, y, 3, 300, leapfrog=2), exact).abs() < Z_LIMIT).all()
    sandwich = evidence.bdmc(pair, 5, 3, 100, leapfrog=1)
    assert sandwich.gap.shape == (5,) and sandwich.gap.isfinite().all()


def test_cost_is_what_was_evaluated(monkeypatch):
    pair, y, _ = ppca()
    seen = []
    drawn, scored = terms.Evaluator.sample_pass, terms.Evaluator.terms

    def draw(self, particles, rows=None):
        seen.append(particles * len(y))
        return drawn(self, particles, rows)

    def score(self, latents, rows=None):
        seen.append(3 * len(latents["z"]) * len(y))
        return scored(self, latents, rows)

    monkeypatch.setattr(potential, "_PATIENCE", 10**9)  # every evaluation by the programs
    monkeypatch.setattr(terms.Evaluator, "sample_pass", draw)
    monkeypatch.setattr(terms.Evaluator, "terms", score)
    assert evidence.ais(pair, y, 3, 7).cost == sum(seen)


def test_a_guide_wider_than_the_support_weighs_zero_there():
    pair = pair_of(
        lambda y: dist.Uniform(torch.zeros(len(y)), 1.0),
        lambda z: dist.Normal(z, 1.0),
        lambda y: dist.Normal(torch.full((len(y),), 0.5), 1.0),
    )
    y = torch.rand(2)
    normal = dist.Normal(torch.zeros(2), 1.0)
    exact = (normal.cdf(y) - normal.cdf(y - 1)).log()
    assert (z_scores(evidence.ais(pair, y, 4, 3000, leapfrog=2), exact).abs() < Z_LIMIT).all()


def test_latents_beyond_the_guides_reach_make_the_simulated_upper_bound_infinite_and_say_so():
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros(len(y)), 1.0),
        lambda z: dist.Normal(z, 1.0),
        lambda y: dist.Uniform(torch.full((len(y),), -0.5), 0.5),
    )
    found = evidence.bdmc(pair, 20, 3, 4, leapfrog=1, like=torch.zeros(20), progress=False)
    lost = int(found.upper.value.isinf().sum())
    assert 0 < lost < 20  # 38 % of the prior lies within
    assert f"infinite for {lost} of 20 data" in found.upper.notes[-1]


def test_a_guide_whose_formula_goes_on_beyond_its_support_is_no_density_there():
    """An exponential's is finite below zero: the upper bound of latents there fell below ln p(y)."""
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros(len(y)), 1.0),
        lambda z: dist.Normal(z, 1.0),
        lambda y: dist.Exponential(torch.ones(len(y))),
    )
    found = evidence.bdmc(pair, 40, 1, 2, like=torch.zeros(40), progress=False)
    assert 8 < int(found.upper.value.isinf().sum()) < 32  # half of them, six standard deviations at most


def test_a_guide_with_fewer_categories_than_the_model_is_started_from_the_prior():
    pair = pair_of(
        lambda y: dist.Categorical(torch.ones(3)),
        lambda z: dist.Normal(z.double(), 1.0),
        lambda y: dist.Categorical(torch.ones(len(y), 2)),
    )
    y = torch.tensor([0.3, 2.0])
    bound = audit(pair, y, references=("ais",), temperatures=4, progress=False)["ais-4"]
    assert any("started from the prior" in note for note in bound.notes)
    assert (z_scores(bound, evidence.exact(pair, y).value).abs() < Z_LIMIT).all()


def test_what_it_does_not_take():
    with pytest.raises(evidence.Unavailable, match="no exact posterior"):
        evidence.ais(Nonlinear(), torch.randn(2, 4), reverse=True)
    for options, message in (
        ({"start": "posterior"}, "start: expected"),
        ({"temperatures": 0}, "temperatures"),
        ({"leapfrog": 0}, "leapfrog"),
        ({"reverse": "posterior"}, "reverse: expected"),
        ({"reverse": "chains", "temperatures": 1}, "temperatures: expected at least 2"),
        ({"particles": 0}, "particles"),
    ):
        with pytest.raises(ValueError, match=message):
            evidence.ais(Nonlinear(), torch.randn(2, 4), **options)

    def guide(y):
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(y, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(u, 1.0))

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(evidence.Unavailable, match="'u' is auxiliary"):
        evidence.ais(Pair.of(model, guide), torch.randn(3))

    def rounded(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z.detach().round(), 1.0), obs=y)

    def flat(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    with pytest.raises(evidence.Unavailable, match="latent site 'z' and has no gradient"):
        evidence.ais(Pair.of(rounded, flat), torch.randn(3))

    def through_numpy(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(torch.from_numpy(z.numpy() ** 2), 1.0), obs=y)

    with pytest.raises(evidence.Unavailable, match="latent site 'z' and gives no gradient"):
        evidence.ais(Pair.of(through_numpy, flat), torch.randn(3))


def test_a_thousand_latents():
    """y = Σ z / √1000 + noise: steps shrink with the dimension, and the bound stays a tight one."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1000), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1) / math.sqrt(1000), 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), 1000), 1.0).to_event(1))

    y = torch.tensor([0.0, 2.0])
    exact = dist.Normal(0.0, math.sqrt(1.25)).log_prob(y)
    bound = evidence.ais(Pair.of(model, guide), y, 60, 16)
    assert ((bound.value - exact).abs() < 0.5).all() and (z_scores(bound, exact) < Z_LIMIT).all()


def test_a_guide_narrower_than_the_posterior_bounds_from_below():
    """A guide that never looks beyond (0, 1): what it misses is missing from the bound, not added."""
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros_like(y), 1.0),
        lambda z: dist.Normal(z, 1.0),
        lambda y: dist.Uniform(torch.zeros_like(y), 1.0),
    )
    y = torch.tensor([0.5, 3.0])
    seen = dist.Normal(0.5 * y, math.sqrt(0.5))
    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(y)
    part = exact + (seen.cdf(torch.ones(2)) - seen.cdf(torch.zeros(2))).log()
    for bound in (evidence.iwae(pair, y, 3000), evidence.ais(pair, y, 6, 3000, leapfrog=2)):
        assert (z_scores(bound, part).abs() < Z_LIMIT).all()
        assert bound.kind == "lower" and (bound.value < exact).all()


def test_chains_at_the_posterior_give_an_estimate_from_above():
    """On a pair with a known posterior the estimate agrees with the evidence."""
    pair = PPCA(6, 3, guide="mean_field")
    _, y = pair.simulate(30)
    exact = pair.log_evidence(y).detach()
    above = evidence.ais(pair, y, 30, 8, leapfrog=3, reverse="chains")
    gap = above.value - exact
    assert above.kind == "estimate"
    assert any("only if the chains have converged" in note for note in above.notes)
    assert abs(float(gap.mean())) < 0.1 + Z_LIMIT * float(gap.std()) / math.sqrt(30)


@pytest.mark.cuda
def test_on_a_gpu():
    pair = PPCA(8, 4, guide="mean_field").to("cuda")
    _, y = pair.simulate(16)
    bound = evidence.ais(pair, y.cpu(), 50, 64, reverse=False)
    assert bound.value.is_cuda and (bound.value - pair.log_evidence(y)).abs().max() < 0.5


@pytest.mark.slow
def test_the_sandwich_of_ten_dimensions_closes_to_a_twentieth():
    pair = PPCA(20, 10, guide="mean_field")
    sandwich = evidence.bdmc(pair, 100, temperatures=500, particles=8)
    assert abs(sandwich.mean_gap) < 0.05 + 3 * sandwich.mean_gap_error


def scales(y):
    """A location and a positive scale for each datum."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
        s = pyro.sample("s", dist.LogNormal(torch.zeros(len(y)), 0.5))
        pyro.sample("y", dist.Normal(z, s), obs=y)


@pytest.mark.parametrize(
    ("auto", "scope"), [(AutoNormal, "datum"), (AutoStructured, "joint"), (AutoIAFNormal, "joint")]
)
def test_automatic_guides_start_chains_by_a_change_of_variables(auto, scope):
    y = torch.tensor([0.3, -1.0]) if scope == "datum" else torch.tensor([0.4])
    guide = auto(scales) if auto is AutoIAFNormal else auto(scales, init_scale=0.8)
    pair = Pair.of(scales, guide)
    truth = evidence.quadrature(Pair.of(scales, AutoNormal(scales, init_scale=0.7)), y, scope=scope)
    for temperatures in (1, 8):  # with one it is importance sampling
        bound = evidence.ais(pair, y, temperatures, 200, scope=scope, progress=False)
        assert bound.kind == "lower" and not any("prior" in note for note in bound.notes)
        assert (z_scores(bound, truth.value).abs() < Z_LIMIT).all()
    if scope == "datum":
        with pytest.raises(evidence.Unavailable, match="is auxiliary.*use start='prior'"):
            evidence.bdmc(pair, 2, like=y)

"""AIS over discrete latents, alone and beside continuous ones: transitions leave their density as it is, and
Ẑ is unbiased.

False alarms: 1e-6 over all z-scores of the file together (Bonferroni)."""

import itertools
import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, audit, distributions, evidence, models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evidence import annealed, lattice
from pyroelbo.pair import ExactPair
from tests.pairs import TABLE

NUMBERS_TESTED = 200
Z_LIMIT = -statistics.NormalDist().inv_cdf(0.5e-6 / NUMBERS_TESTED)


def z_scores(bound, exact):
    sign = -1 if bound.kind == "upper" else 1
    return -torch.expm1(sign * (exact - bound.value)) / bound.stderr


def bits():
    """Four switches at one site and a die for each of two times; the datum sees their sum."""
    odds, faces = torch.tensor([0.3, -0.5, 1.0, 0.2]), torch.tensor([0.2, 0.3, 0.5])

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(logits=odds).to_event(1))
            with pyro.plate("time", 2, dim=-2):
                b = pyro.sample("b", dist.Categorical(faces))
            pyro.sample("y", dist.Normal(a.sum(-1) - b.to(y.dtype).sum(-2), 0.7), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("a", dist.Bernoulli(logits=(0.3 * y)[:, None].expand(-1, 4)).to_event(1))
            with pyro.plate("time", 2, dim=-2):
                pyro.sample("b", dist.Categorical(torch.ones(3)))

    y = torch.tensor([-3.0, 0.5, 4.0])
    total = []
    for a in itertools.product((0, 1), repeat=4):
        for b in itertools.product(range(3), repeat=2):
            prior = dist.Bernoulli(logits=odds).log_prob(torch.tensor(a, dtype=y.dtype)).sum()
            prior = prior + faces[list(b)].log().sum()
            total.append(prior + dist.Normal(float(sum(a) - sum(b)), 0.7).log_prob(y))
    return Pair.of(model, guide), y, torch.logsumexp(torch.stack(total), 0)


def counts():
    """A Poisson count without a last value, seen through noise."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Poisson(torch.full((len(y),), 4.0)))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Geometric(torch.full((len(y),), 0.15)))

    y = torch.tensor([0.5, 9.0])
    z = torch.arange(60.0)[:, None]
    return (
        Pair.of(model, guide),
        y,
        (dist.Poisson(4.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(y)).logsumexp(0),
    )


class Switching(ExactPair):
    """A component and a position drawn from it: mixed latents, whose posterior is known."""

    weights, centers = torch.tensor([0.2, 0.8]), torch.tensor([-2.0, 1.5])

    def model(self, y):
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(self.weights.to(y)))
            z = pyro.sample("z", dist.Normal(self.centers.to(y)[c], 0.5))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(logits=torch.stack([-0.5 * y, 0.5 * y], -1)))
            pyro.sample("z", dist.Normal(0.4 * y + 0.3 * c, 0.8))

    def log_evidence(self, y):
        each = dist.Normal(self.centers.to(y), math.sqrt(1.25)).log_prob(y[:, None])
        return (each + self.weights.to(y).log()).logsumexp(-1)

    def draws(self, y, count):
        each = (
            dist.Normal(self.centers.to(y), math.sqrt(1.25)).log_prob(y[:, None]) + self.weights.to(y).log()
        )
        c = dist.Categorical(logits=each).sample((count,))
        return {"c": c, "z": dist.Normal((4 * self.centers.to(y)[c] + y) / 5, math.sqrt(0.2)).sample()}


def switching():
    pair, y = Switching(), torch.tensor([-1.0, 0.3, 4.0])
    return pair, y, pair.log_evidence(y)


def enumerable(make):
    """A pair of the library with finite latents, three of its data, and the sum over all latents."""

    def case():
        torch.manual_seed(6)
        pair = make()
        with torch.no_grad():
            for parameter in pair.generator.parameters():
                parameter.mul_(2)  # posteriors far from the prior
        y = pair.simulate(3)[1]
        return pair, y, evidence.exact(pair, y).value

    return case


def row(name):
    def make():
        pair, y = TABLE[name][0](), TABLE[name][1](2)
        return pair, y, pair.log_evidence(y).detach()

    return make


CASES = (
    {"bits": bits, "counts": counts, "switching": switching}
    | {
        "one-hot": enumerable(lambda: models.DiscreteVAE(6, (3, 2), (), 3)),
        "two layers of eight": enumerable(lambda: models.SigmoidBeliefNet(10, (8, 8))),
        "tree": row("chow_liu"),
    }
    | {name: row(name) for name in ("mixture-encoder", "bernoulli_mixture-encoder", "hmm-mean-field")}
)


def check_unbiased(make=switching, start="prior", **options):
    pair, y, exact = make()
    bound = evidence.ais(pair, y, 4, 1500, start=start, leapfrog=1, **options)
    assert (z_scores(bound, exact).abs() < Z_LIMIT).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_the_weights_mean_is_the_evidence(name, start):
    if (name, start) == ("tree", "guide"):  # the posterior: no weight varies
        pair, y, exact = CASES[name]()
        torch.testing.assert_close(evidence.ais(pair, y, 4, 5, leapfrog=1).value, exact)
        return
    check_unbiased(CASES[name], start)


@pytest.mark.parametrize("name", ["mixture-encoder", "hmm-mean-field", "tree"])
def test_reverse_weights_mean_is_one_over_the_evidence(name):
    check_unbiased(CASES[name], "prior", reverse=True)


def test_reverse_of_mixed_latents():
    pair, y, exact = switching()
    annealer = annealed._Annealer(Evaluator(pair, y, with_guide=False), 4, 1, "prior")
    bar = annealer.bar(1500, False)
    annealer.adapt(bar)
    log_w = annealer.reverse(*annealer.coordinates(pair.draws(y, 1500)), bar)
    assert (z_scores(annealer.bound(log_w, "upper"), exact).abs() < Z_LIMIT).all()


def test_a_sandwich_of_mixed_latents_closes():
    pair = Switching()
    sandwich = evidence.bdmc(pair, 40, 12, 4, start="prior", leapfrog=2, like=torch.zeros(1))
    exact = pair.log_evidence(torch.zeros(1))
    assert exact.isfinite().all() and abs(sandwich.mean_gap) < 0.3
    assert sandwich.mean_gap > -Z_LIMIT * sandwich.mean_gap_error


@pytest.mark.parametrize("name", ["one-hot", "two layers of eight"])
def test_reverse_chains_of_simulated_data_have_the_mean_one(name):
    """One z a datum is an exact draw of p(z | y), so that p(y) / w of the chain backwards has mean one."""
    pair = CASES[name]()[0]
    drawn, simulate = [], pair.simulate
    pair.simulate = lambda *args, **named: drawn.append(simulate(*args, **named)) or drawn[-1]
    upper = evidence.bdmc(pair, 50, 4, 4, start="prior", leapfrog=1).upper
    ratio = (evidence.exact(pair, drawn[0][1]).value - upper.value).exp()
    assert abs(ratio.mean() - 1) < Z_LIMIT * ratio.std() / 50**0.5
    assert ratio.std() > 0.01  # the chains are no exact ones


@pytest.mark.parametrize("name", ["one-hot", "two layers of eight"])
def test_every_coordinate_of_finite_latents_moves_alone(name):
    pair, y, _ = CASES[name]()
    box = lattice.Lattice(Evaluator(pair, y))
    _, batch = pair.simulate(3)
    latents = Evaluator(pair, batch).sample_pass(500).latents
    k = box.to_vector(latents)
    assert box.moves == box.dims == (5 if name == "one-hot" else 16)
    back = box.to_latents(k)
    assert all(
        torch.equal(back[key], value) and back[key].dtype == value.dtype for key, value in latents.items()
    )
    moved = box.propose(k)
    assert ((moved != k).sum(-1) == 1).all() and (moved != k).any((0, 1)).all()
    assert moved.min() == 0 and moved.max() == (2 if name == "one-hot" else 1)


def test_an_audit_sets_ais_beside_the_exact_sum():
    pair, y, _ = CASES["one-hot"]()
    found = audit(pair, y, references=("exact", "ais"), temperatures=4, particles=20)
    rows = {b.method: b for b in found.bounds}
    assert (z_scores(rows["ais-4"], rows["exact"].value).abs() < Z_LIMIT).all()


def test_structures_move_only_as_a_whole(monkeypatch):
    """Labels of a parse constrain one another, so no single one may be changed: as if a chain were one."""
    monkeypatch.setattr(distributions.LinearChain, "free_labels", False)
    pair, y, exact = CASES["hmm-mean-field"]()
    assert lattice.Lattice(Evaluator(pair, y)).moves == 0
    bound = evidence.ais(pair, y, 5, 1500, leapfrog=2)
    assert (z_scores(bound, exact).abs() < Z_LIMIT).all()


def check_invariance():
    """Particles drawn from f_β exactly are still so distributed after a transition: a table of counts."""
    values = torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3))
    table = torch.randn(2, 2, 3)

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
            b = pyro.sample("b", dist.Categorical(torch.tensor([0.1, 0.3, 0.6])))
            a = a.long()
            pyro.sample("y", dist.Normal(table[a[..., 0], a[..., 1], b], 0.6), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("a", dist.Bernoulli(torch.tensor([0.7, 0.4])).to_event(1))
            pyro.sample("b", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))

    annealer = annealed._Annealer(Evaluator(Pair.of(model, guide), torch.tensor([0.7])), 3, 1, "guide")
    annealer._draw_latents(1, None)
    every = annealer._points(torch.zeros(12, 1, 0), values[:, None], None)
    for beta in (0.3, 1.0):
        exact = every.density(beta).softmax(0).squeeze(-1)
        start = torch.multinomial(exact, 60_000, replacement=True)
        points = annealer._points(torch.zeros(60_000, 1, 0), values[start][:, None], None)
        moved, _ = annealer._move(points, beta, None, None, None)
        code = (moved.k.squeeze(1) * torch.tensor([6, 3, 1])).sum(-1)
        share = torch.bincount(code, minlength=12) / 60_000
        assert ((share - exact).abs() / (exact * (1 - exact) / 60_000).sqrt() < Z_LIMIT).all()
        assert (moved.k != points.k).any()


def test_transitions_leave_the_density_as_it_is():
    check_invariance()


def always_up(self, k):
    """A proposal that is not symmetric: a die only moves to its next face."""
    index = torch.randint(k.shape[-1], (*k.shape[:-1], 1))
    return k.scatter(-1, index, (k.gather(-1, index) + 1) % self._size[index].clamp_min(2))


def toward_zero(self, k):
    """More often down than up."""
    down = HONEST_PROPOSAL(self, k)
    return torch.where(torch.rand(*k.shape[:-1], 1) < 0.5, down.minimum(k), down)


HONEST_PROPOSAL = lattice.Lattice.propose
BUGS = {
    "a proposal that is not symmetric": (lattice.Lattice, "propose", toward_zero, check_invariance),
    "one way round": (lattice.Lattice, "propose", always_up, check_invariance),
    "no rejection": (annealed, "_log_acceptance", lambda a, b: torch.zeros_like(a), check_invariance),
    "a wrong sign": (annealed, "_log_acceptance", lambda a, b: b - a, check_unbiased),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    owner, name, planted, check = BUGS[bug]
    monkeypatch.setattr(owner, name, planted)
    with pytest.raises(AssertionError):
        check()


def test_counts_never_step_below_their_first_value():
    pair, y, _ = counts()
    box = lattice.Lattice(Evaluator(pair, y))
    k = torch.zeros(1000, 2, 1, dtype=torch.long)
    moved = box.propose(k)
    assert (moved >= 0).all() and (moved == 0).double().mean().sub(0.5).abs() < 0.1
    assert set(moved.unique().tolist()) == {0, 1, 2, 4, 8, 16}

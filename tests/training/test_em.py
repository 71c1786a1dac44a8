"""EM: monotone on every exact pair, equal to other people's EM, and what it refuses."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroelbo import ExactPair, Pair, audit, evidence, fit, fit_em, models
from pyroelbo import distributions as ped
from pyroelbo.evidence import exact
from pyroelbo.models.kmeans import k_means
from pyroelbo.runs import RunDirectory
from pyroelbo.training.em import NotMonotone
from tests.pairs import CONDITIONAL, EM, EXACT, EXACT_GUIDE, TABLE

# fitted by EM, beside a guide that is not the posterior
OTHER_GUIDE = [n for n in EXACT if n not in EXACT_GUIDE and hasattr(TABLE[n][0](), "m_step")]


def quiet(pair, data, **settings):
    return fit_em(pair, data, progress=False, **{"tolerance": 0.0, **settings})


def weights(pair):
    return {k: v.detach().clone() for k, v in pair.named_parameters()}


def assert_climbs(run, slack=1e-9):
    losses = torch.tensor(run.losses)
    assert (losses[1:] <= losses[:-1] + slack * losses[:-1].abs().clamp_min(1)).all()
    assert losses[-1] < losses[0] - 1e-4


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", [*EM, "ctc"])
def test_em_is_monotone(name, hard):
    make, draw = {**TABLE, **CONDITIONAL}[name]
    pair, y = make(), draw(60)
    # the noise of a continuous latent runs to zero where its best value stands for all
    epochs = 1 if hard and name.startswith(("ppca", "state_space")) else 12
    with pyro.validation_enabled(True):
        run = quiet(pair, y, epochs=epochs, hard=hard)
    if not hasattr(pair, "log_prior") or pair.log_prior() == 0:
        assert_climbs(run)
    assert run.stopped in ("epochs", "converged") and [r["epoch"] for r in run.metrics] == list(
        range(len(run.metrics))
    )
    if not hard:
        evidence = pair.log_evidence(*y) if isinstance(y, tuple) else pair.log_evidence(y)
        assert run.losses[-1] == pytest.approx(-float(evidence.mean().detach()), rel=1e-10)


@pytest.mark.parametrize("name", [n for n in EM if hasattr(TABLE[n][0](), "m_step")])
def test_pieces_add_up(name):
    make, draw = TABLE[name]
    torch.manual_seed(3)
    one = make()
    torch.manual_seed(3)
    two = make()
    y = draw(50)
    a, b = quiet(one, y, epochs=4), quiet(two, y, epochs=4, batch_size=11)
    torch.testing.assert_close(torch.tensor(a.losses), torch.tensor(b.losses), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OTHER_GUIDE)
def test_em_of_the_generator_beside_another_guide(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(60)
    before = weights(pair)
    assert_climbs(quiet(pair, y, epochs=5))
    assert all(torch.equal(p, before[k]) for k, p in pair.named_parameters() if k.startswith("encoder"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EM)
def test_the_elbo_of_the_exact_guide_is_the_evidence(name, dtype):
    torch.set_default_dtype(dtype)
    make, draw = TABLE[name]
    pair, y = make(), draw(8)
    bound, value = evidence.elbo(pair, y, particles=16), exact(pair, y).value
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    assert (bound.value - value).abs().max() < tolerance
    assert bound.stderr.max() < tolerance


@pytest.mark.parametrize("name", [n for n in EM if hasattr(TABLE[n][0](), "m_step")])
def test_a_planted_wrong_m_step_is_caught_in_every_exact_pair(name, monkeypatch):
    make, draw = TABLE[name]
    pair, y = make(), draw(60)
    quiet(pair, y, epochs=2)
    right = type(pair).m_step

    def wrong(self, statistics):
        right(self, statistics)
        with torch.no_grad():
            for p in self.parameters():
                p.add_(torch.randn_like(p))

    monkeypatch.setattr(type(pair), "m_step", wrong)
    with pytest.raises(NotMonotone, match=r"step 1 \(epoch 1\)"):
        quiet(pair, y, epochs=2)


def test_padded_sequences_count_as_far_as_they_go():
    torch.manual_seed(0)
    y = torch.randint(4, (6, 7))
    lengths = torch.tensor([7, 3, 1, 5, 7, 2])
    padded = y.clone()
    padded[torch.arange(7) >= lengths[:, None]] = 0
    pair = models.HMM(3, 4)
    alone = torch.cat([pair.log_evidence(y[i : i + 1, :n]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(pair.log_evidence(padded, lengths), alone)
    torch.testing.assert_close(pair.log_evidence(y, lengths), alone)
    bound = evidence.elbo(pair, (padded, lengths), particles=4)
    torch.testing.assert_close(bound.value, alone.detach())
    assert_climbs(quiet(pair, (padded, lengths), epochs=8))
    latents, (drawn, same) = pair.simulate(6, like=(padded, lengths))
    assert drawn.shape == padded.shape and torch.equal(same, lengths) and latents["z"].shape == (6, 7)


def test_padded_paths_of_a_state_space_model():
    y, lengths = torch.randn(4, 6, 2), torch.tensor([6, 3, 1, 5])
    padded = torch.where((torch.arange(6) < lengths[:, None])[..., None], y, 7.0)
    for guide in ("exact", "mean_field"):
        pair = models.StateSpace(2, 3, guide)
        alone = torch.cat([pair.log_evidence(y[i : i + 1, :n]) for i, n in enumerate(lengths)])
        torch.testing.assert_close(pair.log_evidence(padded, lengths), alone)
        bound = evidence.elbo(pair, (padded, lengths), particles=8)
        if guide == "exact":
            torch.testing.assert_close(bound.value, alone.detach())
        else:
            assert (bound.value < alone).all()
        assert_climbs(quiet(pair, (padded, lengths), epochs=5))
    with pytest.raises(ValueError, match=r"expected shape \[B, T, 2\]"):
        pair.log_evidence(torch.zeros(3, 4))


# ------------------------------------------------------------------------------------------ other people's EM


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_mixture_follows_scikit_learn(covariance):
    mixture = pytest.importorskip("sklearn.mixture")
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.normal(c, s, (80, 3)) for c, s in ((-2, 1.0), (1, 0.5), (3, 2.0))])
    pair = models.GaussianMixture(3, 3, covariance, floor=1e-9)
    pair.initialize(torch.from_numpy(y), start="random")
    g = pair.generator
    precision = (1 / g.variance if covariance == "diagonal" else torch.linalg.inv(g.variance)).detach()
    theirs = mixture.GaussianMixture(
        3,
        covariance_type="diag" if covariance == "diagonal" else "full",
        reg_covar=0,
        max_iter=1,
        warm_start=True,
        tol=0,
        weights_init=g.logits.softmax(0).detach().numpy(),
        means_init=g.loc.detach().numpy().copy(),
        precisions_init=precision.numpy(),
    )
    ours = quiet(pair, torch.from_numpy(y), epochs=30)
    seen = []
    for _ in range(31):
        with pytest.warns(match="did not converge"):
            theirs.fit(y)
        seen.append(theirs.lower_bound_)  # the evidence before this step's M-step
    np.testing.assert_allclose(-np.array(ours.losses), seen, rtol=0, atol=1e-6)


def test_pseudo_data_are_data():
    """MAP of one component is the covariance of the data and of a pseudo-data of the prior's."""
    y = torch.randn(30, 3) @ torch.randn(3, 3)
    apart = y - y.mean(0)
    for covariance in ("diagonal", "full"):
        pair = models.GaussianMixture(3, 1, covariance, smoothing=5.0, spread=0.7)
        quiet(pair, y, epochs=2)
        wanted = (apart.T @ apart + 5 * 0.49 * torch.eye(3)) / 35
        wanted = wanted.diagonal() if covariance == "diagonal" else wanted
        torch.testing.assert_close(pair.generator.variance[0].detach(), wanted)
        pair.zero_grad()
        objective = pair.log_evidence(y).sum() + pair.log_prior()
        objective.backward()
        assert all(p.grad.abs().max() < 1e-8 for p in pair.parameters())


@pytest.mark.parametrize("emission", ["categorical", "gaussian", "poisson"])
def test_an_hmm_follows_hmmlearn(emission):
    hmm = pytest.importorskip("hmmlearn.hmm")
    torch.manual_seed(1)
    lengths = torch.tensor([30, 12, 1, 25])
    pair = models.HMM(3, 5 if emission == "categorical" else 2, emission, floor=1e-9)
    inside = torch.arange(30) < lengths[:, None]
    truth = models.HMM(3, pair.dims, emission)
    _, (y, _) = truth.simulate(4, like=(pair.generator.blank(4, 30), lengths))
    pair.prior.initial.data.normal_()
    flat = y[inside].numpy()
    common = {"n_iter": 25, "tol": -math.inf, "init_params": ""}
    if emission == "categorical":
        theirs, flat = hmm.CategoricalHMM(3, n_features=5, **common), flat[:, None]
        theirs.emissionprob_ = pair.generator.logits.softmax(1).detach().numpy()
    elif emission == "gaussian":
        theirs = hmm.GaussianHMM(3, "diag", min_covar=0, covars_prior=0, **common)
        theirs.means_ = pair.generator.loc.detach().numpy().copy()
        theirs.covars_ = pair.generator.scale.detach().numpy() ** 2
    else:
        theirs = hmm.PoissonHMM(3, lambdas_prior=0.0, lambdas_weight=0.0, **common)
        theirs.lambdas_ = pair.generator.log_rate.exp().detach().numpy()
    theirs.startprob_ = pair.prior.initial.softmax(0).detach().numpy()
    theirs.transmat_ = pair.prior.transition.softmax(1).detach().numpy()
    theirs.fit(flat, lengths.numpy())
    ours = quiet(pair, (y, lengths), epochs=24)
    evidence_of_all = -4 * np.array(ours.losses)
    np.testing.assert_allclose(evidence_of_all, theirs.monitor_.history, rtol=0, atol=1e-6)


def test_em_of_ppca_ends_at_its_closed_form():
    y = torch.randn(200, 5) @ torch.randn(5, 5) + 3.0
    pair = models.PPCA(5, 2)
    quiet(pair, y, epochs=600)
    best = models.PPCA(5, 2).solve(y)
    assert float((best.log_evidence(y).mean() - pair.log_evidence(y).mean()).detach()) < 1e-4
    wider = models.PPCA(5, 2, noise="diagonal")
    quiet(wider, y, epochs=600)
    assert wider.log_evidence(y).mean() > best.log_evidence(y).mean()


# ------------------------------------------------------------------------------------------ other M-steps


class NeuralHMM(ExactPair):
    """Emissions by a network: no closed form."""

    def __init__(self):
        super().__init__()
        self.prior = nn.Parameter(torch.randn(4, 3))
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5))

    def hmm(self, steps=None):
        logits = self.generator(torch.eye(3))
        return ped.HMM(self.prior[0], self.prior[1:], dist.Categorical(logits=logits), steps)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.hmm(y.shape[1]).prior)
            logits = self.generator(torch.eye(3))
            pyro.sample("y", dist.Categorical(logits=logits[z]).to_event(1), obs=y)

    def posterior(self, y):
        return self.hmm().posterior(y)

    def log_evidence(self, y):
        return self.posterior(y).log_partition


@pytest.mark.parametrize("hard", [False, True])
def test_a_gradient_m_step_climbs_too(hard):
    y = torch.randint(5, (20, 6))
    y[:, 1::2] = y[:, ::2]
    pair = NeuralHMM()
    run = quiet(pair, y, epochs=15, hard=hard, batch_size=7)
    assert_climbs(run)
    if not hard:
        assert run.losses[-1] == pytest.approx(-evidence.exact(pair, y).mean)


def test_gradient_m_steps_reach_what_closed_ones_reach():
    torch.manual_seed(0)
    y = torch.randint(4, (40, 5))
    closed, climbed = models.HMM(2, 4), models.HMM(2, 4)
    climbed.load_state_dict(closed.state_dict())
    plain = ExactlyThat(climbed)
    a, b = quiet(closed, y, epochs=3, start="current"), quiet(plain, y, epochs=3, gradient_steps=200)
    torch.testing.assert_close(torch.tensor(a.losses), torch.tensor(b.losses), atol=1e-6, rtol=0)


class ExactlyThat(ExactPair):
    """Another exact pair without its M-step."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def model(self, *batch):
        return self.inner.model(*batch)

    def posterior(self, *batch):
        return self.inner.posterior(*batch)

    def log_evidence(self, *batch):
        return self.inner.log_evidence(*batch)


@pytest.mark.parametrize("hard", [False, True])
def test_any_pair_with_finite_latents(hard):
    class Tree(Pair):
        """Two finite latents and two looks at them: no exact posterior is written down."""

        def __init__(self):
            super().__init__()
            self.top = nn.Parameter(torch.randn(3))
            self.below = nn.Parameter(torch.randn(3, 4))
            self.seen = nn.Parameter(torch.randn(3, 4, 5))

        def model(self, y):
            with pyro.plate("data", len(y)):
                a = pyro.sample("a", dist.Categorical(logits=self.top))
                b = pyro.sample("b", dist.Categorical(logits=self.below[a]))
                pyro.sample("y", dist.Categorical(logits=self.seen[a, b]), obs=y)

        def guide(self, y):
            pass

    y = torch.tensor([0] * 5 + [1] * 3 + [2] * 2 + [3] * 4 + [4] * 6)
    pair = Tree()
    run = quiet(pair, y, epochs=15, hard=hard, batch_size=9)
    assert_climbs(run)
    population = torch.bincount(y) / len(y)
    entropy = -float((population * population.log()).sum())
    if hard:
        assert run.losses[-1] >= entropy - 1e-9
    else:
        assert run.losses[-1] == pytest.approx(entropy, abs=1e-3)
        assert run.losses[-1] == pytest.approx(-evidence.exact(pair, y).mean)


def test_a_categorical_posterior_needs_no_m_step_of_its_own():
    make, draw = TABLE["mixture"]
    y = draw(40)
    for hard in (False, True):
        assert_climbs(quiet(ExactlyThat(make()), y, epochs=4, hard=hard))


# ------------------------------------------------------------------------------------------ ways to run it


def test_the_page_in_the_docs_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "em.md").read_text()
    torch.set_default_dtype(torch.float32)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, names)
    idle, rate = map(float, capsys.readouterr().out.split()[-2:])
    # standard errors of some 0.03 and 0.15: false alarms below 1e-4, and the seed is fixed
    assert abs(idle - 0.3) < 0.12 and abs(rate - 4) < 0.6
    assert audit(names["pair"], names["y"]).gaps[0].mean < 1e-4


def test_stepwise_em_learns_from_pieces():
    torch.manual_seed(4)
    y = torch.cat([torch.randn(100, 2) - 3, torch.randn(100, 2) + 3])
    pair, whole = models.GaussianMixture(2, 2), models.GaussianMixture(2, 2)
    pair.initialize(y)
    whole.load_state_dict(pair.state_dict())
    quiet(whole, y, epochs=60)
    quiet(pair, y, epochs=20, batch_size=20, stepwise=0.7)
    gap = whole.log_evidence(y).mean() - pair.log_evidence(y).mean()
    assert abs(float(gap.detach())) < 0.02


def test_restarts_keep_the_best():
    torch.manual_seed(6)
    y = torch.cat([torch.randn(30, 2) + c for c in (-6, 0, 6, 12)])
    pair = models.GaussianMixture(2, 4)
    run = quiet(pair, y, epochs=40, tolerance=1e-7, restarts=4, start="random")
    ends = [[r["loss"] for r in run.metrics if r["restart"] == k][-1] for k in range(4)]
    assert len(set(ends)) > 1
    assert -float(pair.log_evidence(y).mean().detach()) == pytest.approx(min(ends))


STACKING = [n for n in EM if hasattr(TABLE[n][0](), "stacks")]


@pytest.mark.parametrize(
    "settings", [{}, {"hard": True, "batch_size": 3}, {"batch_size": 3, "stepwise": 0.8}], ids=str
)
@pytest.mark.parametrize("name", STACKING)
def test_restarts_side_by_side_are_those_one_after_another(name, settings, monkeypatch):
    make, draw = TABLE[name]
    y, first = draw(4), make()
    if not name.startswith("hmm"):
        y, settings = draw(45), settings | ({"batch_size": 15} if settings else {})
    settings = {"epochs": 6, "tolerance": 1e-2, "restarts": 5, **settings}
    found = []
    for side_by_side in (True, False):
        pair = make()
        pair.load_state_dict(first.state_dict())
        assert pair.stacks(y)
        if not side_by_side:
            monkeypatch.setattr(type(pair), "stacks", lambda *batch: False)
        with warnings.catch_warnings():  # of scales at the floor, in hard EM of little data
            warnings.simplefilter("ignore", UserWarning)
            run = quiet(pair, y, **settings)
        found.append((sorted((r["restart"], r["epoch"], r["step"], r["loss"]) for r in run.metrics), pair))
    (ours, one), (theirs, other) = found
    assert [r[:3] for r in ours] == [r[:3] for r in theirs]
    np.testing.assert_allclose([r[3] for r in ours], [r[3] for r in theirs], rtol=1e-9, atol=1e-9)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_start_asked_for_is_taken():
    y = torch.cat([torch.randn(40, 2) * 0.1 + torch.tensor(c) for c in ((-9.0, 0), (0, 9), (9, 0), (0, -9))])
    for pair in (
        models.GaussianMixture(2, 4),
        models.GaussianMixture(2, 4, "full"),
        models.HMM(4, 2, "gaussian"),
    ):
        data = y if isinstance(pair, models.GaussianMixture) else y[torch.randperm(160)].view(8, 20, 2)
        run = quiet(pair, data, epochs=3, start="k-means")
        centres = torch.tensor([[-9.0, 0], [0, -9], [0, 9], [9, 0]])
        found = pair.generator.loc.detach()
        # k-means++ with distances that large draws from the same cloud twice with probability below 1e-3
        assert (torch.cdist(found, centres).amin(1) < 0.1).all() and len(run.losses) > 1
    with pytest.raises(ValueError, match=r"start: expected one of \('k-means', 'random'\)"):
        quiet(models.GaussianMixture(2, 4), y, start="middle")
    with pytest.raises(ValueError, match="start: expected 'data' or 'current' for PPCA"):
        quiet(TABLE["ppca"][0](), torch.randn(9, 5), start="random")


def test_k_means_of_fewer_data_than_clusters_and_of_one_place():
    centre, label, rows = k_means(torch.ones(5, 2), 3)
    assert torch.equal(centre, torch.ones(3, 2)) and len(label) == len(rows) == 5
    y = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    centre, label, _ = k_means(y, 2)
    torch.testing.assert_close(centre.sort(0).values, torch.tensor([[0.05], [5.05]]))
    assert label[0] == label[1] != label[2] == label[3]


class Killed(BaseException):
    """A process that ends between two epochs."""


@pytest.mark.parametrize("stepwise", [None, 0.8])
@pytest.mark.parametrize("name", ["hmm-gaussian", "mixture", "state_space"])
def test_resuming_gives_what_an_unbroken_run_gives(name, stepwise, tmp_path):
    make, draw = TABLE[name]
    y, start = draw(40), make()
    settings = {"batch_size": 9, "stepwise": stepwise, "restarts": 2, "checkpoint_seconds": 0.0}
    settings |= {"start": "random"} if name == "mixture" else {}

    def pair():
        fresh = make()
        fresh.load_state_dict(start.state_dict())
        return fresh

    unbroken, broken = pair(), pair()
    whole = quiet(unbroken, y, epochs=6, out=tmp_path / "a", **settings)

    def stop(row):
        if (row["restart"], row["epoch"]) == (1, 3):
            raise Killed

    with pytest.raises(Killed):
        quiet(broken, y, epochs=6, out=tmp_path / "b", callbacks=[stop], **settings)
    again = pair()
    rest = quiet(again, y, epochs=6, out=tmp_path / "b", resume=True, **settings)
    assert rest.metrics == whole.metrics == tuple(RunDirectory(tmp_path / "b").metrics())
    for k, v in weights(unbroken).items():
        assert torch.equal(v, weights(again)[k])
        assert torch.equal(v, RunDirectory(tmp_path / "a").load_weights()[0][k])
    done = quiet(again, y, epochs=6, out=tmp_path / "b", resume=True, **settings)
    assert done.metrics == whole.metrics and done.stopped == "epochs"


def test_em_stops_where_nothing_is_gained():
    make, draw = TABLE["ppca"]
    run = quiet(make(), draw(50), epochs=5000, tolerance=1e-5)
    assert run.stopped == "converged" and run.losses[-2] - run.losses[-1] < 1e-5


# ------------------------------------------------------------------------------------------ refusals


def test_a_wrong_m_step_is_caught():
    class Wrong(models.GaussianMixture):
        count = 0

        def m_step(self, statistics):
            super().m_step(statistics)
            self.count += 1
            if self.count == 3:
                with torch.no_grad():
                    self.generator.loc.add_(0.3)

    with pytest.raises(NotMonotone, match=r"step 3 \(epoch 3\) of Wrong lowered .* M-step"):
        quiet(Wrong(3, 2), torch.randn(50, 3), epochs=10)
    with pytest.raises(NotMonotone, match=r"step 3 \(epoch 3.*\) of Wrong lowered"):
        quiet(Wrong(3, 2), torch.randn(50, 3), epochs=10, restarts=3)


def test_a_scale_that_runs_to_zero_is_floored_with_a_warning():
    y = torch.cat([torch.zeros(10, 2), torch.randn(30, 2) + 5])
    pair = models.GaussianMixture(2, 2, floor=1e-2)
    pair.initialize(y)
    pair.generator.loc.data[0], pair.generator.loc.data[1] = 0.0, 5.0
    with pytest.warns(match="component 0: its scale fell to .* floor=0.01"):
        run = quiet(pair, y, epochs=10)
    assert_climbs(run)
    full = models.GaussianMixture(3, 1, "full", floor=1e-2)
    flat = torch.randn(50, 2) @ torch.randn(2, 3)  # a plane: the best covariance that is allowed is known
    with pytest.warns(match="component 0: its scale fell to .* floor=0.01"):
        assert_climbs(quiet(full, flat, epochs=3))
    unit = flat.std(0, correction=0)  # the floor is relative to the data
    values, vectors = torch.linalg.eigh(torch.cov(flat.T, correction=0) / unit.outer(unit))
    wanted = vectors @ values.clamp_min(1e-4).diag() @ vectors.T * unit.outer(unit)
    torch.testing.assert_close(full.generator.variance[0].detach(), wanted, rtol=1e-5, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet(models.GaussianMixture(3, 2, "full", smoothing=1.0), flat, epochs=9)
    with pytest.warns(match="observation noise fell to"):
        quiet(models.PPCA(3, 1, noise="diagonal"), torch.ones(9, 3), epochs=1)


@pytest.mark.parametrize(
    ("make", "y", "settings", "error", "message"),
    [
        (TABLE["own"][0], torch.zeros(5, 4), {}, TypeError, "expected an exact posterior"),
        (TABLE["mixture"][0], torch.zeros(3, 3), {}, ValueError, "at least 4"),
        (TABLE["mixture"][0], torch.zeros(9, 4), {}, ValueError, r"expected shape \[B, 3\]"),
        (
            TABLE["hmm-categorical"][0],
            torch.zeros(9, 4, 4).long(),
            {},
            ValueError,
            r"expected shape \[B, T\]",
        ),
        (TABLE["hmm-gaussian"][0], torch.zeros(9, 4), {}, ValueError, r"expected shape \[B, T, 2\]"),
        (
            TABLE["hmm-categorical"][0],
            torch.full((2, 3), 4),
            {},
            ValueError,
            "in the support of a Categorical",
        ),
        (TABLE["mixture"][0], torch.full((9, 3), math.nan), {}, ValueError, "NaN"),
        (TABLE["ppca"][0], torch.zeros(9, 5), {"epochs": 0}, ValueError, "epochs: expected"),
        (TABLE["ppca"][0], torch.zeros(9, 5), {"tolerance": -1}, ValueError, "tolerance: expected"),
        (TABLE["ppca"][0], torch.zeros(9, 5), {"stepwise": 0.3}, ValueError, "stepwise: expected"),
        (
            TABLE["ppca"][0],
            torch.zeros(9, 5),
            {"stepwise": 0.7},
            ValueError,
            "stepwise: expected a batch_size",
        ),
        (TABLE["ppca"][0], torch.zeros(9, 5), {"resume": True, "out": None}, ValueError, "give out="),
        (
            NeuralHMM,
            torch.zeros(9, 5),
            {"stepwise": 0.7, "batch_size": 2},
            ValueError,
            "stepwise: expected a pair with e_step",
        ),
        (
            NeuralHMM,
            torch.zeros(9, 5),
            {"restarts": 2},
            ValueError,
            "restarts: expected a pair with initialize",
        ),
    ],
)
def test_refusals(make, y, settings, error, message, tmp_path):
    with pytest.raises(error, match=message):
        quiet(make(), y, **{"out": tmp_path / "run", **settings})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_end(tmp_path):
    """kill -9 while EM runs, and a second process that goes on."""
    code = (
        "import sys, torch; from pyroelbo import fit_em, models; torch.manual_seed(0); y = torch.randn(300, "
        "3)\n"
        "pair = models.GaussianMixture(3, 5, 'full')\n"
        "run = fit_em(pair, y, epochs=150, tolerance=0.0, restarts=4, start='k-means', out=sys.argv[1], "
        "progress=False,\n"
        "    resume=sys.argv[2] == 'resume', checkpoint_seconds=0.0)"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(killed), "no"], env=environment)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = killed / "metrics.jsonl"
        if rows.exists() and len(rows.read_text().splitlines()) > 100:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "weights.safetensors").exists()
    subprocess.run([*command, str(killed), "resume"], check=True, env=environment)
    subprocess.run([*command, str(whole), "no"], check=True, env=environment)
    for name in ("metrics.jsonl", "weights.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_an_impossible_datum_is_named():
    pair = models.HMM(2, 3)
    with torch.no_grad():
        pair.generator.logits[:, 2] = -math.inf
    y = torch.zeros(5, 4, dtype=torch.long)
    y[3, 1] = 2
    with pytest.raises(ValueError, match="got -inf for datum 3 .* in epoch 1"):
        quiet(pair, y)


def test_what_the_hmm_refuses():
    for build, message in (
        (lambda: models.HMM(2, 3, "beta"), "emission: expected"),
        (lambda: models.HMM(2, 3, guide="x"), "guide: expected"),
        (lambda: models.HMM(0, 3), "states: expected"),
        (lambda: models.HMM(2, 3, smoothing=-1.0), "smoothing: expected"),
        (lambda: models.HMM(2, 3).simulate(2), "steps: expected"),
        (lambda: models.HMM(2, 3).log_evidence(torch.zeros(2, 3).long(), torch.ones(3)), "lengths: expected"),
        (lambda: models.HMM(2, 3).log_evidence(torch.zeros(2, 3)), "expected"),
        (lambda: models.HMM(9, 3).initialize(torch.zeros(2, 3).long()), "y: expected at least 9 steps"),
        (lambda: models.PPCA(3, 1, noise="x"), "noise: expected"),
        (
            lambda: models.PPCA(3, 1, noise="diagonal").solve(torch.zeros(3, 3)),
            "noise: expected 'shared' for a closed form",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()


@pytest.mark.parametrize("name", [n for n in OTHER_GUIDE if "pcfg" not in n])
def test_training_closes_the_gap_that_the_audit_shows(name):
    """Another guide than the posterior, beside the exact value: what its training gains is all gap, for the
    generator stands still."""
    make, draw = TABLE[name]
    pair, y = make(), draw(40)
    quiet(pair, y, epochs=5, start="current")
    before = audit(pair, y, particles=400)
    freeze = [k for k, _ in pair.named_children() if k != "encoder"]
    fit(pair, y, epochs=150, batch_size=40, learning_rate=0.05, freeze=freeze, particles=4, progress=False)
    after = audit(pair, y, particles=400)
    for result in (before, after):
        elbo, iwae = result["elbo"], result["iwae-400"]
        noise = 6 * max(elbo.mean_error, iwae.mean_error) + 1e-6  # false alarms below 1e-8
        assert elbo.mean - noise <= iwae.mean <= result["exact"].mean + noise
    assert before["exact"].mean == after["exact"].mean
    gaps = [r["exact"].mean - r["elbo"].mean for r in (before, after)]
    assert 1e-3 < gaps[1] < 0.9 * gaps[0]


def test_a_bad_datum_of_a_later_piece_is_refused():
    """Each of these would change what is summed without a word: a count of two for a coin, half a count."""
    for pair, y in (
        (models.BernoulliMixture(3, 2), torch.ones(60, 3)),
        (models.HMM(2, 3, "bernoulli"), torch.ones(60, 4, 3)),
        (models.HMM(2, 3, "poisson"), torch.ones(60, 4, 3)),
    ):
        bad = y.clone()
        bad[-1] = 2.5
        for settings in ({}, {"batch_size": 7}, {"batch_size": 7, "restarts": 2}):
            with pytest.raises(ValueError, match="support"):
                quiet(pair, bad, epochs=2, **settings)
        with pytest.raises(ValueError, match="expected values in the support of a"):
            quiet(pair, bad, epochs=2, start="random")


def test_a_run_goes_on_with_its_own_data_only(tmp_path):
    pair, y = models.GaussianMixture(2, 2), torch.randn(40, 2)
    quiet(pair, y, epochs=2, out=tmp_path / "run")
    with pytest.raises(ValueError, match="fingerprint was"):
        quiet(pair, y + 1, epochs=4, out=tmp_path / "run", resume=True)
    assert len(quiet(pair, y, epochs=4, out=tmp_path / "run", resume=True).losses) == 5


def test_parameters_that_em_cannot_see_and_a_start_of_one_datum():
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(pyro.param("share", torch.tensor(0.5))))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match=r"those of pyro\.param"):
        quiet(Pair.of(program, program), torch.randn(9))
    for pair, y in ((models.PPCA(3, 1), torch.randn(1, 3)), (models.StateSpace(3, 1), torch.randn(1, 1, 3))):
        pair.initialize(y)
        assert all(p.isfinite().all() for p in pair.parameters()) and pair.log_evidence(y).isfinite()
    pair = models.GaussianMixture(2, 2)
    with torch.no_grad():
        pair.generator.loc.fill_(math.nan)
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="the parameters are not finite"):
        quiet(pair, torch.randn(9, 2))


def test_kinds_of_numbers():
    """Coins may be bools or integers; what a product of matrices cannot mix is named."""
    y = torch.rand(30, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    pair = models.BernoulliMixture(3, 2)
    expected = pair.log_evidence(y.to(torch.get_default_dtype())).detach()
    for given in (y, y.long()):
        torch.testing.assert_close(pair.log_evidence(given).detach(), expected)
        assert audit(pair, given, particles=2)["exact"].mean == pytest.approx(float(expected.mean()))
        quiet(copy.deepcopy(pair), given, epochs=2, restarts=2)
    chain, heads = models.HMM(2, 3, "bernoulli"), y.view(6, 5, 3)
    expected = chain.log_evidence(heads.to(torch.get_default_dtype())).detach()
    for given in (heads, heads.long()):
        assert audit(chain, given, particles=2)["exact"].mean == pytest.approx(float(expected.mean()))
        quiet(copy.deepcopy(chain), given, epochs=2, restarts=2)
    symbols = models.HMM(2, 2, guide="mean_field")
    for kind in (torch.uint8, torch.int32):
        quiet(symbols, y.to(kind), epochs=2, start="random", restarts=2)
        assert math.isfinite(audit(symbols, y.to(kind), particles=2)["elbo"].mean)
    rates = models.HMM(2, 3, "poisson")
    for own, like in ((pair, y), (pair, y.long()), (chain, heads.long()), (rates, heads.long())):
        drawn = own.simulate(len(like), like=like)[1]
        assert drawn.dtype == like.dtype and drawn.shape == like.shape
    for pair, shape in ((models.PPCA(3, 1), (5, 3)), (models.StateSpace(3, 1), (5, 4, 3))):
        quiet(pair, torch.randn(shape).float(), epochs=2)
    with pytest.raises(ValueError, match="components: expected"):
        models.GaussianMixture(2, -1)
    with pytest.raises(TypeError, match="pair: expected a Pair"):
        fit_em(lambda y: None, torch.zeros(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed: expected"):
        quiet(models.PPCA(3, 1), torch.randn(5, 3), seed=-1)


def test_a_gradient_m_step_without_a_maximum_still_climbs():
    """A component on a single place has no best scale: the line search runs off, and what it met on its way
    counts, rather than nothing."""

    class Own(Pair):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([0.5, 2.0]))
            self.log_scale = nn.Parameter(torch.zeros(2))

        def model(self, y):
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Categorical(torch.ones(2)))
                pyro.sample("y", dist.Normal(self.loc[z], self.log_scale[z].exp()), obs=y)

        def guide(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("z", dist.Categorical(torch.ones(2)))

    losses = quiet(Own(), torch.ones(8), epochs=1).losses
    assert losses[1] < losses[0] - 1


@pytest.mark.parametrize("restarts", [1, 3])
def test_an_interrupt_from_a_callback_and_a_time_limit_keep_the_best(restarts):
    make, draw = TABLE["mixture"]
    y = draw(60)

    def stop(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    for settings, stopped in (({"callbacks": [stop]}, "interrupted"), ({"budget": "0.000001s"}, "budget")):
        pyro.set_rng_seed(0)
        pair = make()
        run = quiet(pair, y, epochs=50, tolerance=0.0, restarts=restarts, start="random", **settings)
        assert run.stopped == stopped
        best = min(run.losses) if stopped == "interrupted" else run.losses[-1]
        assert -float(pair.log_evidence(y).mean().detach()) <= best + 1e-9
    with pytest.raises(ValueError, match="budget: expected a time such as"):
        quiet(make(), y, budget="soon")


def test_unscaled_data_start_from_themselves(capsys):
    """Columns of sizes apart by 1e4: from N(0, 1) parameters EM ends far below the closed form."""
    y = (torch.randn(120, 3) @ torch.randn(3, 8) + 0.3 * torch.randn(120, 8)) * torch.logspace(-2, 2, 8) + 500
    best = float(models.PPCA(8, 3).solve(y).log_evidence(y).mean().detach())
    pair = models.PPCA(8, 3)
    assert pair.pristine and copy.deepcopy(pair).float().pristine
    run = fit_em(pair, y, epochs=1500)
    assert "PPCA starts from 'data'" in capsys.readouterr().err
    assert -run.losses[-1] > best - 0.5
    assert not pair.pristine
    assert quiet(pair, y, epochs=1).losses[0] == pytest.approx(run.losses[-1], rel=1e-9)


@pytest.mark.parametrize(
    "name", ["mixture", "mixture-full", "bernoulli_mixture", "hmm-categorical", "ppca", "pcfg"]
)
def test_weights_are_repetitions(name):
    make, draw = TABLE[name]
    y = draw(60)
    times = torch.randint(4, (60,))
    pair = make()
    pair.initialize(y)
    repeated, weighted = copy.deepcopy(pair), copy.deepcopy(pair)
    a = quiet(repeated, y.repeat_interleave(times, 0), epochs=4, start="current")
    b = quiet(weighted, y, weights=times, batch_size=5, epochs=4, start="current")
    assert a.losses == pytest.approx(b.losses, rel=1e-8)
    for v, w in zip(repeated.parameters(), weighted.parameters(), strict=True):
        torch.testing.assert_close(v, w, rtol=1e-6, atol=1e-8)


def test_weights_of_enumerated_latents_are_repetitions():
    y, times = torch.randn(9, 2), torch.tensor([1, 2, 3, 1, 0, 2, 1, 1, 4])
    torch.manual_seed(3)
    mixture = models.GaussianMixture(2, 2)
    repeated, weighted = (ExactlyThat(copy.deepcopy(mixture)) for _ in range(2))
    a = quiet(repeated, y.repeat_interleave(times, 0), epochs=3)
    b = quiet(weighted, y, weights=times, epochs=3)
    assert a.losses == pytest.approx(b.losses, rel=1e-7)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (torch.ones(3), r"expected one number for each of 9 data in memory, got \(3,\)"),
        (-torch.ones(9), "expected numbers of at least 0"),
        (torch.zeros(9), "not all 0"),
        ("many", "weights: expected"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises((ValueError, TypeError), match=message):
        quiet(models.PPCA(3, 1), torch.randn(9, 3), weights=weights)


def test_frozen_parameters_stay():
    y = torch.cat([torch.randn(40, 2) - 3, torch.randn(40, 2) * 2 + 3])
    for settings in ({"freeze": ("generator.loc",)}, {}):
        pair = models.GaussianMixture(2, 2)
        pair.initialize(y)
        if not settings:
            pair.generator.loc.requires_grad_(False)
        before = {k: v.detach().clone() for k, v in pair.named_parameters()}
        assert_climbs(quiet(pair, y, epochs=5, start="current", **settings))
        for k, v in pair.named_parameters():
            assert torch.equal(v.detach(), before[k]) == (k == "generator.loc"), k
    with pytest.raises(TypeError, match="freeze: expected a sequence of part names"):
        quiet(pair, y, freeze="generator")
    with pytest.raises(ValueError, match="freeze: expected to leave parameters"):
        quiet(pair, y, freeze=("generator",), start="current")


def test_impossible_data_are_left_out_on_request():
    pair = models.HMM(2, 3)
    with torch.no_grad():
        pair.generator.logits[:, 2] = -math.inf
    y = torch.tensor([[0, 1, 0], [2, 0, 1], [1, 1, 0], [0, 0, 2]])
    with pytest.raises(ValueError, match="got -inf for datum 1"):
        quiet(pair, y, start="current")
    with pytest.warns(match="left out 2 of 4 rows, which the start gives probability zero"):
        run = quiet(pair, y, start="current", impossible="skip", epochs=3)
    assert_climbs(run)
    with pytest.raises(ValueError, match="impossible: expected 'error' or 'skip'"):
        quiet(pair, y, impossible="drop")


def test_checkpoints_are_written_between_steps(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(RunDirectory, "save_checkpoint", lambda self, *rest, **named: saved.append(1))
    settings = {"epochs": 5, "tolerance": 0.0, "checkpoint_seconds": 0.0, "out": tmp_path / "run"}
    quiet(models.GaussianMixture(2, 3), torch.randn(30, 2), **settings)
    assert len(saved) >= 5

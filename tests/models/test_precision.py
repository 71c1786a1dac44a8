"""Exact evidence of float32 pairs, statistics that are singular, weighted or of unscaled data, and dtypes of
data."""

import copy
import math
import warnings

import pytest
import torch

from pyroelbo import data, evidence, fit_em, models
from pyroelbo.distributions import GaussianStatistics
from pyroelbo.models.emissions import EMISSIONS
from pyroelbo.models.precision import regress
from tests.pairs import EXACT, TABLE


@pytest.fixture
def single():
    """Parameters in float32, as users have them."""
    torch.set_default_dtype(torch.float32)


def marginal(pair):
    """p(y) of a linear Gaussian pair as a dense Gaussian in float64."""
    g = pair.generator
    weight, loc = g.weight.double(), g.loc.double()
    noise = (2 * g.log_scale.double()).exp().expand(len(loc))
    return torch.distributions.MultivariateNormal(loc, weight @ weight.T + noise.diag())


@pytest.mark.parametrize("noise", ["shared", "diagonal"])
def test_rank_deficient_data_have_their_right_evidence(noise, single):
    """The old value was 510.36 with σ = 1e-4, where the right one is 108.1 (the data's last digits vary)."""
    torch.manual_seed(0)
    y = torch.randn(200, 5) @ torch.randn(5, 20)
    pair = models.PPCA(20, 6, noise=noise)
    values, vectors = torch.linalg.eigh((y - y.mean(0)).T @ (y - y.mean(0)) / len(y))
    with torch.no_grad():
        pair.generator.loc.copy_(y.mean(0))
        pair.generator.weight.copy_(vectors[:, -6:] * values[-6:].clamp_min(0).sqrt())
        pair.generator.log_scale.fill_(math.log(1e-4))
    found = evidence.exact(pair, y).value
    assert 105 < float(found.mean()) < 110
    torch.testing.assert_close(found, marginal(pair).log_prob(y.double()), atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("solve", [True, False])
def test_data_far_from_zero_have_their_right_evidence(solve, single):
    torch.manual_seed(0)
    y = 1000 + torch.randn(200, 2) @ torch.randn(2, 6) + 0.1 * torch.randn(200, 6)
    pair = models.PPCA(6, 2)
    pair.solve(y) if solve else pair.initialize(y)
    found = evidence.exact(pair, y).value
    torch.testing.assert_close(found, marginal(pair).log_prob(y.double()), atol=1e-9, rtol=1e-9)
    # the parameters themselves are float32: 1e-7 of 1000 against a noise of 0.1
    whole = copy.deepcopy(pair).double().solve(y.double())
    assert abs(float((found.mean() - whole.log_evidence(y.double()).mean()).detach())) < (
        0.01 if solve else 0.5
    )


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_mixtures_far_from_zero_have_their_right_evidence(covariance, single):
    torch.manual_seed(0)
    y = 1000 + torch.cat([torch.randn(50, 3) * 0.1, 2 + torch.randn(50, 3) * 0.1])
    pair = models.GaussianMixture(3, 2, covariance)
    pair.initialize(y)
    g = pair.generator
    variance = g.variance.double() if covariance == "full" else g.scale.double().square().diag_embed()
    parts = torch.distributions.MultivariateNormal(g.loc.double(), variance)
    wanted = (g.logits.double().log_softmax(-1) + parts.log_prob(y.double()[:, None])).logsumexp(-1)
    found = evidence.exact(pair, y).value
    # 1e-6 for the covariance, whose sum with the floor is rounded in the oracle
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    pair.generator.unit.fill_(1.0)
    with torch.no_grad():
        torch.testing.assert_close(pair.e_step(y)[0], pair.log_evidence(y))


def test_a_flow_is_evaluated_in_double_precision(single):
    pair, y = models.Flow(4, layers=3), 3 * torch.randn(20, 4)
    with torch.no_grad():
        found = pair.log_evidence(y)
        torch.testing.assert_close(found, copy.deepcopy(pair).double().log_evidence(y.double()))


@pytest.mark.parametrize("name", EXACT)
def test_evidence_is_double_in_evaluation_and_single_in_training(name, single):
    if name == "conjugate":
        pytest.skip("not a model of the library")
    make, draw = TABLE[name]
    pair, y = make(), draw(6)
    y = y.float() if y.is_floating_point() else y
    assert pair.log_evidence(y).dtype == torch.float32
    with torch.no_grad():
        value = pair.log_evidence(y)
    assert value.dtype == torch.float64
    torch.testing.assert_close(pair.log_evidence(y).detach().double(), value, rtol=1e-4, atol=1e-4)
    if hasattr(pair, "m_step"):
        assert pair.e_step(y)[0].dtype == torch.float64


# ------------------------------------------------------------------------------------------ emissions


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("kind", EMISSIONS)
def test_log_probabilities_by_products_are_those_of_the_distribution(kind, stacked):
    emission, n = EMISSIONS[kind](4, 3), 10
    y = {
        "categorical": torch.randint(3, (n,)),
        "bernoulli": torch.bernoulli(torch.full((n, 3), 0.4)),
        "poisson": torch.poisson(torch.full((n, 3), 2.0)),
    }.get(kind, torch.randn(n, 3))
    wanted = emission.distribution().log_prob(y.unsqueeze(1))
    if stacked:
        for p in emission.parameters():
            p.data = torch.stack([p.data + 0.1, p.data])
        for b in emission.buffers():
            b.data = torch.stack([b.data, b.data])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = emission.log_prob(y)
        torch.testing.assert_close(found[1] if stacked else found, wanted)


def test_products_give_way_where_they_would_cancel():
    emission = EMISSIONS["gaussian"](2, 3)
    with torch.no_grad():
        emission.log_scale.fill_(-40.0)  # the floor, 1e-3
        y = 1e6 + torch.randn(5, 3)
        assert emission._by_products(y) is None
        wanted = emission.distribution().log_prob(y[:, None])
        torch.testing.assert_close(emission.log_prob(y), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("diagonal", [True, False])
def test_weighted_scatter(diagonal):
    y, share = 5 + torch.randn(20, 3), torch.rand(20, 2)
    found = GaussianStatistics.weighted(y, share, diagonal)
    for m in range(2):
        mean = (share[:, m, None] * y).sum(0) / share[:, m].sum()
        scatter = sum(share[n, m] * torch.outer(y[n] - mean, y[n] - mean) for n in range(20))
        torch.testing.assert_close(found.mean[m], mean)
        torch.testing.assert_close(found.scatter[m], scatter.diagonal() if diagonal else scatter)


# ------------------------------------------------------------------------------------------ EM's statistics


def paths(n, *event):
    """Sequences of 2 to 9 steps with padding that must not matter."""
    lengths = torch.randint(2, 10, (n,))
    return torch.randn(n, 9, *event), lengths


WEIGHTED = {
    "ppca": (lambda: models.PPCA(5, 2), lambda n: (torch.randn(n, 5),)),
    "factor": (lambda: models.PPCA(5, 2, noise="diagonal"), lambda n: (torch.randn(n, 5),)),
    "mixture": (lambda: models.GaussianMixture(3, 2), lambda n: (torch.randn(n, 3),)),
    "mixture-full": (lambda: models.GaussianMixture(3, 2, "full"), lambda n: (torch.randn(n, 3),)),
    "bernoulli": (
        lambda: models.BernoulliMixture(4, 3),
        lambda n: (torch.bernoulli(torch.full((n, 4), 0.4)),),
    ),
    "hmm": (lambda: models.HMM(3, 2, "gaussian"), lambda n: paths(n, 2)),
    "hmm-whole": (lambda: models.HMM(3, 4), lambda n: (torch.randint(4, (n, 5)),)),
    "state_space": (lambda: models.StateSpace(2, 3), lambda n: paths(n, 2)),
}


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_counts_a_datum_so_many_times(name, hard):
    make, draw = WEIGHTED[name]
    pair, batch = make(), draw(6)
    times = torch.tensor([1, 0, 3, 2, 1, 2])
    value, weighed = pair.e_step(*batch, hard=hard, weights=times.double())
    rows = torch.arange(6).repeat_interleave(times)
    _, repeated = pair.e_step(*(part[rows] for part in batch), hard=hard)
    torch.testing.assert_close(value, pair.e_step(*batch, hard=hard)[0])
    for key, wanted in repeated.items():
        found = weighed[key]
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
        else:
            for field in ("count", "mean", "scatter"):
                torch.testing.assert_close(getattr(found, field), getattr(wanted, field))


@pytest.mark.parametrize("name", ["hmm", "state_space"])
def test_sequences_of_very_different_lengths_are_evaluated_apart(name, monkeypatch):
    """Groups of similar length give the sums and, in the data's order, the values of the whole."""
    from pyroelbo.models import sequences

    make, draw = WEIGHTED[name]
    pair, (y, lengths) = make(), draw(12)
    value, whole = pair.e_step(y, lengths)
    monkeypatch.setattr(sequences, "_STEPS", 2)
    sizes, run = [], type(pair)._expected
    monkeypatch.setattr(
        type(pair),
        "_expected",
        lambda self, y, *rest: (sizes.append(tuple(y.shape[:2])), run(self, y, *rest))[1],
    )
    again, parts = pair.e_step(y, lengths)
    assert len(sizes) > 2 and sum(n for n, _ in sizes) == 12
    assert sum(n * t for n, t in sizes) < 1.25 * int(lengths.sum())
    torch.testing.assert_close(again, value)
    for key in whole:
        if isinstance(whole[key], torch.Tensor):
            torch.testing.assert_close(parts[key], whole[key], rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(pair.log_evidence(y, lengths), value)
    torch.testing.assert_close(pair.log_evidence(y, lengths).detach(), value)  # with gradients, in one piece


@pytest.mark.parametrize("name", ["hmm", "state_space"])
def test_a_step_takes_sequences_of_very_different_lengths_apart(name, monkeypatch):
    """The exact guide's ELBO is the evidence for every draw, so that the parts' losses are the whole's."""
    from pyro.infer import Trace_ELBO

    from pyroelbo.models import sequences
    from pyroelbo.objectives.base import PerDatum, adapt

    make, draw = WEIGHTED[name]
    pair, batch = make(), draw(12)
    monkeypatch.setattr(sequences, "_STEPS", 2)
    parts = pair.unpadded(*batch)
    assert len(parts) > 2 and all(y.shape[1] == int(lengths.max()) for y, lengths in parts)
    assert sorted(n for _, lengths in parts for n in lengths.tolist()) == sorted(batch[1].tolist())
    loss = PerDatum(adapt(Trace_ELBO()), float, None, pair.unpadded)
    found = loss.differentiable_loss(pair.model, pair.guide, *batch)
    torch.testing.assert_close(found, -pair.log_evidence(*batch).mean())
    named = dict(zip(("y", "lengths"), batch, strict=True))
    torch.testing.assert_close(loss.differentiable_loss(pair.model, pair.guide, **named), found)
    (alone,) = pair.unpadded(batch[0])
    assert len(alone) == 1 and alone[0] is batch[0]


def test_a_list_of_sequences_is_a_batch():
    items = [torch.randn(4, 2), torch.randn(7, 2), torch.randn(1, 2)]
    y, lengths = data.sequences(items)
    assert y.shape == (3, 7, 2) and lengths.tolist() == [4, 7, 1]
    pair = models.HMM(2, 2, "gaussian")
    with torch.no_grad():
        alone = torch.cat([pair.log_evidence(item[None]) for item in items])
        torch.testing.assert_close(pair.log_evidence(y, lengths), alone)
    run = fit_em(pair, data.sequences(items), epochs=3, progress=False)
    assert len(run.metrics) == 4
    symbols, lengths = data.sequences([[1, 0, 2], [2]])
    assert symbols.dtype == torch.int64 and symbols.tolist() == [[1, 0, 2], [2, 2, 2]]
    for bad, message in (
        ([], "expected a list of at least one"),
        ([[1.0], []], r"items\[1\]: expected a sequence of at least one step"),
        ([[1.0], [[1.0]]], r"items\[1\]: expected steps of shape \(\)"),
        ([["a"]], r"items\[0\]: expected a sequence of numbers"),
        (torch.randn(3, 4), "got a Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            data.sequences(bad)


def test_em_is_monotone_in_single_precision(single):
    """7 of these 8 seeds raised NotMonotone when statistics and evidence were float32."""
    for seed in range(8):
        torch.manual_seed(seed)
        y = torch.randn(300, 3) @ torch.randn(3, 10) + 0.05 * torch.randn(300, 10)
        losses = fit_em(models.PPCA(10, 3), y, epochs=30, progress=False).losses
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("noise", ["shared", "diagonal"])
@pytest.mark.parametrize("n", [2, 4])
def test_fewer_data_than_latents_stop_at_the_floor_with_one_warning(n, noise, single):
    torch.manual_seed(0)
    y = torch.randn(n, 10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit_em(models.PPCA(10, 4, noise=noise, floor=1e-2), y, epochs=60, progress=False)
    assert all(math.isfinite(loss) for loss in run.losses)
    held = [str(w.message) for w in caught if "floor" in str(w.message)]
    assert len(held) == 1 and "observation noise fell to" in held[0] and "floor=0.01" in held[0]


def test_a_regression_on_singular_statistics_predicts_as_least_squares():
    code = (torch.randn(20, 2) @ torch.randn(2, 4)) * torch.tensor([1e-6, 1.0, 1e3, 0.0])
    y = torch.randn(20, 3)
    found = regress(code.T @ code, y.T @ code)
    torch.testing.assert_close(code @ found.T, code @ torch.linalg.lstsq(code, y, driver="gelsd").solution)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_the_floor_is_relative_to_the_data(covariance, scale):
    torch.manual_seed(0)
    y = torch.cat([torch.randn(60, 3), 4 + 0.5 * torch.randn(60, 3)])
    values = {}
    for unit in (1.0, scale):
        pair = models.GaussianMixture(3, 2, covariance)
        run = fit_em(pair, unit * y, epochs=30, start="k-means", progress=False)
        values[unit] = -run.losses[-1]
    assert abs(values[scale] + 3 * math.log(scale) - values[1.0]) < 1e-4


@pytest.mark.parametrize(
    "make", [lambda: models.PPCA(4, 2, noise="diagonal"), lambda: models.StateSpace(4, 2)]
)
def test_starts_from_data_do_not_depend_on_their_units(make):
    torch.manual_seed(0)
    y = torch.randn(1, 300, 2).cumsum(1) @ torch.randn(2, 4) / 10 + torch.randn(1, 300, 4)
    unit = torch.tensor([1e-3, 1.0, 50.0, 1e4])
    values = []
    for factor in (torch.ones(4), unit):
        pair, x = make(), factor * y
        x = x[0] if isinstance(pair, models.PPCA) else x
        torch.manual_seed(1)
        pair.initialize(x)
        shift = factor.log().sum() * (1 if x.dim() == 2 else 300)
        with torch.no_grad():
            start = float(pair.log_evidence(x).mean() + shift)
        run = fit_em(pair, x, epochs=10, progress=False)
        values.append((start, -run.losses[-1] + float(shift)))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert values[0][1] > values[0][0]


def test_factor_analysis_starts_near_its_maximum():
    torch.manual_seed(0)
    y = (torch.randn(200, 2) @ torch.randn(2, 6) + 0.3 * torch.randn(200, 6)) * torch.logspace(-2, 3, 6) + 100
    pair = models.PPCA(6, 2, noise="diagonal")
    pair.initialize(y)
    first = fit_em(pair, y, epochs=20, progress=False).losses[-1]
    longer = fit_em(pair, y, epochs=2000, progress=False).losses[-1]
    assert first - longer < 0.1


# ------------------------------------------------------------------------------------------ dtypes of data


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize(
    "make",
    [
        lambda: models.VAE(6, 2, (8,)),
        lambda: models.VAE(6, 2, (8,), prior="vamp", components=3),
        lambda: models.Hierarchy(6, (3, 2), 8),
        lambda: models.Ladder(6, (3, 2), (8, 6), norm="none"),
        lambda: models.ConvLadder((2, 3), (1,), 1, 4),
        lambda: models.BernoulliMixture(6, 3),
        lambda: models.BernoulliMixture(6, 3, guide="encoder"),
        lambda: models.Autoregressive((2, 3), width=4, layers=1),
    ],
)
def test_binary_data_may_have_any_dtype(make, dtype):
    torch.manual_seed(0)
    pair, y = make(), torch.bernoulli(torch.full((5, 6), 0.4))
    values = []
    for given in (y, y.to(dtype)):
        torch.manual_seed(1)
        values.append(evidence.elbo(pair, given, particles=4).value)
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("likelihood", ["discretized_logistic", "categorical", "l2"])
def test_grey_levels_may_be_integers(likelihood):
    torch.manual_seed(0)
    pair, y = models.VAE(6, 2, (8,), likelihood=likelihood, levels=5), torch.randint(5, (5, 6))
    values = []
    for given in (y.double(), y.to(torch.uint8)):
        torch.manual_seed(1)
        values.append(evidence.elbo(pair, given, particles=4).value)
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("guide", ["exact", "local"])
def test_frames_of_any_dtype_take_that_of_the_network(guide, own):
    pair = models.CTC(3, 2, width=4, depth=1, guide=guide).to(own)
    x, y = torch.randint(5, (4, 6, 3)), torch.tensor([[1, 2, -1]] * 4)
    for given in (x, x.to(torch.uint8), x.double(), x.float()):
        terms = evidence.terms(pair, (given, y), 2)
        assert all(term.isfinite().all() for term in terms.log_model.values())
        found = evidence.exact(pair, (given, y)).value
        torch.testing.assert_close(found, evidence.exact(pair, (x, y)).value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ppca", "ppca-mean-field", "mixture", "hmm-gaussian", "state_space"])
def test_double_data_are_accepted_by_single_pairs(name, single):
    make, draw = TABLE[name]
    pair, y = make(), draw(6)
    found = evidence.elbo(pair, y.double(), particles=4).value
    assert torch.isfinite(found).all()
    torch.testing.assert_close(
        evidence.exact(pair, y.double()).value, evidence.exact(pair, y).value, rtol=1e-5, atol=1e-4
    )

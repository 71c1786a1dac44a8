"""Mixtures of experts: sums in plain Python, EM's statistics by autograd, steps that never fall."""

import math

import pytest
import torch
from torch.distributions import Normal

from pyroelbo import audit, evidence, fit, fit_em, models
from pyroelbo.models.experts import _newton, _slopes
from tests.pairs import CONDITIONAL, regressions
from tests.training.test_em import assert_climbs, quiet

KINDS = {"gaussian": "experts", "logistic": "experts-logistic"}


def softmax(values):
    total = sum(map(math.exp, values))
    return [math.exp(v) / total for v in values]


def summed(pair, x, y):
    """p(y, z = m | x) of one datum for each m, in plain Python."""
    g = {k: v.detach().tolist() for k, v in pair.generator.state_dict().items()}
    dot = lambda w, b: b + sum(a * c for a, c in zip(w, x, strict=True))  # noqa: E731
    gate = softmax([dot(w, b) for w, b in zip(g["gate"], g["gate_bias"], strict=True)])
    found = []
    for m, p in enumerate(gate):
        means = [dot(w, b) for w, b in zip(g["weight"][m], g["bias"][m], strict=True)]
        if "log_scale" in g:
            for value, mean, log_scale in zip(y, means, g["log_scale"][m], strict=True):
                p *= math.exp(-0.5 * ((value - mean) / math.exp(log_scale)) ** 2 - log_scale)
                p /= math.sqrt(2 * math.pi)
        else:
            p *= softmax(means)[y]
        found.append(p)
    return found


@pytest.mark.parametrize("name", KINDS.values())
def test_evidence_and_posterior_are_the_sums_they_say(name):
    make, draw = CONDITIONAL[name]
    pair, (x, y) = make(), draw(6)
    joint = torch.tensor([summed(pair, *row) for row in zip(x.tolist(), y.tolist(), strict=True)])
    torch.testing.assert_close(pair.log_evidence(x, y).detach(), joint.sum(-1).log())
    torch.testing.assert_close(pair.posterior(x, y).probs.detach(), joint / joint.sum(-1, keepdim=True))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("name", KINDS.values())
def test_em_climbs(name, hard):
    make, draw = CONDITIONAL[name]
    pair, (x, y) = make(), draw(80)
    run = quiet(pair, (x, y), epochs=25, hard=hard, tolerance=0.0)
    assert_climbs(run)
    if not hard:
        assert run.losses[-1] == pytest.approx(-pair.log_evidence(x, y).mean().item(), rel=1e-10)


@pytest.mark.parametrize("name", KINDS.values())
def test_em_ends_where_the_evidence_is_stationary(name):
    torch.manual_seed(1)
    truth, pair = (CONDITIONAL[name][0]() for _ in range(2))
    _, batch = truth.simulate(300, torch.randn(300, 2))
    quiet(pair, batch, epochs=2000, tolerance=1e-13)
    slopes = torch.autograd.grad(pair.log_evidence(*batch).mean(), list(pair.parameters()))
    assert max(s.abs().max() for s in slopes) < 1e-4


def test_one_expert_is_least_squares():
    x, y = regressions(50)
    x, y = 1e3 + x, 1e5 + y  # far from the origin
    pair = models.MixtureOfExperts(2, 2, 1)
    quiet(pair, (x, y), epochs=3)
    wide = torch.cat([x, torch.ones(50, 1)], -1)
    left = y - wide @ torch.linalg.lstsq(wide, y).solution
    expected = Normal(0.0, left.square().mean(0).sqrt()).log_prob(left).sum(-1)
    torch.testing.assert_close(pair.log_evidence(x, y).detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KINDS.values())
def test_weights_count_data_and_pieces_add_up(name):
    make, draw = CONDITIONAL[name]
    torch.manual_seed(4)
    x, y = draw(40)
    times = torch.randint(0, 3, (40,))
    again = x.repeat_interleave(times, 0), y.repeat_interleave(times, 0)
    # what one step makes: the size of the gate's depends on the data of weight zero too
    pair = make()
    mine, theirs = pair.e_step(x, y, weights=times.double())[1], pair.e_step(*again)[1]
    pieces = [pair.e_step(x[i : i + 7], y[i : i + 7], weights=times[i : i + 7].double())[1] for i in (0, 7)]
    whole = pair.e_step(x[:14], y[:14], weights=times[:14].double())[1]
    for key in mine:
        torch.testing.assert_close(pieces[0][key] + pieces[1][key], whole[key])
        if key != "square":
            torch.testing.assert_close(mine[key], theirs[key])


def test_slopes_and_curvatures_are_those_of_autograd():
    x, seen = torch.randn(9, 3), torch.rand(9, 2, 4)
    w = torch.randn(2, 4, 3)

    def value(m):
        return lambda own: (seen[:, m] * (x @ own.T).log_softmax(-1)).sum()

    probs = torch.einsum("bp,mcp->bmc", x, w).softmax(-1)
    found = _slopes("a", seen, probs, seen.sum(-1), x)
    for m in range(2):
        slope = torch.autograd.functional.jacobian(value(m), w[m])
        curve = torch.autograd.functional.hessian(value(m), w[m])
        torch.testing.assert_close(found["a_slope"][m], slope)
        torch.testing.assert_close(found["a_curve"][m], -curve.reshape(12, 12))


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_a_step_never_lowers_the_likelihood_where_newtons_may(size):
    """From saturated starts, where whole steps of Newton's method overshoot."""
    overshot = 0
    for seed in range(40):
        torch.manual_seed(seed)
        x, w = torch.randn(12, 2), size * torch.randn(1, 3, 2)
        seen = torch.eye(3)[torch.randint(3, (12,))][:, None]

        def value(w, x=x, seen=seen):
            return (seen * torch.einsum("bp,mcp->bmc", x, w).log_softmax(-1)).sum().item()

        probs = torch.einsum("bp,mcp->bmc", x, w).softmax(-1)
        found = _slopes("a", seen, probs, seen.sum(-1), x)
        step = _newton(found["a_slope"], found["a_curve"], x.T @ x)
        assert value(w + step) > value(w)
        whole = torch.linalg.pinv(found["a_curve"][0], hermitian=True) @ found["a_slope"][0].flatten()
        overshot += not value(w + whole.view_as(w)) > value(w)
    assert overshot > 10 or size < 1


def test_em_explains_simulated_data_at_least_as_well_as_the_truth():
    torch.manual_seed(3)
    truth = models.MixtureOfExperts(1, 1, 2)
    with torch.no_grad():
        truth.generator.gate.copy_(torch.tensor([[4.0], [-4.0]]))
        truth.generator.weight.copy_(torch.tensor([[[1.0]], [[-2.0]]]))
        truth.generator.log_scale.fill_(-1.5)
    x = torch.randn(600, 1)
    latents, (same, y) = truth.simulate(600, x)
    assert torch.equal(same, x) and latents["z"].shape == (600,)
    pair = models.MixtureOfExperts(1, 1, 2)
    fit_em(pair, (x, y), epochs=60, restarts=3, progress=False)
    assert pair.log_evidence(x, y).mean() > truth.log_evidence(x, y).mean()


def test_a_trained_encoder_narrows_its_gap():
    torch.manual_seed(5)
    make, draw = CONDITIONAL["experts-encoder"]
    pair, batch = make(), draw(60)
    before = evidence.exact(pair, batch).mean - evidence.elbo(pair, batch, particles=200).mean
    fit(pair, batch, objective="enum", epochs=80, learning_rate=0.03, freeze=("generator",), progress=False)
    result = audit(pair, batch, particles=200)
    assert result.reference == "exact" and 0 < result.gaps[0].mean < 0.7 * before


def test_em_with_a_part_held_fixed():
    """By gradients then, some of which are transposed."""
    make, draw = CONDITIONAL["experts"]
    pair, batch = make(), draw(60)
    before = pair.generator.gate.detach().clone()
    assert_climbs(quiet(pair, batch, epochs=5, start="current", freeze=("generator.gate",)))
    assert torch.equal(pair.generator.gate, before)


@pytest.mark.parametrize("name", KINDS.values())
def test_em_in_float32(name):
    torch.set_default_dtype(torch.float32)
    make, draw = CONDITIONAL[name]
    quiet(make(), draw(60), epochs=20)  # raises if the evidence falls


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.MixtureOfExperts(0), "inputs: expected a positive number, got 0"),
        (lambda: models.MixtureOfExperts(2, experts="trees"), "experts: expected 'gaussian' or 'logistic'"),
        (lambda: models.MixtureOfExperts(2, guide="flow"), "guide: expected 'exact' or 'encoder'"),
        (lambda: models.MixtureOfExperts(2, floor=0.0), "floor: expected a positive scale"),
        (
            lambda: models.MixtureOfExperts(2).log_evidence(X, X[:, :1]),
            r"x: expected shape \[B, 2\], got \(2, 3\)",
        ),
        (
            lambda: models.MixtureOfExperts(3).log_evidence(X, X[:1]),
            r"y: expected shape \[2, 1\] for x of 2 rows, got \[1, 3\]",
        ),
        (
            lambda: models.MixtureOfExperts(3, 2, experts="logistic").log_evidence(X, torch.tensor([0, 2])),
            "y: expected classes as integers 0 … 1, got torch.int64 from 0 to 2",
        ),
        (
            lambda: models.MixtureOfExperts(3, 2, experts="logistic").log_evidence(X, torch.zeros(2)),
            "y: expected classes as integers 0 … 1, got torch.float64",
        ),
        (
            lambda: fit_em(models.MixtureOfExperts(3), (X, X[:, :1]), progress=False),
            "data: expected at least 4 rows for MixtureOfExperts, got 2",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

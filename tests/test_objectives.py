import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyroelbo import evidence
from pyroelbo.objectives import Evidence_ELBO, Exact_ELBO, Weighted_ELBO
from tests.pairs import EM, TABLE, Nonlinear
from tests.test_examples import load


def gradient(pair, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(pair.parameters()))])


CHAINS_AND_MIXTURES = [n for n in EM if "pcfg" not in n]  # grammars have theirs beside the model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CHAINS_AND_MIXTURES)
def test_exact_elbo_has_the_evidences_value_and_gradient(name, dtype):
    torch.set_default_dtype(dtype)
    make, draw = TABLE[name]
    pair, y = make(), draw(9)
    loss = Exact_ELBO().differentiable_loss(pair.model, pair.guide, y)
    exact = -pair.log_evidence(y).sum()
    value, slope = (1e-5, 1e-4) if dtype == torch.float32 else (1e-10, 1e-8)
    torch.testing.assert_close(loss, exact, rtol=value, atol=value)
    torch.testing.assert_close(gradient(pair, loss), gradient(pair, exact), rtol=slope, atol=slope)


# Reparameterized draws leave ln w constant, and so its whole derivative; the score function does not.
STEADY = [n for n in CHAINS_AND_MIXTURES if n.startswith(("ppca", "state_space"))]


@pytest.mark.parametrize("name", CHAINS_AND_MIXTURES)
def test_trace_elbos_noisier_gradient_has_the_same_mean(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    exact = gradient(pair, -pair.log_evidence(y).sum())
    number = 5 if name in STEADY else 200
    draws = torch.stack(
        [gradient(pair, Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)) for _ in range(number)]
    )
    noise = draws.std(0)
    steady = noise < 1e-9
    torch.testing.assert_close(draws[0, steady], exact[steady])
    assert bool(steady.all()) == (name in STEADY)
    if name not in STEADY:
        z = (draws.mean(0) - exact)[~steady] / (noise[~steady] / number**0.5)
        # t with 199 degrees of freedom, some 30 entries a pair: false alarms below 1e-5 each
        assert z.abs().max() < 5.5


def test_shannons_code_has_the_hard_elbo_of_its_length():
    coding = load("coding")
    for counts in ([30, 20, 15, 10, 8, 6, 5, 3, 2, 1], [1, 1], [4, 2, 1, 1], [9, 7]):
        counts = torch.tensor(counts)
        population = counts / counts.sum()
        bits = sum(p * math.ceil(-math.log2(p) - 1e-12) for p in population.tolist())
        entropy, soft, hard = coding.code_length(counts)
        assert entropy - 1e-9 <= hard < entropy + math.log(2)
        assert hard == pytest.approx(bits * math.log(2)) == soft


def test_the_smallest_loss_over_guides_is_the_cross_entropy():
    coding = load("coding")
    population = torch.rand(6).softmax(0)
    pair = coding.Table(6, 3, "table")
    cross = -float(population @ pair.joint().logsumexp(-1))
    assert coding.best_loss(pair, population) == pytest.approx(cross, abs=1e-6)
    torch.testing.assert_close(pair.q(), pair.posterior(torch.arange(6)).probs, atol=1e-3, rtol=0)
    best = -float(population @ pair.joint().amax(-1))
    assert coding.best_loss(pair, population, hard=True) == pytest.approx(best, abs=1e-2) and best > cross
    pair.encoder = torch.nn.Parameter(torch.zeros(1, 3))
    excess = -float((population @ pair.joint().log_softmax(-1)).logsumexp(0))
    assert coding.best_loss(pair, population) == pytest.approx(cross + excess, abs=1e-6) and excess > 0.01


def test_exact_elbo_is_a_loss_for_svi():
    make, draw = TABLE["ppca"]
    pair, y = make(), draw(50)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.05}), Exact_ELBO())
    losses = [svi.step(y) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert svi.evaluate_loss(y) == pytest.approx(-float(pair.log_evidence(y).sum().detach()))


@pytest.mark.parametrize("inner", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_kl_weight_scales_the_latents_terms_only(inner):
    pair, y = Nonlinear(), torch.randn(5, 4)

    def loss(weight):
        pyro.set_rng_seed(1)
        return Weighted_ELBO(inner(), weight).differentiable_loss(pair.model, pair.guide, y).detach()

    whole = loss(1.0)
    pyro.set_rng_seed(1)
    assert whole == inner().differentiable_loss(pair.model, pair.guide, y).detach()
    kl = loss(1.0) - loss(0.0)
    torch.testing.assert_close(loss(0.25), loss(0.0) + 0.25 * kl)
    reconstruction = loss(0.0)
    pyro.set_rng_seed(1)
    z = pyro.poutine.trace(pair.guide).get_trace(y).nodes["z"]["value"]
    torch.testing.assert_close(
        reconstruction, -dist.Normal(pair.generator(z), 0.5).log_prob(y).sum().detach()
    )


def test_the_model_stays_evaluable_while_the_objective_is_annealed():
    pair, y = Nonlinear(), torch.randn(5, 4)
    objective = Weighted_ELBO(Trace_ELBO(), 0.0)
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), objective)
    svi.step(y)
    objective.weight = 0.7
    assert objective.weight == pytest.approx(0.7)
    svi.step(y)
    assert torch.isfinite(evidence.iwae(pair, y).value).all()
    with pytest.raises(ValueError, match="weight takes"):
        objective.weight = -1.0


@pytest.mark.parametrize("name", ["hmm-gaussian", "ppca", "autoregressive-pixelcnn"])
def test_the_evidence_as_an_objective(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(6)
    ours, drawn = (
        loss.differentiable_loss(pair.model, pair.guide, y) for loss in (Evidence_ELBO(), Exact_ELBO())
    )
    torch.testing.assert_close(ours, drawn, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(pair, ours), gradient(pair, drawn), rtol=1e-8, atol=1e-8)
    before = pair.log_evidence(y).sum().detach()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Evidence_ELBO())
    assert svi.evaluate_loss(y) == pytest.approx(-float(before), rel=1e-10)
    losses = [svi.step(y) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0] == pytest.approx(-float(before), rel=1e-10)


def test_the_evidence_takes_exact_pairs_alone():
    make, draw = TABLE["vae-bernoulli"]
    pair, y = make(), draw(3)
    with pytest.raises(TypeError, match="the model of an ExactPair, got that of a VAE"):
        Evidence_ELBO().differentiable_loss(pair.model, pair.guide, y)
    with pytest.raises(TypeError, match="ExactPair, got a function"):
        Evidence_ELBO().differentiable_loss(lambda y: None, None, y)

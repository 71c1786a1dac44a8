import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyroelbo import evidence
from pyroelbo.objectives import Exact_ELBO, Weighted_ELBO
from tests.pairs import TABLE, Nonlinear


def gradient(pair, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(pair.parameters()))])


@pytest.mark.parametrize(
    "name", ["ppca", "mixture", "bernoulli_mixture", "hmm-categorical", "hmm-gaussian", "state_space"]
)
def test_exact_elbo_has_the_evidences_value_and_gradient(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(9)
    loss = Exact_ELBO().differentiable_loss(pair.model, pair.guide, y)
    exact = -pair.log_evidence(y).sum()
    torch.testing.assert_close(loss, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(pair, loss), gradient(pair, exact), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["ppca", "mixture"])
def test_trace_elbos_noisier_gradient_has_the_same_mean(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    exact = gradient(pair, -pair.log_evidence(y).sum())
    draws = torch.stack(
        [gradient(pair, Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)) for _ in range(400)]
    )
    noise = draws.std(0)
    steady = noise < 1e-9
    torch.testing.assert_close(draws[0, steady], exact[steady])
    # Reparameterized draws leave ln w constant, and so its whole derivative; the score function does not.
    assert bool(steady.all()) == (name == "ppca")
    if name == "ppca":
        return
    z = (draws.mean(0) - exact)[~steady] / (noise[~steady] / 20)
    assert z.abs().max() < 5.5  # t with 399 degrees of freedom, some 20 entries: false alarms below 2e-6


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

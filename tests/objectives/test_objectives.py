import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

from pyroelbo import Pair, evidence, fit, models
from pyroelbo.objectives import IWAE_ELBO, Evidence_ELBO, Exact_ELBO, Layered_ELBO, Weighted_ELBO
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
    coding = load("compress")
    for counts in ([30, 20, 15, 10, 8, 6, 5, 3, 2, 1], [1, 1], [4, 2, 1, 1], [9, 7]):
        counts = torch.tensor(counts)
        population = counts / counts.sum()
        bits = sum(p * math.ceil(-math.log2(p) - 1e-12) for p in population.tolist())
        entropy, soft, hard = coding.code_length(counts)
        assert entropy - 1e-9 <= hard < entropy + math.log(2)
        assert hard == pytest.approx(bits * math.log(2)) == soft


def test_the_smallest_loss_over_guides_is_the_cross_entropy():
    coding = load("compress")
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
    with pytest.raises(ValueError, match="weight: expected"):
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


# ------------------------------------------------------------------------------- importance-weighted bound


class Shifted(Pair):
    """z ~ N(0, 1), y ~ N(z, 1), q = N(y/2 + shift, 1): evidence N(y; 0, 2)."""

    def __init__(self, shift=0.4, size=None):
        super().__init__()
        self.shift, self.size = torch.nn.Parameter(torch.tensor(shift)), size

    def plate(self, y):
        if self.size is None:
            return pyro.plate("data", len(y))
        return pyro.plate("data", self.size, subsample=torch.arange(len(y)))

    def model(self, y):
        with self.plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(self, y):
        with self.plate(y):
            pyro.sample("z", dist.Normal(y / 2 + self.shift, 1.0))


def by_hand(pair, y, particles, weight=1.0):
    z = y / 2 + pair.shift + torch.randn(particles, len(y))
    kl = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(y / 2 + pair.shift, 1.0).log_prob(z)
    log_w = dist.Normal(z, 1.0).log_prob(y) + weight * kl
    return -log_w.exp().mean(0).log()


@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("particles", [1, 4])
def test_iwae_is_the_logarithm_of_the_mean_weight_of_each_datum(particles, weight):
    y, values = torch.randn(6), []
    for size in (None, 60):
        pair = Shifted(size=size)
        objective = IWAE_ELBO(particles, weight=weight, max_plate_nesting=1)
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(pair.model, pair.guide, y) / (1 if size is None else size / 6)
        pyro.set_rng_seed(1)
        expected = by_hand(pair, y, particles, weight).sum()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient(pair, loss), gradient(pair, expected))
        values.append(loss.detach())
    torch.testing.assert_close(*values)


def test_iwae_is_unbiased_before_the_logarithm_and_bounds_the_evidence():
    pair, y = Shifted(), torch.tensor([0.7])
    exact = dist.Normal(0.0, 2**0.5).log_prob(y).item()
    means = []
    for particles in (1, 5, 25):
        objective = IWAE_ELBO(particles)
        bounds = -torch.tensor([objective.loss(pair.model, pair.guide, y) for _ in range(1000)])
        ratio = (bounds - exact).exp()
        # three two-sided z-tests on 1,000 bounded weights: false alarms below 1e-6 each
        assert abs(float(ratio.mean() - 1) / float(ratio.std() / 1000**0.5)) < 5
        means.append(float(bounds.mean()))
    assert means[0] < means[1] < means[2] < exact + 0.02


def test_iwae_of_an_exact_guide_is_the_evidence():
    make, draw = TABLE["ppca"]
    pair, y = make(), draw(9)
    loss = IWAE_ELBO(3).loss(pair.model, pair.guide, y)
    assert loss == pytest.approx(-float(pair.log_evidence(y).sum().detach()))


def test_iwae_counts_masked_data_as_not_there():
    pair, y = Shifted(), torch.randn(6)
    mask = torch.arange(6) < 4
    programs = [pyro.poutine.mask(program, mask=mask) for program in (pair.model, pair.guide)]
    pyro.set_rng_seed(1)
    loss = IWAE_ELBO(3, max_plate_nesting=1).loss(*programs, y)
    pyro.set_rng_seed(1)
    assert loss == pytest.approx(float(by_hand(pair, y, 3)[mask].sum().detach()))


def test_iwae_computes_features_of_the_data_once():
    pair, y = models.Ladder(6, (3, 2), (8, 6), norm="layer"), (torch.rand(7, 6) < 0.5).double()
    seen = []
    pair.encoder.features.register_forward_hook(lambda module, args, out: seen.append(out[0].shape))
    IWAE_ELBO(4, max_plate_nesting=1).loss(pair.model, pair.guide, y)
    assert seen == [(7, 8)]


def test_iwae_refuses_what_is_no_weight():
    y = torch.randn(5)
    objective = IWAE_ELBO(2, max_plate_nesting=1)
    pair = Shifted()
    scaled = pyro.poutine.scale(pair.model, 0.5)
    with pytest.raises(ValueError, match="'z' is scaled by 0.5"):
        objective.differentiable_loss(scaled, pair.guide, y)
    make, draw = TABLE["mixture-encoder"]
    pair = make()
    with pytest.raises(ValueError, match="expected a reparametrized"):
        objective.differentiable_loss(pair.model, pair.guide, draw(4))
    with pytest.raises(ValueError, match="num_particles"):
        IWAE_ELBO(0)

    def loose(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError, match="outside the plate"):
        objective.differentiable_loss(loose, guide, y)
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="'z': expected a site of the same name in the guide"),
    ):
        objective.differentiable_loss(Shifted().model, lambda y: None, y)


def test_fit_takes_the_number_of_particles_into_the_bound():
    runs = []
    y = torch.randn(64)
    for objective, particles in (("iwae", 5), (IWAE_ELBO(5), 1)):
        pair = Shifted()
        run = fit(
            pair,
            y,
            objective=objective,
            particles=particles,
            batch_size=32,
            epochs=2,
            kl_weight=lambda e: 0.5,
            progress=False,
        )
        runs.append((pair.shift.item(), [row["loss"] for row in run.metrics], run.metrics[0]["kl_weight"]))
    assert runs[0] == runs[1] and runs[0][2] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="expected at least 2 for an importance-weighted objective, got 1"):
        fit(Shifted(), y, objective="iwae", progress=False)


def test_fit_validates_by_the_bound_that_it_trains():
    pair, y = Shifted(), torch.randn(200)
    run = fit(
        pair,
        y,
        valid=y,
        objective="iwae",
        particles=20,
        learning_rate=1e-9,
        epochs=1,
        patience=3,
        progress=False,
    )
    exact = float(dist.Normal(0.0, 2**0.5).log_prob(y).mean())
    (row,) = run.metrics
    # The guide misses by 0.3 nats; of 200 data the bound of 20 draws strays by some 0.02.
    assert "valid_elbo" not in row and abs(row["valid_iwae-20"] - exact) < 0.1


@pytest.mark.parametrize("objective", [Layered_ELBO, IWAE_ELBO])
def test_a_constant_kl_weight_goes_into_the_objective_that_has_one(objective):
    loss = objective()
    fit(Shifted(), torch.randn(8), objective=loss, kl_weight=0.25, epochs=1, progress=False)
    assert loss.weight == 0.25

"""Priors: densities that integrate to one and agree with their draws, learned inside the ELBO."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyroelbo import Pair, audit, evidence, fit, models, priors
from pyroelbo.compiled import CompiledStep
from pyroelbo.distributions import DiagonalMixture
from pyroelbo.priors import (
    AutoregressivePrior,
    FlowPrior,
    GaussianMixturePrior,
    IntegerPrior,
    StandardNormal,
    VampPrior,
)


def encoder(weight):
    """A nonlinear Gaussian encoder as a plain function."""
    return lambda u: dist.Normal(torch.tanh(u @ weight), 0.3 + 0.1 * (u @ weight).cos()).to_event(1)


def disturbed(prior, by=0.3):
    """Away from its start, where a wrong Jacobian could hide."""
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return prior


MAKE = {
    "standard": lambda dims: StandardNormal(dims),
    "mixture": lambda dims: GaussianMixturePrior(dims, 4),
    "vamp": lambda dims: VampPrior(dims, encoder(torch.randn(3, dims)), torch.rand(5, 3)),
    "coupling": lambda dims: FlowPrior(dims, layers=3, hidden=(8,), bins=4),
    "masked": lambda dims: FlowPrior(dims, "autoregressive", layers=2, hidden=(8,), bins=4),
    "autoregressive": lambda dims: AutoregressivePrior(dims, 3, hidden=(8,)),
}


@pytest.mark.parametrize("kind", MAKE)
def test_the_mass_of_a_square_is_the_share_of_draws_in_it(kind):
    torch.manual_seed(1)
    prior = disturbed(MAKE[kind](2), 0.15)()
    ticks = torch.linspace(-8, 8, 401)
    grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1)
    with torch.no_grad():
        mass = float(prior.log_prob(grid).exp().sum()) * 0.04**2
        share = float((prior.sample((20_000,)).abs() < 8).all(-1).double().mean())
    # 4.5 standard errors of the share (false alarms: 7e-6 for each of 6), and the kinks of splines within a
    # cell.
    assert abs(mass - share) < 4.5 * math.sqrt(share * (1 - share) / 20_000) + 3e-3
    assert share > 0.3


@pytest.mark.parametrize("dims", [1, 5])
@pytest.mark.parametrize("kind", MAKE)
def test_priors_of_any_dimension(kind, dims):
    if (kind, dims) == ("coupling", 1):
        pytest.skip("a coupling splits the dimensions")
    prior = MAKE[kind](dims)()
    z = prior.expand((3, 2)).sample((4,))
    assert z.shape == (4, 3, 2, dims) and prior.log_prob(z).shape == (4, 3, 2)
    assert torch.isfinite(prior.log_prob(10 * z)).all()


def test_the_diagonal_mixture_is_pyros():
    torch.manual_seed(0)
    logits, loc, scale = torch.randn(7), 3 * torch.randn(7, 4) + 50, torch.rand(7, 4) * 0.1 + 1e-3
    ours = DiagonalMixture(logits, loc, scale)
    theirs = dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, scale).to_event(1))
    z = theirs.sample((6, 5))
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z), atol=1e-7, rtol=1e-9)
    wide = ours.expand((6, 5))
    assert wide.batch_shape == (6, 5) and wide.sample().shape == (6, 5, 4)
    assert wide.log_prob(z[0, 0]).shape == (6, 5)
    single = DiagonalMixture(logits.float(), loc.float(), scale.float())
    torch.testing.assert_close(
        single.log_prob(z.float()).double(), ours.log_prob(z.float().double()), atol=0.02, rtol=0
    )
    with pytest.raises(ValueError, match="logits, loc, scale: expected shapes"):
        DiagonalMixture(logits[:3], loc, scale)


def test_a_vampprior_is_the_mixture_of_its_encodings():
    weight, u, z = torch.randn(3, 2), torch.rand(5, 3), torch.randn(4, 2)
    prior = VampPrior(2, encoder(weight), u)
    terms = torch.stack([encoder(weight)(u[m]).log_prob(z) for m in range(5)])
    torch.testing.assert_close(prior().log_prob(z), terms.logsumexp(0) - math.log(5))

    def correlated(u):
        return dist.MultivariateNormal(u @ weight, scale_tril=torch.tensor([[0.5, 0.0], [0.4, 0.3]]))

    terms = torch.stack([correlated(u[m]).log_prob(z) for m in range(5)])
    general = VampPrior(2, correlated, u)()
    torch.testing.assert_close(general.log_prob(z), terms.logsumexp(0) - math.log(5))


def test_pseudo_inputs_start_at_data_with_noise_of_the_datas_scale():
    torch.manual_seed(0)
    y = 5 + 10 * torch.randn(400, 50)
    prior = VampPrior(2, encoder(torch.randn(50, 2)), torch.rand(100, 50), noise=0.02)
    prior.initialize(y)
    apart = prior.pseudo_inputs.detach()[:, None] - y
    nearest = apart.square().sum(-1).argmin(-1)
    assert len(set(nearest.tolist())) == 100  # each at a datum of its own
    noise = apart[torch.arange(100), nearest]
    expected = 0.02 * float(y.std(correction=0))
    # 5 standard errors of a standard deviation and of a mean over 5,000 numbers (false alarms: 6e-7 each)
    assert abs(float(noise.std()) / expected - 1) < 5 / math.sqrt(2 * 5000)
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(5000)


def vae(prior, **settings):
    torch.manual_seed(0)
    return models.VAE(6, 2, (8,), prior=prior, components=4, **settings)


def binary(n):
    return torch.bernoulli(torch.full((n, 6), 0.4))


@pytest.mark.parametrize("prior", priors.PRIORS)
def test_the_mean_field_loss_is_the_same_bound(prior):
    """Where Pyro has no closed KL it samples: both losses agree in mean."""
    pair, y = vae(prior), binary(30)
    disturbed(pair.prior)
    with torch.no_grad():
        draws = 2000
        losses = {}
        for loss in (Trace_ELBO, TraceMeanField_ELBO):
            value = loss(num_particles=draws, vectorize_particles=True, max_plate_nesting=1)
            losses[loss] = value.loss(pair.model, pair.guide, y)
        bound = evidence.elbo(pair, y, particles=2000)
    error = float(bound.stderr.square().sum().sqrt())
    for value in losses.values():
        assert abs(-value - float(bound.value.sum())) < 6 * math.sqrt(2) * error  # false alarms: 2e-9


def test_the_prior_is_learned_and_resumes(tmp_path):
    y = binary(64)
    for prior in priors.PRIORS:
        whole = vae(prior)
        before = {k: p.detach().clone() for k, p in whole.prior.named_parameters()}
        fit(whole, y, epochs=4, batch_size=16, out=tmp_path / f"{prior}-a", progress=False)
        assert all(not torch.equal(p, before[k]) for k, p in whole.prior.named_parameters())
        cut = vae(prior)
        fit(cut, y, epochs=2, batch_size=16, out=tmp_path / f"{prior}-b", progress=False)
        again = vae(prior)
        fit(again, y, epochs=4, batch_size=16, out=tmp_path / f"{prior}-b", resume=True, progress=False)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
        # After training, when distributions may hold on to what they last saw.
        twin = copy.deepcopy(whole)
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), twin.parameters(), strict=True))
        other = pickle.loads(pickle.dumps(whole))
        assert torch.equal(other.prior().log_prob(torch.ones(2)), whole.prior().log_prob(torch.ones(2)))
        if prior == "vamp":
            assert other.prior.encode.__self__ is other and twin.prior.encode.__self__ is twin


@pytest.mark.parametrize("prior", ["mixture", "vamp", "flow", "autoregressive"])
def test_a_step_with_the_prior_is_one_graph(prior):
    pair, y = vae(prior), binary(8)
    step = CompiledStep(Trace_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), backend="eager")
    with pyro.validation_enabled(False):
        for _ in range(3):
            step(y)
    assert step.counters.compiled_calls == 3 and step.counters.fallbacks == 0


def test_a_learned_prior_closes_the_gap_between_prior_and_aggregated_posterior():
    """With the encoder and decoder held, a flexible prior may only raise the ELBO."""
    y = binary(40)
    pair = vae("mixture")
    before = evidence.elbo(pair, y, particles=500).mean
    fit(
        pair,
        y,
        epochs=300,
        batch_size=40,
        learning_rate=0.02,
        freeze=("generator", "encoder"),
        progress=False,
    )
    assert evidence.elbo(pair, y, particles=500).mean > before + 0.1


@pytest.mark.parametrize("kind", ["mixture", "masked", "autoregressive"])
def test_a_prior_stands_at_the_top_of_a_ladder(kind):
    torch.manual_seed(0)
    prior, y = MAKE[kind](3), binary(12)
    pair = models.Ladder(6, (4, 3), (8, 8), norm="none", prior=prior)
    before = {k: p.detach().clone() for k, p in prior.named_parameters()}
    fit(pair, y, epochs=2, learning_rate=0.01, progress=False)
    assert all(not torch.equal(p, before[k]) for k, p in prior.named_parameters())
    a = audit(pair, y, particles=200)
    assert a["iwae-200"].mean > a["elbo"].mean


def test_pseudo_inputs_are_data_with_noise_in_the_datas_units():
    y = 100.0 * torch.randint(2, (400, 3))
    prior = VampPrior(2, encoder(torch.randn(3, 2)), torch.zeros(400, 3), noise=0.02)
    prior.initialize(y)
    apart = prior.pseudo_inputs.detach() - 100.0 * (prior.pseudo_inputs.detach() > 50)
    # the spread of 1200 draws, to 5 standard errors: false alarms below 1e-6
    assert float(apart.std() / (0.02 * y.std(correction=0))) == pytest.approx(1, abs=5 / math.sqrt(2400))
    assert abs(float(apart.mean())) < 5 * float(apart.std()) / math.sqrt(1200)


def test_vamps_part_is_its_own():
    pair = vae("vamp")
    assert set(pair.part("prior")) == {"prior.pseudo_inputs"}
    assert set(vae("mixture").part("prior")) == {"prior.logits", "prior.loc", "prior.log_scale"}


@pytest.mark.parametrize(
    "prior",
    ["mixture", "vamp", *(pytest.param(p, marks=pytest.mark.slow) for p in priors.PRIORS[2:])],
)
def test_bounds_of_the_registered_vae_are_ordered(prior):
    y = binary(3)
    pair = vae(prior)
    fit(pair, y, epochs=20, learning_rate=0.01, progress=False)
    torch.manual_seed(0)
    a = audit(pair, y, particles=400)
    assert a["quadrature"].mean >= a["iwae-400"].mean - 5 * a["iwae-400"].mean_error - 1e-6
    assert a["iwae-400"].mean >= a["elbo"].mean - 5 * a["elbo"].mean_error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vae("gumbel"), "prior: expected one of .* got 'gumbel'"),
        (
            lambda: models.VAE(6, 3, (8,), prior=StandardNormal(2)),
            "expected 3 dimensions for the latent 'z', got a StandardNormal of 2",
        ),
        (lambda: models.VAE(6, 1, (8,), prior="flow"), "dims: expected at least 2 for a coupling, .* got 1"),
        (
            lambda: models.VAE(6, 2, (8,), prior="vamp", components=0),
            "positive number of pseudo-inputs, got 0",
        ),
        (
            lambda: models.VAE(6, 2, (8,), prior="mixture", components=0),
            "'mixture' of 'z': components: .*got 0",
        ),
        (
            lambda: models.VAE(6, prior="vamp", components=4).initialize(torch.zeros(3, 6)),
            "at most one pseudo-input for each of the 3 data, got 4",
        ),
        (
            lambda: vae("vamp").prior.initialize(torch.zeros(9, 5)),
            r"expected rows of shape \(6,\).* got \(5,\)",
        ),
        (
            lambda: VampPrior(3, encoder(torch.randn(4, 2)), torch.rand(2, 4))(),
            r"encode: expected a latent of shape \(3,\), got \(2,\)",
        ),
        (
            lambda: VampPrior(3, encoder(torch.randn(4, 2)), torch.rand(4)),
            r"pseudo_inputs: expected shape \[M, ...\]",
        ),
        (lambda: FlowPrior(3, "radial"), "kind: expected one of .* got 'radial'"),
        (lambda: AutoregressivePrior(3, hidden=()), "hidden: expected at least one width"),
        (lambda: AutoregressivePrior(0), "dims: .*got 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Alone(Pair):
    """A prior whose draws are the data."""

    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def model(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", self.prior(), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            self.prior.guide(y)


def test_a_diffusion_prior_is_a_chain_of_latents():
    """Two steps of one number: two latents, which quadrature integrates out."""
    pair, y = Alone(disturbed(priors.DiffusionPrior(1, steps=2, width=8, layers=1))), torch.randn(4, 1)
    exact, found = evidence.quadrature(pair, y), evidence.iwae(pair, y, 20000)
    assert ((found.value - exact.value).expm1().abs() < 5 * found.stderr + 1e-4).all()
    assert evidence.elbo(pair, y, 500).mean < exact.mean
    assert audit(vae("diffusion"), binary(3), particles=5, progress=False)["iwae-5"].kind == "lower"
    with pytest.raises(ValueError, match="latent site of its own, 'prior_chain': use order='bottom-up'"):
        models.Hierarchy(6, (3, 2), 8, order="top-down", prior="diffusion")


def test_a_diffusion_prior_is_learned():
    torch.manual_seed(0)
    y = 0.2 * torch.randn(400, 1) + torch.tensor([[-2.0], [2.0]]).repeat(200, 1)
    pair = Alone(priors.DiffusionPrior(1, steps=10, width=32, layers=1))
    fit(pair, y, epochs=25, batch_size=50, learning_rate=1e-2, schedule="cosine", progress=False)
    normal = torch.distributions.Normal(0.0, 4.04**0.5).log_prob(y).mean()
    assert evidence.iwae(pair, y[:100], 50).mean > float(normal) + 0.5  # two modes, not one Gaussian


def test_a_prior_of_integers_sums_to_one_and_is_drawn_coordinate_by_coordinate():
    """Pearson's statistic of 20,000 draws of 27 vectors: chi-squared with 26 degrees of freedom, at 1e-6."""
    torch.manual_seed(0)
    p = disturbed(IntegerPrior(3, 3, 2, (8,)))()
    every = p.enumerate_support()
    assert every.shape == (27, 3) and p.expand((2, 4)).enumerate_support(expand=False).shape == (27, 1, 1, 3)
    probs = p.log_prob(every).exp().detach()
    assert float(probs.sum()) == pytest.approx(1, abs=1e-9)
    place = (p.sample((20_000,)) * torch.tensor([9.0, 3.0, 1.0])).sum(-1).long()
    seen = place.bincount(minlength=27)
    assert ((seen - 20_000 * probs).square() / (20_000 * probs)).sum() < 80
    steps = p.stepwise()
    state, total = steps.begin(27), 0.0
    for d in range(3):
        total = total + steps.distribution(state).log_prob(every[:, d])
        state = steps.append(state, every[:, d])
    torch.testing.assert_close(total, p.log_prob(every))


def test_a_prior_of_many_integers_is_not_enumerated():
    p = IntegerPrior(4)()
    assert not p.has_enumerate_support and IntegerPrior(2)().has_enumerate_support
    with pytest.raises(NotImplementedError, match="expected at most 1048576 values"):
        p.enumerate_support()
    with pytest.raises(ValueError, match="components: expected a positive number of logistics, got 0"):
        IntegerPrior(2, components=0)

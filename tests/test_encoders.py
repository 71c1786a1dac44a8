"""Encoders: densities that integrate to one, reparametrized draws, and posteriors that a diagonal Gaussian
misses.
"""

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyroelbo import Pair, encoders, evidence, fit, models
from pyroelbo.compiled import CompiledStep
from pyroelbo.encoders import ENCODERS, MixtureEncoder, UniformMixture
from pyroelbo.nn import MLP


def encoder(kind, dims, **settings):
    torch.manual_seed(4)
    made = ENCODERS[kind](dims, 3.0, **settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()  # a density of its own only outside training, for batch-normalized means


def square(dims, to=15.0, step=0.05):
    ticks = torch.arange(-to, to, step)
    return torch.stack(torch.meshgrid(*[ticks] * dims, indexing="ij"), -1), step**dims


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_density_integrates_to_one_and_gives_the_moments_of_draws(kind, dims):
    made = encoder(kind, dims)
    q = made(0.4 * torch.randn(made.num_inputs))
    grid, cell = square(dims)
    with torch.no_grad():
        mass = (q.log_prob(grid).exp() * cell).flatten()
        assert abs(float(mass.sum()) - 1) < 2e-3  # kinks of splines within a cell
        points, draws = grid.flatten(0, dims - 1), q.rsample((20_000,))
    for f in (lambda z: z, lambda z: z.square(), lambda z: z.prod(-1, keepdim=True)):
        error = f(draws).std(0) / math.sqrt(20_000)
        # false alarms: 6e-7 a coordinate; 0.01 for the grid
        assert ((f(draws).mean(0) - mass @ f(points)).abs() < 5 * error + 0.01).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_draws_have_the_gradient_of_the_expectation(kind):
    """d/dx E_q(x) f(z), by reparametrized draws and by a sum over a grid."""
    made = encoder(kind, 2)
    x = (0.4 * torch.randn(made.num_inputs)).requires_grad_()

    def f(z):
        return (z[..., 0] - 0.4).square() * 0.3 + torch.sin(z.prod(-1)) + z[..., 1]

    grid, cell = square(2, step=0.1)
    value = (made(x).log_prob(grid).exp() * f(grid)).sum() * cell
    (exact,) = torch.autograd.grad(value, x)
    rows = x.detach().expand(10_000, -1).clone().requires_grad_()
    (each,) = torch.autograd.grad(f(made(rows).rsample()).sum(), rows)
    error = each.std(0) / math.sqrt(len(rows))
    # 5 standard errors: false alarms 6e-7 a number; 0.01 for the grid's edges and kinks
    assert ((each.mean(0) - exact).abs() < 5 * error + 0.01).all()
    assert (exact.abs() > 0.03).sum() >= 3


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_base_gives_the_unit_of_the_correction(kind):
    made, base = encoder(kind, 3), dist.Normal(torch.randn(3), torch.rand(3) + 0.5)
    x, z = torch.randn(5, made.num_inputs), torch.randn(5, 3)
    alone = made(x).log_prob((z - base.loc) / base.scale) - base.scale.log().sum()
    torch.testing.assert_close(made(x, base).log_prob(z), alone)
    pyro.set_rng_seed(1)
    there = made(x, base).rsample()
    pyro.set_rng_seed(1)
    torch.testing.assert_close(there, base.loc + base.scale * made(x).rsample())


@pytest.mark.parametrize("kind", ENCODERS)
def test_particles_and_batches(kind):
    made = encoder(kind, 3)
    q = made(torch.randn(4, made.num_inputs))
    assert q.batch_shape == (4,) and q.event_shape == (3,) and q.has_rsample
    z = q.rsample((7,))
    assert z.shape == (7, 4, 3) and q.log_prob(z).shape == (7, 4)
    wide = q.expand((7, 4))
    assert wide.batch_shape == (7, 4) and wide.sample().shape == (7, 4, 3)
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))


def test_draws_of_an_inverse_autoregressive_flow_see_earlier_noise_only():
    flow = encoder("iaf", 4, layers=1).flow
    e, c = torch.randn(4), torch.randn(flow.context)
    jacobian = torch.autograd.functional.jacobian(lambda e: flow.from_noise(e, c)[0], e)
    order = flow.flow._order(0)
    there = jacobian[:, order]  # by the coordinate of noise that each output moves
    assert (there.diagonal() > 0).all() and (there.triu(1) == 0).all() and (there.tril(-1) != 0).any()
    x, log_det = flow.from_noise(e, c)
    back, inverse = flow.to_noise(x, c)
    torch.testing.assert_close(back, e)
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(inverse, -log_det)


def test_the_uniform_mixture_is_pyros():
    loc, scale = torch.randn(6, 4, 3), torch.rand(6, 4, 3) + 0.1
    ours, even = UniformMixture(loc, scale), dist.Categorical(logits=torch.zeros(6, 4))
    theirs = dist.MixtureSameFamily(even, dist.Normal(loc, scale).to_event(1))
    z = 2 * torch.randn(5, 6, 3)
    torch.testing.assert_close(ours.log_prob(z), theirs.log_prob(z))


class Fixed(Pair):
    """y = f(z) + N(0, noise²) for z ~ N(0, I_2), with nothing to learn but the encoder."""

    def __init__(self, f, noise, encoder):
        super().__init__()
        head = encoders.build(encoder, 2)
        self.f, self.noise = f, noise
        self.encoder = torch.nn.Sequential(*MLP((1, 32, head.num_inputs)), head)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.f(z), self.noise).to_event(1), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", self.encoder(y))


def gap_after_training(f, noise, encoder, y):
    torch.manual_seed(0)
    pair = Fixed(f, noise, encoder)
    fit(pair, y, epochs=100, batch_size=64, learning_rate=0.01, schedule="cosine", progress=False)
    with torch.no_grad():
        exact = evidence.quadrature(pair, y[:32]).value
        return float((exact - evidence.elbo(pair, y[:32], particles=500).value).mean())


def data(f, noise):
    torch.manual_seed(1)
    return f(torch.randn(256, 2)) + noise * torch.randn(256, 1)


@pytest.mark.slow
def test_a_correlated_posterior_is_found_by_all_but_the_diagonal():
    """y = z_1 + z_2 + N(0, 0.3²): the posterior's correlation is -0.917, and a diagonal q cannot come nearer
    than -½ ln(1 - 0.917²) = 0.92 nats.
    """

    def f(z):
        return z.sum(-1, keepdim=True)

    y = data(f, 0.3)
    gaps = {kind: gap_after_training(f, 0.3, kind, y) for kind in ENCODERS}
    correlation = 1 / (1 + 0.3**2)
    assert gaps["diagonal"] > -0.5 * math.log(1 - correlation**2) - 0.02
    assert gaps["full"] < 0.05 and gaps["flow"] < 0.1 and gaps["iaf"] < 0.1
    assert gaps["mixture"] < gaps["diagonal"] - 0.2


@pytest.mark.slow
def test_a_bimodal_posterior_is_found_by_a_mixture():
    """y = |z_1| + N(0, 0.2²): a diagonal q covers one of two modes and loses about ln 2."""

    def f(z):
        return z[..., :1].abs()

    y = data(f, 0.2)
    gaps = {kind: gap_after_training(f, 0.2, kind, y) for kind in ("diagonal", "mixture")}
    assert gaps["diagonal"] > 0.5
    assert gaps["mixture"] < 0.2  # 0.13 if three of the four components share a mode


@pytest.mark.parametrize("network", ["mlp", "gated", "conv"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_family_is_a_part_of_the_encoder(kind, network):
    pair = models.VAE((4, 4), 2, (8,), network=network, channels=2, encoder=kind)
    y = torch.bernoulli(torch.full((20, 16), 0.4))
    before = {k: p.detach().clone() for k, p in pair.part("encoder").items()}
    fit(pair, y, epochs=2, learning_rate=0.01, progress=False)
    assert all(not torch.equal(p, before[k]) for k, p in pair.part("encoder").items())
    assert type(pair.encode(y)) is type(
        ENCODERS[kind](2, None)(torch.zeros(20, ENCODERS[kind](2, None).num_inputs))
    )


def test_the_default_keeps_its_parameters_names():
    names = [k for k, _ in models.VAE(6, 2, (8,)).encoder.named_parameters()]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_an_encoder_of_ones_own():
    three = functools.partial(MixtureEncoder, components=3)
    pair = models.Ladder(6, (3, 2), (8, 6), encoder=three)
    assert all(link.family.components == 3 for link in pair.encoder.links)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: models.VAE(6, 2, (8,), encoder="cubic"),
            r"encoder: expected one of \('diagonal', .* got 'cubic'",
        ),
        (lambda: models.Hierarchy(6, (3, 2), 8, encoder="cubic"), "encoder: expected one of"),
        (
            lambda: models.Ladder(6, (3, 2), (8, 6), merge="precision", encoder="full"),
            "encoder: expected 'diagonal' with merge='precision'",
        ),
        (lambda: MixtureEncoder(2, components=0), "components: .*got 0"),
        (lambda: encoders.FlowEncoder(2, context=0), "context: .*got 0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_step_is_one_graph(kind):
    pair = models.VAE(6, 2, (8,), encoder=kind)
    step = CompiledStep(Trace_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), backend="eager")
    with pyro.validation_enabled(False):
        for _ in range(3):
            step(torch.bernoulli(torch.full((8, 6), 0.4)))
    assert step.counters.compiled_calls == 3 and step.counters.fallbacks == 0

"""Diffusion: the bound's training form against the written-out chain, Gaussian and finite oracles,
refusals."""

import copy
import math

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyroelbo import audit, evidence, fit, models
from pyroelbo.compiled import CompiledStep
from pyroelbo.distributions.corruption import Corrupted, GaussianNoise, Generated, NoisyChain, kept
from pyroelbo.evidence import Unavailable
from pyroelbo.training.step import EagerStep
from tests.pairs import TABLE as PAIR_TABLE

# Gap between the optimal bound and the entropy, nats/dim, of AR(1) data: .9, 8 dimensions, variance .25.
TABLE = {
    "linear": {10: 0.164, 50: 0.043, 200: 0.0104, 1000: 0.0021},
    "cosine": {10: 0.108, 50: 0.0215, 200: 0.0053, 1000: 0.0011},
}


def covariance(dims=8):
    i = torch.arange(dims)
    return 0.25 * 0.9 ** (i[:, None] - i).abs().double()


def links(schedule, steps, s):
    """E[z_{t-1} | z_t] = M_t z_t and the diagonal of its covariance, t = 1 … T, for z_0 ~ N(0, s)."""
    left, eye = kept(schedule, steps), torch.eye(len(s))
    for t in range(1, steps + 1):
        alpha = left[t] / left[t - 1]
        below = left[t - 1] * s + (1 - left[t - 1]) * eye
        gain = torch.linalg.solve(alpha * below + (1 - alpha) * eye, alpha.sqrt() * below).T
        yield gain, (below - gain @ below * alpha.sqrt()).diagonal()


def entropy(s):
    return float(0.5 * torch.logdet(2 * math.pi * math.e * s))


def closed_gap(schedule, steps, s):
    """Optimal bound minus entropy, nats/dim: E -ln p(z_{t-1} | z_t) - h(z_t | z_{t-1}) summed over t, and the
    prior's cross-entropy."""
    left, total = kept(schedule, steps), 0.0
    for t, (_, variance) in enumerate(links(schedule, steps, s), 1):
        total += float(0.5 * (variance / (1 - left[t] / left[t - 1])).log().sum())
    power = (left[-1] * s.diagonal() + 1 - left[-1]).sum()
    return (total + float(0.5 * (len(s) * math.log(2 * math.pi) + power)) - entropy(s)) / len(s)


@torch.no_grad()
def optimal(schedule, steps, s):
    """The pair of linear denoisers whose links are the optimal ones."""
    pair = models.Diffusion(len(s), steps, None, schedule, "x0", network="linear")
    left, network = kept(schedule, steps), pair.generator
    for t, (gain, variance) in enumerate(links(schedule, steps, s), 1):
        alpha = left[t] / left[t - 1]
        of_x = left[t - 1].sqrt() * (1 - alpha) / (1 - left[t])
        of_z = alpha.sqrt() * (1 - left[t - 1]) / (1 - left[t])
        network.weight[t - 1] = (gain - of_z * torch.eye(len(s))) / of_x
        ratio = (variance / (1 - alpha)).log()
        network.bias[t - 1, :, 1] = 10 * torch.atanh(ratio / 10)  # the variance's soft clamp
    return pair


def sigma_points(s):
    """Points (x, noise) [4d, d] whose mean of a quadratic function is its mean over N(0, s) and N(0, I)."""
    dims = len(s)
    root = torch.block_diag(torch.linalg.cholesky(s), torch.eye(dims)) * (2 * dims) ** 0.5
    return torch.cat([root.T, -root.T]).split(dims, 1)


@torch.no_grad()
def exact_bound(pair, s):
    """The bound's mean over y ~ N(0, s): every term is quadratic in (y, noise)."""
    y, noise = sigma_points(s)
    time = (torch.arange(pair.steps) + 0.5)[:, None] / pair.steps
    return float(pair.term(y, time.expand(-1, len(y)), noise.expand(pair.steps, -1, -1)).mean(1).sum())


@pytest.mark.parametrize("schedule", TABLE)
def test_the_gap_of_the_optimal_gaussian_bound(schedule):
    s = covariance()
    for steps, wanted in TABLE[schedule].items():
        found = closed_gap(schedule, steps, s)
        assert abs(found - wanted) < 6e-4 if steps < 200 else abs(found - wanted) < 6e-5
        bound = exact_bound(optimal(schedule, steps, s), s)
        assert (-bound - entropy(s)) / 8 == pytest.approx(found, abs=1e-9)


def whitened(n, s):
    """n data with exactly this second moment and mean 0, so that the closed form holds for them as they
    are."""
    y = torch.randn(n, len(s))
    y = y - y.mean(0)
    root = torch.linalg.cholesky(y.T @ y / n)
    return torch.linalg.solve_triangular(root, y.T, upper=False).T @ torch.linalg.cholesky(s).T


def trained_gap(schedule, steps, s, network="linear", **settings):
    pair = models.Diffusion(len(s), steps, None, schedule, network=network)
    defaults = {"epochs": 60, "batch_size": 250, "learning_rate": 0.03, "particles": 4, "ema": 0.99}
    fit(pair, whitened(2000, s), schedule="cosine", progress=False, **{**defaults, **settings})
    return pair


def test_a_trained_bound_reaches_the_closed_form():
    s = covariance()
    pair = trained_gap("cosine", 10, s, epochs=40)
    assert abs((-exact_bound(pair, s) - entropy(s)) / 8 - TABLE["cosine"][10]) < 0.003


@pytest.mark.slow
@pytest.mark.parametrize("schedule", TABLE)
@pytest.mark.parametrize("steps", [10, 50])
def test_trained_bounds_reach_the_table(schedule, steps):
    s = covariance()
    pair = trained_gap(schedule, steps, s, epochs=300)
    assert abs((-exact_bound(pair, s) - entropy(s)) / 8 - TABLE[schedule][steps]) < 0.003


@pytest.mark.slow
@pytest.mark.parametrize("schedule", TABLE)
@pytest.mark.parametrize("steps", [10, 50])
def test_an_mlp_comes_close_to_the_table(schedule, steps):
    s = covariance()
    pair = trained_gap(schedule, steps, s, "mlp", epochs=300, learning_rate=2e-3)
    y = torch.randn(20000, 8) @ torch.linalg.cholesky(s).T  # fresh: the network may not remember them
    bound = float(pair.by_layer(y, 4).sum())
    # the entropy of these very data under the true density
    true = torch.distributions.MultivariateNormal(torch.zeros(8), s).log_prob(y).mean()
    assert abs((float(true) - bound) / 8 - TABLE[schedule][steps]) < 0.02


def test_fixed_variances_of_isotropic_data():
    """At T = 1000 and variance ¼, β̃ leaves .4563 nats/dim with the linear schedule, β .0011."""
    s, left = torch.tensor([[0.25]]), kept("linear", 1000)[1:]
    for variance, wanted in (("beta_tilde", 0.4563), ("beta", 0.0011)):
        pair = models.Diffusion(1, 1000, None, "linear", "x0", variance, network="linear")
        with torch.no_grad():
            pair.generator.weight[:, 0, 0] = left.sqrt() * 0.25 / (0.25 * left + 1 - left)
        assert -exact_bound(pair, s) - entropy(s) == pytest.approx(wanted, abs=6e-5)


# ------------------------------------------------------------------------------ training form = chain


def perturbed(pair, scale=0.3):
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(scale * torch.randn_like(p))
    return pair


PAIRS = {
    "gaussian": (lambda t: models.Diffusion(2, t, 5, network="linear"), torch.tensor([[1.0, 4.0]])),
    "density": (lambda t: models.Diffusion(2, t, None, "linear", "eps", width=8, layers=1), torch.ones(1, 2)),
    "uniform": (lambda t: models.DiscreteDiffusion(2, 3, t, width=8, layers=1), torch.tensor([[0, 2]])),
}


@torch.no_grad()
def draws(pair, y, n, seed):
    """n draws of ln w in both forms, the same random numbers for a seed."""
    torch.manual_seed(seed)
    y = y.expand(n, -1)
    one = pair.terms * pair.term(y, torch.rand(n), pair.noise_law().sample((n,)))
    whole = pair.written_out()
    q = Corrupted(pair.corruption, pair.corruption.encode(y))
    z = q.sample()
    p = Generated(pair).log_prob(z) + whole.observation(z[:, -1]).log_prob(y).sum(-1)
    return one, p - q.log_prob(z)


def z_score(a, b):
    return float((a.mean() - b.mean()) / (a.var() / len(a) + b.var() / len(b)).sqrt())


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("kind", PAIRS)
def test_one_drawn_step_has_the_mean_of_the_whole_chain(kind, steps):
    """Values and gradients; a z-test each at 4.9 standard errors, 1e-6. Gradients along a random direction,
    by central differences of the same draws."""
    make, y = PAIRS[kind]
    pair = perturbed(make(steps))
    one, chain = draws(pair, y, 10000, 1)
    assert abs(z_score(one, chain)) < 4.9
    direction = {k: torch.randn_like(p) for k, p in pair.named_parameters()}
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            for k, p in pair.named_parameters():
                p.add_(sign * (1 if sign > 0 else 2) * 1e-4 * direction[k])
        # Gaussian draws do not move with the parameters, and the encoder has none
        found.append(draws(pair, y, 10000, 2))
    slopes = [(up - down) / 2e-4 for up, down in zip(*found, strict=True)]
    assert abs(z_score(*slopes)) < 4.9


def test_the_simple_loss_is_trained_and_the_bound_is_evaluated():
    """In training the mean over steps of half the squared error of the noise, with .001 of the bound; one
    dimension at z_t = noise by hand."""
    torch.manual_seed(0)
    pair = models.Diffusion(2, 8, None, parametrization="eps", network="linear", loss="simple")
    plain = models.Diffusion(2, 8, None, parametrization="eps", network="linear")
    plain.load_state_dict(pair.state_dict())
    y, time, noise = torch.randn(5, 2), torch.rand(5), torch.randn(5, 2)
    whole = plain.term(y, time, noise)  # ε̂ = 0, so that the error is the noise
    top = pair._top(pair.corruption.encode(y)) / 8
    wanted = -0.5 * noise.square().sum(-1) / 8 + 1e-3 * (whole + top) - top
    torch.testing.assert_close(pair.term(y, time, noise), wanted)
    torch.testing.assert_close(pair.eval().term(y, time, noise), whole)
    assert evidence.elbo(pair, y, 50).kind == "lower"


def test_layers_add_up_to_the_bound():
    make, y = PAIRS["gaussian"]
    pair = perturbed(make(8))
    found = pair.by_layer(y, 20000)
    one, _ = draws(pair, y, 20000, 3)
    assert found.shape == (9,) and abs(float(found.sum() - one.mean())) < 6 * float(one.std() / 20000**0.5)


# ------------------------------------------------------------------------------------------- oracles


@torch.no_grad()
def gaussian_evidence(pair, y):
    """ln p(y) of a real-valued diffusion with linear denoisers: its marginal is Gaussian, by recursion."""
    whole, dims = pair.written_out(), pair.dims
    mean, cov = torch.zeros(dims), torch.eye(dims)
    probes = torch.cat([torch.zeros(1, dims), torch.eye(dims)])
    for t in range(pair.steps, 0, -1):
        step = torch.tensor(t)
        if t > 1:
            link = pair.corruption.reverse(pair.output(probes, step), probes, step)
        else:
            link = whole.observation(probes)
        loc, variance = link.mean, link.variance[0]
        matrix = (loc[1:] - loc[0]).T
        mean, cov = matrix @ mean + loc[0], matrix @ cov @ matrix.T + variance.diag()
    return torch.distributions.MultivariateNormal(mean, cov)


def test_bounds_of_a_gaussian_chain_and_its_exact_evidence():
    pair = perturbed(models.Diffusion(2, 4, None, network="linear"))
    law = gaussian_evidence(pair, None)
    y, whole = law.sample((4,)), pair.written_out()
    truth = law.log_prob(y)
    found = {
        "elbo": evidence.elbo(pair, y, 4000),
        "chain": evidence.elbo(whole, y, 4000),
        "iwae": evidence.iwae(whole, y, 20000),
        "smc": evidence.smc(whole, y, 32, 600, progress=False),
    }
    for name in ("iwae", "smc"):  # unbiased on the linear scale; eight z-tests at 4.9, 1e-6 each
        ratio = (found[name].value - truth).expm1()
        assert (ratio.abs() < 4.9 * found[name].stderr + 1e-9).all(), name
    gap = found["elbo"].value - found["chain"].value
    assert (gap.abs() < 4.9 * torch.hypot(found["elbo"].stderr, found["chain"].stderr)).all()
    assert (found["chain"].value < truth - 5 * found["chain"].stderr).all()
    assert evidence.iwae(whole, y, 8).mean > found["chain"].mean
    _, drawn = pair.simulate(20000)
    error = (law.covariance_matrix.diagonal() / 20000).sqrt()
    assert ((drawn.mean(0) - law.mean).abs() < 5 * error).all()
    torch.testing.assert_close(torch.cov(drawn.T), law.covariance_matrix, rtol=0.1, atol=0.1)


@torch.no_grad()
def finite_evidence(pair):
    """p(y) over all states of two symbols, by the chain's transition matrices."""
    v, whole = pair.corruption.levels, pair.written_out()
    states = torch.cartesian_prod(torch.arange(v), torch.arange(v))
    law = torch.full((len(states),), 1.0 / len(states))
    for t in range(pair.steps, 0, -1):
        step = torch.tensor(t)
        if t > 1:
            link = pair.corruption.reverse(pair.output(states, step), states, step)
        else:
            link = whole.observation(states)
        law = law @ link.log_prob(states[:, None, :]).sum(-1).exp().T
    return states, law


def test_bounds_of_a_finite_chain_and_its_exact_evidence():
    pair = perturbed(models.DiscreteDiffusion(2, 3, 5, width=8, layers=1))
    y, law = finite_evidence(pair)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    whole, truth = pair.written_out(), law.log()
    iwae, smc = evidence.iwae(whole, y, 4000), evidence.smc(whole, y, 16, 300, progress=False)
    for bound in (iwae, smc):  # 18 z-tests at 5.1, 6e-6 in all
        assert ((bound.value - truth).expm1().abs() < 5.1 * bound.stderr).all()
    elbo = evidence.elbo(pair, y, 4000)
    assert (elbo.value < truth + 5 * elbo.stderr).all() and elbo.mean < iwae.mean
    _, drawn = pair.simulate(20000)
    seen = torch.bincount((drawn.long() * torch.tensor([3, 1])).sum(-1), minlength=9) / 20000
    assert ((seen - law).abs() < 5.1 * (law * (1 - law) / 20000).sqrt()).all()


# ------------------------------------------------------------------------------------ what is refused


def test_the_training_form_has_no_weights():
    pair, y = models.Diffusion(3, 4, None, width=8, layers=1), torch.randn(5, 3)
    for refuse in (
        evidence.iwae,
        evidence.smc,
        evidence.ais,
        evidence.prior_monte_carlo,
        evidence.quadrature,
    ):
        with pytest.raises(Unavailable, match="within its datum"):
            refuse(pair, y)
    with pytest.raises(Unavailable, match="within its datum"):
        evidence.site_gaps(pair, y)
    with pytest.raises(ValueError, match="within the datum"):
        fit(pair, y, epochs=1, objective="iwae", particles=3, progress=False)
    result = audit(pair, y, particles=20, progress=False)
    assert [b.method for b in result.bounds] == ["elbo", "iwae-20"] and "written out" in str(result)


def test_a_batchs_times_are_spread_in_training_and_independent_in_evaluation():
    pair, y = models.Diffusion(3, 4, None, width=8, layers=1), torch.randn(8, 3)
    from pyro import poutine

    def times():
        return poutine.trace(pair.guide).get_trace(y).nodes["time"]["value"]

    spread = torch.stack([times() for _ in range(400)])
    assert ((spread * 8).long().sort(-1).values == torch.arange(8)).all()
    assert abs(float(spread.mean()) - 0.5) < 0.01 and abs(float(spread[:, 0].mean()) - 0.5) < 0.075
    pair.eval()
    free = torch.stack([times() for _ in range(400)])
    assert ((free * 8).long().sort(-1).values != torch.arange(8)).any(-1).double().mean() > 0.95


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "sigmoid"}, "schedule: expected one of"),
        ({"schedule": [0.1] * 10}, "at most 5% of the signal's variance at T, got 34.9%"),
        ({"schedule": [0.5] * 9}, "expected 10 numbers"),
        ({"schedule": [0.5] * 9 + [1.0]}, "expected 0 < β_t < 1, so that ᾱ_t falls, got 1 at t = 10"),
        ({"schedule": [0.9, -0.1] * 5}, "got -0.1 at t = 2"),
        ({"steps": 1}, "steps: expected at least 2"),
        ({"steps": 0}, "steps: expected a positive"),
        ({"parametrization": "x"}, "parametrization: expected one of"),
        ({"variance": "fixed"}, "variance: expected one of"),
        ({"network": "unet2"}, "network: expected one of"),
        ({"levels": 1}, "levels: expected a whole number of at least 2"),
        ({"loss": "l2"}, "loss: expected one of"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        models.Diffusion(3, **{"steps": 10, **settings})


def test_refused_data():
    pair = models.Diffusion(3, 4, 5, width=8, layers=1)
    with pytest.raises(ValueError, match=r"y: expected shape \[B, 3\] for this Diffusion, got \(2, 4\)"):
        fit(pair, torch.zeros(2, 4), progress=False)
    with pytest.raises(ValueError, match="got 5"):
        fit(pair, torch.full((2, 3), 5.0), progress=False)


def test_weights_of_another_number_of_steps_do_not_fit():
    tables = models.Diffusion(3, 4, None).state_dict()
    with pytest.raises(RuntimeError, match="tables"):
        models.Diffusion(3, 5, None).load_state_dict(tables)


# ------------------------------------------------------------------------------------------- samplers


def test_few_steps_end_at_the_data_and_all_steps_have_their_moments():
    s = covariance(2)
    pair = optimal("cosine", 50, s)
    error = 6 * (2 / 4000) ** 0.5 * 0.25
    for steps, eta in ((50, 1.0), (50, 0.0)):
        drawn = pair.few_steps(4000, steps, eta)
        torch.testing.assert_close(torch.cov(drawn.T), s, atol=error + 0.03, rtol=0)
    grey = models.Diffusion(2, 8, 5, width=8, layers=1)
    assert set(grey.few_steps(50, 3).unique().tolist()) <= set(range(5))
    with pytest.raises(ValueError, match="steps: expected at most T = 8, got 9"):
        grey.few_steps(5, 9)


def test_estimates_along_a_chain_end_at_its_data():
    s = covariance(2)
    pair = optimal("cosine", 50, s)
    latents, y = pair.written_out().simulate(200)
    strip = pair.strip(latents["z"], 6)
    error = (strip - y).square().mean((1, 2))
    assert strip.shape == (6, 200, 2) and (error.diff() < 0).all() and error[-1] < 0.01
    assert strip[0].square().mean() < 0.02  # of noise alone the mean is all that is known


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diffusion", "discrete_diffusion", "masked_diffusion", "vdm"])
def test_a_training_step_is_one_graph(name):
    """The learned schedule's gradients are weighed by hooks, which the graph has as well."""
    make, draw = PAIR_TABLE[name]
    pair = make()
    twin, y = copy.deepcopy(pair), draw(6)
    graph, plain = (
        step(Trace_ELBO(), p.model, p.guide, dict(p.named_parameters()), **settings)
        for step, p, settings in ((CompiledStep, pair, {"backend": "eager"}), (EagerStep, twin, {}))
    )
    with pyro.validation_enabled(False):
        for seed in range(4):
            losses = []
            for step in (graph, plain):
                pyro.set_rng_seed(seed)
                losses.append(step(y))
            torch.testing.assert_close(*losses)
    assert graph.counters.compiled_calls == 4 and graph.counters.fallbacks == 0
    for p, q in zip(pair.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("parametrization", ["eps", "x0", "v"])
def test_the_true_output_estimates_the_data(parametrization):
    """z_t = √a x + √(1-a) e, of which the network gives e, x, or √a e - √(1-a) x."""
    noise, t = GaussianNoise(6, "cosine", parametrization, "beta", None, 3), torch.tensor([1, 3, 6])
    left, lost, _, _ = noise.at(t)
    x, e = torch.randn(3, 3), torch.randn(3, 3)
    z = left.sqrt() * x + lost.sqrt() * e
    out = {"eps": e, "x0": x, "v": left.sqrt() * e - lost.sqrt() * x}[parametrization]
    torch.testing.assert_close(noise.estimate(out[..., None], z, t), x)


def test_the_observation_is_what_the_network_says_of_the_first_step(monkeypatch):
    pair, told = models.Diffusion(3, 4), []
    chain = next(m for m in pair.modules() if isinstance(m, NoisyChain))
    output = chain.output
    monkeypatch.setattr(chain, "output", lambda z, t, labels=None: (told.append(t), output(z, t, labels))[1])
    chain.observation(torch.randn(2, 3))
    assert [int(t) for t in told] == [1]

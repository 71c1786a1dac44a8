"""Finite latents that the guide leaves out are summed within each particle, against sums by hand."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import nn

from pyroelbo import Pair, audit, evidence, fit
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.pair import within_datum

Z_LIMIT = 4.9  # two-sided normal tail of 1e-6: the declared false-alarm rate of one z-test
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64)
SHIFTS = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
Y = torch.tensor([-1.0, 0.3, 4.0, 2.0, -2.5], dtype=torch.float64)


@config_enumerate
def clusters(y):
    """z about the mean of cluster k, y about z and a shift by k: y is a mixture of normals."""
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(MEANS[k], 1.0))
        pyro.sample("y", dist.Normal(z + SHIFTS[k], 0.5), obs=y)


@config_enumerate
def noise(y):
    """z of its own, y about z in one of three distances."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        pyro.sample("y", dist.Normal(z + SHIFTS[k], 0.5), obs=y)


def guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.7 * y, 0.9))


def mixture(means, y):
    marginal = dist.Normal(means, 1.25**0.5)
    return torch.logsumexp(WEIGHTS.log() + marginal.log_prob(y[:, None]), -1)


CASES = [(clusters, MEANS + SHIFTS), (noise, SHIFTS)]


def close_on_z(bound, truth):
    """A z-test on p(y), which the mean weight estimates without bias."""
    assert bool(((truth - bound.value).expm1().abs() < Z_LIMIT * bound.stderr).all()), bound.method


@pytest.mark.parametrize("model, means", CASES)
def test_the_weight_is_the_sum_over_the_finite_latent(model, means):
    evaluator = Evaluator(Pair.of(model, guide), Y)
    assert set(evaluator.latents) == {"z"} and evaluator.strategy.most is None
    z = torch.randn(7, 5)
    log_p = []
    for k in range(3):
        prior = dist.Normal(MEANS[k] if model is clusters else 0.0, 1.0)
        log_p.append(WEIGHTS[k].log() + prior.log_prob(z) + dist.Normal(z + SHIFTS[k], 0.5).log_prob(Y))
    right = torch.logsumexp(torch.stack(log_p), 0)
    terms = evaluator.terms({"z": z})
    torch.testing.assert_close(terms.log_joint, right, rtol=0, atol=1e-12)
    torch.testing.assert_close(evaluator.log_joint({"z": z}), right, rtol=0, atol=1e-12)
    # What is not observed is the marginal prior of z.
    prior = torch.stack([v for k, v in terms.log_model.items() if k not in terms.observed]).sum(0)
    if model is clusters:
        own = torch.logsumexp(WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(z[..., None]), -1)
    else:
        own = dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(prior, own, rtol=0, atol=1e-12)


@pytest.mark.parametrize("model, means", CASES)
def test_every_estimator_against_the_mixture(model, means):
    pair, truth = Pair.of(model, guide), mixture(means, Y)
    result = audit(pair, Y, particles=4000, progress=False)
    assert result.reference == "quadrature"
    torch.testing.assert_close(result["quadrature"].value, truth, rtol=0, atol=1e-6)
    assert result["elbo"].mean < result["iwae-4000"].mean < float(truth.mean()) + 0.1
    close_on_z(result["iwae-4000"], truth)
    close_on_z(evidence.prior_monte_carlo(pair, Y, 4000), truth)
    for start in ("guide", "prior"):
        close_on_z(evidence.ais(pair, Y, 10, 100, start=start, progress=False), truth)


def test_a_sum_within_the_guides_own_error():
    """ELBO + KL of the posterior is the evidence, by quadrature in z."""
    y = Y[:1]
    elbo = evidence.elbo(Pair.of(noise, guide), y, 4000)
    z = torch.linspace(-9, 9, 4001)
    q = dist.Normal(0.7 * y, 0.9)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + torch.logsumexp(
        WEIGHTS.log() + dist.Normal(z[:, None] + SHIFTS, 0.5).log_prob(y), -1
    )
    right = torch.trapezoid(q.log_prob(z).exp() * (log_joint - q.log_prob(z)), z)
    assert abs(float(elbo.value - right)) < Z_LIMIT * float(elbo.stderr)


def test_what_needs_a_term_of_its_own_is_refused():
    with pytest.raises(evidence.Unavailable, match="'z' depends on latents that are summed out"):
        evidence.site_gaps(Pair.of(clusters, guide), Y)
    assert evidence.site_gaps(Pair.of(noise, guide), Y, 8, 8).sites == ("z",)


def switching(y):
    """Two latents, a finite one and the observation of each step."""
    past = torch.zeros(len(y))
    with pyro.plate("data", len(y)):
        for t in range(2):
            past = pyro.sample(f"z_{t}", dist.Normal(0.8 * past, 1.0))
            k = pyro.sample(f"k_{t}", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(past + 2 * k, 0.5), obs=y[:, t])


def switching_guide(y):
    with pyro.plate("data", len(y)):
        for t in range(2):
            pyro.sample(f"z_{t}", dist.Normal(y[:, t] / 2, 1.0))


@pytest.mark.parametrize("proposal", ["guide", "prior"])
def test_particle_filters(proposal):
    y = torch.tensor([[1.0, 2.0], [-0.5, 0.4]])
    covariance = torch.tensor([[1.25, 0.8], [0.8, 1.89]])
    parts = []
    for k in itertools.product(range(2), repeat=2):
        prior = sum(math.log((0.7, 0.3)[i]) for i in k)
        parts.append(prior + dist.MultivariateNormal(2.0 * torch.tensor(k), covariance).log_prob(y))
    truth = torch.logsumexp(torch.stack(parts), 0)
    pair = Pair.of(switching, switching_guide)
    close_on_z(evidence.smc(pair, y, 200, 60, proposal=proposal, progress=False), truth)


class Refuses(nn.Module):
    """A network that takes [B] only."""

    def forward(self, z):
        assert z.dim() == 1
        return 1.5 * z


@pytest.mark.parametrize("kind", ["plate", "repeat", "loop"])
def test_each_layout_of_particles(kind):
    @config_enumerate
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            location = Refuses()(z) if kind != "plate" else 1.5 * z
            if kind == "loop":
                location = location + 0.0 * float(z[0])
            with pyro.plate("inner", 2, dim=-2):
                k = pyro.sample("k", dist.Categorical(WEIGHTS))
                pyro.sample("y", dist.Normal(location + SHIFTS[k], 0.5), obs=y.T)

    y = torch.randn(4, 2)

    def draws(y):
        guide(y.sum(1))

    evaluator = Evaluator(Pair.of(model, draws), y)
    assert type(evaluator.strategy).__name__.lower() == kind
    terms = evaluator.sample(6)
    z = terms.latents["z"]
    each = torch.logsumexp(
        WEIGHTS.log() + dist.Normal(1.5 * z[..., None, None] + SHIFTS, 0.5).log_prob(y[..., None]), -1
    )
    right = dist.Normal(0.0, 1.0).log_prob(z) + each.sum(-1)
    torch.testing.assert_close(terms.log_joint, right, rtol=0, atol=1e-12)


def test_the_weight_of_a_draw_is_that_of_pyro():
    """A hidden Markov model with global parameters, masks, inner and outer plates, as one joint value."""

    def model(y, lengths):
        matrix = pyro.sample("matrix", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
        rates = pyro.sample("rates", dist.Beta(torch.ones(3, 4), 1.0).to_event(2))
        tones = pyro.plate("tones", 4, dim=-1)
        with pyro.plate("sequences", len(y), dim=-2):
            x = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(
                        f"x_{t}", dist.Categorical(Vindex(matrix)[x]), infer={"enumerate": "parallel"}
                    )
                    with tones:
                        pyro.sample(f"y_{t}", dist.Bernoulli(rates[x.squeeze(-1)]), obs=y[:, t])

    def draws(y, lengths):
        pyro.sample("matrix", dist.Dirichlet(2 * torch.ones(3, 3)).to_event(1))
        pyro.sample("rates", dist.Beta(2 * torch.ones(3, 4), 2.0).to_event(2))

    y, lengths = torch.bernoulli(torch.full((3, 5, 4), 0.5)), torch.tensor([5, 2, 3])
    evaluator = Evaluator(Pair.of(model, draws), (y, lengths), scope="joint")
    terms = evaluator.sample(3)
    for i in range(3):
        trace = poutine.trace(draws).get_trace(y, lengths)
        for name, value in terms.latents.items():
            trace.nodes[name]["value"] = value[i, 0]
        fixed = poutine.replay(draws, trace=trace)
        loss = TraceEnum_ELBO(max_plate_nesting=2).loss(model, fixed, y, lengths)
        torch.testing.assert_close(terms.log_weight[i, 0], torch.tensor(-loss), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needed", [-18.0, -120.0, -800.0, -math.inf])
def test_a_needed_rare_transition_keeps_its_value(dtype, needed):
    """The only way through the data uses one improbable step."""
    torch.set_default_dtype(dtype)
    step = torch.tensor([[0.0, needed], [-math.inf, 0.0]])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            a = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(3)):
                a = pyro.sample(f"a_{t}", dist.Categorical(logits=step[a]), infer={"enumerate": "parallel"})
                if t == 2:
                    pyro.sample("y", dist.Delta(a.to(y.dtype)), obs=y)
            pyro.sample("w", dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([1.0, 0.0])
    z = torch.zeros(1, 2)
    terms = Evaluator(Pair.of(model, guide), y).terms({"z": z})
    rest = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(0.0, 1.0).log_prob(y)
    # Three steps offer three moments for the rare one.
    right = rest + torch.tensor([needed + math.log(3.0), 0.0])
    torch.testing.assert_close(terms.log_joint, right, rtol=1e-6, atol=1e-6)


def test_a_masked_finite_latent_keeps_its_prior():
    """Padding: steps beyond a length have no observation, and their states sum to one."""
    matrix = torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def model(y, lengths):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            x = torch.zeros((), dtype=torch.long)
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=t < lengths):
                    x = pyro.sample(f"x_{t}", dist.Categorical(matrix[x]), infer={"enumerate": "parallel"})
                    pyro.sample(f"y_{t}", dist.Normal(z + x, 1.0), obs=y[:, t])

    y, lengths = torch.randn(3, 4), torch.tensor([4, 1, 2])
    evaluator = Evaluator(Pair.of(model, lambda y, lengths: guide(y[:, 0])), (y, lengths))
    z = torch.randn(2, 3)
    right = dist.Normal(0.0, 1.0).log_prob(z)
    for n, length in enumerate(lengths):
        paths = []
        for path in itertools.product(range(2), repeat=int(length)):
            log_p = sum(matrix[a, b].log() for a, b in itertools.pairwise((0, *path)))
            paths.append(
                log_p + dist.Normal(z[:, n, None] + torch.tensor(path), 1.0).log_prob(y[n, :length]).sum(-1)
            )
        right[:, n] += torch.logsumexp(torch.stack(paths), 0)
    torch.testing.assert_close(evaluator.terms({"z": z}).log_joint, right, rtol=0, atol=1e-12)


def test_a_support_that_differs_between_enumerated_values():
    """Zeros of their own: the observation's support is masked, and has an enumerated dimension."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            none = dist.Delta(torch.zeros(()))
            pyro.sample("y", dist.MaskedMixture(y == 0, dist.Exponential((z + k).exp()), none), obs=y)

    y, z = torch.tensor([0.0, 0.8]), torch.tensor([[0.2, -0.4]])
    terms = Evaluator(Pair.of(model, guide), y).terms({"z": z})
    rates = torch.stack([z[0, 1].exp(), (z[0, 1] + 1).exp()])
    mixed = (torch.tensor([0.7, 0.3]) * rates * (-0.8 * rates).exp()).sum().log()
    right = dist.Normal(0.0, 1.0).log_prob(z) + torch.stack([torch.zeros(()), mixed])
    torch.testing.assert_close(terms.log_joint, right, rtol=0, atol=1e-12)


def test_sequential_plates():
    """A loop over the data, with a coin for each: exact for finite latents, summed beside a global mean."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(y)):
            k = pyro.sample(f"k_{i}", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{i}", dist.Normal(mean + k, 1.0), obs=y[i])

    def draws(y):
        pyro.sample("mean", dist.Normal(0.5, 1.0))

    evaluator = Evaluator(Pair.of(model, draws), Y, scope="joint")
    terms = evaluator.sample(4)
    mean = terms.latents["mean"]
    each = [math.log(p) + dist.Normal(mean + k, 1.0).log_prob(Y) for k, p in ((0, 0.7), (1, 0.3))]
    right = dist.Normal(0.0, 1.0).log_prob(mean) + torch.logaddexp(*each).sum(-1, keepdim=True)
    torch.testing.assert_close(terms.log_joint, right, rtol=0, atol=1e-12)


def test_what_cannot_be_summed_is_refused():
    def branch(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y),), 0.5)), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + 3.0 * bool((k > 0).any()), 1.0), obs=y)

    def total(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with pyro.plate("time", 3, dim=-2):
                k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + k.expand(3, len(y)).sum(-2), 1.0), obs=y)

    def scaled(y):
        with pyro.plate("data", len(y)), within_datum(3.0):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)

    def unmarked(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(z + k, 1.0), obs=y)

    for model, message in (
        (branch, "other log probabilities than the model"),
        (total, "other log probabilities|takes all values"),
        (scaled, "carries a scale within its datum and depends on latents that are summed"),
        (unmarked, '\'k\' is missing in the guide.*mark it infer={"enumerate": "parallel"}'),
    ):
        with pytest.raises(ValueError, match=message):
            evidence.elbo(Pair.of(model, guide), Y)


class Learned(Pair):
    def __init__(self):
        super().__init__()
        self.generator = nn.Linear(3, 1)
        self.encoder = nn.Linear(1, 2)

    @config_enumerate
    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            k = pyro.sample("k", dist.Categorical(WEIGHTS))
            pyro.sample("y", dist.Normal(z + self.generator.weight[0][k], 0.5), obs=y)

    def guide(self, y):
        loc, log_scale = self.encoder(y[:, None]).unbind(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def test_fit_validates_by_the_summed_bound():
    torch.manual_seed(0)
    pair = Learned()
    run = fit(
        pair,
        Y,
        valid=Y,
        objective=TraceEnum_ELBO(max_plate_nesting=1),
        epochs=2,
        batch_size=5,
        learning_rate=1e-3,
        seed=0,
    )
    found = evidence.elbo(pair, Y, 4000)
    assert abs(run.metrics[-1]["valid_elbo"] - found.mean) < 1.0, run.metrics[-1]

"""The hard ELBO and the coding inequality; consistency of the ELBO. All on populations that can be summed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO
from torch import nn

from pyroelbo import Pair, evidence, fit, fit_em
from pyroelbo.objectives import Hard_ELBO

POPULATION = torch.tensor([0.3, 0.2, 0.14, 0.1, 0.08, 0.07, 0.05, 0.03, 0.02, 0.01], dtype=torch.float64)
ENTROPY = -float((POPULATION * POPULATION.log()).sum())
EVERY = torch.arange(10)


class Codes(Pair):
    """Ten symbols, a code word z each; one more z takes what Kraft's inequality leaves over."""

    def __init__(self, lengths, words):
        super().__init__()
        taken = torch.exp2(-lengths.double())
        prior = torch.cat([taken, (1 - taken.sum()).clamp_min(0)[None]])
        self.prior = nn.Parameter(prior.log())
        says = torch.full((11, 10), -math.inf)
        says[words, EVERY] = 0.0
        says[says.amax(1) == -math.inf] = 0.0
        self.generator = nn.Parameter(says)
        self.words = words

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            pyro.sample("y", dist.Categorical(logits=self.generator[z]), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Delta(self.words[y]))


def population_loss(objective, pair):
    """E_Pop of the loss, exactly: one call a symbol."""
    losses = [objective.loss(pair.model, pair.guide, EVERY[i : i + 1]) for i in range(10)]
    return float(torch.tensor(losses) @ POPULATION)


def test_shannons_code_words_cost_less_than_a_bit_above_the_entropy():
    lengths = (-POPULATION.log2()).ceil()
    assert torch.exp2(-lengths).sum() <= 1
    with pyro.validation_enabled(False):
        loss = population_loss(Hard_ELBO(), Codes(lengths, EVERY))
        assert loss == pytest.approx(math.log(2) * float(POPULATION @ lengths), abs=1e-12)
        assert loss == pytest.approx(population_loss(Trace_ELBO(), Codes(lengths, EVERY)), abs=1e-12)
    assert ENTROPY <= loss < ENTROPY + math.log(2)


def test_without_codes_the_least_hard_loss_is_the_entropy():
    """A constant z, and a generator that is the population, has hard loss H: no code comes for free."""
    pair = Codes(torch.zeros(10), torch.zeros(10, dtype=torch.long))
    with torch.no_grad():
        pair.prior[:] = torch.cat([torch.zeros(1), torch.full((10,), -math.inf)])
        pair.generator[:] = POPULATION.log()
    with pyro.validation_enabled(False):
        assert population_loss(Hard_ELBO(), pair) == pytest.approx(ENTROPY, abs=1e-12)


class Tables(Pair):
    """Three hidden values, ten symbols; the encoder is a table by symbol, or one row for all of them."""

    def __init__(self, rows=10, enumerate=None):
        super().__init__()
        self.infer = {} if enumerate is None else {"enumerate": enumerate}
        self.generator = nn.Module()
        self.generator.register_parameter("prior", nn.Parameter(torch.randn(3)))
        self.generator.register_parameter("says", nn.Parameter(torch.randn(3, 10)))
        self.encoder = nn.Parameter(torch.randn(rows, 3))

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.generator.prior))
            pyro.sample("y", dist.Categorical(logits=self.generator.says[z]), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            q = dist.Categorical(logits=self.encoder[y % len(self.encoder)])
            pyro.sample("z", q, infer=dict(self.infer))


def sample_of_population():
    return EVERY.repeat_interleave((POPULATION * 100).round().long())


def test_the_hard_loss_is_the_elbos_plus_the_encoders_entropy():
    pair, y = Tables(), sample_of_population()
    q = pair.encoder.softmax(1)
    joint = pair.generator.prior.log_softmax(0) + pair.generator.says.log_softmax(1).T
    hard = -(q * joint).sum(1) @ POPULATION
    draws = torch.tensor([Hard_ELBO().loss(pair.model, pair.guide, y) / 100 for _ in range(100)])
    assert abs(float(draws.mean() - hard.detach())) < 6 * float(draws.std()) / 10
    with torch.no_grad():
        elbo = -evidence.elbo(pair, EVERY, particles=2000).value @ POPULATION
        entropy = -(q * q.log()).sum(1) @ POPULATION
    assert float(elbo + entropy - hard.detach()) == pytest.approx(0, abs=0.05)
    exact = torch.autograd.grad(hard, pair.encoder)[0]
    noisy = torch.stack(
        [
            torch.autograd.grad(
                Hard_ELBO().differentiable_loss(pair.model, pair.guide, y) / 100, pair.encoder
            )[0]
            for _ in range(200)
        ]
    )
    # t with 199 degrees of freedom, 30 entries: false alarms below 4e-6
    assert ((noisy.mean(0) - exact).abs() < 5.5 * noisy.std(0) / 200**0.5 + 1e-12).all()


def test_the_hard_loss_trains():
    y = sample_of_population()
    pair = Tables()
    fit(
        pair, y, objective="hard", epochs=120, batch_size=100, learning_rate=0.05, particles=4, progress=False
    )
    loss = (
        SVI(pair.model, pair.guide, pyro.optim.Adam({}), Hard_ELBO(num_particles=50)).evaluate_loss(y) / 100
    )
    assert ENTROPY - 1e-6 < loss < 2.2
    assert -evidence.exact(pair, y).mean <= loss + 1e-6
    hard = Tables()
    run = fit_em(hard, y, hard=True, epochs=30, progress=False)
    assert ENTROPY - 1e-9 <= run.losses[-1] <= run.losses[0]


@pytest.mark.parametrize("rows", [10, 1])
def test_the_least_elbo_loss_over_guides_is_the_cross_entropy(rows):
    """Reached by a family with the posterior in it; a family of one q for all y pays min_q E KL(q,
    posterior).
    """
    torch.manual_seed(1)
    pair, y = Tables(rows, "parallel"), sample_of_population()
    value = evidence.exact(pair, EVERY).value
    cross_entropy = -float(value @ POPULATION)
    with torch.no_grad():
        joint = pair.generator.prior.log_softmax(0) + pair.generator.says.log_softmax(1).T
        posterior = joint.log_softmax(1)
        # The best single q is the normalized geometric mean of the posteriors.
        excess = 0.0 if rows == 10 else -float((POPULATION @ posterior).logsumexp(0))
    objective = TraceEnum_ELBO(max_plate_nesting=1)
    optimizer = torch.optim.LBFGS([pair.encoder], max_iter=60, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = objective.differentiable_loss(pair.model, pair.guide, y) / len(y)
        value.backward()
        return value.detach()

    optimizer.step(loss)
    assert float(loss()) == pytest.approx(cross_entropy + excess, abs=1e-6)
    assert rows == 10 or excess > 0.05

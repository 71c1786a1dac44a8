"""Gradient estimators for discrete latents against the gradient of the enumerated bound."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from pyroelbo import Pair, evidence, fit
from pyroelbo.compiled import CompiledELBO
from pyroelbo.objectives import ESTIMATORS, Discrete_ELBO

FORMS = {
    "bernoulli": lambda logits: dist.Bernoulli(logits=logits).to_event(1),
    "categorical": lambda logits: dist.Categorical(logits=logits.unflatten(-1, (2, 3))).to_event(1),
    "one_hot": lambda logits: dist.OneHotCategorical(logits=logits.unflatten(-1, (2, 3))).to_event(1),
    "value": lambda logits: dist.Categorical(logits=logits),
}


LOGITS = {"bernoulli": 3, "categorical": 6, "one_hot": 6, "value": 6}


def values(form):
    """Every value of a site."""
    if form == "bernoulli":
        return [torch.tensor(v, dtype=torch.double) for v in itertools.product((0, 1), repeat=3)]
    if form == "value":
        return [torch.tensor(v) for v in range(6)]
    pairs = [torch.tensor(v) for v in itertools.product(range(3), repeat=2)]
    return [nn.functional.one_hot(v, 3).double() for v in pairs] if form == "one_hot" else pairs


class Stacked(Pair):
    """Two layers of discrete latents of any form, generated from the top and encoded from the bottom."""

    def __init__(self, forms=("bernoulli", "bernoulli"), full_size=None):
        super().__init__()
        self.forms, self.full_size = forms, full_size
        self.sizes = [{"bernoulli": 3, "categorical": 2, "one_hot": 6, "value": 1}[f] for f in forms]
        below, top = (LOGITS[f] for f in forms)
        self.prior = nn.Parameter(torch.randn(top))
        self.generator = nn.ModuleList([nn.Linear(self.sizes[1], below), nn.Linear(self.sizes[0], 3)])
        self.encoder = nn.ModuleList([nn.Linear(3, below), nn.Linear(self.sizes[0], top)])
        self.predictor = nn.Linear(3, 1)

    def number(self, z, layer):
        event = {"value": 0, "bernoulli": 1, "categorical": 1, "one_hot": 2}[self.forms[layer]]
        return z.reshape(*z.shape[: z.dim() - event], self.sizes[layer]).double()

    def plate(self, y):
        size = len(y) if self.full_size is None else self.full_size
        return pyro.plate("data", size, subsample=torch.arange(len(y)))

    def model(self, y):
        with self.plate(y):
            z2 = pyro.sample("z2", FORMS[self.forms[1]](self.prior))
            z1 = pyro.sample("z1", FORMS[self.forms[0]](self.generator[0](self.number(z2, 1))))
            loc = self.generator[1](2 * self.number(z1, 0))
            pyro.sample("y", dist.Normal(loc, 1.2).to_event(1), obs=y)

    def guide(self, y):
        with self.plate(y):
            z1 = pyro.sample("z1", FORMS[self.forms[0]](self.encoder[0](y)))
            pyro.sample("z2", FORMS[self.forms[1]](self.encoder[1](self.number(z1, 0))))

    def baseline(self, y):
        return self.predictor(y)[..., 0]

    def log_weights(self, y):
        """ln q and ln w of every pair of values, [V, B], by the programs themselves."""
        rows = []
        for z1, z2 in itertools.product(values(self.forms[0]), values(self.forms[1])):
            given = {k: v.expand(len(y), *v.shape) for k, v in (("z1", z1), ("z2", z2))}
            found = []
            for program in (self.guide, self.model):
                trace = pyro.poutine.trace(pyro.condition(program, given)).get_trace(y)
                trace.compute_log_prob()
                sites = [s for k, s in trace.nodes.items() if s["type"] == "sample" and k != "data"]
                found.append(sum(s["unscaled_log_prob"] for s in sites))
            rows.append((found[0], found[1] - found[0]))
        return [torch.stack(part) for part in zip(*rows, strict=True)]


def make(forms, seed=1):
    torch.manual_seed(seed)
    return Stacked(forms), torch.randn(1, 3)


def parameters(pair):
    return [p for n, p in pair.named_parameters() if "predictor" not in n]


def gradient(pair, loss):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters(pair))])


def check_unbiased(pair, y, exact, objective, batches=40, copies=500):
    """A t-test of each entry of the gradient, corrected for their number: false alarms in 1e-4 of runs."""
    many = y.expand(copies, -1)
    found = torch.stack(
        [
            gradient(pair, objective.differentiable_loss(pair.model, pair.guide, many)) / copies
            for _ in range(batches)
        ]
    )
    error = found.std(0) / math.sqrt(batches)
    steady = error < 1e-12
    torch.testing.assert_close(found[0, steady], exact[steady], rtol=1e-9, atol=1e-9)
    z = ((found.mean(0) - exact) / error)[~steady]
    # Student's t with 39 degrees of freedom at 1e-4 / 80 entries, two-sided
    assert z.numel() == 0 or z.abs().max() < 5.7
    assert (error[~steady] < 0.2).all()  # what the test could see


UNBIASED = [
    ("score_function", 1, "bernoulli", "bernoulli"),
    ("baseline", 1, "bernoulli", "categorical"),
    ("rloo", 3, "one_hot", "value"),
    ("double_cv", 3, "bernoulli", "one_hot"),
    ("disarm", 2, "bernoulli", "bernoulli"),
    ("disarm", 4, "bernoulli", "bernoulli"),
    ("coupled", 2, "categorical", "one_hot"),
    ("coupled", 4, "value", "bernoulli"),
    ("enumerate", 1, "value", "value"),
    ({"z1": "rloo", "z2": "enumerate"}, 2, "bernoulli", "value"),
    ({"z1": "enumerate", "z2": "rloo"}, 2, "value", "categorical"),
    ({"z1": "disarm", "z2": "enumerate"}, 2, "bernoulli", "value"),
    ({"z1": "enumerate", "z2": "coupled"}, 2, "value", "categorical"),
]


@pytest.mark.parametrize("estimator, particles, first, second", UNBIASED)
def test_the_gradient_is_that_of_the_enumerated_bound(estimator, particles, first, second):
    pair, y = make((first, second))
    log_q, log_w = pair.log_weights(y)
    elbo = (log_q.exp() * log_w).sum()
    exact = gradient(pair, -elbo)
    objective = Discrete_ELBO(estimator, particles)
    check_unbiased(pair, y, exact, objective)
    many = y.expand(20000, -1)
    with torch.no_grad():
        value = -objective.differentiable_loss(pair.model, pair.guide, many) / len(many)
        spread = (log_q.exp() * (log_w - elbo) ** 2).sum().sqrt() / math.sqrt(len(many))
    assert abs(value - elbo) < 5.5 * spread + 1e-9


def test_enumeration_has_no_noise():
    pair, y = make(("value", "value"))
    log_q, log_w = pair.log_weights(y)
    loss = Discrete_ELBO("enumerate", 1).differentiable_loss(pair.model, pair.guide, y)
    torch.testing.assert_close(loss, -(log_q.exp() * log_w).sum())


def test_vimcos_gradient_is_that_of_the_importance_weighted_bound():
    pair, y = make(("value", "value"))
    log_q, log_w = pair.log_weights(y)
    log_q, log_w = log_q[:, 0], log_w[:, 0]
    pairs = torch.logaddexp(log_w[:, None], log_w) - math.log(2)
    exact = gradient(pair, -((log_q[:, None] + log_q).exp() * pairs).sum())
    check_unbiased(pair, y, exact, Discrete_ELBO("vimco", 2))


@pytest.mark.parametrize("estimator", ["rloo", "double_cv", "disarm", "baseline", "vimco"])
def test_a_subsampled_plate_multiplies_the_loss(estimator):
    pair, y = make(("bernoulli", "bernoulli"))
    losses = []
    for size in (None, 12):
        pair.full_size = size
        torch.manual_seed(3)
        objective = Discrete_ELBO(estimator, 2)
        loss = objective.differentiable_loss(pair.model, pair.guide, y.expand(3, -1))
        losses.append(torch.cat([gradient(pair, loss), loss.detach()[None]]))
    torch.testing.assert_close(losses[1], 4 * losses[0])


def test_variance_against_the_score_function():
    """One of eight units of a belief net: leave-one-out has a tenth of the score function's variance."""
    torch.manual_seed(4)
    pair = BeliefNet(8, 20)
    y = torch.bernoulli(torch.full((1, 20), 0.5))
    variance = {}
    for name in ("score_function", "rloo", "disarm", "double_cv", "coupled"):
        objective = Discrete_ELBO(name, 2)
        draws = torch.stack([pair.slope(objective, y) for _ in range(150)])
        variance[name] = float(draws.var(0).sum())
    assert variance["rloo"] < variance["score_function"] / 10
    assert variance["disarm"] < variance["score_function"] / 10 and variance["double_cv"] < variance["rloo"]
    assert variance["coupled"] == pytest.approx(variance["disarm"], rel=0.5)


class BeliefNet(Pair):
    """z of Bernoullis, y of Bernoullis given a linear map of z, a free guide."""

    def __init__(self, latent, dims):
        super().__init__()
        self.latent = latent
        self.generator = nn.Linear(latent, dims)
        nn.init.normal_(self.generator.weight)
        self.encoder = nn.Parameter(torch.randn(latent))

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(self.latent)).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=self.generator(z)).to_event(1), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder).to_event(1))

    def slope(self, objective, y):
        return torch.autograd.grad(objective.differentiable_loss(self.model, self.guide, y), self.encoder)[0]


def test_relaxed_draws_are_biased_and_judged_by_the_hard_guide():
    pair, y = make(("bernoulli", "one_hot"))
    for name in ("gumbel", "straight_through"):
        objective = Discrete_ELBO(name, 1, temperature=0.3)
        slope = gradient(pair, objective.differentiable_loss(pair.model, pair.guide, y))
        assert slope.isfinite().all() and slope.abs().max() > 0
        assert objective.validate(pair, y).method == "elbo"
    torch.manual_seed(0)
    hard = Discrete_ELBO("straight_through", 1).differentiable_loss(
        pair.model, pair.guide, y.expand(4000, -1)
    )
    log_q, log_w = pair.log_weights(y)
    elbo = (log_q.exp() * log_w).sum()
    spread = (log_q.exp() * (log_w - elbo) ** 2).sum().sqrt() / math.sqrt(4000)
    assert abs(hard.detach() / 4000 + elbo) < 5.5 * spread  # its draws are hard, so its value is the bound's


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"enumerate"}))
def test_every_estimator_trains_eager_and_compiled(name):
    losses = {}
    for compiled in (False, True):
        pyro.clear_param_store()
        pair, _ = make(("bernoulli", "bernoulli"))
        y = torch.randn(8, 3)
        objective = Discrete_ELBO(name, 2)
        loss = CompiledELBO(objective, backend="eager") if compiled else objective
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), loss)
        pyro.set_rng_seed(0)
        losses[compiled] = [svi.step(y) for _ in range(5)]
        if compiled:
            assert loss.counters.compiled_calls and not loss.counters.fallbacks, loss.counters
    assert losses[True] == pytest.approx(losses[False])


def test_fit_takes_the_estimators_by_name():
    pair, _ = make(("bernoulli", "bernoulli"))
    y = torch.randn(64, 3)
    before = evidence.elbo(pair, y, particles=32).value.mean()
    run = fit(
        pair, y, objective="disarm", particles=4, epochs=60, batch_size=64, learning_rate=0.02, progress=False
    )
    assert run.metrics and evidence.elbo(pair, y, particles=32).value.mean() > before + 0.5


@pytest.mark.parametrize(
    "forms, estimator, particles, message",
    [
        (
            ("categorical", "value"),
            "disarm",
            2,
            "'z1': expected a Bernoulli without a mask",
        ),
        (("bernoulli", "value"), "enumerate", 1, "'z1': expected one value of a finite set per datum"),
        (("value", "value"), {"z1": "rloo"}, 2, "expected a name for guide site 'z2', a Categorical"),
        (("value", "value"), {"z1": "rloo", "z3": "rloo"}, 2, "expected sites of the guide, .* got 'z3'"),
    ],
)
def test_sites_that_an_estimator_does_not_take(forms, estimator, particles, message):
    pair, y = make(forms)
    with pytest.raises(ValueError, match=message):
        Discrete_ELBO(estimator, particles).differentiable_loss(pair.model, pair.guide, y)


@pytest.mark.parametrize(
    "estimator, particles, message",
    [
        ("reinforce", 2, "expected one of score_function, baseline"),
        ("rloo", 1, "expected at least 2 for estimator 'rloo', got 1"),
        ("disarm", 3, "expected an even number"),
        ({"a": "vimco", "b": "rloo"}, 2, "expected 'vimco' for every site or for none"),
        ({"a": "disarm", "b": "rloo"}, 2, "expected pairs"),
        ({"a": "score_function", "b": "rloo"}, 2, "one kind of baseline"),
    ],
)
def test_settings_that_make_no_estimator(estimator, particles, message):
    with pytest.raises(ValueError, match=message):
        Discrete_ELBO(estimator, particles)


def test_a_pair_without_a_baseline_is_told_to_define_one():
    with pytest.raises(ValueError, match=r"expected baseline\(self, \*batch\)"):
        Discrete_ELBO("baseline", 1).check(BeliefNet(2, 3), torch.zeros(2, 3))


def test_relaxed_vectors_are_counted_coordinate_by_coordinate():
    """Hard draws, so that the straight-through loss is the ELBO's in the mean."""
    torch.manual_seed(0)
    pair, y = BeliefNet(3, 5), torch.bernoulli(torch.full((1, 5), 0.5)).expand(4000, -1)
    loss = Discrete_ELBO("straight_through", 1).differentiable_loss(pair.model, pair.guide, y).detach() / 4000
    elbo = evidence.elbo(pair, y, particles=2)
    assert abs(float(loss + elbo.value.mean())) < 5.5 * float(elbo.value.std()) * math.sqrt(3 / 4000)

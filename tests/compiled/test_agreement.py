"""Compiled losses give the numbers of eager losses."""

import random
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn

from pyroelbo.compiled import CompiledELBO
from tests.compiled.cases import SGD, VAE, agree, baseline_pair, data, mixture, vae


def generated(seed):
    """A static pair: a random chain of latent sites under random plates, masks, scales and distributions."""
    rng = random.Random(seed)
    sizes = [rng.randint(2, 4) for _ in range(rng.randint(1, 2))]
    depth = rng.randint(1, 4)
    sites = []
    for k in range(depth):
        kind = rng.choice(
            ["normal", "gamma", "beta", "lognormal", "dirichlet", "bernoulli", "categorical", "poisson"]
        )
        sites.append((f"z{k}", kind, rng.random() < 0.3, rng.choice([1.0, 1.0, 0.5, 2.0])))
    likelihood = rng.choice(["normal", "poisson", "bernoulli"])
    keep = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < 0.7

    def prior(kind, x):
        x = x.tanh()
        return {
            "normal": lambda: dist.Normal(x, 1.0),
            "gamma": lambda: dist.Gamma(2.0 + x, 1.0 + x.exp()),
            "beta": lambda: dist.Beta(2.0 + x, 1.5 - x),
            "lognormal": lambda: dist.LogNormal(x, 0.7),
            "dirichlet": lambda: dist.Dirichlet(torch.stack([1.5 + x, 1.5 - x, 1.0 + x * x], -1)),
            "bernoulli": lambda: dist.Bernoulli(logits=x),
            "categorical": lambda: dist.Categorical(logits=torch.stack([x, -x, x * 0], -1)),
            "poisson": lambda: dist.Poisson(x.exp()),
        }[kind]()

    def posterior(name, kind):
        def p(suffix, value, constraint=constraints.real):
            return pyro.param(f"{name}_{suffix}", lambda: torch.full(sizes, value), constraint=constraint)

        if kind in ("normal", "lognormal"):
            family = dist.Normal if kind == "normal" else dist.LogNormal
            return family(p("loc", 0.1), p("scale", 0.6, constraints.positive))
        if kind in ("gamma", "beta"):
            family = dist.Gamma if kind == "gamma" else dist.Beta
            return family(p("a", 1.7, constraints.positive), p("b", 1.9, constraints.positive))
        if kind == "dirichlet":
            a = [p(s, v, constraints.positive) for s, v in (("a", 1.5), ("b", 2.0), ("c", 1.2))]
            return dist.Dirichlet(torch.stack(a, -1))
        if kind == "bernoulli":
            return dist.Bernoulli(logits=p("logit", 0.2))
        if kind == "categorical":
            return dist.Categorical(
                logits=torch.stack([p(s, v) for s, v in (("a", 0.1), ("b", -0.3), ("c", 0.2))], -1)
            )
        return dist.Poisson(p("rate", 1.3, constraints.positive))

    def plates():
        return [pyro.plate(f"plate{i}", n, dim=i - len(sizes)) for i, n in enumerate(sizes)]

    def walk(chain, guide):
        stack = plates()
        for plate in stack:
            plate.__enter__()
        try:
            x = torch.zeros(sizes)
            for name, kind, masked, scale in sites:
                fn = posterior(name, kind) if guide else prior(kind, x)
                with pyro.poutine.mask(mask=keep if masked else True), pyro.poutine.scale(scale=scale):
                    z = pyro.sample(name, fn)
                x = z[..., 0] if kind == "dirichlet" else z.to(x.dtype)
            return x if guide else chain(x)
        finally:
            for plate in reversed(stack):
                plate.__exit__(None, None, None)

    def guide(y):
        walk(None, True)

    def model(y):
        weight = pyro.param("weight", torch.tensor(0.3))

        def observe(x):
            fn = {
                "normal": lambda: dist.Normal(weight * x, 1.0),
                "poisson": lambda: dist.Poisson((weight * x).tanh().exp()),
                "bernoulli": lambda: dist.Bernoulli(logits=weight * x.tanh()),
            }[likelihood]()
            pyro.sample("y", fn, obs=y)

        walk(observe, False)

    y = (torch.rand(sizes, generator=torch.Generator().manual_seed(seed + 1)) < 0.5).to(
        torch.get_default_dtype()
    )
    return model, guide, y, [kind for _, kind, _, _ in sites]


@pytest.mark.parametrize("seed", range(20))
def test_generated_pairs(seed):
    make_loss = [Trace_ELBO, TraceGraph_ELBO, lambda: Trace_ELBO(num_particles=2, vectorize_particles=True)][
        seed % 3
    ]
    if make_loss is not TraceGraph_ELBO and seed % 2:
        make_loss = lambda: Trace_ELBO(num_particles=2)  # noqa: E731

    def make():
        model, guide, _, _ = generated(seed)
        return model, guide, None

    y = generated(seed)[2]
    agree(make_loss, make, [(y,)] * 4, tolerance=1e-10)


def test_generated_pairs_cover_the_distributions():
    kinds = {kind for seed in range(20) for kind in generated(seed)[3]}
    assert kinds == {
        "normal",
        "gamma",
        "beta",
        "lognormal",
        "dirichlet",
        "bernoulli",
        "categorical",
        "poisson",
    }


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 20))])
def test_generated_pairs_float32_inductor(seed):
    torch.set_default_dtype(torch.float32)

    def make():
        model, guide, _, _ = generated(seed)
        return model, guide, None

    y = generated(seed)[2]
    loss = agree(Trace_ELBO, make, [(y,)] * 4, backend="inductor", optimizer=SGD, tolerance=2e-6)
    assert loss.counters.compiles == 1
    assert loss.counters.compile_time > 0
    assert "builds" in str(loss.counters)


def test_batchnorm_statistics_and_dropout():
    agree(Trace_ELBO, vae(norm=True, dropout=0.4), [(data(8, 6, seed=i),) for i in range(5)])


@pytest.mark.slow
def test_batchnorm_and_dropout_inductor():
    loss = agree(
        Trace_ELBO, vae(norm=True, dropout=0.4), [(data(8, 6, seed=i),) for i in range(4)], backend="inductor"
    )
    assert loss.counters.compiles == 1


def test_draws_are_fresh():
    module = VAE(dropout=0.5)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    y = data(8, 6)
    values = [loss.loss_and_grads(module.model, module.guide, y) for _ in range(5)]
    assert len(set(values)) == 5
    assert loss.counters.compiled_calls == 4


def test_subsampled_plates_draw_new_indices():
    y = data(50)

    def model(y):
        loc = pyro.param("loc", torch.tensor(0.1))
        with pyro.plate("data", 50, subsample_size=5) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    agree(Trace_ELBO, lambda: (model, lambda y: None, None), [(y,)] * 6)


def sequential(y, order):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", 4, subsample=order):
        pyro.sample(f"y{i}", dist.Normal(z, 1.0 + i), obs=y[i])


def sequential_guide(y, order):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


def test_sequential_plates():
    agree(
        Trace_ELBO, lambda: (sequential, sequential_guide, None), [(data(4, seed=i), None) for i in range(4)]
    )


def test_indices_that_python_code_reads_are_guards():
    loss, y = CompiledELBO(Trace_ELBO(), backend="eager"), data(4)
    orders = [torch.tensor([2, 0, 3, 1]), torch.tensor([1, 0, 2, 3])]
    for i in range(8):
        pyro.set_rng_seed(i)
        value = loss.loss_and_grads(sequential, sequential_guide, y, orders[i % 3 // 2])
        pyro.set_rng_seed(i)
        expected = Trace_ELBO().loss_and_grads(sequential, sequential_guide, y, orders[i % 3 // 2])
        assert value == pytest.approx(expected, rel=1e-12)
    assert (loss.counters.captures, loss.counters.compiled_calls) == (2, 6)


def test_mean_field_and_vectorized_particles():
    batches = [(data(8, 6, seed=i),) for i in range(4)]
    agree(TraceMeanField_ELBO, vae(), batches)
    agree(lambda: Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1), vae(), batches)


@pytest.mark.parametrize("kind", ["none", "average", "network"])
def test_score_function_and_baselines(kind):
    def make():
        return baseline_pair(kind)

    agree(TraceGraph_ELBO, make, [(data(4, seed=i),) for i in range(6)])


def enumerated_guide(y):
    logits = pyro.param("logits", 0.1 * torch.arange(20.0).reshape(10, 2))
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Categorical(logits=logits))


@pytest.mark.parametrize("where", ["model", "guide", "sequential"])
def test_enumeration(where):
    guide = {
        "model": lambda y: None,
        "guide": config_enumerate(enumerated_guide, "parallel"),
        "sequential": None,
    }[where]
    if where == "sequential":

        def model(y):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
            loc = pyro.param("mixture_loc", torch.tensor([-1.0, 1.0]))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)

        def guide(y):
            logits = pyro.param("logits", torch.tensor([0.2, -0.1]))
            pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "sequential"})
    else:
        model = mixture
    agree(
        lambda: TraceEnum_ELBO(max_plate_nesting=1),
        lambda: (model, guide, None),
        [(data(10, seed=i),) for i in range(5)],
    )


@pytest.mark.parametrize("family", [AutoNormal, AutoLowRankMultivariateNormal])
def test_autoguides_are_materialized(family):
    x = data(20, 3)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, s), obs=y)

    agree(Trace_ELBO, lambda: (model, family(model), None), [(x, data(20, seed=i)) for i in range(5)])


def cholesky_prior(x):
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.5))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale[:, None] * factor), obs=x)


class Weights(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 2)
        with pyro.validation_enabled():  # its prior checks its values for ever after
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 3]).to_event(2))

    def forward(self, x):
        loc = self.linear(x).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=x[:, 0])


@pytest.mark.parametrize("make_model", [lambda: cholesky_prior, Weights], ids=["LKJ", "PyroSample"])
def test_masks_and_checks_inside_torch_do_not_stop_a_capture(make_model):
    def make():
        model = make_model()
        return model, AutoNormal(model), None

    agree(Trace_ELBO, make, [(data(12, 3, seed=i),) for i in range(4)])


def test_costly_functions_of_expanded_parameters_run_once_for_each_parameter():
    def counts(y):
        shape = pyro.param("shape", torch.tensor([[0.5, 2.0, 3.0]]).T, constraint=constraints.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.GammaPoisson(shape.T.squeeze(0), 1.5).to_event(1), obs=y)

    def nothing(y):
        pass

    batches = [(data(8, 3, seed=i).abs().mul(3).floor(),) for i in range(4)]
    loss = agree(Trace_ELBO, lambda: (counts, nothing, None), batches)
    (graph,) = next(iter(loss._cache.graphs.values()))
    aten = torch.ops.aten
    for function in (aten.lgamma.default, aten.digamma.default):
        found = graph.plan.graph.graph.find_nodes(op="call_function", target=function)
        assert len(found) >= 2
        assert all(node.args[0].target is not aten.expand.default for node in found)


def test_autocast_is_part_of_the_graph():
    torch.set_default_dtype(torch.float32)
    module, y = VAE(), data(8, 6)
    plain = CompiledELBO(Trace_ELBO(), backend="eager")
    for cast in (False, True, False, True, True):
        pyro.set_rng_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            expected = Trace_ELBO().loss_and_grads(module.model, module.guide, y)
        pyro.set_rng_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            assert plain.loss_and_grads(module.model, module.guide, y) == pytest.approx(expected, rel=1e-6)
    assert (plain.counters.captures, plain.counters.compiled_calls) == (2, 3)


def test_no_warning_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agree(Trace_ELBO, vae(), [(data(4, 6),)] * 3)

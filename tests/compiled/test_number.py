"""Python floats that change from call to call are inputs of the graph, and promote as Python numbers do."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyroelbo.compiled import CompiledELBO
from tests.compiled.cases import VAE, data, follow, nothing


def guide(y, beta=1.0):
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), scale))


def annealed(use):
    def model(y, beta):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            use(y, z, beta)

    return model


def observe(y, loc, scale=1.0):
    pyro.sample("y", dist.Normal(loc, scale), obs=y)


USES = {
    "scale": lambda y, z, b: pyro.poutine.scale(observe, b)(y, z),
    "location": lambda y, z, b: observe(y, b * z + (1 - b)),
    "standard deviation": lambda y, z, b: observe(y, z, b),
    "both parameters": lambda y, z, b: pyro.sample("y", dist.Normal(b, 2.0 * b), obs=y),
    "power": lambda y, z, b: observe(y, z * b**2 + 2.0**b + z.abs() ** b),
    "tensor": lambda y, z, b: observe(y, z * torch.tensor([b, 1.0])[0] + torch.full((len(y),), b)),
    "integer tensor": lambda y, z, b: observe(y, z + torch.arange(len(y)) * b),
    "expand": lambda y, z, b: observe(y, z + torch.zeros(()).new_full((len(y),), b) - torch.ones(1).fill_(b)),
    "minus": lambda y, z, b: observe(y, -b + z / b - abs(b)),
    "other way round": lambda y, z, b: observe(y, (1 / b - b / 3) * z),
    "clamp": lambda y, z, b: observe(y, torch.clamp(z, max=b)),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float_argument_is_an_input(name, dtype):
    torch.set_default_dtype(dtype)
    calls = [(data(5), 0.5 + 0.03 * i) for i in range(12)]
    loss = follow(annealed(USES[name]), guide, calls, rel=1e-10 if dtype is torch.float64 else 1e-6)
    assert (loss.counters.captures, loss.counters.compiled_calls, loss.counters.fallbacks) == (1, 11, 0)


def test_a_float_that_stays_is_a_constant():
    loss = follow(annealed(USES["scale"]), guide, [(data(5), 0.5)] * 4)
    assert not next(iter(loss._cache.graphs.values()))[0].plan.lifted
    loss = follow(
        annealed(USES["scale"]), guide, [(data(5), 0.5)] * 3 + [(data(5), 0.5 + i) for i in range(1, 9)]
    )
    assert loss.counters.captures == 2


@pytest.mark.parametrize(
    "use",
    [
        lambda y, z, b: observe(y, z * (2.0 if b > 0.7 else 3.0) * b),
        lambda y, z, b: observe(y, z * min(b, 0.7)),
        lambda y, z, b: pyro.poutine.scale(observe, max(0.6, b))(y, z),
    ],
)
def test_branches_on_a_float_are_guards(use):
    loss = follow(annealed(use), guide, [(data(5), 0.5 + 0.03 * i) for i in range(16)])
    assert loss.counters.captures == 2
    assert loss.counters.compiled_calls == 14


@pytest.mark.parametrize(
    "use", [math.exp, lambda b: round(b, 1), lambda b: float(f"{b:.1f}"), lambda b: b // 0.1]
)
def test_a_value_that_leaves_the_graph_is_a_constant(use):
    calls = [(data(5), [0.5, 0.6][i // 6]) for i in range(12)]
    loss = follow(annealed(lambda y, z, b: observe(y, z * use(b))), guide, calls)
    assert loss.counters.compiled_calls >= 9
    assert loss.counters.fallbacks == 0


def test_warm_up_of_the_kl_weight_by_an_attribute():
    """Weights that change for a while and then stay: at most two graphs, and the last one stays compiled."""
    module, y = VAE(), data(8, 6)

    def before(i):
        module.beta = min(1.0, (i // 5 + 1) / 10)

    loss = follow(module.model, module.guide, [(y,)] * 80, before=before)
    assert loss.counters.fallbacks == 0
    assert loss.counters.captures <= 3
    assert loss.counters.compiled_calls >= 76


def test_warm_up_by_a_closure_and_by_a_global():
    weight = 0.1

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), pyro.poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal(GLOBAL["shift"] * z, 1.0), obs=y)

    def before(i):
        nonlocal weight
        weight = 0.1 * (i + 1)
        GLOBAL["shift"] = 1.0 / (i + 1)

    loss = follow(model, guide, [(data(5),)] * 12, before=before)
    assert (loss.counters.fallbacks, loss.counters.captures) == (0, 1)


GLOBAL = {"shift": 1.0}


def test_float32_losses_stay_float32():
    torch.set_default_dtype(torch.float32)
    loss = CompiledELBO(TraceMeanField_ELBO(), backend="eager")
    model = annealed(USES["scale"])
    for i in range(4):
        value = loss.differentiable_loss(model, guide, data(5), 0.1 * (i + 1))
        assert value.dtype == torch.float32
    assert loss.counters.compiled_calls == 3


def test_integers_in_steps_give_way_to_the_last():
    """More values than graphs, each for a while: stale graphs are dropped, and the final value compiles."""
    module, y = VAE(), data(8, 6)

    def before(i):
        module.beta = 1 + min(i // 4, 12)

    loss = CompiledELBO(Trace_ELBO(), backend="eager", max_graphs=4)
    for i in range(160):
        before(i)
        pyro.set_rng_seed(i)
        value = loss.loss_and_grads(module.model, module.guide, y)
        pyro.set_rng_seed(i)
        assert value == pytest.approx(Trace_ELBO().loss_and_grads(module.model, module.guide, y), rel=1e-10)
    assert loss.counters.fallbacks == 0
    assert sum(map(len, loss._cache.graphs.values())) <= 4
    assert loss.counters.compiled_calls > 80


def test_memory_of_pending_structures_is_bounded():
    loss = CompiledELBO(Trace_ELBO(), backend="eager", max_graphs=2)
    for n in range(2, 40):
        loss.loss_and_grads(annealed(USES["scale"]), nothing if n < 0 else guide, data(n), 0.1)
    assert len(loss._cache._pending) <= 4

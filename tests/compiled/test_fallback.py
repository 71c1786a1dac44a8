"""What cannot be a graph stays eager, with a reason."""

import ctypes
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyroelbo.compiled import CompiledELBO, CompileWarning, FusedOptim
from tests.compiled.cases import SGD, VAE, data, normal_guide, von_mises, von_mises_guide


def test_a_model_that_counts_its_calls_falls_back():
    module, y = VAE(), data(8, 6)

    def model(y):
        module.beta = 0.9 * module.beta
        return module.model(y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match="beta"):
        for _ in range(25):
            loss.loss_and_grads(model, module.guide, y)
    assert loss.counters.compiled_calls == 0


def branching(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z if z > 0 else -2 * z, 1.0), obs=y)


def selecting(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z[z > 0].sum(), 1.0), obs=y)


def normal_guide_5(y):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(5)), 1.0).to_event(1))


@pytest.mark.parametrize(
    "model, guide, names",
    [
        (von_mises, von_mises_guide, "angle.*"),
        (branching, normal_guide, "value of a tensor.*random draw, test_fallback.py:.*'z'"),
        (selecting, normal_guide_5, "shape of index"),
    ],
)
def test_what_depends_on_data_falls_back_with_one_warning(model, guide, names):
    svi = SVI(model, guide, FusedOptim(*SGD), loss := CompiledELBO(Trace_ELBO(), backend="eager"))
    with pytest.warns(CompileWarning, match=names) as caught:
        losses = [svi.step(torch.tensor(0.5)) for _ in range(5)]
    assert len(caught) == 1
    assert (loss.counters.eager_calls, loss.counters.compiled_calls, loss.counters.fallbacks) == (5, 0, 1)
    assert len(set(losses)) == 5


def test_numbers_from_outside_torch_are_caught():
    rng = random.Random(0)

    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * rng.random(), 1.0), obs=y)

    def guide(y):
        pass

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match="private random.Random"):
        for _ in range(4):
            loss.loss_and_grads(model, guide, torch.tensor(0.5))
    assert loss.counters.compiled_calls == 0


def test_a_change_that_no_guard_sees_is_caught_by_a_later_comparison():
    hidden = ctypes.c_double(1.0)

    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * hidden.value, 1.0), obs=y)

    def guide(y):
        pass

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    y = torch.tensor(0.5)
    for _ in range(5):
        loss.loss_and_grads(model, guide, y)
    hidden.value = 3.0
    with pytest.warns(CompileWarning, match="no longer does"):
        for _ in range(12):
            value = loss.loss_and_grads(model, guide, y)
    assert value == Trace_ELBO().loss(model, guide, y)

"""A graph runs only while everything that it was captured with is unchanged."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyroelbo.compiled import CompiledELBO, CompileWarning, FusedOptim
from pyroelbo.compiled.environment import Environment
from tests.compiled.cases import ADAM, VAE, agree, data, regression, vae


def test_train_and_eval_are_two_graphs():
    def before(i, module):
        module.train(i % 4 < 2)

    loss = agree(
        Trace_ELBO,
        vae(norm=True, dropout=0.4),
        [(data(8, 6, seed=i),) for i in range(10)],
        before=before,
        compiled=8,
    )
    assert loss.counters.captures == 2


def test_a_python_number_that_changes_is_seen():
    def before(i, module):
        module.beta = 1.0 if i < 3 else 0.25

    loss = agree(Trace_ELBO, vae(), [(data(8, 6, seed=i),) for i in range(7)], before=before, compiled=5)
    assert loss.counters.captures == 2


def test_a_float_that_always_changes_is_an_input():
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for i in range(30):
        module.beta = 1.0 / (1 + i)
        pyro.set_rng_seed(i)
        value = loss.loss_and_grads(module.model, module.guide, y)
        pyro.set_rng_seed(i)
        expected = Trace_ELBO().loss_and_grads(module.model, module.guide, y)
        assert value == pytest.approx(expected, rel=1e-12)
    # At 1.0 Pyro skips the scale, which is a branch on the number.
    assert (loss.counters.captures, loss.counters.compiled_calls, loss.counters.fallbacks) == (1, 29, 0)


def test_an_integer_that_always_changes_falls_back_by_name():
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match="beta") as caught:
        for i in range(30):
            module.beta = 1 + i
            value = loss.loss_and_grads(module.model, module.guide, y)
    assert len(caught) == 1
    assert loss.counters.compiled_calls == 0
    pyro.set_rng_seed(1)
    expected = Trace_ELBO().loss_and_grads(module.model, module.guide, y)
    pyro.set_rng_seed(1)
    value = loss.loss_and_grads(module.model, module.guide, y)
    assert value == expected


def test_closed_over_tensors_are_inputs():
    scale = torch.tensor(1.0)
    holder = {"shift": torch.zeros(3)}

    def model():
        pyro.sample("z", dist.Normal(holder["shift"], scale).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    loss = CompiledELBO(TraceMeanField_ELBO(), backend="eager")
    for i in range(8):
        scale.fill_(1.0 + i)
        holder["shift"] = torch.full((3,), float(i))
        pyro.set_rng_seed(i)
        value = loss.loss_and_grads(model, guide)
        pyro.set_rng_seed(i)
        assert value == pytest.approx(TraceMeanField_ELBO().loss_and_grads(model, guide), rel=1e-12)
    assert loss.counters.compiled_calls == 7


def test_a_cleared_param_store_needs_no_new_graph():
    x, y = data(20, 3), data(20)
    guide, loss = AutoNormal(regression), CompiledELBO(Trace_ELBO(), backend="eager")
    svi = SVI(regression, guide, FusedOptim(*ADAM), loss)
    for _ in range(3):
        pyro.clear_param_store()
        for _ in range(4):
            svi.step(x, y)
    assert (loss.counters.captures, loss.counters.compiled_calls, loss.counters.fallbacks) == (1, 9, 0)


def test_steps_and_evaluations_may_alternate():
    x, y = data(20, 3), data(20)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    svi = SVI(regression, AutoNormal(regression), FusedOptim(*ADAM), loss)
    for _ in range(4):  # the guide makes its plates anew in each eager run
        svi.step(x, y)
        svi.evaluate_loss(x, y)
    assert (loss.counters.captures, loss.counters.compiled_calls) == (2, 6)


@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_frozen_or_thawed_in_place(frozen):
    y = data(8, 6)

    def run(make_loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module = VAE()
        module.eval()  # Pyro warns of frozen parameters in train mode only
        weight = module.decoder[0].weight.requires_grad_(not frozen)
        loss = make_loss()
        svi = SVI(module.model, module.guide, FusedOptim(*ADAM), loss)
        values = [svi.step(y) for _ in range(4)]
        weight.requires_grad_(frozen)
        before = weight.detach().clone()
        values += [svi.step(y) for _ in range(4)]
        assert torch.equal(weight, before) != frozen
        return loss, values

    expected = run(Trace_ELBO)[1]
    loss, values = run(lambda: CompiledELBO(Trace_ELBO(), backend="eager"))
    assert values == pytest.approx(expected, rel=1e-9)
    assert loss.counters.compiled_calls >= 5


def test_a_last_smaller_batch_is_one_more_graph():
    sizes = [8, 8, 8, 3] * 4
    batches = [(data(n, 6, seed=i),) for i, n in enumerate(sizes)]
    loss = agree(Trace_ELBO, vae(), batches, compiled=14)
    assert loss.counters.captures == 2


def test_the_number_of_graphs_is_bounded():
    module = VAE()
    loss = CompiledELBO(Trace_ELBO(), backend="eager", max_graphs=2)
    with pytest.warns(CompileWarning, match="max_graphs=2"):
        for _ in range(3):
            for n in (2, 3, 4):
                loss.loss_and_grads(module.model, module.guide, data(n, 6))
    assert loss.counters.captures == 2
    assert loss.counters.compiled_calls == 4
    assert loss.counters.fallbacks == 1


def test_dtypes_have_their_own_graphs():
    def model(y):
        pyro.sample(
            "y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0).expand(y.shape).to_event(1), obs=y
        )

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for y in [data(4), data(4), data(4).float(), data(4).float()] * 2:
        value = loss.loss_and_grads(model, lambda y: None, y)
        assert value == pytest.approx(Trace_ELBO().loss(model, lambda y: None, y), rel=1e-6)
    assert loss.counters.captures == 0  # a guide made anew at each call is a new structure each time

    def guide(y):
        pass

    for y in [data(4), data(4), data(4).float(), data(4).float()] * 2:
        loss.loss_and_grads(model, guide, y)
    assert loss.counters.captures == 2


def test_the_same_tensor_for_two_arguments_is_no_promise():
    def model(a, b):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * a, 1.0), obs=b)

    def guide(a, b):
        pass

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    x = torch.tensor(0.5)
    for _ in range(3):
        loss.loss_and_grads(model, guide, x, x)
    other = torch.tensor(2.0)
    assert loss.loss_and_grads(model, guide, x, other) == pytest.approx(
        Trace_ELBO().loss(model, guide, x, other)
    )
    assert loss.counters.compiled_calls == 3


def test_environment_names_what_changed():
    module = VAE()
    environment = Environment([module.model, module.guide])
    assert environment.holds()
    module.beta = 1.0 + 0.0
    assert environment.holds()
    module.eval()
    assert "training" in environment.changed()
    module.train()
    module.encoder[0] = nn.Linear(6, 5)
    assert "encoder" in environment.changed()

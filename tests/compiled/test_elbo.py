"""``CompiledELBO`` behaves as the loss that it wraps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroelbo.compiled import CompiledELBO, CompiledStep, CompileWarning, FusedOptim
from tests.compiled.cases import SGD, VAE, data, mixture


def test_handlers_around_the_loss_are_not_ignored():
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        loss.loss_and_grads(module.model, module.guide, y)
    pyro.set_rng_seed(1)
    with pyro.poutine.scale(scale=0.5):
        expected = Trace_ELBO().loss_and_grads(module.model, module.guide, y)
    pyro.set_rng_seed(1)
    with pyro.poutine.scale(scale=0.5), pytest.warns(CompileWarning, match="ScaleMessenger"):
        assert loss.loss_and_grads(module.model, module.guide, y) == expected


def test_nan_is_reported():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0, validate_args=False), obs=y)

    def guide(y):
        pass

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        loss.loss_and_grads(model, guide, torch.tensor(0.5))
    with pytest.warns(UserWarning, match="NaN"):
        loss.loss_and_grads(model, guide, torch.tensor(float("nan")))
    assert loss.counters.compiled_calls == 3


def test_gradients_accumulate_and_do_not_alias():
    def model():
        a, b = pyro.param("a", torch.ones(3)), pyro.param("b", torch.ones(3))
        pyro.sample("y", dist.Normal(a + b, 1.0).to_event(1), obs=torch.zeros(3))

    def guide():
        pass

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        loss.loss_and_grads(model, guide)
    a, b = (pyro.get_param_store()._params[n] for n in "ab")
    torch.testing.assert_close(a.grad, torch.full((3,), 6.0))
    a.grad.zero_()
    torch.testing.assert_close(b.grad, torch.full((3,), 6.0))


def test_loss_without_gradients():
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    svi = SVI(module.model, module.guide, FusedOptim(*SGD), loss)
    for seed in range(4):
        pyro.set_rng_seed(seed)
        value = svi.evaluate_loss(y)
        pyro.set_rng_seed(seed)
        assert value == pytest.approx(Trace_ELBO().loss(module.model, module.guide, y), rel=1e-12)
    assert loss.counters.compiled_calls == 3
    assert all(p.grad is None for p in module.parameters())


def test_torch_loop_with_local_parameters():
    class Pair(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = pyro.nn.PyroParam(torch.tensor(0.2))
            self.scale = pyro.nn.PyroParam(torch.tensor(0.5), constraint=constraints.positive)
            self.weight = nn.Parameter(torch.tensor(0.7))

    class Model(Pair):
        def forward(self, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(self.weight * z, 1.0), obs=y)

    class Guide(Pair):
        def forward(self, y):
            pyro.sample("z", dist.Normal(self.loc * self.weight, self.scale))

    def loop(loss):
        pyro.set_rng_seed(5)
        elbo = loss(Model(), Guide())
        optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-2)
        values = []
        for i in range(6):
            optimizer.zero_grad()
            value = elbo(data(7, seed=i))
            (2 * value).backward()
            optimizer.step()
            values.append(value.item())
        return torch.tensor(values), [p.detach().clone() for p in elbo.parameters()]

    with pyro.settings.context(module_local_params=True):
        expected = loop(Trace_ELBO())
        loss = CompiledELBO(Trace_ELBO(), backend="eager")
        found = loop(loss)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert loss.counters.compiled_calls == 5
    assert len(pyro.get_param_store()) == 0


def test_arguments_are_refused_by_name():
    with pytest.raises(TypeError, match="loss"):
        CompiledELBO(object())
    with pytest.raises(ValueError, match="backend"):
        CompiledELBO(Trace_ELBO(), backend="fast")
    with pytest.raises(ValueError, match="max_graphs"):
        CompiledELBO(Trace_ELBO(), max_graphs=0)
    with pytest.raises(TypeError, match="optim_constructor"):
        FusedOptim(pyro.optim.Adam, {"lr": 1.0})
    with pytest.raises(TypeError, match="optim_args"):
        FusedOptim(torch.optim.Adam, 1e-3)
    p = {"w": torch.ones(2, requires_grad=True)}
    for options, name in [
        ({"optimizer": "lion"}, "optimizer"),
        ({"lr": -1.0}, "lr"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"ema": 1.0}, "ema"),
        ({"nesterov": True}, "nesterov"),
    ]:
        with pytest.raises(ValueError, match=name):
            CompiledStep(Trace_ELBO(), mixture, mixture, p, **options)
    with pytest.raises(ValueError, match="parameters"):
        CompiledStep(Trace_ELBO(), mixture, mixture, {})
    with pytest.raises(ValueError, match=r"parameters\['w'\]"):
        CompiledStep(Trace_ELBO(), mixture, mixture, {"w": torch.ones(2)})

"""``CompiledELBO`` behaves as the loss that it wraps."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyroelbo.compiled import CompiledELBO, CompiledStep, CompileWarning, FusedOptim
from tests.compiled.cases import SGD, VAE, data, follow, mixture, nothing


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


@pytest.mark.parametrize("post", [False, True])
def test_gradient_hooks_fire_as_in_eager(post):
    def run(make_loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module, fired = VAE(), []
        for name, p in module.named_parameters():
            if post:
                p.register_post_accumulate_grad_hook(
                    lambda p, name=name: fired.append((name, float(p.grad.norm())))
                )
            else:
                p.register_hook(lambda g, name=name: fired.append((name, float(g.norm()))) or 2.0 * g)
        svi = SVI(module.model, module.guide, FusedOptim(*SGD), loss := make_loss())
        pyro.set_rng_seed(4)
        values = [svi.step(data(8, 6, seed=i)) for i in range(10)]
        return loss, values, sorted(fired), module.state_dict()

    _, expected, fired, end = run(Trace_ELBO)
    loss, values, found, state = run(lambda: CompiledELBO(Trace_ELBO(), backend="eager"))
    assert loss.counters.compiled_calls == 9
    assert values == pytest.approx(expected, rel=1e-10)
    assert [n for n, _ in found] == [n for n, _ in fired]
    assert [v for _, v in found] == pytest.approx([v for _, v in fired], rel=1e-9)
    torch.testing.assert_close(state, end, rtol=1e-10, atol=1e-10)


def test_attributes_of_the_wrapped_loss_are_shown():
    wrapped = Trace_ELBO(num_particles=7, max_plate_nesting=2, vectorize_particles=True)
    loss = CompiledELBO(wrapped)
    assert (loss.num_particles, loss.max_plate_nesting, loss.vectorize_particles) == (
        7,
        wrapped.max_plate_nesting,
        True,
    )
    loss.num_particles = 3
    assert wrapped.num_particles == 3
    assert copy.copy(loss).wrapped is wrapped
    with pytest.raises(AttributeError, match="no_such"):
        _ = loss.no_such


class FloatLoss(Trace_ELBO):
    """Returns a float computed with ``.item()`` in its own code."""

    def loss_and_grads(self, model, guide, *args, **kwargs):
        total = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            elbo = model_trace.log_prob_sum() - guide_trace.log_prob_sum()
            (-elbo).backward()
            total += elbo.item()
        return -total


def test_losses_that_return_a_float():
    module = VAE()
    loss = follow(module.model, module.guide, [(data(8, 6, seed=i),) for i in range(5)], FloatLoss)
    assert loss.counters.compiled_calls == 4


@pytest.mark.parametrize("make_loss", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("kind", ["loss", "loss_and_grads", "differentiable_loss"])
def test_models_without_parameters(make_loss, kind):
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([4]).to_event(1), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(0.5, 1.0))

    if not hasattr(make_loss, kind):
        return
    loss = follow(model, guide, [(data(4, seed=i),) for i in range(5)], make_loss, kind)
    assert (loss.counters.compiled_calls, loss.counters.fallbacks) == (4, 0)


@pytest.mark.parametrize("kind", ["loss", "loss_and_grads", "differentiable_loss"])
def test_a_model_without_sites(kind):
    """Its loss is a plain float in all of Pyro's methods."""
    loss = follow(nothing, nothing, [()] * 4, kind=kind)
    assert loss.counters.compiled_calls == 3


def test_the_loss_alone_compiles_in_single_precision():
    """Pyro sums it in float64 from parts in float32."""
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()
    y = data(5)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNormal(model)
    guide(y)
    loss = follow(model, guide, [(y,)] * 5, kind="loss", rel=1e-6)
    assert (loss.counters.compiled_calls, loss.counters.fallbacks) == (4, 0)


def test_a_weight_is_followed_though_evaluations_replace_objects_of_the_guide():
    pyro.clear_param_store()
    weight, y = {"kl": 1.0}, data(5)

    def model(y):
        with pyro.poutine.scale(scale=weight["kl"]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):  # AutoNormal makes its plates anew in every run
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = AutoNormal(model)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for i in range(4):
        weight["kl"] = 0.1 * (1 + i)
        loss.loss_and_grads(model, guide, y)
        Trace_ELBO().loss(model, guide, y)
    assert (loss.counters.compiled_calls, loss.counters.captures) == (3, 1)


def test_a_backward_pass_of_the_caller_survives_the_checks():
    """A penalty on the weights, computed before the call that captures and compares."""
    module, y = VAE(), data(8, 6)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for _ in range(3):
        weights = [p for p in module.parameters() if p.dim() == 2]
        penalty = sum(w.square().sum() for w in weights)
        (loss.differentiable_loss(module.model, module.guide, y) + penalty).backward()
    assert loss.counters.compiled_calls == 2


def test_a_loss_of_ones_own_may_read_its_value():
    class Weighted(Trace_ELBO):
        weight = 1.0

        def loss_and_grads(this, model, guide, *args):
            loss = this.weight * this.differentiable_loss(model, guide, *args)
            loss.backward()
            return loss.item()

    y = data(8, 6)
    module = VAE()
    loss = follow(module.model, module.guide, [(y,)] * 4, make_loss=Weighted)
    assert loss.counters.compiled_calls == 3

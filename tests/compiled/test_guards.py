"""A graph runs only while everything that it was captured with is unchanged."""

import argparse
import collections
import functools
import importlib
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyroelbo.compiled import CompiledELBO, CompileWarning, FusedOptim
from pyroelbo.compiled.environment import Environment
from tests.compiled.cases import ADAM, VAE, agree, data, follow, nothing, regression, vae


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


def shifted(read):
    """A model whose location is ``read()``."""

    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) + read(), 1.0), obs=y)

    return model


class Slotted:
    __slots__ = ("value",)


def slotted():
    thing = Slotted()
    thing.value = 1.0
    return lambda: thing.value, lambda v: setattr(thing, "value", v)


def namespace():
    options = argparse.Namespace(shift=1.0, nested=types.SimpleNamespace(more=[1.0]))

    def write(v):
        options.nested.more[0] = v

    return lambda: options.nested.more[0] + options.shift, write


def array():
    values = np.ones(3)

    def write(v):
        values[1] = v

    return lambda: float(values[1]), write


def array_as_tensor():
    values = np.ones(3)

    def write(v):
        values[1] = v

    return lambda: torch.tensor(values).sum(), write


def members():
    values = {1.0}

    def write(v):
        values.clear()
        values.add(v)

    return lambda: sum(values), write


def queue():
    values = collections.deque([1.0])

    def write(v):
        values[0] = v

    return lambda: values[0], write


def keyword_default():
    def read(*, shift=1.0):
        return shift

    def write(v):
        read.__kwdefaults__["shift"] = v

    return read, write


def long_list():
    values = [1.0] * 5_000

    def write(v):
        values[4_321] = v

    return lambda: values[4_321], write


def property_of_a_base_class():
    class Base:
        level = 1.0

        @property
        def shift(self):
            return self.level

    thing = type("Child", (Base,), {})()
    return lambda: thing.shift, lambda v: setattr(Base, "level", v)


def forward_hook():
    module, level = nn.Identity(), [1.0]
    module.register_forward_hook(lambda m, x, out: out * level[0])

    def write(v):
        level[0] = v

    return lambda: module(torch.ones(())), write


@pytest.mark.parametrize(
    "place",
    [
        *(slotted, namespace, array, array_as_tensor, members, queue, keyword_default, long_list),
        *(property_of_a_base_class, forward_hook),
    ],
)
def test_no_place_of_a_value_is_overlooked(place):
    read, write = place()
    loss = follow(shifted(read), nothing, [(torch.tensor(0.5),)] * 9, before=lambda i: write(1.0 + i // 3))
    assert loss.counters.fallbacks == 0
    assert loss.counters.compiled_calls >= 3


def test_a_hook_registered_later_is_seen():
    module = nn.Identity()
    model = shifted(lambda: module(torch.ones(())))

    def before(i):
        if i == 3:
            module.register_forward_hook(lambda m, x, out: 5 * out)

    assert follow(model, nothing, [(torch.tensor(0.5),)] * 6, before=before).counters.captures == 2


def make_package(path, name, code, monkeypatch):
    (path / name).mkdir(parents=True)
    (path / name / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(path))
    return importlib.import_module(name)


def test_installed_packages_do_not_hide_the_model(tmp_path, monkeypatch):
    """A method that the loss never calls mentions a package of 60,000 values."""
    code = "table = {i: float(i) for i in range(60_000)}\ndef draw(x):\n    return table[x]\n"
    package = make_package(tmp_path / "site-packages", "big_plots", code, monkeypatch)
    monkeypatch.setitem(globals(), "big_plots", package)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = 1.0

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, y):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) + self.net.shift, 1.0), obs=y)

        def plot(self):
            return big_plots.draw(3) + big_plots.table[0]  # noqa: F821

    model = Model()

    def before(i):
        model.net.shift = 1.0 if i < 4 else 5.0

    loss = follow(model, nothing, [(torch.tensor(0.5),)] * 8, before=before)
    assert loss.counters.captures == 2
    graph = next(iter(loss._cache.graphs.values()))[0]
    assert len(graph.plan.environment._keys) < 200


def test_the_models_own_package_is_watched_where_it_is_installed(tmp_path, monkeypatch):
    code = (
        "import pyro, torch, pyro.distributions as dist\nLEVEL = 1\n"
        "def level():\n    return LEVEL\n"
        "class Model(torch.nn.Module):\n    def forward(self, y):\n"
        "        pyro.sample('y', dist.Normal(pyro.param('loc', torch.tensor(0.3)) + level(), 1.0), obs=y)\n"
    )
    package = make_package(tmp_path / "site-packages", "own_models", code, monkeypatch)

    def before(i):
        package.LEVEL = 1 + i // 4

    wrapped = functools.partial(package.Model())
    loss = follow(wrapped, nothing, [(torch.tensor(0.5),)] * 8, before=before)
    assert loss.counters.captures == 2


def test_packages_and_transforms_keep_tensors_for_themselves(tmp_path, monkeypatch):
    code = (
        "import pyro, torch, pyro.distributions as dist\nclass Model(torch.nn.Module):\n"
        "    def forward(self, y):\n        self.theta = pyro.param('loc', torch.tensor(0.3)).exp()\n"
        "        pyro.sample('y', dist.Normal(self.theta, 1.0), obs=y)\n"
    )
    package = make_package(tmp_path / "site-packages", "keeping_models", code, monkeypatch)
    loss = follow(package.Model(), nothing, [(torch.tensor(0.5),)] * 5)
    assert (loss.counters.compiled_calls, loss.counters.fallbacks) == (4, 0)

    class Kept(torch.distributions.transforms.ExpTransform):
        def log_abs_det_jacobian(self, x, y):
            self.kept = super().log_abs_det_jacobian(x, y)
            return self.kept

    transform = Kept(cache_size=1)

    def model(y):
        base = dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0)
        pyro.sample("y", dist.TransformedDistribution(base, transform), obs=y)

    loss = follow(model, nothing, [(torch.tensor(0.5),)] * 5)
    assert (loss.counters.compiled_calls, loss.counters.fallbacks) == (4, 0)


def test_a_model_that_sees_too_much_is_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.vocabulary = {f"word {i}": i for i in range(60_000)}

        def forward(self, y):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match="more than 50,000 Python values.*vocabulary"):
        loss.loss_and_grads(Model(), nothing, torch.tensor(0.5))
    assert loss.counters.fallbacks == 1


def test_unhashable_arguments_count_by_identity_and_content():
    options = argparse.Namespace(shift=1.0, table=np.ones(2))

    def model(y, options, table):
        loc = pyro.param("loc", torch.tensor(0.3)) + options.shift + float(table[0])
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def before(i):
        options.shift = 1.0 + i // 3
        options.table[0] = 1.0 + i // 5

    loss = follow(model, nothing, [(torch.tensor(0.5), options, options.table)] * 10, before=before)
    assert loss.counters.fallbacks == 0
    assert loss.counters.compiled_calls >= 4


def test_arguments_made_anew_are_said_to_be_the_reason():
    def model(y, options):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) + options.shift, 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match="every call has another structure"):
        for _ in range(70):
            loss.loss_and_grads(model, nothing, torch.tensor(0.5), argparse.Namespace(shift=1.0))
    assert (loss.counters.compiled_calls, loss.counters.fallbacks) == (0, 1)


class Default(nn.Module):
    level = 1.0

    def forward(self, y):
        loc = pyro.param("loc", torch.tensor(0.3)) + self.level + getattr(self, "extra", 0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize("name", ["level", "extra"])
@pytest.mark.parametrize("where", ["instance", "class"])
def test_an_attribute_that_appears_later_is_seen(name, where):
    model = type("Child", (Default,), {})()

    def before(i):
        if i == 4:
            setattr(model if where == "instance" else type(model), name, 5)

    assert follow(model, nothing, [(torch.tensor(0.5),)] * 8, before=before).counters.captures == 2


def test_settings_in_an_installed_package_are_seen(tmp_path, monkeypatch):
    package = make_package(
        tmp_path / "site-packages", "settings_of_all", "LEVEL = 1\nTABLE = {'a': 1}\n", monkeypatch
    )
    monkeypatch.setitem(globals(), "settings_of_all", package)

    def before(i):
        package.LEVEL, package.TABLE["a"] = 1 + i // 3, 1 + i // 5

    model = shifted(lambda: settings_of_all.LEVEL + settings_of_all.TABLE["a"])  # noqa: F821
    loss = follow(model, nothing, [(torch.tensor(0.5),)] * 9, before=before)
    assert loss.counters.captures == 3


def test_scalars_of_numpy_are_numbers():
    for dtype in (np.float64, np.float32, np.int64):
        pyro.clear_param_store()
        module = VAE()
        if dtype is not np.float64:
            module.beta = dtype(1)
        weights = [dtype(1 + (i // 6 if dtype is np.int64 else 0.1 * i)) for i in range(12)]
        loss = follow(
            module.model,
            module.guide,
            [(data(8, 6),)] * 12,
            before=lambda i, m=module, w=weights: setattr(m, "beta", w[i]),
        )
        assert loss.counters.fallbacks == 0
        assert loss.counters.compiled_calls >= (10 if dtype is not np.float32 else 0)


def test_a_buffer_of_another_shape_at_the_same_address_is_seen():
    """The address of a freed tensor is used again at once; the graph would read beyond the new one."""
    module = nn.Module()
    module.table = torch.ones(64)

    def model(y):
        loc = pyro.param("loc", torch.tensor(0.3)) * module.table.sum()
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    shapes = [(64,)] * 3 + [(8, 8), (64,), (4, 16)] * 4
    for shape in shapes:
        module.table = None
        module.table = torch.full(shape, 0.5)
        value = loss.loss_and_grads(model, nothing, torch.tensor(0.5))
        assert value == pytest.approx(Trace_ELBO().loss(model, nothing, torch.tensor(0.5)), rel=1e-12)
    for graphs in loss._cache.graphs.values():
        for graph in graphs:
            assert all(a is b for a, b in zip(graph.plan.state() or [], graph.plan._last, strict=False))

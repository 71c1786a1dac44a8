"""What cannot be a graph stays eager, with a reason."""

import ctypes
import importlib
import itertools
import random
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroelbo.compiled import CompiledELBO, CompileWarning, FusedOptim
from tests.compiled.cases import SGD, VAE, data, normal_guide, nothing, von_mises, von_mises_guide


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


RNG = random.Random(0)
NUMPY_RNG = np.random.default_rng(0)
OLD_NUMPY_RNG = np.random.RandomState(0)
GENERATOR = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "draw, named",
    [
        (random.random, "Python's random module"),
        (lambda: random.choice([1.0, 2.0]), "Python's random module"),
        (lambda: np.random.rand(), r"numpy\.random"),
        (lambda: NUMPY_RNG.normal(), r"private numpy\.random\._generator\.Generator"),
        (lambda: OLD_NUMPY_RNG.rand(), r"private numpy\.random\.mtrand\.RandomState"),
        (lambda: RNG.random(), r"private random\.Random"),
        (
            lambda: torch.randn((), generator=GENERATOR),
            r"torch\.Generator of its own at test_fallback\.py:\d+",
        ),
    ],
)
def test_draws_outside_torchs_seed_are_refused(draw, named):
    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * draw(), 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    before = random.getstate()
    with pytest.warns(CompileWarning, match=named) as caught:
        values = [loss.loss_and_grads(model, nothing, torch.tensor(0.5)) for _ in range(12)]
    assert len(caught) == 1
    assert len(set(values)) > 1
    assert loss.counters.compiled_calls == 0
    random.setstate(before)


def test_an_iterator_that_the_model_advances_is_refused():
    def run(make_loss):
        weights = (1.0 + 1e-6 * i for i in itertools.count())  # too slow for a comparison with eager

        def model(y):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * next(weights), 1.0), obs=y)

        loss = make_loss()
        return [loss.loss_and_grads(model, nothing, torch.tensor(0.5)) for _ in range(6)]

    with pytest.warns(CompileWarning, match="next item of the iterator 'weights'"):
        values = run(lambda: CompiledELBO(Trace_ELBO(), backend="eager"))
    assert values == run(Trace_ELBO)


def test_the_check_does_not_advance_other_generators():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * random.random(), 1.0), obs=y)

    def run(make_loss):
        random.seed(5)
        loss = make_loss()
        return [loss.loss_and_grads(model, nothing, torch.tensor(0.5)) for _ in range(6)]

    with pytest.warns(CompileWarning):
        values = run(lambda: CompiledELBO(Trace_ELBO(), backend="eager"))
    assert values == run(Trace_ELBO)


class Slotted:
    __slots__ = ("value",)


class Stateful(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change
        self.total = torch.zeros(())
        self.history = []
        self.count = 0
        self.slotted = Slotted()
        self.slotted.value = 0
        self.generator = np.random.default_rng(0)
        type(self).calls = 0

    def forward(self, y):
        loc = pyro.param("loc", torch.tensor(0.3)) + self.change(self, y)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def replace(module, y):
    module.total = module.total + y
    return module.total


def append(module, y):
    module.history.append(1.0)
    return len(module.history)


def count(module, y):
    module.count += 1
    return module.count


def count_in_the_class(module, y):
    type(module).calls += 1
    return type(module).calls


def count_in_a_slot(module, y):
    module.slotted.value += 1
    return module.slotted.value


def draw(module, y):
    return module.generator.random()


def seed(module, y):
    torch.manual_seed(0)
    return torch.randn(())


@pytest.mark.parametrize(
    "change, named",
    [
        (replace, "another tensor in 'Stateful.total'"),
        (append, "history"),
        (count, "count"),
        (count_in_the_class, "calls"),
        (count_in_a_slot, "value"),
        (draw, r"private numpy\.random"),
        (seed, "differs"),
    ],
)
def test_state_that_the_model_changes_is_refused(change, named):
    model = Stateful(change)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match=named):
        values = [loss.loss_and_grads(model, nothing, torch.tensor(0.5)) for _ in range(6)]
    assert loss.counters.compiled_calls == 0
    if change is not seed:  # the refused run is undone: eager goes on where it was
        other = Stateful(change)
        expected = [Trace_ELBO().loss_and_grads(other, nothing, torch.tensor(0.5)) for _ in range(6)]
        assert values == expected


KEPT = types.SimpleNamespace(last=None, options={})
CELL = torch.zeros(())


def in_an_attribute(y):
    KEPT.last = (2 * y).detach()


def in_a_tuple(y):
    KEPT.last = (y, 3 * y)


def in_a_distribution(y):
    KEPT.last = dist.Normal(y, 1.0)


def in_a_dict(y):
    KEPT.options["last"] = 4 * y


def in_a_global(y):
    global CELL
    CELL = 5 * y


def in_a_hook(y):
    if KEPT.last is None:
        KEPT.module = nn.Identity()
        KEPT.module.register_forward_hook(lambda m, x, out: setattr(KEPT, "last", out + 1))
    KEPT.module(y)


@pytest.mark.parametrize(
    "store", [in_an_attribute, in_a_tuple, in_a_distribution, in_a_dict, in_a_global, in_a_hook]
)
def test_tensors_that_the_model_leaves_behind_are_those_of_its_last_call(store):
    """The loss does not read them, but the user may."""
    KEPT.last, KEPT.options = None, {}

    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0), obs=y)
        store(y)

    def run(make_loss):
        loss, seen = make_loss(), []
        for i in range(5):
            loss.loss_and_grads(model, nothing, torch.tensor(float(i)))
            seen.append(repr((KEPT.last, KEPT.options, CELL)))
        return seen

    expected = run(Trace_ELBO)
    with pytest.warns(CompileWarning, match=r"leaves another tensor in|running the model changes"):
        assert run(lambda: CompiledELBO(Trace_ELBO(), backend="eager")) == expected


def test_a_tensor_that_is_only_written_in_place_is_followed():
    last = torch.zeros(())

    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0), obs=y)
        last.copy_(2 * y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    for i in range(5):
        loss.loss_and_grads(model, nothing, torch.tensor(float(i)))
        assert last == 2 * i
    assert loss.counters.compiled_calls == 4


def test_a_tensor_changed_in_place_is_followed():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.total = torch.zeros(())

        def forward(self, y):
            self.total.mul_(0.5).add_(y)
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) + self.total, 1.0), obs=y)

    def run(loss):
        pyro.clear_param_store()
        model = Running()
        return [loss.loss_and_grads(model, nothing, torch.tensor(0.1 * i)) for i in range(8)]

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    assert run(loss) == pytest.approx(run(Trace_ELBO()), rel=1e-12)
    assert loss.counters.compiled_calls == 7


def test_reasons_name_user_code_on_any_path(tmp_path, monkeypatch):
    folder = tmp_path / "pyro" / "torch"
    folder.mkdir(parents=True)
    (folder / "user_program.py").write_text(
        "import pyro, torch, pyro.distributions as dist\n"
        "def model(y):\n"
        "    z = pyro.sample('first', dist.Normal(0.0, 1.0))\n"
        "    w = 2.0 if z > 0 else 1.0\n"
        "    pyro.sample('y', dist.Normal(w * pyro.param('loc', torch.tensor(0.3)), 1.0), obs=y)\n"
        "def guide(y):\n"
        "    pyro.sample('first', dist.Normal(0.0, 1.0))\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    program = importlib.import_module("user_program")
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match=r"user_program\.py:4 \(last site 'first'\)"):
        for _ in range(3):
            loss.loss_and_grads(program.model, program.guide, torch.tensor(0.5))


def test_shapes_that_depend_on_values_name_their_line():
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match=r"test_fallback\.py:\d+ \(last site 'z'\)"):
        for _ in range(3):
            loss.loss_and_grads(selecting, normal_guide_5, torch.tensor(0.5))


def test_a_program_that_fails_is_not_tried_for_ever():
    loss = CompiledELBO(Trace_ELBO(), backend="eager", max_graphs=100)
    with pytest.warns(CompileWarning):
        for n in range(2, 12):
            for _ in range(3):
                loss.loss_and_grads(branching_rows, rows_guide, torch.zeros(n))
    assert loss.counters.fallbacks == 3


def branching_rows(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z if z > 0 else -2 * z, 1.0), obs=y)


def rows_guide(y):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


def test_arguments_changed_in_place_are_refused_and_not_changed_twice():
    def model(y):
        y.add_(1.0)
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 1.0), obs=y)

    loss, y = CompiledELBO(Trace_ELBO(), backend="eager"), torch.tensor(0.0)
    with pytest.warns(CompileWarning, match="changes its arguments in place"):
        for _ in range(5):
            loss.loss_and_grads(model, nothing, y)
    assert float(y) == 5.0


def test_reading_gradients_is_refused():
    def model(y):
        loc = pyro.param("loc", torch.tensor(0.3))
        g = loc.unconstrained().grad
        pyro.sample("y", dist.Normal(loc if g is None else loc + 0.1 * g, 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match=r"reads the \.grad"):
        for _ in range(4):
            loss.loss_and_grads(model, nothing, torch.tensor(0.5))
    assert loss.counters.compiled_calls == 0


@pytest.mark.parametrize("held", [False, True])
def test_a_constructor_that_no_mode_sees_is_caught_by_the_check(held):
    state = torch.tensor(1.0)

    def model(y, b):
        s = torch.Tensor([state if held else b]).to(y.dtype)
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * s[0], 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match="differs"):
        for i in range(4):
            state.fill_(1.0 + i)
            loss.loss_and_grads(model, nothing, torch.tensor(0.5), torch.tensor(1.0 + i))
    assert loss.counters.compiled_calls == 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 2, batch_first=True)

    def forward(self, y):
        pyro.module("recurrent", self)
        hidden, _ = self.lstm(y[:, :, None])
        pyro.sample("y", dist.Normal(hidden.sum(-1), 1.0).to_event(2), obs=y)


def sparse(y):
    loc = pyro.param("loc", torch.full((3,), 0.3))
    pyro.sample("y", dist.Normal(torch.mv(y, loc), 1.0).to_event(1), obs=y.to_dense()[0])


ADJACENCY = torch.eye(3).to_sparse()


def sparse_in_a_global(y):
    loc = pyro.param("loc", torch.full((3,), 0.3))
    pyro.sample("y", dist.Normal(torch.mv(ADJACENCY.to(y.dtype), loc), 1.0).to_event(1), obs=y)


@pytest.mark.parametrize(
    "make_model, y, named",
    [
        (Recurrent, torch.ones(2, 4), "the graph fails where eager does not"),
        (lambda: sparse, torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
        (lambda: sparse_in_a_global, torch.ones(3), "'ADJACENCY' is a tensor of layout"),
    ],
)
def test_what_a_graph_cannot_run_stays_eager(make_model, y, named):
    torch.set_default_dtype(torch.float32)  # an LSTM is one kernel then
    pyro.clear_param_store()
    model = make_model()
    y = y.to(torch.float32)
    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match=named):
        values = [loss.loss_and_grads(model, nothing, y) for _ in range(4)]
    assert values == [Trace_ELBO().loss_and_grads(model, nothing, y)] * 4
    assert loss.counters.compiled_calls == 0

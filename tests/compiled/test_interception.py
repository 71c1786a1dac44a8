"""Values of tensors that Python code reads or copies are followed, guarded or refused."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

from pyroelbo.compiled import CompiledELBO, CompileWarning
from pyroelbo.compiled.capture import capture
from pyroelbo.compiled.eager import Call
from pyroelbo.compiled.interception import Census
from pyroelbo.compiled.verify import Mismatch, verify
from tests.compiled.cases import data, follow, normal_guide, nothing


def scaled(weight):
    """A model that multiplies its term by a number that ``weight`` makes from the argument."""

    def model(y, b):
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(y)), pyro.poutine.scale(scale=weight(b)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    return model


@pytest.mark.parametrize(
    "weight",
    [
        lambda b: torch.tensor([b, b])[0],
        lambda b: torch.tensor([[b, 2.0], [3, b * b]])[1, 1],
        lambda b: torch.tensor((b, 1)).sum(),
        lambda b: torch.as_tensor([b, b], dtype=torch.float32)[1].double(),
        lambda b: torch.asarray([b, b])[0],
        lambda b: b.new_tensor([b, 1.0])[0],
        lambda b: torch.tensor([b.reshape(1)])[0],
        lambda b: torch.tensor(b),
        lambda b: copy.deepcopy(b),
    ],
)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_tensors_made_from_tensors_are_followed(weight):
    y = data(7)
    loss = follow(scaled(weight), nothing, [(y, torch.tensor(1.0 + i)) for i in range(9)])
    assert (loss.counters.captures, loss.counters.compiled_calls) == (1, 8)


@pytest.mark.parametrize(
    "weight",
    [
        lambda b: b.item() + 1.0,  # Pyro compares a scale with 1
        lambda b: float(b) + 1.0,
        lambda b: int(b) + 1.0,
        lambda b: b.tolist(),
        lambda b: torch.as_tensor(b.numpy() * 2.0),
        lambda b: torch.as_tensor(np.asarray(b) + 1.0),
        lambda b: 2.0 if b > 1.5 else 3.0,
        lambda b: 2.0 if torch.equal(b, torch.tensor(2.0)) else 3.0,
        lambda b: 2.0 if 2.0 in b else 3.0,
        lambda b: torch.ones(5)[: int(b)].sum(),
        lambda b: torch.ones(5)[: b.long()].sum(),
        lambda b: torch.arange(1.0, 6.0)[..., b.long()],
        lambda b: max(1.0, float(b * b) + 1.0),
    ],
)
def test_values_that_python_reads_are_guards(weight):
    y = data(7)
    loss = follow(scaled(weight), nothing, [(y, torch.tensor(1.0 + i // 3 % 2)) for i in range(12)])
    assert loss.counters.captures == 2
    assert loss.counters.compiled_calls >= 10
    assert loss.counters.fallbacks == 0


class Words(dist.Multinomial):
    """Stores a size and never asks for it."""

    def log_prob(self, value):
        return (self.logits * value).sum(-1)


@pytest.mark.parametrize(
    "weight, captures",
    [
        (lambda b: b.item(), 2),
        (lambda b: 3 * int(b.item() / 2) + float(b), 2),
        (lambda b: torch.tensor([int(b), 1]).sum(), 2),
        (lambda b: torch.full((), int(b)) * torch.ones((), dtype=torch.float32), 2),
        (lambda b: torch.arange(4)[2] * int(b), 2),
        (lambda b: 1.0 if isinstance(b.item(), float) and isinstance(int(b), int) else 2.0, 2),
        (lambda b: -Words(int(torch.max(b).item()), b * torch.ones(3)).log_prob(torch.ones(3)), 2),
        (lambda b: 2.0 if b.item() > 4 else b.item(), 2),
        (lambda b: float(len(range(int(b)))), 5),
        (lambda b: float(str(b.item())), 5),
    ],
)
def test_numbers_that_python_only_passes_on_stay_in_the_graph(weight, captures):
    """They are guards at first; where their value is asked for in any way, they remain so."""
    y = data(7)
    loss = CompiledELBO(Trace_ELBO(), backend="eager", max_graphs=20)
    model = scaled(weight)
    for i in range(10):
        b = torch.tensor(2.0 + i)
        expected = Trace_ELBO().loss(model, nothing, y, b)
        assert loss.loss_and_grads(model, nothing, y, b) == pytest.approx(expected, rel=1e-12)
    assert (loss.counters.captures, loss.counters.fallbacks) == (captures, 0)


def test_a_number_of_a_draw_may_stay_in_the_graph():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(2 * z.item(), 1.0), obs=y)

    loss = follow(model, normal_guide, [(data(1, seed=i)[0],) for i in range(5)])
    assert (loss.counters.captures, loss.counters.compiled_calls) == (1, 4)


def test_reads_of_constants_cost_nothing():
    def model(y):
        n = torch.tensor([2.0, 3.0]).sum().item()
        for i in range(torch.arange(3).max() + 1):
            pyro.sample(f"y{i}", dist.Normal(pyro.param("loc", torch.tensor(0.3)), n), obs=y[i])

    loss = follow(model, nothing, [(data(4, seed=i),) for i in range(5)])
    (graph,) = loss._cache.graphs.popitem()[1]
    assert not graph.plan.guarded


def test_lengths_and_assertions_are_guards():
    def model(y, lengths):
        assert lengths.max() <= 6
        longest = int(lengths.max())
        assert (lengths > 0).all()
        mask = torch.arange(longest) < lengths[:, None]
        loc = pyro.param("loc", torch.tensor(0.3))
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=mask.all(-1)):
            pyro.sample("y", dist.Normal(loc, 1.0).expand([longest]).to_event(1), obs=y[:, :longest])

    lengths = [torch.tensor(x) for x in ([1, 2, 3], [3, 3, 2], [4, 4, 1])]
    loss = follow(model, nothing, [(data(3, 6, seed=i), lengths[i // 2 % 3]) for i in range(12)])
    assert (loss.counters.captures, loss.counters.fallbacks) == (2, 0)
    assert loss.counters.compiled_calls == 10


def test_a_read_after_a_write_in_place_is_refused():
    count = torch.zeros((), dtype=torch.int64)

    def model(y):
        count.add_(1)
        loc = pyro.param("loc", torch.tensor(0.3)) * (1.0 if int(count) % 2 else 2.0)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(CompileWarning, match=r"changes in place, test_interception.py:\d+"):
        values = [loss.loss_and_grads(model, nothing, torch.tensor(0.7)) for _ in range(6)]
    assert len(set(values)) == 2


def test_scratch_memory_before_a_read_is_computed_anew():
    def model(y):
        scratch = torch.zeros(3)
        scratch[1:].copy_(y[1:3])
        scratch[0] += y[0]
        weight = 1.0 if scratch.sum() > 0 else 2.0
        pyro.sample(
            "y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), weight).expand([3]).to_event(1), obs=y
        )

    loss = follow(model, nothing, [((-1) ** i * torch.tensor([0.1, 0.2, 0.3]),) for i in range(8)])
    assert (loss.counters.captures, loss.counters.fallbacks) == (2, 0)


@pytest.mark.parametrize("classes", [3, -1])
def test_one_hot(classes):
    table = torch.randn(3, 2)

    def model(y, k):
        w = pyro.param("w", torch.ones(3, 2))
        with pyro.plate("data", len(y)):
            loc = (F.one_hot(k, classes).to(w.dtype) @ (w * table)).sum(-1)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    ks = [torch.tensor([0, 2, 1, 1]), torch.tensor([2, 2, 0, 1])]
    loss = follow(model, nothing, [(data(4, seed=i), ks[i % 2]) for i in range(6)])
    assert (loss.counters.captures, loss.counters.compiled_calls) == (1, 5)


def one_hot_model(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(k @ pyro.param("m", torch.tensor([-1.0, 0.0, 1.0])), 1.0), obs=y)


def one_hot_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.OneHotCategorical(logits=pyro.param("logits", torch.zeros(len(y), 3))))


@pytest.mark.parametrize("make_loss", [Trace_ELBO, TraceGraph_ELBO])
def test_one_hot_categorical(make_loss):
    loss = follow(one_hot_model, one_hot_guide, [(data(4, seed=i),) for i in range(6)], make_loss)
    assert loss.counters.compiled_calls == 5


def bernoulli_model(y):
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.4)))
        pyro.sample("y", dist.Normal(pyro.param("w", torch.tensor(0.5)) * z, 1.0), obs=y)


def bernoulli_guide(y):
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(4))))


@pytest.mark.parametrize("kind", ["loss", "loss_and_grads"])
def test_no_draw_is_baked_into_a_graph(kind):
    """``detach()`` of a provenance tensor lost its place in the graph: one constant for all calls."""
    loss = follow(bernoulli_model, bernoulli_guide, [(data(4),)] * 20, TraceGraph_ELBO, kind)
    assert (loss.counters.compiled_calls, loss.counters.fallbacks) == (19, 0)


def test_a_constant_is_caught_even_where_the_loss_takes_few_values():
    """A graph that holds one of two possible draws agrees with eager under every second seed."""

    def model(y):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(0.0, 1.0 + z), obs=y)

    def guide(y):
        pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))

    call = Call(Trace_ELBO(), "loss", model, guide, (torch.tensor(0.3),), {})
    plan = capture(call)
    outputs = plan.graph(*call.tensors, *plan.state())
    verify(plan, call, plan.graph)
    with pytest.raises(Mismatch, match="the loss differs"):
        verify(plan, call, lambda *inputs: outputs)


def test_a_graph_that_misses_any_one_input_is_refused():
    """Rows, floating arguments, Python numbers and state are each changed before a graph is taken."""
    shift = torch.tensor(0.7)

    def model(y, k, beta):
        w = pyro.param("w", torch.tensor([0.3, 0.5, 0.9]))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(beta * w[k] + shift, 1.0), obs=y)

    args = (data(4), torch.tensor([0, 1, 2, 2]), 0.4)
    Trace_ELBO().loss(model, nothing, *args)
    call = Call(Trace_ELBO(), "grads", model, nothing, args, {})
    plan = capture(call, [0])
    inputs = [*call.tensors, *plan.number_tensors([0.4]), *plan.state()]
    assert len(inputs) == 5
    verify(plan, call, plan.graph, thorough=True)
    for i, t in enumerate(inputs):
        held = t.detach().clone()

        def stale(*inputs, i=i, held=held):
            return plan.graph(*inputs[:i], held, *inputs[i + 1 :])

        verify(plan, call, stale)  # the call itself does not tell
        with pytest.raises(Mismatch, match="differs"):
            verify(plan, call, stale, thorough=True)


def test_unused_draws_keep_their_place():
    """A guide's global latent before a subsampled plate whose indices nobody uses."""

    def model(y):
        g = pyro.sample("g", dist.Normal(torch.zeros(200), 1.0).to_event(1))
        with pyro.plate("data", 500, subsample_size=125):
            z = pyro.sample("z", dist.Normal(g.mean(), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("g", dist.Normal(pyro.param("loc", torch.zeros(200)), 1.0).to_event(1))
        with pyro.plate("data", 500, subsample_size=125):
            pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(125)), 1.0))

    y = data(125)
    follow(model, guide, [(y,)] * 4)
    pyro.clear_param_store()
    loss = CompiledELBO(Trace_ELBO())
    for i in range(3):
        pyro.set_rng_seed(i)
        value = loss.loss_and_grads(model, guide, y)
        pyro.set_rng_seed(i)
        assert value == pytest.approx(Trace_ELBO().loss(model, guide, y), rel=1e-9)
    assert (loss.counters.compiles, loss.counters.compiled_calls) == (1, 2)


def test_a_read_of_a_draw_names_its_line():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(round(z.item()), 1.0), obs=y)

    loss = CompiledELBO(Trace_ELBO(), backend="eager")
    with pytest.warns(
        CompileWarning, match=r"depends on a random draw, test_interception.py:\d+ \(last site 'y'\)"
    ):
        for _ in range(3):
            loss.loss_and_grads(model, normal_guide, torch.tensor(0.5))


def test_a_class_out_of_range_raises_as_in_eager():
    def model(y, k):
        w = pyro.param("w", torch.ones(3))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(F.one_hot(k, 3).to(w.dtype) @ w, 1.0), obs=y)

    loss, y = CompiledELBO(Trace_ELBO(), backend="eager"), data(4)
    for _ in range(3):
        loss.loss_and_grads(model, nothing, y, torch.tensor([0, 2, 1, 1]))
    assert loss.counters.compiled_calls == 2
    with pytest.raises(RuntimeError, match="Class values"):
        loss.loss_and_grads(model, nothing, y, torch.tensor([0, 3, 1, 1]))


def test_memory_of_a_draw_that_is_used_again_is_no_draw():
    with Census() as census:
        for _ in range(20):
            torch.randn(3) * 2
            assert census.taint(torch.tensor([2, 3, 4])) is None


def where_positive(z):
    x, mask = torch.zeros_like(z), z > 0
    x[mask] = z[mask]
    return x


def doubled_where_positive(z):
    x, mask = z * 1.0, z > 0
    x[mask] = 2 * x[mask]
    return x


def changed_between(z):
    x, source, mask = z * 1.0, z * 3.0, z > 0
    selected = source[mask]
    source += 1.0
    x[mask] = selected
    return x


def another_mask(z):
    x = z * 1.0
    x[z > 0] = z[z > 0]
    return x


def length(z):
    return z + len(z[z > 0])


@pytest.mark.parametrize(
    "change, compiled",
    [
        *((where_positive, 5), (doubled_where_positive, 0), (changed_between, 0), (another_mask, 0)),
        *((length, 0), (T.Spline(6, count_bins=3, bound=1.0), 5)),
    ],
)
@pytest.mark.filterwarnings("ignore::pyroelbo.compiled.CompileWarning")
def test_a_selection_that_is_only_copied_needs_no_shape(change, compiled):
    """Splines of Pyro copy what lies outside their interval."""

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(change(z), 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.full((6,), 0.1)), 1.0).to_event(1))

    loss = follow(model, guide, [(data(6, seed=i),) for i in range(6)])
    assert loss.counters.compiled_calls == compiled
    if not compiled:
        assert "shape of index" in loss.counters.reasons[0]


KNOWN = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.tolist()[1],
        lambda t: float(t.numpy()[1]),
        lambda t: float(np.asarray(t)[1]),
        lambda t: float(np.from_dlpack(t)[1]),
        lambda t: 2.0 if torch.equal(t, torch.tensor([1.0, 2.0])) else 3.0,
    ],
)
def test_a_tensor_in_sight_that_is_read_and_never_computed_with_is_a_guard(read):
    def model(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)) * read(KNOWN), 1.0), obs=y)

    def before(i):
        KNOWN.copy_(torch.tensor([1.0, 2.0]) * (1 + i // 4))

    loss = follow(model, nothing, [(torch.tensor(0.5),)] * 8, before=before)
    assert loss.counters.compiled_calls >= 6

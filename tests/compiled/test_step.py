"""``CompiledStep`` gives the numbers of an eager step."""

import copy
import itertools

import pyro
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from torch import nn

from pyroelbo.compiled import CompiledStep, CompileWarning
from pyroelbo.compiled import step as step_module
from pyroelbo.compiled.verify import Mismatch
from pyroelbo.objectives import Weighted_ELBO
from tests.compiled.cases import VAE, baseline_pair, data, von_mises, von_mises_guide


def reference_steps(module, batches, make_optimizer, clip=None, ema=None, cast=False):
    loss, optimizer = Trace_ELBO(), make_optimizer(module.parameters())
    averages = [p.detach().clone() for p in module.parameters()]
    values = []
    for t, y in enumerate(batches, 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            values.append(value := loss.differentiable_loss(module.model, module.guide, y))
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        for a, p in zip(averages, module.parameters(), strict=True):
            a.lerp_(p.detach(), max(1 - (ema or 0.0), 9 / (9 + t)))
    return torch.stack(values).detach(), averages


RULES = [
    ({"optimizer": "adam", "lr": 1e-2}, lambda p: torch.optim.Adam(p, lr=1e-2)),
    (
        {"optimizer": "adam", "lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-4},
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-4),
    ),
    (
        {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    ),
    ({"optimizer": "adamw", "lr": 1e-2}, lambda p: torch.optim.AdamW(p, lr=1e-2)),
    ({"optimizer": "sgd", "lr": 1e-4}, lambda p: torch.optim.SGD(p, lr=1e-4)),
    (
        {"optimizer": "sgd", "lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
]


def check_step(options, make_optimizer, backend, clip=None, ema=None, tolerance=1e-9):
    pyro.set_rng_seed(3)
    module = VAE(norm=True)
    other = copy.deepcopy(module)
    batches = [data(8, 6, seed=i) for i in range(5)]
    pyro.set_rng_seed(4)
    expected, averages = reference_steps(other, batches, make_optimizer, clip, ema)
    pyro.clear_param_store()
    step = CompiledStep(
        Trace_ELBO(),
        module.model,
        module.guide,
        dict(module.named_parameters()),
        clip_norm=clip,
        ema=ema,
        backend=backend,
        **options,
    )
    pyro.set_rng_seed(4)
    found = torch.stack([step(y) for y in batches])
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    # The gradient of a bias before a BatchNorm is rounding alone, 1e-15, which Adam divides by eps = 1e-8.
    loose = 20 * tolerance
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=tolerance, atol=loose)
    if ema is not None:
        torch.testing.assert_close(list(step.averages.values()), averages, rtol=tolerance, atol=loose)
    assert (step.counters.compiled_calls, step.counters.eager_calls) == (5, 0)
    return step


@pytest.mark.parametrize("options, make_optimizer", RULES)
@pytest.mark.parametrize("clip, ema, most", [(None, None, 24), (0.5, 0.9, 24), (0.5, 0.9, 2)])
def test_step_is_torch_optim(options, make_optimizer, clip, ema, most, monkeypatch):
    monkeypatch.setattr("pyroelbo.compiled.step._MOST_INSIDE", most)
    check_step(options, make_optimizer, "eager", clip, ema)


@pytest.mark.parametrize(
    "options, make_optimizer", [RULES[1], *(pytest.param(*r, marks=pytest.mark.slow) for r in RULES[2:])]
)
def test_step_is_torch_optim_inductor(options, make_optimizer):
    assert check_step(options, make_optimizer, "inductor", 0.5, 0.9).counters.compiles == 1


def test_step_takes_schedules_without_retracing():
    module, y = VAE(), data(8, 6)
    objective = Weighted_ELBO(Trace_ELBO(), 0.0)
    step = CompiledStep(
        objective, module.model, module.guide, dict(module.named_parameters()), backend="eager"
    )
    losses = []
    for i in range(4):
        step.lr, objective.weight = 0.0, float(i)
        pyro.set_rng_seed(1)
        losses.append(step(y).item())
    steps = [b - a for a, b in itertools.pairwise(losses)]
    assert steps == pytest.approx([steps[0]] * 3)
    module.beta = 2.0
    pyro.set_rng_seed(1)
    assert losses[2] == pytest.approx(Trace_ELBO().loss(module.model, module.guide, y))
    assert step.counters.captures == 1
    assert (step.lr, objective.weight) == (0.0, 3.0)


def test_step_under_autocast():
    torch.set_default_dtype(torch.float32)
    batches = [data(8, 6, seed=i) for i in range(4)]

    def run(kind, cast):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module = VAE()
        parameters = dict(module.named_parameters())
        pyro.set_rng_seed(4)
        if kind == "reference":
            return reference_steps(module, batches, lambda p: torch.optim.Adam(p, lr=1e-2), cast=cast)[0]
        step = CompiledStep(Trace_ELBO(), module.model, module.guide, parameters, lr=1e-2, backend="eager")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            losses = torch.stack([step(y) for y in batches])
        assert (step.counters.compiled_calls, step.counters.fallbacks) == (4, 0)
        return losses

    expected = run("reference", True)
    torch.testing.assert_close(run("step", True), expected, rtol=1e-5, atol=0.0, check_dtype=False)
    assert float((run("step", False) - expected).abs().max()) > 1e-4  # the products were in bfloat16


def test_inductors_step_under_autocast_is_taken():
    """Rounded to bfloat16 in other places, gradients differ by a part in a hundred."""
    torch.set_default_dtype(torch.float32)
    module, y = VAE(width=64), data(64, 6)
    step = CompiledStep(
        Trace_ELBO(),
        module.model,
        module.guide,
        dict(module.named_parameters()),
        clip_norm=10.0,
        skip_norm=1e9,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [step(y).item() for _ in range(3)]
    assert step.counters.compiles == 1 and losses[-1] < losses[0] * 1.1


def test_step_names_a_python_number_that_always_changes():
    module, y = VAE(), data(8, 6)
    step = CompiledStep(
        Trace_ELBO(),
        module.model,
        module.guide,
        dict(module.named_parameters()),
        backend="eager",
        max_graphs=2,
    )
    with pytest.warns(CompileWarning, match="beta.*tensor"):
        for i in range(4):
            module.beta = 1 + i
            step(y)
    assert (step.counters.captures, step.counters.compiled_calls, step.counters.eager_calls) == (2, 2, 2)


def test_step_resumes_bit_for_bit():
    batches = [data(8, 6, seed=i) for i in range(6)]

    def start():
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module = VAE(norm=True, dropout=0.2)
        parameters = dict(module.named_parameters())
        return module, CompiledStep(
            Trace_ELBO(), module.model, module.guide, parameters, ema=0.9, clip_norm=1.0, backend="eager"
        )

    module, step = start()
    for y in batches[:3]:
        step(y)
    saved = {k: v.clone() for k, v in step.state_dict().items()}
    weights, rng = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    expected = [step(y) for y in batches[3:]]
    end = copy.deepcopy(module.state_dict())

    module, step = start()
    module.load_state_dict(weights)
    step.load_state_dict(saved)
    torch.set_rng_state(rng)
    assert all(torch.equal(step(y), value) for y, value in zip(batches[3:], expected, strict=True))
    assert all(torch.equal(value, end[name]) for name, value in module.state_dict().items())
    with pytest.raises(ValueError, match="exp_avg"):
        step.load_state_dict({k: v for k, v in saved.items() if not k.startswith("exp_avg.")})


def test_step_falls_back_with_the_same_update():
    def make(backend_loss):
        pyro.clear_param_store()
        loc = pyro.param("loc", torch.tensor(0.1))
        k = pyro.param("k", torch.tensor(1.0), constraint=constraints.positive)
        return {"loc": loc.unconstrained(), "k": k.unconstrained()}

    parameters = make(None)
    step = CompiledStep(Trace_ELBO(), von_mises, von_mises_guide, parameters, lr=1e-2, backend="eager")
    with pytest.warns(CompileWarning, match="angle"):
        for _ in range(5):
            step(torch.tensor(0.5))
    assert (step.counters.compiled_calls, step.counters.eager_calls) == (0, 5)
    assert step.state_dict()["step"] == 5
    assert parameters["loc"] != 0.1


def test_step_with_baselines():
    model, guide, _ = baseline_pair("average")

    def run(make_step):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        TraceGraph_ELBO().loss_and_grads(model, guide, data(4))
        parameters = {name: pyro.get_param_store()._params[name] for name in ("w", "logit")}
        for p in parameters.values():
            p.grad = None
        step = make_step(parameters)
        pyro.set_rng_seed(2)
        return torch.stack([torch.as_tensor(step(data(4, seed=i))) for i in range(5)]), dict(
            pyro.get_param_store()
        )

    def by_hand(parameters):
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)

        def step(y):
            optimizer.zero_grad()
            value = TraceGraph_ELBO().loss_and_grads(model, guide, y)
            optimizer.step()
            return value

        return step

    expected, end = run(by_hand)
    found, other = run(
        lambda p: CompiledStep(TraceGraph_ELBO(), model, guide, p, optimizer="sgd", lr=0.1, backend="eager")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, check_dtype=False)
    for name, value in end.items():
        assert float((other[name] - value).detach().norm()) < 1e-10, name


def doubled(p, note):
    p.register_hook(lambda g: note(g) or 2.0 * g)


def halved(p, note):
    def hook(p):
        note(p.grad)
        p.grad.mul_(0.5)

    p.register_post_accumulate_grad_hook(hook)


@pytest.mark.parametrize("register", [doubled, halved])
@pytest.mark.parametrize("when", [0, 2])
def test_gradient_hooks_fire_once_a_step(register, when):
    """Also those registered after a build, and on a parameter that the step does not train."""

    def run(make_step):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module, fired = VAE(), []
        trained = {n: p for n, p in module.named_parameters() if n != "encoder.0.bias"}
        step = make_step(module, trained)
        pyro.set_rng_seed(4)
        losses = []
        for i in range(5):
            if i == when:
                for p in (module.encoder[0].bias, module.decoder[0].weight):
                    register(p, lambda g, i=i: fired.append(float(g.norm())))
            losses.append(float(step(data(8, 6, seed=i))))
        assert not any(p.grad is not None for p in trained.values())
        return step, losses, sorted(fired), module.state_dict()

    def by_hand(module, trained):
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)

        def step(y):
            value = Trace_ELBO().loss_and_grads(module.model, module.guide, y)
            torch.nn.utils.clip_grad_norm_(trained.values(), 5.0)
            optimizer.step()
            module.zero_grad()
            return value

        return step

    _, expected, calls, end = run(by_hand)
    step, losses, found, state = run(
        lambda module, trained: CompiledStep(
            Trace_ELBO(),
            module.model,
            module.guide,
            trained,
            optimizer="sgd",
            lr=0.1,
            clip_norm=5.0,
            backend="eager",
        )
    )
    assert step.counters.compiled_calls == 5
    assert losses == pytest.approx(expected, rel=1e-9)
    assert len(found) == 2 * (5 - when) and found == pytest.approx(calls, rel=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-6, atol=1e-6)


def test_step_trains_only_what_it_was_given():
    module, y = VAE(), data(8, 6)
    decoder = copy.deepcopy(module.decoder.state_dict())
    step = CompiledStep(
        Trace_ELBO(), module.model, module.guide, dict(module.encoder.named_parameters()), backend="eager"
    )
    before = copy.deepcopy(module.encoder.state_dict())
    for _ in range(3):
        step(y)
    assert all(torch.equal(v, decoder[n]) for n, v in module.decoder.state_dict().items())
    assert all(not torch.equal(v, before[n]) for n, v in module.encoder.state_dict().items())


@pytest.mark.cuda
def test_cuda_step_agrees_with_eager():
    torch.set_default_dtype(torch.float32)
    module = VAE(norm=True).cuda()
    other = copy.deepcopy(module)
    batches = [data(8, 6, seed=i).cuda() for i in range(4)]
    pyro.set_rng_seed(4)
    expected, _ = reference_steps(other, batches, lambda p: torch.optim.Adam(p, lr=1e-2))
    pyro.clear_param_store()
    step = CompiledStep(Trace_ELBO(), module.model, module.guide, dict(module.named_parameters()), lr=1e-2)
    pyro.set_rng_seed(4)
    found = torch.stack([step(y) for y in batches])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    assert step.counters.compiled_calls == 4


@pytest.mark.parametrize("wrong", [0.0, 1e-3])
def test_a_gradient_that_is_only_rounding_does_not_refuse_a_build(wrong):
    """Adam divides it by itself, so two runs may move a parameter in opposite directions."""
    inputs = [torch.ones(4), torch.ones(4), torch.tensor(1e-2), *(torch.zeros(4) for _ in range(4))]

    def update(sign, error):
        def run(p, q, lr, mean_p, mean_q, square_p, square_q):
            gradients = sign * torch.full((4,), 1e-13), torch.arange(1.0, 5.0) * (1 + error)
            for x, g, mean, square in zip(
                (p, q), gradients, (mean_p, mean_q), (square_p, square_q), strict=True
            ):
                mean.lerp_(g, 0.1)
                square.mul_(0.999).addcmul_(g, g, value=0.001)
                x.sub_(lr * mean / (square.sqrt() + 1e-8))
            return [torch.tensor(3.0)]

        return run

    slots = [inputs[3:5], inputs[5:7]]
    check = step_module._SameStep(update(1, 0.0), inputs, 0, slots, ["p", "q"], ["p", "q"])
    if wrong:
        with pytest.raises(Mismatch, match="a moment of 'q'"):
            check(update(-1, wrong))
    else:
        check(update(-1, 0.0))
    assert torch.equal(inputs[5], torch.zeros(4))


@pytest.mark.slow
def test_a_step_with_batchnorm_in_float32_is_built():
    torch.set_default_dtype(torch.float32)
    module, y = VAE(norm=True, dropout=0.3), data(16, 6)
    step = CompiledStep(Trace_ELBO(), module.model, module.guide, dict(module.named_parameters()))
    for _ in range(3):
        step(y)
    assert (step.counters.compiles, step.counters.compiled_calls) == (1, 3)

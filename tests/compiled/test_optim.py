"""``FusedOptim`` is ``PyroOptim``, for all parameters at once."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroelbo.compiled import CompiledELBO, FusedOptim
from tests.compiled.cases import ADAM, VAE, data


@pytest.mark.parametrize("constructor", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_fused_optim_is_pyro_optim(constructor):
    def run(optimizer):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module = VAE()
        svi = SVI(module.model, module.guide, optimizer, Trace_ELBO())
        losses = [svi.step(data(8, 6, seed=i)) for i in range(5)]
        return torch.tensor(losses)

    torch.testing.assert_close(
        run(FusedOptim(constructor, {"lr": 1e-2}, {"clip_norm": 1.0})),
        run(pyro.optim.PyroOptim(constructor, {"lr": 1e-2}, {"clip_norm": 1.0})),
        rtol=1e-10,
        atol=0.0,
    )


def test_fused_optim_options_by_name():
    def options(name):
        return {"lr": 0.0 if "encoder" in name else 1e-2}

    module, y = VAE(), data(8, 6)
    before = copy.deepcopy(module.state_dict())
    svi = SVI(module.model, module.guide, FusedOptim(torch.optim.Adam, options), Trace_ELBO())
    for _ in range(3):
        svi.step(y)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) == ("encoder" in name)


@pytest.mark.parametrize("other", [FusedOptim, pyro.optim.PyroOptim])
def test_fused_optim_state_resumes(tmp_path, other):
    y = data(8, 6)

    def start(make):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module = VAE()
        optimizer = make(*ADAM)
        return module, optimizer, SVI(module.model, module.guide, optimizer, Trace_ELBO())

    module, optimizer, svi = start(FusedOptim)
    for _ in range(3):
        svi.step(y)
    saved, weights = optimizer.get_state(), copy.deepcopy(module.state_dict())
    optimizer.save(str(tmp_path / "optimizer.pt"))
    pyro.set_rng_seed(9)
    expected = [svi.step(y) for _ in range(3)]

    module, optimizer, svi = start(other)
    svi.step(y)
    module.load_state_dict(weights)
    if other is FusedOptim:
        optimizer.load(str(tmp_path / "optimizer.pt"))
    else:
        optimizer.optim_objs.clear()
        optimizer.set_state(saved)
    pyro.set_rng_seed(9)
    assert [svi.step(y) for _ in range(3)] == pytest.approx(expected, rel=1e-12)


def test_fused_optim_follows_replaced_parameters():
    optimizer = FusedOptim(*ADAM)
    module, y = VAE(), data(8, 6)
    svi = SVI(module.model, module.guide, optimizer, CompiledELBO(Trace_ELBO(), backend="eager"))
    for _ in range(3):
        svi.step(y)
    pyro.clear_param_store()
    fresh = VAE()
    module.encoder, module.decoder = fresh.encoder, fresh.decoder
    before = copy.deepcopy(module.state_dict())
    for _ in range(3):
        svi.step(y)
    assert all(not torch.equal(v, before[n]) for n, v in module.state_dict().items())


@pytest.mark.parametrize("constructor", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_without_a_gradient_are_pyros(constructor, compiled):
    """In the trace without a gradient: a zero one if there was one before. Absent or never trained: none."""
    options = {"lr": 1e-2} | ({"momentum": 0.9} if constructor is torch.optim.SGD else {})

    def run(optimizer, make_loss):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        module = VAE()
        captured = nn.Linear(6, 1)
        absent, never = nn.Linear(6, 1), nn.Linear(6, 1)

        def labelled(y):
            pyro.module("captured", captured)
            pyro.module("absent", absent)
            pyro.module("never", never)
            with pyro.plate("labels", len(y)):
                pyro.sample("x", dist.Normal((captured(y) + absent(y)).squeeze(-1), 1.0), obs=y[:, 0])

        def unlabelled(y):
            pyro.module("captured", captured)
            pyro.module("never", never)
            return module.model(y)

        def empty(y):
            pass

        first = SVI(labelled, empty, optimizer, make_loss())
        second = SVI(unlabelled, module.guide, optimizer, make_loss())
        for i in range(20):
            (first if i % 2 == 0 else second).step(data(8, 6, seed=i))
        return {n: v.detach().clone() for n, v in pyro.get_param_store()._params.items()}

    expected = run(pyro.optim.PyroOptim(constructor, options), Trace_ELBO)
    make_loss = (lambda: CompiledELBO(Trace_ELBO(), backend="eager")) if compiled else Trace_ELBO
    found = run(FusedOptim(constructor, options), make_loss)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("constructor", [torch.optim.Adam, torch.optim.SGD])
def test_parameters_that_come_back_go_on_with_their_state(constructor):
    options = {"lr": 1e-2} | ({"momentum": 0.9} if constructor is torch.optim.SGD else {})

    def model(y):
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.3)), scale), obs=y)

    def run(optimizer):
        pyro.clear_param_store()
        svi = SVI(model, lambda y: None, optimizer, Trace_ELBO())
        store, y = pyro.get_param_store(), torch.tensor(1.0)
        losses = [svi.step(y) for _ in range(3)]
        with store.scope() as other:
            losses += [svi.step(y) for _ in range(3)]
        losses += [svi.step(y) for _ in range(3)]
        with store.scope(other):
            losses += [svi.step(y) for _ in range(3)]
        return losses

    expected = run(pyro.optim.PyroOptim(constructor, options))
    assert run(FusedOptim(constructor, options)) == pytest.approx(expected, rel=1e-12)


def test_a_program_without_parameters_steps():
    def program(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    optimizer = FusedOptim(torch.optim.Adam, {"lr": 1e-2})
    svi = SVI(program, program, optimizer, CompiledELBO(Trace_ELBO(), backend="eager"))
    assert [svi.step(data(3)) for _ in range(3)] == [0.0] * 3

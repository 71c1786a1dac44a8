"""Generated programs, whose Python values change between calls, follow eager over 30 calls."""

import argparse
import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

from pyroelbo.compiled import CompileWarning
from tests.compiled.cases import follow

CALLS = 30


class World(nn.Module):
    """What a program can see, and the ways in which it changes between two calls."""

    def __init__(self, rng):
        super().__init__()
        self.rng = rng
        self.a, self.n, self.flag = rng.uniform(0.5, 1.5), rng.randint(1, 3), rng.random() < 0.5
        self.items = [rng.uniform(0.5, 1.5) for _ in range(3)]
        self.options = {"b": rng.uniform(0.5, 1.5), "nested": {"c": 1.0}}
        self.array = np.linspace(0.5, 1.0, 3)
        self.buffer = torch.linspace(0.5, 1.5, 3)
        norm = [nn.BatchNorm1d(1)] if rng.random() < 0.5 else []
        self.net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.3), nn.Tanh(), nn.Linear(3, 1), *norm)
        self.settings = argparse.Namespace(level=rng.uniform(0.5, 1.5))
        self.generator = torch.Generator()
        self.hook = None
        self.period = rng.choice([1, 2, 3, 5, 8])
        self.changes = rng.sample(list(CHANGES), rng.randint(0, 3))

    def change(self, i):
        if i and i % self.period == 0:
            for name in self.changes:
                CHANGES[name](self, i)

    def seed(self, i):
        pyro.set_rng_seed(i)
        self.generator.manual_seed(i)


def _hook(world, i):
    if world.hook is None:
        world.hook = world.net[0].weight.register_hook(lambda g: (1.0 + 0.1 * i) * g)
    else:
        world.hook.remove()
        world.hook = None


CHANGES = {
    "float": lambda w, i: setattr(w, "a", 0.5 + 0.01 * i),
    "warm-up": lambda w, i: setattr(w, "a", min(1.0, 0.1 * i)),
    "back and forth": lambda w, i: setattr(w, "a", [0.7, 1.3][i % 2]),
    "integer": lambda w, i: setattr(w, "n", 1 + i % 3),
    "flag": lambda w, i: setattr(w, "flag", not w.flag),
    "item": lambda w, i: w.items.__setitem__(i % 3, 0.5 + 0.01 * i),
    "more items": lambda w, i: w.items.append(0.9),
    "option": lambda w, i: w.options.update(b=w.rng.uniform(0.5, 1.5)),
    "nested": lambda w, i: w.options["nested"].update(c=1.0 + 0.1 * (i % 4)),
    "array": lambda w, i: w.array.__setitem__(1, 0.5 + 0.01 * i),
    "tensor in place": lambda w, i: w.buffer.mul_(1.01),
    "tensor replaced": lambda w, i: setattr(w, "buffer", w.buffer + 0.01),
    "mode": lambda w, i: w.train(not w.training),
    "module replaced": lambda w, i: w.net.__setitem__(2, nn.ReLU() if i % 2 else nn.Tanh()),
    "frozen": lambda w, i: w.net[0].weight.requires_grad_(i % 2 == 0),
    "kind of number": lambda w, i: setattr(w, "a", 1 if i % 2 else 1.0),
    "namespace": lambda w, i: setattr(w.settings, "level", 0.5 + 0.1 * (i % 3)),
    "hook": _hook,
}

# Numbers and 0-dim tensors that a program makes of the world w, an argument t (0-dim tensor) and a float s.
VALUES = {
    "attribute": lambda w, t, s: w.a,
    "argument": lambda w, t, s: s,
    "tensor argument": lambda w, t, s: t,
    "tensor of tensors": lambda w, t, s: torch.tensor([t, t * t])[1],
    "tensor of both": lambda w, t, s: torch.tensor([t, w.a, s]).sum() / 3,
    "as_tensor": lambda w, t, s: torch.as_tensor([w.buffer[0], t])[0],
    "item": lambda w, t, s: t.item(),
    "branch on a tensor": lambda w, t, s: w.a if t > 1.0 else 0.8,
    "branch on a float": lambda w, t, s: 0.9 if s > 1.0 else w.a * s,
    "branch on a flag": lambda w, t, s: w.a if w.flag else 1.2,
    "integer": lambda w, t, s: w.n,
    "loop": lambda w, t, s: sum(0.3 * w.a for _ in range(w.n)),
    "list": lambda w, t, s: sum(w.items) / len(w.items),
    "dict": lambda w, t, s: w.options["b"] * w.options["nested"]["c"],
    "array": lambda w, t, s: float(w.array[1]),
    "array as tensor": lambda w, t, s: torch.as_tensor(w.array)[1].to(torch.get_default_dtype()),
    "buffer": lambda w, t, s: w.buffer[w.n - 1],
    "rounded": lambda w, t, s: round(w.a, 1),
    "min": lambda w, t, s: min(1.0, w.a + 0.2 * s),
    "full": lambda w, t, s: torch.full((), w.a) * t,
    "one-hot": lambda w, t, s: (F.one_hot(torch.tensor(w.n - 1), 3) * w.buffer).sum(),
    "longest": lambda w, t, s: 1.0 / (1 + int((t * torch.ones(2)).max())),
    "loop to a tensor": lambda w, t, s: sum(0.6 for _ in range(int(t.ceil()))),
    "numpy": lambda w, t, s: float(np.asarray(t)) * 0.9,
    "namespace": lambda w, t, s: w.settings.level,
    "parameter": lambda w, t, s: pyro.param("extra", torch.tensor(0.5)).exp() if w.flag else 0.4,
}

# Draws from other generators, which stay eager.
OUTSIDE = {
    "random": lambda w, t, s: 0.5 + random.random(),
    "numpy.random": lambda w, t, s: 0.5 + np.random.rand(),
    "generator": lambda w, t, s: 0.5 + torch.rand((), generator=w.generator),
}


def program(seed):
    """Model, guide, calls, the world, and the loss of a seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    world = World(rng)
    use = [VALUES[rng.choice(list(VALUES))] for _ in range(6)]
    if rng.random() < 0.1:
        use[rng.randrange(6)] = OUTSIDE[rng.choice(list(OUTSIDE))]
    kinds = [rng.choice(["normal", "gamma", "lognormal", "bernoulli"]) for _ in range(rng.randint(1, 3))]
    make_loss = rng.choice([Trace_ELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO])
    if make_loss is TraceMeanField_ELBO:
        kinds = ["normal" if kind == "bernoulli" else kind for kind in kinds]
    size, subsample = rng.choice([4, 5]), rng.choice([None, None, 3])
    outer = rng.random() < 0.3
    floats = rng.choice([lambda i: 1.1, lambda i: 0.7 + 0.02 * i, lambda i: 0.8 + 0.4 * (i // 10)])
    tensors = rng.choice([lambda i: 1.0, lambda i: 0.8 + 0.02 * i, lambda i: [0.9, 1.2][i // 7 % 2]])
    network = rng.random() < 0.4

    def plate():
        return pyro.plate("data", size, subsample_size=subsample, dim=-1)

    def prior(kind, x):
        return {
            "normal": lambda: dist.Normal(x, 1.0),
            "gamma": lambda: dist.Gamma(2.0 + x.tanh(), 1.5),
            "lognormal": lambda: dist.LogNormal(x.tanh(), 0.7),
            "bernoulli": lambda: dist.Bernoulli(logits=x.tanh()),
        }[kind]()

    def posterior(name, kind, index):
        def p(suffix, value, constraint=constraints.positive):
            return pyro.param(f"{name}_{suffix}", lambda: torch.full((size,), value), constraint=constraint)[
                index
            ]

        if kind == "gamma":
            return dist.Gamma(p("a", 1.7), p("b", 1.9))
        if kind == "bernoulli":
            return dist.Bernoulli(logits=p("logit", 0.2, constraints.real))
        family = dist.Normal if kind == "normal" else dist.LogNormal
        return family(p("loc", 0.1, constraints.real), p("scale", 0.6))

    def model(y, t, s, settings):
        pyro.module("net", world.net)
        x = torch.zeros(())
        if outer:
            x = pyro.sample("g", dist.Normal(0.0, 1.0 + use[0](world, t, s)))
        with plate() as index, pyro.poutine.scale(scale=use[1](world, t, s)):
            for k, kind in enumerate(kinds):
                z = pyro.sample(f"z{k}", prior(kind, x + 0.1 * use[2](world, t, s)))
                x = 0.5 * z + 0.1 * use[3](world, t, s)
            if network:
                x = x + world.net(torch.stack([x, y[index]], -1)).squeeze(-1)
            pyro.sample("y", dist.Normal(x * use[4](world, t, s), 1.0), obs=y[index])

    def guide(y, t, s, settings):
        if outer:
            pyro.sample("g", dist.Normal(pyro.param("g_loc", torch.tensor(0.1)), 0.5))
        with plate() as index:
            for k, kind in enumerate(kinds):
                with pyro.poutine.scale(scale=use[5](world, t, s)):
                    pyro.sample(f"z{k}", posterior(f"z{k}", kind, index))

    calls = [(torch.randn(size), torch.tensor(tensors(i)), floats(i), world.settings) for i in range(CALLS)]
    return model, guide, calls, world, make_loss


def check(seed):
    model, guide, calls, world, make_loss = program(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        warnings.filterwarnings(
            "ignore", message=".*(copy construct|enumerate|max_plate_nesting|not registered).*"
        )
        loss = follow(
            model,
            guide,
            calls,
            make_loss,
            rel=1e-8,
            before=world.change,
            seed=world.seed,
            module=world.net,
        )
    pyro.clear_param_store()
    return loss


@pytest.mark.parametrize("seed", range(3))
def test_generated_programs_are_never_stale(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_two_thousand_generated_programs_are_never_stale(block):
    losses = [check(100 * block + k) for k in range(100)]
    compiled = [loss for loss in losses if loss.counters.compiled_calls > 0]
    assert len(compiled) >= 60  # most programs run compiled for part of their calls


def test_the_generator_covers_its_parts():
    """A change that no seed of the slow test makes would be untested."""
    changes = {name for seed in range(200) for name in World(random.Random(seed)).changes}
    assert changes == set(CHANGES)

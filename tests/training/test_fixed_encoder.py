"""Prior and generator trained against a frozen encoder: what is frozen stays, and the optimum is reached."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

from pyroelbo import Pair, evidence, fit
from pyroelbo.compiled import CompiledELBO, FusedOptim

POPULATION = (8, 4, 2, 1, 1)  # rows of each symbol


class Table(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape))


class Tables(Pair):
    """y of five symbols, z of four codes: every distribution is a table, so all families are universal."""

    def __init__(self, codes=4):
        super().__init__()
        self.prior, self.generator = Table(codes), Table(codes, len(POPULATION))
        self.encoder = Table(len(POPULATION), codes)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior.logits))
            pyro.sample("y", dist.Categorical(logits=self.generator.logits[z]), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            q = dist.Categorical(logits=self.encoder.logits[y])
            pyro.sample("z", q, infer={"enumerate": "parallel"})


def population():
    return torch.repeat_interleave(torch.arange(len(POPULATION)), torch.tensor(POPULATION))


@torch.no_grad()
def loss(pair):
    """E_Pop E_q [-ln p(z) p(y | z) + ln q(z | y)], by plain sums."""
    total, size = 0.0, sum(POPULATION)
    for y, count in enumerate(POPULATION):
        q = pair.encoder.logits[y].softmax(-1)
        for z in range(len(q)):
            if float(q[z]) > 0:
                joint = pair.prior.logits.log_softmax(-1)[z] + pair.generator.logits[z].log_softmax(-1)[y]
                total += count / size * float(q[z] * (q[z].log() - joint))
    return total


ENTROPY = -sum(n / sum(POPULATION) * math.log(n / sum(POPULATION)) for n in POPULATION)
ENCODERS = {
    "any": lambda: torch.randn(5, 4),
    "of nothing": lambda: torch.zeros(5, 4),
    "nearly of everything": lambda: 4 * torch.eye(5)[:, :4],
}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_cross_entropy_falls_to_the_entropy_for_any_encoder(name):
    torch.manual_seed(0)
    pair = Tables()
    with torch.no_grad():
        pair.encoder.logits.copy_(ENCODERS[name]())
    before = pair.encoder.logits.detach().clone()
    by_name = name == "any"
    pair.encoder.requires_grad_(by_name)
    assert loss(pair) > ENTROPY + 0.1
    fit(
        pair,
        population(),
        objective="enum",
        epochs=250,
        batch_size=16,
        learning_rate=0.3,
        schedule="cosine",
        freeze=("encoder",) if by_name else (),
        progress=False,
    )
    assert torch.equal(pair.encoder.logits, before)
    assert ENTROPY - 1e-12 < loss(pair) < ENTROPY + 1e-4
    joint = pair.prior.logits.softmax(-1)[:, None] * pair.generator.logits.softmax(-1)
    pop = torch.tensor(POPULATION) / sum(POPULATION)
    # a divergence below 1e-4 keeps the total variation below its root (Pinsker)
    assert (joint.T - pop[:, None] * before.softmax(-1)).abs().sum() / 2 < math.sqrt(1e-4 / 2)
    exact = evidence.exact(pair, torch.arange(5)).value.exp()
    torch.testing.assert_close(exact, joint.sum(0).detach())
    assert (exact - pop).abs().max() < math.sqrt(1e-4 / 2)


def test_the_optimum_in_closed_form_for_a_deterministic_encoder():
    pair = Tables()
    codes = torch.tensor([0, 1, 1, 2, 0])
    pop = torch.tensor(POPULATION) / sum(POPULATION)
    joint = pop[:, None] * torch.eye(4)[codes]
    with torch.no_grad():
        pair.encoder.logits.copy_(torch.eye(4)[codes].log())
        pair.prior.logits.copy_(joint.sum(0).log())
        pair.generator.logits.copy_((joint / joint.sum(0).clamp(min=1e-300)).T.log())
        pair.generator.logits[3] = 0.0  # a code that never occurs
    assert loss(pair) == pytest.approx(ENTROPY, abs=1e-12)


class Frozen(Pair):
    """A VAE with one parameter of the pair itself, and one of a nested PyroModule."""

    def __init__(self):
        super().__init__()
        self.generator, self.encoder = nn.Linear(2, 4), nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.zeros(2))
        self.inner = PyroModule("inner")
        self.inner.shift = nn.Parameter(torch.zeros(2))

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.generator(z), 0.5).to_event(1), obs=y)

    def guide(self, y):
        loc, log_scale = self.encoder(y).chunk(2, -1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc + self.shift + self.inner.shift, log_scale.exp()).to_event(1))


def svi(optimizer, loss):
    def train(pair, y):
        with warnings.catch_warnings():  # Pyro remarks on every frozen parameter of a plain module
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            steps = SVI(pair.model, pair.guide, optimizer(), loss())
            for _ in range(3):
                steps.step(y)

    return train


TRAINERS = {
    "fit": lambda pair, y: fit(pair, y, epochs=2, progress=False),
    "fit, decay": lambda pair, y: fit(pair, y, epochs=2, optimizer="adamw", ema=0.9, progress=False),
    "fit, iwae": lambda pair, y: fit(pair, y, epochs=2, objective="dreg", particles=2, progress=False),
    "svi": svi(lambda: pyro.optim.Adam({"lr": 0.01}), Trace_ELBO),
    "fused": svi(lambda: FusedOptim(torch.optim.AdamW, {"lr": 0.01}), Trace_ELBO),
}
COMPILED = {
    "fit": lambda pair, y: fit(pair, y, epochs=2, compile=True, progress=False),
    "drop-ins": svi(
        lambda: FusedOptim(torch.optim.Adam, {"lr": 0.01}),
        lambda: CompiledELBO(Trace_ELBO(), backend="eager"),
    ),
}


def check(train, nested):
    torch.manual_seed(0)
    pair, y = Frozen(), torch.randn(32, 4)
    held = [*pair.encoder.parameters(), pair.shift, *([pair.inner.shift] if nested else [])]
    for p in held:
        p.requires_grad_(False)
    before = [p.clone() for p in held]
    free = [p for p in pair.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in free]
    train(pair, y)
    assert not any(p.requires_grad for p in held)
    assert all(torch.equal(p, q) for p, q in zip(held, before, strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(free, start, strict=True))


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_frozen_stays(name):
    # SVI alone runs nested PyroModules as Pyro does, which thaws their own parameters
    check(TRAINERS[name], nested=name.startswith("fit"))


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_what_is_frozen_stays_in_compiled_steps(name):
    check(COMPILED[name], nested=name == "fit")

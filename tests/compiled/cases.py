"""Models, guides and comparisons shared by the tests of compiled losses."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroelbo.compiled import CompiledELBO, FusedOptim

SGD = (torch.optim.SGD, {"lr": 1e-3})


ADAM = (torch.optim.Adam, {"lr": 1e-2})


class VAE(nn.Module):
    def __init__(self, dims=6, width=5, latent=2, norm=False, dropout=0.0):
        super().__init__()
        extra = [nn.BatchNorm1d(width)] if norm else []
        extra += [nn.Dropout(dropout)] if dropout else []
        self.encoder = nn.Sequential(nn.Linear(dims, width), *extra, nn.Tanh(), nn.Linear(width, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.Tanh(), nn.Linear(width, dims))
        self.latent = latent
        self.beta = 1.0

    def model(self, y):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", y.shape[0]):
            with pyro.poutine.scale(scale=self.beta):
                z = pyro.sample("z", dist.Normal(y.new_zeros(y.shape[0], self.latent), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=y)

    def guide(self, y):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", y.shape[0]):
            loc, log_scale = self.encoder(y).chunk(2, -1)
            with pyro.poutine.scale(scale=self.beta):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def train(loss, make, batches, optimizer=ADAM, before=None):
    """Losses, parameters and buffers after one SVI step a batch, from fixed seeds."""
    pyro.clear_param_store()
    pyro.set_rng_seed(3)
    model, guide, module = make()
    svi = SVI(model, guide, FusedOptim(*optimizer), loss)
    pyro.set_rng_seed(4)
    losses = []
    for i, batch in enumerate(batches):
        if before is not None:
            before(i, module)
        losses.append(svi.step(*batch))
    store = pyro.get_param_store()
    end = {name: value.detach().clone() for name, value in store._params.items()}
    if module is not None:
        end.update({f"buffer {name}": b.clone() for name, b in module.named_buffers()})
    end["losses"] = torch.tensor(losses)
    return end


def agree(make_loss, make, batches, *, backend="eager", compiled=None, tolerance=1e-9, **options):
    """Compiled training ends where eager training ends, and was compiled."""
    eager = train(make_loss(), make, batches, **options)
    loss = CompiledELBO(make_loss(), backend=backend)
    fast = train(loss, make, batches, **options)
    assert loss.counters.fallbacks == 0, loss.counters.reasons
    assert loss.counters.compiled_calls == (len(batches) - 1 if compiled is None else compiled), loss.counters
    assert fast.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(
            fast[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    return loss


def vae(**options):
    def make():
        module = VAE(**options)
        return module.model, module.guide, module

    return make


def data(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def baseline_pair(kind):
    network = nn.Linear(2, 1) if kind == "network" else None

    def model(y):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.4)))
            pyro.sample("y", dist.Normal(pyro.param("w", torch.tensor(0.5)) * z, 1.0), obs=y)

    def guide(y):
        options = {}
        if kind == "average":
            options = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}}
        elif kind == "network":
            pyro.module("network", network)
            x = torch.stack([y, y * y], -1)
            options = {"baseline": {"nn_baseline": lambda x: network(x).squeeze(-1), "nn_baseline_input": x}}
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.zeros(4))), infer=options)

    return model, guide, None


def mixture(y):
    weights = pyro.param("weights", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    loc = pyro.param("mixture_loc", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def von_mises(y):
    a = pyro.sample("angle", dist.VonMises(torch.tensor(0.1), torch.tensor(2.0)))
    pyro.sample("y", dist.Normal(a, 1.0), obs=y)


def von_mises_guide(y):
    loc = pyro.param("loc", torch.tensor(0.1))
    pyro.sample(
        "angle", dist.VonMises(loc, pyro.param("k", torch.tensor(1.0), constraint=constraints.positive))
    )


def normal_guide(y):
    pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


def follow(
    model,
    guide,
    calls,
    make_loss=Trace_ELBO,
    kind="loss_and_grads",
    rel=1e-10,
    before=None,
    seed=pyro.set_rng_seed,
    module=None,
):
    """Every call of a compiled loss gives eager's value, gradients and buffers of ``module``.

    ``before(i)`` changes the world first; ``seed(i)`` goes before each of the two evaluations. Returns the
    compiled loss, for its counters.
    """
    eager, loss = make_loss(), CompiledELBO(make_loss(), backend="eager")
    buffers = {} if module is None else dict(module.named_buffers())
    params = pyro.get_param_store()._params
    for i, args in enumerate(calls):
        if before is not None:
            before(i)
        results = []
        saved = {name: b.clone() for name, b in buffers.items()}
        for one in (eager, loss):
            for p in params.values():
                p.grad = None
            for name, b in buffers.items():
                b.copy_(saved[name])
            seed(i)
            value = getattr(one, kind)(model, guide, *args)
            gradients = {n: p.grad for n, p in params.items() if p.grad is not None}
            after = {name: b.clone() for name, b in buffers.items()}
            results.append((torch.as_tensor(value, dtype=torch.float64), gradients, after))
        torch.testing.assert_close(
            results[1], results[0], rtol=rel, atol=rel, msg=lambda m, i=i: f"call {i}: {m}"
        )
    return loss


def nothing(*args):
    pass

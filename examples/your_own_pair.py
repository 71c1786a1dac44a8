"""Your own Pyro model and guide, trained by Pyro's SVI and audited: counts with a hidden, datum-wise rate."""

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO

from pyroelbo import Pair, audit


def model(y):
    rate = pyro.param("rate", torch.tensor(0.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Poisson((rate + z).exp()), obs=y)


def guide(y):
    slope = pyro.param("slope", torch.tensor(0.0))
    shift = pyro.param("shift", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(shift + slope * y.log1p(), scale))


def main(steps=1000):
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    y = dist.Poisson((0.5 + torch.randn(200)).exp()).sample()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(y)
    result = audit(Pair.of(model, guide), y)  # the latent has one dimension, so quadrature gives the evidence
    print(result)
    return result


if __name__ == "__main__":
    main()

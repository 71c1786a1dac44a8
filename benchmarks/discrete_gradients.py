"""Which estimator of a discrete guide's gradient, at what cost?

A sigmoid belief net of 8 binary latents under a free guide, one datum, weights from a seed: the bias of each
estimator against the enumerated gradient (in standard errors of the mean, the largest coordinate), the
variance summed over coordinates, the milliseconds of loss and gradient (processor time, median), and the
variance at equal cost (variance times milliseconds) relative to the score function. The second table has six
latents of four values.

    python -m benchmarks.discrete_gradients [--draws 20000] [--seed 0]
"""

import argparse
import itertools
import json
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroelbo import Pair
from pyroelbo.objectives import ESTIMATORS, Discrete_ELBO


class BeliefNet(Pair):
    """Bernoulli (or four-valued) latents, Bernoulli pixels given a linear map of them, a free guide."""

    def __init__(self, latent: int, dims: int, values: int = 2):
        super().__init__()
        self.latent, self.values = latent, values
        self.generator = nn.Linear(latent * (1 if values == 2 else values), dims)
        nn.init.normal_(self.generator.weight)
        self.encoder = nn.Parameter(torch.randn(latent) if values == 2 else torch.randn(latent, values))
        self.baseline_value = nn.Parameter(torch.zeros(()))

    def site(self, logits):
        if self.values == 2:
            return dist.Bernoulli(logits=logits).to_event(1)
        return dist.OneHotCategorical(logits=logits).to_event(1)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.site(torch.zeros_like(self.encoder)))
            z = z if self.values == 2 else z.flatten(-2)
            pyro.sample("y", dist.Bernoulli(logits=self.generator(z)).to_event(1), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", self.site(self.encoder))

    def baseline(self, y):
        return self.baseline_value.expand(len(y))

    def exact_gradient(self, y):
        """Of minus the ELBO by the sum over all values of the latents."""
        one = torch.eye(self.values)
        codes = torch.tensor(list(itertools.product(range(self.values), repeat=self.latent)))
        z = codes.to(y.dtype) if self.values == 2 else one[codes]
        log_q = self.site(self.encoder).log_prob(z)
        prior = self.site(torch.zeros_like(self.encoder)).log_prob(z)
        flat = z if self.values == 2 else z.flatten(-2)
        seen = dist.Bernoulli(logits=self.generator(flat)).log_prob(y[0]).sum(-1)
        return torch.autograd.grad(-(log_q.exp() * (seen + prior - log_q)).sum(), self.encoder)[0]


def measure(pair: BeliefNet, name: str, particles: int, draws: int) -> dict[str, float]:
    objective = Discrete_ELBO(name, particles)
    y = pair.datum
    if name == "baseline":  # a constant, at its best value
        with torch.no_grad():
            value = -objective.differentiable_loss(pair.model, pair.guide, y.expand(4000, -1)) / 4000
            pair.baseline_value.copy_(value)
    found, times = [], []
    for _ in range(draws):
        start = time.process_time()
        loss = objective.differentiable_loss(pair.model, pair.guide, y)
        found.append(torch.autograd.grad(loss, pair.encoder)[0].reshape(-1))
        times.append(time.process_time() - start)
    slopes = torch.stack(found)
    z = (slopes.mean(0) - pair.exact_gradient(y).reshape(-1)) / (slopes.std(0) / draws**0.5)
    return {
        "bias_in_standard_errors": float(z.abs().max()),
        "variance": float(slopes.var(0).sum()),
        "milliseconds": statistics.median(times) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, default=20000, help="gradients a row")
    parser.add_argument("--particles", type=int, default=2, help="draws K a gradient")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    record: dict[str, dict[str, dict[str, float]]] = {}
    for form, latent, values in (("8 binary latents", 8, 2), ("6 latents of 4 values", 6, 4)):
        torch.manual_seed(options.seed)
        pair = BeliefNet(latent, 20, values)
        pair.datum = torch.bernoulli(torch.full((1, 20), 0.5))
        print(f"\n{form}, K = {options.particles}, {options.draws} gradients, seed {options.seed}")
        print("| estimator | bias, s.e. (max) | variance | ms | variance × ms, score function = 1 |")
        print("|---|---|---|---|---|")
        rows = record[form] = {}
        for name, estimator in ESTIMATORS.items():
            families = estimator.families
            kind = "Bernoulli" if values == 2 else "OneHotCategorical"
            if name in ("enumerate", "vimco") or (families is not None and kind not in families):
                continue  # enumeration takes single values, VIMCO is another bound's gradient
            row = rows[name] = measure(pair, name, options.particles, options.draws)
            first = rows["score_function"]
            cost = row["variance"] * row["milliseconds"] / (first["variance"] * first["milliseconds"])
            told = f"{row['bias_in_standard_errors']:.1f} | {row['variance']:.3g} | {row['milliseconds']:.2f}"
            print(f"| {name} | {told} | {cost:.3g} |", flush=True)
    print(json.dumps({"benchmark": "discrete_gradients", **vars(options), "rows": record}))


if __name__ == "__main__":
    main()

"""How does the error of an estimate of ln p(y) grow with the number of latent dimensions?

Probabilistic PCA of L latent and 2 L observed dimensions, whose evidence is known: plain Monte Carlo from the
prior, importance sampling with the best diagonal guide (the posterior's mean, scales 1 / sqrt of its
precision's diagonal), and annealed importance sampling from the prior and from that guide, all at the same
number of model evaluations a datum (a gradient counts as three, the pilot run included). Error: mean of ln
p(y) - estimate over data drawn from the model, in nats, with its standard error over them.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.dimension [--budget 30000] [--data 20] [--out
    runs/dimension.png]
"""

import argparse
import json
import math
from pathlib import Path

import pyro
import torch

from pyroelbo import evidence
from pyroelbo.models import PPCA

LEAPFROG, PARTICLES, PILOT = 5, 8, 8


def pair_of(latent):
    """A pPCA with the best diagonal guide."""
    pair = PPCA(2 * latent, latent, guide="mean_field")
    with torch.no_grad():
        g, zero = pair.generator, torch.zeros(1, pair.dims)
        g.log_scale.fill_(math.log(0.5))
        offset = pair.posterior(zero).mean[0]
        slope = pair.posterior(torch.eye(pair.dims)).mean - offset
        pair.encoder.weight.copy_(slope.T)
        pair.encoder.bias.copy_(offset)
        precision = torch.linalg.inv(pair.posterior(zero).covariance_matrix[0])
        pair.encoder.log_scale.copy_(-0.5 * precision.diagonal().log())
    return pair


def temperatures(budget):
    return max(2, round(budget / (3 * LEAPFROG * (PARTICLES + PILOT))))


def rows(latents, budget, data, seed):
    steps = temperatures(budget)
    runs = {
        "prior sampling": lambda p, y: evidence.prior_monte_carlo(p, y, budget),
        "importance sampling": lambda p, y: evidence.iwae(p, y, budget),
        "AIS from the prior": lambda p, y: evidence.ais(
            p, y, steps, PARTICLES, leapfrog=LEAPFROG, start="prior", progress=False
        ),
        "AIS from the guide": lambda p, y: evidence.ais(
            p, y, steps, PARTICLES, leapfrog=LEAPFROG, progress=False
        ),
    }
    for latent in latents:
        pyro.set_rng_seed(seed)
        pair = pair_of(latent)
        _, y = pair.simulate(data)
        exact = evidence.exact(pair, y).value
        for name, run in runs.items():
            bound = run(pair, y)
            error = exact - bound.value
            yield {
                "latent": latent,
                "estimator": name,
                "error": float(error.mean()),
                "stderr": float(error.std() / math.sqrt(data)),
                "cost": bound.cost / data,
            }


def figure(found, path):
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = canvas.subplots()
    for name in dict.fromkeys(r["estimator"] for r in found):
        mine = [r for r in found if r["estimator"] == name]
        x = [r["latent"] for r in mine]
        error, spread = (torch.tensor([r[key] for r in mine]) for key in ("error", "stderr"))
        (line,) = axes.plot(x, error, marker="o", label=name)
        axes.fill_between(x, error - 2 * spread, error + 2 * spread, alpha=0.2, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=0.1)  # Monte Carlo errors of either sign around zero
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks([r["latent"] for r in found if r["estimator"] == found[0]["estimator"]])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("latent dimensions")
    axes.set_ylabel("ln p(y) - estimate, nats a datum")
    axes.set_title(f"{found[0]['cost']:,.0f} model evaluations a datum")
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latents", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--budget", type=int, default=30_000)
    parser.add_argument("--data", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/dimension.png")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    found = []
    print("| latent dimensions | estimator | error, nats | ± | evaluations |\n|---|---|---|---|---|")
    for r in rows(options.latents, options.budget, options.data, options.seed):
        found.append(r)
        print(
            f"| {r['latent']} | {r['estimator']} | {r['error']:.4f} | {r['stderr']:.4f} | {r['cost']:,.0f} |",
            flush=True,
        )
    figure(found, options.out)
    print(json.dumps({"benchmark": "dimension", "seed": options.seed, "rows": found}))


if __name__ == "__main__":
    main()

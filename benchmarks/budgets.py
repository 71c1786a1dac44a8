"""AIS or importance sampling: which bound is tighter for the same number of model evaluations, and how fast
is AIS?

A VAE with 50 latents (binary 8 × 8 digits, or binarized MNIST with --data-dir) is trained by `fit`; then, on
test data at three equal budgets of model evaluations a datum (a gradient counts as three, AIS's pilot run
included): the importance-weighted bound, and AIS from the guide. `--sandwich` bounds the evidence of
simulated data from both sides. `--speed` compares leapfrog steps a second with Hamiltonian Monte Carlo
written by hand for the same decoder, and shows how AIS's time grows with temperatures and particles.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.budgets [--sandwich] [--speed] [--data-dir DIR] [--epochs 100]
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import numpy as np
import pyro
import torch
import torch.nn.functional as F

from pyroelbo import evidence, fit
from pyroelbo.models import VAE

LEAPFROG = 5


def digits(folder):
    """Training and test data, binary, [N, D], and the shape of a hidden layer."""
    if folder is None:
        from sklearn.datasets import load_digits

        x = torch.from_numpy(load_digits().data > 7.5).to(torch.get_default_dtype())
        x = x[torch.from_numpy(np.random.default_rng(0).permutation(len(x)))]
        return x[:1500], x[1500:]
    with np.load(Path(folder) / "binarized_mnist.npz") as found:
        train, test = (np.unpackbits(found[k], axis=1)[:, :784] for k in ("train", "test"))
    # the test split is sorted by class
    test = test[np.random.default_rng(0).permutation(len(test))]
    return torch.from_numpy(train).float(), torch.from_numpy(test).float()


def compare(pair, y, budgets, particles):
    """Both bounds at each budget of evaluations a datum."""
    for budget in budgets:
        steps = max(2, round(budget / (3 * LEAPFROG * (particles + 8))))
        for run in (
            lambda budget=budget: evidence.iwae(pair, y, budget),
            lambda steps=steps: evidence.ais(pair, y, steps, particles, leapfrog=LEAPFROG, progress=False),
        ):
            began = time.perf_counter()
            bound = run()
            k_hat = bound.k_hat.nanmedian() if bound.k_hat is not None else math.nan
            yield (
                {
                    "budget": budget,
                    "method": bound.method,
                    "mean": bound.mean,
                    "stderr": float(bound.value.double().std() / math.sqrt(len(y))),
                    "monte_carlo_error": bound.mean_error,
                    "cost": bound.cost / len(y),
                    "k_hat": float(k_hat),
                    "ess": float(bound.ess.mean()),
                    "seconds": time.perf_counter() - began,
                },
                bound.value,
            )


def by_hand(pair, y, particles, transitions, step=0.05):
    """Leapfrog steps a second of processor time, of HMC on ln p(z) p(y | z), all particles and data in one
    batch.
    """
    decoder = pair.generator.decoder
    z = torch.randn(particles, len(y), pair.latent)

    def slope(z):
        z = z.detach().requires_grad_()
        energy = 0.5 * z.square().sum(-1) + F.binary_cross_entropy_with_logits(
            decoder(z), y.expand(particles, *y.shape), reduction="none"
        ).sum(-1)
        return energy.detach(), torch.autograd.grad(energy.sum(), z)[0]

    energy, grad = slope(z)
    began = time.process_time()
    for _ in range(transitions):
        p = torch.randn_like(z)
        start = energy + 0.5 * p.square().sum(-1)
        end, force = z, grad
        p = p - 0.5 * step * force
        for i in range(LEAPFROG):
            end = end + step * p
            last, force = slope(end)
            p = p - (0.5 if i == LEAPFROG - 1 else 1.0) * step * force
        accept = torch.rand_like(start).log() < start - last - 0.5 * p.square().sum(-1)
        z = torch.where(accept[..., None], end, z)
        energy, grad = torch.where(accept, last, energy), torch.where(accept[..., None], force, grad)
    return particles * len(y) * transitions * LEAPFROG / (time.process_time() - began)


def ours(pair, y, particles, temperatures):
    """Leapfrog steps a second of processor time, of AIS's transitions, setting up and pilot run included, and
    its seconds.
    """
    began = time.process_time()
    bound = evidence.ais(pair, y, temperatures, particles, leapfrog=LEAPFROG, progress=False)
    seconds = time.process_time() - began
    return bound.cost / 3 / seconds, seconds


def speed(pair, y, rounds=3):
    """Interleaved medians, and growth."""
    mine, theirs = [], []
    for _ in range(rounds):
        theirs.append(by_hand(pair, y, 16, 20))
        mine.append(ours(pair, y, 16, 31)[0])
    row = {
        "ais": statistics.median(mine),
        "by_hand": statistics.median(theirs),
        "ratio": statistics.median(mine) / statistics.median(theirs),
    }
    few = y[:20]
    row["seconds by temperatures"] = {t: ours(pair, few, 8, t)[1] for t in (100, 200, 400)}
    row["seconds by particles"] = {k: ours(pair, y, k, 100)[1] for k in (8, 24, 56)}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--data", type=int, default=50)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--budgets", type=int, nargs="+", default=[3_000, 30_000, 300_000])
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--out", help="a run directory to train in, or to resume")
    parser.add_argument("--sandwich", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)
    train, test = digits(options.data_dir)
    pair = VAE(train.shape[1], 50, (options.hidden, options.hidden))
    run = fit(
        pair,
        train,
        valid=test[: len(test) // 2],
        epochs=options.epochs,
        batch_size=100,
        compile=options.data_dir is not None,
        seed=options.seed,
        out=options.out,
        resume=options.out is not None and Path(options.out).exists(),
        progress=False,
    )
    last = len(test) // 2
    y = test[last : last + options.data]
    print(f"trained: {run.metrics[-1]}")
    pyro.set_rng_seed(options.seed + 1)
    result = {"benchmark": "budgets", "seed": options.seed, "epochs": options.epochs}
    if options.speed:
        result["speed"] = speed(pair, y)
        print(result["speed"])
    elif options.sandwich:
        top = max(options.budgets)
        steps = max(2, round(top / (3 * LEAPFROG * (options.particles + 8))))
        began = time.perf_counter()
        sandwich = evidence.bdmc(
            pair, options.data, steps, options.particles, leapfrog=LEAPFROG, progress=False
        )
        print(sandwich)
        result["sandwich"] = {
            "temperatures": steps,
            "mean_gap": sandwich.mean_gap,
            "error": sandwich.mean_gap_error,
            "seconds": time.perf_counter() - began,
        }
    else:
        found, values = [], []
        print("| evaluations | method | ln p(y) | spread of data ± | Monte Carlo ± | ESS | k-hat | s |")
        print("|---|---|---|---|---|---|---|---|")
        for r, value in compare(pair, y, options.budgets, options.particles):
            found.append(r)
            values.append(value.double())
            print(
                f"| {r['cost']:,.0f} | {r['method']} | {r['mean']:.3f} | {r['stderr']:.3f} | "
                f"{r['monte_carlo_error']:.3f} | {r['ess']:.1f} | {r['k_hat']:.2f} | {r['seconds']:.0f} |",
                flush=True,
            )
        pairs = zip(values[::2], values[1::2], options.budgets, strict=True)
        result["ais_minus_iwae"] = {
            b: (float((a - w).mean()), float((a - w).std() / math.sqrt(len(a)))) for w, a, b in pairs
        }
        print("AIS minus IWAE, paired over the data (mean, standard error):", result["ais_minus_iwae"])
        result["rows"] = found
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""How much faster is a step of `fit` than `pyro.infer.SVI.step`, for the demo's VAE?

The VAE of examples/vae.py (8x8 digits, two latent dimensions, discretized logistic) on batches of 64, Adam.
`fit` is timed as a user has it, batching and metrics included; `SVI.step` as shipped, its batches cut
beforehand. Each round runs every row once; the table shows medians over rounds, in milliseconds a step.

    python benchmarks/fit_speed.py --threads 1 --rounds 7
"""

import argparse
import json
import platform
import statistics
import time

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO

from pyroelbo import data, fit, models

EPOCHS = 8


def fresh():
    torch.manual_seed(0)
    return models.VAE((8, 8), latent=2, likelihood="discretized_logistic", levels=17)


def svi(train, validation):
    pyro.clear_param_store()
    pair = fresh()
    batches = train.split(64)
    engine = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    with pyro.validation_enabled(validation):
        engine.step(batches[0])
        began = time.perf_counter()
        for _ in range(EPOCHS):
            for y in batches:
                engine.step(y)
    return (time.perf_counter() - began) / (EPOCHS * len(batches))


def ours(train):
    run = fit(fresh(), train, epochs=EPOCHS, batch_size=64, progress=False, device="cpu")
    return run.seconds / run.metrics[-1]["step"]


ROWS = {
    "SVI.step, as shipped": lambda train: svi(train, True),
    "SVI.step, validation off": lambda train: svi(train, False),
    "fit, eager": ours,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train = data.load("digits", "bytes")["train"]
    times = {name: [] for name in ROWS}
    for name in ROWS:
        ROWS[name](train)
    for _ in range(options.rounds):
        for name, row in ROWS.items():
            times[name].append(1e3 * row(train))
    medians = {name: statistics.median(t) for name, t in times.items()}
    base = medians["SVI.step, as shipped"]
    print(f"{'row':<26} {'ms/step':>8} {'times SVI.step':>15}")
    for name, value in medians.items():
        print(f"{name:<26} {value:8.3f} {base / value:15.2f}")
    print(
        json.dumps(
            {
                "benchmark": "fit_speed",
                "threads": options.threads,
                "torch": torch.__version__,
                "machine": platform.machine(),
                "ms": medians,
            }
        )
    )


if __name__ == "__main__":
    main()

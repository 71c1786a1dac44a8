"""What does a training step cost with K particles?

    python -m benchmarks.particles

Milliseconds of processor time of a whole step (loss, gradients, Adam) of a VAE 784-200-200-50 at batch 100,
in float32 on one thread: eager, and compiled as one graph. Medians over interleaved rounds; in parentheses
times the step of one particle in the same row. K particles are one vectorized plate; the encoder's network
runs once, so that fifty cost fewer than fifty times one. DReG runs it twice.
"""

import argparse
import json
import os
import platform
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyro
import torch
from pyro.infer import Trace_ELBO

from pyroelbo import models
from pyroelbo.compiled import CompiledStep
from pyroelbo.objectives import IWAE_ELBO
from pyroelbo.training.step import EagerStep

COLUMNS = {
    "ELBO, 1": Trace_ELBO,
    "IWAE-5": lambda: IWAE_ELBO(5),
    "IWAE-50": lambda: IWAE_ELBO(50),
    "DReG-50": lambda: IWAE_ELBO(50, gradient="dreg"),
}
ROWS = {"eager": EagerStep, "compiled": CompiledStep}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a cell in a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.enable_validation(False)
    y = (torch.rand(options.batch, 784) < 0.2).float()
    steps, counts, times = {}, {}, {}
    for row, make in ROWS.items():
        for column, objective in COLUMNS.items():
            pair = models.VAE(784, 50, (200, 200))
            step = make(objective(), pair.model, pair.guide, dict(pair.named_parameters()), lr=1e-3)
            for _ in range(3):
                step(y)
            began = time.process_time()
            step(y)
            steps[row, column], times[row, column] = step, []
            counts[row, column] = max(2, int(options.seconds / (time.process_time() - began)))
    for _ in range(options.rounds):
        for cell, step in steps.items():
            began = time.process_time()
            for _ in range(counts[cell]):
                step(y)
            times[cell].append((time.process_time() - began) / counts[cell] * 1e3)
    for cell, step in steps.items():
        counters = getattr(step, "counters", None)
        if counters is not None and (counters.fallbacks or not counters.compiled_calls):
            raise RuntimeError(f"{cell}: not compiled: {counters.reasons}")
    found = {cell: statistics.median(t) for cell, t in times.items()}
    print(f"milliseconds a step, one thread, batch {options.batch}, median of {options.rounds} rounds")
    print("| row | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    for row in ROWS:
        one = found[row, "ELBO, 1"]
        cells = [f"{found[row, c]:.3g} ({found[row, c] / one:.1f})" for c in COLUMNS]
        print(f"| {row} | " + " | ".join(cells) + " |")
    record = {
        "benchmark": "particles",
        "batch": options.batch,
        "milliseconds": {" / ".join(cell): value for cell, value in found.items()},
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""What does padding cost?

One sequence of 4,000 steps, 40 of 100, and both in one batch padded to 4,000: milliseconds of processor time
of each, best of ``--repeats``, one thread, float32, four states (or latent dimensions). The last column is
the third by the sum of the first two.

    python -m benchmarks.padding
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import pyro
import torch
from pyro.infer import Trace_ELBO

from pyroelbo import models
from pyroelbo.objectives.base import PerDatum, adapt
from pyroelbo.training.step import EagerStep

PAIRS = {
    "Gaussian HMM": lambda: models.HMM(4, 1, "gaussian"),
    "categorical HMM": lambda: models.HMM(4, 5, "categorical"),
    "state space": lambda: models.StateSpace(1, 4),
}
Task = Callable[[torch.Tensor, torch.Tensor], object]


def sequences(name: str, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(lengths), max(lengths))
    y = torch.randint(0, 5, shape) if name == "categorical HMM" else torch.randn(*shape, 1)
    return y, torch.tensor(lengths)


def tasks(pair) -> dict[str, Task]:
    def evidence(y: torch.Tensor, lengths: torch.Tensor) -> None:
        with torch.no_grad():
            pair.log_evidence(y, lengths)

    loss = PerDatum(adapt(Trace_ELBO()), float, None, pair.unpadded)
    step = EagerStep(loss, pair.model, pair.guide, dict(pair.named_parameters()), lr=0.0)
    return {
        "evidence": evidence,
        "with gradient": lambda y, lengths: pair.log_evidence(y, lengths).sum().backward(),
        "E-step": pair.e_step,
        'step of `fit(objective="elbo")`': step,
    }


def milliseconds(task: Task, batch: tuple, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        task(*batch)
        best = min(best, time.process_time() - began)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    print("| | long | short | both | times the sum |\n|---|---|---|---|---|")
    for name, make in PAIRS.items():
        torch.manual_seed(0)
        pair = make()
        batches = [sequences(name, rows) for rows in ([4000], [100] * 40, [4000] + [100] * 40)]
        for task, run in tasks(pair).items():
            run(*batches[1])
            long, short, both = map(partial(milliseconds, run, repeats=options.repeats), batches)
            share = both / (long + short)
            print(f"| {name}, {task} | {long:.1f} | {short:.1f} | {both:.1f} | {share:.2f} |")
            row = {"benchmark": "padding", "pair": name, "task": task, "long": long, "short": short}
            print(json.dumps(row | {"both": both, "share": round(share, 3)}), flush=True)


if __name__ == "__main__":
    main()

"""How tight is a guide on the models of a formula?

For each formula of the shared sets (random 3-SAT of 20 and 50 variables, structured ones; exact counts
come with them): seconds to compile and check the decision diagram, its size, and the gap of its bound,
|ln Z - ln count|. With --learn instead the autoregressive guide kept on extendable prefixes, untrained and
trained by rloo: ln count minus the mean of 2,000 draws of its ELBO, and processor time, for the first
formulas of each set.

    python -m benchmarks.formulas --data-dir DATA [--seconds 120]
    python -m benchmarks.formulas --data-dir DATA --sets sat_uf20_91 --learn 10 [--epochs 300]
"""

import argparse
import gzip
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch

from pyroelbo import evidence, fit, models
from pyroelbo.distributions import CNF, Models, compile_formula

SETS = ("sat_uf20_91", "sat_uf50_218", "sat_structured")


def compiled(row: dict, seconds: float) -> dict:
    formula, start = CNF(row["n_vars"], row["clauses"]), time.perf_counter()
    try:
        circuit = compile_formula(formula, seconds)
    except TimeoutError:
        return {"name": row["name"], "seconds": None}
    used = time.perf_counter() - start
    q = Models(circuit, torch.zeros(formula.variables, 2))
    exact = math.log(int(row["count"])) if int(row["count"]) else -math.inf
    log_count = float(q.log_partition)
    gap = 0.0 if log_count == exact else abs(log_count - exact)
    return {"name": row["name"], "seconds": used, "edges": circuit.num_edges, "gap": gap}


def learned(row: dict, epochs: int) -> tuple[float, float]:
    """Gaps of the autoregressive guide before and after training, in nats."""
    torch.manual_seed(0)
    pair, y = models.SAT(CNF(row["n_vars"], row["clauses"]), "autoregressive"), torch.ones(8)
    exact = math.log(int(row["count"])) - row["n_vars"] * math.log(2)

    def gap() -> float:
        return exact - float(evidence.elbo(pair, y, particles=250).value.mean())

    before = gap()
    settings = {"epochs": epochs, "batch_size": 8, "learning_rate": 0.02, "schedule": "cosine"}
    fit(pair, y, objective="rloo", particles=8, progress=False, **settings)
    return before, gap()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("PYROELBO_DATA", ".")))
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--learn", type=int, default=0, metavar="N")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=120.0, help="time limit of the compiler")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    record: dict[str, object] = {"benchmark": "formulas"}
    if options.learn:
        print(
            f"| set | formulas | untrained: mean, most | {options.epochs} epochs: mean, most | seconds each |"
        )
        print("|---|---|---|---|---|")
    else:
        print("| set | formulas | compiled | largest gap, nats | seconds, median | most | edges, most |")
        print("|---|---|---|---|---|---|---|")
    for name in options.sets:
        with gzip.open(options.data_dir / f"{name}.json.gz") as file:
            rows = json.load(file)
        cells: list[object] = []
        if options.learn:
            start = time.process_time()
            gaps = [learned(row, options.epochs) for row in rows[: options.learn]]
            cells = [f"{statistics.mean(g):.4f}, {max(g):.4f}" for g in zip(*gaps, strict=True)]
            cells = [name, len(gaps), *cells, f"{(time.process_time() - start) / len(gaps):.1f}"]
            record[name] = gaps
        else:
            found = [compiled(row, options.seconds) for row in rows]
            done = [r for r in found if r["seconds"] is not None]
            times = [r["seconds"] for r in done]
            cells = [name, len(rows), len(done), f"{max(r['gap'] for r in done):.1e}"]
            cells += [f"{statistics.median(times):.2f}", f"{max(times):.1f}", max(r["edges"] for r in done)]
            late = [r["name"] for r in found if r["seconds"] is None]
            record[name] = {"formulas": len(rows), "late": late, "largest_gap": max(r["gap"] for r in done)}
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

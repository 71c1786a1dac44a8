"""Which programs of Pyro's users are audited, and which compiled?

Each program of `tests/programs/`: what audit says of it after a short training, next to ln p(y) by other
means (closed form, enumeration, Gauss–Legendre, Monte Carlo over the prior), and whether 20 steps of SVI with
the two drop-ins, compiled, give the losses of eager ones. A row is a fault if it lies more than four standard
errors on the wrong side of the reference.

    OMP_NUM_THREADS=1 python -m benchmarks.programs [--only WORD ...] [--backend inductor]
"""

import argparse
import json
import math
import platform
import time
import warnings

import pyro
import torch

from tests.programs import PROGRAMS
from tests.programs.base import audited, compiled


def measured(entry, backend):
    """One row of the table."""
    row = {"program": entry.name, "reference": entry.how, "ln p(y)": None, "rows": {}, "gap": None}
    try:
        found = audited(entry)
    except ValueError as error:
        row["audited"] = f"refused: {error}"
        row["fault"] = entry.refused is None
    else:
        kinds = {bound.kind for bound in found.audit.bounds}
        row["audited"] = "exact" if "exact" in kinds else "yes"
        row["ln p(y)"] = float(found.reference.mean())
        row["rows"] = {b.method: [b.mean, b.mean_error] for b in found.audit.bounds}
        row["gap"] = None if math.isnan(found.gap) else found.gap
        row["fault"] = list(found.faults)
    steps = compiled(entry, backend)
    row["compiled"] = "yes" if steps.calls else f"no: {'; '.join(steps.reasons)}"
    row["apart"] = steps.apart
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", help="words in the names of the programs to run")
    parser.add_argument("--backend", default="eager", choices=("eager", "inductor"), help="of the graphs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    chosen = [e for n, e in PROGRAMS.items() if not options.only or any(w in n for w in options.only)]
    table, start = [], time.process_time()
    print("| program | reference | ln p(y) | audited, rows | gap | compiled |\n|---|---|---|---|---|---|")
    for entry in chosen:
        row = measured(entry, options.backend)
        table.append(row)
        value = "–" if row["ln p(y)"] is None else f"{row['ln p(y)']:.3f}"
        gap = "–" if row["gap"] is None else f"{row['gap']:.3f}"
        rows = ", ".join(f"{name} {mean:.3f}" for name, (mean, _) in row["rows"].items())
        said = f"{row['audited']}{': ' * bool(rows)}{rows}{' FAULT' * bool(row['fault'])}"
        print(f"| {entry.name} | {entry.how} | {value} | {said} | {gap} | {row['compiled']} |", flush=True)
    counts = {
        "programs": len(table),
        "audited": sum(not r["audited"].startswith("refused") for r in table),
        "faults": sum(bool(r["fault"]) for r in table),
        "compiled": sum(r["compiled"] == "yes" for r in table),
        "largest difference": max(r["apart"] for r in table),
        "processor seconds": round(time.process_time() - start, 1),
    }
    print(f"\n{counts}")
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "programs", "versions": versions, **counts, "rows": table}))


if __name__ == "__main__":
    main()

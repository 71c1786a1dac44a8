"""Who is right on hard input? Chains that break scaled recursions, clamps, and finite stand-ins for -inf.

    python -m benchmarks.hard_cases

For each case and precision, every library's evidence and gradient against a plain-Python log-space recursion:
"right" within 1e-5 relative (-inf where it is -inf; gradients within 1e-4), otherwise what it said.
Those of "large offsets" and "dead end" are no probabilities, which some libraries require.
Add cases to ``TABLES``: functions that yield ``(case, dtype, {library: verdict})``. The last line is JSON.
"""

import json
import math
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks import hard_structures, peers
from pyroelbo.distributions import LinearChain
from tests.hard_cases import CHAINS
from tests.oracles import forward_backward


def ours(initial, transition, observation):
    inputs = [torch.as_tensor(x) for x in (initial[None], transition[None], observation)]

    def gradient():
        leaves = [x.clone().requires_grad_() for x in inputs]
        found = torch.autograd.grad(LinearChain(*leaves).log_partition.sum(), leaves)
        return [found[0][0].numpy(), found[1][0].numpy(), found[2].numpy()]

    return {"log-likelihood": lambda: [LinearChain(*inputs).log_partition.numpy()], "gradient": gradient}


def verdict(tasks, log_z, marginals, counts):
    try:
        value = float(np.asarray(tasks["log-likelihood"]()[0]).reshape(-1)[0])
    except Exception as error:
        return f"raises {type(error).__name__}"
    right = value == log_z or (math.isfinite(log_z) and abs(value - log_z) <= 1e-5 * abs(log_z))
    if not right:
        return f"{value:.6g}"
    if "gradient" not in tasks:
        return "right (value)"
    try:
        _, steps, states = tasks["gradient"]()
    except Exception as error:
        return f"gradient raises {type(error).__name__}"
    if not (np.isfinite(steps).all() and np.isfinite(states).all()):
        return "gradient not finite"
    # a step of log weight -inf has no part in the sum, whatever a library says there
    off = max(
        np.max(np.abs(steps - counts) / np.maximum(1.0, np.abs(counts))),
        np.max(np.abs(states[0] - marginals)),
    )
    return "right" if off < 1e-4 else f"gradient off by {off:.2g}"


def chain_cases():
    for case, make in CHAINS.items():
        for dtype in ("float32", "float64"):
            arrays = [x.numpy().astype(dtype) for x in make()]
            log_z, marginals, counts, _ = forward_backward(*(x.astype(np.float64).tolist() for x in arrays))
            arrays[2] = arrays[2][None]
            tasks, notes = peers.installed(*arrays)
            told = {"ours": verdict(ours(*arrays), log_z, np.array(marginals), np.array(counts))}
            for name, one in tasks.items():
                told[name] = verdict(one, log_z, np.array(marginals), np.array(counts))
            yield f"{case} (true {log_z:.6g})", dtype, told, notes


TABLES = {"chains": chain_cases, **hard_structures.TABLES}


def main() -> None:
    torch.set_num_threads(1)
    results, printed = [], set()
    for table in TABLES.values():
        head = None
        for case, dtype, told, notes in table():
            for note in set(notes) - printed:
                printed.add(note)
                print(note)
            if head != list(told):
                head = list(told)
                print(f"| case | dtype | {' | '.join(head)} |")
                print("|" + "---|" * (2 + len(head)))
            print(f"| {case} | {dtype} | {' | '.join(told.values())} |", flush=True)
            results.append({"case": case, "dtype": dtype, "verdicts": told})
    for name in dict.fromkeys(name for row in results for name in row["verdicts"]):
        passed = sum(row["verdicts"].get(name, "").startswith("right") for row in results)
        print(f"{name}: right in {passed} of {sum(name in row['verdicts'] for row in results)}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()

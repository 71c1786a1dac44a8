"""Is any library faster? Medians of one run on one core, in milliseconds, ours and the peers' in turn.

    python -m benchmarks.structured_speed [--dtype float32|float64] [--only TEXT]

A case is a row: a task at a size, our function, and the peers' functions for the same inputs. Add rows by
adding a function that yields ``Case``s to ``TABLES``. Everybody starts from the same arrays of log
probabilities; ours pays for the checks that users get by default. The last line is JSON.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import numpy as np
import torch

from benchmarks import peers
from pyroelbo.distributions import LinearChain

SECONDS, BLOCK = 1.0, 0.03


@dataclass
class Case:
    task: str
    size: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]] = field(default_factory=dict)
    # a bare lower limit of the same work, where one is known
    bare: Callable[[], object] | None = None


def hmm_cases(dtype: str) -> Iterator[Case]:
    for size in ((1, 1000, 10), (1, 20000, 16), (32, 500, 32), (8, 2000, 128), (4, 256, 1024)):
        rows, steps, states = size
        rng = np.random.default_rng(0)
        initial = np.log(rng.dirichlet(np.ones(states))).astype(dtype)
        transition = np.log(rng.dirichlet(np.ones(states), states)).astype(dtype)
        observation = rng.normal(size=(rows, steps, states)).astype(dtype)
        # the log-space scans keep a matrix for each step
        scans = () if rows * steps * states**2 > 1e6 else ("pyro", "torch_struct")
        most = ("dynamax", "hmmlearn", *(("pomegranate",) if states <= 32 else ()), *scans)
        others, notes = peers.installed(initial, transition, observation, only=most)
        for note in notes:
            print(note)
        inputs = [torch.as_tensor(x) for x in (initial[None], transition[None], observation)]
        leaves = [x.clone().requires_grad_() for x in inputs]

        def gradient(leaves=leaves):
            return torch.autograd.grad(LinearChain(*leaves).log_partition.sum(), leaves)

        def products(a=inputs[1], x=inputs[2], steps=steps):
            for _ in range(steps):
                torch.mm(x[:, 0], a[0])

        ours = {
            "log-likelihood": lambda i=inputs: LinearChain(*i).log_partition,
            "gradient": gradient,
            "marginals and counts": lambda i=inputs: LinearChain(*i).marginals,
            "best path": lambda i=inputs: LinearChain(*i).mode,
        }
        for task, function in ours.items():
            same = {name: tasks[task] for name, tasks in others.items() if task in tasks}
            bare = products if task == "log-likelihood" and states >= 1024 else None
            yield Case(f"HMM {task}", str(size), function, same, bare)


TABLES: dict[str, Callable[[str], Iterator[Case]]] = {"hmm": hmm_cases}


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each, in short blocks taken in turn so that a busy machine hits all alike.

    Counted is the processor time of all threads: on one core that is the time, less what others take from it.
    """
    spent: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    while min(map(len, spent.values())) < 3 or time.perf_counter() - start < SECONDS:
        for name, function in functions.items():
            block = time.perf_counter()
            while True:
                before = time.process_time()
                function()
                spent[name].append(1e3 * (time.process_time() - before))
                if time.perf_counter() - block > BLOCK:
                    break
    return {name: float(np.median(times)) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--only", default="", help="a part of the task's name or size")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = []
    print(f"| task, {options.dtype} | size | ours, ms | best peer, ms | times faster | all |")
    print("|---|---|---|---|---|---|")
    for make in TABLES.values():
        for case in make(options.dtype):
            if options.only not in f"{case.task} {case.size}":
                continue
            functions = {"ours": case.ours, **case.peers}
            if case.bare is not None:
                functions["bare products"] = case.bare
            times = medians(functions)
            rivals = {name: ms for name, ms in times.items() if name in case.peers}
            best = min(rivals, key=rivals.__getitem__, default=None)
            told = f"{best} {rivals[best]:.3g}" if best else "none here"
            ratio = f"{rivals[best] / times['ours']:.1f}" if best else ""
            rest = ", ".join(f"{name} {ms:.3g}" for name, ms in times.items() if name not in ("ours", best))
            print(
                f"| {case.task} | {case.size} | {times['ours']:.3g} | {told} | {ratio} | {rest} |", flush=True
            )
            results.append({"task": case.task, "size": case.size, "dtype": options.dtype, "ms": times})
    print(json.dumps(results))


if __name__ == "__main__":
    main()

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
import pyro.distributions as dist
import torch

from benchmarks import peers
from pyroelbo.distributions import CTC, LinearChain, LinearGaussianChain, Mixture, ParseTree

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


def grammar_cases(dtype: str) -> Iterator[Case]:
    rows, words, inner, leaf = size = (8, 40, 30, 60)
    torch.manual_seed(0)
    every = inner + leaf
    root = torch.randn(rows, inner).log_softmax(-1)
    rules = torch.randn(rows, inner, every**2).log_softmax(-1).view(rows, inner, every, every)
    leaves = torch.randn(rows, words, leaf) - 8
    inputs = [x.to(getattr(torch, dtype)) for x in (root, rules, leaves)]
    values = {"ours": lambda root, rules, leaves: ParseTree(root, rules, leaves).log_partition}
    try:
        from torch_struct import SentCFG

        lengths = torch.full((rows,), words)
        values["torch_struct"] = lambda root, rules, leaves: SentCFG((leaves, rules, root), lengths).partition
    except ImportError:
        print("torch_struct: not installed, skipped")
    yield from _both("PCFG inside", size, values, inputs)


def alignment_cases(dtype: str) -> Iterator[Case]:
    for steps, rows, symbols, longest in ((150, 16, 29, 30), (500, 8, 80, 100)):
        torch.manual_seed(0)
        logits = torch.randn(rows, steps, symbols, dtype=getattr(torch, dtype), requires_grad=True)
        target = torch.randint(1, symbols, (rows, longest))
        # native takes time first
        swapped = logits.detach().transpose(0, 1).contiguous().requires_grad_()
        lengths = torch.full((rows,), steps), torch.full((rows,), longest)

        def ours(logits=logits, target=target):
            return torch.autograd.grad(CTC(logits).log_prob(target).sum(), logits)

        def native(logits=swapped, target=target, lengths=lengths):
            loss = torch.nn.functional.ctc_loss(logits.log_softmax(-1), target, *lengths, reduction="sum")
            return torch.autograd.grad(loss, logits)

        yield Case("CTC forward and backward", str((steps, rows, symbols, longest)), ours, {"torch": native})


def mixture_cases(dtype: str) -> Iterator[Case]:
    count, parts, dims = size = (50_000, 16, 32)
    torch.manual_seed(0)
    centers = 3 * torch.randn(parts, dims, dtype=torch.float64)
    y = torch.randn(count, dims, dtype=torch.float64) + centers[torch.randint(parts, (count,))]
    roots = torch.randn(parts, dims, dims, dtype=torch.float64)
    covariance = roots @ roots.mT / dims + torch.eye(dims, dtype=torch.float64)
    logits, kind = torch.zeros(parts, dtype=torch.float64), getattr(torch, dtype)
    for name in ("full", "diagonal"):
        if name == "full":
            components = dist.MultivariateNormal(centers.to(kind), covariance.to(kind))
            precision = torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
        else:
            scale = covariance.diagonal(0, 1, 2).sqrt()
            components, precision = dist.Normal(centers.to(kind), scale.to(kind)).to_event(1), 1 / scale
        mixture, data = Mixture(logits.to(kind), components), y.to(kind)
        others = {}
        try:
            from sklearn.mixture import GaussianMixture
            from sklearn.mixture._gaussian_mixture import _estimate_gaussian_parameters

            short = {"full": "full", "diagonal": "diag"}[name]
            model = GaussianMixture(parts, covariance_type=short)
            model.weights_, model.means_ = np.full(parts, 1 / parts, dtype), centers.numpy().astype(dtype)
            model.precisions_cholesky_ = np.ascontiguousarray(precision.numpy(), dtype)

            def scikit_learn(model=model, rows=data, short=short):
                rows = rows.numpy()
                _, share = model._e_step(rows)
                return _estimate_gaussian_parameters(rows, np.exp(share), 0.0, short)

            others["scikit-learn"] = scikit_learn
        except ImportError:
            print("scikit-learn: not installed, skipped")
        task = f"mixture E-step and statistics, {name}"
        yield Case(task, str(size), lambda m=mixture, x=data: m.expected_statistics(x), others)


def gaussian_cases(dtype: str) -> Iterator[Case]:
    for rows, steps, dims in ((16, 1000, 8), (1, 10000, 4)):
        torch.manual_seed(0)
        kind = getattr(torch, dtype)

        def positive(dims=dims):
            root = torch.randn(dims, dims)
            return root @ root.mT / dims + torch.eye(dims) / 2

        move, read = 0.95 * torch.linalg.qr(torch.randn(dims, dims))[0], torch.randn(dims, dims)
        zero = torch.zeros(dims, dtype=kind)
        parts = [x.to(kind) for x in (zero, positive(), move, positive(), read, positive())]
        y = torch.randn(rows, steps, dims, dtype=kind)

        def build(start, spread, move, noise, read, error, zero=zero):
            step, look = dist.MultivariateNormal(zero, noise), dist.MultivariateNormal(zero, error)
            return LinearGaussianChain(dist.MultivariateNormal(start, spread), move, step, read, look)

        def pyro_chain(start, spread, move, noise, read, error, zero=zero, steps=steps):
            step, look = dist.MultivariateNormal(zero, noise), dist.MultivariateNormal(zero, error)
            initial = dist.MultivariateNormal(start, spread)
            return dist.GaussianHMM(initial, move.mT, step, read.mT, look, duration=steps)

        values = {
            "ours": lambda *p, y=y, build=build: build(*p).log_prob(y),
            "pyro": lambda *p, y=y, build=pyro_chain: build(*p).log_prob(y),
        }
        cases = list(_both("linear-Gaussian", (rows, steps, dims), values, parts))
        try:
            for case, function in zip(cases, _dynamax_gaussian(parts, y), strict=True):
                case.peers["dynamax"] = function
        except ImportError:
            print("dynamax: not installed, skipped")
        yield from cases


def _dynamax_gaussian(parts, y):
    import jax

    jax.config.update("jax_enable_x64", y.dtype == torch.float64)
    import jax.numpy as jnp
    from dynamax.linear_gaussian_ssm import lgssm_filter
    from dynamax.linear_gaussian_ssm.inference import make_lgssm_params

    arrays, rows = [jnp.asarray(x.numpy()) for x in parts], jnp.asarray(y.numpy())

    def total(start, spread, move, noise, read, error):
        params = make_lgssm_params(start, spread, move, noise, read, error)
        return jax.vmap(lambda row: lgssm_filter(params, row).marginal_loglik)(rows).sum()

    value, gradient = jax.jit(total), jax.jit(jax.grad(total, argnums=tuple(range(6))))
    return [lambda f=f: jax.block_until_ready(f(*arrays)) for f in (value, gradient)]


def _both(task: str, size: tuple[int, ...], values: dict[str, Callable], inputs: list) -> Iterator[Case]:
    """A row for the value and one for the gradient by all inputs."""

    def gradient(value):
        fresh = [x.clone().requires_grad_() for x in inputs]
        return lambda: torch.autograd.grad(value(*fresh).sum(), fresh, allow_unused=True)

    forward = {name: lambda value=value: value(*inputs) for name, value in values.items()}
    backward = {name: gradient(value) for name, value in values.items()}
    for told, functions in ((task, forward), (f"{task} with gradient", backward)):
        yield Case(told, str(size), functions.pop("ours"), functions)


TABLES: dict[str, Callable[[str], Iterator[Case]]] = {
    "hmm": hmm_cases,
    "grammar": grammar_cases,
    "alignment": alignment_cases,
    "mixture": mixture_cases,
    "gaussian": gaussian_cases,
}


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

"""How fast is a training step?

Each cell is the median, over interleaved rounds, of the mean time of one training step (loss, gradients, Adam
update) in milliseconds, with the seconds spent compiling before the first fast step. With one thread it is
processor time, so that other work on the machine counts less; with more it is the clock on the wall. Every
row of a column trains the same model with the same shapes in float32, on as many cores as threads. Rows:

    pyro SVI             pyro.infer.SVI with Pyro's loss and optimizer, as shipped (validation on)
    SVI, FusedOptim      the same with our optimizer alone
    torch eager          hand-written loss, torch.optim.Adam(fused=True)
    torch.compile        the same, its loss under torch.compile
    SVI, two drop-ins    pyro.infer.SVI with FusedOptim and CompiledELBO
    CompiledStep         the whole step as one graph
    ... C++ wrapper      the same with options={"cpp_wrapper": True}
    numpyro update       NumPyro's jitted SVI.update, called from Python
    numpyro fori_loop    the same inside lax.fori_loop (the host sees one call for many steps)

    python benchmarks/svi_speed.py --threads 1
    python benchmarks/svi_speed.py --memory

With ``--memory`` a cell is the peak of tensor memory in a step, in megabytes: what a row holds between steps
(parameters, gradients, optimizer state) and the most it has allocated besides at any moment of one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds; the median is shown")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for one cell in one round")
    parser.add_argument("--columns", nargs="*", help="some of: " + " ".join(COLUMNS))
    parser.add_argument("--rows", nargs="*", help="substrings of the rows to run")
    parser.add_argument("--memory", action="store_true", help="peak tensor memory, torch rows only")
    return parser.parse_args()


COLUMNS = {
    "vae 64-64-8": ("vae", {"dims": 64, "width": 64, "latent": 8, "batch": 64}),
    "vae 784-200-50": ("vae", {"dims": 784, "width": 200, "latent": 50, "batch": 128}),
    "chain 1": ("chain", {"depth": 1}),
    "chain 10": ("chain", {"depth": 10}),
    "chain 50": ("chain", {"depth": 50}),
    "mixture": ("mixture", {}),
    "regression": ("regression", {}),
}
RATE = 1e-3


class Case:
    """One model, three times: for Pyro, by hand in torch, and for NumPyro."""

    def __init__(self, tag):
        self.tag = tag


class Chain(Case):
    """y ⇄ z_1 ⇄ ... ⇄ z_N with a Gaussian link of one hidden layer each way; a VAE is the chain of one."""

    def __init__(self, tag, depth, dims=64, width=64, latent=8, batch=64):
        super().__init__(tag)
        self.depth, self.dims, self.width, self.latent = depth, dims, width, latent
        self.data = ((torch.rand(batch, dims) < 0.5).float(),)
        self.modules = {}

    def networks(self, row):
        if row not in self.modules:

            def link(inside, outside):
                return nn.Sequential(nn.Linear(inside, self.width), nn.Tanh(), nn.Linear(self.width, outside))

            d, z = self.dims, self.latent
            up = [link(d, 2 * z)] + [link(z, 2 * z) for _ in range(self.depth - 1)]
            down = [link(z, d)] + [link(z, 2 * z) for _ in range(self.depth - 1)]
            self.modules[row] = nn.ModuleList(up), nn.ModuleList(down)
        return self.modules[row]

    def pyro(self, row):
        up, down = self.networks(row)
        prefix = f"{self.tag} {row}"

        def model(y):
            pyro.module(prefix + " down", down)
            with pyro.plate("data", len(y)):
                z = pyro.sample(
                    f"z{self.depth}", dist.Normal(y.new_zeros(len(y), self.latent), 1.0).to_event(1)
                )
                for i in range(self.depth - 1, 0, -1):
                    loc, log_scale = down[i](z).chunk(2, -1)
                    z = pyro.sample(f"z{i}", dist.Normal(loc, log_scale.exp()).to_event(1))
                pyro.sample("y", dist.Bernoulli(logits=down[0](z)).to_event(1), obs=y)

        def guide(y):
            pyro.module(prefix + " up", up)
            with pyro.plate("data", len(y)):
                z = y
                for i, network in enumerate(up):
                    loc, log_scale = network(z).chunk(2, -1)
                    z = pyro.sample(f"z{i + 1}", dist.Normal(loc, log_scale.exp()).to_event(1))

        return model, guide, Trace_ELBO()

    def torch(self, row):
        up, down = self.networks(row)

        def normal(x, loc, log_scale):
            return -0.5 * ((x - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)

        def loss(y):
            total, z, below = 0.0, y, []
            for network in up:
                loc, log_scale = network(z).chunk(2, -1)
                z = loc + log_scale.exp() * torch.randn_like(loc)
                total = total + normal(z, loc, log_scale).sum()
                below.append(z)
            total = total - (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum()
            for i in range(self.depth - 1, 0, -1):
                total = total - normal(below[i - 1], *down[i](below[i]).chunk(2, -1)).sum()
            return total + F.binary_cross_entropy_with_logits(down[0](below[0]), y, reduction="sum")

        return loss, [*up.parameters(), *down.parameters()]

    def numpyro(self, jax, numpyro):
        jnp, jdist = jax.numpy, numpyro.distributions
        d, z, h = self.dims, self.latent, self.width

        def link(name, x, inside, outside):
            def weight(part, shape):
                bound = 1 / math.sqrt(shape[0])
                value = jax.random.uniform(
                    jax.random.PRNGKey(sum(map(ord, name + part))), shape, minval=-bound, maxval=bound
                )
                return numpyro.param(f"{name} {part}", value)

            hidden = jnp.tanh(x @ weight("w1", (inside, h)) + weight("b1", (h,)))
            return hidden @ weight("w2", (h, outside)) + weight("b2", (outside,))

        def model(y):
            with numpyro.plate("data", len(y)):
                x = numpyro.sample(f"z{self.depth}", jdist.Normal(jnp.zeros((len(y), z)), 1.0).to_event(1))
                for i in range(self.depth - 1, 0, -1):
                    loc, log_scale = jnp.split(link(f"down{i}", x, z, 2 * z), 2, -1)
                    x = numpyro.sample(f"z{i}", jdist.Normal(loc, jnp.exp(log_scale)).to_event(1))
                numpyro.sample("y", jdist.Bernoulli(logits=link("down0", x, z, d)).to_event(1), obs=y)

        def guide(y):
            with numpyro.plate("data", len(y)):
                x, inside = y, d
                for i in range(self.depth):
                    loc, log_scale = jnp.split(link(f"up{i}", x, inside, 2 * z), 2, -1)
                    x = numpyro.sample(f"z{i + 1}", jdist.Normal(loc, jnp.exp(log_scale)).to_event(1))
                    inside = z

        return model, guide


class MixtureCase(Case):
    """1,000 points of a mixture of 8 Gaussians in the plane; Pyro enumerates, the others sum by logsumexp."""

    def __init__(self, tag):
        super().__init__(tag)
        self.data = (torch.randn(1000, 2),)
        self.start = torch.randn(8, 2)

    def pyro(self, row):
        prefix = f"{self.tag} {row}"

        def model(y):
            logits = pyro.param(prefix + " logits", lambda: torch.zeros(8))
            loc = pyro.param(prefix + " loc", lambda: self.start.clone())
            log_scale = pyro.param(prefix + " log_scale", lambda: torch.zeros(8, 2))
            with pyro.plate("data", len(y)):
                k = pyro.sample("k", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
                pyro.sample("y", dist.Normal(loc[k], log_scale.exp()[k]).to_event(1), obs=y)

        def guide(y):
            pass

        return model, guide, TraceEnum_ELBO(max_plate_nesting=1)

    def torch(self, row):
        parameters = [nn.Parameter(t.clone()) for t in (torch.zeros(8), self.start, torch.zeros(8, 2))]

        def loss(y):
            logits, loc, log_scale = parameters
            x = ((y[:, None] - loc) / log_scale.exp()) ** 2
            joint = logits.log_softmax(-1) + (-0.5 * x - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)
            return -joint.logsumexp(-1).sum()

        return loss, parameters

    def numpyro(self, jax, numpyro):
        jnp, jdist = jax.numpy, numpyro.distributions

        def model(y):
            logits = numpyro.param("logits", jnp.zeros(8))
            loc = numpyro.param("loc", jnp.asarray(self.start.numpy()))
            scale = jnp.exp(numpyro.param("log_scale", jnp.zeros((8, 2))))
            parts = jdist.Normal(loc, scale).to_event(1)
            with numpyro.plate("data", len(y)):
                numpyro.sample("y", jdist.MixtureSameFamily(jdist.Categorical(logits=logits), parts), obs=y)

        def guide(y):
            pass

        return model, guide


class Regression(Case):
    """Bayesian linear regression, 500 points, 10 inputs, with AutoNormal."""

    def __init__(self, tag):
        super().__init__(tag)
        x = torch.randn(500, 10)
        self.data = (x, x @ torch.randn(10) + 0.5 * torch.randn(500))

    def pyro(self, row):
        def model(x, y):
            w = pyro.sample("w", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
            s = pyro.sample("s", dist.LogNormal(x.new_zeros(()), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w + b, s), obs=y)

        family = type(f"AutoNormal {row}", (AutoNormal,), {})
        return model, family(model), Trace_ELBO()

    def torch(self, row):
        loc, raw = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.full((12,), -2.0))

        def loss(x, y):
            scale = F.softplus(raw)
            z = loc + scale * torch.randn_like(loc)
            constant = 0.5 * math.log(2 * math.pi)
            entropy = (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - constant).sum()
            prior = (-0.5 * z**2 - constant).sum()
            error = (y - x @ z[:10] - z[10]) * (-z[11]).exp()
            return entropy - prior - (-0.5 * error**2 - z[11] - constant).sum()

        return loss, [loc, raw]

    def numpyro(self, jax, numpyro):
        jnp, jdist = jax.numpy, numpyro.distributions

        def model(x, y):
            w = numpyro.sample("w", jdist.Normal(jnp.zeros(10), 1.0).to_event(1))
            b = numpyro.sample("b", jdist.Normal(0.0, 1.0))
            s = numpyro.sample("s", jdist.LogNormal(0.0, 1.0))
            with numpyro.plate("data", len(x)):
                numpyro.sample("y", jdist.Normal(x @ w + b, s), obs=y)

        return model, numpyro.infer.autoguide.AutoNormal(model)


KINDS = {
    "chain": Chain,
    "vae": lambda tag, **size: Chain(tag, 1, **size),
    "mixture": MixtureCase,
    "regression": Regression,
}


def svi_row(case, row, optimizer, wrap):
    model, guide, loss = case.pyro(row)
    loss = wrap(loss)
    svi = SVI(model, guide, optimizer, loss)
    return lambda: svi.step(*case.data), getattr(loss, "counters", None)


def step_row(case, row, options=None):
    model, guide, loss = case.pyro(row)
    loss.loss_and_grads(model, guide, *case.data)
    with pyro.poutine.trace(param_only=True) as found:
        loss.loss(model, guide, *case.data)
    parameters = {name: site["value"].unconstrained() for name, site in found.trace.nodes.items()}
    step = CompiledStep(loss, model, guide, parameters, lr=RATE, options=options)
    return lambda: step(*case.data), step.counters


def torch_row(case, row, compiled):
    loss, parameters = case.torch(row)
    optimizer = torch.optim.Adam(parameters, lr=RATE, fused=True)
    run = torch.compile(loss) if compiled else loss

    def step():
        optimizer.zero_grad(set_to_none=True)
        value = run(*case.data)
        value.backward()
        optimizer.step()
        return value

    return step, None


def numpyro_rows(case):
    import jax
    import numpyro

    model, guide = case.numpyro(jax, numpyro)
    data = [jax.numpy.asarray(x.numpy()) for x in case.data]
    svi = numpyro.infer.SVI(model, guide, numpyro.optim.Adam(RATE), numpyro.infer.Trace_ELBO())
    state = [svi.init(jax.random.PRNGKey(0), *data)]
    update = jax.jit(svi.update)

    def one():
        state[0], loss = update(state[0], *data)
        return loss.block_until_ready()

    many = jax.jit(lambda s, n: jax.lax.fori_loop(0, n, lambda i, s: svi.update(s, *data)[0], s))

    def loop(n):
        state[0] = jax.block_until_ready(many(state[0], n))

    return one, loop


def rows(case, wanted):
    plain = {"lr": RATE}
    made = {
        "pyro SVI": lambda: svi_row(case, "pyro", pyro.optim.Adam(plain), lambda loss: loss),
        "SVI, FusedOptim": lambda: svi_row(
            case, "fused", FusedOptim(torch.optim.Adam, plain), lambda loss: loss
        ),
        "torch eager": lambda: torch_row(case, "eager", False),
        "torch.compile": lambda: torch_row(case, "compile", True),
        "SVI, two drop-ins": lambda: svi_row(case, "drop", FusedOptim(torch.optim.Adam, plain), CompiledELBO),
        "CompiledStep": lambda: step_row(case, "step"),
        "... C++ wrapper": lambda: step_row(case, "wrapped", {"cpp_wrapper": True}),
    }
    for name, make in made.items():
        if wanted(name):
            step, counters = make()
            yield name, (lambda n, step=step: [step() for _ in range(n)]), counters
    if wanted("numpyro"):
        try:
            one, loop = numpyro_rows(case)
        except ImportError as error:
            print(f"numpyro rows skipped: {error}")
            return
        yield "numpyro update", (lambda n: [one() for _ in range(n)]), None
        yield "numpyro fori_loop", loop, None


def live():
    """Bytes of all tensors that Python holds."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def peak_memory(case, options):
    peaks, kept = {}, []  # a row that is freed while another is measured would hide in the difference
    generator = rows(case, lambda name: "numpyro" not in name and selected(name, options))
    while True:
        gc.collect()
        before = live()
        made = next(generator, None)
        if made is None:
            return peaks
        kept.append(made)
        name, run, _ = made
        run(12)
        gc.collect()
        held = live() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            run(1)
        events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        peaks[name] = (held + max(itertools.accumulate(changes, initial=0))) / 1e6


def selected(name, options):
    return not options.rows or any(part in name or name.startswith(part) for part in options.rows)


def measure(case, options):
    def wanted(name):
        return selected(name, options)

    runs, compile_seconds, steps = {}, {}, {}
    for name, run, counters in rows(case, wanted):
        start = time.perf_counter()
        run(3)
        first = time.perf_counter() - start
        start = time.perf_counter()
        run(3)
        again = time.perf_counter() - start
        compile_seconds[name] = max(first - again, 0.0)
        run(20)
        start = time.perf_counter()
        run(5)
        steps[name] = max(5, int(options.seconds * 5 / (time.perf_counter() - start)))
        runs[name] = run, counters
    times = {name: [] for name in runs}
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for _ in range(options.rounds):
        for name, (run, _) in runs.items():
            start = clock()
            run(steps[name])
            times[name].append((clock() - start) / steps[name] * 1e3)
    for name, (_, counters) in runs.items():
        if counters is not None and (counters.fallbacks or not counters.compiled_calls):
            raise RuntimeError(f"{case.tag}, {name}: not compiled: {counters.reasons}")
    return {name: statistics.median(t) for name, t in times.items()}, compile_seconds


def main():
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unknown = set(options.columns or ()) - COLUMNS.keys()
    if unknown:
        raise SystemExit(f"--columns: {sorted(unknown)} unknown, takes some of {list(COLUMNS)}")
    table, compiling = {}, {}
    for column in options.columns or COLUMNS:
        kind, size = COLUMNS[column]
        pyro.clear_param_store()
        case = KINDS[kind](column, **size)
        if options.memory:
            table[column] = peak_memory(case, options)
        else:
            table[column], compiling[column] = measure(case, options)
        print(column, {k: round(v, 3) for k, v in table[column].items()}, flush=True)
    names = list(dict.fromkeys(name for cells in table.values() for name in cells))
    protocol = f"{options.threads} threads, median of {options.rounds} rounds"
    what = "peak megabytes of tensors" if options.memory else "milliseconds a step (and seconds of compiling)"
    print(f"\n{what}, {protocol}")
    print("| row | " + " | ".join(table) + " |\n|" + "---|" * (1 + len(table)))
    for name in names:
        cells = [
            "–"
            if name not in table[c]
            else f"{table[c][name]:.3g}" + ("" if options.memory else f" ({compiling[c][name]:.1f} s)")
            for c in table
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    versions = {"torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}
    record = {"benchmark": "svi_speed", "threads": options.threads, "versions": versions}
    if options.memory:
        print(json.dumps({**record, "megabytes": table}))
    else:
        print(json.dumps({**record, "milliseconds": table, "compile_seconds": compiling}))


if __name__ == "__main__":
    # Thread counts are read when the libraries load.
    count = str(next((n for f, n in itertools.pairwise(sys.argv) if f == "--threads"), 1))
    os.environ.setdefault("OMP_NUM_THREADS", count)
    if hasattr(os, "sched_setaffinity"):  # XLA's pool does not always keep to its flags
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(count)])
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=" + count
    )
    warnings.simplefilter("ignore")

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal  # noqa: E402
from torch import nn  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from pyroelbo.compiled import CompiledELBO, CompiledStep, FusedOptim  # noqa: E402

if __name__ == "__main__":
    main()

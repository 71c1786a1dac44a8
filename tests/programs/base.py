"""What an entry of the gallery is, how it is run, and the means by which references are computed.

Nothing here uses the library to compute a reference: closed forms, enumeration in Python, Gauss–Legendre
integrals, Monte Carlo over the prior, and Pyro's own TraceEnum_ELBO.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyroelbo import Pair, audit
from pyroelbo.compiled import CompiledELBO, CompileWarning, FusedOptim

PROGRAMS: dict[str, "Program"] = {}
STEPS = 20  # of training, compared between eager and compiled


@dataclass(frozen=True)
class Case:
    """A fresh model and guide, their arguments, and ln p(y) at the present parameters.

    ``reference`` returns [B] (one number for joint programs), or that and its own error; ``joint``, for rows
    given latents of all data, ln p of all data or that and its error.
    """

    model: Callable
    guide: Callable
    batch: tuple
    reference: Callable[[], Any]
    plate: str | None = None
    joint: Callable[[], Any] | None = None
    data_dim: int = 0


@dataclass(frozen=True)
class Program:
    """A row of the gallery.

    Args:
        name: what it is.
        build: makes its :class:`Case`.
        how: by what means the reference is computed.
        loss: makes the Pyro loss that its users would take.
        steps: training steps before the audit.
        rate: Adam's learning rate in them.
        options: keywords of ``audit``.
        refused: what audit's refusal says, for programs that have no bound.
        eager: what the warning says, for programs that no static graph can hold.
        slack: nats that the best lower row may lie below the reference, per value.
    """

    name: str
    build: Callable[[], Case]
    how: str
    loss: Callable[[], Any] = Trace_ELBO
    steps: int = 200
    rate: float = 0.03
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    eager: str | None = None
    slack: float = 0.5


def program(how, *, loss=Trace_ELBO, steps=200, rate=0.03, refused=None, eager=None, slack=0.5, **options):
    """Decorator that enters a function returning a :class:`Case` into the table, under its name."""

    def enter(build):
        name = build.__name__.replace("_", " ")
        assert name not in PROGRAMS
        PROGRAMS[name] = Program(name, build, how, loss, steps, rate, options, refused, eager, slack)
        return build

    return enter


# ------------------------------------------------------------------------------------------------- running


def train(case, loss, optimizer, steps):
    """The losses of ``steps`` steps of SVI from a fixed seed."""
    svi = SVI(case.model, case.guide, optimizer, loss)
    pyro.set_rng_seed(5)
    return [svi.step(*case.batch) for _ in range(steps)]


def fresh(entry):
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    return entry.build()


@dataclass(frozen=True)
class Audited:
    """Rows next to a reference: ``gap`` is the mean of the reference minus the best lower row's."""

    audit: Any
    reference: torch.Tensor
    error: torch.Tensor
    gap: float
    faults: tuple[str, ...]


def audited(entry):
    """Train and audit a program; raises what ``audit`` raises."""
    case = fresh(entry)
    if entry.steps:
        train(case, entry.loss(), Adam({"lr": entry.rate}), entry.steps)
    pyro.set_rng_seed(6)
    pair = Pair.of(case.model, case.guide, plate=case.plate, data_dim=case.data_dim)
    batch = case.batch if len(case.batch) > 1 else case.batch[0]
    if case.data_dim:
        batch = batch.movedim(case.data_dim, 0)
    found = audit(pair, batch, progress=False, **entry.options)
    reference, error = with_error(case.reference())
    best = max((b.value.double().mean() for b in found.bounds if b.kind == "lower"), default=math.nan)
    gap = float(reference.mean() - best)
    faults = [*_faults(entry, found, reference, error, gap)]
    if case.joint is not None:
        faults += _joint_faults(found, *with_error(case.joint()))
    return Audited(found, reference, error, gap, tuple(faults))


def with_error(reference):
    """A reference and its error, as float64 tensors of one shape."""
    value, error = reference if isinstance(reference, tuple) else (reference, 0.0)
    value = torch.as_tensor(value).detach().double()
    return value, torch.as_tensor(error).double().expand_as(value)


def _joint_faults(found, joint, error):
    """What is wrong with the sums of rows minus the divergence, against ln p of all data."""
    for bound in found.bounds:
        lower = found.divergence.joint(bound)
        if lower.value - joint > 4 * torch.hypot(lower.stderr, error):
            yield f"{lower.method}: {lower.value:.4f} ± {lower.stderr:.4f}, above {joint:.4f}"


def _faults(entry, found, reference, error, gap):
    """What is wrong with rows: four standard errors and more on the wrong side, or away; or far below."""
    if not found.bounds:
        yield "no rows"
    for bound in found.bounds:
        if bound.value.shape != reference.shape:
            yield f"{bound.method}: shape {tuple(bound.value.shape)}, reference {tuple(reference.shape)}"
            continue
        own = torch.nan_to_num(bound.error.double(), nan=math.inf)
        excess = bound.value.double() - reference
        limit = 4 * torch.hypot(own, error) + 1e-6 * (1 + reference.abs())
        wrong = {
            "lower": excess > limit,
            "upper": -excess > limit,
            "exact": excess.abs() > limit,
            "estimate": excess.abs() > limit + 1e-3,
        }[bound.kind]
        if bool(wrong.any()):
            far, allowed = excess[wrong].tolist(), limit[wrong].tolist()
            yield f"{bound.method} ({bound.kind}): {far} above ln p(y), where {allowed} is allowed"
    if entry.how == "integral" and float(error.max()) > 1e-3:
        yield f"the reference is known to {float(error.max()):.2g} nats only: take more nodes"
    if gap > entry.slack:
        yield f"the best lower row is {gap:.3g} nats below the reference, expected {entry.slack} at most"


@dataclass(frozen=True)
class Compiled:
    """Losses in eager mode (Pyro's optimizer) and with the two drop-ins, calls compiled, reasons if none."""

    eager: list[float]
    fast: list[float]
    calls: int
    reasons: tuple[str, ...]

    @property
    def apart(self):
        """The largest relative difference between losses."""
        return max(abs(a - b) / (1 + abs(a)) for a, b in zip(self.eager, self.fast, strict=True))


def compiled(entry, backend="eager"):
    """Twenty steps of training, eager and compiled."""
    eager = train(fresh(entry), entry.loss(), Adam({"lr": entry.rate}), STEPS)
    loss = CompiledELBO(entry.loss(), backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompileWarning)
        fast = train(fresh(entry), loss, FusedOptim(torch.optim.Adam, {"lr": entry.rate}), STEPS)
    counters = loss.counters
    return Compiled(eager, fast, counters.compiled_calls, tuple(map(str, counters.reasons)))


# ---------------------------------------------------------------------------------------------- references


def value_of(name):
    """A parameter of Pyro's store, constrained."""
    return pyro.param(name).detach().double()


def gaussian(y, mean, covariance):
    """ln N(y | mean, covariance) by the determinant and the inverse."""
    apart = y - mean
    _, log_det = torch.linalg.slogdet(covariance)
    return -0.5 * (apart @ torch.linalg.inv(covariance) @ apart + log_det + len(y) * math.log(2 * math.pi))


def integral(log_f, *bounds, nodes=None):
    """ln ∫ exp(log_f) over a box by Gauss–Legendre, and its change since two thirds of the nodes.

    ``log_f`` takes one tensor [M] for each dimension and returns [M] or [M, B].
    """

    def rule(count):
        points, weights = np.polynomial.legendre.leggauss(count)
        axes, logs = [], []
        for low, high in bounds:
            axes.append(torch.as_tensor(low + (high - low) * (points + 1) / 2))
            logs.append(torch.as_tensor(np.log(weights * (high - low) / 2)))
        mesh = [m.reshape(-1) for m in torch.meshgrid(*axes, indexing="ij")]
        total = sum(m.reshape(-1) for m in torch.meshgrid(*logs, indexing="ij"))
        values = log_f(*mesh)
        return torch.logsumexp(values + total.reshape(-1, *[1] * (values.dim() - 1)), 0)

    nodes = nodes or (300, 150, 60)[len(bounds) - 1]
    fine = rule(nodes)
    return fine, (fine - rule(nodes * 2 // 3)).abs()


def average(log_weights):
    """ln of the mean of exp(log_weights) over the first dimension, and its standard error."""
    top = log_weights.max(0).values
    weights = (log_weights - top).exp()
    mean = weights.mean(0)
    return top + mean.log(), weights.std(0) / mean / math.sqrt(len(weights))


def over_guide(guide, batch, log_p, count=400):
    """The mean of ``log_p(latents)`` [B] over draws of the guide, and its standard error."""
    rows = []
    for _ in range(count):
        with torch.no_grad():
            nodes = poutine.trace(guide).get_trace(*batch).nodes
        rows.append(log_p({name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}))
    values = torch.stack(rows)
    return values.mean(0), values.std(0) / math.sqrt(count)


def assignments(values, count):
    """All tuples of ``count`` values out of range(values), a LongTensor [values ** count, count]."""
    return torch.tensor(list(itertools.product(range(values), repeat=count)))


def forward(initial, transition, emission):
    """ln p(y) of hidden Markov models: logs [..., S], [..., S, S] (from, to), [..., T, S]."""
    state = initial + emission[..., 0, :]
    for t in range(1, emission.shape[-2]):
        state = torch.logsumexp(state[..., :, None] + transition, -2) + emission[..., t, :]
    return torch.logsumexp(state, -1)


def draws(*shape, seed=0):
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

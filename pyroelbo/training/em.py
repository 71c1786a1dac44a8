"""`fit_em`: expectation maximization, the alternating optimization of the ELBO, with its evidence watched."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo import batch as batches
from pyroelbo.batch import Batch, Minibatches
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.evaluation.enumeration import Unavailable, enumerate_latents
from pyroelbo.numerics import positive_count
from pyroelbo.pair import ExactPair, Pair, unregistered
from pyroelbo.results import Run
from pyroelbo.runs import RunDirectory, choose_device, copy_into, group, interruptible

__all__ = ["ClosedForm", "NotMonotone", "fit_em"]

Statistics = dict[str, Any]


class NotMonotone(ArithmeticError):
    """A step of EM lowered what no step can lower."""


@runtime_checkable
class ClosedForm(Protocol):
    """What a pair offers for an M-step in closed form.

    A pair may also have ``initialize(*batch)``, a random start from data, which restarts take (with a choice
    of starts if it has an argument ``start``); ``log_prior()``, the log density of its parameters (MAP: the
    objective is the evidence of all data plus this); and ``least_data``, the number of data below which it
    cannot be fitted. Where ``stacks(*batch)`` is true, restarts run side by side: these methods then meet
    parameters with one more dimension R in front, a start each, and return ln p(y) as [R, B], the log prior as [R], and
    statistics whose tensors all have R in front.
    """

    def e_step(self, *batch: Tensor, hard: bool) -> tuple[Tensor, Statistics]:
        """ln p(y) of each datum, [B], and the batch's expected sufficient statistics by name: tensors or
        other values that add up with ``+`` and are weighed by ``* number``. With ``hard`` the posterior's mode
        z* stands for the posterior: ln p(y, z*), and the statistics of z*. Runs without gradients."""
        ...

    def m_step(self, statistics: Statistics) -> None:
        """Set the parameters to the maximum of the expected log joint."""
        ...


def fit_em(
    pair: Pair,
    data: Any,
    *,
    epochs: int = 100,
    tolerance: float = 1e-8,
    hard: bool = False,
    batch_size: int | None = None,
    stepwise: float | None = None,
    gradient_steps: int = 20,
    restarts: int = 1,
    start: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 10.0,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> Run:
    """Fit ``pair`` in place by EM: q = p(z | y) exactly, then the parameters that maximize E_q ln p(y, z).

    ``pair`` is an :class:`~pyroelbo.ExactPair`, or any pair whose latents can be enumerated. A pair with
    ``e_step`` and ``m_step`` (:class:`ClosedForm`) is fitted by these; for others the M-step climbs the
    expected log joint by ``gradient_steps`` steps of L-BFGS. ``hard`` puts the best z in place of the
    posterior (for continuous z the noise then runs to its floor: a few steps only). ``restarts`` runs as many
    times, the first from the parameters as they are, the others from ``pair.initialize``, seeded ``seed`` + 1,
    2, ..., and keeps the best; side by side where the pair's parameters stack (:class:`ClosedForm`), else one after
    another, with the same result. ``start`` says how to initialize (mixtures and Gaussian HMMs: ``"k-means"``
    or ``"random"``); given, the first run is initialized too, from ``seed``.

    Each epoch is one E-step and one M-step over all data, taken in pieces of ``batch_size``. With
    ``stepwise`` = κ in (0.5, 1] the M-step follows each piece instead, on statistics averaged with steps
    (k + 2)^-κ (closed forms only).

    Metrics start with row 0 of each restart, before its first step, and come as they are made; ``loss`` is
    -ln p(y) (``hard``: -ln p(y, z*)) in nats per datum, after that epoch's step (``stepwise``: the mean while
    the epoch ran). A run ends after ``epochs``, or when an epoch gains less than ``tolerance`` nats per datum
    (``stopped`` is then ``"converged"``).
    ``out``, ``resume``, ``config``, ``callbacks``, ``device`` are as in :func:`~pyroelbo.fit`.

    Raises TypeError for a pair with neither exact posterior nor finite latents; ValueError for too few data,
    or a datum that the model gives probability zero (with its row and epoch); :class:`NotMonotone` where a
    step lowers the objective by more than rounding can, 1e-9 of it in float64 and 1e-5 in float32 (not for
    ``stepwise``, which promises nothing).

    Source: Dempster, Laird, Rubin (1977); Neal and Hinton (1998); Cappé and Moulines (2009) for stepwise EM.
    """
    if not isinstance(pair, Pair):
        raise TypeError(
            f"pair takes a Pair, got a {type(pair).__name__}: Pair.of(model, guide) makes one of functions"
        )
    _check_settings(epochs, tolerance, batch_size, stepwise, gradient_steps, restarts, seed)
    if resume and out is None:
        raise ValueError("resume takes the run directory to go on with: give out=")
    closed = isinstance(pair, ClosedForm)
    if not any(closed or p.requires_grad for p in pair.parameters()):
        raise ValueError(
            f"{pair.name} has no parameters to fit: EM takes those of its modules (fit trains those of pyro.param too)"
        )
    if stepwise is not None and not closed:
        raise ValueError(
            f"stepwise takes a pair with an M-step in closed form; {pair.name} has none: use fit, which takes minibatches"
        )
    if restarts > 1 and not hasattr(pair, "initialize"):
        raise ValueError(
            f"restarts takes a pair that can draw a start: {pair.name} has no initialize(*batch)"
        )
    if start is not None and "start" not in signature(getattr(pair, "initialize", lambda: None)).parameters:
        raise ValueError(f"start takes a pair with a choice of starts: {pair.name}.initialize has none")
    place = choose_device(device)
    loader = Minibatches(data, batch_size or sys.maxsize, seed)
    least = getattr(pair, "least_data", 1)
    if loader.size is not None and loader.size < least:
        raise ValueError(f"data has {loader.size} rows: {pair.name} takes at least {least}")
    pyro.set_rng_seed(seed)
    pair.to(place)
    settings = {
        **(config or {}),
        "epochs": epochs,
        "tolerance": tolerance,
        "hard": hard,
        "batch_size": batch_size,
        "stepwise": stepwise,
        "gradient_steps": gradient_steps,
        "restarts": restarts,
        "start": start,
        "seed": seed,
        "objective": "hard_em" if hard else "em",
        "fingerprint": loader.fingerprint(),
    }
    steps = _Closed(pair, hard) if closed else _Gradient(pair, hard, gradient_steps)
    first = batches.to(loader.first(), place)
    if start is not None:
        _initialize(pair, batches.to(_known(loader), place), seed, start)
    # bad input is refused before anything is written; where this is the whole first E-step it is not done again
    probed = None if resume else steps.expect(first)
    run = None if out is None else RunDirectory.create(out, settings, resume)
    job = _Job(pair, steps, loader, place, run, probed if loader.whole else None, seed, start)
    job.side_by_side = restarts > 1 and closed and batches.call(getattr(pair, "stacks", _never), first)
    if resume:
        job.load()
    began = time.perf_counter()
    stopped = job.train(epochs, tolerance, stepwise, restarts, checkpoint_seconds, progress, callbacks)
    seconds = time.perf_counter() - began
    if run is not None:
        run.finish(
            _state(pair),
            {"stopped": stopped, "epochs": job.epoch, "steps": job.step, "seconds": round(seconds, 3)},
        )
    return Run(tuple(job.metrics), stopped, seconds, None if run is None else run.path)


def _never(*batch: Any, **named: Any) -> bool:
    return False


def _known(loader: Minibatches) -> Batch:
    """All data where they are in memory, else some."""
    return loader.first() if loader.tensors is None else loader.tensors


def _state(pair: Pair) -> dict[str, Tensor]:
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}


def _initialize(pair: Any, batch: Batch, seed: int, start: str | None) -> None:
    def initialize(*parts: Any, **named: Any) -> None:
        pair.initialize(*parts, **named, **({} if start is None else {"start": start}))

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches.call(initialize, batch)


class _Closed:
    """E- and M-steps that the pair brings itself."""

    def __init__(self, pair: Any, hard: bool) -> None:
        self.pair, self.hard = pair, hard

    @torch.no_grad()
    def expect(self, batch: Batch) -> tuple[Tensor, Statistics]:
        def e_step(*parts: Any, **named: Any) -> Any:
            return self.pair.e_step(*parts, hard=self.hard, **named)

        return batches.call(e_step, batch)

    @staticmethod
    def add(a: Statistics, b: Statistics) -> Statistics:
        return {k: a[k] + b[k] for k in a}

    @torch.no_grad()
    def maximize(self, statistics: Statistics) -> None:
        self.pair.m_step(statistics)


class _Stack(_Closed):
    """The same for a copy of the pair whose parameters are those of several starts, one beside the other."""

    def __init__(self, pair: Any, hard: bool, starts: int) -> None:
        super().__init__(copy.deepcopy(pair), hard)
        for x in _state(self.pair).values():
            x.data = x.data.expand(starts, *x.shape).clone()

    def keep(self, rows: list[int], statistics: Statistics) -> Statistics:
        """Go on with the starts in ``rows`` only."""
        for x in _state(self.pair).values():
            x.data = x.data[rows]

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[rows]
            fields = {f.name: getattr(value, f.name)[rows] for f in dataclasses.fields(value)}
            return dataclasses.replace(value, **fields)

        return {k: kept(v) for k, v in statistics.items()}


class _Gradient:
    """E-steps by marginals of the potentials that make up ln p(y, z); M-steps that climb
    Σ marginal · potential, which is E_q ln p(y, z), from the parameters at hand.
    """

    def __init__(self, pair: Pair, hard: bool, steps: int) -> None:
        self.pair, self.hard, self.steps = pair, hard, steps
        self.depth: int | None = None
        self.parameters = [p for p in pair.parameters() if p.requires_grad]

    def expect(self, batch: Batch) -> tuple[Tensor, list[tuple[Batch, tuple[Tensor, ...]]]]:
        if not isinstance(self.pair, ExactPair):
            graph = self._graph(batch)
            with torch.enable_grad():
                leaves = tuple(f.detach().requires_grad_() for f in graph.factors)
                value = graph.log_partition(leaves, largest=self.hard)
                used = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
            return value.detach(), [(batch, used)]
        posterior = batches.call(self.pair.posterior, batch)
        if isinstance(posterior, StructuredDistribution):
            value, used = posterior.expected_parts(hard=self.hard)
            return value, [(batch, used)]
        with torch.no_grad():
            (joint,) = self._potentials(batch)
            if not self.hard:
                return joint.logsumexp(-1), [(batch, (joint.softmax(-1),))]
            best = joint.argmax(-1, keepdim=True)
            return joint.amax(-1), [(batch, (torch.zeros_like(joint).scatter_(-1, best, 1.0),))]

    @staticmethod
    def add(a: list, b: list) -> list:
        return a + b

    def _graph(self, batch: Batch) -> Any:
        try:
            graph = enumerate_latents(self.pair, batch, self.depth)
        except Unavailable as error:
            raise TypeError(
                f"{self.pair.name} has no exact posterior, which EM takes: {error}. Train it with fit"
            ) from error
        self.depth = graph.depth
        return graph

    def _potentials(self, batch: Batch) -> tuple[Tensor, ...]:
        if not isinstance(self.pair, ExactPair):
            return self._graph(batch).factors
        posterior = batches.call(self.pair.posterior, batch)
        if isinstance(posterior, StructuredDistribution):
            return posterior.potentials
        if not isinstance(posterior, torch.distributions.Categorical):
            raise TypeError(
                f"{self.pair.name}.posterior is a {type(posterior).__name__}: EM takes an e_step and m_step of the "
                "pair's own, or a structured or categorical posterior"
            )
        return (posterior.logits + batches.call(self.pair.log_evidence, batch)[:, None],)

    def _expected_log_joint(self, statistics: list) -> Tensor:
        total: Any = 0.0
        for batch, used in statistics:
            for weight, potential in zip(used, self._potentials(batch), strict=True):
                total = total + (torch.where(weight > 0, potential, 0.0) * weight).sum()
        return total

    def maximize(self, statistics: list) -> None:
        optimizer = torch.optim.LBFGS(
            self.parameters, max_iter=self.steps, tolerance_change=0.0, line_search_fn="strong_wolfe"
        )
        count = sum(batches.size(batch) for batch, _ in statistics)
        best, kept = math.inf, [p.detach().clone() for p in self.parameters]

        def loss() -> Tensor:
            nonlocal best, kept
            with torch.enable_grad():
                value = -self._expected_log_joint(statistics) / count
                gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            value = value.detach()
            if -math.inf < float(value) < best:
                best, kept = float(value), [p.detach().clone() for p in self.parameters]
            return value

        optimizer.step(loss)
        with torch.no_grad():  # a line search may end at a worse place, or run off where there is no maximum
            torch._foreach_copy_(self.parameters, kept)


class _Job:
    """The state of a run, and what saves and restores all of it.

    ``flight`` are the restarts on their way: one, or those side by side, which then take their steps together.
    """

    def __init__(
        self,
        pair: Pair,
        steps: Any,
        loader: Minibatches,
        place: torch.device,
        run: RunDirectory | None,
        probed: tuple[Tensor, Any] | None,
        seed: int,
        start: str | None,
    ) -> None:
        self.probed, self.seed, self.start = probed, seed, start
        self.pair, self.steps, self.loader, self.place, self.run = pair, steps, loader, place, run
        self.side_by_side = False
        self.flight: list[int] = []
        self.values: list[float] = []  # of those, the objective after the last step, nats over all data
        self.restart = self.epoch = self.step = 0  # the restart that comes next, after those in flight
        self.running: Statistics | None = None
        self.best: dict[str, Tensor] | None = None
        self.best_value, self.best_restart = -math.inf, 0
        self.metrics: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self.saved = time.monotonic()

    def train(
        self,
        epochs: int,
        tolerance: float,
        stepwise: float | None,
        restarts: int,
        checkpoint_seconds: float,
        progress: bool,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
    ) -> str:
        bar = tqdm(
            total=epochs * restarts,
            initial=len(self.metrics),
            disable=not progress,
            unit="epoch",
            mininterval=0.3 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )
        statistics: Any = None
        self.pair.eval()
        if self.epoch >= epochs:  # a finished run, resumed
            self.stopped = "epochs"
        with bar, interruptible() as interrupt, unregistered(), ExitStack() as unchecked:
            if self.flight:
                unchecked.enter_context(pyro.validation_enabled(False))
            while self.stopped is None:
                if not self.flight:
                    self._begin(restarts)
                    # the first pass also looks whether all data are in the model's support
                    self.values, statistics, count = self._expect()
                    unchecked.enter_context(pyro.validation_enabled(False))
                    self._record(self.values, count, callbacks, bar)
                elif statistics is None and stepwise is None:
                    _, statistics, _ = self._expect()
                if stepwise is None:
                    self.steps.maximize(statistics)
                    self.step += 1
                    values, statistics, count = self._expect()
                    self._check(values, count)
                else:
                    values, count = self._stepwise(stepwise)
                self.epoch += 1
                gains = [new - old for new, old in zip(values, self.values, strict=True)]
                self.values = values
                self._record(values, count, callbacks, bar)
                bar.update(len(self.flight))
                done = [stepwise is None and gain < tolerance * count for gain in gains]
                if self.epoch == epochs:
                    self._land(
                        range(len(self.flight)), None, restarts, "converged" if all(done) else "epochs"
                    )
                elif any(done):
                    rows = [row for row, ended in enumerate(done) if ended]
                    statistics = self._land(rows, statistics, restarts, "converged")
                if self.stopped is None and interrupt.is_set():
                    self.stopped = "interrupted"
                if self.run is not None and time.monotonic() - self.saved > checkpoint_seconds:
                    self.save()
        self.save()
        if self.stopped == "interrupted" and self.side_by_side:
            row = self.values.index(max(self.values))
            now = {k: v[row] for k, v in _state(self.steps.pair).items()}
            copy_into(_state(self.pair), now, "the best in flight")
        elif self.stopped != "interrupted" and self.best is not None:
            copy_into(_state(self.pair), self.best, "the best start")
        return self.stopped

    def _begin(self, restarts: int) -> None:
        """The next start, or all of them side by side."""
        known = batches.to(_known(self.loader), self.place)
        self.flight = list(range(restarts)) if self.side_by_side else [self.restart]
        self.step = 0
        if self.side_by_side:
            own = {k: v.detach().clone() for k, v in _state(self.pair).items()}
            self.steps, self.probed = _Stack(self.pair, self.steps.hard, restarts), None
        for row, restart in enumerate(self.flight):
            if restart:
                _initialize(self.pair, known, self.seed + restart, self.start)
            if self.side_by_side:
                for name, x in _state(self.steps.pair).items():
                    x.data[row] = _state(self.pair)[name].data
        if self.side_by_side:
            copy_into(_state(self.pair), own, "the pair")
        self.restart = self.flight[-1] + 1

    def _land(self, rows: Sequence[int], statistics: Any, restarts: int, why: str) -> Any:
        """Take the restarts in these rows out of flight, and keep the best of all so far."""
        state = _state(self.steps.pair)
        for row in rows:
            value, restart = self.values[row], self.flight[row]
            if value > self.best_value or (value == self.best_value and restart < self.best_restart):
                alone = {k: v[row] if self.side_by_side else v for k, v in state.items()}
                self.best = {k: v.detach().clone() for k, v in alone.items()}
                self.best_value, self.best_restart = value, restart
        left = [row for row in range(len(self.flight)) if row not in rows]
        if not left and self.restart == restarts:
            self.stopped = why  # and stay in flight, should a resumed run have more epochs
            return None
        self.flight, self.values = [self.flight[r] for r in left], [self.values[r] for r in left]
        if not left:
            self.epoch, self.running = 0, None
            return None
        return self.steps.keep(left, statistics)

    def _log_prior(self) -> Tensor:
        prior = getattr(self.steps.pair, "log_prior", None)
        with torch.no_grad():
            found = torch.zeros(()) if prior is None else torch.as_tensor(prior()).cpu()
        return found.double().expand(len(self.flight) or 1)

    def _expect(self) -> tuple[list[float], Any, int]:
        """The objectives of all data under the parameters at hand, the statistics, and the number of data."""
        total, count, statistics = self._log_prior(), 0, None
        for batch in self.loader.in_order():
            batch = batches.to(batch, self.place)
            value, found = self.probed or self.steps.expect(batch)
            self.probed = None
            total = total + self._sum(value, count)
            count += batches.size(batch)
            statistics = found if statistics is None else self.steps.add(statistics, found)
        return total.tolist(), statistics, count

    def _sum(self, value: Tensor, before: int) -> Tensor:
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            row, found = int(bad.nonzero()[0, -1]), float(value[bad][0])
            why = (
                "no z explains it. Smooth the start, or leave that datum out"
                if found == -math.inf
                else "its parameters have run out of range, or are not finite to begin with"
            )
            raise ValueError(
                f"{self.pair.name} gives datum {before + row} (of that pass) log probability {found} in epoch "
                f"{self.epoch + 1}: {why}"
            )
        return value.double().sum(-1).cpu()

    def _stepwise(self, exponent: float) -> tuple[list[float], int]:
        total, count = self._log_prior(), 0
        size = self.loader.size
        for batch in self.loader.epoch(self.epoch):
            batch = batches.to(batch, self.place)
            value, found = self.steps.expect(batch)
            total = total + self._sum(value, count)
            number = batches.size(batch)
            count += number
            found = {k: v * ((size or number) / number) for k, v in found.items()}
            if self.running is None:
                self.running = found
            else:
                rate = (self.step + 2) ** -exponent
                self.running = {k: v * (1 - rate) + found[k] * rate for k, v in self.running.items()}
            self.steps.maximize(self.running)
            self.step += 1
        return total.tolist(), count

    def _check(self, values: list[float], count: int) -> None:
        rounding = 1e-9 if next(iter(_state(self.pair).values())).dtype == torch.float64 else 1e-5
        for restart, old, new in zip(self.flight, self.values, values, strict=True):
            if not new >= old - rounding * max(abs(old), 1.0):
                which = f"epoch {self.epoch + 1}" + (f", restart {restart}" if restart else "")
                raise NotMonotone(
                    f"step {self.step} ({which}) of {self.pair.name} lowered the objective from "
                    f"{old / count:.9f} to {new / count:.9f} nats per datum, which EM cannot: its M-step does not "
                    "maximize the expected log joint, or its E-step is not that of this model"
                )

    def _record(self, values: list[float], count: int, callbacks: Sequence[Callable], bar: Any) -> None:
        rows = []
        for restart, value, prior in zip(self.flight, values, self._log_prior().tolist(), strict=True):
            loss = -(value - prior) / count
            rows.append({"epoch": self.epoch, "step": self.step, "loss": loss, "restart": restart})
        self.metrics += rows
        bar.set_postfix({"loss": f"{min(r['loss'] for r in rows):.4f}"}, refresh=False)
        if self.run is not None:
            for row in rows:
                self.run.append_metrics(row)
        for row in rows if callbacks else ():
            for callback in callbacks:
                callback(row)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        if self.run is None:
            return
        tensors = {f"state/{k}": v for k, v in _state(self.steps.pair).items()}
        if self.best is not None:
            tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for name, value in (self.running or {}).items():
            fields = {"": value} if isinstance(value, Tensor) else dataclasses.asdict(value)
            tensors |= {f"statistics/{name}/{k}": v for k, v in fields.items()}
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "restart": self.restart,
            "flight": self.flight,
            "rows": len(self.metrics),
            "values": [repr(v) for v in self.values],
            "best_value": repr(self.best_value),
            "best_restart": self.best_restart,
            "stopped": self.stopped,
        }
        self.run.save_checkpoint(tensors, meta)
        self.saved = time.monotonic()

    def load(self) -> None:
        """Everything back as it was; a run without a checkpoint yet begins anew."""
        assert self.run is not None
        loaded = self.run.load_checkpoint()
        if loaded is None:
            self.run.keep_metrics(0)
            return
        tensors, meta = loaded
        self.flight = meta["flight"]
        state, where = group(tensors, "state/"), str(self.run.path / "checkpoint.safetensors")
        if self.side_by_side:
            self.steps = _Stack(self.pair, self.steps.hard, len(self.flight))
        if self.flight:
            copy_into(_state(self.steps.pair), state, where)
        best = group(tensors, "best/")
        self.best = {k: v.to(self.place) for k, v in best.items()} or None
        self.running = self._statistics(group(tensors, "statistics/"))
        self.epoch, self.step, self.restart = meta["epoch"], meta["step"], meta["restart"]
        self.values, self.best_value = [float(v) for v in meta["values"]], float(meta["best_value"])
        self.best_restart = meta["best_restart"]
        self.metrics = self.run.keep_metrics(meta["rows"])
        self.stopped = "converged" if meta["stopped"] == "converged" else None

    def _statistics(self, stored: dict[str, Tensor]) -> Statistics | None:
        if not stored:
            return None
        _, like = self.steps.expect(batches.to(self.loader.first(), self.place))
        fields: dict[str, dict[str, Tensor]] = {}
        for key, value in stored.items():
            name, part = key.split("/")
            fields.setdefault(name, {})[part] = value.to(self.place)
        return {k: type(like[k])(**v) if "" not in v else v[""] for k, v in fields.items()}


def _check_settings(epochs, tolerance, batch_size, stepwise, gradient_steps, restarts, seed) -> None:
    counts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_steps": gradient_steps,
        "restarts": restarts,
    }
    for name, value in counts.items():
        if name != "batch_size" or value is not None:
            positive_count(name, value, "whole number")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed takes a whole number from 0 to 2**32 - 1, got {seed!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance takes a number of nats of at least 0, got {tolerance!r}")
    if stepwise is not None and not 0.5 < stepwise <= 1:
        raise ValueError(f"stepwise takes an exponent above 0.5 and up to 1, got {stepwise!r}")
    if stepwise is not None and batch_size is None:
        raise ValueError("stepwise updates after each piece of the data: give batch_size=")

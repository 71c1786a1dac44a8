"""`fit_em`: expectation maximization, the alternating optimization of the ELBO, with its evidence watched."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo import data as batches
from pyroelbo.data import Batch, Minibatches
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.enumeration import Unavailable, enumerate_latents
from pyroelbo.pair import ExactPair, Pair, unregistered
from pyroelbo.records import Run
from pyroelbo.runs import RunDirectory, choose_device, copy_into, group, interruptible

__all__ = ["ClosedForm", "NotMonotone", "fit_em"]

Statistics = dict[str, Any]


class NotMonotone(ArithmeticError):
    """A step of EM lowered what no step can lower."""


@runtime_checkable
class ClosedForm(Protocol):
    """What a pair offers for an M-step in closed form.

    A pair may also have ``initialize(*batch)``, a random start from data, which restarts take;
    ``log_prior()``, the log density of its parameters (MAP: the objective is the evidence of all data plus
    this); and ``least_data``, the number of data below which it cannot be fitted.
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
    posterior (for continuous z the noise then runs to its floor: a few steps only). ``restarts`` runs as
    many times, the first from the parameters as they are, the others from ``pair.initialize``, and keeps the
    best.

    Each epoch is one E-step and one M-step over all data, taken in pieces of ``batch_size``. With
    ``stepwise`` = κ in (0.5, 1] the M-step follows each piece instead, on statistics averaged with steps
    (k + 2)^-κ (closed forms only).

    Metrics start with row 0, before the first step; ``loss`` is -ln p(y) (``hard``: -ln p(y, z*)) in nats per
    datum, after that epoch's step (``stepwise``: the mean while the epoch ran). A run ends after ``epochs``,
    or when an epoch gains less than ``tolerance`` nats per datum (``stopped`` is then ``"converged"``).
    ``out``, ``resume``, ``config``, ``callbacks``, ``device`` are as in :func:`~pyroelbo.fit`.

    Raises TypeError for a pair with neither exact posterior nor finite latents; ValueError for too few data,
    or a datum that the model gives probability zero (with its row and epoch); :class:`NotMonotone` where a
    step lowers the objective by more than rounding can, 1e-9 of it in float64 and 1e-5 in float32 (not for
    ``stepwise``, which promises nothing).

    Source: Dempster, Laird, Rubin (1977); Neal and Hinton (1998); Cappé and Moulines (2009) for stepwise EM.
    """
    _check_settings(epochs, tolerance, batch_size, stepwise, gradient_steps, restarts)
    if not any(True for _ in pair.parameters()):
        raise ValueError(f"{pair.name} has no parameters to fit")
    if resume and out is None:
        raise ValueError("resume takes the run directory to go on with: give out=")
    closed = isinstance(pair, ClosedForm)
    if stepwise is not None and not closed:
        raise ValueError(
            f"stepwise takes a pair with an M-step in closed form; {pair.name} has none: use fit, which takes minibatches"
        )
    if restarts > 1 and not hasattr(pair, "initialize"):
        raise ValueError(
            f"restarts takes a pair that can draw a start: {pair.name} has no initialize(*batch)"
        )
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
        "seed": seed,
        "objective": "hard_em" if hard else "em",
        "data_size": loader.size,
    }
    steps = _Closed(pair, hard) if closed else _Gradient(pair, hard, gradient_steps)
    # bad input is refused before anything is written; where this is the whole first E-step it is not done again
    probed = None if resume else steps.expect(batches.to(loader.first(), place))
    run = None if out is None else RunDirectory.create(out, settings, resume)
    job = _Job(pair, steps, loader, place, run, probed if loader.whole else None)
    if resume:
        job.load()
    began = time.perf_counter()
    stopped = job.train(epochs, tolerance, stepwise, restarts, checkpoint_seconds, progress, callbacks, seed)
    seconds = time.perf_counter() - began
    if run is not None:
        run.finish(
            job.state,
            {"stopped": stopped, "epochs": job.epoch, "steps": job.step, "seconds": round(seconds, 3)},
        )
    return Run(tuple(job.metrics), stopped, seconds, None if run is None else run.path)


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
        before = [p.detach().clone() for p in self.parameters]

        def loss() -> Tensor:
            with torch.enable_grad():
                value = -self._expected_log_joint(statistics) / count
                gradients = torch.autograd.grad(value, self.parameters, allow_unused=True)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = torch.zeros_like(parameter) if gradient is None else gradient
            return value.detach()

        start = loss()
        optimizer.step(loss)
        after = loss()
        if not after <= start:  # a line search that found nothing better, at rounding's end
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, before)


class _Job:
    """The state of a run, and what saves and restores all of it."""

    def __init__(
        self,
        pair: Pair,
        steps: Any,
        loader: Minibatches,
        place: torch.device,
        run: RunDirectory | None,
        probed: tuple[Tensor, Any] | None,
    ) -> None:
        self.probed = probed
        self.pair, self.steps, self.loader, self.place, self.run = pair, steps, loader, place, run
        self.state: dict[str, Tensor] = {**dict(pair.named_parameters()), **dict(pair.named_buffers())}
        self.restart = self.epoch = self.step = 0
        self.value = -math.inf  # the objective after the last step, nats over all data
        self.running: Statistics | None = None
        self.best: dict[str, Tensor] | None = None
        self.best_value = -math.inf
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
        seed: int,
    ) -> str:
        bar = tqdm(
            total=epochs * restarts,
            initial=self.restart * epochs + self.epoch,
            disable=not progress,
            unit="epoch",
            mininterval=0.3 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )
        statistics: Any = None
        self.pair.eval()
        if self.epoch >= epochs:  # a finished run, resumed
            self.stopped = "epochs"
        with bar, interruptible() as interrupt, unregistered(), pyro.validation_enabled(False):
            while self.stopped is None:
                if statistics is None:
                    if not self.metrics or self.metrics[-1]["restart"] != self.restart:
                        self._begin(seed)
                        self.value, statistics, count = self._expect()
                        self._record(self.value, count, callbacks, bar)
                    else:
                        _, statistics, _ = self._expect()
                if stepwise is None:
                    self.steps.maximize(statistics)
                    self.step += 1
                    value, statistics, count = self._expect()
                    self._check(value, count)
                else:
                    value, count = self._stepwise(stepwise)
                self.epoch += 1
                gain, self.value = value - self.value, value
                self._record(value, count, callbacks, bar)
                bar.update()
                converged = stepwise is None and gain < tolerance * count
                if self.epoch == epochs or converged:
                    self._finish_start(interrupt, epochs, restarts, converged, bar)
                    statistics = None
                elif interrupt.is_set():
                    self.stopped = "interrupted"
                if self.run is not None and time.monotonic() - self.saved > checkpoint_seconds:
                    self.save()
        self.save()
        if self.best is not None and self.stopped != "interrupted":
            copy_into(self.state, self.best, "the best start")
        return self.stopped

    def _begin(self, seed: int) -> None:
        if self.restart:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + self.restart)
                first = batches.to(self.loader.first(), self.place)
                batches.call(self.pair.initialize, first)  # type: ignore[operator]

    def _finish_start(self, interrupt: Any, epochs: int, restarts: int, converged: bool, bar: Any) -> None:
        """Keep the better of this start and those before; go on with the next one."""
        if self.value > self.best_value:
            self.best = {k: v.detach().clone() for k, v in self.state.items()}
            self.best_value = self.value
        if self.restart + 1 == restarts:
            self.stopped = "converged" if converged else "epochs"
            return
        self.restart, self.epoch, self.running, self.value = self.restart + 1, 0, None, -math.inf
        bar.update(self.restart * epochs - bar.n)
        if interrupt.is_set():
            self.stopped = "interrupted"

    def _log_prior(self) -> float:
        prior = getattr(self.pair, "log_prior", None)
        with torch.no_grad():
            return 0.0 if prior is None else float(prior())

    def _expect(self) -> tuple[float, Any, int]:
        """The objective of all data under the parameters at hand, the statistics, and the number of data."""
        total, count, statistics = self._log_prior(), 0, None
        for batch in self.loader.in_order():
            batch = batches.to(batch, self.place)
            value, found = self.probed or self.steps.expect(batch)
            self.probed = None
            total += self._sum(value, count)
            count += batches.size(batch)
            statistics = found if statistics is None else self.steps.add(statistics, found)
        return total, statistics, count

    def _sum(self, value: Tensor, before: int) -> float:
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"{self.pair.name} gives datum {before + row} (of that pass) log probability {float(value[row])} in epoch "
                f"{self.epoch + 1}: "
                "no z explains it. Smooth the start, or leave that datum out"
            )
        return float(value.double().sum())

    def _stepwise(self, exponent: float) -> tuple[float, int]:
        total, count = self._log_prior(), 0
        size = self.loader.size
        for batch in self.loader.epoch(self.epoch):
            batch = batches.to(batch, self.place)
            value, found = self.steps.expect(batch)
            total += self._sum(value, count)
            count += len(value)
            found = {k: v * ((size or len(value)) / len(value)) for k, v in found.items()}
            if self.running is None:
                self.running = found
            else:
                rate = (self.step + 2) ** -exponent
                self.running = {k: v * (1 - rate) + found[k] * rate for k, v in self.running.items()}
            self.steps.maximize(self.running)
            self.step += 1
        return total, count

    def _check(self, value: float, count: int) -> None:
        dtype = next(iter(self.state.values())).dtype
        slack = (1e-9 if dtype == torch.float64 else 1e-5) * max(abs(self.value), 1.0)
        if not value >= self.value - slack:
            raise NotMonotone(
                f"step {self.step} (epoch {self.epoch + 1}) of {self.pair.name} lowered the objective from "
                f"{self.value / count:.9f} to {value / count:.9f} nats per datum, which EM cannot: its M-step does not "
                "maximize the expected log joint, or its E-step is not that of this model"
            )

    def _record(self, value: float, count: int, callbacks: Sequence[Callable], bar: Any) -> None:
        loss = -(value - self._log_prior()) / count
        row = {"epoch": self.epoch, "step": self.step, "loss": loss, "restart": self.restart}
        self.metrics.append(row)
        if self.run is not None:
            self.run.append_metrics(row)
        bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
        for callback in callbacks:
            callback(row)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        if self.run is None:
            return
        tensors = {f"state/{k}": v for k, v in self.state.items()}
        if self.best is not None:
            tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for name, value in (self.running or {}).items():
            fields = {"": value} if isinstance(value, Tensor) else dataclasses.asdict(value)
            tensors |= {f"statistics/{name}/{k}": v for k, v in fields.items()}
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "restart": self.restart,
            "rows": len(self.metrics),
            "value": repr(self.value),
            "best_value": repr(self.best_value),
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

        copy_into(self.state, group(tensors, "state/"), str(self.run.path / "checkpoint.safetensors"))
        best = group(tensors, "best/")
        self.best = {k: v.to(self.place) for k, v in best.items()} or None
        self.running = self._statistics(group(tensors, "statistics/"))
        self.epoch, self.step, self.restart = meta["epoch"], meta["step"], meta["restart"]
        self.value, self.best_value = float(meta["value"]), float(meta["best_value"])
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


def _check_settings(epochs, tolerance, batch_size, stepwise, gradient_steps, restarts) -> None:
    counts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "gradient_steps": gradient_steps,
        "restarts": restarts,
    }
    for name, value in counts.items():
        if name == "batch_size" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} takes a positive whole number, got {value!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance takes a number of nats of at least 0, got {tolerance!r}")
    if stepwise is not None and not 0.5 < stepwise <= 1:
        raise ValueError(f"stepwise takes an exponent above 0.5 and up to 1, got {stepwise!r}")
    if stepwise is not None and batch_size is None:
        raise ValueError("stepwise updates after each piece of the data: give batch_size=")

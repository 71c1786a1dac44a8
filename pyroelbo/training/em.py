"""`fit_em`: expectation maximization, the alternating maximization of the ELBO, with a check that it is
monotone.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo import batch as batches
from pyroelbo import numerics
from pyroelbo.batch import Batch, Minibatches
from pyroelbo.numerics import duration, positive_count
from pyroelbo.pair import Pair, unregistered
from pyroelbo.results import Run
from pyroelbo.runs import RunDirectory, choose_device, copy_into, group, interruptible
from pyroelbo.training.em_steps import (
    ClosedForm,
    ClosedSteps,
    GradientSteps,
    StackedSteps,
    Statistics,
    state_of,
)

__all__ = ["ClosedForm", "NotMonotone", "fit_em"]


class NotMonotone(ArithmeticError):
    """A step of EM lowered the objective, which an exact step cannot."""


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
    weights: Any = None,
    impossible: str = "error",
    freeze: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 10.0,
    budget: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> Run:
    """Fit ``pair`` in place by EM: q = p(z | y) exactly, then the parameters that maximize E_q ln p(y, z).

    ``pair`` is an :class:`~pyroelbo.ExactPair`, or any pair whose latents can be enumerated. A pair with
    ``e_step`` and ``m_step`` (:class:`ClosedForm`) is fitted by these; for others the M-step maximizes the
    expected log joint by L-BFGS. Each epoch is one E-step and one M-step over all data.

    Metrics start with row 0 of each restart, before its first step; ``loss`` is -ln p(y) (``hard``: -ln p(y,
    z*)) in nats per datum, after that epoch's step (``stepwise``: the mean over the epoch). A run ends after
    ``epochs``, or when an epoch gains less than ``tolerance`` (``stopped`` is then ``"converged"``).

    Args:
        pair: the pair to fit.
        data: a batch, a map-style Dataset or a DataLoader.
        epochs: maximum number of passes over the data, per restart.
        tolerance: smallest gain of an epoch, nats per datum.
        hard: replace the posterior by its mode (for continuous z the noise then shrinks to its floor: use few
            epochs).
        batch_size: data per chunk of an E-step; None takes all at once.
        stepwise: exponent κ in (0.5, 1]: an M-step after each piece, on statistics averaged with step sizes
            (k + 2)^-κ (closed forms only).
        gradient_steps: steps of L-BFGS in an M-step that has no closed form.
        restarts: number of runs, the best of which is kept: the first as ``start`` says, the others from
            ``pair.initialize``, seeded ``seed`` + 1, 2, …; run side by side where the pair's parameters
            stack (:class:`ClosedForm`), otherwise one after another, with the same result.
        start: ``"data"``: the first run starts from ``pair.initialize``, seeded ``seed``; ``"current"``: from
            the parameters as they are; or a start that ``initialize`` knows (mixtures and Gaussian HMMs:
            ``"k-means"`` or ``"random"``), for all runs. By default "data" while the parameters are those of
            the constructor, otherwise "current"; the progress bar says which.
        weights: case weights [N], not negative, of data in memory; for pairs whose ``e_step`` has
            ``weights``, and those without a closed form.
        impossible: what to do with data of probability zero under the start: ``"error"`` or ``"skip"``, which
            leaves them out and warns with their number.
        freeze: parts to keep fixed, like parameters that require no gradient. The M-step of the others is by
            gradients then, for pairs with finite latents.
        seed: seed of starts and data order.
        device: where to fit; CUDA if there is one, unless given.
        out: a new run directory, as in :func:`~pyroelbo.fit`.
        resume: continue from the checkpoint in ``out``.
        checkpoint_seconds: seconds between checkpoints.
        budget: stop after this much time, such as ``"10min"``; ``stopped`` is then ``"budget"``.
        config: stored with the run.
        progress: show a progress bar.
        callbacks: called with each row of metrics; one that raises KeyboardInterrupt stops the run.

    Raises TypeError for a pair with neither an exact posterior nor finite latents; ValueError for too few
    data, or a datum of probability zero (with its row and epoch); :class:`NotMonotone` if a step lowers the
    objective by more than rounding can: 1e-9 of the sum of its terms' sizes in float64, 1e-5 in float32 (not
    for ``stepwise``, which is not monotone).

    Source: Dempster, Laird, Rubin (1977); Neal and Hinton (1998); Cappé and Moulines (2009) for stepwise EM.
    """
    if not isinstance(pair, Pair):
        raise TypeError(
            f"pair: expected a Pair, got {type(pair).__name__}: Pair.of(model, guide) makes one of functions"
        )
    _check_settings(epochs, tolerance, batch_size, stepwise, gradient_steps, restarts, seed)
    if resume and out is None:
        raise ValueError("resume: expected the run directory to continue: give out=")
    frozen = _frozen(pair, freeze)
    closed = isinstance(pair, ClosedForm) and not frozen
    if not any(closed or p.requires_grad for p in pair.parameters()):
        raise ValueError(
            f"pair: expected parameters in its modules, got none in {pair.name}: fit trains those of "
            f"pyro.param"
        )
    if stepwise is not None and not closed:
        raise ValueError(
            f"stepwise: expected a pair with e_step and m_step, got {pair.name}: use fit, which takes "
            f"minibatches"
        )
    if restarts > 1 and not hasattr(pair, "initialize"):
        raise ValueError(f"restarts: expected a pair with initialize(*batch), got {pair.name}")
    known = "start" in signature(getattr(pair, "initialize", lambda: None)).parameters
    if start == "data" and not hasattr(pair, "initialize"):
        raise ValueError(f"start: expected a pair with initialize(*batch) for 'data', got {pair.name}")
    if start not in (None, "data", "current") and not known:
        raise ValueError(
            f"start: expected 'data' or 'current' for {pair.name}, whose initialize has no argument start, "
            f"got "
            f"{start!r}"
        )
    if impossible not in ("error", "skip"):
        raise ValueError(f"impossible: expected 'error' or 'skip', got {impossible!r}")
    limit = math.inf if budget is None else duration(budget)
    place = choose_device(device)
    if not numerics.holds_float64(place):
        raise ValueError(f"device: expected one with float64, which EM computes in, got {place}: use 'cpu'")
    loader = Minibatches(data, batch_size or sys.maxsize, seed)
    weights = None if weights is None else _checked_weights(weights, loader)
    least = getattr(pair, "least_data", 1)
    if loader.size is not None and loader.size < least:
        raise ValueError(f"data: expected at least {least} rows for {pair.name}, got {loader.size}")
    pair.model.check(loader.first())
    pyro.set_rng_seed(seed)
    begins = start or ("data" if pair.pristine else "current")
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
        "impossible": impossible,
        "freeze": list(freeze),
        "seed": seed,
        "objective": "hard_em" if hard else "em",
        "fingerprint": loader.fingerprint(),
        "weights": None if weights is None else batches.fingerprint(weights),
    }
    steps = ClosedSteps(pair, hard) if closed else GradientSteps(pair, hard, gradient_steps, frozen)
    way = None if begins in ("data", "current") else begins
    if begins != "current":
        _initialize(pair, batches.to(_known(loader), place), seed, way)
    if start is None and progress and hasattr(pair, "initialize"):
        tqdm.write(f"fit_em: {pair.name} starts from {begins!r} (start= chooses)", file=sys.stderr)
    if impossible == "skip":
        loader, weights = _possible(steps, loader, weights, place)
    first = batches.to(loader.first(), place)
    scale = None if weights is None else Minibatches(weights, loader.batch_size, seed)
    share: Any = None if scale is None else batches.to(scale.first(), place)
    # Bad input is refused before anything is written; if this is the whole first E-step it is not repeated.
    probed = None if resume else steps.expect(first, share)
    run = None if out is None else RunDirectory.create(out, settings, resume)
    with closing(run) if run is not None else nullcontext():
        job = _Job(pair, steps, loader, scale, place, run, probed if loader.whole else None, seed, way)
        job.side_by_side = restarts > 1 and closed and batches.call(getattr(pair, "stacks", _never), first)
        if run is not None and resume:
            with run.restoring():
                job.load()
        began = time.perf_counter()
        stopped = job.train(
            epochs, tolerance, stepwise, restarts, checkpoint_seconds, limit, progress, callbacks
        )
        seconds = time.perf_counter() - began
        if run is not None:
            run.finish(state_of(pair), stopped=stopped, epochs=job.epoch, steps=job.step, seconds=seconds)
    return Run(tuple(job.metrics), stopped, seconds, None if run is None else run.path)


def _frozen(pair: Pair, freeze: Sequence[str]) -> frozenset[int]:
    """Identities of the parameters that must stay."""
    if isinstance(freeze, str):
        raise TypeError(f"freeze: expected a sequence of part names, got the string {freeze!r}")
    parts = {id(p) for name in freeze for p in pair.part(name).values()}
    return frozenset(parts | {id(p) for p in pair.parameters() if not p.requires_grad})


def _checked_weights(weights: Any, loader: Minibatches) -> Tensor:
    """Weights as a tensor [N]; ValueError for others."""
    found = batches.as_batch(weights, "weights")
    if not isinstance(found, Tensor) or loader.tensors is None or found.shape != (loader.size,):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(weights).__name__
        raise ValueError(f"weights: expected one number for each of {loader.size} data in memory, got {got}")
    if not bool((found >= 0).all()) or not bool((found > 0).any()):
        raise ValueError(f"weights: expected numbers of at least 0, not all 0, got {found.min().item()}")
    return found.double()


def _possible(
    steps: Any, loader: Minibatches, weights: Tensor | None, place: torch.device
) -> tuple[Minibatches, Tensor | None]:
    """The data, and their weights, to which the current parameters give a positive probability."""
    if loader.tensors is None:
        raise ValueError("impossible: expected data in memory for 'skip', got a Dataset or DataLoader")
    values = [steps.expect(batches.to(b, place), None)[0].cpu() for b in loader.in_order()]
    keep = torch.cat(values) != -math.inf
    if bool(keep.all()):
        return loader, weights
    if not bool(keep.any()):
        raise ValueError("data: expected some rows of positive probability under the start, got none")
    left_out = int((~keep).sum())
    warnings.warn(f"data: left out {left_out} of {len(keep)} rows, which the start gives probability zero")
    kept = batches.rows(loader.tensors, keep)
    return Minibatches(kept, loader.batch_size, loader.seed), None if weights is None else weights[keep]


def _never(*batch: Any, **named: Any) -> bool:
    return False


def _known(loader: Minibatches) -> Batch:
    """All data if they are in memory, otherwise some."""
    return loader.first() if loader.tensors is None else loader.tensors


def _initialize(pair: Any, batch: Batch, seed: int, start: str | None) -> None:
    def initialize(*parts: Any, **named: Any) -> None:
        pair.initialize(*parts, **named, **({} if start is None else {"start": start}))

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batches.call(initialize, batch)


class _Job:
    """The state of a run, and what saves and restores all of it.

    ``active`` are the indices of the restarts still running: one, or all of those that run side by side.
    """

    def __init__(
        self,
        pair: Pair,
        steps: Any,
        loader: Minibatches,
        weights: Minibatches | None,
        place: torch.device,
        run: RunDirectory | None,
        probed: tuple[Tensor, Any] | None,
        seed: int,
        start: str | None,
    ) -> None:
        self.probed, self.seed, self.start, self.weights = probed, seed, start, weights
        self.pair, self.steps, self.loader, self.place, self.run = pair, steps, loader, place, run
        self.side_by_side = False
        self.active: list[int] = []
        self.values: list[float] = []  # their objectives after the last step, nats over all data
        self.sizes = torch.zeros(1)  # sums of the sizes of the objectives' terms
        self.restart = self.epoch = self.step = 0  # the next restart
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
        limit: float,
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
        began = time.monotonic()
        self.pair.eval()
        if self.epoch >= epochs:  # a finished run is resumed
            self.stopped = "epochs"
        with bar, interruptible() as interrupt, unregistered(), ExitStack() as unchecked:
            if self.active:
                unchecked.enter_context(pyro.validation_enabled(False))
            while self.stopped is None:
                if not self.active:
                    self._begin(restarts)
                    # the first pass also checks that all data are in the model's support
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
                bar.update(len(self.active))
                done = [stepwise is None and gain < tolerance * count for gain in gains]
                if self.epoch == epochs:
                    self._end(range(len(self.active)), None, restarts, "converged" if all(done) else "epochs")
                elif any(done):
                    rows = [row for row, ended in enumerate(done) if ended]
                    statistics = self._end(rows, statistics, restarts, "converged")
                if self.stopped is None and (interrupt.is_set() or time.monotonic() - began > limit):
                    self.stopped = "interrupted" if interrupt.is_set() else "budget"
                if self.run is not None and time.monotonic() - self.saved > checkpoint_seconds:
                    self.save()
        self.save()
        cut = self.stopped in ("interrupted", "budget") and self.values
        if cut and max(self.values) > self.best_value:
            if self.side_by_side:
                row = self.values.index(max(self.values))
                now = {k: v[row] for k, v in state_of(self.steps.pair).items()}
                copy_into(state_of(self.pair), now, "the best active start")
        elif self.best is not None:
            copy_into(state_of(self.pair), self.best, "the best start")
        return self.stopped

    def _begin(self, restarts: int) -> None:
        """Begin the next start, or all of them side by side."""
        known = batches.to(_known(self.loader), self.place)
        self.active = list(range(restarts)) if self.side_by_side else [self.restart]
        self.step = 0
        if self.side_by_side:
            own = {k: v.detach().clone() for k, v in state_of(self.pair).items()}
            self.steps, self.probed = StackedSteps(self.pair, self.steps.hard, restarts), None
        for row, restart in enumerate(self.active):
            if restart:
                _initialize(self.pair, known, self.seed + restart, self.start)
            if self.side_by_side:
                for name, x in state_of(self.steps.pair).items():
                    x.data[row] = state_of(self.pair)[name].data
        if self.side_by_side:
            copy_into(state_of(self.pair), own, "the pair")
        self.restart = self.active[-1] + 1

    def _end(self, rows: Sequence[int], statistics: Any, restarts: int, why: str) -> Any:
        """End the restarts in these rows, and keep the best so far."""
        state = state_of(self.steps.pair)
        for row in rows:
            value, restart = self.values[row], self.active[row]
            if value > self.best_value or (value == self.best_value and restart < self.best_restart):
                alone = {k: v[row] if self.side_by_side else v for k, v in state.items()}
                self.best = {k: v.detach().clone() for k, v in alone.items()}
                self.best_value, self.best_restart = value, restart
        left = [row for row in range(len(self.active)) if row not in rows]
        if not left and self.restart == restarts:
            self.stopped = why  # they stay active, in case a resumed run has more epochs
            return None
        self.active, self.values = [self.active[r] for r in left], [self.values[r] for r in left]
        if not left:
            self.epoch, self.running = 0, None
            return None
        return self.steps.keep(left, statistics)

    def _log_prior(self) -> Tensor:
        prior = getattr(self.steps.pair, "log_prior", None)
        with torch.no_grad():
            found = torch.zeros(()) if prior is None else torch.as_tensor(prior()).cpu()
        return found.double().expand(len(self.active) or 1)

    def _pieces(self, epoch: int | None) -> Iterator[tuple[Batch, Tensor | None, float]]:
        """Pieces of the data with their weights and total weight: in order, or shuffled for an epoch."""
        pieces = self.loader.in_order() if epoch is None else self.loader.epoch(epoch)
        if self.weights is None:
            for batch in pieces:
                yield batches.to(batch, self.place), None, batches.size(batch)
            return
        shares: Any = self.weights.in_order() if epoch is None else self.weights.epoch(epoch)
        for batch, share in zip(pieces, shares, strict=True):
            yield batches.to(batch, self.place), share.to(self.place), float(share.sum())

    def _expect(self) -> tuple[list[float], Any, float]:
        """The objective of all data under the current parameters, the statistics, and the number of data."""
        total, count, statistics = self._log_prior(), 0.0, None
        self.sizes = total.abs()
        for batch, share, number in self._pieces(None):
            value, found = self.probed or self.steps.expect(batch, share)
            self.probed = None
            total = total + self._sum(value, share, count)
            self.sizes = self.sizes + self._sum(value.abs(), share, count)
            count += number
            statistics = found if statistics is None else self.steps.add(statistics, found)
        return total.tolist(), statistics, count

    def _sum(self, value: Tensor, share: Tensor | None, before: float) -> Tensor:
        bad = ~torch.isfinite(value)
        if bool(bad.any()):
            row, found = int(bad.nonzero()[0, -1]), float(value[bad][0])
            why = (
                "no latent value explains it; smooth the start, or leave that datum out"
                if found == -math.inf
                else "the parameters are not finite"
            )
            raise ValueError(
                f"data: expected a finite log probability for every datum, got {found} for datum "
                f"{int(before) + row} (of that pass) "
                f"of {self.pair.name} in epoch {self.epoch + 1}: {why}"
            )
        value = value.double()
        return (value if share is None else value * share).sum(-1).cpu()

    def _stepwise(self, exponent: float) -> tuple[list[float], float]:
        total, count = self._log_prior(), 0.0
        size: Any = self.loader.size if self.weights is None else self.weights.tensors.sum()  # type: ignore
        for batch, share, number in self._pieces(self.epoch):
            value, found = self.steps.expect(batch, share)
            total = total + self._sum(value, share, count)
            count += number
            found = {k: v * (float(size or number) / number) for k, v in found.items()}
            if self.running is None:
                self.running = found
            else:
                rate = (self.step + 2) ** -exponent
                self.running = {k: v * (1 - rate) + found[k] * rate for k, v in self.running.items()}
            self.steps.maximize(self.running)
            self.step += 1
        return total.tolist(), count

    def _check(self, values: list[float], count: float) -> None:
        rounding = 1e-9 if next(iter(state_of(self.pair).values())).dtype == torch.float64 else 1e-5
        for restart, old, new, size in zip(
            self.active, self.values, values, self.sizes.tolist(), strict=True
        ):
            if not new >= old - rounding * max(size, 1.0):
                which = f"epoch {self.epoch + 1}" + (f", restart {restart}" if restart else "")
                raise NotMonotone(
                    f"step {self.step} ({which}) of {self.pair.name} lowered the objective from "
                    f"{old / count:.9f} to {new / count:.9f} nats per datum: its M-step does not maximize "
                    f"the expected log "
                    "joint, or its E-step belongs to another model"
                )

    def _record(self, values: list[float], count: float, callbacks: Sequence[Callable], bar: Any) -> None:
        rows = []
        for restart, value, prior in zip(self.active, values, self._log_prior().tolist(), strict=True):
            loss = -(value - prior) / count
            rows.append({"epoch": self.epoch, "step": self.step, "loss": loss, "restart": restart})
        self.metrics += rows
        bar.set_postfix({"loss": f"{min(r['loss'] for r in rows):.4f}"}, refresh=False)
        if self.run is not None:
            for row in rows:
                self.run.append_metrics(row)
        try:
            for row in rows if callbacks else ():
                for callback in callbacks:
                    callback(row)
        except KeyboardInterrupt:
            self.stopped = "interrupted"

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        if self.run is None:
            return
        tensors = {f"state/{k}": v for k, v in state_of(self.steps.pair).items()}
        if self.best is not None:
            tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for name, value in (self.running or {}).items():
            fields = {"": value} if isinstance(value, Tensor) else dataclasses.asdict(value)
            tensors |= {f"statistics/{name}/{k}": v for k, v in fields.items()}
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "restart": self.restart,
            "active": self.active,
            "rows": len(self.metrics),
            "values": [repr(v) for v in self.values],
            "best_value": repr(self.best_value),
            "best_restart": self.best_restart,
            "stopped": self.stopped,
        }
        self.run.save_checkpoint(tensors, meta)
        self.saved = time.monotonic()

    def load(self) -> None:
        """Restore everything; a run without a checkpoint starts from the beginning."""
        assert self.run is not None
        loaded = self.run.load_checkpoint()
        if loaded is None:
            self.run.keep_metrics(0)
            return
        tensors, meta = loaded
        self.active = meta["active"]
        state, where = group(tensors, "state/"), str(self.run.path / "checkpoint.safetensors")
        if self.side_by_side:
            self.steps = StackedSteps(self.pair, self.steps.hard, len(self.active))
        if self.active:
            copy_into(state_of(self.steps.pair), state, where)
        best = group(tensors, "best/")
        self.best = {k: v.to(self.place) for k, v in best.items()} or None
        self.running = self._statistics(group(tensors, "statistics/"))
        counts = ("epoch", "step", "restart", "best_restart", "rows")
        found = {key: self.run.count(meta, key) for key in counts}
        self.epoch, self.step, self.restart = found["epoch"], found["step"], found["restart"]
        self.values, self.best_value = [float(v) for v in meta["values"]], float(meta["best_value"])
        self.best_restart = found["best_restart"]
        self.metrics = self.run.keep_metrics(found["rows"])
        self.stopped = "converged" if meta["stopped"] == "converged" else None

    def _statistics(self, stored: dict[str, Tensor]) -> Statistics | None:
        if not stored:
            return None
        batch, share, _ = next(self._pieces(None))
        _, like = self.steps.expect(batch, share)
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
        raise ValueError(f"seed: expected a whole number from 0 to 2**32 - 1, got {seed!r}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number of nats of at least 0, got {tolerance!r}")
    if stepwise is not None and not 0.5 < stepwise <= 1:
        raise ValueError(f"stepwise: expected an exponent in (0.5, 1], got {stepwise!r}")
    if stepwise is not None and batch_size is None:
        raise ValueError("stepwise: expected a batch_size with it, got None")

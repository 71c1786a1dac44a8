"""`fit`: train a pair with any objective, with checkpoints, so that a kill loses nothing."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from tqdm import tqdm

from pyroelbo import batch as batches
from pyroelbo.batch import Batch, Minibatches
from pyroelbo.numerics import duration
from pyroelbo.objectives import Objective, build
from pyroelbo.objectives.base import PerDatum, Update, adapt
from pyroelbo.optim import TrainingStep
from pyroelbo.pair import Pair, unregistered
from pyroelbo.results import Bound, Run
from pyroelbo.runs import RunDirectory, choose_device, copy_into, group, interruptible
from pyroelbo.training.checks import parameters_of, probe, trainable
from pyroelbo.training.settings import FitSettings
from pyroelbo.training.step import EagerStep, UpdateSequence

__all__ = ["fit"]

_VALIDATION_SEED = 7


def fit(
    pair: Pair,
    data: Any,
    *,
    valid: Any = None,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    **settings: Any,
) -> Run:
    """Train ``pair`` in place on ``data`` by stochastic gradients; losses are in nats per datum.

    Objectives by name: ``"elbo"`` (Trace_ELBO; for an exact guide only ln w is differentiated),
    ``"mean_field"`` (closed-form KL terms; refused where they are not the bound's), ``"layered"`` (closed
    form where it is the bound's term; see :class:`~pyroelbo.objectives.Layered_ELBO`), ``"aggressive"``
    (several updates of the encoder for each of the rest), ``"hard"`` (without the guide's entropy),
    ``"progressive"`` (chains layer by layer, :class:`~pyroelbo.objectives.Progressive_ELBO`), ``"iwae"`` (the
    importance-weighted bound of ``particles`` draws, :class:`~pyroelbo.objectives.IWAE_ELBO`), ``"enum"``
    (TraceEnum_ELBO), ``"evidence"`` (-ln p(y) of an ExactPair, without its guide). A pair's
    ``auxiliary_loss(*batch)``, [B], if it has one, is added to the loss (per datum) and never enters a bound.

    Args:
        pair: the pair to train.
        data: all data as a batch (a tensor, a tuple or a dict), cut into minibatches; a map-style Dataset; or
            a DataLoader, which makes its own batches.
        valid: a batch whose bound is measured after each epoch, in the metric ``valid_METHOD``.
        device: where to train; CUDA if there is one, unless given.
        out: a new run directory for metrics, checkpoints and the final weights.
        resume: continue from the checkpoint in ``out``; on the CPU the result equals an unbroken run bit for
            bit (pass the same functions).
        config: stored with the run.
        progress: show a progress bar.
        callbacks: called with each epoch's row of metrics; one that raises KeyboardInterrupt stops the run.
        {settings}

    Raises, before training starts, ValueError or TypeError for data that are not finite, of wrong shape or
    outside the likelihood's support (all data in memory are checked; of a Dataset or DataLoader the first
    batch), sites that do not match, a model without the plate ``"data"``, an unknown part, a checkpoint of
    another pair; RuntimeError if CUDA is requested and absent; FileExistsError and PermissionError for the
    run directory. A loss that is not finite raises FloatingPointError and names the epoch; the last
    checkpoint stays.
    """
    known = {f.name for f in dataclasses.fields(FitSettings)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TypeError(f"fit: expected settings among {sorted(known)}, got {unknown[0]!r}")
    chosen = FitSettings(**settings)
    if chosen.patience is not None and valid is None:
        raise ValueError("patience: expected validation data with it: give valid=")
    if resume and out is None:
        raise ValueError("resume: expected the run directory to continue: give out=")
    place = choose_device(device)
    loader = Minibatches(data, chosen.batch_size, chosen.seed)
    held_out = None if valid is None else batches.to(batches.as_batch(valid, "valid"), place)
    pyro.set_rng_seed(chosen.seed)
    pair.to(place)
    objective = build(chosen.objective, pair, chosen.particles)
    if callable(chosen.kl_weight) or chosen.kl_weight != 1.0:
        start = chosen.kl_weight(0.0) if callable(chosen.kl_weight) else chosen.kl_weight
        objective = objective.weighted(start)
    first = batches.to(loader.first(), place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was not registered in the param store because requires_grad")
        leaves, full_size = probe(pair, first, loader)
        objective.check(pair, first)
    sequence = _updates(pair, objective, chosen, leaves, full_size)
    stored = {
        **(config or {}),
        **chosen.serialize(objective),
        "fingerprint": loader.fingerprint(),
        "valid": None if held_out is None else batches.fingerprint(held_out),
    }
    run = None if out is None else RunDirectory.create(out, stored, resume, FitSettings.FREE)
    with closing(run) if run is not None else nullcontext():
        pyro.set_rng_seed(chosen.seed)
        job = _Job(pair, objective, chosen, leaves, sequence, held_out, run)
        if run is not None and resume:
            with run.restoring():
                job.load()
        began = time.perf_counter()
        stopped = job.train(loader, place, progress, callbacks)
        seconds = time.perf_counter() - began
        if run is not None:
            run.finish(job.state, stopped=stopped, epochs=job.epoch, steps=job.step, seconds=seconds)
    return Run(tuple(job.metrics), stopped, seconds, None if run is None else run.path)


def _document() -> None:
    """Give ``fit`` the signature and the description of its settings."""
    fields = dataclasses.fields(FitSettings)
    about = "\n    ".join(f"{f.name}: {f.metadata['about']}." for f in fields)
    fit.__doc__ = inspect.cleandoc(fit.__doc__ or "").replace("{settings}", about)
    own = inspect.signature(fit)
    keep = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keep += [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields
    ]
    fit.__signature__ = own.replace(parameters=keep)  # type: ignore[attr-defined]


_document()


def _updates(
    pair: Pair,
    objective: Objective,
    settings: FitSettings,
    leaves: dict[str, Tensor],
    full_size: int | None,
) -> UpdateSequence:
    """The objective's updates as steps on their own parameters."""
    make: Any = EagerStep
    if settings.compile:
        from pyroelbo.compiled import CompiledStep

        make = CompiledStep
    updates = objective.updates()
    owned = parameters_of(updates, pair, trainable(pair, leaves, settings.freeze))
    buffers = {k: v for k, v in pair.named_buffers() if v.is_floating_point()}
    steps: dict[str, TrainingStep] = {}
    for name, parameters in owned.items():
        steps[name] = make(
            _per_datum(updates[name], pair, full_size, None if settings.compile else pair.unpadded),
            pair.model,
            pair.guide,
            parameters,
            lr=settings.learning_rate,
            buffers=buffers if not steps else None,
            **settings.rule_fields(),
        )
    return UpdateSequence(steps, {name: updates[name].times for name in steps})


def _per_datum(
    update: Update, pair: Pair, full_size: int | None, parts: Callable[..., Sequence[Batch]] | None
) -> PerDatum:
    scaled = full_size is not None and adapt(update.loss).scales_subsamples

    def count(rows: int) -> float:
        return full_size if scaled else float(rows)  # type: ignore[return-value]

    return PerDatum(update.loss, count, getattr(pair, "auxiliary_loss", None), parts)


class _Job:
    """The state of a training run, and what saves and restores all of it."""

    def __init__(
        self,
        pair: Pair,
        objective: Objective,
        settings: FitSettings,
        leaves: dict[str, Tensor],
        sequence: UpdateSequence,
        valid: Batch | None,
        run: RunDirectory | None,
    ) -> None:
        self.pair, self.objective, self.settings = pair, objective, settings
        self.sequence, self.valid, self.run = sequence, valid, run
        self.state = {**leaves, **dict(pair.named_buffers())}
        self.best: dict[str, Tensor] | None = None
        self.best_value, self.best_epoch = -math.inf, 0
        self.epoch = self.step = self.position = 0
        self.loss_sum = torch.zeros(len(sequence.updates), dtype=torch.float64)  # a loss for each update
        self.loss_count = 0
        self.epoch_rng: Tensor | None = None
        self.metrics: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self.deadline = math.inf
        self.saved = -math.inf  # the first checkpoint comes after the first step

    # ------------------------------------------------------------------------------------------ one run

    def train(
        self, loader: Minibatches, place: torch.device, progress: bool, callbacks: Sequence[Callable]
    ) -> str:
        """Train until the last epoch, an early stop or an interrupt; leave the final weights in the pair."""
        if self.settings.budget is not None:
            self.deadline = time.monotonic() + duration(self.settings.budget)
        self.loss_sum = self.loss_sum.to(place)
        self.pair.train()
        total = self.settings.epochs * loader.steps if loader.steps else None
        bar = tqdm(
            total=total,
            initial=self.step,
            disable=not progress,
            unit="step",
            mininterval=0.3 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )
        with (
            bar,
            interruptible() as interrupt,
            unregistered(),
            pyro.validation_enabled(False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", "Encountered NaN")  # an error of ours names the epoch
            while self.stopped is None and self.epoch < self.settings.epochs:
                self._run_epoch(loader, place, bar, interrupt)
                if interrupt.is_set() or time.monotonic() > self.deadline:
                    self.stopped = "interrupted" if interrupt.is_set() else "budget"
                    break
                row = self._end_epoch()
                bar.set_postfix(self._postfix(row), refresh=False)
                try:
                    for callback in callbacks:
                        callback(row)
                except KeyboardInterrupt:
                    self.stopped = "interrupted"
                    break
                except Exception:
                    self.save()
                    raise
                patience = self.settings.patience
                if patience is not None and self.epoch - self.best_epoch >= patience:
                    self.stopped = "early"
        self.stopped = self.stopped or "epochs"
        self.save()
        _assign(self.state, self.best if self.best is not None else self.kept())
        self.pair.eval()
        return self.stopped

    def _run_epoch(
        self, loader: Minibatches, place: torch.device, bar: Any, interrupt: threading.Event
    ) -> None:
        settings = self.settings
        factor, anneal = settings.factor, settings.kl_weight if callable(settings.kl_weight) else None
        repeats = 1 if self.objective.takes_particles else settings.particles
        shown = time.monotonic()
        for batch in self._epoch_batches(loader):
            when = self.epoch + self.position / loader.steps if loader.steps else float(self.epoch)
            self.sequence.lr = settings.learning_rate * factor(when)
            if anneal is not None:
                self.objective.weight = anneal(when)
            count = batches.size(batch)
            batch = batches.to(batch, place)
            batch = batch if repeats == 1 else batches.repeat(batch, repeats)
            self.loss_sum += batches.call(self.sequence, batch) * count
            self.loss_count += count
            self.position += 1
            self.step += 1
            bar.update()
            now = time.monotonic()
            if not bar.disable and now - shown > bar.mininterval:
                shown = now
                bar.set_postfix(self._postfix(), refresh=False)
            if self.run is not None and now - self.saved > settings.checkpoint_seconds:
                self._check_finite()
                self.save()
            if interrupt.is_set() or now > self.deadline:
                return

    def _epoch_batches(self, loader: Minibatches) -> Iterator[Batch]:
        if self.position == 0:
            self.epoch_rng = torch.get_rng_state()
            yield from loader.epoch(self.epoch)
            return
        # A user's DataLoader draws its order from the global generator when the epoch begins.
        after = torch.get_rng_state()
        assert self.epoch_rng is not None
        torch.set_rng_state(self.epoch_rng)
        left = loader.epoch(self.epoch, skip=self.position)
        first = next(left, None)
        torch.set_rng_state(after)
        if first is not None:
            yield first
            yield from left

    def _check_finite(self) -> None:
        if not bool(torch.isfinite(self.loss_sum).all()):
            raise FloatingPointError(
                f"loss: expected finite values, got {self.loss_sum.tolist()} in epoch {self.epoch + 1}, by "
                f"step "
                f"{self.step}: lower learning_rate, set clip_norm, or look for a scale that goes to zero"
            )

    def _losses(self) -> dict[str, float]:
        """The epoch's mean losses: that of the first update, and by name where there are several."""
        means = dict(zip(self.sequence.updates, (self.loss_sum / self.loss_count).tolist(), strict=True))
        named = {f"loss_{name}": value for name, value in means.items()} if len(means) > 1 else {}
        return {"loss": next(iter(means.values())), **named}

    def _end_epoch(self) -> dict[str, Any]:
        self._check_finite()
        self.epoch += 1
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.step, **self._losses()}
        row["learning_rate"] = self.sequence.lr
        if self.objective.weight is not None:
            row["kl_weight"] = self.objective.weight
        if self.settings.skip_norm is not None:
            row["skipped"] = self.sequence.skipped
        self.position, self.loss_count = 0, 0
        self.loss_sum = torch.zeros_like(self.loss_sum)
        if self.valid is not None:
            bound = self._validate(self.valid)
            row[f"valid_{bound.method}"] = bound.mean
            if bound.mean > self.best_value:
                self.best_value, self.best_epoch = bound.mean, self.epoch
                if self.settings.patience is not None or self.settings.budget is not None:
                    self.best = {k: v.detach().clone() for k, v in self.kept().items()}
        self.metrics.append(row)
        if self.run is not None:
            self.run.append_metrics(row)
        return row

    def _validate(self, valid: Batch) -> Bound:
        """The objective's bound of the held-out data under the final weights."""
        averages = self.sequence.averages
        own = {k: self.state[k].detach().clone() for k in averages}
        _assign(self.state, averages)
        cuda = [self.loss_sum.device] if self.loss_sum.is_cuda else []
        # A caller's autocast would reuse casts of an earlier epoch's weights.
        whole = torch.autocast(self.loss_sum.device.type, enabled=False)
        with torch.random.fork_rng(devices=cuda), whole:
            torch.manual_seed(_VALIDATION_SEED)
            bound = self.objective.validate(self.pair, valid)
        _assign(self.state, own)
        return bound

    def _postfix(self, row: Mapping[str, Any] | None = None) -> dict[str, str]:
        shown = {"epoch": f"{self.epoch + (row is None)}"}
        last = row or (self.metrics[-1] if self.metrics else {})
        if self.loss_count:
            shown["loss"] = f"{self._losses()['loss']:.3f}"
        elif last:
            shown["loss"] = f"{last['loss']:.3f}"
        valid = [value for name, value in last.items() if name.startswith("valid_")]
        return shown | ({"valid": f"{valid[0]:.3f}"} if valid else {})

    def kept(self) -> dict[str, Tensor]:
        """The weights that a run ends with: the moving averages where there are any."""
        return {**self.state, **self.sequence.averages}

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        if self.run is None:
            return
        tensors = {f"state/{k}": v for k, v in self.state.items()}
        tensors |= {f"step/{k}": v for k, v in self.sequence.state_dict().items()}
        if self.best is not None:
            tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors["loss_sum"] = self.loss_sum
        if self.epoch_rng is not None:
            tensors["rng/epoch"] = self.epoch_rng
        generators, plain = _generators()
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "loss_count": self.loss_count,
            "best_value": repr(self.best_value),
            "best_epoch": self.best_epoch,
            "rows": len(self.metrics),
            "stopped": self.stopped,
            **plain,
        }
        self.run.save_checkpoint(tensors | generators, meta)
        self.saved = time.monotonic()

    def load(self) -> None:
        """Restore everything; a run without a checkpoint starts from the beginning."""
        assert self.run is not None
        loaded = self.run.load_checkpoint()
        if loaded is None:
            self.run.keep_metrics(0)
            return
        tensors, meta = loaded
        where = str(self.run.path / "checkpoint.safetensors")
        copy_into(self.state, group(tensors, "state/"), where)
        self.sequence.load_state_dict(group(tensors, "step/"))
        best = group(tensors, "best/")
        self.best = {k: v.to(self.state[k].device) for k, v in best.items()} or None
        counts = ("epoch", "step", "position", "best_epoch", "loss_count", "rows")
        found = {key: self.run.count(meta, key) for key in counts}
        self.epoch, self.step, self.position = found["epoch"], found["step"], found["position"]
        if self.epoch > self.settings.epochs:
            raise ValueError(
                f"epochs: expected at least the {self.epoch} that {self.run.path} has, got "
                f"{self.settings.epochs}"
            )
        self.best_value, self.best_epoch = float(meta["best_value"]), found["best_epoch"]
        self.loss_sum, self.loss_count = tensors["loss_sum"], found["loss_count"]
        self.epoch_rng = tensors.get("rng/epoch")
        self.metrics = self.run.keep_metrics(found["rows"])
        _restore_generators(tensors, meta)
        self.stopped = "early" if meta["stopped"] == "early" else None


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the random generators of torch, numpy and Python: tensors, and plain values."""
    tensors = {"rng/torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    tensors["rng/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, internal, cached = random.getstate()
    return tensors, {
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), cached],
    }


def _restore_generators(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    torch.set_rng_state(tensors["rng/torch"])
    if torch.cuda.is_available() and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    kind, position, has_gauss, gauss = meta["numpy"]
    np.random.set_state((kind, tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, cached = meta["python"]
    random.setstate((version, tuple(internal), cached))


@torch.no_grad()
def _assign(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)

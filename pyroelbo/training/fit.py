"""`fit`: train a pair with any of Pyro's losses, checkpointed so that a kill loses nothing."""

from __future__ import annotations

import math
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from tqdm import tqdm

from pyroelbo import batch as batches
from pyroelbo import evidence
from pyroelbo.batch import Batch, Minibatches
from pyroelbo.evaluation.sites import check_observation, check_support, observed_part
from pyroelbo.numerics import positive_count
from pyroelbo.objectives import (
    IWAE_ELBO,
    OBJECTIVES,
    Evidence_ELBO,
    Exact_ELBO,
    Layered_ELBO,
    Weighted_ELBO,
    mean_field_fault,
)
from pyroelbo.objectives.base import Annealed, PerDatum, WrappedELBO
from pyroelbo.optim import OPTIMIZERS
from pyroelbo.pair import PLATE, ExactPair, Pair, unregistered
from pyroelbo.results import Run
from pyroelbo.runs import RunDirectory, choose_device, copy_into, group, interruptible
from pyroelbo.training.step import EagerStep

if TYPE_CHECKING:
    from pyroelbo.compiled import CompiledStep

__all__ = ["fit"]

_VALIDATION_SEED = 7


def fit(
    pair: Pair,
    data: Any,
    *,
    valid: Any = None,
    objective: str | ELBO = "elbo",
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    schedule: str | Callable[[float], float] = "constant",
    optimizer: str = "adam",
    particles: int = 1,
    kl_weight: float | Callable[[float], float] = 1.0,
    clip_norm: float | None = None,
    skip_norm: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    freeze: Sequence[str] = (),
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 10.0,
    config: Mapping[str, Any] | None = None,
    compile: bool = False,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> Run:
    """Train ``pair`` in place on ``data`` by stochastic gradients of an ELBO; losses are nats per datum.

    ``data`` is a batch (a tensor, a tuple or a dict: all data at once), a map-style Dataset, or a DataLoader,
    which brings its own batches. ``valid``, a batch, gets an ELBO after each epoch (``"iwae"``: that bound); with
    ``patience`` training stops after so many epochs without a better one, and the best weights are kept.

    ``objective``: ``"elbo"`` (Trace_ELBO; for an exact guide ln w alone is differentiated), ``"mean_field"``
    (closed-form KLs; refused where they are not the bound's terms), ``"layered"`` (closed form where they
    are; see :class:`~pyroelbo.objectives.Layered_ELBO`), ``"hard"`` (without the encoder's entropy), ``"iwae"``
    (the importance-weighted bound of ``particles`` draws, :class:`~pyroelbo.objectives.IWAE_ELBO`), ``"enum"``,
    ``"evidence"`` (-ln p(y) of an ExactPair, without its guide) or any Pyro ELBO that has a
    ``differentiable_loss``. With all but ``"iwae"``, ``particles`` repeats each batch along its
    first dimension. ``kl_weight`` and ``schedule`` (``"constant"``, ``"cosine"`` to zero over all epochs) may
    be functions of the epoch, a float, that give the weight of the KL and a factor on ``learning_rate``.
    ``clip_norm`` bounds the gradient's norm, and a step whose gradient is longer than ``skip_norm`` is left
    out (the rows of metrics count them); ``ema`` is the decay of a moving average of the weights, which is what
    is validated and kept (BatchNorm's running statistics are averaged alike). ``freeze`` names parts that stay
    as they are: ``("encoder",)`` is fixed-encoder training. ``compile`` runs loss, gradients and update as one
    graph (:class:`~pyroelbo.compiled.CompiledStep`), which pays off after some thousand steps: building it
    takes seconds for each shape of batch.

    ``device`` is CUDA where there is one, unless given. ``out`` is a new run directory, with
    ``metrics.jsonl``, a checkpoint every ``checkpoint_seconds`` and the weights at the end; ``resume`` goes
    on from its checkpoint and, on the CPU, gives what an unbroken run gives, bit for bit (callables must be
    the same ones again). ``config`` is stored with it. ``callbacks`` are called with each epoch's row of
    metrics.

    Raises, before training starts, ValueError or TypeError for data that are not finite, of wrong shape or
    outside the likelihood's support (of all data in memory; of a Dataset or DataLoader its first batch),
    sites that do not match, a model without the plate ``"data"``, an unknown part, a foreign checkpoint;
    RuntimeError for CUDA asked for and absent; FileExistsError and PermissionError for the run directory. A
    loss that is not finite raises FloatingPointError and names the epoch; the last checkpoint stands.
    """
    _check_settings(
        epochs, batch_size, learning_rate, particles, clip_norm, skip_norm, ema, patience, valid, seed
    )
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer takes one of {tuple(OPTIMIZERS)}, got {optimizer!r}")
    if resume and out is None:
        raise ValueError("resume takes the run directory to go on with: give out=")
    factor = _schedule(schedule, epochs)
    place = choose_device(device)
    loader = Minibatches(data, batch_size, seed)
    held_out = None if valid is None else batches.to(batches.as_batch(valid, "valid"), place)
    pyro.set_rng_seed(seed)
    pair.to(place)
    loss_fn = _objective(objective, pair, kl_weight, particles)
    repeats = 1 if isinstance(loss_fn, IWAE_ELBO) else particles
    first = batches.to(loader.first(), place)
    leaves, per_datum = _probe(pair, first, loader)
    _check_mean_field(loss_fn, pair, first)
    if isinstance(loss_fn, Evidence_ELBO):
        per_datum = float  # the scale of a subsampled plate is not in it
    trained = _trained(pair, leaves, freeze)
    settings = {
        **(config or {}),
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer,
        "particles": particles,
        "clip_norm": clip_norm,
        "skip_norm": skip_norm,
        "ema": ema,
        "compile": compile,
        "freeze": list(freeze),
        "seed": seed,
        "objective": objective if isinstance(objective, str) else _described(objective),
        "kl_weight": "a function" if callable(kl_weight) else kl_weight,
        "schedule": "a function" if callable(schedule) else schedule,
        # The cosine depends on the last epoch, so such a run cannot be lengthened.
        "schedule_epochs": epochs if schedule == "cosine" else None,
        "patience": patience,
        "fingerprint": loader.fingerprint(),
        "valid": None if held_out is None else batches.fingerprint(held_out),
    }
    run = None if out is None else RunDirectory.create(out, settings, resume)
    pyro.set_rng_seed(seed)
    plan = _Plan(
        epochs,
        repeats,
        factor,
        kl_weight if callable(kl_weight) else None,
        held_out,
        skip_norm is not None,
        patience,
        checkpoint_seconds,
        progress,
        callbacks,
    )
    make: Any = EagerStep
    if compile:
        from pyroelbo.compiled import CompiledStep

        make = CompiledStep
    stepper = make(
        PerDatum(loss_fn, per_datum),
        pair.model,
        pair.guide,
        trained,
        optimizer=optimizer,
        lr=learning_rate,
        clip_norm=clip_norm,
        skip_norm=skip_norm,
        ema=ema,
        buffers={k: v for k, v in pair.named_buffers() if v.is_floating_point()},
    )
    job = _Job(pair, loss_fn, leaves, stepper, run)
    if resume:
        job.load()
    began = time.perf_counter()
    stopped = job.train(loader, place, plan)
    seconds = time.perf_counter() - began
    if run is not None:
        run.finish(
            job.state,
            {"stopped": stopped, "epochs": job.epoch, "steps": job.step, "seconds": round(seconds, 3)},
        )
    return Run(tuple(job.metrics), stopped, seconds, None if run is None else run.path)


@dataclass(frozen=True)
class _Plan:
    epochs: int
    particles: int
    factor: Callable[[float], float]
    kl_weight: Callable[[float], float] | None
    valid: Batch | None
    skipping: bool
    patience: int | None
    checkpoint_seconds: float
    progress: bool
    callbacks: Sequence[Callable[[dict[str, Any]], None]]


class _Job:
    """The state of a training run, and what saves and restores all of it."""

    def __init__(
        self,
        pair: Pair,
        loss_fn: ELBO,
        leaves: dict[str, Tensor],
        stepper: EagerStep | CompiledStep,
        run: RunDirectory | None,
    ) -> None:
        self.pair, self.loss_fn, self.run = pair, loss_fn, run
        self.state = {**leaves, **dict(pair.named_buffers())}
        self.stepper, self.learning_rate = stepper, stepper.lr
        self.best: dict[str, Tensor] | None = None
        self.best_value, self.best_epoch = -math.inf, 0
        self.epoch = self.step = self.position = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.loss_count = 0
        self.epoch_rng: Tensor | None = None
        self.metrics: list[dict[str, Any]] = []
        self.stopped: str | None = None
        self.saved = -math.inf  # the first checkpoint comes after the first step

    # ------------------------------------------------------------------------------------------ one run

    def train(self, loader: Minibatches, place: torch.device, plan: _Plan) -> str:
        """Train until the last epoch, an early stop or an interrupt, and leave the weights to keep in the
        pair."""
        self.loss_sum = self.loss_sum.to(place)
        self.pair.train()
        total = plan.epochs * loader.steps if loader.steps else None
        every = 0.3 if sys.stderr.isatty() else 30.0
        bar = tqdm(
            total=total,
            initial=self.step,
            disable=not plan.progress,
            unit="step",
            mininterval=every,
            dynamic_ncols=True,
        )
        with (
            bar,
            interruptible() as interrupt,
            unregistered(),
            pyro.validation_enabled(False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings(
                "ignore", "Encountered NaN"
            )  # told by an error of our own, with the epoch
            while self.stopped is None and self.epoch < plan.epochs:
                self._run_epoch(loader, place, plan, bar, every, interrupt)
                if interrupt.is_set():
                    self.stopped = "interrupted"
                    break
                row = self._end_epoch(plan)
                bar.set_postfix(self._postfix(row), refresh=False)
                try:
                    for callback in plan.callbacks:
                        callback(row)
                except Exception:
                    self.save()
                    raise
                if plan.patience is not None and self.epoch - self.best_epoch >= plan.patience:
                    self.stopped = "early"
        self.stopped = self.stopped or "epochs"
        self.save()
        self._keep()
        self.pair.eval()
        return self.stopped

    def _run_epoch(
        self,
        loader: Minibatches,
        place: torch.device,
        plan: _Plan,
        bar: Any,
        every: float,
        interrupt: threading.Event,
    ) -> None:
        shown = time.monotonic()
        for batch in self._epoch_batches(loader):
            when = self.epoch + self.position / loader.steps if loader.steps else float(self.epoch)
            self.stepper.lr = self.learning_rate * plan.factor(when)
            if plan.kl_weight is not None:
                self.loss_fn.weight = plan.kl_weight(when)  # type: ignore[attr-defined]
            count = batches.size(batch)
            batch = batches.to(batch, place)
            batch = batch if plan.particles == 1 else batches.repeat(batch, plan.particles)
            self.loss_sum += batches.call(self.stepper, batch) * count
            self.loss_count += count
            self.position += 1
            self.step += 1
            bar.update()
            now = time.monotonic()
            if plan.progress and now - shown > every:
                shown = now
                bar.set_postfix(self._postfix(), refresh=False)
            if self.run is not None and now - self.saved > plan.checkpoint_seconds:
                self._finite()
                self.save()
            if interrupt.is_set():
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

    def _finite(self) -> None:
        if not math.isfinite(float(self.loss_sum)):
            raise FloatingPointError(
                f"the loss became {float(self.loss_sum)} in epoch {self.epoch + 1}, by step "
                f"{self.step}: lower learning_rate, set "
                "clip_norm, or look for a scale that runs to zero"
            )

    def _end_epoch(self, plan: _Plan) -> dict[str, Any]:
        self._finite()
        self.epoch += 1
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "loss": float(self.loss_sum) / self.loss_count,
        }
        row["learning_rate"] = self.stepper.lr
        if isinstance(self.loss_fn, Annealed):
            row["kl_weight"] = self.loss_fn.weight
        if plan.skipping:
            row["skipped"] = int(self.stepper.skipped)
        self.position, self.loss_count = 0, 0
        self.loss_sum = torch.zeros_like(self.loss_sum)
        if plan.valid is not None:
            name, value = self._validate(plan.valid)
            row[name] = value
            if value > self.best_value:
                self.best_value, self.best_epoch = value, self.epoch
                if plan.patience is not None:
                    self.best = {k: v.detach().clone() for k, v in self.kept().items()}
        self.metrics.append(row)
        if self.run is not None:
            self.run.append_metrics(row)
        return row

    def _validate(self, valid: Batch) -> tuple[str, float]:
        """The mean bound of the held-out data under the weights to keep, and its name: the bound that is trained."""
        averages = self.stepper.averages
        own = {k: self.state[k].detach().clone() for k in averages}
        _assign(self.state, averages)
        cuda = [self.loss_sum.device] if self.loss_sum.is_cuda else []
        # Under a caller's autocast, casts of weights are kept, and would be those of an earlier epoch.
        whole = torch.autocast(self.loss_sum.device.type, enabled=False)
        with torch.random.fork_rng(devices=cuda), whole:
            torch.manual_seed(_VALIDATION_SEED)
            name = "valid_elbo"
            if isinstance(self.loss_fn, Evidence_ELBO):
                bound = evidence.exact(self.pair, valid)
            elif isinstance(self.loss_fn, IWAE_ELBO):
                name = "valid_iwae"
                bound = evidence.iwae(self.pair, valid, particles=self.loss_fn.num_particles)
            else:
                bound = evidence.elbo(self.pair, valid, particles=8)
        _assign(self.state, own)
        return name, bound.mean

    def _postfix(self, row: Mapping[str, Any] | None = None) -> dict[str, str]:
        shown = {"epoch": f"{self.epoch + (row is None)}"}
        if self.loss_count:
            shown["loss"] = f"{float(self.loss_sum) / self.loss_count:.3f}"
        last = row or (self.metrics[-1] if self.metrics else {})
        if "loss" not in shown and last:
            shown["loss"] = f"{last['loss']:.3f}"
        for name in ("valid_elbo", "valid_iwae"):
            if name in last:
                shown["valid"] = f"{last[name]:.3f}"
        return shown

    def kept(self) -> dict[str, Tensor]:
        """The weights a run ends with: the best validated ones, else the moving average, else the last."""
        return {**self.state, **self.stepper.averages}

    def _keep(self) -> None:
        source = self.best if self.best is not None else self.kept()
        _assign(self.state, source)

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        if self.run is None:
            return
        tensors = {f"state/{k}": v for k, v in self.state.items()}
        tensors |= {f"step/{k}": v for k, v in self.stepper.state_dict().items()}
        if self.best is not None:
            tensors |= {f"best/{k}": v for k, v in self.best.items()}
        tensors["rng/torch"] = torch.get_rng_state()
        tensors["loss_sum"] = self.loss_sum
        if self.epoch_rng is not None:
            tensors["rng/epoch"] = self.epoch_rng
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        kind, keys, position, has_gauss, gauss = np.random.get_state()
        tensors["rng/numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
        version, internal, cached = random.getstate()
        meta = {
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "loss_count": self.loss_count,
            "best_value": repr(self.best_value),
            "best_epoch": self.best_epoch,
            "rows": len(self.metrics),
            "stopped": self.stopped,
            "numpy": [kind, int(position), int(has_gauss), float(gauss)],
            "python": [version, list(internal), cached],
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

        where = str(self.run.path / "checkpoint.safetensors")
        copy_into(self.state, group(tensors, "state/"), where)
        self.stepper.load_state_dict(group(tensors, "step/"))
        best = group(tensors, "best/")
        self.best = {k: v.to(self.state[k].device) for k, v in best.items()} or None
        self.best_value, self.best_epoch = float(meta["best_value"]), meta["best_epoch"]
        self.epoch, self.step, self.position = meta["epoch"], meta["step"], meta["position"]
        self.loss_sum, self.loss_count = tensors["loss_sum"], meta["loss_count"]
        self.epoch_rng = tensors.get("rng/epoch")
        self.metrics = self.run.keep_metrics(meta["rows"])
        torch.set_rng_state(tensors["rng/torch"])
        if torch.cuda.is_available() and "rng/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng/cuda"])
        kind, position, has_gauss, gauss = meta["numpy"]
        np.random.set_state(
            (kind, tensors["rng/numpy"].numpy().astype(np.uint32), position, has_gauss, gauss)
        )
        version, internal, cached = meta["python"]
        random.setstate((version, tuple(internal), cached))
        self.stopped = "early" if meta["stopped"] == "early" else None


def _check_settings(
    epochs, batch_size, learning_rate, particles, clip_norm, skip_norm, ema, patience, valid, seed
) -> None:
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("particles", particles)):
        positive_count(name, value, "whole number")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed takes a whole number, got {seed!r}")
    positive = (("learning_rate", learning_rate), ("clip_norm", clip_norm), ("skip_norm", skip_norm))
    for name, value in positive:
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} takes a positive number, got {value!r}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema takes a decay between 0 and 1, got {ema!r}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience takes a positive number of epochs, got {patience!r}")
    if patience is not None and valid is None:
        raise ValueError("patience looks at the validation bound: give valid=")


def _described(objective: ELBO) -> str:
    """Type and plain settings, so that a resumed run is held to them; the nesting of plates is found, not set."""
    plain = {k: v for k, v in sorted(vars(objective).items()) if isinstance(v, (bool, int, float, str))}
    plain.pop("max_plate_nesting", None)
    return f"{type(objective).__name__}({', '.join(f'{k}={v!r}' for k, v in plain.items())})"


def _objective(objective: str | ELBO, pair: Pair, kl_weight: Any, particles: int) -> ELBO:
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            raise ValueError(
                f"objective takes one of {tuple(OBJECTIVES)} or a pyro.infer.ELBO, got {objective!r}"
            )
        exact = objective == "elbo" and isinstance(pair, ExactPair) and pair.exact_guide
        loss: ELBO = Exact_ELBO() if exact else OBJECTIVES[objective]()
        if objective == "iwae":
            if particles == 1:
                raise ValueError("objective 'iwae' takes particles of at least 2, got 1: one draw is 'elbo'")
            loss = IWAE_ELBO(particles)
    elif isinstance(objective, ELBO):
        loss = objective
    else:
        raise TypeError(f"objective takes a name or a pyro.infer.ELBO, got a {type(objective).__name__}")
    if not hasattr(loss, "differentiable_loss"):
        raise TypeError(
            f"objective {type(loss).__name__} has no differentiable_loss: train it with pyro.infer.SVI"
        )
    if isinstance(loss, Evidence_ELBO):
        if not isinstance(pair, ExactPair):
            raise TypeError(
                f"objective 'evidence' takes an ExactPair, got a {type(pair).__name__}: take 'elbo'"
            )
        if kl_weight != 1.0:
            raise ValueError(f"kl_weight: objective 'evidence' has no KL to weigh, got {kl_weight!r}")
    weight = kl_weight(0.0) if callable(kl_weight) else kl_weight
    if not weight >= 0:
        raise ValueError(
            f"kl_weight takes a number of at least 0 or a function of the epoch, got {kl_weight!r}"
        )
    if isinstance(loss, (IWAE_ELBO, Layered_ELBO)):
        if callable(kl_weight) or weight != 1.0:
            loss.weight = weight
        return loss
    return Weighted_ELBO(loss, weight) if callable(kl_weight) or weight != 1.0 else loss


def _check_mean_field(loss: ELBO, pair: Pair, batch: Batch) -> None:
    """ValueError for a closed-form objective on a pair whose bound it would not be."""
    while isinstance(loss, WrappedELBO):
        loss = loss.inner
    if not isinstance(loss, TraceMeanField_ELBO):
        return
    with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
        fault = batches.call(
            lambda *args, **kwargs: mean_field_fault(pair.model, pair.guide, *args, **kwargs), batch
        )
    if fault is not None:
        raise ValueError(f"objective 'mean_field' (TraceMeanField_ELBO) is wrong for {pair.name}: {fault}")


def _schedule(schedule: str | Callable[[float], float], epochs: int) -> Callable[[float], float]:
    if callable(schedule):
        return schedule
    if schedule == "constant":
        return lambda epoch: 1.0
    if schedule == "cosine":
        return lambda epoch: 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))
    raise ValueError(f"schedule takes 'constant', 'cosine' or a function of the epoch, got {schedule!r}")


def _probe(pair: Pair, batch: Batch, loader: Minibatches) -> tuple[dict[str, Tensor], Callable[[int], float]]:
    """Run the pair once, checked: its trainable leaves by name, and by what a batch's loss is divided to be
    per datum."""
    shapes = {k: (tuple(v.shape), str(v.dtype)) for k, v in batches.parts(batch, "batch").items()}
    with torch.no_grad(), pyro.validation_enabled(True), poutine.trace(param_only=True) as captured:
        try:
            guide = batches.call(poutine.trace(pair.guide).get_trace, batch)
            with pyro.validation_enabled(False):
                model = batches.call(poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace, batch)
        except RuntimeError as error:
            raise ValueError(
                f"{pair.name} could not be run on a batch of shapes and types {shapes}: {str(error).splitlines()[0]}"
            ) from error
    guide, model = prune_subsample_sites(guide), prune_subsample_sites(model)
    sites = {k: s for k, s in model.nodes.items() if s["type"] == "sample"}
    drawn = {k: s for k, s in guide.nodes.items() if s["type"] == "sample"}
    latent = {k: s for k, s in sites.items() if not s["is_observed"]}
    for name, site in drawn.items():
        if name not in latent and not site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"guide site {name!r} is missing in the model, whose latent sites are {sorted(latent)}"
            )
    for name, site in latent.items():
        if name not in drawn and not site["infer"].get("enumerate"):
            raise ValueError(f"model site {name!r} is missing in the guide, which draws {sorted(drawn)}")
    observed = [s for s in sites.values() if s["is_observed"]]
    if not observed:
        raise ValueError("the model observes nothing: its last sites must be pyro.sample(..., obs=y)")
    for site in observed:
        check_observation(site, batch)
        _check_all(site, batch, loader)
    frames = [f for s in sites.values() for f in s["cond_indep_stack"] if f.name == PLATE]
    if not frames:
        raise ValueError(
            f'the model has no plate {PLATE!r}: write `with pyro.plate("{PLATE}", len(y)):` around the sites of one datum'
        )
    frame = frames[0]
    full = frame.size if frame.full_size is None else frame.full_size
    subsampled = full != frame.size
    outside = [k for k, s in sites.items() if not any(f.name == PLATE for f in s["cond_indep_stack"])]
    if outside and not subsampled and not loader.whole:
        raise ValueError(
            f"site {outside[0]!r} stands outside the plate {PLATE!r} and would be counted once a "
            "minibatch: declare the whole size, "
            f'pyro.plate("{PLATE}", N, subsample_size=len(y)), or train on one batch of all data (batch_size)'
        )
    leaves: dict[str, Tensor] = dict(pair.named_parameters())
    known = {id(p) for p in leaves.values()}
    for name, site in captured.trace.nodes.items():
        leaf = site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
        if id(leaf) not in known and leaf.is_leaf and leaf.requires_grad:
            leaves[name] = leaf
            known.add(id(leaf))
    if not leaves:
        raise ValueError(f"{pair.name} has no parameters to train")
    return leaves, (lambda rows: full) if subsampled else (lambda rows: float(rows))


def _check_all(site: Any, batch: Batch, loader: Minibatches) -> None:
    """The support of a site that observes a part of the data, over all of that part where it is in memory."""
    name = observed_part(site, batch)
    if name is None or loader.tensors is None:
        return
    whole = batches.parts(loader.tensors)[name].reshape(-1, *site["value"].shape[1:])
    support = site["fn"].support
    try:
        support.check(whole[:1])
    except RuntimeError:
        return  # a support with bounds of its own for each datum
    check_support(site["name"], type(site["fn"]).__name__, support, whole)


def _trained(pair: Pair, leaves: dict[str, Tensor], freeze: Sequence[str]) -> dict[str, Tensor]:
    if isinstance(freeze, str):
        raise TypeError(
            f"freeze takes a sequence of part names, got the string {freeze!r}: write freeze=({freeze!r},)"
        )
    frozen = {id(p) for name in freeze for p in pair.part(name).values()}
    trained = {k: p for k, p in leaves.items() if id(p) not in frozen and p.requires_grad}
    if not trained:
        raise ValueError(f"freeze={tuple(freeze)} leaves no parameter to train")
    return trained


@torch.no_grad()
def _assign(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)

"""Run directories: configuration, metrics, atomic checkpoints and weights. Nothing here unpickles
anything."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pyroelbo._version import __version__

__all__ = ["RunDirectory", "choose_device", "copy_into", "fresh", "interruptible"]

CONFIG, METRICS, CHECKPOINT, WEIGHTS, SUMMARY = (
    "config.json",
    "metrics.jsonl",
    "checkpoint.safetensors",
    "weights.safetensors",
    "run.json",
)


class RunDirectory:
    """One training run on disk.

    ``config.json`` what was asked for; ``metrics.jsonl`` a row per epoch; ``checkpoint.safetensors`` all it
    takes to go on; ``weights.safetensors`` and ``run.json`` when it is done. Every file but the metrics is
    written beside its place and renamed, so that a kill leaves the old one or the new one. Wall-clock times
    stand in ``run.json`` alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        resume: bool = False,
        free: Sequence[str] = ("epochs",),
    ) -> RunDirectory:
        """A new run directory, or with ``resume`` the existing one.

        Raises FileExistsError for a directory that is not empty, FileNotFoundError for nothing to resume,
        PermissionError where it cannot be written, ValueError where ``config`` differs from the run's own in a key
        that is not ``free``.
        """
        run = cls(path)
        if resume:
            before = run.config()
            changed = [
                k for k in config if k not in free and before.get(k) != json.loads(json.dumps(config[k]))
            ]
            if changed:
                raise ValueError(
                    f"cannot resume {run.path}: {changed[0]} was {before.get(changed[0])!r} in "
                    f"that run and is {config[changed[0]]!r} now"
                )
        elif run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
            raise FileExistsError(
                f"{run.path} exists and is not empty: choose another directory, or resume=True to go on with its run"
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            for name in (WEIGHTS, SUMMARY):  # they would be older than what comes now
                (run.path / name).unlink(missing_ok=True)
            run.write_json(CONFIG, {"pyroelbo": __version__, **config})
            (run.path / METRICS).touch()
        except OSError as error:
            raise PermissionError(
                f"cannot write to the run directory {run.path}: {error.strerror or error}"
            ) from error
        return run

    def config(self) -> dict[str, Any]:
        """The run's configuration; FileNotFoundError or ValueError where there is none of ours."""
        file = self.path / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} holds no run: there is no {CONFIG} in it")
        try:
            config = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if not isinstance(config, dict) or "pyroelbo" not in config:
            raise ValueError(f"{file} was not written by pyroelbo")
        return config

    def finish(self, weights: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
        """Write the weights to keep and the run's summary."""
        self._save(WEIGHTS, weights, {})
        self.write_json(SUMMARY, dict(summary))

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / f".{name}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(error.errno, f"cannot write {self.path / name}: {error.strerror}") from error

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / METRICS).read_text().splitlines()]

    def keep_metrics(self, rows: int) -> list[dict[str, Any]]:
        """Drop the rows that came after the checkpoint; a half-written last line goes with them."""
        lines = (self.path / METRICS).read_text().splitlines()[:rows]
        self.write_text(METRICS, "".join(line + "\n" for line in lines))
        return [json.loads(line) for line in lines]

    def save_checkpoint(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._save(CHECKPOINT, tensors, meta)

    def _save(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        # Clones: safetensors refuses tensors that share memory, as tied parameters do.
        plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        self._write(name, save(plain, {"pyroelbo": json.dumps(dict(meta))}))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata of the checkpoint; None where the run was stopped before its first one."""
        return self._load(CHECKPOINT) if (self.path / CHECKPOINT).exists() else None

    def load_weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of the finished run, else those of its last checkpoint. FileNotFoundError where there are
        neither."""
        if (self.path / WEIGHTS).exists():
            return self._load(WEIGHTS)
        checkpoint = self.load_checkpoint()
        if checkpoint is None:
            raise FileNotFoundError(
                f"{self.path} has no weights yet: the run was stopped before its first checkpoint"
            )
        tensors, meta = checkpoint
        return group(tensors, "state/"), meta

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        file = self.path / name
        try:
            with safe_open(file, framework="pt") as opened:
                meta = opened.metadata() or {}
                tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{file} is damaged or no safetensors file: {error}") from error
        if "pyroelbo" not in meta:
            raise ValueError(f"{file} was not written by pyroelbo")
        return tensors, json.loads(meta["pyroelbo"])


def fresh(base: str | Path) -> Path:
    """``base``, or the first of ``base-2``, ``base-3``, … that does not exist yet."""
    base = Path(base)
    path, number = base, 1
    while path.exists():
        number += 1
        path = base.with_name(f"{base.name}-{number}")
    return path


def group(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint whose names begin with ``prefix``, under the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors of the same names and shapes; ValueError, naming the first that differs, before anything
    is changed."""
    missing, extra = sorted(set(target) - set(source)), sorted(set(source) - set(target))
    if missing or extra:
        what = f"lacks {missing[0]!r}" if missing else f"has {extra[0]!r}, which this pair lacks"
        raise ValueError(f"{where} belongs to another pair: it {what}")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            raise ValueError(
                f"{where} belongs to another pair: {name!r} has shape "
                f"{tuple(source[name].shape)} there, {tuple(tensor.shape)} here"
            )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets an event, so that a step is never cut in half; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handler(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, CUDA where there is one if none was; RuntimeError for CUDA that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device takes 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device={str(device)!r} was asked for, and this machine has no CUDA device (or "
            "torch was built without CUDA)"
        )
    return place

"""Run directories: configuration, metrics, atomic checkpoints and weights, and the lock that keeps two
trainings apart.
"""

from __future__ import annotations

import errno
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroelbo import files
from pyroelbo._version import __version__

try:
    import fcntl
except ImportError:  # no POSIX locks on this platform
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunDirectory", "check_same", "choose_device", "copy_into", "fresh", "group", "interruptible"]

CONFIG, METRICS, CHECKPOINT, WEIGHTS, SUMMARY, LOCK = (
    "config.json",
    "metrics.jsonl",
    "checkpoint.safetensors",
    "weights.safetensors",
    "run.json",
    ".lock",
)


def _is_left(file: Path) -> bool:
    """Whether a file may be what a run leaves that was killed before it had begun."""
    return file.name == LOCK or file.match(".*.partial")


class RunDirectory:
    """One training run on disk.

    ``config.json`` is what was asked for; ``metrics.jsonl`` has a row per epoch; ``checkpoint.safetensors``
    is all it takes to continue; ``weights.safetensors`` and ``run.json`` are written at the end. Every file
    but the metrics is written beside its place and renamed, so that a kill leaves the old one or the new one;
    nothing is deleted. Wall-clock times are in ``run.json`` only.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: Any = None
        self._config: dict[str, Any] = {}

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        resume: bool = False,
        free: Sequence[str] = ("epochs",),
    ) -> RunDirectory:
        """A new run directory, or with ``resume`` the existing one, locked until :meth:`close` or the
        process's end.

        Raises FileExistsError for a directory that is not empty, FileNotFoundError for nothing to resume,
        PermissionError where it cannot be written, ValueError where ``config`` differs from the run's own in
        a key that is not ``free``, RuntimeError while another process trains there.
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
        elif run.path.exists() and not (run.path.is_dir() and all(map(_is_left, run.path.iterdir()))):
            raise FileExistsError(
                f"{run.path} exists and is not empty: choose another directory, or resume=True (--resume) to "
                f"continue its run"
            )
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run._acquire()
            for left in run.path.glob(".*.partial"):  # of a killed process: this one holds the lock
                left.unlink()
            run._config = {"pyroelbo": __version__, **config}
            if not resume:
                run.write_json(CONFIG, run._config)
                (run.path / METRICS).touch()
        except OSError as error:
            run.close()
            raise PermissionError(
                f"cannot write to the run directory {run.path}: {error.strerror or error}"
            ) from error
        return run

    def _acquire(self) -> None:
        if fcntl is None:
            return
        self._lock = open(self.path / LOCK, "w")  # noqa: SIM115  (held until close)
        try:
            # Not flock: workers forked by a DataLoader would inherit it and outlive a killed parent.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise RuntimeError(
                    f"another process trains in {self.path}: wait for it, or choose another directory"
                ) from error
            # otherwise the file system has no locks

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def config(self) -> dict[str, Any]:
        """The run's configuration; FileNotFoundError or ValueError where there is none of ours."""
        file = self.path / CONFIG
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} holds no run: there is no {CONFIG} in it")
        config = files.read_json(file)
        if not isinstance(config.get("pyroelbo"), str):
            raise ValueError(f"{file} was not written by pyroelbo")
        return config

    def finish(
        self, weights: Mapping[str, Tensor], *, stopped: str, epochs: int, steps: int, seconds: float
    ) -> None:
        """Write the final weights, with their number of steps, and the run's summary."""
        files.write_tensors(self.path / WEIGHTS, weights, {"step": steps})
        summary = {"stopped": stopped, "epochs": epochs, "steps": steps, "seconds": round(seconds, 3)}
        self.write_json(SUMMARY, summary)

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        files.write(self.path / name, text.encode())

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return files.read_jsonl(self.path / METRICS)

    def keep_metrics(self, rows: int) -> list[dict[str, Any]]:
        """Keep the first ``rows`` and drop those after the checkpoint, a half-written last line with them.

        Raises ValueError, naming the file, where rows that the checkpoint counts are missing.
        """
        file = self.path / METRICS
        if not file.exists():
            if rows:
                raise ValueError(f"{file}: expected at least {rows} rows, got no file")
            file.touch()
        kept = files.read_jsonl(file, rows)
        self.write_text(METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        return kept

    def save_checkpoint(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        files.write_tensors(self.path / CHECKPOINT, tensors, meta)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and metadata of the checkpoint; None where the run was stopped before its first one."""
        file = self.path / CHECKPOINT
        return files.read_tensors(file) if file.exists() else None

    def load_weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights of the finished run, or of a checkpoint where there are none or it is newer.

        Raises FileNotFoundError where there are neither.
        """
        finished = files.read_tensors(self.path / WEIGHTS) if (self.path / WEIGHTS).exists() else None
        checkpoint = self.load_checkpoint()
        if finished is not None and (
            checkpoint is None or self.count(checkpoint[1], "step") <= self.count(finished[1], "step")
        ):
            return finished
        if checkpoint is None:
            raise FileNotFoundError(
                f"{self.path} has no weights yet: the run was stopped before its first checkpoint"
            )
        tensors, meta = checkpoint
        return group(tensors, "state/"), meta

    def count(self, meta: Mapping[str, Any], key: str) -> int:
        """A count in the metadata of a checkpoint or of weights; ValueError for anything but a number of at
        least 0.
        """
        value = meta.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
            raise ValueError(f"{self.path / CHECKPOINT} is damaged: expected a count {key!r}, got {value!r}")
        return value

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Context manager around a resume: errors that a checkpoint's content causes become a ValueError that
        names it; without any, the new configuration is written."""
        file = self.path / CHECKPOINT
        try:
            yield
        except Exception as error:
            if str(self.path) in str(error):
                raise
            raise ValueError(f"{file} is damaged: {type(error).__name__}: {error}") from error
        if self._config:
            self.write_json(CONFIG, self._config)


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


def check_same(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """ValueError, naming the first difference, unless both have the same names and shapes."""
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


@torch.no_grad()
def copy_into(target: Mapping[str, Tensor], source: Mapping[str, Tensor], where: str) -> None:
    """Copy tensors after :func:`check_same`: nothing is changed where anything differs."""
    check_same(target, source, where)
    for name, tensor in target.items():
        tensor.copy_(source[name])


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Context manager in which Ctrl-C sets an event, so that a step is never cut short; a second one
    interrupts.
    """
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
    """The requested device, by default CUDA if available; RuntimeError for CUDA that is not available."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device: expected one that is available, got {str(device)!r}: this machine has no CUDA device "
            f"(or "
            "torch was built without CUDA)"
        )
    return place

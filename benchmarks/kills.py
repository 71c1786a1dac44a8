"""Does a training that is killed at a random moment continue to the same result, bit for bit?

For each kind of training: one unbroken run, then ``--kills`` runs that are killed with SIGKILL at a moment
drawn uniformly over the unbroken run's time (as often as the run needs to end), each resumed until it
finishes. Metrics and final weights must equal the unbroken run's byte for byte. Runs are forked from one
process that has imported the packages, so that kills fall into training.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from pyroelbo import data, fit, fit_em, models

KINDS = {
    "vae": {"model": lambda: models.VAE(64, 2, (16,)), "fit": fit, "settings": {"epochs": 12, "ema": 0.9}},
    "vae-patience": {
        "model": lambda: models.VAE(64, 2, (16,)),
        "fit": fit,
        "settings": {"epochs": 16, "patience": 5, "clip_norm": 1.0},
        "valid": True,
    },
    "vae-loader": {
        "model": lambda: models.VAE(64, 2, (16,)),
        "fit": fit,
        "settings": {"epochs": 12, "skip_norm": 1e4, "optimizer": "sgd", "learning_rate": 1e-4},
        "loader": True,
    },
    "ladder": {"model": lambda: models.Ladder(64, (3, 2), (16, 8)), "fit": fit, "settings": {"epochs": 8}},
    "autoregressive": {
        "model": lambda: models.Autoregressive((8, 8), width=4, layers=2),
        "fit": fit,
        "settings": {"epochs": 2, "batch_size": 50},
    },
    "em-mixture": {
        "model": lambda: models.GaussianMixture(64, 8, smoothing=0.1),
        "fit": fit_em,
        "settings": {"epochs": 20, "tolerance": 0.0, "restarts": 2, "batch_size": 100},
    },
    "vae-compile": {
        "model": lambda: models.VAE(64, 2, (16,)),
        "fit": fit,
        "settings": {"epochs": 12, "compile": True},
    },
}


def train(kind: dict, out: Path, resume: bool) -> None:
    torch.manual_seed(0)
    y = data.load("digits", "binary")["train"][:300]
    pair = kind["model"]()
    train = DataLoader(TensorDataset(y), batch_size=32, shuffle=True) if kind.get("loader") else y
    more = {"valid": y[:50]} if kind.get("valid") else {}
    kind["fit"](
        pair,
        train,
        out=out,
        resume=resume,
        progress=False,
        checkpoint_seconds=0.05,
        **kind["settings"],
        **more,
    )


def start(kind: str, out: Path) -> int:
    """The process id of a child that trains, from its last checkpoint if there is one."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(KINDS[kind], out, (out / "config.json").exists())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def killed(pid: int) -> bool:
    """Whether the child was killed before its end; RuntimeError where it failed."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError("the training failed")
    return status != 0


def content(out: Path) -> tuple[bytes, bytes]:
    return (out / "metrics.jsonl").read_bytes(), (out / "weights.safetensors").read_bytes()


def kill_runs(kind: str, kills: int, folder: Path, generator: random.Random) -> dict:
    """Kill one run after another until so many kills hit a living process."""
    began = time.monotonic()
    killed(start(kind, folder / "whole"))
    seconds = time.monotonic() - began
    whole, hits, runs, equal = content(folder / "whole"), 0, 0, 0
    while hits < kills:
        out = folder / f"run-{runs}"
        runs += 1
        while not (out / "weights.safetensors").exists():
            pid = start(kind, out)
            if hits < kills:
                time.sleep(generator.random() * seconds)
                os.kill(pid, signal.SIGKILL)
            hits += killed(pid)
        equal += content(out) == whole
    return {"kind": kind, "kills": hits, "runs": runs, "equal": equal}


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50, help="kills of each kind")
    parser.add_argument("--kinds", nargs="*", default=[k for k in KINDS if k != "vae-compile"], choices=KINDS)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    print(f"{'kind':<16}{'kills':>7}{'runs':>6}{'equal':>7}")
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            row = kill_runs(kind, options.kills, Path(folder), random.Random(options.seed))
        print(f"{kind:<16}{row['kills']:>7}{row['runs']:>6}{row['equal']:>7}", flush=True)
        print(json.dumps({"benchmark": "kills", **row}), flush=True)


if __name__ == "__main__":
    main()

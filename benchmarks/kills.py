"""Does a training that is killed at a random moment continue to the same result, bit for bit?

For each kind of training: one unbroken run, then ``--kills`` runs that are killed with SIGKILL at a moment
drawn uniformly over the unbroken run's time (as often as the run needs to end), each resumed until it
finishes. Metrics and final weights must equal the unbroken run's byte for byte. ``python -m benchmarks.kills
--kills 50`` takes about a second a kill.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = {
    "vae": {"model": "models.VAE(64, 2, (16,))", "fit": "fit", "settings": {"epochs": 30, "ema": 0.9}},
    "vae-patience": {
        "model": "models.VAE(64, 2, (16,))",
        "fit": "fit",
        "settings": {"epochs": 60, "patience": 5, "clip_norm": 1.0},
        "valid": True,
    },
    "vae-loader": {
        "model": "models.VAE(64, 2, (16,))",
        "fit": "fit",
        "settings": {"epochs": 30, "skip_norm": 1e4, "optimizer": "sgd", "learning_rate": 1e-4},
        "loader": True,
    },
    "ladder": {"model": "models.Ladder(64, (3, 2), (16, 8))", "fit": "fit", "settings": {"epochs": 20}},
    "autoregressive": {
        "model": "models.Autoregressive((8, 8), width=4, layers=2)",
        "fit": "fit",
        "settings": {"epochs": 2, "batch_size": 16},
    },
    "em-mixture": {
        "model": "models.GaussianMixture(64, 8, smoothing=0.1)",
        "fit": "fit_em",
        "settings": {"epochs": 300, "tolerance": 0.0, "restarts": 2, "batch_size": 50},
    },
    "vae-compile": {
        "model": "models.VAE(64, 2, (16,))",
        "fit": "fit",
        "settings": {"epochs": 30, "compile": True},
    },
}

PROGRAM = """
import json, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from pyroelbo import data, fit, fit_em, models
kind, out, resume = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"
torch.set_num_threads(1)
torch.manual_seed(0)
y = data.load("digits", "binary")["train"][:300]
pair = eval(kind["model"])
train = DataLoader(TensorDataset(y), batch_size=32, shuffle=True) if kind.get("loader") else y
more = {"valid": y[:50]} if kind.get("valid") else {}
{"fit": fit, "fit_em": fit_em}[kind["fit"]](
    pair, train, out=out, resume=resume, progress=False, checkpoint_seconds=0.05, **kind["settings"], **more
)
"""


def start(kind: str, out: Path, resume: bool) -> subprocess.Popen:
    arguments = [
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(KINDS[kind]),
        str(out),
        "resume" if resume else "new",
    ]
    return subprocess.Popen(
        arguments,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> None:
    error = process.communicate()[1].decode()
    if process.returncode:
        raise RuntimeError(error.strip().splitlines()[-1])


def content(out: Path) -> tuple[bytes, bytes]:
    return (out / "metrics.jsonl").read_bytes(), (out / "weights.safetensors").read_bytes()


def kill_runs(kind: str, kills: int, folder: Path, generator: random.Random) -> dict:
    """Kill one run after another until so many kills hit a living process."""
    began = time.monotonic()
    finish(start(kind, folder / "whole", False))
    seconds = time.monotonic() - began
    # Before the first metrics there is only the import of the packages.
    first = (folder / "whole" / "config.json").stat().st_mtime - (time.time() - (time.monotonic() - began))
    whole, hits, runs, equal = content(folder / "whole"), 0, 0, 0
    while hits < kills:
        out = folder / f"run-{runs}"
        runs += 1
        while not (out / "weights.safetensors").exists():
            process = start(kind, out, (out / "config.json").exists())
            if hits < kills:
                time.sleep(first + generator.random() * (seconds - first))
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    hits += 1
                    continue
            finish(process)
        equal += content(out) == whole
    return {"kind": kind, "kills": hits, "runs": runs, "equal": equal}


def main() -> None:
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

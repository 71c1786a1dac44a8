"""How many nats does a small causal transformer need for a byte of Shakespeare that it has not seen?

    python -m benchmarks.shakespeare --train        # goes on where it was stopped
    python -m benchmarks.shakespeare                # the run so far

The first 90 % of the text are for training, in windows of 64 bytes, one every 16; the last 10 % in windows of
64 bytes, one after the other: half of them (every other one) are for validation, the rest are the held-out
text. A window begins without a memory of the one before, so its first bytes are the dearest: nats are also
given for the second half of the windows alone. All figures are exact ln p, no bounds. What the bytes cost
without any context, by their frequencies, is shown beside.
"""

import argparse
import gzip
import json
import os
import platform
import time
from pathlib import Path

import pyro
import torch

from pyroelbo import data, fit, models
from pyroelbo.runs import RunDirectory, copy_into

LENGTH, STRIDE = 64, 16


def text(folder):
    with gzip.open(Path(folder) / "tinyshakespeare.txt.gz") as file:
        whole = file.read()
    alphabet = bytes(sorted(set(whole)))
    cut = len(whole) * 9 // 10
    codes, _ = data.windows(whole[:cut], cut, alphabet)
    train = codes[0].unfold(0, LENGTH, STRIDE)
    rest, _ = data.windows(whole[cut:], LENGTH, alphabet)
    return alphabet, train.contiguous(), rest[::2], rest[1::2]


def make(symbols):
    return models.Autoregressive(
        LENGTH, symbols, "categorical", "transformer", width=96, layers=3, dropout=0.05
    )


@torch.no_grad()
def nats(pair, rows):
    """Nats per byte: of whole windows, of their second halves, and the standard error of the first."""
    pair.eval()
    parts = []
    for block in rows.split(256):
        parts.append(-pair.logits(block).log_softmax(-1).gather(-1, block[..., None])[..., 0])
    found = torch.cat(parts).double()
    return (
        float(found.mean()),
        float(found[:, LENGTH // 2 :].mean()),
        float(found.mean(1).std() / len(found) ** 0.5),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=os.environ.get("PYROELBO_DATA", "."))
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"))
    options = parser.parse_args()
    alphabet, train, valid, held_out = text(options.data_dir)
    pyro.set_rng_seed(options.seed)
    pair = make(len(alphabet))
    began = time.perf_counter()
    if options.train:

        def show(row):
            row = {
                **row,
                "valid_nats": round(nats(pair, valid[:400])[0], 4),
                "minutes": (time.perf_counter() - began) / 60,
            }
            print(json.dumps(row), flush=True)
            pair.train()

        fit(
            pair,
            train,
            epochs=options.epochs,
            batch_size=64,
            learning_rate=2e-3,
            schedule="cosine",
            clip_norm=64.0,
            seed=options.seed,
            out=options.out,
            resume=(options.out / "config.json").exists(),
            checkpoint_seconds=30.0,
            progress=False,
            callbacks=[show],
        )
    else:
        tensors, _ = RunDirectory(options.out).load_weights()
        copy_into({**dict(pair.named_parameters()), **dict(pair.named_buffers())}, tensors, str(options.out))
    share = torch.bincount(train.reshape(-1), minlength=len(alphabet)).double().clamp_min(0.5)
    single = -float((share / share.sum()).log()[held_out].mean())
    mean, late, error = nats(pair, held_out)
    print(
        f"held out: {mean:.4f} +- {error:.4f} nats a byte, {late:.4f} in second halves; single bytes "
        f"{single:.4f}"
    )
    print(
        json.dumps(
            {
                "nats_per_byte": round(mean, 4),
                "error": round(error, 4),
                "second_halves": round(late, 4),
                "single_bytes": round(single, 4),
                "bytes": held_out.numel(),
                "parameters": sum(p.numel() for p in pair.parameters()),
                "epochs": len(RunDirectory(options.out).metrics()),
                "seed": options.seed,
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()

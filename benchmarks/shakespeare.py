"""How many nats does a small transformer need for a byte of Shakespeare that it has not seen, in the order of
the text, and in random orders?

    python -m benchmarks.shakespeare autoregressive --train     # goes on where it was stopped
    python -m benchmarks.shakespeare masked --train             # masked diffusion, the same transformer
    python -m benchmarks.shakespeare masked                     # the run so far

The first 90 % of the text are for training, in windows of 64 bytes, one every 16; the last 10 % in windows of
64 bytes, one after the other: half of them (every other one) are for validation, the rest are the held-out
text. A window begins without a memory of the one before, so its first bytes are the dearest: nats are also
given for the second half of the windows alone. What the bytes cost without any context, by their
frequencies, is shown beside. Figures of the autoregressive system are exact ln p. Those of masked diffusion,
in which every byte attends to all that are revealed, are bounds, averages of -ln p over random orders of the
bytes: one order a window, and on the first windows the bound of K orders each beside their average.
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
from pyroelbo.numerics import log_mean_exp
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


SYSTEMS = {"autoregressive": models.Autoregressive, "masked": models.MaskedDiffusion}


def make(system, symbols):
    return SYSTEMS[system](LENGTH, symbols, "categorical", "transformer", width=96, layers=3, dropout=0.05)


@torch.no_grad()
def exact(pair, rows):
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


@torch.no_grad()
def bounds(pair, rows, orders):
    """Nats per byte with standard errors over windows: the average of ``orders`` orders of each window, the
    bound of all of them, and their difference; the same orders at every call."""
    pair.eval()
    generator, found = torch.Generator().manual_seed(0), []
    for block in rows.split(max(1, 256 // orders)):
        order = torch.rand(orders, *block.shape, generator=generator).argsort(-1)
        found.append(pair.by_step(block, order).double().sum(-1))
    log_p = torch.cat(found, 1)
    average, joint = -log_p.mean(0) / LENGTH, -log_mean_exp(log_p)[0] / LENGTH
    return [(float(x.mean()), float(x.std() / len(rows) ** 0.5)) for x in (average, joint, average - joint)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=os.environ.get("PYROELBO_DATA", "."))
    parser.add_argument("--orders", type=int, default=16, help="K of the bound of several orders")
    parser.add_argument("--windows", type=int, default=100, help="windows on which it is computed")
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare"), help="a folder for each system")
    options = parser.parse_args()
    out, masked = options.out / options.system, options.system == "masked"
    alphabet, train, valid, held_out = text(options.data_dir)
    pyro.set_rng_seed(options.seed)
    pair = make(options.system, len(alphabet))
    began = time.process_time()
    if options.train:

        def show(row):
            found = bounds(pair, valid[:100], 1)[0][0] if masked else exact(pair, valid[:400])[0]
            minutes = (time.process_time() - began) / 60
            print(json.dumps(row | {"valid_nats": round(found, 4), "minutes": round(minutes, 2)}), flush=True)
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
            out=out,
            resume=(out / "config.json").exists(),
            checkpoint_seconds=30.0,
            progress=False,
            callbacks=[show],
        )
    else:
        tensors, _ = RunDirectory(out).load_weights()
        copy_into({**dict(pair.named_parameters()), **dict(pair.named_buffers())}, tensors, str(out))
    share = torch.bincount(train.reshape(-1), minlength=len(alphabet)).double().clamp_min(0.5)
    single = -float((share / share.sum()).log()[held_out].mean())
    if masked:
        (mean, error), *_ = bounds(pair, held_out, 1)
        several = bounds(pair, held_out[: options.windows], options.orders)
        print(f"held out: order average {mean:.4f} +- {error:.4f} nats a byte; single bytes {single:.4f}")
        print(
            f"{options.windows} windows, {options.orders} orders: order average, IW-{options.orders}, won:",
            ", ".join(f"{m:.4f} +- {e:.4f}" for m, e in several),
        )
        more = {"orders": options.orders, "windows": options.windows, "average_iw_won": several}
    else:
        mean, late, error = exact(pair, held_out)
        print(
            f"held out: {mean:.4f} +- {error:.4f} nats a byte, {late:.4f} in second halves; single bytes "
            f"{single:.4f}"
        )
        more = {"second_halves": round(late, 4)}
    print(
        json.dumps(
            {
                "system": options.system,
                "nats_per_byte": round(mean, 4),
                "error": round(error, 4),
                **more,
                "single_bytes": round(single, 4),
                "bytes": held_out.numel(),
                "parameters": sum(p.numel() for p in pair.parameters()),
                "epochs": len(RunDirectory(out).metrics()),
                "seed": options.seed,
                "torch": torch.__version__,
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()

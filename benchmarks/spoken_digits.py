"""Do exact sums over alignments learn to hear digits? Label error rate of a CTC pair on spoken strings.

Recordings of single digits (``fsdd_logmel24.npz``: 24 log-mel bands, 10 ms a frame, six speakers; its own
split, recordings 0 … 4 of every speaker and digit are the test set) are joined into strings of 1 to 4 by one
speaker. The pair is told the string, never the boundaries. It prints a table and one JSON line; --data-dir,
or $PYROELBO_DATA, says where the file lies.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from pyroelbo import fit, models

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from ctc_digits import edits


def recordings(path):
    """A list of (frames [T, 24], digit, speaker, whether it is for testing)."""
    with np.load(path, allow_pickle=False) as file:
        frames = torch.from_numpy(file["x"].astype(np.float32)) / 128 - 1
        pieces = frames.split(file["length"].tolist())
        return list(zip(pieces, *(file[k].tolist() for k in ("digit", "speaker", "is_test")), strict=True))


def strings(found, count, seed, longest=4):
    """(frames [B, T, 48], labels [B, L], lengths [B]): two frames of 10 ms are one step of 20 ms."""
    rng = np.random.default_rng(seed)
    speakers = {}
    for item in found:
        speakers.setdefault(item[2], []).append(item)
    frames, targets = [], []
    for _ in range(count):
        pool = speakers[int(rng.choice(sorted(speakers)))]
        chosen = [pool[int(i)] for i in rng.integers(len(pool), size=rng.integers(1, longest + 1))]
        joined = torch.cat([c[0] for c in chosen])
        frames.append(joined[: len(joined) // 2 * 2].reshape(-1, 48))
        targets.append(torch.tensor([c[1] + 1 for c in chosen]))
    return (
        pad_sequence(frames, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=-1),
        torch.tensor([len(f) for f in frames]),
    )


def error_rate(pair, batch):
    x, y, lengths = batch
    wrong = total = 0
    for part in torch.arange(len(x)).split(100):
        for a, b in zip(
            pair.eval().transcribe(x[part], lengths[part]).tolist(), y[part].tolist(), strict=True
        ):
            truth = [s for s in b if s >= 0]
            wrong += edits([s for s in a if s >= 0], truth)
            total += len(truth)
    return wrong / total, total


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=10)
    parser.add_argument("--data", type=int, default=2700, help="strings to learn from")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PYROELBO_DATA"))
    options = parser.parse_args(arguments)
    if options.data_dir is None:
        parser.error("say by --data-dir, or PYROELBO_DATA, where fsdd_logmel24.npz lies")
    found = recordings(Path(options.data_dir) / "fsdd_logmel24.npz")
    train = strings([r for r in found if not r[3]], options.data, options.seed)
    test = strings([r for r in found if r[3]], 500, options.seed + 1)
    torch.manual_seed(options.seed)
    pair = models.CTC(48, 10, options.width, options.depth)
    began = time.perf_counter()
    fit(
        pair,
        train,
        epochs=options.num_epochs,
        batch_size=32,
        learning_rate=2e-3,
        clip_norm=5.0,
        schedule="cosine",
        seed=options.seed,
    )
    seconds = time.perf_counter() - began
    rows = {}
    print(f"\n{'strings':<8} {'labels':>7} {'label error rate':>17}")
    for name, batch in (("train", tuple(part[:500] for part in train)), ("test", test)):
        rate, total = error_rate(pair, batch)
        # the standard error of a share, as if labels were independent
        rows[name] = {"labels": total, "rate": rate, "stderr": (rate * (1 - rate) / total) ** 0.5}
        print(f"{name:<8} {total:>7} {rate:>16.1%} ± {rows[name]['stderr']:.1%}")
    settings = {k: v for k, v in vars(options).items() if k != "data_dir"}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    print(
        json.dumps({"benchmark": "spoken_digits", **settings, "seconds": round(seconds), **rows, **machine})
    )


if __name__ == "__main__":
    main()

"""Which remedies against posterior collapse put information into the latent of a sentence VAE, at what cost?

One Gaussian latent of 32 numbers, a gated recurrent decoder of 96 features, English sentences (Universal
Dependencies EWT, its own split) of 2 … 20 lower-cased words; words seen fewer than 5 times in the training
split are one word <unk>. Each row differs from `plain` in one thing (the last in two), and has the same
budget: `--passes` evaluations of the loss on each training sentence (an aggressive step counts as several;
the last weights are kept).

Of 500 test sentences, drawn by seed 0, per sentence and in nats: KL(q(z|y), p(z)); the information I_q(y; z),
of the sentence's index and the latent, at most ln 500 = 6.2 (its estimate may be negative); active units; -ln
p(y) by the importance-weighted bound IW-500, an upper bound (exact without latents), and its difference from
`plain`, paired; what the latent says: how much better the first word, and the others, are predicted from the
sentence's own latent than from another's, and how well the mean of q(z|y) tells the number of words (R² of
least squares, fitted on training sentences). Errors are standard errors over draws for the information, over
sentences for others.

    python -m benchmarks.collapse [--out DIR] [--rows plain "free bits"] [--seeds 0 1 2] [--passes 10]

Finished rows are kept in DIR and killed ones resume. --data-dir, or $PYROELBO_DATA, says where
``ud_ewt.json.gz`` lies. Sources of the remedies: docs/collapse.md.
"""

import argparse
import gzip
import json
import os
import platform
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from pyro.infer import Trace_ELBO

from pyroelbo import evidence, files, fit, models
from pyroelbo.encoders import BatchNormEncoder
from pyroelbo.nn import CausalGRU
from pyroelbo.objectives import Aggressive, Layered_ELBO, Rate_ELBO
from pyroelbo.training.schedules import warmup

LONGEST, SEEN = 20, 5
RATE = 3.0  # nats that free bits, the minimum rate and the batch's means ask for
SIZES = {"latent": 32, "width": 96, "dropout": 0.3}
ALONE = "no latents"


def remedies(passes):
    """name: (settings of the pair, phases of training)."""

    def whole(**settings):
        return [{"epochs": passes, **settings}]

    first = max(1, passes // 10)  # aggressive epochs, of five passes each
    aggressive = Aggressive(Trace_ELBO(), ("generator",), times=4)
    spread = (2 * RATE / SIZES["latent"]) ** 0.5
    return {
        ALONE: ({}, whole()),
        "plain": ({}, whole()),
        "KL annealing": ({}, whole(kl_weight=warmup(passes / 2))),
        "cyclical annealing": ({}, whole(kl_weight=warmup(passes / 8, period=passes / 4))),
        "free bits": ({}, whole(objective=Layered_ELBO(free_bits=RATE))),
        "minimum rate": ({}, whole(objective=Rate_ELBO(RATE))),
        "aggressive encoder": (
            {},
            [
                {"epochs": first, "objective": aggressive, "schedule": "constant"},
                *whole(epochs=max(1, passes - 5 * first)),
            ],
        ),
        "word dropout": ({"word_dropout": 0.5}, whole()),
        "weak decoder": ({"network": "window", "reach": 2}, whole()),
        "skip connections": ({"skip": True}, whole()),
        "batch-normalized means": ({"encoder": partial(BatchNormEncoder, spread=spread)}, whole()),
        "VampPrior": ({"prior": "vamp", "components": 50}, whole()),
        "skip and free bits": ({"skip": True}, whole(objective=Layered_ELBO(free_bits=RATE))),
    }


def sentences(folder):
    """The splits as rows of words, padded with -1, the vocabulary, and the share of unknown test words."""
    with gzip.open(Path(folder) / "ud_ewt.json.gz", "rt", encoding="utf-8") as file:
        found = json.load(file)
    texts = {
        split: [[w.lower() for w in s[1]] for s in found[split] if 2 <= len(s[1]) <= LONGEST]
        for split in ("train", "test")
    }
    counts = Counter(w for text in texts["train"] for w in text)
    names = ["<unk>", *sorted(w for w, n in counts.items() if n >= SEEN)]
    number = {w: i for i, w in enumerate(names)}
    y = {
        split: torch.tensor([[number.get(w, 0) for w in t] + [-1] * (LONGEST - len(t)) for t in rows])
        for split, rows in texts.items()
    }
    return y["train"], y["test"], names


def train(pair, phases, train, folder, seed):
    for i, phase in enumerate(phases):
        settings = {"schedule": "cosine", **phase}
        fit(
            pair,
            train,
            batch_size=64,
            learning_rate=2e-3,
            clip_norm=5.0,
            seed=seed,
            progress=False,
            out=folder / f"phase{i}",
            resume=(folder / f"phase{i}").exists(),
            **settings,
        )


@torch.no_grad()
def told(pair, train, y):
    """Nats by which the own latent predicts better than another sentence's, for the first word and the others
    [B], and the R² of the number of words."""
    gains = []
    for _ in range(8):
        z = pair.encode(y).sample()
        own, other = (pair.observation(c).by_word(y) for c in (z, z[torch.randperm(len(z))]))
        gains.append(own - other)
    gain = torch.stack(gains).mean(0)

    def inputs(x):
        mean = pair.encode(x).mean
        return torch.cat([mean, torch.ones(len(x), 1)], -1)

    lengths = [(x >= 0).sum(-1, keepdim=True).float() for x in (train, y)]
    slope = torch.linalg.lstsq(inputs(train), lengths[0]).solution
    left = (lengths[1] - inputs(y) @ slope).square().mean()
    return gain[:, 0], gain[:, 1:].sum(-1), 1 - float(left / lengths[1].var(correction=0))


def mean(x):
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


def measure(pair, train, y, draws):
    """What the table says of one trained pair; ``nll`` by sentence."""
    pair.eval()
    if not hasattr(pair, "encode"):
        return {"nll": (-evidence.exact(pair, y).value).tolist()}
    found = evidence.diagnostics(pair, y, 8)
    torch.manual_seed(0)
    first, others, r2 = told(pair, train[:2000], y)
    bound = evidence.iwae(pair, y, particles=draws)
    unit = found.unit_kl.value + found.unit_information.value if found.unit_kl is not None else None
    return {
        "nll": (-bound.value).tolist(),
        "ess": float(bound.ess.mean()),
        "elbo": float(found.elbo),
        "kl": (float(found.kl.value), float(found.kl.stderr)),
        "information": (float(found.information.value), float(found.information.stderr)),
        "marginal_kl": float(found.marginal_kl),
        "active": found.active_units,
        "unit_kl": None if unit is None else sorted(unit.tolist(), reverse=True),
        "first": mean(first),
        "others": mean(others),
        "length_r2": r2,
    }


def run(name, seed, options, data):
    """The record of a row: from DIR if it has been measured."""
    folder = options.out / f"{name.replace(' ', '_')}-{options.passes}-{seed}"
    kept = folder / "result.json"
    if kept.exists():
        return json.loads(kept.read_text())
    words, test, names = data
    settings, phases = remedies(options.passes)[name]
    torch.manual_seed(seed)
    if name == ALONE:
        network = CausalGRU(len(names) + 1, SIZES["width"], dropout=SIZES["dropout"])
        pair = models.Strings(LONGEST, len(names), network)
        phases = [{**phase, "objective": "evidence"} for phase in phases]
    else:
        pair = models.SentenceVAE(LONGEST, len(names), **{**SIZES, **settings})
        pair.initialize(words)
    train(pair, phases, words, folder, seed)
    parameters = sum(p.numel() for p in pair.parameters())
    record = {"row": name, "seed": seed, "passes": options.passes, "parameters": parameters}
    record |= measure(pair, words, test, options.draws)
    files.write(kept, json.dumps(record).encode())
    return record


def line(record, plain):
    """A row of the table."""
    nll = torch.tensor(record["nll"])
    cells = [f"{mean(nll)[0]:.2f} ± {mean(nll)[1]:.2f}"]
    if plain is not None:
        change = mean(nll - torch.tensor(plain["nll"]))
        cells.append(f"{change[0]:+.2f} ± {change[1]:.2f}")
    else:
        cells.append("")
    if "kl" not in record:
        return f"| {record['row']} | {record['seed']} | – | – | – | {' | '.join(cells)} | – | – | – |"
    shown = [
        f"{record['kl'][0]:.3f}",
        "{:.3f} ± {:.3f}".format(*record["information"]),
        str(record["active"]),
    ]
    said = ["{:.2f} ± {:.2f}".format(*record[k]) for k in ("first", "others")] + [
        f"{record['length_r2']:.2f}"
    ]
    return f"| {record['row']} | {record['seed']} | {' | '.join([*shown, *cells, *said])} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(remedies(10)), help="rows of the table")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--passes", type=int, default=10, help="evaluations of the loss on each sentence")
    parser.add_argument("--draws", type=int, default=500, help="K of the importance-weighted bound")
    parser.add_argument("--num-data", type=int, default=500, help="test sentences")
    parser.add_argument("--out", type=Path, default=Path("runs/collapse"), help="folder of runs and results")
    parser.add_argument("--data-dir", default=os.environ.get("PYROELBO_DATA", "."))
    options = parser.parse_args()
    unknown = set(options.rows) - set(remedies(10))
    if unknown:
        parser.error(f"--rows: expected some of {', '.join(remedies(10))}, got {unknown.pop()!r}")
    torch.set_num_threads(1)
    words, test, names = sentences(options.data_dir)
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: options.num_data]
    test = test[chosen]
    test = test[(test >= 0).sum(-1).argsort(stable=True)]  # texts of one length are evaluated together
    seen = test[test >= 0]
    unknown = float((seen == 0).double().mean())
    print(
        f"{len(words)} training sentences of {int((words >= 0).sum())} words, {len(test)} test sentences of "
        f"{len(seen)} words ({unknown:.1%} of them <unk>), vocabulary of {len(names)}"
    )
    print("| row | seed | KL | information | active | -ln p(y) | less plain's | first | others | length |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    data, records = (words, test, names), []
    for seed in options.seeds:
        plain = run("plain", seed, options, data)
        for name in options.rows:
            records.append(plain if name == "plain" else run(name, seed, options, data))
            print(line(records[-1], plain), flush=True)
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    rows = [{**record, "nll": mean(torch.tensor(record["nll"]))} for record in records]
    print(json.dumps({"benchmark": "collapse", **options, "machine": platform.machine(), "rows": rows}))


if __name__ == "__main__":
    main()

"""Does EM on Bach's chorales end as well as dynamax's, from the same starts, and what do more states bring?

Hidden Markov models over 88 keys, on or off, trained on 229 chorales; the score is the evidence of the 77
test chorales in nats per time step. One row for each number of states, seed and method: ``ours`` with a
pseudo-count of 0.1 on every outcome (MAP) and without (flat priors); ``dynamax`` with the same two priors
from the same start; ``neural``, an HMM whose moves and keys a small network makes. Rows are appended to
``rows.jsonl`` under --out as they come, and a run started again leaves out those it finds there. Then a table
and a JSON line.

Usage: python -m benchmarks.chorales --data-dir DATA [--out runs/chorales] [--states 16 64] [--seeds 0 1 2]
"""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch

from examples.chorales import NeuralHMM, chorales
from pyroelbo import fit_em, models

SPLITS = ("train", "valid", "test")
SMOOTHING = {"MAP": 0.1, "flat": 0.0}


def start_of(states, seed, smoothing, data):
    torch.manual_seed(seed)
    pair = models.HMM(states, 88, "bernoulli", smoothing=smoothing)
    pair.initialize(*data["train"])
    return pair


def scores(pair, data):
    with torch.no_grad():
        return {s: float(pair.log_evidence(*data[s]).double().sum() / data[s][1].sum()) for s in SPLITS}


def ours(states, seed, prior, epochs, data):
    pair = start_of(states, seed, SMOOTHING[prior], data)
    run = fit_em(pair, data["train"], epochs=epochs, tolerance=0.0, progress=False)
    return scores(pair, data), run.metrics[-1]["epoch"]


def neural(states, seed, prior, epochs, data):
    torch.manual_seed(seed)
    pair = NeuralHMM(states, 88)
    run = fit_em(pair, data["train"], epochs=epochs, tolerance=0.0, gradient_steps=10, progress=False)
    return scores(pair, data), run.metrics[-1]["epoch"]


@functools.cache
def compiled_dynamax(states, one):
    """dynamax's model with this concentration for every prior, and its steps, compiled once for all seeds."""
    import jax
    from dynamax.hidden_markov_model import BernoulliHMM

    peer = BernoulliHMM(states, 88, one, one, 0.0, one, one)
    expect = jax.jit(jax.vmap(peer.e_step, (None, 0)))
    evidence = jax.jit(jax.vmap(peer.marginal_log_prob, (None, 0)))
    return peer, expect, evidence


def dynamax(states, seed, prior, epochs, data):
    """Its own E-step and M-step, over sequences grouped by length: it knows no lengths in a batch."""
    import jax
    import jax.numpy as jnp

    pair = start_of(states, seed, SMOOTHING[prior], data)
    peer, expect, evidence = compiled_dynamax(states, 1.0 + SMOOTHING[prior])
    start = (
        pair.prior.initial.softmax(0),
        pair.prior.transition.softmax(1),
        pair.generator.log_odds.sigmoid(),
    )
    names = ("initial_probs", "transition_matrix", "emission_probs")
    start = {k: jnp.asarray(x.detach().numpy()) for k, x in zip(names, start, strict=True)}
    parameters, properties = peer.initialize(**start)
    state = peer.initialize_m_step_state(parameters, properties)

    def groups(split):
        y, lengths = data[split]
        return [jnp.asarray(y[lengths == n, :n].numpy()) for n in lengths.unique().tolist()]

    train = groups("train")
    for _ in range(epochs):
        found = [expect(parameters, y)[0] for y in train]
        total = jax.tree.map(lambda *x: sum(v.sum(0) for v in x)[None], *found)
        parameters, state = peer.m_step(parameters, properties, total, state)
    result = {}
    for split in SPLITS:
        total = sum(float(np.asarray(evidence(parameters, y), np.float64).sum()) for y in groups(split))
        result[split] = total / int(data[split][1].sum())
    return result, epochs


METHODS = {
    "ours, MAP": (ours, "MAP"),
    "dynamax, MAP": (dynamax, "MAP"),
    "ours, flat": (ours, "flat"),
    "dynamax, flat": (dynamax, "flat"),
    "neural": (neural, None),
}


def table(rows):
    print(f"{'states':>6}  {'method':14}{'seeds':>6}{'mean':>10}{'best':>10}{'its seed':>9}{'seconds':>9}")
    for states in sorted({r["states"] for r in rows}):
        for name in METHODS:
            mine = [r for r in rows if r["states"] == states and r["method"] == name]
            if mine:
                best = max(mine, key=lambda r: r["valid"])
                mean = sum(r["test"] for r in mine) / len(mine)
                seconds = sum(r["seconds"] for r in mine) / len(mine)
                print(
                    f"{states:6}  "
                    f"{name:14}{len(mine):6}{mean:10.4f}{best['test']:10.4f}{best['seed']:9}{seconds:9.1f}"
                )
    print("nats a test step; best by the validation chorales")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/chorales"))
    parser.add_argument("--states", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    data = chorales(options.data_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for states in options.states:
        for name in options.methods:
            for seed in options.seeds:
                row = {"states": states, "method": name, "seed": seed, "epochs": options.epochs}
                if any(row.items() <= r.items() for r in rows):
                    continue
                run, prior = METHODS[name]
                began = time.process_time()
                try:
                    found, done = run(states, seed, prior, options.epochs, data)
                except ImportError as error:
                    print(f"{name} is left out: {error}")
                    break
                seconds = round(time.process_time() - began, 2)
                rows.append({**row, "done": done, "seconds": seconds, **found})
                with file.open("a") as out:
                    out.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
    table(rows)
    print(json.dumps({"benchmark": "chorales", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()

"""How tight is each bound, against the exact evidence?

Every pair of the contract table (tests/pairs.py) whose evidence is exact (closed form, dynamic program,
enumeration) or found by quadrature, times every estimator. A new pair joins by its row there; nothing is
written here. Guides that are not exact are fitted first, generators stay as they were drawn; data are the
row's.

For each cell: the bias (mean of value - ln p(y) over the data, in nats), its standard error over the data,
and the model evaluations a datum. Two checks, at 1e-6 over the whole grid together (Bonferroni):

- order: for a lower bound E Π_i exp(value_i - ln p(y_i)) <= 1 over independent data, so by Markov's
  inequality the mean excess stays below ln(cells / 1e-6) / data, whatever the weights' tails; for an upper
  bound from the other side;
- mean: where Ẑ is unbiased, the mean of Ẑ/p(y) over the data is 1, by a z-test. It means nothing where the
  ratios' tails are so heavy that they lack a third moment (Pareto k-hat above 1/3): those say "tail". From
  above, the mean of p(y)/Ẑ is the share of the prior's draws under which y is possible at all, which draws of
  their own estimate without bias: 1 for most pairs, and for a grammar the probability that a tree has as many
  leaves as the sentence words.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.tightness [--data 300] [--only NAME] [--seed 0]
"""

import argparse
import json
import math
import statistics
import time
import warnings

import pyro
import torch

from pyroelbo import evidence, fit
from pyroelbo.evaluation.evaluator import Evaluator
from tests.pairs import TABLE

FALSE_ALARM = 1e-6
CELLS = 1000  # more than any grid has: the limits do not move when a pair is added

# name: (estimator, whether its exp(±value) is unbiased)
ESTIMATORS = {
    "elbo, 16 draws": (lambda pair, y: evidence.elbo(pair, y, 16), False),
    "iwae, 64": (lambda pair, y: evidence.iwae(pair, y, 64), True),
    "prior, 64": (lambda pair, y: evidence.prior_monte_carlo(pair, y, 64), True),
    "ais, guide": (lambda pair, y: evidence.ais(pair, y, 16, 4, leapfrog=2, progress=False), True),
    "ais, prior": (
        lambda pair, y: evidence.ais(pair, y, 16, 4, leapfrog=2, start="prior", progress=False),
        True,
    ),
    "ais, reverse": (
        lambda pair, y: evidence.ais(pair, y, 16, 4, leapfrog=2, start="prior", reverse=True, progress=False),
        True,
    ),
    "ais, from chains": (
        lambda pair, y: evidence.ais(pair, y, 16, 4, leapfrog=2, reverse="chains", progress=False),
        False,
    ),
    "smc, guide": (lambda pair, y: evidence.smc(pair, y, 16, 4, progress=False), True),
    "smc, prior": (lambda pair, y: evidence.smc(pair, y, 16, 4, proposal="prior", progress=False), True),
    "eubo, posterior": (lambda pair, y: evidence.eubo(pair, y, 16), False),
    "eubo, weights": (lambda pair, y: evidence.eubo(pair, y, 64, source="weights"), False),
    "cubo, 64": (lambda pair, y: evidence.cubo(pair, y, 64), False),
}


def reference(pair, y):
    """The exact evidence, or quadrature's; None for a pair that has neither."""
    for find in (evidence.exact, evidence.quadrature):
        try:
            return find(pair, y)
        except evidence.Unavailable:
            continue
    return None


def fitted(name, data, seed):
    """The row's pair, its guide fitted, and data."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    make, draw = TABLE[name]
    pair, y = make(), draw(data)
    inner = {k.split(".")[0] for k, _ in pair.named_parameters()}
    if "encoder" in inner and len(inner) > 1:
        fit(
            pair,
            y,
            epochs=150,
            batch_size=50,
            learning_rate=1e-2,
            freeze=sorted(inner - {"encoder"}),
            progress=False,
        )
    return pair, y


def reach(pair, y, draws=64):
    """The share of the prior's draws under which each datum is possible, [B]."""
    with torch.no_grad():
        log_joint = Evaluator(pair, y, with_guide=False).sample(draws, latents=False).log_joint
    return (log_joint > -math.inf).double().mean(0)


def cells(name, data, seed=0, estimators=tuple(ESTIMATORS)):
    """Rows of one pair: dicts; none for a pair that cannot be solved."""
    pair, y = fitted(name, data, seed)
    truth = reference(pair, y)
    if truth is None:
        return []
    rows = []
    for label in estimators:
        run, unbiased = ESTIMATORS[label]
        began = time.perf_counter()
        try:
            bound = run(pair, y)
            mean = reach(pair, y) if unbiased and bound.kind == "upper" else 1.0
        except evidence.Unavailable:
            continue
        except ValueError as refused:
            if "outgrows" in str(refused):  # a prior over trees whose derivations may never end
                continue
            raise
        rows.append(
            judge(name, label, bound, truth, unbiased, mean)
            | {"seconds": round(time.perf_counter() - began, 2)}
        )
    return rows


def judge(name, label, bound, truth, unbiased, mean=1.0):
    """A row: ``mean`` is that of exp(±excess), or independent unbiased estimates of it, [B]."""
    excess = bound.value.double() - truth.value.double()
    count = len(excess)
    slack = float(truth.error.double().mean()) + 1e-8
    row = {
        "pair": name,
        "estimator": label,
        "kind": bound.kind,
        "reference": truth.method,
        "bias": float(excess.mean()),
        "error": float(excess.std() / math.sqrt(count)),
        "cost": bound.cost / count,
    }
    side = {"lower": 1, "upper": -1}.get(bound.kind, 0)
    row["ordered"] = side * row["bias"] <= math.log(CELLS / FALSE_ALARM) / count + slack if side else None
    row["z"] = None
    if unbiased and side:
        log_ratio = side * excess
        surplus = log_ratio.exp() - mean
        k_hat = float(evidence.pareto_k_hat(log_ratio[:, None]))
        if k_hat > 1 / 3 or bool(log_ratio.isinf().any()):  # zeros: what counts is too rare to be seen
            row["z"] = "tail"
        else:
            spread = float(surplus.std() / math.sqrt(count)) + slack
            row["z"] = float(surplus.mean() / spread)
    return row


def failures(rows):
    """Cells on the wrong side of their reference, or whose mean is wrong."""
    limit = -statistics.NormalDist().inv_cdf(0.5 * FALSE_ALARM / CELLS)
    return [r for r in rows if r["ordered"] is False or (isinstance(r["z"], float) and abs(r["z"]) > limit)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=int, default=300)
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    rows = []
    print(
        "| pair | estimator | kind | bias, nats | ± | evaluations | ordered | z "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for name in TABLE:
        if not name.startswith(options.only):
            continue
        for r in cells(name, options.data, options.seed):
            rows.append(r)
            z = f"{r['z']:.1f}" if isinstance(r["z"], float) else r["z"] or ""
            side = {True: "yes", False: "NO", None: ""}[r["ordered"]]
            print(
                f"| {name} | {r['estimator']} | {r['kind']} | {r['bias']:+.4f} | {r['error']:.4f} | "
                f"{r['cost']:,.0f} | {side} | {z} |",
                flush=True,
            )
    bad = failures(rows)
    print(f"{len(rows)} cells, {len({r['pair'] for r in rows})} pairs, failures: {bad or 'none'}")
    print(json.dumps({"benchmark": "tightness", "seed": options.seed, "data": options.data, "rows": rows}))


if __name__ == "__main__":
    main()

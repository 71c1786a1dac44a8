"""How many ways are there to colour a map? Counting as inference, with a guide that proves its bound.

Every region gets some of four colours, drawn at random; the observation is that each has one and neighbours
differ. Then ln p(y) = ln(number of colourings) - n ln 2 for n true-or-false variables. The formula is
compiled into a decision diagram, whose guide is the posterior: the bound is tight, and the count exact. A
second guide sets variable after variable, only to values that a solver can still complete, and learns which
of them leave more colourings. Its sampled bound comes close but proves less: with probability 1 - δ, ln
p(y) ≥ ln Ẑ - ln(1/δ). Another formula: --file my.cnf (DIMACS).
"""

import argparse
import math
from pathlib import Path

import torch

from pyroelbo import audit, evidence, fit, models
from pyroelbo.data.formulas import colouring, read_dimacs


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a DIMACS file instead of the map")
    parser.add_argument("-n", "--num-epochs", type=int, default=200)
    parser.add_argument("-lr", "--learning-rate", type=float, default=1e-2)
    parser.add_argument("--delta", type=float, default=0.05, help="chance that the sampled claim is false")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    formula = read_dimacs(options.file) if options.file else colouring()
    y = torch.ones(1)  # the formula holds

    pair = models.SAT(formula)
    print(f"{formula.variables} variables, {len(formula.clauses)} clauses\n\nthe compiled guide:")
    results = {"compiled": audit(pair, y, particles=16)}
    print(results["compiled"])
    count = math.exp(float(pair.log_evidence(y)) + formula.variables * math.log(2))
    print(f"\n{count:.6g} models, for certain\n")

    torch.manual_seed(options.seed)
    learned = models.SAT(formula, "autoregressive")
    for name in ("untrained", "trained"):
        if name == "trained":
            fit(
                learned,
                y.expand(8),
                objective="rloo",
                particles=8,
                epochs=3 if options.smoke else options.num_epochs,
                batch_size=8,
                learning_rate=options.learning_rate,
                seed=options.seed,
            )
        print(f"\nthe autoregressive guide, {name}:")
        results[name] = audit(learned, y, particles=200)
        print(results[name])
    estimate = float(evidence.iwae(learned, y, particles=200).value)
    claim = estimate + math.log(options.delta) + formula.variables * math.log(2)
    print(f"\nat least {math.exp(claim):.4g} models, with probability {1 - options.delta:g}")
    return results


if __name__ == "__main__":
    main()

"""A complete audit in one picture: lower and upper bounds around the exact value, and the gap's causes.

Probabilistic PCA of handwritten digits has a closed-form evidence, with which every estimator can be
compared. Its guide is deliberately weak: a diagonal Gaussian (the posterior is correlated) with a briefly
trained encoder. The picture shows the lower bounds, the upper bound, and which part of the ELBO's gap is due
to the guide's family and which to its encoder.

    python examples/whole_audit.py --out runs/whole-audit
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, evidence, fit, models, report


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--num-audit", type=int, default=100, help="number of test data to audit")
    parser.add_argument("--temperatures", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/whole-audit"))
    options = parser.parse_args(arguments)
    if options.smoke:
        options.latent, options.num_audit, options.temperatures = 2, 4, 4

    torch.manual_seed(options.seed)
    digits = data.load("digits", "grey")
    pair = models.PPCA(64, options.latent, guide="mean_field").solve(digits["train"])
    with torch.no_grad():
        # Rotated latents give the same model, but make the posterior correlated.
        rotation, _ = torch.linalg.qr(torch.randn(options.latent, options.latent))
        pair.generator.weight.copy_(pair.generator.weight @ rotation)
        pair.encoder.weight.mul_(0.1)
    fit(
        pair, digits["train"], objective="mean_field", epochs=1 if options.smoke else 300, learning_rate=5e-3,
        schedule="cosine", freeze=("generator",), seed=options.seed, progress=False,
    )  # fmt: skip

    y = digits["test"][: options.num_audit]
    lower = evidence.ais(pair, y, options.temperatures, progress=not options.smoke)
    # Chains that run backwards from exact posterior samples give an upper bound, on any data.
    upper = evidence.ais(pair, y, options.temperatures, reverse=True, progress=not options.smoke)
    result = audit(pair, y, references=("exact", lower, upper))
    parts = evidence.gap(pair, y, particles=256, steps=5 if options.smoke else 500)
    print(result, parts, sep="\n\n")
    print("\npicture:", report.plot(result, options.out / "audit.png", parts))
    return result


if __name__ == "__main__":
    main()

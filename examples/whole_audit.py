"""Everything an audit can say, in one picture: bounds from below and above around the exact value, and who is to blame.

Probabilistic PCA of handwritten digits is a model whose evidence is known exactly, so that every estimator can be held
against it. Its guide is deliberately modest: a diagonal Gaussian (the posterior is correlated) whose encoder had little
training. The picture shows that the lower bounds lie below and the upper bound above, and how much of the ELBO's gap is
owed to the guide's family and how much to its encoder.

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
    parser.add_argument("--num-audit", type=int, default=100, help="test data that the audit looks at")
    parser.add_argument("--temperatures", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/whole-audit"))
    options = parser.parse_args(arguments)
    if options.smoke:
        options.latent, options.num_audit, options.temperatures = 2, 4, 4

    torch.manual_seed(options.seed)
    digits = data.load("digits", form="grey")
    pair = models.PPCA(64, options.latent, guide="mean_field").solve(digits["train"])
    with torch.no_grad():
        # Any rotation of the latents is the same model, but in these coordinates the posterior is correlated.
        rotation, _ = torch.linalg.qr(torch.randn(options.latent, options.latent))
        pair.generator.weight.copy_(pair.generator.weight @ rotation)
        pair.encoder.weight.mul_(0.1)
    fit(
        pair, digits["train"], objective="mean_field", epochs=1 if options.smoke else 300, learning_rate=5e-3,
        schedule="cosine", freeze=("generator",), seed=options.seed, progress=False,
    )  # fmt: skip

    y = digits["test"][: options.num_audit]
    lower = evidence.ais(pair, y, options.temperatures, progress=not options.smoke)
    # The exact posterior gives chains that run backwards from it, and with them a bound from above, on any data.
    upper = evidence.ais(pair, y, options.temperatures, reverse=True, progress=not options.smoke)
    result = audit(pair, y, references=("exact", lower, upper))
    parts = evidence.gap(pair, y, particles=256, steps=5 if options.smoke else 500)
    print(result, parts, sep="\n\n")
    print("\npicture:", report.plot(result, options.out / "audit.png", parts))
    return result


if __name__ == "__main__":
    main()

"""A Gaussian mixture: the latent is finite, so every sum is exact, and a guide can be judged without sampling
error.

The data are the digits' two leading principal components (from models.PPCA). The same model is trained with
two guides: the exact posterior (responsibilities), and an encoder, a linear softmax of the data, which has to
learn them.
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models, report
from pyroelbo.runs import fresh


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-2)
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=None, help="a new directory for the pictures; runs/mixture if left out"
    )
    options = parser.parse_args(arguments)
    epochs = 2 if options.smoke else options.num_epochs
    out = options.out or fresh("runs/mixture")

    digits = data.load("digits", "grey")
    with torch.no_grad():
        projection = models.PPCA(64, 2).solve(digits["train"])
        train, test = (projection.posterior(digits[split]).mean for split in ("train", "test"))

    results = {}
    for guide in ("exact", "encoder"):
        torch.manual_seed(options.seed)
        pair = models.GaussianMixture(2, options.components, guide=guide)
        pair.initialize(train)
        # The latent is discrete: Trace_ELBO uses score-function gradients for the encoder; with the exact
        # guide ln w is differentiated directly.
        fit(
            pair,
            train,
            epochs=epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            device="cuda" if options.cuda else None,
        )
        print(f"\n{guide} guide:")
        results[guide] = audit(pair, test)
        print(results[guide], "\n")
        print("picture:", report.plot(results[guide], out / f"{guide}.png"))
    return results


if __name__ == "__main__":
    main()

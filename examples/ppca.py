"""Probabilistic PCA: a model whose evidence is known exactly, trained three ways.

The closed form gives the maximum likelihood parameters. Gradient ascent with the exact posterior as guide
reaches them: its ELBO equals the evidence. A mean-field guide cannot represent the posterior's correlations,
so its bound is loose, and maximizing it biases the parameters: compare the `exact` rows of the three tables.
"""

import argparse

import torch

from pyroelbo import audit, data, fit, models


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-2)
    parser.add_argument("--latent", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs = 2 if options.smoke else options.num_epochs

    digits = data.load("digits", "grey")  # grey pixels in [0, 1], with a Gaussian density
    train, test = digits["train"], digits["test"]

    torch.manual_seed(options.seed)
    best = models.PPCA(64, options.latent).solve(train)
    print("closed form (Tipping and Bishop):")
    print(results := audit(best, test, particles=16), "\n")

    all_results = {"closed form": results}
    for guide in ("exact", "mean_field"):
        torch.manual_seed(options.seed)
        pair = models.PPCA(64, options.latent, guide)
        pair.initialize(train)
        fit(
            pair,
            train,
            epochs=epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            seed=options.seed,
            device="cuda" if options.cuda else None,
        )
        print(f"\ntrained with the {guide} guide:")
        print(results := audit(pair, test, particles=16), "\n")
        all_results[guide] = results
    return all_results


if __name__ == "__main__":
    main()

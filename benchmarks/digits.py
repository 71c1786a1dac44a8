"""How many nats does each kind of model need for an 8x8 digit of 17 grey levels? (scikit-learn's, 300 held out)

Every row is a probability of the grey levels, so the numbers may be compared: a normalizing flow is bounded through
dequantization (its ELBO is uniform dequantization, IW-K tightens it), a VAE by IW-K or, with two latents, quadrature.
All numbers are means of -bounds on ln P(y) over the test digits; lower is better. Each row trains with early stopping on 200
validation digits, from one seed.

    python -m benchmarks.digits
"""

import argparse
import json
import platform

import pyro
import torch

from pyroelbo import data, evidence, fit, models

LEVELS = 17


def vae(**settings):
    return lambda train: models.VAE.for_data(
        train, (8, 8), LEVELS, likelihood="discretized_logistic", **settings
    )


def flow(kind, layers):
    return lambda train: models.DequantizedFlow.for_data(train, (8, 8), LEVELS, kind=kind, layers=layers)


ROWS = {
    "flow, 6 couplings": flow("coupling", 6),
    "flow, 3 masked autoregressive layers": flow("autoregressive", 3),
    "VAE, 2 latents, N(0, I)": vae(),
    "VAE, 2 latents, VampPrior-50": vae(prior="vamp"),
    "VAE, 16 latents, N(0, I)": vae(latent=16),
    "VAE, 16 latents, VampPrior-50": vae(latent=16, prior="vamp"),
    "VAE, 16 latents, flow prior": vae(latent=16, prior="flow"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1000, help="K of IW-K")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    digits = data.load("digits", form="bytes")
    results = []
    print(
        f"| model | parameters | epochs | -ELBO | -IW-{options.samples} | reference |\n|---|---|---|---|---|---|"
    )
    for name, make in ROWS.items():
        pyro.set_rng_seed(options.seed)
        pair = make(digits["train"])
        run = fit(
            pair,
            digits["train"],
            valid=digits["valid"],
            epochs=options.epochs,
            batch_size=64,
            learning_rate=2e-3,
            ema=0.99,
            patience=20,
            seed=options.seed,
            progress=False,
        )
        pyro.set_rng_seed(options.seed)
        test = digits["test"]
        bounds = [evidence.elbo(pair, test, 64), evidence.iwae(pair, test, options.samples)]
        two = isinstance(pair, models.VAE) and pair.latent == 2
        reference = -evidence.quadrature(pair, test).mean if two else None
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in pair.parameters()),
            "epochs": len(run.metrics),
            "elbo": -bounds[0].mean,
            "iw": -bounds[1].mean,
            "error_over_data": float(bounds[1].value.std() / len(test) ** 0.5),
            "quadrature": reference,
        }
        results.append(row)
        shown = f"quadrature {reference:.2f}" if two else ""
        print(
            f"| {name} | {row['parameters']:,} | {row['epochs']} | {row['elbo']:.2f} | {row['iw']:.2f} | {shown} |",
            flush=True,
        )
    print(
        json.dumps(
            {
                "benchmark": "digits",
                "seed": options.seed,
                "K": options.samples,
                "torch": torch.__version__,
                "machine": platform.machine(),
                "rows": results,
            }
        )
    )


if __name__ == "__main__":
    main()

"""How many nats does each kind of model need for an 8x8 digit of 17 grey levels? (scikit-learn's, 300 held
out)

Every row is a probability of the same grey levels, so the numbers may be compared: a normalizing flow is
bounded through dequantization (its ELBO is uniform dequantization, IW-K tightens it), a VAE, a hierarchy and
a ladder by IW-K or, with two latents, quadrature; a diffusion by IW-8 of its chain or its orders, in
continuous time by the ELBO alone; an autoregressive model gives its exact ln P(y). All
numbers are means of -bounds on ln P(y) over the test digits; lower is better. Each row trains with early
stopping on 200 validation digits, from one seed. The errors over data (some 0.7 nats) are of the digits
drawn, which all rows share: `differs` is the mean difference to the row above with its error.

    python -m benchmarks.digits
"""

import argparse
import json
import platform

import pyro
import torch

from pyroelbo import ExactPair, data, evidence, fit, models

LAYERED = {"objective": "layered"}
ANNEALED = {"optimizer": "adamw", "clip_norm": 30.0, "schedule": "cosine", "ema": 0.998, "patience": None}


def image(model, **settings):
    return lambda digits: models.build(model, digits, settings)


def vae(**settings):
    return image("vae", **settings), {}


def flow(kind, layers):
    return image("flow", kind=kind, layers=layers), {}


CHAINS = 8  # K of IW-K where a draw is a chain of network passes

# name: how to build the pair, and the settings of `fit` that differ
ROWS = {
    "flow, 6 couplings": flow("coupling", 6),
    "flow, 3 masked autoregressive layers": flow("autoregressive", 3),
    "VAE, 2 latents, N(0, I)": vae(),
    "VAE, 2 latents, VampPrior-50": vae(prior="vamp"),
    "VAE, 16 latents, N(0, I)": vae(latent=16),
    "VAE, 16 latents, VampPrior-50": vae(latent=16, prior="vamp"),
    "VAE, 16 latents, flow prior": vae(latent=16, prior="flow"),
    "hierarchy 16-8, bottom-up": (image("hierarchy", latent=(16, 8)), {}),
    "ladder 16-8": (image("ladder", latent=(16, 8), hidden=(128, 64)), LAYERED),
    "diffusion, T = 100, UNet of 32": (
        image("diffusion", steps=100, network="unet", width=32, layers=1, dropout=0.1),
        {},
    ),
    "VDM, UNet of 32, a logit for each level": (
        image("vdm", network="unet", width=32, layers=1, dropout=0.1, parametrization="levels"),
        ANNEALED,
    ),
    "masked diffusion, 6 convolutions of 48": (
        image("masked_diffusion", network="conv", width=48, layers=6, dropout=0.1),
        ANNEALED,
    ),
    "PixelCNN, 4 layers of 32": (
        image("autoregressive", width=32, layers=4),
        {"objective": "evidence"},
    ),
}


def bounds(pair, y, samples):
    """-ELBO and -IW-K of each datum, and a reference where there is one: (name, values)."""
    if isinstance(pair, ExactPair):
        exact = evidence.exact(pair, y)
        return exact, exact, ("exact", exact)
    whole = pair.written_out()
    some = samples if whole is pair else min(samples, CHAINS)
    elbo = evidence.elbo(pair, y, 64)
    if isinstance(pair, models.VDM):
        return elbo, elbo, None  # there is no chain to weigh
    found = elbo, evidence.iwae(whole, y, some)
    if isinstance(pair, models.VAE) and pair.latent == 2:
        return *found, ("quadrature", evidence.quadrature(pair, y))
    return *found, None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--samples", type=int, default=1000, help="K of IW-K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of rows' names")
    options = parser.parse_args()
    digits = data.load("digits", "bytes")
    results, above = [], None
    print(
        f"| model | parameters | epochs | -ELBO | -IW-{options.samples} | reference | differs from the row "
        f"above |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows = {name: row for name, row in ROWS.items() if any(part in name for part in options.only)}
    for name, (make, settings) in rows.items():
        pyro.set_rng_seed(options.seed)
        pair = make(digits)
        run = fit(
            pair,
            digits["train"],
            valid=digits["valid"],
            epochs=options.epochs,
            batch_size=64,
            learning_rate=2e-3,
            seed=options.seed,
            progress=False,
            **{"ema": 0.99, "patience": 20, **settings},
        )
        pyro.set_rng_seed(options.seed)
        elbo, iw, reference = bounds(pair, digits["test"], options.samples)
        best = -(iw if reference is None else reference[1]).value.double()
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in pair.parameters()),
            "epochs": len(run.metrics),
            "elbo": -elbo.mean,
            "iw": -iw.mean,
            "error_over_data": float(best.std() / len(best) ** 0.5),
            "reference": None if reference is None else [reference[0], -reference[1].mean],
        }
        differs = ""
        if above is not None:
            step = best - above
            row["differs"] = [float(step.mean()), float(step.std() / len(step) ** 0.5)]
            differs = f"{row['differs'][0]:+.2f} ± {row['differs'][1]:.2f}"
        above = best
        results.append(row)
        shown = "" if reference is None else f"{reference[0]} {-reference[1].mean:.2f}"
        print(
            f"| {name} | {row['parameters']:,} | {row['epochs']} | {row['elbo']:.2f} | {row['iw']:.2f} | "
            f"{shown} | {differs} |",
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

"""Gaussian diffusion on handwritten digits: the bound with all its terms, where along the chain its nats are
spent, and what it looks like when noise becomes digits.

Training draws one step of the chain for each digit; the audit writes the whole chain out, so that importance
weights and particle filters bound ln p(y) from closer.

    python examples/diffusion.py --num-epochs 300 --out runs/my-diffusion
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, evidence, fit, models, report
from pyroelbo.runs import fresh


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=300)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steps", type=int, default=100, help="T, the length of the chain")
    parser.add_argument("--schedule", default="cosine", choices=("cosine", "linear"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num-audit", type=int, default=50, help="number of test data to audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory; runs/diffusion if left out")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.num_audit, options.steps, options.width = 1, 3, 8, 16
    out = options.out or fresh("runs/diffusion")

    # Integer grey levels 0 … 16: p(y | z_1) is a discretized logistic, so the bound is one on a probability.
    digits = data.load("digits", "bytes")
    torch.manual_seed(options.seed)
    settings = {"steps": options.steps, "schedule": options.schedule, "width": options.width, "dropout": 0.1}
    pair = models.build("diffusion", digits, settings)
    run = fit(
        pair,
        digits["train"],
        valid=digits["valid"],
        epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        ema=0.999,
        seed=options.seed,
        out=out,
        config={"model": "diffusion", "data": digits.describe(), "settings": settings},
    )

    # The audit writes the chain out by itself. SMC resamples along it, by what the steps so far say, which
    # know nothing of the steps to come: here it is looser than the ELBO, and importance weights are tighter.
    test = digits["test"][: options.num_audit]
    result = audit(pair, test, particles=16)
    print(result)
    smc = evidence.smc(pair.written_out(), test, particles=16, filters=4)
    print(f"{smc.method}: {smc.mean:.3f} ± {smc.mean_error:.3f} nats per datum, a lower bound")
    layers = pair.by_layer(digits["test"], draws=1 if options.smoke else 16)
    print(
        f"of {-layers.sum():.2f} nats per digit, {-layers[0]:.2f} are the grey levels given z_1 and "
        f"{-layers[-1]:.4f} the prior's"
    )

    latents, drawn = pair.written_out().simulate(12)
    strip = (pair.strip(latents["z"], 8) / 16).clamp(0, 1)
    shown = torch.linspace(options.steps, 1, len(strip)).round().int().tolist()
    few = pair.few_steps(12, steps=min(20, options.steps))
    pictures = [
        report.plot_curve(run, out / "curve.png"),
        report.plot(result, out / "audit.png"),
        report.plot_layers({"diffusion": layers}, out / "layers.png"),
        report.images(
            [digits["test"][:12] / 16, drawn / 16, few / 16],
            (8, 8),
            out / "samples.png",
            ["data", "ancestral", "few steps"],
        ),
        report.images(list(strip), (8, 8), out / "strip.png", [f"t = {t}" for t in shown]),
    ]
    print("\npictures:", *pictures)
    return result


if __name__ == "__main__":
    main()

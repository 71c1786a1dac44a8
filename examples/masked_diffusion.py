"""Masked diffusion on handwritten digits: pixels are revealed in a random order, each given those before it.

The training loss averages ln p(y | order) over orders: a bound on ln p(y) = ln mean p(y | order). Averaging
the probabilities of several orders is the importance-weighted bound, and for few pixels the mean over all
orders is a sum over the subsets of revealed pixels: the last part crops the digits to 3x3 and finds how much
the bound lost.

    python examples/masked_diffusion.py --num-epochs 200 --out runs/my-masked
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, evidence, fit, models, report
from pyroelbo.runs import fresh


def train(name, digits, settings, options, out):
    torch.manual_seed(options.seed)
    pair = models.build("masked_diffusion", digits, settings)
    run = fit(
        pair,
        digits["train"],
        valid=digits["valid"][:64],
        epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        ema=0.998,
        clip_norm=30.0,
        seed=options.seed,
        out=out / name,
        config={"model": "masked_diffusion", "data": digits.describe(), "settings": settings},
    )
    return pair, run


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=100)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--num-audit", type=int, default=100, help="number of test data to audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory; runs/masked if left out")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.num_audit, options.width, options.layers = 1, 2, 8, 1
    out = options.out or fresh("runs/masked")

    digits = data.load("digits", "bytes")
    settings = {"network": "conv", "width": options.width, "layers": options.layers, "dropout": 0.1}
    pair, run = train("whole", digits, settings, options, out)
    test = digits["test"][: options.num_audit]
    bound = evidence.elbo(pair, test, 8 if options.smoke else 64)
    print(f"order average: {bound.mean:.2f} ± {bound.mean_error:.2f} nats per digit, a lower bound")
    weighted = evidence.iwae(pair.written_out(), test[:20], 2 if options.smoke else 8)
    print(f"{weighted.method} over orders, 20 digits: {weighted.mean:.2f} ± {weighted.mean_error:.2f}")

    # The pixels of a digit in the order in which they are revealed; grey are those still masked.
    latents, drawn = pair.written_out().simulate(12)
    strip = [torch.where(latents["order"] < k, drawn / 16, 0.5) for k in (0, 8, 16, 32, 48, 64)]
    # Inpainting: the upper half of test digits is kept, the lower half drawn given it.
    upper = torch.arange(64) < 32
    filled = [pair.inpaint(digits["test"][:12], upper) / 16 for _ in range(3)]

    # 3x3 pixels from the middle of each digit, black or white: nine tokens have 512 subsets.
    middle = [8 * i + j for i in (2, 3, 4) for j in (2, 3, 4)]
    crops = {k: (y[:, middle] > 8).to(y.dtype) for k, y in digits.splits.items()}
    small = data.Dataset("digits, 3x3", "binary", (3, 3), crops, 2)
    few, _ = train("small", small, {"network": "mlp", "width": 64, "layers": 2}, options, out)
    result = audit(few, crops["test"][: options.num_audit], particles=16)
    print(f"\n{result}")

    pictures = [
        report.plot_curve(run, out / "curve.png"),
        report.plot(result, out / "audit.png"),
        report.images(strip, (8, 8), out / "strip.png", [f"{k} revealed" for k in (0, 8, 16, 32, 48, 64)]),
        report.images(
            [digits["test"][:12] / 16, torch.where(upper, digits["test"][:12] / 16, 0.5), *filled],
            (8, 8),
            out / "inpainting.png",
            ["data", "given", *["filled in"] * 3],
        ),
    ]
    print("\npictures:", *pictures)
    return result


if __name__ == "__main__":
    main()

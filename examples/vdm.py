"""Diffusion in continuous time: the schedule of the noise is learned, and what it is learned for is variance.

One schedule for all pixels does not move the bound: only its ends do. Its interior decides how noisy the
bound's estimate is. The table shows the standard deviation of a batch's estimate under two schedules and two
ways to draw the times of a batch.

    python examples/vdm.py --num-epochs 300 --out runs/my-vdm
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models, report
from pyroelbo.runs import fresh


@torch.no_grad()
def spread(pair, y, coupled, draws):
    """Standard deviation over draws of the mean bound of the batch y, in nats per datum."""
    pair.eval()
    time = torch.rand(draws, len(y))
    if coupled:  # one number for the batch, and an even comb; each time is uniform still
        time = (torch.rand(draws, 1) + torch.arange(len(y)) / len(y)) % 1
    means = [pair.term(y, t, pair.noise_law().sample(t.shape)).mean() for t in time]
    return float(torch.stack(means).std())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=300)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory; runs/vdm if left out")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.width = 1, 16
    out = options.out or fresh("runs/vdm")

    digits = data.load("digits", "bytes")
    pairs, draws, some = {}, 10 if options.smoke else 200, 20 if options.smoke else 300
    for schedule in ("cosine", "learned"):
        torch.manual_seed(options.seed)
        settings = {"schedule": schedule, "width": options.width, "dropout": 0.1, "steps": some // 2}
        pair = pairs[schedule] = models.build("vdm", digits, settings)
        run = fit(
            pair,
            digits["train"],
            valid=digits["valid"],
            epochs=options.num_epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            ema=0.999,
            clip_norm=100.0,
            seed=options.seed,
            out=out / schedule,
            config={"model": "vdm", "data": digits.describe(), "settings": settings},
        )
    print("\nstandard deviation of the bound of a batch of 64 digits, nats per digit")
    print(f"{'schedule':10} {'uniform times':>14} {'spread times':>14}")
    for schedule, pair in pairs.items():
        row = [spread(pair, digits["test"][:64], coupled, draws) for coupled in (False, True)]
        print(f"{schedule:10} {row[0]:14.2f} {row[1]:14.2f}")

    # There is no chain to write out: the audit has the bound alone, and says why.
    result = audit(pairs["learned"], digits["test"][:some], particles=64)
    print(f"\n{result}")
    _, drawn = pairs["learned"].simulate(12)
    named = {k: p.by_layer(digits["test"][:some], 4) for k, p in pairs.items()}
    pictures = [
        report.plot_curve(run, out / "curve.png"),
        report.plot_layers(named, out / "layers.png"),
        report.images(
            [digits["test"][:12] / 16, drawn / 16], (8, 8), out / "samples.png", ["data", "samples"]
        ),
    ]
    print("\npictures:", *pictures)
    return result


if __name__ == "__main__":
    main()

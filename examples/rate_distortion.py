"""Rate against distortion: how many bits do codes cost, what do they keep, and why are pictures blurred?

An autoencoder rounds its codes, z = round(x(y)), and a learned prior p(z) says what they cost: the rate
E[-ln p(z)]. The distortion is a density: L2 with weight λ is a Gaussian of variance 1/λ. Then minus the ELBO
is rate + distortion + ln Z, and λ is the exchange rate between them. For each λ the codes of held-out digits
are written to a file, and its size (without the fixed part that describes it) stands beside the rate that the
model claims.

The figure answers the question why pictures of autoencoders are blurred: at a low rate the decoder gives the
mean of everything that has the same code, whatever the distortion. The variance of the Laplacian, which is
small for blurred pictures, rises with the rate towards that of the data, under L2 as under L1.

For a Gaussian source the least rate is known, R(D) = ½ log₂ σ²/D. Rounding with a learned prior stays about a
quarter of a bit above it, ½ log₂ πe/6 = .2546 at high rates: the last part.

    python examples/rate_distortion.py
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch

from pyroelbo import audit, coding, data, fit, models, report
from pyroelbo.results import RatePoint

LN2 = math.log(2)


def train(pair, y, options, epochs):
    fit(
        pair,
        y,
        epochs=epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device="cuda" if options.cuda else None,
        progress=False,
    )
    return pair.cpu().eval()


def measure(pair, y, path, shape=None):
    """The point of a pair: the rate that its prior claims, the file that its codes need, what they keep."""
    lossy = pair.lossy()
    z = lossy.encode(y)
    path.unlink(missing_ok=True)
    code = coding.compress(lossy.codes, z.numpy().astype(np.uint8), path)
    restored = lossy.decode(torch.from_numpy(coding.decompress(lossy.codes, path)))
    assert torch.equal(restored, lossy.decode(z))
    error = float((y - restored).square().mean())
    file = (code.bytes - code.frame_bytes) * 8 * LN2 / len(y)  # without the frame, a fixed part
    sharp = math.nan if shape is None else report.sharpness(restored, shape)
    return RatePoint(pair.weight, y.shape[1], float(pair.rate(y).mean()), file, error, sharp), restored


def digits(options, epochs):
    """Curves of L2 and L1 distortion, and a row of pictures for each weight of L2."""
    found = data.load("digits", "grey")
    weights = {"l2": (2.0, 8.0, 32.0, 128.0, 512.0), "l1": (1.0, 3.0, 8.0, 20.0, 60.0)}
    test, curves, audits = found["test"], {}, {}
    rows, titles = [test[:16]], ["data"]
    print("distortion       λ   bits/pixel   the file's   mean squared error   sharpness")
    for name, sweep in weights.items():
        curves[name.upper()] = points = []
        for weight in sweep[: 1 if options.smoke else None]:
            torch.manual_seed(options.seed)
            pair = models.RateDistortion((8, 8), 16, likelihood=name, weight=weight)
            train(pair, found["train"], options, epochs)
            point, decoded = measure(pair, test, options.out / f"{name}_{weight:g}.code", (8, 8))
            points.append(point)
            print(
                f"{name:10s}{weight:8g}{point.bits:13.4f}{point.file_bits:13.4f}{point.distortion:21.5f}"
                f"{point.sharpness:12.4f}"
            )
            if name == "l2":
                rows.append(decoded[:16].clamp(0, 1))
                titles.append(f"{point.bits:.2f} bits")
        audits[name] = audit(pair, test[: 5 if options.smoke else 50], particles=2)
    sharp = report.sharpness(test, (8, 8))
    print(f"sharpness of the data {sharp:.4f}")
    path = options.out / "rate_distortion.png"
    report.plot_rate_distortion(curves, path, sharp=sharp, rows=rows, shape=(8, 8), titles=titles)
    print(f"written: {path}\n")
    return audits


def gaussian(options, epochs):
    """A Gaussian source: how far above R(D)?"""
    torch.manual_seed(options.seed)
    y, test = torch.randn(2, 500 if options.smoke else 20000, 1)
    points = []
    print("Gaussian source   λ       bits   mean squared error   above R(D)   the file's")
    for weight in (10.0, 100.0, 1000.0)[: 1 if options.smoke else None]:
        torch.manual_seed(options.seed)
        pair = models.RateDistortion(1, 1, (), weight=weight)
        train(pair, y, options, epochs)
        point, _ = measure(pair, test, options.out / f"gaussian_{weight:g}.code")
        points.append(point)
        least = 0.5 * math.log2(float(test.var()) / point.distortion)
        print(
            f"{weight:20g}{point.bits:10.4f}{point.distortion:21.6f}{point.bits - least:13.4f}"
            f"{point.file_bits:13.4f}"
        )
    print(f"at high rates ½ log₂ πe/6 = {0.5 * math.log2(math.pi * math.e / 6):.4f} bits above")
    errors = torch.logspace(-3.5, 0, 50, dtype=torch.float64)
    bound = (0.5 * (1 / errors).log2()).tolist(), errors.tolist()
    path = options.out / "gaussian.png"
    print(f"written: {report.plot_rate_distortion({'rounding': points}, path, bound)}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rate_distortion"))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    found = digits(options, 1 if options.smoke else options.num_epochs)
    for name, result in found.items():
        print(f"{name}, the largest weight, densities of grey levels:\n{result}\n")
    gaussian(options, 1 if options.smoke else 10)
    return found


if __name__ == "__main__":
    main()

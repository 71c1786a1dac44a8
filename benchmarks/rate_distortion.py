"""How far above the rate-distortion function are rounded codes, and does a file of them have the rate?

    python -m benchmarks.rate_distortion gaussian   # sources whose R(D) is known
    python -m benchmarks.rate_distortion digits     # L2 and L1, noise and straight-through, sharpness

`gaussian`: 20,000 training and 20,000 test draws of N(0, 1), and of an AR(1) process of 8 numbers
(correlation .9, variance 1); linear encoder and decoder, L2. R(D) of the process is the reverse water-filling
over the eigenvalues of its covariance. Rate, file and R(D) are in bits a number, at the distortion measured
on the test draws; entropy-coded rounding stays ½ log2 πe/6 = .2546 above R(D) at high rates.

`digits`: 300 test digits of 8x8 in [0, 1], 16 integers; every row is trained for 60 epochs. "file" has the
codes of all test digits; some hundred bytes that describe a file, its frame, are left out.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from pyroelbo import coding, data, fit, models, report
from pyroelbo.results import RatePoint

LN2 = math.log(2)


def point(pair, y, shape=None):
    """Rate, file of the codes (restored and compared), error and sharpness of test data."""
    lossy = pair.cpu().eval().lossy()
    z = lossy.encode(y)
    with tempfile.TemporaryDirectory() as folder:
        code = coding.compress(lossy.codes, z.numpy().astype(np.uint8), Path(folder) / "code")
        restored = lossy.decode(torch.from_numpy(coding.decompress(lossy.codes, Path(folder) / "code")))
    assert torch.equal(restored, lossy.decode(z))
    error = float((y - restored).square().mean())
    file = (code.bytes - code.frame_bytes) * 8 * LN2 / len(y)  # without the frame, a fixed part
    sharp = math.nan if shape is None else report.sharpness(restored, shape)
    return RatePoint(pair.weight, y.shape[1], float(pair.rate(y).mean()), file, error, sharp)


def water_filling(eigenvalues, error):
    """R(D) in bits a number, D the mean squared error: ½ log₂ of eigenvalues over the water level."""
    low, high = 0.0, float(eigenvalues.max())
    for _ in range(200):
        level = 0.5 * (low + high)
        low, high = (level, high) if float(eigenvalues.clamp(max=level).mean()) < error else (low, level)
    return float(0.5 * (eigenvalues / eigenvalues.clamp(max=level)).log2().mean())


def gaussian(options):
    place = torch.arange(8)
    sources = {"N(0, 1)": torch.ones(1, 1), "AR(1), 8 numbers": 0.9 ** (place[:, None] - place).abs()}
    rows = []
    print("| source | gradients | λ | mean squared error | rate, bits | file, bits | R(D) | above R(D) |")
    print("|---|---|---|---|---|---|---|---|")
    for name, covariance in sources.items():
        root = torch.linalg.cholesky(covariance)
        torch.manual_seed(options.seed)
        dims = len(covariance)
        train, test = (torch.randn(20000, dims) @ root.T for _ in range(2))
        for quantization in ("noise", "straight_through"):
            for weight in (10.0, 100.0, 1000.0):
                torch.manual_seed(options.seed)
                pair = models.RateDistortion(dims, dims, (), weight=weight, quantization=quantization)
                fit(
                    pair, train, epochs=options.epochs, batch_size=256, learning_rate=1e-2, seed=options.seed,
                    device="cpu", progress=False,
                )  # fmt: skip
                found = point(pair, test)
                least = water_filling(torch.linalg.eigvalsh(covariance.double()), found.distortion)
                rows.append(
                    {
                        "source": name, "quantization": quantization, "weight": weight,
                        "distortion": found.distortion, "bits": found.bits, "file_bits": found.file_bits,
                        "least": least,
                    }
                )  # fmt: skip
                print(
                    f"| {name} | {quantization} | {weight:g} | {found.distortion:.5f} | {found.bits:.4f} | "
                    f"{found.file_bits:.4f} | {least:.4f} | {found.bits - least:.4f} |",
                    flush=True,
                )
    return rows


def digits(options):
    found = data.load("digits", "grey")
    sweeps = {
        ("l2", "noise"): (2.0, 8.0, 32.0, 128.0, 512.0),
        ("l2", "straight_through"): (2.0, 8.0, 32.0, 128.0, 512.0),
        ("l1", "noise"): (1.0, 3.0, 8.0, 20.0, 60.0),
    }
    rows, test = [], found["test"]
    print(f"sharpness of the data: {report.sharpness(test, (8, 8)):.4f}")
    print("| distortion, gradients | λ | rate, bits/pixel | file | mean squared error | sharpness |")
    print("|---|---|---|---|---|---|")
    for (likelihood, quantization), weights in sweeps.items():
        for weight in weights:
            torch.manual_seed(options.seed)
            pair = models.RateDistortion(
                (8, 8), 16, likelihood=likelihood, weight=weight, quantization=quantization
            )
            fit(
                pair, found["train"], epochs=60, batch_size=64, learning_rate=2e-3, seed=options.seed,
                device="cpu", progress=False,
            )  # fmt: skip
            row = point(pair, test, (8, 8))
            rows.append({"distortion": likelihood, "quantization": quantization, **row.to_dict()})
            print(
                f"| {likelihood}, {quantization} | {weight:g} | {row.bits:.4f} | {row.file_bits:.4f} | "
                f"{row.distortion:.5f} | {row.sharpness:.4f} |",
                flush=True,
            )
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="gaussian", choices=("gaussian", "digits"))
    parser.add_argument("--epochs", type=int, default=20, help="of `gaussian`")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"gaussian": gaussian, "digits": digits}[options.what](options)
    print(json.dumps({"benchmark": "rate_distortion", **vars(options), "rows": rows}))


if __name__ == "__main__":
    main()

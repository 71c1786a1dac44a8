"""Why are the samples of variational autoencoders blurry: L2 instead of L1, a scale that is fixed too wide,
or the generator?

    PYROELBO_DATA=... python -m benchmarks.sharpness freyfaces --epochs 40
    PYROELBO_DATA=... python -m benchmarks.sharpness mnist --epochs 6 --num-train 8000

Sharpness is the variance of the Laplacian (`report.sharpness`) as a share of that of the test images: 1 is as
sharp as data, and more is noise. It is measured on test images decoded from their codes, on means of p(y | z)
at draws of the prior (what is commonly shown), and on draws of y itself.

One convolutional generator under four observation models: L2 and L1 distortions, ½λ(y - ŷ)² and λ|y - ŷ|
of pixels in [0, 1], with a fixed weight (a variance of ½ for both) and with a learned one; and the style-
based generator under the learned two. All are rounded to the 256 grey levels, so that probabilities are
compared, in bits: of the latents E[log2 q(z | y) - log2 p(z)], of the residual E[-log2 p(y | z)], 16
draws a test image. One seed; Adam, batches of 64, a cosine on the learning rate, no augmentation.
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch

from pyroelbo import data, evidence, files, fit, models, report

LIKELIHOODS = {"L2": "discretized_normal", "L1": "discretized_laplace"}
KINDS = ("fixed weight", "learned weight", "learned, style")
FIXED = 2.0


def systems(shape):
    rows = {}
    for name, likelihood in LIKELIHOODS.items():
        common = {"likelihood": likelihood, "levels": 256}
        conv = {"latent": 16, "hidden": (16,), "network": "conv", "channels": 16, **common}
        rows[f"{name}, fixed weight"] = lambda conv=conv: models.VAE(shape, weight=FIXED, **conv)
        rows[f"{name}, learned weight"] = lambda conv=conv: models.VAE(shape, **conv)
        rows[f"{name}, learned, style"] = lambda common=common: models.StyleVAE(
            shape, 3, 1, 16, 32, 2, 16, **common
        )
    return {f"{name}, {kind}": rows[f"{name}, {kind}"] for kind in KINDS for name in LIKELIHOODS}


@torch.no_grad()
def images_of(pair, test, n, seed):
    """Decoded test images, means at draws of the prior, and draws of y; all in [0, 1]."""
    torch.manual_seed(seed)
    latents, drawn = pair.simulate(n)
    if isinstance(pair, models.StyleVAE):
        means = pair.pixels.mean_image(pair.observation(*pair.truncated(latents, 1.0)))
    else:
        means = pair.mean_image(latents["z"])
    return pair.reconstruct(test[:n]), means, drawn / 255


def measured(name, make, options, found, train, test):
    """The row of a system, and pictures [2, 12, D], decoded and drawn, read from the folder if there."""
    key = f"{found.name}-{name}-{options.epochs}-{len(train)}-{len(test)}-{options.seed}".replace(", ", "-")
    file = options.out / f"{key.replace(' ', '-')}.safetensors"
    if file.exists():
        tensors, row = files.read_tensors(file)
        return row, tensors["pictures"]
    torch.manual_seed(options.seed)
    pair = make()
    style = isinstance(pair, models.StyleVAE)
    fit(
        pair,
        train,
        epochs=options.epochs,
        batch_size=64,
        learning_rate=2e-3,
        schedule="cosine",
        clip_norm=500.0,
        objective="layered" if style else "elbo",
        seed=options.seed,
        progress=False,
    )
    kinds = images_of(pair, test, len(test), options.seed)
    torch.manual_seed(options.seed)
    terms = evidence.terms(pair, test, 16)
    rate = sum((terms.log_guide[s] - terms.log_model[s]).mean(0) for s in terms.log_guide).double()
    residual = -sum(terms.log_model[s].mean(0) for s in terms.observed).double()
    weight = float((pair.pixels if style else pair.generator).log_weight.detach().exp())
    deviation = weight**-0.5 if name.startswith("L2") else math.sqrt(2) / weight
    total, sharp = (rate + residual) / math.log(2), report.sharpness(test / 255, found.shape)
    row = {
        "data": found.name,
        "system": name,
        "parameters": sum(p.numel() for p in pair.parameters()),
        "deviation": round(255 * deviation, 1),
        "latent_bits": round(float(rate.mean()) / math.log(2), 1),
        "residual_bits": round(float(residual.mean()) / math.log(2), 1),
        "bits_per_dim": round(float(total.mean()) / found.dims, 4),
        "error": round(float(total.std()) / math.sqrt(len(test)) / found.dims, 4),
        **{
            kind: round(report.sharpness(y, found.shape) / sharp, 3)
            for kind, y in zip(("decoded", "means", "draws"), kinds, strict=True)
        },
    }
    pictures = torch.stack([kinds[0][:12], kinds[1][:12]]).float()
    files.write_tensors(file, {"pictures": pictures}, row)
    print(json.dumps(row | {"cores": os.cpu_count()}), flush=True)
    return row, pictures


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=("freyfaces", "mnist", "patches"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--num-train", type=int, default=0, help="0: all")
    parser.add_argument("--num-test", type=int, default=200, help="test images at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="train systems whose names contain it")
    parser.add_argument("--out", type=Path, default=Path("runs/sharpness"), help="keeps what is trained")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found = data.load(options.data)
    train = found["train"][: options.num_train or None]
    order = torch.randperm(len(found["test"]), generator=torch.Generator().manual_seed(options.seed))
    test = found["test"][order[: options.num_test]]
    chosen = {name: make for name, make in systems(found.shape).items() if options.only in name}
    runs = {name: measured(name, make, options, found, train, test) for name, make in chosen.items()}
    if options.only:
        return
    pictures = {"data": test[:12] / 255}
    for name, (_, (decoded, means)) in runs.items():
        pictures |= {f"{name}: decoded": decoded, f"{name}: drawn": means}
    print(
        f"\n{found.name}, {len(train)} training and {len(test)} test images, {options.epochs} epochs, seed "
        f"{options.seed}\n{'system':22}{'σ, levels':>10}{'latent':>9}{'residual':>10}{'bits/dim':>10}"
        f"{'error':>8}{'decoded':>9}{'means':>7}{'draws':>7}"
    )
    for row, _ in runs.values():
        print(
            f"{row['system']:22}{row['deviation']:10.1f}{row['latent_bits']:9.1f}{row['residual_bits']:10.1f}"
            f"{row['bits_per_dim']:10.3f}{row['error']:8.3f}{row['decoded']:9.2f}{row['means']:7.2f}"
            f"{row['draws']:7.2f}"
        )
    file = options.out / f"{found.name}.png"
    print("picture:", report.images(list(pictures.values()), found.shape, file, list(pictures), found.light))


if __name__ == "__main__":
    main()

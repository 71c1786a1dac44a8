"""How good is the bound of a style-based generator with its inverter, beside a convolutional VAE of its size?

    PYROELBO_DATA=... python -m benchmarks.style freyfaces --epochs 40
    PYROELBO_DATA=... python -m benchmarks.style mnist --epochs 6 --num-train 8000

Grey images in 256 levels under one discretized logistic likelihood. Three systems, each trained from several
seeds on the same images, Adam, batches of 64, a cosine on the learning rate, no augmentation:

- style: StyleVAE, three sizes, one noise map each, trained by the closed-form KL terms;
- conv: VAE(network="conv") with at least as many parameters, as many epochs;
- conv, longer: the same for seven times as many epochs, about the style pair's processor time.

Printed are the ELBO of test images (16 draws a datum), in nats: the mean over seeds, its standard error from
the spread over seeds, and of "style - conv" the standard error over test images (paired, seeds averaged) too.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch

from pyroelbo import data, evidence, fit, models

LIKELIHOOD = {"likelihood": "discretized_logistic", "levels": 256}


def style(shape):
    return models.StyleVAE(shape, 3, 1, 16, 32, 2, 16, **LIKELIHOOD)


def conv(shape):
    return models.VAE(shape, 16, (16,), network="conv", channels=16, **LIKELIHOOD)


def size(pair):
    return sum(p.numel() for p in pair.parameters())


def trained(make, shape, train, epochs, seed, objective):
    torch.manual_seed(seed)
    pair, start = make(shape), time.process_time()
    fit(
        pair,
        train,
        epochs=epochs,
        batch_size=64,
        learning_rate=2e-3,
        schedule="cosine",
        clip_norm=500.0,
        objective=objective,
        seed=seed,
        progress=False,
    )
    return pair, time.process_time() - start


def measured(name, seed, epochs, images, train, test, folder):
    """The ELBO of each test image and the seconds of training; of a run in the folder, as they were."""
    key = [name, seed, epochs, len(train), len(test)]
    file = folder / f"{images.name}-{'-'.join(map(str, key)).replace(', ', '-')}.json"
    if not file.exists():
        make, objective = (style, "layered") if name == "style" else (conv, "elbo")
        pair, seconds = trained(make, images.shape, train, epochs, seed, objective)
        torch.manual_seed(seed)
        bound = evidence.elbo(pair, test, particles=16)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"elbo": bound.value.tolist(), "seconds": seconds}))
        print(f"{name}, seed {seed}: {bound.mean:.2f} after {epochs} epochs, {seconds:.0f} s", flush=True)
    found = json.loads(file.read_text())
    return torch.tensor(found["elbo"], dtype=torch.float64), found["seconds"]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=("freyfaces", "mnist"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=0, help="0: all")
    parser.add_argument("--num-test", type=int, default=200, help="test images at random; 0: all")
    parser.add_argument(
        "--longer", type=float, default=7.0, help="epochs of conv, longer, as a multiple; 0: none"
    )
    parser.add_argument(
        "--only", nargs=2, metavar=("SYSTEM", "SEED"), help="train one; a later call prints all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/style"), help="what is there is not trained again"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images = data.load(options.data)
    train = images["train"][: options.num_train or None]
    order = torch.randperm(len(images["test"]), generator=torch.Generator().manual_seed(0))
    test = images["test"][order[: options.num_test or None]]
    epochs = dict.fromkeys(("style", "conv"), options.epochs)
    if options.longer:
        epochs["conv, longer"] = round(options.longer * options.epochs)
    if options.only:
        name, seed = options.only[0], int(options.only[1])
        measured(name, seed, epochs[name], images, train, test, options.out)
        return
    runs = {
        name: [measured(name, s, count, images, train, test, options.out) for s in range(options.seeds)]
        for name, count in epochs.items()
    }
    values = {name: torch.stack([v for v, _ in found]) for name, found in runs.items()}

    print(
        f"\n{images.name}, {len(train)} training and {len(test)} test images, {options.seeds} seeds\n"
        f"{'system':14}{'parameters':>12}{'epochs':>8}{'seconds':>9}{'ELBO':>11}{'error':>8}{'bits/dim':>10}"
    )
    for name, found in values.items():
        mean, error = float(found.mean()), float(found.mean(1).std()) / math.sqrt(options.seeds)
        row = {
            "data": images.name,
            "system": name,
            "parameters": size((style if name == "style" else conv)(images.shape)),
            "epochs": epochs[name],
            "seconds": round(sum(s for _, s in runs[name]) / options.seeds, 1),
            "elbo": round(mean, 3),
            "error": round(error, 3),
            "bits_per_dim": round(-mean / images.dims / math.log(2), 4),
        }
        print(
            f"{name:14}{row['parameters']:12,}{row['epochs']:8}{row['seconds']:9.0f}{mean:11.2f}"
            f"{error:8.2f}{row['bits_per_dim']:10.3f}"
        )
        if name != "style":
            gain = values["style"] - found
            over_data = float(gain.mean(0).std()) / math.sqrt(len(test))
            over_seeds = float(gain.mean(1).std()) / math.sqrt(options.seeds)
            row |= {"gain": round(float(gain.mean()), 3), "gain_error_over_data": round(over_data, 3)}
            row["gain_error_over_seeds"] = round(over_seeds, 3)
            print(
                f"  style is {row['gain']:.2f} better (error over images {over_data:.2f}, "
                f"over seeds {over_seeds:.2f})"
            )
        print(json.dumps(row | {"cores": os.cpu_count()}))


if __name__ == "__main__":
    main()

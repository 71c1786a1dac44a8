"""How evenly are codes used, what does a point-mass guide waste, and what does a step of a VQ-VAE cost?

    python -m benchmarks.vq usage --data-dir DATA  # 512 codes on patches, held-out perplexity
    python -m benchmarks.vq bounds                 # bound, exact evidence and file of digits
    python -m benchmarks.vq speed                  # a training step beside vector-quantize-pytorch's layer

`usage`: one code a patch, non-overlapping patches of MNIST's training and test images (static binarization
and grey levels) and of scikit-image's photographs (8x8; held out are the squares that the data set "patches"
holds out). p0 is the share of the commonest patch of the test split. Perplexity cannot exceed exp(h(p0) +
(1 - p0) ln 511) if that patch has a code for itself; 80 % of it are wanted. Beside it the perplexity of
k-means of the pixels, what squared error alone makes of them. The codebook does not move while it is
measured.

`bounds`: 4,096 code words, so that ln p(y) is a sum; nats on the 300 test digits (17 grey levels, discretized
logistic), and the file, decoded and compared. A prior "learned later" is held as it starts for the first
third of the epochs.

`speed`: the same encoder, decoder and likelihood around the layer; milliseconds of processor time of loss and
gradients, median of interleaved rounds. The peer is skipped if it is not installed.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pyroelbo import coding, data, evidence, fit, models
from pyroelbo.models.kmeans import k_means
from pyroelbo.results import CodeUsage

CODES = 512


def patches(pictures, shape, size):
    """Non-overlapping patches [n, size²] of flat pictures [N, H·W]."""
    cut = pictures.reshape(-1, shape[0] // size, size, shape[1] // size, size).transpose(2, 3)
    return cut.reshape(-1, size * size)


def commonest(y):
    """The share of the commonest row."""
    _, counts = y.unique(dim=0, return_counts=True)
    return float(counts.max()) / len(y)


def ceiling(p0):
    """The largest perplexity of codes of which one has the share p0."""
    entropy = -p0 * math.log(p0) - (1 - p0) * math.log(1 - p0) if 0 < p0 < 1 else 0.0
    return math.exp(entropy + (1 - p0) * math.log(CODES - 1))


def least_squares(train, test, seed):
    """The held-out perplexity of as many centres of k-means of the pixels themselves."""
    torch.manual_seed(seed)
    centres, _, _ = k_means(train[torch.randperm(len(train))[:20_000]], CODES)
    nearest = torch.cat([torch.cdist(y, centres).argmin(-1) for y in test.split(4000)])
    return CodeUsage(tuple(torch.bincount(nearest, minlength=CODES).tolist())).perplexity


def usage(options):
    rows = []
    print("| patches | p0 | ceiling | k-means | perplexity | used | of the ceiling | bits/dim | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, kind, size in (
        ("binarized_mnist", None, 4), ("binarized_mnist", None, 7),
        ("mnist", None, 4), ("mnist", None, 7), ("patches", None, 8),
    ):  # fmt: skip
        if options.only not in f"{name} {size}x{size}":
            continue
        found = data.load(name, kind, root=options.data_dir)
        splits = {k: patches(found[k], found.shape, size) for k in ("train", "test")}
        order = torch.randperm(len(splits["train"]), generator=torch.Generator().manual_seed(0))
        train, test = splits["train"][order[: options.num_data]], splits["test"]
        means = least_squares(train, test, options.seed)
        likelihood = "bernoulli" if found.levels == 2 else "discretized_logistic"
        torch.manual_seed(options.seed)
        start = time.process_time()
        pair = models.VQVAE(
            (size, size),
            CODES,
            16,
            1,
            (128,),
            likelihood,
            found.levels,
            codebook=options.codebook,
            reset=options.reset,
        ).initialize(train)
        fit(
            pair, train, epochs=math.ceil(options.steps * 512 / len(train)), batch_size=512,
            learning_rate=2e-3, seed=options.seed, device="cpu", progress=False,
        )  # fmt: skip
        seconds = time.process_time() - start
        result, p0 = pair.usage(test), commonest(test)
        bound = torch.cat([evidence.elbo(pair, y, particles=1).value for y in test[:20000].split(2000)])
        bits = -float(bound.mean()) / math.log(2) / size**2
        share = result.perplexity / ceiling(p0)
        rows.append(
            {
                "patches": f"{name} {size}x{size}", "p0": p0, "ceiling": ceiling(p0), "k_means": means,
                "perplexity": result.perplexity, "used": result.used, "bits_per_dim": bits,
            }
        )  # fmt: skip
        print(
            f"| {name} {size}x{size} | {p0:.3f} | {ceiling(p0):.1f} | {means:.1f} | "
            f"{result.perplexity:.1f} | {result.used} | {share:.0%} | {bits:.3f} | {seconds:.0f} |",
            flush=True,
        )
    return rows


SYSTEMS = {
    "VQ, averages": (models.VQVAE, {"codes": 16}, "elbo"),
    "VQ, gradients": (models.VQVAE, {"codes": 16, "codebook": "gradient"}, "elbo"),
    "FSQ 4x4": (models.FSQVAE, {"bins": (4, 4)}, "elbo"),
    "SQ, uniform prior": (models.SQVAE, {"codes": 16}, "straight_through"),
    "SQ, prior learned later": (models.SQVAE, {"codes": 16, "prior": "autoregressive"}, "straight_through"),
}


def bounds(options):
    digits = data.load("digits")
    train, test = digits["train"], digits["test"]
    array = test.numpy().astype(np.uint8)
    rows = []
    print("| codes | -ELBO | -ln p(y), exact | wasted | file, nats by the model | perplexity |")
    print("|---|---|---|---|---|---|")
    for name, (make, settings, objective) in SYSTEMS.items():
        if options.only not in name:
            continue
        for seed in range(options.seed, options.seed + options.seeds):
            torch.manual_seed(seed)
            pair = make((8, 8), positions=3, likelihood="discretized_logistic", levels=17, **settings)
            pair.initialize(train)
            later = options.epochs // 3 if "later" in name else 0
            for epochs, freeze in ((later, ("prior",)), (options.epochs - later, ())):
                if epochs:
                    fit(
                        pair, train, epochs=epochs, batch_size=64, learning_rate=2e-3, seed=seed,
                        objective=objective, freeze=freeze, device="cpu", progress=False,
                    )  # fmt: skip
            pair.eval()
            elbo, exact = evidence.elbo(pair, test, particles=16), evidence.exact(pair, test)
            gap = exact.value - elbo.value
            with tempfile.TemporaryDirectory() as folder:
                code = coding.compress(pair, array, Path(folder) / "code")
                assert np.array_equal(coding.decompress(pair, Path(folder) / "code"), array)
            perplexity = pair.usage(test).perplexity
            row = {
                "codes": name, "seed": seed, "elbo": -elbo.mean, "exact": -exact.mean,
                "gap": float(gap.mean()), "gap_error": float(gap.std() / len(gap) ** 0.5), "file": code.net,
                "perplexity": perplexity,
            }  # fmt: skip
            rows.append(row)
            print(
                f"| {name}, seed {seed} | {-elbo.mean:.2f} | {-exact.mean:.2f} | {row['gap']:.4f} ± "
                f"{row['gap_error']:.4f} | {code.net:.2f} | {perplexity:.1f} |",
                flush=True,
            )
    return rows


class Peer(torch.nn.Module):
    """The network of a VQVAE with vector-quantize-pytorch's layer in it, its loss by hand; no prior."""

    def __init__(self, pair, layer):
        super().__init__()
        self.pair, self.layer = pair, layer

    def forward(self, y):
        vectors, _, commitment = self.layer(self.pair.vectors(y))
        return commitment - self.pair.observation(vectors).log_prob(y).mean()


class Ours(torch.nn.Module):
    """The same with ours: bound of the pixels and commitment."""

    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, y):
        pair, x = self.pair, self.pair.vectors(y)
        found = pair.quantizer(x)[1]
        penalty = pair.quantizer.penalty(x, found, pair.commitment).sum(-1)
        return (penalty - pair.observation(found).log_prob(y)).mean()


def speed(options):
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        print("vector-quantize-pytorch is not installed: no peer")
        VectorQuantize = None
    rows = []
    print("| network, codes | row | ms a step |")
    print("|---|---|---|")
    sizes = {
        "mlp 784-256, 16 codes of 512, width 32": {"positions": 16, "hidden": (256,), "width": 32},
        "conv 28x28, 49 codes of 512, width 32": {"network": "conv", "width": 32, "channels": 16},
    }
    for title, settings in sizes.items():
        torch.manual_seed(options.seed)
        y = torch.bernoulli(torch.full((64, 784), 0.13))

        def make(settings=settings):
            return models.VQVAE((28, 28), CODES, prior="uniform", **settings)

        steps: dict[str, torch.nn.Module] = {}
        steps["ours"] = Ours(make())
        if VectorQuantize is not None:
            peer = VectorQuantize(
                dim=32, codebook_size=CODES, decay=0.99, commitment_weight=0.25, threshold_ema_dead_code=2
            )
            steps["vector-quantize-pytorch"] = Peer(make(), peer)
        times = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, module in steps.items():
                start = time.process_time()
                module(y).backward()
                times[name].append(time.process_time() - start)
        for name, found in times.items():
            value = statistics.median(found[2:]) * 1e3
            rows.append({"network": title, "row": name, "ms": value})
            print(f"| {title} | {name} | {value:.2f} |", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="bounds", choices=("usage", "bounds", "speed"))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=60, help="of `bounds`")
    parser.add_argument("--steps", type=int, default=3000, help="of 512 patches, at least")
    parser.add_argument("--num-data", type=int, default=100_000, help="training patches, at random")
    parser.add_argument("--codebook", default="ema")
    parser.add_argument("--reset", type=float, default=0.1)
    parser.add_argument("--only", default="", help="part of a row's name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of `bounds`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {"usage": usage, "bounds": bounds, "speed": speed}[options.what](options)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    settings.pop("data_dir")
    print(json.dumps({"benchmark": "vq", **settings, "rows": rows}))


if __name__ == "__main__":
    main()

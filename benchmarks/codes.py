"""How many bytes does a bound make of real data? Codes of a pair beside general compressors, decoded bit for
bit.

    python -m benchmarks.codes digits                           # trains on 8x8 digits of 17 levels
    python -m benchmarks.codes mnist --run RUN --data-dir DATA  # a run of `pyroelbo train` on binarized_mnist
    python -m benchmarks.codes mnist --run RUN --system ladder  # a run of that system by static_mnist.py
    python -m benchmarks.codes speed                            # coders alone, without networks

`digits` trains the models of MODELS (seed 0) and codes the 300 held-out images; `mnist` codes the test
images in random order (seed 0), a sequence, a set, and with weights of float16 and int8, whose ELBO is
measured anew. "net" is what the model coded, in nats an image, beside the negative ELBO of the same images
(16 draws; of an exact model -ln p). Not in the file are the model, and the initial bits that bits-back pops
first: they come out of the data at the start, which are coded without the model. Break-even: the number of
images from which file and model together are smaller than the best code without a model here.
"""

import argparse
import bz2
import json
import lzma
import math
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyro
import torch

from benchmarks import static_mnist
from pyroelbo import coding, data, evidence, fit, models
from pyroelbo.coding.symbols import Bernoullis

# name, settings, settings of `fit` that differ
MODELS = (
    ("vae", {"latent": 16, "likelihood": "discretized_logistic"}, {}),
    ("vae", {"latent": 16, "likelihood": "discretized_logistic", "prior": "vamp"}, {}),
    ("hierarchy", {"latent": (16, 8), "likelihood": "discretized_logistic"}, {}),
    ("ladder", {"latent": (16, 8), "hidden": (128, 64), "likelihood": "discretized_logistic"}, {}),
    ("autoregressive", {"likelihood": "categorical", "width": 24, "layers": 3}, {"epochs": 10}),
)


def general(y):
    """Sizes by compressors of bytes; binary images are packed for them, eight pixels a byte."""
    content = np.packbits(y).tobytes() if y.max() == 1 else y.tobytes()
    packed = {"zlib -9": zlib.compress(content, 9), "bz2": bz2.compress(content)}
    packed["xz -9e"] = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    return {name: len(code) for name, code in packed.items()}


def without_model(y, shape, folder):
    """Sizes without a model: general compressors, and contexts for binary images."""
    sizes = general(y)
    if y.max() == 1:
        path = folder / "contexts"
        found = coding.compress_contexts(y, path, shape=shape)
        assert np.array_equal(coding.decompress_contexts(path), y)
        sizes["contexts, 16 pixels"] = found.bytes - found.frame_bytes
    return sizes


def histograms(train, y, levels):
    """-ln p an image, every pixel by the histogram of its values in the training images."""
    counts = np.stack([np.bincount(column, minlength=levels) for column in train.T]) + 0.5
    log_p = np.log(counts / counts.sum(-1, keepdims=True))
    return -float(np.mean(sum(log_p[i, y[:, i]] for i in range(y.shape[1]))))


def elbo(pair, y):
    """Negative ELBO of the images; -ln p of an exact model."""
    with torch.no_grad():
        if pair.stepwise() is not None:
            return -float(pair.log_evidence(y).mean())
        parts = [evidence.elbo(pair, rows, particles=16).value for rows in y.split(500)]
        return -float(torch.cat(parts).mean())


def coded(name, pair, y, best, folder, **options):
    """A row: the code of a pair, decoded and compared."""
    path = folder / "code"
    path.unlink(missing_ok=True)
    found = coding.compress(pair, y, path, **options)
    start = time.perf_counter()
    again = coding.decompress(pair, path)
    decoding = time.perf_counter() - start
    if options.get("as_set"):
        assert sorted(map(bytes, again)) == sorted(map(bytes, y))
    else:
        assert again.dtype == y.dtype and np.array_equal(again, y)
    precision = options.get("precision")
    same = y if options.get("as_set") else y[: found.coded]  # those that the model coded
    bound = elbo(coding.quantized(pair, precision) if precision else pair, torch.from_numpy(same).float())
    row = {
        "name": name,
        "bytes": found.bytes,
        "total": found.total,
        "net": found.net,
        "elbo": bound,
        "excess": 100 * (found.net / bound - 1),
        "start": [found.starter_data, found.starter_bytes],
        "frame": found.frame_bytes,
        "initial": found.initial_bits / 8,
        "model": found.model_bytes,
        "break even": found.break_even(best / len(y)),
        "seconds": [found.seconds, decoding],
        "coder": found.coder_seconds,
    }
    print(
        f"{name:34}{found.bytes:10,}{found.total:9.2f}{found.net:9.3f}{bound:9.3f}{row['excess']:8.2f} %"
        f"{found.starter_data:6}{found.starter_bytes:7,}{row['initial']:8,.0f}{found.model_bytes:11,}"
        f"{row['break even']:14,.0f}{found.seconds:8.1f}{decoding:8.1f}{found.coder_seconds:7.1f}",
        flush=True,
    )
    return row


def table(y, shape, rows):
    """Codes without a model, then ``rows``: (name, pair, options)."""
    with tempfile.TemporaryDirectory() as name:
        sizes = without_model(y, shape, Path(name))
        for other, size in sizes.items():
            print(f"{other:34}{size:10,}{size * 8 * math.log(2) / len(y):9.2f}")
        best = min(sizes.values())
        print(
            f"\n{'':34}{'bytes':>10}{'nats':>9}{'net':>9}{'-ELBO':>9}{'over':>10}{'start':>13}{'initial':>8}"
            f"{'model':>11}{'break-even':>14}{'coded':>8}{'decoded':>8}{'coder':>7}"
        )
        found = [coded(row, pair, y, best, Path(name), **options) for row, pair, options in rows]
    return {"sizes": sizes, "rows": found}


def on_digits(options):
    digits = data.load("digits")
    train, y = (digits[k].to(torch.uint8).numpy() for k in ("train", "test"))
    print(
        f"digits, {len(y)} images of 8x8 in 17 levels; pixel histograms {histograms(train, y, 17):.2f} nats\n"
    )

    def rows():
        for name, settings, changes in MODELS:
            pyro.set_rng_seed(0)
            pair = models.build(name, digits, settings)
            fitted = {"epochs": options.epochs, "learning_rate": 2e-3, "patience": 40} | changes
            fit(pair, digits["train"], valid=digits["valid"], progress=False, **fitted)
            label = " ".join((name, str(settings.get("latent", "")), settings.get("prior", ""))).strip()
            yield label, pair, {}
            if pair.markov_links() is not None:
                yield f"{label}, all latents first", pair, {"method": "bits-back"}
            yield f"{label}, int8", pair, {"precision": "int8"}

    return table(y, (8, 8), rows())


def on_mnist(options):
    images = data.load("binarized_mnist", root=options.data_dir)
    if options.system:
        pair = static_mnist.SYSTEMS[options.system].make(images["train"])
        static_mnist.load(pair, options.run)
    else:
        pair, _, _ = models.load(options.run)
    test = images["test"].to(torch.uint8).numpy()
    y = test[np.random.default_rng(0).permutation(len(test))][: options.num_data]
    print(f"static binarized MNIST, {len(y)} test images, {options.run}\n")
    rows = [("sequence", pair, {}), ("set", pair, {"as_set": True})]
    rows += [(f"weights of {p}", pair, {"precision": p}) for p in coding.PRECISIONS]
    return table(y, (28, 28), rows)


def speeds(options):
    """Million pixels a second of the coders alone."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.3, 2, 5_000_000)
    y = (rng.random(p.shape) < p).astype(np.int64)
    images = np.repeat(y[: 784 * 5000].reshape(-1, 28, 28), 2, axis=2)

    def bernoullis():
        codec, stack = Bernoullis(1 - p, p), coding.Stack()
        yield lambda: codec.push(stack, y)
        yield lambda: codec.pop(stack)

    def contexts():
        coder, code = coding.ContextCoder(), []
        yield lambda: code.append(coder.encode(images))
        other = coding.ContextCoder()
        yield lambda: other.decode(code[0], images.shape)

    found = {}
    for name, make, pixels in (("ANS, Bernoulli", bernoullis, p.size), ("contexts", contexts, images.size)):
        best = [math.inf, math.inf]
        for _ in range(5):
            for i, run in enumerate(make()):
                start = time.process_time()
                run()
                best[i] = min(best[i], time.process_time() - start)
        found[name] = [pixels / seconds / 1e6 for seconds in best]
        print(
            f"{name:20} encoded {found[name][0]:6.1f}, decoded {found[name][1]:6.1f} million pixels a second"
        )
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="digits", choices=("digits", "mnist", "speed"))
    parser.add_argument("--run", type=Path, default=None, help="a run directory on binarized_mnist")
    parser.add_argument("--system", choices=tuple(static_mnist.SYSTEMS), help="of static_mnist.py's --run")
    parser.add_argument("--data-dir", type=Path, default=None, help="by default $PYROELBO_DATA")
    parser.add_argument("--num-data", type=int, default=10_000, help="number of test images of mnist")
    parser.add_argument("--epochs", type=int, default=200, help="of the models of digits")
    options = parser.parse_args()
    found = {"digits": on_digits, "mnist": on_mnist, "speed": speeds}[options.what](options)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""What does a family of encoders lose, and what does amortization lose on top? (Cremer, Li and Duvenaud,
2018, on static binarized MNIST)

    python -m benchmarks.encoders --train       # the generator, then each family; killed, it goes on
    python -m benchmarks.encoders --evaluate    # the table, in nats on test images; what is stored is kept
    python -m benchmarks.encoders --rates       # the ELBO of validation images by the size of the few steps

A VAE is trained once, and its generator then frozen. Each family of q(z | y) is fitted to it with the same
number of steps, on the same data. All start from the VAE's own encoder: from its hidden layers, and from its
Gaussian, around which maps begin as the identity, covariances as diagonal ones and components near one
another. ``--hidden`` makes them wider, ``--distort`` trains them on images that are distorted anew each time.
On test images drawn at random:

- ln p(y): one AIS bound for all rows, with the gap of BDMC on data that the generator simulated.
- ELBO of q*: the best member of the family for each image, free parameters from two starts; of the flow the
  weights of its maps as well.
- ELBO of q: the encoder, as it was trained, and after some steps of gradient from its output on each image
  (semi-amortized; a flow's maps stay those of the encoder).

Differences are means over images, with their paired standard errors: all rows see the same images and the
same reference, whose own error is common to all of them.
"""

import argparse
import json
import math
import os
import platform
import time
from functools import partial
from pathlib import Path

import pyro
import torch

from benchmarks.static_mnist import Distorted
from pyroelbo import data, encoders, evidence, fit, models, unamortized
from pyroelbo.results import Bound
from pyroelbo.runs import RunDirectory, copy_into

FAMILIES = {
    "diagonal": "diagonal",
    "full": "full",
    "flow": partial(encoders.FlowEncoder, layers=4, hidden=(64, 64), context=32),
    "iaf": partial(encoders.IAFEncoder, layers=2, hidden=(64,), context=32),
    "mixture": "mixture",
}
ABOUT = {
    "diagonal": "diagonal Gaussian",
    "full": "full covariance",
    "flow": "coupling spline flow, 4 maps",
    "iaf": "inverse autoregressive splines, 2 maps",
    "mixture": "4 diagonal Gaussians, equal weights",
}


def make(family, options):
    """The generator with an encoder of a family; ``generator`` is the first pair."""
    first = models.VAE((28, 28), options.latent, (options.width,) * 2)
    if family == "generator":
        return first
    hidden = (options.hidden or options.width,) * 2
    pair = models.VAE((28, 28), options.latent, hidden, encoder=FAMILIES[family])
    pair.generator = first.generator
    return pair


def train(options, splits):
    """The generator with its first encoder, then an encoder of each family on it."""
    for name in ("generator", *options.families):
        pyro.set_rng_seed(options.seed)
        pair = make(name, options)
        if name != "generator":
            load(pair.generator, options.out / "generator", "generator.")
            begin(pair, options)
        folder = options.out / name
        if (folder / "weights.safetensors").exists():
            continue
        began = time.process_time()
        share = options.distort if name != "generator" else options.distort_generator
        run = fit(
            pair,
            Distorted(splits["train"], share).batches(100) if share else splits["train"],
            valid=splits["valid"][:1000],
            epochs=options.epochs if name == "generator" else options.refit,
            batch_size=100,
            learning_rate=1e-3,
            schedule="cosine",
            freeze=() if name == "generator" else ("generator",),
            compile=not options.eager,
            seed=options.seed,
            out=folder,
            resume=(folder / "config.json").exists(),
            progress=False,
            config={"family": name},
        )
        minutes = (time.process_time() - began) / 60
        print(f"{name}: {len(run.metrics)} epochs, {minutes:.1f} minutes of processor time", flush=True)
        (folder / "minutes.json").write_text(json.dumps(minutes))


@torch.no_grad()
def begin(pair, options):
    """The first encoder's layers as parts of wider ones, whose other units have no effect yet, and its
    Gaussian as that of another family, with what else there is near zero."""
    first, own, narrow = make("generator", options), pair.encoder[-2], options.width
    load(first, options.out / "generator")
    for old, new in zip(first.encoder[:-2], pair.encoder[:-2], strict=True):
        if isinstance(old, torch.nn.Linear):
            rows, columns = old.weight.shape
            if columns == narrow:
                new.weight[:rows, columns:] = 0
            new.weight[:rows, :columns], new.bias[:rows] = old.weight, old.bias
    own.weight.mul_(0.01)
    own.bias.zero_()
    head = pair.encoder[-1]
    if hasattr(head, "components"):
        head.loc.mul_(0.1)
    size = 2 * options.latent
    times = getattr(head, "components", 1)
    own.weight[: times * size, narrow:] = 0
    own.weight[: times * size, :narrow] = first.encoder[-2].weight.repeat(times, 1)
    own.bias[: times * size] = first.encoder[-2].bias.repeat(times)


def load(module, folder, prefix=""):
    tensors, _ = RunDirectory(folder).load_weights()
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    copy_into(own, {k: tensors[prefix + k] for k in own}, str(folder))


def pairs_of(options):
    for name in ("generator", *options.families):
        pair = make(name, options)
        load(pair, options.out / name)
        yield name, pair.eval()


def refined(pair, y, options):
    """The ELBO after some steps from the encoder's output, and the seconds of processor time they took."""
    began = time.process_time()
    free, batch = unamortized(pair, y, options.steps, learning_rate=options.rate)
    seconds = time.process_time() - began
    return evidence.elbo(free, batch, options.particles).value, seconds


def drawn(images, options):
    """The same images at random for every row, by the seed."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
    return images[order[: options.images]]


def kept(file, make):
    """What was stored, or what ``make`` gives, stored."""
    if not file.exists():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def reference(pair, y, options):
    """AIS of the images, and the gap of BDMC on simulated ones."""
    size = {"temperatures": options.temperatures, "particles": options.chains, "progress": False}
    pyro.set_rng_seed(options.seed)
    found = evidence.ais(pair, y, **size)
    sandwich = evidence.bdmc(pair, options.simulated, **size)
    gap = [float(sandwich.mean_gap), sandwich.mean_gap_error, options.simulated]
    return {"ais": found.to_dict(), "bdmc": gap}


def row(pair, y, options):
    """Bounds of each image under one family; the table subtracts them from its own reference."""
    pyro.set_rng_seed(options.seed)
    began = time.process_time()
    own, told = evidence.iwae(pair, y, options.particles), {}
    bounds = {"iw": own.value}
    if options.climb:
        size = {"steps": options.climb, "learning_rate": 0.03}
        found = evidence.gap(pair, y, options.particles, reference=own, **size)
        bounds |= {"best": found.local.value, "encoder": found.amortized.value}
        told = {"notes": found.local.notes, "seconds of the gap": time.process_time() - began}
    else:
        bounds["encoder"] = evidence.elbo(pair, y, options.particles).value
    bounds["refined"], told["seconds of steps"] = refined(pair, y, options)
    return {"bounds": {k: v.tolist() for k, v in bounds.items()}, "told": told}


def evaluate(options, splits):
    y = drawn(splits["test"], options)
    pairs = dict(pairs_of(options))
    frozen = dict(pairs["generator"].generator.named_parameters())
    for name, pair in pairs.items():
        for key, value in pair.generator.named_parameters():
            assert torch.equal(value, frozen[key]), f"the generator of {name} is another: {key}"
    o, same = options, f"{options.images}-{options.seed}"
    rows = {}
    for name in options.families:
        file = o.out / name / f"bounds-{same}-{o.climb}-{o.particles}-{o.steps}-{o.rate}.json"
        found = kept(file, lambda name=name: row(pairs[name], y, options))
        bounds = {k: torch.tensor(v, dtype=torch.float64) for k, v in found["bounds"].items()}
        rows[name] = bounds, found["told"]
    file = o.out / f"reference-{same}-{o.temperatures}-{o.chains}-{o.simulated}.json"
    stored = kept(file, lambda: reference(pairs["generator"], y, options))
    report(
        options,
        Bound.from_dict(stored["ais"]).value,
        {k: bounds for k, (bounds, _) in rows.items()},
        {k: told for k, (_, told) in rows.items()},
        stored["bdmc"],
    )


def mean(x):
    """Mean over images and its standard error."""
    return float(x.mean()), float(x.std() / math.sqrt(len(x)))


def show(x):
    return "{:.2f} ± {:.2f}".format(*mean(x))


def rates(options, splits):
    """What so many steps of several sizes give on validation images."""
    y = drawn(splits["valid"], options)
    for name, pair in pairs_of(options):
        if name == "generator":
            continue
        before = evidence.elbo(pair, y, options.particles)
        cells = []
        for rate in (0.02, 0.05, 0.1, 0.2):
            pyro.set_rng_seed(options.seed)
            free, batch = unamortized(pair, y, options.steps, learning_rate=rate)
            cells.append(f"{rate}: {evidence.elbo(free, batch, options.particles).mean - before.mean:+.3f}")
        print(f"{name}: ELBO {before.mean:.2f}, {options.steps} steps of {', '.join(cells)}", flush=True)


def report(options, log_p, rows, told, bdmc):
    head = [ABOUT[name] for name in rows]
    lines, whole = {"ln p(y), AIS": [log_p] * len(rows)}, options.climb > 0
    if whole:
        lines["ELBO of q*, free for each image"] = [r["best"] for r in rows.values()]
    lines[f"ELBO of q, {options.steps} steps from the encoder"] = [r["refined"] for r in rows.values()]
    lines["ELBO of q, the encoder"] = [r["encoder"] for r in rows.values()]
    if whole:
        lines["approximation gap"] = [log_p - r["best"] for r in rows.values()]
        lines["amortization gap"] = [r["best"] - r["encoder"] for r in rows.values()]
        lines[f"the same after {options.steps} steps"] = [r["best"] - r["refined"] for r in rows.values()]
    lines["inference gap"] = [log_p - r["encoder"] for r in rows.values()]
    print(f"\nnats per image, {len(log_p)} test images, means ± standard errors over images")
    print("| | " + " | ".join(head) + " |\n|" + "---|" * (1 + len(head)))
    for name, cells in lines.items():
        print(f"| {name} | " + " | ".join(map(show, cells)) + " |")
    print(f"BDMC gap on {bdmc[2]} simulated images: {bdmc[0]:.3f} ± {bdmc[1]:.3f}")
    names, differences = list(rows), {}
    for a, b in ((a, b) for i, a in enumerate(names) for b in names[i + 1 :]):
        if whole:
            differences[f"approximation, {a} - {b}"] = mean(rows[b]["best"] - rows[a]["best"])
        differences[f"encoder, {b} - {a}"] = mean(rows[b]["encoder"] - rows[a]["encoder"])
    for name, r in rows.items():
        differences[f"{options.steps} steps, {name}"] = mean(r["refined"] - r["encoder"])
    for name, (value, error) in differences.items():
        print(f"{name}: {value:+.3f} ± {error:.3f} nats")
    closed = {}
    first = float((log_p - rows[names[0]]["encoder"]).mean())
    for name in names[1:]:
        closed[name] = float((rows[name]["encoder"] - rows[names[0]]["encoder"]).mean()) / first
        print(f"the {name} encoder closes {closed[name]:.0%} of the {names[0]} one's inference gap")
    record = {
        "benchmark": "encoders",
        "settings": {k: str(v) for k, v in vars(options).items()},
        "table": {name: dict(zip(names, map(mean, cells), strict=True)) for name, cells in lines.items()},
        "differences": differences,
        "closed": closed,
        "bdmc": bdmc,
        "told": told,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    (options.out / "evaluation.json").write_text(json.dumps(record) + "\n")
    print(json.dumps(record))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PYROELBO_DATA"))
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--width", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=60, help="of the generator and its first encoder")
    parser.add_argument("--refit", type=int, default=10, help="epochs of each family")
    parser.add_argument("--hidden", type=int, default=0, help="width of the families' layers; 0: the first's")
    parser.add_argument(
        "--distort", type=float, default=0.0, help="share of a refit's images under a random affine map"
    )
    parser.add_argument(
        "--distort-generator", type=float, default=0.0, help="share that is distorted for the generator"
    )
    parser.add_argument("--eager", action="store_true", help="train without compiling")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--simulated", type=int, default=50, help="data of BDMC")
    parser.add_argument("--temperatures", type=int, default=300)
    parser.add_argument("--chains", type=int, default=10)
    parser.add_argument(
        "--climb", type=int, default=400, help="steps towards the best member of a family; 0: no such rows"
    )
    parser.add_argument("--particles", type=int, default=1000, help="draws per ELBO")
    parser.add_argument("--steps", type=int, default=20, help="steps of the semi-amortized rows")
    parser.add_argument("--rate", type=float, default=0.1, help="step size of the semi-amortized rows")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not (options.train or options.rates or options.evaluate):
        return
    splits = data.load("binarized_mnist", "binary", root=options.data_dir).splits
    options.out.mkdir(parents=True, exist_ok=True)
    for wanted, run in ((options.train, train), (options.rates, rates), (options.evaluate, evaluate)):
        if wanted:
            run(options, splits)


if __name__ == "__main__":
    main()

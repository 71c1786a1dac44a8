"""What do latent-variable models reach on static binarized MNIST (50,000 / 10,000 / 10,000), in nats on the
test split?

    python -m benchmarks.static_mnist vamp --train                  # hours; killed, it goes on where it was
    python -m benchmarks.static_mnist vamp --evaluate               # the run so far, 500 random test images
    python -m benchmarks.static_mnist vamp --evaluate --num-data 0  # on all 10,000; blocks are kept on disk
    python -m benchmarks.static_mnist vamp --curve                  # nats against epochs and processor time
    python -m benchmarks.static_mnist --table

A system is one row of SYSTEMS: how to build its pair, and the settings of `fit` that differ from DEFAULTS.
Training stops early on the ELBO of some validation images, keeps a moving average of the weights, and can be
stopped at any time by Ctrl-C. Evaluation draws its test images at random by seed (the split is sorted by
class) and prints negative mean bounds: the ELBO, IW-K, AIS (all in expectation at least -ln p, so lower is
better), and the gap that BDMC leaves open on data that the model simulated. Of an autoregressive model the
exact -ln p is printed instead, of all test images. Standard errors are those of a mean over data; --seed
seeds images and draws.

IW-K of all images is estimated by the ELBO of all plus what IW-K of the drawn ones wins over the mean of the
same K terms. Its error is that of this estimate: of the drawn images' mean, and of the draws of all images'
ELBO.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyro
import torch

from pyroelbo import ExactPair, Pair, data, evidence, fit, models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.nn.causal import PixelCNN
from pyroelbo.numerics import log_mean_exp
from pyroelbo.runs import RunDirectory, copy_into, group


@dataclass(frozen=True)
class System:
    about: str
    make: Callable[[torch.Tensor], Pair]
    fit: dict = field(default_factory=dict)
    samples: int = 5000  # K of IW-K
    data: str = "binarized_mnist"
    draws: int = 16  # of the ELBO


def started(model, shape, **settings):
    return lambda train: model(shape, **settings).initialize(train)


def gated_vae(**settings):
    shape = {"latent": 40, "hidden": (300, 300), "network": "gated"}
    return started(models.VAE, (28, 28), **shape, **settings)


def ladder(**settings):
    shape = {"latent": (40, 40), "hidden": (300, 300), "network": "gated", "norm": "none", "prior": "vamp"}
    return started(models.Ladder, (28, 28), components=250, **shape | settings)


# The ladder learns its training images by heart within 65 epochs (83 nats beside 90 of validation), which
# distorted images prevent; the importance-weighted bound is for its last phases:
#     P="python -m benchmarks.static_mnist --num-valid 2000 --train" R=runs/static_mnist
#     $P ladder
#     $P ladder-distorted --start $R/ladder
#     $P ladder-iwae --start $R/ladder-distorted
#     $P ladder-distorted --name ladder-again --start $R/ladder-iwae --fit '{"epochs": 27}'
#     $P ladder-last --start $R/ladder-again
LADDER = {
    "epochs": 71,
    "objective": "layered",
    "batch_size": 250,
    "learning_rate": 1e-3,
    "ema": 0.9995,
    "warmup": 15,
    "bf16": True,
}


# K grows by phases, each from the weights of the one before; DReG-50 starts where IWAE-50 does and sees the
# same batches. From K = 5 on three of five images are distorted, or they are learned by heart:
#     $P vae; $P iwae-5 --start $R/vae; $P iwae-50 --start $R/iwae-5; $P dreg-50 --start $R/iwae-5
def iwae(epochs, rate, tail, objective, particles):
    return System(
        f"VAE 784-300-300-40, gated, {objective}-{particles}, distorted",
        gated_vae(),
        {
            "batch_size": 100,
            "epochs": epochs,
            "learning_rate": rate,
            "warmup": 1,
            "tail": tail,
            "distort": 0.6,
            "objective": objective,
            "particles": particles,
        },
    )


HALF = torch.cpu._is_avx512_bf16_supported()  # elsewhere products of bfloat16 are fifty times slower


class HalfPixelCNN(PixelCNN):
    """In training bfloat16 convolutions (twice as fast where the processor has them), float32 weights; else
    float32.
    """

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.training and HALF):
            logits = super().forward(tokens)
        return logits.float()


def pixelcnn(train):
    return models.Autoregressive((28, 28), network=HalfPixelCNN(2, (28, 28), channels=32, layers=5))


# VampPrior-500 begins with a hundred pseudo-inputs, whose pass through the encoder would else cost more than
# the data's:
#     python -m benchmarks.static_mnist vamp-100 --train
#     python -m benchmarks.static_mnist vamp --train --start runs/static_mnist/vamp-100
SYSTEMS = {
    "vae": System(
        "VAE 784-300-300-40, gated, N(0, I)",
        gated_vae(),
        {"batch_size": 100, "epochs": 80, "learning_rate": 1e-3, "warmup": 20, "tail": (40, 40)},
    ),
    "iwae-5": iwae(23, 1e-3, None, "iwae", 5),
    "iwae-50": iwae(3, 5e-4, (0, 3), "iwae", 50),
    "dreg-50": iwae(3, 5e-4, (0, 3), "dreg", 50),
    "vamp-100": System(
        "the same, VampPrior-100", gated_vae(prior="vamp", components=100), {"batch_size": 100}
    ),
    "vamp": System("the same, VampPrior-500", gated_vae(prior="vamp", components=500), {"batch_size": 250}),
    "ladder": System("ladder 40-40, gated 784-300-300, VampPrior-250", ladder(), LADDER, samples=1000),
    "ladder-distorted": System(
        "the same, then on distorted images",
        ladder(),
        LADDER | {"epochs": 47, "warmup": 1, "distort": 0.75},
        samples=1000,
    ),
    "ladder-iwae": System(
        "the same, then by IW-5",
        ladder(),
        LADDER | {"epochs": 19, "warmup": 1, "distort": 0.6, "objective": "iwae", "particles": 5},
        samples=1000,
    ),
    "ladder-last": System(
        "ladder 40-40, gated 784-300-300, VampPrior-250, all five phases",
        ladder(),
        LADDER
        | {
            "epochs": 18,
            "warmup": 1,
            "distort": 0.6,
            "objective": "iwae",
            "particles": 5,
            "learning_rate": 3e-4,
            "ema": 0.999,
            "tail": (0, 18),
        },
        samples=1000,
    ),
    "conv_ladder": System(
        "convolutional ladder, 2+2+2 groups of 2 maps, 24 channels",
        lambda train: models.ConvLadder((28, 28), (2, 2, 2), 2, 24),
        {
            "objective": "layered",
            "batch_size": 64,
            "learning_rate": 2e-3,
            "clip_norm": 200.0,
            "skip_norm": 1e4,
            "warmup": 1,
            "compile": False,
        },
        samples=1000,
        draws=2,
    ),
    "autoregressive": System(
        "gated PixelCNN, 5 layers of 32 channels, windows of 5",
        pixelcnn,
        {
            "objective": "evidence",
            "batch_size": 64,
            "learning_rate": 3e-3,
            "clip_norm": 50.0,
            "ema": 0.998,
            "compile": False,
        },
    ),
    # IW-K averages K orders of 784 steps, of some 25 µs each: --evaluate --num-data 100 --num-ais 0
    "masked": System(
        "masked diffusion, MLP of 2 residual layers of 512",
        lambda train: models.MaskedDiffusion((28, 28), width=512, layers=2),
        {
            "epochs": 60,
            "batch_size": 256,
            "learning_rate": 2.5e-3,
            "clip_norm": 50.0,
            "warmup": 1,
            "tail": (0, 60),
            "bf16": True,
            "compile": False,
        },
        samples=128,
    ),
}
DEFAULTS = {
    "epochs": 2000,
    "learning_rate": 7e-4,
    "ema": 0.999,
    "patience": 50,
    "compile": True,
    "warmup": 30,
    "decay": math.inf,
}


class Distorted(torch.utils.data.Dataset):
    """Training images, a ``share`` of them under a small random affine map (rotation, shear, scale, shift):
    every pixel is that of the nearest place, so that images stay binary. An index is a list of rows, and
    gives a batch.
    """

    def __init__(self, images, share):
        self.images, self.share = images, float(share)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        y = self.images[rows]
        angle, shear, wide, high, right, down = (2 * torch.rand(6, len(y)) - 1) * torch.tensor(
            [[0.15], [0.1], [0.06], [0.06], [0.06], [0.06]]
        )
        cos, sin = angle.cos(), angle.sin()
        maps = torch.stack(
            [
                torch.stack([(1 + wide) * cos, shear - sin, right], -1),
                torch.stack([sin, (1 + high) * cos, down], -1),
            ],
            1,
        )
        maps[torch.rand(len(y)) >= self.share] = torch.eye(2, 3)
        grid = torch.nn.functional.affine_grid(maps, (len(y), 1, 28, 28), align_corners=False)
        image = y.view(-1, 1, 28, 28)
        moved = torch.nn.functional.grid_sample(image, grid, "nearest", align_corners=False)
        return moved.reshape(-1, 784)

    def batches(self, size):
        rows = torch.utils.data.BatchSampler(torch.utils.data.RandomSampler(self), size, drop_last=False)
        return torch.utils.data.DataLoader(self, sampler=rows, batch_size=None)


def schedules(settings):
    """The KL's weight and the factor on the learning rate, functions of the epoch: a linear warm-up, and a
    halving every ``decay`` epochs, or with ``tail`` = (start, length) a cosine to zero that begins at epoch
    start.
    """
    warmup, decay, tail = settings.pop("warmup"), settings.pop("decay"), settings.pop("tail", None)

    def factor(epoch):
        if tail is None or epoch < tail[0]:
            return 0.5 ** (epoch / decay)
        return max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - tail[0]) / tail[1]))))

    return (lambda epoch: min(1.0, (epoch + 1) / warmup)), factor


def subset(images, count, seed):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return order if count == 0 else order[:count]


def train(options, system, images, folder):
    settings = DEFAULTS | system.fit | json.loads(options.fit)
    kl_weight, schedule = schedules(settings)
    pyro.set_rng_seed(options.seed)
    pair = system.make(images["train"])
    exact = settings.get("objective") == "evidence"
    resume = (folder / "config.json").exists()
    if options.start and not resume:
        load(pair, options.start)
    share = settings.pop("distort", 0.0)
    given = Distorted(images["train"], share).batches(settings["batch_size"]) if share else images["train"]
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.pop("bf16", False) and HALF):
        run = fit(
            pair,
            given,
            valid=images["valid"][subset(images["valid"], options.num_valid, 0)],
            kl_weight=1.0 if exact else kl_weight,
            schedule=schedule,
            seed=options.seed,
            out=folder,
            resume=resume,
            checkpoint_seconds=60.0,
            config={"system": options.system, "settings": options.fit, "start": str(options.start)},
            progress=False,
            callbacks=[Minutes(folder / "curve.jsonl")],
            **settings,
        )
    print(f"{options.system}: stopped by {run.stopped} after {len(run.metrics)} epochs")


class Minutes:
    """Prints each epoch's row of metrics, and notes it with the minutes of processor time so far, those of
    the epochs noted before a resumption included.
    """

    def __init__(self, file):
        self.file = file
        self.before = json.loads(file.read_text().splitlines()[-1])["minutes"] if file.exists() else 0.0

    def __call__(self, row):
        row = row | {"minutes": round(self.before + time.process_time() / 60, 2)}
        with open(self.file, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(time.strftime("%H:%M:%S"), json.dumps(row), flush=True)


def curve(folder):
    """The validation bound (or exact nats) of the moving average after each epoch."""
    print(
        "| epoch | steps | minutes of processor time | training loss | validation, nats "
        "|\n|---|---|---|---|---|"
    )
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    for r in {r["epoch"]: r for r in rows}.values():  # an epoch that a kill undid was noted twice
        valid = -next(v for k, v in r.items() if k.startswith("valid_"))
        print(f"| {r['epoch']} | {r['step']:,} | {r['minutes']:.1f} | {r['loss']:.2f} | {valid:.2f} |")


def load(pair, folder):
    """The weights to keep of a run, into ``pair``: those of a finished one, else the best validated so far.
    Returns the run's number of epochs.
    """
    run = RunDirectory(folder)
    tensors, _ = run.load_weights()
    if not (folder / "weights.safetensors").exists():
        checkpoint, _ = run.load_checkpoint()
        tensors = tensors | group(group(checkpoint, "step/loss/"), "ema.") | group(checkpoint, "best/")
    own = {**dict(pair.named_parameters()), **dict(pair.named_buffers())}
    inputs, size = tensors.get("prior.pseudo_inputs"), len(own.get("prior.pseudo_inputs", ()))
    if inputs is not None and len(inputs) != size:
        # Another number of them: all in turn, told apart by a little noise. (Fresh training images in their
        # place cost 1.5 nats of the validation bound at first, of which 6 epochs won back 0.2.)
        inputs = inputs[torch.arange(size) % len(inputs)]
        tensors["prior.pseudo_inputs"] = inputs + 0.1 * torch.randn_like(inputs)
    copy_into(own, tensors, str(folder))
    pair.eval()
    return len(run.metrics())


def in_blocks(name, pair, y, which, rows, bound, record):
    """The two numbers that ``bound`` gives of each image [2, N], of images by index, each block appended to
    ``record``; what is there already is not done again.
    """
    done = {}
    if record.exists():
        done = {int(i): v for line in record.read_text().splitlines() for i, v in json.loads(line).items()}
    todo = [int(i) for i in which if int(i) not in done]
    for start in range(0, len(todo), rows):
        index = todo[start : start + rows]
        pyro.set_rng_seed(index[0])
        found = torch.stack(bound(pair, y[index]), 1).tolist()
        done |= dict(zip(index, found, strict=True))
        with open(record, "a") as file:
            file.write(json.dumps(dict(zip(index, found, strict=True))) + "\n")
        mean = sum(value for value, _ in done.values()) / len(done)
        print(f"{name}: {start + len(index)} of {len(todo)}, so far {-mean:.3f}", flush=True)
    return torch.tensor([done[int(i)] for i in which], dtype=torch.float64).T


def with_error(estimator, *arguments, **settings):
    """A bound's value and standard error of each image."""

    def both(pair, y):
        found = estimator(pair, y, *arguments, **settings)
        return found.value, found.stderr

    return both


def weighted(K):
    """IW-K of each image, and the mean of the K terms that it is made of."""

    @torch.no_grad()
    def both(pair, y):
        log_weight = Evaluator(pair.written_out(), y).sample(K, latents=False).log_weight.double()
        return log_mean_exp(log_weight)[0], log_weight.mean(0)

    return both


def summary(value):
    error = float(value.std() / math.sqrt(len(value))) if len(value) > 1 else math.nan
    return {"value": round(-float(value.mean()), 4), "error": round(error, 4), "data": len(value)}


def evaluate(options, system, images, folder):
    pair = system.make(images["train"])
    epoch = load(pair, folder)
    torch.manual_seed(options.seed)
    K, T = options.samples or system.samples, options.temperatures
    test = images["test"]
    which = subset(test, options.num_data, options.seed)
    # A record holds what one state of the weights gave.
    state = sum(float(p.detach().double().abs().sum()) for p in pair.parameters())
    stem = folder / f"{state:.6f}"
    result = {
        "system": options.system,
        "about": system.about,
        "epoch": epoch,
        "seed": options.seed,
        "K": K,
        "temperatures": T,
        "parameters": sum(p.numel() for p in pair.parameters()),
    }

    def run(name, index, rows, bound):
        record = stem.with_name(f"{stem.name}-{name}.pairs.jsonl")
        return in_blocks(name, pair, test, index, rows, bound, record)

    if isinstance(pair, ExactPair):
        result["exact"] = summary(run("exact", range(len(test)), 500, with_error(evidence.exact))[0])
        write(result, images, folder)
        return
    draws = system.draws
    elbo, error = run(f"elbo-{draws}", range(len(test)), 500, with_error(evidence.elbo, draws))
    iw, terms = run(f"iw-{K}", which, 20, weighted(K))
    result["elbo"], result["iw"] = summary(elbo), summary(iw)
    won = result["won"] = summary(terms - iw)
    noise = float(error.square().sum().sqrt()) / len(elbo)
    result["iw of all"] = {
        "value": round(result["elbo"]["value"] - won["value"], 4),
        "error": round(math.hypot(won["error"], noise), 4),
        "data": len(iw),
    }
    if options.num_ais:
        few = which[: options.num_ais]
        annealed = with_error(evidence.ais, T, particles=options.chains, progress=False)
        ais, _ = run(f"ais-{T}", few, 100, annealed)
        result["ais"], result["iw beside ais"] = summary(ais), summary(iw[: len(few)])
        sandwich = evidence.bdmc(pair, options.num_ais, T, particles=options.chains, progress=False)
        result["bdmc gap"] = {
            "value": round(float(sandwich.mean_gap), 4),
            "error": round(sandwich.mean_gap_error, 4),
        }
    write(result, images, folder)


def write(result, images, folder):
    """The result with its unit: bits a pixel = nats / (pixels · ln 2), for grey levels."""
    best = result["exact"] if "exact" in result else result["iw of all"]
    if images["levels"] > 2:
        result["bits/dim"] = round(best["value"] / (images["test"].shape[1] * math.log(2)), 4)
    result |= {"torch": torch.__version__, "machine": platform.machine()}
    (folder / "evaluation.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def table(folder):
    print(
        "| system | epochs | -ELBO, all images | -IW-K, drawn images | -IW-K, all by difference, or exact | "
        "-AIS (-IW-K) "
        "| BDMC gap | bits/dim |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for file in sorted(folder.glob("*/evaluation.json")):
        r = json.loads(file.read_text())

        def show(name, r=r):
            return f"{r[name]['value']:.2f} ± {r[name]['error']:.2f}" if name in r else ""

        drawn = f"{show('iw')} ({r['iw']['data']}, K={r['K']})" if "iw" in r else ""
        ais = f"{show('ais')} ({show('iw beside ais')}; {r['ais']['data']})" if "ais" in r else ""
        of_all = f"{show('exact')} exact" if "exact" in r else show("iw of all")
        cells = (
            r["about"],
            r["epoch"],
            show("elbo"),
            drawn,
            of_all,
            ais,
            show("bdmc gap"),
            r.get("bits/dim", ""),
        )
        print("| " + " | ".join(map(str, cells)) + " |")


def load_images(name, root):
    """Splits of a data set by name, and its number of ``levels``. Omniglot's grey levels are drawn as coin
    flips once, by seed 0, as static MNIST's were.
    """
    kind = {"omniglot": "grey", "freyfaces": "bytes"}.get(name, "binary")
    images = data.load(name, kind, root=root)
    splits = images.splits
    if kind == "grey":
        generator = torch.Generator().manual_seed(0)
        splits = {split: data.binarize(x, generator) for split, x in splits.items()}
    return splits | {"levels": images.levels or 2}


def main(systems=SYSTEMS, out="runs/static_mnist", description=__doc__):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", nargs="?", choices=tuple(systems))
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PYROELBO_DATA"))
    parser.add_argument(
        "--fit", default="{}", help='settings that replace the system\'s, as JSON: {"batch_size": 100}'
    )
    parser.add_argument(
        "--start", type=Path, default=None, help="another run of the same system whose weights to start from"
    )
    parser.add_argument("--num-valid", type=int, default=5000, help="validation images for early stopping")
    parser.add_argument("--num-data", type=int, default=500, help="test images; 0 for all")
    parser.add_argument(
        "--num-ais", type=int, default=100, help="of these, and simulated, for AIS and BDMC; 0 for none"
    )
    parser.add_argument("--samples", type=int, default=None, help="K of IW-K, if not the system's own")
    parser.add_argument("--temperatures", type=int, default=200)
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=None, help="folder of the run, if not the system's name")
    options = parser.parse_args()
    if options.system:
        system, folder = systems[options.system], options.out / (options.name or options.system)
        if options.train or options.evaluate:
            images = load_images(system.data, options.data_dir)
        if options.train:
            train(options, system, images, folder)
        if options.evaluate:
            evaluate(options, system, images, folder)
        if options.curve:
            curve(folder)
    if options.table:
        table(options.out)


if __name__ == "__main__":
    main()

"""Which estimator of a discrete guide's gradient trains furthest in so many steps?

A discrete VAE of 200 binary latents, ``linear`` (one matrix each way) or ``nonlinear`` (two hidden layers of
200 each way), on MNIST binarized anew at each step (the digits' first 50,000 images, batches of 100, Adam at
1e-4, K = 2 draws). Estimators are paired: the same initial weights, the same images with the same bits at
each step. The curve is minus the training loss, which is the ELBO of the bits just drawn, nats an image, mean
over the last tenth of the steps so far; beside it, at the end, the ELBO of the static binarized test split.

    python -m benchmarks.discrete_training [--steps 100000] [--estimators rloo disarm] [--nets linear]

Stopped, it goes on from its checkpoints under --out (minutes apart), from other random draws.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import pyro
import torch
from torch import nn

from pyroelbo import data, evidence, files, models
from pyroelbo.compiled import CompiledStep
from pyroelbo.objectives import Discrete_ELBO

BATCH = 100
NETS = {"linear": (), "nonlinear": (200, 200)}
ESTIMATORS = ("baseline", "rloo", "double_cv", "disarm")
MARKS = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)


class Net(models.DiscreteVAE):
    """With the learned baseline that ``baseline`` asks for: a network of the image."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__((28, 28), (200,), hidden)
        self.of_image = nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 1))

    def baseline(self, y: torch.Tensor) -> torch.Tensor:
        return self.of_image(y).squeeze(-1)


def train(net: str, estimator: str, images: torch.Tensor, options: argparse.Namespace) -> tuple[dict, Net]:
    """The curve {steps: ELBO}, and the pair."""
    torch.manual_seed(options.seed)
    pair = Net(NETS[net])
    parameters = dict(pair.named_parameters())
    if estimator != "baseline":
        parameters = {k: v for k, v in parameters.items() if not k.startswith("of_image")}
    step = CompiledStep(
        Discrete_ELBO(estimator, num_particles=2), pair.model, pair.guide, parameters, lr=1e-4
    )
    file = options.out / f"{net}-{estimator}-{options.seed}.safetensors"
    first, losses, seconds = 0, [], 0.0
    if file.exists():
        tensors, meta = files.read_tensors(file)
        pair.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
        step.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("s.")})
        losses, first, seconds = [tensors["losses"]], len(tensors["losses"]), meta["seconds"]

    def save() -> None:
        tensors = {"w." + k: v.detach().clone() for k, v in pair.state_dict().items()}
        tensors |= {"s." + k: v.clone() for k, v in step.state_dict().items()}
        files.write_tensors(file, tensors | {"losses": torch.cat(losses)}, {"seconds": seconds})

    seen, began = [], time.process_time()
    for i in range(first, options.steps):
        generator = torch.Generator().manual_seed(options.seed * 10_000_019 + i)
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        y = torch.bernoulli(images[rows], generator=generator)
        seen.append(step(y).detach() / BATCH)
        if i + 1 == options.steps or len(seen) == 5_000:
            losses.append(torch.stack(seen))
            seconds, began = seconds + time.process_time() - began, time.process_time()
            seen = []
            save()
            print(f"{net} {estimator}: {i + 1} steps, {-float(losses[-1].mean()):.2f}", flush=True)
    whole = torch.cat(losses).double()
    if not bool(whole.isfinite().all()):
        raise RuntimeError(f"{net} {estimator}: the loss was not finite")
    marks = [m for m in MARKS if m < len(whole)] + [len(whole)]
    counters = step.counters
    return {
        "curve": {m: round(-float(whole[m - math.ceil(m / 10) : m].mean()), 2) for m in marks},
        "milliseconds": round(seconds / max(1, len(whole)) * 1e3, 2),
        "compiled": counters.compiled_calls > 0 and not counters.fallbacks,
    }, pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=NETS)
    parser.add_argument("--estimators", nargs="*", default=list(ESTIMATORS))
    parser.add_argument("--num-test", type=int, default=1000, help="static test images at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", help="folder of benchmark files")
    parser.add_argument("--out", type=Path, default=Path("runs/discrete_training"), help="checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.enable_validation(False)
    options.out.mkdir(parents=True, exist_ok=True)
    images = data.load("mnist", root=options.data_dir)["train"][:50_000] / 255
    static = data.load("binarized_mnist", root=options.data_dir)["test"]
    order = torch.randperm(len(static), generator=torch.Generator().manual_seed(options.seed))
    static = static[order[: options.num_test]]
    for net in options.nets:
        for estimator in options.estimators:
            found, pair = train(net, estimator, images, options)
            torch.manual_seed(options.seed)
            elbo = evidence.elbo(pair, static, particles=16)
            row = {
                "benchmark": "discrete_training",
                "net": net,
                "estimator": estimator,
                **found,
                "static_test_elbo": round(float(elbo.value.mean()), 2),
                "stderr": round(float(elbo.value.std()) / math.sqrt(len(static)), 2),
                "torch": torch.__version__,
                "cores": os.cpu_count(),
            }
            curve = "".join(f"{m:>9}: {v:8.2f}" for m, v in found["curve"].items())
            print(f"{net:<10}{estimator:<10}{curve}  static test {row['static_test_elbo']} ± {row['stderr']}")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

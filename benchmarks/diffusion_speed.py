"""Is a training step of diffusion slower than denoising-diffusion-pytorch's, with its own UNet?

Both train the package's ``Unet`` on the same batches of 28x28 images, eps predicted, T steps, Adam: theirs
`GaussianDiffusion` with the mean squared error and torch's Adam; ours `Diffusion(loss="simple",
variance="beta")`, a step of `fit` without its bookkeeping, and the same compiled. Each round times some steps
of every row in turn; the table shows medians over rounds of processor milliseconds a step (one thread), which
other processes on the machine disturb less than the clock.

    python -m benchmarks.diffusion_speed --rounds 7 --compile
"""

import argparse
import json
import platform
import statistics
import sys
import time
import types

import pyro
import torch
from pyro.infer import Trace_ELBO

from pyroelbo import models
from pyroelbo.compiled import CompiledStep
from pyroelbo.pair import unregistered
from pyroelbo.training.step import EagerStep

SHAPE, STEPS = (28, 28), 1000


def peer():
    """The package; what only its trainer needs is left out where it is not installed."""
    for name, parts in (
        ("torchvision", ("transforms", "utils")),
        ("ema_pytorch", ("EMA",)),
        ("accelerate", ("Accelerator", "DistributedDataParallelKwargs")),
    ):
        if name not in sys.modules:
            try:
                __import__(name)
            except ImportError:
                empty = types.ModuleType(name)
                for part in parts:
                    setattr(empty, part, None)
                sys.modules[name] = empty
    import denoising_diffusion_pytorch.denoising_diffusion_pytorch as found

    return found


class Theirs(torch.nn.Module):
    """Their network as ours: flat images and times in [0, 1]."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z, time):
        image = z.reshape(-1, 1, *SHAPE)
        return self.network(image, time.expand(z.shape[:-1]) * STEPS - 1).flatten(1).unsqueeze(-1)


def rows(package, width, compiled):
    def network():
        torch.manual_seed(0)
        return package.Unet(dim=width, dim_mults=(1, 2, 4), channels=1, flash_attn=False)

    def their_step():
        diffusion = package.GaussianDiffusion(
            network(), image_size=SHAPE, timesteps=STEPS, objective="pred_noise", beta_schedule="cosine"
        )
        optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4)

        def step(y):
            loss = diffusion(y.view(-1, 1, *SHAPE))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return step

    def our_step(kind, **settings):
        pair = models.Diffusion(SHAPE, STEPS, None, "cosine", "eps", "beta", Theirs(network()), loss="simple")
        made = kind(Trace_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), **settings)

        def step(y):
            with unregistered():
                return made(y)

        return step

    made = {"denoising-diffusion-pytorch": their_step(), "Diffusion": our_step(EagerStep)}
    if compiled:
        made["Diffusion, compiled"] = our_step(CompiledStep)
    return made


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=16, help="dim of the UNet")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = rows(peer(), options.width, options.compile)
    y = torch.rand(options.batch, SHAPE[0] * SHAPE[1])
    times = {name: [] for name in made}

    with pyro.validation_enabled(False):
        for step in made.values():
            step(y)
            step(y)
        for _ in range(options.rounds):
            for name, step in made.items():
                began = time.process_time()
                for _ in range(options.steps):
                    step(y)
                times[name].append(1e3 * (time.process_time() - began) / options.steps)
    medians = {name: statistics.median(t) for name, t in times.items()}
    base = medians["denoising-diffusion-pytorch"]
    print("| row | ms of processor time a step | share of theirs |\n|---|---|---|")
    for name, value in medians.items():
        print(f"| {name} | {value:.1f} | {value / base:.2f} |")
    print(
        json.dumps(
            {
                "benchmark": "diffusion_speed",
                "batch": options.batch,
                "width": options.width,
                "torch": torch.__version__,
                "machine": platform.machine(),
                "ms": medians,
                "all": times,
            }
        )
    )


if __name__ == "__main__":
    main()

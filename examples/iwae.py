"""Why more particles need another gradient: three gradients of the importance-weighted bound's encoder.

    IW-K = E ln (1/K) Σ_k w_k,    w_k = p(y, z_k) / q(z_k | y)

rises towards ln p(y) with K, so the generator learns from a tighter bound. The encoder's gradient suffers: as
K grows its mean falls like 1/K and its standard deviation only like 1/√K, so that their ratio, the signal to
noise, falls like 1/√K (Rainforth et al., 2018). Three gradients of the same loss:

    plain   the loss differentiated as it stands
    stl     the encoder's parameters held fixed inside ln q: no noise where q is the posterior, but biased for
            K > 1 (Roeder, Wu and Duvenaud, 2017)
    dreg    doubly reparametrized: unbiased, and its signal to noise does not fall (Tucker et al., 2019)

Both statements are about large K; for small K the ratio of plain can rise first, as draws are averaged.

The example trains a VAE by the ELBO for a while and measures the three on one batch; from there it goes on by
the ELBO of 32 draws and by IW-32 with each of them, and audits the results.

    python examples/iwae.py --num-epochs 60 --draws 400
"""

import argparse
import copy
import math
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models
from pyroelbo.objectives import IWAE_ELBO
from pyroelbo.runs import fresh

GRADIENTS = ("plain", "stl", "dreg")


def signal_to_noise(pair, y, particles, gradient, draws):
    """|mean| / standard deviation of the gradient of each of the encoder's parameters, their mean."""
    objective = IWAE_ELBO(particles, gradient=gradient, max_plate_nesting=1)
    parameters = list(pair.encoder.parameters())
    total, squares = 0.0, 0.0
    for _ in range(draws):
        loss = objective.differentiable_loss(pair.model, pair.guide, y)
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()
        total, squares = total + slope, squares + slope**2
    mean = total / draws
    deviation = (squares / draws - mean**2).clamp(min=0).sqrt()
    moved = deviation > 0  # a parameter that no datum of the batch reaches has no gradient
    return float((mean.abs() / deviation)[moved].mean())


def trained(pair, found, options, **settings):
    fit(
        pair,
        found["train"][: options.num_train],
        batch_size=64,
        schedule="cosine",
        seed=options.seed,
        progress=False,
        **settings,
    )
    return pair


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("--draws", type=int, default=400, help="of the gradient, for each K")
    parser.add_argument("--num-train", type=int, default=1297, help="number of training digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="a new directory; runs/iwae, or the next free name, if left out",
    )
    options = parser.parse_args(arguments)
    counts, test_size = (1, 2, 4, 8, 16, 32, 64), 300
    if options.smoke:
        options.num_epochs, options.draws, options.num_train = 2, 5, 128
        counts, test_size = (1, 4), 8
    out = options.out or fresh("runs/iwae")
    found = data.load("digits", "binary")
    torch.manual_seed(options.seed)
    pair = models.VAE((8, 8), latent=8, hidden=(64,))
    trained(pair, found, options, epochs=options.num_epochs, learning_rate=2e-3)

    batch, floor = found["train"][:64], math.sqrt(2 / math.pi / options.draws)
    ratios = {g: [signal_to_noise(pair, batch, k, g, options.draws) for k in counts] for g in GRADIENTS}
    print(f"signal to noise of the encoder's gradient, {options.draws} draws (pure noise: {floor:.3f})")
    print(f"{'K':>8}" + "".join(f"{k:8}" for k in counts))
    for name, row in ratios.items():
        print(f"{name:>8}" + "".join(f"{value:8.3f}" for value in row))

    audits, wide = {}, max(counts)
    last = {"epochs": max(1, options.num_epochs // 2), "learning_rate": 1e-3}
    audits["elbo"] = trained(copy.deepcopy(pair), found, options, objective="elbo", particles=32, **last)
    for name, objective in (("plain", "iwae"), ("stl", "stl"), ("dreg", "dreg")):
        more = {"objective": objective, "particles": 32, **last}
        audits[f"IW-32, {name}"] = trained(copy.deepcopy(pair), found, options, **more)
    print(f"\nThen {last['epochs']} more epochs; test digits, nats per datum\n{'':14}{'ELBO':>10}", end="")
    print(f"{f'iwae-{wide}':>10}{'error':>8}{'gap':>8}{'ESS':>8}")
    for name, tuned in audits.items():
        torch.manual_seed(options.seed)
        audits[name] = result = audit(tuned, found["test"][:test_size], particles=wide)
        low, high = result["elbo"], result[f"iwae-{wide}"]
        effective = float(high.ess.mean())
        print(f"{name:14}{low.mean:10.2f}{high.mean:10.2f}{high.mean_error:8.3f}", end="")
        print(f"{high.mean - low.mean:8.2f}{effective:8.1f}")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, row in ratios.items():
        axis.loglog(counts, row, marker="o", label=name)
    start = ratios["plain"][0]
    axis.loglog(counts, [start / k**0.5 for k in counts], color="gray", ls=":", label="1/√K")
    axis.axhline(floor, color="gray", lw=0.8, ls="--", label="pure noise")
    axis.set_xlabel("particles K")
    axis.set_ylabel("signal to noise, encoder's gradient")
    axis.set_xticks(counts, map(str, counts), minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "signal_to_noise.png", dpi=130)
    print("picture:", out / "signal_to_noise.png")
    return audits


if __name__ == "__main__":
    main()

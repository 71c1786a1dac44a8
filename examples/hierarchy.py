"""Why the upper layers of a hierarchy go unused, and how a ladder uses them: the same three layers of latents, twice.

A chain y ⇄ z_1 ⇄ z_2 ⇄ z_3 has one generator, p(z_3) p(z_2 | z_3) p(z_1 | z_2) p(y | z_1), and two natural encoders:

    bottom-up   q(z_1 | y) q(z_2 | z_1) q(z_3 | z_2)          each layer summarizes the one below
    top-down    q(z_3 | y) q(z_2 | z_3, y) q(z_1 | z_2, y)    each layer is told what the ones above left open

Both bounds are right. But bottom-up, z_1 alone can carry everything, the upper layers only have to explain the
*distribution* of z_1, and as soon as q(z_2 | z_1) = p(z_2) nothing pulls them back: their KL is 0 and they say nothing.
The ladder shares the generator's own path with the encoder, so that every layer adds what is still missing.

The numbers that show it: the rate of each layer, E_q[ln q - ln p] in nats, and how many of its units are active,
that is, have a posterior mean that moves with the data.

    python examples/hierarchy.py --num-epochs 200 --out runs/my-hierarchy
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, evidence, fit, models, report
from pyroelbo.runs import fresh
from pyroelbo.terms import Evaluator

LATENT, HIDDEN = (8, 6, 4), 64


def pairs():
    return {
        "bottom-up": models.Hierarchy((8, 8), LATENT, HIDDEN),
        "ladder": models.Ladder((8, 8), LATENT, (HIDDEN,) * 3, norm="layer"),
    }


def active_units(pair, y, particles=64):
    """How many coordinates of each layer have a posterior mean whose variance over the data is above 0.01 (Burda et al., 2016).

    The mean of a few draws varies by itself, by the draws' variance over their number: that is taken off.
    """
    found = {}
    with torch.no_grad():
        draws = Evaluator(pair, y).draws(particles).latents
    for site in reversed(pair.sites):
        z = draws[site]  # [particles, data, units]
        variance = z.mean(0).var(0) - z.var(0).mean(0) / particles
        found[site] = (int((variance > 0.01).sum()), z.shape[-1])
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=150)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="a new directory; runs/hierarchy, or the next free name, if left out",
    )
    options = parser.parse_args(arguments)
    out = options.out or fresh("runs/hierarchy")
    digits = data.load("digits", form="binary")
    test = digits["test"]
    if options.smoke:
        options.num_epochs, test = 2, test[:10]

    torch.manual_seed(options.seed)
    audits, found, wide = {}, {}, (16 if options.smoke else 64)
    for name, pair in pairs().items():
        fit(
            pair,
            digits["train"],
            valid=digits["valid"],
            # "layered" takes each KL in closed form exactly where that is the bound's own term: all of the ladder's, the top
            # one bottom-up. (Pyro's TraceMeanField_ELBO would do so for all three; `fit` refuses it there, and says why.)
            objective="layered",
            kl_weight=lambda epoch: min(1.0, epoch / 20),
            epochs=options.num_epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            seed=options.seed,
            device="cuda" if options.cuda else None,
            progress=False,
        )
        torch.manual_seed(options.seed)
        audits[name] = audit(pair, test, particles=wide)
        found[name] = evidence.layers(pair, test, particles=wide // 4, inner=wide // 4)
        print(f"\n=== {name}\n{audits[name]}\n\n{found[name]}")
        units = active_units(pair, test)
        print("active units:", ", ".join(f"{k} {a} of {n}" for k, (a, n) in units.items()))

    print("\npicture:", report.plot_rates(found, out / "rates.png"))
    return audits


if __name__ == "__main__":
    main()

"""Why the upper layers of a hierarchy go unused, and how a ladder uses them: the same three layers of latents, twice.

A chain y ⇄ z_1 ⇄ z_2 ⇄ z_3 has one generator, p(z_3) p(z_2 | z_3) p(z_1 | z_2) p(y | z_1), and two natural encoders:

    bottom-up   q(z_1 | y) q(z_2 | z_1) q(z_3 | z_2)          each layer summarizes the one below
    top-down    q(z_3 | y) q(z_2 | z_3, y) q(z_1 | z_2, y)    each layer is told what the ones above left open

Both bounds are right. But bottom-up, z_1 alone can carry everything, the upper layers only have to explain the
*distribution* of z_1, and as soon as q(z_2 | z_1) = p(z_2) nothing pulls them back: they cost nothing and say nothing.
The ladder shares the generator's own path with the encoder, so that every layer adds what is still missing. Even so a
layer whose neighbours are enough may fall idle; free bits, a nat that each layer has for nothing, keep it in use.

The numbers that show it: the rate of each layer, E_q[ln q - ln p] in nats; how many of its units are active, that
is, have a rate of their own above 0.1 nats; and what is lost without the upper layers, by a model that has only the lowest.

    python examples/hierarchy.py --num-epochs 200 --out runs/my-hierarchy
"""

import argparse
from pathlib import Path

import torch
from pyro import poutine

from pyroelbo import audit, data, evidence, fit, models, report
from pyroelbo.objectives import Layered_ELBO
from pyroelbo.runs import fresh

LATENT, HIDDEN = (8, 6, 4), 64


def systems():
    ladder = {"shape": (8, 8), "latent": LATENT, "hidden": (HIDDEN,) * 3, "norm": "layer"}
    return {
        "one layer": (models.Hierarchy((8, 8), LATENT[:1], HIDDEN), Layered_ELBO()),
        "bottom-up": (models.Hierarchy((8, 8), LATENT, HIDDEN), Layered_ELBO()),
        "ladder": (models.Ladder(**ladder), Layered_ELBO()),
        "ladder, free bits": (models.Ladder(**ladder), Layered_ELBO(free_bits=1.0)),
    }


@torch.no_grad()
def active_units(pair, y, draws=16):
    """How many coordinates of each layer have E_q[ln q(z_d | …) - ln p(z_d | …)] above 0.1 nats.

    (The usual count, of posterior means that move with the data, is made for one layer: in an upper layer's shadow a lower
    one moves even if it only repeats what the generator says anyway.)
    """
    pair.eval()
    y = y.repeat(draws, 1)
    guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    found = {}
    for site in reversed(pair.sites):
        z = guide.nodes[site]["value"]
        # Both are diagonal Gaussians: without their event dimension the coordinates' log densities come one by one.
        q, p = guide.nodes[site]["fn"].base_dist, model.nodes[site]["fn"].base_dist
        rate = (q.log_prob(z) - p.log_prob(z)).mean(0)
        found[site] = (int((rate > 0.1).sum()), z.shape[-1])
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
    audits, found, units, wide = {}, {}, {}, (16 if options.smoke else 64)
    for name, (pair, objective) in systems().items():
        fit(
            pair,
            digits["train"],
            valid=digits["valid"],
            # It takes each KL in closed form exactly where that is the bound's own term: all of a ladder's, bottom-up the
            # top one. (Pyro's TraceMeanField_ELBO would do so for all three; `fit` refuses it there, and says why.)
            objective=objective,
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
        found[name] = evidence.site_gaps(pair, test, particles=wide // 4, inner=wide // 4)
        print(f"\n=== {name}\n{audits[name]}\n\n{found[name]}")
        units[name] = active_units(pair, test)

    sites = [f"z_{layer}" for layer in range(1, len(LATENT) + 1)]
    print(
        f"\nTest digits: bounds in nats, and for each layer its rate in nats and its active units\n{'':18}",
        end="",
    )
    print("".join(f"{head:>16}" for head in ("ELBO", f"iwae-{wide}", *sites)))
    for name, result in audits.items():
        bounds = [f"{result[method].mean:.2f}" for method in ("elbo", f"iwae-{wide}")]
        layers = [
            f"{float(found[name].rates[site].value):.2f} ({active} of {size})" if size else "-"
            for site, (active, size) in ((site, units[name].get(site, (0, 0))) for site in sites)
        ]
        print(f"{name:18}" + "".join(f"{cell:>16}" for cell in (*bounds, *layers)))

    named = {f"{name}: ELBO {audits[name]['elbo'].mean:.2f}": layers for name, layers in found.items()}
    print("\npicture:", report.plot_rates(named, out / "rates.png"))
    return audits


if __name__ == "__main__":
    main()

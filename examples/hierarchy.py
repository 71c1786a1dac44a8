"""Why the upper layers of a hierarchy go unused, and how a ladder uses them: the same three layers of
latents, twice.

A chain y ⇄ z_1 ⇄ z_2 ⇄ z_3 has one generator, p(z_3) p(z_2 | z_3) p(z_1 | z_2) p(y | z_1), and two natural
encoders:

    bottom-up   q(z_1 | y) q(z_2 | z_1) q(z_3 | z_2)          each layer summarizes the one below
    top-down    q(z_3 | y) q(z_2 | z_3, y) q(z_1 | z_2, y)    each layer adds to the ones above

Both bounds are valid. But bottom-up, z_1 alone can carry all information, and the upper layers only model the
*distribution* of z_1; once q(z_2 | z_1) = p(z_2), their rate is zero and stays there. The ladder's encoder
shares the generator's path, so that every layer adds what is still missing. A layer may still become unused
if its neighbours suffice; free bits, a nat per layer that is not penalized, keep it in use.

Printed are the rate of each layer, E_q[ln q - ln p] in nats; the number of its active units, those with a
rate above 0.1 nats; and the bounds of a model that has only the lowest layer.

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
    """Number of coordinates of each layer with E_q[ln q(z_d | …) - ln p(z_d | …)] above 0.1 nats.

    (The usual count, of posterior means that vary with the data, is meant for one layer: in a hierarchy the
    means of a lower layer vary with the upper one even if q equals p.)
    """
    pair.eval()
    y = y.repeat(draws, 1)
    guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    found = {}
    for site in reversed(pair.sites):
        z = guide.nodes[site]["value"]
        # Both are diagonal Gaussians: base_dist has the log density of each coordinate.
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
    digits = data.load("digits", "binary")
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
            # Uses the closed-form KL exactly where it is a term of the bound: for all layers of a ladder,
            # bottom-up for the top one. (Pyro's TraceMeanField_ELBO would use it for all three, and is
            # refused by `fit`.)
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

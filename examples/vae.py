"""The demo: a VAE with two latent dimensions learns handwritten digits, and an audit measures how tight its
bound is.

With two latent dimensions ln p(y) can be integrated numerically, so the table at the end shows how many nats
the ELBO (the training loss) and the importance-weighted bound lie below the evidence of the same model.

    python examples/vae.py --num-epochs 200 --out runs/my-vae
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models, report
from pyroelbo.runs import fresh


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=150)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--likelihood", default="discretized_logistic", choices=tuple(models.vae.LIKELIHOODS))
    parser.add_argument("--network", default="mlp", choices=("mlp", "conv"))
    parser.add_argument("--num-audit", type=int, default=200, help="number of test data to audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=None, help="a new directory; runs/vae, or the next free name, if left out"
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.num_audit = 2, 4
    out = options.out or fresh("runs/vae")

    # Grey levels 0 … 16 of 8x8 pixels. The discretized logistic assigns a probability to each level, so nats
    # are a code length.
    settings = {"likelihood": options.likelihood, "network": options.network}
    digits, settings = models.matched("vae", data.load("digits"), settings)  # as this likelihood takes them
    torch.manual_seed(options.seed)
    pair = models.build("vae", digits, settings)

    # The pair is a Pyro model and a Pyro guide; fit minimizes -ELBO, as SVI(pair.model, pair.guide, ...)
    # does.
    run = fit(
        pair,
        digits["train"],
        valid=digits["valid"],
        epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        seed=options.seed,
        device="cuda" if options.cuda else None,
        out=out,
        config={"model": "vae", "data": digits.describe(), "settings": settings},
    )
    print(
        f"\nafter {len(run.losses)} epochs the loss is {run.losses[-1]:.2f} nats per digit. How far is "
        "that from -ln p(y)?\n"
    )

    # Held-out data, in the order of a fixed shuffle.
    torch.manual_seed(options.seed)
    test = digits["test"][: options.num_audit]
    result = audit(pair, test, particles=64)
    print(result)
    (out / "audit.json").write_text(result.to_json())

    with torch.no_grad():
        white = max(digits.levels - 1, 1)
        codes = pair.encode(digits["test"].to(pair.device)).mean
        _, drawn = pair.simulate(16)
        ticks = torch.linspace(-2.5, 2.5, 15)
        plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).reshape(-1, 2).to(pair.device)
        pictures = [
            report.plot_curve(run, out / "curve.png"),
            report.plot(result, out / "audit.png"),
            report.images(
                [test[:16] / white, pair.mean_image(codes[:16]), (drawn / white).clamp(0, 1)],
                (8, 8),
                out / "images.png",
                ["data", "decoded", "samples"],
            ),
            report.plot_latents(
                codes, digits.labels["test"], pair.mean_image(plane), (8, 8), 2.5, out / "latents.png"
            ),
        ]
    print("\npictures:", *pictures)
    return result


if __name__ == "__main__":
    main()

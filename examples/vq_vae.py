"""Codes from a codebook: what is their bound, what does a point mass waste, and how are the codes used?

A VQ-VAE replaces each of its encoder's vectors by the nearest one of a codebook. Papers report its
reconstructions. With a prior over the codes and a likelihood of the pixels it has a bound on ln p(y) like any
other pair: the guide is a point mass on the nearest codes, so the bound is ln p(z) + ln p(y | z), and a file
of the data has that many nats. Four ways to learn codes, on digits of 17 grey levels, all with 16 codes at
each of three positions:

- vq: the codebook follows moving averages of the vectors that choose each code;
- vq, gradient: the codebook is trained by gradients;
- fsq: no codebook, each of two numbers is rounded to one of four values;
- sq: codes are drawn, near ones more often, so that the bound has the guide's entropy, which shrinks as the
  noise is learned away.

There are 4,096 code words, so ln p(y) is a sum, and the table shows what each guide wastes.

    python examples/vq_vae.py
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, coding, data, fit, models, report

SYSTEMS = {
    "vq": (models.VQVAE, {"codes": 16}, "elbo"),
    "vq, gradient": (models.VQVAE, {"codes": 16, "codebook": "gradient"}, "elbo"),
    "fsq": (models.FSQVAE, {"bins": (4, 4)}, "elbo"),
    "sq": (models.SQVAE, {"codes": 16}, "straight_through"),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/vq_vae"))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_data = (1, 5) if options.smoke else (options.num_epochs, 100)
    options.out.mkdir(parents=True, exist_ok=True)

    digits = data.load("digits")
    train, test = digits["train"], digits["test"]
    results, rows = {}, [test[:16]]
    for name, (make, settings, objective) in list(SYSTEMS.items())[:: 3 if options.smoke else 1]:
        torch.manual_seed(options.seed)
        if options.smoke:
            settings = {"codes": 4}  # 16 code words
        positions = 2 if options.smoke else 3
        pair = make((8, 8), positions=positions, likelihood="discretized_logistic", levels=17, **settings)
        pair.initialize(train)  # k-means on the vectors of the encoder as it is
        fit(
            pair,
            train,
            epochs=epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            objective=objective,
            seed=options.seed,
            device="cuda" if options.cuda else None,
        )
        pair.cpu()
        print(f"\n{name}: {pair.usage(test)}")  # held out, and the codebook is not moved by it
        results[name] = audit(pair, test[:num_data], particles=64)
        print(results[name])
        file = options.out / f"{name.replace(', ', '_')}.code"
        y = test[:num_data].numpy().astype("uint8")
        file.unlink(missing_ok=True)
        code = coding.compress(pair, y, file)
        assert (coding.decompress(pair, file) == y).all()
        print(f"as a file: {code.net:.2f} nats per datum that the pair coded, decoded bit for bit")
        rows.append(pair.reconstruct(test[:16]))
    print("\nwhat the guides waste, ln p(y) - ELBO, nats per datum:")
    for name, found in results.items():
        gap = found["exact"].mean - found["elbo"].mean
        print(f"{name:14s}{gap:8.4f}")
    _, drawn = pair.simulate(16)
    names = ["data", *(name.split(",")[0] for name in results), "samples"]
    rows = [rows[0] / 16, *rows[1:], drawn / 16]
    print(f"written: {report.images(rows, (8, 8), options.out / 'digits.png', names)}")
    return results


if __name__ == "__main__":
    main()

"""A VAE with binary latents: which gradient estimator trains it, and how tight is each bound?

Binary draws have no derivative, so the encoder's gradient is estimated: by leave-one-out baselines (rloo),
antithetic pairs (disarm), slopes as control variates (double_cv), a straight-through relaxation, or not at
all, as in wake-sleep, which trains the encoder on the model's own dreams. All start from the same weights and
take as many steps. With ten latents the exact ln p(y) is a sum over 1,024 codes, so each
table shows how far the trained bound is from it.
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models, report

ESTIMATORS = {
    "rloo": {"objective": "rloo", "particles": 4},
    "disarm": {"objective": "disarm", "particles": 4},
    "double_cv": {"objective": "double_cv", "particles": 4},
    "straight_through": {"objective": "straight_through", "particles": 4},
    "wake_sleep": {"objective": "wake_sleep"},
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--latent", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/discrete_vae"))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_data = (1, 5) if options.smoke else (options.num_epochs, 100)
    names = list(ESTIMATORS)[: 2 if options.smoke else None]
    options.out.mkdir(parents=True, exist_ok=True)

    digits = data.load("digits", "binary")  # thresholded at one half
    train, test = digits["train"], digits["test"][:num_data]
    results = {}
    for name in names:
        torch.manual_seed(options.seed)
        pair = models.DiscreteVAE(64, (4 if options.smoke else options.latent,), (100,))
        fit(
            pair,
            train,
            epochs=epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            device="cuda" if options.cuda else None,
            **ESTIMATORS[name],
        )
        print(f"\ntrained with {name}:")
        results[name] = audit(pair, test, particles=64)
        print(results[name])
    pair.cpu()
    _, drawn = pair.simulate(32)
    rows = [test[:16].cpu(), pair.reconstruct(test[:16].cpu()), drawn[:16], drawn[16:]]
    figure = report.images(rows, (8, 8), options.out / "digits.png", ["data", "decoded", "samples", ""])
    print(f"written: {figure}")
    return results


if __name__ == "__main__":
    main()

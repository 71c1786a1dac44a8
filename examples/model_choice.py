"""How many clusters, and of what shape? Mixtures on three classic tables, selected by held-out evidence.

Iris, wine and breast cancer ship with scikit-learn. Every number of components, with diagonal and with full
covariances, is fitted by EM to nine tenths of a table and judged by ln p(y) of the held-out tenth; ten times,
so that each row is held out once. Training evidence tends to grow with the number of components; held-out
evidence does not. Selected is the smallest number of components within one standard error of the best, for
paired differences. The tables' classes are only compared with at the end.
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, fit, fit_em, models
from pyroelbo.runs import fresh


def tables():
    """Standardized columns [N, D] and classes [N] by name."""
    from sklearn.datasets import load_breast_cancer, load_iris, load_wine

    found = {}
    for name, load in (("iris", load_iris), ("wine", load_wine), ("breast cancer", load_breast_cancer)):
        x, classes = load(return_X_y=True)
        y = torch.tensor(x, dtype=torch.float64)
        found[name] = ((y - y.mean(0)) / y.std(0), torch.tensor(classes))
    return found


def mixture(y, components, covariance, options, guide="exact"):
    """The best of a few runs of EM. ``smoothing`` shrinks covariances towards the identity: with many columns
    and few rows the likelihood would otherwise be unbounded."""
    torch.manual_seed(options.seed)
    settings = {"covariance": covariance, "guide": guide, "smoothing": options.smoothing}
    pair = models.GaussianMixture(y.shape[1], components, **settings).double()
    pair.initialize(y)
    fit_em(
        pair,
        y,
        epochs=options.num_epochs,
        tolerance=1e-4,
        restarts=options.restarts,
        seed=options.seed,
        progress=False,
    )
    return pair


def held_out(y, components, covariance, options):
    """ln p of every row under a model fitted without it, [N], and the mean of ln p of the training rows."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(options.seed))
    value, seen = torch.zeros(len(y), dtype=y.dtype), []
    for fold in order.tensor_split(options.folds):
        rest = torch.ones(len(y), dtype=torch.bool)
        rest[fold] = False
        pair = mixture(y[rest], components, covariance, options)
        with torch.no_grad():
            value[fold] = pair.log_evidence(y[fold])
            seen.append(pair.log_evidence(y[rest]).mean())
    return value, float(torch.stack(seen).mean())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=100)
    parser.add_argument("--most", type=int, default=6, help="the largest number of components")
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--smoothing", type=float, default=1.0, help="strength of the prior on covariances")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory for the picture")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.most, options.folds, options.restarts = 3, 2, 2, 1
    out = options.out or fresh("runs/model_choice")

    from matplotlib.figure import Figure
    from sklearn.metrics import adjusted_rand_score

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    results = {}
    for axis, (name, (y, classes)) in zip(figure.subplots(1, 3), tables().items(), strict=True):
        print(f"\n{name}: {len(y)} rows, {y.shape[1]} columns; nats per row of {options.folds} folds")
        print(f"{'covariance':<10} {'components':>10} {'seen':>9} {'held out':>9} {'error':>6}")
        choices = {}
        for covariance, colour in (("diagonal", "tab:blue"), ("full", "tab:orange")):
            rows = []
            for components in range(1, options.most + 1):
                value, seen = held_out(y, components, covariance, options)
                error = float(value.std() / len(value) ** 0.5)
                rows.append((float(value.mean()), error, seen))
                choices[covariance, components] = value
                print(f"{covariance:<10} {components:>10} {seen:>9.3f} {rows[-1][0]:>9.3f} {error:>6.3f}")
            held, errors, seen_ones = zip(*rows, strict=True)
            x = range(1, options.most + 1)
            axis.errorbar(
                x, held, yerr=errors, fmt="o-", ms=4, capsize=2, color=colour, label=f"{covariance}, held out"
            )
            axis.plot(x, seen_ones, ":", color=colour, label=f"{covariance}, seen")
        best = max(choices.values(), key=lambda value: value.mean())
        close = [c for c, v in choices.items() if (best - v).mean() <= (best - v).std() / len(v) ** 0.5]
        covariance, components = min(close, key=lambda choice: choice[1])
        axis.plot(components, choices[covariance, components].mean(), "k*", ms=13, label="chosen")
        axis.set_title(f"{name} ({len(y)} × {y.shape[1]})")
        axis.set_xlabel("components")
        axis.legend(fontsize=7)
        # The selected model on all rows, with an encoder that has to learn the responsibilities.
        pair = mixture(y, components, covariance, options, "encoder")
        with torch.no_grad():
            cluster = pair.posterior(y).probs.argmax(1)
        agreement = adjusted_rand_score(classes, cluster)
        print(
            f"chosen: {components} of {covariance} covariance; adjusted Rand index with the classes "
            f"{agreement:.3f}"
        )
        fit(
            pair,
            y,
            epochs=1 if options.smoke else 30,
            batch_size=50,
            learning_rate=3e-2,
            freeze=("generator",),
            seed=options.seed,
            progress=False,
        )
        print(result := audit(pair, y, particles=16))
        results[name] = result
    figure.axes[0].set_ylabel("ln p(y), nats a row")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "model_choice.png", dpi=120)
    print("picture:", out / "model_choice.png")
    return results


if __name__ == "__main__":
    main()

"""A mixture of experts on an inverse problem: several answers are right, and the gate knows where.

Forwards, x = y + 0.3 sin(2πy) + noise is a curve. Backwards, to tell y from x, it has up to three branches,
between which one regression draws a line through nothing. A mixture of experts has a line for each branch and
a gate, a softmax of x, that says how probable each is. Its latent is finite, so ln p(y | x) is an exact sum,
EM climbs it, and the audit tells what an amortized guide, a network of x and y on the same model, loses, by
how it was trained. Picture: data, the experts' lines where the gate trusts them, the gate.
"""

import argparse
import math
from pathlib import Path

import torch

from pyroelbo import audit, fit, fit_em, models, report
from pyroelbo.runs import fresh


def inverse_problem(n, noise=0.05):
    y = torch.rand(n, 1)
    return y + 0.3 * torch.sin(2 * math.pi * y) + noise * torch.randn(n, 1), y


def draw(pair, x, y, path):
    from matplotlib.figure import Figure

    grid = torch.linspace(float(x.min()), float(x.max()), 200)[:, None]
    with torch.no_grad():
        gate, means = pair.gate(grid).exp(), pair.means(grid)[..., 0]
    figure = Figure(figsize=(6, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot(x[:, 0], y[:, 0], ".", color="0.7", ms=3)
    for m in range(pair.components):
        colour, trusted = f"C{m}", gate[:, m] > 0.05
        above.plot(grid[trusted], means[trusted, m], color=colour, lw=2)
        below.plot(grid, gate[:, m], color=colour)
    above.set(ylabel="y", ylim=(-0.2, 1.2), title="experts where the gate gives them 5 % or more")
    below.set(xlabel="x", ylabel="p(z | x)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=300)
    parser.add_argument("--components", type=int, default=5)
    parser.add_argument("--restarts", type=int, default=5, help="of EM, from other divisions of the data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory; runs/experts if left out")
    options = parser.parse_args(arguments)
    epochs, restarts = (5, 1) if options.smoke else (options.num_epochs, options.restarts)
    out = options.out or fresh("runs/experts")

    torch.manual_seed(options.seed)
    train, test = inverse_problem(1000), inverse_problem(1000)
    table = {}
    for count in (1, options.components):
        pair = models.MixtureOfExperts(1, 1, count)
        fit_em(pair, train, epochs=epochs, restarts=restarts, seed=options.seed)
        table[count] = float(pair.log_evidence(*test).mean().detach())
    print("picture:", draw(pair, *train, out / "experts.png"))

    # The same generator with a network as guide, trained in two ways: by the ELBO, its draws of z summed
    # over, and by wake-sleep. A guide that gives a wrong expert any weight loses much ELBO, so the first soon
    # trusts one expert for good; the second learns from the posterior's side.
    guides = {"exact": pair}
    for objective, particles in (("enum", 1), ("reweighted_wake_sleep", 5)):
        torch.manual_seed(options.seed)
        amortized = models.MixtureOfExperts(1, 1, options.components, guide="encoder")
        amortized.generator.load_state_dict(pair.generator.state_dict())
        fit(
            amortized,
            train,
            objective=objective,
            particles=particles,
            epochs=epochs,
            learning_rate=1e-2,
            freeze=("generator",),
            seed=options.seed,
        )
        guides[f"encoder by {objective}"] = amortized
    results = {}
    for name, guide in guides.items():
        print(f"\n{name}:")
        results[name] = audit(guide, tuple(part[: 20 if options.smoke else 200] for part in test))
        print(results[name])
    print("picture:", report.plot(results[name], out / "encoder.png"))
    print(f"\nexact ln p(y | x) of {len(test[0])} test data, nats:")
    for count, value in table.items():
        print(f"{count} expert{'s' if count > 1 else ''}: {value:.3f}")
    return results


if __name__ == "__main__":
    main()

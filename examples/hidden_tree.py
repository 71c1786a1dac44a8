"""Digits as a tree of hidden bits: the tree comes from the data, and every sum over it is exact.

A Chow-Liu tree links each pixel to one other, so that linked pixels tell as much of each other as a tree
allows. Here the tree links hidden states instead, of which each pixel is a noisy copy. One pass over the tree
gives ln p(y) and the posterior of all states, so EM is exact and the guide tight. The table compares, on the
test split, independent pixels, the tree of the pixels themselves, and trees of more and more hidden states.
Pictures: the tree, with the strength of its links, and digits drawn from the model.
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit_em, models, report
from pyroelbo.runs import fresh


def independent(train, test, smoothing=0.1):
    """Mean ln p(y) of test pictures under independent pixels."""
    share = (train.sum(0) + smoothing) / (len(train) + 2 * smoothing)
    return float(torch.distributions.Bernoulli(share).log_prob(test).sum(-1).mean())


def without_noise(pair, train):
    """The Chow-Liu tree of the pixels themselves: states that show as they are."""
    pair.initialize(train)
    with torch.no_grad():
        as_they_are = torch.eye(2).log().expand(pair.dims, 2, 2)  # true zeros
        pair.generator.logits.copy_(as_they_are)
        pair.m_step(pair.e_step(train)[1])
        pair.generator.logits.copy_(as_they_are)


def draw_tree(pair, train, shape, path):
    """The tree on the pixel grid: a link is as thick as its two states tell of each other."""
    from matplotlib.figure import Figure

    both = pair.e_step(train)[1]["transition"] / len(train)  # P(parent's state, own state)
    apart = both.sum(-1, keepdim=True) * both.sum(-2, keepdim=True)
    told = torch.where(both > 0, both * (both / apart).log(), 0.0).sum((1, 2))  # nats
    figure = Figure(figsize=(4, 4), layout="constrained")
    axis = figure.subplots()
    for n, above in enumerate(pair.prior.parents.tolist()):
        (row, column), (up, left) = divmod(n, shape[1]), divmod(above, shape[1])
        if above >= 0:
            width = 0.2 + 8 * float(told[n])
            axis.plot((column, left), (row, up), color="tab:blue", lw=width, solid_capstyle="round")
        axis.plot(column, row, "o", color="tab:red" if above < 0 else "black", ms=8 if above < 0 else 4)
    axis.set(title="links of the hidden states, root in red", xticks=[], yticks=[])
    axis.invert_yaxis()
    axis.set_aspect("equal")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=150)
    parser.add_argument("--states", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out", type=Path, default=None, help="a new directory; runs/hidden_tree if left out"
    )
    options = parser.parse_args(arguments)
    epochs, states = (2, [2]) if options.smoke else (options.num_epochs, options.states)
    out = options.out or fresh("runs/hidden_tree")

    digits = data.view(data.load("digits"), ["binary"])
    train, test = digits["train"], digits["test"]
    torch.manual_seed(options.seed)
    plain = models.HiddenChowLiuTree(digits.shape)
    without_noise(plain, train)
    table = {
        "independent pixels": independent(train, test),
        "Chow-Liu tree of the pixels": float(plain.log_evidence(test).mean().detach()),
    }

    results = {}
    for count in states:
        torch.manual_seed(options.seed)
        pair = models.HiddenChowLiuTree(digits.shape, states=count)
        pair.initialize(train)
        fit_em(pair, train, epochs=epochs, start="current")
        name = f"hidden tree of {count} states"
        results[name] = audit(pair, test[: 5 if options.smoke else 100])
        table[name] = float(pair.log_evidence(test).mean().detach())
        if count == 2:
            print("tree:", draw_tree(pair, train, digits.shape, out / "tree.png"))
    print(f"\n{results[name]}\n\nexact ln p(y) of {len(test)} test pictures, nats:")
    for name, value in table.items():
        print(f"{name:30s} {value:8.3f}")
    pictures = pair.simulate(32)[1]
    print("samples:", report.images([test[:16], *pictures.split(16)], digits.shape, out / "samples.png"))
    return results


if __name__ == "__main__":
    main()

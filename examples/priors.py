"""Five priors for one VAE: where does the prior have mass that no code uses?

A VAE of the digits with two latent dimensions is trained once with each prior. The decomposition of the ELBO,

    ELBO = reconstruction - cross-entropy(q(z), p(z)) + entropy of q(z | y),

shows what a prior can gain: only the cross-entropy depends on it, and is smallest if p(z) equals the
aggregated posterior q(z), the mean of q(z | y) over the data. Where p(z) is large and q(z) is small, samples
come from codes that the decoder was not trained on: a hole. The figure shows both densities and their ratio
for every prior.

    python examples/priors.py --out runs/my-priors
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, evidence, fit, models, report
from pyroelbo.distributions import DiagonalMixture
from pyroelbo.runs import fresh

PRIORS = ("standard", "mixture", "vamp", "flow", "autoregressive")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=100)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--components", type=int, default=50, help="Gaussians of the mixture, pseudo-inputs of vamp"
    )
    parser.add_argument("--num-audit", type=int, default=50, help="number of test data to audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory; runs/priors if left out")
    options = parser.parse_args(arguments)
    names = PRIORS
    if options.smoke:
        options.num_epochs, options.num_audit, names = 2, 2, ("standard", "vamp")
    out = options.out or fresh("runs/priors")

    # Grey levels 0 … 16 with probabilities, so that nats are a code length.
    digits = data.load("digits", "bytes")
    train, test = digits["train"], digits["test"][: options.num_audit]
    results, parts, planes = {}, {}, {}
    for prior in names:
        torch.manual_seed(options.seed)
        # build also initializes the pseudo-inputs of a VampPrior from data; the other priors need none.
        pair = models.build("vae", digits, {"prior": prior, "components": options.components})
        # The prior is a part of the pair, as the decoder: the same loss trains both.
        fit(
            pair,
            train,
            valid=digits["valid"],
            epochs=options.num_epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            seed=options.seed,
            device="cuda" if options.cuda else None,
            progress=False,
        )
        torch.manual_seed(options.seed)
        results[prior] = audit(pair, test)
        # q(z) is an explicit mixture over the training data, so its density is exact; only expectations are
        # averages over draws.
        parts[prior] = evidence.diagnostics(pair, train, draws=2 if options.smoke else 8)
        holes = float(parts[prior].holes)
        planes[f"{prior}\n{holes:.1%} of it in holes"] = densities(pair, train, parts[prior])
        print(f"\n{prior}:\n{results[prior]}")

    print(f"\nTraining data ({len(train)} digits), nats per datum:")
    heads = ("prior", "reconstruction", "cross-entropy", "entropy", "KL(q(z), p(z))", "holes", "test ln p")
    print(" | ".join(f"{h:>15}" for h in heads))
    for prior, d in parts.items():
        numbers = [d.reconstruction, d.cross_entropy, d.entropy, d.marginal_kl]
        best = results[prior]["quadrature"].mean
        cells = [prior, *(f"{float(v):.3f}" for v in numbers), f"{float(d.holes):.1%}", f"{best:.2f}"]
        print(" | ".join(f"{c:>15}" for c in cells))
    print("\npicture:", report.plot_planes(planes, out / "holes.png"))
    return results


@torch.no_grad()
def densities(pair, train, found, ticks=160):
    """ln p(z) and ln q(z) on a square of the latent plane, [ticks, ticks] each with rows along z[1], and half
    the square's side."""
    # Only the standard normal fixes the scale of the codes.
    half = 1.2 * float(found.guide_draws.abs().quantile(0.995))
    line = torch.linspace(-half, half, ticks, device=pair.device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    q = pair.encode(train.to(pair.device)).base_dist
    codes = DiagonalMixture(q.loc.new_zeros(len(q.loc)), q.loc, q.scale)
    return pair.prior().log_prob(grid), torch.cat([codes.log_prob(row) for row in grid.split(10)]), half


if __name__ == "__main__":
    main()

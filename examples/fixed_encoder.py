"""The encoder frozen: what prior and generator alone can reach, on a small world and on digits.

    pri*, gen* = argmin E_{y ~ Pop, z ~ enc(z | y)} [-ln pri(z) gen(y | z)]

is the cross-entropy from Pop(y) enc(z | y) to pri(z) gen(y | z). If both families are universal its minimum
is the entropy, pri* gen* = Pop enc, and draws of pri* gen* are draws of Pop: *whatever the encoder is*. The
first part shows it where everything is a table: eight symbols, five codes, four encoders, one of which tells
nothing about y. The loss with ln enc(z | y) added, the negative ELBO, falls to the entropy H(Pop) for all.

The second part freezes encoders of real images. The generator is a network with independent pixels given z,
so it is not universal, and now the encoder matters: one that tells little leaves the pixels' dependence to a
generator that has none. The prior matters as well: what the encoder does with the data must be what the prior
expects, and a flow learns it where N(0, I) cannot.

    python examples/fixed_encoder.py --num-epochs 60
"""

import argparse
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroelbo import Pair, audit, data, evidence, fit, models, report
from pyroelbo.runs import fresh

# ------------------------------------------------------------------------------------------ a world of tables

COUNTS = torch.tensor([16, 12, 10, 8, 6, 6, 4, 2])  # of 64: the population
CODES = 5


class Tables(Pair):
    """p(z), p(y | z) and q(z | y) as free tables: universal families."""

    def __init__(self, encoder):
        super().__init__()
        self.prior, self.generator = nn.Module(), nn.Module()
        self.prior.logits = nn.Parameter(torch.zeros(CODES))
        self.generator.logits = nn.Parameter(torch.randn(CODES, len(COUNTS)))
        self.encoder = nn.Module()
        self.encoder.logits = nn.Parameter(encoder)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior.logits))
            pyro.sample("y", dist.Categorical(logits=self.generator.logits[z]), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            q = dist.Categorical(logits=self.encoder.logits[y])
            pyro.sample("z", q, infer={"enumerate": "parallel"})

    def placeholder(self, n):
        return torch.zeros(n, dtype=torch.long)


def small_world(options):
    population = COUNTS / COUNTS.sum()
    entropy = float(-(population * population.log()).sum())
    y = torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS)
    encoders = {
        "drawn at random": torch.randn(len(COUNTS), CODES),
        "tells nothing": torch.zeros(len(COUNTS), CODES),
        "two symbols a code": 6 * torch.eye(CODES)[torch.arange(len(COUNTS)) // 2],
        "noisy copy": 2 * torch.eye(len(COUNTS))[:, :CODES],
    }
    print(
        f"entropy of the population: {entropy:.5f} nats\n{'encoder':20} {'-ELBO before':>13} {'after':>9}",
        end="",
    )
    print(f" {'-ln p(y)':>9}  {'draws of the generator, per 64':>32}")
    audits = {}
    for name, logits in encoders.items():
        pair = Tables(logits)
        pair.encoder.requires_grad_(
            False
        )  # fit trains the rest; freeze=("encoder",) does the same for one run
        before = expected_loss(pair, y)
        fit(
            pair,
            y,
            objective="enum",  # sums over the codes: the loss has no noise
            epochs=20 if options.smoke else 600,
            batch_size=len(y),
            learning_rate=0.2,
            schedule="cosine",
            progress=False,
        )
        audits[name] = audit(pair, y, particles=16)
        _, drawn = pair.simulate(6400)
        counts = torch.bincount(drawn, minlength=len(COUNTS)) / 100
        print(
            f"{name:20} {before:13.5f} {expected_loss(pair, y):9.5f} {-audits[name]['exact'].mean:9.5f}  "
            + " ".join(f"{c:4.1f}" for c in counts.tolist())
        )
    print(f"{'(the population)':54}  " + " ".join(f"{c:4.1f}" for c in COUNTS.tolist()))
    return audits


@torch.no_grad()
def expected_loss(pair, y):
    """The negative ELBO with the expectation over codes written out, mean over y."""
    log_q = pair.encoder.logits.log_softmax(-1)[y]
    joint = pair.prior.logits.log_softmax(-1) + pair.generator.logits.log_softmax(-1)[:, y].T
    return float((log_q.exp() * (log_q - joint)).sum(-1).mean())


# ------------------------------------------------------------------------------------------ digits


class Principal(nn.Module):
    """q(z | y) = N(whitened principal components of y, scale² I): an encoder without parameters."""

    def __init__(self, y, latent, scale=0.2):
        super().__init__()
        y = 2 * y / y.max() - 1  # as the VAE centers pixels
        loc = y.mean(0)
        _, s, v = torch.linalg.svd(y - loc, full_matrices=False)
        self.scale = scale
        self.register_buffer("loc", loc)
        self.register_buffer("directions", v[:latent].T / s[:latent] * len(y) ** 0.5)

    def forward(self, y):
        return dist.Normal((y - self.loc) @ self.directions, self.scale).to_event(1)


def digits(options, out):
    found = data.load("digits")
    train, test = found["train"], found["test"]
    if options.smoke:
        train, test = train[:200], test[:8]
    latent, rows, audits = 8, {}, {}
    for encoder in ("trained", "principal", "untrained network"):
        for prior in ("standard", "flow"):
            torch.manual_seed(options.seed)
            pair = models.VAE(
                (8, 8), latent, likelihood="discretized_logistic", levels=found.levels, prior=prior
            )
            if encoder == "principal":
                pair.encoder = Principal(train, latent)
            elif encoder != "trained":
                pair.encoder.requires_grad_(False)
            fit(
                pair,
                train,
                epochs=2 if options.smoke else options.num_epochs,
                batch_size=64,
                learning_rate=2e-3,
                schedule="cosine",
                seed=options.seed,
                progress=False,
            )
            name = f"{encoder} encoder, {prior} prior"
            torch.manual_seed(options.seed)
            audits[name] = audit(pair, test, particles=16)
            terms = evidence.terms(pair, test, 16)
            rate = float((terms.log_guide["z"] - terms.log_model["z"]).mean())
            elbo, iwae = audits[name]["elbo"], audits[name]["iwae-16"]
            print(f"{name:42} {elbo.mean:10.2f} {rate:8.2f} {elbo.mean + rate:15.2f} {iwae.mean:10.2f}")
            latents, _ = pair.simulate(12)
            with torch.no_grad():
                rows[name] = pair.mean_image(latents["z"])
    rows["data"] = test[:12] / (found.levels - 1)
    print("picture:", report.images(list(rows.values()), (8, 8), out / "samples.png", list(rows)))
    return audits


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="a new directory; runs/fixed_encoder, or the next free name, if left out",
    )
    options = parser.parse_args(arguments)
    out = options.out or fresh("runs/fixed_encoder")
    torch.manual_seed(options.seed)
    audits = small_world(options)
    print(
        f"\nTest digits, nats per datum\n{'':42} {'ELBO':>10} {'rate':>8} {'reconstruction':>15} "
        f"{'iwae-16':>10}"
    )
    return audits | digits(options, out)


if __name__ == "__main__":
    main()

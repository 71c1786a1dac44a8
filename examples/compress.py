"""Codes as latents, and the bound as a file: what the ELBO claims, in bits that can be counted.

First, Shannon's code. A population Pop(y) has few members, z(y) is the code word of y, of |z| = ⌈-log₂
Pop(y)⌉ bits, and the prior is P(z) = 2^-|z|. The encoder is deterministic and the generator decodes the word,
so the loss -ln P(z) P(y | z) is the code length, and H <= loss < H + ln 2. Coding data with this pair takes
just that many bits.

Second, a generator of random tables over the same population. Over all guides the smallest loss of the ELBO
is the cross-entropy H(Pop, P), if the family of guides contains the posterior. Otherwise there is an excess,
the smallest mean KL to the posterior within the family. The hard ELBO drops the guide's entropy, and its loss
is larger. Bits-back gets that entropy back: to code y, it pops z ~ q(z | y) off a stack of bits, then pushes
y under p(y | z) and z under p(z).

Third, a VAE of digits: its file has minus the ELBO in bits, beside the compressors that everybody has.

    python examples/compress.py
"""

import argparse
import bz2
import lzma
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyroelbo import ExactPair, Pair, audit, coding, data, fit, models
from pyroelbo.objectives import Hard_ELBO
from pyroelbo.runs import fresh

LN2 = 0.6931471805599453


class ShannonCode(Pair):
    """Each member has a word of the same number; one more stands for all unused words."""

    def __init__(self, population):
        super().__init__()
        length = (-population.log2() - 1e-9).ceil()
        # Kraft's inequality: the words' probabilities sum to at most one. The rest is unused.
        left = (1 - (2.0**-length).sum()).clamp_min(0)
        self.prior = nn.Parameter(torch.cat([-length * LN2, left.log()[None]]), requires_grad=False)
        reads = torch.cat([torch.eye(len(population)), torch.ones(1, len(population))])
        self.reads = nn.Parameter(reads.log(), requires_grad=False)  # -inf: never

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.prior))
            pyro.sample("y", dist.Categorical(logits=self.reads[z]), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(logits=self.reads.T[y, :-1].log_softmax(-1)))


class Table(ExactPair):
    """p(z) and p(y | z) are random tables; the guide is a table with a row for every y, or one row for
    all."""

    def __init__(self, members, codes, guide):
        super().__init__()
        self.top = nn.Parameter(torch.randn(codes), requires_grad=False)
        self.below = nn.Parameter(2 * torch.randn(codes, members), requires_grad=False)
        self.encoder = nn.Parameter(torch.zeros(members if guide == "table" else 1, codes))

    def joint(self):
        """ln p(z, y), [members, codes]."""
        return (self.top.log_softmax(0)[:, None] + self.below.log_softmax(1)).T

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=self.top))
            pyro.sample("y", dist.Categorical(logits=self.below[z]), obs=y)

    def q(self):
        """The guide's probabilities, [members, codes]."""
        return self.encoder.softmax(-1).expand(self.below.shape[1], -1)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(probs=self.q()[y]))

    def posterior(self, y):
        return dist.Categorical(logits=self.joint()[y])

    def log_evidence(self, y):
        return self.joint().logsumexp(-1)[y]


def code_length(counts):
    """(H, loss of the ELBO, loss of the hard ELBO) of Shannon's code, in nats, for a population with these
    counts."""
    population = counts / counts.sum()
    y = torch.arange(len(counts)).repeat_interleave(counts)  # every member as often as it occurs
    pair = ShannonCode(population)
    losses = [objective.loss(pair.model, pair.guide, y) / len(y) for objective in (Trace_ELBO(), Hard_ELBO())]
    return float(-(population * population.log()).sum()), *losses


def best_loss(pair, population, hard=False, steps=2000):
    """The smallest loss over the pair's guides, by gradient descent on the exact sums."""
    optimizer = torch.optim.Adam([pair.encoder], lr=0.05)
    for _ in range(steps):
        q = pair.q()
        loss = -(q * pair.joint()).sum(-1)
        if not hard:  # the ELBO's loss has the guide's entropy too
            loss = loss + (q * q.clamp_min(1e-30).log()).sum(-1)
        loss = population @ loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def measured(pair, y, path):
    """The code of data as a file, which is decoded and compared."""
    found = coding.compress(pair, y, path)
    assert torch.equal(torch.from_numpy(coding.decompress(pair, path)), y)
    return found


def digits(options, out):
    """A VAE of 17 grey levels, and the held-out digits by its bound."""
    sets = data.load("digits")
    pair = models.VAE((8, 8), latent=8, likelihood="discretized_logistic", levels=17)
    epochs = 2 if options.smoke else 150
    settings = {"epochs": epochs, "learning_rate": 2e-3, "schedule": "cosine", "seed": options.seed}
    fit(pair, sets["train"], valid=sets["valid"], progress=False, **settings)
    y = sets["test"][: 60 if options.smoke else None].to(torch.uint8)
    result = audit(pair, sets["test"][: len(y)], particles=64)
    found = measured(pair, y, out / "digits.code")
    content = y.numpy().tobytes()
    print(f"a VAE of {len(y)} digits\n{result}\n")
    for name, size in (("bz2", len(bz2.compress(content))), ("xz", len(lzma.compress(content, preset=9)))):
        print(f"{name:4}{size:8,} bytes, {size * 8 * LN2 / len(y):.2f} nats per datum")
    print(f"ours, decoded bit for bit: {found}")
    even = found.break_even(len(bz2.compress(content)) / len(y))
    when = f"from {even:,.0f} digits on" if math.isfinite(even) else "never"
    print(f"with the model of {found.model_bytes:,} bytes it is smaller than bz2 {when}\n")
    return result


def draw(band, bars, path):
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    entropy, loss = zip(*sorted(band), strict=True)
    left.fill_between(entropy, entropy, [h + LN2 for h in entropy], alpha=0.2, label="[H, H + ln 2)")
    left.plot(entropy, loss, ".", label="hard ELBO of Shannon's code")
    left.set(xlabel="entropy H of the population, nats", ylabel="nats per datum")
    left.legend()
    names, values = zip(*bars.items(), strict=True)
    shown = right.barh(names, values, color=["0.7", "0.5", "C0", "C1", "C2"])
    right.bar_label(shown, fmt="%.4f", padding=3)
    right.set_xlim(0, 1.2 * max(values))
    right.invert_yaxis()
    right.set_xlabel("smallest loss, nats per datum")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=2000, help="steps of gradient descent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--cuda", action="store_true", help="accepted for uniformity; tables this small stay on the CPU"
    )
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="a new directory for its files; runs/compress if left out",
    )
    options = parser.parse_args(arguments)
    steps = 300 if options.smoke else options.num_epochs
    torch.manual_seed(options.seed)
    out = options.out or fresh("runs/compress")
    out.mkdir(parents=True, exist_ok=True)

    counts = torch.tensor([30, 20, 15, 10, 8, 6, 5, 3, 2, 1])
    entropy, soft, hard = code_length(counts)
    print(f"Shannon's code: H {entropy:.4f} <= loss {hard:.4f} < H + ln 2 {entropy + LN2:.4f} nats per datum")
    print(f"a deterministic encoder has no entropy to drop: ELBO loss {soft:.4f}")
    many = torch.arange(len(counts)).repeat_interleave(20 * counts)
    shannon = measured(
        ShannonCode(counts / counts.sum()), many[torch.randperm(len(many))], out / "shannon.code"
    )
    print(f"{shannon.coded} data as a file take {shannon.net:.4f} nats per datum\n")
    band = []
    for _ in range(20 if options.smoke else 200):
        some = (torch.rand(10).pow(4) * 100).long() + 1
        h, _, loss = code_length(some)
        assert h - 1e-5 <= loss < h + LN2
        band.append((h, loss))

    population = counts / counts.sum()
    y = torch.arange(len(counts)).repeat_interleave(counts)
    bars, results = {"entropy H(Pop)": entropy}, {}
    for family in ("table", "one row"):
        torch.manual_seed(options.seed + 1)  # the same generator for both
        pair = Table(len(counts), 3, family)
        loss = best_loss(pair, population, steps=steps)
        results[family] = audit(pair, y, particles=256)
        posterior = pair.joint().log_softmax(-1)
        if family == "table":
            cross = -float(population @ pair.joint().logsumexp(-1))
            bars |= {"cross-entropy H(Pop, P)": cross, "ELBO, a row for each y": loss}
            bars["hard ELBO, the same"] = best_loss(pair, population, hard=True, steps=steps)
        else:
            bars["ELBO, one row for all y"] = loss
            # the best single row is the normalized geometric mean of the posteriors
            excess = -float((population @ posterior).logsumexp(0))
            print(
                f"one row for all: excess {loss - cross:.4f}, the smallest mean KL to the posterior "
                f"{excess:.4f}\n"
            )
        print(f"guide: {family}\n{results[family]}\n")
    for name, value in bars.items():
        print(f"{name:26}{value:8.4f}")
    print("picture:", draw(band, bars, out / "coding.png"), "\n")
    results["digits"] = digits(options, out)
    return results


if __name__ == "__main__":
    main()

"""Bach's chorales as piano rolls: hidden Markov models of chords by EM, with 88 keys on or off at each step.

The keys of an HMM are independent given its state. In a neural HMM a small network computes emissions and
transitions from embeddings of the states, so its M-step uses gradients. Printed are nats per time step on the
test chorales.

Data: ``jsb.npz`` (Boulanger-Lewandowski's split of the chorales) in --data-dir; with --smoke, chorales drawn
    from a
random HMM.
"""

import argparse
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroelbo import ExactPair, audit, fit_em, models
from pyroelbo import distributions as ped


class NeuralHMM(ExactPair):
    """An HMM whose transitions and emissions are computed from embeddings of its states."""

    def __init__(self, states, keys, width=32):
        super().__init__()
        self.states = nn.Parameter(torch.randn(states, width))
        self.start = nn.Parameter(torch.zeros(states))
        self.onward = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, states))
        self.keys = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, keys))

    def hmm(self, lengths, steps=None):
        emission = dist.Bernoulli(logits=self.keys(self.states)).to_event(1)
        return ped.HMM(self.start, self.onward(self.states), emission, steps, lengths)

    def model(self, y, lengths):
        within = torch.arange(y.shape[1], device=y.device) < lengths[:, None]
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.hmm(lengths, y.shape[1]).prior)
            keys = dist.Bernoulli(logits=self.keys(self.states)[z]).to_event(1)
            pyro.sample("y", keys.mask(within).to_event(1), obs=y)

    def posterior(self, y, lengths):
        return self.hmm(lengths).posterior(y)

    def log_evidence(self, y, lengths):
        return self.posterior(y, lengths).log_partition


def chorales(folder):
    """Splits (y [B, T, 88], lengths [B])."""
    if folder is None:
        torch.manual_seed(7)
        truth = models.HMM(4, 88, "bernoulli")
        like = (torch.zeros(30, 20, 88), torch.randint(5, 21, (30,)))
        return {split: truth.simulate(30, like=like)[1] for split in ("train", "valid", "test")}
    splits = {}
    with np.load(folder / "jsb.npz", allow_pickle=False) as file:
        for split in ("train", "valid", "test"):
            rolls = torch.from_numpy(np.unpackbits(file[split], axis=1)[:, :88]).float()
            lengths = torch.from_numpy(file[f"{split}_len"]).long()
            y = nn.utils.rnn.pad_sequence(rolls.split(lengths.tolist()), batch_first=True)
            splits[split] = (y, lengths)
    return splits


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("--states", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--smoothing", type=float, default=0.1, help="pseudo-count of every outcome")
    parser.add_argument("--neural-epochs", type=int, default=0, help="0 leaves the neural HMM out")
    parser.add_argument("--data-dir", type=Path, default=None, help="folder of jsb.npz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.states, options.neural_epochs = 3, [3], 2
    elif options.data_dir is None:
        parser.error("--data-dir: expected the folder of jsb.npz, got none; or use --smoke")
    splits = chorales(None if options.smoke else options.data_dir)
    train, valid, test = (splits[s] for s in ("train", "valid", "test"))
    device = "cuda" if options.cuda else None

    def report(name, pair):
        result = audit(pair, test, particles=4)
        print(f"\n{name}\n{result}")
        with torch.no_grad():
            for split, (y, lengths) in (("valid", valid), ("test", test)):
                total = pair.log_evidence(y.to(pair.device), lengths.to(pair.device)).sum()
                print(f"{split}: {float(total / lengths.sum()):.4f} nats a step")
        return result

    results = {}
    for states in options.states:
        torch.manual_seed(options.seed)
        pair = models.HMM(states, 88, "bernoulli", smoothing=options.smoothing)
        pair.initialize(*train)
        fit_em(pair, train, epochs=options.num_epochs, tolerance=1e-3, seed=options.seed, device=device)
        results[f"HMM, {states} states"] = report(f"HMM, {states} states", pair)
    if options.neural_epochs:
        torch.manual_seed(options.seed)
        pair = NeuralHMM(options.states[0], 88)
        settings = {"tolerance": 1e-3, "seed": options.seed, "device": device}
        fit_em(pair, train, epochs=options.neural_epochs, gradient_steps=10, **settings)
        name = f"neural HMM, {options.states[0]} states"
        results[name] = report(name, pair)
    return results


if __name__ == "__main__":
    main()

"""Letters of English as a two-state hidden Markov model: unsupervised, it finds vowels and consonants.

The text is the language reference that ships inside Python (``pydoc_data.topics``), reduced to a … z and the
space. EM starts from small random numbers; each letter is assigned to its more probable state, p(state |
letter). The audit then compares the exact evidence with the bounds of a mean-field guide that sees one letter
at a time: its gap is the information in neighbouring letters.

Source of the idea: Cave and Neuwirth (1980), *Hidden Markov models for English*.
"""

import argparse
import re
from pydoc_data.topics import topics

import torch

from pyroelbo import audit, fit, fit_em, models

LETTERS = " abcdefghijklmnopqrstuvwxyz"


def sequences(length):
    """The whole text as LongTensor [B, length] of 0 … 26."""
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
    symbols = torch.tensor([LETTERS.index(c) for c in text])
    return symbols[: len(symbols) // length * length].view(-1, length)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=150)
    parser.add_argument("--states", type=int, default=2)
    parser.add_argument("--length", type=int, default=100, help="letters in a sequence")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)

    y = sequences(options.length)
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(options.seed))]
    train, test = (y[:40], y[40:60]) if options.smoke else (y[:-200], y[-200:])

    torch.manual_seed(options.seed)
    # A pseudo-count keeps all probabilities positive: the guide of single letters would draw states of
    # probability zero.
    pair = models.HMM(options.states, len(LETTERS), guide="mean_field", smoothing=0.1)
    fit_em(
        pair,
        train,
        epochs=3 if options.smoke else options.num_epochs,
        tolerance=1e-4,
        restarts=1 if options.smoke else options.restarts,
        seed=options.seed,
        device="cuda" if options.cuda else None,
    )
    with torch.no_grad():
        # p(state | letter), from expected counts
        _, counts = pair.e_step(train)
        share = counts["on"] / counts["on"].sum(0)
    for state in range(options.states):
        mine = [(float(share[state, i]), c) for i, c in enumerate(LETTERS) if share[:, i].argmax() == state]
        shown = " ".join(f"{'_' if c == ' ' else c}:{p:.2f}" for p, c in sorted(mine, reverse=True))
        print(f"state {state}: {shown}")

    # The model is kept fixed; the guide of single letters is trained.
    fit(
        pair,
        train,
        epochs=1 if options.smoke else 5,
        batch_size=64,
        learning_rate=2e-2,
        freeze=("prior", "generator"),
        seed=options.seed,
        device="cuda" if options.cuda else None,
    )
    print(result := audit(pair, test, particles=16))
    print(f"evidence a letter: {result['exact'].mean / options.length:.4f} nats")
    return result


if __name__ == "__main__":
    main()

"""Words letter by letter: an autoregressive model as a chain whose encoder drops the last letter.

    [f, u, n, c, t, i, o, n, stop] -> [f, u, n, c, t, i, o, n] -> [f, u, n, c, t, i, o] -> ... -> [f]

Read from right to left this is the generator: each link appends one letter. Dropping a letter is the
generator's own posterior, so the ELBO equals ln p(y): the usual loss of a language model *is* the ELBO of
this pair, and every prefix is a latent site with its own term, ln p(letter | letters before it).

Words have different lengths, so the end is a symbol too. Without it a prefix would be more probable than
every word that begins with it, and the probabilities of all words would not sum to one.

The words are those of the language reference that ships inside Python (``pydoc_data.topics``), each once.

    python examples/words.py --num-epochs 60
"""

import argparse

import torch

from pyroelbo import audit, data, evidence, fit, models


def spell(rows, alphabet):
    """Rows of symbols back to words; -1 is the end and the padding."""
    return ["".join(alphabet[i] for i in row if i >= 0) for row in rows.tolist()]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("-lr", "--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)

    # Rows of symbols, padded with -1: the first -1 of a row is the stop symbol (data.strings makes them).
    words = data.load("words")
    train, test, alphabet = torch.cat([words["train"], words["valid"]]), words["test"], "".join(words.names)
    known = {*spell(train, alphabet), *spell(test, alphabet)}
    if options.smoke:
        options.num_epochs, train, test = 1, train[:200], test[:10]
    print(f"{len(train)} words to train on, {len(test)} held out, an alphabet of {len(alphabet)}: {alphabet}")

    torch.manual_seed(options.seed)
    pair = models.Strings(words.steps, len(alphabet), width=48, layers=2, dropout=0.2)
    # The guide is the exact posterior, so `fit` differentiates ln w without score-function terms.
    fit(
        pair,
        train,
        epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        seed=options.seed,
        device="cuda" if options.cuda else None,
        progress=False,
    )

    # The bound and the likelihood are one number: the rows of this table agree to the last digit.
    result = audit(pair, test, particles=4)
    print(f"\n{result}")

    # What do the letters before one tell? Against letters and stops that are drawn on their own, as often as
    # in training:
    counts = torch.bincount(train[train >= 0], minlength=len(alphabet) + 1).double()
    counts[-1] = len(train)  # one stop a word
    log_p = (counts / counts.sum()).log()
    alone = ((log_p[test] * (test >= 0)).sum(1) + log_p[-1]).mean()
    print(f"\nheld-out words: {result['exact'].mean:.2f} nats a word, {alone:.2f} by letters on their own")

    # Each prefix is a site: which letters are surprising? The last number is that of the stop symbol; padding
    # costs nothing.
    shown = ["function", "functional", "iterator", "qwerty"]
    rows, _ = data.strings(shown, words.steps, alphabet)
    terms = evidence.terms(pair, rows, particles=1)
    print("\n-ln p(letter | those before), nats:")
    for i, word in enumerate(shown):
        costs = [-float(terms.log_model[site][0, i]) for site in (*pair.sites, "y")]
        line = "  ".join(f"{letter} {cost:.1f}" for letter, cost in zip(f"{word}.", costs, strict=False))
        print(f"  {line}  = {sum(costs):.1f}")

    torch.manual_seed(options.seed)
    drawn = spell(pair.simulate(40)[1], alphabet)
    new = [word for word in drawn if word not in known]
    print(f"\n40 words drawn, {len(new)} of them new: {' '.join(drawn)}")
    return result


if __name__ == "__main__":
    main()

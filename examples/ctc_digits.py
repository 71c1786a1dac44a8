"""Reading numbers column by column, without knowing where a digit is.

Handwritten digits are joined into strings, with gaps of random width between them. The pair is given a
string's columns of pixels, one per frame, and its labels, but not which column belongs to which digit: that
is the alignment, the latent. ln p(labels | columns) sums over all alignments exactly, so `fit` maximizes the
evidence itself, and the posterior over alignments shows where each digit was found. Test strings are made of
other images than training strings.

The audit then compares the exact evidence with the bounds of a guide whose alignment depends on one column at
a time.

Source: Graves, Fernández, Gomez, Schmidhuber (2006), *Connectionist temporal classification*.
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models
from pyroelbo.runs import fresh


def edits(a, b):
    """Edit distance: the smallest number of insertions, deletions and replacements."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def label_error_rate(pair, batch):
    """Edit distance of the transcripts, per label."""
    x, y, lengths = batch
    guessed = pair.eval().transcribe(x, lengths)
    pairs = [
        ([s for s in a if s >= 0], [s for s in b if s >= 0])
        for a, b in zip(guessed.tolist(), y.tolist(), strict=True)
    ]
    return sum(edits(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def draw_alignments(path, pair, batch):
    """Each string of digits, and above it the posterior over its columns' symbols given the labels."""
    from matplotlib.figure import Figure

    x, y, lengths = batch
    with torch.no_grad():
        (marginals,) = pair.posterior(x, y, lengths).marginals
    read = pair.transcribe(x, lengths)
    figure = Figure(figsize=(11, 3.6 * len(x)), layout="constrained")
    axes = figure.subplots(2 * len(x), 1, height_ratios=[11, 8] * len(x))
    for i, steps in enumerate(lengths.tolist()):
        above, below = axes[2 * i], axes[2 * i + 1]
        above.imshow(marginals[i, :steps].t().numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        above.set_yticks(range(11), ["blank", *"0123456789"], fontsize=7)
        truth, guess = ("".join(str(s - 1) for s in row.tolist() if s > 0) for row in (y[i], read[i]))
        above.set_title(
            f"p(symbol of each column | columns, {truth}); read without the labels: {guess}", fontsize=9
        )
        below.imshow(x[i, :steps].t().numpy(), cmap="gray_r", aspect="auto")
        below.set_yticks([])
        for axis in (above, below):
            axis.set_xticks([])
    below.set_xlabel("column")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=12)
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("-lr", "--learning-rate", type=float, default=3e-3)
    parser.add_argument("--data", type=int, default=3000, help="strings to learn from")
    parser.add_argument("--width", type=int, default=64, help="channels of the network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory for the picture")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.data, options.width = 1, 64, 8
    out = options.out or fresh("runs/ctc_digits")

    # (columns [B, T, 8], labels [B, L] from 1 on, padded with -1, lengths [B]); each split has its own images
    strings = data.load("digit_strings")
    train = tuple(part[: options.data] for part in strings["train"])
    valid, test = strings["valid"], tuple(part[: 40 if options.smoke else 500] for part in strings["test"])

    torch.manual_seed(options.seed)
    pair = models.CTC(8, 10, options.width)
    fit(
        pair,
        train,
        valid=valid,
        epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        seed=options.seed,
        device="cuda" if options.cuda else None,
    )
    pair.to("cpu")
    print(f"\n{'strings':<10} {'nats a label':>12} {'label error rate':>18}")
    for name, batch in (("train", tuple(part[:500] for part in train)), ("test", test)):
        with torch.no_grad():
            nats = float(pair.log_evidence(*batch).sum() / (batch[1] > 0).sum())
        print(f"{name:<10} {nats:>12.4f} {label_error_rate(pair, batch):>17.1%}")
    print("picture:", draw_alignments(out / "alignments.png", pair, tuple(part[:3] for part in test)), "\n")

    # The same generator with a guide whose alignment depends on one column at a time.
    local = models.CTC(8, 10, options.width, guide="local")
    local.generator.load_state_dict(pair.generator.state_dict())
    few = tuple(part[:200] for part in train)
    fit(
        local,
        few,
        epochs=1 if options.smoke else 20,
        batch_size=20,
        learning_rate=5e-2,
        freeze=("generator",),
        seed=options.seed,
    )
    print(result := audit(local, tuple(part[:100] for part in test), particles=16))
    return result


if __name__ == "__main__":
    main()

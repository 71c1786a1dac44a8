"""A grammar of Python, learned from token sequences alone.

Expressions in the sources of Python's standard library are split into tokens (names, numbers and strings lose
their spelling). A probabilistic context-free grammar is fitted to them by EM, without any parse, from several
random starts, of which held-out evidence selects one. Its trees are then compared with those of Python's
parser `ast` by the F1 of unlabelled brackets, as are right-branching, left-branching and random trees.

Source of the idea: Lari and Young (1990), *The estimation of stochastic context-free grammars using the
inside-outside algorithm*; Goodman (1996) for decoding by expected brackets.
"""

import argparse
import ast
import io
import keyword
import sysconfig
import tokenize
from collections import Counter
from pathlib import Path

import torch

from pyroelbo import audit, fit, fit_em, models
from pyroelbo import distributions as ped
from pyroelbo.runs import fresh

KINDS = {tokenize.NUMBER: "number", tokenize.STRING: "string"}


def expressions(files, longest):
    """Distinct expressions of 3 … ``longest`` tokens: {tokens: their brackets by ast}.

    A bracket is (first, last) token of a syntax node with more than one token and less than all of them.
    """
    found = {}
    for path in files:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):
            continue
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.string.strip()]
        starts = {t.start: i for i, t in enumerate(tokens)}
        ends = {t.end: i for i, t in enumerate(tokens)}
        lines = source.splitlines()
        for statement in ast.walk(tree):
            # the value of an assignment or a return, a condition, a bare expression
            node = getattr(statement, "test", None) or getattr(statement, "value", None)
            if not isinstance(statement, ast.stmt) or not isinstance(node, ast.expr):
                continue
            # ast counts bytes, tokenize characters: the two agree on one ASCII line
            if node.lineno != node.end_lineno or not lines[node.lineno - 1].isascii():
                continue

            whole = span(node, starts, ends)
            if whole is None or not 3 <= whole[1] - whole[0] + 1 <= longest:
                continue
            parts = {span(part, starts, ends) for part in ast.walk(node) if hasattr(part, "lineno")} - {
                whole,
                None,
            }
            brackets = frozenset((i - whole[0], j - whole[0]) for i, j in parts if i < j)
            words = tuple(spelling(t) for t in tokens[whole[0] : whole[1] + 1])
            found.setdefault(words, brackets)
    return found


def span(node, starts, ends):
    """(first, last) token of a syntax node; None if it does not begin and end with a token."""
    first = starts.get((node.lineno, node.col_offset))
    last = ends.get((node.end_lineno, node.end_col_offset))
    return None if first is None or last is None else (first, last)


def spelling(token):
    if token.type in KINDS:
        return KINDS[token.type]
    return "name" if token.type == tokenize.NAME and not keyword.iskeyword(token.string) else token.string


def counts(brackets, gold):
    """Numbers of (correct, predicted, true) brackets of charts [B, L, L]; the true ones are ast's."""
    right = guessed = wanted = 0
    for chart, truth in zip(brackets.tolist(), gold, strict=True):
        length = sum(chart[i][i] for i in range(len(chart)))
        guess = {(i, j) for i in range(length) for j in range(i + 1, length) if chart[i][j]} - {
            (0, length - 1)
        }
        right, guessed, wanted = right + len(guess & truth), guessed + len(guess), wanted + len(truth)
    return right, guessed, wanted


def f1(brackets, gold):
    right, guessed, wanted = counts(brackets, gold)
    return 2 * right / (guessed + wanted)


def baselines(y):
    """Uninformed trees: right-branching, left-branching and uniformly random ones."""
    index, lengths = torch.arange(y.shape[1]), (y >= 0).sum(1)
    inside = (index[:, None] <= index) & (index < lengths[:, None])[:, None, :]
    leaf = index[:, None] == index
    # one symbol and one rule: all binary trees are equally probable
    one = ped.PCFG(torch.zeros(1), torch.zeros(1, 2, 2), torch.zeros(1, int(y.max()) + 1))
    return {
        "right-branching": inside & (leaf | (index == lengths[:, None] - 1)[:, None, :]),
        "left-branching": inside & (leaf | (index == 0)[:, None]),
        "random trees": one.posterior(y).sample() >= 0,
    }


def draw_trees(path, charts, sentences, gold):
    """Parsed expressions; brackets that agree with ast are green, others grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.9 * ((len(charts) + 1) // 2)), layout="constrained")
    axes = figure.subplots((len(charts) + 1) // 2, 2, squeeze=False).flatten()
    for axis, chart, words, truth in zip(axes, charts.tolist(), sentences, gold, strict=False):
        whole = (0, len(words) - 1)

        def place(i, j, axis=axis, chart=chart, truth=truth, whole=whole):
            """Draw the tree over i … j and return the position of its root."""
            if i == j:
                return i, 0
            split = next(k for k in range(i, j) if chart[i][k] and chart[k + 1][j])
            x, y = (i + j) / 2, j - i
            agreed = (i, j) in truth or (i, j) == whole
            colour = "tab:green" if agreed else "lightgrey"
            for u, v in (place(i, split), place(split + 1, j)):
                axis.plot([x, u], [y, v], color=colour, lw=2 if agreed else 1.2, zorder=1)
            axis.plot(x, y, "o", ms=4, color=colour, zorder=2)
            return x, y

        place(*whole)
        for i, word in enumerate(words):
            axis.text(i, -0.5, word, ha="center", va="top", fontsize=9, family="monospace")
        axis.set_ylim(-0.25 * len(words), None)
        right, guessed, wanted = counts(torch.tensor([chart]), [truth])
        axis.set_title(f"{right} of ast's {wanted} brackets, {guessed} drawn", fontsize=9)
    for axis in axes:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("--nonterminals", type=int, default=5)
    parser.add_argument("--preterminals", type=int, default=20)
    parser.add_argument("--longest", type=int, default=12, help="tokens in an expression, at most")
    parser.add_argument("--data", type=int, default=1500, help="expressions to learn from")
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--smoothing", type=float, default=0.05, help="pseudo-count of every rule and word")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory for the picture")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.restarts, options.data = 3, 2, 40
        options.nonterminals, options.preterminals, options.longest = 2, 8, 7
    out = options.out or fresh("runs/grammar")

    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = expressions(files[:8] if options.smoke else files, options.longest)
    # Rare tokens would make the alphabet long.
    often = {word for word, n in Counter(w for words in found for w in set(words)).items() if n >= 5}
    sentences = [words for words in sorted(found) if often.issuperset(words)]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(options.seed)).tolist()
    sentences = [sentences[i] for i in order[: options.data + 600]]
    alphabet = sorted({w for words in sentences for w in words})
    index = {word: i for i, word in enumerate(alphabet)}
    y = torch.full((len(sentences), options.longest), -1)
    for row, words in enumerate(sentences):
        y[row, : len(words)] = torch.tensor([index[w] for w in words])
    # All token sequences are distinct, so held-out ones are new.
    train, valid, test = y[: -2 * (held := 15 if options.smoke else 300)], y[-2 * held : -held], y[-held:]
    gold = [found[words] for words in sentences[-held:]]
    print(f"{len(train)} expressions of {len(files)} files, {len(alphabet)} different tokens; {held} to test")

    # Each start ends in a different local optimum. Held-out evidence selects one; brackets are only reported.
    best, chosen = -float("inf"), None
    print(f"\n{'start':>6} {'train':>8} {'valid':>8}  nats a token {'bracket F1':>12}")
    for start in range(options.restarts):
        torch.manual_seed(options.seed + start)
        pair = models.PCFG(
            options.nonterminals,
            options.preterminals,
            len(alphabet),
            guide="mean_field",
            smoothing=options.smoothing,
        )
        pair.initialize(train)
        fit_em(pair, train, epochs=options.num_epochs, tolerance=1e-4, seed=options.seed + start)
        with torch.no_grad():
            nats = [float(pair.log_evidence(part).sum() / (part >= 0).sum()) for part in (train, valid)]
        print(f"{start:>6} {nats[0]:>8.4f} {nats[1]:>8.4f}  {'':>12} {f1(pair.brackets(test), gold):>12.3f}")
        if nats[1] > best:
            best, chosen = nats[1], pair
    pair = chosen

    with torch.no_grad():
        nats = float(pair.log_evidence(test).sum() / (test >= 0).sum())
    print(f"\nthe best on held-out evidence has {nats:.4f} nats a token on the test expressions\n")
    charts = pair.brackets(test)
    trees = {"learned grammar": charts, **baselines(test)}
    print(f"{'trees':<28} {'precision':>9} {'recall':>7} {'F1':>6}")
    for name, chart in trees.items():
        right, guessed, wanted = counts(chart, gold)
        print(f"{name:<28} {right / guessed:>9.3f} {right / wanted:>7.3f} {f1(chart, gold):>6.3f}")
    # ast's nodes may have many children, ours have two: the best binary tree has all of ast's brackets and
    # some more.
    print(
        f"{'best binary trees':<28} {wanted / guessed:>9.3f} {1:>7.3f} "
        f"{2 * wanted / (guessed + wanted):>6.3f}"
    )

    shown = ([i for i in range(held) if len(gold[i]) >= 2] or list(range(held)))[:6]
    picture = draw_trees(
        out / "trees.png", charts[shown], [sentences[-held:][i] for i in shown], [gold[i] for i in shown]
    )
    print("picture:", picture)

    # The grammar is kept fixed; a guide without rules, which sees only the words at the ends of a span, is
    # trained.
    fit(
        pair,
        train,
        epochs=1 if options.smoke else 10,
        batch_size=64,
        learning_rate=3e-2,
        freeze=("prior", "generator"),
        seed=options.seed,
    )
    print(result := audit(pair, test[:50], particles=16))
    return result


if __name__ == "__main__":
    main()

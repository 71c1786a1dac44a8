"""Does a small stochastic grammar fold RNA? F1 of base pairs against counting pairs (Nussinov) and nothing.

The grammar is that of Knudsen and Hein (1999), S → LS | L, L → s | dFd', F → dFd' | LS, brought into binary
form: a preterminal "( a" opens a pair with base a, a nonterminal X_a remembers a until "b )" closes it. Rules
are learned from the training structures: with the brackets as part of the words each sequence has one
derivation, so that a single step of EM counts its rules (supervised). For prediction the words are bases
alone. Structures are the best tree, and the one of maximum expected accuracy (pairs weigh 2 γ p_ij, unpaired
bases 1 - Σ p). Both, and Nussinov's maximum number of pairs, are modes of one dynamic program with other
potentials.

Data: ``rna_bprna_short.json.gz`` (10 to 100 bases, its own split, made by hash: families leak from training
to test). It prints a table and one JSON line; --data-dir, or $PYROELBO_DATA, says where the file lies.

Source: Knudsen and Hein (1999), *RNA secondary structure prediction using stochastic context-free grammars*;
Dowell and Eddy (2004); Nussinov and Jacobson (1980).
"""

import argparse
import gzip
import json
import math
import os
import platform
import time
from pathlib import Path

import torch

from pyroelbo import distributions as ped
from pyroelbo import fit_em, models

BASES = "ACGU"
CANONICAL = ("AU", "CG", "GC", "GU", "UA", "UG")
LOOP = 3  # bases that a hairpin holds at least, for Nussinov


# Nonterminals S, L, F and X_a, a pair opened by base a; preterminals "( a", "b )", an unpaired base as L and
# as S.
S, L, F, X = 0, 1, 2, range(3, 7)
OPEN, CLOSE, SINGLE, LAST = range(7, 11), range(11, 15), 15, 16


def rules():
    """Log potentials [7, 17, 17], 0 for the allowed rules."""
    allowed = torch.full((7, 17, 17), -math.inf)
    for parent in (S, F):
        for left in (L, SINGLE):
            for right in (S, LAST):
                allowed[parent, left, right] = 0.0
    for a in range(4):
        allowed[[S, L, F], OPEN[a], X[a]] = 0.0
        allowed[X[a], F, list(CLOSE)] = 0.0
    return allowed


def words():
    """Which of the twelve words "( a", "b )", ". a" a preterminal may write, [10, 12]."""
    allowed = torch.full((10, 12), -math.inf)
    for i in range(8):
        allowed[i, i] = 0.0
    allowed[8:, 8:] = 0.0
    return allowed


def pairs_of(structure):
    stack, found = [], set()
    for i, c in enumerate(structure):
        if c == "(":
            stack.append(i)
        elif c == ")":
            found.add((stack.pop(), i))
    return found


def padded(rows):
    y = torch.full((len(rows), max(map(len, rows))), -1)
    for i, row in enumerate(rows):
        y[i, : len(row)] = torch.tensor(row)
    return y


def annotated(rows):
    return padded(
        [["().".index(c) * 4 + BASES.index(b) for b, c in zip(s, z, strict=True)] for _, s, z in rows]
    )


def train(rows):
    """The grammar over bases, its rules counted in the structures."""
    pair, y = models.PCFG(7, 10, 12), annotated(rows)
    with torch.no_grad():
        pair.prior.start.copy_(torch.where(torch.arange(7) == S, 0.0, -math.inf))
        pair.prior.rules.copy_(rules())
        pair.generator.words.copy_(words())
        # One derivation each: what a step of EM counts is what the structures say.
        assert pair.posterior(y[:50]).entropy().max() < 1e-3
    fit_em(pair, y, epochs=1, batch_size=64)
    bases = models.PCFG(7, 10, 4)
    with torch.no_grad():
        bases.prior.load_state_dict(pair.prior.state_dict())
        bases.generator.words.copy_(pair.generator.words.log_softmax(-1).view(10, 3, 4).logsumexp(1))
    return bases


def best_structure(paired, unpaired, lengths):
    """The nested structure with the largest sum of ``paired [B, L, L]`` and ``unpaired [B, L]``: pairs [B, L,
    L].
    """
    # one base is enough where the grammar only says what a structure is
    keep = torch.tensor([S, L, F, X[0], OPEN[0], CLOSE[0], SINGLE, LAST])
    spans = torch.zeros(*paired.shape, 4)
    spans[:, 1:, :, 3] = paired[:, :-1]  # the pair (i, j) is an X over i + 1 … j
    leaves = torch.zeros(*unpaired.shape, 4)
    leaves[..., 2:] = unpaired[..., None]
    root = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    structure = rules()[keep[:4]][:, keep][:, :, keep][None]
    chart = ped.ParseTree(root, structure, leaves, spans, lengths, validate_args=False).mode
    return pairs_in(chart == 3)


def pairs_in(closing):
    """Where an X begins one base after its pair does: [B, L, L] shifted up by a row."""
    return torch.nn.functional.pad(closing[:, 1:], (0, 0, 0, 1))


def nussinov(y, lengths):
    """The largest number of canonical pairs whose hairpins hold ``LOOP`` bases."""
    allowed = torch.zeros(5, 5, dtype=torch.bool)
    for a, b in CANONICAL:
        allowed[BASES.index(a), BASES.index(b)] = True
    index = torch.arange(y.shape[1])
    good = allowed[y][torch.arange(len(y))[:, None, None], index[:, None], y[:, None, :]]
    good &= index - index[:, None] > LOOP
    return best_structure(torch.where(good, 1.0, -math.inf), torch.zeros(y.shape), lengths)


def predict(pair, y, gammas):
    """{name: pairs [B, L, L]} of one batch."""
    lengths, posterior = (y >= 0).sum(1), pair.posterior(y)
    p = pairs_in(posterior.marginals[3][..., list(X)].sum(-1)).clamp(0, 1)
    alone = (1 - p.sum(1) - p.sum(2)).clamp(0, 1)
    found = {f"expected accuracy, γ={g:g}": best_structure(2 * g * p, alone, lengths) for g in gammas}
    chart = posterior.mode
    found["best tree"] = pairs_in((chart >= X[0]) & (chart <= X[3]))
    return found


def score(found, rows):
    """Counts and F1 over all pairs, and the mean F1 of a sequence with its standard error."""
    right = guessed = wanted = 0
    each = []
    for guess, (_, _, structure) in zip(found, rows, strict=True):
        truth, guess = pairs_of(structure), set(map(tuple, guess.nonzero().tolist()))
        hits = len(guess & truth)
        right, guessed, wanted = right + hits, guessed + len(guess), wanted + len(truth)
        each.append(2 * hits / (len(guess) + len(truth)) if guess or truth else 1.0)
    each = torch.tensor(each)
    return {
        "precision": right / guessed if guessed else 0.0,
        "recall": right / wanted,
        "f1": 2 * right / (guessed + wanted),
        "mean_f1": float(each.mean()),
        "stderr": float(each.std() / len(each) ** 0.5),
    }


@torch.no_grad()
def collect(rows, batch, answer):
    """``answer(y)`` on batches of similar lengths, its matrices in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
    found = {}
    for start in range(0, len(rows), batch):
        part = order[start : start + batch]
        for name, pairs in answer(padded([[BASES.index(b) for b in rows[i][1]] for i in part])).items():
            for i, matrix in zip(part, pairs, strict=True):
                found.setdefault(name, {})[i] = matrix
    return {name: [matrices[i] for i in range(len(rows))] for name, matrices in found.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gammas", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument(
        "--train", type=int, default=None, help="the first sequences of the training split; all"
    )
    parser.add_argument(
        "--test", type=int, default=None, help="that many sequences of the split, at random; all"
    )
    parser.add_argument("--split", default="test", choices=("valid", "test"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("PYROELBO_DATA"))
    options = parser.parse_args(arguments)
    if options.data_dir is None:
        parser.error("say by --data-dir, or PYROELBO_DATA, where rna_bprna_short.json.gz lies")
    with gzip.open(Path(options.data_dir) / "rna_bprna_short.json.gz", "rt") as file:
        splits = json.load(file)
    generator = torch.Generator().manual_seed(options.seed)

    def some(rows, count):
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]

    # The grammar needs two bases in every hairpin; the few structures with fewer are left out of training.
    learn = [
        row for row in some(splits["train"], options.train) if all(j - i > 2 for i, j in pairs_of(row[2]))
    ]
    rows = some(splits[options.split], options.test)
    began = time.perf_counter()
    pair = train(learn)
    seconds = {"train": round(time.perf_counter() - began)}
    began = time.perf_counter()
    found = collect(rows, options.batch_size, lambda y: predict(pair, y, options.gammas))
    seconds["predict"] = round(time.perf_counter() - began)
    found |= collect(rows, options.batch_size, lambda y: {"Nussinov": nussinov(y, (y >= 0).sum(1))})
    found["empty"] = [matrix & False for matrix in found["Nussinov"]]
    print(f"\n{len(learn)} structures to learn from, {len(rows)} of the {options.split} split")
    print(f"{'structures':<26} {'precision':>9} {'recall':>7} {'F1':>6}   mean F1 of a sequence")
    table = {name: score(matrices, rows) for name, matrices in found.items()}
    for name, row in table.items():
        print(
            f"{name:<26} {row['precision']:>9.3f} {row['recall']:>7.3f} {row['f1']:>6.3f}   "
            f"{row['mean_f1']:.3f} ± {row['stderr']:.3f}"
        )
    settings = {k: v for k, v in vars(options).items() if k != "data_dir"}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": "rna", **settings, "seconds": seconds, **table, **machine}))


if __name__ == "__main__":
    main()

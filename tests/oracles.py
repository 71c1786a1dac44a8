"""Brute force in plain Python: every structure with its log weight. Never imports the semiring."""

import itertools
import math


def parse_trees(root, rules, leaves, spans):
    """All labelled binary trees over the words: a list of (chart as nested lists, log weight)."""
    n, p, words = len(root), len(leaves[0]), len(leaves)

    def under(first, last):
        if first == last:
            return [([(first, last, n + a)], leaves[first][a]) for a in range(p)]
        found = []
        for split in range(first, last):
            for (left, u), (right, v) in itertools.product(under(first, split), under(split + 1, last)):
                for a in range(n):
                    weight = u + v + rules[a][left[0][2]][right[0][2]] + spans[first][last][a]
                    found.append(([(first, last, a), *left, *right], weight))
        return found

    trees = []
    for nodes, weight in under(0, words - 1) if words > 1 else []:
        chart = [[-1] * words for _ in range(words)]
        for first, last, label in nodes:
            chart[first][last] = label
        trees.append((chart, weight + root[nodes[0][2]]))
    return trees


def alignments(log_probs, target, blank=0):
    """All paths that collapse to the target: a list of (path, log weight)."""
    found = []
    for path in itertools.product(range(len(log_probs[0])), repeat=len(log_probs)):
        merged = [c for c, _ in itertools.groupby(path)]
        if [c for c in merged if c != blank] == list(target):
            found.append((list(path), sum(row[c] for row, c in zip(log_probs, path, strict=True))))
    return found


def log_total(weights):
    """ln Σ exp over a list of floats."""
    peak = max(weights, default=-math.inf)
    return peak if peak == -math.inf else peak + math.log(math.fsum(math.exp(w - peak) for w in weights))

"""Exact answers by listing everything, in plain Python: no semiring, nothing of the library.

An enumerator of structures yields ``(labels, log weight, use)`` for one datum, ``use`` counting the parts
that the structure uses as ``{part name: {index: count}}``. ``Listing`` answers every question from such a
list.
"""

import itertools
import math
from collections import Counter


def log_sum_exp(numbers):
    numbers = list(numbers)
    top = max(numbers, default=-math.inf)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(x - top) for x in numbers))


class Listing:
    """All structures of one datum with their log weights and parts."""

    def __init__(self, items):
        self.items = list(items)
        self.log_partition = log_sum_exp(w for _, w, _ in self.items)
        self.log_prob = {labels: w - self.log_partition for labels, w, _ in self.items if w > -math.inf}
        assert len({labels for labels, _, _ in self.items}) == len(self.items)

    def best(self, k):
        return sorted(self.log_prob.items(), key=lambda item: -item[1])[:k]

    def marginals(self):
        expected = {}
        for labels, _, use in self.items:
            if labels in self.log_prob:
                for name, counts in use.items():
                    for index, count in counts.items():
                        expected.setdefault(name, Counter())[index] += count * math.exp(self.log_prob[labels])
        return expected

    def entropy(self):
        return -math.fsum(math.exp(w) * w for w in self.log_prob.values())

    def cross_entropy(self, other):
        if any(labels not in other.log_prob for labels in self.log_prob):
            return math.inf
        return -math.fsum(math.exp(w) * other.log_prob[labels] for labels, w in self.log_prob.items())


def chains(initial, transition, observation, length=None):
    """Label sequences of a linear chain; ``transition`` is [S][S], or [T-1][S][S]. Labels are padded with
    0.
    """
    steps, states = len(observation), len(initial)
    length = steps if length is None else length
    varying = steps > 1 and isinstance(transition[0][0], list)
    for z in itertools.product(range(states), repeat=length):
        use = {"initial": Counter([(z[0],)]), "transition": Counter(), "observation": Counter(enumerate(z))}
        weight = initial[z[0]] + sum(observation[t][s] for t, s in enumerate(z))
        for t in range(length - 1):
            if varying:
                weight += transition[t][z[t]][z[t + 1]]
                use["transition"][(t, z[t], z[t + 1])] += 1
            else:
                weight += transition[z[t]][z[t + 1]]
                use["transition"][(z[t], z[t + 1])] += 1
        yield z + (0,) * (steps - length), weight, use


def segmentations(initial, transition, duration, observation, start, length=None):
    """Segmentations of a semi-Markov chain; a label is the state, plus S where a segment starts; padded with
    0.
    """
    steps, states = len(observation), len(initial)
    length = steps if length is None else length

    def grow(at, previous):
        if at == length:
            yield (), 0.0, []
            return
        for s in range(states):
            enter = initial[s] if previous is None else transition[previous][s]
            for d in range(1, min(len(duration[s]), length - at) + 1):
                own = (
                    enter + duration[s][d - 1] + start[at][s] + sum(observation[at + i][s] for i in range(d))
                )
                for labels, weight, rest in grow(at + d, s):
                    yield (s + states, *[s] * (d - 1), *labels), own + weight, [(previous, s, at, d), *rest]

    for labels, weight, segments in grow(0, None):
        use = {name: Counter() for name in ("initial", "transition", "duration", "observation", "start")}
        for previous, s, at, d in segments:
            if previous is None:
                use["initial"][(s,)] += 1
            else:
                use["transition"][(previous, s)] += 1
            use["duration"][(s, d - 1)] += 1
            use["start"][(at, s)] += 1
            use["observation"].update((at + i, s) for i in range(d))
        yield labels + (0,) * (steps - length), weight, use


def labelled_trees(parents, node, edge):
    """Labellings of a given tree; ``edge`` is [S][S] (parent, child), or [N][S][S]."""
    nodes, states = len(node), len(node[0])
    varying = isinstance(edge[0][0], list)
    for z in itertools.product(range(states), repeat=nodes):
        use = {"node": Counter(enumerate(z)), "edge": Counter()}
        weight = sum(node[n][s] for n, s in enumerate(z))
        for n, above in enumerate(parents):
            if above >= 0:
                pair = (z[above], z[n])
                weight += edge[n][pair[0]][pair[1]] if varying else edge[pair[0]][pair[1]]
                use["edge"][(n, *pair) if varying else pair] += 1
        yield z, weight, use


def forward_backward(initial, transition, observation):
    """ln Z, marginals [T][S], expected steps [S][S] and best score of a chain, by loops in log space."""
    states, steps = range(len(initial)), len(observation)
    alpha = [[initial[s] + observation[0][s] for s in states]]
    best = alpha[0]
    for row in observation[1:]:
        last = alpha[-1]
        alpha.append([log_sum_exp(last[i] + transition[i][j] for i in states) + row[j] for j in states])
        best = [max(best[i] + transition[i][j] for i in states) + row[j] for j in states]
    log_z = log_sum_exp(alpha[-1])
    beta = [0.0 for _ in states]
    marginals, expected = [], [[0.0 for _ in states] for _ in states]
    if log_z == -math.inf:
        return log_z, [[0.0 for _ in states] for _ in observation], expected, max(best)
    for t in range(steps - 1, -1, -1):
        marginals.append([math.exp(alpha[t][s] + beta[s] - log_z) for s in states])
        if t:
            ahead = [[transition[i][j] + observation[t][j] + beta[j] for j in states] for i in states]
            for i in states:
                for j in states:
                    expected[i][j] += math.exp(alpha[t - 1][i] + ahead[i][j] - log_z)
            beta = [log_sum_exp(ahead[i]) for i in states]
    return log_z, marginals[::-1], expected, max(best)


def parse_trees(root, rules, leaves, spans, length=None):
    """Labelled binary trees over the words; labels are a chart, row after row, -1 where no node."""
    words, n = len(leaves), len(root)
    length = words if length is None else length

    def grow(first, last):
        if first == last:
            for p, weight in enumerate(leaves[first]):
                yield n + p, weight, [(first, last, n + p)], []
            return
        for split in range(first, last):
            both = itertools.product(list(grow(first, split)), list(grow(split + 1, last)), range(n))
            for (left, u, nodes, used), (right, v, others, also), a in both:
                weight = u + v + rules[a][left][right] + spans[first][last][a]
                yield a, weight, [(first, last, a), *nodes, *others], [(a, left, right), *used, *also]

    for label, weight, nodes, used in grow(0, length - 1) if length > 1 else ():
        chart = [-1] * (words * words)
        for first, last, symbol in nodes:
            chart[first * words + last] = symbol
        use = {
            "root": Counter([(label,)]),
            "rules": Counter(used),
            "leaves": Counter((i, symbol - n) for i, j, symbol in nodes if i == j),
            "spans": Counter(node for node in nodes if node[0] < node[1]),
        }
        yield tuple(chart), root[label] + weight, use


def alignments(emission, target, blank=0, length=None):
    """Symbol sequences that give the target once repeats are merged and blanks left out; padded with 0."""
    steps = len(emission)
    length = steps if length is None else length
    for path in itertools.product(range(len(emission[0])), repeat=length):
        merged = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol for symbol in merged if symbol != blank] == target:
            weight = sum(emission[t][symbol] for t, symbol in enumerate(path))
            yield path + (0,) * (steps - length), weight, {"emission": Counter(enumerate(path))}


def models_of(clauses, literal):
    """Assignments of 0 and 1 that satisfy every clause, weighted by ``literal[i][z_i]``."""
    for z in itertools.product((0, 1), repeat=len(literal)):
        if all(any(z[abs(x) - 1] == (x > 0) for x in clause) for clause in clauses):
            weight = sum(literal[i][v] for i, v in enumerate(z))
            yield z, weight, {"literal": Counter(enumerate(z))}

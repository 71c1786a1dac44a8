"""Hard grammars, alignments and linear-Gaussian chains, ours beside the peers, for ``hard_cases``.

Grammars and alignments are small enough to list; the chains of Gaussians are scalar, filtered with 60 digits.
"""

import math
from decimal import Decimal, getcontext

import pyro.distributions as dist
import torch

from pyroelbo.distributions import CTC, LinearGaussianChain, ParseTree
from tests.oracles import Listing, alignments, parse_trees

DTYPES = ("float32", "float64")


def judge(value, inputs, log_z, expected=None):
    """Whether values of a batch and their gradient by ``inputs`` are right; finite will do if not told."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    try:
        found = value(*leaves)
        gradients = torch.autograd.grad(found.sum(), leaves, allow_unused=True, materialize_grads=True)
    except Exception as error:
        return f"raises {type(error).__name__}"
    for one, true in zip(found.tolist(), log_z, strict=True):
        if not (one == true or (math.isfinite(true) and abs(one - true) <= 1e-5 * abs(true))):
            return f"{one:.6g} for {true:.6g}"
    if not all(g.isfinite().all() for g in gradients):
        return "gradient not finite"
    if expected is None:
        return "right"
    off = max(
        ((g - e).abs() / e.abs().clamp(min=1)).max().item() for g, e in zip(gradients, expected, strict=True)
    )
    return "right" if off < 1e-4 else f"gradient off by {off:.2g}"


def grammar_cases():
    def sparse(root, rules, leaves):
        rules[torch.rand(rules.shape) < 0.6] = -math.inf

    def unparsable(root, rules, leaves):
        leaves[1, 2] = -math.inf

    def needed(depth):
        def change(root, rules, leaves):
            rules[:, 1] += depth
            root[:, 0] = -math.inf

        return change

    cases = {
        "sparse grammar": sparse,
        "an unparsable sentence in a batch": unparsable,
        "a label of e^-120 in every span is needed": needed(-120.0),
        "a label of e^-800 in every span is needed": needed(-800.0),
    }
    values, notes = {"ours": lambda *parts: ParseTree(*parts).log_partition}, []
    try:
        from torch_struct import SentCFG

        def peer(root, rules, leaves):
            return SentCFG((leaves, rules, root), torch.full((len(root),), leaves.shape[1])).partition

        values["torch_struct"] = peer
    except ImportError:
        notes.append("torch_struct: not installed, skipped")
    for case, change in cases.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            parts = [torch.randn(3, 2), torch.randn(3, 2, 4, 4), torch.randn(3, 4, 2)]
            change(*parts)
            parts = [x.to(getattr(torch, dtype)) for x in parts]
            nothing = torch.zeros(4, 4, 2).tolist()
            lists = [Listing(parse_trees(*(x[b].tolist() for x in parts), nothing)) for b in range(3)]
            expected = [torch.zeros_like(x) for x in parts]
            for b, one in enumerate(lists):
                for name, target in zip(("root", "rules", "leaves"), expected, strict=True):
                    for index, count in one.marginals().get(name, {}).items():
                        target[(b, *index)] = count
            log_z = [one.log_partition for one in lists]
            told = {name: judge(value, parts, log_z, expected) for name, value in values.items()}
            yield case, dtype, told, notes


def alignment_cases():
    cases = {
        "no probability for unused symbols": lambda x, y: x[..., 4:].fill_(-math.inf),
        "an infeasible target in a batch": lambda x, y: y[1].fill_(1),
        "a needed symbol of e^-120": lambda x, y: x[..., 1].sub_(120.0),
        "a needed symbol of e^-800": lambda x, y: x[..., 1].sub_(800.0),
        "blanks impossible late": lambda x, y: x[:, 3:, 0].fill_(-math.inf),
    }

    def native(logits, target):
        log_probs = logits.log_softmax(-1).transpose(0, 1)
        lengths = torch.full((3,), 5), torch.full((3,), 3)
        return -torch.nn.functional.ctc_loss(log_probs, target, *lengths, reduction="none")

    for case, change in cases.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            logits, target = torch.randn(3, 5, 6), torch.tensor([[1, 2, 3], [2, 1, 2], [1, 1, 3]])
            change(logits, target)
            logits = logits.to(getattr(torch, dtype))
            log_probs, log_z = logits.double().log_softmax(-1), []
            expected = torch.zeros_like(log_probs)
            for b in range(3):
                one = Listing(alignments(log_probs[b].tolist(), target[b].tolist()))
                log_z.append(one.log_partition)
                if one.log_prob:
                    expected[b] = -log_probs[b].exp()
                    for index, share in one.marginals()["emission"].items():
                        expected[(b, *index)] += share
            told = {
                "ours": judge(lambda x, y=target: CTC(x).log_prob(y), [logits], log_z, [expected]),
                "torch": judge(lambda x, y=target: native(x, y), [logits], log_z, [expected]),
            }
            yield case, dtype, told, []


def gaussian_cases():
    # variances of start, steps and observations, and the change of y
    cases = {
        "an outlier of 1000 sigma": (1.0, 0.5, 1.0, lambda y: y[0, 7].add_(1000.0)),
        "a vague start, precise observations": (1e12, 1e-6, 1e-6, lambda y: y.mul_(1e-3)),
        "20,000 steps": (1.0, 0.5, 1.0, None),
    }
    for case, (start, step, look, change) in cases.items():
        for dtype in DTYPES:
            torch.manual_seed(0)
            y = torch.randn(1, 20_000 if change is None else 30, 1).to(getattr(torch, dtype))
            if change is not None:
                change(y)
            inputs = [torch.full((1, 1), x, dtype=y.dtype) for x in (start, step, look)]
            log_z = [
                _filter([Decimal(x) for x in y.flatten().tolist()], *(Decimal(x.item()) for x in inputs))
            ]
            yield (
                case,
                dtype,
                {name: judge(value, inputs, log_z) for name, value in _gaussian_chains(y).items()},
                [],
            )


def _filter(y, variance, step, look):
    """ln p(y) of a random walk that is seen with noise, by Kalman's filter with 60 digits."""
    getcontext().prec = 60
    mean, total, pi = Decimal(0), Decimal(0), Decimal("3.14159265358979323846264338327950288419716939937511")
    for x in y:
        seen = variance + look
        total -= ((x - mean) ** 2 / seen + (2 * pi * seen).ln()) / 2
        mean, variance = mean + variance / seen * (x - mean), variance * look / seen + step
    return float(total)


def _gaussian_chains(y):
    one, zero = torch.ones(1, 1, dtype=y.dtype), torch.zeros(1, dtype=y.dtype)

    def noises(*variances):
        return [dist.MultivariateNormal(zero, x) for x in variances]

    def ours(start, step, look):
        first, move, seen = noises(start, step, look)
        return LinearGaussianChain(first, one, move, one, seen).log_prob(y)

    def pyro(start, step, look):
        # its chain takes a step before the first observation
        first, move, seen = noises(start - step, step, look)
        return dist.GaussianHMM(first, one, move, one, seen, duration=y.shape[1]).log_prob(y)

    return {"ours": ours, "pyro": pyro}


TABLES = {"grammars": grammar_cases, "alignments": alignment_cases, "Gaussians": gaussian_cases}

import math

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO

import pyroelbo.distributions.alignment as alignment
from pyroelbo.distributions import CTC, Alignment
from tests.distributions.structured_contract import StructuredContract
from tests.distributions.test_chain import nested, randn
from tests.oracles import Listing, alignments, log_sum_exp

pytestmark = pytest.mark.usefixtures("kernels")

# steps, symbols, one emission for all data, targets, lengths, blank
CASES = {
    "plain": (5, 3, False, [[1, 2], [2, 1], [1, 1]], None, 0),
    "padded": (4, 3, False, [[1, 2], [2, -1], [-1, -1]], None, 0),
    "lengths": (5, 3, False, [[1, 2], [1, -1], [2, 2]], [3, 1, 4], 0),
    "last blank": (4, 4, False, [[0, 1], [2, 2], [1, 0]], [4, 3, 2], 3),
    "shared": (4, 3, True, [[1, 2], [2, 1], [1, -1]], [4, 3, 2], 0),
    "sparse": (4, 4, False, [[1, 2], [2, -1], [3, 3]], None, 0),
    "one frame": (1, 3, False, [[1], [2], [-1]], None, 0),
    "tight": (3, 3, False, [[1, 2, 1], [2, 1, 2], [1, 1, -1]], None, 0),
}


@pytest.mark.parametrize("case", CASES)
class TestAlignment(StructuredContract):
    def make(self, case, seed=0):
        steps, symbols, shared, target, lengths, blank = CASES[case]
        emission = randn(seed, 1 if shared else 3, steps, symbols)
        if "sparse" in case:
            emission = emission.detach()
            emission[0, 2, 1] = emission[1, 0, 0] = emission[:, 3, 0] = -math.inf
            emission.requires_grad_()
        lengths = None if lengths is None else torch.tensor(lengths)
        return Alignment(emission, torch.tensor(target), lengths, blank)

    def construct(self, q, potentials):
        return Alignment(*potentials, q.target, q.lengths, q.blank)

    def listing(self, q, b):
        target = [c for c in q.target[b].tolist() if c >= 0]
        (emission,) = (nested(x.expand(3, *x.shape[1:])[b]) for x in q.potentials)
        return Listing(alignments(emission, target, q.blank, int(q.lengths[b])))

    def test_paths_of_another_target(self, case, q):
        z = q.mode.clone()
        z[:, 0] = (z[:, 0] + 1) % q.potentials[0].shape[-1]
        for b, one in enumerate(self.lists(q)):
            expected = one.log_prob.get(tuple(z[b].tolist()), -math.inf)
            assert q.log_prob(z)[b].item() == pytest.approx(expected, abs=1e-10)


def problem(dtype, steps=30, batch=4, symbols=6, longest=8):
    torch.manual_seed(3)
    logits = torch.randn(batch, steps, symbols, dtype=dtype)
    target = torch.randint(1, symbols, (batch, longest))
    lengths = torch.tensor([steps, steps - 5, steps, steps - 9])[:batch]
    counts = torch.tensor([longest, longest - 3, 0, longest - 1])[:batch]
    target[torch.arange(longest) >= counts[:, None]] = -1
    return logits, target, lengths, counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_torch(dtype):
    logits, target, lengths, counts = problem(dtype)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    value = CTC(ours, lengths).log_prob(target)
    loss = F.ctc_loss(
        theirs.log_softmax(-1).transpose(0, 1), target.clamp(min=1), lengths, counts, reduction="none"
    )
    torch.testing.assert_close(value, -loss)
    weight = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=dtype)
    (value * weight).sum().backward()
    (-loss * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unused_symbols_without_probability(dtype):
    """torch's own gradient is NaN throughout here."""
    logits, target, lengths, _ = problem(dtype)
    unused = F.pad(logits, (0, 2), value=-math.inf).requires_grad_()
    plain = logits.clone().requires_grad_()
    value = CTC(unused, lengths).log_prob(target)
    torch.testing.assert_close(value, CTC(plain, lengths).log_prob(target))
    value.sum().backward()
    CTC(plain, lengths).log_prob(target).sum().backward()
    torch.testing.assert_close(unused.grad[..., :-2], plain.grad)
    assert not unused.grad[..., -2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_infeasible_target_leaves_others_alone(dtype):
    logits, target, lengths, _ = problem(dtype)
    bad = target.clone()
    bad[0] = 1  # eight equal symbols need fifteen frames
    short = lengths.clone()
    short[0] = 12
    x = logits.clone().requires_grad_()
    value = CTC(x, short).log_prob(bad)
    assert value[0] == -math.inf
    torch.testing.assert_close(value[1:], CTC(logits, lengths).log_prob(target)[1:], rtol=0, atol=0)
    value[1:].sum().backward(retain_graph=True)
    alone = x.grad.clone()
    value[0].backward()
    torch.testing.assert_close(x.grad, alone)
    assert x.grad.isfinite().all() and not x.grad[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_path_behind_by_hundreds_of_nats_overtakes(dtype):
    """Frames first insist on the blank, at e^-12 a frame for the symbol that must fill them all in the
    end.
    """
    steps = 200
    emission = torch.zeros(1, steps, 3, dtype=dtype)
    emission[0, :100, 1], emission[0, :, 2] = -12.0, -40.0
    emission[0, 100:, 0] = -math.inf
    emission.requires_grad_()
    # 1 2 1 with no blank after frame 100: the step to 2 must be taken within the second half, or before it
    q = Alignment(emission, torch.tensor([[1, 2, 1]]))
    rows = emission.detach().double()[0]

    def segment(symbol, start, stop):
        return rows[start:stop, symbol].sum().item()

    ways = []
    for first in range(101):  # blanks first, then a run of 1, a run of 2 and a run of 1 to the end
        for second in range(max(first + 1, 95), steps - 1):
            for third in range(second + 1, min(second + 4, steps)):
                runs = ((0, 0, first), (1, first, second), (2, second, third), (1, third, steps))
                ways.append(sum(segment(*run) for run in runs))
    lower = log_sum_exp(ways)
    with torch.no_grad():
        exact = q._answer(tuple(x.double() for x in q.potentials), alignment.Log())
    assert lower < exact.item() < lower + 1e-3 * abs(lower)
    torch.testing.assert_close(q.log_partition.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(q.log_partition.sum(), emission)
    torch.testing.assert_close(gradient.sum(-1), torch.ones(1, steps, dtype=dtype), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [-120.0, -800.0, -1e5])
def test_a_needed_symbol_is_rare(dtype, depth):
    emission = torch.zeros(1, 4, 3, dtype=dtype)
    emission[..., 2] = depth
    emission.requires_grad_()
    q = Alignment(emission, torch.tensor([[2]]))
    # a run of n frames of symbol 2: 4 of one frame, and the longer ones count for nothing
    value = q.log_partition
    assert value.item() == pytest.approx(depth + math.log(4), rel=1e-6)
    value.sum().backward()
    torch.testing.assert_close(emission.grad[0, :, 2], torch.full((4,), 0.25, dtype=dtype), rtol=1e-5, atol=0)


def test_long_input():
    logits, target, _, _ = problem(torch.float32, steps=4000, batch=2, longest=50)
    target[0] = torch.arange(50) % 5 + 1
    loss = F.ctc_loss(
        logits.double().log_softmax(-1).transpose(0, 1), target.clamp(min=1), torch.tensor([4000, 4000]),
        (target >= 0).sum(-1), reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(CTC(logits).log_prob(target), -loss.float())


def test_probabilities_of_all_targets_sum_to_one():
    logits = randn(0, 2, 3, 3)
    every = torch.tensor(
        [[-1] * 3]
        + [[a, -1, -1] for a in (1, 2)]
        + [[a, b, -1] for a in (1, 2) for b in (1, 2)]
        + [[a, b, c] for a in (1, 2) for b in (1, 2) for c in (1, 2)]
    )
    total = CTC(logits, torch.tensor([3, 2]), validate_args=False).log_prob(every[:, None]).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(2))


def test_samples_follow_their_probability():
    """Fails by chance with probability below 1e-6: z-scores of 30 frequencies within 6."""
    torch.manual_seed(0)
    d = CTC(torch.randn(2, 4, 3), torch.tensor([4, 3]), validate_args=False)
    draws = d.sample((20_000,))
    for b in range(2):
        values, times = draws[:, b].unique(dim=0, return_counts=True)
        for y, n in zip(values, times, strict=True):
            p = d.log_prob(y.expand(2, 4))[b].exp()
            assert abs(n - 20_000 * p) < 6 * math.sqrt(20_000 * p * (1 - p)) + 1


def test_evidence_is_the_posterior_s_log_partition():
    logits, target, lengths, _ = problem(torch.float64)
    d = CTC(logits, lengths)
    assert torch.equal(d.log_prob(target), d.posterior(target).log_partition)
    big = d.expand((2, 4))
    torch.testing.assert_close(big.log_prob(target), d.log_prob(target).expand(2, 4))
    assert big.sample((5,)).shape == (5, 2, 4, 30)


def test_training_at_a_site():
    _, target, lengths, _ = problem(torch.float64)

    def model():
        logits = pyro.param("logits", torch.zeros(4, 30, 6))
        with pyro.plate("data", 4):
            pyro.sample("y", CTC(logits, lengths), obs=target)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.3}), Trace_ELBO())
    losses = [svi.step() for _ in range(30)]
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": [[1, 9]]}, r"y: expected .*got 9 at index \[0, 1\]"),
        ({"target": [[1, 0]]}, r"y: expected no blank, got 0 at index \[0, 1\]"),
        ({"target": [[-1, 1]]}, r"y: expected .*got 1 at index \[0, 1\]"),
        ({"target": [[1, 2, 1, 2, 1]]}, r"y: expected targets no longer .* index \[0\]"),
        ({"lengths": [5]}, r"lengths: expected .*got 5 at index \[0\]"),
        ({"lengths": [0]}, r"lengths: expected .*got 0 at index \[0\]"),
        ({"value": math.nan}, r"logits: expected .*got nan at index \[0, 1, 2\]"),
        ({"frame": True}, r"logits: expected a finite logit at every frame, got none at index \[0, 1\]"),
        ({"blank": 3}, "lengths, blank: expected .* and 3"),
    ],
)
def test_bad_input_is_refused(change, message):
    logits = torch.zeros(1, 4, 3)
    logits[0, 1, 2] = change.get("value", 0.0)
    if "frame" in change:
        logits[0, 1] = -math.inf
    with pytest.raises(ValueError, match=message):
        CTC(logits, torch.tensor(change.get("lengths", [4])), change.get("blank", 0)).log_prob(
            torch.tensor(change.get("target", [[1, 2]]))
        )


def test_bad_input_without_validation_is_impossible():
    d = CTC(torch.zeros(1, 2, 3), validate_args=False)
    assert d.log_prob(torch.tensor([[1, 2, 1]])).item() == -math.inf

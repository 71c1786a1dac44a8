"""Large magnitudes, diffuse starts, changes in place, transforms that are not supported."""

import math

import pyro.distributions as dist
import pytest
import torch
from mpmath import det, log, matrix, mpf, pi, workdps

from pyroelbo.distributions import CTC, HMM, PCFG, LinearChain, LinearGaussianChain, SemiMarkov, TreeCRF

pytestmark = pytest.mark.usefixtures("kernels")

# ---- large magnitudes


def large(magnitude, rows=2, steps=6, states=4, lengths=None, homogeneous=False, grad=False):
    torch.manual_seed(3)
    shapes = (
        (rows, states),
        (rows, *(() if homogeneous else (steps - 1,)), states, states),
        (rows, steps, states),
    )
    potentials = [(magnitude * torch.randn(s)).requires_grad_(grad) for s in shapes]
    return LinearChain(*potentials, lengths)


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("magnitude", [1e3, 1e9, 1e12, 1e15, 1e17, 1e30])
def test_marginals_of_a_chain_are_a_distribution(magnitude, homogeneous):
    """Σ marginals was off by 2e-2 at 1e12 and 9e6 at 1e15, and not finite at 1e17. The posterior is then all
    on the best path, which the first-order optimum gives.
    """
    lengths = torch.tensor([6, 3])
    q = large(magnitude, lengths=lengths, homogeneous=homogeneous)
    marginals = q.marginals
    ones = torch.ones(2, 6)
    ones[1, 3:] = 0
    torch.testing.assert_close(marginals.observation.sum(-1), ones, rtol=0, atol=1e-12)
    torch.testing.assert_close(marginals.initial.sum(-1), torch.ones(2), rtol=0, atol=1e-12)
    moves = marginals.transition.flatten(1).sum(-1)
    torch.testing.assert_close(moves, torch.tensor([5.0, 2.0]), rtol=0, atol=1e-12)
    best = q.to_parts(q.mode)
    for part, expected in zip(marginals, best, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6 if magnitude > 1e3 else 1.0)
    tracked = large(magnitude, lengths=lengths, homogeneous=homogeneous, grad=True)
    gradients = torch.autograd.grad(tracked.log_partition.sum(), tracked.potentials)
    torch.testing.assert_close(gradients, tuple(marginals), rtol=0, atol=1e-9)


@pytest.mark.parametrize("magnitude", [1e12, 1e15, 1e17])
def test_marginals_of_other_structures(magnitude):
    torch.manual_seed(0)
    emission = magnitude * torch.randn(2, 6, 4)
    d = CTC(emission).posterior(torch.tensor([[1, 2], [3, -1]]))
    torch.testing.assert_close(d.marginals.emission.sum(-1), torch.ones(2, 6), rtol=0, atol=1e-12)
    tree = TreeCRF(
        torch.tensor([-1, 0, 0, 1]), magnitude * torch.randn(2, 4, 3), magnitude * torch.randn(2, 3, 3)
    )
    torch.testing.assert_close(tree.marginals.node.sum(-1), torch.ones(2, 4), rtol=0, atol=1e-12)
    parts = [magnitude * torch.randn(2, *shape) for shape in ((3,), (3, 3), (3, 2), (5, 3))]
    segments = SemiMarkov(*parts)
    torch.testing.assert_close(segments.marginals.observation.sum(-1), torch.ones(2, 5), rtol=0, atol=1e-9)


# ---- diffuse starts, by a filter with 50 digits


def exact_filter(y, start, spread, move, noise, read, error):
    """ln p(y) by the plain filter, in 50 digits; everything as nested lists."""
    m, p, a, q, c, r = (matrix(x) for x in (start, spread, move, noise, read, error))
    total = mpf(0)
    for row in y:
        apart, s = matrix(row) - c * m, c * p * c.T + r
        inverse = s**-1
        total -= (c.rows * log(2 * pi) + log(det(s)) + (apart.T * inverse * apart)[0]) / 2
        gain = p * c.T * inverse
        m, p = a * (m + gain * apart), a * (p - gain * c * p) * a.T + q
    return total


def exactly(*tensors):
    with workdps(50):
        return float(exact_filter(*(x.tolist() for x in tensors)))


def chain_of(start, spread, move, noise, read, error):
    normal = dist.MultivariateNormal
    return LinearGaussianChain(
        normal(start, spread), move, normal(torch.zeros(len(start)), noise), read,
        normal(torch.zeros(len(read)), error),
    )  # fmt: skip


def one_state(deviation):
    """One state, two sensors of noise .05, 30 steps around 5000: 52.27 instead of 64.64 was printed."""
    torch.manual_seed(0)
    y = 5000 + 0.1 * torch.randn(30, 1).cumsum(0) + 0.05 * torch.randn(30, 2)
    one = torch.ones(1, 1)
    return y, (torch.zeros(1), deviation**2 * one, one, 0.01 * one, torch.ones(2, 1), 0.0025 * torch.eye(2))


def four_states():
    torch.manual_seed(0)
    move = 0.9 * torch.linalg.qr(torch.randn(4, 4))[0]
    read, y = torch.randn(6, 4), torch.randn(30, 6)
    eye = torch.eye(4)
    return y, (torch.zeros(4), 1e8 * eye, move, 0.1 * eye, read, 1e-4 * torch.eye(6))


@pytest.mark.parametrize("deviation", [1e2, 1e3, 1e4, 1e5, 1e6, 1e8])
def test_one_state_with_a_diffuse_start(deviation):
    y, parts = one_state(deviation)
    right = exactly(y, *parts)
    assert chain_of(*parts).log_prob(y).item() == pytest.approx(
        right, rel=1e-8, abs=1e-8 * math.sqrt(deviation)
    )


def test_four_states_with_a_diffuse_start():
    """A few times the rounding of the summed |terms|, of which one is 1e6."""
    y, parts = four_states()
    assert chain_of(*parts).log_prob(y).item() == pytest.approx(exactly(y, *parts), rel=1e-10)


def test_gradients_with_a_diffuse_start():
    """By central differences in 50 digits."""
    y, parts = one_state(1e6)
    y = y[:6]
    leaves = [x.clone().requires_grad_() for x in (y, *parts[2:5])]
    value = chain_of(*parts[:2], *leaves[1:], parts[5]).log_prob(leaves[0])
    gradients = torch.autograd.grad(value, leaves)
    places = {0: 0, 1: 3, 2: 4, 3: 5}  # of the leaves among the filter's arguments
    step = mpf("1e-20")

    def shifted(place, index, by):
        given = [x.tolist() for x in (y, *parts)]
        given[place][index[0]][index[1]] = mpf(given[place][index[0]][index[1]]) + by
        return exact_filter(*given)

    for leaf, place in places.items():
        for index in {(0, 0), (leaves[leaf].shape[0] - 1, leaves[leaf].shape[1] - 1)}:
            with workdps(50):
                right = float((shifted(place, index, step) - shifted(place, index, -step)) / (2 * step))
            assert gradients[leaf][index].item() == pytest.approx(right, rel=1e-6, abs=1e-6)


def test_the_posterior_with_a_diffuse_start():
    """Its ELBO terms are the evidence: ln p(z, y) - ln p(z | y) = ln p(y) for every z."""
    y, parts = one_state(1e5)
    d = chain_of(*parts)
    q = d.posterior(y)
    z = q.mean + q.variance.sqrt() * torch.randn(3, 30, 1)
    start, spread, move, noise, read, error = parts
    joint = dist.MultivariateNormal(start, spread).log_prob(z[:, 0])
    joint = joint + dist.MultivariateNormal(z[:, :-1] @ move.T, noise).log_prob(z[:, 1:]).sum(-1)
    joint = joint + dist.MultivariateNormal(z @ read.T, error).log_prob(y).sum(-1)
    torch.testing.assert_close(joint - q.log_prob(z), d.log_prob(y).expand(3), rtol=0, atol=1e-5)


# ---- changes in place


def test_potentials_changed_in_place():
    q = large(1.0)
    old, _ = q.log_partition, q.sample()
    q.potentials.observation.add_(2.0)
    torch.testing.assert_close(q.log_partition, old + 12.0)
    q.potentials.observation[:, :, 0] += 50.0
    fresh = LinearChain(*q.potentials)
    torch.testing.assert_close(q.log_partition, fresh.log_partition)
    torch.testing.assert_close(tuple(q.marginals), tuple(fresh.marginals))
    torch.testing.assert_close(q.log_prob(q.mode), fresh.log_prob(q.mode))
    assert (q.sample((50,)) == 0).double().mean() > 0.99
    torch.testing.assert_close(q.expand((3, 2)).log_partition, fresh.log_partition.expand(3, 2))


def test_potentials_of_inference_mode_changed_in_place():
    with torch.inference_mode():
        q = large(1.0)
        old, _ = q.log_partition, q.sample()
        q.potentials.observation.add_(2.0)
        torch.testing.assert_close(q.log_partition, old + 12.0)


def test_the_data_of_a_gaussian_chain_changed_in_place():
    y, parts = one_state(1.0)
    d = chain_of(*parts)
    y = y - 5000
    q = d.posterior(y)
    with torch.no_grad():
        before, _ = q.log_partition, q.mean
    q.y.add_(0.1)
    torch.testing.assert_close(q.log_partition, d.log_prob(y))
    torch.testing.assert_close(q.mean, d.posterior(y).mean)
    assert (q.log_partition - before).abs() > 1e-3


# ---- torch.func


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_transforms_are_refused():
    shapes = (3,), (3, 3), (5, 3)
    batch = [torch.randn(4, *shape) for shape in shapes]
    makers = {
        "initial": lambda *x: LinearChain(*x).log_partition,
        "logits": lambda _, __, x: CTC(x).log_prob(torch.tensor([1, 2])),
        "transition": lambda i, t, _: HMM(i.detach(), t, dist.Normal(torch.zeros(3), 1.0)).log_prob(
            torch.zeros(5)
        ),
    }
    plain = [x[0] for x in batch]
    for make in makers.values():
        calls = (
            lambda make=make: torch.func.vmap(make)(*batch),
            lambda make=make: torch.func.grad(make, argnums=(0, 1, 2))(*plain),
            lambda make=make: torch.func.jvp(make, tuple(plain), tuple(plain)),
        )
        for call in calls:
            with pytest.raises(
                NotImplementedError, match="expected a plain tensor, got one inside torch.func"
            ):
                call()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(plain[0], plain[0])
        with pytest.raises(NotImplementedError, match="initial: expected a plain tensor"):
            LinearChain(dual, *plain[1:])


# ---- impossible data


def test_impossible_data_have_minus_infinity():
    diagonal = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    d = HMM(torch.zeros(2), diagonal, dist.Categorical(logits=diagonal))
    y = torch.tensor([[0, 0, 0], [0, 1, 0]])
    assert d.log_prob(y).tolist() == [pytest.approx(math.log(0.5)), -math.inf]
    ctc = CTC(torch.zeros(1, 2, 3))
    assert ctc.log_prob(torch.tensor([[1, 1]])).tolist() == [-math.inf]
    rules = torch.full((1, 3, 3), -math.inf)
    rules[0, 1, 2] = 0.0
    grammar = PCFG(torch.zeros(1), rules, torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]]))
    assert grammar.log_prob(torch.tensor([[0, 1], [1, 0]])).tolist() == [0.0, -math.inf]

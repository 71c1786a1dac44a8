import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate

import pyroelbo.distributions._forward_backward as recursions
from pyroelbo.distributions import CTC, HMM, Alignment, LinearChain, ParseTree, SemiMarkov, TreeCRF
from tests.distributions.structured_contract import StructuredContract
from tests.oracles import Listing, chains, log_sum_exp, segmentations


def randn(seed, *shape, sparse=False):
    generator = torch.Generator().manual_seed(hash((seed, *shape)) % 2**31)
    x = 1.5 * torch.randn(shape, generator=generator)
    if sparse:
        x[torch.rand(shape, generator=generator) < 0.2] = -math.inf
    return x.requires_grad_()


def nested(x):
    return x.detach().tolist()


# steps, states, one transition matrix for all steps, one for all data, lengths
CHAINS = {
    "same": (4, 3, True, False, None),
    "varying": (4, 3, False, False, None),
    "shared": (4, 3, True, True, None),
    "shared varying sparse": (4, 3, False, True, None),
    "lengths": (4, 3, True, False, [4, 1, 3]),
    "lengths varying": (4, 3, False, False, [2, 4, 1]),
    "lengths shared": (5, 3, True, True, [2, 5, 4]),
    "sparse": (4, 3, True, False, None),
    "sparse lengths": (4, 3, False, False, [4, 3, 2]),
    "one step": (1, 4, True, False, None),
    "one step varying": (1, 4, False, False, None),
    "two steps": (2, 5, False, True, None),
    "wide": (2, 19, True, True, None),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", CHAINS)
class TestLinearChain(StructuredContract):
    def make(self, case, seed=0):
        steps, states, same, shared, lengths = CHAINS[case]
        rows, sparse = 3, "sparse" in case
        lead = (1 if shared else rows,) + (() if same else (steps - 1,))
        return LinearChain(
            randn(seed, 1 if shared else rows, states),
            randn(seed + 10, *lead, states, states, sparse=sparse),
            randn(seed + 20, rows, steps, states),
            None if lengths is None else torch.tensor(lengths),
        )

    def construct(self, q, potentials):
        return LinearChain(*potentials, q.lengths)

    def listing(self, q, b):
        initial, transition, observation = (nested(x.expand(3, *x.shape[1:])[b]) for x in q.potentials)
        return Listing(
            chains(initial, transition, observation, None if q.lengths is None else int(q.lengths[b]))
        )


SEGMENTS = {
    "plain": (4, 2, 3, None),
    "sparse": (4, 2, 3, None),
    "long": (3, 2, 5, None),
    "unit": (3, 3, 1, None),
    "lengths": (4, 2, 2, [4, 1, 3]),
}


@pytest.mark.parametrize("case", SEGMENTS)
class TestSemiMarkov(StructuredContract):
    def make(self, case, seed=0):
        steps, states, longest, lengths = SEGMENTS[case]
        sparse = "sparse" in case
        return SemiMarkov(
            randn(seed, 3, states),
            randn(seed + 10, 1, states, states, sparse=sparse),
            randn(seed + 20, 3, states, longest),
            randn(seed + 30, 3, steps, states),
            randn(seed + 40, 3, steps, states),
            None if lengths is None else torch.tensor(lengths),
        )

    def construct(self, q, potentials):
        return SemiMarkov(*potentials, lengths=q.lengths)

    def listing(self, q, b):
        parts = (nested(x.expand(3, *x.shape[1:])[b]) for x in q.potentials)
        return Listing(segmentations(*parts, None if q.lengths is None else int(q.lengths[b])))

    def test_labels_that_are_no_segmentation(self, case, q):
        states = q.potentials[0].shape[-1]
        z = q.mode.clone()
        z[:, 0] %= states
        assert (q.log_prob(z) == -math.inf).all()


def test_semi_markov_of_unit_segments_is_a_chain():
    initial, transition, observation = randn(0, 2, 3), randn(1, 2, 3, 3), randn(2, 2, 5, 3)
    segments = SemiMarkov(initial, transition, torch.zeros(2, 3, 1), observation)
    chain = LinearChain(initial, transition, observation)
    torch.testing.assert_close(segments.log_partition, chain.log_partition)
    assert torch.equal(segments.mode % 3, chain.mode)


# ---- hidden Markov models

EMISSIONS = {
    "categorical": lambda lead: dist.Categorical(logits=randn(5, *lead, 4)),
    "bernoulli": lambda lead: dist.Bernoulli(logits=randn(5, *lead, 2)).to_event(1),
    "poisson": lambda lead: dist.Poisson(randn(5, *lead).exp()),
    "diagonal": lambda lead: dist.Normal(randn(5, *lead, 2), randn(6, *lead, 2).exp()).to_event(1),
    "full": lambda lead: dist.MultivariateNormal(
        randn(5, *lead, 2), scale_tril=torch.eye(2) + 0.3 * torch.ones(2, 2).tril()
    ),
    "gamma": lambda lead: dist.Gamma(randn(5, *lead).exp(), 1.0),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("kind", EMISSIONS)
def test_evidence_is_the_sum_over_state_sequences(kind, batch, varying):
    steps, states = 4, 3
    lead = (*batch, steps, states) if varying else (*batch, states)
    emission = EMISSIONS[kind](lead)
    initial, transition = (
        randn(0, *batch, states),
        randn(1, *batch, *((steps - 1,) if varying else ()), states, states),
    )
    d = HMM(initial, transition, emission, num_steps=steps)
    y = d.sample((2,))
    assert y.shape == (2, *batch, steps, *emission.event_shape) == (2, *d.batch_shape, *d.event_shape)
    evidence = d.log_prob(y)
    torch.testing.assert_close(evidence, d.posterior(y).log_partition, rtol=0, atol=0)
    for n in range(2):
        for b in range(*batch) if batch else [None]:
            at = () if b is None else (b,)
            item = (
                emission.log_prob(y[n].unsqueeze(len(batch) + 1))
                if varying
                else torch.stack(
                    [
                        emission.log_prob(y[(n, *([slice(None)] * len(batch)), t)].unsqueeze(len(batch)))
                        for t in range(steps)
                    ],
                    len(batch),
                )
            )
            listing = Listing(
                chains(
                    nested(initial[at].log_softmax(-1)),
                    nested(transition[at].log_softmax(-1)),
                    nested(item[at]),
                )
            )
            assert evidence[(n, *at)].item() == pytest.approx(listing.log_partition, abs=1e-10)


def test_evidence_sums_to_one_over_all_observations():
    d = HMM(randn(0, 3), randn(1, 3, 3), dist.Categorical(logits=randn(2, 3, 2)))
    y = torch.cartesian_prod(*[torch.arange(2)] * 5)
    assert log_sum_exp(d.log_prob(y).tolist()) == pytest.approx(0.0, abs=1e-12)


def test_evidence_equals_pyros_enumeration():
    steps, states = 6, 3
    initial, transition, location = randn(0, states), randn(1, states, states), randn(2, states)
    y = torch.randn(4, steps)

    @config_enumerate
    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z0", dist.Categorical(logits=initial))
            for t in pyro.markov(range(steps)):
                if t:
                    z = pyro.sample(f"z{t}", dist.Categorical(logits=transition[z]))
                pyro.sample(f"y{t}", dist.Normal(location[z], 0.5), obs=y[:, t])

    ours = HMM(initial, transition, dist.Normal(location, 0.5)).log_prob(y).sum()
    theirs = -TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda: None)
    torch.testing.assert_close(ours, theirs)
    inputs = (initial, transition, location)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs))


def test_missing_steps_are_summed_over():
    d = HMM(randn(0, 3), randn(1, 3, 3), dist.Gamma(randn(2, 3, 2).exp(), 1.0).to_event(1), num_steps=4)
    y = d.sample((3,))
    y[0, 1, 0] = math.nan
    y[1] = math.nan
    chain = d.posterior(y)
    assert chain.potentials.observation[0, 1].tolist() == [0.0] * 3
    listing = Listing(
        chains(*(nested(x[0] if len(x) == 1 or i == 2 else x) for i, x in enumerate(chain.potentials)))
    )
    assert d.log_prob(y)[0].item() == pytest.approx(listing.log_partition, abs=1e-10)
    torch.testing.assert_close(d.log_prob(y)[1], torch.tensor(0.0))
    torch.testing.assert_close(d.log_prob(y)[2], d.log_prob(y[2]))


def test_lengths_cut_sequences():
    emission = dist.Categorical(logits=randn(2, 3, 4))
    lengths = torch.tensor([5, 2, 3])
    d = HMM(randn(0, 3), randn(1, 3, 3), emission, num_steps=5, lengths=lengths)
    plain = HMM(randn(0, 3), randn(1, 3, 3), emission)
    y = d.sample()
    y[1, 2:] = -1  # padding may be anything
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(d.log_prob(y)[b], plain.log_prob(y[b, :n]))
        assert (d.sample((20,))[:, b, n:] == 0).all()
    assert (d.posterior(y).sample((20,))[:, 1, 2:] == 0).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("steps", [2, 3, 4])
def test_one_value_under_a_batch_of_models(steps):
    """Also where there are as many models as steps, so that a mistaken axis would broadcast."""
    initial, transition, location = randn(0, 3, 2, 2), randn(1, 3, 2, 2, 2), randn(2, 3, 2, 2)
    y = torch.randn(steps)
    value = HMM(initial, transition, dist.Normal(location, 1.0)).log_prob(y)
    assert value.shape == (3, 2)
    for a in range(3):
        for b in range(2):
            own = HMM(initial[a, b], transition[a, b], dist.Normal(location[a, b], 1.0)).log_prob(y)
            torch.testing.assert_close(value[a, b], own)
    some = HMM(initial[:, 0], transition[:, 0], dist.Normal(location[:, 0], 1.0)).log_prob(y)
    torch.testing.assert_close(some, value[:, 0])


def test_evidence_beside_enumerated_sites():
    """The chain is summed inside, what it depends on by Pyro: the same as all by hand."""
    y = torch.randn(3, 4)
    initial, transition, location = randn(0, 2), randn(1, 2, 2), randn(2, 2)

    def chain(shift):
        lead = shift.shape
        parts = initial.expand(*lead, 2), transition.expand(*lead, 2, 2)
        return HMM(*parts, dist.Normal(location + shift.unsqueeze(-1), 1.0))

    @config_enumerate
    def model():
        w = pyro.sample("w", dist.Bernoulli(0.3))
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("y", chain(w + 2 * k), obs=y)

    total = torch.tensor(-math.inf)
    for w, p in ((0.0, 0.7), (1.0, 0.3)):
        each = [chain(torch.tensor(w + 2 * k)).log_prob(y) + math.log(q) for k, q in ((0, 0.4), (1, 0.6))]
        total = torch.logaddexp(total, torch.logaddexp(*each).sum() + math.log(p))
    torch.testing.assert_close(
        -TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda: None), total
    )


@pytest.mark.usefixtures("kernels")
def test_an_empty_batch_and_half_precision():
    q = LinearChain(torch.zeros(0, 3), torch.zeros(0, 3, 3), torch.zeros(0, 5, 3))
    assert q.log_partition.shape == (0,) and q.mode.shape == (0, 5) and q.sample((2,)).shape == (2, 0, 5)
    assert [x.shape for x in q.marginals] == [x.shape for x in q.potentials]
    assert HMM(torch.zeros(3), torch.zeros(3, 3), dist.Normal(torch.zeros(3), 1.0)).log_prob(
        torch.zeros(0, 5)
    ).shape == (0,)
    parts = [randn(0, 1, 3), randn(1, 1, 3, 3), randn(2, 1, 5, 3)]
    half = LinearChain(*(x.detach().bfloat16() for x in parts))
    exact = LinearChain(*(x.detach().bfloat16().double() for x in parts))
    torch.testing.assert_close(half.log_partition.double(), exact.log_partition, rtol=2**-8, atol=0)


def test_samples_follow_the_evidence():
    d = HMM(randn(0, 3), randn(1, 3, 3), dist.Bernoulli(logits=randn(2, 3)), num_steps=4)
    y = torch.cartesian_prod(*[torch.arange(2.0)] * 4)
    draws = 40_000
    codes = (d.sample((draws,)) * torch.tensor([8.0, 4, 2, 1])).sum(-1).long()
    counts = torch.bincount(codes, minlength=16).double()
    from tests.distributions.structured_contract import FALSE_ALARM, chi_square_p_value

    assert chi_square_p_value(counts, d.log_prob(y).exp() * draws) > FALSE_ALARM


def test_second_derivatives_of_the_evidence():
    initial, transition, logits = randn(0, 3), randn(1, 3, 3), randn(2, 3, 4)
    y = torch.tensor([[0, 3, 1, 2], [1, 1, 1, 1]])

    def evidence(*x):
        return HMM(x[0], x[1], dist.Categorical(logits=x[2])).log_prob(y)

    assert torch.autograd.gradcheck(evidence, (initial, transition, logits))
    assert torch.autograd.gradgradcheck(evidence, (initial, transition, logits))


def test_the_gradient_can_be_taken_twice_from_one_graph():
    q = LinearChain(randn(0, 3), randn(1, 3, 3), randn(2, 5, 3))
    first = torch.autograd.grad(q.log_partition, q.potentials, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(q.log_partition, q.potentials), first, rtol=0, atol=0)


def test_a_value_computed_without_gradient_does_not_stick():
    q = LinearChain(randn(0, 3), randn(1, 3, 3), randn(2, 5, 3))
    with torch.no_grad():
        assert not q.log_partition.requires_grad
        q.sample()
    assert q.log_partition.requires_grad


@pytest.mark.parametrize(("rows", "steps", "states"), [(2, 200, 64), (2, 200, 150), (40, 3, 64)])
def test_memory_of_the_gradient_does_not_grow_with_the_square_of_the_states(rows, steps, states):
    q = LinearChain(randn(0, rows, states), randn(1, 1, states, states), randn(2, rows, steps, states))
    kept = 0

    def pack(x):
        nonlocal kept
        kept += x.numel()
        return x

    def size(x):
        return x.numel() if isinstance(x, torch.Tensor) else sum(map(size, x))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = recursions.log_partition(q._flat(q.potentials))
    held = sum(size(one) for _, one in value.grad_fn.passes)
    assert kept + held < 4 * rows * steps * states + 4 * states * states


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_potentials_of_two_precisions(which):
    mixed = [randn(i, 2, *shape).detach() for i, shape in enumerate([(3,), (3, 3), (5, 3)])]
    mixed[which] = mixed[which].float()
    lengths = torch.tensor([4]).expand(2)
    leaves = [x.requires_grad_() for x in mixed]
    q, right = LinearChain(*leaves, lengths), LinearChain(*(x.detach().double() for x in leaves), lengths)
    torch.testing.assert_close(q.log_partition, right.log_partition)
    torch.testing.assert_close(
        torch.autograd.grad(q.log_partition.sum(), leaves)[2].double(), right.marginals[2]
    )
    assert torch.equal(q.mode, right.mode)


def test_a_value_of_inference_mode_does_not_stick():
    q = LinearChain(randn(0, 3), randn(1, 3, 3), randn(2, 5, 3))
    with torch.inference_mode():
        q.log_partition.sum()
    weight = torch.ones((), requires_grad=True)
    (q.log_partition * weight).sum().backward()


def test_gradients_share_no_memory():
    leaves = [
        randn(0, 1, 3).requires_grad_(),
        randn(1, 1, 3, 3).requires_grad_(),
        randn(2, 1, 5, 3).requires_grad_(),
    ]
    LinearChain(*leaves).log_partition.sum().backward()
    first, step, seen = (x.grad for x in leaves)
    kept = seen.clone()
    first.mul_(7.0)
    step.mul_(7.0)
    torch.testing.assert_close(seen, kept, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_compiled_and_plain_agree_on_a_long_batch(shared, dtype, no_kernels):
    """Longer than the pieces that the kernels work in, and more rows than go together."""
    pytest.importorskip("numba")
    rows, steps, states = 18, 500, 20
    lead = 1 if shared else rows
    lengths = torch.tensor([500, 205, 204, 1, 410, 206, 499, 408, 409, 2, 203, 300, 500, 500, 7, 205, 1, 499])
    potentials = [randn(0, lead, states), randn(1, lead, states, states), randn(2, rows, steps, states)]
    potentials = [x.detach().to(dtype).requires_grad_() for x in potentials]
    answers = []
    for without in (False, True):
        if without:
            no_kernels()
        q = LinearChain(*potentials, lengths)
        weights = torch.arange(1.0, rows + 1, dtype=dtype)
        gradients = torch.autograd.grad((q.log_partition * weights).sum(), potentials)
        pyro.set_rng_seed(3)
        fixed = LinearChain(*(x.detach() for x in potentials), lengths)
        answers.append((q.log_partition.detach(), gradients, q.mode, q.sample((2,)), fixed.marginals))
    (value, gradients, mode, z, marginals), (value2, gradients2, mode2, z2, marginals2) = answers
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(value, value2, **close)
    torch.testing.assert_close(gradients, gradients2, **close)
    torch.testing.assert_close(tuple(marginals), tuple(marginals2), **close)
    # a sequence of n steps has n states and n - 1 moves
    torch.testing.assert_close(marginals.observation.sum((-1, -2)), lengths.to(dtype), **close)
    torch.testing.assert_close(marginals.transition.sum((-1, -2)), lengths.to(dtype) - 1, **close)
    assert torch.equal(mode, mode2)
    # the same uniform numbers choose the same states, but for a rounding at the edge of one
    assert (z == z2).double().mean() > (0.999 if dtype == torch.float32 else 1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "steps", "states"), [(1, 1000, n) for n in (1, 7, 8, 9, 16, 17)] + [(4, 2700, 100)]
)
def test_compiled_and_plain_agree_on_long_rows(rows, steps, states, dtype, no_kernels):
    """One row of few states, which has its own kernel, over several pieces; and one too long to keep its
    weights.
    """
    pytest.importorskip("numba")
    shapes = [(1, states), (1, states, states), (rows, steps, states)]
    potentials = [randn(i, *shape).detach().to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    lengths = torch.tensor([steps - 7 * i for i in range(rows)])
    answers = []
    for without in (False, True):
        if without:
            no_kernels()
        q = LinearChain(*potentials, lengths)
        weights = torch.linspace(1.0, -2.0, rows, dtype=dtype)
        gradients = torch.autograd.grad((q.log_partition * weights).sum(), potentials)
        fixed = LinearChain(*(x.detach() for x in potentials), lengths)
        # two ways may be equally good but for rounding
        best = fixed.log_weight(q.mode)
        answers.append(
            (fixed.log_partition, q.log_partition.detach(), gradients, tuple(fixed.marginals), best)
        )
    relative = 1e-4 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(answers[0], answers[1], rtol=relative, atol=relative)


@pytest.mark.usefixtures("kernels")
def test_tiny_sums_one_after_another_keep_their_digits():
    """Each step has a share of 1e-161, which is trusted; the product of two is not a normal number."""
    initial, transition = torch.zeros(2), torch.tensor([[0.0, -375.0], [0.0, -375.0]])
    observation = torch.tensor([[0.0, -1.0]] + [[-371.0, 0.0]] * 4)
    got = LinearChain(initial, transition, observation).log_partition
    right = Listing(chains(nested(initial), nested(transition), nested(observation))).log_partition
    assert got.item() == pytest.approx(right, rel=1e-13)


def test_third_derivatives_by_enumeration():
    """Of ln Z by an observation and a transition that is computed from it."""
    observation = randn(0, 3, 2)
    paths = torch.cartesian_prod(*[torch.arange(2)] * 3)
    at = torch.nn.functional.one_hot(paths, 2).double()

    def by_chain(x):
        return LinearChain(x[0], x[1:].sin(), x).marginals.observation

    def by_listing(x):
        score = x[0][paths[:, 0]] + sum(x[t][paths[:, t]] for t in range(3))
        score = score + sum(x[1:].sin()[paths[:, t], paths[:, t + 1]] for t in range(2))
        return torch.einsum("n,nts->ts", score.softmax(0), at)

    weight = torch.arange(6.0).view(3, 2)
    found = []
    for marginals in (by_chain, by_listing):
        (first,) = torch.autograd.grad((marginals(observation)[1] ** 2).sum(), observation, create_graph=True)
        (second,) = torch.autograd.grad((first * weight).sum(), observation, create_graph=True)
        found.append((first, second, *torch.autograd.grad((second * weight).sum(), observation)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def long_pair(kind, shift=0.0):
    """A long structure in float64 with float32 numbers, and how to make it again of others."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (4 * torch.randn(shape, generator=generator)).float().double()

    steps = 200
    if kind == "chain":
        return [draw(1, 4), draw(1, 4, 4), draw(1, steps, 4)], LinearChain
    if kind == "segments":
        return [draw(1, 3), draw(1, 3, 3), draw(1, 3, 2), draw(1, steps, 3), draw(1, steps, 3)], SemiMarkov
    target = torch.randint(1, 5, (1, 60), generator=generator)
    return [draw(1, steps, 5)], lambda x: Alignment(x, target)


@pytest.mark.parametrize("kind", ["chain", "segments", "alignment"])
def test_entropy_and_divergence_of_long_structures_in_single_precision(kind):
    """Against ln Z and marginals in float64: H = ln Z - Σ marginal · potential, and KL likewise."""
    parts, make = long_pair(kind)
    generator = torch.Generator().manual_seed(1)
    near = [(x + 0.01 * torch.randn(x.shape, generator=generator)).float().double() for x in parts]
    p, q = make(*parts), make(*near)
    expected = p.marginals
    entropy = p.log_partition - sum((m * x).sum() for m, x in zip(expected, parts, strict=True))
    divergence = q.log_partition - p.log_partition
    divergence = divergence + sum((m * (x - y)).sum() for m, x, y in zip(expected, parts, near, strict=True))
    p32, q32 = make(*(x.float() for x in parts)), make(*(x.float() for x in near))
    assert p32.entropy().dtype == torch.float32
    assert p32.entropy().item() == pytest.approx(entropy.item(), rel=1e-6)
    assert p32.kl_divergence(q32).item() == pytest.approx(divergence.item(), rel=1e-6)
    assert p32.cross_entropy(q32).item() == pytest.approx((entropy + divergence).item(), rel=1e-6)
    assert p32.kl_divergence(make(*(x.float() for x in parts))).abs().item() < 1e-6


@pytest.mark.parametrize("kind", ["chain", "tree", "segments"])
def test_divergence_from_what_has_a_dead_end(kind):
    """The other forbids a step that leads nowhere here: value and gradient by listing the four paths."""
    never = -math.inf
    start, closed = randn(0, 1, 2), torch.tensor([[0.0, 0.0], [0.0, never]])
    move = randn(1, 1, 2, 2)
    away = torch.tensor([[0.0, never], [0.0, 0.0]])
    none = torch.zeros(1, 2)

    def make(first, steps, nodes):
        if kind == "chain":
            return LinearChain(first, steps, nodes)
        if kind == "segments":
            return SemiMarkov(first, steps, torch.zeros(1, 2, 1), nodes)
        return TreeCRF(torch.tensor([-1, 0]), nodes + torch.stack([first, none], 1), steps)

    p, q = make(start, move, closed[None]), make(none, away[None] + move.detach(), torch.zeros(1, 2, 2))

    def listed(first, steps, nodes):
        return (first[0][:, None] + steps[0] + nodes[0][:, None] + nodes[1]).flatten()

    kept = [0, 2]
    log_p = listed(start, move, closed)[kept].log_softmax(0)
    log_q = listed(none, away[None] + move.detach(), torch.zeros(2, 2))
    right = (log_p.exp() * (log_p - (log_q[kept] - log_q.logsumexp(0)))).sum()
    got = p.kl_divergence(q)[0]
    torch.testing.assert_close(got, right, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(got, (start, move)), torch.autograd.grad(right, (start, move)), rtol=0, atol=1e-12
    )


def test_divergence_of_what_has_no_structures_in_common_is_refused():
    parts = torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 4, 3)
    chain, alignment = LinearChain(*parts), CTC(torch.zeros(2, 5, 4))
    leaves = torch.zeros(2, 2), torch.zeros(2, 2, 5, 5), torch.zeros(2, 4, 3)
    node, edge = torch.zeros(1, 3, 2), torch.zeros(1, 2, 2)
    short, target = torch.tensor([4, 2]), torch.tensor([[1, 2], [1, 3]])
    every = torch.zeros(2, 3, 3, 3)
    for p, q, message in (
        (chain, LinearChain(*parts, short), r"other: expected lengths 4 at index \[1\], .* got 2"),
        (LinearChain(*parts, short), chain, r"other: expected lengths 2 at index \[1\], .* got 4"),
        (
            ParseTree(*leaves),
            ParseTree(*leaves, lengths=short),
            r"other: expected lengths 4 at index \[1\], .* got 2",
        ),
        (
            TreeCRF(torch.tensor([-1, 0, 0]), node, edge),
            TreeCRF(torch.tensor([-1, 0, 1]), node, edge),
            r"other: expected parents 0 at index \[2\], .* got 1",
        ),
        (alignment.posterior(target), alignment.posterior(target.flip(0)), "other: expected target .* got 3"),
        (
            alignment.posterior(target),
            alignment.posterior(target[:, :1]),
            r"other: expected target of shape \(2, 2\), as here, got \(2, 1\)",
        ),
        (
            alignment.posterior(target),
            CTC(torch.zeros(2, 5, 4), blank=3).posterior(target.clamp(max=2)[:1].expand(2, 2)),
            "other: expected (target 3|blank 0)",
        ),
        (
            chain,
            LinearChain(*(x[..., :2] for x in (parts[0], parts[1][:, :2], parts[2]))),
            r"other: expected initial of event shape",
        ),
        (
            chain,
            LinearChain(parts[0], every, parts[2]),
            r"other: expected transition of event shape \(3, 3\), as here, got \(3, 3, 3\)",
        ),
    ):
        for ask in (p.kl_divergence, p.cross_entropy):
            with pytest.raises(ValueError, match=message):
                ask(q)
    torch.testing.assert_close(chain.kl_divergence(LinearChain(*parts, torch.tensor([4, 4]))), torch.zeros(2))
    padded = torch.nn.functional.pad(target, (0, 2), value=-1)
    same = alignment.posterior(target).kl_divergence(alignment.posterior(padded))
    torch.testing.assert_close(same, torch.zeros(2))


APART = {
    "uniform": (dist.Uniform, [0.0, 0.5], [1.0, 2.0], [0.7, 0.2, 1.5]),
    "binomial": (dist.Binomial, [3.0, 10.0], [0.5, 0.2], [2.0, 8.0]),
    "pareto": (dist.Pareto, [1.0, 2.0], [1.0, 3.0], [5.0, 1.5, 3.0]),
}


@pytest.mark.parametrize("batch", [(), (2,), (3,)])
@pytest.mark.parametrize("kind", APART)
def test_states_with_supports_of_their_own(kind, batch):
    """A value outside one state's support is impossible there, outside all supports an error."""
    make, first, second, y = APART[kind]
    a, b, y = (
        torch.tensor(x).requires_grad_(not n) for n, x in zip((0, 0, 1), (first, second, y), strict=True)
    )
    b = b.detach() if kind == "uniform" else b
    emission = make(
        a.detach().expand(*batch, 2) if kind == "binomial" else a.expand(*batch, 2), b.expand(*batch, 2)
    )
    d = HMM(randn(0, *batch, 2), randn(1, *batch, 2, 2), emission, num_steps=len(y))
    evidence = d.log_prob(y)
    inside = {
        "uniform": lambda s, v: first[s] <= v < second[s],
        "binomial": lambda s, v: v <= first[s],
        "pareto": lambda s, v: v >= first[s],
    }[kind]
    alone = [
        make(torch.tensor(m), torch.tensor(n), validate_args=False)
        for m, n in zip(first, second, strict=True)
    ]
    seen = [[alone[s].log_prob(v).item() if inside(s, v) else -math.inf for s in (0, 1)] for v in y]
    assert any(-math.inf in row for row in seen)
    for at in itertools.product(*map(range, batch)):
        initial, transition = (x[at].log_softmax(-1).tolist() for x in (d.initial, d.transition))
        right = Listing(chains(initial, transition, seen)).log_partition
        assert evidence[at].item() == pytest.approx(right, abs=1e-12)
    (gradient,) = torch.autograd.grad(evidence.sum(), a if kind == "uniform" else b)
    assert gradient.isfinite().all() and gradient.any()
    assert d.log_prob(d.sample((5,))).isfinite().all()
    if not batch:
        assert d.support.check(y)
        assert not d.support.check(y - 9)
    y = y.detach().clone()
    y[1] = -7.0
    with pytest.raises(
        ValueError, match=r"y: expected values in the emission's support, got -7.0 at index \[(0, )?1\]"
    ):
        d.log_prob(y)
    y[1] = math.nan
    assert d.log_prob(y).isfinite().all()


def test_a_missing_step_is_in_no_support():
    """What stands in for it may be outside the support that its own step has."""
    emission = dist.Binomial(torch.tensor([[9.0, 9.0], [2.0, 1.0]]), 0.5)
    d = HMM(torch.zeros(2), torch.zeros(2, 2), emission)
    right = dist.Binomial(9.0, 0.5).log_prob(torch.tensor(8.0))
    torch.testing.assert_close(d.log_prob(torch.tensor([8.0, math.nan])), right)


# ---- at Pyro sites


def test_training_through_an_hmm_site_raises_the_evidence():
    true = HMM(
        torch.zeros(2),
        torch.tensor([[2.0, 0.0], [0.0, 2.0]]),
        dist.Normal(torch.tensor([-2.0, 2.0]), 1.0),
        10,
    )
    y = true.sample((50,))

    def model(y):
        initial = pyro.param("initial", torch.zeros(2))
        transition = pyro.param("transition", torch.zeros(2, 2))
        location = pyro.param("location", torch.tensor([-0.5, 0.5]))
        with pyro.plate("data", 50, subsample_size=25) as index:
            pyro.sample("y", HMM(initial, transition, dist.Normal(location, 1.0), num_steps=10), obs=y[index])

    svi = SVI(model, lambda y: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(150):
        svi.step(y)
    location = pyro.param("location").detach()
    learned = HMM(pyro.param("initial"), pyro.param("transition"), dist.Normal(location, 1.0))
    torch.testing.assert_close(location, torch.tensor([-2.0, 2.0]), rtol=0, atol=0.3)
    assert learned.log_prob(y).mean() > true.log_prob(y).mean() - 0.1


def test_exact_posterior_as_guide_gives_the_evidence_without_variance():
    steps, states = 5, 3
    initial, transition, location = (
        randn(0, states).detach(),
        randn(1, states, states).detach(),
        randn(2, states).detach(),
    )
    y = torch.randn(4, steps)
    prior = HMM(initial, transition, dist.Normal(location, 1.0), num_steps=steps)

    def model():
        with pyro.plate("data", 4):
            z = pyro.sample("z", prior.prior)
            pyro.sample("y", dist.Normal(location[z], 1.0).to_event(1), obs=y)

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", prior.posterior(y))

    for _ in range(3):
        assert -Trace_ELBO().loss(model, guide) == pytest.approx(prior.log_prob(y).sum().item(), abs=1e-10)


# ---- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LinearChain(torch.zeros(3), torch.zeros(2, 2), torch.zeros(4, 3)),
            "initial, transition, observation: expected shapes",
        ),
        (
            lambda: LinearChain(torch.zeros(3), torch.zeros(5, 3, 3), torch.zeros(4, 3)),
            "initial, transition, observation: expected shapes",
        ),
        (
            lambda: LinearChain(torch.zeros(3), torch.zeros(3, 3), torch.zeros(0, 3)),
            "initial, transition, observation: expected shapes",
        ),
        (
            lambda: LinearChain(
                torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 4, 3), torch.tensor([4, 5])
            ),
            r"lengths: expected .*got 5 at index \[1\]",
        ),
        (
            lambda: LinearChain(
                torch.zeros(2, 3), torch.zeros(2, 3, 3), torch.zeros(2, 4, 3), torch.tensor([0, 4])
            ),
            r"lengths: expected .*got 0 at index \[0\]",
        ),
        (
            lambda: HMM(
                torch.zeros(2), torch.tensor([[0.0, 0.0], [-math.inf] * 2]), dist.Normal(torch.zeros(2), 1.0)
            ),
            r"transition: expected .*got -inf throughout row \[1\]",
        ),
        (
            lambda: HMM(torch.tensor([0.0, math.nan]), torch.zeros(2, 2), dist.Normal(torch.zeros(2), 1.0)),
            r"initial: expected .*got nan at index \[1\]",
        ),
        (
            lambda: HMM(torch.zeros(2), torch.zeros(2, 2), dist.Normal(torch.zeros(3), 1.0)),
            "initial, transition, emission: expected",
        ),
        (
            lambda: HMM(torch.zeros(2), torch.zeros(2, 2), dist.Normal(torch.zeros(2), 1.0)).sample(),
            "num_steps: expected .* got None",
        ),
        (
            lambda: HMM(torch.zeros(2), torch.zeros(3, 2, 2), dist.Normal(torch.zeros(2), 1.0), num_steps=7),
            "num_steps: expected the same number",
        ),
        (
            lambda: HMM(
                torch.zeros(2), torch.zeros(2, 2), dist.Categorical(logits=torch.zeros(2, 3))
            ).log_prob(torch.tensor([[0, 1], [2, 3]])),
            r"y: expected .*got 3 at index \[1, 1\]",
        ),
        (
            lambda: HMM(torch.zeros(2), torch.zeros(3, 2, 2), dist.Normal(torch.zeros(2), 1.0)).log_prob(
                torch.zeros(5)
            ),
            "y: expected 4 steps, got 5",
        ),
        (
            lambda: LinearChain(torch.zeros(3), torch.zeros(3, 3), torch.zeros(4, 3)).log_prob(
                torch.tensor([0, 1, 3, 0])
            ),
            r"z: expected .*got 3 at index \[2\]",
        ),
        (
            lambda: LinearChain(torch.zeros(3), torch.zeros(3, 3), torch.zeros(3)),
            "initial, transition, observation: expected shapes",
        ),
        (
            lambda: LinearChain(torch.zeros(1, 0), torch.zeros(1, 0, 0), torch.zeros(1, 5, 0)),
            "initial, transition, observation: expected shapes",
        ),
        (
            lambda: LinearChain(torch.zeros(4, 17), torch.zeros(17, 17), torch.zeros(4, 5, 17)),
            r"potentials shared by the batch have batch size 1, as transition\[None\]",
        ),
        (
            lambda: LinearChain(torch.zeros(3), torch.zeros(3, 3), torch.zeros(5, 3), torch.tensor([5, 3])),
            r"lengths: expected shape .* 0 batch dimensions, .* got \(2,\); add .* by x\[None\]",
        ),
        (
            lambda: LinearChain(torch.zeros(1, 3), torch.zeros(1, 3, 3), torch.zeros(1, 5, 3), [2]),
            r"lengths: expected a LongTensor .*got a list",
        ),
        (
            lambda: LinearChain(
                torch.zeros(2, 3), torch.zeros(1, 3, 3), torch.zeros(1, 5, 3), torch.ones(3).long()
            ),
            "batch shapes: expected shapes that broadcast",
        ),
        (
            lambda: SemiMarkov(
                torch.zeros(3),
                torch.zeros(3, 3),
                torch.zeros(3, 4),
                torch.zeros(4, 3),
                lengths=torch.ones(2).long(),
            ),
            r"lengths: expected shape .*got \(2,\)",
        ),
        (
            lambda: HMM(torch.zeros(2), torch.zeros(2, 2), torch.zeros(2)),
            "emission: expected a distribution .*got a Tensor",
        ),
        (
            lambda: HMM(torch.zeros(2), torch.zeros(2, 2), dist.Normal(torch.zeros(2), 1.0), lengths=[3]),
            "lengths: expected .*got a list",
        ),
        (
            lambda: HMM(
                torch.zeros(2),
                torch.zeros(2, 2),
                dist.Bernoulli(logits=torch.tensor([0.0, math.inf]), validate_args=False),
            ).log_prob(torch.tensor([0.0, 1.0])),
            r"emission's log probability of y: expected .*got nan at index \[1, 1\]",
        ),
        (
            lambda: CTC(torch.zeros(2, 5, 4)).log_prob(torch.ones(3, 1).long()),
            r"y: expected shape \[\*B,L\] with \*B = \(2,\), got \(3, 1\)",
        ),
        (
            lambda: TreeCRF(torch.tensor([-1.0]), torch.zeros(1, 3), torch.zeros(3, 3)),
            "parents: expected integers, got dtype",
        ),
        (
            lambda: TreeCRF(torch.zeros(0).long(), torch.zeros(0, 3), torch.zeros(3, 3)),
            "parents, node, edge: expected",
        ),
        (
            lambda: SemiMarkov(torch.zeros(3), torch.zeros(3, 3), torch.zeros(2, 4), torch.zeros(4, 3)),
            "initial, transition, duration, .*: expected shapes",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_chain_is_not_enumerated():
    q = LinearChain(torch.zeros(3), torch.zeros(3, 3), torch.zeros(4, 3))
    with pytest.raises(NotImplementedError, match="LinearChain has too many values to enumerate"):
        q.enumerate_support()


def test_checks_are_off_when_validation_is():
    with pyro.validation_enabled(False):
        q = LinearChain(torch.tensor([0.0, math.nan]), torch.zeros(2, 2), torch.zeros(3, 2))
        assert q.log_partition.isnan()


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2, 3])])
@pytest.mark.parametrize("kind", ["bernoulli", "poisson"])
def test_emissions_by_matrix_products_are_the_plain_ones(kind, lengths):
    parameter = torch.randn(2, 5, requires_grad=True)
    if kind == "bernoulli":
        emission = dist.Bernoulli(logits=parameter).to_event(1)
    else:
        emission = dist.Poisson(parameter.exp()).to_event(1)
    y = emission.sample((3, 4))[..., 0, :]
    hmm = HMM(torch.zeros(2), torch.randn(2, 2), emission, lengths=lengths)
    fast = hmm.posterior(y).potentials[2]
    plain = emission.log_prob(y.unsqueeze(-2))
    if lengths is not None:
        plain = torch.where((torch.arange(4) < lengths[:, None])[..., None], plain, 0.0)
    torch.testing.assert_close(fast, plain)
    weight = torch.randn_like(fast)
    (a,), (b,) = (
        torch.autograd.grad((weight * x).sum(), parameter, retain_graph=True) for x in (fast, plain)
    )
    torch.testing.assert_close(a, b)


class Counting(dist.Normal):
    """Counts the values whose density is asked for."""

    values = 0

    def log_prob(self, value):
        Counting.values += value.numel()
        return super().log_prob(value)


UNEVEN = [300, 7, 5, 7, 300, 6, 1, 280, 7, 90, 8, 2]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("varying", [False, True])
def test_sequences_of_unequal_lengths_cost_what_they_cost_apart(varying):
    steps, states, lengths = 300, 40, torch.tensor(UNEVEN)
    y = torch.randn(len(lengths), steps)
    leaves = [
        randn(0, states),
        randn(1, *((steps - 1,) if varying else ()), states, states),
        randn(2, states),
    ]

    def make(lengths, steps):
        move = leaves[1][: steps - 1] if varying else leaves[1]
        return HMM(leaves[0], move, Counting(leaves[2], 1.0), lengths=lengths)

    Counting.values = 0
    value = make(lengths, steps).log_prob(y)
    assert Counting.values == lengths.sum()
    gradients = torch.autograd.grad(value.sum(), leaves)
    apart = torch.stack([make(None, n).log_prob(row[:n]) for row, n in zip(y, lengths.tolist(), strict=True)])
    torch.testing.assert_close(value, apart, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(apart.sum(), leaves), rtol=1e-9, atol=1e-9)
    # the posterior of all evaluates the emissions of present steps alone, too
    Counting.values = 0
    posterior = make(lengths, steps).posterior(y)
    assert Counting.values == lengths.sum()
    torch.testing.assert_close(posterior.log_partition, value, rtol=1e-11, atol=0)
    ones = (torch.arange(steps) < lengths[:, None]).double()
    torch.testing.assert_close(posterior.marginals.observation.sum(-1), ones, rtol=0, atol=1e-10)
    # padding may be anything, and has no gradient
    y = torch.where(ones.bool(), y, math.nan).requires_grad_()
    again = make(lengths, steps).log_prob(y)
    torch.testing.assert_close(again, value, rtol=1e-11, atol=0)
    (by_y,) = torch.autograd.grad(again.sum(), y)
    assert not by_y[~ones.bool()].any() and by_y[ones.bool()].all()


@pytest.mark.usefixtures("kernels")
def test_a_value_beyond_the_supports_of_uneven_sequences_is_named():
    d = HMM(
        randn(0, 3), randn(1, 3, 3), dist.Gamma(randn(2, 3).exp(), 1.0), lengths=torch.tensor([500, 3, 2])
    )
    y = torch.ones(3, 500)
    y[2, 1] = -7.0
    with pytest.raises(ValueError, match=r"y: expected values in the emission's support, got -7.0"):
        d.log_prob(y)
    y[2, 1], y[2, 2] = 1.0, -7.0
    assert d.log_prob(y).isfinite().all()


def test_an_evidence_without_gradient_is_not_kept_for_those_who_need_one():
    initial = torch.randn(1, 3, requires_grad=True)
    chain = LinearChain(initial, torch.randn(1, 3, 3), torch.randn(1, 4, 3))
    with torch.no_grad():
        value = chain.log_partition
    assert not value.requires_grad
    chain.log_partition.sum().backward()
    assert initial.grad.abs().max() > 0

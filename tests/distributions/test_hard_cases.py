"""On hard input the value is right to 1e-5, the gradient right and finite, and other rows are untouched."""

import math

import pytest
import torch

import pyroelbo.distributions._forward_backward as recursions
from pyroelbo.distributions import LinearChain
from tests.hard_cases import CHAINS
from tests.oracles import Listing, chains, forward_backward

TOLERANCE = 1e-5


def build(case, dtype, shared, states=None):
    """Three sequences, the hard one in the middle; ``states`` adds unreachable ones beside its own."""
    initial, transition, observation = CHAINS[case]()
    if states is not None:
        more = states - len(initial)
        initial = torch.nn.functional.pad(initial, (0, more), value=-math.inf)
        transition = torch.nn.functional.pad(transition, (0, more, 0, more), value=-math.inf)
        observation = torch.nn.functional.pad(observation, (0, more), value=0.0)
    generator = torch.Generator().manual_seed(1)
    beside = torch.randn(2, *observation.shape, generator=generator, dtype=torch.float64)
    observation = torch.stack([beside[0], observation, beside[1]])
    count = len(initial)
    easy = torch.full((count, count), -math.log(count), dtype=torch.float64)
    initial = torch.stack([easy[0], initial, easy[0]])
    transition = transition[None] if shared else torch.stack([easy, transition, easy])
    return [x.to(dtype).requires_grad_() for x in (initial, transition, observation)]


def truth(initial, transition, observation, b):
    rows = [
        x.detach().double().expand(3, *x.shape[1:])[b].tolist() for x in (initial, transition, observation)
    ]
    return forward_backward(*rows)


@pytest.mark.parametrize("states", [None, 24], ids=["as is", "among 24 states"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CHAINS)
def test_chain(case, dtype, shared, states, kernels):
    if case == "twenty thousand steps" and (kernels == "torch" or states):
        pytest.skip("takes too long for what it adds")
    potentials = build(case, dtype, shared, states)
    q = LinearChain(*potentials)
    value, marginals = q.log_partition, q.marginals
    gradients = torch.autograd.grad(value.sum(), potentials)
    assert all(g.isfinite().all() for g in gradients)
    counts = torch.zeros_like(marginals.transition)
    for b in range(3):
        log_z, states_at, steps, best = truth(*potentials, b)
        assert value[b].item() == pytest.approx(log_z, rel=TOLERANCE)
        expected = torch.tensor(states_at).to(dtype)
        torch.testing.assert_close(marginals.observation[b].detach(), expected, rtol=0, atol=10 * TOLERANCE)
        counts[b] = torch.tensor(steps)
        if log_z > -math.inf:
            assert q.log_weight(q.mode)[b].item() == pytest.approx(best, rel=TOLERANCE)
            assert q.log_weight(q.expand((3,)).mode)[b] > -math.inf
    torch.testing.assert_close(
        marginals.transition.detach(), counts, rtol=10 * TOLERANCE, atol=10 * TOLERANCE
    )
    if shared:
        counts = counts.sum(0, keepdim=True)
    torch.testing.assert_close(gradients[1], counts, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)
    torch.testing.assert_close(gradients[2], marginals.observation.detach(), rtol=0, atol=TOLERANCE)

    rest = [x.detach()[[0, 2]] if len(x) == 3 else x.detach() for x in potentials]
    alone = LinearChain(*rest)
    torch.testing.assert_close(value[[0, 2]].detach(), alone.log_partition, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        marginals.observation[[0, 2]].detach(), alone.marginals.observation, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("case", CHAINS)
def test_samples_are_possible(case, kernels):
    if case == "twenty thousand steps":
        pytest.skip("nothing hard about its samples")
    potentials = [x.detach()[1:2] for x in build(case, torch.float64, False)]
    q = LinearChain(*potentials)
    if q.log_partition == -math.inf:
        with pytest.raises(ValueError, match="no structure has positive probability"):
            q.sample()
    else:
        z = q.sample((200,))
        assert (q.log_prob(z) > -700).all()
        frequency = q.to_parts(z).observation.mean(0)
        # Hoeffding at a false-alarm rate of 1e-6 over all cells
        bound = math.sqrt(math.log(2 * frequency.numel() / 1e-6) / 400)
        assert (frequency - q.marginals.observation).abs().max() < bound


def test_the_log_space_oracle_agrees_with_enumeration():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(*shape, generator=generator).tolist() for shape in ((3,), (3, 3), (4, 3))]
    log_z, states_at, _, best = forward_backward(*rows)
    listing = Listing(chains(*rows))
    assert log_z == pytest.approx(listing.log_partition, abs=1e-12)
    assert best - log_z == pytest.approx(listing.best(1)[0][1], abs=1e-12)
    expected = listing.marginals()["observation"]
    assert all(states_at[t][s] == pytest.approx(p, abs=1e-12) for (t, s), p in expected.items())


def test_a_naive_scaled_recursion_fails_these_cases():
    """The cases have teeth: the recursion without its check gets some wrong in each precision."""
    wrong = set()
    for case in CHAINS:
        for dtype in (torch.float32, torch.float64):
            flat = LinearChain(*build(case, dtype, False))._flat
            problem = flat(LinearChain(*build(case, dtype, False)).potentials)
            with torch.no_grad():
                naive = recursions._forward(problem, dtype, 0.0, False)[0].log_z[1].item()
            right = truth(*build(case, dtype, False), 1)[0]
            if naive != pytest.approx(right, rel=TOLERANCE):
                wrong.add((case, dtype))
    assert ("needed step of minus 120", torch.float32) in wrong
    assert ("needed step of minus 800", torch.float64) in wrong
    assert ("overtaking by 200", torch.float32) in wrong
    assert ("overtaking by 2000", torch.float64) in wrong

"""Masked diffusion: counts, orders and subsets agree with enumeration; tokens are revealed as the chain
says."""

import itertools
import math

import pytest
import torch
from torch import nn

from pyroelbo import audit, data, evidence, fit, models
from pyroelbo.evidence import Unavailable
from pyroelbo.models.masked import _reveal, ordinal


class Free(nn.Module):
    """A free table of logits for every pattern of tokens and masks."""

    def __init__(self, dims, symbols):
        super().__init__()
        self.places = (symbols + 1) ** torch.arange(dims)
        self.table = nn.Parameter(torch.randn((symbols + 1) ** dims, dims, symbols))

    def forward(self, z):
        return self.table[(z * self.places).sum(-1)]


def free(dims=3, symbols=2):
    pair = models.MaskedDiffusion(dims, symbols, "categorical", Free(dims, symbols))
    return pair, torch.cartesian_prod(*[torch.arange(symbols)] * dims)


@torch.no_grad()
def by_order(pair, y):
    """ln p(y | σ) of every order, [D!, N], one conditional after the other."""
    found = []
    for order in itertools.permutations(range(pair.dims)):
        total = torch.zeros(len(y))
        shown = torch.full_like(y, pair.levels)
        for i in order:
            total += pair.generator(shown)[:, i].log_softmax(-1).gather(-1, y[:, i : i + 1])[:, 0]
            shown = shown.clone()
            shown[:, i] = y[:, i]
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize(("dims", "symbols"), [(3, 2), (2, 4), (4, 2)])
def test_the_evidence_is_the_mean_over_all_orders(dims, symbols):
    pair, y = free(dims, symbols)
    each = by_order(pair, y)
    exact = evidence.exact(pair.written_out(), y).value
    torch.testing.assert_close(exact, each.logsumexp(0) - math.lgamma(dims + 1), rtol=0, atol=1e-12)
    assert float(exact.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_the_bound_by_count_is_the_average_over_orders():
    """By count, by drawn orders, and by continuous time with its weight 1/t: z-tests at 5, 1e-5 in all."""
    pair, y = free()
    average = by_order(pair, y).mean(0)
    for bound in (evidence.elbo(pair, y, 10000), evidence.elbo(pair.written_out(), y, 4000)):
        assert ((bound.value - average).abs() < 5 * bound.stderr).all()
    time = torch.rand(40000, 1)
    masked = torch.rand(40000, len(y), 3) < time[..., None]
    with torch.no_grad():
        found = pair.log_probs(y.expand(masked.shape), masked).gather(-1, y.expand(masked.shape)[..., None])
    integrand = (found[..., 0] * masked).sum(-1) / time
    error = integrand.std(0) / 200
    assert ((integrand.mean(0) - average).abs() < 5 * error).all()


def test_bounds_lie_between_the_order_average_and_the_evidence():
    pair, y = free()
    whole, average = pair.written_out(), by_order(pair, y).mean(0)
    exact = evidence.exact(whole, y).value
    iwae, smc = evidence.iwae(whole, y, 4000), evidence.smc(whole, y, 8, 500, progress=False)
    for bound in (iwae, smc):  # 16 z-tests on the linear scale at 5.1
        assert ((bound.value - exact).expm1().abs() < 5.1 * bound.stderr).all()
    few = evidence.terms(whole, y, 4000).log_weight.reshape(1000, 4, -1).logsumexp(1) - math.log(4)
    error = few.mean(1).std() / 1000**0.5
    assert average.mean() + 5 * error < few.mean() < exact.mean() - 5 * error
    above = evidence.eubo(whole, y, 2000)
    assert (above.value > exact).all()
    result = audit(pair, y, particles=50, progress=False)
    assert result.reference == "exact" and result.name == "MaskedDiffusion, written out"


def test_the_posterior_over_orders():
    pair, y = free()
    whole = pair.written_out()
    q = whole.posterior(y)
    each = by_order(pair, y)
    orders = list(itertools.permutations(range(3)))
    ranks = torch.tensor(orders).argsort(-1)  # order lists places, a value the step of each place
    wanted = each.log_softmax(0)
    found = torch.stack([q.log_prob(r.expand(len(y), -1)) for r in ranks]).detach()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    drawn = q.sample((20000,))
    share = (drawn == ranks[0]).all(-1).double().mean(0)
    error = (found[0].exp() * (1 - found[0].exp()) / 20000).sqrt()
    assert ((share - found[0].exp()).abs() < 5 * error).all()


def test_simulated_data_and_filled_in_tokens_follow_the_evidence():
    pair, y = free()
    exact = evidence.exact(pair.written_out(), y).value.exp()
    place = 2 ** torch.arange(3).flip(0)
    _, drawn = pair.simulate(20000)
    seen = torch.bincount((drawn.long() * place).sum(-1), minlength=8) / 20000
    assert ((seen - exact).abs() < 5 * (exact * (1 - exact) / 20000).sqrt()).all()
    known = torch.tensor([True, False, False])
    start = torch.tensor([1, 0, 0]).expand(20000, -1)
    filled = pair.inpaint(start, known)
    assert (filled[:, 0] == 1).all()
    # the mean over the orders of the two others of the chain's conditionals
    with torch.no_grad():
        first = pair.generator(torch.tensor([[1, 2, 2]]))[0].softmax(-1)
        wanted = torch.zeros(2, 2)
        for a, b in itertools.product(range(2), repeat=2):
            last = pair.generator(torch.tensor([[1, a, 2], [1, 2, b]])).softmax(-1)
            wanted[a, b] = 0.5 * (first[1, a] * last[0, 2, b] + first[2, b] * last[1, 1, a])
    seen = torch.bincount(2 * filled[:, 1] + filled[:, 2], minlength=4) / 20000
    wanted = wanted.flatten()
    assert ((seen - wanted).abs() < 5 * (wanted * (1 - wanted) / 20000).sqrt()).all()
    at_once = pair.inpaint(start, known, steps=1)
    seen = torch.bincount(2 * at_once[:, 1] + at_once[:, 2], minlength=4) / 20000
    wanted = (first[1][:, None] * first[2]).flatten()
    assert ((seen - wanted).abs() < 5 * (wanted * (1 - wanted) / 20000).sqrt()).all()


@torch.no_grad()
@pytest.mark.parametrize("likelihood", ["categorical", "discretized_logistic"])
def test_steps_by_columns_are_passes_of_the_network(likelihood):
    pair = models.MaskedDiffusion(5, 4, likelihood, width=8, layers=2, classes=2).eval()
    for p in pair.parameters():
        p.add_(0.3 * torch.randn_like(p))
    y, labels = torch.randint(4, (6, 5)), torch.arange(6) % 2
    order = torch.rand(3, 6, 5).argsort(-1)
    passes = [_reveal(pair, y, labels, order, step) for step in range(5)]
    torch.testing.assert_close(pair.by_step(y, order, labels), torch.stack(passes, -1))


@pytest.mark.parametrize("network", ["mlp", "conv", "transformer"])
def test_only_tokens_that_are_not_masked_are_seen(network):
    pair = models.MaskedDiffusion((2, 3), 4, "categorical", network, 8, 2)
    masked = torch.tensor([True, False, True, False, False, True])
    y = torch.randint(4, (20, 6))
    other = torch.where(masked, torch.randint(4, (20, 6)), y)
    where = masked.expand(20, 6)
    torch.testing.assert_close(pair.log_probs(y, where), pair.log_probs(other, where))
    changed = torch.where(masked, y, (y + 1) % 4)
    moved = pair.log_probs(y, where) - pair.log_probs(changed, where)
    assert (moved[:, masked].abs() > 0).any(-1).all()


def test_logistics_are_ordered_and_sum_to_one():
    out = 3 * torch.randn(50, 9)
    found = ordinal(out, 7)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(50))
    sharp = ordinal(torch.tensor([0.0, 0.5, 3.0]), 7)  # one logistic at 4.5, between 4 and 5
    assert sharp.argsort(descending=True)[:2].sort().values.tolist() == [4, 5]
    assert (ordinal(torch.zeros(15), 17).exp() * 17 > 0.2).all()


def test_training_lowers_the_bound_and_the_mask_is_no_symbol():
    y = data.load("digits", "binary")["train"][:100]
    torch.manual_seed(0)
    pair = models.MaskedDiffusion((8, 8), width=32, layers=1)
    run = fit(pair, y, epochs=12, batch_size=25, learning_rate=1e-2, progress=False)
    assert run.losses[-1] < 34 < 64 * math.log(2) - 8
    with pytest.raises(ValueError, match="got 2"):
        fit(pair, torch.full((3, 64), 2.0), progress=False)
    with pytest.raises(Unavailable, match=r"D ≤ 16, got D = 64"):
        evidence.exact(pair.written_out(), y[:2])


def test_a_transformer_starts_with_places_that_tell_their_distance():
    """From another start a small one was at the symbols' frequencies for a thousand steps."""
    places = models.MaskedDiffusion(12, 3, "categorical", "transformer", width=8).generator.places.detach()
    alike = places @ places.T
    for distance in range(12):
        along = alike.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
        assert distance == 0 or along[0] < alike[0, 0] - 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"likelihood": "l2"}, "likelihood: expected"),
        ({"network": "conv"}, "shape: expected \\(height, width\\)"),
        ({"network": "unet"}, "network: expected one of"),
        ({"likelihood": "categorical", "levels": 1}, "levels: expected a whole number of at least 2"),
        ({"network": "transformer", "width": 6}, "width: expected a multiple of heads=4"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        models.MaskedDiffusion(5, **settings)


def test_a_transformer_learns_from_where_symbols_are():
    """Palindromes: a symbol is known once its mirror image is revealed. Where symbols outshout their places
    300 steps stay at 1.28, what the counts of symbols tell."""
    torch.manual_seed(0)
    pair = models.MaskedDiffusion(16, 4, "categorical", "transformer", width=16, layers=1)
    optimizer, losses = torch.optim.Adam(pair.parameters(), lr=1e-2), []
    for _ in range(300):
        half = torch.randint(4, (32, 8))
        loss = -pair.term(torch.cat([half, half.flip(1)], 1), torch.rand(32), torch.rand(32, 16)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-50:]) / 50 < 1

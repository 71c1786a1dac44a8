"""Enumeration against sums written out by hand, and against Pyro's own on ordinary input."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate

from pyroelbo import Pair, evidence
from pyroelbo.models import GaussianMixture
from pyroelbo.pair import ExactPair


def chain(log_first, log_next, length):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z_0", dist.Categorical(logits=log_first))
            for t in range(length):
                if t:
                    z = pyro.sample(f"z_{t}", dist.Categorical(logits=log_next[z]))
                pyro.sample(f"y_{t}", dist.Normal(z.to(y.dtype), 0.5), obs=y[:, t])

    return Pair.of(model, lambda y: None)


def by_hand(log_first, log_next, y):
    total = []
    for path in itertools.product(range(len(log_first)), repeat=y.shape[1]):
        log_p = log_first[path[0]] + sum(log_next[a, b] for a, b in itertools.pairwise(path))
        total.append(log_p + dist.Normal(torch.tensor(path, dtype=y.dtype), 0.5).log_prob(y).sum(-1))
    return torch.logsumexp(torch.stack(total), 0)


def test_a_chain_is_summed_exactly():
    first, following = torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1)
    y = torch.randn(4, 5)
    bound = evidence.exact(chain(first, following, 5), y)
    torch.testing.assert_close(bound.value, by_hand(first, following, y), rtol=1e-12, atol=1e-12)
    alone = evidence.exact(chain(first, following, 5), y[:1])
    torch.testing.assert_close(alone.value, bound.value[:1], rtol=1e-12, atol=1e-12)
    assert bound.kind == "exact" and bound.scope == "datum"


def test_a_long_chain_needs_no_table_of_all_paths():
    first, following = torch.randn(4).log_softmax(0), torch.randn(4, 4).log_softmax(-1)
    y = torch.randn(2, 40)
    value = evidence.exact(chain(first, following, 40), y).value
    alpha = first + dist.Normal(torch.arange(4.0), 0.5).log_prob(y[:, :1])
    for t in range(1, 40):
        alpha = torch.logsumexp(alpha[:, :, None] + following, 1) + dist.Normal(
            torch.arange(4.0), 0.5
        ).log_prob(y[:, t : t + 1])
    torch.testing.assert_close(value, alpha.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("needed", [-18.0, -120.0, -800.0])
def test_a_needed_rare_transition_is_not_lost(dtype, needed):
    """The only way through the data uses one improbable step; sums of probabilities would underflow."""
    torch.set_default_dtype(dtype)
    first = torch.tensor([0.0, -math.inf])
    following = torch.tensor([[0.0, needed], [-math.inf, 0.0]])

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Categorical(logits=first))
            b = pyro.sample("b", dist.Categorical(logits=following[a]))
            pyro.sample("y", dist.Delta(b.to(y.dtype)), obs=y)

    y = torch.tensor([1.0, 0.0])
    value = evidence.exact(Pair.of(model, lambda y: None), y).value
    torch.testing.assert_close(value, torch.tensor([needed, 0.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_inner_plates_multiply():
    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))
            with pyro.plate("time", y.shape[1], dim=-2):
                j = pyro.sample("j", dist.Bernoulli(torch.tensor([0.3, 0.6])[k]))
                pyro.sample("y", dist.Normal(j + 2.0 * k, 1.0), obs=y.T)

    y = torch.randn(3, 4)
    total = []
    for k, log_pk in enumerate((math.log(0.2), math.log(0.8))):
        p = (0.3, 0.6)[k]
        step = torch.logsumexp(
            torch.stack(
                [math.log(q) + dist.Normal(j + 2.0 * k, 1.0).log_prob(y) for j, q in ((0, 1 - p), (1, p))]
            ),
            0,
        )
        total.append(log_pk + step.sum(1))
    value = evidence.exact(Pair.of(model, lambda y: None), y).value
    torch.testing.assert_close(value, torch.logsumexp(torch.stack(total), 0), rtol=1e-12, atol=1e-12)
    loss = TraceEnum_ELBO(max_plate_nesting=2).loss(config_enumerate(model, "parallel"), lambda y: None, y)
    assert loss == pytest.approx(-float(value.sum()))


def test_enumeration_agrees_with_the_closed_form_of_a_mixture():
    mixture, y = GaussianMixture(3, 4), torch.randn(6, 3)
    value = evidence.exact(Pair.of(mixture.model, lambda y: None), y).value
    torch.testing.assert_close(value, mixture.log_evidence(y).detach(), rtol=1e-12, atol=1e-12)


def test_latents_outside_the_data_plate_are_eliminated():
    """A shared mean and a coin for each of 60 data: 3 · 2^60 joint values."""

    def model(y):
        m = pyro.sample("m", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(m + 3 * k, 1.0), obs=y)

    y = torch.randn(60)
    parts = []
    for m, p in enumerate((0.2, 0.3, 0.5)):
        each = [math.log(w) + dist.Normal(m + 3.0 * k, 1.0).log_prob(y) for k, w in ((0, 0.6), (1, 0.4))]
        parts.append(math.log(p) + torch.logsumexp(torch.stack(each), 0).sum())
    bound = evidence.exact(Pair.of(model, lambda y: None), y, scope="joint")
    torch.testing.assert_close(bound.value, torch.logsumexp(torch.stack(parts), 0), rtol=1e-12, atol=1e-12)
    assert bound.scope == "joint" and bound.kind == "exact"


def test_a_chain_over_the_data_is_its_dynamic_program():
    """Regimes of 40 groups of data, drawn outside their plate: 3^40 joint values."""
    first, following = torch.randn(3).log_softmax(0), torch.randn(3, 3).log_softmax(-1)

    def model(y):
        plate = pyro.plate("data", len(y))
        z = None
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=first if z is None else following[z]))
            with plate:
                pyro.sample(f"y_{t}", dist.Normal(z.to(y.dtype), 1.0), obs=y[:, t])

    y = torch.randn(5, 40)
    alpha = first
    for t in range(40):
        alpha = alpha if t == 0 else torch.logsumexp(alpha[:, None] + following, 0)
        alpha = alpha + dist.Normal(torch.arange(3.0), 1.0).log_prob(y[:, t, None]).sum(0)
    value = evidence.exact(Pair.of(model, lambda y: None), y, scope="joint").value
    torch.testing.assert_close(value, alpha.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_what_cannot_be_summed_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(evidence.Unavailable, match="'z' has no finite set"):
        evidence.exact(Pair.of(model, lambda y: None), torch.zeros(2))

    class Sums(ExactPair):
        def model(self, y):
            model(y)

        def log_evidence(self, y):
            return y.sum()

        def posterior(self, y):
            return dist.Normal(y, 1.0)

    with pytest.raises(ValueError, match=r"expected shape \(2,\), got \(\)"):
        evidence.exact(Sums(), torch.zeros(2))


def test_the_cost_of_an_enumeration_is_its_states():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("y", dist.Normal(z.double(), 1.0), obs=y)

    assert evidence.exact(Pair.of(model, lambda y: None), torch.randn(5)).cost == 15


def test_a_scale_in_the_model_is_no_part_of_an_enumeration():
    def model(y):
        with pyro.plate("data", len(y)), pyro.poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("y", dist.Normal(z.double(), 1.0), obs=y)

    with pytest.raises(ValueError, match="scale"):
        evidence.exact(Pair.of(model, lambda y: None), torch.randn(5))

"""Vectors of finite values are summed over like single values."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroelbo import Pair, audit, evidence, fit_em, models
from pyroelbo.distributions import TreeCRF
from pyroelbo.evaluation.finite import EnumerableVectors, num_values


def test_the_number_of_values():
    assert num_values(dist.Bernoulli(torch.rand(4, 3)).to_event(1)) == 8
    assert num_values(dist.Categorical(torch.ones(2, 3, 5)).to_event(2)) == 5**6
    assert num_values(dist.OneHotCategorical(torch.ones(2, 3)).to_event(1)) == 9
    assert num_values(dist.Bernoulli(torch.rand(2, 3)).to_event(1).to_event(1)) == 64
    assert num_values(dist.Normal(torch.zeros(3), 1).to_event(1)) is None
    assert num_values(dist.Poisson(1.0)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Bernoulli(torch.rand(4, 3)).to_event(1),
        lambda: dist.Categorical(torch.rand(4, 2, 3)).to_event(1),
        lambda: dist.OneHotCategorical(torch.rand(4, 2, 3)).to_event(1),
        lambda: dist.Bernoulli(torch.rand(4, 2, 1)).to_event(1).to_event(1),
    ],
)
def test_every_value_once_with_probabilities_that_sum_to_one(make):
    fn = make()
    with EnumerableVectors():
        site = pyro.poutine.trace(lambda: pyro.sample("z", fn)).get_trace().nodes["z"]
    values = site["fn"].enumerate_support(expand=False)
    rest = [1] * len(fn.batch_shape)
    assert values.shape == (num_values(fn), *rest, *fn.event_shape)
    assert len(values.reshape(len(values), -1).unique(dim=0)) == len(values)
    torch.testing.assert_close(site["fn"].log_prob(values).logsumexp(0), torch.zeros(fn.batch_shape))


@pytest.mark.parametrize("values", [2, 3])
def test_exact_evidence_of_layers_of_vectors(values):
    pair = models.DiscreteVAE(6, (3, 2), (5,), values)
    y = torch.bernoulli(torch.full((4, 6), 0.5))

    def every(count):
        codes = torch.tensor(list(itertools.product(range(values), repeat=count)))
        return codes.double() if values == 2 else nn.functional.one_hot(codes, values).double()

    total = []
    for z2, z1 in itertools.product(every(2), every(3)):
        given = {"z_2": z2.expand(4, *z2.shape), "z_1": z1.expand(4, *z1.shape)}
        trace = pyro.poutine.trace(pyro.condition(pair.model, given)).get_trace(y)
        trace.compute_log_prob()
        total.append(sum(trace.nodes[k]["log_prob"] for k in ("z_1", "z_2", "y")))
    found = evidence.exact(pair, y)
    torch.testing.assert_close(found.value, torch.stack(total).logsumexp(0).detach())
    assert evidence.exact(pair, y, scope="joint").value == pytest.approx(float(found.value.sum()))
    rows = {b.method: b for b in audit(pair, y, particles=32).bounds}
    assert (rows["elbo"].value <= found.value + 5 * rows["elbo"].stderr).all()


def test_data_go_in_blocks_where_values_are_many(monkeypatch):
    pair, y = models.DiscreteVAE(6, (4,), ()), torch.bernoulli(torch.full((7, 6), 0.5))
    whole = evidence.exact(pair, y)
    monkeypatch.setattr("pyroelbo.evaluation.enumeration._AT_ONCE", 32)
    blocks = evidence.exact(pair, y)
    torch.testing.assert_close(blocks.value, whole.value)
    assert blocks.cost == whole.cost


def test_em_fits_them():
    pair = models.DiscreteVAE(6, (3,), ())
    y = torch.bernoulli(torch.full((40, 6), 0.5))
    run = fit_em(pair, y, epochs=5, progress=False)
    assert all(b <= a + 1e-9 for a, b in itertools.pairwise(run.losses)) and run.losses[-1] < run.losses[0]


def test_vectors_of_too_many_values_are_refused_with_their_number():
    with pytest.raises(
        ValueError, match=r"'z_1' has 1.1e\+12 values: a sum over them is limited to 1,048,576"
    ):
        evidence.exact(models.DiscreteVAE(6, (40,), ()), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"'z_1' has 1\.2e\+313 values"):  # more than a float holds
        evidence.exact(models.ByteVAE(6, (130, 1), ()), torch.zeros(2, 6))


class Switch(Pair):
    """A vector of switches beside a data-free scale, all data coupled by their mean."""

    def model(self, y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y), 2), 0.3)).to_event(1))
            loc = k.sum(-1) - k.sum(-1).mean(-1, keepdim=True)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def guide(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(y), 2), 0.4)).to_event(1))


def test_coupled_data_are_summed_over_all_values_together():
    y = torch.tensor([0.5, -1.0, 1.2])
    total = []
    for code in itertools.product((0.0, 1.0), repeat=6):
        k = torch.tensor(code).reshape(3, 2)
        loc = k.sum(-1) - k.sum(-1).mean()
        prior = (0.3**k * 0.7 ** (1 - k)).log().sum()
        total.append(float(prior - 0.5 * ((y - loc) ** 2).sum() - 1.5 * math.log(2 * math.pi)))
    expected = float(torch.tensor(total).logsumexp(0))
    assert float(evidence.exact(Switch(), y, scope="joint").value) == pytest.approx(expected)


def test_the_labels_of_a_tree_are_enumerated():
    parents = torch.tensor([[-1, 0, 0, 1], [3, 0, 1, -1]])
    torch.manual_seed(0)
    node, edge, seen = torch.randn(2, 4, 2), torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", TreeCRF(parents[: len(y)], node[: len(y)], edge[: len(y)]))
            p = torch.where(z == 1, seen[: len(y), :, 1], seen[: len(y), :, 0])
            pyro.sample("y", dist.Normal(p, 1.0).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(torch.ones(len(y), 4, 2)).to_event(1))

    y = torch.randn(2, 4)
    emission = dist.Normal(seen, 1.0).log_prob(y[..., None])  # a tree again, whose sum is known
    prior, posterior = (TreeCRF(parents, x, edge).log_partition for x in (node, node + emission))
    found = evidence.exact(Pair.of(model, guide), y)
    torch.testing.assert_close(found.value, posterior - prior)

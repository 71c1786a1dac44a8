import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceGraph_ELBO

from pyroelbo.distributions import LinearChain, TreeCRF
from tests.distributions.structured_contract import StructuredContract
from tests.distributions.test_chain import nested, randn
from tests.oracles import Listing, labelled_trees

# parents, states, one edge matrix for all edges
TREES = {
    "binary": ([-1, 0, 0, 1, 1], 2, True),
    "star": ([2, 2, -1, 2, 2], 2, False),
    "path": ([1, 2, 3, -1], 3, False),
    "forest": ([-1, 0, -1, 2, 2], 2, True),
    "sparse": ([-1, 0, 0, 1], 3, False),
    "single": ([-1], 4, True),
    "uneven": ([3, 0, 0, -1, 1, 3], 2, False),
    "own": ([[-1, 0, 0, 1, 1], [2, 2, -1, 2, 2], [1, 2, 3, 4, -1]], 2, True),
    "own-sparse": ([[-1, 0, 0, 1], [1, -1, -1, 2], [-1, -1, -1, -1]], 3, False),
}


@pytest.mark.parametrize("case", TREES)
class TestTreeCRF(StructuredContract):
    def make(self, case, seed=0):
        parents, states, same = TREES[case]
        nodes = torch.tensor(parents).shape[-1]
        edge = (
            randn(seed + 1, 1, states, states)
            if same
            else randn(seed + 1, 3, nodes, states, states, sparse="sparse" in case)
        )
        return TreeCRF(torch.tensor(parents), randn(seed, 3, nodes, states), edge)

    def construct(self, q, potentials):
        rows = len(potentials[0])
        return TreeCRF(q.parents[:rows] if q.parents.dim() > 1 and rows < 3 else q.parents, *potentials)

    def listing(self, q, b):
        node, edge = (nested(x.expand(3, *x.shape[1:])[b]) for x in q.potentials)
        parents = q.parents[b] if q.parents.dim() > 1 else q.parents
        return Listing(labelled_trees(parents.tolist(), node, edge))


@pytest.mark.parametrize("case", TREES)
def test_labels_one_by_one_have_the_probability_of_the_tree(case):
    """ln p(z) = Σ ln p(z_n | z_parent) in the order of stepwise, for every z."""
    q = TestTreeCRF().make(case)
    nodes, states = q.event_shape[0], q.potentials[0].shape[-1]
    steps = q.stepwise()
    order = steps.order(3)
    place = order.argsort(-1)
    parents = q.parents.expand(3, -1)
    above = place.gather(-1, parents.clamp(min=0))
    assert bool(((above < place) | (parents < 0)).all())
    for labels in itertools.product(range(states), repeat=nodes):
        z = torch.tensor(labels).expand(3, -1)
        total, state = 0.0, steps.begin(3)
        for t in range(nodes):
            label = z.gather(-1, order[:, t : t + 1])[:, 0]
            total = total + steps.distribution(state).log_prob(label)
            state = steps.append(state, label)
        possible = q.log_prob(z) > -math.inf
        torch.testing.assert_close(total[possible], q.log_prob(z)[possible])
        assert not bool((total[~possible] > -math.inf).any())


def test_improbable_labels_keep_their_conditionals():
    """Marginals of e^-400 underflow in float32; what follows given them does not."""
    node = torch.tensor([[0.0, -400.0], [0.0, 0.0]], dtype=torch.float32)
    edge = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]], dtype=torch.float32)
    found = TreeCRF(torch.tensor([-1, 0]), node, edge).conditionals()
    torch.testing.assert_close(found[1].exp(), torch.tensor([[0.5, 0.5], [0.25, 0.75]]).float())


def test_a_path_is_a_chain():
    node, step = randn(0, 2, 6, 3), randn(1, 2, 3, 3)
    chain = LinearChain(torch.zeros(2, 3), step, node)
    tree = TreeCRF(torch.arange(6) - 1, node, step)
    torch.testing.assert_close(tree.log_partition, chain.log_partition)
    torch.testing.assert_close(tree.marginals.edge, chain.marginals.transition)
    torch.testing.assert_close(tree.entropy(), chain.entropy())
    assert torch.equal(tree.mode, chain.mode)


def test_training_through_a_tree_guide_site():
    """A guide on a tree finds the posterior of a model on that tree."""
    parents = torch.tensor([-1, 0, 0])
    coupling = torch.tensor([[1.5, -1.5], [-1.5, 1.5]])
    y = torch.tensor([[1.0, -0.5, 0.3], [-2.0, 0.1, 0.4]])
    prior = TreeCRF(parents, torch.zeros(2, 3, 2), coupling.expand(2, 2, 2))

    def log_likelihood():
        return dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(y.unsqueeze(-1))

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(2.0 * z - 1.0, 1.0).to_event(1), obs=y)

    def guide():
        node = pyro.param("node", torch.zeros(2, 3, 2))
        edge = pyro.param("edge", torch.zeros(2, 2, 2))
        with pyro.plate("data", 2):
            pyro.sample("z", TreeCRF(parents, node, edge))

    elbo = TraceGraph_ELBO(num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    for rate, steps in ((0.1, 80), (0.01, 80)):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": rate}), elbo)
        for _ in range(steps):
            svi.step()
    guided = TreeCRF(parents, pyro.param("node"), pyro.param("edge"))
    untrained = TreeCRF(parents, torch.zeros(2, 3, 2), torch.zeros(2, 2, 2))
    posterior = TreeCRF(parents, log_likelihood(), coupling.expand(2, 2, 2))
    assert untrained.kl_divergence(posterior).min() > 0.5
    assert guided.kl_divergence(posterior).max() < 0.05


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([1, 0], "cycle"),
        ([0], "cycle"),
        ([-1, 5], r"parents: expected integers in \[-1, 1\], got 5 at index \[1\]"),
        ([-1, -2], r"parents: expected .*got -2 at index \[1\]"),
        ([-1], "parents, node, edge: expected"),
    ],
)
def test_bad_trees_are_refused(parents, message):
    nodes = 1 if parents == [0] else 2
    with pytest.raises(ValueError, match=message):
        TreeCRF(torch.tensor(parents), torch.zeros(nodes, 3), torch.zeros(3, 3))


def test_deep_and_wide_trees():
    nodes = 300
    node = torch.randn(nodes, 3)
    deep = TreeCRF(torch.arange(nodes) - 1, node, torch.randn(3, 3))
    wide = TreeCRF(
        torch.cat([torch.tensor([-1]), torch.zeros(nodes - 1, dtype=torch.long)]), node, torch.randn(3, 3)
    )
    for q in (deep, wide):
        assert q.log_partition.isfinite()
        torch.testing.assert_close(q.marginals.node.sum(-1), torch.ones(nodes))
        assert math.isfinite(q.log_prob(q.sample()))


def test_a_forest_with_an_impossible_tree_has_no_parts():
    """Its other trees know nothing of it; the second datum is as if alone."""
    parents, edge = torch.tensor([-1, 0, -1, 2]), randn(1, 1, 2, 2)
    node = randn(0, 2, 4, 2).detach().clone()
    node[0, 3] = -math.inf
    node.requires_grad_()
    q = TreeCRF(parents, node, edge)
    alone = TreeCRF(parents, node[1:].detach(), edge.detach())
    gradient = torch.autograd.grad(q.log_partition[0], (node, edge), retain_graph=True)
    assert not any(g.any() for g in gradient)
    assert not any(part[0].any() for part in q.marginals)
    for hard in (False, True):
        torch.testing.assert_close(
            q.expected_parts(hard=hard)[1].edge, alone.expected_parts(hard=hard)[1].edge
        )
    assert q.entropy()[0] == 0


def test_nan_stays_nan_where_nobody_checks():
    q = TreeCRF(torch.tensor([-1, 0]), torch.full((2, 3), math.nan), torch.zeros(3, 3), validate_args=False)
    assert q.log_partition.isnan()


def test_trees_of_their_own_are_trees_alone():
    parents = torch.tensor(TREES["own"][0])
    node, edge = randn(0, 3, 5, 2), randn(1, 3, 5, 2, 2)
    together = TreeCRF(parents, node, edge)
    z = together.sample((7,))
    for b in range(3):
        alone = TreeCRF(parents[b], node[b], edge[b])
        torch.testing.assert_close(together.log_partition[b], alone.log_partition)
        torch.testing.assert_close(together.log_prob(z)[:, b], alone.log_prob(z[:, b]))
        torch.testing.assert_close(together.entropy()[b], alone.entropy())
        assert torch.equal(together.mode[b], alone.mode)
    wide = TreeCRF(parents[:1], node[:1], edge[:1]).expand((2, 4))  # one tree, for four data
    assert wide.parents.shape == (4, 5) and wide.sample().shape == (2, 4, 5)
    torch.testing.assert_close(wide.log_partition, together.log_partition[:1].expand(2, 4))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[-1, 0, 0], [2, -1, 3]], r"expected integers in \[-1, 2\], got 3 at index \[1, 2\]"),
        ([[-1, 0, 0], [1, 0, -1]], r"a cycle through index \[1, [01]\]"),
        ([[[-1, 0, 0]]], r"parents, node, edge: expected shapes \[N\] or \[\*C,N\]"),
        ([[-1, 0, 0]] * 3, "batch shapes: expected shapes that broadcast"),
    ],
)
def test_wrong_trees_are_refused(parents, message):
    with pytest.raises(ValueError, match=message):
        TreeCRF(torch.tensor(parents), torch.zeros(2, 3, 2), torch.zeros(2, 2, 2))

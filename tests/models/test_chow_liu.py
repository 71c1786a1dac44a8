"""Hidden Chow-Liu trees: sums over all labels, trees by enumeration, and plain Chow-Liu as the limit."""

import itertools
import math

import pytest
import torch

from pyroelbo import fit_em, models
from pyroelbo.models.chow_liu import dependence_tree


def tables(pair):
    """The probabilities of a pair as lists: root [S], transition [N][S][S], symbols [N][S][V]."""
    parts = (pair.prior.initial, pair.prior.transition, pair.generator.logits)
    return (x.detach().softmax(-1).tolist() for x in parts)


def enumerated(pair, row):
    """ln p(y) of a row and the posterior of its labels, label by label in plain Python."""
    initial, move, symbol = tables(pair)
    parents, weights = pair.prior.parents.tolist(), {}
    for z in itertools.product(range(pair.states), repeat=pair.dims):
        p = 1.0
        for n, above in enumerate(parents):
            p *= initial[z[n]] if above < 0 else move[n][z[above]][z[n]]
            p *= symbol[n][z[n]][int(row[n])]
        weights[z] = p
    total = sum(weights.values())
    return math.log(total), {z: p / total for z, p in weights.items()}


@pytest.mark.parametrize("parents", [[-1, 0, 1, 2], [1, 3, 1, -1], [2, 2, -1, 2]])
@pytest.mark.parametrize("levels, states", [(2, 2), (3, 2), (2, 3)])
def test_evidence_posterior_and_statistics_are_sums_over_all_labels(parents, levels, states):
    pair = models.HiddenChowLiuTree(4, levels, states)
    pair.prior.parents.copy_(torch.tensor(parents))
    y = torch.randint(levels, (3, 4)).double()
    weights = torch.tensor([1.0, 0.5, 2.0])
    value, found = pair.e_step(y, weights=weights)
    wanted = {name: torch.zeros_like(x) for name, x in found.items()}
    for i, row in enumerate(y.tolist()):
        log_p, posterior = enumerated(pair, row)
        assert value[i].item() == pytest.approx(log_p, abs=1e-12)
        for z, p in posterior.items():
            p *= weights[i].item()
            for n, above in enumerate(parents):
                wanted["seen"][n, z[n], int(row[n])] += p
                if above < 0:
                    wanted["initial"][z[n]] += p
                else:
                    wanted["transition"][n, z[above], z[n]] += p
        draws = torch.tensor(list(posterior))
        log_q = pair.posterior(y[i : i + 1]).log_prob(draws[:, None]).squeeze(-1).exp()
        torch.testing.assert_close(log_q.detach(), torch.tensor(list(posterior.values())))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pair.log_evidence(y).detach(), value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_data_of_any_type(dtype):
    pair, y = models.HiddenChowLiuTree(4), torch.randint(2, (6, 4))
    torch.testing.assert_close(pair.log_evidence(y.to(dtype)), pair.log_evidence(y))


def test_blocks_of_data_change_nothing(monkeypatch):
    pair, y = models.HiddenChowLiuTree(5), torch.randint(2, (7, 5)).double()
    whole = pair.e_step(y)
    monkeypatch.setattr("pyroelbo.models.chow_liu._BLOCK", 20)
    torch.testing.assert_close(pair.e_step(y), whole)


def spanning_trees(nodes):
    """All trees on a few nodes, as sets of edges, by their Prüfer sequences."""
    for code in itertools.product(range(nodes), repeat=nodes - 2):
        degree = [1 + code.count(n) for n in range(nodes)]
        edges = []
        for n in code:
            leaf = degree.index(1)
            edges.append((leaf, n))
            degree[leaf] -= 1
            degree[n] -= 1
        edges.append(tuple(n for n in range(nodes) if degree[n] == 1))
        yield edges


def likelihood(rows, edges, nodes):
    """ln of the largest likelihood of rows under a tree, Σ ln p(y_n) + Σ ln p(y_a, y_b) / (p(y_a) p(y_b))."""

    def share(*places):
        keys = [tuple(row[n] for n in places) for row in rows]
        return [keys.count(key) / len(rows) for key in keys]

    alone = [share(n) for n in range(nodes)]
    total = sum(math.log(p) for own in alone for p in own)
    for a, b in edges:
        total += sum(
            math.log(both / (p * q)) for both, p, q in zip(share(a, b), alone[a], alone[b], strict=True)
        )
    return total


@pytest.mark.parametrize("levels", [2, 3])
def test_the_tree_is_the_likeliest_of_all(levels):
    latent = torch.randint(levels, (60, 2))
    noise = torch.rand(60, 5) < torch.tensor([0.1, 0.3, 0.2, 0.4, 0.5])
    y = torch.where(noise, torch.randint(levels, (60, 5)), latent[:, [0, 0, 1, 1, 0]])
    y = torch.cat([y[:, :4], torch.where(torch.rand(60) < 0.7, y[:, 2], y[:, 4])[:, None]], -1)
    rows = y.tolist()
    best = max(likelihood(rows, edges, 5) for edges in spanning_trees(5))
    parents = dependence_tree(y, levels).tolist()
    edges = [(above, n) for n, above in enumerate(parents) if above >= 0]
    assert len(edges) == 4 and likelihood(rows, edges, 5) == pytest.approx(best, abs=1e-9)


def test_the_root_is_a_centre():
    """A path of seven nodes in another order: the root is the middle one, three steps from each end."""
    order = [3, 0, 5, 1, 6, 2, 4]
    y = torch.randint(2, (4000, 7))
    for a, b in itertools.pairwise(order):
        y[:, b] = torch.where(torch.rand(4000) < 0.1, 1 - y[:, a], y[:, a])
    parents = dependence_tree(y, 2)
    assert parents[1] == -1 and parents[5] == parents[6] == 1 and parents[3] == 0 and parents[4] == 2


def test_without_noise_it_is_the_chow_liu_tree():
    y = torch.randint(2, (200, 5))
    y[:, 1:] = torch.where(torch.rand(200, 4) < 0.2, y[:, 1:], y[:, :1])
    pair = models.HiddenChowLiuTree(5, smoothing=0.0)
    pair.initialize(y)
    with torch.no_grad():
        pair.generator.logits.copy_(torch.eye(2).log().expand(5, 2, 2))
    fit_em(pair, y, epochs=1, start="current", progress=False)
    edges = [(above, n) for n, above in enumerate(pair.prior.parents.tolist()) if above >= 0]
    assert pair.log_evidence(y).sum().item() == pytest.approx(likelihood(y.tolist(), edges, 5), abs=1e-9)


def test_em_explains_its_own_data_at_least_as_well_as_the_truth():
    truth = models.HiddenChowLiuTree(6)
    with torch.no_grad():
        truth.prior.parents.copy_(torch.tensor([2, 2, -1, 2, 3, 3]))
        truth.prior.transition.copy_(2 * torch.eye(2))
        truth.generator.logits.copy_(3 * torch.eye(2))
    _, y = truth.simulate(1000)
    pair = models.HiddenChowLiuTree(6, smoothing=0.0)
    fit_em(pair, y, epochs=60, progress=False)
    assert pair.log_evidence(y).mean() > truth.log_evidence(y).mean()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: models.HiddenChowLiuTree(0),
            "shape: expected a positive number of coordinates, or sides, got 0",
        ),
        (lambda: models.HiddenChowLiuTree(3, states=0), "states: expected a positive number, got 0"),
        (lambda: models.HiddenChowLiuTree(3, smoothing=-1.0), "smoothing: expected a pseudo-count"),
        (
            lambda: models.HiddenChowLiuTree(3).log_evidence(torch.zeros(2, 4)),
            r"y: expected shape \[B, 3\], got \(2, 4\)",
        ),
        (
            lambda: models.HiddenChowLiuTree(2).log_evidence(torch.tensor([[0.0, 1.0], [0.0, 2.0]])),
            r"y: expected symbols 0 … 1, got 2 at index \[1, 1\]",
        ),
        (
            lambda: models.HiddenChowLiuTree(1).log_evidence(torch.tensor([[0.5]])),
            r"y: expected symbols 0 … 1, got 0\.5 at index \[0, 0\]",
        ),
        (
            lambda: dependence_tree(torch.zeros(2, 64), 256),
            "y: expected at most 4,096 symbols of all coordinates together, .* got 64 x 256",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

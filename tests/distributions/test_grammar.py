import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO

from pyroelbo.distributions import PCFG, ParseTree, StructuredDistribution
from pyroelbo.distributions import parse_tree as module
from tests.distributions.structured_contract import StructuredContract
from tests.distributions.test_chain import nested, randn
from tests.oracles import Listing, log_sum_exp, parse_trees

# words, inner labels, leaf labels, one grammar for all, span potentials, lengths
CASES = {
    "three": (3, 2, 2, False, True, None),
    "shared": (3, 2, 2, True, False, None),
    "two": (2, 3, 2, False, True, None),
    "four": (4, 2, 1, False, False, None),
    "lengths": (4, 1, 2, True, True, [4, 2, 3]),
    "sparse": (4, 2, 2, False, True, [4, 3, 4]),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", CASES)
class TestParseTree(StructuredContract):
    def make(self, case, seed=0):
        words, inner, leaf, shared, spans, lengths = CASES[case]
        every = inner + leaf
        return ParseTree(
            randn(seed, 3, inner),
            randn(seed + 10, 1 if shared else 3, inner, every, every, sparse="sparse" in case),
            randn(seed + 20, 3, words, leaf),
            randn(seed + 30, 3, words, words, inner) if spans else None,
            None if lengths is None else torch.tensor(lengths),
        )

    def construct(self, q, potentials):
        return ParseTree(*potentials, q.lengths)

    def listing(self, q, b):
        parts = (nested(x.expand(3, *x.shape[1:])[b]) for x in q.potentials)
        return Listing(parse_trees(*parts, int(q.lengths[b])))

    def test_charts_that_are_no_tree(self, case, q):
        z = q.mode.clone()
        z[:, 0, 0] = -1
        assert (q.log_prob(z) == -math.inf).all()
        z = q.mode.clone()
        z[:, 1, 1] = 0  # an inner label at a leaf
        assert (q.log_prob(z) == -math.inf).all()
        z = q.mode.clone()
        z[:, 1, 0] = 0  # below the diagonal
        assert (q.log_prob(z) == -math.inf).all()


def potentials(dtype, batch=3, words=8, inner=4, leaf=5, shared=False):
    torch.manual_seed(1)
    every = inner + leaf
    shapes = [(batch, inner), (1 if shared else batch, inner, every, every), (batch, words, leaf)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def answers(parts, **options):
    """ln Z and its gradients by the fast way, and by the log semiring in float64."""
    q = ParseTree(*parts, **options)
    exact = ParseTree(*(x.detach().double().requires_grad_() for x in parts), **options)
    generic = StructuredDistribution._log_partition(exact, exact.potentials)
    fast = torch.autograd.grad(q.log_partition[q.log_partition > -math.inf].sum(), parts)
    slow = torch.autograd.grad(generic[generic > -math.inf].sum(), exact.potentials[:3])
    return q.log_partition, generic, fast, slow


def assert_agree(found, dtype):
    value, expected, fast, slow = found
    assert value.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(value.double(), expected, rtol=rtol, atol=rtol)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_charts_agree_with_log_space(dtype, shared):
    assert_agree(answers(potentials(dtype, shared=shared), lengths=torch.tensor([8, 5, 7])), dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("inner", [1, 8, 35])
def test_many_labels_long_sentences_and_spans(inner):
    """Whole vectors of labels and less, several panels of them; more spans of one width than go together."""
    root, rules, leaves = potentials(torch.float64, words=22, inner=inner, leaf=2)
    spans = randn(5, 3, 22, 22, inner)
    lengths = torch.tensor([22, 1, 19])
    q = ParseTree(root, rules, leaves, spans, lengths)
    generic = StructuredDistribution._log_partition(q, q.potentials)
    assert generic[1] == q.log_partition[1] == -math.inf
    torch.testing.assert_close(q.log_partition, generic)
    fast = torch.autograd.grad(q.log_partition[[0, 2]].sum(), q.potentials)
    slow = torch.autograd.grad(generic[[0, 2]].sum(), q.potentials)
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture
def rescues(monkeypatch):
    """How often sentences were computed again, by the type that the first attempt had."""
    seen = []
    rescue = module._rescue

    def spy(index, lengths, flat):
        seen.append((flat[0].dtype, index.tolist()))
        return rescue(index, lengths, flat)

    monkeypatch.setattr(module, "_rescue", spy)
    return seen


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [-120.0, -800.0, -30_000.0])
def test_a_label_far_behind_is_needed(dtype, depth, rescues):
    """Label 1 lies e^depth behind within every span, and is the only one that the top accepts."""
    root, rules, leaves = (x.detach() for x in potentials(dtype))
    rules[:, 1] += depth
    root[1] = -math.inf
    root[1, 1] = 0.0
    found = answers([x.requires_grad_() for x in (root, rules, leaves)])
    assert_agree(found, dtype)
    assert found[0][1] < depth + 50
    assert bool(rescues) == (depth < -700 or dtype == torch.float32)
    assert (torch.float64, [0, 1, 2]) in rescues or depth == -120.0


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_the_hard_sentence_is_computed_again(dtype, rescues):
    root, rules, leaves = (x.detach() for x in potentials(dtype))
    rules[2, 1] -= 2000.0
    root[2] = -math.inf
    root[2, 1] = 0.0
    assert_agree(answers([x.requires_grad_() for x in (root, rules, leaves)]), dtype)
    assert rescues[0] == (dtype, [2])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shared_grammar_with_a_hard_sentence(dtype, rescues):
    root, rules, leaves = (x.detach() for x in potentials(dtype, shared=True))
    leaves[1, :4, :2] -= 3000.0
    leaves[1, :4, 2:] = -math.inf
    rules[:, :, 4:6] -= 900.0
    found = answers([x.requires_grad_() for x in (root, rules, leaves)])
    assert_agree(found, dtype)
    assert -math.inf < found[0][1] < -10_000
    assert rescues


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
def test_sparse_grammars(dtype, shared):
    root, rules, leaves = (x.detach() for x in potentials(dtype, shared=shared))
    torch.manual_seed(2)
    rules[torch.rand_like(rules) < 0.85] = -math.inf
    leaves[torch.rand_like(leaves) < 0.3] = -math.inf
    found = answers([x.requires_grad_() for x in (root, rules, leaves)])
    assert found[0].isfinite().any()
    assert_agree(found, dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unparsable_sentence_leaves_others_alone(dtype):
    root, rules, leaves = (x.detach() for x in potentials(dtype, shared=True))
    before = ParseTree(root, rules, leaves).log_partition
    leaves[1, 3] = -math.inf
    parts = [x.requires_grad_() for x in (root, rules, leaves)]
    value = ParseTree(*parts).log_partition
    assert value[1] == -math.inf
    assert torch.equal(value[[0, 2]], before[[0, 2]])
    for g in torch.autograd.grad(value.sum(), parts):
        assert g.isfinite().all()
    assert all(not g[1].any() for g in torch.autograd.grad(ParseTree(*parts).log_partition.sum(), parts[2]))


def test_recursive_left_branching_grammar():
    """S -> S b | a b has one tree for each length: its probability is known."""
    inner, leaf = 1, 2
    rules = torch.full((inner, 3, 3), -math.inf)
    rules[0, 0, 2], rules[0, 1, 2] = math.log(0.4), math.log(0.6)
    words = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    d = PCFG(torch.zeros(inner), rules, words)
    y = torch.full((4, 7), -1)
    for b, length in enumerate((2, 3, 5, 7)):
        y[b, 0], y[b, 1:length] = 0, 1
    expected = torch.tensor([math.log(0.6) + (n - 2) * math.log(0.4) for n in (2, 3, 5, 7)])
    torch.testing.assert_close(d.log_prob(y), expected)
    y[2, 4] = 0
    assert d.log_prob(y)[2] == -math.inf
    draws = d.sample((2000,))
    length = (draws >= 0).sum(-1).double()
    # mean 2 + 2/3, variance 10/9: fails by chance with probability below 1e-6
    assert abs(length.mean() - 8 / 3) < 5 * math.sqrt(10 / 9 / 2000)
    assert leaf == d.preterminals.shape[-2] and d.log_prob(draws).isfinite().all()


def pcfg(batch=(), seed=0, inner=2, leaf=2, words=3, **options):
    every = inner + leaf
    rules = randn(seed + 1, *batch, inner, every, every)
    rules = rules + 2.0 * (torch.arange(every) >= inner)  # derivations end
    return PCFG(randn(seed, *batch, inner), rules, randn(seed + 2, *batch, leaf, words), **options)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_evidence_by_brute_force(batch):
    d = pcfg(batch)
    y = torch.tensor([[0, 2, 1, 0], [1, 1, -1, -1], [2, 0, 1, -1]])
    value = d.log_prob(y)
    assert value.shape == (batch or (3,))
    q = d.posterior(y)
    assert torch.equal(value, q.log_partition)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in value.shape)).view(-1, value.dim()).tolist():
        own = tuple(index[len(index) - len(batch) :]) if batch else ()
        sentence = [w for w in y[index[-1]].tolist() if w >= 0]
        root, rules, table = (x[own].tolist() for x in (d.root, d.rules, d.preterminals))
        leaves = [[row[w] for row in table] for w in sentence]
        zeros = [[[0.0] * 2 for _ in sentence] for _ in sentence]
        total = log_sum_exp(w for _, w, _ in parse_trees(root, rules, leaves, zeros))
        assert value[tuple(index)].item() == pytest.approx(total, abs=1e-10)


def test_parameters_are_normalized():
    d = pcfg((3,))
    for x, dims in ((d.root, -1), (d.rules, (-1, -2)), (d.preterminals, -1)):
        torch.testing.assert_close(x.exp().sum(dims), torch.ones(x.exp().sum(dims).shape))


def test_samples_follow_their_probability():
    """χ² of short sentences at a false-alarm rate of 1e-6 (Wilson–Hilferty: z below 4.9)."""
    torch.manual_seed(0)
    d = pcfg(max_length=200)
    count = 20_000
    draws = d.sample((count,))
    values, times = draws.unique(dim=0, return_counts=True)
    often = times >= 20
    expected = d.log_prob(values[often]).exp() * count
    statistic = ((times[often] - expected) ** 2 / expected).sum().item()
    freedom = int(often.sum())
    assert freedom > 20
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert z < 4.9


def test_large_grammars_sample_and_decode():
    """Modes and draws by the top-down pass at a size that the generic one is slow at."""
    parts = [x.detach() for x in potentials(torch.float32, batch=2, words=15, inner=6, leaf=8)]
    q = ParseTree(*parts)
    z = q.sample((300,))
    assert q.log_prob(z).isfinite().all()
    # E -ln p(z) is the entropy: within six standard errors
    lp = -q.log_prob(z)
    assert ((lp.mean(0) - q.entropy()).abs() < 6 * lp.std(0) / math.sqrt(300)).all()
    assert (q.log_prob(q.mode) >= q.log_prob(z).amax(0) - 1e-4).all()
    torch.testing.assert_close(q.log_prob(q.mode), q.topk(1)[1][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("depth", [-100.0, -900.0])
def test_draws_by_way_of_rare_labels(depth):
    """Only labels of e^depth fit together; the share of one kind of tree within 5 standard deviations."""
    root, rules, leaves = (x.detach() for x in potentials(torch.float64, batch=1, words=3, inner=2, leaf=4))
    rules[:] = -math.inf
    rules[:, 0, 2, 2] = 0.0  # two common leaves fit together,
    rules[:, 0, 3, 3], rules[:, 1, 0, 3], rules[:, 1, 3, 0] = (
        0.0,
        0.0,
        1.0,
    )  # but the top takes only rare ones
    leaves[..., 1] += depth
    root[:, 0] = -math.inf
    q = ParseTree(root, rules, leaves)
    z = q.sample((4000,))
    assert q.log_prob(z).isfinite().all()
    trees = Listing(parse_trees(*(x[0].tolist() for x in q.potentials[:3]), torch.zeros(3, 3, 2).tolist()))
    p = trees.marginals()["spans"][(0, 1, 0)]
    assert 0.05 < p < 0.95
    assert abs((z[:, 0, 0, 1] == 0).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / 4000)


def test_span_marginals_and_counts():
    q = pcfg((3,)).posterior(torch.tensor([[0, 1, 2, 0, 1]] * 3))
    m = q.marginals
    torch.testing.assert_close(m.spans.sum((-1, -2, -3)), torch.full((3,), 4.0))
    torch.testing.assert_close(m.rules.sum((-1, -2, -3)), torch.full((3,), 4.0))
    torch.testing.assert_close(m.leaves.sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(m.spans[:, 0, -1], m.root)


def test_training_at_a_site_from_a_network():
    """The grammar's parameters come from a network; the evidence rises by SVI under a plate."""
    y = torch.tensor([[0, 1, 0, 1], [0, 1, -1, -1], [0, 1, 0, 1]])
    net = torch.nn.Linear(1, 2 + 2 * 16 + 2 * 3)

    def model():
        pyro.module("net", net)
        out = net(torch.ones(3, 1))
        root, rules, table = out.split([2, 32, 6], -1)
        with pyro.plate("data", 3):
            pyro.sample("y", PCFG(root, rules.view(3, 2, 4, 4), table.view(3, 2, 3)), obs=y)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    losses = [svi.step() for _ in range(60)]
    assert losses[-1] < 0.4 * losses[0]


def test_a_parse_at_a_guide_site():
    """A guide over trees finds a model's posterior over them: the ELBO reaches the evidence."""
    parts = [x.detach() for x in potentials(torch.float64, batch=2, words=3, inner=2, leaf=2)]
    prior = ParseTree(*(0.3 * x for x in parts))
    likes = torch.randn(2, 3, 3, 2)

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", prior)
            at = torch.nn.functional.one_hot(z.clamp(0, 1), 2) * ((z >= 0) & (z < 2))[..., None]
            pyro.factor("like", (at * likes).sum((-1, -2, -3)))

    exact = ParseTree(*prior.potentials[:3], likes)

    def guide(exactly=True):
        spans = likes if exactly else pyro.param("spans", torch.zeros(2, 3, 3, 2))
        with pyro.plate("data", 2):
            pyro.sample("z", ParseTree(*prior.potentials[:3], spans))

    evidence = (exact.log_partition - prior.log_partition).sum().item()
    assert -Trace_ELBO().loss(model, guide) == pytest.approx(evidence, abs=1e-8)
    elbo = TraceGraph_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, lambda: guide(False), pyro.optim.Adam({"lr": 0.1}), elbo)
    for _ in range(60):
        svi.step()
    learned = ParseTree(*prior.potentials[:3], pyro.param("spans").detach())
    start = ParseTree(*prior.potentials[:3])
    assert learned.kl_divergence(exact).max() < 0.2 * start.kl_divergence(exact).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [[0, 7]]}, r"y: expected .*got 7 at index \[0, 1\]"),
        ({"y": [[0, -1, 1]]}, r"y: expected .*got 1 at index \[0, 2\]"),
        ({"y": [[0, -3]]}, r"y: expected .*got -3 at index \[0, 1\]"),
        ({"y": [[0, 1], [-1, -1]]}, r"y: expected at least one word, got none at index \[1\]"),
        ({"root": -math.inf}, r"root: expected a finite logit, got none at batch index \[\]"),
        ({"root": math.nan}, r"root: expected .*got nan at index \[0\]"),
        ({"table": torch.zeros(3, 3)}, "root, rules, preterminals: expected"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PCFG(
            torch.full((2,), change.get("root", 0.0)),
            torch.zeros(2, 4, 4),
            change.get("table", torch.zeros(2, 3)),
        ).log_prob(torch.tensor(change.get("y", [[0, 1]])))


def test_a_sentence_that_outgrows_the_limit_is_refused():
    endless = PCFG(
        torch.zeros(1), torch.tensor([[[0.0, -9.0], [-9.0, -9.0]]]), torch.zeros(1, 2), max_length=20
    )
    with pytest.raises(ValueError, match="max_length: expected samples of at most 20 words"):
        endless.sample()


def test_unused_and_dead_symbols():
    """A nonterminal without rules and a preterminal without words are allowed and never used."""
    root, rules, table = torch.zeros(2), torch.zeros(2, 4, 4), torch.zeros(2, 3)
    rules[1], table[1] = -math.inf, -math.inf
    parts = [x.requires_grad_() for x in (root, rules, table)]
    d = PCFG(*parts)
    y = torch.tensor([0, 1, 2])
    assert d.log_prob(y).isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(d.log_prob(y), parts))


def test_an_empty_batch():
    d = PCFG(torch.zeros(2), torch.zeros(2, 5, 5), torch.zeros(3, 4))
    assert d.log_prob(torch.zeros(0, 3, dtype=torch.long)).shape == (0,)


def test_expand_and_plates():
    d = pcfg((3,), max_length=300)
    y = torch.tensor([[0, 1, 2]] * 3)
    torch.testing.assert_close(d.expand((2, 3)).log_prob(y), d.log_prob(y).expand(2, 3))
    assert d.expand((2, 3)).sample((4,)).shape == (4, 2, 3, 300)
    with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
        value = pyro.sample("y", d)
    assert value.shape == (2, 3, 300)
    assert isinstance(d.mask(torch.tensor([True, False, True])), dist.MaskedDistribution)


def test_one_closed_root_of_a_batch_is_refused():
    root = torch.zeros(2, 2)
    root[1] = -math.inf
    with pytest.raises(ValueError, match=r"root: expected a finite logit, got none at batch index"):
        PCFG(root, torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 3), validate_args=True)

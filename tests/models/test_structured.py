"""Grammars and alignments as pairs: against enumeration, by simulation, padded, and what they refuse."""

import math

import pytest
import torch

from pyroelbo import ExactPair, audit, evidence, fit, models
from pyroelbo.distributions import PCFG, Derivation
from pyroelbo.objectives import Exact_ELBO
from tests.oracles import alignments, parse_trees
from tests.pairs import CONDITIONAL, TABLE, labelled_frames, sentences
from tests.training.test_em import assert_climbs, quiet


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["pcfg", "neural_pcfg", "ctc"])
def test_the_exact_guides_objective_is_the_evidence(name, dtype):
    torch.set_default_dtype(dtype)
    make, draw = (TABLE | CONDITIONAL)[name]
    pair, y = make(), draw(9)
    batch = y if isinstance(y, tuple) else (y,)
    loss = Exact_ELBO().differentiable_loss(pair.model, pair.guide, *batch)
    exact = -pair.log_evidence(*batch).sum()
    slopes = [torch.autograd.grad(value, list(pair.parameters())) for value in (loss, exact)]
    value, slope = (1e-5, 1e-4) if dtype == torch.float32 else (1e-10, 1e-8)
    torch.testing.assert_close(loss, exact, rtol=value, atol=value)
    torch.testing.assert_close(*slopes, rtol=slope, atol=slope)
    bound = evidence.elbo(pair, y, particles=16)
    assert (bound.value - evidence.exact(pair, y).value).abs().max() < 10 * value
    assert bound.stderr.max() < 10 * value


@pytest.mark.parametrize("name", [n for n, (make, _) in CONDITIONAL.items() if isinstance(make(), ExactPair)])
def test_conditional_pairs_are_audited_against_their_evidence(name):
    make, draw = CONDITIONAL[name]
    result = audit(make(), draw(5), particles=100)
    assert result.reference == "exact" and [b.method for b in result.bounds] == ["exact", "elbo", "iwae-100"]
    assert all((gap.value > -6 * gap.error - 1e-6).all() for gap in result.gaps)


# ------------------------------------------------------------------------------------------ grammars


def test_the_joint_of_a_grammar_sums_to_its_evidence():
    """Every tree that plain Python lists, scored by the sites of the model."""
    torch.manual_seed(3)
    pair, y = models.PCFG(2, 3, 4), torch.tensor([[2, 0, 3, 3]])
    root, rules, words = (
        x.flatten(1 - (i == 0)).log_softmax(-1).view_as(x) for i, x in enumerate(pair.tables())
    )
    leaves, spans = words[:, y[0]].T, torch.zeros(4, 4, 2)
    listed = list(parse_trees(*(x.tolist() for x in (root, rules, leaves, spans))))
    z = torch.tensor([chart for chart, _, _ in listed]).view(-1, 1, 4, 4)
    expected = torch.tensor([weight for _, weight, _ in listed])
    joint = evidence_terms(pair, y, z)
    torch.testing.assert_close(joint[:, 0], expected)
    torch.testing.assert_close(joint.logsumexp(0), pair.log_evidence(y))


def evidence_terms(pair, batch, z):
    from pyroelbo.evaluation.evaluator import Evaluator

    return Evaluator(pair, batch).log_joint({"z": z})


def test_derivations_follow_their_probability():
    """χ² of small trees at a false-alarm rate of 1e-6 (Wilson–Hilferty: z below 4.9), for a batch of
    grammars."""
    torch.manual_seed(0)
    rules = torch.randn(2, 2, 6, 6)
    rules[..., :2, :] -= 2  # most derivations end soon
    rules[..., :2] -= 2
    d = Derivation(torch.randn(2, 2), rules, max_length=25)
    count = 5_000
    draws = d.sample((count,))
    assert draws.shape == (count, 2, 25, 25)
    for b in range(2):
        values, times = draws[:, b].unique(dim=0, return_counts=True)
        often = times >= 20
        log_prob = d.log_prob(values[:, None].expand(-1, 2, -1, -1))[:, b]
        assert log_prob.isfinite().all()
        expected = log_prob[often].exp() * count
        freedom = int(often.sum())
        assert freedom > 20
        statistic = ((times[often] - expected) ** 2 / expected).sum().item()
        z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
        assert z < 4.9


def test_a_chart_that_is_no_tree_has_no_probability():
    d = Derivation(torch.zeros(1), torch.zeros(1, 3, 3), max_length=4)
    z = torch.full((4, 4), -1)
    assert d.log_prob(z) == -math.inf
    z[0, 0], z[1, 1], z[0, 1] = 1, 2, 0
    assert d.log_prob(z) == pytest.approx(-math.log(9))
    z[2, 2] = 1
    assert d.log_prob(z) == -math.inf
    with pytest.raises(ValueError, match="max_length: expected samples of at most 4 words"):
        Derivation(torch.zeros(1), torch.tensor([[[9.0, 0.0], [0.0, 0.0]]]), max_length=4).sample((20,))


def test_simulated_sentences_and_trees_belong_together():
    make, _ = TABLE["pcfg-smoothed"]
    torch.manual_seed(1)
    pair = models.PCFG(1, 6, 5, steps=30)
    latents, y = pair.simulate(50)
    words, leaves = y >= 0, latents["z"].diagonal(dim1=1, dim2=2) >= 0
    assert torch.equal(words, leaves) and (words.sum(1) >= 2).all()
    assert pair.posterior(y).log_prob(latents["z"]).isfinite().all()
    assert make().placeholder(3).shape == (3, 20)


@pytest.mark.parametrize("name", ["pcfg", "pcfg-mean-field", "neural_pcfg"])
def test_padding_of_sentences_changes_nothing(name):
    make, _ = TABLE[name]
    pair, y = make(), sentences(6, 5)
    wider = torch.nn.functional.pad(y, (0, 3), value=-1)
    torch.testing.assert_close(pair.log_evidence(wider), pair.log_evidence(y))
    if name == "pcfg-mean-field":
        torch.testing.assert_close(pair._encode(wider).log_partition, pair._encode(y).log_partition)


def test_em_of_a_grammar_finds_what_simulated_sentences_know():
    """A deterministic language, a b a b …: one rule at each step explains it, and zeros stay zeros."""
    y = torch.tensor([[0, 1, -1, -1, -1, -1], [0, 1, 0, 1, -1, -1], [0, 1, 0, 1, 0, 1]] * 5)
    pair = models.PCFG(2, 2, 2)
    quiet(pair, y, epochs=60, restarts=4, tolerance=1e-7)
    # the entropy of three sentences, and what lengths that fall geometrically cost
    assert -float(pair.log_evidence(y).mean().detach()) < math.log(3) + 0.3
    torch.testing.assert_close(pair.generator.words.softmax(1).amax(1), torch.ones(2), atol=1e-2, rtol=0)


def test_a_grammar_whose_derivations_never_end_can_be_audited():
    """Nothing asks its prior for a tree."""
    pair, y = models.PCFG(3, 1, 5, "mean_field"), sentences(5, 6)
    with pytest.raises(ValueError, match="max_length: expected samples of at most"):
        pair.simulate(20, like=y.repeat(4, 1))
    assert audit(pair, y, particles=10).reference == "exact"


def test_brackets_have_the_most_expected_hits():
    make, _ = TABLE["pcfg-smoothed"]
    pair, y = make(), sentences(8, 5)
    found, spans = pair.brackets(y), pair.posterior(y).marginals[3].sum(-1).detach()
    trees = PCFG(torch.zeros(1), torch.zeros(1, 2, 2), torch.zeros(1, 5)).posterior(y).sample((200,)) >= 0
    assert ((spans * found).sum((1, 2)) >= (spans * trees).sum((2, 3)).amax(0) - 1e-9).all()
    assert torch.equal(found.sum((1, 2)), 2 * (y >= 0).sum(1) - 1)


@pytest.mark.parametrize("hard", [False, True])
def test_the_neural_grammar_climbs(hard):
    make, draw = TABLE["neural_pcfg"]
    assert_climbs(quiet(make(), draw(20), epochs=5, hard=hard, gradient_steps=5))


@pytest.mark.parametrize("name", ["pcfg-mean-field", "ctc-local"])
def test_training_the_restricted_guide_narrows_its_gap(name):
    torch.manual_seed(5)
    pair = models.PCFG(2, 3, 5, "mean_field") if name.startswith("pcfg") else CONDITIONAL[name][0]()
    y = sentences(20, 5) if name.startswith("pcfg") else labelled_frames(20)
    exact = evidence.exact(pair, y).mean
    before = exact - evidence.elbo(pair, y, particles=400).mean
    freeze = [p for p in ("prior", "generator") if hasattr(pair, p)]
    fit(pair, y, epochs=60, batch_size=20, learning_rate=0.03, particles=4, freeze=freeze, progress=False)
    after = evidence.elbo(pair, y, particles=400)
    gap = exact - after.mean
    # a real gap, at six standard errors, which training has narrowed
    assert 6 * after.mean_error < gap < 0.9 * before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.PCFG(0, 1, 2), "nonterminals: expected a positive number, got 0"),
        (lambda: models.PCFG(1, 1, 2, guide="x"), "guide: expected 'exact' or 'mean_field', got 'x'"),
        (
            lambda: models.PCFG(1, 1, 2, smoothing=-1.0),
            r"smoothing: expected a pseudo-count of at least 0, got -1\.0",
        ),
        (
            lambda: models.PCFG(1, 1, 2).log_evidence(torch.zeros(3, 4)),
            r"y: expected integers \[B, L\] with L at least 2, padded with -1, got torch\.float64 of",
        ),
        (lambda: models.PCFG(1, 1, 2).log_evidence(torch.zeros(3, 1).long()), "L at least 2"),
        (
            lambda: models.PCFG(1, 1, 2).log_evidence(torch.full((3, 2), 2)),
            r"y: expected integers in \[-1, 1\], got 2 at index",
        ),
        (lambda: models.CTC(2, 0), "labels: expected a positive number, got 0"),
        (lambda: models.CTC(2, 3, guide="x"), "guide: expected 'exact' or 'local', got 'x'"),
        (lambda: models.CTC(2, 3).simulate(3), r"given: expected frames, got none; call simulate\(n, x\)"),
        (lambda: models.CTC(2, 3).log_evidence(torch.zeros(2, 4, 2), torch.tensor([[1], [0]])), "the blank"),
        (
            lambda: models.CTC(2, 3).log_evidence(torch.zeros(2, 4, 2), torch.tensor([[1], [4]])),
            r"y: expected labels in \[1, 3\], then -1 \(0 is the blank\), got 1 to 4",
        ),
        (
            lambda: models.CTC(2, 3).log_evidence(torch.zeros(3, 4), torch.ones(3, 1).long()),
            r"x: expected shape \[B, T, 2\], got \(3, 4\)",
        ),
        (
            lambda: models.CTC(2, 3).log_evidence(torch.zeros(3, 4, 2), torch.ones(3, 1)),
            r"y: expected integers \[B, L\], got torch\.float64 of shape \(3, 1\)",
        ),
        (
            lambda: models.CTC(2, 3).log_evidence(
                torch.zeros(3, 4, 2), torch.ones(3, 1).long(), torch.ones(2)
            ),
            r"lengths: expected 3 integers, one per sequence, got torch\.float64 of shape \(2,\)",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_sentence_of_one_word_has_no_tree():
    y = torch.tensor([[0, 1, 1], [1, -1, -1]])
    with pytest.raises(
        ValueError,
        match=r"data: expected a finite log probability for every datum, got -inf for datum 1 \(of",
    ):
        quiet(models.PCFG(1, 2, 2), y, epochs=1)


# ------------------------------------------------------------------------------------------ alignments


def test_the_joint_of_a_ctc_pair_sums_to_its_evidence():
    torch.manual_seed(0)
    pair = models.CTC(2, 2, 4, 1)
    x, y = torch.randn(1, 5, 2), torch.tensor([[2, 1, -1]])
    scores = pair.logits(x).log_softmax(-1)
    listed = list(alignments(scores[0].tolist(), [2, 1]))
    z = torch.tensor([path for path, _, _ in listed]).view(-1, 1, 5)
    joint = evidence_terms(pair, (x, y), z)
    torch.testing.assert_close(joint[:, 0], torch.tensor([w for _, w, _ in listed]))
    torch.testing.assert_close(joint.logsumexp(0), pair.log_evidence(x, y))
    assert evidence_terms(pair, (x, y), torch.tensor([[[1, 2, 2, 0, 0]]])) == -math.inf


@pytest.mark.parametrize("name", ["ctc", "ctc-local"])
def test_padding_of_frames_changes_nothing(name):
    make, _ = CONDITIONAL[name]
    pair, (x, y, lengths) = make(), labelled_frames(6)
    noise = torch.where((torch.arange(6) < lengths[:, None])[..., None], x, torch.randn_like(x))
    wider = torch.nn.functional.pad(noise, (0, 0, 0, 4), value=9.0)
    torch.testing.assert_close(pair.log_evidence(wider, y, lengths), pair.log_evidence(x, y, lengths))
    assert torch.equal(pair.transcribe(wider, lengths)[:, :6], pair.transcribe(x, lengths))
    alone = torch.cat([pair.log_evidence(x[i : i + 1, :n], y[i : i + 1]) for i, n in enumerate(lengths)])
    torch.testing.assert_close(pair.log_evidence(x, y, lengths), alone)


def test_simulated_labels_are_what_their_paths_give():
    torch.manual_seed(2)
    pair, (x, _, lengths) = CONDITIONAL["ctc"][0](), labelled_frames(40)
    latents, (same, y, _) = pair.simulate(40, x, lengths)
    assert torch.equal(same, x) and y.shape == (40, 6)
    assert torch.equal(pair.posterior(x, y, lengths).log_prob(latents["z"]).isfinite(), torch.ones(40).bool())
    narrow = (x, torch.ones(40, 1, dtype=torch.long), lengths)
    with pytest.raises(
        ValueError,
        match="y: expected at most 1 labels, got a draw of more; simulate with a longer placeholder",
    ):
        pair.simulate(40, like=narrow)


def test_ctc_learns_to_transcribe():
    """Frames that spell their label out, two frames each: training by ln p(y | x) alone finds them."""
    torch.manual_seed(0)
    y = torch.stack([torch.randperm(3)[:2] + 1 for _ in range(40)])
    x = torch.eye(4)[torch.stack([y[:, 0], y[:, 0] * 0, y[:, 1], y[:, 1]], 1)] + 0.1 * torch.randn(40, 4, 4)
    pair = models.CTC(4, 3, 8, 1)
    climbed = quiet(pair, (x, y), epochs=6)
    assert_climbs(climbed)
    fit(pair, (x, y), epochs=60, batch_size=40, learning_rate=0.02, progress=False)
    assert torch.equal(pair.transcribe(x)[:, :2], y)


def test_a_tree_is_written_in_brackets():
    pair = models.PCFG(2, 2, 3)
    chart = torch.full((2, 3, 3), -1)
    chart[0, 0, 2], chart[0, 1, 2] = 0, 1
    chart[1, 0, 1] = 1
    for tree, length in enumerate((3, 2)):
        chart[tree].diagonal()[:length] = 2
    y = torch.tensor([[0, 1, 2], [2, 0, -1]])
    assert pair.lines({"z": chart}, y, ("the", "old", "man")) == ["⟨0 the ⟨1 old man⟩⟩", "⟨1 man the⟩"]
    assert pair.lines({"z": chart}, y, ()) == ["⟨0 0 ⟨1 1 2⟩⟩", "⟨1 2 0⟩"]

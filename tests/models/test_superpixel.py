"""Colours of superpixels: what the pair says is what plain sums say, and what it takes."""

import itertools
import math

import pyro
import pytest
import torch
from pyro import poutine

from pyroelbo import Pair, audit, data, evidence, fit, fit_em, models
from pyroelbo.models.superpixel import Painted, Palette, contrast_tree, superpixel_features
from tests.pairs import CONDITIONAL, coloured

NAMES = [name for name in CONDITIONAL if name.startswith("superpixel")]


def site(program, batch, name, z=None):
    """A site of a program on a batch, with the labels z."""
    program = program if z is None else poutine.condition(program, data={"z": z})
    return poutine.trace(program).get_trace(*batch).nodes[name]


def test_a_palettes_colours_are_distributions():
    palette = Palette(3, 4)
    luma = torch.tensor([0, 100, 255])
    co, cg = torch.meshgrid(*[torch.arange(-255, 256)] * 2, indexing="ij")
    grid = torch.stack([co, cg], -1).view(-1, 1, 2)
    log_p = palette.log_prob(luma.expand(len(grid), -1), grid.expand(-1, 3, -1))
    torch.testing.assert_close(log_p.logsumexp(0), torch.zeros(3, 3), atol=1e-9, rtol=0)


def test_a_palettes_draws_are_its_colours():
    torch.manual_seed(0)
    palette = Palette(2, 4)
    palette.start(torch.tensor([[0.5, -0.3], [-1.0, 0.8]]), torch.tensor(0.05))
    luma, colour = torch.full((40_000,), 90), torch.ones(40_000).long()
    seen = Painted(palette, luma, colour).sample()
    values = torch.arange(-255, 256)
    p = palette.distributions(torch.tensor([90]))[0].log_prob(values[:, None, None])[:, 0, 1].exp()
    counts = torch.bincount(seen[:, 0].long() + 255, minlength=511).to(p)
    keep = 40_000 * p > 5
    statistic = ((counts - 40_000 * p)[keep] ** 2 / (40_000 * p[keep])).sum()
    # a right sampler exceeds a chi-square's 1e-6 quantile with that probability
    free = torch.tensor((int(keep.sum()) - 1) / 2)
    assert torch.special.gammaincc(free, statistic / 2) > 1e-6


def plain_log_prob(pair, batch, row, labels):
    """ln P(y | z, x) of one picture by loops over segments, colours and pixels."""
    x, superpixels, parents, y = (part[row : row + 1] for part in batch)
    features = superpixel_features(x, superpixels, parents)[0]
    count = int(superpixels.max()) + 1
    size = [int((superpixels == n).sum()) for n in range(count)]
    shares, means = [], []
    for s in range(pair.segments):
        own = [n for n in range(count) if labels[n] == s]
        total = sum(size[n] for n in own)
        shares.append(total / x.numel())
        means.append(sum(size[n] * features[n] for n in own) / total if own else torch.zeros(7))
    log_prior = pair.generator(torch.stack(means)[None], torch.tensor(shares)[None])[0].tolist()
    pixels = pair.generator.palette.log_prob(x[0], y[0]).flatten(0, 1).tolist()
    own = [labels[n] for n in superpixels.flatten().tolist()]
    result = 0.0
    for s in range(pair.segments):
        terms = [
            log_prior[s][c] + sum(pixel[c] for pixel, label in zip(pixels, own, strict=True) if label == s)
            for c in range(pair.colours)
        ]
        result += max(terms) + math.log(sum(math.exp(t - max(terms)) for t in terms))
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_evidence_is_the_sum_over_segmentations(name):
    torch.manual_seed(1)
    pair, batch = CONDITIONAL[name][0](), coloured(2)
    for p in pair.parameters():  # away from the start, where labels are uniform
        p.data += 0.3 * torch.randn_like(p)
    batch = (*batch[:3], (batch[3] / 20).round().long())  # terms of a like size
    with torch.no_grad():
        found = evidence.exact(pair, batch)
        for row, count in enumerate((5, 6)):
            joint = []
            for labels in itertools.product(range(2), repeat=count):
                z = torch.zeros(2, 6).long()
                z[row, :count] = torch.tensor(labels)
                prior = site(pair.model, batch, "z")["fn"].log_prob(z)[row]
                joint.append(float(prior) + plain_log_prob(pair, batch, row, labels))
            assert float(found.value[row]) == pytest.approx(float(torch.tensor(joint).logsumexp(0)), abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("program", ["model", "guide"])
def test_labels_have_probabilities_that_sum_to_one_and_lacking_superpixels_have_none(name, program):
    pair, batch = CONDITIONAL[name][0](), coloured(2)
    q = site(getattr(pair, program), batch, "z")["fn"]
    z = torch.cartesian_prod(*[torch.arange(2)] * 6)[:, None]
    log_q = q.log_prob(z)
    torch.testing.assert_close(log_q.logsumexp(0), torch.zeros(2), atol=1e-9, rtol=0)
    assert (log_q[z[:, 0, 5] == 1, 0] == -math.inf).all() and log_q[:, 1].isfinite().all()
    assert (q.sample((50,))[:, 0, 5] == 0).all()


def test_the_generator_does_not_know_the_order_of_the_labels():
    pair, batch = models.Superpixel(3, 4, width=4), coloured(3)
    z = torch.randint(3, (3, 6))
    y = site(pair.model, batch, "y", z)["fn"].log_prob(batch[3])
    moved = torch.tensor([2, 0, 1])[z]
    torch.testing.assert_close(site(pair.model, batch, "y", moved)["fn"].log_prob(batch[3]), y)


def test_every_segments_pixels_share_a_colour():
    pair, batch = models.Superpixel(2, 2, width=4), coloured(2)
    pair.generator.palette.start(torch.tensor([[3.0, 3.0], [-3.0, -3.0]]), torch.tensor(0.02))
    z = torch.tensor([[0, 1, 0, 1, 1, 0]] * 2)
    seen = set()
    for _ in range(20):
        y = site(poutine.uncondition(pair.model), batch, "y", z)["value"]
        assert y.dtype == torch.int32 and y.shape == batch[3].shape
        labels = z.gather(1, batch[1].flatten(1)).view(batch[1].shape)
        for row, s in itertools.product(range(2), range(2)):
            signs = y[row][labels[row] == s].sign().unique()
            assert len(signs) == 1
            seen.add((s, int(signs[0])))
    assert len(seen) == 4


def test_one_segment_has_no_latent_to_speak_of():
    pair, batch = models.Superpixel(1, 3, width=4), coloured(2)
    bound = evidence.elbo(pair, batch, particles=3)
    torch.testing.assert_close(bound.value, evidence.exact(pair, batch).value)
    assert (bound.stderr == 0).all()


def test_exact_em_and_leave_one_out_gradients_climb():
    torch.manual_seed(0)
    batch = coloured(6)
    pair = models.Superpixel(2, 3, width=4).initialize(*batch)
    run = fit_em(pair, batch, epochs=4, progress=False, start="current")
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(run.losses)) and run.losses[-1] < run.losses[0]
    torch.testing.assert_close(
        torch.tensor(run.losses[-1]), -evidence.exact(pair, batch).value.mean(), rtol=1e-6, atol=0
    )
    before = evidence.elbo(pair, batch, particles=200).value.mean()
    settings = {"objective": "rloo", "particles": 8, "epochs": 60, "learning_rate": 0.02}
    fit(pair, batch, freeze=("prior", "generator"), progress=False, **settings)
    result = audit(pair, batch, particles=200)
    assert result["elbo"].mean > before and result.reference == "exact"
    assert all((gap.value > -6 * gap.error - 1e-6).all() for gap in result.gaps)


def test_it_starts_from_the_colours_of_the_pictures():
    batch = coloured(8)
    y = torch.where(batch[1][..., None] % 2 == 0, torch.tensor([40, -20]), torch.tensor([-64, 80]))
    y[0] = y[1]
    pair = models.Superpixel(2, 2, width=4).initialize(*batch[:2], batch[2], y)
    centres = pair.generator.palette.distributions(torch.tensor([10]))[0].loc
    assert sorted(centres[0].tolist()) == pytest.approx([-64, 40], abs=3)
    z = site(pair.guide, (*batch[:3], y), "z")["fn"].mode[1:]
    assert ((z == z[:, :1]) == (torch.arange(6) % 2 == 0)).all()


def test_draws_given_pictures_keep_the_pictures():
    pair, batch = models.Superpixel(2, 3, width=4), coloured(3)
    latents, drawn = pair.simulate(3, *batch[:3])
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], batch[:3], strict=True))
    assert latents["z"].shape == (3, 6) and not torch.equal(drawn[3], batch[3])
    with pytest.raises(ValueError, match="given: expected x, superpixels and parents, got 0 parts"):
        pair.simulate(3)


def changed(i, value):
    def make():
        batch = list(coloured(2))
        batch[i] = value(batch[i])
        return batch

    return make


@pytest.mark.parametrize("use", [fit, fit_em, audit, evidence.exact, evidence.elbo])
def test_colours_without_what_they_are_given_are_refused(use):
    pair, (*_, y) = models.Superpixel(2, 3, width=4), coloured(3)
    message = (
        "batch: expected the parts x, superpixels, parents, y that Superpixel.model takes, got batch: missing"
    )
    with pytest.raises(ValueError, match=message):
        use(pair, y)


def test_parts_are_those_of_any_two_callables():
    def model(x, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", pyro.distributions.Normal(pyro.param("w", torch.tensor(1.0)) * x, 1.0), obs=y)

    with pytest.raises(ValueError, match="batch: expected the parts x, y that model.model takes, got batch"):
        fit(Pair.of(model, lambda x, y: None), torch.zeros(3), progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (*coloured(2)[:3], coloured(2)[3][..., 0]), r"x, superpixels, parents, y: expected shapes"),
        (changed(0, lambda x: x / 255.0), r"x: expected integers in 0 … 255, got torch.float"),
        (changed(3, lambda y: y + 300), r"y: expected integers in -255 … 255"),
        (changed(1, lambda s: s + 3), r"superpixels: expected integers in 0 … 5, got torch.int64, 3 … 8"),
        (
            changed(1, lambda s: s.clamp(max=1)),
            "superpixels: expected at least 3 in each picture, one a segment, got 2 in row 0; use fewer",
        ),
    ],
)
def test_bad_batches_are_refused(make, message):
    pair = models.Superpixel(3, 2, width=4)
    with pyro.validation_enabled(True), pytest.raises(ValueError, match=message):
        evidence.elbo(pair, tuple(make()), particles=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.Superpixel(0), "segments: expected a positive number, got 0"),
        (lambda: models.Superpixel(prior="chain"), r"prior: expected one of .* 'tree'\), got 'chain'"),
        (
            lambda: models.matched("superpixel", data.load("digits"), {}),
            "data: expected superpixels for superpixel, got digits, bytes",
        ),
        (
            lambda: models.matched("vae", data.load("scenes"), {}),
            "data: expected binary or .* for vae, got scenes, colour; colour are for superpixel",
        ),
    ],
)
def test_bad_settings_and_data_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_tree_of_contrasts_spans_what_is_there_at_the_largest_distance():
    """Against every spanning tree of five points, and of the three that are real."""
    torch.manual_seed(0)
    chroma = torch.randn(4, 5, 2)
    real = torch.tensor(
        [[True] * 5, [False, True, True, False, True], [True] * 5, [False, False, True, False, False]]
    )
    parents = contrast_tree(chroma, real)
    for row in range(4):
        there = real[row].nonzero()[:, 0].tolist()
        apart = torch.cdist(chroma[row], chroma[row])
        edges = list(itertools.combinations(there, 2))
        totals = []
        for tree in itertools.combinations(edges, len(there) - 1):
            reached = {there[0]}
            for _ in tree:
                reached |= {v for edge in tree if reached & set(edge) for v in edge}
            if len(reached) == len(there):
                totals.append(sum(float(apart[a, b]) for a, b in tree))
        found = [(n, int(parents[row, n])) for n in range(5) if parents[row, n] >= 0]
        assert len(found) == len(there) - 1 and {n for edge in found for n in edge} <= set(there)
        assert sum(float(apart[a, b]) for a, b in found) == pytest.approx(max(totals))
        for n, _ in found:  # each leads to the root, the first that is real
            while parents[row, n] >= 0:
                n = int(parents[row, n])
            assert n == there[0]


def test_a_guide_on_a_tree_may_leave_the_order_of_the_labels_free():
    torch.manual_seed(0)
    pair, batch = models.Superpixel(3, 4, width=4), coloured(2)
    pair.initialize(*batch)
    for network in (pair.encoder.node, pair.encoder.edge):
        torch.nn.init.zeros_(network[-1].weight)
    z = torch.cartesian_prod(*[torch.arange(3)] * 6)[:, None]
    turned = (z + 1) % 3
    with torch.no_grad():
        pair.encoder.lean.fill_(1.0)
        settled = site(pair.guide, batch, "z")["fn"]
        logits = -pair.encoder.log_precision.exp() * (
            site_chroma(batch).unsqueeze(-2) - pair.encoder.anchors
        ).square().sum(-1)
        alone = pyro.distributions.Categorical(logits=logits[1]).to_event(1)
        torch.testing.assert_close(settled.log_prob(z)[:, 1], alone.log_prob(z[:, 0]))
        pair.encoder.lean.fill_(0.0)
        free = site(pair.guide, batch, "z")["fn"]
        torch.testing.assert_close(free.log_prob(turned)[:, 1], free.log_prob(z)[:, 1])
        assert free.log_prob(z)[:, 1].logsumexp(0).abs() < 1e-9


def site_chroma(batch):
    """Mean chroma of the superpixels, in units of 32 levels, [B, 6, 2]."""
    _, superpixels, _, y = batch
    own = torch.nn.functional.one_hot(superpixels.flatten(1), 6).double()
    return (own.mT @ y.flatten(1, 2).double()) / own.sum(1).clamp_min(1)[..., None] / 32

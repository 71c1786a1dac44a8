"""Diffusion of labelled data: the pair given a label is the pair of that class, in every form."""

import copy

import pytest
import torch
from torch import nn

from pyroelbo import audit, evidence, fit, models
from pyroelbo.distributions.corruption import Generated
from pyroelbo.nn import MLPDenoiser, TokenMLP
from tests.models.test_diffusion import gaussian_evidence, perturbed
from tests.pairs import CONDITIONAL

NAMES = [name for name in CONDITIONAL if "classes" in name]


class ByClass(nn.Module):
    """A network of its own for each class."""

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, z, time=None, labels=None):
        out = [network(z) if time is None else network(z, time) for network in self.networks]
        labels = labels.expand(z.shape[:-1])[..., None, None]
        return sum(torch.where(labels == c, each, 0.0) for c, each in enumerate(out))


def gaussian(network, **settings):
    return models.Diffusion(2, 4, None, network=network, **settings)


def continuous(network, **settings):
    return models.VDM(2, None, network=network, steps=5, **settings)


def uniform(network, **settings):
    return models.DiscreteDiffusion(2, 3, 4, network=network, **settings)


def masked(network, **settings):
    return models.MaskedDiffusion(3, 3, "categorical", network, **settings)


KINDS = {
    "gaussian": (gaussian, lambda: MLPDenoiser(2, 2, 8, 1), lambda n: torch.randn(n, 2)),
    "continuous": (continuous, lambda: MLPDenoiser(2, 1, 8, 1), lambda n: torch.randn(n, 2)),
    "uniform": (uniform, lambda: TokenMLP(2, 3, 3, 8, 1), lambda n: torch.randint(3, (n, 2))),
    "masked": (masked, lambda: TokenMLP(3, 4, 3, 8, 1, timed=False), lambda n: torch.randint(3, (n, 3))),
}


def made(kind, classes=2):
    """The pair of labelled data, those of its classes, and labelled data."""
    make, network, draw = KINDS[kind]
    networks = [perturbed(network()) for _ in range(classes)]
    joint = make(ByClass(networks), classes=classes)
    singles = [make(copy.deepcopy(n)) for n in networks]
    return joint.eval(), [s.eval() for s in singles], (torch.arange(12) % classes, draw(12))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_term_is_that_of_its_class(kind):
    pair, singles, (labels, y) = made(kind)
    time, noise = torch.rand(5, 12), pair.noise_law().sample((5, 12))
    found = pair.term(y, time, noise, labels)
    for c, single in enumerate(singles):
        own = labels == c
        torch.testing.assert_close(found[:, own], single.term(y[own], time[:, own], noise[:, own]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_a_chain_is_that_of_its_class(kind):
    pair, singles, (labels, y) = made(kind)
    terms = evidence.terms(pair.written_out(), (labels, y), 4)
    z = terms.latents["z"]
    for c, single in enumerate(singles):
        own, chain = labels == c, single.written_out()
        torch.testing.assert_close(terms.log_model["z"][:, own], Generated(chain).log_prob(z[:, own]))
        seen = chain.observation(z[:, own, -1]).log_prob(y[own]).sum(-1)
        torch.testing.assert_close(terms.log_model["y"][:, own], seen.to(terms.log_model["y"].dtype))


def test_bounds_and_draws_of_gaussian_chains_by_class():
    networks = [perturbed(models.Diffusion(2, 4, None, network="linear").generator) for _ in range(2)]
    pair = gaussian(ByClass(networks), classes=2)
    laws = [gaussian_evidence(gaussian(n), None) for n in networks]
    labels = torch.tensor([0, 1, 1])
    y = torch.stack([laws[c].sample() for c in labels])
    truth = torch.stack([laws[c].log_prob(row) for c, row in zip(labels, y, strict=True)])
    whole = pair.written_out()
    for bound in (
        evidence.iwae(whole, (labels, y), 10000),
        evidence.smc(whole, (labels, y), 32, 400, progress=False),
    ):  # six z-tests on the linear scale at 4.9, 6e-6 in all
        assert ((bound.value - truth).expm1().abs() < 4.9 * bound.stderr + 1e-9).all()
    many = torch.arange(20000) % 2
    given, drawn = pair.simulate(20000, many)[1]
    assert torch.equal(given, many)
    for c, law in enumerate(laws):
        error = (law.covariance_matrix.diagonal() / 10000).sqrt()
        assert ((drawn[many == c].mean(0) - law.mean).abs() < 5 * error).all()


def test_the_evidence_over_orders_by_class():
    pair, singles, (labels, y) = made("masked")
    exact = evidence.exact(pair.written_out(), (labels, y)).value
    for c, single in enumerate(singles):
        own = labels == c
        torch.testing.assert_close(exact[own], evidence.exact(single.written_out(), y[own]).value)
    smc = evidence.smc(pair.written_out(), (labels, y), 8, 300, progress=False)
    assert ((smc.value - exact).expm1().abs() < 5 * smc.stderr).all()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_every_network_is_told_the_label(name):
    """Whatever the particles, and nothing else of the batch changes with it."""
    make, draw = CONDITIONAL[name]
    pair, (labels, y) = perturbed(make()).eval(), draw(6)
    if "written_out" in name:
        value = lambda labels: evidence.terms(pair, (labels, y), 3).log_joint  # noqa: E731
    else:
        time, noise = torch.rand(3, 6), pair.noise_law().sample((3, 6))
        value = lambda labels: pair.term(y, time, noise, labels)  # noqa: E731
    torch.manual_seed(1)
    before = value(labels)
    torch.manual_seed(1)
    after = value(torch.where(torch.arange(6) == 2, (labels + 1) % 3, labels))
    same = torch.arange(6) != 2
    torch.testing.assert_close(before[:, same], after[:, same])
    assert before.shape == (3, 6) and (before[:, 2] != after[:, 2]).any()


@pytest.mark.parametrize("name", NAMES)
def test_labelled_data_are_simulated_and_audited(name):
    make, draw = CONDITIONAL[name]
    pair, batch = make(), draw(4)
    result = audit(pair, batch, particles=8, progress=False)
    assert result.bounds[-1].kind == "lower" and result.bounds[-1].value.shape == (4,)
    _, (labels, y) = pair.simulate(5, torch.tensor([2, 1, 0, 0, 2]))
    assert labels.tolist() == [2, 1, 0, 0, 2] and y.shape == (5, batch[1].shape[1])
    _, (labels, _) = pair.simulate(6, like=batch)
    assert torch.equal(labels, batch[0][torch.arange(6) % 4])


def test_draws_of_a_class_look_like_it():
    """Coins of .1 and .9: the bound given the label knows which, and so do the draws."""
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    y = torch.bernoulli(0.1 + 0.8 * labels[:, None].double().expand(-1, 6))
    pair = models.MaskedDiffusion(6, width=8, layers=1, classes=2)
    fit(pair, (labels, y), epochs=20, batch_size=50, learning_rate=3e-2, progress=False)
    entropy = -6 * (0.1 * torch.tensor(0.1).log() + 0.9 * torch.tensor(0.9).log())
    assert evidence.elbo(pair, (labels, y), 64).mean > -float(entropy) - 0.3
    _, (_, drawn) = pair.simulate(400, labels)
    assert drawn[labels == 0].mean() < 0.2 and drawn[labels == 1].mean() > 0.8
    known = torch.zeros(6, dtype=torch.bool)
    assert pair.inpaint(torch.zeros(50, 6), known, labels=torch.ones(50).long()).mean() > 0.75


def test_few_steps_by_class():
    pair = models.Diffusion(2, 8, 5, width=8, layers=1, classes=2)
    assert pair.few_steps(4, 3, labels=torch.tensor([0, 1, 1, 0])).shape == (4, 2)
    with pytest.raises(ValueError, match=r"given: expected labels \[4\] for a Diffusion of 2 classes"):
        pair.few_steps(4, 3)
    chains = pair.written_out().simulate(3, torch.tensor([0, 1, 1]))[0]["z"]
    assert pair.strip(chains, 4, torch.tensor([0, 1, 1])).shape == (4, 3, 2)


@pytest.mark.parametrize("make", [gaussian, continuous, uniform, masked])
def test_refused_labels(make):
    pair = make("mlp", classes=3, width=8, layers=1)
    y = torch.zeros(4, pair.dims)
    for labels, message in (
        (torch.tensor([0, 1, 3, 0]), r"labels: expected integers in \[0, 2\], got 3 at row 2"),
        (torch.tensor([0, -1, 1, 0]), "got -1 at row 1"),
        (torch.tensor([0, 0.5, 1, 0]), "got 0.5 at row 1"),
        (torch.zeros(4, 1), r"labels: expected shape \[4\], one a datum, got \(4, 1\)"),
    ):
        for use in (lambda b: evidence.elbo(pair, b, 2), lambda b: fit(pair, b, epochs=1, progress=False)):
            with pytest.raises(ValueError, match=message):
                use((labels, y))
    for batch in (y, (torch.zeros(4), y, y)):
        with pytest.raises(ValueError, match="batch: expected labels and y for this"):
            evidence.elbo(pair, batch, 2)
    with pytest.raises(ValueError, match="batch: expected y for this"):
        evidence.elbo(make("mlp", width=8, layers=1), (torch.zeros(4), y), 2)
    with pytest.raises(ValueError, match=r"given: expected labels \[2\]"):
        pair.simulate(2)
    with pytest.raises(ValueError, match="given: expected nothing"):
        make("mlp", width=8, layers=1).simulate(2, torch.zeros(2))
    with pytest.raises(ValueError, match="labels: expected shape"):
        pair.simulate(2, torch.zeros(3))
    with pytest.raises(ValueError, match="classes: expected a positive number"):
        make("mlp", classes=0)
    assert evidence.elbo(pair, {"labels": torch.zeros(4), "y": y}, 2).value.shape == (4,)


def test_linear_maps_see_no_label():
    with pytest.raises(ValueError, match="classes: expected none for network='linear'"):
        gaussian("linear", classes=2)

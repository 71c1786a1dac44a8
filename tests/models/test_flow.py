"""Flows alone: exact evidence, the entropy of known densities, and dequantization as a bound."""

import math

import pyro.distributions as dist
import pytest
import torch

from pyroelbo import audit, evidence, fit
from pyroelbo.models import DequantizedFlow, Flow


def test_a_flows_elbo_is_its_evidence():
    pair, y = Flow(3, layers=2, hidden=(8,)), torch.randn(5, 3)
    a = audit(pair, y, particles=3)
    for method in ("exact", "elbo", "iwae-3"):
        torch.testing.assert_close(a[method].value, pair.generator().log_prob(y).double())
    assert a["elbo"].stderr.abs().max() < 1e-12
    with pytest.raises(TypeError, match="posterior"):
        pair.posterior(y)


def test_dequantization_is_a_bound_on_the_sum_over_cells():
    torch.manual_seed(0)
    pair = DequantizedFlow(2, 4, layers=2, hidden=(8,), bins=4)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    y = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    # Oracle: the midpoint rule over each cell, the outer ones stretched to where the density has gone.
    fine = 24
    ticks = (torch.arange(32 * fine) + 0.5) / fine - 14
    grid = torch.cartesian_prod(ticks, ticks)
    with torch.no_grad():
        log_p = torch.cat([pair.generator().log_prob(g) for g in grid.split(100_000)])
    cell = grid.floor().clamp(0, 3)
    index = (4 * cell[:, 0] + cell[:, 1]).long()
    mass = torch.zeros(16).index_add_(0, index, (log_p - 2 * math.log(fine)).exp())
    assert abs(float(mass.sum()) - 1) < 5e-3
    elbo, iwae = evidence.elbo(pair, y, particles=3000), evidence.iwae(pair, y, particles=3000)
    inner = ((y > 0) & (y < 3)).all(1)  # the guide does not reach into the tails
    assert (elbo.value <= mass.log() + 5 * elbo.stderr + 1e-3).all()
    torch.testing.assert_close(iwae.value[inner], mass.log()[inner], atol=0.05, rtol=0)
    assert torch.isfinite(elbo.value).all()


def test_no_draw_leaves_its_cell_in_single_precision():
    torch.set_default_dtype(torch.float32)
    pair = DequantizedFlow(2000, 256, layers=1, hidden=(4,))
    y = torch.full((50, 2000), 255.0)
    assert torch.isfinite(
        evidence.elbo(pair, y, particles=40).value
    ).all()  # 4 million draws of probability 4e-6 each


def ring(n):
    """Radius N(2, 0.2²) kept positive, angle uniform: entropy ln 2π + h(r) + E ln r."""
    r, angle = 2 + 0.2 * torch.randn(n), 2 * math.pi * torch.rand(n)
    return torch.stack([r * angle.cos(), r * angle.sin()], -1)


def blobs():
    angle = 2 * math.pi * torch.arange(8) / 8
    centres = 2 * torch.stack([angle.cos(), angle.sin()], -1)
    return dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(8)), dist.Normal(centres, 0.3).to_event(1)
    )


def bent(n):
    """A banana: y_1 = x_1, y_2 = x_2 + x_1² with x ~ N(0, diag(1, 0.3²)); a shear keeps the entropy."""
    x = torch.randn(n, 2) * torch.tensor([1.0, 0.3])
    return torch.stack([x[:, 0], x[:, 1] + x[:, 0] ** 2], -1)


def entropies():
    r = 2 + 0.2 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    mixture = blobs()
    torch.manual_seed(0)
    gaussian = 0.5 * math.log(2 * math.pi * math.e)
    return {
        "ring": (ring, math.log(2 * math.pi) + gaussian + math.log(0.2) + float(r.log().mean())),
        "blobs": (
            lambda n: blobs().sample((n,)),
            -float(mixture.log_prob(mixture.sample((1_000_000,))).mean()),
        ),
        "banana": (bent, 2 * gaussian + math.log(0.3)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
@pytest.mark.parametrize("name", ["ring", "blobs", "banana"])
def test_a_flow_reaches_the_entropy_of_a_toy(name, kind):
    torch.set_default_dtype(torch.float32)
    draw, entropy = entropies()[name]
    torch.manual_seed(1)
    train, test = draw(50_000), draw(50_000)
    pair = Flow(2, kind, layers=6, hidden=(64, 64), bins=12).initialize(train)
    fit(
        pair,
        train,
        epochs=25,
        batch_size=500,
        learning_rate=3e-3,
        schedule="cosine",
        compile=True,
        progress=False,
    )
    with torch.no_grad():
        value = pair.log_evidence(test)
    cross, error = -float(value.mean()), float(value.std()) / math.sqrt(len(test))
    # Cross-entropy minus entropy is a KL: at least zero, within the sampling error of 50,000 test points.
    assert -4 * error < cross - entropy < 0.02


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Flow(3).log_evidence(torch.zeros(2, 4)),
            r"y: expected shape \[B, 3\] for this Flow, got \(2, 4\)",
        ),
        (
            lambda: fit(DequantizedFlow(3, 4), torch.full((2, 3), 4.0), progress=False),
            r"observed site 'y' \(_Cell\): expected values in IntegerInterval\(lower_bound=0,",
        ),
        (
            lambda: fit(DequantizedFlow(3, 4), torch.full((2, 3), 0.5), progress=False),
            r"observed site 'y' \(_Cell\): expected values in IntegerInterval\(lower_bound=0,",
        ),
        (lambda: DequantizedFlow(3, 1), "levels: expected a whole number of at least 2 grey levels, got 1"),
        (lambda: Flow(1), "expected at least 2 for a coupling"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

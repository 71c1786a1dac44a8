"""Shares of the gap by site, against closed forms of a linear-Gaussian chain of two."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, evidence
from pyroelbo.results import Bound
from tests.pairs import TABLE, Nonlinear

Z_LIMIT = 4.9  # a two-sided normal tail of 1e-6: the false-alarm rate of one z-test


def model(y):
    with pyro.plate("data", len(y)):
        top = pyro.sample("top", dist.Normal(torch.zeros(len(y)), 1.0))
        low = pyro.sample("low", dist.Normal(top, 1.0))
        pyro.sample("y", dist.Normal(low, 1.0), obs=y)


def top_down(y):
    with pyro.plate("data", len(y)):
        top = pyro.sample("top", dist.Normal(0.2 * y, 0.7))
        pyro.sample("low", dist.Normal(0.4 * (top + y), 0.6))


def bottom_up(y):
    with pyro.plate("data", len(y)):
        low = pyro.sample("low", dist.Normal(0.6 * y, 0.9))
        pyro.sample("top", dist.Normal(0.5 * low, 0.8))


def close(found, truth):
    return abs(float(found) - float(truth)) < Z_LIMIT * float(found.stderr) + 2e-3


def kl(a, b):
    return dist.kl.kl_divergence(a, b)


def test_shares_of_a_top_down_guide():
    y = torch.randn(8)
    found = evidence.site_gaps(Pair.of(model, top_down), y, 400, 200)
    top = kl(dist.Normal(0.2 * y, 0.7), dist.Normal(y / 3, math.sqrt(2 / 3))).mean()
    # Given the top, low has the posterior N((top + y)/2, 1/2); the mean square of the guide's error is in
    # closed form.
    square = 0.01 * ((1.2 * y).square() + 0.49)
    low = (0.5 * (0.72 + square / 0.5 - 1) - 0.5 * math.log(0.72)).mean()
    exact = dist.Normal(0.0, math.sqrt(3)).log_prob(y).mean()
    assert found.sites == ("top", "low") and set(found.kinds.values()) == {"KL"}
    assert close(found.gaps["top"], top) and close(found.gaps["low"], low)
    assert close(found.total, top + low) and close(found.elbo, exact - top - low)
    rates = sum(r.value for r in found.rates.values())
    assert abs(float(found.reconstruction.value - rates - found.elbo.value)) < 1e-9
    assert close(found.rates["top"], kl(dist.Normal(0.2 * y, 0.7), dist.Normal(0.0, 1.0)).mean())
    assert "share of the gap" in str(found) and json.loads(found.to_json())["kinds"]["low"] == "KL"


def test_a_bottom_up_guides_lower_rate_is_no_kl():
    y = torch.randn(8)
    found = evidence.site_gaps(Pair.of(model, bottom_up), y, 400, 200)
    assert found.sites == ("low", "top") and found.kinds == {"low": "difference", "top": "KL"}
    # p(low | y) = N(2y/3, 2/3), p(top | low) = N(low/2, 1/2)
    low = kl(dist.Normal(0.6 * y, 0.9), dist.Normal(2 * y / 3, math.sqrt(2 / 3))).mean()
    top = kl(dist.Normal(0.0, 0.8), dist.Normal(0.0, math.sqrt(0.5)))
    assert close(found.gaps["low"], low) and close(found.gaps["top"], top)


def test_the_rest_is_what_the_reference_has_beyond():
    y = torch.randn(5)
    value = dist.Normal(0.0, math.sqrt(3)).log_prob(y) + 0.25
    exact = evidence.exact(TABLE["ppca"][0](), torch.randn(5, 5))
    from dataclasses import replace

    found = evidence.site_gaps(Pair.of(model, top_down), y, 300, 300, reference=replace(exact, value=value))
    parts = sum(float(g) for g in found.gaps.values()) + float(found.rest)
    assert abs(parts - float(found.total)) < 1e-9 and close(found.rest, 0.25)
    with pytest.raises(ValueError, match="reference: expected shape"):
        evidence.site_gaps(
            Pair.of(model, top_down), y, reference=exact.__class__("x", value[:2], value[:2], "exact")
        )


def test_one_site_and_a_decoder_that_refuses_particles():
    make, draw = TABLE["own-conv"]
    found = evidence.site_gaps(make(), draw(3), 6, 5)
    assert found.sites == ("z",) and float(found.gaps["z"]) == pytest.approx(float(found.total))
    with pytest.raises(ValueError, match="inner: expected"):
        evidence.site_gaps(Nonlinear(), torch.randn(2, 4), inner=0)


@pytest.mark.parametrize(
    "kind, said", [("lower", "a lower bound"), ("upper", "an upper bound"), ("estimate", "an estimate")]
)
def test_a_reference_that_is_not_exact_is_said_to_be_so(kind, said):
    y = torch.randn(3)
    anchor = Bound("other", torch.zeros(3), torch.ones(3), kind)
    found = evidence.site_gaps(Pair.of(model, top_down), y, 4, 4, reference=anchor)
    assert f"other is {said}, and so are the rest and the total" in found.notes
    assert float(found.total.value) == pytest.approx(-float(found.elbo.value))
    assert float(found.total.stderr) > 1 / math.sqrt(3)  # the reference's own error, and that of the draws


def test_without_a_reference_nothing_is_left_over():
    found = evidence.site_gaps(Pair.of(model, top_down), torch.randn(3), 4, 4)
    assert found.reference == "iwae-4" and float(found.rest.value) == float(found.rest.stderr) == 0
    parts = sum(float(g.value) for g in found.gaps.values())
    assert float(found.total.value) == pytest.approx(parts)

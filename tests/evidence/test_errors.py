"""Stated errors held against repetitions: of weighted upper bounds, of AIS with few chains."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, evidence

from ..pairs import Nonlinear


def leave_one_out(statistic, log_w):
    """Jackknife standard error of a statistic of log weights [K, B]."""
    count = len(log_w)
    values = torch.stack([statistic(torch.cat([log_w[:i], log_w[i + 1 :]])) for i in range(count)])
    return ((count - 1) * values.var(0, correction=0)).sqrt()


def draws_of(pair, y, particles, seed):
    pyro.set_rng_seed(seed)
    return evidence.terms(pair, y, particles).log_weight.detach()


def test_the_error_of_the_weighted_upper_bound():
    pair, y = Nonlinear(), torch.randn(5, 4)
    log_w = draws_of(pair, y, 800, 3)
    pyro.set_rng_seed(3)
    bound = evidence.eubo(pair, y, 800, source="weights")
    oracle = leave_one_out(lambda w: (w.softmax(0) * w).sum(0), log_w)
    torch.testing.assert_close(bound.stderr, oracle, rtol=0.1, atol=0)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_the_error_of_the_chi_bound(order):
    pair, y = Nonlinear(), torch.randn(5, 4)
    log_w = draws_of(pair, y, 800, 3)
    pyro.set_rng_seed(3)
    bound = evidence.cubo(pair, y, 800, order)
    oracle = leave_one_out(lambda w: (torch.logsumexp(order * w, 0) - math.log(len(w))) / order, log_w)
    few = bound.ess > 50  # the two agree where many draws count
    assert few.any()
    torch.testing.assert_close(bound.stderr[few], oracle[few], rtol=0.1, atol=0)


@pytest.mark.parametrize("temperatures", [10, 40])
def test_the_error_of_ais_with_eight_chains(temperatures):
    """The root mean square of bound - ln p(y) over 300 data, within a fifth of the stated one."""
    pair, y = Nonlinear(), 2 * torch.randn(300, 4)
    exact = evidence.quadrature(pair, y).value
    bound = evidence.ais(pair, y, temperatures, 8, progress=False)
    found = float((bound.value - exact).square().mean().sqrt())
    stated = float(bound.stderr.square().mean().sqrt())
    assert stated == pytest.approx(found, rel=0.2)
    assert any("no k-hat for 300 of 300 data: too few draws" in note for note in bound.notes)


def test_a_single_chain_or_weight_knows_no_error():
    from pyroelbo.evidence.bounds import weighted

    log_w = torch.tensor([[0.0, 0.0], [-1.0, -800.0], [-0.5, -900.0]])
    bound = weighted("ais", log_w, jackknife=True)
    assert bound.stderr[0].isfinite() and bound.stderr[1].isnan()
    assert weighted("ais", log_w[:1], jackknife=True).stderr.isnan().all()
    torch.testing.assert_close(
        bound.stderr[:1], leave_one_out(lambda w: torch.logsumexp(w, 0), log_w[:, :1]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("scale, refused", [(1 + 1e-7, False), (1.0002, True), (0.9998, True), (1.05, True)])
def test_a_scale_close_to_one_is_a_scale(scale, refused):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            with pyro.poutine.scale(scale=scale):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    pair = Pair.of(model, guide)
    if not refused:
        evidence.elbo(pair, torch.randn(3), 2)
        return
    for scope in ("datum", "joint"):
        with pytest.raises(ValueError, match="'y' is scaled by"):
            evidence.elbo(pair, torch.randn(3), 2, scope=scope)

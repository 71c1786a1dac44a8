import math

import pytest
import torch

from pyroelbo import numerics


def test_logsumexp_agrees_with_torch_on_ordinary_input():
    x = torch.randn(4, 5, 6) * 30
    for dim in (0, -1, (0, 2)):
        torch.testing.assert_close(numerics.logsumexp(x, dim), torch.logsumexp(x, dim))
        torch.testing.assert_close(
            numerics.logsumexp(x, dim, keepdim=True), torch.logsumexp(x, dim, keepdim=True)
        )


def test_logsumexp_of_nothing_is_minus_infinity_with_zero_gradient():
    x = torch.tensor([[-math.inf, -math.inf], [0.0, -math.inf], [1.0, 2.0]], requires_grad=True)
    value = numerics.logsumexp(x)
    assert value[0] == -math.inf and value[1] == 0
    value[1:].sum().backward()
    assert torch.equal(x.grad[0], torch.zeros(2)) and torch.equal(x.grad[1], torch.tensor([1.0, 0.0]))
    grad = torch.autograd.grad(numerics.logsumexp(x).nan_to_num(neginf=0.0).sum(), x)[0]
    assert torch.isfinite(grad).all()


def test_logsumexp_at_plus_infinity_and_nan():
    x = torch.tensor([[math.inf, 0.0], [math.inf, -math.inf], [math.nan, 0.0]])
    value = numerics.logsumexp(x)
    assert torch.equal(value[:2], torch.full((2,), math.inf)) and value[2].isnan()


def test_logsumexp_gradient_is_the_softmax():
    x = torch.randn(3, 4, requires_grad=True)
    assert torch.autograd.gradcheck(numerics.logsumexp, (x,))


def test_log_mean_exp_standard_error():
    """The delta method's standard error is the spread over repetitions, and weights far from one do not
    matter."""
    draws, repeats = 400, 2000
    log_w = 0.3 * torch.randn(draws, repeats) - 700
    value, stderr = numerics.log_mean_exp(log_w)
    exact = -700 + 0.045
    z = (value.mean() - exact + value.var() / 2) / (value.std() / math.sqrt(repeats))
    assert abs(z) < 5  # false alarms: 6e-7
    assert (
        abs(float(stderr.mean() / value.std()) - 1) < 0.1
    )  # 1 / sqrt(2 * 2000) = 0.016 is one standard error


def test_log_mean_exp_edges():
    value, stderr = numerics.log_mean_exp(torch.tensor([[0.0, -math.inf]]))
    assert torch.equal(value, torch.tensor([0.0, -math.inf])) and stderr.isnan().all()
    value, stderr = numerics.log_mean_exp(torch.tensor([[0.0], [-math.inf]]))
    torch.testing.assert_close(value, torch.tensor([-math.log(2)]))
    assert stderr > 0


def test_effective_sample_size():
    assert float(numerics.effective_sample_size(torch.zeros(7))) == pytest.approx(7)
    assert float(numerics.effective_sample_size(torch.tensor([0.0, -math.inf, -math.inf]))) == pytest.approx(
        1
    )


@pytest.mark.parametrize(
    "text, seconds", [("90s", 90), ("3 sec", 3), ("1.5min", 90), (" 2 h ", 7200), ("0.5s", 0.5)]
)
def test_times(text, seconds):
    assert numerics.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0s", "-1s", "10", "3 days", "1s2min", 90, None])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=r"limit: expected a time such as '90s'.* got"):
        numerics.duration(text, "limit")


@pytest.mark.parametrize("value, good", [(1, True), (7, True), (0, False), (True, False), (2.0, False)])
def test_counts(value, good):
    if good:
        assert numerics.positive_count("n", value) == value
        return
    with pytest.raises(ValueError, match=r"n: expected a positive draw, got"):
        numerics.positive_count("n", value, "draw")


def test_units():
    assert numerics.nats_to_bits(math.log(8.0)) == pytest.approx(3)
    assert numerics.bits_per_dim(-10 * math.log(2.0), 5) == pytest.approx(2)


def test_agreement_of_different_dtypes():
    a = torch.tensor([1.0, math.nan, -math.inf], dtype=torch.float32)
    assert numerics.agree(a, a.double(), rtol=1e-6, atol=0.0)
    assert not numerics.agree(a.double(), a + torch.tensor([1e-3, 0, 0]), rtol=1e-6, atol=0.0)

import math

import pytest
import torch
from torch.distributions import Laplace, Normal

from pyroelbo.distributions import (
    DiscretizedLaplace,
    DiscretizedLogistic,
    DiscretizedLogistics,
    DiscretizedNormal,
    l1_density,
    l2_density,
)

# each with the distribution function of its density
ROUNDED = {
    DiscretizedLogistic: torch.sigmoid,
    DiscretizedNormal: lambda x: Normal(0.0, 1.0).cdf(x),
    DiscretizedLaplace: lambda x: Laplace(0.0, 1.0).cdf(x),
}


@pytest.mark.parametrize("levels", [2, 5, 256])
@pytest.mark.parametrize("scale", [1e-3, 0.3, 40.0])
@pytest.mark.parametrize("kind", ROUNDED)
def test_probabilities_sum_to_one(kind, levels, scale):
    d = kind(torch.linspace(-3, levels + 2, 7), torch.tensor(scale), levels)
    every = torch.arange(levels, dtype=torch.float64)[:, None]
    torch.testing.assert_close(d.log_prob(every).logsumexp(0), torch.zeros(7), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ROUNDED)
def test_is_the_difference_of_distribution_functions(kind):
    cdf, scale, y = ROUNDED[kind], torch.tensor(2.0), torch.arange(9.0)
    for loc in (torch.tensor(4.2), torch.tensor(4.0), torch.tensor(3.5), torch.tensor(-2.0)):
        above, below = cdf((y + 0.5 - loc) / scale), cdf((y - 0.5 - loc) / scale)
        above[-1], below[0] = 1.0, 0.0
        torch.testing.assert_close(kind(loc, scale, 9).log_prob(y), (above - below).log())


@pytest.mark.parametrize("kind", ROUNDED)
def test_gradients_are_those_of_finite_differences(kind):
    loc = torch.tensor([4.2, 4.5, -3.0, 20.0, 3.0], requires_grad=True)
    scale = torch.tensor([1.3, 0.4, 2.0, 3.0, 0.2], requires_grad=True)
    y = torch.tensor([0.0, 2, 4, 5, 8])[:, None]
    assert torch.autograd.gradcheck(lambda loc, scale: kind(loc, scale, 9).log_prob(y), (loc, scale))


@pytest.mark.parametrize("kind", ROUNDED)
def test_far_from_its_centre_it_stays_finite_with_gradients(kind):
    loc = torch.tensor(0.0, dtype=torch.float32, requires_grad=True)
    scale = torch.tensor(0.02, requires_grad=True)
    log_p = kind(loc, scale, 256).log_prob(torch.tensor([0.0, 100.0, 255.0]))
    log_p.sum().backward()
    assert torch.isfinite(log_p).all() and torch.isfinite(loc.grad) and torch.isfinite(scale.grad)


@pytest.mark.parametrize("kind", ROUNDED)
def test_float32_has_the_gradients_of_float64_at_any_distance(kind):
    loc = torch.tensor([-12750.0, -656.0, -77.0, 0.0, 300.0, 12750.0])[:, None, None].double()
    scale = torch.tensor([0.05, 0.1, 1.0, 30.0])[:, None].double()
    y = torch.tensor([0.0, 1.0, 128.0, 254.0, 255.0]).double()

    def found(dtype):
        at = [x.to(dtype).expand(6, 4, 5).clone().requires_grad_() for x in (loc, scale)]
        log_p = kind(*at, 256).log_prob(y.to(dtype))
        assert log_p.dtype == dtype
        return torch.stack([log_p.detach(), *torch.autograd.grad(log_p.sum(), at)]).double()

    torch.testing.assert_close(found(torch.float32), found(torch.float64), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ROUNDED)
def test_samples_follow_the_probabilities(kind):
    d = kind(torch.tensor(1.4), torch.tensor(1.1), 5)
    n = 50_000
    counts = torch.bincount(d.sample((n,)).long(), minlength=5).double()
    expected = n * d.log_prob(torch.arange(5.0)).exp()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < 33.4  # chi-squared with 4 degrees of freedom: a false alarm in 1e-6
    assert not torch.signbit(kind(torch.tensor(0.0), torch.tensor(0.3), 5).sample((99,))).any()  # no -0


def test_densities_keep_their_constants():
    y, center = torch.randn(4), torch.zeros(4)
    torch.testing.assert_close(l2_density(center, 4.0).log_prob(y), Normal(0.0, 0.5).log_prob(y))
    torch.testing.assert_close(l1_density(center, 4.0).log_prob(y), Laplace(0.0, 0.25).log_prob(y))


@pytest.mark.parametrize("kind", ROUNDED)
def test_validation(kind):
    d = kind(torch.tensor(1.0), torch.tensor(1.0), 5, validate_args=True)
    with pytest.raises(ValueError):
        d.log_prob(torch.tensor(5.0))
    with pytest.raises(ValueError, match="levels"):
        kind(torch.tensor(1.0), torch.tensor(1.0), 1)


def mixture(levels=7, parts=3):
    g = torch.Generator().manual_seed(0)
    logits, loc = (torch.randn(4, parts, generator=g) for _ in range(2))
    return DiscretizedLogistics(logits, levels * loc, 0.3 + torch.rand(4, parts, generator=g), levels)


def test_a_mixture_of_logistics_is_the_sum_it_says():
    d = mixture()
    every = d.enumerate_support()
    assert every.shape == (7, 4) and d.enumerate_support(expand=False).shape == (7, 1)
    torch.testing.assert_close(d.log_prob(every).logsumexp(0), torch.zeros(4), atol=1e-9, rtol=0)
    parts = DiscretizedLogistic(d.loc, d.scale, 7).log_prob(every.unsqueeze(-1)).exp()
    expected = (1 - 1e-6) * (d.logits.softmax(-1) * parts).sum(-1) + 1e-6 / 7
    torch.testing.assert_close(d.log_prob(every).exp(), expected)
    torch.testing.assert_close(
        d.expand((2, 4)).log_prob(every[:, None]), d.log_prob(every)[:, None].expand(7, 2, 4)
    )


def test_no_value_of_a_mixture_is_impossible():
    like = {"dtype": torch.float32}
    loc = torch.zeros(1, **like).requires_grad_()
    d = DiscretizedLogistics(torch.zeros(1, **like), loc, torch.full((1,), 1e-3, **like))
    log_p = d.log_prob(torch.tensor([0.0, 1.0, 255.0], **like))
    assert float(log_p.min().detach()) == pytest.approx(math.log(1e-6 / 256), abs=1e-4)
    assert torch.autograd.grad(log_p.sum(), loc)[0].isfinite().all()


def test_samples_of_a_mixture_follow_the_probabilities():
    """Pearson's statistic of 10,000 draws: chi-squared with at most 24 degrees of freedom, at 1e-6."""
    torch.manual_seed(0)
    d = mixture()
    p = d.log_prob(d.enumerate_support()).exp()
    y = d.sample((10_000,))
    seen = torch.stack([(y == v).sum(0) for v in range(7)])
    likely = p * 10_000 > 5
    rest = ((seen - 10_000 * p).square() / (10_000 * p))[likely].sum()
    assert rest < 75 and (seen[~likely] < 30).all()

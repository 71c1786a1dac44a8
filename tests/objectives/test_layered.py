"""Free bits under masks and subsampling, and balance weights that are constants, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from pyroelbo.objectives import Layered_ELBO

Y = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
MASK = torch.tensor([True, True, False, False])
SIZE = 20  # of the data set that the four are drawn from


def model(y, slopes):
    with pyro.plate("data", SIZE, subsample=torch.arange(4)):
        with pyro.poutine.mask(mask=MASK):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))
        pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)


def guide(y, slopes):
    with pyro.plate("data", SIZE, subsample=torch.arange(4)):
        with pyro.poutine.mask(mask=MASK):
            pyro.sample("z", dist.Normal(slopes[0] * y, 1.0))
        pyro.sample("x", dist.Normal(slopes[1] * y, 0.5))


def divergences(slopes):
    """KL of each datum at z, where it counts, and at x."""
    prior = Normal(torch.zeros(4), 1.0)
    return (
        kl_divergence(Normal(slopes[0] * Y, 1.0), prior)[MASK],
        kl_divergence(Normal(slopes[1] * Y, 0.5), prior),
    )


def penalty(slopes, **settings):
    """What the KL terms add to the loss, at half their weight: the draws are those of weight 0."""
    losses = []
    for weight in (0.5, 0.0):
        pyro.set_rng_seed(1)
        losses.append(Layered_ELBO(weight=weight, **settings).differentiable_loss(model, guide, Y, slopes))
    return losses[0] - losses[1]


@pytest.mark.parametrize("share", [0.6, 1.5])
def test_free_bits_are_those_of_the_data_that_count(share):
    """The mean over the data under the mask decides, 0.6 of it lies above their sum over all; the floor is
    that of as many data, and scaled like them."""
    slopes = torch.tensor([0.7, 0.3])
    z, x = divergences(slopes)
    free = share * float(z.mean())
    held = z.sum() if share < 1 else free * len(z)
    other = torch.where(x.mean() > free, x.sum(), torch.as_tensor(free * len(x)))
    torch.testing.assert_close(penalty(slopes, free_bits=free), 0.5 * SIZE / 4 * (held + other))


def test_balance_weights_are_held_constant():
    slopes = torch.tensor([0.7, 0.3], requires_grad=True)
    means = torch.stack([k.mean() for k in divergences(slopes)])
    share = (means / means.mean()).detach()
    expected = 0.5 * SIZE / 4 * sum(g * k.sum() for g, k in zip(share, divergences(slopes), strict=True))
    found = penalty(slopes, balance=True)
    gradients = [torch.autograd.grad(value, slopes)[0] for value in (found, expected)]
    # each share is formed with 1e-6 nats added to the mean
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def two(prior):
    def model(y):
        with pyro.plate("data", SIZE, subsample=torch.arange(4)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    return model


def drawing(y, auxiliary):
    with pyro.plate("data", SIZE, subsample=torch.arange(4)):
        pyro.sample("z", dist.Normal(y, 0.5))
        if auxiliary:
            pyro.sample("u", dist.Normal(y, 2.0), infer={"is_auxiliary": True})


def test_terms_without_a_closed_form_are_sampled_and_auxiliary_draws_count():
    """A Student-t prior has no KL in closed form; ln q(u) of a draw beside the latents is charged."""
    prior = dist.StudentT(3.0, torch.zeros(4), 1.0)
    for auxiliary in (False, True):
        pyro.set_rng_seed(2)
        drawn = pyro.poutine.trace(drawing).get_trace(Y, auxiliary)
        z = drawn.nodes["z"]["value"]
        expected = dist.Normal(Y, 0.5).log_prob(z) - prior.log_prob(z) - dist.Normal(z, 1.0).log_prob(Y)
        if auxiliary:
            expected = expected + dist.Normal(Y, 2.0).log_prob(drawn.nodes["u"]["value"])
        pyro.set_rng_seed(2)
        loss = Layered_ELBO().loss(two(prior), lambda y, a=auxiliary: drawing(y, a), Y)
        assert loss == pytest.approx(SIZE / 4 * float(expected.sum()))


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_free_bits_are_a_number_of_nats(value):
    with pytest.raises(ValueError, match="free_bits: expected a number of nats of at least 0"):
        Layered_ELBO(free_bits=value)


def test_one_datum_is_its_own_mean():
    def one(y):
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            pyro.sample("y", dist.Normal(0 * z, 1.0), obs=y)

    def narrow(y):
        with pyro.plate("data", 1):
            pyro.sample("z", dist.Normal(torch.zeros(1), 0.5))

    kl = float(kl_divergence(Normal(0.0, 0.5), Normal(0.0, 1.0)))
    rest = -float(Normal(0.0, 1.0).log_prob(torch.zeros(())))
    for free, held in ((0.75 * kl, kl), (1.5 * kl, 1.5 * kl)):
        assert Layered_ELBO(free).loss(one, narrow, torch.zeros(1)) == pytest.approx(rest + held)

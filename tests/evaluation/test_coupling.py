"""Data that depend on one another have no evidence of their own, and enumeration is what the model says."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, audit, evidence

Y = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)


def coupled(location, observe=lambda y: y, rate=0.4):
    """A coin for each datum; ``location(k)`` of all coins."""

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(torch.full((len(y),), rate)))
            pyro.sample("y", dist.Normal(location(k), 1.0), obs=observe(y))

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Bernoulli(torch.full((len(y),), rate)))

    return Pair.of(model, guide)


def by_hand(location, y, rate=0.4):
    total = []
    for values in itertools.product([0.0, 1.0], repeat=len(y)):
        k = torch.tensor(values)
        total.append(
            dist.Bernoulli(rate).log_prob(k).sum() + dist.Normal(location(k), 1.0).log_prob(y).sum(-1)
        )
    return torch.logsumexp(torch.stack(total), 0)


def centred(k):
    return 4 * (k - k.mean(-1, keepdim=True))


def branched(k):
    return torch.full_like(k, 3.0) if bool(k.sum() > 0) else torch.zeros_like(k)


ESTIMATORS = [evidence.exact, evidence.elbo, evidence.iwae, evidence.ais, evidence.prior_monte_carlo]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("location", [centred, lambda k: k - k[..., :1], lambda k: k.cumsum(-1)])
def test_data_coupled_through_latents_are_refused_per_datum(estimator, location):
    with pytest.raises(ValueError, match="'y': the term of a datum depends on other data.*joint"):
        estimator(coupled(location), Y)


@pytest.mark.parametrize("whole", [True, False])
def test_two_rows_coupled_by_an_index_of_groups_are_found(whole):
    """As many groups as data, in their plate: one datum of eleven reads another's latent, which no few rows
    show."""
    group = torch.arange(11)
    group[7] = 4

    def model(group, y):
        plate = pyro.plate("data", 11 if whole else len(y))
        with plate:
            level = pyro.sample("level", dist.Normal(torch.zeros(len(y)), 1.0))
        with plate:
            pyro.sample("y", dist.Normal(level[..., group], 1.0), obs=y)

    def guide(group, y):
        with pyro.plate("data", 11 if whole else len(y)):
            pyro.sample("level", dist.Normal(torch.zeros(len(y)), 1.0))

    with pytest.raises(ValueError, match="'y': the term of a datum depends on other data.*joint"):
        evidence.iwae(Pair.of(model, guide), (group, torch.randn(11)), 4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_data_coupled_through_observations_are_refused_per_datum(estimator):
    with pytest.raises(ValueError, match="'y': the term of a datum depends on other data.*joint"):
        estimator(coupled(lambda k: k, lambda y: y - y.mean(0)), Y)


def test_a_guide_may_read_other_data():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.4 * y + 0.1 * y.mean(), 0.8))

    pair = Pair.of(model, guide)
    exact = dist.Normal(0.0, 2**0.5).log_prob(Y)
    bound = evidence.iwae(pair, Y, 4000)
    assert ((bound.value - exact).abs() < 5 * bound.stderr + 1e-3).all()


@pytest.mark.parametrize("location", [centred, branched])
def test_the_joint_evidence_of_coupled_data_sums_over_all_their_latents(location):
    found = evidence.exact(coupled(location), Y, scope="joint")
    torch.testing.assert_close(found.value, by_hand(location, Y), rtol=0, atol=1e-12)
    assert (found.scope, found.cost) == ("joint", 16)
    rows = audit(coupled(location), Y, scope="joint", progress=False)
    assert (
        rows.reference == "exact" and rows["iwae-64"].mean < found.mean + 5 * rows["iwae-64"].mean_error + 0.1
    )


def test_too_many_joint_values_are_refused():
    with pytest.raises(evidence.Unavailable, match="joint values"):
        evidence.exact(coupled(centred), torch.zeros(30), scope="joint")


def test_a_latent_outside_the_data_plate_is_enumerated_jointly():
    def model(y):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k.to(y.dtype), 1.0).expand([len(y)]), obs=y)

    pair = Pair.of(model, lambda y: pyro.sample("k", dist.Categorical(torch.ones(3))))
    right = torch.stack([dist.Normal(float(k), 1.0).log_prob(Y).sum() for k in range(3)])
    right = torch.logsumexp(right + torch.tensor([0.2, 0.3, 0.5]).log(), 0)
    torch.testing.assert_close(evidence.exact(pair, Y, scope="joint").value, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 4])
def test_enumeration_through_a_branch_is_refused(rows):
    with pytest.raises(ValueError, match="depends on other data|other log probabilities than the model"):
        evidence.exact(coupled(branched), Y[:rows])


def test_enumeration_of_a_sum_over_an_inner_plate_is_refused():
    """Parallel enumeration puts every value of a plate's latents on one dimension: their sum is not seen."""

    def model(y):
        with pyro.plate("data", len(y)):
            with pyro.plate("time", 3, dim=-2):
                k = pyro.sample("k", dist.Bernoulli(torch.full((3, len(y)), 0.4)))
            pyro.sample("y", dist.Normal(k.sum(-2), 1.0), obs=y)

    with pytest.raises(ValueError, match="other log probabilities|takes all values|batch dimensions"):
        evidence.exact(Pair.of(model, lambda y: None), Y)


def test_chains_and_plates_pass_the_check():
    """Factors over several latents, events and inner plates, held against the sum by hand."""
    table = torch.tensor([[0.7, 0.3], [0.2, 0.8]])

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Categorical(torch.tensor([0.5, 0.5])))
            b = pyro.sample("b", dist.Categorical(table[a]))
            with pyro.plate("time", 2, dim=-2):
                c = pyro.sample("c", dist.Bernoulli(torch.where(b > 0, 0.9, 0.3)))
                pyro.sample("y", dist.Normal(c + a, 1.0), obs=y.T)

    y = torch.randn(3, 2)
    total = []
    for a, b, c, d in itertools.product(range(2), repeat=4):
        rate = 0.9 if b else 0.3
        log_p = (0.5 * table[a, b]).log() + sum(
            dist.Bernoulli(rate).log_prob(torch.tensor(float(x))) for x in (c, d)
        )
        total.append(log_p + dist.Normal(torch.tensor([c + a, d + a]).double(), 1.0).log_prob(y).sum(-1))
    right = torch.logsumexp(torch.stack(total), 0)
    torch.testing.assert_close(
        evidence.exact(Pair.of(model, lambda y: None), y).value, right, rtol=0, atol=1e-12
    )


def test_a_pair_of_three_data_is_looked_at_whole():
    """Its mask fits three rows only, of which two are equal."""
    seen = torch.tensor([True, False, True])

    def model(y):
        with pyro.plate("data", len(y)), pyro.poutine.mask(mask=seen):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 2**-0.5))

    y = torch.tensor([1.0, 0.0, 1.0])
    exact = dist.Normal(0.0, 2**0.5).log_prob(y) * seen
    torch.testing.assert_close(evidence.elbo(Pair.of(model, guide), y, 3).value, exact, rtol=0, atol=1e-12)

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyroelbo.distributions.gaussian as gaussian
from pyroelbo.distributions import LinearGaussianChain

MVN = dist.MultivariateNormal


pytestmark = pytest.mark.usefixtures("kernels")


def positive(*shape, dtype=None):
    root = torch.randn(*shape, shape[-1], dtype=dtype)
    return root @ root.mT + 0.5 * torch.eye(shape[-1], dtype=dtype)


def parameters(rows=(), steps=5, hidden=2, observed=3, varying=False, dtype=None, seed=0):
    """Start, spread, move, drift, noise, read, offset, error."""
    torch.manual_seed(seed)
    moves, looks = ((steps - 1,), (steps,)) if varying else ((), ())

    def randn(*shape):
        return torch.randn(shape, dtype=dtype)

    return [
        randn(*rows, hidden),
        positive(*rows, hidden, dtype=dtype),
        0.4 * randn(*rows, *moves, hidden, hidden),
        randn(*rows, *moves, hidden),
        positive(*rows, *moves, hidden, dtype=dtype),
        randn(*rows, *looks, observed, hidden),
        randn(*rows, *looks, observed),
        positive(*rows, *looks, observed, dtype=dtype),
    ]


def chain(parts, **options):
    start, spread, move, drift, noise, read, offset, error = parts
    initial, step, look = MVN(start, spread), MVN(drift, noise), MVN(offset, error)
    return LinearGaussianChain(initial, move, step, read, look, **options)


def joint(parts, steps):
    """Mean and covariance of all states, and of all observations given them, as one Gaussian each."""
    start, spread, move, drift, noise, read, offset, error = parts
    hidden = len(start)

    def at(x, t, dims):
        return x if x.dim() == dims else x[t]

    mean, unit = [start], torch.eye(steps * hidden)
    response = [unit[:hidden]]
    sources = [spread]
    for t in range(1, steps):
        a = at(move, t - 1, 2)
        mean.append(a @ mean[-1] + at(drift, t - 1, 1))
        rows = slice(t * hidden, (t + 1) * hidden)
        response.append(unit[rows] + a @ response[-1])
        sources.append(at(noise, t - 1, 2))
    covariance = torch.cat(response) @ torch.block_diag(*sources) @ torch.cat(response).T
    read = torch.block_diag(*(at(read, t, 2) for t in range(steps)))
    error = torch.block_diag(*(at(error, t, 2) for t in range(steps)))
    offset = torch.cat([at(offset, t, 1) for t in range(steps)])
    return torch.cat(mean), covariance, read, offset, error


def conditioned(parts, y):
    """ln p(y), and mean and covariance of all states given y."""
    mean, covariance, read, offset, error = joint(parts, len(y))
    seen = read @ covariance @ read.T + error
    gain = covariance @ read.T @ torch.linalg.inv(seen)
    apart = y.flatten() - read @ mean - offset
    evidence = MVN(read @ mean + offset, seen).log_prob(y.flatten())
    left = covariance - gain @ read @ covariance
    return evidence, mean + gain @ apart, (left + left.T) / 2


@pytest.mark.parametrize("lengths", [None, [5, 3, 2]])
@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("varying", [False, True])
def test_missing_coordinates_are_integrated_over(varying, rows, lengths):
    steps, hidden = 5, 2
    parts = [x.requires_grad_() for x in parameters(rows, varying=varying)]
    y = torch.randn(3, steps, 3)
    y[0, 1] = y[0, 0, 2] = y[1, :, 1] = y[1, 2, 0] = math.nan
    d = chain(parts, lengths=None if lengths is None else torch.tensor(lengths))
    value, q = d.log_prob(y), d.posterior(y)
    assert torch.equal(value, q.log_partition)
    right = []
    for b in range(3):
        own = [x[b] for x in parts] if rows else parts
        length = steps if lengths is None else lengths[b]
        mean, covariance, read, offset, error = joint(own, length)
        seen = ~y[b, :length].flatten().isnan()
        read, offset, error = read[seen], offset[seen], error[seen][:, seen]
        centre, spread = read @ mean + offset, read @ covariance @ read.T + error
        given = y[b, :length].flatten()[seen]
        right.append(MVN(centre, spread).log_prob(given))
        gain = covariance @ read.T @ torch.linalg.inv(spread)
        torch.testing.assert_close(q.mean[b, :length].flatten(), mean + gain @ (given - centre))
        left = covariance - gain @ read @ covariance
        for t in range(length):
            at = slice(t * hidden, (t + 1) * hidden)
            torch.testing.assert_close(q.covariance[b, t], left[at, at])
    torch.testing.assert_close(value, torch.stack(right), rtol=0, atol=1e-10)
    weight = torch.tensor([1.0, 2.0, -0.5])
    ours = torch.autograd.grad(value @ weight, parts)
    theirs = torch.autograd.grad(torch.stack(right) @ weight, parts)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    # where no coordinate is missing nothing changes, and a chain of nothing but missing ones has evidence one
    torch.testing.assert_close(
        value[2], chain(parts, lengths=d.lengths).log_prob(torch.where(y.isnan(), 0.0, y))[2]
    )
    torch.testing.assert_close(d.log_prob(torch.full_like(y, math.nan)), torch.zeros(3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("lengths", [None, [5, 3, 1]])
@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("varying", [False, True])
def test_agrees_with_one_large_gaussian(varying, rows, lengths):
    steps, hidden = 5, 2
    parts = parameters(rows, varying=varying)
    y = torch.randn(3, steps, 3)
    d = chain(parts, lengths=None if lengths is None else torch.tensor(lengths))
    q, value = d.posterior(y), d.log_prob(y)
    past = d.filter(y)
    assert torch.equal(value, q.log_partition)
    z = q.sample((4,))
    for b in range(3):
        own = [x[b] for x in parts] if rows else parts
        length = steps if lengths is None else lengths[b]
        evidence, mean, covariance = conditioned(own, y[b, :length])
        assert value[b].item() == pytest.approx(evidence.item(), abs=1e-10)
        torch.testing.assert_close(q.mean[b, :length].flatten(), mean, rtol=0, atol=1e-10)
        blocks = covariance.view(length, hidden, length, hidden).transpose(1, 2)
        for t in range(length):
            torch.testing.assert_close(q.covariance[b, t], blocks[t, t], rtol=0, atol=1e-10)
            torch.testing.assert_close(q.variance[b, t], blocks[t, t].diagonal(), rtol=0, atol=1e-10)
            if t + 1 < length:
                torch.testing.assert_close(q.lagged[b, t], blocks[t, t + 1], rtol=0, atol=1e-10)
            _, shorter, spread = conditioned(own, y[b, : t + 1])
            torch.testing.assert_close(past.mean[b, t], shorter[-hidden:], rtol=0, atol=1e-10)
            torch.testing.assert_close(past.covariance[b, t], spread[-hidden:, -hidden:], rtol=0, atol=1e-10)
        whole = MVN(mean, covariance)
        states = z[:, b, :length].reshape(4, -1)
        torch.testing.assert_close(q.log_prob(z)[:, b], whole.log_prob(states), rtol=0, atol=1e-8)
        assert q.entropy()[b].item() == pytest.approx(whole.entropy().item(), abs=1e-9)
        assert not z[:, b, length:].any() and not q.mean[b, length:].any()


@pytest.mark.parametrize(
    "steps, varying, rows, lengths",
    [
        (5, False, (), None),
        (5, True, (3,), [5, 3, 1]),
        (5, False, (3,), [5, 3, 1]),
        (200, False, (), [200, 150, 7]),  # beyond the fixed point
        (1, False, (), None),
    ],
)
def test_the_compiled_smoother_is_the_one_in_torch(steps, varying, rows, lengths):
    """With gradients the smoother runs in torch."""
    pytest.importorskip("numba")
    parts = [x.requires_grad_() for x in parameters(rows, steps=steps, varying=varying)]
    q = chain(parts, lengths=None if lengths is None else torch.tensor(lengths)).posterior(
        torch.randn(3, steps, 3)
    )
    with torch.no_grad():
        found = q.mean, q.covariance, q.lagged
        torch.manual_seed(0)
        z = q.rsample((4,))
    assert q.mean.requires_grad and not found[0].requires_grad
    torch.testing.assert_close(found, (q.mean, q.covariance, q.lagged), rtol=0, atol=1e-11)
    torch.manual_seed(0)
    torch.testing.assert_close(z, q.rsample((4,)).detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("lengths", [None, [5, 3, 1]])
@pytest.mark.parametrize("rows", [(), (3,)])
@pytest.mark.parametrize("varying", [False, True])
def test_derivatives(varying, rows, lengths, kernels):
    if kernels == "torch" and lengths is None:
        pytest.skip("autograd's own; one of the two is enough")
    lengths = None if lengths is None else torch.tensor(lengths)
    parts = [
        x.requires_grad_() for x in (torch.randn(3, 5, 2), *parameters(rows, observed=2, varying=varying))
    ]

    def evidence(y, *rest):
        rest = [(x + x.mT) / 2 if i in (1, 4, 7) else x for i, x in enumerate(rest)]
        return chain(rest, lengths=lengths, validate_args=False).log_prob(y)

    assert torch.autograd.gradcheck(evidence, parts, atol=1e-6)
    if not varying and not rows:
        assert torch.autograd.gradgradcheck(evidence, parts, atol=1e-5)


def test_second_derivatives_of_a_chain_of_one_step(kernels):
    """It is a Gaussian: the moves have no part in it."""
    parts = [x.requires_grad_() for x in (torch.randn(3, 1, 2), *parameters((), steps=1, observed=2))]

    def evidence(y, *rest):
        rest = [(x + x.mT) / 2 if i in (1, 4, 7) else x for i, x in enumerate(rest)]
        return chain(rest, validate_args=False).log_prob(y)

    assert torch.autograd.gradgradcheck(evidence, parts, atol=1e-5)
    total = evidence(*parts).sum()
    (slope,) = torch.autograd.grad(
        total, parts[3], create_graph=True, allow_unused=True, materialize_grads=True
    )
    assert not slope.any()


def test_the_posterior_s_draws_are_differentiable():
    parts = [x.requires_grad_() for x in (torch.randn(3, 4, 3), *parameters(steps=4))]

    def draw(y, *rest):
        torch.manual_seed(0)
        rest = [(x + x.mT) / 2 if i in (1, 4, 7) else x for i, x in enumerate(rest)]
        return chain(rest, validate_args=False).posterior(y).rsample()

    assert torch.autograd.gradcheck(draw, parts, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_pyro(dtype):
    start, spread, move, drift, noise, read, offset, error = parameters(hidden=3, dtype=dtype, seed=4)
    y = torch.randn(4, 9, 3, dtype=dtype)
    theirs = dist.GaussianHMM(
        MVN(start, spread), move.T, MVN(drift, noise), read.T, MVN(offset, error), duration=9
    )
    # Pyro's chain takes a step before its first observation
    first = [move @ start + drift, move @ spread @ move.T + noise]
    ours = chain([*first, move, drift, noise, read, offset, error])
    torch.testing.assert_close(ours.log_prob(y), theirs.log_prob(y), rtol=1e-5, atol=1e-4)


def test_diagonal_noise():
    parts = parameters()
    scales = [x.diagonal(0, -2, -1).sqrt() for x in (parts[1], parts[4], parts[7])]
    y = torch.randn(3, 5, 3)
    diagonal = LinearGaussianChain(
        dist.Normal(parts[0], scales[0]).to_event(1),
        parts[2],
        dist.Normal(parts[3], scales[1]).to_event(1),
        parts[5],
        dist.Normal(parts[6], scales[2]).to_event(1),
    )
    for i, scale in zip((1, 4, 7), scales, strict=True):
        parts[i] = torch.diag_embed(scale.square())
    torch.testing.assert_close(diagonal.log_prob(y), chain(parts).log_prob(y))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stopping_at_the_fixed_point_changes_nothing(dtype):
    """The same parameters at every step, once said once and once written out, where nothing is skipped."""
    steps = 3000
    parts = [x.requires_grad_() for x in parameters(hidden=3, dtype=dtype)]
    with torch.no_grad():
        parts[2].copy_(0.99 * torch.linalg.qr(parts[2])[0])
        parts[4].mul_(1e-4)  # slow to settle
    y = torch.randn(2, steps, 3, dtype=dtype)
    long = [x.expand(steps - (i < 5), *x.shape) if i > 1 else x for i, x in enumerate(parts)]
    values, gradients = [], []
    for each in (parts, long):
        values.append(chain(each, validate_args=False).log_prob(y))
        gradients.append(torch.autograd.grad(values[-1].sum(), parts))
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(*values, rtol=rtol, atol=0)
    torch.testing.assert_close(*gradients, rtol=100 * rtol, atol=100 * rtol)


def test_a_vague_start_and_precise_observations():
    """Where spread is 10^18 times the noise a filter without Joseph's form has negative variances."""
    spread, error = torch.tensor([[1e12]]), torch.tensor([[1e-6]])
    one = torch.ones(1, 1)
    parts = [torch.zeros(1), spread, one, torch.zeros(1), 1e-6 * one, one, torch.zeros(1), error]
    y = torch.tensor([[3.0], [3.001], [3.002], [3.001]])
    # y_1 is vague; the differences are precise and do not know of it
    value = chain(parts).log_prob(y[None])
    gaps = y[1:, 0] - y[:-1, 0]
    covariance = 1e-6 * (3 * torch.eye(3) - torch.diag(torch.ones(2), 1) - torch.diag(torch.ones(2), -1))
    expected = MVN(torch.zeros(3), covariance).log_prob(gaps)
    expected += -0.5 * math.log(2 * math.pi * 1e12)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (chain(parts).posterior(y[None]).variance > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_outlier_in_one_sequence(dtype):
    parts = parameters(dtype=dtype)
    y = torch.randn(3, 5, 3, dtype=dtype)
    before = chain(parts).log_prob(y)
    y[1, 2] += 1000.0
    after = chain(parts).log_prob(y)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    exact = conditioned([x.double() for x in parts], y[1].double())[0]
    assert after[1].item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_long_sequence(dtype):
    steps = 20_000
    parts = [x.to(dtype) for x in (torch.zeros(1), torch.ones(1, 1), 0.9 * torch.ones(1, 1), torch.zeros(1),
             0.19 * torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1))]  # fmt: skip
    torch.manual_seed(0)
    y = torch.randn(1, steps, 1, dtype=dtype)
    # a plain scalar filter
    mean, variance, total = 0.0, 1.0, 0.0
    for x in y[0, :, 0].tolist():
        seen = variance + 1.0
        total -= 0.5 * ((x - mean) ** 2 / seen + math.log(2 * math.pi * seen))
        mean, variance = mean + variance / seen * (x - mean), variance / seen
        mean, variance = 0.9 * mean, 0.81 * variance + 0.19
    assert chain(parts).log_prob(y).item() == pytest.approx(
        total, rel=1e-5 if dtype == torch.float32 else 1e-10
    )


def test_samples_follow_the_law():
    """Means and covariances of draws within 6 standard errors: by chance outside with probability below
    1e-6.
    """
    parts = parameters(steps=3)
    count = 40_000
    y = chain(parts, num_steps=3).sample((count,)).flatten(1)
    mean, covariance, read, offset, error = joint(parts, 3)
    expected, spread = read @ mean + offset, read @ covariance @ read.T + error
    deviation = spread.diagonal().sqrt()
    assert ((y.mean(0) - expected).abs() < 6 * deviation / math.sqrt(count)).all()
    bound = 6 * math.sqrt(2 / count) * deviation[:, None] * deviation
    assert ((y.T.cov() - spread).abs() < bound).all()

    q = chain(parts).posterior(torch.randn(1, 3, 3))
    z = q.sample((count,))[:, 0]
    sd = q.variance[0].sqrt()
    assert ((z.mean(0) - q.mean[0]).abs() < 6 * sd / math.sqrt(count)).all()
    products = (z[:, :-1, :, None] - q.mean[0, :-1, :, None]) * (z[:, 1:, None] - q.mean[0, 1:, None])
    bound = 6 * math.sqrt(2 / count) * sd[:-1, :, None] * sd[1:, None]
    assert ((products.mean(0) - q.lagged[0]).abs() < bound).all()


def test_sites_in_model_and_guide():
    """With its posterior as the guide, the ELBO is the evidence without variance."""
    parts = parameters(steps=4)
    y = chain(parts, num_steps=4).sample((3,))
    q = chain(parts).posterior(y)

    def model():
        with pyro.plate("data", 3):
            z = pyro.sample("z", latent)
            look = MVN((parts[5] @ z.unsqueeze(-1)).squeeze(-1) + parts[6], parts[7])
            pyro.sample("y", look.to_event(1), obs=y)

    # the chain of states alone, as a posterior given observations that say nothing
    nothing = [*parts[:5], torch.zeros(1, 2), torch.zeros(1), torch.eye(1)]
    latent = chain(nothing).posterior(torch.zeros(3, 4, 1))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("z", q)

    losses = [Trace_ELBO().loss(model, guide) for _ in range(3)]
    assert losses == pytest.approx([-chain(parts).log_prob(y).sum().item()] * 3, abs=1e-8)


def test_training_at_a_site():
    true = parameters(hidden=1, observed=1)
    true[2] = torch.full((1, 1), 0.8)
    y = chain(true, num_steps=60).sample((20,))

    def model():
        move = pyro.param("move", torch.zeros(1, 1))
        with pyro.plate("data", 20, subsample_size=10) as index:
            pyro.sample("y", chain([*true[:2], move, *true[3:]]), obs=y[index])

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(80):
        svi.step()
    assert abs(pyro.param("move").item() - 0.8) < 0.08


def test_expand():
    parts = parameters((3,), steps=4)
    d = chain(parts, num_steps=4, lengths=torch.tensor([4, 2, 3]))
    y = d.sample()
    assert y.shape == (3, 4, 3) and not y[1, 2:].any()
    big = d.expand((2, 3))
    torch.testing.assert_close(big.log_prob(y), d.log_prob(y).expand(2, 3))
    assert big.sample((5,)).shape == (5, 2, 3, 4, 3)
    q = d.posterior(y)
    torch.testing.assert_close(q.expand((2, 3)).mean, q.mean.expand(2, 3, 4, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(2, 5, 2)}, r"y: expected shape .*got \(2, 5, 2\)"),
        ({"y": torch.full((2, 5, 3), math.inf)}, r"y: expected .*got inf at index \[0, 0, 0\]"),
        ({"y": torch.zeros(2, 0, 3)}, r"y: expected shape .*got \(2, 0, 3\)"),
        ({"lengths": torch.tensor([5, 6])}, r"lengths: expected .*got 6 at index \[1\]"),
        ({"num_steps": 4}, "y: expected 4 steps, got 5"),
        ({"move": torch.zeros(3, 3)}, "initial, transition_matrix.*: expected"),
        (
            {"move": torch.full((2, 2), math.inf)},
            r"transition_matrix: expected finite numbers, got others at index \[0, 0\]",
        ),
        ({"move": torch.zeros(3, 2, 2), "read": torch.zeros(5, 3, 2)}, "num_steps: expected the same number"),
    ],
)
def test_bad_input_is_refused(change, message):
    parts = parameters()
    parts[2], parts[5] = change.get("move", parts[2]), change.get("read", parts[5])
    options = {k: change[k] for k in ("lengths", "num_steps") if k in change}
    with pytest.raises(ValueError, match=message):
        chain(parts, **options).log_prob(change.get("y", torch.zeros(2, 5, 3)))


def test_other_noise_is_refused():
    parts = parameters()
    with pytest.raises(ValueError, match="initial: expected .*got a Gamma"):
        gaussian._moments("initial", dist.Gamma(1.0, 1.0))
    with pytest.raises(ValueError, match="num_steps: expected .*got None"):
        chain(parts).sample()


def test_data_of_another_kind_are_taken_as_the_parameters_are():
    """One dimension and two steps: y is a Gaussian vector, its density known."""
    one = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    d = LinearGaussianChain(one, torch.eye(1), one, torch.eye(1), one)
    covariance = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    for y in (torch.tensor([1, 2]), torch.tensor([1.0, 2.0], dtype=torch.float32)):
        right = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y.double())
        found = d.log_prob(y[:, None])
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
        assert d.posterior(y[:, None]).mean.dtype == torch.float64


def test_what_is_missing_adds_nothing_to_the_last_digit():
    one = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    d = LinearGaussianChain(one, torch.eye(1), one, torch.eye(1), one)
    torch.set_default_dtype(torch.float32)
    try:
        value = d.log_prob(torch.full((6, 1), math.nan, dtype=torch.float64))
    finally:
        torch.set_default_dtype(torch.float64)
    assert abs(value.item()) < 1e-13


def test_bad_parts_are_named():
    one, flat = dist.Normal(torch.zeros(1), 1.0).to_event(1), dist.Normal(torch.zeros(1), 1.0)
    with pytest.raises(ValueError, match=r"initial: expected a MultivariateNormal .*got a Normal"):
        LinearGaussianChain(flat, torch.eye(1), one, torch.eye(1), one)
    with pytest.raises(ValueError, match="lengths: expected .*got a list"):
        LinearGaussianChain(one, torch.eye(1), one, torch.eye(1), one, lengths=[2])


def test_time_major_data_are_those_of_contiguous_ones():
    chain = LinearGaussianChain(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        0.5 * torch.eye(2),
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        torch.randn(3, 2),
        dist.Normal(torch.zeros(3), 1.0).to_event(1),
    )
    y = torch.randn(6, 4, 3).transpose(0, 1)
    torch.testing.assert_close(chain.log_prob(y), chain.log_prob(y.contiguous()))
    one = torch.randn(3, 6).T  # a single series, its coordinates first
    torch.testing.assert_close(chain.log_prob(one), chain.log_prob(one.contiguous()))

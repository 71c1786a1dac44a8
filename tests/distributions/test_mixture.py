import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyroelbo.distributions import GaussianStatistics, Mixture
from tests.distributions.test_chain import randn

COMPONENTS = {
    "normal": lambda lead: dist.Normal(randn(1, *lead, 3), randn(2, *lead, 3).exp()),
    "diagonal": lambda lead: dist.Normal(randn(1, *lead, 3, 2), randn(2, *lead, 3, 2).exp()).to_event(1),
    "full": lambda lead: dist.MultivariateNormal(
        randn(1, *lead, 3, 2), scale_tril=(torch.eye(2) + 0.5).tril()
    ),
    "poisson": lambda lead: dist.Poisson(randn(1, *lead, 3).exp()),
    "pixels": lambda lead: dist.Bernoulli(logits=randn(1, *lead, 3, 2, 2)).to_event(2),
    "uniform": lambda lead: dist.Uniform(
        torch.zeros(*lead, 3), torch.tensor([1.0, 2.0, 4.0]), validate_args=False
    ),
}


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)])
@pytest.mark.parametrize("kind", COMPONENTS)
def test_evidence_and_responsibilities_by_enumeration(kind, batch):
    logits, components = randn(0, *batch, 3), COMPONENTS[kind](batch)
    d = Mixture(logits, components)
    y = d.sample((5,))
    assert y.shape == (5, *batch, *components.event_shape)
    weights = logits.log_softmax(-1)
    columns = []
    for m in range(3):
        each = components.log_prob(y.unsqueeze(len(batch) + 1))[..., m]
        columns.append(weights[..., m] + each)
    joint = torch.stack(columns, -1).exp()
    torch.testing.assert_close(d.log_prob(y), joint.sum(-1).log(), rtol=0, atol=1e-10)
    q = d.posterior(y)
    assert isinstance(q, dist.Categorical) and q.batch_shape == (5, *batch)
    torch.testing.assert_close(q.probs, joint / joint.sum(-1, keepdim=True), rtol=0, atol=1e-10)
    assert q.sample().shape == (5, *batch)


def test_agrees_with_torch():
    logits, components = randn(0, 4, 3), COMPONENTS["full"]((4,))
    y = torch.randn(7, 4, 2)
    theirs = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=logits), components)
    torch.testing.assert_close(Mixture(logits, components).log_prob(y), theirs.log_prob(y))


def test_samples_follow_their_probability():
    """Three well separated components; counts within 6 standard deviations, wrong by chance below 1e-8."""
    d = Mixture(torch.tensor([0.2, 0.3, 0.5]).log(), dist.Normal(torch.tensor([-100.0, 0.0, 100.0]), 1.0))
    y = d.sample((20_000,))
    for center, p in ((-100, 0.2), (0, 0.3), (100, 0.5)):
        near = y[(y - center).abs() < 50]
        assert abs(len(near) - 20_000 * p) < 6 * math.sqrt(20_000 * p * (1 - p))
        assert abs(near.mean() - center) < 6 / math.sqrt(len(near))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_component_of_no_weight_and_an_impossible_datum(dtype):
    logits = torch.tensor([0.0, -math.inf, 0.0], dtype=dtype, requires_grad=True)
    rate = torch.tensor([1.0, 5.0, 2.0], dtype=dtype, requires_grad=True)
    d = Mixture(logits, dist.Exponential(rate, validate_args=False), validate_args=False)
    assert (d.posterior(torch.tensor([0.5], dtype=dtype)).probs[..., 1] == 0).all()
    d.log_prob(torch.tensor([0.5, 3.0], dtype=dtype)).sum().backward()
    assert logits.grad.isfinite().all() and rate.grad.isfinite().all() and rate.grad[1] == 0

    low = torch.tensor([0.0, 1.0], dtype=dtype)
    weights = torch.zeros(2, dtype=dtype, requires_grad=True)
    two = Mixture(weights, dist.Uniform(low, low + 2, validate_args=False))
    y = torch.tensor([0.5, 7.0, 1.5], dtype=dtype)
    value = two.log_prob(y)
    assert value[1] == -math.inf
    (alone,) = torch.autograd.grad(value[[0, 2]].sum(), weights, retain_graph=True)
    (both,) = torch.autograd.grad(value.sum(), weights)
    torch.testing.assert_close(both, alone)
    with pytest.raises(
        ValueError, match=r"y: expected data of positive probability, got zero at index \[1\]"
    ):
        two.posterior(y)
    loose = Mixture(weights, dist.Uniform(low, low + 2, validate_args=False), validate_args=False)
    torch.testing.assert_close(loose.posterior(y).probs[1], torch.tensor([0.5, 0.5], dtype=dtype))


def gaussians(kind, offset=0.0, spread=1.0, dtype=torch.float64, dims=5, count=3):
    torch.manual_seed(0)
    mean = (2 * torch.randn(count, dims) + offset).to(dtype)
    if kind == "full":
        root = spread * (torch.eye(dims) + 0.3 * torch.randn(count, dims, dims)).tril()
        root.diagonal(0, 1, 2).abs_()
        components = dist.MultivariateNormal(mean, scale_tril=root.to(dtype))
    else:
        components = dist.Normal(mean, spread * (0.5 + torch.rand(count, dims, dtype=dtype))).to_event(1)
    return Mixture(torch.randn(count, dtype=dtype), components)


def plain_statistics(d, y):
    share = (d._joint(y) - d.log_prob(y)[:, None]).exp()
    count = share.sum(0)
    mean = share.T @ y / count[:, None]
    apart = y[:, None] - mean
    scatter = torch.einsum("nm,nmi,nmj->mij", share, apart, apart)
    full = isinstance(d.components, dist.MultivariateNormal)
    return count, mean, scatter if full else scatter.diagonal(0, 1, 2)


@pytest.mark.parametrize("dims", [1, 5, 35])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_expected_statistics(kind, dims):
    d = gaussians(kind, dims=dims)
    y = d.sample((700,))
    evidence, statistics = d.expected_statistics(y)
    torch.testing.assert_close(evidence, d.log_prob(y), rtol=0, atol=1e-10)
    for found, expected in zip(vars(statistics).values(), plain_statistics(d, y), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    halves = d.expected_statistics(y[:300])[1] + d.expected_statistics(y[300:])[1]
    thrice = statistics + statistics * 2.0
    for found, expected in ((halves, statistics), (thrice, statistics * 3.0)):
        for a, b in zip(vars(found).values(), vars(expected).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 5, 8, 35])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("count", [1, 3, 8, 21])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 700])
def test_compiled_and_plain_statistics_agree(dims, kind, count, hard, rows, no_kernels):
    """Also if data, components and coordinates do not fill the kernel's vectors and blocks."""
    pytest.importorskip("numba")
    d = gaussians(kind, dims=dims, count=count)
    # one component that nothing can come from
    d = Mixture(
        torch.cat([d.logits[:-1], torch.tensor([-math.inf])]) if count > 1 else d.logits, d.components
    )
    y = d.sample((rows,))
    evidence, statistics = d.expected_statistics(y, hard=hard)
    no_kernels()
    plain_evidence, plain = d.expected_statistics(y, hard=hard)
    torch.testing.assert_close(evidence, plain_evidence, rtol=1e-12, atol=1e-12)
    for found, expected in zip(vars(statistics).values(), vars(plain).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("case", ["offset", "narrow", "outlier", "far"])
def test_expected_statistics_of_hard_data(kind, case, dtype):
    """Where quadratic forms as inner products would lose digits, they are not used; float32 data, float64
    sums.
    """
    d = gaussians(
        kind, offset=1e4 if case == "offset" else 0.0, spread=1e-4 if case == "narrow" else 1.0, dtype=dtype
    )
    y = d.sample((200,))
    if case == "outlier":
        y[7] += 1000.0
    if case == "far":
        y[:50] += 1e6
    exact = Mixture(d.logits.double(), type(d.components)(*_double(d.components)))
    evidence, statistics = d.expected_statistics(y)
    expected = exact.log_prob(y.double())
    assert evidence.dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        evidence.double(), expected, rtol=rtol, atol=1e-2 if case == "narrow" else rtol
    )
    if dtype == torch.float64:
        for found, plain in zip(vars(statistics).values(), plain_statistics(exact, y), strict=True):
            torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-9)


def _double(components):
    if isinstance(components, dist.MultivariateNormal):
        return components.loc.double(), None, None, components.scale_tril.double()
    base = components.base_dist
    return dist.Normal(base.loc.double(), base.scale.double()), 1


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_an_em_iteration_is_scikit_learn_s(kind):
    mixture = pytest.importorskip("sklearn.mixture")
    d = gaussians(kind)
    y = d.sample((500,))
    _, s = d.expected_statistics(y)
    assert isinstance(s, GaussianStatistics)
    if kind == "full":
        precision = d.components.precision_matrix.detach().numpy()
    else:
        precision = (1 / d.components.variance).numpy()
    theirs = mixture.GaussianMixture(
        3, covariance_type="full" if kind == "full" else "diag", max_iter=1, reg_covar=0.0,
        weights_init=d.logits.exp().numpy(), means_init=d.components.mean.numpy(), precisions_init=precision,
    )  # fmt: skip
    with pytest.warns(Warning, match="did not converge"):
        theirs.fit(y.numpy())
    torch.testing.assert_close(s.count / 500, torch.from_numpy(theirs.weights_))
    torch.testing.assert_close(s.mean, torch.from_numpy(theirs.means_))
    shape = (-1, 1, 1) if kind == "full" else (-1, 1)
    torch.testing.assert_close(s.scatter / s.count.view(shape), torch.from_numpy(theirs.covariances_))


def test_em_raises_the_evidence():
    y = gaussians("full").sample((400,))
    d = Mixture(torch.zeros(3), dist.MultivariateNormal(y[:3], scale_tril=3 * torch.eye(5)))
    seen = []
    for _ in range(20):
        evidence, s = d.expected_statistics(y)
        seen.append(evidence.sum().item())
        d = Mixture(s.count.log(), dist.MultivariateNormal(s.mean, s.scatter / s.count[:, None, None]))
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(seen))
    assert seen[-1] > seen[0] + 100


def test_an_unused_component_has_no_statistics():
    d = gaussians("full")
    far = Mixture(torch.tensor([0.0, 0.0, -math.inf]), d.components)
    y = d.sample((50,))
    _, s = far.expected_statistics(y)
    assert s.count[2] == 0 and s.scatter[2].abs().max() == 0 and s.mean[2].isfinite().all()
    both = s + far.expected_statistics(y)[1]
    assert both.mean.isfinite().all() and both.scatter.isfinite().all()


def test_training_at_a_site_under_a_plate():
    y = torch.cat([torch.randn(60) - 4, torch.randn(40) + 4])

    def model():
        center = pyro.param("center", torch.tensor([-1.0, 1.0]))
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", 100, subsample_size=50) as index:
            pyro.sample("y", Mixture(logits, dist.Normal(center, 1.0)), obs=y[index])

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(150):
        svi.step()
    assert (pyro.param("center") - torch.tensor([-4.0, 4.0])).abs().max() < 0.5
    assert (pyro.param("logits").softmax(0)[0] - 0.6).abs() < 0.1


NORMALS = dist.Normal(torch.zeros(2), 1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixture(torch.zeros(3), dist.Normal(torch.zeros(2), 1.0)), "logits, components: expected"),
        (lambda: Mixture(torch.zeros(2), dist.Normal(0.0, 1.0)), "logits, components: expected"),
        (lambda: Mixture(torch.tensor([0.0, math.nan]), NORMALS), r"logits: .*got nan at index \[1\]"),
        (lambda: Mixture(torch.full((2,), -math.inf), NORMALS), "logits: expected a finite logit"),
        (lambda: Mixture(torch.zeros(2), NORMALS).expected_statistics(torch.zeros(3, 1)), "Gaussians"),
        (lambda: gaussians("full").expected_statistics(torch.zeros(0, 5)), r"y: .*got \(0, 5\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kind", ["uniform", "binomial"])
def test_components_with_supports_of_their_own(kind):
    if kind == "uniform":
        low, high = torch.tensor([0.0, 5.0, 0.5]), torch.tensor([1.0, 6.0, 5.5])
        components, y = dist.Uniform(low, high), torch.tensor([0.2, 5.2, 0.7, 5.9])
        seen = ((y[:, None] >= low) & (y[:, None] < high)) / (high - low)
    else:
        count, p = torch.tensor([3.0, 10.0]), torch.tensor([0.5, 0.2])
        components, y = dist.Binomial(count, p), torch.tensor([8.0, 2.0])
        seen = torch.tensor(
            [
                [math.comb(int(n), int(v)) * q**v * (1 - q) ** (n - v) for n, q in zip(count, p, strict=True)]
                for v in y
            ]
        )
    d = Mixture(torch.zeros(len(components.mean)), components)
    torch.testing.assert_close(d.log_prob(y), seen.mean(-1).log(), rtol=0, atol=1e-12)
    torch.testing.assert_close(d.posterior(y).probs, seen / seen.sum(-1, keepdim=True), rtol=0, atol=1e-12)
    assert d.log_prob(d.sample((50,))).isfinite().all()
    assert d.support.check(y).all() and not d.support.check(y - 20).any()
    y[1] = -3.0
    with pytest.raises(ValueError, match=r"y: expected .*got -3.0 at index \[1\]"):
        d.log_prob(y)


def test_bad_and_empty_data():
    d = Mixture(torch.zeros(3), dist.Normal(torch.randn(3, 2), 1.0).to_event(1))
    assert d.log_prob(torch.zeros(0, 2)).shape == d.posterior(torch.zeros(0, 2)).batch_shape == (0,)
    with pytest.raises(ValueError, match=r"y: expected .*got \[0.0, nan\] at index \[1\]"):
        d.log_prob(torch.tensor([[0.0, 0.0], [0.0, math.nan]]))
    for width in (1, 3):
        with pytest.raises(ValueError, match=rf"y: expected shape .*got \(5, {width}\)"):
            d.expected_statistics(torch.zeros(5, width))
        with pytest.raises(ValueError, match=rf"y: expected shape .*got \(5, {width}\)"):
            d.log_prob(torch.zeros(5, width))


def test_integers_are_numbers():
    d, y = (
        Mixture(torch.zeros(3), dist.Normal(torch.randn(3, 2), 1.0).to_event(1)),
        torch.tensor([[1, 2], [-3, 0]]),
    )
    torch.testing.assert_close(d.expected_statistics(y)[0], d.log_prob(y.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_normals_one_coordinate_at_a_time(dtype):
    """The same as their own log_prob, which is used where gradients are asked for or a value is refused."""
    d, values = gaussians("diagonal", dtype=dtype), randn(7, 4000, 5).detach().to(dtype)
    joint = d._joint(values)
    expected = d.logits + d.components.log_prob(values[:, None])
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(joint, expected, **close)
    values.requires_grad_()
    assert d._joint(values).requires_grad
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.full((4000, 5), math.nan, dtype=dtype))

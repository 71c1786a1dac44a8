"""Flows: both directions, log-determinants against autograd's Jacobians, context, and their distributions."""

import copy
import math
import pickle

import pytest
import torch

from pyroelbo.flows import FlowDistribution, SplineFlow, spline

SIZES = [("coupling", 2), ("coupling", 5), ("autoregressive", 1), ("autoregressive", 4)]


def flow(kind, dims, context=0, **settings):
    """A flow away from its start near the identity, where a wrong Jacobian could hide."""
    made = SplineFlow(dims, kind, **{"layers": 2, "hidden": (8,), "bins": 4, "context": context, **settings})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def context_of(made, *shape):
    return torch.randn(*shape, made.context) if made.context else None


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("kind", "dims"), SIZES)
def test_each_direction_inverts_the_other(kind, dims, context):
    made = flow(kind, dims, context)
    x, c = 3 * torch.randn(6, dims), context_of(made, 6)
    e, there = made.to_noise(x, c)
    assert (e - x).abs().max() > 0.1
    back, again = made.from_noise(e, c)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(again, -there, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("kind", "dims"), SIZES)
@pytest.mark.parametrize("direction", ["to_noise", "from_noise"])
def test_log_determinants_are_those_of_autograd(direction, kind, dims, context):
    made = flow(kind, dims, context)
    x, c = 3 * torch.randn(5, dims), context_of(made, 5)
    _, log_det = getattr(made, direction)(x, c)
    for row in range(5):
        given = None if c is None else c[row]
        jacobian = torch.autograd.functional.jacobian(
            lambda v, g=given: getattr(made, direction)(v, g)[0], x[row]
        )
        torch.testing.assert_close(jacobian.det().abs().log(), log_det[row], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("inverse", [False, True])
def test_a_splines_slope_is_its_derivative_in_both_directions(inverse):
    pieces = [2 * torch.randn(50, n) for n in (6, 6, 5)]
    x = torch.linspace(-7, 7, 50).requires_grad_()
    y, log_slope = spline(x, pieces, inverse)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_slope, slope.log(), atol=1e-10, rtol=1e-10)


def test_a_spline_is_monotone_and_the_identity_outside():
    same = [(2 * torch.randn(1, n)).expand(200, n) for n in (6, 6, 5)]
    x = torch.linspace(-7, 7, 200)
    y, _ = spline(x, same)
    assert (y.diff() > 0).all()
    assert torch.equal(y[x.abs() > 5], x[x.abs() > 5])
    back, _ = spline(y, same, inverse=True)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize(("kind", "dims"), SIZES)
def test_the_context_conditions_every_coordinate_that_moves(kind, dims):
    made = flow(kind, dims, 2, layers=2 if kind == "coupling" else 1)
    c = torch.randn(2, requires_grad=True)
    e, _ = made.to_noise(torch.randn(dims), c)
    for d in range(dims):
        (gradient,) = torch.autograd.grad(e[d], c, retain_graph=True)
        assert (gradient != 0).all()


def test_a_masked_map_is_autoregressive():
    made = flow("autoregressive", 4, layers=1)
    order = made.order_0
    jacobian = torch.autograd.functional.jacobian(lambda x: made.to_noise(x)[0], torch.randn(4))
    assert torch.equal(jacobian[:, order].triu(1), torch.zeros(4, 4))


@pytest.mark.parametrize(("kind", "dims"), [("coupling", 2), ("autoregressive", 2), ("autoregressive", 1)])
def test_the_density_integrates_to_one_and_its_mean_is_that_of_draws(kind, dims):
    torch.manual_seed(3)
    made = flow(kind, dims, 2)
    q = FlowDistribution(
        made, torch.tensor([0.3, -0.2])[:dims], torch.tensor([-0.3, 0.2])[:dims], torch.randn(2)
    )
    ticks = torch.linspace(-16, 16, 801)
    grid = torch.stack(torch.meshgrid(*[ticks] * dims, indexing="ij"), -1)
    with torch.no_grad():
        mass = q.log_prob(grid).exp() * 0.04**dims
        # the trapezoidal rule's error at the splines' kinks
        assert abs(float(mass.sum()) - 1) < 2e-3
        mean = (mass[..., None] * grid).flatten(0, dims - 1).sum(0)
        draws = q.sample((20_000,))
    error = draws.std(0) / math.sqrt(20_000)
    assert ((draws.mean(0) - mean).abs() < 5 * error + 4e-3).all()  # false alarms: 6e-7 a coordinate


def test_draws_are_reparametrized_and_batches_broadcast():
    made = flow("coupling", 3, 2)
    loc, log_scale = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    context = torch.randn(4, 2, requires_grad=True)
    q = FlowDistribution(made, loc, log_scale, context)
    z = q.rsample((6,))
    assert q.batch_shape == (4,) and z.shape == (6, 4, 3)
    assert q.log_prob(z).shape == (6, 4) and q.expand((5, 4)).rsample().shape == (5, 4, 3)
    assert q.expand((5, 4)).log_prob(z[0]).shape == (5, 4)
    z.sum().backward()
    for x in (loc, log_scale, context, *made.parameters()):
        assert x.grad is not None
    torch.testing.assert_close(loc.grad, torch.full((4, 3), 6.0))  # z = loc + …
    assert not q.sample().requires_grad


def test_flows_are_copied_and_pickled_after_use():
    made = flow("autoregressive", 3)
    x = torch.randn(5, 3)
    e, _ = made.to_noise(x)
    made.from_noise(e)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin.to_noise(x)[0], e)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SplineFlow(3, "radial"),
            r"kind: expected one of \('coupling', 'autoregressive'\), got 'radial'",
        ),
        (lambda: SplineFlow(1), "dims: expected at least 2 for a coupling, which splits them, got 1"),
        (lambda: SplineFlow(3, layers=0), "layers: .*positive whole number, got 0"),
        (lambda: SplineFlow(3, bins=1), "bins: expected 2 to 999 pieces of a spline, got 1"),
        (lambda: SplineFlow(3, "autoregressive", hidden=()), "hidden: expected at least one width"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Layers: what rounding with a straight-through derivative computes."""

import pytest
import torch

from pyroelbo.nn import round_straight_through


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounds_exactly_and_has_the_derivative_of_the_identity(dtype):
    torch.manual_seed(0)
    x = (300 * torch.randn(1000, dtype=dtype)).requires_grad_()
    z = round_straight_through(x)
    assert torch.equal(z, x.detach().round()) and z.dtype == dtype
    slope = torch.randn(1000, dtype=dtype)
    (gradient,) = torch.autograd.grad((slope * z).sum(), x)
    assert torch.equal(gradient, slope)

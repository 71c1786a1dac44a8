"""The UNet: shapes, leading dimensions, and what it refuses."""

import pytest
import torch

from pyroelbo import models
from pyroelbo.nn import UNet


def test_leading_dimensions_and_times_broadcast():
    net = UNet((8, 4), 2, 8, 1)
    torch.nn.init.normal_(net.outwards.weight)
    z, time = torch.randn(3, 5, 32), torch.rand(5)
    out = net(z, time)
    assert out.shape == (3, 5, 32, 2)
    torch.testing.assert_close(out[1, 2], net(z[1, 2], time[2]))
    assert (net(z, 1 - time) - out).abs().max() > 1e-6  # the time is seen
    moved = z.clone()
    moved[..., 0] += 1
    assert ((net(moved, time) - out).abs().amax((0, 1, 3)) > 0).all()  # every pixel sees every other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: UNet((6, 8)),
            r"shape: expected sides that are multiples of 4, to be halved 2 times, got \(6, 8\)",
        ),
        (lambda: UNet((2, 2)), "multiples of 4"),
        (lambda: UNet((64,)), r"shape: expected \(height, width\)"),
        (lambda: UNet((8, 8), width=6), "width: expected a multiple of 4"),
        (lambda: models.Diffusion(64, 4, network="unet"), r"shape: expected \(height, width\)"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

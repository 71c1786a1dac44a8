"""Convolutions whose channels a style scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ModulatedConv", "doubled"]


def doubled(x: Tensor) -> Tensor:
    """Images [*, C, H, W] at twice the size, each pixel four times."""
    flat = F.interpolate(x.reshape(-1, *x.shape[-3:]), scale_factor=2.0, mode="nearest")
    return flat.reshape(*x.shape[:-3], *flat.shape[1:])


class ModulatedConv(nn.Module):
    """Convolution of images [*, a, H, W] with weights v_oi = s_i(w) · v⁰_oi of a style w [*, width] and, with
    ``demodulate``, divided by (Σ_i,k v_oik²)^½, so that the outputs of unit inputs have unit scale.

    s is affine in w and begins near 1. Inputs and outputs are scaled instead of the weights, which is the
    same function and one ordinary convolution for all images. No bias.

    Source: Karras et al. (2020), StyleGAN2, equations 1 and 3.
    """

    def __init__(self, a: int, b: int, width: int, kernel: int = 3, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, kernel, kernel) / (a * kernel**2) ** 0.5)
        self.style = nn.Linear(width, a)
        nn.init.ones_(self.style.bias)
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """[*, b, H, W]; the leading dimensions of x and w are broadcast."""
        scale = self.style(w)
        x = x * scale[..., None, None]
        flat = F.conv2d(x.reshape(-1, *x.shape[-3:]), self.weight, padding=self.weight.shape[-1] // 2)
        out = flat.reshape(*x.shape[:-3], *flat.shape[1:])
        if not self.demodulate:
            return out
        power = scale.square() @ self.weight.square().sum((2, 3)).T
        return out * (power + 1e-8).rsqrt()[..., None, None]

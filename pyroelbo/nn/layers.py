"""Layers and small networks. All accept any number of leading dimensions, so that particles are
vectorized."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pyroelbo.numerics import positive_count

__all__ = [
    "MLP",
    "BatchNorm",
    "Conv",
    "ConvCell",
    "ConvDecoder",
    "ConvEncoder",
    "Dense",
    "GatedMLP",
    "LinearNormal",
    "bounded",
    "join",
    "masked_mlp",
    "round_straight_through",
]


def _check_sizes(sizes: Sequence[int]) -> None:
    if len(sizes) < 2:
        raise ValueError(f"sizes: expected at least two widths, got {tuple(sizes)}")
    for i, size in enumerate(sizes):
        positive_count("hidden" if 0 < i < len(sizes) - 1 else "sizes", size, "width of each layer")


class MLP(nn.Sequential):
    """Fully connected layers ``sizes[0] → … → sizes[-1]`` with an activation between them."""

    def __init__(self, sizes: Sequence[int], activation: type[nn.Module] = nn.SiLU) -> None:
        _check_sizes(sizes)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            layers += [nn.Linear(a, b)] if i == 0 else [activation(), nn.Linear(a, b)]
        super().__init__(*layers)


def bounded(raw: Tensor, limit: float) -> Tensor:
    """limit · tanh(raw / limit): the identity near zero, within ± ``limit`` (Vahdat and Kautz, 2020, soft
    clamp)."""
    return limit * torch.tanh(raw / limit)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate along the last dimension, broadcasting the others: [*, m], [*, n] to [*, m + n]."""
    lead = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([a.expand(*lead, -1), b.expand(*lead, -1)], -1)


def round_straight_through(x: Tensor) -> Tensor:
    """x rounded to the nearest integers, halves to the even one, with the derivative of the identity.

    The value is exactly that integer: x + (round(x) - x) would differ from it by rounding errors.

    Source: Bengio, Léonard and Courville (2013).
    """
    return x.detach().round() + (x - x.detach())


def masked_mlp(dims: int, hidden: Sequence[int], out: int, context: int = 0) -> Any:
    """Network from x [*, dims] to [*, out, dims] whose outputs at d depend on the coordinates before d alone;
    with ``context``, called as ``network(x, c)`` with c [*, context], on which all outputs may depend.

    Raises ValueError for no hidden layer. Source: Germain, Gregor, Murray and Larochelle (2015).
    """
    if not hidden:
        raise ValueError("hidden: expected at least one width, got none")
    _check_sizes((dims, *hidden, out))
    sizes, order = [max(h, dims) for h in hidden], torch.arange(dims)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input_dim = 1")  # the first coordinate's own distribution
        if context:
            return ConditionalAutoRegressiveNN(
                dims, context, sizes, [out], permutation=order, nonlinearity=nn.SiLU()
            )
        return AutoRegressiveNN(dims, sizes, [out], order, nonlinearity=nn.SiLU())


class LinearNormal(nn.Linear):
    """N(W x + b, diag s²): a mean that is linear in x, scales s = exp(log_scale) that do not depend on x."""

    def __init__(self, inputs: int, out: int) -> None:
        super().__init__(inputs, out)
        self.log_scale = nn.Parameter(torch.zeros(out))

    def distribution(self, x: Tensor) -> dist.Normal:
        """N(W x + b, diag s²) of batch shape [*, out]."""
        return dist.Normal(self(x), self.log_scale.exp())


class GatedMLP(nn.Sequential):
    """Layers ``sizes[0] → … → sizes[-1]``, gated except the last: h = (A x + a) · σ(B x + b).

    Source: Dauphin, Fan, Auli and Grangier (2017); Tomczak and Welling (2018) for VAEs.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        _check_sizes(sizes)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes[:-1]):
            layers += [nn.Linear(a, 2 * b), nn.GLU()]
        super().__init__(*layers, nn.Linear(sizes[-2], sizes[-1]))


NORMS = ("batch", "layer", "none")


class BatchNorm(nn.BatchNorm1d):
    """Batch normalization of the last dimension over all leading ones; a single row, which has no variance,
    is normalized by the running averages."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.training and len(rows) == 1:
            out = nn.functional.batch_norm(rows, self.running_mean, self.running_var, self.weight, self.bias)
        else:
            out = super().forward(rows)
        return out.reshape(x.shape)


class Dense(nn.Module):
    """Dropout(SiLU(norm(W x))), plus x if the widths ``a`` and ``b`` are equal; with ``gated``, u · σ(v) with
    (u, v) = norm(W x) instead of SiLU, at twice the cost."""

    def __init__(self, a: int, b: int, norm: str = "none", dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
        out = 2 * b if gated else b
        self.linear = nn.Linear(a, out, bias=norm != "batch")
        norms = {"batch": BatchNorm, "layer": nn.LayerNorm, "none": nn.Identity}
        self.norm = norms[norm](out)
        self.activation = nn.GLU() if gated else nn.SiLU()
        self.dropout = nn.Dropout(dropout)
        self.residual = a == b

    def forward(self, x: Tensor) -> Tensor:
        new = self.dropout(self.activation(self.norm(self.linear(x))))
        return x + new if self.residual else new


class Conv(nn.Conv2d):
    """Convolution of images [*, C, H, W] with any number of leading dimensions; ``stride`` 1 keeps their
    size."""

    def __init__(self, a: int, b: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__(a, b, kernel, stride=stride, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x.reshape(-1, *x.shape[-3:]))
        return out.reshape(*x.shape[:-3], *out.shape[1:])


class ConvCell(nn.Module):
    """x + ``gain`` · (a bottleneck of four convolutions of SiLU(x), two of them 3x3), without x if the
    numbers of channels ``a`` and ``b`` differ. The 3x3 convolutions become 1x1 for ``small`` images.

    Source: Child (2021), figure 3.
    """

    def __init__(self, a: int, b: int, gain: float = 1.0, small: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        middle, kernel = max(b // 2, 1), 1 if small else 3
        last = Conv(middle, b, 1)
        with torch.no_grad():
            last.weight.mul_(gain)
        act = nn.SiLU
        self.layers = nn.Sequential(
            act(), Conv(a, middle, 1), act(), Conv(middle, middle, kernel), act(),
            Conv(middle, middle, kernel), act(), nn.Dropout(dropout), last,
        )  # fmt: skip
        self.residual = a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class ConvEncoder(nn.Module):
    """Flat images [*, H·W] to features [*, out]: two strided convolutions, then an MLP layer.

    Args:
        shape: height and width of the images.
        out: number of features.
        channels: channels of the first convolution; the second has twice as many.
        hidden: width of the MLP layer.
        head: module applied to the features, whose output is returned instead of them.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        out: int,
        channels: int = 32,
        hidden: int = 128,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.head = shape, head
        height, width = (math.ceil(s / 4) for s in shape)
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * channels * height * width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out),
        )

    def forward(self, y: Tensor) -> Tensor:
        features = self.layers(y.reshape(-1, 1, *self.shape)).reshape(*y.shape[:-1], -1)
        return features if self.head is None else self.head(features)


class ConvDecoder(nn.Module):
    """Codes [*, latent] to ``out`` numbers per pixel, [*, H·W·out]: an MLP layer, then two transposed
    convolutions."""

    def __init__(
        self, shape: tuple[int, int], latent: int, out: int = 1, channels: int = 32, hidden: int = 128
    ) -> None:
        super().__init__()
        self.shape = shape
        height, width = (math.ceil(s / 4) for s in shape)
        self.layers = nn.Sequential(
            nn.Linear(latent, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * channels * height * width),
            nn.SiLU(),
            nn.Unflatten(-1, (2 * channels, height, width)),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, out, 4, stride=2, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        image = self.layers(z.reshape(-1, z.shape[-1]))
        # sizes that are no multiple of four are decoded larger and cropped
        image = image[..., : self.shape[0], : self.shape[1]]
        return torch.movedim(image, 1, -1).reshape(*z.shape[:-1], -1)

"""Networks of diffusion models: from noisy data and a time, or from partly masked tokens, to numbers per
dimension."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroelbo.numerics import positive_count, whole_number

__all__ = [
    "Attend",
    "Condition",
    "MLPDenoiser",
    "PerStepLinear",
    "TokenConv",
    "TokenMLP",
    "TokenTransformer",
    "Waves",
    "one_hot",
    "start_small",
]


class Waves(nn.Module):
    """Times t [*] in [0, 1] to features [*, 2·``count``]: sine and cosine of π t 2^j, j = 0 … count-1."""

    rates: Tensor

    def __init__(self, count: int = 10) -> None:
        super().__init__()
        self.register_buffer("rates", math.pi * 2.0 ** torch.arange(count), persistent=False)

    @property
    def size(self) -> int:
        """Number of features."""
        return 2 * len(self.rates)

    def forward(self, time: Tensor) -> Tensor:
        angle = time.to(self.rates.dtype)[..., None] * self.rates
        return torch.cat([angle.sin(), angle.cos()], -1)


class Condition(nn.Module):
    """Features [*, size] of what a network is told beside its input: the :class:`Waves` of a time [*], and of
    a label [*] in 0 … ``classes``-1 which one it is; None without ``timed`` and ``classes``."""

    rows: Tensor

    def __init__(self, timed: bool = True, classes: int | None = None) -> None:
        super().__init__()
        self.waves = Waves() if timed else None
        self.register_buffer("rows", torch.eye(classes or 0), persistent=False)

    @property
    def size(self) -> int:
        """Number of features."""
        return len(self.rows) + (0 if self.waves is None else self.waves.size)

    def forward(self, time: Tensor | None, labels: Tensor | None) -> Tensor | None:
        found = [] if self.waves is None or time is None else [self.waves(time)]
        if labels is not None:
            found.append(nn.functional.embedding(labels, self.rows))
        if len(found) < 2:
            return found[0] if found else None
        shape = torch.broadcast_shapes(*(f.shape[:-1] for f in found))
        return torch.cat([f.expand(*shape, -1) for f in found], -1)


def one_hot(z: Tensor, symbols: int) -> Tensor:
    """Integers z [*] as BoolTensors [*, symbols]; torch's function looks at the values, which no graph can
    capture."""
    return z.unsqueeze(-1) == torch.arange(symbols, device=z.device)


@torch.no_grad()
def start_small(layer: nn.Module) -> None:
    """Start a layer near zero: its inputs have gradients from the first step on."""
    for parameter, share in ((layer.weight, 0.01), (layer.bias, 0.0)):
        parameter.mul_(share)  # type: ignore[operator]


def sinusoids(places: int, width: int) -> Tensor:
    """Features [places, width] of places 0, 1, …: sine and cosine of place / 10,000^(2j / width), j = 0, 1, …

    A step to another place is a rotation, the same from everywhere. Source: Vaswani et al. (2017), 3.5."""
    angle = torch.arange(places)[:, None] * 1e4 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class PerStepLinear(nn.Module):
    """z [*, D] at time t/T to [*, D, outputs]: first W_t z + b_t, then ``outputs`` - 1 numbers per dimension
    that depend on t alone.

    With it every reverse conditional of a Gaussian diffusion is linear in z with a diagonal variance: the
    optimum for Gaussian data. W and b start at zero. Memory O(T · D²).
    """

    def __init__(self, dims: int, steps: int, outputs: int = 2) -> None:
        super().__init__()
        self.steps = positive_count("steps", steps)
        self.weight = nn.Parameter(torch.zeros(steps, dims, dims))
        self.bias = nn.Parameter(torch.zeros(steps, dims, outputs))

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        step = (time * self.steps).round().long().clamp(1, self.steps) - 1
        first = (self.weight[step] @ z.unsqueeze(-1)) + self.bias[step][..., :1]
        rest = self.bias[step][..., 1:]
        return torch.cat([first, rest.expand(*first.shape[:-1], -1)], -1)


class MLPDenoiser(nn.Module):
    """z [*, D] at time t in [0, 1] to [*, D, outputs]: residual layers, each shifted by features of the time.

    x ← x + W SiLU(V norm(x) + U φ), with φ the :class:`Condition`: the time, if ``timed``, and the label, if
    there are ``classes``. The input is z, with sine and cosine of 2^j π z for each j of ``fourier``. Outputs
    start near 0."""

    def __init__(
        self,
        dims: int,
        outputs: int = 1,
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        timed: bool = True,
        fourier: Sequence[int] = (),
        classes: int | None = None,
    ) -> None:
        super().__init__()
        positive_count("width", width, "number of features")
        whole_number("layers", layers, 0, "blocks")
        self.dims, self.outputs, self.fourier = dims, outputs, tuple(fourier)
        self.condition = Condition(timed, classes)
        self.inwards = nn.Linear(dims * (1 + 2 * len(self.fourier)), width)
        self.blocks = nn.ModuleList(_Residual(width, self.condition.size, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.outwards = nn.Linear(width, dims * outputs)
        start_small(self.outwards)

    def forward(self, z: Tensor, time: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        when = self.condition(time, labels)
        angles = [math.pi * 2.0**j * z for j in self.fourier]
        x = self.inwards(torch.cat([z, *(f(a) for a in angles for f in (torch.sin, torch.cos))], -1))
        return self.outwards(self.body(x, when)).unflatten(-1, (self.dims, self.outputs))

    def body(self, x: Tensor, when: Tensor | None) -> Tensor:
        """What lies between the first layer and the last."""
        for block in self.blocks:
            x = block(x, when)
        return self.norm(x)


class TokenMLP(MLPDenoiser):
    """An :class:`MLPDenoiser` of symbols z [*, D], integers 0 … symbols-1, one-hot at the input; the integer
    ``symbols``, the mask of masked diffusion, is all zeros."""

    def __init__(
        self,
        dims: int,
        symbols: int,
        outputs: int,
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        timed: bool = True,
        classes: int | None = None,
    ) -> None:
        super().__init__(dims, outputs, width, layers, dropout, timed, classes=classes)
        self.symbols = symbols
        self.inwards = nn.Linear(dims * symbols, width)

    def forward(self, z: Tensor, time: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        one = one_hot(z, self.symbols).flatten(-2)
        return super().forward(one.to(self.inwards.weight.dtype), time, labels)

    def one_by_one(self, z: Tensor, places: Tensor, labels: Tensor | None = None) -> Tensor:
        """Outputs [*, D, outputs] at the place ``places[..., k]`` given the symbols z [*, D] at
        ``places[..., :k]``, the mask elsewhere, for k = 0 … D-1.

        A step adds one column to the first layer, and only one place's outputs are computed: the cost of D
        passes without those two layers.
        """
        columns = self.inwards.weight.T.contiguous()
        rows = self.outwards.weight.unflatten(0, (self.dims, self.outputs))
        biases = self.outwards.bias.view(self.dims, self.outputs)
        column = places * self.symbols + z.gather(-1, places)
        when, found = self.condition(None, labels), []
        x = self.inwards.bias.expand(*z.shape[:-1], -1)
        for k in range(self.dims):
            place = places[..., k]
            found.append((rows[place] * self.body(x, when).unsqueeze(-2)).sum(-1) + biases[place])
            x = x + nn.functional.embedding(column[..., k], columns)
        return torch.stack(found, -2)


class _Residual(nn.Module):
    def __init__(self, width: int, told: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)
        self.when = nn.Linear(told, width, bias=False) if told else None
        self.outer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, when: Tensor | None) -> Tensor:
        hidden = self.inner(self.norm(x))
        if self.when is not None:
            hidden = hidden + self.when(when)
        return x + self.outer(self.dropout(nn.functional.silu(hidden)))


class _Tokens(nn.Module):
    """Features [n, D, width] of symbols [n, D]: an embedding of each plus one of its place, and of the label
    if there are ``classes``; and the head from features to [n, D, outputs]."""

    def __init__(self, dims: int, symbols: int, outputs: int, width: int, classes: int | None) -> None:
        super().__init__()
        positive_count("width", width, "number of features")
        self.embed = nn.Embedding(symbols, width)
        self.label = None if classes is None else nn.Embedding(classes, width)
        self.places = nn.Parameter(0.02 * torch.randn(dims, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        self.bias = nn.Parameter(torch.zeros(dims, outputs))
        start_small(self.head)

    def features(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Those of symbols [*, D] and labels [*], as one batch."""
        x = self.embed(z.reshape(-1, z.shape[-1])) + self.places
        if self.label is None:
            return x
        return x + self.label(labels).expand(*z.shape[:-1], -1).reshape(len(x), 1, -1)


class TokenTransformer(_Tokens):
    """Symbols z [*, D], integers 0 … symbols-1, to [*, D, outputs]: a pre-norm transformer in which every
    place attends to all.

    Learned positions start at :func:`sinusoids`: a masked place knows nothing but where it is, and must find
    its neighbours before anything can be learned.

    Args:
        dims: D.
        symbols: number of symbols at the input.
        outputs: numbers per place.
        width: number of features, a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads of each block.
        dropout: probability of dropout in the blocks.
        classes: number of labels, if it is told one.
    """

    def __init__(
        self,
        dims: int,
        symbols: int,
        outputs: int,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__(dims, symbols, outputs, width, classes)
        self.places = nn.Parameter(sinusoids(dims, width))
        self.blocks = nn.ModuleList(Attend(width, heads, dropout) for _ in range(layers))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.features(z, labels)
        for block in self.blocks:
            x = block(x)
        return (self.head(self.norm(x)) + self.bias).reshape(*z.shape, -1)


class Attend(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), of x [n, t, width]; every row attends to all of its
    t."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        positive_count("width", width, "number of features")
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads={heads}, got {width}")
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.inwards(self.before(x)).chunk(3, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.dropout(self.outwards(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.between(x)))


class TokenConv(_Tokens):
    """Symbols z [*, H·W], integers 0 … symbols-1, to [*, H·W, outputs]: residual 3x3 convolutions at full
    resolution.

    x ← x + 1x1(dropout(SiLU(3x3(SiLU(norm(x)))))), with a group norm of one group; ``layers`` blocks see
    2·``layers`` + 1 pixels in each direction.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        symbols: int,
        outputs: int,
        width: int = 48,
        layers: int = 6,
        dropout: float = 0.0,
        classes: int | None = None,
    ) -> None:
        super().__init__(math.prod(shape), symbols, outputs, width, classes)
        self.shape = shape
        self.blocks = nn.ModuleList(_ConvResidual(width, dropout) for _ in range(layers))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.features(z, labels)
        x = x.transpose(1, 2).unflatten(-1, self.shape)
        for block in self.blocks:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        return (self.head(self.norm(x)) + self.bias).reshape(*z.shape, -1)


class _ConvResidual(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 1)
        start_small(last)
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Dropout(dropout),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)

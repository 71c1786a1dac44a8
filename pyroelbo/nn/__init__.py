"""Networks for pairs. All accept any number of leading dimensions, so that particles are vectorized."""

from pyroelbo.nn.causal import CausalTransformer, PixelCNN
from pyroelbo.nn.layers import (
    MLP,
    BatchNorm,
    Conv,
    ConvCell,
    ConvDecoder,
    ConvEncoder,
    Dense,
    GatedMLP,
    LinearNormal,
    bounded,
    join,
    masked_mlp,
)

__all__ = [
    "MLP",
    "BatchNorm",
    "CausalTransformer",
    "Conv",
    "ConvCell",
    "ConvDecoder",
    "ConvEncoder",
    "Dense",
    "GatedMLP",
    "LinearNormal",
    "PixelCNN",
    "bounded",
    "join",
    "masked_mlp",
]

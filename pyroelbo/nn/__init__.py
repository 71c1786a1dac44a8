"""Networks for pairs. All accept any number of leading dimensions, so that particles are vectorized."""

from pyroelbo.nn.causal import CausalGRU, CausalText, CausalTransformer, CausalWindow, PixelCNN
from pyroelbo.nn.denoisers import (
    MLPDenoiser,
    PerStepLinear,
    TokenConv,
    TokenMLP,
    TokenTransformer,
    Waves,
    one_hot,
)
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
    round_straight_through,
)
from pyroelbo.nn.modulated import ModulatedConv, doubled
from pyroelbo.nn.quantizers import NoisyQuantizer, ScalarQuantizer, VectorQuantizer
from pyroelbo.nn.unet import UNet

__all__ = [
    "MLP",
    "BatchNorm",
    "CausalGRU",
    "CausalText",
    "CausalTransformer",
    "CausalWindow",
    "Conv",
    "ConvCell",
    "ConvDecoder",
    "ConvEncoder",
    "Dense",
    "GatedMLP",
    "LinearNormal",
    "MLPDenoiser",
    "ModulatedConv",
    "NoisyQuantizer",
    "PerStepLinear",
    "PixelCNN",
    "ScalarQuantizer",
    "TokenConv",
    "TokenMLP",
    "TokenTransformer",
    "UNet",
    "VectorQuantizer",
    "Waves",
    "bounded",
    "doubled",
    "join",
    "masked_mlp",
    "one_hot",
    "round_straight_through",
]

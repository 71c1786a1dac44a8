"""Codes: a pair's bound as a file (needs constriction)."""

from pyroelbo.coding.archive import compress, compress_contexts, decompress, decompress_contexts
from pyroelbo.coding.contexts import ContextCoder
from pyroelbo.coding.pairs import BitsBack, Direct, PairCodec, Swapped, pair_codec
from pyroelbo.coding.sites import Grid, codec_of
from pyroelbo.coding.stack import Codec, Impossible, Stack, Underflow
from pyroelbo.coding.weights import PRECISIONS, quantized

__all__ = [
    "PRECISIONS",
    "BitsBack",
    "Codec",
    "ContextCoder",
    "Direct",
    "Grid",
    "Impossible",
    "PairCodec",
    "Stack",
    "Swapped",
    "Underflow",
    "codec_of",
    "compress",
    "compress_contexts",
    "decompress",
    "decompress_contexts",
    "pair_codec",
    "quantized",
]

"""Friendly distributions: each can be sampled and evaluated exactly."""

from pyroelbo.distributions.chain import HMM, ChainParts, LinearChain
from pyroelbo.distributions.segment import SegmentParts, SemiMarkov
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.distributions.tree import TreeCRF, TreeParts

__all__ = [
    "HMM",
    "ChainParts",
    "LinearChain",
    "SegmentParts",
    "SemiMarkov",
    "StructuredDistribution",
    "TreeCRF",
    "TreeParts",
]

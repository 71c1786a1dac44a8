"""Friendly distributions: each can be sampled and evaluated exactly."""

from pyroelbo.distributions.chain import ChainParts, LinearChain
from pyroelbo.distributions.structured import StructuredDistribution

__all__ = ["ChainParts", "LinearChain", "StructuredDistribution"]

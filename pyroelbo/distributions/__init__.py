"""Friendly distributions, latent structures whose sums are exact, and observation models for pixels."""

from pyroelbo.distributions.alignment import CTC, Alignment, AlignmentParts
from pyroelbo.distributions.chain import HMM, ChainParts, LinearChain
from pyroelbo.distributions.gaussian import Filtered, GaussianChain, LinearGaussianChain
from pyroelbo.distributions.grammar import PCFG, Derivation, ParseParts, ParseTree
from pyroelbo.distributions.mixture import DiagonalMixture, GaussianStatistics, Mixture
from pyroelbo.distributions.pixels import DiscretizedLogistic, l1_density, l2_density
from pyroelbo.distributions.segment import SegmentParts, SemiMarkov
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.distributions.tree import TreeCRF, TreeParts

__all__ = [
    "CTC",
    "HMM",
    "PCFG",
    "Alignment",
    "AlignmentParts",
    "ChainParts",
    "Derivation",
    "DiagonalMixture",
    "DiscretizedLogistic",
    "Filtered",
    "GaussianChain",
    "GaussianStatistics",
    "LinearChain",
    "LinearGaussianChain",
    "Mixture",
    "ParseParts",
    "ParseTree",
    "SegmentParts",
    "SemiMarkov",
    "StructuredDistribution",
    "TreeCRF",
    "TreeParts",
    "l1_density",
    "l2_density",
]

"""Friendly distributions, latent structures whose sums are exact, and observation models for pixels."""

from pyroelbo.distributions.alignment import CTC, Alignment, AlignmentParts
from pyroelbo.distributions.chain import HMM, ChainParts, LinearChain
from pyroelbo.distributions.gaussian import Filtered, GaussianChain, LinearGaussianChain
from pyroelbo.distributions.grammar import PCFG, Derivation
from pyroelbo.distributions.logic import CNF, Circuit, Models, ModelsParts, compile_formula, read_dimacs
from pyroelbo.distributions.mixture import DiagonalMixture, GaussianStatistics, Mixture
from pyroelbo.distributions.parse_tree import ParseParts, ParseTree
from pyroelbo.distributions.pixels import (
    DiscretizedLaplace,
    DiscretizedLogistic,
    DiscretizedLogistics,
    DiscretizedNormal,
    l1_density,
    l2_density,
)
from pyroelbo.distributions.segment import SegmentParts, SemiMarkov
from pyroelbo.distributions.structured import StructuredDistribution
from pyroelbo.distributions.tree import TreeCRF, TreeParts

__all__ = [
    "CNF",
    "CTC",
    "HMM",
    "PCFG",
    "Alignment",
    "AlignmentParts",
    "ChainParts",
    "Circuit",
    "Derivation",
    "DiagonalMixture",
    "DiscretizedLaplace",
    "DiscretizedLogistic",
    "DiscretizedLogistics",
    "DiscretizedNormal",
    "Filtered",
    "GaussianChain",
    "GaussianStatistics",
    "LinearChain",
    "LinearGaussianChain",
    "Mixture",
    "Models",
    "ModelsParts",
    "ParseParts",
    "ParseTree",
    "SegmentParts",
    "SemiMarkov",
    "StructuredDistribution",
    "TreeCRF",
    "TreeParts",
    "compile_formula",
    "l1_density",
    "l2_density",
    "read_dimacs",
]

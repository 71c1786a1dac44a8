"""Models, and the registry of those that the command line trains."""

from pyroelbo.models.autoregressive import Autoregressive, Strings
from pyroelbo.models.byte_vae import ByteVAE
from pyroelbo.models.chain import Chain
from pyroelbo.models.chow_liu import HiddenChowLiuTree
from pyroelbo.models.conv_ladder import ConvLadder
from pyroelbo.models.ctc import CTC
from pyroelbo.models.diffusion import Diffusion, DiscreteDiffusion
from pyroelbo.models.discrete_vae import DiscreteVAE, SigmoidBeliefNet
from pyroelbo.models.experts import MixtureOfExperts
from pyroelbo.models.flow import DequantizedFlow, Flow
from pyroelbo.models.grammar import PCFG, NeuralPCFG
from pyroelbo.models.hierarchy import Hierarchy
from pyroelbo.models.hmm import HMM
from pyroelbo.models.ladder import Ladder
from pyroelbo.models.masked import MaskedDiffusion
from pyroelbo.models.mixture import BernoulliMixture, GaussianMixture
from pyroelbo.models.ppca import PPCA
from pyroelbo.models.rate_distortion import RateDistortion
from pyroelbo.models.registry import REGISTRY, Entry, build, entry, load, matched, settings_of
from pyroelbo.models.sat import SAT
from pyroelbo.models.sentences import SentenceVAE
from pyroelbo.models.state_space import StateSpace
from pyroelbo.models.style import StyleVAE
from pyroelbo.models.superpixel import Superpixel
from pyroelbo.models.topics import LDA
from pyroelbo.models.vae import VAE
from pyroelbo.models.vdm import VDM
from pyroelbo.models.vq_chain import VQChain
from pyroelbo.models.vq_vae import FSQVAE, SQVAE, VQVAE

__all__ = [
    "CTC",
    "FSQVAE",
    "HMM",
    "LDA",
    "PCFG",
    "PPCA",
    "REGISTRY",
    "SAT",
    "SQVAE",
    "VAE",
    "VDM",
    "VQVAE",
    "Autoregressive",
    "BernoulliMixture",
    "ByteVAE",
    "Chain",
    "ConvLadder",
    "DequantizedFlow",
    "Diffusion",
    "DiscreteDiffusion",
    "DiscreteVAE",
    "Entry",
    "Flow",
    "GaussianMixture",
    "HiddenChowLiuTree",
    "Hierarchy",
    "Ladder",
    "MaskedDiffusion",
    "MixtureOfExperts",
    "NeuralPCFG",
    "RateDistortion",
    "SentenceVAE",
    "SigmoidBeliefNet",
    "StateSpace",
    "Strings",
    "StyleVAE",
    "Superpixel",
    "VQChain",
    "build",
    "entry",
    "load",
    "matched",
    "settings_of",
]

"""How large is ln p(y)? Bounds, exact values and estimates of the evidence of any pair, per datum, in
nats."""

from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.annealed import ais, bdmc
from pyroelbo.evidence.audit import audit
from pyroelbo.evidence.bounds import cubo, draws, elbo, eubo, iwae, prior_monte_carlo
from pyroelbo.evidence.calibration import calibration
from pyroelbo.evidence.diagnostics import diagnostics, pareto_k_hat
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.gap import gap
from pyroelbo.evidence.layers import layers
from pyroelbo.evidence.particle import smc
from pyroelbo.evidence.quadrature import quadrature

__all__ = [
    "Unavailable",
    "ais",
    "audit",
    "bdmc",
    "calibration",
    "cubo",
    "diagnostics",
    "draws",
    "elbo",
    "eubo",
    "exact",
    "gap",
    "iwae",
    "layers",
    "pareto_k_hat",
    "prior_monte_carlo",
    "quadrature",
    "smc",
]

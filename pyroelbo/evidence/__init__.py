"""Bounds, exact values and estimates of the evidence ln p(y) of any pair, per datum, in nats."""

from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evidence.annealed import ais, bdmc
from pyroelbo.evidence.audit import Contradiction, audit
from pyroelbo.evidence.bounds import cubo, elbo, eubo, iwae, prior_monte_carlo, terms
from pyroelbo.evidence.calibration import calibration
from pyroelbo.evidence.conditional import given_globals
from pyroelbo.evidence.diagnostics import diagnostics, pareto_k_hat
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.gap import gap
from pyroelbo.evidence.particle import smc
from pyroelbo.evidence.quadrature import quadrature
from pyroelbo.evidence.site_gaps import site_gaps

__all__ = [
    "Contradiction",
    "Unavailable",
    "ais",
    "audit",
    "bdmc",
    "calibration",
    "cubo",
    "diagnostics",
    "elbo",
    "eubo",
    "exact",
    "gap",
    "given_globals",
    "iwae",
    "pareto_k_hat",
    "prior_monte_carlo",
    "quadrature",
    "site_gaps",
    "smc",
    "terms",
]

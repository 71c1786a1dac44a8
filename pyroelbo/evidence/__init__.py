"""How large is ln p(y)? Lower bounds, exact values and estimates of the evidence of any pair, per datum, in
nats."""

from pyroelbo.evidence.audit import audit
from pyroelbo.evidence.bounds import elbo, iwae
from pyroelbo.evidence.diagnostics import pareto_k_hat
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.quadrature import quadrature
from pyroelbo.terms import Unavailable

__all__ = ["Unavailable", "audit", "elbo", "exact", "iwae", "pareto_k_hat", "quadrature"]

"""Pyro's SVI at the speed of hand-written, compiled torch: two drop-ins, and the whole step as one graph."""

from pyroelbo.compiled.cache import CompileWarning, Counters
from pyroelbo.compiled.elbo import CompiledELBO
from pyroelbo.compiled.optim import FusedOptim
from pyroelbo.compiled.step import CompiledStep

__all__ = ["CompileWarning", "CompiledELBO", "CompiledStep", "Counters", "FusedOptim"]

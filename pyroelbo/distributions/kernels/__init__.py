"""Compiled CPU loops of the structures, one file a structure, behind
:mod:`pyroelbo.distributions.kernels.dispatch`.
"""

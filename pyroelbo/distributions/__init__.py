"""Distributions that Pyro lacks: latent structures with exact sums, and observation models."""

from pyroelbo.distributions.pixels import DiscretizedLogistic, l1_density, l2_density

__all__ = ["DiscretizedLogistic", "l1_density", "l2_density"]

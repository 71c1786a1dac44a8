"""pyroelbo: latent-variable models as Pyro model/guide pairs, and how tight their bounds are."""

from pyroelbo._version import __version__

__all__ = ["__version__"]

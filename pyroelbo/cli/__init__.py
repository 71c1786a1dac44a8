"""The command line: ``pyroelbo models | train | audit | sample | compress | decompress | show``."""

from pyroelbo.cli.main import main

__all__ = ["main"]

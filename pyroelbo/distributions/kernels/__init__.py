"""Compiled CPU kernels, one file a structure; see docs/kernels.md and :mod:`.dispatch` for when they are
used.
"""

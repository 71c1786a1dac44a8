"""Frozen results: what an evaluation, an audit or a training found. They hold numbers, never models."""

from pyroelbo.results.bounds import (
    KINDS,
    SCOPES,
    Audit,
    Bound,
    Decomposition,
    Divergence,
    Gap,
    Json,
    Run,
    Sandwich,
    Terms,
    short,
)
from pyroelbo.results.codes import CodeLength, CodeUsage, RatePoint
from pyroelbo.results.diagnostics import Calibration, Diagnostics, Estimate, SiteGaps

__all__ = [
    "KINDS",
    "SCOPES",
    "Audit",
    "Bound",
    "Calibration",
    "CodeLength",
    "CodeUsage",
    "Decomposition",
    "Diagnostics",
    "Divergence",
    "Estimate",
    "Gap",
    "Json",
    "RatePoint",
    "Run",
    "Sandwich",
    "SiteGaps",
    "Terms",
    "short",
]

"""Log probabilities of traced sites per particle and datum, as importance weights need them."""

from __future__ import annotations

import math
from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyroelbo.evaluation.sites import check_scale

__all__ = ["per_datum"]


def per_datum(site: Any, frame: Any, outer: float, program: str, particles: bool) -> Tensor:
    """ln p of one site, unscaled but masked, [K, B] ([B] without a dimension of particles).

    Raises ValueError for scales other than ``outer``, that of a subsampled data plate.
    """
    scale = site["scale"]
    marked = "within_datum" in site
    if marked or isinstance(scale, Tensor) or not math.isclose(scale, outer, rel_tol=1e-5):
        check_scale(site, program)
        raise ValueError(
            f"{program} site {site['name']!r}: expected no scale within the datum (it would enter the "
            f"weights), got one: "
            "use Trace_ELBO for data that are estimated by subsampling"
        )
    terms = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
    keep = {terms.dim() + frame.dim} | ({0} if particles else set())
    inner = [i for i in range(terms.dim()) if i not in keep]
    return terms.sum(inner) if inner else terms

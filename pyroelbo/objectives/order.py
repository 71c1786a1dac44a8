"""In which order model and guide draw their latents, and what that says about closed-form KL terms."""

from __future__ import annotations

from typing import Any

from pyro import poutine
from pyro.infer.inspect import get_dependencies

__all__ = ["drawn_later", "mean_field_fault"]


def _latents(trace: Any) -> list[str]:
    return [
        k
        for k, s in trace.nodes.items()
        if s["type"] == "sample" and not s["is_observed"] and type(s["fn"]).__name__ != "_Subsample"
    ]


def drawn_later(name: str, model: Any, guide: Any) -> list[str]:
    """Latents that the model draws before ``name`` and the guide after it."""
    before, drawn = _latents(model), _latents(guide)
    later = set(drawn[drawn.index(name) + 1 :])
    return [k for k in before[: before.index(name)] if k in later]


def mean_field_fault(model: Any, guide: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why :class:`~pyro.infer.TraceMeanField_ELBO` would not be a bound for this pair; None if it is one.

    It uses KL(q(z_l | …), p(z_l | …)) in closed form, conditioned on drawn values. If the model's z_l depends
    on a z_k that the guide draws *from* z_l, the two are dependent given the draws, and the closed form is a
    term of another guide's bound: it may lie on either side of the ELBO. The order of sites alone does not
    decide this; where the orders differ, Pyro's provenance tracking does.
    """
    traced = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.trace(poutine.replay(model, trace=traced)).get_trace(*args, **kwargs)
    suspects = {k: drawn_later(k, replayed, traced) for k in _latents(replayed) if k in traced.nodes}
    if not any(suspects.values()):
        return None
    above = get_dependencies(model, args, kwargs)["prior_dependencies"]
    stands_on = {k: set(v) for k, v in get_dependencies(guide, args, kwargs)["prior_dependencies"].items()}
    for site in traced.nodes:  # in drawing order, so one pass gives the transitive closure
        if site in stands_on:
            stands_on[site] |= set().union(*(stands_on[k] for k in stands_on[site] if k != site), ())
    for site, later in suspects.items():
        for other in later:
            if other in above[site] and site in stands_on[other]:
                return (
                    f"the model draws {site!r} from {other!r} and the guide {other!r} from {site!r}: the "
                    f"closed-form KL of "
                    f"{site!r} is not a term of this bound. Use objective='elbo' or 'layered', which "
                    f"samples it, or a "
                    "top-down guide"
                )
    return None

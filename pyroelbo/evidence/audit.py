"""`audit`: the bounds of a pair on the same data, side by side with the best reference there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyroelbo import data as batches
from pyroelbo.evidence.annealed import ais
from pyroelbo.evidence.bounds import elbo, iwae
from pyroelbo.evidence.exact import exact
from pyroelbo.evidence.quadrature import quadrature
from pyroelbo.pair import Pair
from pyroelbo.records import Audit, Bound
from pyroelbo.terms import Unavailable

__all__ = ["audit"]

_REFERENCES: dict[str, Callable[[Pair, Any, int], Bound]] = {
    "exact": lambda pair, batch, temperatures: exact(pair, batch),
    "quadrature": lambda pair, batch, temperatures: quadrature(pair, batch),
    "ais": lambda pair, batch, temperatures: ais(pair, batch, temperatures),
}
_DEFAULT = ("exact", "quadrature")


def audit(
    pair: Pair,
    y: Any,
    *,
    particles: int = 64,
    references: Sequence[str] | None = None,
    temperatures: int = 1000,
) -> Audit:
    """How tight is the bound? ELBO and IWAE with ``particles`` draws each, beside a reference, per datum, in
    nats.

    ``references`` names what to hold them against, some of ``"exact"``, ``"quadrature"`` and ``"ais"`` (of
    ``temperatures``; a lower bound itself, so that gaps to it are lower estimates, which a note says); the
    gaps are taken from the first, and one that the pair does not have raises
    :class:`~pyroelbo.evidence.Unavailable`.
    Left out, the exact evidence is used where there is one, else quadrature for one or two continuous latent
    dimensions; the notes say what was not possible and why. ``print(audit(pair, y))`` is a table. Cost: 2
    ``particles`` evaluations a datum and the reference's.
    """
    batch = batches.as_batch(y, "y")
    notes: list[str] = []
    found: list[Bound] = []
    for name in _DEFAULT if references is None else references:
        if name not in _REFERENCES:
            raise ValueError(f"references takes some of {tuple(_REFERENCES)}, got {name!r}")
        try:
            found.append(_REFERENCES[name](pair, batch, temperatures))
        except Unavailable as reason:
            if references is not None:
                raise
            notes.append(f"no {name} value: {reason}")
        if references is None and found:
            break
    if not found:
        notes.append(
            "no reference, so no gap: the lower bounds alone do not say how far they are from ln p(y)"
        )
    elif found[0].kind == "lower":
        notes.append(f"{found[0].method} is a lower bound itself: the gaps to it are lower estimates")
    bounds = list(found)
    try:
        bounds += [elbo(pair, batch, particles), iwae(pair, batch, particles)]
    except Unavailable as reason:
        if not found:
            raise
        notes.append(f"no elbo and iwae: {reason}")
    return Audit(pair.name, tuple(bounds), found[0].method if found else None, tuple(notes))

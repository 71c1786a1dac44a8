"""Rows given the latents outside the data plate: per-datum bounds of pairs with global and local latents."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyroelbo import batch as batches
from pyroelbo.evaluation.masks import is_masked, log_prob_of
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import Unavailable, check_joint, check_sites, is_point, sample_sites
from pyroelbo.numerics import positive_count
from pyroelbo.pair import PLATE, Pair
from pyroelbo.results import Bound, Divergence

__all__ = ["GivenGlobals", "given_globals"]


def given_globals(pair: Pair, y: Any, draws: int = 16, *, num_data: int | None = None) -> GivenGlobals:
    """Draws θ ~ q(θ) of the latents outside the data plate, shared by all data, for per-datum bounds given
    them.

    ``given_globals(pair, y).row(evidence.iwae, 64)`` is a bound on E_q(θ)[ln p(y_i | θ)] for each datum, not
    on ln p(y_i); its gap is the local one, and the distance of q(θ) from p(θ | y) is not seen by it. The
    ``divergence`` KL(q(θ) || p(θ)) counts once: Σ_i row_i - KL is a lower bound on ln p(y) of all data where
    the rows are. A guide that sets θ to a point has rows of ln p(y_i | θ), and no divergence.

    Args:
        pair: the pair.
        y: the batch, all data or a subset.
        draws: draws of θ.
        num_data: number of all data where ``y`` is a subset; by default that of the data plate.

    Raises :class:`Unavailable`, naming the site, for global latents that are summed out and for guides that
    draw global and local latents together, ValueError for a guide of θ that reads the batch where that is a
    subset, and for pairs without latents outside the data plate.
    """
    return GivenGlobals(pair, y, draws, num_data)


class GivenGlobals:
    """``draws`` of the global latents of a pair; :meth:`row` averages a per-datum bound over them."""

    def __init__(self, pair: Pair, y: Any, draws: int, num_data: int | None) -> None:
        positive_count("draws", draws)
        self.batch = batches.to(batches.as_batch(y, "y"), pair.device)
        self._programs = Programs(pair)
        with torch.no_grad(), self._programs.quiet():
            traces = [self._programs.traces(self.batch) for _ in range(max(2, draws))]
            guide, model = traces[0]
            self.names, drawn = _outside(model), _outside(guide)
            self._check(guide, model)
            points = [k for k in self.names if _is_fixed(k, traces)]
            if not points:
                check_sites(guide, model, True, self._programs.summed(guide, model))
            self.fixed = len(points) == len(self.names)
            traces = traces[: 1 if self.fixed else draws]
            self.num_data = self._all_data(model, num_data)
            values = [{k: g.nodes[k]["value"] for k in drawn} for g, _ in traces]
            self._check_reading(values[0], guide)
            self.divergence = self._divergence(traces, points)
        self.note = self._describe(model)
        layouts: dict[Any, Any] = {}
        self.pairs = tuple(_Given(pair, v, layouts) for v in values)

    def row(self, estimator: Callable[..., Bound], *arguments: Any, **options: Any) -> Bound:
        """The mean over the draws of θ of ``estimator(pair, y, ...)`` given each, a Bound of scope
        ``"globals"`` with the errors of θ's draws, which all data share."""
        return self.average(lambda pair: estimator(pair, self.batch, *arguments, **options))

    def average(self, estimate: Callable[[Pair], Bound]) -> Bound:
        """The mean of ``estimate(pair)`` over the pairs given each draw of θ."""
        found = [estimate(pair) for pair in self.pairs]
        first = found[0]
        values = torch.stack([b.value.double() for b in found])
        one = len(found) == 1
        stderr = values.std(0) / math.sqrt(len(values)) if not one else torch.full_like(values[0], math.nan)
        notes = tuple(dict.fromkeys(note for b in found for note in b.notes))
        return Bound(
            first.method,
            values.mean(0),
            first.error.double() if self.fixed else stderr,
            "estimate" if first.kind == "exact" and not self.fixed else first.kind,
            "globals",
            draws=first.draws,
            cost=sum(b.cost for b in found),
            ess=None if first.ess is None else torch.stack([b.ess for b in found]).mean(0),  # type: ignore[misc]
            k_hat=None if first.k_hat is None else torch.stack([b.k_hat for b in found]).nanmedian(0).values,  # type: ignore[misc]
            notes=notes,
            by_draw=None if one else values,
        )

    # ------------------------------------------------------------------------------------------ inside

    def _check(self, guide: Any, model: Any) -> None:
        if not self.names:
            raise ValueError(
                f"given: expected latents outside the plate {PLATE!r}, got none: every row is a bound on ln "
                "p(y) already. Leave given out"
            )
        for program, trace in (("guide", guide), ("model", model)):
            for name in _outside(trace):
                check_joint(trace.nodes[name], program)
        left_out = [name for name in self.names if name not in guide.nodes]
        if left_out:
            raise Unavailable(
                f"latent site {left_out[0]!r} stands outside the plate {PLATE!r} and the guide does not draw "
                'it: the data depend on one another through it. Use scope="joint"'
            )
        auxiliary = [
            k
            for k in _outside(guide)
            if k not in model.nodes and k.removesuffix("_unconstrained") not in self.names
        ]
        local = [k for k, s in sample_sites(model) if not s["is_observed"] and k not in self.names]
        made = [k for k in local if k in guide.nodes and is_point(guide.nodes[k]["fn"])]
        if auxiliary and made and not any(f"{k}_unconstrained" in guide.nodes for k in made):
            raise Unavailable(
                f"guide site {auxiliary[0]!r} draws {made[0]!r} together with the global latents: given "
                "those it has no density. Use AutoNormal, or write the guide of the local latents"
            )

    def _all_data(self, model: Any, num_data: int | None) -> int:
        size = batches.size(self.batch)
        frames = [f for _, s in sample_sites(model) for f in s["cond_indep_stack"] if f.name == PLATE]
        found = max([size, *(f.full_size or 0 for f in frames)]) if num_data is None else num_data
        if isinstance(found, bool) or not isinstance(found, int) or found < size:
            raise ValueError(f"num_data: expected at least the {size} data of the batch, got {found!r}")
        return found

    def _check_reading(self, values: Mapping[str, Tensor], guide: Any) -> None:
        """Refuse a guide of θ that looks at the data where they are a subset: q(θ) would be another."""
        size = batches.size(self.batch)
        if self.num_data == size or size == 1:
            return
        copies = batches.rows(self.batch, torch.zeros(size, dtype=torch.long))
        other = self._programs.guide(copies, values)
        fresh = self._programs.guide(copies)
        for name in values:
            same = torch.allclose(log_prob_of(guide.nodes[name]), log_prob_of(other.nodes[name]))
            if is_point(guide.nodes[name]["fn"]) and f"{name}_unconstrained" not in values:
                same = torch.equal(values[name], fresh.nodes[name]["value"])
            if not same:
                raise ValueError(
                    f"guide site {name!r} stands outside the plate {PLATE!r} and reads the batch, which is "
                    f"{size} of {self.num_data} data: q of a subset is not q of all. Pass all data"
                )

    def _divergence(self, traces: list[tuple[Any, Any]], points: list[str]) -> Divergence | None:
        if points or any(is_masked(traces[0][1].nodes[k]["mask"]) for k in self.names):
            return None

        def total(trace: Any, names: list[str]) -> Tensor:
            return torch.stack([log_prob_of(trace.nodes[k]).double().sum() for k in names]).sum()

        by_draw = [total(guide, _outside(guide)) - total(model, self.names) for guide, model in traces]
        return Divergence(torch.stack(by_draw), self.num_data, batches.size(self.batch))

    def _describe(self, model: Any) -> str:
        names = ", ".join(self.names[:4]) + (", …" if len(self.names) > 4 else "")
        if self.fixed:
            return f"given {names}, set to a point by the guide: rows are of ln p(y | θ) there, none is joint"
        masked = [k for k in self.names if is_masked(model.nodes[k]["mask"])]
        if masked:
            return f"given draws of {names}; {masked[0]!r} is masked, so that there is no KL to a prior"
        if self.divergence is None:
            return f"given draws of {names}, of which the guide sets some to a point: there is no KL"
        return f"given draws of {names}: rows are of E ln p(y | θ) over q(θ), gaps are those of local latents"


class _Given(Pair):
    """A pair whose latents outside the data plate have given values and are no latents any more."""

    def __init__(self, pair: Pair, values: Mapping[str, Tensor], layouts: dict[Any, Any]) -> None:
        super().__init__()
        self.__dict__.update(_pair=pair, _values=values, _layouts=layouts)
        # Registering the pair as a PyroModule's child would change its names in Pyro's store.
        nn.Module.add_module(self, "generator", pair)

    @property
    def name(self) -> str:
        return self.__dict__["_pair"].name

    def model(self, *batch: Any, **named: Any) -> Any:
        with _Fixed(self.__dict__["_values"]):
            return self.__dict__["_pair"].model(*batch, **named)

    def guide(self, *batch: Any, **named: Any) -> Any:
        with _Fixed(self.__dict__["_values"]):
            return self.__dict__["_pair"].guide(*batch, **named)


class _Fixed(Messenger):
    """Makes constants of sites, as ``pyro.deterministic`` does; hidden, they would be missing in the scope of
    ``pyro.markov``."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["is_observed"] = self.values[msg["name"]], True
            msg["infer"] = {**msg["infer"], "_deterministic": True}


def _outside(trace: Any) -> list[str]:
    """Latent sites outside the data plate."""
    return [
        name
        for name, site in sample_sites(trace)
        if not site["is_observed"] and all(f.name != PLATE or f.dim is None for f in site["cond_indep_stack"])
    ]


def _is_fixed(name: str, traces: list[tuple[Any, Any]]) -> bool:
    """Whether a guide sets a continuous latent to the same value in every draw."""
    first, second = (guide.nodes[name] for guide, _ in traces[:2])
    prior = traces[0][1].nodes[name]["fn"]
    point = is_point(first["fn"]) and not is_point(prior) and not prior.support.is_discrete
    return point and torch.equal(first["value"], second["value"])

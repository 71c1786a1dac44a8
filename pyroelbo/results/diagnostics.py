"""Results of analysing a pair: frozen records for `report`. All log quantities are in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyroelbo.results.bounds import Json, short

__all__ = ["Calibration", "Diagnostics", "Estimate", "SiteGaps"]


@dataclass(frozen=True)
class Estimate:
    """Numbers with their Monte Carlo standard errors, of one shape; NaN for a single draw."""

    value: Tensor
    stderr: Tensor

    @classmethod
    def of(cls, draws: Tensor) -> Estimate:
        """Mean over draws and data [K, N, *] and its standard error, given the data."""
        count, size = draws.shape[:2]
        error = draws.var(0).mean(0).div(count * size).sqrt() if count > 1 else draws[0, 0] * math.nan
        return cls(draws.mean((0, 1)), error)

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        pairs = zip(self.value.reshape(-1).tolist(), self.stderr.reshape(-1).tolist(), strict=True)
        return ", ".join(f"{value:.4f} ± {short(error)}" for value, error in pairs)

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value.tolist(), "stderr": self.stderr.tolist()}


@dataclass(frozen=True)
class Diagnostics(Json):
    """How a pair uses its latents: the ELBO split at the aggregated posterior q(z) = (1/N) Σ_n q(z | y_n).

    ``elbo`` = ``reconstruction`` - ``cross_entropy`` + ``entropy`` and ``kl`` = ``information`` +
    ``marginal_kl``, in nats. ``information`` is the index-code mutual information, at most ln N. ``holes`` is
    the prior mass where ln p(z) - ln q(z) > 3. ``activity`` [D] is the variance over the data of each
    coordinate's posterior mean. If the coordinates are independent under prior and guide,
    ``unit_information`` [D] and ``unit_kl`` [D] are ``information`` and ``marginal_kl`` of each alone, and
    ``marginal_kl`` = ``total_correlation`` + Σ ``unit_kl``. ``prior_draws`` [M, D] with ``prior_excess`` [M]
    = ln p(z) - ln q(z) show the holes, ``guide_draws`` [M, D] the codes.
    """

    name: str
    sites: tuple[str, ...]
    num_data: int
    draws: int
    elbo: Estimate
    reconstruction: Estimate
    cross_entropy: Estimate
    entropy: Estimate
    kl: Estimate
    information: Estimate
    marginal_kl: Estimate
    holes: Estimate
    activity: Estimate
    unit_information: Estimate | None
    unit_kl: Estimate | None
    total_correlation: Estimate | None
    prior_draws: Tensor
    prior_excess: Tensor
    guide_draws: Tensor
    notes: tuple[str, ...] = ()

    @property
    def active_units(self) -> int:
        """How many coordinates have an ``activity`` above 0.01 (Burda, Grosse and Salakhutdinov 2016,
        section 5)."""
        return int((self.activity.value > 0.01).sum())

    def __str__(self) -> str:
        rows = [
            ("ELBO", self.elbo, "= reconstruction - cross-entropy + entropy"),
            ("reconstruction", self.reconstruction, "E ln p(y | z)"),
            ("cross-entropy", self.cross_entropy, "-E ln p(z), z from q(z)"),
            ("entropy", self.entropy, "mean entropy of q(z | y)"),
            ("KL", self.kl, "mean KL(q(z | y), p(z)) = information + marginal KL"),
            (
                "information",
                self.information,
                f"of index and code, at most ln N = {math.log(self.num_data):.4f}",
            ),
            ("marginal KL", self.marginal_kl, "KL(q(z), p(z))"),
            ("holes", self.holes, "prior mass where ln p(z) - ln q(z) > 3"),
        ]
        if self.total_correlation is not None:
            rows.insert(7, ("  of which TC", self.total_correlation, "KL(q(z), Π q(z_d))"))
        lines = [f"{self.name}, {', '.join(self.sites)}: {self.num_data} data, {self.draws} draws each, nats"]
        lines += [f"{label:<15} {value!s:<22} {what}" for label, value, what in rows]
        if self.activity.value.numel():
            lines.append(f"active units    {self.active_units} of {self.activity.value.numel()}")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if not isinstance(v, (Estimate, Tensor))}
        found = {k: v.to_dict() for k, v in vars(self).items() if isinstance(v, Estimate)}
        return {**plain, "unit": "nats", "active_units": self.active_units, **found}


@dataclass(frozen=True)
class Calibration(Json):
    """Simulation-based calibration: ``ranks`` [N, Q] of N simulated values of Q quantities among ``draws``
    draws of the guide.

    If the guide is the exact posterior, every column is uniform on 0 … ``draws``. ``p_values`` [Q] are those
    of the chi-square test on the histograms ``counts`` [Q, bins].
    """

    name: str
    quantities: tuple[str, ...]
    draws: int
    ranks: Tensor
    counts: Tensor
    p_values: Tensor
    notes: tuple[str, ...] = ()

    @property
    def num_data(self) -> int:
        return len(self.ranks)

    @property
    def p_value(self) -> float:
        """The p value of the worst quantity times their number (Bonferroni), at most 1."""
        return min(1.0, float(self.p_values.min()) * len(self.quantities))

    def __str__(self) -> str:
        lines = [f"{self.name}: ranks of {self.num_data} simulations among {self.draws} draws of the guide"]
        width = max(map(len, self.quantities))
        for i, name in enumerate(self.quantities):
            mean = float(self.ranks[:, i].double().mean()) / self.draws
            lines.append(f"{name:<{width}}  mean rank {mean:.3f}  p = {float(self.p_values[i]):.2g}")
        lines.append(f"all: p = {self.p_value:.2g} (Bonferroni)")
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if not isinstance(v, Tensor)}
        return {
            **plain,
            "p_value": self.p_value,
            "p_values": self.p_values.tolist(),
            "counts": self.counts.tolist(),
            "ranks": self.ranks.tolist(),
        }


@dataclass(frozen=True)
class SiteGaps(Json):
    """The ELBO and its gap by latent site, in the guide's order, in nats per datum (means over the data).

    ``rates`` are E_q[ln q - ln p] of each site, and ``elbo`` = ``reconstruction`` - Σ rates. ``kinds`` label
    each rate: ``"KL"`` if the site's prior depends only on sites that the guide draws before it, so that the
    rate is an expected KL divergence; ``"difference"`` (lower layers of a bottom-up encoder) if it is not,
    and may be negative. ``gaps`` are each site's share of ``total`` = reference - ELBO, E KL(q(z_l | z_<l,
    y), p(z_l | z_<l, y)), estimated by importance weights, and ``rest`` is what remains: zero if the
    reference is the bound of these weights.
    """

    name: str
    sites: tuple[str, ...]
    num_data: int
    reference: str
    elbo: Estimate
    reconstruction: Estimate
    rates: dict[str, Estimate]
    kinds: dict[str, str]
    gaps: dict[str, Estimate]
    rest: Estimate
    total: Estimate
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(14, *map(len, self.sites))
        lines = [f"{self.name}: {self.num_data} data, by latent site in the guide's order, nats per datum"]
        lines.append(f"{'site':<{width}}  {'rate':<20}  {'is a':<10}  share of the gap")
        for site in self.sites:
            rate, gap = self.rates[site], self.gaps[site]
            lines.append(f"{site:<{width}}  {rate!s:<20}  {self.kinds[site]:<10}  {gap}")
        lines.append(f"{'left by weights':<{width}}  {'':<20}  {'':<10}  {self.rest}")
        lines.append(
            f"reconstruction {self.reconstruction}, ELBO {self.elbo}, {self.reference} - ELBO {self.total}"
        )
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        def plain(x: Any) -> Any:
            if isinstance(x, dict):
                return {k: plain(v) for k, v in x.items()}
            return x.to_dict() if isinstance(x, Estimate) else x

        return {**{k: plain(v) for k, v in vars(self).items()}, "unit": "nats"}

"""Results: frozen records for `report` and the command line. All log quantities are in nats."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroelbo.results import records

__all__ = [
    "Audit",
    "Bound",
    "Decomposition",
    "Divergence",
    "Gap",
    "Run",
    "Sandwich",
    "Terms",
]

KINDS = ("lower", "upper", "exact", "estimate")
SCOPES = ("datum", "joint", "globals")


class Json:
    """A record that serializes itself (abstract)."""

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_json(self) -> str:
        """The whole record as JSON; NaN and infinities are written as the strings "nan", "inf" and "-inf"."""
        return json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False)


@dataclass(frozen=True)
class Terms:
    """Log probabilities by site for K particles of each of B data, unscaled and masked: tensors [K, B].

    ``log_model`` holds every sample site of the generator, observed ones (named in ``observed``) included;
    ``log_guide`` every site of the encoder; ``latents`` the draws, [K, ..., B, *event].
    """

    log_model: dict[str, Tensor]
    log_guide: dict[str, Tensor]
    observed: frozenset[str]
    latents: dict[str, Tensor]

    @property
    def log_joint(self) -> Tensor:
        """ln p(y, z), [K, B]."""
        return _total(self.log_model)

    @property
    def log_proposal(self) -> Tensor:
        """ln q(z | y), [K, B]."""
        return _total(self.log_guide)

    @property
    def log_weight(self) -> Tensor:
        """ln p(y, z) - ln q(z | y), [K, B], -inf where p(y, z) = 0; its mean over K is the ELBO of each
        datum."""
        log_joint = self.log_joint
        # The posterior of impossible data has no density: inf - inf there would be NaN.
        return torch.where(log_joint == -math.inf, log_joint, log_joint - self.log_proposal)


def _total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*terms.values())).sum(0)


@dataclass(frozen=True)
class Bound:
    """An estimator's statement about ln p(y) in nats: one value per datum, or one for the whole batch.

    ``kind``: ``lower`` and ``upper`` hold in expectation, ``exact`` is a closed form, a dynamic program or an
    enumeration, ``estimate`` errs on either side. ``stderr`` is the Monte Carlo standard error of each value
    (zero for exact ones, NaN if there is only one draw). ``resolution`` replaces it for quadrature: the
    absolute disagreement of two rules. ``cost`` counts model evaluations (one particle of one datum). ``ess``
    is the effective number of draws and ``k_hat`` the Pareto tail index of the weights, if there are weights.

    ``scope`` is ``datum`` for ln p(y_i), ``joint`` for ln p(y) of the whole batch, and ``globals`` for
    E_q(θ)[ln p(y_i | θ)] over draws of the latents θ outside the data plate, which is no ln p(y_i); the
    values given each draw are ``by_draw``, [S, B]: all data share the draws, and so their errors.
    """

    method: str
    value: Tensor
    stderr: Tensor
    kind: str
    scope: str = "datum"
    draws: int = 0
    cost: int = 0
    ess: Tensor | None = None
    k_hat: Tensor | None = None
    resolution: Tensor | None = None
    notes: tuple[str, ...] = ()
    by_draw: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Bound.kind: expected one of {KINDS}, got {self.kind!r}")
        if self.scope not in SCOPES:
            raise ValueError(f"Bound.scope: expected one of {SCOPES}, got {self.scope!r}")
        if self.value.shape != self.stderr.shape:
            raise ValueError(
                f"Bound.stderr: expected shape {tuple(self.value.shape)}, as its value, got "
                f"{tuple(self.stderr.shape)}"
            )

    @property
    def error(self) -> Tensor:
        """The stated error of each value: the resolution error if there is one, else the standard error."""
        return self.stderr if self.resolution is None else self.resolution

    @property
    def mean(self) -> float:
        """Mean over the data."""
        return float(self.value.double().mean())

    @property
    def mean_error(self) -> float:
        """Stated error of the mean: Monte Carlo errors add in quadrature, resolution errors linearly, those
        of shared draws by draw."""
        if self.by_draw is not None:
            return float(_error_of_mean(self.by_draw.mean(1)))
        if self.resolution is not None:
            return float(self.resolution.double().mean())
        return float(self.stderr.double().square().sum().sqrt() / max(self.stderr.numel(), 1))

    def to_dict(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "method": self.method,
            "kind": self.kind,
            "scope": self.scope,
            "draws": self.draws,
            "cost": self.cost,
            "mean": self.mean,
            "mean_error": self.mean_error,
            "notes": list(self.notes),
        }
        for name in ("value", "stderr", "ess", "k_hat", "resolution"):
            part = getattr(self, name)
            row[name] = None if part is None else part.double().reshape(-1).tolist()
        row["by_draw"] = None if self.by_draw is None else self.by_draw.double().tolist()
        return row

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Bound:
        """The bound of :meth:`to_dict`; ValueError names a field that is missing or of another type."""
        row = records.checked("Bound", row, records.BOUND)
        named, draws = ("value", "stderr", "ess", "k_hat", "resolution"), row["by_draw"] or []
        sizes = {name: len(row[name]) for name in named if row[name] is not None}
        sizes.update((f"by_draw[{i}]", len(values)) for i, values in enumerate(draws))
        if len(set(sizes.values())) > 1 or (row["scope"] == "joint" and sizes["value"] != 1):
            raise ValueError(f"Bound: expected as many numbers as data, got {sizes} in scope {row['scope']}")
        parts = {name: records.numbers(row[name]) for name in named}
        if row["scope"] == "joint":
            parts = {name: None if part is None else part.reshape(()) for name, part in parts.items()}
        parts["by_draw"] = records.numbers(row["by_draw"])
        plain = {name: row[name] for name in ("method", "kind", "scope", "draws", "cost")}
        if row.get("by_draw") is not None:
            numbers = [[float(x) for x in values] for values in row["by_draw"]]
            parts["by_draw"] = torch.tensor(numbers, dtype=torch.float64)
        return cls(**plain, **parts, notes=tuple(row["notes"]))  # type: ignore[arg-type]


def _error_of_mean(draws: Tensor) -> Tensor:
    """Standard error of the mean over dimension 0; NaN for one draw."""
    if len(draws) == 1:
        return torch.full_like(draws[0], math.nan)
    return draws.double().std(0) / math.sqrt(len(draws))


@dataclass(frozen=True)
class Gap:
    """Reference minus bound, per datum, in nats. The errors of both are independent and combined in
    quadrature, unless both have values of the same draws of global latents: then differences are by draw."""

    method: str
    reference: str
    value: Tensor
    error: Tensor
    mean: float
    mean_error: float

    @classmethod
    def between(cls, reference: Bound, bound: Bound) -> Gap:
        error = torch.hypot(reference.error.double(), bound.error.double())
        mean_error = math.hypot(reference.mean_error, bound.mean_error)
        if reference.by_draw is not None and bound.by_draw is not None:
            apart = reference.by_draw - bound.by_draw
            error, mean_error = _error_of_mean(apart), float(_error_of_mean(apart.mean(1)))
        return cls(
            method=bound.method,
            reference=reference.method,
            value=reference.value.double() - bound.value.double(),
            error=error,
            mean=reference.mean - bound.mean,
            mean_error=mean_error,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "reference": self.reference,
            "mean": self.mean,
            "mean_error": self.mean_error,
            "value": self.value.tolist(),
            "error": self.error.tolist(),
        }


@dataclass(frozen=True)
class Decomposition(Json):
    """The gap of a guide, split: ``reference`` - ``amortized`` = (``reference`` - ``local``) + (``local`` -
    ``amortized``).

    ``local`` is the ELBO of the best member of the guide's family for each datum, ``amortized`` the guide's
    own, ``estimator`` the importance-weighted bound. :attr:`labels` give the direction in which each part
    errs.
    """

    name: str
    reference: Bound
    local: Bound
    amortized: Bound
    estimator: Bound

    @property
    def approximation(self) -> Gap:
        """The gap of the best member of the guide's family."""
        return Gap.between(self.reference, self.local)

    @property
    def amortization(self) -> Gap:
        """The loss of the encoder against the best member of its family."""
        return Gap.between(self.local, self.amortized)

    @property
    def total(self) -> Gap:
        return Gap.between(self.reference, self.amortized)

    @property
    def estimation(self) -> Gap:
        """The remaining gap of the importance-weighted bound."""
        return Gap.between(self.reference, self.estimator)

    def as_audit(self) -> Audit:
        """The four bounds side by side, with gaps relative to the reference."""
        rows = (self.reference, self.local, self.amortized, self.estimator)
        return Audit(self.name, rows, self.reference.method)

    @property
    def labels(self) -> dict[str, str]:
        """The direction in which each part errs in expectation.

        Imperfect local optimization overstates the approximation gap and understates the amortization gap; a
        lower reference understates every gap relative to it.
        """
        whole = {"exact": "unbiased"}.get(self.reference.kind, self.reference.kind)
        family = "upper" if self.reference.kind in ("exact", "upper") else "estimate"
        return {"total": whole, "approximation": family, "amortization": "lower", "estimation": whole}

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {self.local.value.numel()} data, gap in nats per datum against "
            f"{self.reference.method}"
        ]
        for part, label in self.labels.items():
            row = getattr(self, part)
            lines.append(
                f"{part:<14} {row.mean:9.4f} ± {short(row.mean_error):<8} {label:<9} {row.reference} - "
                f"{row.method}"
            )
        notes = [n for b in (self.reference, self.local, self.estimator) for n in b.notes]
        return "\n".join([*lines, *(f"note: {n}" for n in notes)])

    def to_dict(self) -> dict[str, Any]:
        bounds = {k: getattr(self, k).to_dict() for k in ("reference", "local", "amortized", "estimator")}
        parts = {k: {**getattr(self, k).to_dict(), "label": label} for k, label in self.labels.items()}
        return {"name": self.name, "unit": "nats", **bounds, **parts}


@dataclass(frozen=True)
class Sandwich(Json):
    """A lower and an upper bound on ln p(y) of data simulated from the model: their difference is the
    remaining uncertainty.

    Data are independent, chains of one datum are not: the gap's standard error is computed across the data.
    """

    name: str
    lower: Bound
    upper: Bound

    @property
    def gap(self) -> Tensor:
        """Upper minus lower bound of each datum, [N], in nats."""
        return self.upper.value.double() - self.lower.value.double()

    @property
    def mean_gap(self) -> float:
        return float(self.gap.mean())

    @property
    def mean_gap_error(self) -> float:
        """Standard error of the mean gap across the data; NaN for one datum."""
        return float(self.gap.std() / math.sqrt(len(self.gap))) if len(self.gap) > 1 else math.nan

    def as_audit(self) -> Audit:
        """The two bounds side by side; neither is a reference."""
        note = (
            f"simulated data; upper - lower = {self.mean_gap:.4f} ± {short(self.mean_gap_error)} across data"
        )
        return Audit(self.name, (self.lower, self.upper), None, (note,))

    def __str__(self) -> str:
        lines = [f"{self.name}: {len(self.gap)} simulated data, nats per datum"]
        for bound in (self.upper, self.lower):
            lines.append(f"{bound.kind}  {bound.mean:.4f}  ({bound.method}, {bound.cost:,} evaluations)")
        lines.append(
            f"gap    {self.mean_gap:.4f} ± {short(self.mean_gap_error)} (standard error across data)"
        )
        return "\n".join([*lines, *(f"note: {n}" for b in (self.lower, self.upper) for n in b.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": "nats",
            "lower": self.lower.to_dict(),
            "upper": self.upper.to_dict(),
            "mean_gap": self.mean_gap,
            "mean_gap_error": self.mean_gap_error,
        }


@dataclass(frozen=True)
class Divergence:
    """KL(q(θ) || p(θ)) of the latents θ outside the data plate, in nats; it counts once for all ``num_data``
    data, of which ``size`` were audited. ``by_draw`` is ln q(θ) - ln p(θ) of each draw, [S]."""

    by_draw: Tensor
    num_data: int
    size: int

    @property
    def value(self) -> float:
        return float(self.by_draw.mean())

    @property
    def error(self) -> float:
        return float(_error_of_mean(self.by_draw))

    def joint(self, bound: Bound) -> Bound:
        """Σ_i row_i - KL, a lower bound on ln p of all data where ``bound``, given the same draws, is one on
        E ln p(y_i | θ); extrapolated from a subset."""
        if bound.scope != "globals" or bound.kind == "upper":
            raise ValueError(
                f"bound: expected a lower row given the globals, got {bound.method!r}, {bound.kind}, of "
                f"scope {bound.scope!r}"
            )
        rows = bound.value[None] if bound.by_draw is None else bound.by_draw
        draws = self.num_data / self.size * rows.double().sum(1) - self.by_draw
        notes = () if self.num_data == self.size else (f"extrapolated from {self.size} data",)
        return Bound(
            f"{bound.method}, Σ - KL",
            draws.mean(),
            _error_of_mean(draws),
            "lower",
            "joint",
            draws=len(draws),
            cost=bound.cost,
            notes=notes,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"by_draw": self.by_draw.tolist(), "num_data": self.num_data, "size": self.size}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Divergence:
        row = records.checked("Divergence", row, records.DIVERGENCE)
        return cls(records.numbers(row["by_draw"]), row["num_data"], row["size"])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Audit(Json):
    """Bounds on the evidence of the same data side by side, and their gaps to ``reference``.

    ``print(audit)`` is a table; ``reference`` is the method that gaps are relative to, ``None`` if there are
    only lower bounds. ``notes`` say what was not possible and why. ``divergence`` belongs to rows given the
    latents outside the data plate.
    """

    name: str
    bounds: tuple[Bound, ...]
    reference: str | None = None
    notes: tuple[str, ...] = ()
    divergence: Divergence | None = None
    gaps: tuple[Gap, ...] = field(init=False)

    def __post_init__(self) -> None:
        gaps: tuple[Gap, ...] = ()
        if self.reference is not None:
            anchor = self[self.reference]
            gaps = tuple(Gap.between(anchor, b) for b in self.bounds if b.method != self.reference)
        object.__setattr__(self, "gaps", gaps)

    def __getitem__(self, method: str) -> Bound:
        for bound in self.bounds:
            if bound.method == method:
                return bound
        raise KeyError(f"no row {method!r} in this audit, which has {[b.method for b in self.bounds]}")

    @property
    def num_data(self) -> int:
        return max(b.value.numel() for b in self.bounds)

    def in_units(self, log_scale: Tensor) -> Audit:
        """The audit of standardized data as that of the raw ones, ln p(raw) = ln p(y) - ``log_scale``, where
        ``log_scale`` [N] is ln |d raw / d y| of each datum, in nats; gaps stay as they are."""
        shift = log_scale.double()
        moved = []
        for b in self.bounds:
            if b.scope == "datum" and b.value.shape != shift.shape:
                raise ValueError(
                    f"log_scale: expected one number for each of {b.value.numel()} data, got shape "
                    f"{tuple(shift.shape)}"
                )
            less = (shift if b.scope == "datum" else shift.sum()).to(b.value.device)
            moved.append(replace(b, value=b.value.double() - less))
        return Audit(self.name, tuple(moved), self.reference, self.notes)

    def __str__(self) -> str:
        gaps = {g.method: g for g in self.gaps}
        given = all(b.scope == "globals" for b in self.bounds)
        quantity = "E ln p(y|θ)" if given else "ln p(y)"
        head = ["method", "kind", quantity, "error", "gap", "error", "ESS", "k-hat", "evaluations"]
        rows = [head]
        for b in sorted(self.bounds, key=lambda b: -b.mean):
            gap = gaps.get(b.method)
            rows.append(
                [
                    b.method,
                    b.kind + {"datum": "", "joint": ", joint", "globals": ", given θ"}[b.scope],
                    f"{b.mean:.4f}",
                    short(b.mean_error),
                    "" if gap is None else f"{gap.mean:.4f}",
                    "" if gap is None else short(gap.mean_error),
                    "" if b.ess is None else f"{float(b.ess.double().mean()):.1f}/{b.draws}",
                    ""
                    if b.k_hat is None
                    else f"{float(b.k_hat.double().nanmedian()):.2f}".replace("nan", "?"),
                    f"{b.cost:,}",
                ]
            )
        widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
        lines = [
            "  ".join(
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        ]
        rule = "-" * max(map(len, lines))
        joint = all(b.scope == "joint" for b in self.bounds)
        what = (
            "one joint value, nats"
            if joint
            else f"{self.num_data} data, nats per datum (means over the data)"
        )
        title = f"{self.name}: {what}"
        tail = [f"note: {n}" for n in self.notes]
        tail += [f"note: {b.method}: {n}" for b in self.bounds for n in b.notes]
        if self.divergence is not None:
            tail = [*self._once(self.divergence), *tail]
        if self.reference is not None:
            tail.insert(0, f"gap = {self.reference} - row; ESS is the mean, k-hat the median over the data")
        return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, *tail])

    def _once(self, divergence: Divergence) -> list[str]:
        """What counts once for all data: the divergence of global latents, and the joint bounds."""
        total, count = divergence.value, divergence.num_data
        lines = [
            f"KL(q(θ) || p(θ)) = {total:.4f} ± {short(divergence.error)} nats, once for {count} data "
            f"({total / count:.4f} per datum)"
        ]
        lower = [divergence.joint(b) for b in self.bounds if b.kind == "lower" and b.by_draw is not None]
        if lower:
            rows = ", ".join(f"{b.method.split(',')[0]} {b.mean:.4f} ± {short(b.mean_error)}" for b in lower)
            lines.append(f"lower bounds on ln p of all data, sum of rows - KL: {rows}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "reference": self.reference,
            "unit": "nats",
            "notes": list(self.notes),
            "bounds": [b.to_dict() for b in self.bounds],
            "gaps": [g.to_dict() for g in self.gaps],
            "divergence": None if self.divergence is None else self.divergence.to_dict(),
        }

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Audit:
        """The audit of :meth:`to_dict`; ValueError names a field that is missing or of another type."""
        row = records.checked("Audit", row, records.AUDIT)
        bounds = tuple(map(Bound.from_dict, row["bounds"]))
        methods, sizes = [b.method for b in bounds], {b.value.numel() for b in bounds if b.scope != "joint"}
        if row["reference"] not in (None, *methods):
            raise ValueError(f"Audit.reference: expected one of {methods} or null, got {row['reference']!r}")
        if len(sizes) > 1:
            raise ValueError(f"Audit.bounds: expected one number of data, got {sorted(sizes)}")
        once = None if row["divergence"] is None else Divergence.from_dict(row["divergence"])
        return cls(row["name"], bounds, row["reference"], tuple(row["notes"]), once)


def short(error: float) -> str:
    return (
        "?"
        if math.isnan(error)
        else "0"
        if error == 0
        else f"{error:.4f}"
        if error >= 5e-5
        else f"{error:.0e}"
    )


def _finite(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _finite(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(v) for v in node]
    return str(node) if isinstance(node, float) and not math.isfinite(node) else node


@dataclass(frozen=True)
class Run:
    """The record of a training run: one row of metrics per epoch, and the directory of its files, if any.

    ``metrics`` rows are ``{"epoch", "step", "loss", ...}``, the loss in nats per datum; ``stopped`` is the
    reason it ended (``"epochs"``, ``"early"`` for the validation bound, ``"converged"`` for EM,
    ``"budget"``, ``"interrupted"``); ``seconds`` counts this process only.
    """

    metrics: tuple[dict[str, Any], ...]
    stopped: str
    seconds: float
    path: Path | None = None

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.metrics]

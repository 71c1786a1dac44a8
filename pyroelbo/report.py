"""Figures and exports of results and plain arrays; this module sees no models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroelbo.numerics import bits_per_dim
from pyroelbo.results import Audit, Bound, Decomposition, RatePoint, Run, Sandwich, Terms
from pyroelbo.results.diagnostics import Calibration, Diagnostics

__all__ = [
    "bits_table",
    "images",
    "plot",
    "plot_calibration",
    "plot_curve",
    "plot_holes",
    "plot_latents",
    "plot_layers",
    "plot_planes",
    "plot_rate_distortion",
    "plot_sequences",
    "sharpness",
    "to_arviz",
]

_COLOURS = {"exact": "black", "estimate": "black", "lower": "tab:blue", "upper": "tab:red"}
_MARKERS = {"exact": "o", "estimate": "o", "lower": "^", "upper": "v"}
_SHADES = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown")


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def plot(
    result: Audit | Decomposition | Sandwich, path: str | Path, decomposition: Decomposition | None = None
) -> Path:
    """Plot lower bounds, exact values and upper bounds: each datum on the left, means on the right. Returns
    the path.

    Triangles point towards ln p(y): up from a lower bound, down from an upper bound. With a reference the
    left panel shows value - reference; a joint audit has no left panel. A Decomposition, alone or with an
    audit, adds the parts of the gap.
    """
    audit = result if isinstance(result, Audit) else result.as_audit()
    parts = result if isinstance(result, Decomposition) else decomposition
    rows = [b for b in audit.bounds if b.scope != "joint"]
    columns = bool(rows) + 1 + (parts is not None)
    figure, axes = _figure(5.2 * columns, 4.2, columns)
    panels = list(np.atleast_1d(axes))
    if rows:
        _each_datum(panels.pop(0), audit, rows)
    _means(panels.pop(0), audit)
    if parts is not None:
        _parts(panels.pop(0), parts)
    return _save(figure, path)


def _each_datum(axis: Any, audit: Audit, rows: list[Bound]) -> None:
    anchor = None if audit.reference is None else audit[audit.reference]
    base = (anchor or rows[0]).value.double()
    order = base.argsort().cpu()
    x, shade = np.arange(len(order)), 0
    for bound in rows:
        if anchor is not None and bound.method == anchor.method:
            axis.axhline(0.0, color="black", lw=1, label=f"{bound.method} ({bound.kind})")
            continue
        value = bound.value.double() - (0.0 if anchor is None else base)
        axis.errorbar(
            x,
            value.cpu()[order],
            yerr=_bars(bound.error).cpu()[order],
            fmt=_MARKERS[bound.kind],
            ms=3.5,
            lw=0.6,
            alpha=0.7,
            color=_SHADES[shade % len(_SHADES)],
            label=f"{bound.method} ({bound.kind})",
        )
        shade += 1
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("datum, from least to most likely")
    axis.set_ylabel("nats" if anchor is None else f"value - {anchor.method}, nats")
    axis.legend(fontsize=8)
    axis.set_title("each datum")


def _means(axis: Any, audit: Audit) -> None:
    rows = sorted(audit.bounds, key=lambda b: b.mean)
    for i, bound in enumerate(rows):
        error = bound.mean_error
        axis.errorbar(
            bound.mean,
            i,
            xerr=0 if math.isnan(error) else 2 * error,
            fmt=_MARKERS[bound.kind],
            ms=7,
            capsize=3,
            color=_COLOURS[bound.kind],
        )
        axis.annotate(
            f"{bound.mean:.2f}",
            (bound.mean, i),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
        )
        if bound.kind == "exact":
            axis.axvline(bound.mean, color="black", lw=0.8, zorder=0)
    axis.set_yticks(range(len(rows)), [f"{b.method}\n{b.kind}" for b in rows], fontsize=8)
    axis.set_ylim(-0.6, len(rows) - 0.3)
    axis.margins(x=0.15)
    joint = all(b.scope == "joint" for b in rows)
    quantity = "E ln p(y | θ)" if all(b.scope == "globals" for b in rows) else "ln p(y)"
    axis.set_xlabel(f"{'joint' if joint else 'mean'} {quantity}, nats (bars: two standard errors)")
    axis.set_title(audit.name if joint else f"{audit.name}, {audit.num_data} data")


def _parts(axis: Any, parts: Decomposition) -> None:
    labels = {"upper": "at most", "lower": "at least", "unbiased": "", "estimate": "about"}
    start = 0.0
    for i, name in enumerate(("approximation", "amortization", "total", "estimation")):
        gap = getattr(parts, name)
        left = start if name == "amortization" else 0.0
        error = 0 if math.isnan(gap.mean_error) else 2 * gap.mean_error
        axis.barh(-i, gap.mean, left=left, xerr=error, color=_SHADES[i], alpha=0.8, capsize=3)
        text = f"{labels[parts.labels[name]]} {gap.mean:.3f}".strip()
        axis.annotate(
            text,
            (left + gap.mean + error, -i),
            textcoords="offset points",
            xytext=(5, 0),
            va="center",
            fontsize=8,
        )
        start = gap.mean if name == "approximation" else start
    names = [
        "the family\n(approximation)",
        "the encoder\n(amortization)",
        "ELBO, total",
        parts.estimator.method,
    ]
    axis.set_yticks([0, -1, -2, -3], names, fontsize=8)
    axis.margins(x=0.25)
    axis.set_xlabel(f"gap to {parts.reference.method}, nats per datum")
    axis.set_title("who is to blame")


def _bars(error: Tensor) -> Tensor:
    return error.double().nan_to_num(nan=0.0)


def plot_curve(run: Run, path: str | Path) -> Path:
    """Plot the loss per epoch and the validation bound, if any, in nats per datum. Returns the path."""
    figure, axis = _figure(5.5, 3.6)
    epochs = [row["epoch"] for row in run.metrics]
    axis.plot(epochs, run.losses, label="training loss")
    for name in dict.fromkeys(k for row in run.metrics for k in row if k.startswith("valid_")):
        bound = [-row.get(name, math.nan) for row in run.metrics]
        axis.plot(epochs, bound, label=f"validation, -{name.removeprefix('valid_')}")
    axis.set_xlabel("epoch")
    axis.set_ylabel("nats per datum")
    if len(epochs) > 5:
        # The first epochs would hide the rest.
        tail = [v for v in run.losses[len(epochs) // 10 :] if math.isfinite(v)]
        low, high = min(run.losses), max(tail)
        axis.set_ylim(low - 0.1 * (high - low) - 1e-9, high + 0.2 * (high - low) + 1e-9)
    axis.legend(fontsize=8)
    return _save(figure, path)


def plot_rates(layers: Mapping[str, Any], path: str | Path) -> Path:
    """Plot the rate of every latent site of each pair, a bar in nats per datum.

    ``layers`` are what ``evidence.site_gaps`` found, by name. Returns the path.
    """
    figure, axis = _figure(6.4, 3.6)
    width = 0.8 / len(layers)
    # z_2 before z_10; a pair may have fewer layers than another
    sites = sorted({site for found in layers.values() for site in found.rates}, key=lambda s: (len(s), s))
    for i, (name, found) in enumerate(layers.items()):
        own = [site for site in sites if site in found.rates]
        rates = [float(found.rates[site].value) for site in own]
        errors = [float(found.rates[site].stderr) for site in own]
        place = np.array([sites.index(site) for site in own]) + (i - (len(layers) - 1) / 2) * width
        bars = axis.bar(place, rates, width, yerr=errors, label=name, color=_SHADES[i % len(_SHADES)])
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axis.set_xticks(range(len(sites)), sites)
    axis.axhline(0.0, color="black", lw=0.8)
    axis.set_ylabel("E ln q - ln p, nats per datum")
    axis.legend(fontsize=8)
    return _save(figure, path)


def plot_layers(layers: Mapping[str, Tensor], path: str | Path) -> Path:
    """Plot a diffusion's bound by layer: minus the terms of each pair against their place, data left, prior
    right, and below their sum from the left.

    ``layers`` are the results of a pair's ``by_layer``, [T + 1], nats per datum, by name. Returns the path.
    """
    figure, axes = _figure(6.4, 5.0, rows=2)
    for i, (name, terms) in enumerate(layers.items()):
        cost = -terms.double().cpu().numpy()
        place = np.arange(len(cost)) / (len(cost) - 1)
        colour = _SHADES[i % len(_SHADES)]
        axes[0].plot(place, cost, ".-", lw=0.8, ms=4, color=colour, label=name)
        axes[1].plot(place, cost.cumsum(), color=colour, label=f"{name}, in all {cost.sum():.2f}")
    axes[0].set_yscale("symlog", linthresh=1e-2)
    axes[0].set_ylabel("nats per datum and term")
    axes[1].set_ylabel("sum from the left, nats")
    axes[1].set_xlabel("t / T: E -ln p(y | z_1) at 0, KL terms, the prior's at 1")
    for axis in axes:
        axis.axhline(0.0, color="black", lw=0.8)
        axis.legend(fontsize=8)
    return _save(figure, path)


def images(
    rows: Sequence[Tensor],
    shape: Sequence[int],
    path: str | Path,
    titles: Sequence[str] | None = None,
    light: bool = False,
) -> Path:
    """Plot rows of images, a tensor [n, H·W] (1 is ink, or ``light``) or [n, H, W, 3] (colours) in [0, 1] for
    each row, with a title each. Returns the path."""
    each = 0.62 if rows[0].dim() == 2 else 1.6
    figure, axes = _figure(each * max(map(len, rows)) + 1.2, (each + 0.1) * len(rows))
    _pictures(axes, _as_ink(rows, light), shape, titles)
    return _save(figure, path)


def _as_ink(rows: Sequence[Tensor], light: bool) -> list[Tensor]:
    return [1 - row if light and row.dim() == 2 else row for row in rows]


def _pictures(axes: Any, rows: Sequence[Tensor], shape: Sequence[int], titles: Sequence[str] | None) -> None:
    height, width = shape
    columns = max(map(len, rows))
    canvas = np.ones(((height + 1) * len(rows) - 1, (width + 1) * columns - 1, 3))
    for i, row in enumerate(rows):
        pictures = row.detach().cpu().double()
        pictures = pictures if row.dim() == 4 else (1 - pictures).reshape(-1, height, width, 1)
        for j, picture in enumerate(pictures.numpy()):
            top, left = i * (height + 1), j * (width + 1)
            canvas[top : top + height, left : left + width] = picture
    axes.imshow(canvas, interpolation="nearest")
    axes.set_anchor("W")  # in the middle of spare width the layout would leave too little room for titles
    axes.set_xticks([])
    axes.set_yticks([i * (height + 1) + height / 2 for i in range(len(rows))], titles or [""] * len(rows))
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def sharpness(pictures: Tensor, shape: Sequence[int]) -> float:
    """The variance of the discrete Laplacian (right + left + above + below - 4 · pixel) of pictures [n, H·W],
    over their inner pixels: small for blurred ones. Source: Pech-Pacheco et al. (2000)."""
    y = pictures.detach().double().reshape(-1, *shape)
    inner = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * inner
    return float(laplacian.var(correction=0))


def plot_rate_distortion(
    curves: Mapping[str, Sequence[RatePoint]],
    path: str | Path,
    bound: tuple[Sequence[float], Sequence[float]] | None = None,
    sharp: float | None = None,
    rows: Sequence[Tensor] = (),
    shape: Sequence[int] = (),
    titles: Sequence[str] | None = None,
) -> Path:
    """Plot distortion against rate, a curve for each name: lines through the rates of the priors, crosses at
    the sizes of the files. Returns the path.

    Args:
        curves: points by name, in any order.
        path: the figure's file.
        bound: bits per number and mean squared errors of the rate–distortion function, if it is known.
        sharp: the sharpness of the data; with it a second panel shows that of what is decoded.
        rows: pictures [n, H·W] in [0, 1] below the curves, a row each, with ``titles``.
        shape: of these pictures.
        titles: of the rows.
    """
    from matplotlib.figure import Figure

    columns, below = 1 if sharp is None else 2, 0.6 * len(rows)
    figure = Figure(figsize=(4.6 * columns, 3.6 + below), layout="constrained")
    grid = figure.add_gridspec(2 if rows else 1, columns, height_ratios=[3.6, below] if rows else None)
    panels = {"distortion": (figure.add_subplot(grid[0, 0]), "mean squared error")}
    if bound is not None:
        panels["distortion"][0].plot(*bound, color="black", linewidth=1, label="R(D)")
    if sharp is not None:
        panels["sharpness"] = figure.add_subplot(grid[0, 1]), "variance of the Laplacian"
        panels["sharpness"][0].axhline(sharp, color="black", linewidth=1, label="data")
    for quantity, (axis, label) in panels.items():
        for i, (name, points) in enumerate(curves.items()):
            ordered, colour = sorted(points, key=lambda point: point.bits), _SHADES[i % len(_SHADES)]
            values = [getattr(point, quantity) for point in ordered]
            axis.plot([point.bits for point in ordered], values, ".-", color=colour, label=name)
            axis.plot([point.file_bits for point in ordered], values, "x", color=colour)
        axis.set_xlabel("rate, bits per number (x: file)")
        axis.set_ylabel(label)
        axis.legend(fontsize=8)
    panels["distortion"][0].set_yscale("log")
    if rows:
        _pictures(figure.add_subplot(grid[1, :]), rows, shape, titles)
    return _save(figure, path)


def plot_sequences(
    rows: Sequence[Tensor],
    path: str | Path,
    titles: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> Path:
    """Plot sequences [T, D] below each other: a line per coordinate, of which ``names`` are the labels, or an
    image of more than six. Returns the path."""
    figure, axes = _figure(8, 1.5 * len(rows), 1, len(rows))
    longest = max(len(row) for row in rows)
    for i, (axis, row) in enumerate(zip(np.atleast_1d(axes), rows, strict=True)):
        values = row.detach().cpu().double().numpy()
        if values.shape[-1] > 6:
            axis.imshow(values.T, cmap="gray_r", aspect="auto", interpolation="nearest")
        else:
            axis.plot(values, marker=".", label=list(names) or None)
            if names and i == 0:
                axis.legend(fontsize=8)
        axis.set_xlim(-0.5, longest - 0.5)
        axis.set_xticks([])
        if titles is not None:
            axis.set_title(titles[i], loc="left", fontsize=9)
    axis.set_xlabel(f"step, of {longest}")
    return _save(figure, path)


def plot_latents(
    mean: Tensor,
    labels: Tensor | None,
    plane: Tensor | None,
    shape: Sequence[int],
    extent: float,
    path: str | Path,
) -> Path:
    """Plot a two-dimensional latent plane: posterior means [N, 2], coloured by label, and decoded images [n²,
    H·W], if there are any.
    """
    figure, axes = _figure(10 if plane is not None else 5.6, 4.8, 2 if plane is not None else 1)
    left, *others = np.atleast_1d(axes)
    points = mean.detach().cpu()
    if labels is None:
        left.scatter(points[:, 0], points[:, 1], s=8)
    else:
        from matplotlib import colormaps

        classes = int(labels.max()) + 1
        colours = {"cmap": colormaps["tab10"].resampled(classes), "vmin": -0.5, "vmax": classes - 0.5}
        drawn = left.scatter(points[:, 0], points[:, 1], c=labels.cpu(), s=8, **colours)
        figure.colorbar(drawn, ax=left, ticks=range(classes))
    left.set_title("posterior means")
    left.set_aspect("equal")
    if plane is not None:
        _tiles(others[0], plane, shape, extent)
    for axis in (left, *others):
        axis.set_xlabel("z[0]")
        axis.set_ylabel("z[1]")
    return _save(figure, path)


def _tiles(axis: Any, plane: Tensor, shape: Sequence[int], extent: float) -> None:
    n, (height, width) = math.isqrt(len(plane)), shape
    tiles = plane.detach().cpu().double().reshape(n, n, height, width).numpy()
    framed = np.zeros((n, n, height + 1, width + 1))
    framed[:, :, :height, :width] = tiles
    canvas = np.block([[framed[i, j] for j in range(n)] for i in reversed(range(n))])
    axis.imshow(1 - canvas, cmap="gray", vmin=0, vmax=1, extent=(-extent, extent, -extent, extent))
    axis.set_title("decoded from the plane")


def plot_holes(diagnostics: Diagnostics, path: str | Path) -> Path:
    """Where the prior has mass and the codes have none, in two latent dimensions: ln p(z) - ln q(z) at draws
    of the prior, and draws of the codes.

    Raises ValueError for latents of other dimensions.
    """
    points = diagnostics.prior_draws.cpu()
    if points.shape[-1] != 2:
        raise ValueError(
            f"plot_holes takes two latent dimensions, {diagnostics.name} has {points.shape[-1]}: "
            "diagnostics(pair, y, site=...) looks at one site"
        )
    excess, codes = diagnostics.prior_excess.cpu(), diagnostics.guide_draws.cpu()
    figure, (left, right) = _figure(10, 4.4, 2)
    order = excess.argsort()
    drawn = left.scatter(
        *points[order].T, c=excess[order].clamp(-6, 6), cmap="coolwarm", s=9, vmin=-6, vmax=6, linewidths=0
    )
    figure.colorbar(drawn, ax=left, label="ln p(z) - ln q(z), nats (cut at ±6)")
    left.set_title(f"draws of the prior: {float(diagnostics.holes):.1%} in holes (above 3)")
    right.scatter(*codes.T, s=5, alpha=0.5, color="tab:blue", linewidths=0)
    right.set_title(f"codes: draws of q(z), {diagnostics.num_data} data")
    everything = torch.cat([points, codes])
    low, high = everything.amin(0).tolist(), everything.amax(0).tolist()
    for axis in (left, right):
        axis.set(xlim=(low[0] - 0.2, high[0] + 0.2), ylim=(low[1] - 0.2, high[1] + 0.2))
        axis.set(xlabel="z[0]", ylabel="z[1]", aspect="equal")
    return _save(figure, path)


def plot_planes(planes: Mapping[str, tuple[Tensor, Tensor, float]], path: str | Path) -> Path:
    """For each name ln p(z) and ln q(z) on a square grid [n, n] of the latent plane with rows along z[1], and
    the side's half: both densities on [-half, half]², and below them ln p - ln q with the holes, above 3,
    outlined.

    The ratio is left white where both densities are below e^-6 of their highest values on the grid.
    """
    figure, axes = _figure(2.3 * len(planes) + 1.2, 7.2, len(planes), 3)
    axes = np.asarray(axes).reshape(3, len(planes))
    shown = None
    for column, (name, (log_p, log_q, half)) in zip(axes.T, planes.items(), strict=True):
        p, q = (np.asarray(t.detach().cpu().double()) for t in (log_p, log_q))
        common = {"origin": "lower", "extent": (-half, half, -half, half), "interpolation": "nearest"}
        column[0].imshow(np.exp(p), cmap="Greys", **common)
        column[1].imshow(np.exp(q), cmap="Greys", **common)
        empty = (p < p.max() - 6) & (q < q.max() - 6)
        ratio = np.where(empty, np.nan, np.clip(p - q, -6, 6))
        shown = column[2].imshow(ratio, cmap="coolwarm", vmin=-6, vmax=6, **common)
        if np.nanmax(ratio) > 3 > np.nanmin(ratio):
            ticks = np.linspace(-half, half, len(p))
            column[2].contour(ticks, ticks, ratio, levels=[3], colors="black", linewidths=0.8)
        column[0].set_title(f"{name}\nside ±{half:.1f}", fontsize=10)
        for axis in column:
            axis.set(xticks=[], yticks=[])
    rows = ("prior p(z)", "codes q(z)", "ln p - ln q\nholes outlined, > 3")
    for axis, label in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(label)
    if shown is not None:
        figure.colorbar(shown, ax=axes[2].tolist(), label="nats (cut at ±6)")
    return _save(figure, path)


def plot_calibration(calibration: Calibration, path: str | Path, most: int = 6) -> Path:
    """Plot rank histograms of the ``most`` quantities with the smallest p-values, with the band that contains
    99 % of the bins of a calibrated guide. Returns the path.
    """
    worst = calibration.p_values.argsort()[:most].tolist()
    columns = min(3, len(worst))
    rows = math.ceil(len(worst) / columns)
    figure, axes = _figure(3.5 * columns, 2.6 * rows, columns, rows)
    bins, size = calibration.counts.shape[1], calibration.num_data
    expected = size / bins
    width = 2.576 * math.sqrt(expected * (1 - 1 / bins))
    for axis in np.atleast_1d(axes).flat[len(worst) :]:
        axis.set_visible(False)
    for axis, i in zip(np.atleast_1d(axes).flat, worst, strict=False):
        edges = (np.arange(bins) + 0.5) / bins
        axis.axhspan(max(0.0, expected - width), expected + width, color="0.85", lw=0)
        axis.axhline(expected, color="black", lw=0.8)
        axis.bar(edges, calibration.counts[i].tolist(), width=0.9 / bins, color="tab:blue", alpha=0.8)
        axis.set_title(f"{calibration.quantities[i]}: p = {float(calibration.p_values[i]):.2g}", fontsize=9)
        axis.set_xlim(0, 1)
        axis.set_xlabel(f"rank / {calibration.draws}")
    return _save(figure, path)


def bits_table(audit: Audit, dims: float, unit: str = "dim") -> str:
    """Table of the audit's means in bits per dimension (or other ``unit``) of data with ``dims`` of them on
    average (for probabilities, not densities).
    """
    lines = [f"{'method':<12}  {'kind':<8}  bits/{unit}"]
    for bound in sorted(audit.bounds, key=lambda b: -b.mean):
        lines.append(f"{bound.method:<12}  {bound.kind:<8}  {bits_per_dim(bound.mean, dims):8.4f}")
    return "\n".join(lines)


def to_arviz(result: Audit | Decomposition | Sandwich, terms: Terms | None = None) -> Any:
    """A result as arviz data: an ``InferenceData`` on arviz below 1, a ``DataTree`` from 1 on.

    Group ``bounds`` has for every row its ``value`` and ``error``, [estimator, datum] (joint ones
    [estimator]), with kind, draws and cost as coordinates. ``terms``, the guide's draws of
    :func:`pyroelbo.evidence.terms` on the same data, add ``posterior`` (the latents drawn), ``sample_stats``
    with ``log_p`` = ln p(y, z) and ``log_q`` = ln q(z | y), and ``log_likelihood`` = ln p(y | z) by observed
    site, [chain, draw, datum]. No bound is exported as a likelihood.
    """
    from importlib.metadata import version

    import xarray

    audit = result if isinstance(result, Audit) else result.as_audit()
    joint = all(b.scope == "joint" for b in audit.bounds)
    rows = [b for b in audit.bounds if joint or b.scope != "joint"]
    dims = ("estimator",) if joint else ("estimator", "datum")
    coordinates = {
        "estimator": [b.method for b in rows],
        "kind": ("estimator", [b.kind for b in rows]),
        "draws": ("estimator", [b.draws for b in rows]),
        "cost": ("estimator", [b.cost for b in rows]),
    }
    data = {} if joint else {"datum": np.arange(audit.num_data)}
    groups = {
        "bounds": xarray.Dataset(
            {name: (dims, np.stack([_array(getattr(b, name)) for b in rows])) for name in ("value", "error")},
            coords={**coordinates, **data},
            attrs={"unit": "nats", "reference": audit.reference or "none", "name": audit.name},
        )
    }
    if terms is not None:
        size = terms.log_weight.shape[1]
        if not joint and size != audit.num_data:
            raise ValueError(f"terms are of {size} data, the audit of {audit.num_data}")
        groups |= _draws(terms)
    if int(version("arviz").split(".")[0]) < 1:
        from arviz import InferenceData

        return InferenceData(**groups)
    return xarray.DataTree.from_dict({f"/{k}": v for k, v in groups.items()})


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _draws(terms: Terms) -> dict[str, Any]:
    import xarray

    draws, size = terms.log_weight.shape
    plain = {"chain": [0], "draw": np.arange(draws), "datum": np.arange(size)}

    def table(values: dict[str, Tensor]) -> Any:
        found = {k: (("chain", "draw", "datum"), _array(v)[None]) for k, v in values.items()}
        return xarray.Dataset(found, coords=plain, attrs={"unit": "nats", "draws_of": "guide"})

    latents = {}
    for name, value in terms.latents.items():
        inner = tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))
        latents[name] = (("chain", "draw", *inner), _array(value)[None])
    return {
        "posterior": xarray.Dataset(
            latents, coords={"chain": [0], "draw": np.arange(draws)}, attrs={"draws_of": "guide"}
        ),
        "sample_stats": table({"log_p": terms.log_joint, "log_q": terms.log_proposal}),
        "log_likelihood": table({k: v for k, v in terms.log_model.items() if k in terms.observed}),
    }

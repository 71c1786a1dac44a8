"""Data, samples and runs as lines, tables and pictures, by the kind of data."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo import files, report
from pyroelbo.batch import Batch
from pyroelbo.data import Dataset, from_ycocg
from pyroelbo.pair import Pair
from pyroelbo.results import Audit, Run

__all__ = ["configuration", "curve", "decoded", "in_other_units", "result", "samples", "told"]

_LINES = 8  # of the samples that are printed
_SHOWN = 16  # pictures in a row


def told(found: Dataset) -> str:
    """What the data are, in one line."""
    sizes = ", ".join(f"{batches.size(batch)} {split}" for split, batch in found.splits.items())
    shape = "x".join(map(str, found.shape))
    parts = [f"of {shape} {'variables' if found.kind == 'formula' else 'numbers'}" if shape else ""]
    parts += [f"{len(found.names)} clauses" if found.kind == "formula" else ""]
    parts += [f"up to {found.steps} steps" if found.steps > 1 else ""]
    parts += [f"{found.levels} {'labels' if found.kind == 'labelled' else 'values'}" if found.levels else ""]
    parts += [f"given one of {found.classes} classes" if found.classes else ""]
    parts += ["standardized (audit reports nats in the data's own units)" if found.scale else ""]
    return f"{found.title}: {found.kind} " + ", ".join(p for p in parts if p) + f"; {sizes}"


def result(model: str, found: Dataset, run: Run) -> str:
    """How the training ended, in one line."""
    if not run.metrics:
        return f"{model} on {found.title}: no epoch was finished"
    last = run.metrics[-1]
    bound = "".join(f", validation {k[6:]} {v:.3f} nats" for k, v in last.items() if k.startswith("valid_"))
    epochs = f"{last['epoch']} {'epoch' if last['epoch'] == 1 else 'epochs'}"
    stopped = "" if run.stopped == "epochs" else f", stopped: {run.stopped}"
    scaled = " (of standardized data)" if found.scale else ""
    return f"{model} on {found.title}: loss {last['loss']:.3f} nats{bound}{scaled} after {epochs}{stopped}"


def in_other_units(result: Audit, found: Dataset, y: Batch, settings: Mapping[str, Any]) -> str:
    """An audit's means as their kind is counted: bits per number or symbol, the models of a formula."""
    if found.kind == "formula":
        return _counts(result, found.dims, float(settings.get("weights", 0.5)))
    return report.bits_table(result, found.numbers(y), "symbol" if found.about.symbols else "dim")


def _counts(result: Audit, variables: int, weight: float) -> str:
    """ln p(y) + n ln 2, the logarithm of the number of models, if all assignments have the same weight."""
    if weight != 0.5:
        return f"ln p(y) is the logarithm of the count of models with weight {weight:g} for true"
    lines = [f"{'method':<12}  {'kind':<8}  ln(models), {variables} ln 2 above ln p(y)"]
    for bound in sorted(result.bounds, key=lambda b: -b.mean):
        lines.append(f"{bound.method:<12}  {bound.kind:<8}  {bound.mean + variables * math.log(2):10.6f}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- pictures


def _scaled(found: Dataset, y: Tensor) -> Tensor:
    """Pictures of the data set's kind in [0, 1]."""
    return (y / max(found.levels - 1, 1)).clamp(0, 1)


def decoded(pair: Pair, found: Dataset, y: Batch, labels: Tensor | None, path: Path) -> list[Path]:
    """Reconstructions, for pairs that decode pictures, and the latent plane: the files written."""
    if not isinstance(y, Tensor):
        return []
    written, pictures = [], len(found.shape) == 2
    means = pair.reconstruct(y[:_SHOWN])
    if means is not None and pictures:
        rows, file = [_scaled(found, y[:_SHOWN]), means], path / "reconstructions.png"
        written.append(report.images(rows, found.shape, file, ["data", "decoded"], found.light))
    plane = pair.latent_plane(y)
    if plane is not None:
        codes, decode = plane
        ticks = torch.linspace(-2.5, 2.5, 15).to(codes)
        grid = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).reshape(-1, 2)
        with torch.no_grad():
            tiles = decode(grid) if pictures else None
        if tiles is not None and found.light:
            tiles = 1 - tiles
        written.append(report.plot_latents(codes, labels, tiles, found.shape, 2.5, path / "latents.png"))
    return written


# ----------------------------------------------------------------------------------------------- samples


def samples(pair: Pair, known: Dataset, latents: dict[str, Tensor], batch: Batch, path: Path) -> list[Path]:
    """Show samples as their kind is shown: the files written."""
    lines = pair.lines(latents, batch, known.names)
    if lines is not None:
        return _text(lines, path)
    return _SHOWS.get(known.kind, _table)(known, batch, path)


def _pictures(known: Dataset, batch: Any, path: Path) -> list[Path]:
    if len(known.shape) != 2:
        return _table(known, batch, path)
    y = batch[1] if known.classes else batch
    each = min(known.classes or _SHOWN, _SHOWN, len(y))  # of classes in turn a column each
    rows = list(_scaled(known, y).split(each))
    return [report.images(rows, known.shape, path / "samples.png", light=known.light)]


def _colours(known: Dataset, batch: Any, path: Path) -> list[Path]:
    """Luma, superpixels and a draw of the colours, or the pictures alone, column by column."""
    if known.kind == "colour":
        rows = list(batch.unflatten(-1, known.shape)[:_LINES].div(255.0).split(_LINES))
        return [report.images(rows, known.shape[:2], path / "samples.png")]
    x, superpixels, _, y = (part[:_LINES] for part in batch)
    # a border is where a pixel differs from the one above or before it
    border = (superpixels.diff(dim=-1, prepend=superpixels[..., :1]) != 0) | (
        superpixels.diff(dim=-2, prepend=superpixels[..., :1, :]) != 0
    )
    luma = (x / 255.0)[..., None].expand(*x.shape, 3)
    rows = [luma, torch.where(border[..., None], 0.0, luma), (from_ycocg(x, y) / 255.0).clamp(0, 1)]
    return [report.images(rows, known.shape[:2], path / "samples.png", ["luma", "superpixels", "sample"])]


def _table(known: Dataset, batch: Any, path: Path) -> list[Path]:
    """Rows of numbers, each with its class in front if there are classes."""
    labels, y = batch if known.classes else (None, batch)
    names = known.names or tuple(f"y{i}" for i in range(known.dims))
    rows = [[f"{x:.6g}" for x in row] for row in known.raw(y).tolist()]
    if labels is not None:
        names = ("class", *names)
        rows = [[str(label), *row] for label, row in zip(labels.tolist(), rows, strict=True)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([names, *rows])
    return _written(path / "samples.csv", text.getvalue())


def _symbols(known: Dataset, batch: Any, path: Path) -> list[Path]:
    y, *lengths = batch if isinstance(batch, tuple) else (batch,)
    steps = lengths[0].tolist() if lengths else [y.shape[1]] * len(y)
    rows = [[i for i in row[:n] if i >= 0] for row, n in zip(y.tolist(), steps, strict=True)]
    return _text([_spelled(row, known.names) for row in rows], path)


def _spelled(row: Sequence[int], names: Sequence[str]) -> str:
    words = [names[i] if names else str(i) for i in row]
    single = bool(names) and all(len(name) <= 1 for name in names)
    return "".join(words) if single else " ".join(words)


def _sequences(known: Dataset, batch: Any, path: Path) -> list[Path]:
    y, *lengths = batch if isinstance(batch, tuple) else (batch,)
    steps = lengths[0].tolist() if lengths else [y.shape[1]] * len(y)
    found = [known.raw(row[:n]) for row, n in zip(y, steps, strict=True)]
    return [report.plot_sequences(found[:_LINES], path / "samples.png", names=known.names)]


def _labelled(known: Dataset, batch: Any, path: Path) -> list[Path]:
    x, y, *lengths = batch
    steps = lengths[0].tolist() if lengths else [x.shape[1]] * len(x)
    titles = [_spelled([i for i in row if i > 0], known.names) for row in y.tolist()]
    frames = [row[:n] for row, n in zip(x, steps, strict=True)]
    written = [report.plot_sequences(frames[:_LINES], path / "samples.png", titles[:_LINES])]
    return _text(titles, path) + written


def _text(lines: list[str], path: Path) -> list[Path]:
    return _written(path / "samples.txt", "\n".join(lines) + "\n")


def _written(path: Path, text: str) -> list[Path]:
    """Write a text and print its first lines."""
    files.write(path, text.encode())
    lines = text.splitlines()
    print("\n".join(line[:100] for line in lines[:_LINES]) + ("\n…" if len(lines) > _LINES else ""))
    return [path]


_SHOWS: dict[str, Callable[[Dataset, Any, Path], list[Path]]] = {
    "binary": _pictures,
    "bytes": _pictures,
    "grey": _pictures,
    "colour": _colours,
    "superpixels": _colours,
    "symbols": _symbols,
    "strings": _symbols,
    "sentences": _symbols,
    "series": _sequences,
    "counts": _sequences,
    "labelled": _labelled,
}


# ----------------------------------------------------------------------------------------------- runs


def configuration(path: Path, config: Mapping[str, Any]) -> str:
    """The run's model, data and settings, a line each."""
    found = Dataset.described(config["data"]) if "model" in config else None
    lines = [f"{path}: {config.get('model', 'a pair of a Python program')}, pyroelbo {config['pyroelbo']}"]
    if found is not None:
        file = f", from {found.name}" if found.name != found.title else ""
        lines.append(f"data: {told(found).rstrip('; ')}{file}")
    hidden = ("pyroelbo", "model", "data", "about", "settings", "fingerprint", "valid")
    for title, settings in (
        ("model", config.get("settings") or {}),
        (
            "training",
            {k: v for k, v in config.items() if k not in hidden and v not in ([], "") and v is not None},
        ),
    ):
        told_ = ", ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in settings.items())
        lines.append(f"{title}: {told_ or 'its defaults'}")
    return "\n".join(lines)


def curve(rows: Sequence[Mapping[str, Any]], most: int = 10) -> str:
    """A table of some epochs, the first and the last among them."""
    names = [k for k in rows[-1] if k in ("epoch", "loss", "learning_rate") or k.startswith("valid_")]
    chosen = sorted({round(i * (len(rows) - 1) / max(1, most - 1)) for i in range(most)})
    cells = [names] + [[_cell(rows[i].get(k)) for k in names] for i in chosen]
    widths = [max(len(row[c]) for row in cells) for c in range(len(names))]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in cells)


def _cell(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)

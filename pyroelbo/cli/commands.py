"""What the commands do."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

from pyroelbo import batch as batches
from pyroelbo import coding, data, evidence, files, models, report
from pyroelbo.batch import Batch
from pyroelbo.cli import shows
from pyroelbo.distributions.grammar import TooLong
from pyroelbo.evidence import audit
from pyroelbo.numerics import duration
from pyroelbo.pair import Lossy, Pair
from pyroelbo.results import Audit, Run
from pyroelbo.runs import RunDirectory
from pyroelbo.training.em import ClosedForm, fit_em
from pyroelbo.training.fit import fit
from pyroelbo.training.schedules import warmup
from pyroelbo.training.settings import FitSettings

__all__ = ["MODELS_OWN", "audit_", "compress", "decompress", "models_", "sample", "show", "train"]

# Settings whose defaults come from the registry of models.
MODELS_OWN = ("epochs", "learning_rate", "objective", "particles")


def models_(options: argparse.Namespace) -> int:
    wide = max(map(len, models.REGISTRY))
    for name, entry in models.REGISTRY.items():
        print(f"{name:<{wide}}  {entry.about}")
        needed = {key for needs in entry.kinds.values() for key in needs}
        settings = [f"{k}={p.default}" for k, p in models.settings_of(name).items() if k not in needed]
        settings = [s.replace("=(", "=").replace(")", "").replace(", ", ",") for s in settings]
        print(f"{'':<{wide}}  settings: {', '.join(settings)}")
        kinds = [
            " ".join([kind, *(f"({key}={'|'.join(values)})" for key, values in needs.items())])
            for kind, needs in entry.kinds.items()
        ]
        print(f"{'':<{wide}}  data: {', '.join(kinds)}; by default {entry.data}\n")
    print("Kinds of data (a file of your own is one of them by its shape and numbers):")
    for kind, row in data.KINDS.items():
        print(f"{kind:<{wide}}  {row.about}")
    print(f"\nData sets: {', '.join(data.NAMES)}")
    return 0


# ----------------------------------------------------------------------------------------------- train


def train(options: argparse.Namespace) -> int:
    entry = models.entry(options.model)
    found = data.load(options.data or entry.data, columns=options.columns, root=options.data_dir)
    found, settings = models.matched(options.model, found, _settings(options.settings))
    found = found.standardized()
    found = found.conditional() if options.conditional else found
    if options.resume:
        _check_resumed(options, found)
    chosen = _chosen(options, entry)
    pyro.set_rng_seed(options.seed)
    pair = models.build(options.model, found, settings)
    method = options.method or ("em" if _closed(pair) else "gradient")
    config = {
        "model": options.model,
        "about": entry.about,
        "data": found.describe(),
        "settings": settings,
        "method": method,
        "kl_warmup": options.kl_warmup,
        "kl_period": options.kl_period,
    }
    print(shows.told(found))
    run = (
        _em(options, pair, found, chosen, config)
        if method == "em"
        else _gradient(options, pair, found, chosen, config)
    )
    report.plot_curve(run, options.out / "curve.png")
    print(shows.result(options.model, found, run))
    if run.stopped == "interrupted":
        print(
            f"interrupted; continue with: pyroelbo train {options.model} --out {options.out} --resume (and "
            f"the same options)",
            file=sys.stderr,
        )
        return 130
    print(f"next: pyroelbo audit {options.out}")
    return 0


def _settings(pairs: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for text in pairs:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        parts = [_value(v) for v in value.split(",") if v]
        settings[name] = parts if "," in value else parts[0] if parts else ""
    return settings


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _chosen(options: argparse.Namespace, entry: models.Entry) -> dict[str, Any]:
    """The settings of training: the user's, else the model's."""
    if options.kl_warmup < 0:
        raise ValueError(f"--kl-warmup: expected a number of epochs, got {options.kl_warmup}")
    if options.kl_period is not None and not options.kl_period >= options.kl_warmup > 0:
        raise ValueError(
            f"--kl-period: expected at least the epochs of --kl-warmup, a positive number, got "
            f"{options.kl_period} after {options.kl_warmup}"
        )
    chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(FitSettings)}
    return chosen | {k: getattr(entry, k) for k in MODELS_OWN if chosen[k] is None}


def _check_resumed(options: argparse.Namespace, found: data.Dataset) -> None:
    before = RunDirectory(options.out).config().get("data")
    now = found.describe()
    if not isinstance(before, dict) or before == now:
        return
    changed = next((k for k in now if before.get(k) != now[k]), "data")
    raise ValueError(
        f"data: expected those of the run {options.out}, with {changed} {before.get(changed)!r:.80}, got "
        f"{now.get(changed)!r:.80}"
    )


def _closed(pair: Pair) -> bool:
    """Whether EM trains all of the pair, by closed forms."""
    return isinstance(pair, ClosedForm) and getattr(pair, "exact_guide", False)


def _gradient(
    options: argparse.Namespace,
    pair: Pair,
    found: data.Dataset,
    chosen: dict[str, Any],
    config: dict[str, Any],
) -> Run:
    weight = options.kl_weight
    if options.kl_warmup > 0:
        rise = warmup(options.kl_warmup, options.kl_period)
        chosen["kl_weight"] = lambda epoch: weight * rise(epoch)
    if options.patience is not None and "valid" not in found.splits:
        raise ValueError(f"patience: expected data with a split 'valid', got {found.title} without one")
    return fit(
        pair,
        found["train"],
        valid=found.splits.get("valid"),
        device=options.device,
        out=options.out,
        resume=options.resume,
        config=config,
        progress=not options.quiet,
        **chosen,
    )


def _em(
    options: argparse.Namespace,
    pair: Pair,
    found: data.Dataset,
    chosen: dict[str, Any],
    config: dict[str, Any],
) -> Run:
    if not getattr(pair, "exact_guide", True):
        raise ValueError("method: expected gradient for a guide with an encoder, which EM does not train")
    known = inspect.signature(fit_em).parameters
    defaults = {f.name: f.default for f in dataclasses.fields(FitSettings) if f.name not in MODELS_OWN}
    for name, default in defaults.items():
        if name not in known and chosen[name] != default:
            raise ValueError(f"{name}: expected none with --method em, got {chosen[name]!r}")
    for name in (*(n for n in MODELS_OWN if n not in known), "kl_warmup", "kl_period"):
        if getattr(options, name):
            raise ValueError(f"{name}: expected none with --method em, got {getattr(options, name)!r}")
    chosen = {k: v for k, v in chosen.items() if k in known}
    if chosen["batch_size"] == defaults["batch_size"]:
        chosen["batch_size"] = None  # all at once
    return fit_em(
        pair,
        found["train"],
        start="current",  # as it was built, from the data
        device=options.device,
        out=options.out,
        resume=options.resume,
        config=config,
        progress=not options.quiet,
        **chosen,
    )


# ----------------------------------------------------------------------------------------------- audit


def left(budget: str | int | None, started: float) -> str | int | None:
    """What a time leaves to the audit itself: some has gone since the command ``started``, and a tenth is
    for the figures."""
    if not isinstance(budget, str):
        return budget
    seconds, gone = duration(budget), time.monotonic() - started
    if 0.9 * seconds <= gone:
        raise ValueError(f"--budget: expected more than the {gone:.1f} s that loading took, got {budget!r}")
    return f"{0.9 * seconds - gone:.1f}s"


def audit_(options: argparse.Namespace) -> int:
    started = time.monotonic()
    if options.num_data < 0:
        raise ValueError(f"--num-data: expected a number of data, or 0 for all, got {options.num_data}")
    pair, config, known = models.load(options.path)
    found = _reloaded(known, config, options.data_dir)
    split = options.split or ("test" if "test" in found.splits else "train")
    y, labels = _subset(found, split, options.num_data, options.seed)
    pyro.set_rng_seed(options.seed)
    result = audit(
        pair,
        y,
        particles=options.particles,
        references=options.references,
        temperatures=options.temperatures,
        budget=left(options.budget, started),
    )
    if found.scale:
        result = result.in_units(found.log_scale(y))
    print(f"{config['model']} of {options.path}, {found.title} {split} split, seed {options.seed}")
    print(result)
    if found.scale:
        print("Nats are those of densities in the data's own units; the model sees standardized data.")
    run = RunDirectory(options.path)
    terms, written = pair.by_layer(y, min(options.particles, _DRAWS)), [run.path / "audit.json"]
    if terms is not None:
        terms[0] -= found.log_scale(y).mean() if found.scale else 0.0
        print(f"\n{_terms(terms, min(options.particles, _DRAWS))}")
        written.append(report.plot_layers({pair.name: terms}, run.path / "layers.png"))
    elif rates := _rates(pair.written_out(), y, options.particles):
        print("\n" + rates)
    if usage := batches.call(pair.usage, y):
        print(f"\n{usage}")
    if found.about.discrete:
        print("\n" + shows.in_other_units(result, found, y, config["settings"]))
    run.write_text("audit.json", result.to_json() + "\n")
    written.append(report.plot(result, run.path / "audit.png"))
    written += shows.decoded(pair, found, y, labels, run.path)
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _reloaded(known: data.Dataset, config: dict[str, Any], root: Path | None) -> data.Dataset:
    """The data of a run as it was trained on them; ValueError if they have changed since."""
    columns = known.names if known.name.lower().endswith(".csv") else ()
    found = data.load(known.name, known.kind, columns=columns, root=root).standardized(known)
    found = found.conditional() if known.classes else found
    now, before = found.describe(), known.describe()
    changed = next((k for k in now if now[k] != before[k]), None)
    if changed is not None:
        raise ValueError(
            f"{known.name}: expected the data that the run was trained on, with {changed} "
            f"{before[changed]!r:.80}, got {now[changed]!r:.80}"
        )
    if config.get("fingerprint") != batches.fingerprint(found["train"]):
        raise ValueError(
            f"{known.name}: expected the rows that the run was trained on, got others: what is held out may "
            "have been trained on. Bring the file back, or train anew"
        )
    return found


def _subset(found: data.Dataset, split: str, count: int, seed: int) -> tuple[Batch, torch.Tensor | None]:
    """``count`` rows of a split (0: all) at random, and their classes."""
    y, labels = found[split], found.labels.get(split)
    size = batches.size(y)
    if not 0 < count < size:
        return y, labels
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    return batches.rows(y, order), None if labels is None else labels[order]


_MOST_SITES = 16  # of which the rates are shown
_DRAWS = 16  # of a bound by layer, at most


def _terms(terms: torch.Tensor, draws: int) -> str:
    """The bound of a pair of many layers, in three parts."""
    return (
        f"The ELBO by layer ({draws} other draws), nats per datum: {float(terms.sum()):.3f} = reconstruction "
        f"{float(terms[0]):.3f}, {len(terms) - 2} layers {float(terms[1:-1].sum()):.3f}, prior "
        f"{float(terms[-1]):.3f}"
    )


def _rates(pair: Pair, y: Batch, particles: int) -> str | None:
    """Rate of each latent site of a pair with several, the generator's first ones first, and the
    reconstruction, in nats per datum."""
    if not 2 <= len(evidence.terms(pair, batches.rows(y, slice(0, 1)), 1).log_guide) <= _MOST_SITES:
        return None
    terms = evidence.terms(pair, y, particles)
    seen = sum(terms.log_model[site].mean() for site in terms.observed)
    rates = [
        f"{site} {(terms.log_guide[site] - log_p).mean():.3f}"
        for site, log_p in terms.log_model.items()
        if site not in terms.observed
    ]
    return (
        f"The ELBO by layer ({particles} other draws), nats per datum: reconstruction {float(seen):.3f} "
        "minus the rates E[ln q - ln p] of " + ", ".join(rates)
    )


# ----------------------------------------------------------------------------------------------- the others


def sample(options: argparse.Namespace) -> int:
    pair, config, known = models.load(options.path)
    pyro.set_rng_seed(options.seed)
    like = _like(known, config, options) if len(known.about.parts) > 1 and options.n > 0 else None
    given = _given(known, options)
    if options.truncation is None:
        latents, batch = _simulated(pair, options.n, given, like)
    elif "truncation" in inspect.signature(pair.simulate).parameters:
        latents, batch = pair.simulate(options.n, truncation=options.truncation)  # type: ignore[call-arg]
    else:
        raise ValueError(f"truncation: expected none for a {pair.name}, got {options.truncation}")
    drawn = dict(zip(known.parts, batches.parts(batch).values(), strict=False))
    files.write_tensors(options.path / "samples.safetensors", drawn, {"seed": options.seed})
    written = shows.samples(pair, known, latents, batch, options.path)
    sizes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in drawn.items())
    print(f"written: {options.path / 'samples.safetensors'} ({sizes})" + "".join(f", {p}" for p in written))
    return 0


def _given(known: data.Dataset, options: argparse.Namespace) -> tuple[torch.Tensor, ...]:
    """The classes of the draws of a conditional pair: all in turn, or the one asked for."""
    one, many = options.label, known.classes
    if one is not None and not 0 <= one < many:
        wanted = f"one of 0 to {many - 1}" if many else "none of a run that is not conditional"
        raise ValueError(f"label: expected {wanted}, got {one}")
    if not many or options.n < 1:
        return ()
    return (torch.arange(options.n) % many if one is None else torch.full((options.n,), one),)


def _like(known: data.Dataset, config: dict[str, Any], options: argparse.Namespace) -> Batch:
    """Data drawn at random for their lengths, or for what is labelled, with room for a label a step."""
    found = _reloaded(known, config, options.data_dir)["train"]
    rows = batches.rows(found, torch.randint(batches.size(found), (options.n,)))
    if known.kind != "labelled" or not isinstance(rows, tuple):
        return rows
    x, y, *lengths = rows
    return x, y.new_full(x.shape[:2], -1), *lengths


def _simulated(
    pair: Pair, n: int, given: tuple[torch.Tensor, ...], like: Batch | None
) -> tuple[dict[str, torch.Tensor], Batch]:
    """Draws of the pair; of a grammar, those that end within its longest sentence."""
    with suppress(TooLong):
        return pair.simulate(n, *given, like=like)
    drawn: list[Any] = []
    for tried in range(1, 50 * n + 1):
        with suppress(TooLong):
            drawn.append(pair.simulate(1))
        if len(drawn) == n:
            print(f"{tried - n} of {tried} sentences drawn did not end in time and were left out")
            latents = {k: torch.cat([z[k] for z, _ in drawn]) for k in drawn[0][0]}
            return latents, torch.cat([y for _, y in drawn])
    return pair.simulate(n)  # which tells why there are none


def compress(options: argparse.Namespace) -> int:
    y, out = files.read_npy(options.file), options.out or options.file.with_suffix(".code")
    if options.path == "contexts":
        _check_alone(options, "given", "as_set", "precision", "chunk")
        found = coding.compress_contexts(y, out, shape=options.shape)
    else:
        pair, _, known = models.load(options.path)
        _same_given(known.classes > 0, options.given, "the classes of the data of a conditional run")
        lossy = None if known.about.discrete else pair.lossy()
        given = _classes(known, options.given)
        if lossy is not None:
            pair, y = lossy.codes, _encoded(lossy, known, y)
        elif known.kind == "superpixels":
            *given, y = _in_pieces(y, "FILE", "colour pictures [N, H, W, 3]", 4)
        found = coding.compress(
            pair,
            y,
            out,
            given=given,
            chunk=options.chunk,
            as_set=options.as_set,
            precision=options.precision,
        )
        if lossy is not None:
            print("the codes alone: decompress gives the data as they are decoded, not bit for bit")
    print(f"{found}\nwritten: {out}")
    return 0


def _check_alone(options: argparse.Namespace, *names: str) -> None:
    """Raise ValueError, naming it, if an option that belongs to a run is set."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected none for 'contexts', which has no model, got {value}")


def _same_given(wanted: bool, file: Path | None, what: str) -> None:
    """Raise ValueError unless a file is given where one is ``wanted``, and only there."""
    if wanted != (file is not None):
        raise ValueError(f"given: expected {what}, and nothing for others; got {file or 'nothing'}")


def _classes(known: data.Dataset, file: Path | None) -> Sequence[Any]:
    """What the data of a conditional run are coded given; nothing for other runs."""
    return [files.read_npy(file)] if known.classes and file is not None else []


def _in_pieces(pictures: np.ndarray, name: str, expected: str, dims: int) -> Any:
    """Luma, superpixels, their tree and chroma, int16, of pictures of bytes, or of their lumas alone."""
    if pictures.dtype != np.uint8 or pictures.ndim != dims or not pictures.size:
        raise ValueError(
            f"{name}: expected {expected} of uint8, got {pictures.dtype} of shape {pictures.shape}"
        )
    rgb = torch.from_numpy(np.array(pictures))
    *given, chroma = data.superpixels(rgb if dims == 4 else rgb[..., None].expand(*rgb.shape, 3))
    return *given, chroma.to(torch.int16)


def _encoded(lossy: Lossy, known: data.Dataset, y: np.ndarray) -> np.ndarray:
    """The codes of an array of data in their own units."""
    if y.ndim < 2 or math.prod(y.shape[1:]) != known.dims or y.dtype.kind not in "fiu":
        raise ValueError(
            f"FILE: expected an array of {known.dims} numbers a datum, got one of shape {y.shape} and dtype "
            f"{y.dtype}"
        )
    rows = torch.from_numpy(np.array(y.reshape(len(y), -1), np.float64)).to(torch.get_default_dtype())
    if not bool(rows.isfinite().all()):
        raise ValueError("FILE: expected finite numbers, got NaN or infinite ones")
    rows = dataclasses.replace(known, splits={"data": rows}).standardized(known)["data"]
    codes = lossy.encode(rows).numpy()
    return codes.astype(np.uint8 if codes.max(initial=0) < 256 else np.int32)


def decompress(options: argparse.Namespace) -> int:
    out = options.out or options.file.with_suffix(".npy")
    if options.path == "contexts":
        _check_alone(options, "given")
        coding.decompress_contexts(options.file, out)
    else:
        pair, _, known = models.load(options.path)
        lossy = None if known.about.discrete else pair.lossy()
        what = "the lumas of pictures coded in pieces, or the classes of data coded given them"
        _same_given(known.classes > 0 or known.kind == "superpixels", options.given, what)
        if lossy is None and known.kind != "superpixels":
            coding.decompress(pair, options.file, out, given=_classes(known, options.given))
        else:
            if out.exists():
                raise FileExistsError(f"{out} exists: choose another name, or remove it")
            if lossy is None:
                luma = files.read_npy(options.given)
                *given, _ = _in_pieces(luma, "given", "lumas [N, H, W]", 3)
                chroma = torch.from_numpy(coding.decompress(pair, options.file, given=given))
                y = data.from_ycocg(given[0], chroma).to(torch.uint8)
            else:
                codes = torch.from_numpy(coding.decompress(lossy.codes, options.file))
                y = known.raw(lossy.decode(codes)).reshape(len(codes), *known.shape)
            with files.replacing(out) as file:
                np.save(file, y.numpy())
    print(f"written: {out}")
    return 0


def show(options: argparse.Namespace) -> int:
    run = RunDirectory(options.path)
    config = run.config()
    print(shows.configuration(options.path, config))
    if rows := run.metrics():
        print("\n" + shows.curve(rows))
    file = run.path / "audit.json"
    if file.exists():
        print(f"\nlast audit:\n{Audit.from_dict(files.read_json(file))}")
    print("\nfiles: " + ", ".join(sorted(p.name for p in run.path.iterdir() if not p.name.startswith("."))))
    return 0

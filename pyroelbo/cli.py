"""The command line: ``pyroelbo models | train | audit | sample | compress | decompress``."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import pyro
import torch

from pyroelbo import batch as batches
from pyroelbo import coding, data, evidence, files, models, report
from pyroelbo._version import __version__
from pyroelbo.evidence import audit
from pyroelbo.runs import RunDirectory
from pyroelbo.training.fit import fit
from pyroelbo.training.settings import FitSettings

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 after an error (printed in one line), 130 if
    interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has gone; files have been written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("pyroelbo: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        print(f"pyroelbo: {error}", file=sys.stderr)
        return 1


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyroelbo",
        description="Train latent-variable models as Pyro pairs and measure how tight their bounds are "
        "(nats).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    listing = commands.add_parser("models", help="list the models and their settings")
    listing.set_defaults(run=_models)

    train = commands.add_parser(
        "train",
        help="train a model into a run directory",
        formatter_class=_Help,
    )
    train.add_argument("model", help=f"one of: {', '.join(models.REGISTRY)}")
    train.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the run directory: new or, with --resume, the one to continue",
    )
    train.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the model, such as latent=8 (see `pyroelbo models`)",
    )
    _data_options(train)
    _settings_options(train)
    train.add_argument(
        "--kl-warmup",
        type=float,
        default=0.0,
        metavar="EPOCHS",
        help="increase the KL weight from 0 to its value over so many epochs",
    )
    train.add_argument(
        "--cuda", action="store_true", help="require a GPU (by default one is used if available)"
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=_train)

    judge = commands.add_parser(
        "audit",
        help="how tight is the bound of a trained run?",
        formatter_class=_Help,
    )
    judge.add_argument("path", type=Path, metavar="RUN", help="a run directory of `pyroelbo train`")
    judge.add_argument("--particles", type=int, default=64, help="draws of the latents per datum")
    judge.add_argument(
        "--num-data",
        type=int,
        default=200,
        help="size of a random subset of the split, by the seed; 0 for all",
    )
    judge.add_argument("--split", default="test", choices=("train", "valid", "test"), help="part of the data")
    judge.add_argument(
        "--reference",
        action="append",
        default=None,
        help="exact, quadrature or ais; by default the best of the first two",
    )
    judge.add_argument("--temperatures", type=int, default=1000, help="temperatures of --reference ais")
    judge.add_argument(
        "--budget",
        type=_budget,
        default=None,
        help="a time (90s, 1min, 2h) or a number of evaluations: chooses particles, temperatures and, "
        "if none is named, the reference",
    )
    judge.add_argument(
        "--data-dir", type=Path, default=None, help="folder of benchmark files; by default $PYROELBO_DATA"
    )
    judge.add_argument("--seed", type=int, default=0, help="seed of draws and of the random subset")
    judge.set_defaults(run=_audit)

    sample = commands.add_parser("sample", help="draw data from a trained run", formatter_class=_Help)
    sample.add_argument("path", type=Path, metavar="RUN", help="a run directory of `pyroelbo train`")
    sample.add_argument("-n", "--num-samples", type=int, default=64, help="number of data to draw")
    sample.add_argument("--seed", type=int, default=0, help="seed of the draws")
    sample.set_defaults(run=_sample)
    _coding_commands(commands)
    return parser


def _coding_commands(commands: Any) -> None:
    run = {"metavar": "RUN", "help": "a run directory, or `contexts`: binary images without a model"}
    code = commands.add_parser(
        "compress",
        help="write an array to a file of as many bits as the bound says",
        formatter_class=_Help,
    )
    code.add_argument("path", **run)
    code.add_argument("file", type=Path, metavar="FILE", help="an .npy file of discrete data [N, ...]")
    code.add_argument("--out", type=Path, default=None, help="by default FILE with the suffix .code")
    code.add_argument("--as-set", action="store_true", help="lose the order, which saves log N!")
    code.add_argument(
        "--precision", choices=coding.PRECISIONS, default=None, help="of the weights that are used to code"
    )
    code.add_argument("--chunk", type=int, default=None, help="number of data that the networks see at once")
    code.add_argument("--shape", type=_shape, default=None, help="H,W of flat images, for `contexts`")
    code.set_defaults(run=_compress)

    decode = commands.add_parser(
        "decompress",
        help="restore the array of a code, bit for bit",
        formatter_class=_Help,
    )
    decode.add_argument("path", **run)
    decode.add_argument("file", type=Path, metavar="FILE", help="a code of `pyroelbo compress`")
    decode.add_argument(
        "--out", type=Path, default=None, help="the array; by default FILE with the suffix .npy"
    )
    decode.set_defaults(run=_decompress)


def _settings_options(parser: argparse.ArgumentParser) -> None:
    """An option for each of :class:`FitSettings`."""
    for setting in dataclasses.fields(FitSettings):
        about, kind, names = (setting.metadata[k] for k in ("about", "kind", "names"))
        flags = [*setting.metadata["flags"], f"--{setting.name.replace('_', '-')}"]
        own = setting.name in _MODELS_OWN
        more: dict[str, Any] = {"default": None if own else setting.default}
        if kind is bool:
            more = {"action": "store_true"}
        elif kind is list:
            more = {"default": [], "action": "append", "metavar": "PART"}
        else:
            more |= {"type": kind, "choices": tuple(names) or None}
        parser.add_argument(
            *flags, dest=setting.name, help=about + "; by default the model's own" * own, **more
        )


# Defaults come from the registry of models.
_MODELS_OWN = ("epochs", "learning_rate", "objective", "particles")


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default=None,
        choices=data.NAMES,
        help="data set; by default the model's own. Digits ship with scikit-learn, the others are files",
    )
    parser.add_argument(
        "--data-dir", type=Path, default=None, help="folder of benchmark files; by default $PYROELBO_DATA"
    )


def _shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _budget(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def _models(options: argparse.Namespace) -> int:
    wide = max(map(len, models.REGISTRY))
    for name, entry in models.REGISTRY.items():
        print(f"{name:<{wide}}  {entry.about}")
        settings = [f"{k}={p.default}" for k, p in models.settings_of(name).items()]
        settings = [s.replace("=(", "=").replace(")", "").replace(", ", ",") for s in settings]
        print(f"{'':<{wide}}  settings: {', '.join(settings)}\n")
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


def _train(options: argparse.Namespace) -> int:
    entry = models.entry(options.model)
    found = data.load(options.data or entry.data, root=options.data_dir)
    found, settings = models.matched(options.model, found, _settings(options.set))
    pyro.set_rng_seed(options.seed)
    pair = models.build(options.model, found, settings)
    warmup = options.kl_warmup
    if warmup < 0:
        raise ValueError(f"--kl-warmup: expected a number of epochs, got {warmup}")
    chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(FitSettings)}
    chosen |= {k: getattr(entry, k) for k in _MODELS_OWN if chosen[k] is None}
    if warmup > 0:
        weight = options.kl_weight
        chosen["kl_weight"] = lambda epoch: weight * min(1.0, epoch / warmup)
    run = fit(
        pair,
        found["train"],
        valid=found["valid"],
        device="cuda" if options.cuda else None,
        out=options.out,
        resume=options.resume,
        config={
            "model": options.model,
            "data": found.describe(),
            "settings": settings,
            "kl_warmup": warmup,
        },
        progress=not options.quiet,
        **chosen,
    )
    report.plot_curve(run, options.out / "curve.png")
    last = run.metrics[-1] if run.metrics else {}
    bound = "".join(f", validation {k[6:]} {v:.3f} nats" for k, v in last.items() if k.startswith("valid_"))
    if last:
        print(
            f"{options.model} on {found.name}: loss {last['loss']:.3f} nats{bound} after {last['epoch']} "
            f"{'epoch' if last['epoch'] == 1 else 'epochs'}"
            + ("" if run.stopped == "epochs" else f", stopped: {run.stopped}")
        )
    if run.stopped == "interrupted":
        print(
            f"interrupted; continue with: pyroelbo train {options.model} --out {options.out} --resume (and "
            f"the same options)",
            file=sys.stderr,
        )
        return 130
    print(f"next: pyroelbo audit {options.out}")
    return 0


def _audit(options: argparse.Namespace) -> int:
    if options.num_data < 0:
        raise ValueError(f"--num-data: expected a number of data, or 0 for all, got {options.num_data}")
    pair, config, known = models.load(options.path)
    found = data.load(known.name, known.kind, root=options.data_dir)
    y, labels = found[options.split], found.labels.get(options.split)
    pyro.set_rng_seed(options.seed)
    if 0 < options.num_data < len(y):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(options.seed))
        order = order[: options.num_data]
        y, labels = y[order], None if labels is None else labels[order]
    result = audit(
        pair,
        y,
        particles=options.particles,
        references=options.reference,
        temperatures=options.temperatures,
        budget=options.budget,
    )
    print(f"{config['model']} of {options.path}, {found.name} {options.split} split, seed {options.seed}")
    print(result)
    if isinstance(pair, models.Chain):
        print("\n" + _rates(pair, y, options.particles))
    if found.about.discrete:
        print("\n" + report.bits_table(result, found.dims))
    run = RunDirectory(options.path)
    run.write_text("audit.json", result.to_json() + "\n")
    written = [run.path / "audit.json", report.plot(result, run.path / "audit.png")]
    written += _pictures(pair, found, y, labels, run.path)
    print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def _rates(pair: models.Chain, y: torch.Tensor, particles: int) -> str:
    """Rate of each layer of a chain, top first, and the reconstruction, in nats per datum."""
    terms = evidence.terms(pair, y, particles)
    parts = {site: terms.log_guide[site] - terms.log_model[site] for site in pair.sites}
    told = [f"{site} {rate.mean():.3f}" for site, rate in parts.items()]
    return (
        f"The ELBO by layer ({particles} other draws), nats per datum: reconstruction "
        f"{terms.log_model['y'].mean():.3f} minus "
        "the rates E[ln q - ln p] of " + ", ".join(told)
    )


def _pictures(pair: Any, found: data.Dataset, y: torch.Tensor, labels: Any, path: Path) -> list[Path]:
    """Reconstructions and the latent plane, for pairs that decode pictures."""
    decoded = pair.reconstruct(y[:16])
    if decoded is None or len(found.shape) != 2:
        return []
    rows = [_brightness(found, y[:16]), decoded]
    written = [report.images(rows, found.shape, path / "reconstructions.png", ["data", "decoded"])]
    plane = pair.latent_plane(y)
    if plane is not None:
        codes, decode = plane
        with torch.no_grad():
            grid = decode(_plane(15, 2.5).to(codes))
        written.append(report.plot_latents(codes, labels, grid, found.shape, 2.5, path / "latents.png"))
    return written


def _brightness(found: data.Dataset, y: torch.Tensor) -> torch.Tensor:
    """Pictures of the data set's kind in [0, 1]."""
    return (y / max(found.levels - 1, 1)).clamp(0, 1)


def _plane(n: int, extent: float) -> torch.Tensor:
    ticks = torch.linspace(-extent, extent, n)
    return torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), -1).reshape(-1, 2)


def _sample(options: argparse.Namespace) -> int:
    pair, _, known = models.load(options.path)
    pyro.set_rng_seed(options.seed)
    _, batch = pair.simulate(options.num_samples)
    (y,) = batches.parts(batch).values()
    files.write_tensors(options.path / "samples.safetensors", {"y": y}, {"seed": options.seed})
    columns = min(16, options.num_samples)
    figure = report.images(
        list(_brightness(known, y).split(columns)), known.shape, options.path / "samples.png"
    )
    print(f"written: {options.path / 'samples.safetensors'} (y, {tuple(y.shape)}), {figure}")
    return 0


def _compress(options: argparse.Namespace) -> int:
    y, out = files.read_npy(options.file), options.out or options.file.with_suffix(".code")
    if options.path == "contexts":
        found = coding.compress_contexts(y, out, shape=options.shape)
    else:
        pair, _, _ = models.load(options.path)
        found = coding.compress(
            pair, y, out, chunk=options.chunk, as_set=options.as_set, precision=options.precision
        )
    print(f"{found}\nwritten: {out}")
    return 0


def _decompress(options: argparse.Namespace) -> int:
    out = options.out or options.file.with_suffix(".npy")
    if options.path == "contexts":
        coding.decompress_contexts(options.file, out)
    else:
        pair, _, _ = models.load(options.path)
        coding.decompress(pair, options.file, out)
    print(f"written: {out}")
    return 0

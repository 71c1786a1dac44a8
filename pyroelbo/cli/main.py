"""The parser of the command line, and how errors are told."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pyroelbo import coding, data, models
from pyroelbo._version import __version__
from pyroelbo.cli import commands
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
        print(f"pyroelbo: {_told(str(error), options)}", file=sys.stderr)
        return 1


def _told(message: str, options: argparse.Namespace) -> str:
    """The message on one line; the Python argument that it begins with becomes the option that sets it."""
    message = " ".join(message.split())
    name, colon, rest = message.partition(": ")
    if colon and name in options.flags:
        return f"{options.flags[name]}: {rest}"
    with suppress(ValueError):
        if colon and name in models.settings_of(getattr(options, "model", "")):
            return f"--set {name}: {rest}"
    return message


class _Parser(argparse.ArgumentParser):
    """Keeps the option of each argument by its Python name, for messages."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.flags: dict[str, str] = {}
        super().__init__(*args, **kwargs)
        self.set_defaults(flags=self.flags)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*args, **kwargs)
        self.flags[action.dest] = max(action.option_strings, key=len, default=str(action.metavar))
        return action


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pyroelbo",
        description="Train latent-variable models as Pyro pairs and measure how tight their bounds are "
        "(nats).",
    )
    parser.add_argument("--version", action="version", version=__version__)
    add = parser.add_subparsers(title="commands", required=True, metavar="COMMAND").add_parser

    listing = add("models", help="list the models, their settings and their data, and the data sets")
    listing.set_defaults(run=commands.models_)
    _train_options(add("train", help="train a model into a run directory", formatter_class=_Help))
    _audit_options(
        add("audit", help="how tight is the bound of a trained run?", formatter_class=_Help),
    )
    sample = add("sample", help="draw data from a trained run", formatter_class=_Help)
    _run_argument(sample)
    sample.add_argument(
        "-n", "--num-samples", dest="n", metavar="N", type=int, default=64, help="number of data to draw"
    )
    sample.add_argument("--seed", type=int, default=0, help="seed of the draws")
    sample.add_argument(
        "--truncation",
        type=float,
        default=None,
        metavar="SHARE",
        help="of style_vae: move styles and noise to their means, all the way at 0",
    )
    sample.add_argument(
        "--class",
        dest="label",
        type=int,
        default=None,
        metavar="CLASS",
        help="of a conditional run: draw this class; by default all in turn",
    )
    _data_dir(sample)
    sample.set_defaults(run=commands.sample)
    _coding_options(add)
    show = add("show", help="what a run directory holds: settings, curve, last audit")
    _run_argument(show)
    show.set_defaults(run=commands.show)
    return parser


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="RUN", help="a run directory of `pyroelbo train`")


def _data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        dest="data_dir",
        type=Path,
        default=None,
        help="folder of benchmark files; by default $PYROELBO_DATA",
    )


def _train_options(train: argparse.ArgumentParser) -> None:
    train.add_argument(
        "model",
        metavar="MODEL",
        help=f"one of: {', '.join(models.REGISTRY)}; or module:Class, a Pair of your own in module.py, which "
        "is imported from the working folder (by audit, sample and show of the run as well)",
    )
    train.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the run directory: new or, with --resume, the one to continue",
    )
    train.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    train.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a setting of the model, such as latent=8 (see `pyroelbo models`)",
    )
    train.add_argument(
        "--data",
        default=None,
        metavar="DATA",
        help=f"a data set ({', '.join(data.NAMES)}) or a file of your own: *.csv, a table with a header; "
        "*.npy; *.npz with an array train, perhaps valid, test, lengths, labels; *.txt, a text by line; "
        "*.cnf, a formula (DIMACS); or a folder of colour pictures. By default the model's own",
    )
    train.add_argument(
        "--columns",
        type=lambda text: [name for name in text.split(",") if name],
        default=[],
        metavar="A,B,...",
        help="columns of a csv file; by default all",
    )
    _data_dir(train)
    train.add_argument(
        "--conditional",
        action="store_true",
        help="learn p(y | class) of data that have classes, by a model of classes, such as a diffusion",
    )
    train.add_argument(
        "--method",
        choices=("em", "gradient"),
        default=None,
        help="em: fit_em (--num-epochs, --batch-size, --freeze, --budget apply); gradient: fit. By default "
        "em where the guide is exact and the M-step is closed",
    )
    _settings_options(train)
    train.add_argument(
        "--kl-warmup",
        type=float,
        default=0.0,
        metavar="EPOCHS",
        help="increase the KL weight from 0 to its value over so many epochs",
    )
    train.add_argument(
        "--kl-period",
        type=float,
        default=None,
        metavar="EPOCHS",
        help="begin that increase anew after so many epochs (a cyclical schedule)",
    )
    train.add_argument(
        "--cuda",
        dest="device",
        action="store_const",
        const="cuda",
        help="require a GPU (by default one is used if available)",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.set_defaults(run=commands.train)


def _settings_options(parser: argparse.ArgumentParser) -> None:
    """An option for each of :class:`FitSettings`."""
    for setting in dataclasses.fields(FitSettings):
        about, kind, names = (setting.metadata[k] for k in ("about", "kind", "names"))
        flags = [*setting.metadata["flags"], f"--{setting.name.replace('_', '-')}"]
        about = about.partition("; in Python")[0]
        own = setting.name in commands.MODELS_OWN
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


def _coding_options(add: Callable[..., argparse.ArgumentParser]) -> None:
    run: dict[str, Any] = {
        "metavar": "RUN",
        "help": "a run directory, or `contexts`: binary images without a model",
    }
    code = add(
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
    code.add_argument(
        "--given",
        type=Path,
        default=None,
        metavar="CLASSES",
        help="an .npy file of the classes [N] of the data, for a conditional run",
    )
    code.add_argument(
        "--shape",
        type=lambda text: tuple(map(int, text.split(","))),
        default=None,
        help="H,W of flat images, for `contexts`",
    )
    code.set_defaults(run=commands.compress)

    decode = add("decompress", help="restore the array of a code, bit for bit", formatter_class=_Help)
    decode.add_argument("path", **run)
    decode.add_argument("file", type=Path, metavar="FILE", help="a code of `pyroelbo compress`")
    decode.add_argument(
        "--out", type=Path, default=None, help="the array; by default FILE with the suffix .npy"
    )
    decode.add_argument(
        "--given",
        type=Path,
        default=None,
        metavar="GIVEN",
        help="an .npy file of what FILE was written given: lumas [N, H, W] of colour pictures, of which it "
        "has the chroma, or classes [N] of a conditional run",
    )
    decode.set_defaults(run=commands.decompress)


def _audit_options(judge: argparse.ArgumentParser) -> None:
    _run_argument(judge)
    judge.add_argument("--particles", type=int, default=64, help="draws of the latents per datum")
    judge.add_argument(
        "--num-data",
        type=int,
        default=200,
        help="size of a random subset of the split, by the seed; 0 for all",
    )
    judge.add_argument(
        "--split",
        default=None,
        choices=("train", "valid", "test"),
        help="part of the data; by default test where there is one, else train",
    )
    judge.add_argument(
        "--reference",
        dest="references",
        action="append",
        default=None,
        metavar="NAME",
        help="exact, quadrature or ais; by default the best of the first two",
    )
    judge.add_argument("--temperatures", type=int, default=1000, help="temperatures of --reference ais")
    judge.add_argument(
        "--budget",
        type=lambda text: int(text) if text.isdigit() else text,
        default=None,
        help="a time (90s, 1min, 2h), loading and figures included, or a number of evaluations: chooses "
        "particles, temperatures and, if none is named, the reference",
    )
    _data_dir(judge)
    judge.add_argument("--seed", type=int, default=0, help="seed of draws and of the random subset")
    judge.set_defaults(run=commands.audit_)

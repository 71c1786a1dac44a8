"""The registry of models that the command line trains: one row per model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyroelbo import data
from pyroelbo.encoders import ENCODERS
from pyroelbo.models.autoregressive import Autoregressive
from pyroelbo.models.conv_ladder import ConvLadder
from pyroelbo.models.flow import DequantizedFlow
from pyroelbo.models.hierarchy import Hierarchy
from pyroelbo.models.ladder import Ladder
from pyroelbo.models.mixture import BernoulliMixture, GaussianMixture
from pyroelbo.models.ppca import PPCA
from pyroelbo.models.vae import VAE
from pyroelbo.pair import Pair
from pyroelbo.priors import PRIORS
from pyroelbo.runs import RunDirectory, check_same, copy_into

__all__ = ["REGISTRY", "Entry", "build", "entry", "load", "settings_of"]


@dataclass(frozen=True)
class Entry:
    """A row of the registry: ``make(train or None, shape, levels, **settings)`` builds the pair,
    ``form(settings)`` is the form of data that it expects."""

    about: str
    make: Callable[..., Pair]
    form: Callable[[dict[str, Any]], str]
    epochs: int
    learning_rate: float


REGISTRY: dict[str, Entry] = {
    "vae": Entry(
        "VAE; likelihood=bernoulli|discretized_logistic|categorical|l2|l1, network=mlp|gated|conv, "
        f"encoder={'|'.join(ENCODERS)}, prior={'|'.join(PRIORS)}",
        VAE.for_data,
        VAE.form_of,
        50,
        1e-3,
    ),
    "hierarchy": Entry(
        "chain of Gaussian latents; order=bottom-up|top-down, likelihood, encoder and prior (at the top) "
        "as vae",
        Hierarchy.for_data,
        Hierarchy.form_of,
        50,
        1e-3,
    ),
    "ladder": Entry(
        "top-down VAE of Gaussian layers; merge=network|precision, norm=batch|layer|none, likelihood, "
        "encoder and prior "
        "as vae",
        Ladder.for_data,
        Ladder.form_of,
        50,
        1e-3,
    ),
    "conv_ladder": Entry(
        "top-down VAE of latent maps at several resolutions, groups=2,2,1; likelihood and prior as vae",
        ConvLadder.for_data,
        ConvLadder.form_of,
        30,
        1e-3,
    ),
    "autoregressive": Entry(
        "pixels one after the other, exact; network=pixelcnn|transformer, likelihood=bernoulli|categorical",
        Autoregressive.for_data,
        Autoregressive.form_of,
        20,
        1e-3,
    ),
    "flow": Entry(
        "normalizing flow on grey levels, uniformly dequantized; kind=coupling|autoregressive",
        DequantizedFlow.for_data,
        lambda settings: "bytes",
        50,
        1e-3,
    ),
    "ppca": Entry(
        "probabilistic PCA, exact; guide=exact|mean_field", PPCA.for_data, lambda settings: "grey", 50, 1e-2
    ),
    "mixture": Entry(
        "Gaussian mixture, exact; covariance=diagonal|full, guide=exact|encoder",
        GaussianMixture.for_data,
        lambda settings: "grey",
        50,
        1e-2,
    ),
    "bernoulli_mixture": Entry(
        "Bernoulli mixture, exact; guide=exact|encoder",
        BernoulliMixture.for_data,
        lambda settings: "binary",
        50,
        1e-2,
    ),
}


def entry(name: str) -> Entry:
    if name not in REGISTRY:
        raise ValueError(f"model: expected one of {', '.join(REGISTRY)}, got {name!r}")
    return REGISTRY[name]


def build(name: str, dataset: str, settings: dict[str, Any], train: Any = None) -> Pair:
    """The pair of this name for images of ``dataset``, initialized from ``train`` if that is given."""
    make = entry(name).make
    return make(train, data.shape(dataset), data.levels(dataset), **_checked(name, settings))


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings of a model, besides the shape of its data."""
    owner = getattr(entry(name).make, "__self__", entry(name).make)
    found = inspect.signature(owner).parameters
    return {k: p for k, p in found.items() if k not in ("shape", "dims", "levels")}


_LARGEST = 10**6  # of an integer setting


def _checked(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose types are those of the model's defaults; raises ValueError, naming the first that is
    not."""
    known = settings_of(name)
    checked = {}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"settings: expected some of {', '.join(known)} for model {name!r}, got {key!r}")
        default = known[key].default
        if isinstance(default, tuple):
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        single = default[0] if isinstance(default, tuple) and default else default
        kinds = (int, float) if single is None or isinstance(single, float) else type(single)
        for each in value if isinstance(default, tuple) else (value,):
            fits = isinstance(each, kinds) and not isinstance(each, bool)
            if not (fits or (each is None and default is None)):
                raise ValueError(
                    f"{key}: expected a value like {default!r} for model {name!r}, got {value!r}"
                )
            if isinstance(each, int) and abs(each) > _LARGEST:
                raise ValueError(f"{key}: expected at most {_LARGEST}, got {each}")
        checked[key] = value
    return checked


def load(path: str | Path) -> tuple[Pair, dict[str, Any]]:
    """The trained pair of a run directory, and the run's configuration.

    Raises FileNotFoundError or ValueError for a directory without a run, damaged files, or weights of another
    pair.
    """
    run = RunDirectory(path)
    config = run.config()
    file = run.path / "config.json"
    if "model" not in config:
        raise ValueError(
            f"{file}: expected the name of a model, got none: it was not started by `pyroelbo train`"
        )
    kinds = {"model": str, "data": str, "settings": dict}
    if not all(isinstance(config.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{file} is damaged: expected {', '.join(kinds)}")
    tensors, _ = run.load_weights()
    try:
        # The shapes alone first: damaged settings may ask for more memory than there is.
        with torch.device("meta"), suppress(RuntimeError):  # networks of Pyro's read values as they are built
            check_same(_state(build(config["model"], config["data"], config["settings"])), tensors, str(path))
        pair = build(config["model"], config["data"], config["settings"])
        copy_into(_state(pair), tensors, str(path))
    except ValueError as error:
        # The run names this very model and its settings, so the code or a file is another.
        raise ValueError(
            f"{error}: pyroelbo {config['pyroelbo']}, which trained it, built the model {config['model']!r} "
            f"otherwise; train it anew, load it with that version, or look for damage in {file}"
        ) from error
    return pair.eval(), config


def _state(pair: Pair) -> dict[str, Tensor]:
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}

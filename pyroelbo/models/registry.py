"""The registry of models that the command line trains: one row per model."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.data import KINDS, Dataset, view, views
from pyroelbo.data.formulas import formula_of
from pyroelbo.encoders import ENCODERS
from pyroelbo.models.autoregressive import Autoregressive, Strings
from pyroelbo.models.byte_vae import ByteVAE
from pyroelbo.models.chow_liu import HiddenChowLiuTree
from pyroelbo.models.conv_ladder import ConvLadder
from pyroelbo.models.ctc import CTC
from pyroelbo.models.diffusion import Diffusion, DiscreteDiffusion
from pyroelbo.models.discrete_vae import DiscreteVAE, SigmoidBeliefNet
from pyroelbo.models.flow import DequantizedFlow, Flow
from pyroelbo.models.grammar import PCFG, NeuralPCFG
from pyroelbo.models.hierarchy import Hierarchy
from pyroelbo.models.hmm import HMM
from pyroelbo.models.ladder import Ladder
from pyroelbo.models.masked import MaskedDiffusion
from pyroelbo.models.mixture import BernoulliMixture, GaussianMixture
from pyroelbo.models.observation import LIKELIHOODS
from pyroelbo.models.ppca import PPCA
from pyroelbo.models.rate_distortion import RateDistortion
from pyroelbo.models.sat import SAT
from pyroelbo.models.sentences import SentenceVAE
from pyroelbo.models.state_space import StateSpace
from pyroelbo.models.style import StyleVAE
from pyroelbo.models.superpixel import Superpixel
from pyroelbo.models.topics import LDA
from pyroelbo.models.vae import VAE
from pyroelbo.models.vdm import VDM
from pyroelbo.models.vq_chain import VQChain
from pyroelbo.models.vq_vae import FSQVAE, SQVAE, VQVAE
from pyroelbo.pair import Pair
from pyroelbo.priors import PRIORS
from pyroelbo.runs import RunDirectory, check_same, copy_into

__all__ = ["REGISTRY", "Entry", "build", "entry", "load", "matched", "settings_of"]

Kinds = Mapping[str, Mapping[str, Sequence[str]]]


@dataclass(frozen=True)
class Entry:
    """A row of the registry.

    Args:
        about: one line of ``pyroelbo models``.
        pair: the class; the arguments of its constructor but those of ``sizes`` are the model's settings.
        kinds: the kinds of data that it takes (:data:`pyroelbo.data.KINDS`), the first choice first, each
            with the settings that this kind needs: the values that fit, the default first.
        sizes: the arguments of the constructor that the data determine.
        data: the data set that stands for none.
        settings: values of settings that have no default in the constructor.
        epochs, learning_rate, objective, particles: defaults of the command line.
    """

    about: str
    pair: Callable[..., Pair]
    kinds: Kinds
    sizes: Callable[[Dataset], dict[str, Any]]
    data: str = "digits"
    settings: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 50
    learning_rate: float = 1e-3
    objective: str = "elbo"
    particles: int = 1


def _pixels(*names: str) -> Kinds:
    """The kinds of the pixel likelihoods of these names."""
    kinds: dict[str, dict[str, list[str]]] = {}
    for name in names:
        for kind in LIKELIHOODS[name][1]:
            kinds.setdefault(kind, {"likelihood": []})["likelihood"].append(name)
    return kinds


def _picture(data: Dataset) -> dict[str, Any]:
    return {"shape": data.shape, "levels": data.levels}


def _levels(data: Dataset) -> dict[str, Any]:
    return {"shape": data.shape, "levels": data.levels or None, "classes": data.classes or None}


def _symbols(data: Dataset) -> dict[str, Any]:
    return {**_picture(data), "classes": data.classes or None}


def _row(data: Dataset) -> dict[str, Any]:
    return {"dims": data.dims}


def _words(data: Dataset) -> dict[str, Any]:
    return {"words": data.levels, "steps": max(data.steps, 100)}


REGISTRY: dict[str, Entry] = {
    "vae": Entry(
        f"VAE; network=mlp|gated|conv, encoder={'|'.join(ENCODERS)}, prior={'|'.join(PRIORS)}|diffusion",
        VAE,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
    ),
    "hierarchy": Entry(
        "chain of Gaussian latents; order=bottom-up|top-down, encoder and prior (at the top) as vae",
        Hierarchy,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
    ),
    "ladder": Entry(
        "top-down VAE of Gaussian layers; merge=network|precision, norm=batch|layer|none, encoder and prior "
        "as vae",
        Ladder,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
    ),
    "conv_ladder": Entry(
        "top-down VAE of latent maps at several resolutions, groups=2,2,1; prior as vae",
        ConvLadder,
        kinds={k: v for k, v in _pixels(*LIKELIHOODS).items() if k != "vectors"},
        sizes=_picture,
        epochs=30,
    ),
    "style_vae": Entry(
        "style-based generator with its inverter: a style and noise maps at several sizes; prior as vae",
        StyleVAE,
        kinds={k: v for k, v in _pixels(*LIKELIHOODS).items() if k != "vectors"},
        sizes=_picture,
    ),
    "autoregressive": Entry(
        "pixels one after the other, exact; network=pixelcnn|transformer",
        Autoregressive,
        kinds=_pixels("bernoulli", "categorical"),
        sizes=_picture,
        epochs=20,
    ),
    "diffusion": Entry(
        "Gaussian diffusion in steps=T, a bound; schedule=cosine|linear, parametrization=v|eps|x0, "
        "variance=learned|beta|beta_tilde, network=mlp|unet|linear",
        Diffusion,
        kinds={"bytes": {}, "binary": {}, "vectors": {}, "grey": {}},
        sizes=_levels,
        epochs=100,
    ),
    "vdm": Entry(
        "Gaussian diffusion in continuous time, a bound; network=mlp|unet, "
        "schedule=learned|per_dimension|linear|cosine, parametrization=v|levels",
        VDM,
        kinds={"bytes": {}, "binary": {}, "vectors": {}, "grey": {}},
        sizes=_levels,
        epochs=100,
    ),
    "discrete_diffusion": Entry(
        "diffusion of symbols by uniform noise in steps=T, a bound; schedule=cosine|linear",
        DiscreteDiffusion,
        kinds={"bytes": {}, "binary": {}},
        sizes=_symbols,
        epochs=100,
    ),
    "masked_diffusion": Entry(
        "tokens revealed in random order, a bound; network=mlp|conv|transformer, "
        "likelihood=discretized_logistic|categorical|bernoulli",
        MaskedDiffusion,
        kinds=_pixels("discretized_logistic", "categorical", "bernoulli"),
        sizes=_symbols,
        epochs=100,
    ),
    "flow": Entry(
        "normalizing flow on grey levels, uniformly dequantized; kind=coupling|autoregressive",
        DequantizedFlow,
        kinds={"bytes": {}},
        sizes=lambda data: {"dims": data.dims, "levels": data.levels},
    ),
    "discrete_vae": Entry(
        "VAE of binary or categorical latents, one layer or several; likelihood as vae",
        DiscreteVAE,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
        objective="rloo",
        particles=4,
    ),
    "sbn": Entry(
        "sigmoid belief net: layers of binary units, linear maps; likelihood as vae",
        SigmoidBeliefNet,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
        objective="rloo",
        particles=4,
    ),
    "vq_vae": Entry(
        "VAE whose codes are the nearest of a codebook=ema|gradient; network=mlp|conv, "
        "prior=autoregressive|factorized|uniform",
        VQVAE,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
    ),
    "fsq_vae": Entry(
        "VAE whose codes are rounded numbers, bins=4,4,4; network and prior as vq_vae",
        FSQVAE,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
    ),
    "sq_vae": Entry(
        "VAE of codes drawn near those of a codebook; network and prior as vq_vae",
        SQVAE,
        kinds=_pixels(*LIKELIHOODS),
        sizes=_picture,
        objective="straight_through",
    ),
    "byte_vae": Entry(
        "chain of vectors of bytes with a deterministic encoder, latent=16,8; loss=bound|squared; likelihood "
        "as vae",
        ByteVAE,
        kinds=_pixels("categorical", *(name for name in LIKELIHOODS if name != "categorical")),
        sizes=_picture,
        learning_rate=2e-3,
    ),
    "progressive_vae": Entry(
        "byte_vae of narrow codes, trained layer by layer without what is above, the prior on the top codes",
        ByteVAE,
        kinds=_pixels("categorical", *(name for name in LIKELIHOODS if name != "categorical")),
        sizes=_picture,
        settings={"latent": (6, 3), "values": 4},
        learning_rate=2e-3,
        objective="progressive",
    ),
    "vq_chain": Entry(
        "chain of codes of a codebook a layer, positions=6,3, trained layer by layer; likelihood as vae",
        VQChain,
        kinds=_pixels("categorical", *(name for name in LIKELIHOODS if name != "categorical")),
        sizes=_picture,
        learning_rate=2e-3,
        objective="progressive",
    ),
    "rate_distortion": Entry(
        "autoencoder of rounded codes, weight=λ of the distortion; quantization=noise|straight_through",
        RateDistortion,
        kinds=_pixels("discretized_normal", "discretized_laplace", "l2", "l1"),
        sizes=_picture,
    ),
    "ppca": Entry(
        "probabilistic PCA, exact; guide=exact|mean_field, noise=shared|diagonal",
        PPCA,
        kinds={"grey": {}, "vectors": {}},
        sizes=_row,
        learning_rate=1e-2,
    ),
    "mixture": Entry(
        "Gaussian mixture, exact; covariance=diagonal|full, guide=exact|encoder",
        GaussianMixture,
        kinds={"grey": {}, "vectors": {}},
        sizes=_row,
        learning_rate=1e-2,
    ),
    "bernoulli_mixture": Entry(
        "Bernoulli mixture, exact; guide=exact|encoder",
        BernoulliMixture,
        kinds={"binary": {}},
        sizes=_row,
        learning_rate=1e-2,
    ),
    "chow_liu": Entry(
        "tree of finite latents found in the data, each seen through a noisy pixel, exact",
        HiddenChowLiuTree,
        kinds={"binary": {}},
        sizes=_picture,
    ),
    "density_flow": Entry(
        "normalizing flow, an exact density; kind=coupling|autoregressive",
        Flow,
        kinds={"vectors": {}, "grey": {}},
        sizes=_row,
        data="wine",
    ),
    "hmm": Entry(
        "hidden Markov model, exact; guide=exact|mean_field",
        HMM,
        kinds={
            "symbols": {"emission": ("categorical",)},
            "series": {"emission": ("gaussian", "full_gaussian")},
            "counts": {"emission": ("poisson", "bernoulli")},
        },
        sizes=lambda data: {
            "dims": data.levels if data.kind == "symbols" else data.dims,
            "steps": data.steps,
        },
        data="words",
        settings={"states": 8},
        learning_rate=1e-2,
    ),
    "state_space": Entry(
        "linear-Gaussian state-space model, exact; guide=exact|mean_field",
        StateSpace,
        kinds={"series": {}},
        sizes=lambda data: {"dims": data.dims, "steps": data.steps},
        data="digit_strings",
        learning_rate=1e-2,
    ),
    "strings": Entry(
        "symbols one after the other and a stop symbol, by a transformer, exact",
        Strings,
        kinds={"strings": {}},
        sizes=lambda data: {"length": data.steps, "symbols": data.levels},
        data="words",
        epochs=20,
    ),
    "sentence_vae": Entry(
        "VAE of texts, written word by word; network=gru|window, encoder and prior as vae",
        SentenceVAE,
        kinds={"sentences": {}},
        sizes=lambda data: {"length": data.steps, "symbols": data.levels},
        data="expressions",
    ),
    "lda": Entry(
        "topics of documents, the order of words aside; exact for few topics",
        LDA,
        kinds={"sentences": {}},
        sizes=lambda data: {"vocabulary": data.levels, "length": data.steps},
        data="docstrings",
        learning_rate=1e-2,
    ),
    "pcfg": Entry(
        "probabilistic grammar, exact; guide=exact|mean_field",
        PCFG,
        kinds={"sentences": {}},
        sizes=_words,
        data="expressions",
        settings={"nonterminals": 5, "preterminals": 20},
        learning_rate=1e-2,
    ),
    "neural_pcfg": Entry(
        "probabilistic grammar whose rules are networks, exact; guide=exact|mean_field",
        NeuralPCFG,
        kinds={"sentences": {}},
        sizes=_words,
        data="expressions",
        settings={"nonterminals": 5, "preterminals": 20},
        epochs=20,
    ),
    "sat": Entry(
        "assignments that satisfy a formula, counted exactly by a decision diagram; guide=autoregressive "
        "learns them",
        SAT,
        kinds={"formula": {}},
        sizes=lambda data: {"formula": formula_of(data.shape[0], data.names)},
        data="map_colouring",
        settings={"guide": "autoregressive"},
        epochs=200,
        learning_rate=1e-2,
        objective="rloo",
        particles=64,
    ),
    "superpixel": Entry(
        "colours of a grey picture by segments of superpixels; prior=tree|independent, "
        "guide=contrast|tree|independent",
        Superpixel,
        kinds={"superpixels": {}},
        sizes=lambda data: {},
        data="scenes",
        epochs=200,
        learning_rate=5e-3,
        objective="rloo",
        particles=4,
    ),
    "ctc": Entry(
        "labels of a sequence, summed over all alignments, exact; guide=exact|local",
        CTC,
        kinds={"labelled": {}},
        sizes=lambda data: {"dims": data.dims, "labels": data.levels},
        data="digit_strings",
        epochs=10,
        learning_rate=3e-3,
    ),
}


def entry(name: str) -> Entry:
    """The row of this name; of ``module:Class``, a pair of the user's own, see :func:`own`."""
    if ":" in name:
        return own(name)
    if name not in REGISTRY:
        raise ValueError(
            f"model: expected one of {', '.join(REGISTRY)}, or module:Class of your own, got {name!r}"
        )
    return REGISTRY[name]


_FROM_DATA = ("shape", "dims", "levels", "steps")


def own(name: str) -> Entry:
    """A row for ``module:Class``, a subclass of Pair in the file ``module.py`` of the working folder, which
    is imported.

    The arguments ``shape``, ``dims``, ``levels`` and ``steps`` of its constructor, as far as it has them, are
    those of the data (:class:`~pyroelbo.data.Dataset`), and so is ``classes`` of data given their classes;
    its others are settings. It is given data of any kind as they are, or as one of the ``kinds`` that the
    class names in an attribute.
    """
    module, _, title = name.partition(":")
    path = Path(f"{module}.py").absolute()
    if not module.isidentifier() or not path.is_file():
        raise ValueError(f"model: expected module:Class in the working folder, got {name!r}: no file {path}")
    found = _imported(path)
    made = getattr(found, title, None)
    if not isinstance(made, type) or not issubclass(made, Pair):
        pairs = [k for k, v in vars(found).items() if isinstance(v, type) and issubclass(v, Pair)]
        raise ValueError(f"model: expected a subclass of Pair in {path}, got {title!r}; it has {pairs}")
    takes = inspect.signature(made).parameters
    return Entry(
        f"from {path}",
        made,
        kinds={kind: {} for kind in getattr(made, "kinds", KINDS)},
        sizes=lambda data: {
            key: getattr(data, key)
            for key in (*_FROM_DATA, *(("classes",) if data.classes else ()))
            if key in takes
        },
    )


@cache
def _imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


def matched(name: str, data: Dataset, settings: Mapping[str, Any]) -> tuple[Dataset, dict[str, Any]]:
    """The data as they are, or else as the first kind that this model takes under these settings, and the
    settings with those that the kind needs.

    Raises ValueError for data that cannot be seen as such a kind, naming what the model takes and which
    models take the data, and for settings that no kind has.
    """
    kinds, settings = entry(name).kinds, _checked(name, settings)
    for key in {key for needs in kinds.values() for key in needs}:
        known = dict.fromkeys(value for needs in kinds.values() for value in needs.get(key, ()))
        if key in settings and settings[key] not in known:
            raise ValueError(f"{key}: expected one of {', '.join(known)}, got {settings[key]!r}")
    fitting = {
        kind: {key: settings.get(key, values[0]) for key, values in needs.items()}
        for kind, needs in kinds.items()
        if all(settings.get(key, values[0]) in values for key, values in needs.items())
    }
    keys = sorted({key for needs in kinds.values() for key in needs if key in settings})
    model = f"{name} with {', '.join(f'{key}={settings[key]}' for key in keys)}" if keys else name
    try:
        data = view(data, [kind for kind in (data.kind, *fitting) if kind in fitting], model)
    except ValueError as error:
        raise ValueError(f"{error}; {_remedy(kinds, data)}") from error
    return data, settings | fitting[data.kind]


def _remedy(kinds: Kinds, data: Dataset) -> str:
    """The settings under which a model takes the data, or the models that do."""
    ways = [
        f"{key}={'|'.join(values)}"
        for kind, needs in kinds.items()
        if kind in views(data.kind)
        for key, values in needs.items()
    ]
    others = [other for other, row in REGISTRY.items() if set(row.kinds) & set(views(data.kind))]
    return f"use {' or '.join(ways)}" if ways else f"{data.kind} are for {', '.join(others) or 'no model'}"


def build(name: str, data: Dataset, settings: Mapping[str, Any] | None = None) -> Pair:
    """The pair of this name for data of this kind and these sizes, initialized from its split "train", if it
    has one and the pair can be."""
    row = entry(name)
    data, settings = matched(name, data, settings or {})
    if data.classes and "classes" not in row.sizes(data):
        blank = Dataset("none", "bytes", (1, 1), {})
        able = ", ".join(k for k, other in REGISTRY.items() if "classes" in other.sizes(blank))
        raise ValueError(f"conditional: expected a model of classes, {able}, got {name}")
    pair = row.pair(**row.sizes(data), **{**row.settings, **settings})
    if "train" in data.splits and hasattr(pair, "initialize"):
        batches.call(pair.initialize, data["train"])
    return pair


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings of a model: the arguments of its constructor that the data do not determine."""
    row = entry(name)
    blank = Dataset("none", next(iter(row.kinds)), (1, 1), {})
    found = inspect.signature(row.pair).parameters
    return {
        k: p.replace(default=row.settings.get(k, p.default))
        for k, p in found.items()
        if k not in row.sizes(blank)
    }


_LARGEST = 10**6  # of an integer setting


def _checked(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose types are those of the model's defaults; raises ValueError, naming the first that is
    not."""
    known = settings_of(name)
    checked = {}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"settings: expected some of {', '.join(known)} for model {name!r}, got {key!r}")
        default = known[key].default
        if default is inspect.Parameter.empty:  # of a pair of the user's own
            checked[key] = value
            continue
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


def load(path: str | Path) -> tuple[Pair, dict[str, Any], Dataset]:
    """The trained pair of a run directory, the run's configuration, and the data set without its splits.

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
    kinds = {"model": str, "data": dict, "settings": dict}
    if not all(isinstance(config.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{file} is damaged: expected {', '.join(kinds)}")
    try:
        data = Dataset.described(config["data"])
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    tensors, _ = run.load_weights()
    try:
        # The shapes alone first: damaged settings may ask for more memory than there is.
        with torch.device("meta"), suppress(RuntimeError):  # networks of Pyro's read values as they are built
            check_same(_state(build(config["model"], data, config["settings"])), tensors, str(path))
        pair = build(config["model"], data, config["settings"])
        copy_into(_state(pair), tensors, str(path))
    except ValueError as error:
        # The run names this very model and its settings, so the code or a file is another.
        raise ValueError(
            f"{error}: pyroelbo {config['pyroelbo']}, which trained it, built the model {config['model']!r} "
            f"otherwise; train it anew, load it with that version, or look for damage in {file}"
        ) from error
    return pair.eval(), config, data


def _state(pair: Pair) -> dict[str, Tensor]:
    return {**dict(pair.named_parameters()), **dict(pair.named_buffers())}

"""Sizes that are no positive whole numbers are refused at the door, by every model, and named."""

import inspect

import numpy as np
import pytest

from pyroelbo import models

NEEDED = {"shape": (8, 8), "dims": 3, "latent": 2}  # of arguments without a default; others are 4
UNUSED = {  # by the likelihood, prior, decoder or guide that is the default
    "levels", "components", "channels", "reach",
} | {"MixtureOfExperts.hidden"}  # fmt: skip
LAYERS = "layers"  # a network may have none


def sizes():
    for name in models.__all__:
        cls = getattr(models, name)
        if not inspect.isclass(cls) or name in ("Chain", "Entry", "SAT"):
            continue
        parameters = [
            p for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        needed = {p.name: NEEDED.get(p.name, 4) for p in parameters if p.default is p.empty}
        for p in parameters:
            value = needed.get(p.name, p.default)
            entries = value if isinstance(value, tuple) else (value,)
            whole = all(isinstance(v, int) and not isinstance(v, bool) for v in entries) and entries
            if whole and not UNUSED & {p.name, f"{name}.{p.name}"}:
                yield pytest.param(cls, needed, p.name, value, id=f"{name}.{p.name}")


@pytest.mark.parametrize("bad", (0, -1, 2.5))
@pytest.mark.parametrize("cls, needed, name, value", list(sizes()))
def test_refused(cls, needed, name, value, bad):
    cls(**needed)
    if name == LAYERS and bad == 0:
        return
    wrong = (bad,) * len(value) if isinstance(value, tuple) else bad
    with pytest.raises(ValueError, match=rf"{name.rstrip('s')}s?\b.*: expected"):
        cls(**{**needed, name: wrong})


def test_numpy_integers_are_sizes_of_data():
    assert models.VAE((np.int64(8), np.int64(8))).shape == (8, 8)
    assert models.VAE(np.int64(5)).shape == (5,)

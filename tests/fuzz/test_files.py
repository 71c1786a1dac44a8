"""Mutated files end in errors of ours that name the file, in bounded time and memory, or are read.

The default run tries some hundred mutations of each kind of file; ``-m slow`` (``make fuzz``) tries 10^5 in
all.
"""

import json
import random
import resource
import shutil
import warnings

import numpy as np
import pytest
import torch

from pyroelbo import data, files, fit, models
from pyroelbo.runs import RunDirectory

FEW, MANY = 300, 20_000
TOKENS = [
    b"null",
    b"-1",
    b"1e999",
    b"[]",
    b"{}",
    b'""',
    b"NaN",
    b"[" * 5000,
    b"99999999999999999999",
    b"\x00",
    b"\xff",
]

DIGITS = data.Dataset("digits", "binary", (8, 8), {}, 2).describe()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a small VAE, and a data set of four images."""
    folder = tmp_path_factory.mktemp("fuzz")
    torch.manual_seed(0)
    pair = models.VAE((8, 8), 2, (4,))
    y = (torch.rand(8, 64) < 0.5).double()
    config = {"model": "vae", "data": DIGITS, "settings": {"latent": 2, "hidden": [4]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(pair, y, valid=y, epochs=2, batch_size=8, out=folder / "run", config=config, progress=False)
    np.savez_compressed(
        folder / "binarized_mnist.npz", **{k: np.zeros((4, 98), np.uint8) for k in ("train", "valid", "test")}
    )
    return folder


def mutated(content, generator):
    """Some bytes changed, cut, repeated, or replaced by what parsers stumble over."""
    content = bytearray(content)
    for _ in range(generator.choice([1, 1, 2, 5])):
        i = generator.randrange(len(content) + 1)
        j = min(len(content), i + generator.choice([1, 2, 8, 40]))
        kind = generator.randrange(6)
        if kind == 0:
            content[i:j] = bytes(generator.randrange(256) for _ in range(j - i))
        elif kind == 1:
            del content[i:]
        elif kind == 2:
            content[i:i] = content[i:j] * generator.choice([1, 3])
        elif kind == 3:
            content[i:j] = generator.choice(TOKENS)
        elif kind == 4:
            del content[i:j]
        elif content:
            k = generator.randrange(len(content))
            content[k] ^= 1 << generator.randrange(8)
    return bytes(content)


def read_all(run):
    """What resuming and loading read."""
    directory = RunDirectory(run)
    models.load(run)
    directory.metrics()
    loaded = directory.load_checkpoint()
    if loaded is not None:
        with directory.restoring():
            directory.keep_metrics(directory.count(loaded[1], "rows"))


def attack(path, read, tries, seed):
    good = path.read_bytes()
    generator = random.Random(seed)
    refused, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(tries):
        path.write_bytes(mutated(good, generator))
        try:
            read()
        except (ValueError, OSError, TypeError) as error:
            refused += 1
            assert type(error) is not TypeError or "setting" in str(error), repr(error)
            assert path.name in str(error) or str(path.parent) in str(error) or "setting" in str(error), repr(
                error
            )
    path.write_bytes(good)
    read()
    assert refused > tries / 10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    assert grown < 3, f"{grown:.1f} GiB"


@pytest.mark.parametrize("tries", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "checkpoint.safetensors", "weights.safetensors"]
)
def test_run_directories(finished, name, tries, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    attack(run / name, lambda: read_all(run), tries, seed=1)


@pytest.mark.parametrize("tries", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_data_sets(finished, tries, tmp_path):
    path = tmp_path / "binarized_mnist.npz"
    shutil.copy(finished / path.name, path)
    attack(path, lambda: data.load("binarized_mnist", root=tmp_path), tries, seed=2)


@pytest.mark.parametrize("tries", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mine.npz", "mine.npy", "mine.csv"])
def test_files_of_ones_own(name, tries, tmp_path):
    path, draw = tmp_path / name, np.random.default_rng(0)
    if name == "mine.npz":
        np.savez(path, train=draw.normal(size=(3, 4, 2)), lengths=np.array([1, 4, 2]))
    elif name == "mine.npy":
        np.save(path, draw.integers(0, 5, (3, 4)))
    else:
        path.write_text("a,b\n" + "".join(f"{x:.4g},{x * x:.4g}\n" for x in draw.normal(size=6)))
    attack(path, lambda: data.load(path), tries, seed=3)


def test_json_of_any_depth_and_kind(tmp_path):
    path = tmp_path / "x.json"
    for text in ("[" * 10**5, "1" * 10**5, "{" + '"a":{' * 5000, '"\\ud800"', "nul", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x.json"):
            files.read_json(path)
    path.write_text(json.dumps({"a": 1}))
    assert files.read_json(path) == {"a": 1}

import dataclasses
import json

import numpy as np
import pytest
import torch

from pyroelbo import data


def test_digits():
    own, grey, binary = (data.load("digits", kind) for kind in (None, "grey", "binary"))
    assert {k: len(v) for k, v in own.splits.items()} == {"train": 1297, "valid": 200, "test": 300}
    assert own.kind == "bytes" and own["train"].max() == own.levels - 1 == 16
    assert torch.equal(own["test"], grey["test"] * 16)
    assert torch.equal(binary["test"] == 1, grey["test"] > 0.5) and binary.levels == 2 and grey.levels == 0
    assert own.labels["test"].shape == (300,)
    names = "digits, iris, wine, breast_cancer, words, expressions, docstrings, digit_strings, scenes"
    with pytest.raises(ValueError, match=f"data: expected one of {names}, .* got 'cifar'"):
        data.load("cifar")
    with pytest.raises(ValueError, match="data: expected series, got digits, bytes"):
        data.load("digits", "series")


def test_patches_are_squares_of_the_photographs():
    skimage = pytest.importorskip("skimage.data")
    found = data.load("patches")
    assert {k: len(v) for k, v in found.splits.items()} == {"train": 4552, "valid": 500, "test": 500}
    assert found.shape == (16, 16) and found.kind == "bytes" and found.levels == 256
    every = torch.cat(list(found.splits.values()))
    square = torch.from_numpy(skimage.camera()[32:48, 16:32].astype(float)).reshape(-1)
    assert (every == square).all(1).sum() == 1


def test_a_description_is_read_back_and_nothing_else_is():
    digits = data.load("digits", "grey")
    found = data.Dataset.described(json.loads(json.dumps(digits.describe())))
    assert found == dataclasses.replace(digits, splits={}, labels={})
    for damaged in (
        {},
        {"kind": "grey"},
        found.describe() | {"kind": "colours"},
        found.describe() | {"shape": [-1]},
        found.describe() | {"levels": 1.5},
        found.describe() | {"steps": 2**40},
        found.describe() | {"extra": 1},
    ):
        with pytest.raises(ValueError, match="^data: expected|^kind: expected"):
            data.Dataset.described(damaged)


def test_a_description_without_later_fields_is_read():
    digits = data.load("digits")
    early = {k: v for k, v in digits.describe().items() if k not in ("light", "classes")}
    assert data.Dataset.described(early) == dataclasses.replace(digits, splits={}, labels={})


def test_data_given_their_classes():
    wine = data.load("wine").standardized()
    given = wine.conditional()
    assert given.classes == 3 and given.parts == ("class", "y") and wine.parts == ("y",)
    for split, (labels, y) in given.splits.items():
        assert torch.equal(labels, wine.labels[split]) and torch.equal(y, wine[split])
    torch.testing.assert_close(given.log_scale(given["test"]), wine.log_scale(wine["test"]))
    assert given.numbers(given["test"]) == wine.numbers(wine["test"]) == 13
    assert data.Dataset.described(given.describe()).classes == 3
    negative, wide = (
        dataclasses.replace(wine, labels={k: change(v) for k, v in wine.labels.items()})
        for change in (lambda v: v - 1, lambda v: v * 1_000_000)
    )
    for wrong, message in (
        (data.load("words"), "got words, strings without classes"),
        (data.load("digit_strings"), "a class for each datum, got digit_strings"),
        (dataclasses.replace(wine, labels={"train": wine.labels["train"]}), "a class for each datum"),
        (given, "a class for each datum"),
        (negative, "classes from 0 on, got -1"),
        (wide, "classes numbered 0, 1, …, got 2000000 among 178 data"),
    ):
        with pytest.raises(ValueError, match=f"conditional: .*{message}"):
            wrong.conditional()


def test_files_are_read_by_path(tmp_path, monkeypatch):
    bits = (np.arange(784) % 3 == 0).astype(np.uint8)
    np.savez(
        tmp_path / "binarized_mnist.npz",
        **{k: np.packbits(bits[None], axis=1) for k in ("train", "valid", "test")},
    )
    assert torch.equal(
        data.load("binarized_mnist", root=tmp_path)["test"][0], torch.from_numpy(bits).double()
    )
    monkeypatch.setenv("PYROELBO_DATA", str(tmp_path))
    assert data.load("binarized_mnist")["train"].shape == (1, 784)
    with pytest.raises(FileNotFoundError, match="mnist.npz"):
        data.load("mnist")
    monkeypatch.delenv("PYROELBO_DATA")
    with pytest.raises(FileNotFoundError, match="PYROELBO_DATA"):
        data.load("mnist")


def test_stochastic_binarization():
    x = torch.full((20000,), 0.3)
    assert abs(float(data.binarize(x).mean()) - 0.3) < 5 * (0.21 / 20000) ** 0.5

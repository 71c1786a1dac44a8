import numpy as np
import pytest
import torch

from pyroelbo import data


def test_digits():
    grey, binary, levels = (data.load("digits", form=f) for f in ("grey", "binary", "bytes"))
    assert {k: len(v) for k, v in grey.items()} == {"train": 1297, "valid": 200, "test": 300}
    assert set(binary["train"].unique().tolist()) == {0.0, 1.0}
    assert levels["train"].max() == data.levels("digits") - 1 == 16
    assert torch.equal(levels["test"], grey["test"] * 16)
    assert data.labels("digits")["test"].shape == (300,)
    with pytest.raises(
        ValueError, match="name: expected one of digits, binarized_mnist, mnist, omniglot, freyfaces, got"
    ):
        data.load("cifar")
    with pytest.raises(ValueError, match="form: expected 'grey', 'binary' or 'bytes', got 'colour'"):
        data.load("digits", form="colour")


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

import numpy as np
import pytest
import torch

from pyroelbo import data


def test_batches_from_tensors_arrays_tuples_and_dicts():
    x, y = torch.randn(3, 2), np.arange(3)
    for batch in (data.as_batch((x, y)), data.as_batch({"x": x, "y": y})):
        assert data.size(batch) == 3
        assert data.size(data.rows(batch, slice(0, 2))) == 2
        assert data.size(data.repeat(batch, 4)) == 12
    assert data.as_batch(np.zeros((2, 2), np.float32)).dtype == torch.float64
    assert data.as_batch(np.zeros(2, np.uint8)).dtype == torch.uint8
    assert data.call(lambda x, y: (x, y), {"y": 1, "x": 2}) == (2, 1)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.tensor([[1.0], [float("nan")]]), ValueError, "first in row 1"),
        (torch.tensor([float("inf")]), ValueError, "NaN or infinite"),
        (torch.zeros(0, 3), ValueError, "empty"),
        (torch.tensor(1.0), ValueError, "single number"),
        ((), ValueError, "at least one tensor"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"different lengths.*'data\[0\]': 3"),
        ("digits", TypeError, "takes a tensor"),
        (np.array(["a"]), TypeError, "takes numbers"),
        ({"x": None}, TypeError, r"data\['x'\]"),
    ],
)
def test_bad_batches_are_refused(bad, error, message):
    with pytest.raises(error, match=message):
        data.as_batch(bad)


def test_digits():
    grey, binary, levels = (data.load("digits", form=f) for f in ("grey", "binary", "bytes"))
    assert {k: len(v) for k, v in grey.items()} == {"train": 1297, "valid": 200, "test": 300}
    assert set(binary["train"].unique().tolist()) == {0.0, 1.0}
    assert levels["train"].max() == data.levels("digits") - 1 == 16
    assert torch.equal(levels["test"], grey["test"] * 16)
    assert data.labels("digits")["test"].shape == (300,)
    with pytest.raises(ValueError, match="unknown data set 'cifar'"):
        data.load("cifar")
    with pytest.raises(ValueError, match="form takes"):
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

"""Readers and writers."""

import numpy as np
import pytest

from pyroelbo import files


@pytest.mark.parametrize("shape", [(), (3, 2), (0, 4)])
def test_npy_files(shape, tmp_path):
    x = np.full(shape, 3, ">i2")
    np.save(tmp_path / "x.npy", x)
    again = files.read_npy(tmp_path / "x.npy")
    assert again.dtype == x.dtype and again.shape == shape and np.array_equal(again, x)


def test_damaged_npy_files(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(100))
    good = path.read_bytes()
    np.save(path, np.array([None, 3]), allow_pickle=True)
    for content in (
        b"",
        b"text",
        good[:50],
        good[:-1],
        good.replace(b"(100,)", b"(10**9,)"),
        path.read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x.npy is damaged"):
            files.read_npy(path)
    with pytest.raises(FileNotFoundError):
        files.read_npy(tmp_path / "none.npy")


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    files.write(path, b"old")
    with pytest.raises(KeyError), files.replacing(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(OSError, match="cannot write .*none/x"):
        files.write(tmp_path / "none" / "x", b"")
    with pytest.raises(FileNotFoundError, match="other"), files.replacing(path):
        (tmp_path / "other").read_bytes()

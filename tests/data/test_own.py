"""A user's own files: what their arrays hold, and one line for whatever is wrong with them."""

import numpy as np
import pytest
import torch

from pyroelbo import batch as batches
from pyroelbo import data

RNG = np.random.default_rng(0)
LENGTHS = np.array([3, 5, 1, 2])


def npz(**arrays):
    return lambda path: np.savez(path.with_suffix(".npz"), **arrays)


def npy(array):
    return lambda path: np.save(path.with_suffix(".npy"), array, allow_pickle=True)


def text(content, suffix):
    return lambda path: path.with_suffix(suffix).write_text(content, encoding="utf-8")


def read(write, tmp_path, **options):
    write(tmp_path / "mine")
    (path,) = tmp_path.iterdir()
    return data.load(path, **options)


REAL, WHOLE = RNG.normal(size=(4, 5, 2)), RNG.integers(0, 7, (4, 5))
LABELS = np.array([[1, 3], [2, -1], [1, 1], [3, 2]])


@pytest.mark.parametrize(
    ("write", "kind", "shape", "levels", "steps", "parts"),
    [
        (npy(REAL[:, 0]), "vectors", (2,), 0, 1, 1),
        (npy(REAL[:, 0].astype(np.float16)), "vectors", (2,), 0, 1, 1),
        (npy(REAL[:, 0].astype(">f8")), "vectors", (2,), 0, 1, 1),
        (npy(WHOLE - 3), "vectors", (5,), 0, 1, 1),
        (npz(train=REAL[:, 0], labels=LENGTHS), "vectors", (2,), 0, 1, 1),
        (npy(WHOLE), "symbols", (), 7, 5, 1),
        (npy(WHOLE > 3), "symbols", (), 2, 5, 1),
        (npz(train=WHOLE.astype(np.uint16), lengths=LENGTHS), "symbols", (), 7, 5, 2),
        (npy(np.array([[3, 1, -1], [-1, -1, -1]])), "strings", (), 4, 3, 1),
        (npy(REAL), "series", (2,), 0, 5, 1),
        (npz(train=REAL.astype(np.longdouble), lengths=LENGTHS), "series", (2,), 0, 5, 2),
        (npz(train=WHOLE[:, :, None], lengths=LENGTHS), "counts", (1,), 7, 5, 2),
        (npy((255 * RNG.random((4, 5, 2))).astype(np.uint8)), "counts", (2,), None, 5, 1),
        (npz(train=REAL, labels=LABELS), "labelled", (2,), 3, 5, 2),
        (npz(train=REAL, labels=LABELS, lengths=LENGTHS), "labelled", (2,), 3, 5, 3),
        (npy(RNG.integers(0, 256, (4, 5, 6, 3), np.uint8)), "colour", (5, 6, 3), 256, 1, 1),
        (text("a,b\n1,2\n3,4.5\n", ".csv"), "vectors", (2,), 0, 1, 1),
        (text("a\n1\n", ".CSV"), "vectors", (1,), 0, 1, 1),
        (text("to be\n\nor not\n", ".txt"), "strings", (), 7, 6, 1),
    ],
)
def test_the_kind_follows_from_shape_and_numbers(write, kind, shape, levels, steps, parts, tmp_path):
    found = read(write, tmp_path)
    assert (found.kind, found.shape, found.steps) == (kind, shape, steps)
    assert levels is None or found.levels == levels
    tensors = list(batches.parts(found["train"]).values())
    assert len(tensors) == parts and len({len(t) for t in tensors}) == 1
    kinds = {"colour": torch.uint8} | dict.fromkeys(("symbols", "strings", "counts"), torch.long)
    assert tensors[0].dtype == kinds.get(kind, torch.get_default_dtype())
    assert found.title.startswith("mine.") and set(found.splits) == {"train"}  # too few rows to hold some out


def test_columns_are_chosen_by_name(tmp_path):
    write = text("name,x,y,z\nanna,1,,2\nbob,3,,4\n", ".csv")
    found = read(write, tmp_path, columns=("z", "x"))
    assert found.names == ("z", "x") and found["train"].tolist() == [[2, 1], [4, 3]]


def test_a_fifth_is_held_out_for_the_test_and_a_tenth_to_validate(tmp_path):
    y = np.arange(100.0)[:, None]
    found = read(npz(train=y, labels=np.arange(100)), tmp_path)
    assert {k: len(v) for k, v in found.splits.items()} == {"train": 70, "valid": 10, "test": 20}
    assert sorted(torch.cat(list(found.splits.values())).flatten().tolist()) == y[:, 0].tolist()
    assert all(torch.equal(found[k][:, 0].long(), found.labels[k]) for k in found.splits)


def test_splits_of_the_file_are_kept(tmp_path):
    arrays = {"train": REAL, "test": REAL[:2, :4], "lengths": LENGTHS, "test_lengths": LENGTHS[2:]}
    found = read(npz(**arrays), tmp_path)
    assert set(found.splits) == {"train", "test"} and found.steps == 5
    torch.testing.assert_close(found["test"][0], torch.from_numpy(REAL[:2, :4]))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (text("a,b\n1,x\n", ".csv"), r"row 1, column 'b': expected a finite number, got 'x'; .*--columns a"),
        (text("a,b\n1,2\n3,\n", ".csv"), r"row 2, column 'b': expected a finite number, got none"),
        (text("a,b\n1,nan\n", ".csv"), r"row 1, column 'b': expected a finite number, got 'nan'"),
        (text("a,b\n1,2\n3\n", ".csv"), "row 2: expected 2 cells, as the header, got 1"),
        (text("1,2\n3,4\n", ".csv"), "expected a header of different names and rows of numbers"),
        (text("a,a\n3,4\n", ".csv"), "expected a header of different names"),
        (text("a,b\n", ".csv"), "expected a header of different names and rows of numbers, got 0 rows"),
        (text("", ".csv"), "got 0 rows"),
        (text(" \n\n", ".txt"), "expected lines of text, got none"),
        (lambda path: path.with_suffix(".txt").write_bytes(b"\xff\xfe\x00"), "mine.txt is damaged"),
        (lambda path: path.with_suffix(".npy").write_bytes(b"no array"), "mine.npy is damaged"),
        (lambda path: path.with_suffix(".npz").write_bytes(b"no archive"), "mine.npz is damaged"),
        (
            npy(np.array([{}, 1], object)),
            "'train': expected numbers, got an array of objects, which are never",
        ),
        (npz(train=np.array(["a", "b"])), "'train': expected numbers, got an array of <U1"),
        (
            npz(train=REAL, other=REAL),
            "expected arrays named train, valid, test, lengths, labels, got 'other'",
        ),
        (npz(test=REAL), "expected arrays named train, .* got no 'train' but test"),
        (npz(x=REAL), "expected arrays named train, .* got 'x'"),
        (npy(np.array(1.0)), "train: expected rows of data, got a single number"),
        (npy(np.zeros((0, 3))), r"train: expected at least one row, got shape \(0, 3\)"),
        (npy(np.zeros((3, 0), np.int64)), r"train: expected at least one number a row, got shape \(3, 0\)"),
        (npy(np.zeros((3, 0))), r"train: expected at least one number a row, got shape \(3, 0\)"),
        (npy(np.zeros(3)), r"train: expected \[N, D\], \[N, T, D\] or"),
        (npy(np.array([[1.0, np.nan]])), r"train: expected finite numbers, got nan at \[0, 1\]"),
        (
            npz(train=REAL, lengths=LENGTHS + 1),
            r"train_lengths: expected one of 1 … 5 per row, got 6 in row 1",
        ),
        (
            npz(train=REAL, lengths=LENGTHS * 0),
            "train_lengths: expected one of 1 … 5 per row, got 0 in row 0",
        ),
        (npz(train=REAL, lengths=LENGTHS[:2]), "train_lengths: expected 4 integers, one per row"),
        (
            npz(train=REAL, lengths=LENGTHS / 2),
            "train_lengths: expected 4 integers, one per row, got torch.float",
        ),
        (
            npz(train=REAL, test=REAL, lengths=LENGTHS),
            "test_lengths: expected them for all splits or for none",
        ),
        (
            npz(train=REAL, test=REAL[:, :, :1]),
            r"test: expected rows as train's \(4, 5, 2\), got \(4, 5, 1\)",
        ),
        (npz(train=REAL[:, 0], test=REAL[:, 0, :1]), "valid, test: expected 2 columns, as train"),
        (
            npz(train=REAL, labels=LABELS - 1),
            r"train_labels: expected labels from 1 on, then -1, got \[0, 2\]",
        ),
        (npz(train=REAL, labels=LABELS[:, ::-1]), r"train_labels: .* got \[-1, 2\] in row 1"),
    ],
)
def test_whatever_is_wrong_is_named(write, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(write, tmp_path)
    assert "mine." in str(error.value) and "\n" not in str(error.value)


def test_a_file_must_exist_and_have_a_known_ending(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv"):
        data.load(tmp_path / "none.csv")
    with pytest.raises(
        ValueError,
        match=r"or a file \*.npy, \*.npz, \*.csv, \*.txt, \*.cnf, or a folder of pictures, got '.*mine.pkl'",
    ):
        data.load(tmp_path / "mine.pkl")
    np.save(tmp_path / "x.npy", REAL)
    with pytest.raises(ValueError, match="columns: expected none for a .npy file, got a"):
        data.load(tmp_path / "x.npy", columns=("a",))

import numpy as np
import pandas
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from pyroelbo import batch as batches
from pyroelbo import fit
from pyroelbo.models import PPCA


def test_batches_from_tensors_arrays_tuples_and_dicts():
    x, y = torch.randn(3, 2), np.arange(3)
    for batch in (batches.as_batch((x, y)), batches.as_batch({"x": x, "y": y})):
        assert batches.size(batch) == 3
        assert batches.size(batches.rows(batch, slice(0, 2))) == 2
        assert batches.size(batches.repeat(batch, 4)) == 12
    assert batches.as_batch(np.zeros((2, 2), np.float32)).dtype == torch.float64
    assert batches.as_batch(np.zeros(2, np.uint8)).dtype == torch.uint8
    for kind in ("f2", ">f4", "f8", "g"):  # half, another byte order, long double
        assert batches.as_batch(np.ones(2, kind)).tolist() == [1.0, 1.0]
    for kind in ("u2", ">u4", "u8", ">i4", "i8"):
        assert batches.as_batch(np.full(2, 7, kind)).tolist() == [7, 7]
    assert batches.call(lambda x, y: (x, y), {"y": 1, "x": 2}) == (2, 1)


def test_numbers_that_the_default_dtype_cannot_hold_are_said():
    far = 1e6 + np.arange(5.0)[:, None]
    stamps = torch.arange(5) + 1_700_000_000
    whole = np.stack([np.full(5, 3e9), np.arange(5)], 1)  # a constant column loses nothing that varies
    batches.as_batch((far, stamps))  # float64 holds them
    torch.set_default_dtype(torch.float32)
    try:
        for data in (far, stamps, stamps.numpy(), {"x": far}):
            with pytest.warns(UserWarning, match=r"numbers as large as 1\S+ are rounded in torch.float32"):
                batches.as_batch(data)
        batches.as_batch((whole, np.arange(5), np.array([True, False] * 2 + [True]), far - 1e6))
    finally:
        torch.set_default_dtype(torch.float64)


def test_batches_from_pandas_frames():
    frame = pandas.DataFrame({"a": [1, 2], "b": [0.5, 4.0], "c": [True, False]})
    assert batches.as_batch(frame).tolist() == [[1, 0.5, 1], [2, 4, 0]]
    assert batches.as_batch(frame).dtype == torch.float64 and batches.as_batch(frame["a"]).tolist() == [1, 2]
    assert batches.as_batch(frame[["a"]].astype("Int64")).dtype == torch.int64
    assert batches.size(batches.as_batch((frame, frame["b"]))) == 2
    run = fit(PPCA(3, 1), frame, epochs=1, progress=False)
    assert run.stopped == "epochs"


def test_packed_sequences_are_parts():
    first = torch.arange(24.0).reshape(3, 4, 2)
    packed = pack_padded_sequence(first, torch.tensor([2, 4, 3]), batch_first=True, enforce_sorted=False)
    batch = batches.as_batch((torch.zeros(3), packed))
    assert batches.size(batch) == 3 and batches.size(batches.as_batch(packed)) == 3
    assert batches.call(lambda x: x, packed) is packed
    some = batches.rows(batch, torch.tensor([2, 0]))[1]
    right = first[[2, 0], :3].clone()
    right[1, 2] = 0.0  # padding of the shorter one
    assert torch.equal(batches.dense(some), right)
    twice = batches.repeat(batch, 2)[1]
    assert torch.equal(batches.dense(twice), batches.dense(packed).repeat(2, 1, 1))
    with pytest.raises(ValueError, match=r"data\[0\].*: 4"):
        batches.as_batch((torch.zeros(4), packed))


def test_absent_parts_are_none():
    for batch in (
        batches.as_batch((torch.zeros(3), None)),
        batches.as_batch({"y": torch.zeros(3), "x": None}),
    ):
        assert batches.size(batch) == 3 and len(batches.parts(batch)) == 1
        some = batches.rows(batches.repeat(batch, 2), slice(0, 2))
        assert list(some.values() if isinstance(some, dict) else some)[1] is None


def test_a_joint_batch_has_parts_of_any_shape():
    batch = batches.as_batch((torch.zeros(3), torch.zeros(4, 2), torch.tensor(1.0), 2, 0.5), scope="joint")
    assert batches.size(batch) == 3
    assert [part.dtype for part in batch[3:]] == [torch.int64, torch.float64]
    with pytest.raises(ValueError, match=r"data\[1\]: expected finite"):
        batches.as_batch((torch.zeros(3), torch.tensor(float("nan"))), scope="joint")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.tensor([[1.0], [float("nan")]]), ValueError, "expected finite entries.* row 1"),
        (torch.tensor([float("inf")]), ValueError, "got NaN or infinite"),
        (torch.zeros(0, 3), ValueError, r"expected at least one row, got shape \(0, 3\)"),
        (torch.tensor(1.0), ValueError, "got a single number"),
        ((), ValueError, "at least one tensor"),
        ((torch.zeros(3), torch.zeros(4)), ValueError, r"same first dimension, got lengths.*'data\[0\]': 3"),
        ("digits", TypeError, "expected a tensor"),
        (np.array(["a"]), TypeError, "expected numbers"),
        ({"x": None}, ValueError, "at least one tensor, got none"),
        (None, TypeError, "expected a tensor.*got NoneType"),
        ({"x": "y"}, TypeError, r"data\['x'\]"),
        (pandas.DataFrame({"a": ["x"]}), TypeError, "expected columns of numbers, got .* in column 'a'"),
        (
            pandas.DataFrame({"a": [1.0, 2.0], "b": [1.0, None]}, index=["r", "s"]),
            ValueError,
            "data: expected numbers, got a missing one in row 's', column 'b'",
        ),
        (
            pandas.DataFrame({"a": pandas.array([None, 2], "Int64")}),
            ValueError,
            "got a missing one in row 0, column 'a'",
        ),
        (pandas.DataFrame(index=[0, 1]), ValueError, "data: expected at least one column, got none"),
    ],
)
def test_bad_batches_are_refused(bad, error, message):
    with pytest.raises(error, match=message):
        batches.as_batch(bad)

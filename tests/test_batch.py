import numpy as np
import pandas
import pytest
import torch

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


def test_batches_from_pandas_frames():
    frame = pandas.DataFrame({"a": [1, 2], "b": [0.5, 4.0], "c": [True, False]})
    assert batches.as_batch(frame).tolist() == [[1, 0.5, 1], [2, 4, 0]]
    assert batches.as_batch(frame).dtype == torch.float64 and batches.as_batch(frame["a"]).tolist() == [1, 2]
    assert batches.as_batch(frame[["a"]].astype("Int64")).dtype == torch.int64
    assert batches.size(batches.as_batch((frame, frame["b"]))) == 2
    run = fit(PPCA(3, 1), frame, epochs=1, progress=False)
    assert run.stopped == "epochs"


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
        ({"x": None}, TypeError, r"data\['x'\]"),
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

import numpy as np
import pytest
import torch

from pyroelbo import batch as batches


def test_batches_from_tensors_arrays_tuples_and_dicts():
    x, y = torch.randn(3, 2), np.arange(3)
    for batch in (batches.as_batch((x, y)), batches.as_batch({"x": x, "y": y})):
        assert batches.size(batch) == 3
        assert batches.size(batches.rows(batch, slice(0, 2))) == 2
        assert batches.size(batches.repeat(batch, 4)) == 12
    assert batches.as_batch(np.zeros((2, 2), np.float32)).dtype == torch.float64
    assert batches.as_batch(np.zeros(2, np.uint8)).dtype == torch.uint8
    assert batches.call(lambda x, y: (x, y), {"y": 1, "x": 2}) == (2, 1)


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
    ],
)
def test_bad_batches_are_refused(bad, error, message):
    with pytest.raises(error, match=message):
        batches.as_batch(bad)

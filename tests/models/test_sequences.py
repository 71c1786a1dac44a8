"""Padded batches: values and gradients are those of the sequences apart, watched by a graph's capture or
not."""

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pyroelbo import data, models
from pyroelbo.models import sequences


class Watched(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def symbols(length):
    return torch.randint(4, (length,))


def vectors(length):
    return torch.randn(length, 2)


PAIRS = {
    "categorical": (lambda: models.HMM(3, 4), symbols),
    "gaussian": (lambda: models.HMM(3, 2, "gaussian"), vectors),
    "bernoulli": (lambda: models.HMM(2, 2, "bernoulli"), lambda n: (torch.rand(n, 2) < 0.5).double()),
    "state space": (lambda: models.StateSpace(2, 2), vectors),
}


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_padding_enters_no_value_and_no_gradient(name, watched, monkeypatch):
    make, draw = PAIRS[name]
    pair, items = make(), [draw(n) for n in (5, 1, 9, 3)]
    monkeypatch.setattr(sequences, "_STEPS", 2)  # so that these few make several groups
    if name == "gaussian":
        items[2][4] = math.nan  # a step that was not seen
    batch = data.sequences(items)
    parameters = [p for p in pair.parameters() if p.requires_grad]

    def gradients(value):
        return torch.autograd.grad(value.sum(), parameters, allow_unused=True, materialize_grads=True)

    if watched:
        with Watched():
            assert sequences.captured()
            value = pair.log_evidence(*batch)
            found = gradients(value)
    else:
        assert not sequences.captured()
        value = pair.log_evidence(*batch)
        found = gradients(value)
    alone = torch.cat([pair.log_evidence(x[None]) for x in items])
    torch.testing.assert_close(value, alone, rtol=1e-10, atol=1e-10)
    for a, b in zip(found, gradients(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("length", [0, -1, 6])
def test_lengths_outside_the_batch_are_refused(length, grad):
    pair, y = models.HMM(3, 4), torch.zeros(2, 5, dtype=torch.long)
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=rf"lengths: .*in \[1, 5\], got {length}"),
    ):
        pair.log_evidence(y, torch.tensor([5, length]))

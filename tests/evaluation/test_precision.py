"""Evaluation in float64, on devices with and without it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyroelbo import Pair, evidence, fit_em, numerics
from tests.pairs import TABLE


class Tied(Pair):
    """A finite latent, a buffer, and a parameter under two names."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Linear(1, 2)
        self.again = self.generator
        self.register_buffer("steps", torch.tensor([0, 1]))

    def model(self, y):
        scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
        assert scale.dtype == self.generator.weight.dtype == torch.float64
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            loc = self.generator(self.steps[k.long()].to(y)[..., None])
            pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)

    def guide(self, y):
        pass


@pytest.fixture(params=[True, False])
def float64(request, monkeypatch):
    monkeypatch.setattr(numerics, "holds_float64", lambda device: request.param)
    return request.param


def test_evidence_is_computed_on_the_cpu_where_the_device_has_no_float64(float64):
    pair, y = Tied().float(), torch.randn(3, 2).float()
    tensors = dict(pair.named_parameters()) | dict(pair.named_buffers())
    before = {k: v.clone() for k, v in tensors.items()}
    loc = pair.generator(torch.tensor([[0.0], [1.0]]).float()).detach().double()
    log_k = torch.tensor([0.7, 0.3]).log()
    right = torch.stack(
        [dist.Normal(m, torch.tensor(0.7).float().double()).log_prob(y).sum(-1) for m in loc], -1
    )
    found = evidence.exact(pair, y).value
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, (right + log_k).logsumexp(-1), rtol=0, atol=1e-6)
    after = dict(pair.named_parameters()) | dict(pair.named_buffers())
    for name, tensor in tensors.items():
        assert after[name] is tensor and tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert pair.again.weight is pair.generator.weight


@pytest.mark.parametrize("name", ["ppca", "hmm-categorical"])
def test_closed_forms_do_not_depend_on_where_they_are_computed(name, monkeypatch):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    here = evidence.exact(pair, y).value
    monkeypatch.setattr(numerics, "holds_float64", lambda device: False)
    assert torch.equal(evidence.exact(pair, y).value, here)
    with pytest.raises(ValueError, match="device: expected one with float64"):
        fit_em(pair, y, epochs=1, progress=False)

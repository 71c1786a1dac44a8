"""Recorded evaluations equal the programs at any particles; what cannot be recorded is run as it is."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyroelbo import Pair
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evidence import annealed
from pyroelbo.evidence.potential import _draws
from tests.evidence.test_annealed import CASES as CONTINUOUS
from tests.evidence.test_annealed import pair_of
from tests.evidence.test_lattice import CASES as DISCRETE
from tests.pairs import TABLE


def row(name):
    return lambda: (TABLE[name][0](), TABLE[name][1](3), None)


CASES = CONTINUOUS | DISCRETE | {n: row(n) for n in ("vae-bernoulli", "vae-conv", "own-conv")}
OUTSIDE = ("hmm-mean-field", "tree")  # a chain's kernels leave torch, the parents of a tree are read


def annealer_of(pair, y, start="guide"):
    return annealed._Annealer(Evaluator(pair, y, with_guide=start == "guide"), 5, 2, start)


@pytest.mark.parametrize("start", ["guide", "prior"])
@pytest.mark.parametrize("name", CASES)
def test_a_record_gives_what_the_programs_give(name, start):
    pair, y, _ = CASES[name]()
    annealer = annealer_of(pair, y, start)
    potential, slopes = annealer.potential, annealer.space.dims > 0
    for _ in range(3):
        potential(*annealer._draw_latents(5, None), None, slopes)
    recorded = all(callable(r) for r in potential._records.values())
    assert recorded is (name not in OUTSIDE)
    for scale in (1.0, 2.5):
        u, k = annealer._draw_latents(5, None)
        u, k = (x.mT.contiguous().mT for x in (u, k))  # as slices of more data are, not contiguous
        for mine, plain in zip(
            potential(scale * u, k, None, slopes),
            potential._plain(scale * u, k, None, slopes),
            strict=True,
        ):
            torch.testing.assert_close(mine, plain, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_record_runs_no_program(monkeypatch):
    pair, y, _ = CASES["vae-bernoulli"]()
    annealer = annealer_of(pair, y)
    u, k = annealer._draw_latents(5, None)
    for _ in range(3):
        annealer._points(u, k, None)
    monkeypatch.setattr(annealer.evaluator, "terms", None)
    annealer._points(u, k, None)
    with pytest.raises(TypeError):
        annealer._points(u[:4], k[:4], None)


def branching(z):
    return dist.Normal(z if bool((z > 0.5).any()) else 2 * z, 1.0)


def noisy(z):
    return dist.Normal(z + 1e-3 * torch.randn_like(z), 1.0)


def outside(z):
    return dist.Normal(z + torch.from_numpy(np.sin(z.detach().numpy())), 1.0)


@pytest.mark.parametrize("likelihood", [branching, noisy, outside])
def test_what_looks_at_values_is_run_as_it_is(likelihood):
    pair = pair_of(
        lambda y: dist.Normal(torch.zeros_like(y), 1.0), likelihood, lambda y: dist.Normal(0.5 * y, 1.0)
    )
    # A branch on the latents of several data would couple them.
    y = torch.tensor([0.3, 1.0])[: 1 if likelihood is branching else 2]
    annealer = annealer_of(pair, y)
    for _ in range(5):
        u, k = annealer._draw_latents(4, None)
        state = torch.get_rng_state()
        points = annealer._points(u, k, None)
        torch.set_rng_state(state)
        assert torch.equal(points.joint, annealer.potential._plain(u, k, None, True)[1])
    assert set(annealer.potential._records.values()) == {None}


def test_recording_leaves_the_random_numbers_alone():
    pair, y, _ = CASES["switching"]()
    annealer = annealer_of(pair, y)
    u, k = annealer._draw_latents(5, None)
    pyro.set_rng_seed(1)
    for _ in range(4):
        annealer._points(u, k, None)
    after = torch.rand(1)
    pyro.set_rng_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_no_densities_where_the_guide_leaves_the_support():
    """A draw outside has density zero in a record too, where nobody looks at values."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.full((len(y),), 0.5), 1.0))

    annealer = annealer_of(Pair.of(model, guide), torch.rand(2))
    for _ in range(6):
        points = annealer._draw(8, None)
        dead = points.u.isnan().any(-1)
        assert (points.joint.isinf() == dead).all() and dead.any()


def test_a_graph_that_draws_is_told_from_one_that_does_not():
    def drawn(x):
        return (x + torch.randn_like(x)).sum()

    def unused(x):
        torch.randn_like(x)
        return x.sum()

    assert _draws(make_fx(drawn)(torch.zeros(3)))
    assert not _draws(make_fx(unused)(torch.zeros(3)))

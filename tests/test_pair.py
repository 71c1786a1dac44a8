"""What every pair promises, and what `Pair` refuses."""

import copy
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyroelbo import Pair, evidence, fit, models
from pyroelbo.models import REGISTRY
from pyroelbo.pair import ExactPair
from tests.pairs import CONDITIONAL, TABLE, Nonlinear


def moved(pair, step):
    before = {k: p.detach().clone() for k, p in pair.named_parameters()}
    step()
    return {k for k, p in pair.named_parameters() if not torch.equal(p, before[k])}, set(before)


@pytest.mark.parametrize("name", [*TABLE, *CONDITIONAL])
@pytest.mark.parametrize("way", ["svi", "module", "fit", "copy"])
def test_every_parameter_moves(name, way):
    make, draw = (TABLE | CONDITIONAL)[name]
    make()  # another pair of the same class must not stand in the way
    pair, y = make(), draw(6)
    batch = y if isinstance(y, tuple) else (y,)
    if way == "copy":
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.step(*batch)
        pair = copy.deepcopy(pair)
        way = "svi"

    def step():
        if way == "svi":
            SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*batch)
        elif way == "module":
            loss = Trace_ELBO()(pair.model, pair.guide)
            optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
            loss(*batch).backward()
            optimizer.step()
        else:
            fit(pair, y, epochs=1, learning_rate=0.01, progress=False)

    changed, everything = moved(pair, step)
    assert changed == everything


def test_every_registered_model_is_in_the_table():
    # the data of "sat" are always the same: tests/models/test_sat.py
    rows = {n.split("-")[0] for n in (*TABLE, *CONDITIONAL)} | {"sat"}
    pairs = {REGISTRY[name].pair for name in rows & set(REGISTRY)}  # a class may have several rows
    assert all(entry.pair in pairs for entry in REGISTRY.values())


@pytest.mark.parametrize("name", [n for n in TABLE if n != "own-conv"])
def test_simulate(name):
    make, draw = TABLE[name]
    pair = make()
    latents, y = pair.simulate(7)
    assert y.shape == draw(7).shape and all(len(z) == 7 for z in latents.values())
    assert not torch.equal(y, pair.simulate(7)[1])


def test_simulate_has_the_generators_moments():
    pair = TABLE["ppca"][0]()
    _, y = pair.simulate(40000)
    g = pair.generator
    covariance = g.weight @ g.weight.T + (2 * g.log_scale).exp() * torch.eye(5)
    # Entries of a sample covariance have variance (C_ij² + C_ii C_jj) / n; 25 of them at six standard errors:
    # 5e-8.
    error = ((covariance**2 + torch.outer(covariance.diag(), covariance.diag())) / 40000).sqrt()
    assert ((torch.cov(y.T) - covariance).abs() < 6 * error).all()


def test_simulate_keeps_what_is_given():
    def model(x, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("y", dist.Normal(10 * x + z, 0.1), obs=y)

    pair = Pair.of(model, lambda x, y: None)
    x = torch.arange(6.0)
    _, (given, drawn) = pair.simulate(6, like=(x, torch.zeros(6)))
    assert torch.equal(given, x) and (drawn - 10 * x).abs().max() < 10
    with pytest.raises(TypeError, match="placeholder"):
        pair.simulate(3)
    with_shape = Pair.of(model, lambda x, y: None, placeholder=lambda n, x: (x, torch.zeros(n)))
    assert with_shape.simulate(6, x)[1][1].shape == (6,)
    with pytest.raises(ValueError, match="positive number"):
        pair.simulate(0, like=(x, x))


def test_simulating_a_model_that_feeds_observations_forward_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("first", dist.Normal(torch.zeros(len(y)), 1.0), obs=y[:, 0])
            pyro.sample("second", dist.Normal(y[:, 0], 1.0), obs=y[:, 1])

    def whole(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(y.roll(1, -1), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="override simulate"):
        Pair.of(model, lambda y: None).simulate(3, like=torch.randn(3, 2))
    with pytest.raises(ValueError, match="feeds its observations forward"):
        Pair.of(whole, lambda y: None).simulate(3, like=torch.randn(3, 2))

    def weak(y):
        with pyro.plate("data", len(y)):
            logits = torch.stack([torch.zeros(len(y)), 0.1 * y[:, 0]], -1)
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    # The draws come out the same whatever the first bit is, the distribution does not.
    pyro.set_rng_seed(0)
    for _ in range(20):
        with pytest.raises(ValueError, match="feeds its observations forward"):
            Pair.of(weak, lambda y: None).simulate(30, like=torch.zeros(30, 2))


def test_simulating_past_a_factor_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            pyro.factor("penalty", -z.square())

    with pytest.raises(ValueError, match="the factor 'penalty' reweights"):
        Pair.of(model, lambda y: None).simulate(3, like=torch.randn(3))


def test_nothing_to_anneal_or_split_without_latents():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(len(y)), 1.0), obs=y)

    pair, y = Pair.of(model, lambda y: None), torch.randn(3)
    for estimate in (evidence.ais, evidence.gap, evidence.site_gaps):
        with pytest.raises(evidence.Unavailable, match="no latents"):
            estimate(pair, y)


def test_autoguides_and_modules_as_a_pair():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.randn(12)
    pair = Pair.of(model, AutoNormal(model))
    fit(pair, y, epochs=600, batch_size=12, learning_rate=0.05, schedule="cosine", progress=False)
    assert all(k.startswith("encoder.") for k in pair.part("encoder"))
    located = next(p for k, p in pair.named_parameters() if "locs" in k)
    torch.testing.assert_close(located.detach(), 0.8 * y, atol=0.1, rtol=0)


def test_what_a_pair_must_define():
    class Half(Pair):
        def model(self, y):
            pass

    class Vague(ExactPair):
        def model(self, y):
            pass

    with pytest.raises(TypeError, match="must define guide"):
        Half()
    with pytest.raises(TypeError, match="log_evidence"):
        Vague().log_evidence(torch.zeros(1))
    with pytest.raises(TypeError, match="posterior"):
        Vague().posterior(torch.zeros(1))
    with pytest.raises(TypeError, match="guide: expected a Pyro callable"):
        Pair.of(lambda y: None, 3)
    with pytest.raises(ValueError, match="no part 'decoder'"):
        Nonlinear().part("decoder")


def test_a_trained_pair_can_be_pickled():
    pair, y = Nonlinear(), torch.randn(5, 4)
    SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y)
    fit(pair, y, epochs=1, progress=False)
    again = pickle.loads(pickle.dumps(pair))
    assert all(torch.equal(p, q) for p, q in zip(pair.parameters(), again.parameters(), strict=True))
    changed, everything = moved(
        again, lambda: SVI(again.model, again.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(y)
    )
    assert changed == everything


def test_a_sampled_attribute_keeps_its_name_in_every_instance():
    class Scaled(Pair):
        def __init__(self):
            super().__init__()
            self.shift = pyro.nn.PyroSample(dist.Normal(0.0, 1.0))

        def model(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(self.shift, 1.0), obs=y)

        def guide(self, y):
            with pyro.plate("data", len(y)):
                pyro.sample("shift", dist.Normal(y / 2, 0.5**0.5))

    y = torch.randn(4)
    for _ in range(2):
        bound = evidence.elbo(Scaled(), y, particles=5)
        torch.testing.assert_close(bound.value, dist.Normal(0.0, 2**0.5).log_prob(y), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "method", (evidence.elbo, evidence.exact, lambda pair, y: fit(pair, y, objective="enum", progress=False))
)
def test_a_pairs_own_refusal_is_all_that_is_said(method):
    """Pyro appends a table of shapes to the message of every ValueError in a trace."""
    pair = models.SigmoidBeliefNet(7, latent=(3,))
    wanted = "y: expected shape [B, 7] (flattened images) for this SigmoidBeliefNet, got (4, 5)"
    with pytest.raises(ValueError, match=f"^{re.escape(wanted)}$"):
        method(pair, torch.zeros(4, 5))

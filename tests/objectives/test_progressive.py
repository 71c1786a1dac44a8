"""Layer-by-layer training: whose gradients each term has, diffusion as a special case, universal parts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyroelbo import evidence, fit, models
from pyroelbo.models.chain import Chain
from pyroelbo.models.links import GaussianLink
from pyroelbo.objectives import Hard_ELBO, Progressive_ELBO
from tests.models.chains import Standard
from tests.pairs import TABLE, binary


def byte_chain(latent=(3, 2, 2)):
    torch.manual_seed(0)
    return models.ByteVAE(6, latent, (8,), likelihood="bernoulli"), binary(5, 6)


def gradients(loss, parameters):
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def test_every_term_trains_the_links_beside_it():
    pair, y = byte_chain()
    codes = [c.double() for c in pair.encode(y)]
    layers = [y, *codes]
    decoders = (pair.generator.observation, *pair.generator.links)
    loss = Progressive_ELBO(1).differentiable_loss(pair.model, pair.guide, y)
    alone = Progressive_ELBO(2).differentiable_loss(pair.model, pair.guide, y)
    for i, (encode, decode) in enumerate(zip(pair.encoder.links, decoders, strict=True)):
        # the term on its own, of the codes as data
        own = -decode(encode(layers[i]).rsample()).log_prob(layers[i]).sum()
        beside = [*encode.parameters(), *decode.parameters()]
        for a, b in zip(gradients(loss, beside), gradients(own, beside), strict=True):
            torch.testing.assert_close(a, b)
        assert any(bool(g.abs().max() > 0) for g in gradients(loss, encode.parameters()))
        assert all(not g.any() for g in gradients(alone, beside))
    prior = list(pair.prior.parameters())
    for a, b in zip(
        gradients(alone, prior), gradients(-pair.prior().log_prob(codes[-1]).sum(), prior), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert all(not g.any() for g in gradients(loss, prior))


def test_both_phases_together_are_the_hard_loss():
    pair, y = byte_chain()
    parts = [Progressive_ELBO(phase).loss(pair.model, pair.guide, y) for phase in (1, 2, None)]
    hard = Hard_ELBO().loss(pair.model, pair.guide, y)
    assert parts[0] + parts[1] == pytest.approx(parts[2], abs=1e-9)
    assert parts[2] == pytest.approx(hard, abs=1e-9)
    assert parts[2] == pytest.approx(Trace_ELBO().loss(pair.model, pair.guide, y), abs=1e-9)


def test_shared_modules_get_the_gradients_of_all_their_terms():
    torch.manual_seed(0)
    shared = GaussianLink(2, 2, (4,))
    chain = Chain(
        Standard(2),
        [shared, GaussianLink(2, 2)],
        GaussianLink(2, 2),
        [shared, GaussianLink(2, 2), shared],
        event=(2,),
    )
    y, noise = torch.randn(4, 2), {}

    def term(i, z):
        """The i-th layer's term and the draw above it, with the same noise."""
        torch.set_rng_state(noise.setdefault(i, torch.get_rng_state()))
        above = chain.encoder.links[i](z).rsample()
        return -(chain.generator.observation, *chain.generator.links)[i](above).log_prob(
            z
        ).sum(), above.detach()

    torch.manual_seed(1)
    terms, z = [], y
    for i in range(3):
        value, z = term(i, z)
        terms.append(value)
    torch.manual_seed(1)
    loss = Progressive_ELBO(1).differentiable_loss(chain.model, chain.guide, y)
    torch.testing.assert_close(loss, sum(terms))
    own = list(shared.parameters())
    apart = [gradients(value, own) for value in terms]
    for i, g in enumerate(gradients(loss, own)):
        torch.testing.assert_close(g, sum(found[i] for found in apart))
        assert all(bool(found[i].any()) for found in apart)


class Given(nn.Module):
    """An encoder link whose draws are given."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, below):
        return dist.Delta(self.z, event_dim=1)


class Step(nn.Module):
    """The reverse step of a diffusion from z_t, or p(y | z_1), as a link."""

    def __init__(self, diffusion, t):
        super().__init__()
        self.diffusion, self.t = diffusion, torch.tensor(t)

    def forward(self, z):
        c, out = self.diffusion.corruption, self.diffusion.output(z, self.t)
        return (c.observation(out, z) if self.t == 1 else c.reverse(out, z, self.t)).to_event(1)


@pytest.mark.parametrize("variance", ["learned", "beta"])
def test_with_a_noising_encoder_phase_one_is_the_diffusion_loss_and_the_posteriors_entropies(variance):
    """E -ln p(z_{t-1} | z_t) = KL(q(z_{t-1} | z_t, y), p) + H(q(z_{t-1} | z_t, y)). The mean over q is exact:
    that of a quadratic is its mean over two points, one standard deviation on either side."""
    torch.manual_seed(0)
    steps, dims = 3, 2
    diffusion = models.Diffusion(dims, steps, None, variance=variance, width=8, layers=1)
    for p in diffusion.parameters():
        torch.nn.init.normal_(p, std=0.5)
    c, y = diffusion.corruption, torch.randn(4, dims)
    x, entropy, z = c.encode(y), 0.0, {steps: torch.randn(4, dims)}
    for t in range(steps, 1, -1):
        q = c.backwards(x, z[t], torch.tensor(t))
        entropy = entropy + q.entropy().sum() * 4 / len(y)
        z = {s: torch.cat([v, v]) for s, v in z.items()}
        z[t - 1] = torch.cat([q.mean + q.stddev, q.mean - q.stddev])
        x, y = torch.cat([x, x]), torch.cat([y, y])
    chain = Chain(
        Standard(dims),
        [Step(diffusion, t) for t in range(2, steps + 1)],
        Step(diffusion, 1),
        [Given(z[t]) for t in range(1, steps + 1)],
        event=(dims,),
    )
    share = 4 / len(y)
    ours = share * Progressive_ELBO(1).differentiable_loss(chain.model, chain.guide, y)
    top = diffusion._top(x)
    theirs = 0.0
    for t in range(1, steps + 1):
        left, lost, _, _ = c.at(torch.tensor(t))
        noise = (z[t] - left.sqrt() * x) / lost.sqrt()
        time = torch.full((len(y),), (t - 0.5) / steps)
        theirs = theirs - share * (diffusion.term(y, time, noise) + top / steps).sum()
    torch.testing.assert_close(ours, theirs + entropy)
    parameters = list(diffusion.generator.parameters())
    found = list(zip(gradients(ours, parameters), gradients(theirs, parameters), strict=True))
    for a, b in found:
        torch.testing.assert_close(a, b)
    assert sum(float(a.abs().sum()) for a, _ in found) > 1


POPULATION = torch.tensor([40, 25, 15, 10, 6, 4])


def test_universal_parts_give_the_population_to_a_thousandth_of_a_nat():
    """Six symbols under codes of four values: the encoder loses information, and whatever it keeps, decoders
    and prior make the population of it."""
    y = torch.arange(6.0).repeat_interleave(POPULATION)[:, None]
    torch.manual_seed(0)
    pair = models.ByteVAE(1, (1, 1), (16,), 4, "categorical", 6, components=4)
    settings = {"batch_size": 100, "learning_rate": 0.03, "schedule": "cosine", "progress": False}
    fit(pair, y, objective=Progressive_ELBO(1), epochs=300, **settings)
    fit(pair, y, objective=Progressive_ELBO(1), epochs=200, freeze=("encoder",), **settings)  # to its end
    before = pair.encode(y)
    fit(pair, y, objective=Progressive_ELBO(2), epochs=200, **settings)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.encode(y), strict=True))
    assert all(len(c.unique()) >= 2 for c in before)
    found = evidence.exact(pair, torch.arange(6.0)[:, None]).value
    assert (found - (POPULATION / 100).log()).abs().max() < 1e-3


@pytest.mark.parametrize("phase", [None, 1, 2])
def test_a_step_of_plain_svi_moves_what_the_phase_trains(phase):
    pair, y = byte_chain()
    before = {k: p.detach().clone() for k, p in pair.named_parameters()}
    SVI(pair.model, pair.guide, pyro.optim.SGD({"lr": 0.1}), Progressive_ELBO(phase)).step(y)
    moved = {k.split(".")[0] for k, p in pair.named_parameters() if not torch.equal(p, before[k])}
    assert (
        moved == {None: {"prior", "generator", "encoder"}, 1: {"generator", "encoder"}, 2: {"prior"}}[phase]
    )


def test_the_name_trains_both_phases_and_is_validated_by_the_bound():
    pair, y = byte_chain((3,))
    run = fit(pair, y, valid=y, objective="progressive", epochs=2, progress=False)
    assert "valid_elbo" in run.metrics[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vae-bernoulli", "objective 'progressive': expected a chain with a bottom-up encoder"),
        ("ladder", "expected a chain with a bottom-up encoder"),
        ("discrete_vae", "guide site 'z_1': expected a reparametrized distribution, got Independent"),
        (
            "hierarchy-diffusion",
            "expected a prior with a density of z_N, got one with a latent site of its own",
        ),
    ],
)
def test_refused(name, message):
    make, draw = TABLE[name]
    with pytest.raises(ValueError, match=message):
        fit(make(), draw(4), objective="progressive", epochs=1, progress=False)


def test_refused_phases_and_models():
    with pytest.raises(ValueError, match="phase: expected 1, 2 or None, got 3"):
        Progressive_ELBO(3)
    with pytest.raises(TypeError, match="model: expected the model of a Pair, got a function"):
        Progressive_ELBO().loss(lambda y: None, lambda y: None, torch.zeros(2, 6))

"""Chains of links: linear-Gaussian and finite ones as oracles, both orders, and what is refused."""

import copy
import functools
import itertools
import math
import re
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal

from pyroelbo import Pair, audit, evidence, fit, models
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models.chain import Chain, Handed
from pyroelbo.models.links import GaussianLink, TopDownLink, join
from pyroelbo.nn import Dense
from pyroelbo.objectives import IWAE_ELBO, Layered_ELBO, mean_field_fault
from pyroelbo.pair import unregistered
from pyroelbo.priors import PRIORS, StandardNormal
from pyroelbo.training.step import EagerStep
from tests.pairs import TABLE, binary

SIZES = (3, 2, 2, 1)  # y, z_1, z_2, z_3


class Affine(nn.Module):
    """N(W x + b, S) with a full covariance: a kind of link that the library does not have."""

    def __init__(self, weight, shift, covariance):
        super().__init__()
        self.weight, self.shift = nn.Parameter(weight.clone()), nn.Parameter(shift.clone())
        self.register_buffer("root", torch.linalg.cholesky(covariance))

    def forward(self, x):
        return dist.MultivariateNormal(x @ self.weight.mT + self.shift, scale_tril=self.root)


class Standard(nn.Module):
    """N(0, I), of the kind that has a closed KL to an :class:`Affine` link."""

    def __init__(self, out):
        super().__init__()
        self.out = out

    def forward(self):
        return dist.MultivariateNormal(torch.zeros(self.out), torch.eye(self.out))


class AffineTopDown(Affine):
    def forward(self, state, seen, p):
        return super().forward(seen if state is None else join(state, seen))


class Joint:
    """The joint Gaussian of (y, z_1, …, z_N) of a random linear chain, by plain block algebra."""

    def __init__(self, sizes=SIZES, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.sizes = sizes
        self.links = [
            (torch.randn(a, b, generator=g), torch.randn(a, generator=g), 0.4 * torch.eye(a) + 0.1)
            for a, b in itertools.pairwise(sizes)
        ]
        mean, cov = torch.zeros(sizes[-1]), torch.eye(sizes[-1])
        for weight, shift, noise in reversed(self.links):
            below = weight.shape[1]
            cross = weight @ cov[:below]
            cov = torch.cat(
                [
                    torch.cat([cross[:, :below] @ weight.mT + noise, cross], 1),
                    torch.cat([cross.mT, cov], 1),
                ]
            )
            mean = torch.cat([weight @ mean[:below] + shift, mean])
        self.mean, self.cov = mean, cov

    def block(self, *layers):
        starts = [sum(self.sizes[:i]) for i in range(len(self.sizes) + 1)]
        return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in layers])

    def conditional(self, target, given):
        """(W, b, S) of p(target | given), layers by number (0 is y)."""
        a, b = self.block(*target), self.block(*given)
        gain = torch.linalg.solve(self.cov[b][:, b], self.cov[b][:, a]).mT
        cov = self.cov[a][:, a] - gain @ self.cov[b][:, a]
        return gain, self.mean[a] - gain @ self.mean[b], 0.5 * (cov + cov.mT)

    def evidence(self, y):
        a = self.block(0)
        return MultivariateNormal(self.mean[a], self.cov[a][:, a]).log_prob(y)

    def chain(self, order, spoil=0.0):
        top = len(self.sizes) - 1
        torch.manual_seed(1)

        def link(kind, target, given):
            weight, shift, cov = self.conditional(target, given)
            return kind(weight + spoil * torch.randn_like(weight), shift + spoil, cov * (1 + spoil))

        if order == "bottom-up":
            encoder = [link(Affine, [i], [i - 1]) for i in range(1, top + 1)]
        else:
            encoder = [link(AffineTopDown, [i], [0] if i == top else [i + 1, 0]) for i in range(1, top + 1)]
        links = [Affine(*x) for x in self.links]
        return Chain(
            Standard(self.sizes[-1]), links[1:], links[0], encoder, event=self.sizes[:1], order=order
        )

    def elbo(self, chain, y):
        """E_q[ln p - ln q] for each y, from the moments of the Gaussian q, in closed form."""
        values = []
        top = len(self.sizes) - 1
        for row in y:
            mean, cov = torch.zeros(0), torch.zeros(0, 0)
            places, entropy = {}, 0.0
            order = range(1, top + 1) if chain.order == "bottom-up" else range(top, 0, -1)
            for layer in order:
                link = chain.encoder.links[layer - 1]
                weight, shift, noise = link.weight, link.shift, link.root @ link.root.mT
                before = layer - 1 if chain.order == "bottom-up" else layer + 1
                seen_y = before == 0 or chain.order == "top-down"
                full = torch.zeros(len(shift), len(mean))
                drawn = weight[:, : weight.shape[1] - (3 if seen_y else 0)]
                if drawn.shape[1]:
                    full[:, places[before]] = drawn
                shift = shift + (weight[:, -3:] @ row if seen_y else 0)
                places[layer] = torch.arange(len(mean), len(mean) + len(shift))
                entropy = entropy + 0.5 * torch.logdet(2 * math.pi * math.e * noise)
                cross = full @ cov
                cov = torch.cat(
                    [torch.cat([cov, cross.mT], 1), torch.cat([cross, cross @ full.mT + noise], 1)]
                )
                mean = torch.cat([mean, full @ mean + shift])
            index = torch.cat([places[i] for i in range(1, top + 1)])
            m = torch.cat([row, mean[index]])
            c = torch.zeros_like(self.cov)
            c[3:, 3:] = cov[index][:, index]
            precision = torch.linalg.inv(self.cov)
            log_joint = MultivariateNormal(self.mean, self.cov).log_prob(m) - 0.5 * (precision * c).sum()
            values.append(log_joint + entropy)
        return torch.stack(values)


ORDERS = ("bottom-up", "top-down")


@pytest.mark.parametrize("order", ORDERS)
def test_the_exact_conditionals_give_the_evidence_at_every_draw(order):
    joint = Joint()
    chain, y = joint.chain(order), torch.randn(4, 3)
    weights = Evaluator(chain, y).sample_pass(5).log_weight
    torch.testing.assert_close(weights, joint.evidence(y).expand(5, 4))
    assert chain.sites == ("z_3", "z_2", "z_1")
    assert list(poutine.trace(chain.model).get_trace(y).stochastic_nodes)[1:] == ["z_3", "z_2", "z_1"]
    drawn = list(poutine.trace(chain.guide).get_trace(y).stochastic_nodes)[1:]
    assert drawn == (["z_1", "z_2", "z_3"] if order == "bottom-up" else ["z_3", "z_2", "z_1"])


@pytest.mark.parametrize("order", ORDERS)
def test_bounds_of_a_spoiled_encoder_have_their_closed_form(order):
    """Sampled and partly closed-form ELBO against the moments of q; 4.5 sigma, false alarms 7e-6 each."""
    joint = Joint()
    chain, y = joint.chain(order, spoil=0.2), torch.randn(3, 3)
    exact = joint.elbo(chain, y).detach()
    bound = evidence.elbo(chain, y, particles=8_000)
    assert ((bound.value - exact) / bound.stderr).abs().max() < 4.5
    assert (exact < joint.evidence(y) - 0.01).all()
    for loss in (Trace_ELBO(), Layered_ELBO()):
        rows = torch.stack(
            [loss.differentiable_loss(chain.model, chain.guide, y).detach() for _ in range(150)]
        )
        error = rows.std() / 150**0.5
        assert abs(rows.mean() + exact.sum()) < 4.5 * error
    if order == "top-down":
        pyro.set_rng_seed(3)
        ours = Layered_ELBO().differentiable_loss(chain.model, chain.guide, y)
        pyro.set_rng_seed(3)
        torch.testing.assert_close(
            ours, TraceMeanField_ELBO().differentiable_loss(chain.model, chain.guide, y)
        )


def test_what_mean_field_would_do_to_a_bottom_up_chain():
    """At the exact posterior the bound is tight and its gradient vanishes; the closed form of the lower layer
    says otherwise: another value, and a push on the upper link. 10 standard errors, so no false alarms."""
    joint = Joint((3, 2, 2), seed=1)
    chain, y = joint.chain("bottom-up"), torch.randn(50, 3)
    link = chain.encoder.links[1].weight
    found = {}
    for loss in (Layered_ELBO(), TraceMeanField_ELBO()):
        values, pushes = [], []
        for _ in range(100):
            with pyro.validation_enabled(False):
                value = loss.differentiable_loss(chain.model, chain.guide, y) / 50
            values.append(value.detach())
            pushes.append((torch.autograd.grad(value, link)[0] * link).sum())  # along shrinking the link
        values, pushes = torch.stack(values), torch.stack(pushes)
        found[type(loss).__name__] = [(x.mean(), x.std() / 100**0.5) for x in (values, pushes)]
    evidence_ = joint.evidence(y).mean()
    (value, error), (push, push_error) = found["Layered_ELBO"]
    assert abs(value + evidence_) < 4.5 * error + 1e-9 and abs(push) < 4.5 * push_error
    (value, error), (push, push_error) = found["TraceMeanField_ELBO"]
    assert value + evidence_ > 20 * error and value + evidence_ > 0.1
    assert push > 10 * push_error


@pytest.mark.parametrize("wrapped", [False, True])
def test_mean_field_is_refused_with_the_reason(wrapped):
    chain, y = Joint().chain("bottom-up"), torch.randn(8, 3)
    weight = (lambda epoch: 1.0) if wrapped else 1.0
    with pytest.raises(
        ValueError,
        match="the model draws 'z_2' from 'z_3' and the guide 'z_3' from 'z_2'.*not a term of this bound",
    ):
        fit(chain, y, objective="mean_field", kl_weight=weight, epochs=1, progress=False)
    fit(Joint().chain("top-down"), y, objective="mean_field", kl_weight=weight, epochs=1, progress=False)


def test_mean_field_is_allowed_where_only_the_order_differs():
    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    def guide(y, through=0.0):
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Normal(y, 1.0))
            c = pyro.sample("c", dist.Normal(b, 1.0), infer={"is_auxiliary": True})
            pyro.sample("a", dist.Normal(c if through else y, 1.0))

    y = torch.randn(3)
    assert mean_field_fault(model, guide, y) is None
    # From b through an auxiliary draw to a: the model's b stands on a.
    assert "'b' from 'a' and the guide 'a' from 'b'" in mean_field_fault(model, lambda y: guide(y, 1.0), y)


# ------------------------------------------------------------------------------------------ finite sets


class Table(nn.Module):
    """p(z = s | x = t) = softmax(logits[t])[s]: another kind of link, for integers."""

    def __init__(self, rows, states):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(rows, states) if rows else torch.randn(states))

    def forward(self, x=None):
        return dist.Categorical(logits=self.logits if x is None else self.logits[x.long()])


class TableTopDown(nn.Module):
    def __init__(self, above, seen, states):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(above, seen, states))

    def forward(self, state, seen, p):
        above = torch.zeros_like(seen) if state is None else state
        return dist.Categorical(logits=self.logits[above.long(), seen.long()])


def finite(order, states=(4, 3, 2)):
    y, one, two = states
    if order == "bottom-up":
        encoder = [Table(y, one), Table(one, two)]
    else:
        encoder = [TableTopDown(two, y, one), TableTopDown(1, y, two)]
    return Chain(Table(0, two), [Table(two, one)], Table(one, y), encoder, event=(), order=order)


@pytest.mark.parametrize("order", ORDERS)
def test_finite_chains_by_enumeration(order):
    chain, y = finite(order), torch.arange(4)
    tables = [t.log_softmax(-1) for t in (chain.prior.logits, chain.generator.links[0].logits)]
    see = chain.generator.observation.logits.log_softmax(-1)
    joint = torch.zeros(4, 3, 2)
    guide = torch.zeros(4, 3, 2)
    lower, upper = (link.logits.log_softmax(-1) for link in chain.encoder.links)
    for row, one, two in itertools.product(range(4), range(3), range(2)):
        joint[row, one, two] = tables[0][two] + tables[1][two, one] + see[one, row]
        if order == "bottom-up":
            guide[row, one, two] = lower[row, one] + upper[one, two]
        else:
            guide[row, one, two] = upper[0, row, two] + lower[two, row, one]
    torch.testing.assert_close(evidence.exact(chain, y).value, joint.logsumexp((1, 2)).detach())
    cells = list(itertools.product(range(3), range(2)))
    latents = {
        "z_1": torch.tensor([a for a, _ in cells])[:, None].expand(-1, 4),
        "z_2": torch.tensor([b for _, b in cells])[:, None].expand(-1, 4),
    }
    terms = Evaluator(chain, y).terms(latents)
    torch.testing.assert_close(terms.log_joint, joint.flatten(1).T)
    torch.testing.assert_close(terms.log_proposal, guide.flatten(1).T)
    elbo = (guide.exp() * (joint - guide)).sum((1, 2)).detach()
    bound = evidence.elbo(chain, y, particles=10_000)
    assert ((bound.value - elbo) / bound.stderr).abs().max() < 4.5
    with pytest.raises(ValueError, match="'z_[12]': expected a reparametrized distribution, got Categorical"):
        Layered_ELBO().differentiable_loss(chain.model, chain.guide, y)


# ------------------------------------------------------------------------------------------ the shared path


def ladder(**settings):
    torch.manual_seed(0)
    pair = models.Ladder(6, (3, 2, 2), (8, 6, 5), **settings)
    for merge in pair.encoder.links:  # away from KL 0, where it starts
        nn.init.normal_(merge.head.weight, std=0.3)
    return pair


def gradients(pair, y):
    pyro.set_rng_seed(1)
    loss = Trace_ELBO().differentiable_loss(pair.model, pair.guide, y)
    return [loss.detach(), *torch.autograd.grad(loss, list(pair.parameters()))]


@pytest.mark.parametrize("merge", ["network", "precision"])
def test_the_path_that_the_guide_hands_on_is_the_models_own(merge, monkeypatch):
    pair, y = ladder(merge=merge, norm="layer"), binary(5, 6)
    handed = gradients(pair, y)
    calls = []
    original = Handed.path
    monkeypatch.setattr(Handed, "path", lambda self, *a: calls.append(original(self, *a)))
    for a, b in zip(handed, gradients(pair, y), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1 and calls[0] is not None  # it was there, and the patched model went on without
    evaluator = Evaluator(pair, y)
    terms = evaluator.sample_pass(3)
    again = evaluator.terms(terms.latents)
    torch.testing.assert_close(terms.log_weight, again.log_weight)


def test_what_the_guide_found_ends_where_a_draw_is_another():
    pair, y = ladder(norm="layer"), binary(5, 6)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
        other = {"z_3": guide.nodes["z_3"]["value"] + 1}
        mixed = poutine.condition(poutine.replay(pair.model, trace=guide), data=other)
        found = poutine.trace(mixed).get_trace(y)
        plain = {k: found.nodes[k]["value"].clone() for k in pair.sites}
        alone = poutine.trace(poutine.condition(pair.model, data=plain)).get_trace(y)
    torch.testing.assert_close(found.log_prob_sum(), alone.log_prob_sum())


@pytest.mark.parametrize("written", ["weights", "draws"])
def test_what_the_guide_found_ends_where_something_was_written_since(written):
    pair, y = ladder(norm="layer"), binary(5, 6)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
        draws = [guide.nodes[k]["value"] for k in pair.sites]
        for x in pair.generator.parameters() if written == "weights" else draws:
            x.add_(0.3)
        found = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
        plain = {k: v.clone() for k, v in zip(pair.sites, draws, strict=True)}
        alone = poutine.trace(poutine.condition(pair.model, data=plain)).get_trace(y)
    torch.testing.assert_close(found.log_prob_sum(), alone.log_prob_sum())


def test_a_detached_draw_does_not_lead_to_the_encoder():
    pair, y = ladder(norm="layer"), binary(5, 6)
    guide = poutine.trace(pair.guide).get_trace(y)
    guide.detach_()
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    found = torch.autograd.grad(model.log_prob_sum(), list(pair.encoder.parameters()), allow_unused=True)
    assert all(g is None for g in found)
    with torch.no_grad():
        guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    torch.autograd.grad(model.log_prob_sum(), list(pair.generator.parameters()))


def test_precisions_add():
    pair, y = ladder(merge="precision", norm="none"), binary(4, 6)
    p, seen = pair.prior(), pair.encoder.features(y)[-1]
    q = pair.encoder.links[-1](None, seen, p)
    loc, raw = pair.encoder.links[-1].head(seen).chunk(2, -1)
    own = dist.Normal(loc, (5 * torch.tanh(raw / 5)).exp())
    z = torch.randn(7, 4, 2)
    difference = q.base_dist.log_prob(z) - (p.base_dist.log_prob(z) + own.log_prob(z))
    torch.testing.assert_close(difference, difference[:1].expand(7, 4, 2))  # the same up to a constant


def test_a_network_merge_starts_at_the_prior():
    pair = models.Ladder(6, (3, 2), (8, 6))
    terms = Evaluator(pair, binary(4, 6)).sample_pass(2)
    for site in pair.sites:
        torch.testing.assert_close(terms.log_model[site], terms.log_guide[site], rtol=0, atol=0.1)


# ------------------------------------------------------------------------------------------ objectives


def kl_by_site(pair, y):
    guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    kls = [torch.distributions.kl_divergence(guide.nodes[s]["fn"], model.nodes[s]["fn"]) for s in pair.sites]
    model.compute_log_prob()
    return torch.stack([k.mean() for k in kls]), -model.nodes["y"]["log_prob"].sum()


def seeded(loss, pair, y):
    pyro.set_rng_seed(5)
    return loss.differentiable_loss(pair.model, pair.guide, y)


def test_free_bits_balance_and_weight():
    pair, y = ladder(norm="layer"), binary(5, 6)
    pyro.set_rng_seed(5)
    kl, reconstruction = (x.detach() for x in kl_by_site(pair, y))
    floor = float(kl.sort().values[:2].mean())  # between the smallest and the next
    held = kl.clamp_min(floor)
    torch.testing.assert_close(
        seeded(Layered_ELBO(floor, weight=0.5), pair, y), reconstruction + 0.5 * 5 * held.sum()
    )
    share = (kl + 1e-6) / (kl + 1e-6).mean()
    balanced = Layered_ELBO(balance=True, weight=0.5)
    torch.testing.assert_close(seeded(balanced, pair, y), reconstruction + 0.5 * 5 * (share * kl).sum())
    balanced.weight = 1.0
    torch.testing.assert_close(seeded(balanced, pair, y), reconstruction + 5 * kl.sum())
    lowest = pair.encoder.links[[2, 1, 0][int(kl.argmin())]].head.bias
    alone = Layered_ELBO(1e6)
    assert torch.autograd.grad(seeded(alone, pair, y), pair.encoder.links[2].head.bias)[0].abs().max() > 0
    pyro.set_rng_seed(5)
    assert alone.loss(pair.model, pair.guide, y) == pytest.approx(float(reconstruction) + 5 * 3e6)
    assert lowest is not None
    for bad in ({"free_bits": -1.0}, {"weight": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a number"):
            Layered_ELBO(**bad)


def test_a_sampled_term_may_be_negative():
    """A bottom-up lower layer of which its generator says more than its encoder: no KL, and not to be cut at
    0."""
    one, sharp = torch.eye(1), 0.01 * torch.eye(1)
    encoder = [Affine(torch.zeros(1, 1), torch.zeros(1), one), Affine(one, torch.zeros(1), sharp)]
    generator = [Affine(one, torch.zeros(1), sharp)]
    see = Affine(one, torch.zeros(1), one)
    chain, y = Chain(Standard(1), generator, see, encoder, event=(1,)), torch.randn(5, 1)
    pyro.set_rng_seed(5)
    guide = poutine.trace(chain.guide).get_trace(y)
    low, top = guide.nodes["z_1"], guide.nodes["z_2"]
    sampled = low["fn"].log_prob(low["value"]) - generator[0](top["value"]).log_prob(low["value"])
    assert sampled.sum() < -1
    prior = MultivariateNormal(torch.zeros(1), one)
    own = MultivariateNormal(top["fn"].loc, scale_tril=top["fn"].scale_tril)
    kl = torch.distributions.kl_divergence(own, prior)
    expected = (sampled + kl - see(low["value"]).log_prob(y)).sum()
    torch.testing.assert_close(seeded(Layered_ELBO(), chain, y), expected)


def test_a_layered_loss_keeps_scales_and_masks():
    """A data plate that stands for more data, and rows that are masked out."""
    pair, y = ladder(norm="layer"), binary(6, 6)
    whole = seeded(Layered_ELBO(0.3), pair, y)
    scaled = Pair.of(poutine.scale(pair.model, 7.0), poutine.scale(pair.guide, 7.0))
    torch.testing.assert_close(seeded(Layered_ELBO(0.3), scaled, y), 7 * whole)
    mask = torch.tensor([True, True, False, True, True, False])
    masked = Pair.of(poutine.mask(pair.model, mask), poutine.mask(pair.guide, mask))
    torch.testing.assert_close(seeded(Layered_ELBO(), masked, y), seeded(TraceMeanField_ELBO(), masked, y))


def test_a_last_batch_of_one_row_trains():
    run = fit(models.Ladder(6, (3, 2), (8, 6)), binary(9, 6), batch_size=4, epochs=2, progress=False)
    assert all(math.isfinite(loss) for loss in run.losses)


def test_fit_anneals_the_layered_weight():
    pair, y = models.Ladder(6, (3, 2), (8, 6), dropout=0.1, noise=0.1), binary(64, 6)
    objective = Layered_ELBO(free_bits=0.1, balance=True)
    run = fit(
        pair,
        y,
        objective=objective,
        kl_weight=lambda e: min(1.0, 0.1 + e),
        epochs=3,
        batch_size=16,
        progress=False,
    )
    assert [row["kl_weight"] for row in run.metrics] == pytest.approx([0.1 + 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    "objective", [Layered_ELBO(0.1, balance=True, weight=0.5), IWAE_ELBO(3, max_plate_nesting=1)]
)
def test_a_step_of_a_ladder_is_one_graph(objective):
    """Shared path, dropout, BatchNorm's buffers and an annealed objective: captured, and equal to eager;
    averages of weights and buffers as well."""
    from pyroelbo.compiled import CompiledStep

    y, steps, buffers = binary(8, 6), [], []
    with pyro.validation_enabled(False), unregistered():
        for kind in (EagerStep, functools.partial(CompiledStep, backend="eager")):
            torch.manual_seed(2)
            pair = models.Ladder(6, (3, 2), (8, 6), dropout=0.1, noise=0.1)
            pair.train()
            buffers.append({k: v for k, v in pair.named_buffers() if v.is_floating_point()})
            steps.append(
                kind(
                    objective,
                    pair.model,
                    pair.guide,
                    dict(pair.named_parameters()),
                    lr=1e-2,
                    ema=0.75,
                    buffers=buffers[-1],
                )
            )
        name = "encoder.features.layers.0.0.norm.running_var"
        expected = buffers[0][name].clone()
        for i, weight in enumerate((0.5, 1.0, 0.7)):
            objective.weight = weight
            values = []
            for step in steps:
                torch.manual_seed(i)
                values.append(step(y))
            torch.testing.assert_close(*values)
            share = max(0.25, 9 / (10 + i))
            expected = expected + share * (buffers[0][name] - expected)
    assert steps[1].counters.compiled_calls == 3
    torch.testing.assert_close(steps[0].averages, steps[1].averages)
    torch.testing.assert_close(steps[1].averages[name], expected)
    assert float((expected - buffers[0][name]).abs().max()) > 1e-4


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_a_gated_cell_is_a_product_of_a_linear_map_and_a_sigmoid(norm):
    cell, x = Dense(4, 3, norm, gated=True).eval(), torch.randn(5, 2, 4)
    value, gate = cell.norm(cell.linear(x)).split(3, -1)
    torch.testing.assert_close(cell(x), value / (1 + (-gate).exp()))
    square = Dense(4, 4, norm, gated=True).eval()
    value, gate = square.norm(square.linear(x)).split(4, -1)
    torch.testing.assert_close(square(x), x + value * torch.sigmoid(gate))


# ------------------------------------------------------------------------------------------ bad input


def links(*sizes):
    return [GaussianLink(a, b) for a, b in sizes]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((3, 5)), links((5, 4), (4, 2)), event=(5,)
            ),
            "layer 1: the encoder link of z_1: expected an output of 3 numbers, as the",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((4, 3)), *links((3, 5)), links((5, 3), (3, 2)), event=(5,)
            ),
            "layer 1: the generator link of z_1: expected an input of 2 numbers, the size of z_2,",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((4, 5)), links((5, 3), (3, 2)), event=(5,)
            ),
            "the observation: expected an input of 3 numbers, the size of z_1, got one of 4",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((3, 5)), links((5, 3), (4, 2)), event=(5,)
            ),
            "layer 2: the encoder link of z_2: expected an input of 3 numbers, the size of z_1,",
        ),
        (
            lambda: Chain(
                StandardNormal(2), links((2, 3)), *links((3, 5)), links((7, 3), (3, 2)), event=(5,)
            ),
            "layer 1: the encoder link of z_1: expected an input of 5 numbers, the size of y, got",
        ),
        (
            lambda: Chain(
                StandardNormal(2),
                links((2, 3)),
                *links((3, 5)),
                links((5, 3), (3, 2)),
                event=(5,),
                order="top-down",
            ),
            r"layer 1: expected an encoder link of z_1 that is called with \(state, seen, p\), as",
        ),
        (
            lambda: Chain(
                StandardNormal(2),
                links((2, 3)),
                *links((3, 5)),
                [TopDownLink(2, 5, 3), TopDownLink(0, 5, 2)],
                event=(5,),
            ),
            "layer 1: expected an encoder link of z_1 that is called with the layer below, as",
        ),
        (
            lambda: Chain(StandardNormal(2), [], *links((2, 5)), links((5, 3), (3, 2)), event=(5,)),
            r"encoder: expected 1 links, one per latent \(a prior and 0 generator links\), got 2",
        ),
        (
            lambda: models.Hierarchy(6, order="sideways"),
            r"order: expected one of \('bottom-up', 'top-down'\), got 'sideways'",
        ),
        (
            lambda: models.Hierarchy(6, (3, 0)),
            "latent: expected a positive width for each layer, got 0 for layer 2",
        ),
        (lambda: models.Hierarchy(6, ()), "latent: expected at least one layer, got none"),
        (lambda: models.Hierarchy(6, 3), r"latent: expected a width for each layer, such as \(3,\), got 3"),
        (
            lambda: models.Hierarchy(6, (3, 1), prior="flow"),
            "prior 'flow' of 'z_2': dims: expected at least 2 for a coupling, which splits them,",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), prior="vamp", components="x"),
            "prior 'vamp' of 'z_1': components: expected a positive number of pseudo-inputs, got 'x'",
        ),
        (
            lambda: models.Ladder(6, (8,), (8, "a")),
            "hidden: expected a positive width for each layer, got 'a' for layer 2",
        ),
        (
            lambda: models.Hierarchy.for_data(binary(9, 5), (6,), 2, prior="vamp", components=3),
            r"y: expected shape \[B, 6\] \(flattened images\) for this Hierarchy, got \(9, 5\)",
        ),
        (
            lambda: models.ConvLadder((12, 12), (1, 1, 1, 1)),
            "groups: expected at most 3 resolutions for images of 12x12, got 4; resolution 3",
        ),
        (
            lambda: models.ConvLadder((4, 4), (1, 0)),
            r"groups: expected a positive number for each resolution, got \(1, 0\)",
        ),
        (lambda: models.ConvLadder(16), r"shape: expected \(height, width\), got 16"),
        (lambda: models.ConvLadder((4, 4), latent=0), "latent: expected a positive number of maps, got 0"),
        (
            lambda: models.Ladder(6, (3, 2), (8,)),
            r"hidden: expected a width for each of the 2 layers of latent=\(3, 2\), got \(8,\)",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), merge="sum"),
            r"merge: expected one of \('network', 'precision'\), got 'sum'",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), norm="group"),
            r"norm: expected one of \('batch', 'layer', 'none'\), got 'group'",
        ),
        (
            lambda: models.Ladder(6, (3,), (8,), network="conv"),
            r"network: expected one of \('mlp', 'gated'\), got 'conv'",
        ),
    ],
)
def test_links_that_do_not_fit_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_layers_that_do_not_fit_are_named_when_they_run():
    class Bare(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.linear = nn.Linear(a, b)

        def forward(self, x, seen=None, p=None):
            return dist.Normal(self.linear(x if seen is None else seen), 1.0).to_event(1)

    y = torch.randn(4, 5)
    chain = Chain(StandardNormal(2), [Bare(2, 3)], Bare(3, 5), [Bare(5, 4), Bare(4, 2)], event=(5,))
    with pytest.raises(
        ValueError,
        match=r"encoder: expected z_1 of event shape \(3,\), as the generator's, got \(4, 4\) in layer 1",
    ):
        Evaluator(chain, y)
    chain = Chain(StandardNormal(2), [Bare(2, 3)], Bare(3, 5), [Bare(5, 3), Bare(4, 2)], event=(5,))
    with pytest.raises(ValueError, match=r"encoder link of z_2: got inputs of shape \[\(4, 3\)\]"):
        Evaluator(chain, y)
    chain = Chain(
        StandardNormal(2), [Bare(2, 3)], Bare(3, 5), [Bare(5, 4), Bare(5, 2)], event=(5,), order="top-down"
    )
    with pytest.raises(
        ValueError, match=r"encoder: expected z_1 of shape \(3,\), as the generator's, got \(4,\) in layer 1"
    ):
        Evaluator(chain, y)
    with pytest.raises(ValueError, match=r"y: expected shape \[B, 5\] for this Chain, got \(4, 6\)"):
        chain.model(torch.randn(4, 6))


def test_a_top_down_model_under_a_bottom_up_guide_is_told_apart():
    ladder_, hierarchy = models.Ladder(6, (3, 2), (8, 6)), models.Hierarchy(6, (3, 4, 2))
    with pytest.raises(
        ValueError,
        match=r"encoder: expected z_2 of event shape \(2,\), as the generator's, got \(4, 4\) in layer 2",
    ):
        Evaluator(Pair.of(ladder_.model, hierarchy.guide), binary(4, 6))
    same = Pair.of(ladder_.model, models.Hierarchy(6, (3, 2)).guide)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="not a term of this bound"):
        fit(same, binary(4, 6), objective="mean_field", epochs=1, progress=False)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (
            "conv_ladder",
            "ladder",
            r"encoder: expected z_2 of event shape \(4,\), as the generator's, got \(4, 2\) in layer 2",
        ),
        (
            "ladder",
            "conv_ladder",
            r"encoder: expected z_2 of event shape \(2,\), as the generator's, got \(4, 4\) in layer 2",
        ),
        (
            "conv_ladder",
            "hierarchy",
            r"encoder: expected z_2 of event shape \(4,\), as the generator's, got \(4, 2\) in layer 2",
        ),
        (
            "hierarchy",
            "pixels",
            r"encoder: expected z_2 of event shape \(2,\), as the generator's, got \(4, 14\) in layer 2",
        ),
        ("pixels", "hierarchy", r"model site 'z_1\d' is missing in the guide, which draws"),
        ("hierarchy", "vae", "guide site 'z' is missing in the model"),
    ],
)
def test_a_guide_of_another_family_is_told_apart(model, guide, message):
    make = {
        "hierarchy": lambda: models.Hierarchy((4, 4), (3, 2), 8),
        "ladder": lambda: models.Ladder((4, 4), (3, 2), (8, 6)),
        "conv_ladder": lambda: models.ConvLadder((4, 4), (1, 1), 1, 4),
        "pixels": lambda: models.Autoregressive((4, 4), width=4, layers=1),
        "vae": lambda: models.VAE((4, 4), 2, (8,)),
    }
    with pytest.raises(ValueError, match=message):
        Evaluator(Pair.of(make[model]().model, make[guide]().guide), binary(4, 16)).sample_pass(1)


def test_a_model_is_its_own_under_the_guide_of_another_ladder():
    """Of the same sizes, whose guide hands on what it found on another generator's path."""
    one, other, y = ladder(norm="layer"), ladder(norm="layer"), binary(5, 6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    terms = Evaluator(Pair.of(one.model, other.guide), y).sample_pass(3)
    torch.testing.assert_close(terms.log_joint, Evaluator(one, y).terms(terms.latents).log_joint)
    torch.testing.assert_close(terms.log_proposal, Evaluator(other, y).terms(terms.latents).log_proposal)


def test_the_chains_of_the_page_run():
    """The snippets of docs/chains.md: links of the library, and one more in a file of its own."""
    page = (Path(__file__).parents[2] / "docs" / "chains.md").read_text(encoding="utf-8")
    known = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(code, known)
    pair, heavy, y = known["pair"], known["heavy"], binary(30, 64)
    # What the new link gives is what the site has, under both programs.
    terms = Evaluator(heavy, y).sample_pass(2)
    low, top = terms.latents["z_1"], terms.latents["z_2"]
    for found, link, given in (
        (terms.log_model, heavy.generator.links[0], top),
        (terms.log_guide, heavy.encoder.links[0], y),
    ):
        loc, log_scale = link.network(given).chunk(2, -1)
        expected = -(low - loc).abs() / log_scale.exp() - log_scale - math.log(2)
        torch.testing.assert_close(found["z_1"], expected.sum(-1))
    for chain, objective in ((pair, "layered"), (heavy, "layered"), (heavy, "elbo")):
        run = fit(chain, y, epochs=2, objective=objective, progress=False)
        assert all(math.isfinite(loss) for loss in run.losses)
    torch.manual_seed(0)
    a = audit(heavy, y, particles=100)
    assert a["iwae-100"].mean > a["elbo"].mean and set(evidence.site_gaps(heavy, y).rates) == {"z_1", "z_2"}
    with pytest.raises(
        ValueError,
        match="layer 1: the generator link of z_1: expected an input of 4 numbers, the size of z_2,",
    ):
        links_, see = known["LaplaceLink"], heavy.generator.observation
        Chain(StandardNormal(4), [links_(3, 8)], see, [links_(64, 8), links_(8, 4)], event=(64,))


@pytest.mark.parametrize("name", ["hierarchy-top-down", "ladder", "ladder-precision", "conv_ladder"])
def test_pictures_of_what_is_decoded(name):
    make, draw = TABLE[name]
    pair, y = make(), draw(4)
    picture = pair.reconstruct(y)
    assert picture.shape == y.shape and picture.min() >= 0 and picture.max() <= 1


# family: the chain for 4x4 images on a prior, of two layers, the upper of 2 (maps: 2x2) numbers
STANDING = {
    "hierarchy": lambda prior, **s: models.Hierarchy.for_data(
        s.get("train"), (4, 4), 2, latent=(3, 2), hidden=8, prior=prior, components=4
    ),
    "hierarchy-top-down": lambda prior, **s: models.Hierarchy.for_data(
        s.get("train"), (4, 4), 2, latent=(3, 2), hidden=8, order="top-down", prior=prior, components=4
    ),
    "ladder": lambda prior, **s: models.Ladder.for_data(
        s.get("train"), (4, 4), 2, latent=(3, 2), hidden=(8, 6), norm="layer", prior=prior, components=4
    ),
    "conv_ladder": lambda prior, **s: models.ConvLadder.for_data(
        s.get("train"), (4, 4), 2, groups=(1, 1), latent=1, channels=4, prior=prior, components=4
    ),
}


def standing(family, prior, train=None):
    torch.manual_seed(0)
    return STANDING[family](prior, train=train)


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("family", STANDING)
def test_a_chain_may_stand_on_any_prior(family, prior):
    """The top site has the prior's own density; its term is closed where a form is known, and the draw's
    elsewhere."""
    pair, y = standing(family, prior, binary(9, 16)), binary(5, 16)
    top = getattr(pair.prior, "prior", pair.prior)
    with torch.no_grad():
        for parameter in top.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    terms = Evaluator(pair, y).sample_pass(3)
    torch.testing.assert_close(terms.log_model["z_2"], top().log_prob(terms.latents["z_2"]))
    pyro.set_rng_seed(1)
    loss = Layered_ELBO().differentiable_loss(pair.model, pair.guide, y)
    pyro.set_rng_seed(1)
    guide = poutine.trace(pair.guide).get_trace(y)
    model = poutine.trace(poutine.replay(pair.model, trace=guide)).get_trace(y)
    expected = torch.zeros(())
    for site in pair.sites:
        q, p, z = guide.nodes[site]["fn"], model.nodes[site]["fn"], guide.nodes[site]["value"]
        closed = (family != "hierarchy" or site == "z_2") and (prior == "standard" or site == "z_1")
        term = torch.distributions.kl_divergence(q, p) if closed else q.log_prob(z) - p.log_prob(z)
        expected = expected + term.sum()
    expected = expected - model.nodes["y"]["fn"].log_prob(y).sum()
    torch.testing.assert_close(loss, expected)
    before = {k: v.detach().clone() for k, v in top.named_parameters()}
    run = fit(pair, binary(30, 16), epochs=1, objective="layered", progress=False)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert all(not torch.equal(v, before[k]) for k, v in top.named_parameters())


@pytest.mark.parametrize("family", STANDING)
def test_a_vampprior_mixes_the_top_of_the_encoder(family):
    y = binary(9, 16)
    pair = standing(family, "vamp", y)
    top = getattr(pair.prior, "prior", pair.prior)
    u, z = top.pseudo_inputs, torch.randn(7, top.dims)
    links = pair.encoder.links
    if family == "hierarchy":
        assert u.shape == (4, 3)  # of z_1, which the link of z_2 sees
        q = links[1](u)
    else:
        assert torch.cdist(u.detach(), y).amin(1).max() < 0.2  # rows of the data, with a little noise
        seen = u if family == "hierarchy-top-down" else pair.encoder.features(u)[-1]
        q = links[1](None, seen, None)
    mixed = torch.logsumexp(q.log_prob(z[:, None]), -1) - math.log(4)
    torch.testing.assert_close(top().log_prob(z), mixed)
    with pytest.raises(
        ValueError, match="components: expected at most one pseudo-input for each of the 3 data, got 4"
    ):
        standing(family, "vamp", binary(3, 16))


@pytest.mark.parametrize("family", STANDING)
def test_a_chain_on_a_vampprior_is_copied_whole_and_steps_as_one_graph(family):
    from pyroelbo.compiled import CompiledStep

    pair, y = standing(family, "vamp"), binary(8, 16)
    twin = copy.deepcopy(pair)
    assert getattr(twin.prior, "prior", twin.prior).encode.__self__ is twin
    step = CompiledStep(
        Layered_ELBO(), pair.model, pair.guide, dict(pair.named_parameters()), backend="eager"
    )
    before = [parameter.detach().clone() for parameter in pair.prior.parameters()]
    with pyro.validation_enabled(False), unregistered():
        for _ in range(3):
            step(y)
    assert step.counters.compiled_calls == 3 and step.counters.fallbacks == 0
    assert all(not torch.equal(a, b) for a, b in zip(before, pair.prior.parameters(), strict=True))


@pytest.mark.parametrize("family", STANDING)
def test_a_prior_of_another_size_is_named_with_its_layer(family):
    dims = 4 if family == "conv_ladder" else 2
    with pytest.raises(
        ValueError, match=f"expected {dims} dimensions for the latent 'z_2', got a StandardNormal of 5"
    ):
        standing(family, StandardNormal(5))
    with pytest.raises(ValueError, match="prior: expected one of .* got 'gumbel'"):
        standing(family, "gumbel")

"""Chains of links: linear-Gaussian and finite ones as oracles, in both orders."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import MultivariateNormal

from pyroelbo import evidence, fit
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.models.chain import Chain
from pyroelbo.models.links import join
from pyroelbo.objectives import Layered_ELBO, mean_field_fault
from tests.models.chains import Affine, Standard

SIZES = (3, 2, 2, 1)  # y, z_1, z_2, z_3


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


def test_mean_field_is_allowed_where_the_models_link_is_not_the_guides():
    """The model's b stands on a; the guide draws a after b, but not from it, and c from b."""

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            c = pyro.sample("c", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(a + b + c, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Normal(y, 1.0))
            pyro.sample("c", dist.Normal(b, 1.0))
            pyro.sample("a", dist.Normal(y, 1.0))

    assert mean_field_fault(model, guide, torch.randn(3)) is None

"""Rows given the latents outside the data plate, against closed forms."""

import json
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from pyroelbo import Pair, audit, evidence
from pyroelbo.evaluation import memory
from pyroelbo.results import Audit

Z_LIMIT = 4.9  # two-sided normal tail of 1e-6: the declared false-alarm rate of one z-test
Y = torch.tensor([1.3, 0.2, -0.4, 2.0, 1.1], dtype=torch.float64)


def model(y):
    """y ~ N(0, 2 I + 1 1ᵀ)."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide_of(loc, scale, local=0.5**0.5):
    """q(mean), and the exact p(z | mean, y) if ``local`` is its scale."""

    def guide(y):
        mean = pyro.sample("mean", dist.Normal(loc, scale))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal((y + mean) / 2, local))

    return guide


def truth():
    return float(dist.MultivariateNormal(torch.zeros(5), 2 * torch.eye(5) + torch.ones(5, 5)).log_prob(Y))


def expected(loc, scale):
    """E_q ln N(y_i; mean, 2) and KL(q(mean), p(mean))."""
    rows = -0.5 * math.log(4 * math.pi) - ((Y - loc) ** 2 + scale**2) / 4
    kl = dist.kl.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.0, 1.0))
    return rows, float(kl)


def test_the_exact_posterior_of_all_gives_the_joint_evidence_without_variance():
    """ln p(y | θ) - ln q(θ) / p(θ) = ln p(y) for every draw: rows and divergence share their draws."""
    scale = (1 + 5 / 2) ** -0.5
    pair = Pair.of(model, guide_of(float(Y.sum()) / 2 * scale**2, scale))
    theta = evidence.given_globals(pair, Y, 6)
    row = theta.row(evidence.elbo, 3)
    joint = theta.divergence.joint(row)
    assert joint.scope == "joint" and joint.kind == "lower"
    assert abs(float(joint.value) - truth()) < 1e-10 and float(joint.stderr) < 1e-10


def test_rows_are_expectations_over_the_globals():
    loc, scale = 0.4, 0.5
    rows, kl = expected(loc, scale)
    result = audit(
        Pair.of(model, guide_of(loc, scale, 0.8)), Y, particles=20, given="globals", draws=80, progress=False
    )
    assert result.reference == "quadrature" and result["quadrature"].scope == "globals"
    anchor = result["quadrature"]
    assert bool(((anchor.value - rows).abs() < Z_LIMIT * anchor.stderr).all())
    assert abs(anchor.mean - float(rows.mean())) < Z_LIMIT * anchor.mean_error
    # All data share the draws: the mean's error is that of (mean of y - θ)² / 4, not that of five errors.
    spread = ((Y.mean() - loc) * scale / 2) ** 2 + scale**4 / 8
    assert anchor.mean_error == pytest.approx(float(spread / 80) ** 0.5, rel=0.35)
    # The ELBO loses the local KL and nothing else, of which the shared draws tell more than the rows' errors.
    local = dist.kl.kl_divergence(dist.Normal(0.0, 0.8), dist.Normal(0.0, 0.5**0.5))
    (gap,) = (g for g in result.gaps if g.method == "elbo")
    assert abs(gap.mean - float(local)) < Z_LIMIT * gap.mean_error < 0.3 * result["elbo"].mean_error * 4.9
    divergence = result.divergence
    assert abs(divergence.value - kl) < Z_LIMIT * divergence.error
    for method in ("elbo", "iwae-20"):
        joint = divergence.joint(result[method])
        assert float(joint.value) < truth() + Z_LIMIT * float(joint.stderr)
    text = str(result)
    assert "E ln p(y|θ)" in text and "lower, given θ" in text and "ln p(y) " not in text.split("note")[0]
    assert text.count("KL(q(θ) || p(θ))") == 1 and "once for 5 data" in text
    again = Audit.from_dict(json.loads(result.to_json()))
    assert str(again) == text


def test_finite_latents_are_summed_given_the_globals():
    """A mixture indexed as Pyro's users do, given its means: the ELBO is exact for each draw."""

    @config_enumerate
    def mixture(y):
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            pyro.sample("y", dist.Normal(locs[k], 0.7), obs=y)

    def guide(y):
        with pyro.plate("components", 3):
            pyro.sample("locs", dist.Normal(torch.tensor([-0.5, 0.5, 1.5]), 0.2))

    pair = Pair.of(mixture, guide)
    theta = evidence.given_globals(pair, Y, 4)
    exact, elbo = theta.row(evidence.exact), theta.row(evidence.elbo, 2)
    assert exact.kind == "estimate" and exact.by_draw.shape == (4, 5)
    torch.testing.assert_close(exact.by_draw, elbo.by_draw, rtol=0, atol=1e-10)
    for values, given in zip(exact.by_draw, theta.pairs, strict=True):
        locs = given.__dict__["_values"]["locs"]
        right = torch.tensor([0.5, 0.3, 0.2]).log() + dist.Normal(locs, 0.7).log_prob(Y[:, None])
        torch.testing.assert_close(values, right.logsumexp(-1), rtol=0, atol=1e-10)


def test_global_latents_within_a_chain():
    """A rate for each step, drawn between the states of the data's chains."""

    def chain(y):
        plate, x = pyro.plate("data", len(y)), torch.zeros(())
        for t in pyro.markov(range(2)):
            rate = pyro.sample(f"rate_{t}", dist.Beta(2.0, 2.0))
            with plate:
                p = 0.1 + 0.8 * (rate * x + (1 - rate) * (1 - x))
                x = pyro.sample(f"x_{t}", dist.Bernoulli(p), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=y[:, t])

    def guide(y):
        for t in range(2):
            pyro.sample(f"rate_{t}", dist.Beta(3.0, 2.0))

    y = torch.randn(4, 2)
    theta = evidence.given_globals(Pair.of(chain, guide), y, 2)
    rows = [theta.row(evidence.exact).by_draw, theta.row(evidence.elbo, 1).by_draw]
    for s, given in enumerate(theta.pairs):
        first, second = (given.__dict__["_values"][f"rate_{t}"] for t in range(2))
        total = []
        for a in (0.0, 1.0):
            for b in (0.0, 1.0):
                ones = 0.1 + 0.8 * (1 - first), 0.1 + 0.8 * (second * a + (1 - second) * (1 - a))
                log_p = sum(
                    dist.Bernoulli(p).log_prob(torch.tensor(v)) for p, v in zip(ones, (a, b), strict=True)
                )
                total.append(log_p + dist.Normal(torch.tensor([a, b]), 1.0).log_prob(y).sum(-1))
        for row in rows:
            torch.testing.assert_close(row[s], torch.logsumexp(torch.stack(total), 0), rtol=0, atol=1e-10)


def test_a_point_has_rows_but_no_divergence():
    def glm(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(mean + 2 * k, 1.0), obs=y)

    guide = AutoDelta(pyro.poutine.block(glm, hide=["k"]))
    guide(Y)
    result = audit(Pair.of(glm, guide), Y, given="globals", progress=False)
    mean = guide.median()["mean"].detach()
    each = [math.log(p) + dist.Normal(mean + 2.0 * k, 1.0).log_prob(Y) for k, p in ((0, 0.7), (1, 0.3))]
    torch.testing.assert_close(
        result["exact"].value, torch.logsumexp(torch.stack(each), 0), rtol=0, atol=1e-10
    )
    assert result["exact"].kind == "exact" and result.divergence is None
    assert "set to a point by the guide" in str(result) and "KL(" not in str(result)


@pytest.mark.parametrize("auto", [AutoNormal, AutoMultivariateNormal])
def test_automatic_guides(auto):
    guide = auto(model, init_scale=0.5)
    guide(Y)
    pair = Pair.of(model, guide)
    if auto is AutoMultivariateNormal:
        with pytest.raises(evidence.Unavailable, match="draws 'z' together with the global latents"):
            evidence.given_globals(pair, Y, 2)
        return
    theta = evidence.given_globals(pair, Y, 20)
    joint = theta.divergence.joint(theta.row(evidence.elbo, 10))
    assert float(joint.value) < truth() + Z_LIMIT * float(joint.stderr)
    alone = evidence.elbo(pair, Y, 400, scope="joint")
    assert abs(float(joint.value - alone.value)) < Z_LIMIT * math.hypot(joint.stderr, alone.stderr)


def test_subsets():
    """Of 5 data two are audited: the divergence belongs to all five."""

    def subsampled(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 5, subsample=torch.arange(len(y))):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def reading(y):
        mean = pyro.sample("mean", dist.Normal(y.mean(), 0.5))
        with pyro.plate("data", 5, subsample=torch.arange(len(y))):
            pyro.sample("z", dist.Normal((y + mean) / 2, 0.5**0.5))

    def plain(y):
        mean = pyro.sample("mean", dist.Normal(0.4, 0.5))
        with pyro.plate("data", 5, subsample=torch.arange(len(y))):
            pyro.sample("z", dist.Normal((y + mean) / 2, 0.5**0.5))

    pair = Pair.of(subsampled, plain)
    theta = evidence.given_globals(pair, Y[:2], 3)
    row = theta.row(evidence.elbo, 2)
    joint = theta.divergence.joint(row)
    right = 2.5 * row.by_draw.sum(1) - theta.divergence.by_draw
    assert theta.num_data == 5 and float(joint.value) == pytest.approx(float(right.mean()))
    with pytest.raises(ValueError, match="'mean' stands outside the plate 'data' and reads the batch"):
        evidence.given_globals(Pair.of(subsampled, reading), Y[:2])
    evidence.given_globals(Pair.of(model, reading), Y, 2)
    with pytest.raises(ValueError, match="'mean' .*reads the batch, which is 5 of 80"):
        evidence.given_globals(Pair.of(model, reading), Y, 2, num_data=80)
    with pytest.raises(ValueError, match="num_data: expected at least the 5 data"):
        evidence.given_globals(Pair.of(model, guide_of(0.0, 1.0)), Y, 2, num_data=3)


def test_what_is_refused():
    def local(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def local_guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 1.0))

    def switched(y):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="expected latents outside the plate 'data', got none"):
        audit(Pair.of(local, local_guide), Y, given="globals")
    with pytest.raises(evidence.Unavailable, match="'k' stands outside the plate.*joint"):
        audit(Pair.of(switched, local_guide), Y, given="globals")
    with pytest.raises(ValueError, match="given: expected 'globals'"):
        audit(Pair.of(model, guide_of(0.0, 1.0)), Y, given="theta")
    with pytest.raises(ValueError, match="no joint scope"):
        audit(Pair.of(model, guide_of(0.0, 1.0)), Y, given="globals", scope="joint")


def test_a_hidden_markov_model_as_pyro_ships_it(monkeypatch):
    """Sequences at dim -2, padded, of which the longest is none of the first; blocks of rows with their own
    lengths; point estimates of the parameters.
    """
    matrix = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    rates = torch.tensor([[0.1, 0.4, 0.8], [0.6, 0.5, 0.3]])

    def hmm(sequences, lengths):
        probs_x = pyro.sample("probs_x", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
        probs_y = pyro.sample("probs_y", dist.Beta(torch.ones(2, 3), 1.0).to_event(2))
        tones = pyro.plate("tones", 3, dim=-1)
        with pyro.plate("sequences", len(sequences), dim=-2) as batch:
            lengths = lengths[batch]
            x = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with pyro.poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                    with tones:
                        pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x.squeeze(-1)]), obs=sequences[batch, t])

    def guide(sequences, lengths):
        pyro.sample("probs_x", dist.Delta(matrix, event_dim=2))
        pyro.sample("probs_y", dist.Delta(rates, event_dim=2))

    y, lengths = torch.bernoulli(torch.full((5, 6, 3), 0.5)), torch.tensor([3, 1, 2, 6, 4])
    right = []
    for sequence, length in zip(y, lengths, strict=True):
        alpha = matrix[0].log()
        for t in range(int(length)):
            alpha = alpha if t == 0 else torch.logsumexp(alpha[:, None] + matrix.log(), 0)
            alpha = alpha + dist.Bernoulli(rates).log_prob(sequence[t]).sum(-1)
        right.append(alpha.logsumexp(0))
    pair = Pair.of(hmm, guide, plate="sequences")
    result = audit(pair, (y, lengths), given="globals", particles=2, progress=False)
    for method in ("exact", "elbo", "iwae-2"):
        torch.testing.assert_close(result[method].value, torch.stack(right), rtol=0, atol=1e-10)
    monkeypatch.setitem(memory.BUDGET, "cpu", 300)
    blocks = evidence.given_globals(pair, (y, lengths)).row(evidence.elbo, 2)
    torch.testing.assert_close(blocks.value, torch.stack(right), rtol=0, atol=1e-10)

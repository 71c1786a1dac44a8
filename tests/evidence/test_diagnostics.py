import math
from importlib.metadata import version

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyroelbo import Pair, evidence, models
from pyroelbo.evaluation import memory
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evidence import pareto_k_hat
from pyroelbo.evidence.diagnostics import _activity, _fit_tail, _log_mixture
from tests.pairs import TABLE, Convolutional


def arviz_k(log_w):
    """The same quantity from arviz; its 1.x line takes log ratios of the opposite sign."""
    if int(version("arviz").split(".")[0]) < 1:
        from arviz import psislw

        return np.asarray(psislw(log_w)[1])
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.psislw(-log_w, axis=-1)[1])


@pytest.mark.parametrize("tail", [1.2, 2.0, 4.0])
def test_agrees_with_arviz(tail):
    # 3√2500 is a whole number: the two lines of arviz round the tail's length differently.
    log_w = np.random.default_rng(0).exponential(size=(6, 2500)) / tail
    ours = pareto_k_hat(torch.from_numpy(log_w.T))
    np.testing.assert_allclose(ours, arviz_k(log_w), atol=2e-3)
    assert abs(float(ours.mean()) - 1 / tail) < 0.15


def test_nothing_to_fit():
    assert pareto_k_hat(torch.randn(20, 3)).isnan().all()
    assert (pareto_k_hat(torch.zeros(1000, 2)) == -float("inf")).all()
    assert (pareto_k_hat(1e-9 * torch.randn(1000, 2)) == -float("inf")).all()
    assert pareto_k_hat(torch.full((100, 1), -float("inf"))).isnan().all()
    two_values = torch.where(torch.rand(1000, 1) < 0.05, 0.0, -3.0)
    assert pareto_k_hat(two_values).isnan().all()


# ------------------------------------------------------------------------------ the aggregated posterior

Z_LIMIT = 4.9  # a two-sided normal tail of 1e-6: the false-alarm rate of one z-test


def close(estimate, truth):
    return bool(((estimate.value - truth).abs() <= Z_LIMIT * estimate.stderr + 1e-9).all())


def table(probabilities):
    """A pair over a finite latent: q(z | y) by the rows of a table, one row a datum; uniform prior."""
    states = probabilities.shape[1]

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.full((states,), 1 / states)))
            pyro.sample("y", dist.Normal(z.double(), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(probabilities))

    return Pair.of(model, guide)


def test_small_tables():
    q = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]])
    y = torch.tensor([0.3, 1.5, 2.0])
    found = evidence.diagnostics(table(q), y, draws=4000)
    mixture = q.mean(0)
    entropy = -(q * q.log()).sum(1).mean()
    marginal = (mixture * (mixture * 3).log()).sum()
    information = (q * (q / mixture).log()).sum(1).mean()
    likelihood = dist.Normal(torch.arange(3.0), 1.0).log_prob(y[:, None])
    assert close(found.entropy, entropy) and close(found.marginal_kl, marginal)
    assert close(found.information, information) and close(
        found.reconstruction, (q * likelihood).sum(1).mean()
    )
    assert close(found.kl, information + marginal) and abs(found.cross_entropy.value - math.log(3)) < 1e-12
    assert found.activity.value.numel() == 0 and "ln N = 1.0986" in str(found)


def test_holes_of_a_table():
    """The codes use the first of ten states but for a millionth: nine tenths of the prior are holes."""
    q = torch.cat([torch.tensor([1 - 9e-6]), torch.full((9,), 1e-6)]).expand(4, 10)
    found = evidence.diagnostics(table(q), torch.zeros(4), draws=2, points=4000)
    assert close(found.holes, 0.9)
    assert abs(float(found.information)) < 1e-12  # all data have one code


def gaussian_pair(scale=1.0):
    """z = (y + noise) under the guide; data from N(0, S) make q(z) nearly N(0, S + s² I)."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, scale).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 0.7).to_event(1))

    return Pair.of(model, guide)


def test_identities_and_a_gaussian_limit():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]])
    y = dist.MultivariateNormal(torch.zeros(2), covariance).sample((1500,))
    found = evidence.diagnostics(gaussian_pair(), y, draws=4)
    sums = [
        (found.elbo, found.reconstruction.value - found.cross_entropy.value + found.entropy.value),
        (found.kl, found.information.value + found.marginal_kl.value),
        (found.marginal_kl, found.total_correlation.value + found.unit_kl.value.sum()),
    ]
    assert all(abs(float(whole.value - parts)) < 1e-9 for whole, parts in sums)
    # The sample's own moments make the Gaussian limit; what is left is the sampling error of 1500 data.
    spread = torch.cov(y.T) + 0.49 * torch.eye(2)
    limit = dist.MultivariateNormal(y.mean(0), spread)
    kl = dist.kl.kl_divergence(limit, dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    assert abs(float(found.marginal_kl) - float(kl)) < 0.05
    information = 0.5 * torch.logdet(spread / 0.49)
    assert abs(float(found.information) - float(information)) < 0.05
    units = 0.5 * (spread.diagonal() / 0.49).log()
    assert ((found.unit_information.value - units).abs() < 0.05).all()
    assert ((found.activity.value - y.var(0)).abs() < Z_LIMIT * found.activity.stderr).all()
    assert found.active_units == 2 and float(found.holes) < 0.01


def test_ppca_with_its_exact_guide():
    """Data of the model and its posterior: q(z) is the prior but for the sampling of the data."""
    pair = models.PPCA(5, 2)
    _, y = pair.simulate(2000)
    found = evidence.diagnostics(pair, y, draws=3)
    # Each of the three: 2 · 5 / (2 · 2000) nats are what 2000 data miss of a Gaussian.
    assert abs(float(found.marginal_kl)) < 0.02 and float(found.holes) < 0.01
    assert close(found.elbo, pair.log_evidence(y).mean().detach())
    posterior = pair.posterior(y)
    within = posterior.covariance_matrix[0].detach()
    spread = torch.cov(posterior.mean.detach().T) + within
    limit = 0.5 * (torch.logdet(spread) - torch.logdet(within))
    assert abs(float(found.information) - float(limit)) < Z_LIMIT * float(found.information.stderr) + 0.01
    assert found.unit_kl is None and "guide of 'z' is not a product" in found.notes[0]


def test_the_encoder_is_not_run_again_for_each_point(monkeypatch):
    """Memory for 64 (point, datum) pairs a pass, 64 data: 8 points a run of their encoder, not one."""
    seen = []

    def guide(y):
        seen.append(len(y))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.6 * y, 0.7).to_event(1))

    pair, y = Pair.of(gaussian_pair().model, guide), torch.randn(64, 2)
    monkeypatch.setitem(memory.BUDGET, "cpu", 64 * 2 * y.element_size())
    evaluator = Evaluator(pair, y)
    points = {"z": torch.randn(64, 2)}
    evaluator.guide_cells  # noqa: B018 (measured once)
    seen.clear()
    again = _log_mixture(evaluator, points)
    assert sum(seen) <= 64 * 64 / 8 and len(seen) >= 8
    monkeypatch.undo()
    torch.testing.assert_close(again, _log_mixture(Evaluator(pair, y), points))


def test_an_unused_coordinate_is_not_active():
    def guide(y):
        with pyro.plate("data", len(y)):
            loc = torch.stack([y[:, 0], torch.zeros(len(y))], -1)
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.5, 1.0])).to_event(1))

    y = torch.randn(400, 2)
    found = evidence.diagnostics(Pair.of(gaussian_pair().model, guide), y, draws=50)
    assert found.active_units == 1
    assert abs(float(found.unit_information.value[1])) < 1e-9 and abs(float(found.unit_kl.value[1])) < 1e-9


def layered(y_loc=0.0):
    def model(y):
        with pyro.plate("data", len(y)):
            top = pyro.sample("top", dist.Normal(torch.zeros(len(y)), 1.0))
            low = pyro.sample("low", dist.Normal(top, 1.0))
            pyro.sample("y", dist.Normal(low, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            top = pyro.sample("top", dist.Normal(y / 2, 0.8))
            pyro.sample("low", dist.Normal((top + y) / 2, 0.7))

    return Pair.of(model, guide)


def test_one_site_of_several():
    y = torch.randn(50)
    whole = evidence.diagnostics(layered(), y)
    top = evidence.diagnostics(layered(), y, site="top", draws=100)
    assert whole.sites == ("top", "low") and top.sites == ("top",)
    kl = dist.kl.kl_divergence(dist.Normal(y / 2, 0.8), dist.Normal(0.0, 1.0)).mean()
    assert close(top.kl, kl) and top.unit_kl is not None and whole.unit_kl is None
    with pytest.raises(evidence.Unavailable, match="'low' depends on other latents"):
        evidence.diagnostics(layered(), y, site="low")
    with pytest.raises(ValueError, match="site: expected one of"):
        evidence.diagnostics(layered(), y, site="middle")


def test_what_has_no_aggregated_posterior():
    def model(x, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(x, y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    with pytest.raises(evidence.Unavailable, match="'z' has a prior that differs between data"):
        evidence.diagnostics(Pair.of(model, guide), tuple(torch.randn(2, 6)))

    def bounded(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Uniform(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def wide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    for look in (evidence.diagnostics, evidence.site_gaps):
        with pytest.raises(evidence.Unavailable, match="cannot be split"):
            look(Pair.of(bounded, wide), torch.randn(20))
    with pytest.raises(ValueError, match="draws: expected"):
        evidence.diagnostics(gaussian_pair(), torch.randn(3, 2), draws=0)


def test_a_mixture_prior_and_a_decoder_that_refuses_particles():
    class Learned(Convolutional):
        def prior(self):
            loc = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
            parts = dist.Normal(loc, 0.5).to_event(1)
            return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)

        def model(self, y):
            with self.plate(y):
                z = pyro.sample("z", self.prior())
                image = self.conv(self.generator(z).unflatten(-1, (1, 4, 4)))
                pyro.sample("y", dist.Normal(image.flatten(1), 0.5).to_event(1), obs=y)

    pair, y = Learned(), torch.randn(6, 16)
    found = evidence.diagnostics(pair, y, draws=300, points=100)
    loc, scale = pair.encoder(y).detach().chunk(2, -1)
    guide = dist.Normal(loc, (0.3 * scale).exp()).to_event(1)
    z = guide.sample((4000,))
    mixture = guide.log_prob(z[:, :, None]).logsumexp(-1) - math.log(6)
    other = (mixture - pair.prior().log_prob(z)).mean()
    assert abs(float(found.marginal_kl) - float(other)) < 6 * float(found.marginal_kl.stderr)
    assert found.unit_kl is None and "prior of 'z'" in found.notes[0]


# --------------------------------------------------------------------- simulation-based calibration


def scaled_guide(pair, factor):
    """pPCA's posterior with its scale multiplied."""

    def guide(y):
        q = pair.posterior(y)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.MultivariateNormal(q.mean, scale_tril=factor * q.scale_tril))

    return Pair.of(pair.model, guide, placeholder=pair.placeholder)


@pytest.mark.parametrize("name", ["ppca", "mixture", "hmm-categorical", "state_space"])
def test_an_exact_guide_is_calibrated(name):
    """p values of a calibrated guide are uniform: a false alarm once in a thousand for each."""
    found = evidence.calibration(TABLE[name][0](), 300, 39)
    assert found.p_value > 1e-3, found
    assert found.ranks.min() == 0 and found.ranks.max() == 39 and found.counts.sum(1).eq(300).all()


def test_ranks_are_named_by_coordinate():
    assert evidence.calibration(models.PPCA(5, 2), 20, 9).quantities == ("z[0]", "z[1]", "log joint")
    assert evidence.calibration(models.PPCA(5, 1), 20, 9).quantities == ("z", "log joint")
    for sizes, name in (((0, 9), "num_data"), ((20, 0), "draws"), ((20, 2.0), "draws")):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number, got"):
            evidence.calibration(models.PPCA(5, 1), *sizes)
    with pytest.raises(ValueError, match="num_data, draws: expected at least two bins"):
        evidence.calibration(models.PPCA(5, 1), 19, 9)


def test_a_quantity_that_never_varies_has_no_rank():
    def latents(size):
        z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
        pyro.sample("sure", dist.Categorical(logits=torch.tensor([0.0, -math.inf]).expand(size, 2)))
        return z

    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(latents(len(y)), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            latents(len(y))

    pair = Pair.of(model, guide, placeholder=torch.zeros)
    assert evidence.calibration(pair, 20, 9).quantities == ("z", "log joint")


def test_guides_that_err_are_found():
    pair = models.PPCA(5, 2)
    assert evidence.calibration(scaled_guide(pair, 1.0), 300, 39).p_value > 1e-3
    assert evidence.calibration(scaled_guide(pair, 0.6), 300, 39).p_value < 1e-6
    assert evidence.calibration(scaled_guide(pair, 1.7), 300, 39).p_value < 1e-6


def test_a_guide_that_ignores_the_data_is_found_by_the_log_joint():
    pair = models.PPCA(5, 2)

    def prior(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    found = evidence.calibration(Pair.of(pair.model, prior, placeholder=pair.placeholder), 300, 39)
    assert found.quantities == ("z[0]", "z[1]", "log joint")
    assert (found.p_values[:2] > 1e-3).all() and found.p_values[2] < 1e-6


def test_a_wrong_discrete_guide_is_found():
    pair = models.GaussianMixture(3, 4)

    def always_the_first(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(torch.tensor([0.97, 0.01, 0.01, 0.01])).expand([len(y)]))

    found = evidence.calibration(Pair.of(pair.model, always_the_first, placeholder=pair.placeholder), 300, 39)
    assert found.p_value < 1e-6


@pytest.mark.parametrize("what", [evidence.diagnostics, lambda pair, y: evidence.calibration(pair, 40)])
def test_a_model_without_latents_has_neither(what):
    with pytest.raises(evidence.Unavailable, match="the model has no latents"):
        what(models.Flow(2, layers=1, hidden=(4,)), torch.randn(20, 2))


def test_calibration_refuses_what_makes_no_bins():
    pair = models.PPCA(5, 2)
    with pytest.raises(ValueError, match="expected at least two bins"):
        evidence.calibration(pair, 10, 39)
    with pytest.raises(ValueError, match="expected at least two bins"):
        evidence.calibration(pair, 100, 42)
    with pytest.raises(ValueError, match="num_data: expected"):
        evidence.calibration(pair, 0)
    with pytest.raises(TypeError, match="placeholder is not defined"):
        evidence.calibration(Pair.of(pair.model, pair.guide))


def test_the_error_of_activity_does_not_depend_on_where_the_latents_lie():
    z = torch.randn(4, 30, 2) + torch.randn(30, 2)
    here, there = _activity(z), _activity(z + 100)
    torch.testing.assert_close(here.value, there.value)
    torch.testing.assert_close(here.stderr, there.stderr)


def test_a_tail_whose_profile_has_a_hole_is_fitted():
    """With 100 exceedances of which three quarters tie, the third point of the grid is b = 0, where k = 0 and
    the profile 0 / 0."""
    x = torch.cat([torch.linspace(0.1, 0.9, 24), torch.ones(76)])[:, None]
    assert _fit_tail(x).isfinite().all()

"""Latent-variable models with encoders, factor models and models of single cells."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceGraph_ELBO, TraceMeanField_ELBO, autoguide, config_enumerate
from pyro.nn import PyroModule, PyroSample
from torch import nn

from tests.programs.base import Case, assignments, average, draws, gaussian, integral, program, value_of
from tests.programs.mixtures import enumerated, normal

BINARY = (draws(5, 6, seed=20) > 0).double()


def bernoulli(y, logits):
    return y * logits - nn.functional.softplus(logits)


class VAE(nn.Module):
    """The tutorial's VAE: an encoder and a decoder, a plate without a size of its own."""

    def __init__(self, latent=2, weight=1.0):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(latent, 5), nn.Softplus(), nn.Linear(5, 6))
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 2 * latent))
        self.latent, self.weight = latent, weight

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            zero = x.new_zeros(torch.Size((x.shape[0], self.latent)))
            with poutine.scale(scale=self.weight):
                z = pyro.sample("latent", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            with poutine.scale(scale=self.weight):
                pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def evidence(self):
        def log_f(*z):
            z = torch.stack(z, -1)
            likelihood = bernoulli(BINARY, self.decoder(z)[:, None]).sum(-1)
            return likelihood + normal(z, 0.0, 1.0).sum(-1, keepdim=True)

        return integral(log_f, *[(-7.0, 7.0)] * self.latent)


@program("integral")
def vae():
    net = VAE()
    return Case(net.model, net.guide, (BINARY,), net.evidence)


@program("integral", loss=TraceMeanField_ELBO)
def vae_with_closed_form_KL():
    net = VAE()
    return Case(net.model, net.guide, (BINARY,), net.evidence)


@program("integral", refused="scale")
def vae_with_annealed_KL():
    """A weight of the KL term by poutine.scale: the loss is no bound then."""
    net = VAE(weight=0.3)
    return Case(net.model, net.guide, (BINARY,), net.evidence)


@program("integral")
def vae_with_a_mixture_prior():
    decoder = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 6))
    encoder = nn.Linear(6, 2)

    def prior():
        logits = pyro.param("prior_logits", torch.zeros(2))
        locs = pyro.param("prior_locs", torch.tensor([-1.0, 1.0]))
        parts = dist.Normal(locs, 0.5)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)

    def model(x):
        pyro.module("decoder", decoder)
        mixture = prior()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", mixture)
            pyro.sample("obs", dist.Bernoulli(logits=decoder(z.unsqueeze(-1))).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    @torch.no_grad()
    def reference():
        def log_f(z):
            weights = value_of("prior_logits").log_softmax(-1)
            mixture = (weights + normal(z[:, None], value_of("prior_locs"), 0.5)).logsumexp(-1)
            return bernoulli(BINARY, decoder(z[:, None])[:, None]).sum(-1) + mixture[:, None]

        return integral(log_f, (-8.0, 8.0))

    return Case(model, guide, (BINARY,), reference)


class SemiSupervised(nn.Module):
    """A VAE of classes y and styles z; classes of some data are seen."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6))
        self.encoder_y = nn.Linear(6, 2)
        self.encoder_z = nn.Linear(8, 2)

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(xs.new_zeros(len(xs), 1), 1.0).to_event(1))
            ys = pyro.sample("y", dist.OneHotCategorical(xs.new_full((len(xs), 2), 0.5)), obs=ys)
            shape = torch.broadcast_shapes(zs.shape[:-1], ys.shape[:-1])
            inside = torch.cat([zs.expand(*shape, 1), ys.expand(*shape, 2)], -1)
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(inside)).to_event(1), obs=xs)

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            if ys is None:
                ys = pyro.sample("y", dist.OneHotCategorical(logits=self.encoder_y(xs)))
            inside = torch.cat([xs.expand(*ys.shape[:-1], 6), ys], -1)
            loc, log_scale = self.encoder_z(inside).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    @torch.no_grad()
    def joint(self):
        """ln p(x, y), [data, classes]."""

        def log_f(z):
            rows = []
            for y in torch.eye(2):
                inside = torch.cat([z[:, None], y.expand(len(z), 2)], -1)
                rows.append(
                    bernoulli(BINARY, self.decoder(inside)[:, None]).sum(-1) + normal(z, 0.0, 1.0)[:, None]
                )
            return torch.stack(rows, -1) + math.log(0.5)

        return integral(log_f, (-7.0, 7.0))


@program("integral", loss=enumerated())
def semi_supervised_vae_without_labels():
    net = SemiSupervised()
    guide = config_enumerate(net.guide, default="parallel", expand=True)
    return Case(net.model, guide, (BINARY,), lambda: net.joint()[0].logsumexp(-1))


@program("integral")
def semi_supervised_vae_with_labels():
    net = SemiSupervised()
    labels = torch.eye(2)[[0, 1, 1, 0, 1]]
    return Case(net.model, net.guide, (BINARY, labels), lambda: (net.joint()[0] * labels).sum(-1))


@program("closed form", steps=300)
def probabilistic_PCA():
    y = draws(5, 4, seed=21)

    def model(y):
        w = pyro.param("w", torch.randn(2, 4))
        sigma = pyro.param("sigma", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ w, sigma).to_event(1), obs=y)

    def guide(y):
        v = pyro.param("v", lambda: 0.1 * draws(4, 2, seed=23))
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.MultivariateNormal(y @ v, scale_tril=tril))

    def reference():
        cov = value_of("w").T @ value_of("w") + value_of("sigma") ** 2 * torch.eye(4)
        return torch.stack([gaussian(row, 0.0, cov) for row in y])

    return Case(model, guide, (y,), reference)


@program("closed form", steps=400, rate=0.02)
def factor_analysis_AutoNormal_per_datum():
    """An AutoNormal with a location for each datum."""
    y = draws(4, 3, seed=24)

    def model(y):
        w = pyro.param("w", lambda: draws(3, seed=25))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1) * w, 0.8).to_event(1), obs=y)

    def reference():
        cov = torch.outer(value_of("w"), value_of("w")) + 0.64 * torch.eye(3)
        return torch.stack([gaussian(row, 0.0, cov) for row in y])

    return Case(model, autoguide.AutoNormal(model), (y,), reference)


@program("Monte Carlo", scope="joint", steps=500, slack=2.0)
def factor_analysis_of_latent_loadings():
    """Loadings for all data and a factor for each: both are drawn."""
    y = draws(4, 3, seed=24)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1) * w, 0.8).to_event(1), obs=y)

    def reference():
        torch.manual_seed(1)
        w = torch.randn(50000, 3)
        cov = w[:, :, None] * w[:, None] + 0.64 * torch.eye(3)
        return average(
            torch.distributions.MultivariateNormal(torch.zeros(3), cov[:, None]).log_prob(y).sum(-1)
        )

    return Case(model, autoguide.AutoNormal(model), (y,), reference)


@program("enumeration", loss=TraceGraph_ELBO, steps=400)
def sigmoid_belief_network_with_baselines():
    """Two layers of binary units, score-function gradients, a neural baseline."""
    baseline = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def model(x):
        w1 = pyro.param("w1", lambda: draws(2, 3, seed=26))
        w2 = pyro.param("w2", lambda: draws(3, 6, seed=27))
        with pyro.plate("data", len(x)):
            top = pyro.sample("top", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            mid = pyro.sample("mid", dist.Bernoulli(logits=top @ w1).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=mid @ w2).to_event(1), obs=x)

    def guide(x):
        pyro.module("baseline", baseline)
        v1 = pyro.param("v1", lambda: 0.1 * draws(6, 3, seed=28))
        v2 = pyro.param("v2", lambda: 0.1 * draws(3, 2, seed=29))
        options = {"baseline": {"nn_baseline": lambda x: baseline(x).squeeze(-1), "nn_baseline_input": x}}
        with pyro.plate("data", len(x)):
            mid = pyro.sample("mid", dist.Bernoulli(logits=x @ v1).to_event(1), infer=options)
            pyro.sample("top", dist.Bernoulli(logits=mid @ v2).to_event(1), infer=options)

    def reference():
        top, mid = assignments(2, 2).double(), assignments(2, 3).double()
        prior = bernoulli(mid, (top @ value_of("w1"))[:, None]).sum(-1).logsumexp(0) - math.log(4)
        return (prior + bernoulli(BINARY[:, None], mid @ value_of("w2")).sum(-1)).logsumexp(-1)

    return Case(model, guide, (BINARY,), reference)


@program("integral", steps=300)
def deep_exponential_family_of_gammas():
    """Two layers of sparse Gammas over counts, guides of softplus parameters for each datum."""
    counts = torch.tensor([[2.0, 0], [5, 3], [0, 0]])

    def model(x):
        w = pyro.param("w", torch.tensor([1.2, 0.6]), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            top = pyro.sample("z_top", dist.Gamma(0.8, 0.5))
            low = pyro.sample("z_low", dist.Gamma(0.8, 0.8 / top.clamp_min(1e-6)))
            pyro.sample("obs", dist.Poisson(low.unsqueeze(-1) * w).to_event(1), obs=x)

    def guide(x):
        def gamma(name):
            shape = pyro.param(f"{name}_shape", torch.full((len(x),), 1.0), constraint=constraints.positive)
            mean = pyro.param(f"{name}_mean", torch.full((len(x),), 1.0), constraint=constraints.positive)
            return dist.Gamma(shape, shape / mean)

        with pyro.plate("data", len(x)):
            pyro.sample("z_top", gamma("top"))
            pyro.sample("z_low", gamma("low"))

    def log_gamma(z, a, b):
        return a * torch.log(torch.as_tensor(b).double()) - math.lgamma(a) + (a - 1) * z.log() - b * z

    def reference():
        w = value_of("w")

        def log_f(u, v):  # logarithms of the two layers
            top, low = u.exp(), v.exp()
            prior = log_gamma(top, 0.8, 0.5) + log_gamma(low, 0.8, 0.8 / top.clamp_min(1e-6)) + u + v
            mean = low[:, None, None] * w
            likelihood = counts * mean.log() - mean - torch.lgamma(counts + 1)
            return prior[:, None] + likelihood.sum(-1)

        return integral(log_f, (-25.0, 6.0), (-60.0, 6.0), nodes=400)

    return Case(model, guide, (counts,), reference)


@program("integral", scope="joint", steps=400, slack=1.0)
def poisson_matrix_factorization():
    counts = torch.tensor([[3.0, 0], [5, 1]])

    def model(counts):
        users, items = counts.shape
        with pyro.plate("users", users, dim=-2):
            theta = pyro.sample("theta", dist.Gamma(1.0, 1.0))
        with pyro.plate("items", items, dim=-1):
            beta = pyro.sample("beta", dist.Gamma(1.0, 1.0))
        with pyro.plate("rows", users, dim=-2), pyro.plate("columns", items, dim=-1):
            pyro.sample("counts", dist.Poisson(theta * beta), obs=counts)

    def reference():
        n = counts.sum(-1)

        def log_f(a, b):  # given the items, each user's rate is summed in closed form
            beta = torch.stack([a, b], -1)
            users = (
                (counts * beta[:, None].log()).sum(-1)
                + torch.lgamma(n + 1)
                - (n + 1) * torch.log(1 + beta.sum(-1))[:, None]
            )
            return users.sum(-1) - beta.sum(-1) - torch.lgamma(counts + 1).sum()

        return integral(log_f, (0.0, 30.0), (0.0, 30.0), nodes=200)

    return Case(model, autoguide.AutoNormal(model), (counts,), reference)


# ------------------------------------------------------------------------------------------------ cells


@program("integral", steps=300)
def scVI_with_a_zero_inflated_decoder():
    """Gene counts of cells: a state, a library size, a zero-inflated negative binomial."""
    counts = torch.tensor([[3.0, 0, 5], [0, 0, 1], [7, 2, 9]])
    decoder = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 6))
    encoder = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4))

    def parts(z):
        scale, gate = decoder(z).chunk(2, -1)
        return scale.softmax(-1), gate

    def model(x):
        pyro.module("decoder", decoder)
        theta = pyro.param("inverse_dispersion", 5.0 * x.new_ones(3), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), x.new_ones(1)).to_event(1))
            library = pyro.sample("l", dist.LogNormal(2.0 * x.new_ones(1), 0.5 * x.new_ones(1)).to_event(1))
            mu, gate = parts(z)
            logits = (library * mu + 1e-6).log() - (theta + 1e-6).log()
            zinb = dist.ZeroInflatedNegativeBinomial(gate_logits=gate, total_count=theta, logits=logits)
            pyro.sample("x", zinb.to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            z_loc, z_scale, l_loc, l_scale = encoder(torch.log(1 + x)).chunk(4, -1)
            pyro.sample("l", dist.LogNormal(2.0 + l_loc, 0.5 * l_scale.exp()).to_event(1))
            pyro.sample("z", dist.Normal(z_loc, z_scale.exp()).to_event(1))

    @torch.no_grad()
    def reference():
        theta = value_of("inverse_dispersion")

        def log_f(z, u):  # the library's size is exp(2 + u / 2)
            mu, gate = parts(z[:, None])
            mean = (2 + u / 2).exp()[:, None] * mu + 1e-6
            odds = (mean / (theta + 1e-6)).log()[:, None]
            nb = torch.lgamma(theta + counts) - torch.lgamma(theta) - torch.lgamma(1 + counts)
            nb = nb + counts * nn.functional.logsigmoid(odds) + theta * nn.functional.logsigmoid(-odds)
            gate = gate[:, None]
            on, off = nn.functional.logsigmoid(-gate) + nb, nn.functional.logsigmoid(gate)
            each = torch.where(counts == 0, torch.logaddexp(off, on), on)
            return each.sum(-1) + (normal(z, 0.0, 1.0) + normal(u, 0.0, 1.0))[:, None]

        return integral(log_f, (-7.0, 7.0), (-7.0, 7.0), nodes=120)

    return Case(model, guide, (counts,), reference)


SPOTS = torch.tensor([[4.0, 1], [9, 2], [0, 1]]).double()
SIGNATURE = torch.tensor([3.0, 1.0]).double()


def cell2location(x):
    """Counts of genes in spots: a gene's detection for all spots, an abundance for each."""
    spots, genes = x.shape
    spot_plate = pyro.plate("obs_plate", spots, dim=-2)
    gene_plate = pyro.plate("var_plate", genes, dim=-1)
    with gene_plate:
        m_g = pyro.sample("m_g", dist.Gamma(4.0, 4.0))
    with spot_plate:
        w_s = pyro.sample("w_s", dist.Gamma(2.0, 1.0))
    with spot_plate, gene_plate:
        pyro.sample("data_target", dist.GammaPoisson(6.0, 6.0 / (w_s * SIGNATURE * m_g)), obs=x)


def spots_given(m):
    """ln p of each spot, [..., spots], given the genes' detection rates m [..., genes], by Gauss–Legendre."""
    points, weights = np.polynomial.legendre.leggauss(80)
    w = torch.as_tensor(12.5 * (points + 1))
    log_w = torch.as_tensor(np.log(12.5 * weights)) + w.log() - w
    mean = w[:, None] * SIGNATURE * m[..., None, None, :]
    x = SPOTS[:, None]
    terms = torch.lgamma(6.0 + x) - math.lgamma(6.0) - torch.lgamma(x + 1)
    terms = terms + 6.0 * torch.log(6.0 / (6.0 + mean)) + x * torch.log(mean / (6.0 + mean))
    return (terms.sum(-1) + log_w).logsumexp(-1)


def cell2location_evidence():
    torch.manual_seed(2)
    m = torch.distributions.Gamma(torch.full((4000, 2), 4.0), 4.0).sample()
    return average(spots_given(m).sum(-1))


@program("Monte Carlo", scope="joint", steps=400, slack=1.0)
def cell2location_jointly():
    return Case(cell2location, autoguide.AutoNormal(cell2location), (SPOTS,), cell2location_evidence)


# ----------------------------------------------------------------------------- networks of random weights


class BNN(PyroModule):
    """A layer of hidden units whose weights are all random."""

    def __init__(self):
        super().__init__()
        self.fc1 = PyroModule[nn.Linear](1, 2)
        self.fc1.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2))
        self.fc1.bias = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        self.fc2 = PyroModule[nn.Linear](2, 1)
        self.fc2.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.fc2.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x, y=None):
        mean = self.fc2(torch.tanh(self.fc1(x))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)
        return mean


@program("Monte Carlo", scope="joint", steps=500, slack=2.5)
def bayesian_neural_network():
    x = torch.linspace(-1, 1, 6)
    y = torch.sin(2 * x)
    model = BNN()

    def reference():
        torch.manual_seed(3)
        w = torch.randn(200000, 7)
        hidden = torch.tanh(w[:, None, 0:2] * x[:, None] + w[:, None, 2:4])
        mean = (hidden * w[:, None, 4:6]).sum(-1) + w[:, 6:]
        return average(normal(y, mean, 0.5).sum(-1))

    return Case(model, autoguide.AutoNormal(model), (x[:, None], y), reference)

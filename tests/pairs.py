"""Small pairs that the tests share, and the table that every contract test runs over."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyroelbo import ExactPair, Pair, models
from pyroelbo.encoders import ENCODERS
from pyroelbo.priors import PRIORS


class Nonlinear(Pair):
    """A VAE of the plainest kind, with a data plate that may stand for many more data than the batch."""

    def __init__(self, latent=2, dims=4, full_size=None):
        super().__init__()
        self.latent, self.full_size = latent, full_size
        self.generator = nn.Sequential(nn.Linear(latent, 8), nn.Tanh(), nn.Linear(8, dims))
        self.encoder = nn.Linear(dims, 2 * latent)
        self.dims = dims

    def plate(self, y):
        size = len(y) if self.full_size is None else self.full_size
        return pyro.plate("data", size, subsample=torch.arange(len(y)))

    def model(self, y):
        with self.plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(self.generator(z), 0.5).to_event(1), obs=y)

    def guide(self, y):
        loc, log_scale = self.encoder(y).chunk(2, -1)
        with self.plate(y):
            pyro.sample("z", dist.Normal(loc, (0.3 * log_scale).exp()).to_event(1))

    def placeholder(self, n):
        return torch.zeros(n, self.dims)


class Convolutional(Nonlinear):
    """A decoder that refuses a particle dimension."""

    def __init__(self, latent=2):
        super().__init__(latent, 16)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def model(self, y):
        with self.plate(y):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent), 1.0).to_event(1))
            image = self.conv(self.generator(z).unflatten(-1, (1, 4, 4)))
            pyro.sample("y", dist.Normal(image.flatten(1), 0.5).to_event(1), obs=y)


def sentences(n, longest=20):
    """Words 0 … 4, some sentences shorter than others, padded with -1 to ``longest``."""
    y = torch.randint(5, (n, longest))
    y[torch.arange(longest) >= torch.randint(2, 6, (n, 1))] = -1
    return y


def texts(n, longest, symbols):
    """Strings of 0 to ``longest`` symbols, padded with -1."""
    y = torch.randint(symbols, (n, longest))
    y[torch.arange(longest) >= torch.randint(longest + 1, (n, 1))] = -1
    return y


def labelled_frames(n, steps=6):
    """(x, y, lengths): frames, labels 1 … 3 padded with -1 (few enough to fit), lengths of the frames."""
    y = torch.randint(1, 4, (n, 2))
    y[torch.rand(n) < 0.5, 1:] = -1
    return torch.randn(n, steps, 2), y, torch.randint(4, steps + 1, (n,))


def regressions(n):
    """(x, y): inputs, and outputs by one line or another."""
    x = torch.randn(n, 2)
    return x, torch.where(x[:, :1] > 0, x, -x.flip(-1)) + 0.3 * torch.randn(n, 2)


def coloured(n, height=4, width=6):
    """(x, superpixels, parents, y): pictures of six superpixels, or of five, on trees of their own."""
    square = torch.arange(height)[:, None] // 2 * 3 + torch.arange(width) // 2
    superpixels = square.expand(n, -1, -1).clone()
    parents = torch.tensor([[-1, 0, 1, 0, 1, 2], [1, 4, 1, 4, -1, 4]])[torch.randint(2, (n,))]
    superpixels[0] = superpixels[0].clamp(max=4)  # the last two are one
    parents[0] = torch.tensor([1, -1, 1, 0, 1, -1])
    x, y = torch.randint(256, (n, height, width)), torch.randint(-60, 61, (n, height, width, 2))
    return x, superpixels, parents, y


def classed(levels, dims):
    """Draws of (labels, y): one of three classes, then integers 0 … levels-1, [B, dims]."""
    return lambda n: (torch.arange(n) % 3, torch.randint(levels, (n, dims)).double())


class Conjugate(ExactPair):
    """A Bayesian model of the textbook: a rate with a Gamma prior, counts that it explains, a log-normal
    guide."""

    def __init__(self, counts=3):
        super().__init__()
        self.counts = counts
        self.generator = nn.Module()
        self.generator.register_parameter("exposure", nn.Parameter(torch.tensor(1.0)))
        self.encoder = nn.Linear(1, 2)

    def model(self, y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Gamma(torch.full((len(y),), 2.0), 0.5))
            seen = (self.generator.exposure * z)[..., None].expand(*z.shape, self.counts)
            pyro.sample("y", dist.Poisson(seen).to_event(1), obs=y)

    def guide(self, y):
        loc, log_scale = self.encoder((1 + y.sum(-1, keepdim=True)).log()).unbind(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.LogNormal(loc, (log_scale - 1).exp()))

    def posterior(self, y):
        return dist.Gamma(2 + y.sum(-1), 0.5 + self.counts * self.generator.exposure)

    def log_evidence(self, y):
        one = torch.ones(len(y)).to(self.generator.exposure)
        joint = dist.Gamma(2.0, 0.5).log_prob(one) + dist.Poisson(self.generator.exposure).log_prob(y).sum(-1)
        return joint - self.posterior(y).log_prob(one)

    def e_step(self, y, hard=False):
        q, value = self.posterior(y), self.log_evidence(y)
        z = q.mode if hard else q.mean
        value = value + q.log_prob(z) if hard else value
        return value, {"seen": y.sum().double(), "expected": self.counts * z.sum().double()}

    @torch.no_grad()
    def m_step(self, statistics):
        self.generator.exposure.copy_(statistics["seen"] / statistics["expected"])

    def placeholder(self, n):
        return torch.zeros(n, self.counts)


def binary(n, dims):
    return torch.bernoulli(torch.full((n, dims), 0.4))


# name: (a fresh pair, n data for it)
TABLE = {
    "vae-bernoulli": (lambda: models.VAE(6, 2, (8,)), lambda n: binary(n, 6)),
    "vae-logistic": (
        lambda: models.VAE(6, 2, (8,), likelihood="discretized_logistic", levels=5),
        lambda n: torch.randint(5, (n, 6)).double(),
    ),
    **{
        f"vae-{likelihood}": (
            lambda likelihood=likelihood: models.VAE(6, 2, (8,), likelihood=likelihood, levels=5),
            lambda n: torch.randint(5, (n, 6)).double(),
        )
        for likelihood in ("discretized_normal", "discretized_laplace")
    },
    "vae-categorical": (
        lambda: models.VAE(6, 2, (8,), likelihood="categorical", levels=5),
        lambda n: torch.randint(5, (n, 6)).double(),
    ),
    "vae-l2": (lambda: models.VAE(6, 2, (8,), likelihood="l2"), lambda n: torch.rand(n, 6)),
    "vae-l1": (lambda: models.VAE(6, 2, (8,), likelihood="l1"), lambda n: torch.rand(n, 6)),
    "vae-conv": (lambda: models.VAE((5, 6), 2, (8,), network="conv", channels=2), lambda n: binary(n, 30)),
    "vae-gated": (lambda: models.VAE(6, 2, (8, 8), network="gated"), lambda n: binary(n, 6)),
    **{
        f"vae-{prior}": (
            lambda prior=prior: models.VAE(6, 2, (8,), prior=prior, components=3),
            lambda n: binary(n, 6),
        )
        for prior in PRIORS
    },
    "vae-diffusion": (lambda: models.VAE(6, 2, (8,), prior="diffusion"), lambda n: binary(n, 6)),
    **{
        f"vae-{encoder}-encoder": (
            lambda encoder=encoder: models.VAE(6, 2, (8,), encoder=encoder),
            lambda n: binary(n, 6),
        )
        for encoder in ENCODERS
        if encoder != "diagonal"  # those of the rows above
    },
    "discrete_vae": (lambda: models.DiscreteVAE(6, (3, 2), (8,)), lambda n: binary(n, 6)),
    "discrete_vae-categorical": (
        lambda: models.DiscreteVAE(6, (2,), (8,), 3, "categorical", 5),
        lambda n: torch.randint(5, (n, 6)).double(),
    ),
    "rate_distortion": (
        lambda: models.RateDistortion(6, 2, (8,), weight=4.0, values=8),
        lambda n: torch.randn(n, 6),
    ),
    "rate_distortion-straight_through": (
        lambda: models.RateDistortion(
            6, 2, (8,), "discretized_laplace", 5, 20.0, "straight_through", values=8
        ),
        lambda n: torch.randint(5, (n, 6)).double(),
    ),
    "vq_vae": (lambda: models.VQVAE(6, 3, 2, 2, (8,)), lambda n: binary(n, 6)),
    "vq_vae-gradient": (
        lambda: models.VQVAE((4, 5), 3, 2, network="conv", channels=2, codebook="gradient"),
        lambda n: binary(n, 20),
    ),
    "fsq_vae": (
        lambda: models.FSQVAE(6, (3, 2), 2, (8,), "categorical", 5),
        lambda n: torch.randint(5, (n, 6)).double(),
    ),
    "sq_vae": (lambda: models.SQVAE(6, 3, 2, 2, (8,)), lambda n: binary(n, 6)),
    "vq_chain": (
        lambda: models.VQChain(6, (2, 2), 3, 2, (8,)),
        lambda n: binary(n, 6),
    ),
    "byte_vae": (
        lambda: models.ByteVAE(6, (3, 2), (8,), likelihood="bernoulli"),
        lambda n: binary(n, 6),
    ),
    "byte_vae-few": (
        lambda: models.ByteVAE(4, (2, 2), (6,), 3, "categorical", 5, components=1),
        lambda n: torch.randint(5, (n, 4)).double(),
    ),
    "byte_vae-squared": (
        lambda: models.ByteVAE(4, (3, 2), (8,), 256, "discretized_logistic", 5, loss="squared"),
        lambda n: torch.randint(5, (n, 4)).double(),
    ),
    "lda": (lambda: models.LDA(7, 3, 5), lambda n: texts(n, 5, 7)),
    "sbn": (lambda: models.SigmoidBeliefNet(6, (3, 2)), lambda n: binary(n, 6)),
    "flow": (
        lambda: models.DequantizedFlow(4, 5, layers=2, hidden=(8,)),
        lambda n: torch.randint(5, (n, 4)).double(),
    ),
    "flow-autoregressive": (
        lambda: models.DequantizedFlow(4, 5, "autoregressive", 2, (8,)),
        lambda n: torch.randint(5, (n, 4)).double(),
    ),
    "density_flow": (lambda: models.Flow(4, layers=2, hidden=(8,)), lambda n: torch.randn(n, 4)),
    "ppca": (lambda: models.PPCA(5, 2), lambda n: torch.randn(n, 5)),
    "ppca-mean-field": (lambda: models.PPCA(5, 2, guide="mean_field"), lambda n: torch.randn(n, 5)),
    "mixture": (lambda: models.GaussianMixture(3, 4), lambda n: torch.randn(n, 3)),
    "mixture-full": (lambda: models.GaussianMixture(3, 2, "full"), lambda n: torch.randn(n, 3)),
    "mixture-map": (
        lambda: models.GaussianMixture(3, 4, "full", smoothing=0.7, spread=0.6),
        lambda n: torch.randn(n, 3),
    ),
    "mixture-encoder": (lambda: models.GaussianMixture(3, 4, guide="encoder"), lambda n: torch.randn(n, 3)),
    "bernoulli_mixture": (lambda: models.BernoulliMixture(4, 3), lambda n: binary(n, 4)),
    "bernoulli_mixture-encoder": (
        lambda: models.BernoulliMixture(4, 3, guide="encoder"),
        lambda n: binary(n, 4),
    ),
    "chow_liu": (lambda: models.HiddenChowLiuTree(3), lambda n: binary(n, 3)),
    "ppca-diagonal": (lambda: models.PPCA(5, 2, noise="diagonal"), lambda n: torch.randn(n, 5)),
    "hmm-categorical": (lambda: models.HMM(3, 4, steps=5), lambda n: torch.randint(4, (n, 5))),
    "hmm-gaussian": (lambda: models.HMM(3, 2, "gaussian", steps=5), lambda n: torch.randn(n, 5, 2)),
    "hmm-full_gaussian": (lambda: models.HMM(3, 2, "full_gaussian", steps=5), lambda n: torch.randn(n, 5, 2)),
    "hmm-bernoulli": (
        lambda: models.HMM(3, 2, "bernoulli", steps=5, smoothing=0.5),
        lambda n: binary(n, 10).view(n, 5, 2),
    ),
    "hmm-poisson": (
        lambda: models.HMM(3, 2, "poisson", steps=5),
        lambda n: torch.poisson(torch.ones(n, 5, 2)),
    ),
    "hmm-mean-field": (
        lambda: models.HMM(3, 4, guide="mean_field", steps=5),
        lambda n: torch.randint(4, (n, 5)),
    ),
    "state_space": (lambda: models.StateSpace(2, 3, steps=5), lambda n: torch.randn(n, 5, 2)),
    "state_space-mean-field": (
        lambda: models.StateSpace(2, 3, guide="mean_field", steps=5),
        lambda n: torch.randn(n, 5, 2),
    ),
    "pcfg": (lambda: models.PCFG(2, 8, 5, steps=20), sentences),
    "pcfg-smoothed": (lambda: models.PCFG(3, 9, 5, steps=20, smoothing=0.5), sentences),
    "pcfg-mean-field": (lambda: models.PCFG(2, 8, 5, "mean_field", steps=20), sentences),
    "neural_pcfg": (lambda: models.NeuralPCFG(2, 8, 5, 4, steps=20), sentences),
    "hierarchy-bottom-up": (lambda: models.Hierarchy(6, (3, 2, 2), 8), lambda n: binary(n, 6)),
    "hierarchy-top-down": (
        lambda: models.Hierarchy(6, (3, 2), 8, "categorical", 5, "top-down"),
        lambda n: torch.randint(5, (n, 6)).double(),
    ),
    "hierarchy-diffusion": (
        lambda: models.Hierarchy(6, (3, 2), 8, prior="diffusion"),
        lambda n: binary(n, 6),
    ),
    "hierarchy-vamp": (
        lambda: models.Hierarchy(6, (3, 2, 2), 8, prior="vamp", components=3),
        lambda n: binary(n, 6),
    ),
    "hierarchy-top-down-autoregressive": (
        lambda: models.Hierarchy(6, (3, 2), 8, order="top-down", prior="autoregressive"),
        lambda n: binary(n, 6),
    ),
    "hierarchy-bottom-up-full-encoder": (
        lambda: models.Hierarchy(6, (3, 2), 8, encoder="full", prior="vamp", components=3),
        lambda n: binary(n, 6),
    ),
    "hierarchy-top-down-flow-encoder": (
        lambda: models.Hierarchy(6, (3, 2), 8, order="top-down", encoder="flow"),
        lambda n: binary(n, 6),
    ),
    "ladder-mixture-encoder": (
        lambda: models.Ladder(6, (3, 2), (8, 6), encoder="mixture", prior="vamp", components=3),
        lambda n: binary(n, 6),
    ),
    "ladder": (lambda: models.Ladder(6, (3, 2, 2), (8, 6, 5)), lambda n: binary(n, 6)),
    "ladder-precision": (
        lambda: models.Ladder(6, (3, 2), (8, 6), "l2", merge="precision", norm="none", dropout=0.1),
        lambda n: torch.rand(n, 6),
    ),
    "ladder-vamp": (
        lambda: models.Ladder(6, (3, 2), (8, 6), norm="layer", network="gated", prior="vamp", components=3),
        lambda n: binary(n, 6),
    ),
    "conv_ladder": (lambda: models.ConvLadder((4, 4), (2, 1, 1), 2, 4), lambda n: binary(n, 16)),
    "conv_ladder-vamp": (
        lambda: models.ConvLadder((4, 4), (1, 1), 1, 4, prior="vamp", components=3),
        lambda n: binary(n, 16),
    ),
    "style_vae": (
        lambda: models.StyleVAE((4, 6), 2, 1, 3, 8, 2, 4, "discretized_logistic", 5),
        lambda n: torch.randint(5, (n, 24)).double(),
    ),
    "style_vae-vamp": (
        lambda: models.StyleVAE((4, 4), 2, 1, 2, 4, 1, 4, prior="vamp", components=3),
        lambda n: binary(n, 16),
    ),
    "autoregressive-pixelcnn": (
        lambda: models.Autoregressive((2, 3), width=4, layers=2),
        lambda n: binary(n, 6),
    ),
    "autoregressive-transformer": (
        lambda: models.Autoregressive(5, 4, "categorical", "transformer", 8, 1),
        lambda n: torch.randint(4, (n, 5)),
    ),
    "strings": (lambda: models.Strings(5, 3, width=8, layers=1), lambda n: texts(n, 5, 3)),
    "sentence_vae": (lambda: models.SentenceVAE(5, 3, 2, 8), lambda n: texts(n, 5, 3)),
    "sentence_vae-window": (
        lambda: models.SentenceVAE(5, 3, 2, 8, "window", skip=True, prior="vamp", components=3),
        lambda n: texts(n, 5, 3),
    ),
    "diffusion": (
        lambda: models.Diffusion(4, 3, 5, width=8, layers=1),
        lambda n: torch.randint(5, (n, 4)).double(),
    ),
    "diffusion-unet": (
        lambda: models.Diffusion((4, 8), 3, 5, network="unet", width=4, layers=1),
        lambda n: torch.randint(5, (n, 32)).double(),
    ),
    "diffusion-linear": (lambda: models.Diffusion(4, 3, None, network="linear"), lambda n: torch.randn(n, 4)),
    "diffusion-written_out": (
        lambda: models.Diffusion(4, 3, 5, "linear", "eps", "beta", width=8, layers=1).written_out(),
        lambda n: torch.randint(5, (n, 4)).double(),
    ),
    "discrete_diffusion": (
        lambda: models.DiscreteDiffusion(3, 4, 3, width=8, layers=1),
        lambda n: torch.randint(4, (n, 3)),
    ),
    "discrete_diffusion-written_out": (
        lambda: models.DiscreteDiffusion(3, 4, 3, width=8, layers=1).written_out(),
        lambda n: torch.randint(4, (n, 3)),
    ),
    "masked_diffusion": (lambda: models.MaskedDiffusion(6, width=8, layers=1), lambda n: binary(n, 6)),
    "masked_diffusion-conv": (
        lambda: models.MaskedDiffusion((2, 3), 5, "discretized_logistic", "conv", 8, 1, components=2),
        lambda n: torch.randint(5, (n, 6)),
    ),
    "masked_diffusion-written_out": (
        lambda: models.MaskedDiffusion(4, 3, "categorical", "transformer", 8, 1).written_out(),
        lambda n: torch.randint(3, (n, 4)),
    ),
    "vdm": (lambda: models.VDM(4, 5, width=8, layers=1), lambda n: torch.randint(5, (n, 4)).double()),
    "vdm-per_dimension": (
        lambda: models.VDM(4, None, "per_dimension", width=8, layers=1, fourier=(1, 2)),
        lambda n: torch.randn(n, 4),
    ),
    "conjugate": (Conjugate, lambda n: torch.poisson(torch.full((n, 1), 4.0).expand(n, 3))),
    "own": (Nonlinear, lambda n: torch.randn(n, 4)),
    "own-conv": (Convolutional, lambda n: torch.randn(n, 16)),
}
# a row joins the exact pairs, and those whose guide draws from the posterior, by what it makes
EXACT = tuple(n for n, (make, _) in TABLE.items() if isinstance(make(), ExactPair))
EXACT_GUIDE = tuple(n for n in EXACT if TABLE[n][0]().exact_guide)
# those that EM fits: by an M-step of their own, or by marginals of a structured posterior
EM = tuple(n for n in EXACT_GUIDE if hasattr(TABLE[n][0](), "m_step") or n.startswith("neural"))
# conditional pairs: what is drawn is a tuple (x, y, lengths)
CONDITIONAL = {
    "ctc": (lambda: models.CTC(2, 3, 4, 2), labelled_frames),
    "experts": (lambda: models.MixtureOfExperts(2, 2, 3), regressions),
    "experts-logistic": (
        lambda: models.MixtureOfExperts(2, 3, 2, "logistic"),
        lambda n: (torch.randn(n, 2), torch.randint(3, (n,))),
    ),
    "experts-encoder": (lambda: models.MixtureOfExperts(2, 2, 3, guide="encoder"), regressions),
    "superpixel": (lambda: models.Superpixel(2, 3, width=4), coloured),
    "superpixel-tree": (lambda: models.Superpixel(2, 3, guide="tree", width=4), coloured),
    "superpixel-independent": (
        lambda: models.Superpixel(2, 3, "independent", "independent", 4),
        coloured,
    ),
    "ctc-local": (lambda: models.CTC(2, 3, 4, 2, guide="local"), labelled_frames),
    "diffusion-classes": (lambda: models.Diffusion(4, 3, 5, width=8, layers=1, classes=3), classed(5, 4)),
    "diffusion-classes-written_out": (
        lambda: models.Diffusion((4, 4), 3, 5, network="unet", width=4, layers=1, classes=3).written_out(),
        classed(5, 16),
    ),
    "discrete_diffusion-classes": (
        lambda: models.DiscreteDiffusion(3, 4, 3, width=8, layers=1, classes=3),
        classed(4, 3),
    ),
    "vdm-classes": (lambda: models.VDM(4, 5, width=8, layers=1, classes=3), classed(5, 4)),
    "masked_diffusion-classes": (
        lambda: models.MaskedDiffusion((2, 3), 3, "categorical", "conv", 8, 1, classes=3),
        classed(3, 6),
    ),
    "masked_diffusion-classes-written_out": (
        lambda: models.MaskedDiffusion(4, 3, "categorical", "transformer", 8, 1, classes=3).written_out(),
        classed(3, 4),
    ),
}

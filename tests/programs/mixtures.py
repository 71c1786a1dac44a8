"""Mixtures: assignments that Pyro enumerates, alone or beside continuous latents."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO, autoguide, config_enumerate
from torch import nn

from tests.programs.base import Case, assignments, draws, integral, program, value_of

POINTS = torch.tensor([-2.1, -1.7, -2.4, 1.2, 1.9, 1.5, 0.1, 2.3]).double()


def normal(y, loc, scale):
    z = (y - loc) / scale
    return -0.5 * z**2 - torch.as_tensor(scale).double().log() - 0.5 * math.log(2 * math.pi)


def nothing(*args):
    """An empty guide: all latents are enumerated."""


def enumerated(nesting=1):
    return lambda: TraceEnum_ELBO(max_plate_nesting=nesting)


# ---------------------------------------------------------------------------- parameters, nothing to draw


@program("closed form", loss=enumerated())
def gmm_with_an_empty_guide():
    @config_enumerate
    def model(y):
        weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[k], scale), obs=y)

    def reference():
        joint = value_of("weights").log() + normal(POINTS[:, None], value_of("locs"), value_of("scale"))
        return joint.logsumexp(-1)

    return Case(model, nothing, (POINTS,), reference)


@program("closed form", loss=TraceGraph_ELBO)
def gmm_with_drawn_assignments():
    points = POINTS / 2

    def model(y):
        locs = pyro.param("locs", torch.tensor([-0.5, 0.5]))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=y)

    def guide(y):
        slope = pyro.param("slope", torch.tensor(1.0))
        with pyro.plate("data", len(y)):
            baseline = {"use_decaying_avg_baseline": True}
            logits = torch.stack([-slope * y, slope * y], -1)
            pyro.sample("k", dist.Categorical(logits=logits), infer={"baseline": baseline})

    def reference():
        return normal(points[:, None], value_of("locs"), 1.0).logsumexp(-1) - math.log(2)

    return Case(model, guide, (points,), reference)


@program("closed form", loss=enumerated())
def gmm_with_some_labels():
    """Half of the labels are seen, by obs_mask."""
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 0, 1])
    seen = torch.tensor([True, False] * 4)

    @config_enumerate
    def model(y, labels, seen):
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(y)):
            prior = dist.Categorical(torch.tensor([0.3, 0.7]))
            k = pyro.sample("k", prior, obs=labels, obs_mask=seen)
            pyro.sample("obs", dist.Normal(locs[k], 1.0), obs=y)

    def reference():
        prior = torch.tensor([0.3, 0.7]).log()
        joint = prior + normal(POINTS[:, None], value_of("locs"), 1.0)
        return torch.where(seen, joint[torch.arange(8), labels], joint.logsumexp(-1))

    return Case(model, nothing, (POINTS, labels, seen), reference)


@program("closed form", loss=enumerated(2))
def bernoulli_mixture():
    """Binary questionnaires: the items are an inner plate."""
    answers = (draws(6, 4, seed=7) > 0).double()

    @config_enumerate
    def model(y):
        weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
        init = lambda: torch.linspace(0.2, 0.8, 8).reshape(4, 2)  # noqa: E731
        probs = pyro.param("probs", init, constraint=constraints.unit_interval)
        items = pyro.plate("items", 4, dim=-2)
        with pyro.plate("people", len(y), dim=-1):
            k = pyro.sample("k", dist.Categorical(weights))
            with items:
                which = torch.arange(4)[:, None]
                pyro.sample("obs", dist.Bernoulli(probs[which, k]), obs=y.T)

    def reference():
        p = value_of("probs")
        terms = answers[:, :, None] * p.log() + (1 - answers[:, :, None]) * torch.log1p(-p)
        return (value_of("weights").log() + terms.sum(1)).logsumexp(-1)

    return Case(model, nothing, (answers,), reference)


@program("closed form", loss=enumerated())
def mixture_of_regressions():
    x = torch.linspace(-1, 1, 8)

    @config_enumerate
    def model(x, y):
        slope = pyro.param("slope", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("obs", dist.Normal(slope[k] * x, 0.8), obs=y)

    def reference():
        return normal(POINTS[:, None], value_of("slope") * x[:, None], 0.8).logsumexp(-1) - math.log(2)

    return Case(model, nothing, (x, POINTS), reference)


@program("closed form", loss=enumerated())
def zero_inflated_counts_by_enumeration():
    counts = torch.tensor([0.0, 0, 3, 1, 0, 4, 0])

    def model(y):
        gate = pyro.param("gate", torch.tensor(0.3), constraint=constraints.unit_interval)
        rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            off = pyro.sample("off", dist.Bernoulli(gate), infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Poisson(torch.where(off == 1, 1e-10, rate)), obs=y)

    def reference():
        gate, rate = value_of("gate"), value_of("rate")
        poisson = lambda r: counts * r.log() - r - torch.lgamma(counts + 1)  # noqa: E731
        return torch.logaddexp(gate.log() + poisson(torch.tensor(1e-10)), torch.log1p(-gate) + poisson(rate))

    return Case(model, nothing, (counts,), reference)


@program("closed form", loss=enumerated(2))
def annotators_of_Dawid_and_Skene():
    """True classes are enumerated; each of three annotators has a confusion matrix."""
    votes = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0]])

    @config_enumerate
    def model(votes):
        prior = pyro.param("prior", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        start = torch.tensor([[0.7, 0.3], [0.2, 0.8]]).expand(3, 2, 2).clone()
        confusion = pyro.param("confusion", start, constraint=constraints.simplex)
        with pyro.plate("items", len(votes), dim=-2):
            truth = pyro.sample("truth", dist.Categorical(prior))
            with pyro.plate("annotators", 3, dim=-1):
                pyro.sample("votes", dist.Categorical(confusion[torch.arange(3), truth]), obs=votes)

    def reference():
        logs = value_of("confusion").log()
        terms = torch.stack([logs[a][:, votes[:, a]].T for a in range(3)]).sum(0)
        return (value_of("prior").log() + terms).logsumexp(-1)

    return Case(model, nothing, (votes,), reference)


@program("closed form", loss=enumerated())
def N_mixture_of_abundances():
    """Counts of a population whose size is enumerated up to a limit."""
    counts = torch.tensor([[2.0, 1, 3], [0, 0, 1], [4, 2, 3], [1, 1, 0]])
    sizes = torch.arange(16.0)

    def log_prior(rate):
        return (sizes * rate.log() - torch.lgamma(sizes + 1)).log_softmax(-1)

    @config_enumerate
    def model(y):
        rate = pyro.param("rate", torch.tensor(4.0), constraint=constraints.positive)
        p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
        with pyro.plate("sites", len(y)):
            n = pyro.sample("n", dist.Categorical(logits=log_prior(rate))).double()
            d = dist.Binomial(n.unsqueeze(-1), p, validate_args=False).expand([*n.shape[:-1], len(y), 3])
            pyro.sample("obs", d.to_event(1), obs=y)

    def reference():
        p, n, y = value_of("p"), sizes[:, None], counts[:, None]
        choose = torch.lgamma(n + 1) - torch.lgamma(y + 1) - torch.lgamma((n - y).clamp_min(0) + 1)
        terms = choose + y * p.log() + (n - y) * torch.log1p(-p)
        terms = torch.where(y <= n, terms, -math.inf).sum(-1)
        return (log_prior(value_of("rate")) + terms).logsumexp(-1)

    return Case(model, nothing, (counts,), reference)


# -------------------------------------------------------------------------- beside continuous latents


def collapsed(y, components, scale, log_prior):
    """ln p(y) of a mixture with means N(0, 4), by summing over all assignments; ``log_prior(z)`` [M]."""
    z = assignments(components, len(y))
    total = log_prior(z)
    for k in range(components):
        member = (z == k).double()
        cov = scale**2 * torch.eye(len(y)) + 4.0 * member[:, :, None] * member[:, None, :]
        masked = member[:, :, None] * member[:, None, :] * cov + torch.diag_embed(1 - member)
        apart = y * member
        square = (apart[:, None] @ torch.linalg.inv(masked) @ apart[..., None]).reshape(-1)
        total = total - 0.5 * (
            square + torch.linalg.slogdet(masked)[1] + member.sum(-1) * math.log(2 * math.pi)
        )
    return total.logsumexp(0)


def log_dirichlet(counts, alpha):
    """ln of the Dirichlet-multinomial of an ordered sample with these counts [..., K]."""
    total = alpha * counts.shape[-1]
    parts = torch.lgamma(counts + alpha) - math.lgamma(alpha)
    return parts.sum(-1) + math.lgamma(total) - torch.lgamma(counts.sum(-1) + total)


def bayesian_gmm(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Normal(locs[k], 0.7), obs=y)


def bayesian_gmm_evidence():
    def prior(z):
        return log_dirichlet(torch.stack([(z == k).sum(-1) for k in range(2)], -1).double(), 1.0)

    return collapsed(POINTS, 2, 0.7, prior)


@program("enumeration", loss=enumerated(), scope="joint", steps=300, slack=1.5)
def bayesian_gmm_AutoNormal():
    guide = autoguide.AutoNormal(poutine.block(bayesian_gmm, hide=["k"]))
    return Case(bayesian_gmm, guide, (POINTS,), bayesian_gmm_evidence)


@program("enumeration", loss=enumerated(), scope="joint", refused="point mass")
def bayesian_gmm_AutoDelta():
    guide = autoguide.AutoDelta(poutine.block(bayesian_gmm, expose=["weights", "locs"]))
    return Case(bayesian_gmm, guide, (POINTS,), bayesian_gmm_evidence)


@program("enumeration", loss=enumerated(), scope="joint", steps=300, slack=1.5)
def dirichlet_process_by_sticks():
    y = POINTS[1::2]

    def weights_of(beta):
        rest = torch.cumprod(1 - beta, -1)
        return nn.functional.pad(beta, (0, 1), value=1) * nn.functional.pad(rest, (1, 0), value=1)

    def model(y):
        with pyro.plate("beta_plate", 2):
            beta = pyro.sample("beta", dist.Beta(1, 1.5))
        with pyro.plate("mu_plate", 3):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights_of(beta)), infer={"enumerate": "parallel"})
            pyro.sample("obs", dist.Normal(mu[z], 0.7), obs=y)

    def guide(y):
        kappa = pyro.param("kappa", torch.ones(2), constraint=constraints.positive)
        tau = pyro.param("tau", torch.tensor([-1.0, 1.0, 0.0]))
        scale = pyro.param("scale", 0.5 * torch.ones(3), constraint=constraints.positive)
        with pyro.plate("beta_plate", 2):
            pyro.sample("beta", dist.Beta(torch.ones(2), kappa))
        with pyro.plate("mu_plate", 3):
            pyro.sample("mu", dist.Normal(tau, scale))

    def prior(z):
        total = 0.0
        for k in range(2):  # stick k sees as many members as have k, and as many survivors as have more
            here, beyond = (z == k).sum(-1).double(), (z > k).sum(-1).double()
            total = (
                total
                + torch.lgamma(1 + here)
                + torch.lgamma(1.5 + beyond)
                - torch.lgamma(2.5 + here + beyond)
            )
            total = total + math.lgamma(2.5) - math.lgamma(1.5)
        return total

    return Case(model, guide, (y,), lambda: collapsed(y, 3, 0.7, prior))


@program("integral", loss=enumerated(2), steps=300)
def lda_of_given_topics():
    """Documents over known topics: their proportions are drawn, the words' topics enumerated."""
    words = torch.tensor([[0, 1, 1, 2], [2, 2, 2, 1], [0, 0, 1, 0]]).T  # [words, documents]

    def model(words):
        topics = pyro.param(
            "topics",
            torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]]),
            constraint=constraints.simplex,
        )
        with pyro.plate("documents", words.shape[1]):
            proportions = pyro.sample("proportions", dist.Dirichlet(torch.ones(2)))
            with pyro.plate("words", words.shape[0]):
                z = pyro.sample("z", dist.Categorical(proportions), infer={"enumerate": "parallel"})
                pyro.sample("doc_words", dist.Categorical(topics[z]), obs=words)

    def guide(words):
        start = torch.ones(words.shape[1], 2)
        alpha = pyro.param("alpha", start, constraint=constraints.positive)
        with pyro.plate("documents", words.shape[1]):
            pyro.sample("proportions", dist.Dirichlet(alpha))

    def reference():
        topics = value_of("topics")

        def log_f(theta):
            seen = topics[:, words]  # [topics, words, documents]
            mixed = theta[:, None, None] * seen[0] + (1 - theta)[:, None, None] * seen[1]
            return mixed.log().sum(1)

        return integral(log_f, (0.0, 1.0))

    return Case(model, guide, (words,), reference, plate="documents", data_dim=1)


WORDS = torch.tensor([[0, 1, 1], [2, 2, 1]]).T  # [words, documents]


def lda(words):
    with pyro.plate("topics", 2):
        topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("documents", words.shape[1]):
        proportions = pyro.sample("proportions", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("words", words.shape[0]):
            z = pyro.sample("z", dist.Categorical(proportions), infer={"enumerate": "parallel"})
            pyro.sample("doc_words", dist.Categorical(topics[z]), obs=words)


def lda_guide(words):
    topics = pyro.param("q_topics", 1.5 * torch.ones(2, 3), constraint=constraints.positive)
    alpha = pyro.param("q_alpha", 1.5 * torch.ones(2, 2), constraint=constraints.positive)
    with pyro.plate("topics", 2):
        pyro.sample("topic_words", dist.Dirichlet(topics))
    with pyro.plate("documents", words.shape[1]):
        pyro.sample("proportions", dist.Dirichlet(alpha))


def lda_evidence():
    z = assignments(2, 6).reshape(-1, 3, 2)
    total = torch.zeros(len(z))
    for d in range(2):
        counts = torch.stack([(z[:, :, d] == k).sum(-1) for k in range(2)], -1)
        total = total + log_dirichlet(counts.double(), 1.0)
    for k in range(2):
        counts = torch.stack([((z == k) & (v == WORDS)).sum((1, 2)) for v in range(3)], -1)
        total = total + log_dirichlet(counts.double(), 1.0)
    return total.logsumexp(0)


@program("enumeration", loss=enumerated(2), scope="joint", steps=400, slack=2.0)
def lda_of_latent_topics():
    return Case(lda, lda_guide, (WORDS,), lda_evidence, plate="documents")


@program("enumeration", loss=enumerated(2), steps=300)
def mixed_membership_of_answers():
    """Each answer of a person is of one of two profiles, with proportions of the person's own."""
    answers = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1]])

    def model(y):
        probs = pyro.param("probs", torch.tensor([0.2, 0.8]), constraint=constraints.unit_interval)
        with pyro.plate("people", len(y), dim=-2):
            share = pyro.sample("share", dist.Beta(2.0, 2.0))
            with pyro.plate("questions", y.shape[1], dim=-1):
                z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
                pyro.sample("obs", dist.Bernoulli(probs[z.long()]), obs=y)

    def guide(y):
        a = pyro.param("a", 2 * torch.ones(len(y), 1), constraint=constraints.positive)
        b = pyro.param("b", 2 * torch.ones(len(y), 1), constraint=constraints.positive)
        with pyro.plate("people", len(y), dim=-2):
            pyro.sample("share", dist.Beta(a, b))

    def reference():
        p = value_of("probs")
        z = assignments(2, 3)
        ones = z.sum(-1).double()
        beta = torch.lgamma(2 + ones) + torch.lgamma(5 - ones) - math.lgamma(7) + math.log(6)
        likelihood = (answers[:, None] * p[z].log() + (1 - answers[:, None]) * torch.log1p(-p[z])).sum(-1)
        return (beta + likelihood).logsumexp(-1)

    return Case(model, guide, (answers,), reference)


@program("integral", loss=enumerated(), steps=300)
def zero_inflated_rates_beside_enumeration():
    """A rate for each site (drawn) and whether it is empty (enumerated)."""
    counts = torch.tensor([[0.0, 0, 0], [3, 2, 4], [0, 1, 0], [0, 0, 0]])

    def model(y):
        with pyro.plate("sites", len(y)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            empty = pyro.sample("empty", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
            mean = torch.where(empty == 1, 1e-10, rate)
            pyro.sample("obs", dist.Poisson(mean.unsqueeze(-1).expand(*mean.shape, 3)).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("sites", len(y)):
            a = pyro.param("a", 2 + y.sum(-1), constraint=constraints.positive)
            b = pyro.param("b", torch.full((len(y),), 4.0), constraint=constraints.positive)
            pyro.sample("rate", dist.Gamma(a, b))

    def reference():
        def log_f(rate):
            def likelihood(mean):
                return (counts * mean.log() - mean - torch.lgamma(counts + 1)).sum(-1)

            full = math.log(0.6) + likelihood(rate[:, None, None])
            none = math.log(0.4) + likelihood(torch.tensor(1e-10)).expand(len(rate), -1)
            return torch.logaddexp(full, none) + (rate.log() - rate)[:, None]

        return integral(log_f, (0.0, 40.0), nodes=300)

    return Case(model, guide, (counts,), reference)


@program("closed form", loss=enumerated(), scope="joint", steps=300, slack=1.0)
def change_point_of_coal_accidents():
    """The year of the change is enumerated, the rates before and after are drawn."""
    counts = torch.tensor([4.0, 5, 3, 6, 4, 1, 0, 2, 1, 1])

    def model(y):
        early = pyro.sample("early", dist.Gamma(2.0, 0.5))
        late = pyro.sample("late", dist.Gamma(2.0, 0.5))
        tau = pyro.sample("tau", dist.Categorical(torch.ones(10)), infer={"enumerate": "parallel"})
        with pyro.plate("years", len(y)):
            rate = torch.where(torch.arange(10) < tau, early, late)
            pyro.sample("obs", dist.Poisson(rate), obs=y)

    guide = autoguide.AutoNormal(poutine.block(model, hide=["tau"]))

    def reference():
        total = []
        for tau in range(10):
            value = -math.log(10) - torch.lgamma(counts + 1).sum()
            for part in (counts[:tau], counts[tau:]):
                a, b = 2 + part.sum(), torch.tensor(0.5 + len(part))
                value = value + 2 * math.log(0.5) + torch.lgamma(a) - a * b.log()
            total.append(value)
        return torch.stack(total).logsumexp(0)

    return Case(model, guide, (counts,), reference)

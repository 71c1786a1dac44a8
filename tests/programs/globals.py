"""Latents of all data beside latents of each: rows given the former, and the joint bound that follows."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide

from tests.programs.base import Case, assignments, draws, gaussian, over_guide, program
from tests.programs.latents import SPOTS, cell2location, cell2location_evidence, spots_given
from tests.programs.mixtures import (
    POINTS,
    WORDS,
    bayesian_gmm,
    bayesian_gmm_evidence,
    enumerated,
    lda,
    lda_evidence,
    lda_guide,
    log_dirichlet,
    normal,
)
from tests.programs.others import ANSWERS, people_given, two_parameters, two_parameters_evidence

GIVEN = {"given": "globals", "draws": 48}


def case(model, guide, batch, log_p, joint, plate=None, data_dim=0):
    """A case whose reference is the mean over the guide's draws of ``log_p(latents)`` [B]."""
    return Case(model, guide, batch, lambda: over_guide(guide, batch, log_p), plate, joint, data_dim)


@program("closed form", steps=400, **GIVEN)
def random_intercepts_given_their_mean():
    y = 1.0 + draws(5, 1, seed=50) + 0.5 * draws(5, 4, seed=51)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("patients", y.shape[0], dim=-1):
            b = pyro.sample("b", dist.Normal(mu, 1.0))
            with pyro.plate("visits", y.shape[1], dim=-2):
                pyro.sample("obs", dist.Normal(b, 0.5), obs=y.T)

    def log_p(latents):
        cov = 1.0 + 0.25 * torch.eye(4)
        return torch.stack([gaussian(row, latents["mu"], cov) for row in y])

    def joint():
        same = torch.block_diag(*[torch.ones(4, 4)] * 5)
        return gaussian(y.reshape(-1), 0.0, 4.0 + same + 0.25 * torch.eye(20))

    return case(model, autoguide.AutoNormal(model), (y,), log_p, joint)


@program("closed form", steps=500, slack=1.0, **GIVEN)
def factor_analysis_given_loadings():
    y = draws(4, 3, seed=52)

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.unsqueeze(-1) * w, 0.8).to_event(1), obs=y)

    def log_p(latents):
        cov = torch.outer(latents["w"], latents["w"]) + 0.64 * torch.eye(3)
        return torch.stack([gaussian(row, 0.0, cov) for row in y])

    return case(model, autoguide.AutoNormal(model), (y,), log_p, None)


@program("closed form", steps=400, loss=enumerated(), **GIVEN)
def bayesian_gmm_given_components():
    """Assignments are enumerated: the rows given weights and locations are exact for each draw."""

    def log_p(latents):
        parts = normal(POINTS[:, None], latents["locs"], 0.7)
        return (latents["weights"].log() + parts).logsumexp(-1)

    guide = autoguide.AutoNormal(poutine.block(bayesian_gmm, hide=["k"]))
    return case(bayesian_gmm, guide, (POINTS,), log_p, bayesian_gmm_evidence)


@program("closed form", steps=0, **GIVEN)
def regression_given_everything():
    """No local latents: a datum's terms given the coefficients are its likelihood."""
    x = torch.linspace(-1, 1, 6)
    y = 0.5 * x + draws(6, seed=53)

    def model(x, y):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(b * x, 1.0), obs=y)

    def joint():
        return gaussian(y, 0.0, torch.outer(x, x) + torch.eye(6))

    guide = autoguide.AutoNormal(model)
    return case(model, guide, (x, y), lambda latents: normal(y, latents["b"] * x, 1.0), joint)


@program("Monte Carlo", steps=500, slack=1.0, **GIVEN)
def cell2location_given_detection():
    guide = autoguide.AutoNormal(cell2location)
    log_p = lambda latents: spots_given(latents["m_g"])  # noqa: E731
    return case(cell2location, guide, (SPOTS,), log_p, cell2location_evidence, "obs_plate")


@program("Monte Carlo", steps=500, slack=1.0, **GIVEN)
def item_response_given_items():
    guide = autoguide.AutoNormal(two_parameters)
    log_p = lambda latents: people_given(latents["slope"], latents["difficulty"])  # noqa: E731
    return case(two_parameters, guide, (ANSWERS,), log_p, two_parameters_evidence, "people")


@program("closed form", steps=400, slack=1.0, loss=enumerated(2), **GIVEN)
def lda_given_topics():
    """A Pyro batch of [words, documents]: documents are its second dimension."""

    def log_p(latents):
        z = assignments(2, 3)
        counts = torch.stack([(z == k).sum(-1) for k in range(2)], -1).double()
        words = latents["topic_words"].log()[z[:, :, None], WORDS]
        return (log_dirichlet(counts, 1.0)[:, None] + words.sum(1)).logsumexp(0)

    return case(lda, lda_guide, (WORDS,), log_p, lda_evidence, "documents", data_dim=1)

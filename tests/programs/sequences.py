"""Time series: hidden Markov models as Pyro's users write them, state-space models by for loops."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide, config_enumerate
from torch import nn

from tests.programs.base import (
    Case,
    assignments,
    average,
    draws,
    forward,
    gaussian,
    integral,
    program,
    value_of,
)
from tests.programs.mixtures import enumerated, normal, nothing

LENGTHS = torch.tensor([4, 2, 3])
NOTES = (draws(3, 4, 3, seed=8) > 0).double()  # sequences, steps, tones


def probabilities():
    """Parameters of a chain of two states and three tones."""
    start = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    x = pyro.param("probs_x", start, constraint=constraints.simplex)
    tones = torch.tensor([[0.2, 0.4, 0.6], [0.7, 0.5, 0.3]])
    y = pyro.param("probs_y", tones, constraint=constraints.unit_interval)
    return x, y


def tones(probs_y, sequences):
    """ln p(y_t | x_t), [..., T, S], of notes [T, tones]; probs_y [..., S, tones]."""
    y = sequences[..., None, :]
    p = probs_y[..., None, :, :]
    return (y * p.log() + (1 - y) * torch.log1p(-p)).sum(-1)


def notes_evidence(probs_x, probs_y):
    """ln p of each sequence, up to its length, from state 0."""
    first = probs_x.log()[..., 0, :]
    rows = [
        forward(first, probs_x.log(), tones(probs_y, y[:n]))
        for y, n in zip(NOTES, LENGTHS.tolist(), strict=True)
    ]
    return torch.stack(rows, -1)


def notes_reference():
    return notes_evidence(value_of("probs_x"), value_of("probs_y"))


@program("closed form", loss=enumerated(2))
def hmm_of_notes():
    def model(sequences, lengths):
        probs_x, probs_y = probabilities()
        num_sequences, max_length, data_dim = sequences.shape
        tones_plate = pyro.plate("tones", data_dim, dim=-1)
        with pyro.plate("sequences", num_sequences, dim=-2) as batch:
            lengths = lengths[batch]
            x = 0
            for t in pyro.markov(range(max_length)):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                    with tones_plate as tone:
                        pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x, tone]), obs=sequences[batch, t])

    return Case(model, nothing, (NOTES, LENGTHS), notes_reference, plate="sequences")


@program("closed form", loss=enumerated(1), scope="joint")
def hmm_sequence_by_sequence():
    """A Python loop over sequences: there is no plate over the data."""

    def model(sequences, lengths):
        probs_x, probs_y = probabilities()
        tones_plate = pyro.plate("tones", sequences.shape[-1], dim=-1)
        for i in pyro.plate("sequences", len(sequences)):
            x = 0
            for t in pyro.markov(range(int(lengths[i]))):
                x = pyro.sample(f"x_{i}_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                with tones_plate as tone:
                    pyro.sample(f"y_{i}_{t}", dist.Bernoulli(probs_y[x, tone]), obs=sequences[i, t])

    return Case(model, nothing, (NOTES, LENGTHS), lambda: notes_reference().sum())


@program("Monte Carlo", loss=enumerated(2), scope="joint", steps=300, slack=2.0)
def hmm_of_notes_with_priors():
    def model(sequences, lengths):
        with poutine.mask(mask=True):
            probs_x = pyro.sample("probs_x", dist.Dirichlet(0.9 * torch.eye(2) + 0.6).to_event(1))
            probs_y = pyro.sample("probs_y", dist.Beta(1.5, 2.0).expand([2, 3]).to_event(2))
        num_sequences, max_length, data_dim = sequences.shape
        tones_plate = pyro.plate("tones", data_dim, dim=-1)
        with pyro.plate("sequences", num_sequences, dim=-2) as batch:
            lengths = lengths[batch]
            x = 0
            for t in pyro.markov(range(max_length)):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]), infer={"enumerate": "parallel"})
                    with tones_plate as tone:
                        pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x, tone]), obs=sequences[batch, t])

    guide = autoguide.AutoNormal(poutine.block(model, expose=["probs_x", "probs_y"]))

    def reference():
        count = 50000
        torch.manual_seed(0)
        probs_x = torch.distributions.Dirichlet(0.9 * torch.eye(2) + 0.6).sample((count,))
        probs_y = torch.distributions.Beta(torch.tensor(1.5), 2.0).sample((count, 2, 3))
        return average(notes_evidence(probs_x, probs_y).sum(-1))

    return Case(model, guide, (NOTES, LENGTHS), reference)


@program("enumeration", loss=enumerated(1))
def hmm_of_second_order():
    y = draws(3, 5, seed=9)

    @config_enumerate
    def model(y):
        start = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.5, 0.5], [0.2, 0.8]]])
        probs = pyro.param("probs", start, constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([-0.5, 0.5]))
        with pyro.plate("sequences", len(y)):
            before, x = 0, 0
            for t in pyro.markov(range(y.shape[1]), history=2):
                before, x = x, pyro.sample(f"x_{t}", dist.Categorical(probs[before, x]))
                pyro.sample(f"y_{t}", dist.Normal(locs[x], 1.0), obs=y[:, t])

    def reference():
        probs, locs = value_of("probs").log(), value_of("locs")
        x = assignments(2, 5)
        total = normal(y[:, None], locs[x], 1.0).sum(-1)
        past = torch.nn.functional.pad(x, (2, 0))
        for t in range(5):
            total = total + probs[past[:, t], past[:, t + 1], past[:, t + 2]]
        return total.logsumexp(-1)

    return Case(model, nothing, (y,), reference)


@program("closed form", loss=enumerated(1))
def factorial_hmm():
    y = draws(3, 4, seed=10)

    @config_enumerate
    def model(y):
        start = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
        probs_w = pyro.param("probs_w", start, constraint=constraints.simplex)
        probs_x = pyro.param("probs_x", start.flip(0), constraint=constraints.simplex)
        locs = pyro.param("locs", torch.tensor([[-1.0, 0.0], [0.3, 1.0]]))
        with pyro.plate("sequences", len(y)):
            w, x = 0, 0
            for t in pyro.markov(range(y.shape[1])):
                w = pyro.sample(f"w_{t}", dist.Categorical(probs_w[w]))
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]))
                pyro.sample(f"y_{t}", dist.Normal(locs[w, x], 1.0), obs=y[:, t])

    def reference():
        transition = torch.kron(value_of("probs_w"), value_of("probs_x")).log()
        emission = normal(y[..., None], value_of("locs").reshape(-1), 1.0)
        return forward(transition[0], transition, emission)

    return Case(model, nothing, (y,), reference)


@program("closed form", loss=enumerated(1))
def hmm_whose_notes_feed_back():
    """Model 2 of Pyro's HMM example: a note depends on the last note, too."""
    y = (draws(3, 5, seed=11) > 0).double()

    @config_enumerate
    def model(y):
        start = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
        probs_x = pyro.param("probs_x", start, constraint=constraints.simplex)
        probs_y = pyro.param(
            "probs_y", torch.tensor([[0.2, 0.5], [0.6, 0.9]]), constraint=constraints.unit_interval
        )
        with pyro.plate("sequences", len(y)):
            x, last = 0, torch.zeros(len(y)).long()
            for t in pyro.markov(range(y.shape[1])):
                x = pyro.sample(f"x_{t}", dist.Categorical(probs_x[x]))
                pyro.sample(f"y_{t}", dist.Bernoulli(probs_y[x, last]), obs=y[:, t])
                last = y[:, t].long()

    def reference():
        last = torch.nn.functional.pad(y.long(), (1, 0))[:, :-1]
        p = value_of("probs_y")[:, last].movedim(0, -1)
        emission = y[..., None] * p.log() + (1 - y[..., None]) * torch.log1p(-p)
        log = value_of("probs_x").log()
        return forward(log[0], log, emission)

    return Case(model, nothing, (y,), reference)


@program("closed form")
def DiscreteHMM_as_a_distribution():
    y = draws(3, 5, seed=12)

    def model(y):
        logits = pyro.param("logits", torch.tensor([[1.0, 0.0], [-0.5, 0.5]]))
        locs = pyro.param("locs", torch.tensor([-1.0, 1.0]))
        initial = torch.zeros(2)
        with pyro.plate("sequences", len(y)):
            hmm = dist.DiscreteHMM(initial, logits, dist.Normal(locs, 1.0), duration=y.shape[1])
            pyro.sample("y", hmm, obs=y)

    def reference():  # the transition comes before the first emission
        transition = value_of("logits").log_softmax(-1)
        initial = (torch.full((2,), -math.log(2)).double()[:, None] + transition).logsumexp(0)
        return forward(initial, transition, normal(y[..., None], value_of("locs"), 1.0))

    return Case(model, nothing, (y,), reference)


# ------------------------------------------------------------------------------------- capture, recapture


CAPTURES = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).double()


def cjs_evidence(phi, p):
    """ln p of each capture history after its first capture, [..., individuals]; phi and p [...]."""
    phi, p = phi[..., None], p[..., None]
    never = torch.full_like(phi, -math.inf)
    rows = [torch.stack([0 * phi, never], -1), torch.stack([torch.log1p(-phi), phi.log()], -1)]
    transition = torch.stack(rows, -2)
    p = p.unsqueeze(-1)
    seen = CAPTURES[:, 1:]
    alive = seen * p.log() + (1 - seen) * torch.log1p(-p)
    dead = torch.where(seen == 1, -math.inf, torch.zeros_like(alive))
    emission = torch.stack([dead, alive], -1)
    return forward(transition[..., 1, :], transition, emission)


def cjs_history(phi, p, y):
    """Alive or dead, step by step, for animals that are all captured in the first year."""
    z = torch.ones(len(y))
    for t in pyro.markov(range(1, y.shape[1])):
        z = pyro.sample(
            f"z_{t}", dist.Bernoulli(phi * z, validate_args=False), infer={"enumerate": "parallel"}
        )
        pyro.sample(f"y_{t}", dist.Bernoulli(p * z, validate_args=False), obs=y[:, t])


@program("closed form", loss=enumerated(1))
def capture_recapture_by_parameters():
    def model(y):
        phi = pyro.param("phi", torch.tensor(0.7), constraint=constraints.unit_interval)
        p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
        with pyro.plate("animals", len(y), dim=-1):
            cjs_history(phi, p, y)

    return Case(model, nothing, (CAPTURES,), lambda: cjs_evidence(value_of("phi"), value_of("p")))


@program("integral", loss=enumerated(1), scope="joint", steps=300)
def capture_recapture_with_priors():
    def model(y):
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        with pyro.plate("animals", len(y), dim=-1):
            cjs_history(phi, p, y)

    guide = autoguide.AutoDiagonalNormal(poutine.block(model, expose=["phi", "p"]))

    def reference():
        return integral(lambda phi, p: cjs_evidence(phi, p).sum(-1), (0.0, 1.0), (0.0, 1.0))

    return Case(model, guide, (CAPTURES,), reference)


@program("closed form", loss=enumerated(2))
def occupancy_of_sites():
    """A species is there or not; visits of a site find it with some probability if it is."""
    seen = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]])

    @config_enumerate
    def model(y):
        psi = pyro.param("psi", torch.tensor(0.6), constraint=constraints.unit_interval)
        p = pyro.param("p", torch.tensor(0.4), constraint=constraints.unit_interval)
        with pyro.plate("sites", len(y), dim=-2):
            z = pyro.sample("z", dist.Bernoulli(psi))
            with pyro.plate("visits", y.shape[1], dim=-1):
                pyro.sample("y", dist.Bernoulli(z * p), obs=y)

    def reference():
        psi, p = value_of("psi"), value_of("p")
        there = psi.log() + (seen * p.log() + (1 - seen) * torch.log1p(-p)).sum(-1)
        never = torch.where(seen.sum(-1) == 0, torch.log1p(-psi), -math.inf)
        return torch.logaddexp(there, never)

    return Case(model, nothing, (seen,), reference)


# --------------------------------------------------------------------------------------- continuous states


WALK = draws(3, 5, seed=13).cumsum(-1)


@program("closed form", steps=300)
def local_level_by_a_loop():
    def model(y):
        drift = pyro.param("drift", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("series", len(y)):
            z = torch.zeros(len(y))
            for t in range(y.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z, drift))
                pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[:, t])

    def guide(y):
        gain = pyro.param("gain", torch.tensor(0.5), constraint=constraints.unit_interval)
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("series", len(y)):
            z = torch.zeros(len(y))
            for t in range(y.shape[1]):
                z = pyro.sample(f"z_{t}", dist.Normal(z + gain * (y[:, t] - z), scale))

    def reference():
        time = torch.arange(1.0, 6)
        cov = value_of("drift") ** 2 * torch.minimum(time[:, None], time) + 0.25 * torch.eye(5)
        return torch.stack([gaussian(row, 0.0, cov) for row in WALK])

    return Case(model, guide, (WALK,), reference)


@program("closed form", scope="joint", steps=300)
def local_level_AutoMultivariateNormal():
    """One series, its steps a plate of increments."""
    y = WALK[0]

    def model(y):
        with pyro.plate("steps", len(y)):
            step = pyro.sample("step", dist.Normal(0.0, 0.7))
        level = step.cumsum(-1)
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(level, 0.5), obs=y)

    def reference():
        time = torch.arange(1.0, 6)
        return gaussian(y, 0.0, 0.49 * torch.minimum(time[:, None], time) + 0.25 * torch.eye(5))

    return Case(model, autoguide.AutoMultivariateNormal(model), (y,), reference)


def on_a_grid(y, lengths, link, emit, low=-6.0, high=6.0, nodes=200):
    """ln p(y) of scalar state-space models by Gauss–Legendre at each step: ``link(z)`` gives loc and scale of
    the next state, ``emit(z, y_t)`` ln p(y_t | z); from z = 0."""

    def rule(count):
        import numpy as np

        points, weights = np.polynomial.legendre.leggauss(count)
        z = torch.as_tensor((low + high) / 2 + (high - low) / 2 * points)
        log_w = torch.as_tensor(np.log(weights * (high - low) / 2))
        loc, scale = link(z)
        step = normal(z[None, :], loc[:, None], scale.expand(count)[:, None])
        loc, scale = link(torch.zeros(1))
        found = []
        for row, length in zip(y, lengths, strict=True):
            state = normal(z, loc, scale) + emit(z, row[0])
            for t in range(1, int(length)):
                state = ((state + log_w)[:, None] + step).logsumexp(0) + emit(z, row[t])
            found.append((state + log_w).logsumexp(0))
        return torch.stack(found)

    fine = rule(nodes)
    return fine, (fine - rule(nodes * 2 // 3)).abs()


@program("integral", steps=400)
def stochastic_volatility():
    y = 0.3 * draws(2, 4, seed=14)

    def model(y):
        phi = pyro.param("phi", torch.tensor(0.8), constraint=constraints.unit_interval)
        with pyro.plate("stocks", len(y)):
            h = torch.zeros(len(y))
            for t in pyro.markov(range(y.shape[1])):
                h = pyro.sample(f"h_{t}", dist.Normal(phi * h, 0.5))
                pyro.sample(f"r_{t}", dist.Normal(0.0, (h / 2).exp()), obs=y[:, t])

    guide = autoguide.AutoNormal(model)

    def reference():
        link = lambda h: (value_of("phi") * h, torch.tensor(0.5))  # noqa: E731
        return on_a_grid(y, [4, 4], link, lambda h, r: normal(r, 0.0, (h / 2).exp()))

    return Case(model, guide, (y,), reference)


@program("integral", steps=300)
def deep_markov_model_with_masks():
    """A neural transition, padded sequences by poutine.mask, a guide that reads the future by an RNN."""
    y = draws(3, 4, seed=15)
    transition = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    emitter = nn.Linear(1, 1)
    rnn = nn.RNN(1, 4, batch_first=True)
    head = nn.Linear(5, 2)

    def model(y, lengths):
        pyro.module("dmm", nn.ModuleList([transition, emitter]))
        with pyro.plate("sequences", len(y)):
            z = torch.zeros(len(y), 1)
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Normal(transition(z), 0.7).to_event(1))
                    pyro.sample(f"y_{t}", dist.Normal(emitter(z), 0.5).to_event(1), obs=y[:, t, None])

    def guide(y, lengths):
        pyro.module("inference", nn.ModuleList([rnn, head]))
        hidden = rnn(y.flip(1)[..., None])[0].flip(1)
        with pyro.plate("sequences", len(y)):
            z = torch.zeros(len(y), 1)
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=t < lengths):
                    h = hidden[:, t].expand(*z.shape[:-1], 4)
                    loc, log_scale = head(torch.cat([h, z], -1)).chunk(2, -1)
                    z = pyro.sample(f"z_{t}", dist.Normal(loc, (log_scale - 0.5).exp()).to_event(1))

    @torch.no_grad()
    def reference():
        link = lambda z: (transition(z[:, None])[:, 0], torch.tensor(0.7))  # noqa: E731
        emit = lambda z, value: normal(value, emitter(z[:, None])[:, 0], 0.5)  # noqa: E731
        return on_a_grid(y, LENGTHS, link, emit)

    return Case(model, guide, (y, LENGTHS), reference)


@program("enumeration", loss=enumerated(1), steps=400, slack=1.0)
def switching_linear_dynamics():
    """Regimes are enumerated along a Markov chain, positions are drawn."""
    y = draws(2, 3, seed=16)

    def model(y):
        stay = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
        scales = torch.tensor([0.3, 1.5])
        with pyro.plate("series", len(y)):
            s, z = 0, torch.zeros(len(y))
            for t in pyro.markov(range(y.shape[1])):
                s = pyro.sample(f"s_{t}", dist.Categorical(stay[s]), infer={"enumerate": "parallel"})
                z = pyro.sample(f"z_{t}", dist.Normal(z, scales[s]))
                pyro.sample(f"y_{t}", dist.Normal(z, 0.5), obs=y[:, t])

    def guide(y):
        gain = pyro.param("gain", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("series", len(y)):
            z = torch.zeros(len(y))
            for t in pyro.markov(range(y.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(z + gain * (y[:, t] - z), scale))

    def reference():
        stay = torch.tensor([[0.8, 0.2], [0.2, 0.8]])
        scales = torch.tensor([0.3, 1.5])
        rows = []
        for s in assignments(2, 3):
            weight = stay[0, s[0]].log() + stay[s[0], s[1]].log() + stay[s[1], s[2]].log()
            lower = torch.ones(3, 3).tril()
            cov = lower @ torch.diag(scales[s] ** 2) @ lower.T + 0.25 * torch.eye(3)
            rows.append(torch.stack([weight + gaussian(row, 0.0, cov) for row in y]))
        return torch.stack(rows).logsumexp(0)

    return Case(model, guide, (y,), reference)


@program("integral", loss=enumerated(2), steps=300)
def mixed_hmm_of_seals():
    """A random effect of each animal (drawn) shifts the chain of its states (enumerated)."""
    y = draws(3, 4, seed=17)

    def model(y):
        locs = pyro.param("locs", torch.tensor([-0.7, 0.7]))
        with pyro.plate("animals", len(y)):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            x = torch.zeros(len(y)).long()
            for t in pyro.markov(range(y.shape[1])):
                stay = torch.sigmoid(1.0 + effect)
                probs = torch.where(x == 1, stay, 1 - stay)
                x = pyro.sample(f"x_{t}", dist.Bernoulli(probs), infer={"enumerate": "parallel"})
                pyro.sample(f"y_{t}", dist.Normal(locs[x.long()], 1.0), obs=y[:, t])

    def guide(y):
        loc = pyro.param("loc", torch.zeros(len(y)))
        scale = pyro.param("scale", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("animals", len(y)):
            pyro.sample("effect", dist.Normal(loc, scale))

    def reference():
        def log_f(effect):
            stay = torch.sigmoid(1.0 + effect)
            transition = torch.stack([stay, 1 - stay, 1 - stay, stay], -1).reshape(-1, 1, 2, 2).log()
            emission = normal(y[..., None], value_of("locs"), 1.0)
            return forward(transition[..., 0, :], transition, emission) + normal(effect, 0.0, 1.0)[:, None]

        return integral(log_f, (-8.0, 8.0))

    return Case(model, guide, (y,), reference)


@program("integral", scope="joint", steps=300)
def GaussianHMM_with_a_latent_drift():
    y = WALK[0]

    def model(y):
        drift = pyro.sample("drift", dist.LogNormal(0.0, 1.0))
        one, zero = torch.eye(1), torch.zeros(1)
        first = dist.MultivariateNormal(zero, 0.01 * one)
        step = dist.MultivariateNormal(zero, drift[..., None, None] ** 2 * one)
        seen = dist.MultivariateNormal(zero, 0.25 * one)
        hmm = dist.GaussianHMM(first, one, step, one, seen, duration=len(y))
        pyro.sample("y", hmm, obs=y[:, None])

    def reference():
        time = torch.arange(1.0, 6)

        def log_f(u):
            cov = (
                (2 * u).exp()[:, None, None] * torch.minimum(time[:, None], time) + 0.01 + 0.25 * torch.eye(5)
            )
            return torch.stack([gaussian(y, 0.0, c) for c in cov]) + normal(u, 0.0, 1.0)

        return integral(log_f, (-6.0, 6.0))

    return Case(model, autoguide.AutoNormal(model), (y,), reference)

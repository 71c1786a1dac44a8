"""What does a particle cost whose finite latents are summed out, beside TraceEnum_ELBO's own loss?

Processor time of ln Σ_k p(y, z, k) - ln q(z | y) of K particles from an Evaluator that is there already
(making one also looks at the pair and checks the sum), and of ``TraceEnum_ELBO.loss`` of K particles
without gradients and validation: medians of ``--rounds`` calls, interleaved. Where a program takes all
particles at once, both do; else both take one at a time.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.summed_latents [--rounds 7]
"""

import argparse
import json
import statistics
import time

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex

from pyroelbo import Pair
from pyroelbo.evaluation.evaluator import Evaluator


def hmm(states, tones, vectorized):
    """A chain for each sequence with shared matrices, padded, as Pyro's example has it."""

    def model(y, lengths):
        matrix = pyro.sample("matrix", dist.Dirichlet(0.9 * torch.eye(states) + 0.1).to_event(1))
        rates = pyro.sample("rates", dist.Beta(0.3, 0.9).expand([states, tones]).to_event(2))
        inner = pyro.plate("tones", tones, dim=-1)
        with pyro.plate("sequences", len(y), dim=-2):
            x = torch.tensor(0)
            for t in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                    row = Vindex(matrix)[..., x, :] if vectorized else matrix[x]
                    x = pyro.sample(f"x_{t}", dist.Categorical(row), infer={"enumerate": "parallel"})
                    with inner as tone:
                        p = Vindex(rates)[..., x, tone] if vectorized else rates[x.squeeze(-1)]
                        pyro.sample(f"y_{t}", dist.Bernoulli(p), obs=y[:, t])

    def guide(y, lengths):
        pyro.sample("matrix", dist.Dirichlet(torch.ones(states, states)).to_event(1))
        pyro.sample("rates", dist.Beta(torch.ones(states, tones), 1.0).to_event(2))

    return model, guide, (torch.bernoulli(torch.full((10, 20, tones), 0.3)), torch.randint(10, 21, (10,)))


def gmm():
    @config_enumerate
    def model(y):
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(8)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(8), 10.0).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(Vindex(locs)[..., k], 1.0), obs=y)

    def guide(y):
        pyro.sample("weights", dist.Dirichlet(torch.ones(8)))
        pyro.sample("locs", dist.Normal(torch.zeros(8), 10.0).to_event(1))

    return model, guide, (torch.randn(1000),)


def lda():
    @config_enumerate
    def model(words):
        with pyro.plate("topics", 8):
            topics = pyro.sample("topic_words", dist.Dirichlet(torch.ones(256) / 4))
        with pyro.plate("documents", words.shape[1]):
            share = pyro.sample("share", dist.Dirichlet(torch.ones(8)))
            with pyro.plate("words", words.shape[0]):
                topic = pyro.sample("topic", dist.Categorical(share))
                pyro.sample("obs", dist.Categorical(topics[topic]), obs=words)

    def guide(words):
        with pyro.plate("topics", 8):
            pyro.sample("topic_words", dist.Dirichlet(torch.ones(256)))
        with pyro.plate("documents", words.shape[1]):
            pyro.sample("share", dist.Dirichlet(torch.ones(8)))

    return model, guide, (torch.randint(256, (64, 100)),)


def survival():
    """Survival and recapture of 171 animals over six occasions: Bernoulli chains with structural zeros."""

    def model(y):
        stay, seen = (pyro.sample(name, dist.Uniform(0.0, 1.0)) for name in ("stay", "seen"))
        with pyro.plate("animals", len(y)):
            alive = torch.ones(len(y))
            for t in pyro.markov(range(y.shape[1])):
                rate = stay * alive if t else torch.ones(len(y))
                alive = pyro.sample(f"z_{t}", dist.Bernoulli(rate), infer={"enumerate": "parallel"})
                if t:
                    pyro.sample(f"y_{t}", dist.Bernoulli(seen * alive), obs=y[:, t])

    def guide(y):
        for name in ("stay", "seen"):
            pyro.sample(name, dist.Beta(2.0, 2.0))

    return model, guide, (torch.bernoulli(torch.full((171, 6), 0.5)),)


def local():
    @config_enumerate
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            k = pyro.sample("k", dist.Categorical(torch.ones(10)))
            pyro.sample("y", dist.Normal(z + torch.arange(10.0)[k], 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 1.0))

    return model, guide, (torch.randn(200),)


ROWS = (  # name, program, particles, depth of plates, scope
    ("hmm, 16 states, 51 tones, `matrix[x]`", lambda: hmm(16, 51, False), 1, 2, "joint"),
    ("the same with Vindex", lambda: hmm(16, 51, True), 8, 2, "joint"),
    ("hmm, 64 states, 4 tones, Vindex", lambda: hmm(64, 4, True), 2, 2, "joint"),
    ("gmm, 1000 data", gmm, 1, 1, "joint"),
    ("gmm, 1000 data", gmm, 32, 1, "joint"),
    ("lda, 100 documents of 64 words", lda, 1, 2, "joint"),
    ("survival of 171 animals", survival, 1, 1, "joint"),
    ("survival of 171 animals", survival, 32, 1, "joint"),
    ("a latent for each of 200 data", local, 1, 1, "datum"),
    ("a latent for each of 200 data", local, 32, 1, "datum"),
)


@torch.no_grad()
def measure(build, particles, nesting, scope, rounds):
    """Seconds of processor time a particle: TraceEnum_ELBO's loss, and ours."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, batch = build()
    loss = TraceEnum_ELBO(
        max_plate_nesting=nesting, num_particles=particles, vectorize_particles=particles > 1
    )
    evaluator = Evaluator(Pair.of(model, guide), batch if len(batch) > 1 else batch[0], scope=scope)
    calls = (lambda: loss.loss(model, guide, *batch), lambda: evaluator.sample(particles, latents=False))
    spent = ([], [])
    for i in range(rounds + 1):
        for call, seconds in zip(calls, spent, strict=True):
            start = time.process_time()
            call()
            if i:
                seconds.append((time.process_time() - start) / particles)
    return [statistics.median(seconds) for seconds in spent]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    print("| program | particles | `TraceEnum_ELBO.loss`, ms | ours, ms | ratio |\n|---|---|---|---|---|")
    with pyro.validation_enabled(False):
        for name, build, particles, nesting, scope in ROWS:
            theirs, ours = measure(build, particles, nesting, scope, options.rounds)
            found.append({"program": name, "particles": particles, "theirs": theirs, "ours": ours})
            print(
                f"| {name} | {particles} | {1e3 * theirs:.3f} | {1e3 * ours:.3f} | {ours / theirs:.2f} |",
                flush=True,
            )
    print(json.dumps({"benchmark": "summed_latents", "rounds": options.rounds, "rows": found}))


if __name__ == "__main__":
    main()

"""How fast is EM end to end, beside hmmlearn, dynamax and scikit-learn, and what do restarts cost?

The same starts, the same number of steps, one core; processor time, the least of some runs in turn. Both ends
are compared, which must agree. Chorales-sized work is 229 sequences of 60 steps: keys (88 Bernoulli
variables, as dynamax has them; hmmlearn has none), 50 symbols, or Gaussians in 8 coordinates. dynamax
compiles anew at every call: its time without that is what the steps after the first take. Mixtures are
(50000, 16, 32): data, dimensions, components. Restarts: 20 of an HMM of one sequence of 1000 steps with 8
states, in units of a single run.

Usage: OMP_NUM_THREADS=1 python -m benchmarks.em [--epochs 100] [--repeats 2] [--only mixture]
"""

import argparse
import json
import math
import time
import warnings

import numpy as np
import torch

from pyroelbo import fit_em, models

SEQUENCES, STEPS = 229, 60
DIMS = {"bernoulli": 88, "categorical": 50, "gaussian": 8}


def em(pair, y, epochs, **settings):
    return fit_em(pair, y, epochs=epochs, tolerance=0.0, progress=False, **settings)


def hmm(emission, states):
    """A start, its state, data, and our own fit of so many epochs."""
    torch.manual_seed(0)
    start = models.HMM(states, DIMS[emission], emission, steps=STEPS, floor=1e-9)
    _, y = models.HMM(states, DIMS[emission], emission, steps=STEPS).simulate(SEQUENCES)
    start.initialize(y)
    state = {k: v.clone() for k, v in start.state_dict().items()}

    def ours(epochs):
        start.load_state_dict(state)
        return -SEQUENCES * em(start, y, epochs).losses[-1]

    return start, state, y, ours


def against_hmmlearn(emission, states):
    from hmmlearn import hmm as peers

    start, state, y, ours = hmm(emission, states)
    flat = y.flatten(0, 1).numpy()

    def theirs(epochs):
        start.load_state_dict(state)
        g = start.generator
        common = {"n_iter": epochs + 1, "tol": -math.inf, "init_params": ""}
        if emission == "categorical":
            peer = peers.CategoricalHMM(states, n_features=DIMS[emission], **common)
            peer.emissionprob_ = g.logits.softmax(1).detach().numpy()
        else:
            peer = peers.GaussianHMM(states, "diag", min_covar=0, covars_prior=0, **common)
            peer.means_ = g.loc.detach().numpy().copy()
            peer.covars_ = g.scale.detach().numpy() ** 2
        peer.startprob_ = start.prior.initial.softmax(0).detach().numpy()
        peer.transmat_ = start.prior.transition.softmax(1).detach().numpy()
        peer.fit(flat[:, None] if emission == "categorical" else flat, [STEPS] * SEQUENCES)
        return peer.monitor_.history[-1]

    return ours, theirs, lambda: None


def against_dynamax(emission, states):
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import BernoulliHMM

    start, state, y, ours = hmm(emission, states)
    # a pseudo-count keeps the peer's probabilities off zero and one, where its likelihood is NaN
    start.smoothing = start.generator.smoothing = 0.1
    peer = BernoulliHMM(states, DIMS[emission], 1.1, 1.1, 0.0, 1.1, 1.1)
    data = jnp.asarray(y.numpy())

    def theirs(epochs):
        start.load_state_dict(state)
        p = start.prior
        parts = (p.initial.softmax(0), p.transition.softmax(1), start.generator.log_odds.sigmoid())
        names = ("initial_probs", "transition_matrix", "emission_probs")
        given = {k: jnp.asarray(x.detach().numpy()) for k, x in zip(names, parts, strict=True)}
        found, _ = peer.fit_em(*peer.initialize(**given), data, num_iters=epochs, verbose=False)
        return float(jax.vmap(lambda one: peer.marginal_log_prob(found, one))(data).sum())

    return ours, theirs, lambda: theirs(1)


def against_scikit_learn(covariance, size=50000, dims=16, components=32):
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(0)
    y = rng.normal(size=(components, dims))[rng.integers(components, size=size)] * 2
    y += rng.normal(size=(size, dims))
    pair = models.GaussianMixture(dims, components, covariance, floor=1e-9)
    data = torch.from_numpy(y)
    torch.manual_seed(0)
    pair.initialize(data, start="random")
    state = {k: v.clone() for k, v in pair.state_dict().items()}

    def ours(epochs):
        pair.load_state_dict(state)
        return -size * em(pair, data, epochs).losses[-1]

    def theirs(epochs):
        pair.load_state_dict(state)
        g = pair.generator
        precision = torch.linalg.inv(g.variance) if covariance == "full" else 1 / g.variance
        peer = GaussianMixture(
            components,
            covariance_type="diag" if covariance == "diagonal" else "full",
            reg_covar=0,
            max_iter=epochs + 1,
            tol=0,
            weights_init=g.logits.softmax(0).detach().numpy(),
            means_init=g.loc.detach().numpy().copy(),
            precisions_init=precision.detach().numpy(),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer.fit(y)
        return size * peer.lower_bound_

    return ours, theirs, lambda: None


def restarts(emission, number=20):
    """20 restarts in one batch, beside one run: both from new starts, so that initializing counts."""
    torch.manual_seed(0)
    _, y = models.HMM(8, DIMS[emission], emission, steps=1000).simulate(1)
    pair = models.HMM(8, DIMS[emission], emission, floor=1e-9)
    pair.initialize(y)

    def many(epochs):
        return -min(em(pair, y, epochs, restarts=number).losses)

    def one(epochs):
        pair.initialize(y)
        return -em(pair, y, epochs, restarts=1).losses[-1]

    return many, one


CASES = {
    **{
        f"HMM, {e}, {s} states": (against_hmmlearn, e, s)
        for e in ("categorical", "gaussian")
        for s in (16, 64)
    },
    **{f"HMM, keys, {s} states": (against_dynamax, "bernoulli", s) for s in (16, 64)},
    **{f"mixture, {c}": (against_scikit_learn, c) for c in ("full", "diagonal")},
}


def seconds(run, epochs, repeats):
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        value = run(epochs) if epochs else run()
        taken.append(time.process_time() - began)
    return min(taken), value


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose names hold one of these words")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows = []
    print(
        f"{options.epochs} iterations{'':15}{'ours':>9}{'peer':>9}{'ratio':>7}{'steps only':>12}   "
        f"difference of evidence, nats"
    )
    for name, (make, *arguments) in CASES.items():
        if not any(word in name for word in options.only):
            continue
        try:
            ours, theirs, compile_only = make(*arguments)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        ours(1)  # compiled kernels are loaded
        a, mine = seconds(ours, options.epochs, options.repeats)
        b, other = seconds(theirs, options.epochs, 1 if make is against_dynamax else options.repeats)
        c, _ = seconds(compile_only, 0, 1)
        rows.append({"case": name, "ours": a, "peer": b, "peer_steps": b - c, "difference": mine - other})
        print(f"{name:28}{a:8.2f}s{b:8.2f}s{b / a:7.2f}{(b - c) / a:12.2f}   {mine - other:.1e}", flush=True)
    for emission in DIMS if any(word in "restarts" for word in options.only) else ():
        many, one = restarts(emission)
        many(1), one(1)
        a, _ = seconds(many, options.epochs, options.repeats)
        b, _ = seconds(one, options.epochs, 3 * options.repeats)
        rows.append({"case": f"20 restarts, {emission}", "many": a, "one": b})
        print(f"20 restarts, {emission:15}{a:8.2f}s, one run {b:.3f}s: {a / b:.1f} single runs", flush=True)
    print(json.dumps({"benchmark": "em", "torch": torch.__version__, "epochs": options.epochs, "rows": rows}))


if __name__ == "__main__":
    main()

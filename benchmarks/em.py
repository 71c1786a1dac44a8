"""EM end to end beside hmmlearn and scikit-learn: the same starts, the same number of steps, one core.

Prints seconds of processor time (the least of some runs) and the evidence both end with, which must agree. Chorales-sized work
is 229 sequences of 60 steps; Bernoulli vectors have no peer, so the HMM emits diagonal Gaussians in 8
coordinates, or one of 50 symbols. The mixture is (50000, 16, 32): data, dimensions, components.

Usage: OMP_NUM_THREADS=1 python benchmarks/em.py [--repeats 3] [--epochs 20]
"""

import argparse
import math
import time
import warnings

import numpy as np
import torch

from pyroelbo import fit_em, models


def seconds(run, repeats):
    taken = []
    for _ in range(repeats):
        began = time.process_time()
        value = run()
        taken.append(time.process_time() - began)
    return min(taken), value


def against_hmmlearn(emission, states, epochs):
    from hmmlearn import hmm

    torch.manual_seed(0)
    dims = 50 if emission == "categorical" else 8
    start = models.HMM(states, dims, emission, steps=60, floor=1e-9)
    truth = models.HMM(states, dims, emission, steps=60)
    _, y = truth.simulate(229)
    start.initialize(y)
    state = {k: v.clone() for k, v in start.state_dict().items()}

    def ours():
        start.load_state_dict(state)
        return -229 * fit_em(start, y, epochs=epochs, tolerance=0.0, progress=False).losses[-1]

    flat = y.flatten(0, 1).numpy()
    common = {"n_iter": epochs + 1, "tol": -math.inf, "init_params": ""}

    def theirs():
        start.load_state_dict(state)
        g = start.generator
        if emission == "categorical":
            peer = hmm.CategoricalHMM(states, n_features=dims, **common)
            peer.emissionprob_ = g.logits.softmax(1).detach().numpy()
            data = flat[:, None]
        else:
            peer = hmm.GaussianHMM(states, "diag", min_covar=0, covars_prior=0, **common)
            peer.means_ = g.loc.detach().numpy().copy()
            peer.covars_ = g.scale.detach().numpy() ** 2
            data = flat
        peer.startprob_ = start.prior.initial.softmax(0).detach().numpy()
        peer.transmat_ = start.prior.transition.softmax(1).detach().numpy()
        peer.fit(data, [60] * 229)
        return peer.monitor_.history[-1]

    return ours, theirs


def against_scikit_learn(epochs, size=50000, dims=16, components=32):
    from sklearn.mixture import GaussianMixture

    rng = np.random.default_rng(0)
    y = rng.normal(size=(components, dims))[rng.integers(components, size=size)] * 2
    y += rng.normal(size=(size, dims))
    pair = models.GaussianMixture(dims, components, floor=1e-9)
    data = torch.from_numpy(y)
    pair.initialize(data)
    state = {k: v.clone() for k, v in pair.state_dict().items()}

    def ours():
        pair.load_state_dict(state)
        return -size * fit_em(pair, data, epochs=epochs, tolerance=0.0, progress=False).losses[-1]

    def theirs():
        pair.load_state_dict(state)
        g = pair.generator
        peer = GaussianMixture(
            components,
            covariance_type="diag",
            reg_covar=0,
            max_iter=epochs + 1,
            tol=0,
            weights_init=g.logits.softmax(0).detach().numpy(),
            means_init=g.loc.detach().numpy().copy(),
            precisions_init=g.scale.detach().numpy() ** -2,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer.fit(y)
        return size * peer.lower_bound_

    return ours, theirs


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    cases = {
        f"HMM, {emission}, {states} states": (against_hmmlearn, emission, states)
        for emission in ("categorical", "gaussian")
        for states in (16, 64)
    }
    cases["mixture, diagonal (50000,16,32)"] = (against_scikit_learn,)
    print(f"{'':34}{'ours':>9}{'theirs':>9}{'ratio':>7}   difference of evidence, nats")
    for name, (make, *arguments) in cases.items():
        ours, theirs = make(*arguments, options.epochs)
        ours()  # compiled kernels are loaded
        (a, mine), (b, other) = seconds(ours, options.repeats), seconds(theirs, options.repeats)
        print(f"{name:34}{a:8.2f}s{b:8.2f}s{b / a:7.2f}   {mine - other:.1e}", flush=True)


if __name__ == "__main__":
    main()

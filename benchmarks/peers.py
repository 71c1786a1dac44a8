"""Other libraries behind one small interface; each loads only what is installed.

A peer takes arrays ``initial [S]``, ``transition [S,S]`` (log probabilities), ``observation [B,T,S]`` (log
likelihoods), and returns a dict of functions without arguments, one for each task that it can do.
"""

import functools

import numpy as np
import torch


def dynamax(initial, transition, observation):
    import jax

    jax.config.update("jax_enable_x64", observation.dtype == np.float64)
    import jax.numpy as jnp
    from dynamax.hidden_markov_model.inference import hmm_filter, hmm_posterior_mode, hmm_two_filter_smoother

    log_pi, log_a, logs = jnp.asarray(initial), jnp.asarray(transition), jnp.asarray(observation)

    def filtered(pi, a, x):
        return jax.vmap(lambda row: hmm_filter(jnp.exp(pi), jnp.exp(a), row).marginal_loglik)(x)

    def smoothed(pi, a, x):
        def one(row):
            done = hmm_two_filter_smoother(jnp.exp(pi), jnp.exp(a), row)
            return done.smoothed_probs, done.trans_probs

        return jax.vmap(one)(x)

    def best(pi, a, x):
        return jax.vmap(lambda row: hmm_posterior_mode(jnp.exp(pi), jnp.exp(a), row))(x)

    def ready(function):
        compiled = jax.jit(function)
        return lambda: [np.asarray(x) for x in jax.tree.leaves(compiled(log_pi, log_a, logs))]

    return {
        "log-likelihood": ready(filtered),
        "gradient": ready(jax.grad(lambda *x: filtered(*x).sum(), argnums=(0, 1, 2))),
        "marginals and counts": ready(smoothed),
        "best path": ready(best),
    }


def hmmlearn(initial, transition, observation):
    from hmmlearn import _hmmc

    log_pi, log_a, logs = (x.astype(np.float64) for x in (initial, transition, observation))
    pi, a = np.exp(log_pi), np.exp(log_a)

    def likelihood():
        return [np.array([_hmmc.forward_scaling(pi, a, np.exp(row))[0] for row in logs])]

    def counts():
        found = []
        for row in logs:
            p = np.exp(row)
            _, forward, scale = _hmmc.forward_scaling(pi, a, p)
            backward = _hmmc.backward_scaling(pi, a, p, scale)
            posterior = forward * backward
            posterior /= posterior.sum(1, keepdims=True)
            found.append((posterior, _hmmc.compute_scaling_xi_sum(forward, a, backward, p)))
        return [np.stack(x) for x in zip(*found, strict=True)]

    return {
        "log-likelihood": likelihood,
        "marginals and counts": counts,
        "best path": lambda: [np.stack([_hmmc.viterbi(log_pi, log_a, row)[1] for row in logs])],
    }


def pomegranate(initial, transition, observation):
    from pomegranate.distributions import Categorical
    from pomegranate.hmm import DenseHMM

    pi, a, logs = (torch.as_tensor(x) for x in (initial, transition, observation))
    states = len(pi)
    # it knows chains that end: every state ends with one half, which is taken out again
    model = DenseHMM(
        [Categorical([[0.5, 0.5]]) for _ in range(states)],
        edges=(a.exp() / 2).float(),
        starts=pi.exp().float(),
        ends=torch.full((states,), 0.5),
    )
    model = model.to(logs.dtype)
    steps = logs.shape[1]

    def likelihood():
        with torch.no_grad():
            forward = model.forward(emissions=logs)
        return [(torch.logsumexp(forward[:, -1], -1) + (steps - 1) * np.log(2)).numpy()]

    return {"log-likelihood": likelihood}


def _through_torch(value, initial, transition, observation):
    inputs = [torch.as_tensor(x) for x in (initial, transition, observation)]

    def likelihood():
        with torch.no_grad():
            return [value(*inputs).numpy()]

    def gradient():
        fresh = [x.clone().requires_grad_() for x in inputs]
        return [g.numpy() for g in torch.autograd.grad(value(*fresh).sum(), fresh)]

    return {"log-likelihood": likelihood, "gradient": gradient}


def pyro(initial, transition, observation):
    """The scan inside ``DiscreteHMM``."""
    from pyro.distributions.hmm import _sequential_logmatmulexp

    def value(pi, a, logs):
        steps = a + logs[:, 1:, None, :]
        first = pi + logs[:, 0]
        return torch.logsumexp(first[:, :, None] + _sequential_logmatmulexp(steps), (-1, -2))

    return _through_torch(value, initial, transition, observation)


def torch_struct(initial, transition, observation):
    import torch_struct as library

    library.LinearChainCRF.arg_constraints = {}

    def value(pi, a, logs):
        edges = (a + logs[:, 1:, None, :]).transpose(-1, -2)
        first = (pi + logs[:, 0])[:, None, None, :] * torch.eye(edges.shape[1])[:1, :1].to(pi)
        edges = torch.cat([edges[:, :1] + first, edges[:, 1:]], 1)
        return library.LinearChainCRF(edges).partition

    return _through_torch(value, initial, transition, observation)


ALL = {f.__name__: f for f in (dynamax, hmmlearn, pomegranate, pyro, torch_struct)}


def _refuse(error):
    raise error


def installed(*arguments, only=None):
    """``{peer: {task: function}}`` of the peers at hand, and notes about the others."""
    tasks, notes = {}, []
    for name, make in ALL.items():
        if only is not None and name not in only:
            continue
        try:
            tasks[name] = make(*arguments)
        except ImportError:
            notes.append(f"{name}: not installed, skipped")
        except ValueError as refused:
            tasks[name] = {"log-likelihood": functools.partial(_refuse, refused)}
    return tasks, notes

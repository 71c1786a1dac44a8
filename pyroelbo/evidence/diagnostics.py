"""Whether importance weights can be trusted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pareto_k_hat"]


def pareto_k_hat(log_w: Tensor) -> Tensor:
    """Tail index k of the importance weights over dimension 0: ``[K, *]`` to ``[*]``.

    A generalized Pareto distribution is fitted to the largest min(K/5, 3√K) weights, with the weakly
    informative prior that draws k towards 1/2. Below 1/2 the weights' variance is finite; above 0.7 (or 1 -
    1/log10 K for few draws) the estimate and its standard error mislead. NaN where fewer than five weights
    make the tail, where they tie, or all weights are zero; -inf where the largest weights all lie within a
    thousandth of each other. Cost: O(K log K) for each datum.

    Source: Zhang and Stephens (2009); Vehtari, Simpson, Gelman, Yao and Gabry (2024), appendix C.
    """
    draws = log_w.shape[0]
    tail = math.ceil(min(draws / 5, 3 * math.sqrt(draws)))
    flat = log_w.detach().double().reshape(draws, -1)
    result = torch.full((flat.shape[1],), math.nan, dtype=torch.float64, device=flat.device)
    if tail >= 5:
        flat = flat - flat.amax(0)
        ordered = flat.sort(0).values
        excess = ordered[-tail:].exp() - ordered[-tail - 1].exp()
        # Weights within a thousandth of each other (rounding, with an exact guide) are no tail to fit.
        fit = excess[-1] > 1e-3
        # Weights of a discrete latent take few values: where a quarter of the tail ties there is none to fit either.
        fit &= excess[int(tail / 4 + 0.5) - 1] > 0
        result[fit] = _fit_tail(excess[:, fit])
        result[excess[-1] <= 1e-3] = -math.inf
    return result.reshape(log_w.shape[1:])


def _fit_tail(x: Tensor) -> Tensor:
    """Posterior mean of k for sorted exceedances x [n, *], by Zhang and Stephens' profile quadrature over b =
    -k/sigma."""
    n = x.shape[0]
    points = 30 + int(math.sqrt(n))
    grid = 1 - (points / (torch.arange(1, points + 1, dtype=x.dtype, device=x.device) - 0.5)).sqrt()
    quartile = x[int(n / 4 + 0.5) - 1]
    b = grid[:, None] / (3 * quartile) + 1 / x[-1]
    k = torch.log1p(-b[:, None] * x).mean(1)
    profile = n * ((-b / k).log() - k - 1)
    weights = torch.softmax(profile.nan_to_num(nan=-math.inf), 0)
    best = (weights * b).sum(0)
    k_hat = torch.log1p(-best * x).mean(0)
    return (n * k_hat + 10 * 0.5) / (n + 10)

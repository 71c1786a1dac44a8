import inspect

import numpy as np
import pytest
import torch

from pyroelbo.evidence import pareto_k_hat


def arviz_k(log_w):
    """The same quantity from arviz, whose 1.x line wants the draws last and takes the log weights' sign
    reversed."""
    try:
        from arviz import psislw
    except ImportError:
        from arviz_stats.base import array_stats

        parameters = inspect.signature(array_stats.psislw).parameters
        return np.asarray(array_stats.psislw(-log_w if "ary" in parameters else log_w, axis=-1)[1])
    return np.asarray(psislw(log_w)[1])


@pytest.mark.parametrize("tail", [1.2, 2.0, 4.0])
def test_agrees_with_arviz(tail):
    log_w = np.random.default_rng(0).exponential(size=(6, 2000)) / tail
    ours = pareto_k_hat(torch.from_numpy(log_w.T))
    np.testing.assert_allclose(ours, arviz_k(log_w), atol=2e-3)
    assert abs(float(ours.mean()) - 1 / tail) < 0.15


def test_nothing_to_fit():
    assert pareto_k_hat(torch.randn(20, 3)).isnan().all()
    assert (pareto_k_hat(torch.zeros(1000, 2)) == -float("inf")).all()
    assert (pareto_k_hat(1e-9 * torch.randn(1000, 2)) == -float("inf")).all()
    assert pareto_k_hat(torch.full((100, 1), -float("inf"))).isnan().all()
    two_values = torch.where(torch.rand(1000, 1) < 0.05, 0.0, -3.0)
    assert pareto_k_hat(two_values).isnan().all()

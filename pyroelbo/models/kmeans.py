"""k-means, to initialize mixtures."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["k_means"]


@torch.no_grad()
def k_means(
    y: Tensor, clusters: int, iterations: int = 20, most: int = 20_000
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres ``[M,D]`` of M clusters of data ``[N,D]``, the labels ``[n]`` of the data used, and those data
    ``[n,D]``.

    Coordinates are divided by their standard deviations. Seeds are drawn one after the other with probability
    proportional to the squared distance to the nearest earlier one (k-means++), followed by at most
    ``iterations`` of Lloyd's algorithm. Of more than ``most`` data a random subset is used. Cost:
    O(iterations · n · M · D).

    Source: Lloyd (1982); Arthur and Vassilvitskii (2007).
    """
    if len(y) > most:
        y = y[torch.randperm(len(y))[:most].to(y.device)]
    mean, scale = y.mean(0), y.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    x = (y - mean) / scale
    power = x.square().sum(-1)

    def apart(centres: Tensor) -> Tensor:
        """Squared distances [n, M] to centres [M, D]."""
        return (power[:, None] - 2 * x @ centres.T + centres.square().sum(-1)).clamp_min(0)

    first = int(torch.randint(len(x), ()))
    centres, nearest = [x[first]], apart(x[first][None])[:, 0]
    for _ in range(clusters - 1):
        # a datum equal to an earlier centre up to rounding is not drawn again
        weight = torch.where(nearest > 1e-12 * power.max(), nearest, 0.0)
        weight = weight.cumsum(0, dtype=torch.float64)
        mark = weight[-1] * torch.rand((), dtype=torch.float64).to(weight)
        at = int(torch.searchsorted(weight, mark, right=True).clamp_max(len(x) - 1))
        if weight[-1] <= 0:
            at = int(torch.randint(len(x), ()))
        centres.append(x[at])
        nearest = torch.minimum(nearest, apart(x[at][None])[:, 0])
    centre = torch.stack(centres)
    label = apart(centre).argmin(-1)
    for _ in range(iterations):
        count = torch.bincount(label, minlength=clusters).to(x)
        total = torch.zeros_like(centre).index_add_(0, label, x)
        centre = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centre)
        before, label = label, apart(centre).argmin(-1)
        if torch.equal(before, label):
            break
    return centre * scale + mean, label, y

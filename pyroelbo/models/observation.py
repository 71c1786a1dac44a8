"""What a network's numbers say about pixels: five likelihoods that image models share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.distributions.pixels import DiscretizedLogistic, l1_density, l2_density

__all__ = ["LIKELIHOODS", "Pixels", "form_of"]

# name: numbers a pixel that the network gives, form of the data
LIKELIHOODS: dict[str, tuple[Callable[[int], int], str]] = {
    "bernoulli": (lambda levels: 1, "binary"),
    "discretized_logistic": (lambda levels: 1, "bytes"),
    "categorical": (lambda levels: levels, "bytes"),
    "l2": (lambda levels: 1, "grey"),
    "l1": (lambda levels: 1, "grey"),
}


class Pixels(nn.Module):
    """p(y | x) of ``dims`` pixels from a network's output ``x`` [*, dims·outputs]; event shape [dims].

    ``likelihood``: ``bernoulli`` (0 or 1), ``discretized_logistic`` and ``categorical`` (integers 0 …
    levels-1), ``l2`` and ``l1`` (real pixels; the Gaussian and Laplace densities with their constants). The
    logistic's scale and the densities' weight are learned, one number for all pixels, as ``log_weight``;
    ``weight`` fixes the latter instead.
    """

    def __init__(
        self, dims: int, likelihood: str = "bernoulli", levels: int = 256, weight: float | None = None
    ) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood takes one of {tuple(LIKELIHOODS)}, got {likelihood!r}")
        if weight is not None and likelihood not in ("l1", "l2"):
            raise ValueError(f"weight belongs to the densities 'l1' and 'l2', not to {likelihood!r}")
        self.dims, self.likelihood, self.levels = dims, likelihood, levels
        per_pixel, self.form = LIKELIHOODS[likelihood]
        if self.form == "bytes" and levels < 2:
            raise ValueError(f"levels takes at least two grey levels, got {levels}")
        self.per_pixel = per_pixel(levels)
        starts = {"discretized_logistic": levels / 10, "l1": 10.0, "l2": 100.0}
        if weight is not None:
            self.register_buffer("log_weight", torch.tensor(math.log(weight)))
        elif likelihood in starts:
            self.register_parameter("log_weight", nn.Parameter(torch.tensor(math.log(starts[likelihood]))))

    @property
    def outputs(self) -> int:
        """Numbers that the network gives for one datum."""
        return self.dims * self.per_pixel

    def distribution(self, x: Tensor) -> dist.TorchDistribution:
        """p(y | x), event shape [dims]."""
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=x).to_event(1)
        if self.likelihood == "categorical":
            return dist.Categorical(logits=x.unflatten(-1, (self.dims, self.levels))).to_event(1)
        if self.likelihood == "discretized_logistic":
            center = (self.levels - 1) * torch.sigmoid(x)
            return DiscretizedLogistic(center, self.log_weight.exp(), self.levels).to_event(1)
        density = l2_density if self.likelihood == "l2" else l1_density
        return density(x, self.log_weight.exp()).to_event(1)

    def scaled(self, y: Tensor, model: str) -> Tensor:
        """Pixels as a network takes them, in [0, 1]; ValueError, naming the ``model``, for other shapes than
        [B, dims]."""
        self.check(y, model)
        y = y.to(torch.get_default_dtype()) if not y.is_floating_point() else y
        return y / (self.levels - 1) if self.form == "bytes" else y

    def check(self, y: Tensor, model: str) -> None:
        """ValueError, naming the ``model``, for data that are not [B, dims]."""
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: this {model} takes [B, {self.dims}], images flattened"
            )

    def center(self) -> Center:
        """The map of such pixels to [-1, 1]."""
        return Center(self.levels - 1 if self.form == "bytes" else 1)

    def mean_image(self, distribution: Any) -> Tensor:
        """E[y] in [0, 1], [*, dims], for pictures."""
        p = distribution.base_dist
        if self.likelihood == "categorical":
            grey = torch.arange(self.levels, dtype=p.probs.dtype, device=p.probs.device)
            return (p.probs @ grey) / (self.levels - 1)
        if self.likelihood == "discretized_logistic":
            return p.loc / (self.levels - 1)
        return p.mean.clamp(0, 1)


class Center(nn.Module):
    """Pixels in [0, top] to [-1, 1], as an encoder takes them."""

    def __init__(self, top: float) -> None:
        super().__init__()
        self.top = top

    def forward(self, y: Tensor) -> Tensor:
        y = y.to(torch.get_default_dtype()) if not y.is_floating_point() else y
        return 2 * y / self.top - 1


def form_of(settings: Mapping[str, Any]) -> str:
    """The form of data that a model of these settings takes."""
    name = settings.get("likelihood", "bernoulli")
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood takes one of {tuple(LIKELIHOODS)}, got {name!r}")
    return LIKELIHOODS[name][1]

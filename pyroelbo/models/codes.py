"""Distributions over sequences of codes: the priors of discrete autoencoders."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import one_hot

from pyroelbo.evaluation.finite import listed, vectors_of
from pyroelbo.models.autoregressive import CausalNetwork, Tokens
from pyroelbo.nn import CausalTransformer
from pyroelbo.numerics import positive_count
from pyroelbo.pair import Stepwise

__all__ = ["CodePrior", "Codes"]

_ENUMERABLE = 2**20
KINDS = ("autoregressive", "factorized", "uniform")


class CodePrior(nn.Module):
    """p(z) of ``length`` codes 0 … ``codes`` - 1, in a fixed order: ``prior()`` has the event shape [length],
    or [length, codes] of one-hot vectors.

    Args:
        length: number of codes T.
        codes: number of values K of each.
        kind: ``autoregressive`` (a transformer; factorized for one code), ``factorized`` (a learned table
            [T, K]) or ``uniform``.
        one_hot: whether codes are one-hot vectors.
        width: number of features of the transformer.
        layers: number of its layers.
    """

    def __init__(
        self,
        length: int,
        codes: int,
        kind: str = "autoregressive",
        one_hot: bool = False,
        width: int = 64,
        layers: int = 2,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"prior: expected one of {KINDS}, got {kind!r}")
        self.length, self.codes = positive_count("length", length), positive_count("codes", codes)
        self.kind = "factorized" if kind == "autoregressive" and length == 1 else kind
        self.one_hot = one_hot
        if self.kind == "autoregressive":
            self.network = CausalTransformer(codes, length, width, layers)
        elif self.kind == "factorized":
            self.logits = nn.Parameter(torch.zeros(length, codes))
        else:
            self.register_buffer("logits", torch.zeros(length, codes))

    def forward(self) -> Any:
        """The distribution p(z)."""
        if self.kind == "autoregressive":
            return Codes(self.network, self.length, self.codes, self.one_hot)
        family = dist.OneHotCategorical if self.one_hot else dist.Categorical
        return family(logits=self.logits).to_event(1)


class Codes(TorchDistribution):
    """p(z) = Π_t p(z_t | z_<t) of T codes 0 … K-1 by a causal network; z [T], integers of any dtype, or
    one-hot [T, K].

    Relaxed one-hot vectors are scored by Σ_t z_t · ln p(· | argmax z_<t): the slope of a code's own term, and
    none through what follows it. Cost: one pass of the network for a log probability, T cached steps for a
    draw.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    multilinear = True

    def __init__(
        self,
        network: CausalNetwork,
        length: int,
        codes: int,
        one_hot: bool = False,
        batch_shape: torch.Size = torch.Size(),  # noqa: B008
    ) -> None:
        self.network, self.length, self.codes, self.one_hot = network, length, codes, one_hot
        event = (length, codes) if one_hot else (length,)
        super().__init__(batch_shape, torch.Size(event), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        if self.one_hot:
            return constraints.independent(constraints.one_hot, 1)
        return constraints.independent(constraints.integer_interval(0, self.codes - 1), 1)

    @property
    def num_values(self) -> int:
        """K^T."""
        return self.codes**self.length

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.num_values <= _ENUMERABLE

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every value, [K^T, 1, …, 1, *event], the last code changing first."""
        found = vectors_of(self.codes, self.length, self._like.device)
        return listed(self._as_values(found), self, expand)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Codes:
        return Codes(self.network, self.length, self.codes, self.one_hot, torch.Size(batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        tokens = value.argmax(-1) if self.one_hot else value.long()
        log_probs = self.network(tokens).log_softmax(-1)
        terms = log_probs * value if self.one_hot else log_probs.gather(-1, tokens[..., None])
        return terms.sum((-2, -1)).expand(torch.broadcast_shapes(lead, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        """Draws ``[*sample, *B, *event]``."""
        lead = torch.Size((*sample_shape, *self.batch_shape))
        cache, drawn = self.network.begin(torch.Size((math.prod(lead),))), []
        for t in range(self.length):
            drawn.append(torch.multinomial(self.network.step(cache).softmax(-1), 1)[:, 0])
            if t + 1 < self.length:
                cache = self.network.append(cache, drawn[-1])
        return self._as_values(torch.stack(drawn, -1).reshape(*lead, self.length))

    def stepwise(self) -> Stepwise:
        """One code after the other, from the network's cache."""
        return Stepwise(
            lambda n: self.network.begin(torch.Size((n,))),
            lambda cache: Tokens(self.network.step(cache)),
            lambda cache, code: self.network.append(cache, code.long()),
        )

    def _as_values(self, codes: Tensor) -> Tensor:
        return one_hot(codes, self.codes).to(self._like.dtype) if self.one_hot else codes

    @property
    def _like(self) -> Tensor:
        return next(self.network.parameters())  # type: ignore[attr-defined]

"""Latent Dirichlet allocation, with its exact evidence by a dynamic program over topic counts."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.models.precision import exact
from pyroelbo.nn import MLP
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["LDA"]

_STATES = 2**21  # count vectors times data that are held at once
_MOST = 2**17  # count vectors of one document


class LDA(ExactPair):
    """θ ~ Dirichlet(α, …, α), each word w ~ Σ_k θ_k φ_k(w); an encoder draws θ from a Dirichlet. Data [B, L].

    Documents are rows of words 0 … V-1 padded with -1; the order of words does not matter, and the length is
    given. The guide's concentrations are 0.1 + softplus of a network of the words' shares and ln(1 + length).

    The evidence sums over the numbers of words that each topic explains, θ integrated out:
    ln p(y) = ln Σ_c A(c) B(α + c) / B(α), where A(c) collects the assignments of words to topics with counts
    c, word by word. Cost: O(N^K) for N words and K topics: 100 words of 3 topics have 5,151 count vectors.

    Parts: ``generator`` (topics), ``encoder``. Raises ValueError for words outside the vocabulary, and
    :class:`Unavailable` for the evidence of documents with too many count vectors.

    Args:
        vocabulary: number of words V.
        topics: number of topics K.
        length: longest document L, for simulation.
        hidden: widths of the encoder's hidden layers.
        concentration: α, fixed.

    Source: Blei, Ng and Jordan (2003); Srivastava and Sutton (2017) for encoders.
    """

    latent = "theta"

    def __init__(
        self,
        vocabulary: int,
        topics: int = 3,
        length: int = 50,
        hidden: tuple[int, ...] = (64,),
        concentration: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (("vocabulary", vocabulary), ("topics", topics), ("length", length)):
            positive_count(name, value)
        if not concentration > 0:
            raise ValueError(f"concentration: expected a positive number, got {concentration!r}")
        self.vocabulary, self.topics, self.length = vocabulary, topics, length
        self.generator = nn.Module()
        self.generator.register_parameter("logits", nn.Parameter(0.5 * torch.randn(topics, vocabulary)))
        self.register_buffer("concentration", torch.full((topics,), float(concentration)))
        self.encoder = MLP((vocabulary + 1, *hidden, topics))

    @property
    def exact_guide(self) -> bool:
        return False

    @property
    def log_topics(self) -> Tensor:
        """ln φ, [K, V]."""
        return self.generator.logits.log_softmax(-1)

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.is_floating_point():
            raise ValueError(
                f"y: expected words as integers [B, L], padded with -1, got {y.dtype} {tuple(y.shape)}"
            )
        if y.numel() and (int(y.min()) < -1 or int(y.max()) >= self.vocabulary):
            raise ValueError(
                f"y: expected words 0 … {self.vocabulary - 1}, or -1 for none, got {int(y.min())} … "
                f"{int(y.max())}"
            )
        return y

    def model(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            theta = pyro.sample("theta", dist.Dirichlet(self.concentration))
            words = logsumexp(theta.log()[..., None] + self.log_topics, -2)
            pyro.sample("y", _Words(words, y.shape[-1]), obs=y)

    def guide(self, y: Tensor) -> None:
        counts = _counts(y, self.vocabulary).to(self.concentration)
        total = counts.sum(-1, keepdim=True)
        seen = torch.cat([counts / total.clamp_min(1), total.log1p()], -1)
        with pyro.plate(PLATE, len(y)):
            pyro.sample("theta", dist.Dirichlet(0.1 + nn.functional.softplus(self.encoder(seen))))

    def _weights(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Count vectors [S, K], and ln A(c) of each document, [B, S]; -inf for counts that do not add up."""
        y = self._check(y)
        longest = int((y >= 0).sum(-1).max())
        shape = (longest + 1,) * (self.topics - 1)
        if math.prod(shape) > _MOST:
            raise Unavailable(
                f"documents of {longest} words and {self.topics} topics have {math.prod(shape):,} vectors of "
                f"counts: the exact evidence is limited to {_MOST:,}"
            )
        # All but the first topic's count: that one is what remains.
        log_topics = exact(self.log_topics)
        start = log_topics.new_full((len(y), *shape), -math.inf)
        start.reshape(len(y), -1)[:, 0] = 0.0
        order = (y < 0).long().argsort(dim=-1, stable=True)
        for word in y.gather(-1, order)[:, :longest].unbind(-1):
            seen = log_topics.T[word.clamp_min(0)]  # [B, K]
            expand = (slice(None), *[None] * len(shape))
            terms = [start + seen[:, 0][expand]]
            for k in range(1, self.topics):
                moved = start.narrow(k, 0, longest) + seen[:, k][expand]
                pad = [0, 0] * (self.topics - 1 - k) + [1, 0]
                terms.append(nn.functional.pad(moved, pad, value=-math.inf))
            after = logsumexp(torch.stack(terms), 0)
            start = torch.where((word >= 0)[expand], after, start)
        grid = [torch.arange(n, device=y.device) for n in shape]
        others = torch.cartesian_prod(*grid).reshape(-1, len(shape)) if shape else y.new_zeros(1, 0)
        return others, start.reshape(len(y), -1)

    def _posterior_parts(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Concentrations α + c [B, S, K] of the posterior's components, and their ln weights [B, S]."""
        others, log_a = self._weights(y)
        prior = exact(self.concentration)
        first = (y >= 0).sum(-1, keepdim=True) - others.sum(-1)
        counts = torch.cat([first[..., None], others.expand(len(y), *others.shape)], -1)
        alpha = prior + counts.clamp_min(0).to(prior)

        def log_beta(a: Tensor) -> Tensor:
            return a.lgamma().sum(-1) - a.sum(-1).lgamma()

        log_weight = log_a + log_beta(alpha) - log_beta(prior)
        return alpha, torch.where(first >= 0, log_weight, -math.inf)

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y) of each document, [B]: the probability of its words in their order."""
        longest = int((self._check(y) >= 0).sum(-1).max())
        rows = max(1, _STATES // (longest + 1) ** (self.topics - 1))
        return torch.cat([logsumexp(self._posterior_parts(part)[1], -1) for part in y.split(rows)])

    def posterior(self, y: Tensor) -> Any:
        """p(θ | y), the mixture of Dirichlets over the count vectors."""
        alpha, log_weight = self._posterior_parts(y)
        return dist.MixtureSameFamily(dist.Categorical(logits=log_weight), dist.Dirichlet(alpha))

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.length, dtype=torch.long, device=self.device)


class _Words(TorchDistribution):
    """``length`` independent words with log probabilities [*, V]; -1 in a value is no word."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, log_probs: Tensor, length: int) -> None:
        self.log_probs, self.length = log_probs, length
        super().__init__(log_probs.shape[:-1], torch.Size([length]), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-1, self.log_probs.shape[-1] - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Words:
        return _Words(self.log_probs.expand(*batch_shape, -1), self.length)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        index = value.clamp_min(0).expand(*shape, -1)
        found = self.log_probs.expand(*shape, -1).gather(-1, index)
        return torch.where(value >= 0, found, torch.zeros_like(found)).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            draws = dist.Categorical(logits=self.log_probs).sample((self.length, *sample_shape))
            return draws.movedim(0, -1)


def _counts(y: Tensor, vocabulary: int) -> Tensor:
    """How often each word stands in each document, [B, V]."""
    return nn.functional.one_hot(y + 1, vocabulary + 1).sum(-2)[..., 1:]

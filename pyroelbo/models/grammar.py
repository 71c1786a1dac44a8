"""Probabilistic context-free grammars: trees as latents, summed by inside-outside."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo import distributions as ped
from pyroelbo.distributions.grammar import without_padding
from pyroelbo.models.emissions import log_shares
from pyroelbo.models.precision import exact
from pyroelbo.nn import MLP
from pyroelbo.numerics import positive_count
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["PCFG", "NeuralPCFG"]


class _Grammar(ExactPair):
    """p(z) over binary trees, p(y | z) = Π_i preterminals[label of leaf i, y_i] (abstract)."""

    def __init__(self, nonterminals: int, preterminals: int, words: int, guide: str, steps: int) -> None:
        super().__init__()
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide: expected 'exact' or 'mean_field', got {guide!r}")
        counts = {"nonterminals": nonterminals, "preterminals": preterminals, "words": words, "steps": steps}
        for name, value in counts.items():
            positive_count(name, value)
        self.nonterminals, self.preterminals, self.words, self.steps = (
            nonterminals,
            preterminals,
            words,
            steps,
        )
        self.encoder = _SpanWeights(nonterminals, preterminals, words) if guide == "mean_field" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    @abstractmethod
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of start [N], rules [N, N+P, N+P] and words [P, V]."""

    def grammar(self, steps: int | None = None) -> ped.PCFG:
        """p(y), a distribution over sentences of at most ``steps`` words."""
        return ped.PCFG(*self.tables(), max_length=steps or self.steps)

    def _check(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.is_floating_point() or y.shape[1] < 2:
            raise ValueError(
                f"y: expected integers [B, L] with L at least 2, padded with -1, got {y.dtype} of shape "
                f"{tuple(y.shape)}"
            )
        return y

    def model(self, y: Tensor) -> None:
        grammar = self.grammar(self._check(y).shape[1])
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", grammar.prior)
            leaf = z.diagonal(dim1=-2, dim2=-1)
            pyro.sample("y", _Words(grammar.preterminals, leaf - self.nonterminals), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", self.posterior(y) if self.encoder is None else self._encode(y))

    def _encode(self, y: Tensor) -> ped.ParseTree:
        assert self.encoder is not None
        leaves, spans = self.encoder(y)
        every = self.nonterminals + self.preterminals
        flat = leaves.new_zeros(1, self.nonterminals, every, every)
        return ped.ParseTree(flat[:, :, 0, 0], flat, leaves, spans, (y >= 0).sum(-1))

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y), [B], in nats, by the inside recursion; y includes the sentence's length."""
        return self.posterior(y).log_partition

    def posterior(self, y: Tensor) -> ped.ParseTree:
        """p(z | y) over trees; its ``log_partition`` is ln p(y), in float64 without gradients."""
        start, rules, words = map(exact, self.tables())
        return ped.PCFG(start, rules, words, max_length=self.steps).posterior(self._check(y))

    @torch.no_grad()
    def brackets(self, y: Tensor) -> Tensor:
        """The binary tree with the largest expected number of correct unlabelled brackets, BoolTensor [B, L,
        L] (first and last word; single words on the diagonal). Source: Goodman (1996)."""
        lengths = (self._check(y) >= 0).sum(-1)
        spans = self.posterior(y).marginals[3].sum(-1, keepdim=True)
        flat = spans.new_zeros(1, 1, 2, 2)
        leaves = flat.new_zeros(*y.shape, 1)
        return ped.ParseTree(flat[:, :, 0, 0], flat, leaves, spans, lengths).mode >= 0

    def lines(self, latents: dict[str, Tensor], batch: Tensor, names: Sequence[str]) -> list[str]:
        """Sentences in brackets, each with the number of its nonterminal: ⟨0 the ⟨3 old man⟩⟩."""

        def bracket(chart: list[list[int]], words: list[str], i: int, j: int) -> str:
            if i == j:
                return words[i]
            k = next(k for k in range(i, j) if chart[i][k] >= 0 and chart[k + 1][j] >= 0)
            return f"⟨{chart[i][j]} {bracket(chart, words, i, k)} {bracket(chart, words, k + 1, j)}⟩"

        texts = [[names[w] if names else str(w) for w in row if w >= 0] for row in batch.tolist()]
        charts = latents["z"].tolist()
        return [bracket(chart, words, 0, len(words) - 1) for chart, words in zip(charts, texts, strict=True)]

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.steps, dtype=torch.long, device=self.device)


class PCFG(_Grammar):
    """p(y) = Σ_trees p(z, y): a grammar of N nonterminals and P preterminals over V words. Batches ``y``.

    p(z, y) = start[top] Π rules[parent, left, right] Π words[leaf, y_i] over binary trees; symbols N … N+P-1
    are the preterminals. y is a LongTensor [B, L], padded with -1, of sentences of at least two words. The
    latent site ``z`` is the tree as a chart, LongTensor [B, L, L]: at (i, j) the label of the node over words
    i … j, -1 if none.

    Parts: ``prior`` (start [N], rules [N, N+P, N+P], logits), ``generator`` (words [P, V], logits),
        ``encoder``.
    Cost: O(B·(L³N² + L²N³ + L²N²P)). Source: Baker (1979); Lari and Young (1990).

    Args:
        nonterminals: N.
        preterminals: P.
        words: V.
        guide: ``"exact"`` draws from p(z | y). ``"mean_field"`` has log weights of labelled spans from the
            words at their ends: labels are independent given the brackets, and its gap measures what the
            rules add.
        steps: longest sentence that :meth:`simulate` draws; a longer draw is refused, not cut.
        smoothing: pseudo-count a of every start, rule and word, MAP under Dirichlet(1 + a). Without it EM
            keeps probabilities of zero at zero.
    """

    def __init__(
        self,
        nonterminals: int,
        preterminals: int,
        words: int,
        guide: str = "exact",
        steps: int = 40,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__(nonterminals, preterminals, words, guide, steps)
        if not smoothing >= 0:
            raise ValueError(f"smoothing: expected a pseudo-count of at least 0, got {smoothing!r}")
        self.smoothing = smoothing
        every = nonterminals + preterminals
        self.prior, self.generator = nn.Module(), nn.Module()
        self.prior.register_parameter("start", nn.Parameter(0.1 * torch.randn(nonterminals)))
        self.prior.register_parameter("rules", nn.Parameter(0.5 * torch.randn(nonterminals, every, every)))
        self.generator.register_parameter("words", nn.Parameter(0.5 * torch.randn(preterminals, words)))

    def tables(self) -> tuple[Any, Any, Any]:
        return self.prior.start, self.prior.rules, self.generator.words

    @torch.no_grad()
    def e_step(
        self, y: Tensor, hard: bool = False, weights: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) of the best tree) and the statistics of :meth:`m_step`, in which
        ``weights`` [B] count each sentence so many times."""
        y = without_padding(self._check(y))
        evidence, (start, rules, leaves, _) = self.posterior(y).expected_parts(hard=hard, weights=weights)
        seen = y >= 0
        words = leaves.new_zeros(self.words, self.preterminals).index_add_(0, y[seen], leaves[seen])
        return evidence, {"start": start[0], "rules": rules[0], "words": words.t()}

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Start, rules and words that maximize the expected log joint (plus :meth:`log_prior`)."""
        p, g, a = self.prior, self.generator, self.smoothing
        p.start.copy_(log_shares(statistics["start"], a, p.start))
        p.rules.copy_(log_shares(statistics["rules"].flatten(1), a, p.rules.flatten(1)).view_as(p.rules))
        g.words.copy_(log_shares(statistics["words"], a, g.words))

    def log_prior(self) -> Tensor:
        """The log density, up to a constant, that ``smoothing`` stands for."""
        total = self.prior.start.new_zeros(())
        if self.smoothing:
            for logits in (self.prior.start, self.prior.rules.flatten(1), self.generator.words):
                total = total + self.smoothing * logits.log_softmax(-1).sum()
        return total

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        """Random initialization: rules near uniform, words half from the data's frequencies and half
        random."""
        self._check(y)
        self.prior.start.zero_()
        self.prior.rules.normal_().mul_(0.5)
        frequent = torch.bincount(y[y >= 0], minlength=self.words) / (y >= 0).sum()
        drawn = torch.distributions.Dirichlet(torch.ones_like(self.generator.words)).sample()
        self.generator.words.copy_((0.5 * frequent + 0.5 * drawn).log())


class NeuralPCFG(_Grammar):
    """A :class:`PCFG` whose tables are computed by networks from embeddings of its symbols.

    start = MLP(s), rules[a] = linear(e_a), words[t] = MLP(f_t), for learned vectors s, e_a, f_t. Sharing the
    networks makes it easier to fit than free tables. There is no closed-form M-step: :func:`~pyroelbo.fit_em`
    uses gradients, and :func:`~pyroelbo.fit` trains it on minibatches.

    Parts: ``prior`` (start and rules), ``generator`` (words), ``encoder``.

    Args:
        nonterminals: N.
        preterminals: P.
        words: V.
        width: number of features of an embedding.
        guide: ``"exact"`` or ``"mean_field"``, as for :class:`PCFG`.
        steps: longest sentence that :meth:`simulate` draws.

    Source: Kim, Dyer, Rush (2019), *Compound probabilistic context-free grammars*.
    """

    def __init__(
        self,
        nonterminals: int,
        preterminals: int,
        words: int,
        width: int = 64,
        guide: str = "exact",
        steps: int = 40,
    ) -> None:
        super().__init__(nonterminals, preterminals, words, guide, steps)
        every = nonterminals + preterminals
        self.prior, self.generator = nn.Module(), nn.Module()
        positive_count("width", width, "number of features")
        self.prior.register_parameter("symbols", nn.Parameter(torch.randn(nonterminals + 1, width)))
        self.prior.start = MLP((width, width, nonterminals))
        self.prior.rules = nn.Linear(width, every**2)
        self.generator.register_parameter("symbols", nn.Parameter(torch.randn(preterminals, width)))
        self.generator.words = MLP((width, width, words))

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        p, g = self.prior, self.generator
        every = self.nonterminals + self.preterminals
        rules = p.rules(p.symbols[1:]).view(self.nonterminals, every, every)
        return p.start(p.symbols[0]), rules, g.words(g.symbols)


class _SpanWeights(nn.Module):
    """Log weights of leaves [B, L, P] and of labelled spans [B, L, L, N] from the words at and next to their
    ends."""

    def __init__(self, nonterminals: int, preterminals: int, words: int, width: int = 32) -> None:
        super().__init__()
        self.leaves = nn.Embedding(words + 1, preterminals)  # the last row is for padding and sentence ends
        self.before, self.first, self.last, self.after = (nn.Embedding(words + 1, width) for _ in range(4))
        self.spans = nn.Linear(width, nonterminals)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        around = F.pad(y, (1, 1), value=-1)
        around = torch.where(around < 0, self.leaves.num_embeddings - 1, around)
        start = self.before(around[:, :-2]) + self.first(around[:, 1:-1])
        end = self.last(around[:, 1:-1]) + self.after(around[:, 2:])
        spans = self.spans(torch.tanh(start[:, :, None] + end[:, None]))
        return self.leaves(around[:, 1:-1]), spans


class _Words(TorchDistribution):
    """p(y | leaves) = Π_i table[label_i, y_i]; y_i = -1 if and only if label_i is negative.

    ``table [P, V]``: log probabilities; ``label [*B, L]``; y LongTensor [*B, L].
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, table: Tensor, label: Tensor) -> None:
        self.table, self.label = table, label
        super().__init__(label.shape[:-1], label.shape[-1:], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-1, self.table.shape[-1] - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Words:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.label = self.label.expand(*batch_shape, -1)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        seen, leaf = value >= 0, self.label >= 0
        chosen = self.table[self.label.clamp(min=0), value.clamp(min=0)]
        log_prob = torch.where(seen & leaf, chosen, 0.0).sum(-1)
        return torch.where((seen == leaf).all(-1), log_prob, -math.inf)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        label = self.label.expand(*sample_shape, *self.label.shape)
        drawn = torch.distributions.Categorical(logits=self.table[label.clamp(min=0)]).sample()
        return torch.where(label >= 0, drawn, -1)

"""A VAE of texts: one latent vector for a sentence that an autoregressive decoder writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import pad

from pyroelbo import encoders, priors
from pyroelbo.models.autoregressive import Tokens, check_strings, stopped
from pyroelbo.models.sequences import captured
from pyroelbo.nn import CausalGRU, CausalText, CausalWindow
from pyroelbo.numerics import positive_count
from pyroelbo.pair import PLATE, Pair, Stepwise

__all__ = ["SentenceVAE", "Written"]

NETWORKS = ("gru", "window")
_MOST = 1000  # data that pseudo-inputs start from


class Written(TorchDistribution):
    """p(y | z) = Π_t p(y_t | y_<t, z) · p(stop | y, z) over strings of 0 … ``length`` symbols, by a
    ``network`` whose last symbol is the stop, for contexts z [*B, D]; event shape [length].

    Values are padded with -1; the first -1 of a row is the stop symbol, and a string of ``length`` symbols
    stops with probability one (as :class:`~pyroelbo.models.Strings`). The softmax is computed where words or
    stops are, not over the padding.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, network: CausalText, context: Tensor, length: int) -> None:
        self.network, self.context, self.length = network, context, length
        super().__init__(context.shape[:-1], torch.Size([length]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.integer_interval(-1, self.network.symbols - 2), 1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Written:
        return Written(self.network, self.context.expand(*batch_shape, -1), self.length)

    def by_word(self, value: Tensor) -> Tensor:
        """ln p of each word given those before it, and of the stop, [*, length], in nats; 0 after the
        stop."""
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        live, words = ~pad(value[..., :-1] < 0, (1, 0)), value.long()
        wrong = (words != value) | (words < -1) | (words > self.network.symbols - 2) | ((words >= 0) & ~live)
        tokens = words % self.network.symbols
        if captured():
            log_probs = self.network(tokens, self.context).log_softmax(-1)
            found = log_probs.gather(-1, tokens.expand(*lead, -1)[..., None]).squeeze(-1)
            return torch.where(wrong, -math.inf, torch.where(live, found, 0.0))
        longest = int(live.reshape(-1, self.length).any(0).sum())
        features = self.network.features(tokens[..., :longest], self.context)
        where = live[..., :longest].expand(*lead, -1)
        logits = self.network.head(features[where])
        picked = tokens[..., :longest].expand(*lead, -1)[where]
        log_probs = -nn.functional.cross_entropy(logits, picked, reduction="none")
        found = log_probs.new_zeros(where.shape).masked_scatter(where, log_probs)
        return pad(found, (0, self.length - longest)).masked_fill(wrong, -math.inf)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"value: expected {self.length} tokens, got {value.shape[-1]}")
        return self.by_word(value).sum(-1)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        def draw(logits: Tensor) -> Tensor:
            return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)

        return self._write(torch.Size(sample_shape), draw)

    def greedy(self) -> Tensor:
        """The likeliest word at each place, given those before it, [*B, length]."""
        return self._write(torch.Size(), lambda logits: logits.argmax(-1))

    @torch.no_grad()
    def _write(self, sample_shape: torch.Size, choose: Callable[[Tensor], Tensor]) -> Tensor:
        shape = (*sample_shape, *self.batch_shape)
        context = self.context.expand(*shape, -1).reshape(-1, self.context.shape[-1])
        stop = self.network.symbols - 1
        cache, words = self.network.begin(context.shape[:1], context), []
        ended = torch.zeros(len(context), dtype=torch.bool, device=context.device)
        for place in range(self.length):
            word = choose(self.network.step(cache)).masked_fill(ended, stop)
            words.append(word)
            ended = ended | (word == stop)
            if bool(ended.all()):
                break
            if place + 1 < self.length:
                cache = self.network.append(cache, word)
        y = torch.stack(words, -1)
        y = pad(y.masked_fill(y == stop, -1), (0, self.length - len(words)), value=-1)
        return y.reshape(*shape, self.length)

    def stepwise(self) -> Stepwise:
        """One word after the other, for coding."""

        def begin(n: int) -> tuple[Any, Tensor]:
            context = self.context.reshape(n, -1)
            return self.network.begin(context.shape[:1], context), context.new_zeros(n, dtype=torch.bool)

        def distribution(state: tuple[Any, Tensor]) -> Tokens:
            cache, ended = state
            return Tokens(stopped(self.network.step(cache), ended), -1)

        def append(state: tuple[Any, Tensor], token: Tensor) -> tuple[Any, Tensor]:
            cache, ended = state
            return self.network.append(cache, token.long() % self.network.symbols), ended | (token < 0)

        return Stepwise(begin, distribution, append)


class _Reader(nn.Module):
    """Texts to the parameters of q(z | y): the state of a gated recurrent network after the stop symbol."""

    def __init__(self, symbols: int, width: int, head: encoders.Encoder, dropout: float) -> None:
        super().__init__()
        self.symbols = symbols
        self.embed = nn.Embedding(symbols, width)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.out = nn.Linear(width, head.num_inputs)
        self.head = head

    def embedded(self, y: Tensor) -> Tensor:
        """[B, L] to embeddings [B, L + 1, width], those of the stop symbol after the end."""
        return self.embed(pad(y.long(), (0, 1), value=-1) % self.symbols)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Any:
        """q(z | y) from embeddings [B, T, width], read up to the places ``last`` [B], all by default."""
        states, _ = self.gru(self.dropout(x))
        if last is None:
            final = states[:, -1]
        else:
            index = last[:, None, None].expand(-1, 1, states.shape[-1])
            final = states.gather(1, index).squeeze(1)
        return self.head(self.out(self.dropout(final)))


class SentenceVAE(Pair):
    """p(z) = N(0, I), p(y | z) a text written word by word (:class:`Written`), q(z | y) by a recurrent
    reader. Data [B, length], words 0 … symbols-1, padded with -1.

    The decoder can write well without z, so that KL(q(z | y), p(z)) tends to 0: posterior collapse. Settings
    against it: ``skip``, ``word_dropout``, the weak decoder ``window``, ``encoder="batch_norm"``,
    ``prior="vamp"``; others are objectives and schedules of ``fit`` (docs/collapse.md).

    Parts: ``generator``, ``encoder``, ``prior``. Raises ValueError for data that are not [B, length] (longer
    texts than the decoder was built for), unknown words, and words after a text's end. Cost: the recurrences
    over the longest text of a batch, and a softmax over all symbols for each word.

    Args:
        length: largest number of words of a text.
        symbols: number of words of the vocabulary.
        latent: number of latent dimensions.
        width: number of features of the decoder and of the encoder.
        network: the decoder: ``gru``, or ``window``, which sees the last ``reach`` words only.
        reach: number of words that ``window`` sees.
        skip: the latent joins every input and output of the decoder, beside its start.
        dropout: probability of dropout of features.
        word_dropout: probability with which a word is hidden from the decoder in training.
        prior: p(z), by name (:data:`~pyroelbo.priors.PRIORS`) or a :class:`~pyroelbo.priors.Prior`; the
            pseudo-inputs of ``vamp`` are sequences of word embeddings.
        components: Gaussians of the prior ``mixture``, or pseudo-inputs of ``vamp``.
        encoder: family of q(z | y), by name (:data:`~pyroelbo.encoders.ENCODERS`) or a callable.

    Source: Bowman, Vilnis, Vinyals, Dai, Jozefowicz and Bengio (2016).
    """

    def __init__(
        self,
        length: int,
        symbols: int,
        latent: int = 16,
        width: int = 64,
        network: str = "gru",
        reach: int = 2,
        skip: bool = False,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        prior: str | priors.Prior = "standard",
        components: int = 50,
        encoder: encoders.Choice = "diagonal",
    ) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"network: expected one of {NETWORKS}, got {network!r}")
        for name, value in (("length", length), ("symbols", symbols), ("latent", latent)):
            positive_count(name, value)
        self.length, self.symbols, self.latent, self.components = length, symbols, latent, components
        settings = (symbols + 1, width, latent, skip, dropout, word_dropout)
        self.generator: Any = CausalGRU(*settings) if network == "gru" else CausalWindow(*settings, reach)
        self.encoder = _Reader(symbols + 1, width, encoders.build(encoder, latent), dropout)
        self.prior = priors.build(prior, latent, components, self.encoder, (length + 1, width))

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless y is [B, length] of words, then -1."""
        if y.dim() != 2 or y.shape[1] != self.length:
            raise ValueError(
                f"y: expected texts [B, {self.length}] of at most {self.length} words, padded with -1, got "
                f"{tuple(y.shape)}: cut or pad them (data.strings(texts, length={self.length})), or build a "
                "pair of another length"
            )
        if not captured():
            check_strings(y, self.symbols)

    def observation(self, z: Tensor) -> Written:
        """p(y | z) of codes [*, latent], event shape [length]."""
        return Written(self.generator, z, self.length)

    def encode(self, y: Tensor) -> Any:
        """q(z | y), event shape [latent]."""
        self.check(y)
        last = (y >= 0).sum(-1)
        x = self.encoder.embedded(y)
        return self.encoder(x if captured() else x[:, : int(last.max()) + 1], last)

    def model(self, y: Tensor) -> None:
        self.check(y)
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", self.prior())
            pyro.sample("y", self.observation(z), obs=y)

    def guide(self, y: Tensor) -> None:
        with pyro.plate(PLATE, len(y)):
            self.prior.guide(pyro.sample("z", self.encode(y)))

    @torch.no_grad()
    def initialize(self, y: Tensor) -> SentenceVAE:
        """Initialize the prior from data [N, length] (a VampPrior's pseudo-inputs), if it starts from any;
        returns self."""
        self.check(y)
        if not hasattr(self.prior, "initialize"):
            return self
        some = y[torch.randperm(len(y), device=y.device)[: max(_MOST, self.components)]]
        self.prior.initialize(self.encoder.embedded(some))
        return self

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.length, dtype=torch.long, device=self.device)

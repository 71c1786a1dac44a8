"""Causal networks: logits of every token given the tokens before it, in one pass or one at a time from a
cache."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo.numerics import positive_count, whole_number

__all__ = ["CausalGRU", "CausalText", "CausalTransformer", "CausalWindow", "PixelCNN"]


class CausalTransformer(nn.Module):
    """Tokens [*, T] of 0 … symbols-1 to logits [*, T, symbols]; the logits at t depend on tokens before t
    alone.

    A pre-norm transformer with learned positions; the first token is predicted from a learned start
    embedding. :meth:`begin`, :meth:`append` and :meth:`step` give the same logits one token at a time from
    cached keys and values, O(t) per step.

    Args:
        symbols: number of symbols.
        length: largest number of tokens.
        width: number of features, a multiple of ``heads``.
        layers: number of blocks.
        heads: attention heads of each block.
        dropout: probability of dropout in embeddings and blocks.

    Sources: Vaswani et al. (2017); Radford et al. (2019).
    """

    def __init__(
        self,
        symbols: int,
        length: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        positive_count("width", width, "number of features")
        whole_number("layers", layers, 0, "blocks")
        if width % heads:
            raise ValueError(f"width: expected a multiple of heads={heads}, got {width}")
        self.symbols, self.length = symbols, length
        self.embed = nn.Embedding(symbols + 1, width)  # the last row is the start
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > self.length:
            raise ValueError(f"tokens: expected at most {self.length} of them, got {tokens.shape[-1]}")
        rows = tokens.reshape(-1, tokens.shape[-1])
        start = rows.new_full((len(rows), 1), self.symbols)
        x = self.embed(torch.cat([start, rows[:, :-1]], 1)) + self.places[: rows.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.head(self.norm(x)).reshape(*tokens.shape, self.symbols)

    def begin(self, lead: torch.Size) -> Any:
        """The empty cache, for sequences of batch shape ``lead``."""
        rows = math.prod(lead)
        start = torch.full((rows,), self.symbols, device=self.places.device)
        return lead, start, 0, [None] * len(self.blocks)

    def append(self, cache: Any, token: Tensor) -> Any:
        """The cache after appending ``token`` [*lead]."""
        lead, last, place, memory = cache
        _, memory = self._run(last, place, memory)
        return lead, token.reshape(-1), place + 1, memory

    def step(self, cache: Any) -> Tensor:
        """Logits [*lead, symbols] of the next token."""
        lead, last, place, memory = cache
        x, _ = self._run(last, place, memory)
        return self.head(self.norm(x[:, 0])).reshape(*lead, self.symbols)

    def _run(self, last: Tensor, place: int, memory: list[Any]) -> tuple[Tensor, list[Any]]:
        x = self.dropout(self.embed(last)[:, None] + self.places[place])
        after = []
        for block, past in zip(self.blocks, memory, strict=True):
            x, past = block(x, past)
            after.append(past)
        return x, after


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: Any = None) -> tuple[Tensor, Any]:
        """x [n, t, width] attends to itself causally and to the cached keys and values ``past``."""
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.inwards(self.before(x)).chunk(3, -1)
        )
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        # a single query may attend to everything so far; several queries only occur without a past
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=past is None and x.shape[1] > 1)
        x = x + self.dropout(self.outwards(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.between(x))), (key, value)


class CausalText(nn.Module):
    """Tokens [*, T] of 0 … symbols-1, and a context [*, context] if there is one, to logits [*, T, symbols];
    the logits at t depend on the context and on tokens before t alone (abstract).

    Subclasses turn embedded tokens into features. :meth:`begin`, :meth:`append` and :meth:`step` give the
    same logits one token at a time.

    Args:
        symbols: number of symbols.
        width: number of features, and of each token's embedding.
        context: size of the context vector, 0 for none.
        skip: the context joins every input and every output, beside where it starts.
        dropout: probability of dropout in embeddings and features.
        word_dropout: probability with which, in training, a token is hidden from those after it.

    Sources: Bowman et al. (2016) for a context in front and for word dropout; Dieng, Kim, Rush and Blei
    (2019) for skip connections.
    """

    def __init__(
        self,
        symbols: int,
        width: int = 64,
        context: int = 0,
        skip: bool = False,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        positive_count("width", width, "number of features")
        for name, p in (("dropout", dropout), ("word_dropout", word_dropout)):
            if not 0 <= p <= 1:
                raise ValueError(f"{name}: expected a probability, got {p!r}")
        self.symbols, self.width, self.context = symbols, width, context
        self.skip, self.word_dropout = skip and context > 0, word_dropout
        self.embed = nn.Embedding(symbols + 1, width)  # the last row is the start
        self.dropout = nn.Dropout(dropout)
        beside = context if self.skip else 0
        self.inputs = width + beside
        self.head = nn.Linear(width + beside, symbols)

    @abstractmethod
    def features(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        """What ``head`` reads, [*, T, F]: the logits before the softmax's large matrix."""

    def forward(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        return self.head(self.features(tokens, context))

    def _rows(self, tokens: Tensor, context: Tensor | None) -> tuple[torch.Size, Tensor, Tensor | None]:
        """Leading dimensions, inputs [n, T, inputs] with the start in front, and contexts [n, context]."""
        lead = tokens.shape[:-1]
        if context is not None:
            lead = torch.broadcast_shapes(lead, context.shape[:-1])
            context = context.expand(*lead, -1).reshape(-1, self.context)
        rows = tokens.expand(*lead, -1).reshape(-1, tokens.shape[-1])
        start = rows.new_full((len(rows), 1), self.symbols)
        x = self.embed(torch.cat([start, rows[:, :-1]], 1))
        if self.training and self.word_dropout:
            shown = torch.rand(x.shape[:2], device=x.device) >= self.word_dropout
            shown = torch.cat([torch.ones_like(shown[:, :1]), shown[:, 1:]], 1)
            x = x * shown[..., None]
        return lead, self._beside(self.dropout(x), context), context

    def _beside(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Features [n, T, *] with the context at every place, if it joins them."""
        if not self.skip:
            return x
        assert context is not None
        return torch.cat([x, context[:, None].expand(*x.shape[:-1], -1)], -1)

    def _alone(self, last: Tensor, context: Tensor | None) -> Tensor:
        """The input [n, 1, inputs] of one token."""
        return self._beside(self.dropout(self.embed(last)[:, None]), context)

    def _out(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self._beside(self.dropout(x), context)

    @abstractmethod
    def begin(self, lead: torch.Size, context: Tensor | None = None) -> Any:
        """The empty cache, for sequences of batch shape ``lead``."""

    def _first(self, lead: torch.Size, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The start tokens [n] and the contexts [n, context] of sequences."""
        start = torch.full((math.prod(lead),), self.symbols, device=self.head.weight.device)
        if context is not None:
            context = context.expand(*lead, -1).reshape(-1, self.context)
        return start, context


class CausalGRU(CausalText):
    """A :class:`CausalText` whose features are the states of a gated recurrent network, started from the
    context.

    Cost: O(T · width²) a sequence. Source: Cho et al. (2014).
    """

    def __init__(
        self,
        symbols: int,
        width: int = 64,
        context: int = 0,
        skip: bool = False,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
    ) -> None:
        super().__init__(symbols, width, context, skip, dropout, word_dropout)
        self.start = nn.Linear(context, width) if context else None
        self.gru = nn.GRU(self.inputs, width, batch_first=True)

    def _state(self, rows: int, context: Tensor | None) -> Tensor:
        if self.start is None:
            return self.head.weight.new_zeros(1, rows, self.width)
        assert context is not None
        return torch.tanh(self.start(context))[None]

    def features(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        lead, x, context = self._rows(tokens, context)
        states, _ = self.gru(x, self._state(len(x), context))
        return self._out(states, context).reshape(*lead, *states.shape[1:-1], -1)

    def begin(self, lead: torch.Size, context: Tensor | None = None) -> Any:
        start, context = self._first(lead, context)
        return self._enter(lead, context, self._state(len(start), context), start)

    def _enter(self, lead: torch.Size, context: Tensor | None, state: Tensor, token: Tensor) -> Any:
        states, state = self.gru(self._alone(token, context), state)
        return lead, context, state, states

    def append(self, cache: Any, token: Tensor) -> Any:
        """The cache after appending ``token`` [*lead]."""
        lead, context, state, _ = cache
        return self._enter(lead, context, state, token.reshape(-1))

    def step(self, cache: Any) -> Tensor:
        """Logits [*lead, symbols] of the next token."""
        lead, context, _, states = cache
        return self.head(self._out(states, context))[:, 0].reshape(*lead, -1)


class CausalWindow(CausalText):
    """A :class:`CausalText` that sees no more than the last ``reach`` tokens: embeddings side by side with
    the context, and one hidden layer. Weak on purpose: what lies further back must come through the context.

    Cost: O(T · reach · width²) a sequence. Source: Bengio, Ducharme, Vincent and Jauvin (2003).
    """

    def __init__(
        self,
        symbols: int,
        width: int = 64,
        context: int = 0,
        skip: bool = False,
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        reach: int = 2,
    ) -> None:
        super().__init__(symbols, width, context, skip, dropout, word_dropout)
        self.reach = positive_count("reach", reach, "number of tokens")
        beside = 0 if self.skip else context
        self.inwards = nn.Linear(reach * self.inputs + beside, width)

    def _hidden(self, x: Tensor, context: Tensor | None) -> Tensor:
        """[n, reach - 1 + T, inputs], zeros before the start, to features [n, T, *]."""
        seen = x.unfold(1, self.reach, 1).flatten(2)
        if context is not None and not self.skip:
            seen = torch.cat([seen, context[:, None].expand(*seen.shape[:-1], -1)], -1)
        return self._out(F.silu(self.inwards(seen)), context)

    def features(self, tokens: Tensor, context: Tensor | None = None) -> Tensor:
        lead, x, context = self._rows(tokens, context)
        hidden = self._hidden(F.pad(x, (0, 0, self.reach - 1, 0)), context)
        return hidden.reshape(*lead, *hidden.shape[1:])

    def begin(self, lead: torch.Size, context: Tensor | None = None) -> Any:
        last, context = self._first(lead, context)
        before = self.head.weight.new_zeros(len(last), self.reach - 1, self.inputs)
        return lead, context, torch.cat([before, self._alone(last, context)], 1)

    def append(self, cache: Any, token: Tensor) -> Any:
        """The cache after appending ``token`` [*lead]."""
        lead, context, seen = cache
        new = self._alone(token.reshape(-1), context)
        return lead, context, torch.cat([seen, new], 1)[:, 1:]

    def step(self, cache: Any) -> Tensor:
        """Logits [*lead, symbols] of the next token."""
        lead, context, seen = cache
        return self.head(self._hidden(seen, context))[:, 0].reshape(*lead, -1)


_GAIN = 1.5  # of a gated layer's initial weights


class PixelCNN(nn.Module):
    """Pixels [*, H·W] of 0 … symbols-1, row by row, to logits [*, H·W, symbols], by gated masked
    convolutions.

    Two stacks, so that there is no blind spot: at (i, j) the vertical stack sees the rows above i, the
    horizontal stack the pixels left of j in row i and the vertical stack. :meth:`begin`, :meth:`append` and
    :meth:`step` give the same logits one pixel at a time from cached features, O(layers · channels² · reach²)
    per pixel.

    Args:
        symbols: number of grey levels.
        shape: height and width of the images.
        channels: number of features of each layer.
        layers: number of layers.
        reach: windows are ``2·reach + 1`` pixels wide.
        dropout: probability of dropout of features.

    Source: van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves and Kavukcuoglu (2016), figure 2.
    """

    def __init__(
        self,
        symbols: int,
        shape: Sequence[int],
        channels: int = 32,
        layers: int = 5,
        reach: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(
                f"shape: expected (height, width) of images, got {tuple(shape)}; use network='transformer' "
                "for sequences"
            )
        positive_count("width", channels, "number of channels")
        positive_count("layers", layers, "number of layers")  # without layers a pixel would see itself
        self.symbols, self.shape, self.channels = symbols, tuple(shape), channels
        self.blocks = nn.ModuleList(
            _Gated(2 if i == 0 else channels, channels, reach, i == 0, dropout) for i in range(layers)
        )
        self.head = nn.Sequential(
            nn.SiLU(), nn.Linear(channels, 2 * channels), nn.SiLU(), nn.Linear(2 * channels, symbols)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        height, width = self.shape
        image = self._seen(tokens.reshape(-1, height, width)).movedim(-1, 1)
        vertical = horizontal = image
        for block in self.blocks:
            vertical, horizontal = block(vertical, horizontal)
        return self.head(horizontal.movedim(1, -1)).reshape(*tokens.shape, self.symbols)

    def _seen(self, tokens: Tensor) -> Tensor:
        """Two features of a pixel: its level in [-1, 1], and 1, which tells it from padding."""
        level = 2 * tokens.to(self._like.dtype) / (self.symbols - 1) - 1
        return torch.stack([level, torch.ones_like(level)], -1)

    @property
    def _like(self) -> Tensor:
        return next(self.parameters())

    def begin(self, lead: torch.Size) -> Any:
        """The empty cache, for images of batch shape ``lead``."""
        height, width = self.shape
        rows, like = math.prod(lead), self._like
        sizes = [2, *[self.channels] * len(self.blocks)]
        maps = [[like.new_zeros(rows, c, height, width) for c in sizes] for _ in range(2)]
        cache = (lead, maps[0], maps[1], 0)
        self._fill(cache)
        return cache

    def append(self, cache: Any, token: Tensor) -> Any:
        """The cache after appending ``token`` [*lead]; the old one is invalid, as its maps are written in
        place."""
        lead, vertical, horizontal, place = cache
        i, j = divmod(place, self.shape[1])
        for maps in (vertical, horizontal):
            maps[0][:, :, i, j] = self._seen(token.reshape(-1))
        cache = (lead, vertical, horizontal, place + 1)
        if place + 1 < math.prod(self.shape):
            self._fill(cache)
        return cache

    def _fill(self, cache: Any) -> None:
        """Compute the features of the next pixel, and at the start of a row the vertical features of the
        row."""
        _, vertical, horizontal, place = cache
        i, j = divmod(place, self.shape[1])
        block: Any
        for layer, block in enumerate(self.blocks):
            if j == 0:
                vertical[layer + 1][:, :, i] = block.row(vertical[layer], i)
            horizontal[layer + 1][:, :, i, j] = block.pixel(vertical[layer + 1], horizontal[layer], i, j)

    def step(self, cache: Any) -> Tensor:
        """Logits [*lead, symbols] of the next pixel."""
        lead, _, horizontal, place = cache
        i, j = divmod(place, self.shape[1])
        return self.head(horizontal[-1][:, :, i, j]).reshape(*lead, self.symbols)


class _Gated(nn.Module):
    """One layer of both stacks. The first layer excludes the pixel itself from the horizontal stack, and
    shifts the vertical stack down by one row, so that it never sees its own row."""

    def __init__(self, inputs: int, channels: int, reach: int, first: bool, dropout: float) -> None:
        super().__init__()
        self.first, self.reach = first, reach
        self.down = nn.Conv2d(inputs, 2 * channels, (reach + 1, 2 * reach + 1))
        self.across = nn.Conv2d(inputs, 2 * channels, (1, reach + (0 if first else 1)))
        self.link = nn.Conv2d(channels, 2 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.dropout = nn.Dropout2d(dropout)
        for conv in (self.down, self.across, self.link, self.out):
            # a gate halves its input or so; with torch's default, deep vertical features would vanish
            nn.init.normal_(conv.weight, std=_GAIN / conv.weight[0].numel() ** 0.5)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        r, first = self.reach, int(self.first)
        height, width = vertical.shape[-2:]
        # the first layer sees the reach + 1 rows above, later layers their own row and those above
        up = _gate(self.down(F.pad(vertical, (r, r, r + first, 0)))[..., :height, :])
        left = self.across(F.pad(horizontal, (r, 0, 0, 0)))[..., :width]
        return up, self._join(up, left, horizontal)

    def _join(self, up: Tensor, left: Tensor, before: Tensor) -> Tensor:
        new = self.out(self.dropout(_gate(left + self.link(up))))
        return new if self.first else before + new

    def row(self, vertical: Tensor, i: int) -> Tensor:
        """The vertical features [n, channels, W] of row i, from the map of the layer below."""
        r, end = self.reach, i + 1 - int(self.first)
        rows = vertical[:, :, max(0, end - r - 1) : end]
        return _gate(self.down(F.pad(rows, (r, r, r + 1 - rows.shape[2], 0))))[:, :, 0]

    def pixel(self, up: Tensor, horizontal: Tensor, i: int, j: int) -> Tensor:
        """The horizontal features [n, channels] of pixel (i, j), from the vertical map of this layer and the
        horizontal one below."""
        window, end = self.across.kernel_size[1], j + 1 - int(self.first)
        row = horizontal[:, :, i : i + 1, max(0, end - window) : end]
        left = self.across(F.pad(row, (window - row.shape[3], 0)))
        return self._join(up[:, :, i : i + 1, j : j + 1], left, horizontal[:, :, i : i + 1, j : j + 1])[
            ..., 0, 0
        ]


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)

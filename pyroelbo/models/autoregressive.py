"""Autoregressive models as Markovian pairs: the encoder drops the last token, so the bound is exact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import pad

from pyroelbo.models.chain import SharedPath
from pyroelbo.models.precision import exact
from pyroelbo.nn.causal import CausalTransformer, PixelCNN
from pyroelbo.numerics import positive_count, positive_shape, whole_number
from pyroelbo.pair import PLATE, ExactPair, Stepwise

__all__ = ["Append", "Autoregressive", "Prefix", "Strings", "Tokens"]

NETWORKS = ("pixelcnn", "transformer")
_ROWS = 128  # of a pass without gradients


class CausalNetwork(Protocol):
    """Logits of every token given the tokens before it, in one pass or one at a time."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """[*, T] integers to logits [*, T, V]; the logits at t depend on tokens before t alone."""

    def begin(self, lead: torch.Size) -> Any:
        """The empty cache, for sequences of batch shape ``lead``."""

    def step(self, cache: Any) -> Tensor:
        """Logits [*lead, V] of the next token."""

    def append(self, cache: Any, token: Tensor) -> Any:
        """The cache after appending ``token`` [*lead]."""


def check_tokens(y: Tensor, lowest: int, highest: int) -> None:
    """Raise ValueError, naming the token and its place, for the first that is no integer in [lowest,
    highest]."""
    wrong = (y < lowest) | (y > highest) | (y != y.long())
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"y: expected integers in [{lowest}, {highest}], got {float(y[row, place]):.6g} at row {row}, "
            f"place {place}"
        )


def check_strings(y: Tensor, symbols: int) -> None:
    """Raise ValueError, naming row and place, unless the rows of y [B, L] are symbols 0 … ``symbols`` - 1,
    then -1."""
    check_tokens(y, -1, symbols - 1)
    late = (y[:, :-1] < 0) & (y[:, 1:] >= 0)
    if bool(late.any()):
        row, place = late.nonzero()[0].tolist()
        raise ValueError(
            f"y: expected only -1 after the first -1 of a row, got {int(y[row, place + 1])} at row {row}, "
            f"place {place + 1}; that string ends at place {place}"
        )


def stopped(logits: Tensor, ended: Tensor) -> Tensor:
    """Logits [*, symbols], with all mass on the last, the stop symbol, where ``ended`` [*]."""
    stop = pad(logits.new_full((logits.shape[-1] - 1,), -math.inf), (0, 1))
    return torch.where(ended[..., None], stop, logits)


class Prefix(TorchDistribution):
    """Point mass on a sequence ``prefix`` [*, t], event shape [t]: q(z | y) when z drops the last tokens of
    y."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)
    point_mass = True

    def __init__(self, prefix: Tensor) -> None:
        self.prefix = prefix
        super().__init__(prefix.shape[:-1], prefix.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.real, 1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Prefix:
        return Prefix(self.prefix.expand(*batch_shape, -1))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self.prefix.expand(*sample_shape, *self.prefix.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 at the prefix, -inf elsewhere."""
        return _where_equal(value, self.prefix, torch.zeros((), device=value.device))


class Append(TorchDistribution):
    """p(z | above), which appends one token: ln softmax(logits)[last token of z] if the rest of z is
    ``above``, else -inf. ``above`` [*, t], ``logits`` [*, V]; event shape [t + 1]. Tokens are ``lowest`` …
    ``lowest`` + V - 1; token i has the logit i mod V, so -1 has the last one.

    ``known`` is a continuation [*, t + 1] of ``above`` and its log probability [*], if that has been
    computed.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(
        self, above: Tensor, logits: Tensor, known: tuple[Tensor, Tensor] | None = None, lowest: int = 0
    ) -> None:
        self.above, self.logits, self.known, self.lowest = above, logits, known, lowest
        lead = _broadcast(above.shape[:-1], logits.shape[:-1])
        super().__init__(lead, torch.Size([above.shape[-1] + 1]), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        tokens = constraints.integer_interval(self.lowest, self._highest)
        return constraints.independent(tokens, 1)

    @property
    def _highest(self) -> int:
        return self.lowest + self.logits.shape[-1] - 1

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> Append:
        above, logits = self.above.expand(*batch_shape, -1), self.logits.expand(*batch_shape, -1)
        return Append(above, logits, self.known, self.lowest)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = (*sample_shape, *self.batch_shape)
        probs = self.logits.softmax(-1).expand(*shape, -1)
        token = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1).reshape(*shape, 1)
        token = (token - self.lowest) % probs.shape[-1] + self.lowest
        return torch.cat([self.above.expand(*shape, -1), token.to(self.above.dtype)], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if value.shape[-1:] != self.event_shape:
            raise ValueError(f"value: expected {self.event_shape[0]} tokens, got {value.shape[-1]}")
        if self.known is not None and _same_place(value, self.known[0]):
            return self.known[1].expand(_broadcast(value.shape[:-1], self.batch_shape))
        last = value[..., -1:]
        token = last.long().clamp(self.lowest, self._highest)
        lead = _broadcast(token.shape[:-1], self.logits.shape[:-1])
        log_probs = self.logits.log_softmax(-1).expand(*lead, -1)
        found = log_probs.gather(-1, (token % log_probs.shape[-1]).expand(*lead, 1))
        found = torch.where(token == last, found, found.new_tensor(-math.inf)).squeeze(-1)
        return _where_equal(value[..., :-1], self.above, found)


class Tokens(TorchDistribution):
    """The next token, ``lowest`` … ``lowest`` + V - 1, of logits [*, V]; token i has the logit i mod V."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(self, logits: Tensor, lowest: int = 0) -> None:
        self.logits, self.lowest = logits, lowest
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.integer_interval(self.lowest, self.lowest + self.logits.shape[-1] - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        symbol = value.long() % self.logits.shape[-1]
        lead = _broadcast(symbol.shape, self.batch_shape)
        log_probs = self.logits.log_softmax(-1).expand(*lead, -1)
        return log_probs.gather(-1, symbol.expand(lead).unsqueeze(-1)).squeeze(-1)


def _where_equal(value: Tensor, prefix: Tensor, log_prob: Tensor) -> Tensor:
    """``log_prob`` where both sequences are equal, else -inf; views of the same memory are not compared."""
    lead = _broadcast(value.shape[:-1], prefix.shape[:-1], log_prob.shape)
    if value.numel() == 0 or _same_place(value, prefix):
        return log_prob.expand(lead)
    equal = (value == prefix).all(-1)
    return torch.where(equal, log_prob, log_prob.new_tensor(-math.inf)).expand(lead)


def _broadcast(*shapes: torch.Size) -> torch.Size:
    """torch.broadcast_shapes, whose 50 microseconds are spent only on shapes that differ."""
    return shapes[0] if len(set(shapes)) == 1 else torch.broadcast_shapes(*shapes)


def _same_place(value: Tensor, prefix: Tensor) -> bool:
    """Whether both are views of the same memory, up to expanded dimensions."""
    if value.data_ptr() != prefix.data_ptr() or value.shape[-1] != prefix.shape[-1]:
        return False
    return value.stride() == prefix.stride() or _strides(value) == _strides(prefix)


def _strides(x: Tensor) -> list[tuple[int, int]]:
    return [(n, s) for n, s in zip(x.shape, x.stride(), strict=True) if s and n > 1]


class Autoregressive(ExactPair):
    """p(y) = Π_t p(y_t | y_<t) over sequences of T tokens, as the chain of their prefixes. Data [B, T],
    integers of any dtype.

    z_l is y without its last l tokens, a latent site each: the generator's link p(z_{l-1} | z_l) appends one
    token, with the term ln p(y_{T-l+1} | y_{≤T-l}), and the encoder drops the last token. That is the
    generator's own posterior, so the ELBO equals ln p(y) for every draw. T is fixed, so there is no stop
    symbol (:class:`Strings` have one). ``sites`` are "z_{T-1}" (one token) to "z_1".

    When a model is replayed against its guide, all terms come from one pass of the network; otherwise, as in
    simulation, tokens are appended one at a time with the network's cache.

    Part: ``generator``. Cost: one pass of the network and T sites per batch; simulation takes T cached steps.

    Args:
        shape: T, or (height, width) of images, row by row.
        levels: number of symbols of ``categorical``.
        likelihood: ``bernoulli`` (symbols 0 and 1) or ``categorical`` (0 … levels-1).
        network: ``pixelcnn``, ``transformer``, or a :class:`CausalNetwork`.
        width: number of features of a named network.
        layers: number of its layers.
        dropout: probability of dropout in it.

    Sources: van den Oord et al. (2016); Vaswani et al. (2017).
    """

    latent = "z_1"
    lowest = 0  # token i is the network's symbol i mod symbols

    def __init__(
        self,
        shape: int | Sequence[int],
        levels: int = 256,
        likelihood: str = "bernoulli",
        network: str | nn.Module = "pixelcnn",
        width: int = 32,
        layers: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if likelihood not in ("bernoulli", "categorical"):
            raise ValueError(f"likelihood: expected 'bernoulli' or 'categorical', got {likelihood!r}")
        self.shape = positive_shape(shape)
        self.length, self.levels = math.prod(self.shape), levels
        self.symbols = 2 if likelihood == "bernoulli" else levels
        whole_number("levels", self.symbols, 2, "symbols")
        if self.length < 2:
            raise ValueError(f"shape: expected at least 2 tokens, got {shape!r}")
        if isinstance(network, nn.Module):
            self.generator = network
        elif network == "pixelcnn":
            self.generator = PixelCNN(self.symbols, self.shape, width, layers, dropout=dropout)
        elif network == "transformer":
            self.generator = CausalTransformer(self.symbols, self.length, width, layers, dropout=dropout)
        else:
            raise ValueError(f"network: expected one of {NETWORKS} or a module, got {network!r}")

    @property
    def exact_guide(self) -> bool:
        """True: dropping tokens is the exact posterior."""
        return True

    @property
    def depth(self) -> int:
        """The number of latents, T - 1."""
        return self.length - 1

    @property
    def sites(self) -> tuple[str, ...]:
        """The latent sites in the generator's order, shortest prefix first."""
        return tuple(f"z_{layer}" for layer in range(self.depth, 0, -1))

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless y is [B, T]."""
        if y.dim() != 2 or y.shape[1] != self.length:
            raise ValueError(f"y: expected shape [B, {self.length}], got {tuple(y.shape)}")

    def logits(self, y: Tensor) -> Tensor:
        """Logits [B, T, symbols] of every token given the tokens before it, in one pass.

        Raises ValueError, naming the token and its place, for unknown tokens; checked if Pyro's validation is
        on or gradients are off.
        """
        if is_validation_enabled() or not torch.is_grad_enabled():
            self.check_tokens(y)
        return self.generator(self.number(y))

    def check_tokens(self, y: Tensor) -> None:
        """Raise ValueError, naming the token and its place, for the first unknown token."""
        check_tokens(y, self.lowest, self.lowest + self.symbols - 1)

    def number(self, y: Tensor) -> Tensor:
        """The network's symbols of tokens, 0 … symbols-1."""
        return y.long() % self.symbols if self.lowest else y.long()

    def link(self, above: Tensor, logits: Tensor) -> Append:
        """p(next prefix | above), given the network's logits of the next token."""
        return Append(above, logits, lowest=self.lowest)

    def model(self, y: Tensor) -> None:
        self.check(y)
        ahead: _Ahead | None = None  # one pass over y, if the draws are known to be its prefixes
        cache: Any = self.generator.begin(torch.Size([]))
        p = self.link(y[:, :0], self.generator.step(cache))
        with pyro.plate(PLATE, len(y)), SharedPath(self) as shared:
            for site in self.sites:
                z = pyro.sample(site, p)
                known = shared.path(site, z)
                if known is not None:
                    ahead, cache = ahead or _Ahead(self, known), None
                    p = ahead.append(z)
                else:
                    cache, p = self.append(cache, z)
            pyro.sample("y", p, obs=y)

    def append(self, cache: Any, z: Tensor) -> tuple[Any, Append]:
        """The cache after z, whose last token is new, and p(next prefix | z); without a cache, z is
        replayed."""
        tokens = self.number(z)
        if cache is None or z.shape[-1] == 1:
            cache = self.generator.begin(z.shape[:-1])
            for token in tokens[..., :-1].unbind(-1):
                cache = self.generator.append(cache, token)
        cache = self.generator.append(cache, tokens[..., -1])
        return cache, self.link(z, self.generator.step(cache))

    def guide(self, y: Tensor) -> None:
        self.check(y)
        with pyro.plate(PLATE, len(y)):
            for layer in range(1, self.length):
                path: dict[str, Any] = {}
                z = pyro.sample(f"z_{layer}", Prefix(y[:, : self.length - layer]), infer={"path": path})
                path.update(SharedPath.on(self, z, y))

    def log_evidence(self, y: Tensor) -> Tensor:
        """ln p(y), [B], in nats, summed in float64 without gradients; then in blocks of rows, so that memory
        is bounded."""
        self.check(y)
        if not torch.is_grad_enabled():
            self.check_tokens(y)  # before the split, so that an error names the row in y
        blocks = [y] if torch.is_grad_enabled() else y.split(_ROWS)
        found = [
            exact(self.logits(b)).log_softmax(-1).gather(-1, self.number(b)[..., None]).sum((-2, -1))
            for b in blocks
        ]
        return torch.cat(found)

    def posterior(self, y: Tensor) -> Prefix:
        """p(z_1 | y), a point mass on y without its last token, which determines the other prefixes."""
        self.check(y)
        return Prefix(y[:, :-1])

    def stepwise(self) -> Stepwise:
        def distribution(state: tuple[Any, Tensor]) -> Tokens:
            cache, above = state
            return Tokens(self.link(above, self.generator.step(cache)).logits, self.lowest)

        def append(state: tuple[Any, Tensor], token: Tensor) -> tuple[Any, Tensor]:
            cache, above = state
            cache = self.generator.append(cache, self.number(token))
            return cache, torch.cat([above, token.unsqueeze(-1)], -1)

        def begin(n: int) -> tuple[Any, Tensor]:
            above = torch.zeros(n, 0, dtype=torch.long, device=self.device)
            return self.generator.begin(above.shape[:1]), above

        return Stepwise(begin, distribution, append)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        first = next(self.parameters())
        return torch.zeros(n, self.length, dtype=first.dtype, device=first.device)


class Strings(Autoregressive):
    """p(y) = Π_t p(y_t | y_<t) · p(stop | y) over strings of 0 … ``length`` symbols.

    Data [B, length], integers, padded with -1 (:func:`pyroelbo.data.strings` makes them). The first -1 is the
    stop symbol, with its own term ln p(stop | y_<t); after it everything is -1 with probability one, so that
    padding adds exactly 0. A string of ``length`` symbols stops with probability one. The probabilities of
    all strings sum to one; otherwise as :class:`Autoregressive`: the sites are the prefixes, and the ELBO is
    ln p(y). Drawing ends when all strings have stopped.

    Raises ValueError, naming row and place, for unknown symbols and for symbols after a string's end.

    Args:
        length: largest number of symbols, at least 2.
        symbols: number of symbols, 0 … symbols-1.
        network: ``transformer``, or a :class:`CausalNetwork` over symbols + 1 tokens, the last the stop
            symbol.
        width: number of features of the transformer.
        layers: number of its layers.
        dropout: probability of dropout in it.
    """

    lowest = -1

    def __init__(
        self,
        length: int,
        symbols: int,
        network: str | nn.Module = "transformer",
        width: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        whole_number("length", length, 2, "symbols")
        positive_count("symbols", symbols, "number of symbols")
        super().__init__(length, symbols + 1, "categorical", network, width, layers, dropout)

    def check_tokens(self, y: Tensor) -> None:
        check_strings(y, self.symbols - 1)

    def logits(self, y: Tensor) -> Tensor:
        ended = pad(y[..., :-1] < 0, (1, 0))
        return stopped(super().logits(y), ended)

    def link(self, above: Tensor, logits: Tensor) -> Append:
        return super().link(above, stopped(logits, above[..., -1] < 0) if above.shape[-1] else logits)

    def append(self, cache: Any, z: Tensor) -> tuple[Any, Append]:
        if not torch.is_grad_enabled() and bool((z[..., -1] < 0).all()):
            return None, self.link(z, next(self.parameters()).new_zeros(self.symbols))
        return super().append(cache, z)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        return torch.zeros(n, self.length, dtype=torch.long, device=self.device)


class _Ahead:
    """The links of all prefixes of y, computed in one pass of the network."""

    def __init__(self, pair: Autoregressive, y: Tensor) -> None:
        self.y, self.lowest = y, pair.lowest
        logits = pair.logits(y)
        log_probs = logits.log_softmax(-1).gather(-1, pair.number(y)[..., None]).squeeze(-1)
        self.logits, self.log_probs = logits.unbind(-2), log_probs.unbind(-1)

    def append(self, z: Tensor) -> Append:
        """p(next prefix | z) for a prefix z of y."""
        place = z.shape[-1]
        known = self.y[:, : place + 1], self.log_probs[place]
        return Append(z, self.logits[place], known, self.lowest)

"""Masked diffusion: tokens are revealed in a random order, one at a time or many, given those revealed
before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.models.diffusion import SampledTerms
from pyroelbo.models.precision import exact_dtype
from pyroelbo.models.rows import Rows, class_count
from pyroelbo.nn import TokenConv, TokenMLP, TokenTransformer, bounded
from pyroelbo.numerics import logsumexp, positive_count, positive_shape, whole_number
from pyroelbo.pair import PLATE, ExactPair, LatentPath, Stepwise, evaluation_mode

__all__ = ["MaskedDiffusion", "Orders"]

NETWORKS = ("mlp", "conv", "transformer")
LIKELIHOODS = ("bernoulli", "discretized_logistic", "categorical")
_MOST = 16  # dimensions whose subsets are summed exactly
_CELLS = 2**17  # (row, subset) pairs in one pass of the network


class _Tokens(nn.Module):
    """What both forms share: the network and what it says of masked tokens."""

    generator: nn.Module
    dims: int
    levels: int
    likelihood: str

    @property
    def support(self) -> Any:
        """The values of one token."""
        return constraints.integer_interval(0, self.levels - 1)

    def log_probs(self, y: Tensor, masked: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(y_i = v | the tokens that are not masked), [*, D, levels], for every i; only those of masked
        places mean anything."""
        told = {} if labels is None else {"labels": labels}
        return self._normalized(self.generator(torch.where(masked, self.levels, y.long()), **told))

    def by_step(self, y: Tensor, order: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(y_σ(k) | y_σ(<k)), [*, D], k = 0 … D-1, of the place of step k in ``order`` [*, D]."""
        if not isinstance(self.generator, TokenMLP):
            return torch.stack([_reveal(self, y, labels, order, k) for k in range(self.dims)], -1)
        y, places = y.long().expand(order.shape), order.argsort(-1)
        found = self._normalized(self.generator.one_by_one(y, places, labels))
        return found.gather(-1, y.gather(-1, places).unsqueeze(-1)).squeeze(-1)

    def _normalized(self, out: Tensor) -> Tensor:
        if self.likelihood == "discretized_logistic":
            return ordinal(out, self.levels)
        if out.shape[-1] == 2:  # torch's softmax of two is slow
            out = out.to(torch.promote_types(out.dtype, torch.float32))
            logit = out[..., 1] - out[..., 0]
            return torch.stack([nn.functional.logsigmoid(-logit), nn.functional.logsigmoid(logit)], -1)
        return out.log_softmax(-1)


class MaskedDiffusion(_Tokens, SampledTerms):
    """Absorbing diffusion of symbols 0 … levels-1 without a limit of steps, trained by *count*. Data [B, D],
    integers of any dtype.

    Every place is masked with probability t ~ U(0, 1), so that the number k of masked places is uniform on 0
    … D, and a term of the bound is (D + 1)/k Σ_masked ln p(y_i | the others). Its mean is the continuous-time
    bound E_t[1/t Σ_masked ln p(y_i | z_t)], whatever the schedule, and the average of ln p(y | σ) = Σ_k ln
    p(y_σ(k) | y_σ(<k)) over all orders σ, because the network is not told the time. :meth:`written_out` has
    the order as latent.

    Part: ``generator``, a network from tokens [*, D], ``levels`` at masked places, to [*, D, outputs]. Raises
    ValueError, naming the place, for tokens outside 0 … levels-1.

    Args:
        shape: number of tokens D, or (height, width) for ``network="conv"``.
        levels: number of symbols; the mask is one more.
        likelihood: of a masked token: ``bernoulli`` (two symbols), ``categorical``, or
            ``discretized_logistic`` (a mixture of ``components`` logistics on 0 … levels-1, for grey levels).
        network: ``mlp``, ``conv``, ``transformer``, or a module.
        width: number of features of a named network.
        layers: number of its layers.
        dropout: probability of dropout in it.
        components: number of logistics.
        classes: number of classes of a conditional pair: batches are (labels, y), bounds are on ln p(y |
            label), ``simulate(n, labels)`` draws by class, and the network is called with ``labels=`` [*].

    Source: Uria, Murray and Larochelle (2014) for orders; Hoogeboom et al. (2022), equations 3 to 5; Shi et
        al.
    (2024) for continuous time; Salimans et al. (2017) for mixtures of logistics.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        levels: int = 2,
        likelihood: str = "bernoulli",
        network: str | nn.Module = "mlp",
        width: int = 128,
        layers: int = 3,
        dropout: float = 0.0,
        components: int = 5,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        self.classes = class_count(classes)
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood: expected one of {LIKELIHOODS}, got {likelihood!r}")
        self.shape = positive_shape(shape)
        self.dims, self.likelihood = math.prod(self.shape), likelihood
        self.levels = 2 if likelihood == "bernoulli" else levels
        positive_count("components", components, "number of logistics")
        whole_number("levels", self.levels, 2, "symbols")
        self.terms = self.dims + 1.0
        outputs = 3 * components if likelihood == "discretized_logistic" else self.levels
        self.generator = self._network(network, outputs, width, layers, dropout)

    def _network(
        self, network: str | nn.Module, outputs: int, width: int, layers: int, dropout: float
    ) -> nn.Module:
        symbols = self.levels + 1
        if isinstance(network, nn.Module):
            return network
        if network == "mlp":
            return TokenMLP(self.dims, self.levels, outputs, width, layers, dropout, False, self.classes)
        if network == "transformer":
            return TokenTransformer(self.dims, symbols, outputs, width, layers, 4, dropout, self.classes)
        if network == "conv":
            if len(self.shape) != 2:
                raise ValueError(f"shape: expected (height, width) for network='conv', got {self.shape}")
            return TokenConv(self.shape, symbols, outputs, width, layers, dropout, self.classes)
        raise ValueError(f"network: expected one of {NETWORKS} or a module, got {network!r}")

    def noise_law(self) -> Any:
        like = next(self.generator.parameters())
        return dist.Uniform(like.new_zeros(self.dims), 1.0).to_event(1)

    def term(self, y: Tensor, time: Tensor, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """1/k Σ_masked ln p(y_i | the others), [*], places with ``noise`` below ``time`` masked; zero for k =
        0."""
        masked = noise < time[..., None]
        y = y.long().expand(masked.shape)
        found = self.log_probs(y, masked, labels).gather(-1, y.unsqueeze(-1)).squeeze(-1)
        total = torch.where(masked, found, found.new_zeros(())).sum(-1)
        return total / masked.sum(-1).clamp_min(1)

    def written_out(self) -> Orders:
        """The pair whose latent is the order in which tokens are revealed, with the same parameters."""
        return Orders(self)

    def stepwise(self, *given: Tensor) -> Stepwise | None:
        """ln p(y | order) token by token, in an order of its own for each row, from a fixed seed: on average
        over orders the bound; of the labels [n] that are ``given`` if there are classes, None where they
        are not. D passes of the network."""
        if self.classes is not None and not given:
            return None
        labels = self.labels_for(len(given[0]) if given else 1, given)

        def order(n: int) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            rows = [torch.randperm(self.dims, generator=generator) for _ in range(n)]
            return torch.stack(rows).to(self.device)

        def begin(n: int) -> tuple[Tensor, Tensor, Tensor]:
            places = order(n)
            return places, torch.zeros_like(places), torch.ones_like(places, dtype=torch.bool)

        def distribution(state: tuple[Tensor, Tensor, Tensor]) -> dist.Categorical:
            left, y, masked = state
            at = left[:, :1, None].expand(-1, -1, self.levels)
            return dist.Categorical(logits=self.log_probs(y, masked, labels).gather(1, at).squeeze(1))

        def append(state: tuple[Tensor, Tensor, Tensor], token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            left, y, masked = state
            at = left[:, :1]
            return left[:, 1:], y.scatter(1, at, token.long().unsqueeze(1)), masked.scatter(1, at, False)

        return Stepwise(begin, distribution, append, order)

    @torch.no_grad()
    def simulate(self, n: int, *given: Tensor, like: Any = None) -> tuple[dict[str, Tensor], Batch]:
        """Draw n data in random orders, D passes of the network, of the labels [n] that are given if there
        are classes."""
        return {}, self.written_out().simulate(n, *given, like=like)[1]

    @torch.no_grad()
    def inpaint(
        self, y: Tensor, known: Tensor, steps: int | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Draws of the tokens where ``known`` [*, D] is False, given the others and, if there are classes,
        ``labels`` [*]; [*, D].

        Places are revealed in random order, one at a time, or all in ``steps`` passes of the network: tokens
        of one pass are drawn independently, so that few steps sample another model.
        """
        steps = self.dims if steps is None else positive_count("steps", steps, "number of passes")
        masked = ~known.expand(y.shape)
        rank = torch.where(masked, torch.rand(y.shape, device=y.device), 2.0).argsort(-1).argsort(-1)
        hidden = masked.sum(-1, keepdim=True)
        x = torch.where(masked, 0, y.long())
        with evaluation_mode(self):
            for step in range(min(steps, int(hidden.max()))):
                until = (hidden * (step + 1) / steps).ceil()
                chosen = masked & (rank < (until if steps < self.dims else step + 1))
                drawn = dist.Categorical(logits=self.log_probs(x, masked, labels)).sample()
                x, masked = torch.where(chosen, drawn, x), masked & ~chosen
        return x.to(y.dtype)


def ordinal(out: Tensor, levels: int) -> Tensor:
    """ln P(0 … levels-1) [*, levels] of a mixture of discretized logistics, from ``out`` [*, 3·M]: logits,
    centres and log inverse scales in units of half the range.

    Starts near uniform for ``out`` = 0. Probabilities are kept above 1e-7/levels by a uniform share.
    """
    logits, loc, sharp = out.unflatten(-1, (3, -1)).unbind(-2)
    half = (levels - 1) / 2
    count = loc.shape[-1]
    start = torch.linspace(-1, 1, count, dtype=out.dtype, device=out.device) if count > 1 else 0.0
    loc = half * (1 + loc + start)
    scale = 0.1 * half * (-bounded(sharp, 6)).exp()
    edges = torch.arange(levels - 1, dtype=out.dtype, device=out.device) + 0.5
    below = torch.sigmoid((edges[:, None] - loc.unsqueeze(-2)) / scale.unsqueeze(-2))
    below = (below * logits.softmax(-1).unsqueeze(-2)).sum(-1)
    below = torch.cat([torch.zeros_like(below[..., :1]), below, torch.ones_like(below[..., :1])], -1)
    return (below.diff(dim=-1).clamp_min(0) * (1 - 1e-7) + 1e-7 / levels).log()


class Orders(Rows, _Tokens, ExactPair):
    """The evidence form of a :class:`MaskedDiffusion`: the latent ``order`` [B, D] says at which step 0 … D-1
    each token is revealed.

    p(y) = (1/D!) Σ_σ Π_k p(y_σ(k) | y_σ(<k)); prior and guide are uniform over orders, so that the ELBO is
    the order average and IW-K averages K orders. Cost: D passes of the network an order. The evidence and the
    posterior are exact for D ≤ 16, by a dynamic program over the 2^D sets of revealed tokens."""

    latent = "order"
    exact_guide = False  # type: ignore[assignment]

    def __init__(self, pair: MaskedDiffusion) -> None:
        super().__init__()
        self.generator, self.label = pair.generator, f"{pair.name}, written out"
        self.classes = pair.classes
        self.dims, self.levels, self.likelihood = pair.dims, pair.levels, pair.likelihood

    @property
    def name(self) -> str:
        return self.label

    def model(self, *batch: Tensor, **named: Tensor) -> None:
        y, labels = self.split(*batch, **named)
        with pyro.plate(PLATE, len(y)):
            order = pyro.sample("order", self._orders())
            pyro.sample("y", _Revealed(self, order, labels), obs=y)

    def guide(self, *batch: Tensor, **named: Tensor) -> None:
        y, _ = self.split(*batch, **named)
        with pyro.plate(PLATE, len(y)):
            pyro.sample("order", self._orders())

    def _orders(self) -> _Uniform:
        return _Uniform(self.dims, next(self.generator.parameters()).device)

    def latent_path(self, *batch: Tensor, **named: Tensor) -> LatentPath:
        """The places revealed so far, [K, B, D], with their steps and D elsewhere: one more a step,
        uniform."""
        y, labels = self.split(*batch, **named)

        def choose(step: int, past: Tensor | None) -> Any:
            if past is None:
                past = torch.full((1, len(y), self.dims), self.dims, device=y.device)
            return _Next(past, step)

        def emission(step: int, z: Tensor) -> Tensor:
            return _reveal(self, y, labels, z, step)

        return LatentPath(self.dims, choose, choose, emission)

    def log_evidence(self, *batch: Tensor, **named: Tensor) -> Tensor:
        """ln p(y), [B], in nats, by the dynamic program; :class:`Unavailable` for D > 16."""
        return self._tables(*self.split(*batch, **named))[1][:, 0]

    def posterior(self, *batch: Tensor, **named: Tensor) -> _Posterior:
        """p(order | y); :class:`Unavailable` for D > 16."""
        return _Posterior(*self._tables(*self.split(*batch, **named)))

    def _tables(self, y: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """ln p(y_i | y_S) [B, 2^D, D], -inf for i in S, and ln p(y_rest | y_S) [B, 2^D], for all sets S of
        revealed tokens, as bits."""
        dims, told = self.dims, None if labels is None else labels[:, None]
        if dims > _MOST:
            raise Unavailable(f"the 2^D sets of revealed tokens are summed for D ≤ {_MOST}, got D = {dims}")
        sets = torch.arange(2**dims, device=y.device)
        shown = (sets[:, None] >> torch.arange(dims, device=y.device)) & 1 == 1
        links = []
        for some in shown.split(max(1, _CELLS // (len(y) * dims))):
            rows = y.long()[:, None].expand(-1, len(some), -1)
            found = self.log_probs(rows, ~some.expand(rows.shape), told)
            found = found.gather(-1, rows.unsqueeze(-1)).squeeze(-1)
            links.append(found.masked_fill(some, -math.inf).to(exact_dtype(found)))
        link = torch.cat(links, 1)
        size = shown.sum(1)
        total = [link.new_zeros(len(y), 1)]  # of all tokens: nothing is left
        where = torch.empty_like(sets)  # of a set within those of its size
        for k in range(dims + 1):
            where[size == k] = torch.arange(math.comb(dims, k), device=y.device)
        for k in range(dims - 1, -1, -1):
            own = (size == k).nonzero()[:, 0]
            larger = own[:, None] | (1 << torch.arange(dims, device=y.device))
            rest = total[-1][:, where[larger].clamp_max(total[-1].shape[1] - 1)]
            total.append(logsumexp(link[:, own] + rest, -1) - math.log(dims - k))
        value = link.new_zeros(len(y), len(sets))
        by_size = torch.cat(total[::-1], 1)
        order = torch.cat([(size == k).nonzero()[:, 0] for k in range(dims + 1)])
        return link, value.index_copy(1, order, by_size)


def _reveal(pair: _Tokens, y: Tensor, labels: Tensor | None, order: Tensor, step: int) -> Tensor:
    """ln p(y_i | tokens of earlier steps) of the place i with ``order`` = step, [*]."""
    y = y.long().expand(order.shape)
    place = (order == step).long().argmax(-1, keepdim=True)
    log_probs = pair.log_probs(y, order >= step, labels)
    own = log_probs.gather(-2, place.unsqueeze(-1).expand(*place.shape, log_probs.shape[-1])).squeeze(-2)
    return own.gather(-1, y.gather(-1, place)).squeeze(-1)


class _Permutation(TorchDistribution):
    """A distribution of orders, event shape [D] (abstract)."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(constraints.integer_interval(0, self.event_shape[0] - 1), 1)


class _Uniform(_Permutation):
    """All D! orders alike."""

    def __init__(self, dims: int, device: torch.device, batch_shape: Sequence[int] = ()) -> None:
        self.device = device
        super().__init__(torch.Size(batch_shape), torch.Size((dims,)), validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Uniform:
        return _Uniform(self.event_shape[0], self.device, batch_shape)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return torch.rand(shape, device=self.device).argsort(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """-ln D!."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return torch.full(shape, -math.lgamma(self.event_shape[0] + 1), device=value.device)


class _Revealed(TorchDistribution):
    """p(y | order), event shape [D]."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012 (torch's own convention)

    def __init__(self, pair: _Tokens, order: Tensor, labels: Tensor | None) -> None:
        self.pair, self.order, self.labels = pair, order, labels
        super().__init__(order.shape[:-1], order.shape[-1:], validate_args=False)

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.pair.support, 1)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Revealed:
        return _Revealed(self.pair, self.order.expand(*batch_shape, -1), self.labels)

    def log_prob(self, value: Tensor) -> Tensor:
        """Σ_k ln p(y_σ(k) | y_σ(<k)), in nats."""
        order = self.order.expand(*torch.broadcast_shapes(value.shape[:-1], self.batch_shape), -1)
        links = self.pair.by_step(value, order, self.labels)
        return links.sum(-1, dtype=exact_dtype(links))

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        order = self.order.expand(*sample_shape, *self.order.shape)
        y = torch.zeros_like(order)
        for step in range(order.shape[-1]):
            drawn = dist.Categorical(logits=self.pair.log_probs(y, order >= step, self.labels)).sample()
            y = torch.where(order == step, drawn, y)
        return y


class _Next(_Permutation):
    """One more place, uniformly among those not yet revealed in ``past`` [*, D], gets the number ``step``."""

    def __init__(self, past: Tensor, step: int) -> None:
        self.past, self.step = past, step
        super().__init__(past.shape[:-1], past.shape[-1:], validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> _Next:
        return _Next(self.past.expand(*batch_shape, -1), self.step)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        past = self.past.expand(*sample_shape, *self.past.shape)
        draw = torch.rand(past.shape, device=past.device).masked_fill(past < self.step, -1.0)
        return past.scatter(-1, draw.argmax(-1, keepdim=True), self.step)

    def log_prob(self, value: Tensor) -> Tensor:
        """-ln of the number of places left."""
        left = self.event_shape[0] - self.step
        return torch.full(value.shape[:-1], -math.log(left), device=value.device)


class _Posterior(_Permutation):
    """p(order | y), from the tables of the dynamic program."""

    def __init__(self, link: Tensor, total: Tensor) -> None:
        self.link, self.total = link, total
        super().__init__(total.shape[:-1], link.shape[-1:], validate_args=False)

    def _walk(self, shape: torch.Size, order: Tensor | None) -> tuple[Tensor, Tensor]:
        """Orders [*shape, B, D], those given or drawn, and their log probabilities."""
        dims = self.event_shape[0]
        device = self.total.device
        rows = torch.arange(len(self.total), device=device).expand(*shape, -1)
        done = torch.zeros_like(rows)
        bits = 1 << torch.arange(dims, device=device)
        drawn = torch.zeros(*rows.shape, dims, dtype=torch.long, device=device)
        log_prob = torch.zeros((), device=device)
        for step in range(dims):
            after = (done[..., None] | bits).long()
            logits = self.link[rows, done] + self.total[rows[..., None], after]
            choice = dist.Categorical(logits=logits)
            place = choice.sample() if order is None else (order == step).long().argmax(-1)
            log_prob = log_prob + choice.log_prob(place)
            drawn = drawn.scatter(-1, place[..., None], step)
            done = done | bits[place]
        return drawn, log_prob

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return self._walk(torch.Size(sample_shape), None)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(order | y)."""
        return self._walk(value.shape[:-2], value)[1]

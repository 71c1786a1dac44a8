"""Markovian pairs: a chain y ⇄ z_1 ⇄ … ⇄ z_N, whose links are small modules that return distributions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyroelbo.pair import PLATE, MarkovLinks, Pair

__all__ = ["Chain", "SharedPath"]

ORDERS = ("bottom-up", "top-down")


class Chain(Pair):
    """p(z_N) p(z_{N-1} | z_N) … p(y | z_1) with an encoder that runs bottom-up or top-down; latent sites
    "z_1" … "z_N".

    Every link is a module that returns the distribution of one site. The state passed to a generator link is
    the latent above, unless the link of that latent has a method ``move(state, z)``: its return value is then
    passed instead (features of a network, such as a ladder's shared path; ``state`` is None at the top).

    The bound is E_q[ln p(y | z_1) + Σ_l ln p(z_l | …) - ln q(z_l | …)]. In top-down order every latent's term
    is a KL divergence, which may be computed in closed form; bottom-up only the top one is, as z_l and
    z_{l+1} depend on each other given the layer below. ``sites`` are the latent sites from the top, the
    generator's order.

    Top-down, the guide runs the generator's links and passes their results on with its draws; a model that is
    replayed against the same draws reuses them.

    Parts: ``prior``, ``generator`` (with the observation), ``encoder``. Links that declare ``inputs`` and
        ``out``,
    their input and output sizes, are checked against their neighbours. Raises ValueError, naming layer and
    sizes, for links that do not fit.

    Args:
        prior: ``prior()`` is p(z_N).
        generator: links from the bottom; ``generator[l-1](state)`` is p(z_l | …) for l < N.
        observation: ``observation(state)`` is p(y | …).
        encoder: links from the bottom. Bottom-up, ``encoder[l-1](below)`` is q(z_l | z_{l-1}), with y below
            z_1. Top-down, ``encoder[l-1](state, seen, p)`` is q(z_l | z_{>l}, y), with the generator's
            ``state`` (None at the top), its distribution ``p`` of z_l, and ``seen`` = y, or the l-th of the
            ``features(y)``.
        event: shape of one datum.
        order: ``"bottom-up"``, q(z_1 | y) q(z_2 | z_1) …, or ``"top-down"``, q(z_N | y) … q(z_1 | z_2, y).
        features: ``features(y)`` is a list of one input per encoder link; top-down only.
    """

    def __init__(
        self,
        prior: nn.Module,
        generator: Sequence[nn.Module],
        observation: nn.Module,
        encoder: Sequence[nn.Module],
        *,
        event: Sequence[int],
        order: str = "bottom-up",
        features: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, got {order!r}")
        if len(encoder) != len(generator) + 1:
            raise ValueError(
                f"encoder: expected {len(generator) + 1} links, one per latent (a prior and {len(generator)} "
                f"generator links), got {len(encoder)}"
            )
        if features is not None and order == "bottom-up":
            raise ValueError(
                "features: expected None with order='bottom-up', where a link is given the layer below it"
            )
        own = getattr(getattr(prior, "prior", prior), "own_site", None)
        if own is not None and order == "top-down":
            raise ValueError(
                f"prior: expected a density of z_N with order='top-down', whose guide reads it, got a "
                f"{type(prior).__name__} with a latent site of its own, {own!r}: use order='bottom-up'"
            )
        self.order, self.event = order, tuple(event)
        self.prior = prior
        self.generator, self.encoder = nn.Module(), nn.Module()
        self.generator.add_module("links", nn.ModuleList(generator))
        self.generator.add_module("observation", observation)
        self.encoder.add_module("links", nn.ModuleList(encoder))
        self.encoder.add_module("features", features)
        _check_arity(self)
        _check_sizes(self)

    @property
    def depth(self) -> int:
        """N, the number of latents."""
        return len(self.encoder.links)

    @property
    def sites(self) -> tuple[str, ...]:
        """The latent sites in the generator's order: "z_N", …, "z_1"."""
        return tuple(f"z_{layer}" for layer in range(self.depth, 0, -1))

    # ------------------------------------------------------------------------------------------ programs

    def model(self, y: Tensor) -> None:
        self.check(y)
        with pyro.plate(PLATE, len(y)), SharedPath(self, self._weights()) as shared:
            state, p, intact = None, self.prior(), True
            for layer in range(self.depth, 0, -1):
                site = f"z_{layer}"
                z = pyro.sample(site, p)
                if layer == 1:
                    break
                # results of the guide depend on its draws above too: the first other draw ends their reuse
                found = shared.path(site, z) if intact else None
                intact = found is not None
                state, p = found or self._advance(layer, state, z, p)
            state = self._moved(1, state, z, p)
            pyro.sample("y", self._call(self.generator.observation, "observation y", state), obs=y)

    def guide(self, y: Tensor) -> None:
        self.check(y)
        with pyro.plate(PLATE, len(y)):
            if self.order == "bottom-up":
                z = y
                for layer in range(1, self.depth + 1):
                    link = self.encoder.links[layer - 1]
                    z = pyro.sample(f"z_{layer}", self._call(link, f"encoder link of z_{layer}", z))
                if getattr(self.prior, "own_site", None):
                    self.prior.guide(z)
                return
            seen, weights = self._seen(y), self._weights()
            state, p = None, self.prior()
            for layer in range(self.depth, 0, -1):
                link, name = self.encoder.links[layer - 1], f"encoder link of z_{layer}"
                q = self._call(link, name, state, seen[layer - 1], p)
                if q.event_shape != p.event_shape:
                    raise ValueError(
                        f"encoder: expected z_{layer} of shape {tuple(p.event_shape)}, as the generator's, "
                        f"got {tuple(q.event_shape)} in layer {layer}"
                    )
                path: dict[str, Any] = {}
                z = pyro.sample(f"z_{layer}", q, infer={"path": path})
                if layer > 1:
                    state, p = self._advance(layer, state, z, p)
                    path.update(SharedPath.on(self, z, (state, p), weights))

    def check(self, y: Tensor) -> None:
        """Raise ValueError unless y is [B, *event]."""
        if tuple(y.shape[1:]) != self.event or y.dim() != 1 + len(self.event):
            shape = ", ".join(map(str, ("B", *self.event)))
            raise ValueError(
                f"y: expected shape [{shape}] for this {type(self).__name__}, got {tuple(y.shape)}"
            )

    def encode_top(self, seen: Tensor) -> Any:
        """q(z_N | y), or bottom-up q(z_N | z_{N-1}): the components of a VampPrior. The top link gets ``p`` =
        None, as p is that mixture."""
        link = self.encoder.links[-1]
        return link(seen) if self.order == "bottom-up" else link(None, self._seen(seen)[-1], None)

    def markov_links(self) -> MarkovLinks | None:
        """The links, if the encoder runs bottom-up and no generator link passes more than its latent on."""
        generator: Any = self.generator
        links = (generator.observation, *generator.links)
        if self.order != "bottom-up" or any(hasattr(link, "move") for link in (self.prior, *links)):
            return None
        return MarkovLinks(self.prior, links, tuple(self.encoder.links))

    def _weights(self) -> list[int]:
        """Version counters of the generator's parameters."""
        return [_version(p) for part in (self.prior, self.generator) for p in part.parameters()]

    def _seen(self, y: Tensor) -> Sequence[Any]:
        if self.encoder.features is None:
            return [y] * self.depth
        seen = self.encoder.features(y)
        if len(seen) != self.depth:
            raise ValueError(f"features: expected {self.depth} entries, one per layer, got {len(seen)}")
        return seen

    def _advance(self, layer: int, state: Any, z: Tensor, p: Any) -> tuple[Any, Any]:
        """The state below z_l and the next link's distribution, p(z_{l-1} | …)."""
        state = self._moved(layer, state, z, p)
        below = layer - 1
        return state, self._call(self.generator.links[below - 1], f"generator link of z_{below}", state)

    def _moved(self, layer: int, state: Any, z: Tensor, p: Any) -> Any:
        event = tuple(p.event_shape)
        if tuple(z.shape[z.dim() - len(event) :]) != event:
            raise ValueError(
                f"encoder: expected z_{layer} of event shape {event}, as the generator's, got "
                f"{tuple(z.shape)} in "
                f"layer {layer}"
            )
        link = self.prior if layer == self.depth else self.generator.links[layer - 1]
        return link.move(state, z) if hasattr(link, "move") else z

    @staticmethod
    def _call(link: nn.Module, name: str, *context: Any) -> Any:
        try:
            return link(*context)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            shapes = [tuple(c.shape) for c in context if isinstance(c, Tensor)]
            raise ValueError(
                f"{name}: got inputs of shape {shapes}, which it refuses: {str(error).splitlines()[0]}"
            ) from error

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        first = next(self.parameters())
        return torch.zeros(n, *self.event, dtype=first.dtype, device=first.device)


class SharedPath(Messenger):
    """Collects the results that the guide of ``pair`` attached to its draws as ``infer={"path":
    SharedPath.on(…)}``, which replay copies to the model. Results computed with other ``weights`` are
    ignored."""

    def __init__(self, pair: Pair, weights: Any = None) -> None:
        super().__init__()
        self.pair, self.weights = pair, weights
        self._paths: dict[str, dict[str, Any]] = {}

    @staticmethod
    def on(pair: Pair, z: Tensor, found: Any, weights: Any = None) -> dict[str, Any]:
        """What the guide attaches to its draw ``z``: the result ``found``, and under which conditions it
        holds."""
        mode = torch.is_grad_enabled()
        return {
            "pair": pair,
            "value": z,
            "version": _version(z),
            "grad": mode,
            "found": found,
            "weights": weights,
        }

    def _pyro_post_sample(self, msg: Any) -> None:
        path = msg["infer"].get("path")
        # another pair's guide used another generator
        if path and path["pair"] is self.pair and path["weights"] == self.weights:
            self._paths[msg["name"]] = path

    def path(self, site: str, z: Tensor) -> Any:
        """The guide's result for exactly this draw, under the same grad mode; else None."""
        path = self._paths.get(site)
        if path is None or path["grad"] != torch.is_grad_enabled():
            return None
        own = path["value"]
        if _version(own) != path["version"]:
            return None
        # a detached draw is another one, unless it needed no gradient
        same = own is z or (not own.requires_grad and not z.requires_grad and _same_memory(own, z))
        return path["found"] if same else None


def _version(x: Tensor) -> int:
    """Version counter of ``x``, incremented by in-place writes. Inference tensors have none; return 0."""
    return 0 if x.is_inference() else x._version


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr() and a.numel() > 0


def _check_arity(chain: Chain) -> None:
    wanted, context = (1, "the layer below") if chain.order == "bottom-up" else (3, "(state, seen, p)")
    for layer, link in enumerate(chain.encoder.links, 1):
        try:
            inspect.signature(link.forward).bind(*[None] * wanted)
        except TypeError:
            raise ValueError(
                f"layer {layer}: expected an encoder link of z_{layer} that is called with {context}, as "
                f"order={chain.order!r} does, got {type(link).__name__}{inspect.signature(link.forward)}, "
                "a link of the "
                "other order"
            ) from None


def _check_sizes(chain: Chain) -> None:
    """Compare the sizes that links declare with those of their neighbours."""
    depth, y = chain.depth, math.prod(chain.event)
    sizes = {0: y, depth: getattr(chain.prior, "out", None)}
    for layer, link in enumerate(chain.generator.links, 1):
        sizes[layer] = getattr(link, "out", None)

    def compare(who: str, takes: int | None, what: str, size: int | None) -> None:
        if takes is not None and size is not None and takes != size:
            raise ValueError(
                f"{who}: expected an input of {size} numbers, the size of {what}, got one of {takes}"
            )

    for layer in range(depth):
        link = chain.generator.observation if layer == 0 else chain.generator.links[layer - 1]
        who = "the observation" if layer == 0 else f"layer {layer}: the generator link of z_{layer}"
        above = chain.prior if layer + 1 == depth else chain.generator.links[layer]
        if not hasattr(above, "move"):
            compare(who, _first(link), f"z_{layer + 1}", sizes[layer + 1])
    for layer, link in enumerate(chain.encoder.links, 1):
        who = f"layer {layer}: the encoder link of z_{layer}"
        out = getattr(link, "out", None)
        if None not in (out, sizes[layer]) and out != sizes[layer]:
            raise ValueError(
                f"{who}: expected an output of {sizes[layer]} numbers, as the generator's z_{layer}, got "
                f"{out}"
            )
        if chain.order == "bottom-up":
            compare(who, _first(link), "y" if layer == 1 else f"z_{layer - 1}", sizes[layer - 1])


def _first(link: nn.Module) -> int | None:
    inputs = getattr(link, "inputs", None)
    return inputs[0] if inputs else None

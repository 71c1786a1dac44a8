"""Markovian pairs: one chain y ⇄ z_1 ⇄ … ⇄ z_N, whose links are small modules that give distributions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyroelbo.pair import PLATE, Pair

__all__ = ["Chain", "Handed"]

ORDERS = ("bottom-up", "top-down")


class Chain(Pair):
    """p(z_N) p(z_{N-1} | z_N) … p(y | z_1) with an encoder that runs bottom-up or top-down; latent sites
    "z_1" … "z_N".

    The links are modules, and each gives the distribution of one site:

    ``prior()``: p(z_N). ``generator``, from the bottom: ``generator[l-1](state)`` is p(z_l | …) for l < N.
    ``observation(state)`` is p(y | …). The state that a link sees is the latent above it, unless the link
    that gave that latent has a method ``move(state, z)``, which returns what is handed down instead (a
    network's features: a ladder's shared path; ``state`` is None at the top).

    ``encoder``, from the bottom, by ``order``:

    - ``"bottom-up"``, q(z_1 | y) q(z_2 | z_1) …: ``encoder[l-1](below)``, with y below z_1;
    - ``"top-down"``, q(z_N | y) … q(z_1 | z_2, y): ``encoder[l-1](state, seen, p)``, where ``state`` is what
      the generator hands down (None at the top), ``p`` the generator's own distribution of z_l there, and
      ``seen`` is y, or the l-th of the list that ``features(y)`` returns.

    The bound is E_q[ln p(y | z_1) + Σ_l ln p(z_l | …) - ln q(z_l | …)]. In the top-down order every
    term of a latent is a KL divergence that may be taken in closed form; bottom-up only the top one is,
    as z_l and z_{l+1} depend on each other given what is below. ``sites`` are the latent sites in the
    generator's order, top first, the order in which a sequential sampler would run over them.

    Top-down, the guide runs the generator's links, and hands what it found on with its draws; the model
    takes it over where it is replayed against just those draws, and computes it anew otherwise.

    ``event`` is the shape of one datum. Parts: ``prior``, ``generator`` (with the observation), ``encoder``.
    Links that declare ``inputs``, the sizes that they take, and ``out``, the size that they give, are checked
    against their neighbours. Raises ValueError, naming the layer and the sizes, for links that do not fit.
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
            raise ValueError(f"order takes one of {ORDERS}, got {order!r}")
        if len(encoder) != len(generator) + 1:
            raise ValueError(
                f"a chain of {len(generator) + 1} latents (a prior and {len(generator)} generator links) takes as many "
                f"encoder links, got {len(encoder)}"
            )
        if features is not None and order == "bottom-up":
            raise ValueError("features belong to top-down encoders: a bottom-up link sees what is below it")
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
        with pyro.plate(PLATE, len(y)), Handed(self, self._weights()) as handed:
            state, p, intact = None, self.prior(), True
            for layer in range(self.depth, 0, -1):
                site = f"z_{layer}"
                z = pyro.sample(site, p)
                if layer == 1:
                    break
                # What the guide found stands on its draws above too: one that is another ends it.
                found = handed.path(site, z) if intact else None
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
                return
            seen, weights = self._seen(y), self._weights()
            state, p = None, self.prior()
            for layer in range(self.depth, 0, -1):
                link, name = self.encoder.links[layer - 1], f"encoder link of z_{layer}"
                q = self._call(link, name, state, seen[layer - 1], p)
                if q.event_shape != p.event_shape:
                    raise ValueError(
                        f"layer {layer}: the encoder gives z_{layer} the shape {tuple(q.event_shape)}, "
                        f"the generator {tuple(p.event_shape)}"
                    )
                path: dict[str, Any] = {}
                z = pyro.sample(f"z_{layer}", q, infer={"path": path})
                if layer > 1:
                    state, p = self._advance(layer, state, z, p)
                    path.update(Handed.on(self, z, (state, p), weights))

    def check(self, y: Tensor) -> None:
        """ValueError for data that are not [B, *event]."""
        if tuple(y.shape[1:]) != self.event or y.dim() != 1 + len(self.event):
            shape = ", ".join(map(str, ("B", *self.event)))
            raise ValueError(f"y has shape {tuple(y.shape)}: this {type(self).__name__} takes [{shape}]")

    def encode_top(self, seen: Tensor) -> Any:
        """q(z_N | y), or bottom-up q(z_N | z_{N-1}): the top of the encoder given what it sees, as a VampPrior
        mixes it. ``p`` is not given here (None), as it is that mixture."""
        link = self.encoder.links[-1]
        return link(seen) if self.order == "bottom-up" else link(None, self._seen(seen)[-1], None)

    def _weights(self) -> list[int]:
        """How often each weight of the generator was written."""
        return [_version(p) for part in (self.prior, self.generator) for p in part.parameters()]

    def _seen(self, y: Tensor) -> Sequence[Any]:
        if self.encoder.features is None:
            return [y] * self.depth
        seen = self.encoder.features(y)
        if len(seen) != self.depth:
            raise ValueError(f"features gives {len(seen)} layers, the chain has {self.depth}")
        return seen

    def _advance(self, layer: int, state: Any, z: Tensor, p: Any) -> tuple[Any, Any]:
        """From z_l to the next link's distribution: (what is handed down, p(z_{l-1} | …))."""
        state = self._moved(layer, state, z, p)
        below = layer - 1
        return state, self._call(self.generator.links[below - 1], f"generator link of z_{below}", state)

    def _moved(self, layer: int, state: Any, z: Tensor, p: Any) -> Any:
        event = tuple(p.event_shape)
        if tuple(z.shape[z.dim() - len(event) :]) != event:
            raise ValueError(
                f"layer {layer}: the encoder gives z_{layer} of shape {tuple(z.shape)}, the generator's events have shape {event}"
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
            raise ValueError(f"{name} does not take {shapes}: {str(error).splitlines()[0]}") from error

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        first = next(self.parameters())
        return torch.zeros(n, *self.event, dtype=first.dtype, device=first.device)


class Handed(Messenger):
    """Collects what the guide of ``pair`` handed on with its draws, as ``infer={"path": Handed.on(…)}``; replay gives
    the model the guide's ``infer``. What was found by other ``weights`` does not count."""

    def __init__(self, pair: Pair, weights: Any = None) -> None:
        super().__init__()
        self.pair, self.weights = pair, weights
        self._paths: dict[str, dict[str, Any]] = {}

    @staticmethod
    def on(pair: Pair, z: Tensor, found: Any, weights: Any = None) -> dict[str, Any]:
        """What the guide hands on with its draw ``z``: ``found`` below it, and by what."""
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
        # Another pair's guide walked along another generator.
        if path and path["pair"] is self.pair and path["weights"] == self.weights:
            self._paths[msg["name"]] = path

    def path(self, site: str, z: Tensor) -> Any:
        """What the guide found below this very draw, under the same grad mode; else None."""
        path = self._paths.get(site)
        if path is None or path["grad"] != torch.is_grad_enabled():
            return None
        own = path["value"]
        if _version(own) != path["version"]:
            return None
        # A draw that was cut off the encoder is another one, unless there was nothing to cut.
        same = own is z or (not own.requires_grad and not z.requires_grad and _same_memory(own, z))
        return path["found"] if same else None


def _version(x: Tensor) -> int:
    """How often ``x`` was written in place; of inference tensors nobody counts it."""
    return 0 if x.is_inference() else x._version


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.data_ptr() == b.data_ptr() and a.numel() > 0


def _check_arity(chain: Chain) -> None:
    wanted, context = (1, "what is below it") if chain.order == "bottom-up" else (3, "(state, seen, p)")
    for layer, link in enumerate(chain.encoder.links, 1):
        try:
            inspect.signature(link.forward).bind(*[None] * wanted)
        except TypeError:
            raise ValueError(
                f"layer {layer}: order={chain.order!r} gives the encoder link of z_{layer} {context}, and "
                f"{type(link).__name__}{inspect.signature(link.forward)} does not take that: it is a link of the other order"
            ) from None


def _check_sizes(chain: Chain) -> None:
    """Sizes that links declare, against those of their neighbours."""
    depth, y = chain.depth, math.prod(chain.event)
    sizes = {0: y, depth: getattr(chain.prior, "out", None)}
    for layer, link in enumerate(chain.generator.links, 1):
        sizes[layer] = getattr(link, "out", None)

    def compare(who: str, takes: int | None, what: str, size: int | None) -> None:
        if takes is not None and size is not None and takes != size:
            raise ValueError(f"{who} takes {takes} numbers, {what} has {size}")

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
            raise ValueError(f"{who} gives {out} numbers, the generator's z_{layer} has {sizes[layer]}")
        if chain.order == "bottom-up":
            compare(who, _first(link), "y" if layer == 1 else f"z_{layer - 1}", sizes[layer - 1])


def _first(link: nn.Module) -> int | None:
    inputs = getattr(link, "inputs", None)
    return inputs[0] if inputs else None

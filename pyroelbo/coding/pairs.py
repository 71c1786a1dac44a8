"""Codecs of a pair's data: bits-back, Bit-Swap's order for chains, direct coding of exact models."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.coding.sites import Grid, Sequential, a_component, codec_of, is_discrete, is_gaussian
from pyroelbo.coding.stack import Codec, Impossible, Stack
from pyroelbo.evaluation.layout import Layout
from pyroelbo.evaluation.programs import Programs
from pyroelbo.evaluation.sites import data_frame, is_point, sample_sites
from pyroelbo.pair import Pair, traced

__all__ = ["BitsBack", "Direct", "PairCodec", "Swapped", "grids_of", "pair_codec"]


class PairCodec(Codec):
    """Chunks of data [B, *event] under a pair, B fixed: a network's outputs depend on the size of its batch
    in their last bits, and both directions must compute the same numbers (abstract).

    ``method`` is its name, ``template`` a batch of that shape and dtype, ``given`` what conditional pairs
    take before it, of the same B data. Everything runs on the CPU in evaluation mode, without gradients.
    ``bits`` counts by site what was pushed less what was popped.
    """

    method: ClassVar[str]

    def __init__(self, pair: Pair, template: Tensor, given: tuple[Tensor, ...] = ()) -> None:
        self.pair, self.template, self.given = pair, template, given
        self.bits: Counter[str] = Counter()
        self._programs = Programs(pair)

    def part(self, rows: int) -> PairCodec | None:
        """The codec of a last chunk of fewer rows, padded with zeros for the networks; None where there is
        none."""
        return None

    def conditioned(self, given: tuple[Tensor, ...]) -> PairCodec:
        """The codec of a chunk given something else."""
        found = copy.copy(self)
        found.given = given
        return found

    def push(self, stack: Stack, value: Tensor) -> None:
        with torch.no_grad(), self._programs.quiet():
            self._push(stack, value.contiguous())

    def pop(self, stack: Stack) -> Tensor:
        with torch.no_grad(), self._programs.quiet():
            return self._pop(stack)

    def draw(self, stack: Stack) -> Tensor:
        """Data popped under the generator alone: draws from p(y), if the stack's bits are random."""
        with torch.no_grad(), self._programs.quiet():
            return self._draw(stack)

    @abstractmethod
    def _push(self, stack: Stack, y: Tensor) -> None: ...

    @abstractmethod
    def _pop(self, stack: Stack) -> Tensor: ...

    @abstractmethod
    def _draw(self, stack: Stack) -> Tensor: ...


class Direct(PairCodec):
    """An exact model coordinate by coordinate (:meth:`~pyroelbo.Pair.stepwise`): -log₂ p(y) bits."""

    method = "direct"

    def __init__(
        self, pair: Pair, template: Tensor, given: tuple[Tensor, ...] = (), rows: int | None = None
    ) -> None:
        super().__init__(pair, template, given)
        size = len(template)
        whole = (torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])]) for x in given)
        steps, flat = pair.stepwise(*whole), (size, template[:1].numel())
        assert steps is not None
        self._codec, self._rows = Sequential(steps, flat, template.dtype, rows=rows), rows

    def part(self, rows: int) -> Direct:
        return self._with(tuple(part[:rows] for part in self.given), rows)

    def conditioned(self, given: tuple[Tensor, ...]) -> Direct:
        return self._with(given, self._rows)

    def _with(self, given: tuple[Tensor, ...], rows: int | None) -> Direct:
        found = Direct(self.pair, self.template, given, rows)
        found.bits = self.bits
        return found

    def _push(self, stack: Stack, y: Tensor) -> None:
        padded = torch.zeros_like(self.template)
        padded[: len(y)] = y
        with _naming("y"):
            _Counted(self._codec, self.bits, "y").push(stack, padded.reshape(self._codec.shape))

    def _pop(self, stack: Stack) -> Tensor:
        return self._codec.pop(stack).reshape(self.template.shape)[: self._rows]

    _draw = _pop


class BitsBack(PairCodec):
    """Any pair whose latents are discrete or have independent coordinates: pops z from q(z | y), then pushes
    y under p(y | z) and z under p(z); net, minus the ELBO in bits.

    All latents are popped before anything is pushed, so the stack has to hold -log₂ q(z | y) bits for each
    datum of a chunk first.

    Source: Townsend, Bird and Barber (2019), section 2.
    """

    method = "bits-back"

    def __init__(
        self, pair: Pair, template: Tensor, grids: Mapping[str, Grid], given: tuple[Tensor, ...] = ()
    ) -> None:
        super().__init__(pair, template, given)
        layout = _checked(pair, (*given, template) if given else template)
        self._latents = {name: site.dtype for name, site in layout.latents.items()}
        (self._observed,) = layout.observed
        self._grids = grids

    def _codec(self, name: str, fn: Any, narrow: bool = False) -> Codec:
        dtype = self.template.dtype if name == self._observed else self._latents[name]
        with _naming(name):
            codec = codec_of(fn, dtype, self._grids.get(name), narrow=narrow)
        return _Counted(codec, self.bits, name)

    def _trace(self, program: Callable, y: Tensor) -> Any:
        return prune_subsample_sites(traced(program, (*self.given, y)))

    def _push_sites(self, stack: Stack, trace: Any, narrow: bool) -> None:
        for name, site in reversed(list(sample_sites(trace))):
            codec = self._codec(name, site["fn"], narrow)
            frame = data_frame(site, "guide" if narrow else "model")
            with _naming(name, len(site["fn"].batch_shape) + frame.dim):
                codec.push(stack, site["value"].reshape(site["fn"].shape()))

    def _popped(self, stack: Stack, program: Callable, y: Tensor, narrow: bool) -> dict[str, Tensor]:
        """The values of all sites, popped in the program's order."""
        trace = self._trace(_Popping(stack, lambda name, fn: self._codec(name, fn, narrow))(program), y)
        return {name: site["value"] for name, site in sample_sites(trace)}

    def _push(self, stack: Stack, y: Tensor) -> None:
        latents = self._popped(stack, self.pair.guide, y, narrow=True)
        self._push_sites(stack, self._trace(poutine.condition(self.pair.model, latents), y), narrow=False)

    def _pop(self, stack: Stack) -> Tensor:
        y = torch.zeros_like(self.template)
        latents = self._popped(stack, self.pair.model, y, narrow=False)
        del latents[self._observed]  # a view of y, which it has filled
        self._push_sites(stack, self._trace(poutine.condition(self.pair.guide, latents), y), narrow=True)
        return y

    def _draw(self, stack: Stack) -> Tensor:
        y = torch.zeros_like(self.template)
        self._popped(stack, self.pair.model, y, narrow=False)
        return y


class Swapped(PairCodec):
    """A chain with a bottom-up encoder (:meth:`~pyroelbo.Pair.markov_links`): each layer is pushed as soon as
    the one above it is popped, so that the stack has to hold the bits of one layer only.

    Source: Kingma, Abbeel and Ho (2019), Bit-Swap, algorithm 1.
    """

    method = "swap"

    def __init__(
        self, pair: Pair, template: Tensor, grids: Mapping[str, Grid], rows: int | None = None
    ) -> None:
        super().__init__(pair, template)
        _checked(pair, template)
        links = pair.markov_links()
        assert links is not None
        self._links, self._rows = links, rows
        self._grids = [None, *(grids.get(f"z_{i + 1}") for i in range(len(links.encoder)))]

    def part(self, rows: int) -> Swapped | None:
        """Chunks of fewer rows, for encoders that are point masses: from others, the rows beyond would be
        popped, too."""
        z = self.template
        with torch.no_grad(), self._programs.quiet():
            for link in self._links.encoder:
                q = link(z)
                if not is_point(q):
                    return None
                z = q.sample()
        part = Swapped(self.pair, self.template, {}, rows)
        part.bits = self.bits
        return part

    def _codec(self, layer: int, fn: Any, narrow: bool = False) -> Codec:
        name = f"z_{layer}" if layer else "y"
        with _naming(name):
            codec = codec_of(fn, self.template.dtype, self._grids[layer], narrow=narrow, rows=self._rows)
        if self._rows is not None and not hasattr(fn, "stepwise"):
            codec = _First(codec, self._rows, fn.shape())
        return _Counted(codec, self.bits, name)

    def _p(self, layer: int, above: Tensor | None) -> Codec:
        """p(z_l | z_{l+1}), z_0 = y."""
        if above is None:
            prior = self._links.prior()
            return self._codec(layer, prior.expand(torch.Size([len(self.template)])))
        return self._codec(layer, self._links.generator[layer](above))

    def _q(self, layer: int, below: Tensor) -> Codec:
        return self._codec(layer, self._links.encoder[layer - 1](below), narrow=True)

    def _push(self, stack: Stack, y: Tensor) -> None:
        z, top = torch.zeros_like(self.template), len(self._links.encoder)
        z[: len(y)] = y
        for layer in range(1, top + 1):
            below, z = z, self._q(layer, z).pop(stack)
            with _naming(f"z_{layer - 1}" if layer > 1 else "y"):
                self._p(layer - 1, z).push(stack, below)
        self._p(top, None).push(stack, z)

    def _down(self, stack: Stack, back: bool) -> Tensor:
        top = len(self._links.encoder)
        z = self._p(top, None).pop(stack)
        for layer in range(top, 0, -1):
            above, z = z, self._p(layer - 1, z).pop(stack)
            if back:
                self._q(layer, z).push(stack, above)
        return z.reshape(self.template.shape)[: self._rows]

    def _pop(self, stack: Stack) -> Tensor:
        return self._down(stack, back=True)

    def _draw(self, stack: Stack) -> Tensor:
        return self._down(stack, back=False)


class _Counted(Codec):
    """A codec that adds the growth of the stack to the ``bits`` of a site."""

    def __init__(self, codec: Codec, bits: Counter[str], site: str) -> None:
        self.codec, self.bits, self.site = codec, bits, site

    def push(self, stack: Stack, value: Any) -> None:
        before = stack.bits
        self.codec.push(stack, value)
        self.bits[self.site] += stack.bits - before

    def pop(self, stack: Stack) -> Any:
        before = stack.bits
        value = self.codec.pop(stack)
        self.bits[self.site] += stack.bits - before
        return value


class _First(Codec):
    """A codec of ``rows`` rows for tensors of a ``shape`` with more of them, zeros beyond."""

    def __init__(self, codec: Codec, rows: int, shape: torch.Size) -> None:
        self.codec, self.rows, self.shape = codec, rows, shape

    def push(self, stack: Stack, value: Tensor) -> None:
        self.codec.push(stack, value[: self.rows])

    def pop(self, stack: Stack) -> Tensor:
        found = self.codec.pop(stack)
        value = found.new_zeros(self.shape)
        value[: self.rows] = found
        return value


class _Popping(Messenger):
    """Takes the value of every sample site from a stack; observed ones are written into the data."""

    def __init__(self, stack: Stack, codec: Callable[[str, Any], Codec]) -> None:
        super().__init__()
        self._stack, self._codec = stack, codec

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        found = self._codec(msg["name"], msg["fn"]).pop(self._stack)
        if msg["is_observed"]:  # a view of the data, whatever its shape
            msg["value"].copy_(found.reshape(msg["value"].shape))
        else:
            msg["value"], msg["done"] = found, True


@contextmanager
def _naming(site: str, rows: int = 0):
    """Name the site in errors, and the datum, which dimension ``rows`` of its values counts."""
    try:
        yield
    except Impossible as error:
        if error.site is None:
            error.site, error.row = site, error.place[rows]
        raise
    except ValueError as error:
        if str(error).startswith("site "):
            raise
        raise ValueError(f"site {site!r}: {error}") from error


def _checked(pair: Pair, template: Batch) -> Layout:
    """The pair's layout; ValueError for what cannot be coded."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        programs = Programs(pair)
        with programs.quiet():
            layout = Layout.of(programs, template, "datum")
        pair.simulate(batches.size(template), like=template)  # refuses models that feed their data forward
    if layout.auxiliary:
        raise ValueError(f"guide site {min(layout.auxiliary)!r}: expected latents of the model only")
    if layout.scaled_site is not None:
        raise ValueError(
            f"site {layout.scaled_site!r}: expected terms of whole data, got a scale: its ELBO is an "
            "estimate of a sum, as of a diffusion's training form, and no code has that length"
        )
    if layout.masked or len(layout.observed) != 1:
        raise ValueError(
            f"model: expected one observed site without a mask, got {sorted(layout.observed)}"
            + (", with masks" if layout.masked else "")
        )
    return layout


@torch.no_grad()
def grids_of(pair: Pair, chunks: Sequence[Batch]) -> dict[str, Grid]:
    """A grid for every continuous latent, from q(z | y) of chunks of typical data."""
    moments: dict[str, list[tuple[Tensor, Tensor]]] = {}
    plain = set()
    programs = Programs(pair)
    with torch.random.fork_rng(devices=[]), programs.quiet():
        torch.manual_seed(0)
        for y in chunks:
            guide, model = programs.traces(y)
            for name, site in sample_sites(guide):
                q, p = a_component(site["fn"]), model.nodes[name]["fn"]
                with _naming(name):
                    if hasattr(q, "stepwise") or is_point(q) or is_discrete(q):
                        continue
                moments.setdefault(name, []).append(_moments(q))
                if is_gaussian(q) and (is_gaussian(p) or hasattr(p, "stepwise")):
                    plain.add(name)
    grids = {}
    for name, found in moments.items():
        mean, std = (torch.cat(part).double() for part in zip(*found, strict=True))
        with _naming(name):
            grid = Grid.of(mean, std)
        grids[name] = grid if name in plain else grid.uniform
    return grids


def _moments(q: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [*, *event], estimated where the distribution has none."""
    try:
        mean, std = q.mean, q.stddev
    except NotImplementedError:
        drawn = q.sample((64,))
        mean, std = drawn.mean(0), drawn.std(0)
    event = q.event_shape
    return mean.expand(q.shape()).reshape(-1, *event), std.expand(q.shape()).reshape(-1, *event)


def pair_codec(
    pair: Pair,
    template: Tensor,
    grids: Mapping[str, Grid],
    method: str | None = None,
    given: tuple[Tensor, ...] = (),
) -> PairCodec:
    """The codec of a pair's data: ``method`` is ``"direct"``, ``"swap"`` or ``"bits-back"``, by default the
    first of them that the pair offers."""
    offered: dict[str, Callable[[], PairCodec]] = {
        "bits-back": lambda: BitsBack(pair, template, grids, given)
    }
    if not given and pair.markov_links() is not None:
        offered = {"swap": lambda: Swapped(pair, template, grids), **offered}
    if pair.stepwise(*given) is not None:
        offered = {"direct": lambda: Direct(pair, template, given), **offered}
    if method is not None and method not in offered:
        raise ValueError(f"method: expected one of {', '.join(offered)} for this pair, got {method!r}")
    return offered[method or next(iter(offered))]()

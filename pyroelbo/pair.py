"""The protocol: a generator (Pyro `model`) and an encoder (Pyro `guide`) over the same latent sites."""

from __future__ import annotations

import functools
import inspect
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.results import CodeUsage

__all__ = [
    "PLATE",
    "ExactPair",
    "LatentPath",
    "Lossy",
    "MarkovLinks",
    "Pair",
    "Stepwise",
    "Summed",
    "within_datum",
]

PLATE = "data"
_counts: Counter[str] = Counter()
_quiet = False


@contextmanager
def unregistered() -> Iterator[None]:
    """Context manager that runs pairs without one ``pyro.param`` statement per parameter, for trainers that
    hold the parameters themselves."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


class within_datum(Messenger):
    """Mark a scale as part of a datum's own ELBO estimate: ``with within_datum(T): pyro.sample(...)``.

    A term drawn at random among T (one time step per datum, one token of a text) represents all T. This
    handler multiplies its log probability by ``scale`` (a number or a tensor [B]), as ``poutine.scale`` does,
    and marks it, so that ``evidence.elbo`` keeps it while importance weights, which would be wrong, refuse
    it, whatever its value. Any unmarked ``poutine.scale`` (KL annealing) is refused by every evaluation.
    """

    def __init__(self, scale: float | Tensor) -> None:
        super().__init__()
        self.scale = scale

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = msg["scale"] * self.scale
        # Not in msg["infer"]: replay replaces the model's by the guide's.
        msg["within_datum"] = msg.get("within_datum", 1.0) * self.scale


@dataclass(frozen=True)
class LatentPath:
    """A latent path step by step, p(y, z) = Π_t p(z_t | z_{t-1}) p(y_t | z_t), for particle filters.

    ``prior(t, past)`` and ``guide(t, past)`` give the distributions of z_t, t = 0 … ``length`` - 1, given
    ``past`` = z_{t-1} [K, B, *event] (None at t = 0), with batch shapes that expand to [K, B]; ``emission(t,
    z)`` is ln p(y_t | z_t), [K, B]. ``lengths [B]`` ends data earlier: later steps are ignored.
    """

    length: int
    prior: Callable[[int, Tensor | None], Any]
    guide: Callable[[int, Tensor | None], Any]
    emission: Callable[[int, Tensor], Tensor]
    lengths: Tensor | None = None


@dataclass(frozen=True)
class MarkovLinks:
    """A chain y ⇄ z_1 ⇄ … ⇄ z_N whose every link sees its neighbour alone, as Bit-Swap needs it:
    ``prior()`` is p(z_N), ``generator[l](z_{l+1})`` p(z_l | z_{l+1}) with z_0 = y, and ``encoder[l](z_l)``
    q(z_{l+1} | z_l)."""

    prior: Callable[[], Any]
    generator: tuple[Callable[[Tensor], Any], ...]
    encoder: tuple[Callable[[Tensor], Any], ...]


@dataclass(frozen=True)
class Stepwise:
    """A vector coordinate by coordinate, p(y) = Π_t p(y_t | y_<t), for direct coding.

    ``begin(n)`` is the state of n rows before the first coordinate, ``distribution(state)`` the distribution
    of the next one, of batch shape [n] and without event dimensions, and ``append(state, y_t)`` the next
    state. ``order(n)`` [n, T] are the places of the coordinates in this order, None for 0 … T-1.
    """

    begin: Callable[[int], Any]
    distribution: Callable[[Any], Any]
    append: Callable[[Any, Tensor], Any]
    order: Callable[[int], Tensor] | None = None


@dataclass(frozen=True)
class Lossy:
    """The codes of a pair alone, for files from which its data come back approximately: ``encode(y)`` [B, *]
    are integers, ``decode`` gives data of them, and ``codes`` is a pair whose data they are."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    codes: Any


@dataclass(frozen=True)
class Summed:
    """A mixture p(z) = Σ_m p(m) p(z | m) of batch shape [*B], for coding with m as one more latent:
    ``prior`` = p(m), ``given(m)`` = p(z | m) for m [*B], ``posterior(z)`` = p(m | z)."""

    prior: Any
    given: Callable[[Tensor], Any]
    posterior: Callable[[Tensor], Any]


class _DataPlate(Messenger):
    """Names the plate over the data ``"data"``: the one called ``name``, or by default where none has that
    name the only one as long as the batch at a first site. Plates without a size get that of their sites."""

    def __init__(self, pair: Pair, batch: tuple[Any, ...]) -> None:
        super().__init__()
        self.pair, self.name = pair, pair._data_plate
        self.guess: str | None = None
        self.size = next((len(part) for part in batch if isinstance(part, Tensor) and part.dim()), None)

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        frames = msg["cond_indep_stack"]
        if any(f.size == -1 for f in frames):
            frames = tuple(f._replace(**_extent(f, msg)) if f.size == -1 else f for f in frames)
        chosen = [f for f in frames if f.name == PLATE]
        if chosen:
            self.pair.__dict__["_data_plate"] = PLATE  # nothing is guessed in other runs
        elif self.name is None:
            chosen = [f for f in frames if f.dim is not None and f.size == self.size]
            self.guess = chosen[0].name if len(chosen) == 1 else None
            self.name = self.guess
        elif self.name is not None:
            chosen = [f for f in frames if f.name == self.name]
        if len(chosen) == 1:
            frames = tuple(f._replace(name=PLATE) if f is chosen[0] else f for f in frames)
        elif self.name is not None and self.guess is None:
            msg["outside_plate"] = self.name
        msg["guessed_plate"] = self.guess is not None
        msg["cond_indep_stack"] = frames


def _extent(frame: Any, msg: Any) -> dict[str, int]:
    """Size of a plate that was declared without one: the length of a site's distribution, or of its given
    value, along the plate's dimension."""
    shape, value = getattr(msg["fn"], "batch_shape", torch.Size()), msg["value"]
    if isinstance(value, Tensor):
        shape = torch.broadcast_shapes(shape, value.shape[: value.dim() - msg["fn"].event_dim])
    size = shape[frame.dim] if len(shape) >= -frame.dim else 1
    return {"size": size, "full_size": size}


class Program(nn.Module):
    """A model or guide bound to its pair: callable and a module, so that ``elbo(model, guide)`` finds the
    parameters."""

    def __init__(self, pair: Pair, function: Callable) -> None:
        super().__init__()
        self.pair = pair
        self._function = function
        self.__name__ = function.__name__

    def forward(self, *batch: Any, **named: Any) -> Any:
        context = nullcontext() if _quiet and self.pair._without_pyro_samples() else self.pair._pyro_context
        with context, _DataPlate(self.pair, (*batch, *named.values())):
            return self._function(self.pair, *batch, **named)

    def check(self, batch: Batch) -> None:
        """Raise ValueError unless the program can be called with the parts of this batch."""
        own = self.pair.__dict__.get("_callables")
        program = self._function.__get__(self.pair) if own is None else own[self.__name__ == "guide"]
        try:
            takes = inspect.signature(program)
        except ValueError:  # of a callable that does not tell
            return
        try:
            batches.call(takes.bind, batch)
        except TypeError as error:
            has = batches.parts(batch, "batch")
            raise ValueError(
                f"batch: expected the parts {', '.join(takes.parameters)} that {self.pair.name}."
                f"{self.__name__} takes, got {', '.join(has)}: {error}"
            ) from None

    def train(self, mode: bool = True) -> Program:
        # Programs share their pair's mode; recursion here would loop through the pair's children.
        self.training = mode
        self.pair.train(mode)
        return self


class _ProgramAttribute:
    """Turns a method ``model`` or ``guide`` of a Pair subclass into its :class:`Program`."""

    def __init__(self, function: Callable) -> None:
        self.function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, pair: Pair | None, owner: type) -> Any:
        if pair is None:
            return self
        programs = pair.__dict__.setdefault("_programs", {})
        if self.function not in programs:
            programs[self.function] = Program(pair, self.function)
        return programs[self.function]


def _noting(init: Callable) -> Callable:
    """A constructor that notes the parameters it leaves, for pairs that can start from data."""

    @functools.wraps(init)
    def __init__(self: Pair, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is __init__ and hasattr(self, "initialize"):
            self._constructed = self._checksum()

    return __init__


class Pair(PyroModule):
    """A generator and an encoder over the same latent sites, with their parameters.

    Subclasses define ``model(self, *batch)`` and ``guide(self, *batch)``: Pyro programs whose latent sites
    are inside ``pyro.plate("data", len(y))`` at dim -1, and whose last sites observe the data. Conditional
    pairs take ``(x, y)``, padded sequences ``(y, lengths)``; a dict batch is passed by name. ``pair.model``
    and ``pair.guide`` work with plain ``pyro.infer.SVI`` (every pair has its own name in Pyro's store) and,
    being modules, with ``Trace_ELBO()(pair.model, pair.guide)``.

    Parts that :func:`fit` can freeze by name are attributes, by convention ``prior``, ``generator`` and
    ``encoder``.
    """

    _data_plate: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("model", "guide"):
            if callable(cls.__dict__.get(name)):
                setattr(cls, name, _ProgramAttribute(cls.__dict__[name]))
        if "__init__" in cls.__dict__:
            cls.__init__ = _noting(cls.__init__)  # type: ignore[method-assign]

    def __init__(self) -> None:
        for name in ("model", "guide"):
            if not hasattr(type(self), name):
                raise TypeError(f"{type(self).__name__} must define {name}(self, *batch), a Pyro program")
        super().__init__(self._fresh_name())

    @classmethod
    def _fresh_name(cls) -> str:
        _counts[cls.__name__] += 1
        number = _counts[cls.__name__]
        return cls.__name__ if number == 1 else f"{cls.__name__}_{number}"

    def _pyro_get_fullname(self, name: str) -> str:
        # A latent keeps its attribute's name in every instance, as guides refer to it; only
        # parameters get unique names.
        return name if name in self._pyro_samples else super()._pyro_get_fullname(name)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("_parameters", {}).get(name)
        if own is not None and not own.requires_grad and not name.endswith("_unconstrained"):
            return own  # Pyro's store would thaw a frozen one
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            # Pyro's store leaves a weak reference on each, which cannot be pickled; it is set
            # again when needed.
            parameter.__dict__.pop("unconstrained", None)
        return {k: v for k, v in self.__dict__.items() if k != "_programs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy with the original's name would find the original's parameters in Pyro's store and
        # train nothing.
        super().__setstate__(state)
        self._pyro_context.used = False
        self._pyro_set_supermodule(self._fresh_name(), self._pyro_context)

    @staticmethod
    def of(
        model: Callable,
        guide: Callable,
        *,
        placeholder: Callable | None = None,
        plate: str | None = None,
        data_dim: int = 0,
    ) -> Pair:
        """Any two Pyro callables as a pair: functions that use ``pyro.param`` or ``pyro.module``,
        PyroModules, AutoGuides.

        Modules become the parts ``generator`` and ``encoder``. ``placeholder(n)`` returns a batch of n data
        of the right shape, which :meth:`simulate` needs. ``plate`` is the name of the plate over the data; by
        default "data", else at each site the only plate as long as the batch. Batches have the data first;
        ``data_dim=1`` is for programs that take them second, [T, B, *]: every part of a batch with more than
        one dimension is turned for them.
        """
        return _CallablePair(model, guide, placeholder, plate, data_dim)

    @property
    def name(self) -> str:
        """The name of this pair in tables."""
        return type(self).__name__

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU for a pair without any."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _without_pyro_samples(self) -> bool:
        if "_plain" not in self.__dict__:
            plain = not any(m._pyro_samples for m in self.modules() if isinstance(m, PyroModule))
            self.__dict__["_plain"] = plain
        return self.__dict__["_plain"]

    def part(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a part by name: an attribute path to a module or a parameter, such as
        ``encoder``."""
        found = {k: p for k, p in self.named_parameters() if k == name or k.startswith(f"{name}.")}
        found |= {k: p for k, p in self.named_parameters() if k == f"{name}_unconstrained"}
        if not found:
            parts = sorted({k.split(".")[0] for k, _ in self.named_parameters()})
            raise ValueError(
                f"part: expected one of {parts} of {type(self).__name__}, got no part {name!r} with "
                "parameters"
            )
        return found

    @property
    def pristine(self) -> bool:
        """Whether the parameters still have the values that the constructor gave them, dtype and device
        aside.

        False for pairs without ``initialize``.
        """
        return getattr(self, "_constructed", None) == self._checksum()

    def _checksum(self) -> int:
        total = 0
        for p in self.parameters():
            total = zlib.crc32(p.detach().to("cpu", torch.float32).contiguous().numpy().tobytes(), total)
        return total

    def latent_path(self, *batch: Any, **named: Any) -> LatentPath | None:
        """The latent path step by step, for pairs that draw it at one site; None if every latent has its own
        site, whose order in the programs is the chain."""
        return None

    def reconstruct(self, *batch: Tensor) -> Tensor | None:
        """Means of the data given their codes, scaled to [0, 1], [B, D]; None for pairs that have none."""
        return None

    def usage(self, *batch: Tensor) -> CodeUsage | None:
        """How evenly the codes of data are used; None for pairs without a codebook."""
        return None

    def by_layer(self, y: Batch, draws: int = 16) -> Tensor | None:
        """The terms of a bound that is a sum over many layers, means over data and ``draws``, [L], nats: the
        data's first, the prior's last; None for pairs whose latent sites are the layers."""
        return None

    def latent_plane(self, *batch: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
        """The codes [B, 2] of the data and the map that decodes a code as :meth:`reconstruct` does; None
        where the latent has other dimensions."""
        return None

    def markov_links(self) -> MarkovLinks | None:
        """The links of a chain whose encoder runs bottom-up, each of its neighbour alone; None for other
        pairs."""
        return None

    def stepwise(self, *given: Tensor) -> Stepwise | None:
        """The evidence of a datum coordinate by coordinate, p(y) = Π_t p(y_t | y_<t); where the order is a
        latent, p(y | order) for fixed orders. Conditional pairs take the parts ``given`` of as many rows as
        are begun with. None for other pairs."""
        return None

    def lossy(self) -> Lossy | None:
        """The codes alone, as a pair of their own; None for pairs whose data are not coded with loss."""
        return None

    def written_out(self) -> Pair:
        """The pair with the same parameters whose weights are those of a whole datum: itself, unless its own
        sites carry a scale within the datum (one step of a diffusion drawn among T)."""
        return self

    def unpadded(self, *batch: Any, **named: Any) -> Sequence[Batch]:
        """The batch in parts whose losses add up to its own: itself, unless sequences are padded, which are
        cheaper in groups of similar length."""
        return [named or batch]

    def lines(self, latents: dict[str, Tensor], batch: Batch, names: Sequence[str]) -> list[str] | None:
        """Simulated data with their latents, a line of text each, with the ``names`` of the symbols; None for
        pairs whose latents have no such form."""
        return None

    def placeholder(self, n: int, *given: Tensor) -> Batch:
        """A batch of n data of the right shape with arbitrary observed values (abstract: pairs that simulate
        define it)."""
        raise TypeError(
            f"{type(self).__name__}.placeholder is not defined, so the shape of a datum is unknown: define "
            "placeholder(self, n, *given), for example `return torch.zeros(n, 784)`, or call simulate(n, "
            "like=batch)"
        )

    @torch.no_grad()
    def simulate(self, n: int, *given: Tensor, like: Batch | None = None) -> tuple[dict[str, Tensor], Batch]:
        """Draw n data from the generator: ``(latents, batch)``, the latents by site and a batch like those
        trained on.

        ``given`` are the leading parts of a conditional batch (n rows each); ``like`` is a batch whose shapes
        and conditioning parts are used instead of :meth:`placeholder`. Sites that observe a part of the batch
        (or a reshaped view of it) are drawn instead. A model that feeds its observations forward (an
        autoregressive one) would be simulated wrongly: it is refused with a ValueError and must override this
        method.
        """
        if n < 1:
            raise ValueError(f"n: expected a positive number of draws, got {n}")
        if like is None:
            template = batches.as_batch(self.placeholder(n, *given), "placeholder")
        else:
            like = batches.as_batch(like, "like")
            template = batches.rows(like, torch.arange(n) % batches.size(like))
        if batches.size(template) != n:
            raise ValueError(
                f"{type(self).__name__}.placeholder({n}): expected {n} rows, got {batches.size(template)}"
            )
        template = batches.contiguous(template)
        with evaluation_mode(self):
            observed = self._observed_parts(template)
            seed = int(torch.randint(2**31, ()))
            latents, batch, log_probs = self._draw(template, observed, seed)
            _, again, log_probs_again = self._draw(batch, observed, seed)
        changed = [
            name
            for (name, first), second in zip(
                batches.parts(batch).items(), batches.parts(again).values(), strict=True
            )
            if not torch.equal(batches.dense(first), batches.dense(second))
        ]
        # Discrete draws from different distributions may be equal.
        changed += [
            k
            for k, v in log_probs.items()
            if not torch.allclose(v, log_probs_again[k], rtol=1e-6, equal_nan=True)
        ]
        if changed:
            raise ValueError(
                f"{type(self).__name__}.model feeds its observations forward ({changed[0]} depends on them), "
                "and plain simulation would be wrong: override simulate(self, n, *given)"
            )
        return latents, batch

    def _observed_parts(self, batch: Batch) -> dict[str, tuple[int, Tensor]]:
        """The index of the part of the batch that each observed site observes, by shared memory, and the
        view of it that the site sees."""
        trace = prune_subsample_sites(traced(self.model, batch))
        tensors = list(batches.parts(batch).values())
        found = {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or not site["is_observed"]:
                continue
            if type(site["fn"]).__name__ == "Unit":
                raise ValueError(
                    f"the factor {name!r} reweights the draws, and plain simulation would ignore it: "
                    f"{type(self).__name__} must override simulate(self, n, *given)"
                )
            for i, part in enumerate(tensors):
                if batches.same_memory(site["value"], part):
                    found[name] = i, site["value"]
            if name not in found:
                raise ValueError(
                    f"observed site {name!r} observes no part of the batch itself, only something computed "
                    f"from it: {type(self).__name__} must override simulate(self, n, *given)"
                )
        return found

    def _draw(
        self, template: Batch, observed: dict[str, tuple[int, Tensor]], seed: int
    ) -> tuple[dict[str, Tensor], Batch, dict[str, Tensor]]:
        """Latents by site, the batch drawn, and the log probability of each site's draw."""
        cuda = [t.device for t in self.parameters() if t.is_cuda][:1]
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            trace = traced(poutine.uncondition(self.model), template)
        trace = prune_subsample_sites(trace)
        tensors, drawn = list(batches.parts(template).values()), {}
        for name, (i, view) in observed.items():
            # As it lies in the batch: a transposed view is filled as such.
            drawn[id(tensors[i])] = filled = torch.empty_like(tensors[i])
            filled.as_strided(view.shape, view.stride()).copy_(trace.nodes[name]["value"])
        latents = {
            k: s["value"] for k, s in trace.nodes.items() if s["type"] == "sample" and k not in observed
        }
        log_probs = {
            k: s["fn"].log_prob(s["value"], *s["args"], **s["kwargs"])
            for k, s in trace.nodes.items()
            if s["type"] == "sample"
        }
        return latents, batches.change(lambda part: drawn.get(id(part), part), template), log_probs


class ExactPair(Pair):
    """A pair with exact evidence and posterior: subclasses add ``log_evidence(*batch)`` and
    ``posterior(*batch)``.

    Unless a subclass defines another guide, the guide draws the site named by ``latent`` from the exact
    posterior; then the ELBO of every datum equals its evidence for any draw.
    """

    latent = "z"

    def log_evidence(self, *batch: Tensor) -> Tensor:
        """ln p(y) of each datum, [B], in nats (abstract)."""
        raise TypeError(f"{type(self).__name__} must define log_evidence(self, *batch)")

    def posterior(self, *batch: Tensor) -> Any:
        """The exact p(z | y), a Pyro distribution of batch shape [B] (abstract)."""
        raise TypeError(f"{type(self).__name__} must define posterior(self, *batch)")

    def guide(self, *batch: Any, **named: Any) -> None:
        posterior = self.posterior(*batch, **named)
        with pyro.plate(PLATE, posterior.batch_shape[-1]):
            pyro.sample(self.latent, posterior)

    @property
    def exact_guide(self) -> bool:
        """Whether the guide draws from the exact posterior."""
        return type(self).guide is ExactPair.guide


class _CallablePair(Pair):
    def __init__(
        self,
        model: Callable,
        guide: Callable,
        placeholder: Callable | None,
        plate: str | None,
        data_dim: int,
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"{name}: expected a Pyro callable, got a {type(program).__name__}")
        if isinstance(data_dim, bool) or not isinstance(data_dim, int) or data_dim < 0:
            raise ValueError(f"data_dim: expected a dimension, counted from 0, got {data_dim!r}")
        super().__init__()
        run = guide
        if isinstance(guide, GuideMessenger):
            # It runs the model, whose observed sites are none of the guide's.
            run = poutine.block(guide, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
        self.__dict__.update(
            _callables=(model, run), _placeholder=placeholder, _data_plate=plate, _dim=data_dim
        )
        # Registering a PyroModule as a submodule through PyroModule would change its names in the store.
        for part, program in (("generator", model), ("encoder", guide)):
            owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
            if isinstance(owner, nn.Module):
                nn.Module.add_module(self, part, owner)

    @property
    def name(self) -> str:
        model = self.__dict__["_callables"][0]
        return getattr(model, "__name__", type(model).__name__)

    def model(self, *batch: Any, **named: Any) -> Any:
        return self._call(0, batch, named)

    def guide(self, *batch: Any, **named: Any) -> Any:
        return self._call(1, batch, named)

    def _call(self, which: int, batch: tuple[Any, ...], named: dict[str, Any]) -> Any:
        def turned(part: Any) -> Any:
            dim = self.__dict__["_dim"]
            return part.movedim(0, dim) if dim and isinstance(part, Tensor) and part.dim() > dim else part

        return self.__dict__["_callables"][which](
            *map(turned, batch), **{name: turned(part) for name, part in named.items()}
        )

    def placeholder(self, n: int, *given: Tensor) -> Batch:
        make = self.__dict__["_placeholder"]
        return super().placeholder(n, *given) if make is None else make(n, *given)


def traced(program: Callable, batch: Batch) -> Any:
    """The trace of a program run on a batch. A ValueError of the program's is raised as it is, without the
    table of shapes that Pyro appends to its message."""
    try:
        return batches.call(poutine.trace(program).get_trace, batch)
    except ValueError as error:
        cause: BaseException = error
        while "Trace Shapes:" in str(cause) and isinstance(cause.__cause__, ValueError):
            cause = cause.__cause__
        raise cause from cause.__cause__


@contextmanager
def evaluation_mode(pair: Pair) -> Iterator[None]:
    """Context manager for evaluation mode (dropout off, running batch statistics); modes are restored
    afterwards."""
    modules = list(itertools.chain(pair.modules()))
    modes = [m.training for m in modules]
    pair.eval()
    try:
        yield
    finally:
        for m, mode in zip(modules, modes, strict=True):
            m.training = mode

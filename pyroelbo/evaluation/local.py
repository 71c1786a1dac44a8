"""Guides without an encoder: the distributions of a guide's sites with separate parameters for each datum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Transform, constraints, transform_to
from torch.func import functional_call, vmap

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.numerics import positive_count
from pyroelbo.pair import ExactPair, Pair

__all__ = ["FreeGuide", "unamortized"]

_LOC_SCALE = {"loc": constraints.real, "scale": constraints.positive}
_LOC_SCALES = {k: constraints.independent(v, 2) for k, v in _LOC_SCALE.items()}
_VECTOR = constraints.real_vector

# Distributions whose parameters are freed: their constructors' arguments and where those lie.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "Normal": _LOC_SCALE,
    "LogNormal": _LOC_SCALE,
    "Laplace": _LOC_SCALE,
    "MultivariateNormal": {"loc": _VECTOR, "scale_tril": constraints.lower_cholesky},
    "Gamma": {"concentration": constraints.positive, "rate": constraints.positive},
    "Beta": {"concentration1": constraints.positive, "concentration0": constraints.positive},
    "Dirichlet": {"concentration": constraints.independent(constraints.positive, 1)},
    "UniformMixture": _LOC_SCALES,
    "FlowDistribution": {"loc": _VECTOR, "log_scale": _VECTOR, "context": _VECTOR},
}
_MAPS = {"FlowDistribution": "flow"}  # the argument that is a module, and whose weights all data share
_MAPS_RATE = 0.1  # learning rate of such weights, in units of that of the other parameters

_Key = tuple[str, str]
_Free = dict[_Key, Tensor]


class _RelativeCholesky(Transform):
    """x -> diag(s) (I + A / √D), s the exponentials of the diagonal of x and A what is below it: steps of one
    size in all of x move a draw by about as many standard deviations, however many entries A has."""

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.lower_cholesky
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        below = x.tril(-1) / math.sqrt(x.shape[-1])
        scale = x.diagonal(dim1=-2, dim2=-1).exp()
        return torch.diag_embed(scale) + scale.unsqueeze(-1) * below

    def _inverse(self, y: Tensor) -> Tensor:
        scale = y.diagonal(dim1=-2, dim2=-1)
        below = math.sqrt(y.shape[-1]) * y.tril(-1) / scale.unsqueeze(-1)
        return below + torch.diag_embed(scale.log())


def _onto(space: Any) -> Any:
    """The map from unconstrained numbers onto a space."""
    return _RelativeCholesky() if space is constraints.lower_cholesky else transform_to(space)


_OWN = "maps."  # begins the names of weights of a datum's own maps


def _is_weight(key: _Key) -> bool:
    return key[1].startswith(_OWN)


class _Called(nn.Module):
    """A module whose call is that of a method by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *given: Tensor) -> Any:
        return getattr(self.module, method)(*given)


class _OwnMaps:
    """The map ``module`` with weights [B, *] of its own for each datum, on [*, B, d]."""

    def __init__(self, module: nn.Module, weights: dict[str, Tensor]) -> None:
        self.called, self.weights = _Called(module), {f"module.{k}": v for k, v in weights.items()}

    def to_noise(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._call("to_noise", x, context)

    def from_noise(self, e: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._call("from_noise", e, context)

    def _call(self, method: str, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        def one(weights: dict[str, Tensor], *given: Tensor) -> tuple[Tensor, Tensor]:
            return functional_call(self.called, weights, (method, *given))

        present = [x for x in given if x is not None]
        return vmap(one, (0, *(-2 for _ in present)), (-2, -1))(self.weights, *present)


@dataclass(frozen=True)
class _WithMaps:
    """A distribution that draws through maps, those of all data or, where weights are given, its own."""

    make: Callable[..., Any]
    argument: str
    maps: nn.Module

    def __call__(self, **arguments: Tensor) -> Any:
        weights = {k.removeprefix(_OWN): arguments.pop(k) for k in list(arguments) if k.startswith(_OWN)}
        maps = _OwnMaps(self.maps, weights) if weights else self.maps
        return self.make(**{self.argument: maps}, **arguments)


@dataclass(frozen=True)
class _Site:
    make: Callable[..., Any]
    reinterpreted: int
    parameters: dict[str, Tensor]
    spaces: dict[str, Any]


class FreeGuide:
    """The distributions of a guide's sites with free parameters for each datum of the evaluator's batch.

    Freed are the numbers that a network would compute of the datum: of a flow its location, log scale and
    context. With ``maps`` each datum also has maps of its own, with as many weights as those that all data
    share in the guide.

    Raises :class:`Unavailable`, naming the site, for guides whose parameters depend on their own draws,
    masked sites, and distributions without a known reparametrized family.
    """

    def __init__(self, evaluator: Evaluator, maps: bool = False) -> None:
        self.evaluator, self.maps = evaluator, maps
        first, second = self._sites(), self._sites()
        self.sites = first
        self.plates = {name: len(site.plate_shape) for name, site in evaluator.latents.items()}
        for name, site in first.items():
            for key, value in site.parameters.items():
                if not torch.equal(value, second[name].parameters[key]):
                    raise Unavailable(
                        f"guide site {name!r} depends on other draws of the guide: a datum's best member is "
                        "not a single value of its parameters"
                    )

    @torch.no_grad()
    def _sites(self) -> dict[str, _Site]:
        trace = self.evaluator.guide_trace()
        return {name: self._site(name, trace.nodes[name]) for name in self.evaluator.latents}

    def _site(self, name: str, node: Any) -> _Site:
        if node["mask"] is not None and node["mask"] is not True:
            raise Unavailable(f"guide site {name!r} is masked: evaluate data without padding")
        fn, latent = node["fn"], self.evaluator.latents[name]
        while type(fn).__name__ in ("Independent", "ExpandedDistribution"):
            fn = fn.base_dist
        kind = type(fn).__name__
        if kind not in _PARAMETERS:
            raise Unavailable(f"guide site {name!r} is a {kind}: its family is none of {tuple(_PARAMETERS)}")
        lead = (*latent.plate_shape, self.evaluator.size)
        events = latent.event_shape[: latent.event_dim - fn.event_dim]
        spaces = {k: space for k, space in _PARAMETERS[kind].items() if getattr(fn, k) is not None}
        parameters = {}
        for key, space in spaces.items():
            value = getattr(fn, key)
            shape = (*lead, *events, *value.shape[value.dim() - space.event_dim :])
            parameters[key] = value.expand(shape).clone()
        constructor: Any = type(fn)
        make: Callable[..., Any] = partial(constructor, validate_args=False)
        if kind in _MAPS:
            maps = getattr(fn, _MAPS[kind])
            make = _WithMaps(make, _MAPS[kind], maps)
            for key, weight in maps.named_parameters() if self.maps else ():
                parameters[_OWN + key] = weight.expand(self.evaluator.size, *weight.shape).clone()
                spaces[_OWN + key] = constraints.independent(constraints.real, weight.dim())
        return _Site(make, latent.event_dim - latent.batch_dims - fn.event_dim, parameters, spaces)

    def start(self) -> _Free:
        """The amortized guide's parameters, unconstrained, by site and name."""
        return {
            (name, key): _onto(site.spaces[key]).inv(value)
            for name, site in self.sites.items()
            for key, value in site.parameters.items()
        }

    def second_start(self) -> _Free:
        """Another member: every free parameter but the weights of maps shifted by a standard normal draw."""
        return {k: v if _is_weight(k) else v + torch.randn_like(v) for k, v in self.start().items()}

    def member(self, free: Mapping[_Key, Tensor]) -> dict[str, Any]:
        """The distributions by site for unconstrained parameters."""
        out = {}
        for name, site in self.sites.items():
            arguments = {key: _onto(space)(free[name, key]) for key, space in site.spaces.items()}
            out[name] = site.make(**arguments).to_event(site.reinterpreted)
        return out

    def dim(self, key: _Key) -> int:
        """The data dimension of a free parameter."""
        return 0 if _is_weight(key) else self.plates[key[0]]

    def log_weight(self, free: _Free, count: int, rows: slice | None = None) -> Tensor:
        """ln p(y, z) - ln q(z) of reparametrized draws of the member, without the score term in the gradient,
        [count, B], or [count, b] of the rows that ``free`` is of."""
        live, held = self.member(free), self.member({k: v.detach() for k, v in free.items()})
        latents = {name: q.rsample(torch.Size((count,))) for name, q in live.items()}
        total = self.evaluator.log_joint(latents, rows)
        for name, z in latents.items():
            total = total - held[name].log_prob(z).reshape(count, -1, total.shape[-1]).sum(1)
        return total

    def climb(self, start: _Free, steps: int, draws: int, learning_rate: float) -> _Free:
        """Maximize each datum's ELBO over its own parameters, by ``steps`` of Adam on ``draws`` draws each,
        with a cosine schedule; Adam is elementwise, so data do not interact.

        Cost: 3 · steps · draws evaluations per datum. Source: Roeder, Wu and Duvenaud (2017), equation 8.
        """
        size, most = self.evaluator.size, max(1, self.evaluator.cells // draws)
        if most >= size or not self.evaluator.sliceable:
            return self._climb(start, None, steps, draws, learning_rate)
        found = []
        for low in range(0, size, most):
            rows = slice(low, min(low + most, size))
            part = {k: v.narrow(self.dim(k), low, rows.stop - low) for k, v in start.items()}
            found.append(self._climb(part, rows, steps, draws, learning_rate))
        return {k: torch.cat([f[k] for f in found], self.dim(k)) for k in start}

    @torch.enable_grad()
    def _climb(self, start: _Free, rows: slice | None, steps: int, draws: int, learning_rate: float) -> _Free:
        free = {k: v.clone().requires_grad_() for k, v in start.items()}
        optimizer = torch.optim.Adam(
            [
                {"params": [v], "lr": learning_rate * (_MAPS_RATE if _is_weight(k) else 1)}
                for k, v in free.items()
            ]
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            loss = -self.log_weight(free, draws, rows).mean(0).sum()
            gradients = torch.autograd.grad(loss, list(free.values()))
            for parameter, gradient in zip(free.values(), gradients, strict=True):
                parameter.grad = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            optimizer.step()
            schedule.step()
        return {k: v.detach() for k, v in free.items()}


def unamortized(
    pair: Pair, y: Any, steps: int = 0, *, draws: int = 16, learning_rate: float = 0.05
) -> tuple[Pair, Batch]:
    """The pair with a guide of free parameters for each datum of ``y``, and the data for it, (index, y).

    The guide keeps the distributions of ``pair.guide``; their parameters are separate numbers for each datum,
    initialized at the guide's. With ``steps`` the guide is *semi-amortized*: they have made so many steps of
    Adam of size ``learning_rate``, which falls to zero by a cosine, on ``draws`` draws each, from the guide's
    towards the maximum of the datum's ELBO; what ``evidence`` then says of it is a bound like any other, by
    fresh draws. The model is that of ``pair``, whose parameters it shares (part ``generator``; the free ones
    are the part ``encoder``). Batches begin with the indices of the data, as ``fit(*unamortized(pair, y))``
    trains on them; a dict batch gets the key ``index``. The guide has no parameters for data that were not in
    ``y``: audit those with the amortized pair, or give them a free guide with ``freeze=("generator",)``. An
    :class:`ExactPair` keeps its evidence and posterior.

    Raises :class:`Unavailable` as :class:`FreeGuide` does, ValueError for steps, draws or rates that are no
    numbers of their kind. Memory: the parameters of all data; a step of Adam moves them all. Cost: 3 · steps
    · draws evaluations per datum.

    Source: Hoffman, Blei, Wang and Paisley (2013), section 2.2, for local variational parameters; Kim,
    Wiseman, Miller, Sontag and Rush (2018) for their refinement.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected a whole number of at least 0, got {steps!r}")
    check_climb(draws, learning_rate)
    batch = batches.as_batch(y, "y")
    kind = _UnamortizedExact if isinstance(pair, ExactPair) else _Unamortized
    family = FreeGuide(Evaluator(pair, batch))
    free = family.start()
    if steps:
        free = family.climb(free, steps, draws, learning_rate)
    index = torch.arange(batches.size(batch))
    if isinstance(batch, dict):
        return kind(pair, family, free), {"index": index, **batch}
    return kind(pair, family, free), (index, *(batch if isinstance(batch, tuple) else (batch,)))


def check_climb(draws: int, learning_rate: float) -> None:
    """Raise ValueError for draws or a learning rate that :meth:`FreeGuide.climb` cannot use."""
    positive_count("draws", draws)
    if not learning_rate > 0:
        raise ValueError(f"learning_rate: expected a positive number, got {learning_rate!r}")


class _Members(Messenger):
    """Replaces the distributions of a guide."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        super().__init__()
        self.members = members

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.members and not msg["is_observed"]:
            msg["fn"] = self.members[msg["name"]]


class _Unamortized(Pair):
    def __init__(self, pair: Pair, family: FreeGuide, free: _Free) -> None:
        super().__init__()
        self.__dict__.update(_pair=pair, _family=family, _size=family.evaluator.size)
        # Registering the pair as a PyroModule's child would change its names in Pyro's store.
        nn.Module.add_module(self, "generator", pair)
        self.encoder = nn.Module()
        for (site, key), value in free.items():
            # The data dimension first, so that an index selects rows.
            rows = value.movedim(family.plates[site], 0).contiguous()
            self.encoder.register_parameter(_name(site, key), nn.Parameter(rows))

    @property
    def name(self) -> str:
        return f"{self.__dict__['_pair'].name}, free guide"

    def _rest(self, batch: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
        index, batch = (named.pop("index"), batch) if named else (batch[0], batch[1:])
        if index.dim() != 1 or index.is_floating_point():
            size = self.__dict__["_size"]
            raise ValueError(f"index: expected the rows of y, integers in [0, {size - 1}], got {index.dtype}")
        return index, batch

    def model(self, *batch: Any, **named: Any) -> Any:
        _, batch = self._rest(batch, named)
        return self.__dict__["_pair"].model(*batch, **named)

    def guide(self, *batch: Any, **named: Any) -> Any:
        index, batch = self._rest(batch, named)
        family, held = self.__dict__["_family"], self.encoder
        free = {
            (site, key): getattr(held, _name(site, key))[index].movedim(0, family.plates[site])
            for site, kind in family.sites.items()
            for key in kind.parameters
        }
        with _Members(family.member(free)):
            return self.__dict__["_pair"].guide(*batch, **named)


class _UnamortizedExact(_Unamortized, ExactPair):
    def log_evidence(self, *batch: Any, **named: Any) -> Tensor:
        _, batch = self._rest(batch, named)
        return self.__dict__["_pair"].log_evidence(*batch, **named)

    def posterior(self, *batch: Any, **named: Any) -> Any:
        _, batch = self._rest(batch, named)
        return self.__dict__["_pair"].posterior(*batch, **named)

    @property
    def latent(self) -> str:  # type: ignore[override]
        return self.__dict__["_pair"].latent


def _name(site: str, key: str) -> str:
    return f"{site}_{key}".replace(".", "_")

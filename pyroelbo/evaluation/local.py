"""Guides without an encoder: the distributions of a guide's sites with separate parameters for each datum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import transform_to

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.pair import ExactPair, Pair

__all__ = ["FreeGuide", "unamortized"]

# Distributions whose parameters are freed, and the names of their constructors' arguments.
_PARAMETERS = {
    "Normal": ("loc", "scale"),
    "LogNormal": ("loc", "scale"),
    "Laplace": ("loc", "scale"),
    "MultivariateNormal": ("loc", "scale_tril"),
    "Gamma": ("concentration", "rate"),
    "Beta": ("concentration1", "concentration0"),
    "Dirichlet": ("concentration",),
}

_Key = tuple[str, str]


@dataclass(frozen=True)
class _Site:
    kind: Any
    reinterpreted: int
    parameters: dict[str, Tensor]


class FreeGuide:
    """The distributions of a guide's sites with free parameters for each datum of the evaluator's batch.

    Raises :class:`Unavailable`, naming the site, for guides whose parameters depend on their own draws,
    masked sites, and distributions without a known reparametrized family.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
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
        kind = type(fn)
        if kind.__name__ not in _PARAMETERS:
            raise Unavailable(
                f"guide site {name!r} is a {kind.__name__}: its family is none of {tuple(_PARAMETERS)}"
            )
        lead = (*latent.plate_shape, self.evaluator.size)
        parameters = {}
        for key in _PARAMETERS[kind.__name__]:
            value = getattr(fn, key)
            own = kind.arg_constraints[key].event_dim
            events = latent.event_shape[: latent.event_dim - fn.event_dim]
            shape = (*lead, *events, *value.shape[value.dim() - own :])
            parameters[key] = value.expand(shape).clone()
        return _Site(kind, latent.event_dim - latent.batch_dims - fn.event_dim, parameters)

    def start(self) -> dict[_Key, Tensor]:
        """The amortized guide's parameters, unconstrained, by site and name."""
        return {
            (name, key): transform_to(site.kind.arg_constraints[key]).inv(value)
            for name, site in self.sites.items()
            for key, value in site.parameters.items()
        }

    def second_start(self) -> dict[_Key, Tensor]:
        """Another member: every free parameter shifted by a standard normal draw."""
        return {k: v + torch.randn_like(v) for k, v in self.start().items()}

    def member(self, free: Mapping[_Key, Tensor]) -> dict[str, Any]:
        """The distributions by site for unconstrained parameters."""
        out = {}
        for name, site in self.sites.items():
            arguments = {
                key: transform_to(site.kind.arg_constraints[key])(free[name, key]) for key in site.parameters
            }
            out[name] = site.kind(**arguments, validate_args=False).to_event(site.reinterpreted)
        return out


def unamortized(pair: Pair, y: Any) -> tuple[Pair, Batch]:
    """The pair with a guide of free parameters for each datum of ``y``, and the data for it, (index, y).

    The guide keeps the distributions of ``pair.guide``; their parameters are separate numbers for each datum,
    initialized at the guide's. The model is that of ``pair``, whose parameters it shares (part ``generator``;
    the free ones are the part ``encoder``). Batches begin with the indices of the data, as
    ``fit(*unamortized(pair, y))`` trains on them; a dict batch gets the key ``index``. The guide has no
    parameters for data that were not in ``y``: audit those with the amortized pair, or give them a free guide
    with ``freeze=("generator",)``. An :class:`ExactPair` keeps its evidence and posterior.

    Raises :class:`Unavailable` as :class:`FreeGuide` does. Memory: the parameters of all data; a step of Adam
    moves them all.

    Source: Hoffman, Blei, Wang and Paisley (2013), section 2.2, for local variational parameters.
    """
    batch = batches.as_batch(y, "y")
    kind = _UnamortizedExact if isinstance(pair, ExactPair) else _Unamortized
    index = torch.arange(batches.size(batch))
    if isinstance(batch, dict):
        return kind(pair, batch), {"index": index, **batch}
    return kind(pair, batch), (index, *(batch if isinstance(batch, tuple) else (batch,)))


class _Members(Messenger):
    """Replaces the distributions of a guide."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        super().__init__()
        self.members = members

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.members and not msg["is_observed"]:
            msg["fn"] = self.members[msg["name"]]


class _Unamortized(Pair):
    def __init__(self, pair: Pair, batch: Batch) -> None:
        super().__init__()
        family = FreeGuide(Evaluator(pair, batch))
        self.__dict__.update(_pair=pair, _family=family, _size=batches.size(batch))
        # Registering the pair as a PyroModule's child would change its names in Pyro's store.
        nn.Module.add_module(self, "generator", pair)
        self.encoder = nn.Module()
        for (site, key), value in family.start().items():
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

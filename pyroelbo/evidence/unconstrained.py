"""The continuous latents of a datum as one unconstrained vector, with the Jacobian of the transformation."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyroelbo.evaluation.evaluator import Evaluator
from pyroelbo.evaluation.sites import Unavailable
from pyroelbo.evaluation.supports import is_circular
from pyroelbo.evidence.lattice import is_discrete

__all__ = ["Unconstrained"]


class Unconstrained:
    """Maps latents {site: [K, *plates, B, *event]} to u [K, B, D] and back; ``density(u)`` is ln p(y, z(u)) +
    ln |dz/du|.

    Raises :class:`Unavailable` for discrete latents, unless ``partial`` leaves them out, and for supports
    that differ between data.
    """

    def __init__(self, evaluator: Evaluator, partial: bool = False) -> None:
        self.evaluator = evaluator
        self._supports: dict[str, Any] = {}
        self._transforms: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}
        self.dims = 0
        kinds = []
        angles: list[bool] = []
        for name, site in evaluator.latents.items():
            if is_discrete(site):
                if partial:
                    continue
                raise Unavailable(f"latent site {name!r} is discrete")
            self._supports[name] = _common_support(site.support, name)
            transform = _transform(self._supports[name], name)
            self._transforms[name] = transform
            self._shapes[name] = torch.Size((*site.plate_shape, *transform.inverse_shape(site.event_shape)))
            self.dims += self._shapes[name].numel()
            angles += [is_circular(site.support)] * self._shapes[name].numel()
            kinds.append(site.dtype)
        self.dtype = (
            functools.reduce(torch.promote_types, kinds, torch.float32) if kinds else evaluator.layout.dtype
        )
        self._angles = torch.tensor(angles, dtype=torch.bool)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def constrain(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """u [K, B, D] to latents and ln |dz/du|, [K, B]."""
        latents, log_det, start = {}, u.new_zeros(u.shape[:-1]), 0
        for name, shape in self._shapes.items():
            site = self.evaluator.latents[name]
            piece = u[..., start : start + shape.numel()].reshape(*u.shape[:-1], *shape)
            start += shape.numel()
            value = self._transforms[name](piece)
            jacobian = self._transforms[name].log_abs_det_jacobian(piece, value)
            log_det = log_det + jacobian.reshape(*u.shape[:-1], -1).sum(-1)
            latents[name] = value.movedim(1, 1 + len(site.plate_shape))
        return latents, log_det

    def unconstrain(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents to u [K, B, D]."""
        pieces = []
        for name in self._shapes:
            value = latents[name].movedim(1 + len(self.evaluator.latents[name].plate_shape), 1)
            pieces.append(self._transforms[name].inv(value).reshape(*value.shape[:2], -1))
        return torch.cat(pieces, -1)

    def saturated(self, u: Tensor) -> Tensor:
        """Where z(u) cannot be told from the boundary of its support in floating point, so that the density
        there means nothing: [K, B]."""
        latents, _ = self.constrain(u)
        again = self.unconstrain(latents)
        same = (again - u).abs() <= 0.01 * (1 + u.abs())
        return ~(same | self._angles.to(u.device)).all(-1)

    def inside(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Whether latents lie in the model's support, [K, B]; :meth:`unconstrain` moves others to its
        boundary."""
        found = []
        for name, support in self._supports.items():
            site = self.evaluator.latents[name]
            event = tuple(range(1, 1 + len(site.plate_shape)))
            ok = support.check(latents[name])
            ok = ok.reshape(*ok.shape[: 2 + len(event)], -1).all(-1)
            found.append(ok.all(event) if event else ok)
        return torch.stack(found).all(0)

    def density(self, u: Tensor, rows: Any = None) -> Tensor:
        """ln p(y, z) + ln |dz/du| of u [K, B, D] for the given rows of the batch, [K, B]."""
        latents, log_det = self.constrain(u)
        value = self.evaluator.log_joint(latents, rows) + log_det
        angles = u[..., self._angles.to(u.device)]
        return value + _log_share(angles).sum(-1) if angles.shape[-1] else value


class _Wrap:
    """The line onto the circle [-π, π); u and u + 2π are the same angle."""

    def __call__(self, u: Tensor) -> Tensor:
        return torch.remainder(u + math.pi, 2 * math.pi) - math.pi

    def inv(self, angle: Tensor) -> Tensor:
        return angle

    def log_abs_det_jacobian(self, u: Tensor, angle: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return shape


def _log_share(u: Tensor, spread: float = 1.5) -> Tensor:
    """ln ψ(u) with Σ_k ψ(u + 2πk) = 1: the share of an angle's density that u has on the line.

    ∫ f(wrap(u)) ψ(u) du over the line is ∫ f over one period, and the integrand stays smooth where a period
    ends.
    """
    turns = 2 * math.pi * torch.arange(-4, 5, dtype=u.dtype, device=u.device)
    around = _Wrap()(u).unsqueeze(-1) + turns
    return -0.5 * (u / spread).square() - torch.logsumexp(-0.5 * (around / spread).square(), -1)


def _transform(support: Any, name: str) -> Any:
    if is_circular(support):
        return _Wrap()
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise Unavailable(
            f"latent site {name!r}: no map from the whole line to its support {support}"
        ) from error


def _common_support(support: Any, name: str) -> Any:
    """The support with one number per bound, for all data."""
    if isinstance(support, constraints.independent):
        return constraints.independent(
            _common_support(support.base_constraint, name), support.reinterpreted_batch_ndims
        )
    bounds = {k: v for k, v in vars(support).items() if isinstance(v, Tensor)}
    if not bounds:
        return support
    for value in bounds.values():
        if not bool((value == value.reshape(-1)[0]).all()):
            raise Unavailable(f"the support of latent site {name!r} differs between data or dimensions")
    numbers = {k: float(bounds[k].reshape(-1)[0]) if k in bounds else v for k, v in vars(support).items()}
    fresh = object.__new__(type(support))
    fresh.__dict__.update(numbers)
    return fresh

"""Masks that differ between model and guide: the model's mask decides, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Independent

from pyroelbo.evaluation.supports import movable, spread, support_of

__all__ = ["ModelMasks", "event_mask", "is_masked", "log_prob_of", "masked"]

_SHARED = "_shared_latent"


class ModelMasks(Messenger):
    """Makes the model's masks those of the guide; a handler of both programs, ``with ModelMasks(): ...``.

    A masked entry of a latent has no term in the model. Without a term in the guide it leaves the ELBO; with
    one, or if the guide masks an entry that the model does not, what is computed is no bound. So every guide
    site that the model is replayed on gets the model's mask, as does the auxiliary site
    ``<name>_unconstrained`` that an automatic guide draws it from. ``d.mask(m)`` is the same as
    ``poutine.mask(mask=m)`` around the site.

    It must be inside ``poutine.trace`` and ``poutine.replay``: wrap the programs, not the loss. Whether a
    masked entry is unused is for :func:`~pyroelbo.evaluation.probes.check_masks` to find out.

    ``NeuTraReparam`` masks its latent z, the site ``<x>_shared_latent`` with the base density b(z), and puts
    the whole density f into the observed ``Delta`` site ``<x>``. As f = b · f / b, the latent gets its prior
    b back, and the Delta gets f / b.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shared: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        fn, mask, name = msg["fn"], msg["mask"], msg["name"]
        if name in self._shared and msg["is_observed"] and isinstance(fn, Delta):
            msg["fn"] = _without(self._shared.pop(name), fn, name)
            return
        while isinstance(fn, MaskedDistribution) and not msg["is_observed"]:
            mask = fn._mask if mask is None else _both(mask, fn._mask)
            fn = fn.base_dist
        if mask is False and name.endswith(_SHARED) and _reparametrized():
            self._shared[name.removesuffix(_SHARED)] = msg
            mask = None
        msg["fn"], msg["mask"] = fn, mask

    def _pyro_post_sample(self, msg: Any) -> None:
        name = msg["name"]
        for frame in _PYRO_STACK:
            if isinstance(frame, ReplayMessenger) and frame.trace is not None and name in frame.trace.nodes:
                for drawn in (name, f"{name}_unconstrained"):
                    node = frame.trace.nodes.get(drawn)
                    if node is not None and (drawn == name or node["infer"].get("is_auxiliary")):
                        node["mask"] = msg["mask"]


def _reparametrized() -> bool:
    return any(isinstance(frame, ReparamMessenger) for frame in _PYRO_STACK)


def _without(latent: Any, delta: Delta, name: str) -> Delta:
    """The factor ``delta`` divided by the density of ``latent``."""
    prior = latent["fn"].log_prob(latent["value"])
    if delta.log_density.numel() > prior.numel():
        raise ValueError(
            f"model site {name!r}: expected a first latent outside all plates, got one inside a plate: "
            "NeuTraReparam counts its Jacobian for each element of that plate, and no bound follows. Audit "
            "the model without NeuTraReparam, with the guide that it was made from"
        )
    return Delta(delta.v, delta.log_density - prior, event_dim=delta.event_dim)


def _both(a: Any, b: Any) -> Any:
    if isinstance(a, bool) or isinstance(b, bool):
        return (b if a else False) if isinstance(a, bool) else (a if b else False)
    return a & b


def is_masked(mask: Any) -> bool:
    return mask is not None and mask is not True


def masked(log_prob: Tensor, mask: Any) -> Tensor:
    """The log probability, zero where the mask is False."""
    if mask is None or mask is True:
        return log_prob
    if mask is False:
        return torch.zeros_like(log_prob)
    return torch.where(mask, log_prob, log_prob.new_zeros(()))


def log_prob_of(site: Any, *, latent: bool = False) -> Tensor:
    """The unscaled log probability of a traced site, masked unless it is that of a ``latent``: a masked one
    keeps its prior, which sums to one.

    An observation has -inf outside a support whose bounds may depend on latents, where the distribution's
    formula can be finite (a Pareto's is).
    """
    fn, value = site["fn"], site["value"]
    if site["is_observed"] and movable(fn):
        log_prob = _within_support(fn, value)
    else:
        log_prob = fn.log_prob(value, *site["args"], **site["kwargs"])
    return log_prob if latent else masked(log_prob, site["mask"])


def _within_support(fn: Any, value: Tensor) -> Tensor:
    if isinstance(fn, MaskedDistribution):
        return masked(_within_support(fn.base_dist, value), fn._mask)
    if isinstance(fn, Independent):
        return sum_rightmost(_within_support(fn.base_dist, value), fn.reinterpreted_batch_ndims)
    return torch.where(support_of(fn).check(spread(fn, value)), fn.log_prob(value), -math.inf)


def event_mask(fn: Any) -> Tensor | bool | None:
    """The mask inside an event, as of ``Normal(...).mask(m).to_event(1)``; None if there is none."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
        if isinstance(fn, MaskedDistribution):
            return fn._mask
    return None

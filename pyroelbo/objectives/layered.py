"""The ELBO with closed-form KL terms where they are the bound's own, free bits and KL balancing."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.inspect import get_dependencies
from torch import Tensor
from torch.distributions import kl_divergence

from pyroelbo.objectives.base import Pathwise

__all__ = ["Layered_ELBO", "mean_field_fault"]


class Layered_ELBO(Pathwise):
    """E_q[-ln p(y | z)] + ``weight`` · Σ_l γ_l · max(``free_bits``, KL_l) over the latent sites l, in nats.

    KL_l is the mean over the batch of KL(q(z_l | …), p(z_l | …)), in closed form exactly where that is the
    bound's own term and torch knows the form, of ln q - ln p at the draw elsewhere: a site's closed form is
    its term if every latent that the model draws before it is drawn before it by the guide too (top-down
    encoders: all sites; bottom-up ones: the top site). ``free_bits`` is the number of nats that each site may
    use without being pushed down (a nat, despite the name, is 1.44 bits).
    ``balance`` sets γ_l ∝ KL_l (held fixed), with mean 1, while ``weight`` is below 1, so that sites that say
    little are pushed down less during warm-up; γ_l = 1 otherwise. With ``free_bits=0``, weight 1 the loss is
    -ELBO; otherwise an objective, no bound.

    ``fit(objective="layered")`` takes it as it stands; ``fit(objective=Layered_ELBO(free_bits=0.5), kl_weight=...)``
    anneals its weight. Raises ValueError, naming the site, for latents that are not reparametrized.

    Sources: Kingma et al. (2016), equation 15 (free bits); Vahdat and Kautz (2020), appendix A (balancing).
    """

    def __init__(
        self, free_bits: float = 0.0, balance: bool = False, weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        if not free_bits >= 0:
            raise ValueError(f"free_bits takes a number of nats of at least 0, got {free_bits!r}")
        self.free_bits, self.balance = float(free_bits), balance

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        loss: Any = 0.0
        terms = []
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if name in guide_trace.nodes and not site["is_observed"]:
                terms.append(self._term(name, site, guide_trace.nodes[name], model_trace, guide_trace))
            else:
                loss = loss - site["log_prob_sum"]
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                loss = loss + site["log_prob_sum"]
        if terms:
            sums, means, floors = (torch.stack(part) for part in zip(*terms, strict=True))
            # A sampled term may be negative, and counts as it is where nothing is free.
            kls = torch.where(means > self.free_bits, sums, floors) if self.free_bits else sums
            if self.balance:
                share = means.detach().clamp_min(0) + 1e-6
                share = share / share.mean()
                kls = kls * torch.where(self.scale < 1, share, torch.ones_like(share))
            loss = loss + self.scale * kls.sum()
        return loss.detach(), loss

    def _term(
        self, name: str, site: Any, drawn: Any, model: Any, guide: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A site's KL summed with its scale, its mean for one datum (unscaled), and the sum if that mean were
        ``free_bits``."""
        self._check_pathwise(name, drawn)
        kl = None
        if not _drawn_later(name, model, guide):
            with suppress(NotImplementedError):  # torch does not know every form
                kl = kl_divergence(drawn["fn"], site["fn"])
        if kl is None:
            kl = drawn["fn"].log_prob(drawn["value"]) - site["fn"].log_prob(site["value"])
        scale, mask = drawn["scale"], drawn["mask"]
        counted = scale_and_mask(torch.ones_like(kl), 1.0, mask)
        mean = scale_and_mask(kl, 1.0, mask).sum() / counted.sum().clamp_min(1)
        floor = scale_and_mask(self.free_bits * counted, scale).sum()
        return scale_and_mask(kl, scale, mask).sum(), mean, floor


def _latents(trace: Any) -> list[str]:
    return [
        k
        for k, s in trace.nodes.items()
        if s["type"] == "sample" and not s["is_observed"] and type(s["fn"]).__name__ != "_Subsample"
    ]


def _drawn_later(name: str, model: Any, guide: Any) -> list[str]:
    """Latents that the model draws before ``name`` and the guide after it."""
    before, drawn = _latents(model), _latents(guide)
    later = set(drawn[drawn.index(name) + 1 :])
    return [k for k in before[: before.index(name)] if k in later]


def mean_field_fault(model: Any, guide: Any, *args: Any, **kwargs: Any) -> str | None:
    """Why :class:`~pyro.infer.TraceMeanField_ELBO` would be no bound for this pair; None if it is its bound.

    It puts KL(q(z_l | …), p(z_l | …)) in closed form, at drawn values of what both stand on. Where the model's
    z_l stands on a z_k that the guide draws *from* z_l, z_l and z_k depend on each other given what is drawn,
    and the number belongs to another guide: it may lie on either side of the ELBO. The order of sites alone
    does not tell; where it differs, Pyro's provenance does.
    """
    traced = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.trace(poutine.replay(model, trace=traced)).get_trace(*args, **kwargs)
    suspects = {k: _drawn_later(k, replayed, traced) for k in _latents(replayed) if k in traced.nodes}
    if not any(suspects.values()):
        return None
    above = get_dependencies(model, args, kwargs)["prior_dependencies"]
    stands_on = {k: set(v) for k, v in get_dependencies(guide, args, kwargs)["prior_dependencies"].items()}
    for site in traced.nodes:  # in the order of drawing, so one pass closes the relation
        if site in stands_on:
            stands_on[site] |= set().union(*(stands_on[k] for k in stands_on[site] if k != site), ())
    for site, later in suspects.items():
        for other in later:
            if other in above[site] and site in stands_on[other]:
                return (
                    f"the model draws {site!r} from {other!r} and the guide {other!r} from {site!r}: the closed-form KL of "
                    f"{site!r} is not this bound's term, as the two depend on each other. Take objective='elbo' or "
                    "'layered', which samples it, or a top-down guide"
                )
    return None

"""The ELBO with closed-form KL terms where they equal the bound's terms: free bits, KL balancing, rate
targets."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import data_frame
from pyroelbo.objectives.base import Pathwise, refuse_failing
from pyroelbo.objectives.order import drawn_later
from pyroelbo.pair import Pair

__all__ = ["Layered_ELBO", "Rate_ELBO"]


class _BySite(Pathwise):
    """An objective of the reconstruction and the KL of each latent site (abstract)."""

    def check(self, pair: Pair, batch: Batch) -> None:
        refuse_failing(self, pair, batch, "reparametrized latents in the data plate")

    def _parts(self, model_trace: Any, guide_trace: Any) -> tuple[Any, dict[str, Tensor]]:
        """The terms that are no KL, a sum, and each latent's KL, unscaled and unsummed: in closed form where
        that is the bound's term and torch implements it, otherwise ln q - ln p at the draw."""
        rest: Any = 0.0
        terms: dict[str, Tensor] = {}
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if name in guide_trace.nodes and not site["is_observed"]:
                terms[name] = self._kl(name, site, guide_trace.nodes[name], model_trace, guide_trace)
            else:
                rest = rest - site["log_prob_sum"]
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:
                rest = rest + site["log_prob_sum"]
        return rest, terms

    def _kl(self, name: str, site: Any, drawn: Any, model: Any, guide: Any) -> Tensor:
        self._check_pathwise(name, drawn)
        if not drawn_later(name, model, guide):
            with suppress(NotImplementedError):  # torch does not implement every pair
                return kl_divergence(drawn["fn"], site["fn"])
        return drawn["fn"].log_prob(drawn["value"]) - site["fn"].log_prob(site["value"])


class Layered_ELBO(_BySite):
    """E_q[-ln p(y | z)] + ``weight`` · Σ_l γ_l · max(``free_bits``, KL_l) over the latent sites l, in nats.

    KL_l is the batch mean of KL(q(z_l | …), p(z_l | …)): in closed form where that is the bound's term and
    torch implements it, otherwise ln q - ln p at the draw. The closed form is the bound's term if every
    latent that precedes z_l in the model also precedes it in the guide (top-down encoders: all sites;
    bottom-up: the top site).

    With ``free_bits=0`` and weight 1 the loss is -ELBO; otherwise it is an objective, not a bound.
    ``fit(objective="layered")`` uses the defaults; ``fit(objective=Layered_ELBO(free_bits=0.5),
    kl_weight=...)`` anneals the weight.

    Args:
        free_bits: nats that each site may use without penalty (despite the name; a nat is 1.44 bits).
        balance: while ``weight`` is below 1, γ_l ∝ KL_l (held constant) with mean 1, so that sites with
            little information are penalized less during warm-up; otherwise γ_l = 1.
        weight: weight of the KL terms.
        options: of Pyro's ELBO, such as ``num_particles``.

    Raises ValueError, naming the site, for latents that are not reparametrized.

    Sources: Kingma et al. (2016), equation 15 (free bits); Vahdat and Kautz (2020), appendix A (balancing).
    """

    def __init__(
        self, free_bits: float = 0.0, balance: bool = False, weight: float = 1.0, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        if not free_bits >= 0:
            raise ValueError(f"free_bits: expected a number of nats of at least 0, got {free_bits!r}")
        self.free_bits, self.balance = float(free_bits), balance

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        loss, parts = self._parts(model_trace, guide_trace)
        terms = [self._term(kl, guide_trace.nodes[name]) for name, kl in parts.items()]
        if terms:
            sums, means, floors = (torch.stack(part) for part in zip(*terms, strict=True))
            # A sampled term may be negative; without free bits it is kept as it is.
            kls = torch.where(means > self.free_bits, sums, floors) if self.free_bits else sums
            if self.balance:
                share = means.detach().clamp_min(0) + 1e-6
                share = share / share.mean()
                kls = kls * torch.where(self.scale < 1, share, torch.ones_like(share))
            loss = loss + self.scale * kls.sum()
        return loss.detach(), loss

    def _term(self, kl: Tensor, drawn: Any) -> tuple[Tensor, Tensor, Tensor]:
        """A site's KL: the scaled sum, the unscaled mean per datum, and the scaled sum if that mean were
        ``free_bits``.
        """
        scale, mask = drawn["scale"], drawn["mask"]
        counted = scale_and_mask(torch.ones_like(kl), 1.0, mask)
        mean = scale_and_mask(kl, 1.0, mask).sum() / counted.sum().clamp_min(1)
        floor = scale_and_mask(self.free_bits * counted, scale).sum()
        return scale_and_mask(kl, scale, mask).sum(), mean, floor


class Rate_ELBO(_BySite):
    """E_q[-ln p(y | z)] + ``weight`` · |KL - ``rate``|, in nats per datum: the reconstruction at a rate that
    is asked for.

    KL is the batch mean of Σ_l KL(q(z_l | …), p(z_l | …)), each term as in :class:`Layered_ELBO`. With weight
    1 the loss is -ELBO + 2 · max(0, ``rate`` - KL) - ``rate``: a minimum rate, as an exact penalty; a rate
    below the ELBO's own takes a larger weight. It is no bound; ``validate`` and ``audit`` give the ELBO. A
    rate is no information by itself: KL = I(y; z) + KL(q(z), p(z)), see
    :func:`~pyroelbo.evidence.diagnostics`.

    Args:
        rate: nats per datum that the latents shall carry.
        weight: of the distance from it.
        options: of Pyro's ELBO, such as ``num_particles``.

    Raises ValueError, naming the site, for latents that are not reparametrized or outside the data plate.

    Source: Alemi, Poole, Fischer, Dillon, Saurous and Murphy (2018), section 4; Pelsmaeker and Aziz (2020)
    for minimum rates.
    """

    def __init__(self, rate: float, weight: float = 1.0, **options: Any) -> None:
        super().__init__(weight, **options)
        if not 0 <= rate < math.inf:
            raise ValueError(f"rate: expected a number of nats of at least 0, got {rate!r}")
        self.rate = float(rate)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        loss, parts = self._parts(model_trace, guide_trace)
        total, count = torch.zeros_like(self.scale), 0.0
        for name, kl in parts.items():
            drawn = guide_trace.nodes[name]
            frame = data_frame(drawn, "guide")
            count = float(frame.size if frame.full_size is None else frame.full_size)
            total = total + scale_and_mask(kl, drawn["scale"], drawn["mask"]).sum()
        copies = self.num_particles if self.vectorize_particles else 1
        loss = loss + self.scale * (total - copies * count * self.rate).abs()
        return loss.detach(), loss

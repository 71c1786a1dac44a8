"""The layer-by-layer loss of a chain: encoders and decoders without a prior, then the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyroelbo.batch import Batch
from pyroelbo.objectives.base import Objective, OneExpression, Update
from pyroelbo.pair import MarkovLinks, Pair, Program

__all__ = ["Progressive_ELBO"]


class Progressive_ELBO(Objective, OneExpression, ELBO):
    """Σ_l E[-ln p(z_{l-1} | z_l)] - E ln p(z_N) of a chain, summed over the batch: every layer is trained by
    the data that the layers below make of y.

    z_0 = y, and z_l is drawn from q(z_l | z_{l-1}) with z_{l-1} held fixed. So the l-th term has gradients
    for the links between z_{l-1} and z_l only (modules that several links share get those of all), and the
    last term for the prior only: the encoder does not know the prior, nor a layer those above it. ``phase``
    1 is the sum, without a prior; 2 is the last term, with all else fixed; None trains both in one run. With
    universal links and prior the result is the population's distribution, whatever the encoder.

    The value of both phases together is the hard loss (:class:`~pyroelbo.objectives.Hard_ELBO`), a bound for
    discrete latents. For continuous ones it lacks the entropies of q, which are constants if q adds a fixed
    noise; free encoders need discrete codes, or the loss has no lower end. Validation is by the ELBO, which
    means nothing before phase 2.

    ``model`` must be the pair's own ``pair.model``. Raises ValueError for pairs without
    :meth:`~pyroelbo.Pair.markov_links`, priors with a site of their own, and encoders without pathwise
    gradients; TypeError for other models.

    Source: McAllester (2022), TTIC 31230, Progressive VAEs.
    """

    weightable = False
    scales_subsamples = False

    def __init__(self, phase: int | None = None) -> None:
        super().__init__()
        if phase not in (None, 1, 2):
            raise ValueError(f"phase: expected 1, 2 or None, got {phase!r}")
        self.phase = phase

    def updates(self) -> Mapping[str, Update]:
        parts = ("prior",) if self.phase == 2 else None  # the rest has an auxiliary loss of its own, maybe
        return {"loss": Update(self, parts)}

    def check(self, pair: Pair, batch: Batch) -> None:
        links = _links(pair)
        own = getattr(getattr(links.prior, "prior", links.prior), "own_site", None)
        if own is not None:
            raise ValueError(
                f"objective 'progressive': expected a prior with a density of z_N, got one with a latent "
                f"site of its own, {own!r}"
            )
        with torch.no_grad(), torch.random.fork_rng():
            z: Any = batch
            for layer, link in enumerate(links.encoder, 1):
                q = link(z)
                if not q.has_rsample:
                    raise ValueError(
                        f"guide site 'z_{layer}': expected a reparametrized distribution, got "
                        f"{type(q).__name__}: Progressive_ELBO takes pathwise gradients"
                    )
                z = q.rsample()

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError("Progressive_ELBO runs the links of a chain, not its programs: it has no traces")

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        pair = getattr(model, "pair", None)
        if not isinstance(pair, Pair):
            raise TypeError(f"model: expected the model of a Pair, got a {type(model).__name__}")
        # as a program of its pair, so that SVI sees the parameters
        return Program(pair, self._loss)(*args, **kwargs)

    def _loss(self, pair: Pair, y: Tensor) -> Tensor:
        links, z = _links(pair), y
        terms: list[Tensor] = []
        for encode, decode in zip(links.encoder, links.generator, strict=True):
            below = z.detach() if z.requires_grad else z
            with torch.set_grad_enabled(self.phase != 2 and torch.is_grad_enabled()):
                z = encode(below).rsample()
            if self.phase != 2:
                terms.append(decode(z).log_prob(below).sum())
        if self.phase != 1:
            terms.append(links.prior().log_prob(z.detach()).sum())
        return -torch.stack(terms).sum()


def _links(pair: Pair) -> MarkovLinks:
    links = pair.markov_links()
    if links is None:
        raise ValueError(
            f"objective 'progressive': expected a chain with a bottom-up encoder, whose links see their "
            f"neighbours alone, got {pair.name}"
        )
    return links

"""The importance-weighted bound as a training objective."""

from __future__ import annotations

import math
from typing import Any

from pyroelbo import evidence
from pyroelbo.batch import Batch
from pyroelbo.evaluation.sites import data_frame, sample_sites
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.objectives.base import Pathwise, refuse_failing
from pyroelbo.objectives.terms import per_datum
from pyroelbo.pair import Pair
from pyroelbo.results import Bound

__all__ = ["IWAE_ELBO"]


class IWAE_ELBO(Pathwise):
    """-Σ_b ln (1/K) Σ_k w_kb: minus the importance-weighted bound of K = ``num_particles`` draws of the
    guide, in nats.

    ln w_kb = ln p(y_b | z_kb) + ``weight`` · (ln p(z_kb) - ln q(z_kb | y_b)), for each datum of the plate
    "data", whose subsampling scale multiplies the bound and never the weights. The particles are one
    vectorized plate, so what does not depend on them (features of y) is computed once. With ``weight`` 1 it
    is a lower bound on ln p(y), at least the ELBO and monotone in K; K = 1 is the ELBO. The signal-to-noise
    ratio of the guide's gradient falls as K grows (Rainforth et al., 2018): use few particles, or use it as a
    last phase.

    Raises ValueError, naming the site, for latents that are not reparametrized or that the guide lacks, sites
    outside the data plate, and scales other than the plate's own, which would enter the weights. Cost: K
    evaluations a datum.

    Source: Burda, Grosse and Salakhutdinov (2016), equation 8.
    """

    takes_particles = True

    def __init__(self, num_particles: int = 5, weight: float = 1.0, **options: Any) -> None:
        count = positive_count("num_particles", num_particles, "number of draws")
        super().__init__(weight, num_particles=count, vectorize_particles=True, **options)

    def check(self, pair: Pair, batch: Batch) -> None:
        refuse_failing(self, pair, batch, "networks that accept a leading dimension of particles")

    def validate(self, pair: Pair, y: Batch) -> Bound:
        return evidence.iwae(pair, y, particles=self.num_particles)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        log_w: Any = 0.0
        outer, particles = 1.0, self.num_particles
        for name, site in sample_sites(model_trace):
            frame = data_frame(site, "model")
            outer = 1.0 if frame.full_size is None else frame.full_size / frame.size
            log_p = per_datum(site, frame, outer, "model", particles > 1)
            if site["is_observed"]:
                log_w = log_w + log_p
                continue
            if name not in guide_trace.nodes:
                raise ValueError(
                    f"model site {name!r}: expected a site of the same name in the guide, got none"
                )
            drawn = guide_trace.nodes[name]
            self._check_pathwise(name, drawn)
            log_w = log_w + self.scale * (log_p - per_datum(drawn, frame, outer, "guide", particles > 1))
        for name, site in sample_sites(guide_trace):
            if name not in model_trace.nodes:
                frame = data_frame(site, "guide")
                log_w = log_w - self.scale * per_datum(site, frame, outer, "guide", particles > 1)
        bound = log_w if particles == 1 else logsumexp(log_w, 0) - math.log(particles)
        # Trace_ELBO divides the sum over particles by their number.
        loss = -outer * particles * bound.sum()
        return loss.detach(), loss

"""The hidden Markov model: a chain of finite latents, summed by forward-backward."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.models.families import FAMILIES, AnyGaussian, Categorical, log_shares
from pyroelbo.models.sequences import check_lengths, within
from pyroelbo.pair import PLATE, ExactPair, LatentPath

__all__ = ["HMM"]


class HMM(ExactPair):
    """p(z) = p(z_1) Π p(z_{t+1} | z_t) over S states, p(y | z) = Π_t p(y_t | z_t). Batches ``y`` or ``(y, lengths)``.

    ``emission``: ``categorical`` over ``dims`` symbols, y LongTensor [B, T]; ``gaussian`` (diagonal) or
    ``full_gaussian`` (scales above ``floor``), ``bernoulli`` (0 or 1) or ``poisson`` (counts) in ``dims``
    coordinates, y [B, T, dims].
    ``lengths [B]`` shortens sequences: what lies beyond is ignored, though it must be in the support. The
    latent site ``z`` is the whole path, LongTensor [B, T].

    ``guide="exact"`` draws the path from p(z | y); ``"mean_field"`` takes every step on its own,
    q(z_t | y_t) = softmax(linear(y_t)): its gap is what the chain knows and one step does not.
    ``smoothing`` = a adds a pseudo-count to every start, move and (categorical, Bernoulli, Poisson) outcome:
    MAP. ``steps`` is the length that :meth:`simulate` draws; else give it ``like=``.

    Parts: ``prior`` (initial [S], transition [S, S] (from, to), logits), ``generator``, ``encoder``.
    Cost: O(B·T·S²). Source: Rabiner (1989); Baum, Petrie, Soules, Weiss (1970).
    """

    def __init__(
        self,
        states: int,
        dims: int,
        emission: str = "categorical",
        guide: str = "exact",
        steps: int | None = None,
        smoothing: float = 0.0,
        floor: float = 1e-3,
    ) -> None:
        super().__init__()
        if emission not in FAMILIES:
            raise ValueError(f"emission takes one of {tuple(FAMILIES)}, got {emission!r}")
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide takes 'exact' or 'mean_field', got {guide!r}")
        for name, value in (("states", states), ("dims", dims)):
            if value < 1:
                raise ValueError(f"{name} takes a positive number, got {value}")
        self.states, self.dims, self.steps, self.smoothing = states, dims, steps, smoothing
        self.prior = nn.Module()
        self.prior.register_parameter("initial", nn.Parameter(0.1 * torch.randn(states)))
        self.prior.register_parameter("transition", nn.Parameter(torch.randn(states, states)))
        family = FAMILIES[emission]
        option = floor if issubclass(family, AnyGaussian) else smoothing
        self.generator = family(states, dims, option)  # type: ignore[call-arg]
        self.encoder = nn.Linear(dims, states) if guide == "mean_field" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        event = self.generator.event
        if y.dim() != 2 + len(event) or y.shape[2:] != event:
            raise ValueError(
                f"y has shape {tuple(y.shape)}: this HMM takes [B, T{''.join(f', {d}' for d in event)}]"
            )
        check_lengths(lengths, y)
        if not event and y.is_floating_point():
            raise ValueError(f"y is a {y.dtype} tensor: this HMM takes symbols, integers [B, T]")
        if event:
            return y if y.is_floating_point() else y.to(self.prior.initial.dtype)
        return y.long()

    def _hmm(self, steps: int, lengths: Tensor | None) -> ped.HMM:
        p = self.prior
        if p.initial.dim() == 1:
            return ped.HMM(p.initial, p.transition, self.generator.distribution(), steps, lengths)
        # starts of EM side by side: [R, 1] beside the data's [1, B]
        stack = (slice(None), None)
        emission = self.generator.distribution(stack)
        return ped.HMM(p.initial[stack], p.transition[stack], emission, steps, lengths)

    def model(self, y: Tensor, lengths: Tensor | None = None) -> None:
        steps = self._check(y, lengths).shape[1]
        with pyro.plate(PLATE, len(y)):
            z = pyro.sample("z", self._hmm(steps, lengths).prior)
            emitted = self.generator.distribution(z)
            if lengths is not None:
                emitted = emitted.mask(within(y, lengths))
            pyro.sample("y", emitted.to_event(1), obs=y)

    def guide(self, y: Tensor, lengths: Tensor | None = None) -> None:
        with pyro.plate(PLATE, len(y)):
            pyro.sample("z", self.posterior(y, lengths) if self.encoder is None else self._encode(y, lengths))

    def _encode(self, y: Tensor, lengths: Tensor | None) -> ped.LinearChain:
        seen = F.one_hot(y.long(), self.dims) if isinstance(self.generator, Categorical) else y
        assert self.encoder is not None
        local = self.encoder(seen.to(self.encoder.weight.dtype))
        flat = local.new_zeros(self.states, self.states)
        return ped.LinearChain(flat[:1], flat[None], local, lengths)

    def log_evidence(self, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ln p(y), [B], in nats, by the forward recursion."""
        return self.posterior(y, lengths).log_partition

    def posterior(self, y: Tensor, lengths: Tensor | None = None) -> ped.LinearChain:
        """p(z | y), a chain over paths; its ``log_partition`` is ln p(y)."""
        y = self._check(y, lengths)
        return self._hmm(y.shape[1], lengths).posterior(self._beside(y))

    def _beside(self, y: Tensor) -> Tensor:
        return y if self.prior.initial.dim() == 1 else y[None]

    def latent_path(self, y: Tensor, lengths: Tensor | None = None) -> LatentPath:
        y = self._check(y, lengths)
        prior, q = (
            self.prior,
            self.posterior(y, lengths) if self.encoder is None else self._encode(y, lengths),
        )
        first, moves = (x.expand(len(y), *x.shape[1:]) for x in q.conditionals())
        initial, transition = prior.initial.log_softmax(-1), prior.transition.log_softmax(-1)
        rows = torch.arange(len(y), device=y.device)
        return LatentPath(
            y.shape[1],
            lambda t, past: dist.Categorical(logits=initial if past is None else transition[past]),
            lambda t, past: dist.Categorical(logits=first if past is None else moves[rows, t - 1, past]),
            lambda t, z: self.generator.distribution(z).log_prob(y[:, t]),
            lengths,
        )

    def e_step(
        self, y: Tensor, lengths: Tensor | None = None, hard: bool = False
    ) -> tuple[Tensor, dict[str, Any]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) of the best path) and the statistics of :meth:`m_step`."""
        y = self._check(y, lengths)
        evidence, used = self.posterior(y, lengths).expected_parts(hard=hard)
        initial, transition, visits = used
        if lengths is None:
            visits, seen = visits.flatten(-3, -2), y.flatten(0, 1)
        else:
            inside = within(y, lengths)
            visits, seen = visits[..., inside, :], y[inside]
        emitted = self.generator.statistics(visits, seen)
        return evidence, {"initial": initial[..., 0, :], "transition": transition[..., 0, :, :], **emitted}

    def stacks(self, y: Tensor, lengths: Tensor | None = None) -> bool:
        """Whether parameters may be stacked, one start of EM each, and are the faster for it."""
        return len(y) <= 4 and y.shape[1] * self.states <= 2**14

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Start, moves and emissions that maximize the expected log joint (plus :meth:`log_prior`)."""
        p = self.prior
        p.initial.copy_(log_shares(statistics["initial"], self.smoothing, p.initial))
        p.transition.copy_(log_shares(statistics["transition"], self.smoothing, p.transition))
        self.generator.m_step(statistics)

    def log_prior(self) -> Tensor:
        """The log density, up to a constant, that ``smoothing`` stands for."""
        total, p = self.generator.log_prior(), self.prior
        if self.smoothing:
            for logits in (p.initial, p.transition):
                total = total + self.smoothing * logits.log_softmax(-1).flatten(p.initial.dim() - 1).sum(-1)
        return total

    @torch.no_grad()
    def initialize(self, y: Tensor, lengths: Tensor | None = None, start: str | None = None) -> None:
        """A start drawn from data: uniform first state, moves near uniform, emissions ``"random"`` or, the default
        of Gaussian ones, at the centres of ``"k-means"``."""
        y = self._check(y, lengths)
        inside = within(y, lengths)
        if int(inside.sum()) < self.states:
            raise ValueError(f"{self.states} states take at least as many steps, got {int(inside.sum())}")
        self.prior.initial.zero_()
        self.prior.transition.normal_()
        self.generator.initialize(y[inside], start)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        if self.steps is None:
            raise ValueError(
                "steps is None: an HMM that simulates takes the length, or simulate(n, like=batch)"
            )
        return self.generator.blank(n, self.steps)

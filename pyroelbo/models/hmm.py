"""The hidden Markov model: a chain of finite latents, summed by forward-backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyroelbo import distributions as ped
from pyroelbo.batch import Batch
from pyroelbo.models.emissions import EMISSIONS, AnyGaussian, Categorical, log_shares
from pyroelbo.models.precision import exact
from pyroelbo.models.sequences import captured, check_lengths, each_group, unpadded, within
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import PLATE, ExactPair, LatentPath, Stepwise

__all__ = ["HMM"]


class HMM(ExactPair):
    """p(z) = p(z_1) Π p(z_{t+1} | z_t) over S states, p(y | z) = Π_t p(y_t | z_t). Batches ``y`` or ``(y,
    lengths)``.

    ``lengths [B]`` are the lengths of padded sequences; padding is ignored, but must lie in the support
    (:func:`pyroelbo.data.sequences` pads). The latent site ``z`` is the whole path, LongTensor [B, T].

    Parts: ``prior`` (initial [S], transition [S, S] (from, to), logits), ``generator`` (the emission),
        ``encoder``.
    Cost: O(B·T·S²).

    Args:
        states: S.
        dims: number of symbols (categorical) or coordinates.
        emission: ``categorical``, y LongTensor [B, T]; or, with y [B, T, dims], ``gaussian`` (diagonal),
            ``full_gaussian``, ``bernoulli`` (0 or 1) or ``poisson`` (counts).
        guide: ``"exact"`` draws the path from p(z | y); ``"mean_field"`` draws each step from q(z_t | y_t) =
            softmax(linear(y_t)), whose gap measures what the chain adds to a single step.
        steps: length that :meth:`simulate` draws, unless called with ``like=``.
        smoothing: pseudo-count of every initial state, transition and (categorical, Bernoulli, Poisson)
            outcome: MAP.
        floor: smallest standard deviation of Gaussian emissions, relative to the data's from
            :meth:`initialize` on.

    Source: Rabiner (1989); Baum, Petrie, Soules, Weiss (1970).
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
        if emission not in EMISSIONS:
            raise ValueError(f"emission: expected one of {tuple(EMISSIONS)}, got {emission!r}")
        if guide not in ("exact", "mean_field"):
            raise ValueError(f"guide: expected 'exact' or 'mean_field', got {guide!r}")
        for name, value in (("states", states), ("dims", dims)):
            positive_count(name, value)
        self.states, self.dims, self.steps, self.smoothing = states, dims, steps, smoothing
        self.prior = nn.Module()
        self.prior.register_parameter("initial", nn.Parameter(0.1 * torch.randn(states)))
        self.prior.register_parameter("transition", nn.Parameter(torch.randn(states, states)))
        made = EMISSIONS[emission]
        option = floor if issubclass(made, AnyGaussian) else smoothing
        self.generator = made(states, dims, option)  # type: ignore[call-arg]
        self.encoder = nn.Linear(dims, states) if guide == "mean_field" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        event = self.generator.event
        if y.dim() != 2 + len(event) or y.shape[2:] != event:
            raise ValueError(
                f"y: expected shape [B, T{''.join(f', {d}' for d in event)}], got {tuple(y.shape)}"
            )
        check_lengths(lengths, y)
        if not event and y.is_floating_point():
            raise ValueError(f"y: expected symbols, integers [B, T], got {y.dtype}")
        if event:
            return y if y.is_floating_point() else y.to(self.prior.initial.dtype)
        return y.long()

    def model(self, y: Tensor, lengths: Tensor | None = None) -> None:
        steps = self._check(y, lengths).shape[1]
        with pyro.plate(PLATE, len(y)):
            chain = ped.HMM(
                self.prior.initial, self.prior.transition, self.generator.distribution(), steps, lengths
            )
            z = pyro.sample("z", chain.prior)
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

    def unpadded(self, y: Tensor, lengths: Tensor | None = None) -> Sequence[Batch]:
        return unpadded(y, lengths)

    def log_evidence(self, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ln p(y), [B], in nats, by the forward recursion; float64 without gradients."""

        def run(y: Tensor, lengths: Tensor | None, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return self.posterior(y, lengths).log_partition, {}

        return each_group(run, self._check(y, lengths), lengths)[0]

    def posterior(self, y: Tensor, lengths: Tensor | None = None) -> ped.LinearChain:
        """p(z | y), a chain over paths; its ``log_partition`` is ln p(y)."""
        y = self._check(y, lengths)
        stack = (slice(None), None) if self.prior.initial.dim() > 1 else (None,)
        initial, transition = exact(self.prior.initial), exact(self.prior.transition)
        return ped.LinearChain(
            initial.log_softmax(-1)[stack],
            transition.log_softmax(-1)[stack],
            self._log_emission(y, lengths),
            lengths,
        )

    def _log_emission(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        """ln p(y_t | z_t), [*R, B, T, S]; 0 where y_t is NaN, a missing step, and in the padding."""
        event = len(self.generator.event)
        seen = within(y, lengths)
        if event:
            seen = seen & ~y.isnan().flatten(2).any(-1)
        if torch.distributions.Distribution._validate_args:
            self.generator.check(y[seen])
        if not captured() and not bool(seen.all()):  # the steps that count, alone
            rows = seen.flatten().nonzero().squeeze(-1)
            found = self.generator.log_prob(y.flatten(0, 1)[rows])
            whole = found.new_zeros(*found.shape[:-2], seen.numel(), self.states)
            return whole.index_copy(-2, rows, found).unflatten(-2, seen.shape)
        y = torch.where(seen[(...,) + (None,) * event], y, torch.zeros_like(y)) if event else y
        found = self.generator.log_prob(y.flatten(0, 1)).unflatten(-2, seen.shape)
        return torch.where(seen[..., None], found, 0.0)

    def latent_path(self, y: Tensor, lengths: Tensor | None = None) -> LatentPath:
        y = self._check(y, lengths)
        prior, q = (
            self.prior,
            self.posterior(y, lengths) if self.encoder is None else self._encode(y, lengths),
        )
        first, moves = (x.expand(len(y), *x.shape[1:]) for x in q.conditionals())
        initial = exact(prior.initial).log_softmax(-1)
        transition = exact(prior.transition).log_softmax(-1)
        rows = torch.arange(len(y), device=y.device)
        return LatentPath(
            y.shape[1],
            lambda t, past: dist.Categorical(logits=initial if past is None else transition[past]),
            lambda t, past: dist.Categorical(logits=first if past is None else moves[rows, t - 1, past]),
            lambda t, z: self.generator.distribution(z).log_prob(y[:, t]),
            lengths,
        )

    def stepwise(self) -> Stepwise | None:
        """The forward recursion, for categorical emissions: a step is one symbol."""
        if self.generator.event:
            return None
        initial, move = (exact(x).log_softmax(-1) for x in (self.prior.initial, self.prior.transition))
        emit = exact(self.generator.logits).log_softmax(-1)

        def append(state: Tensor, symbol: Tensor) -> Tensor:
            seen = state + emit[:, symbol].mT
            return logsumexp((seen - logsumexp(seen, keepdim=True)).unsqueeze(-1) + move, -2)

        return Stepwise(
            lambda n: initial.expand(n, -1),
            lambda state: dist.Categorical(logits=logsumexp(state.unsqueeze(-1) + emit, -2)),
            append,
        )

    @torch.no_grad()
    def e_step(
        self,
        y: Tensor,
        lengths: Tensor | None = None,
        hard: bool = False,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """ln p(y) [B] (``hard``: ln p(y, z*) of the best path) and the statistics of :meth:`m_step`, in
        float64.

        ``weights`` [B] count each sequence so many times in the statistics.
        """
        y = self._check(y, lengths)

        def run(y: Tensor, lengths: Tensor | None, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return self._expected(y, lengths, hard, None if weights is None else weights[rows])

        return each_group(run, y, lengths)

    def _expected(
        self, y: Tensor, lengths: Tensor | None, hard: bool, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        evidence, used = self.posterior(y, lengths).expected_parts(hard=hard, weights=weights)
        initial, transition, visits = used
        if lengths is None:
            visits, seen = visits.flatten(-3, -2), y.flatten(0, 1)
        else:
            inside = within(y, lengths)
            visits, seen = visits[..., inside, :], y[inside]
        emitted = self.generator.statistics(visits, seen)
        return evidence, {"initial": initial[..., 0, :], "transition": transition[..., 0, :, :], **emitted}

    def stacks(self, y: Tensor, lengths: Tensor | None = None) -> bool:
        """Whether several starts of EM with stacked parameters are faster than one after the other."""
        return len(y) <= 4 and y.shape[1] * self.states <= 2**14

    @torch.no_grad()
    def m_step(self, statistics: dict[str, Any]) -> None:
        """Initial state, transitions and emissions that maximize the expected log joint (plus
        :meth:`log_prior`)."""
        p = self.prior
        p.initial.copy_(log_shares(statistics["initial"], self.smoothing, p.initial))
        p.transition.copy_(log_shares(statistics["transition"], self.smoothing, p.transition))
        self.generator.m_step(statistics)

    def log_prior(self) -> Tensor:
        """The log density of the parameters, up to a constant, of which ``smoothing`` is the pseudo-count."""
        total, p = self.generator.log_prior(), self.prior
        if self.smoothing:
            for logits in (p.initial, p.transition):
                total = total + self.smoothing * logits.log_softmax(-1).flatten(p.initial.dim() - 1).sum(-1)
        return total

    @torch.no_grad()
    def initialize(self, y: Tensor, lengths: Tensor | None = None, start: str | None = None) -> None:
        """Initialize from data: uniform initial state, random transitions, Gaussian emissions at the centres
        of ``"k-means"`` (their default), others and ``"random"`` ones at random."""
        y = self._check(y, lengths)
        inside = within(y, lengths)
        if int(inside.sum()) < self.states:
            raise ValueError(
                f"y: expected at least {self.states} steps, one per state, got {int(inside.sum())}"
            )
        self.prior.initial.zero_()
        self.prior.transition.normal_()
        self.generator.initialize(y[inside], start)

    def placeholder(self, n: int, *given: Tensor) -> Tensor:
        if self.steps is None:
            raise ValueError(
                "steps: expected the length to simulate, got None; set steps=, or call simulate(n, "
                "like=batch)"
            )
        return self.generator.blank(n, self.steps)

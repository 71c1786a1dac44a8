"""Quantizers: maps from vectors to one of finitely many, with gradients that pass straight through."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyroelbo.nn.layers import round_straight_through
from pyroelbo.numerics import positive_count

__all__ = ["NoisyQuantizer", "ScalarQuantizer", "VectorQuantizer"]


class VectorQuantizer(nn.Module):
    """The nearest vector of a codebook e [K, d]: x [*, d] to (codes [*], vectors [*, d]), gradients straight
    through.

    ``learn="ema"``: the codebook is a buffer, moving averages of the vectors that chose each code, e_k = m_k
    / n_k. It moves in training mode only, where gradients are on, and not while the attribute ``fixed`` is
    True. ``learn="gradient"``: a parameter, which has the derivative of the vectors, beside that of the
    codebook's term in :meth:`penalty`.

    A code is dead whose average count n_k has fallen below ``reset`` times the mean count of all codes but
    the commonest (which may have most of the vectors: those of blank patches), or times a tenth of an even
    share if that mean is less. With ``"ema"`` it is moved to a vector of the batch, drawn with probability
    proportional to the squared distance to its nearest code (the seeding of k-means++), so that copies of a
    common vector are not drawn.

    Cost: O(n · K · d) for n vectors.

    Args:
        codes: K.
        width: d.
        learn: ``ema`` or ``gradient``.
        decay: of the moving averages.
        reset: share of that mean below which a code is dead; 0 for never.

    Sources: van den Oord, Vinyals and Kavukcuoglu (2017), equations 3 and 6 to 8; Razavi, van den Oord and
    Vinyals (2019) for the averages; Dhariwal et al. (2020) for dead codes; Arthur and Vassilvitskii (2007).
    """

    count: Tensor
    total: Tensor

    def __init__(
        self, codes: int, width: int, learn: str = "ema", decay: float = 0.99, reset: float = 0.1
    ) -> None:
        super().__init__()
        if learn not in ("ema", "gradient"):
            raise ValueError(f"codebook: expected 'ema' or 'gradient', got {learn!r}")
        if not 0 <= decay < 1 or not 0 <= reset < 1:
            raise ValueError(f"decay, reset: expected numbers in [0, 1), got {decay!r} and {reset!r}")
        self.codes, self.width = positive_count("codes", codes), positive_count("width", width)
        self.learn, self.decay, self.reset, self.fixed = learn, decay, reset, False
        start = torch.randn(codes, width)
        if learn == "gradient":
            self.codebook = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
            self.register_buffer("count", torch.ones(codes))
            self.register_buffer("total", start.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, self.width)
        with torch.no_grad():
            e = self.codebook
            distance, codes = torch.addmm(e.square().sum(-1), rows, e.T, alpha=-2).min(-1)
        found = self.embed(codes).reshape(x.shape)
        if self.learn == "ema" and self.training and not self.fixed and torch.is_grad_enabled():
            with torch.no_grad():
                self._average(rows, codes, distance + rows.square().sum(-1))
        return codes.reshape(x.shape[:-1]), found + (x - x.detach())

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors [*, d] of codes [*]."""
        return nn.functional.embedding(codes.long(), self.codebook)

    def penalty(self, x: Tensor, found: Tensor, commitment: float) -> Tensor:
        """``commitment`` · ‖x - sg(e)‖², which holds x near its code, and for a codebook by gradients ‖sg(x)
        - e‖², which brings the codes to the vectors; [*], sg without derivatives. ``found`` is what
        :meth:`forward` gave."""
        e = found - (x - x.detach())
        penalty = commitment * (x - e.detach()).square().sum(-1)
        return penalty + (x.detach() - e).square().sum(-1) if self.learn == "gradient" else penalty

    @torch.no_grad()
    def start(self, centres: Tensor, count: Tensor) -> None:
        """Put the codes at ``centres`` [K, d], with ``count`` [K] vectors at each."""
        self.codebook.copy_(centres)
        if self.learn == "ema":
            self.count.copy_(count * self.codes / count.sum())
            self.total.copy_(self.codebook * self.count[:, None])

    def _average(self, rows: Tensor, codes: Tensor, distance: Tensor) -> None:
        """Move the codebook, of counts that are 1 on average."""
        unit = self.codes / len(rows)
        count = torch.zeros_like(self.count).index_add_(0, codes, torch.full_like(distance, unit))
        total = torch.zeros_like(self.total).index_add_(0, codes, rows * unit)
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        if self.reset:
            mass = distance.clamp_min(0).cumsum(0)
            at = torch.searchsorted(mass, mass[-1] * torch.rand_like(self.count)).clamp_max(len(rows) - 1)
            even = (self.count.sum() - self.count.max()) / max(1, self.codes - 1)
            even = even.clamp_min(0.1)
            dead = self.count < self.reset * even
            self.count.copy_(torch.where(dead, even, self.count))
            self.total.copy_(torch.where(dead[:, None], even * rows[at], self.total))
        self.codebook.copy_(self.total / self.count.clamp_min(1e-5)[:, None])


class ScalarQuantizer(nn.Module):
    """Each of d numbers rounded to one of L_i values: x [*, d] to (codes [*], vectors [*, d] in [-1, 1]),
    gradients straight through; no parameters.

    Number i has the index round(½ (L_i - 1)(1 + tanh x_i)), the vector 2 · index / (L_i - 1) - 1, and the
    code is the mixed-radix number of the indices, the first one's digit the least: K = Π L_i codes.

    Source: Mentzer, Minnen, Agustsson and Tschannen (2024), finite scalar quantization, section 3; for even
    L_i with values that are symmetric about zero.
    """

    top: Tensor
    radix: Tensor

    def __init__(self, bins: Sequence[int]) -> None:
        super().__init__()
        bins = tuple(bins)
        if not bins or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in bins):
            raise ValueError(f"bins: expected at least two values for each number, got {bins}")
        self.codes, self.width = math.prod(bins), len(bins)
        self.register_buffer("top", torch.tensor(bins).to(torch.get_default_dtype()) - 1)
        self.register_buffer("radix", torch.tensor([math.prod(bins[:i]) for i in range(len(bins))]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        index = round_straight_through(0.5 * self.top * (1 + x.tanh()))
        return (index.detach().long() * self.radix).sum(-1), 2 * index / self.top - 1

    def embed(self, codes: Tensor) -> Tensor:
        """The vectors [*, d] of codes [*]."""
        index = codes.long()[..., None] // self.radix % (self.top.long() + 1)
        return 2 * index.to(self.top.dtype) / self.top - 1


class NoisyQuantizer(nn.Module):
    """Codes at random, near ones more often: q(k | x) ∝ exp(-‖x - e_k‖² / 2σ²), the codebook e [K, d] and σ
    learned; as σ falls to 0, the nearest code (:class:`VectorQuantizer`).

    Cost: O(n · K · d) for n vectors.

    Source: Takida et al. (2022), SQ-VAE, equation 7 with one variance.
    """

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codes, self.width = positive_count("codes", codes), positive_count("width", width)
        self.codebook = nn.Parameter(torch.randn(codes, width))
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [*, K] of the codes of x [*, d]."""
        e = self.codebook
        squares = e.square().sum(-1) - 2 * x @ e.T  # ‖x‖² is the same for all codes
        return -0.5 * (-2 * self.log_scale).exp() * squares

    def embed(self, z: Tensor) -> Tensor:
        """The vectors [*, d] of one-hot codes [*, K]."""
        return z @ self.codebook

    @torch.no_grad()
    def start(self, centres: Tensor, count: Tensor) -> None:
        """Put the codes at ``centres`` [K, d]; σ becomes half the mean distance of a code to its nearest
        other."""
        self.codebook.copy_(centres)
        apart = torch.cdist(centres, centres).fill_diagonal_(math.inf).amin(-1)
        apart = apart[apart.isfinite()]
        if len(apart) and float(apart.mean()) > 0:
            self.log_scale.copy_((0.5 * apart.mean()).log())

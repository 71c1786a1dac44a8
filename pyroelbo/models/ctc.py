"""Connectionist temporal classification as a conditional pair: the latent is the alignment."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo import distributions as ped
from pyroelbo.distributions.alignment import collapse
from pyroelbo.models.precision import exact
from pyroelbo.models.sequences import check_lengths, within
from pyroelbo.numerics import positive_count
from pyroelbo.pair import PLATE, ExactPair

__all__ = ["CTC"]


class CTC(ExactPair):
    """p(y | x) = Σ_z Π_t p(z_t | x) [z collapses to y]: a network labels every frame, repeats are merged and
    blanks removed. Batches ``(x, y)`` or ``(x, y, lengths)``.

    x [B, T, dims] are frames, y a LongTensor [B, L] of labels 1 … ``labels`` padded with -1 (0 is the blank),
    and ``lengths [B]`` the lengths of x, whose padding is ignored. The latent site ``z`` is the alignment,
    LongTensor [B, T]: the symbol of each frame. A y without an alignment has probability zero.

    The network has ``depth`` residual blocks of dilated convolutions of ``width`` channels. ``guide="exact"``
    draws from p(z | x, y); ``"local"`` draws an alignment of y under frame-wise log weights from a linear
    layer. There is no closed-form M-step: :func:`~pyroelbo.fit` differentiates ln p(y | x),
    :func:`~pyroelbo.fit_em` uses gradients.

    Parts: ``generator`` (the network), ``encoder`` (local only). Cost: the network's, and O(B·T·L) for the
        sums.
    Source: Graves, Fernández, Gomez, Schmidhuber (2006).
    """

    def __init__(self, dims: int, labels: int, width: int = 64, depth: int = 3, guide: str = "exact") -> None:
        super().__init__()
        if guide not in ("exact", "local"):
            raise ValueError(f"guide: expected 'exact' or 'local', got {guide!r}")
        for name, value in (("dims", dims), ("labels", labels), ("width", width), ("depth", depth)):
            positive_count(name, value)
        self.dims, self.labels = dims, labels
        self.generator = _FrameNetwork(dims, labels + 1, width, depth)
        self.encoder = nn.Linear(dims, labels + 1) if guide == "local" else None

    @property
    def exact_guide(self) -> bool:
        return self.encoder is None

    def _check(self, x: Tensor, y: Tensor, lengths: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dims:
            raise ValueError(f"x: expected shape [B, T, {self.dims}], got {tuple(x.shape)}")
        if y.dim() != 2 or y.is_floating_point():
            raise ValueError(f"y: expected integers [B, L], got {y.dtype} of shape {tuple(y.shape)}")
        if ((y == 0) | (y > self.labels) | (y < -1)).any():
            raise ValueError(
                f"y: expected labels in [1, {self.labels}], then -1 (0 is the blank), got {int(y.min())} to "
                f"{int(y.max())}"
            )
        check_lengths(lengths, x)

    def logits(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of each frame's symbols, [B, T, labels + 1]."""
        return self.generator(x, within(x, lengths))

    def model(self, x: Tensor, y: Tensor, lengths: Tensor | None = None) -> None:
        self._check(x, y, lengths)
        inside = within(x, lengths)
        logits = self.generator(x, inside)
        with pyro.plate(PLATE, len(x)):
            z = pyro.sample("z", _Frames(logits, inside))
            pyro.sample("y", _Collapsed(z, inside, y.shape[-1], self.labels), obs=y)

    def guide(self, x: Tensor, y: Tensor, lengths: Tensor | None = None) -> None:
        with pyro.plate(PLATE, len(x)):
            if self.encoder is None:
                pyro.sample("z", self.posterior(x, y, lengths))
            else:
                logits = self.encoder(x.to(self.encoder.weight.dtype))
                pyro.sample("z", ped.CTC(logits, lengths).posterior(y))

    def log_evidence(self, x: Tensor, y: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ln p(y | x), [B], in nats, summed in float64 without gradients."""
        return self.posterior(x, y, lengths).log_partition

    def posterior(self, x: Tensor, y: Tensor, lengths: Tensor | None = None) -> ped.Alignment:
        """p(z | x, y) over alignments; its marginals are the distributions of each frame's symbol."""
        self._check(x, y, lengths)
        return ped.CTC(exact(self.logits(x, lengths)), lengths).posterior(y)

    @torch.no_grad()
    def transcribe(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Labels [B, T], padded with -1, from each frame's most probable symbol (best path decoding)."""
        return collapse(self.logits(x, lengths).argmax(-1), within(x, lengths), 0)

    def placeholder(self, n: int, *given: Tensor) -> tuple[Tensor, ...]:
        if not given:
            raise ValueError("given: expected frames, got none; call simulate(n, x)")
        x, *lengths = given
        return x, torch.ones(x.shape[:2], dtype=torch.long, device=x.device), *lengths


class _FrameNetwork(nn.Module):
    """Frames [B, T, D] to logits [B, T, C]: residual convolutions over time, dilated 1, 2, 4, …

    Padded frames are set to zero before each convolution, so that padding changes nothing.
    """

    def __init__(self, dims: int, symbols: int, width: int, depth: int) -> None:
        super().__init__()
        self.into = nn.Conv1d(dims, width, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * 2**i, dilation=2**i) for i in range(depth)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.out = nn.Linear(width, symbols)

    def forward(self, x: Tensor, within: Tensor) -> Tensor:
        x = x.to(self.out.weight.dtype)
        inside = within[..., None].to(x.dtype)
        h = self.into((x * inside).transpose(1, 2)).transpose(1, 2)
        for convolution, norm in zip(self.blocks, self.norms, strict=True):
            normal = F.silu(norm(h)) * inside
            h = h + convolution(normal.transpose(1, 2)).transpose(1, 2)
        return self.out(F.silu(h))


class _Frames(TorchDistribution):
    """Π_t softmax(logits_t)[z_t] over the frames that are ``within`` [*B, T] their sequence.

    ``logits`` are [*B, T, C], values LongTensors [*B, T], whose padded entries are ignored.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, logits: Tensor, within: Tensor) -> None:
        self.logits, self.within = logits.log_softmax(-1), within
        super().__init__(logits.shape[:-2], logits.shape[-2:-1], validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.logits.shape[-1] - 1), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Frames:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(*batch_shape, *self.logits.shape[-2:])
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(z), in nats, of the broadcast shape."""
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        logits, value = self.logits.expand(*lead, -1, -1), value.expand(*lead, -1)
        found = logits.gather(-1, value.unsqueeze(-1)).squeeze(-1)
        return torch.where(self.within, found, 0.0).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws [*sample, *B, T]; padded frames are blank."""
        drawn = torch.distributions.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
        return torch.where(self.within, drawn, 0)


class _Collapsed(TorchDistribution):
    """Point mass on the labels of paths ``z [*B, T]``: repeats merged, blanks and padded frames removed.

    Values are LongTensors [*B, steps] of labels up to ``largest``, padded with -1; ``sample`` raises
    ValueError for more than ``steps`` labels.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, z: Tensor, within: Tensor, steps: int, largest: int) -> None:
        self.labels, self.largest = collapse(z, within, 0), largest
        super().__init__(z.shape[:-1], torch.Size((steps,)), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-1, self.largest), 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Collapsed:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        new.labels = self.labels.expand(*batch_shape, -1)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        width = max(value.shape[-1], self.labels.shape[-1])
        wanted, given = (F.pad(v, (0, width - v.shape[-1]), value=-1) for v in (value, self.labels))
        same = (wanted == given).all(-1)
        return torch.where(same, 0.0, -math.inf)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        steps = self.event_shape[0]
        if (self.labels[..., steps:] >= 0).any():
            raise ValueError(
                f"y: expected at most {steps} labels, got a draw of more; simulate with a longer placeholder"
            )
        labels = F.pad(self.labels, (0, steps - self.labels.shape[-1]), value=-1)
        return labels.expand(*sample_shape, *labels.shape)

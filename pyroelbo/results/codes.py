"""How long a code is, and of what."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pyroelbo.results.bounds import Json

__all__ = ["CodeLength", "CodeUsage", "RatePoint"]


@dataclass(frozen=True)
class CodeLength(Json):
    """The code of ``data`` data: its size in ``bytes`` and what these are.

    ``net_bits`` is the growth of the stack by the ``coded`` data that the pair coded, and ``site_bits`` what
    each site has of it: pushed under p less popped under q, of a layer its rate. The others,
    ``starter_data``, are coded in ``starter_bytes`` without the pair, as what bits-back pops first;
    ``frame_bytes`` describe the file. ``initial_bits`` is what the first chunk popped before it pushed.
    ``model_bytes`` is the size of the parameters, which are not in the file. ``coder_seconds`` of ``seconds``
    were spent in the coder, the rest in networks and files.
    """

    data: int
    coded: int
    bytes: int
    net_bits: float
    starter_data: int
    starter_bytes: int
    frame_bytes: int
    initial_bits: float
    model_bytes: int
    seconds: float
    coder_seconds: float
    site_bits: dict[str, float] = field(default_factory=dict)

    @property
    def net(self) -> float:
        """Nats per datum that the pair coded, to compare with the ELBO; NaN if there are none."""
        return self.net_bits * math.log(2) / self.coded if self.coded else math.nan

    @property
    def total(self) -> float:
        """Nats per datum of the whole file; NaN of no data."""
        return self.bytes * 8 * math.log(2) / self.data if self.data else math.nan

    def break_even(self, bytes_per_datum: float) -> float:
        """The number of data from which file and model together are smaller than another code of so many
        bytes per datum; infinite where they never are."""
        saved = bytes_per_datum - self.total / (8 * math.log(2))
        return self.model_bytes / saved if saved > 0 else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {"unit": "nats", **asdict(self), "net": self.net, "total": self.total}

    def __str__(self) -> str:
        return "\n".join(
            (
                f"{self.bytes:,} bytes for {self.data:,} data, {self.total:.3f} nats per datum",
                f"  by the model         {round(self.net_bits / 8):12,} bytes for {self.coded:,} data"
                + (f", {self.net:.3f} nats per datum" if self.coded else ""),
                *self._sites(),
                f"  without it           {self.starter_bytes:12,} bytes for {self.starter_data:,} data",
                f"  frame                {self.frame_bytes:12,} bytes",
                f"not in the file: the model, {self.model_bytes:,} bytes; initial bits, "
                f"{self.initial_bits / 8:,.0f} bytes, were taken from the part without it",
                f"time: {self.seconds:.1f} s, of which the coder {self.coder_seconds:.1f} s",
            )
        )

    def _sites(self) -> list[str]:
        """A line for each site, where there are several."""
        if len(self.site_bits) < 2:
            return []
        nats = math.log(2) / self.coded
        return [
            f"    {site:19}{round(bits / 8):12,} bytes, {bits * nats:.3f} nats per datum"
            for site, bits in self.site_bits.items()
        ]


@dataclass(frozen=True)
class CodeUsage(Json):
    """How often each of K codes was chosen: ``counts`` of length K."""

    counts: tuple[int, ...]

    @property
    def used(self) -> int:
        """The number of codes that were chosen at all."""
        return sum(n > 0 for n in self.counts)

    @property
    def perplexity(self) -> float:
        """exp(-Σ_k f_k ln f_k) of the frequencies f: as many codes used evenly are as uncertain; NaN of no
        data."""
        total = sum(self.counts)
        shares = [n / total for n in self.counts if n]
        return math.exp(-sum(f * math.log(f) for f in shares)) if shares else math.nan

    def to_dict(self) -> dict[str, Any]:
        return {"counts": list(self.counts), "used": self.used, "perplexity": self.perplexity}

    def __str__(self) -> str:
        return (
            f"codes: {self.used} of {len(self.counts)} used, perplexity {self.perplexity:.1f} "
            f"({sum(self.counts):,} codes counted)"
        )


@dataclass(frozen=True)
class RatePoint(Json):
    """A point of a rate–distortion curve, of data of ``dims`` numbers.

    ``weight`` is λ, ``rate`` E[-ln p(z)] in nats per datum, ``file`` the nats per datum of a file of the
    codes z, ``distortion`` the mean squared error of a number, and ``sharpness`` that of the decoded pictures
    (:func:`pyroelbo.report.sharpness`), NaN for other data.
    """

    weight: float
    dims: int
    rate: float
    file: float
    distortion: float
    sharpness: float = math.nan

    @property
    def bits(self) -> float:
        """The rate in bits per number."""
        return self.rate / self.dims / math.log(2)

    @property
    def file_bits(self) -> float:
        """The file's size in bits per number."""
        return self.file / self.dims / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        return {"unit": "nats", **asdict(self)}

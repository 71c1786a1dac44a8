"""Families of amortized posteriors: modules that turn a network's output into a distribution q(z | y)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyroelbo.flows import FlowDistribution, Reversed, SplineFlow, VectorDistribution
from pyroelbo.nn import BatchNorm, bounded
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import Summed

__all__ = [
    "ENCODERS",
    "BatchNormEncoder",
    "Choice",
    "DiagonalEncoder",
    "Encoder",
    "FlowEncoder",
    "FullEncoder",
    "IAFEncoder",
    "MixtureEncoder",
    "UniformMixture",
    "build",
]


class Encoder(nn.Module):
    """q(z | y) over vectors of ``dims`` numbers, from ``num_inputs`` numbers x that a network computes of y
    (abstract).

    ``encoder(x)``, x [*, num_inputs], is a reparametrized distribution of event shape [dims]. ``encoder(x,
    base)`` reads x in units of a Gaussian ``base``, z = base.loc + base.scale · u with u distributed as
    ``encoder(x)``: a correction of a prior. Log scales stay within ±``bound``, softly; None leaves them as
    they are.
    """

    def __init__(self, dims: int, bound: float | None = None) -> None:
        super().__init__()
        self.dims, self.bound = positive_count("dims", dims, "number of dimensions"), bound

    @property
    @abstractmethod
    def num_inputs(self) -> int:
        """Size of x, the number of network outputs that the family needs."""

    @abstractmethod
    def forward(self, x: Tensor, base: Any = None) -> Any:
        """q(z | y) from x [*, num_inputs]."""

    def _log_scale(self, raw: Tensor) -> Tensor:
        return raw if self.bound is None else bounded(raw, self.bound)


class DiagonalEncoder(Encoder):
    """N(μ, diag s²), x = (μ, ln s)."""

    @property
    def num_inputs(self) -> int:
        return 2 * self.dims

    def forward(self, x: Tensor, base: Any = None) -> Any:
        loc, raw = x.chunk(2, -1)
        scale = self._log_scale(raw).exp()
        if base is not None:
            loc, scale = base.loc + base.scale * loc, base.scale * scale
        return dist.Normal(loc, scale).to_event(1)


class BatchNormEncoder(Encoder):
    """N(γ (μ - m) / v + β, diag s²), x = (μ, ln s), where m and v² are the batch's mean and variance of μ, γ
    = ``spread`` is fixed and β [dims] learned.

    Over the batch E KL(q, N(0, I)) ≥ ½ Σ_d (γ² + β_d²) up to the normalization's epsilon, so that the
    posterior cannot collapse onto the prior. In training q(z | y) depends on the batch; evaluation mode takes
    running averages, and bounds are those of that encoder. A VampPrior would normalize its pseudo-inputs as a
    batch of their own: use another prior with it.

    Source: Zhu, Bi, Liu, Ma, Li and Wu (2020).
    """

    def __init__(self, dims: int, bound: float | None = None, spread: float = 0.6) -> None:
        super().__init__(dims, bound)
        if not 0 < spread < math.inf:
            raise ValueError(f"spread: expected a positive number, got {spread!r}")
        self.spread = spread
        self.norm = BatchNorm(dims, affine=False)
        self.shift = nn.Parameter(torch.zeros(dims))

    @property
    def num_inputs(self) -> int:
        return 2 * self.dims

    def forward(self, x: Tensor, base: Any = None) -> Any:
        loc, raw = x.chunk(2, -1)
        loc, scale = self.spread * self.norm(loc) + self.shift, self._log_scale(raw).exp()
        if base is not None:
            loc, scale = base.loc + base.scale * loc, base.scale * scale
        return dist.Normal(loc, scale).to_event(1)


class FullEncoder(Encoder):
    """N(μ, L Lᵀ), L = diag(s) (I + A) with A strictly lower triangular, x = (μ, ln s, A row by row)."""

    @property
    def num_inputs(self) -> int:
        return 2 * self.dims + self.dims * (self.dims - 1) // 2

    def forward(self, x: Tensor, base: Any = None) -> Any:
        loc, raw, below = x.split((self.dims, self.dims, self.num_inputs - 2 * self.dims), -1)
        scale = self._log_scale(raw).exp()
        if base is not None:
            loc, scale = base.loc + base.scale * loc, base.scale * scale
        row, column = torch.tril_indices(self.dims, self.dims, -1, device=x.device)
        unit = torch.eye(self.dims, dtype=x.dtype, device=x.device).expand(*x.shape[:-1], -1, -1)
        lower = (
            unit.flatten(-2).index_copy(-1, row * self.dims + column, below).unflatten(-1, unit.shape[-2:])
        )
        return dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * lower)


class FlowEncoder(Encoder):
    """z = μ + s · f⁻¹(e; c), e ~ N(0, I): a spline flow conditioned on c around a diagonal Gaussian, x = (μ,
    ln s, c).

    A coupling flow, whose draw and density cost one pass of each network; in one dimension a masked map. The
    flow starts near the identity, so that training starts from about the diagonal Gaussian.

    Args:
        dims: number of dimensions.
        bound: bound of log scales, or None.
        layers: number of maps.
        hidden: widths of each map's network.
        bins: pieces of each spline on [-5, 5], in units of s.
        context: number of conditioning numbers c.

    Source: Rezende and Mohamed (2015); Durkan et al. (2019) for the maps.
    """

    def __init__(
        self,
        dims: int,
        bound: float | None = None,
        layers: int = 2,
        hidden: Sequence[int] = (64,),
        bins: int = 8,
        context: int = 16,
    ) -> None:
        super().__init__(dims, bound)
        positive_count("context", context, "number of conditioning numbers")
        self.flow = self._make(dims, layers, hidden, bins, context)

    def _make(
        self, dims: int, layers: int, hidden: Sequence[int], bins: int, context: int
    ) -> SplineFlow | Reversed:
        return SplineFlow(dims, "coupling" if dims > 1 else "autoregressive", layers, hidden, bins, context)

    @property
    def num_inputs(self) -> int:
        return 2 * self.dims + self.flow.context

    def forward(self, x: Tensor, base: Any = None) -> Any:
        loc, raw, context = x.split((self.dims, self.dims, self.flow.context), -1)
        log_scale = self._log_scale(raw)
        if base is not None:
            loc, log_scale = base.loc + base.scale * loc, base.scale.log() + log_scale
        return FlowDistribution(self.flow, loc, log_scale, context)


class IAFEncoder(FlowEncoder):
    """A :class:`FlowEncoder` by inverse autoregressive maps: each coordinate of z is moved given all those of
    the noise before it.

    A draw costs one pass of each masked network, its density ``dims`` passes.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016), with splines for affine maps.
    """

    def _make(
        self, dims: int, layers: int, hidden: Sequence[int], bins: int, context: int
    ) -> SplineFlow | Reversed:
        return Reversed(SplineFlow(dims, "autoregressive", layers, hidden, bins, context))


class MixtureEncoder(Encoder):
    """(1/M) Σ_m N(μ_m, diag s_m²) over M = ``components``, x = (μ, ln s) of one component after the other.

    The ELBO uses ln q(z | y) of the mixture, with the component summed out: a bound without auxiliary
    latents. As the weights are equal, the component is drawn independently of all parameters and z = μ_m +
    s_m e is an ordinary reparametrization, without bias; components share a mode where the posterior's modes
    have unequal mass. (The gradient of learned weights would have to come from draws in the gaps between
    modes, and with separate modes there are none.) ``loc`` [M, dims], N(0, I) at first and learned, is added
    to the means, so that components start apart.

    Source: Kviman, Melin, Koptagel, Elvira and Lagergren (2022), the bound of a uniform mixture.
    """

    def __init__(self, dims: int, bound: float | None = None, components: int = 4) -> None:
        super().__init__(dims, bound)
        self.components = positive_count("components", components, "number of Gaussians")
        self.loc = nn.Parameter(torch.randn(components, dims))

    @property
    def num_inputs(self) -> int:
        return 2 * self.components * self.dims

    def forward(self, x: Tensor, base: Any = None) -> Any:
        loc, raw = x.unflatten(-1, (self.components, -1)).chunk(2, -1)
        loc, scale = self.loc + loc, self._log_scale(raw).exp()
        if base is not None:
            center, unit = base.loc.unsqueeze(-2), base.scale.unsqueeze(-2)
            loc, scale = center + unit * loc, unit * scale
        return UniformMixture(loc, scale)


class UniformMixture(VectorDistribution):
    """p(z) = (1/M) Σ_m N(z; loc_m, diag scale_m²), ``loc`` and ``scale`` [*B, M, D]; event shape [D].

    Draws are reparametrized, given a component that is drawn uniformly. Cost: O(D) a draw, O(M·D) a density.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = logsumexp(self._log_components(value)) - math.log(self.loc.shape[-2])
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _log_components(self, value: Tensor) -> Tensor:
        """ln N(value; loc_m, scale_m), [*, M]."""
        x = (value.unsqueeze(-2) - self.loc) / self.scale
        return (-0.5 * x.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def summed(self) -> Summed:
        """The mixture with its component as a latent."""
        lead = (*self.batch_shape, -1, -1)
        loc, scale = self.loc.expand(lead), self.scale.expand(lead)

        def given(m: Tensor) -> Any:
            index = m[..., None, None].expand(*m.shape, 1, loc.shape[-1])
            parts = (x.gather(-2, index).squeeze(-2) for x in (loc, scale))
            return dist.Normal(*parts).to_event(1)

        return Summed(
            dist.Categorical(logits=torch.zeros_like(loc[..., 0])),
            given,
            lambda z: dist.Categorical(logits=self._log_components(z)),
        )

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Reparametrized draws ``[*sample, *B, D]``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        which = torch.randint(self.loc.shape[-2], shape[:-1], device=self.loc.device)
        index = which[..., None, None].expand(*shape[:-1], 1, shape[-1])
        lead = (*shape[:-1], -1, -1)
        loc, scale = (x.expand(lead).gather(-2, index).squeeze(-2) for x in (self.loc, self.scale))
        return loc + scale * torch.randn(shape, dtype=loc.dtype, device=loc.device)


# a name of ENCODERS, or a callable of (dims, bound)
Choice: TypeAlias = "str | Callable[[int, float | None], Encoder]"

ENCODERS: dict[str, Callable[[int, float | None], Encoder]] = {
    "diagonal": DiagonalEncoder,
    "full": FullEncoder,
    "flow": FlowEncoder,
    "iaf": IAFEncoder,
    "mixture": MixtureEncoder,
    "batch_norm": BatchNormEncoder,
}


def build(encoder: Choice, dims: int, bound: float | None = None) -> Encoder:
    """The family of q(z | y) for a latent of ``dims`` numbers, by a name of :data:`ENCODERS` or from a
    callable.

    A callable is given ``(dims, bound)``, as in ``functools.partial(MixtureEncoder, components=8)``. Raises
    ValueError for unknown names.
    """
    if isinstance(encoder, str):
        if encoder not in ENCODERS:
            raise ValueError(f"encoder: expected one of {tuple(ENCODERS)} or a callable, got {encoder!r}")
        encoder = ENCODERS[encoder]
    return encoder(dims, bound)

"""Priors of a latent vector that are learned with the rest of the pair: modules whose call gives p(z)."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from pyroelbo.distributions import DiagonalMixture, Mixture
from pyroelbo.nn import MLP
from pyroelbo.numerics import logsumexp, positive_count

__all__ = [
    "PRIORS",
    "AutoregressivePrior",
    "FlowPrior",
    "GaussianMixturePrior",
    "Prior",
    "StandardNormal",
    "VampPrior",
]


class Prior(nn.Module):
    """p(z) over vectors of ``dims`` numbers (abstract): ``prior()`` is a distribution of event shape [dims].

    Its batch shape is empty and a plate expands it: ``z = pyro.sample("z", self.prior())``. The parameters
    then learn through the ELBO like all others. Where no closed KL to the guide is registered, Pyro's
    ``TraceMeanField_ELBO`` takes that term by Monte Carlo.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = positive_count(f"{type(self).__name__}: dims", dims, "number of dimensions")

    @property
    def out(self) -> int:
        """``dims``, by the name that links of a chain have for it."""
        return self.dims

    @abstractmethod
    def forward(self) -> Any:
        """The distribution p(z)."""

    def initialize(self, y: Tensor) -> None:
        """Start from data [N, ...], for priors that look at data."""


class StandardNormal(Prior):
    """p(z) = N(0, I): nothing to learn, and a closed KL to a Gaussian guide."""

    loc: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__(dims)
        self.register_buffer("loc", torch.zeros(dims))

    def forward(self) -> Any:
        return dist.Normal(self.loc, 1.0).to_event(1)


class GaussianMixturePrior(Prior):
    """p(z) = Σ_m softmax(logits)_m N(z; loc_m, diag scale_m²), all of it learned; the start spreads M centres
    as N(0, I) does, each with a scale that lets them overlap, M^(-1/dims)."""

    def __init__(self, dims: int, components: int = 50) -> None:
        super().__init__(dims)
        _positive(self, "components", components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, dims))
        self.log_scale = nn.Parameter(torch.full((components, dims), -math.log(components) / dims))

    def forward(self) -> DiagonalMixture:
        return DiagonalMixture(self.logits, self.loc, self.log_scale.exp())


class VampPrior(Prior):
    """p(z) = (1/M) Σ_m q(z | u_m): the aggregated posterior of M pseudo-inputs u_m, which are learned.

    ``encode`` is the pair's own encoder, from inputs [M, ...] to q(z | u) with event shape [dims]; its
    parameters are shared, not copied. ``pseudo_inputs [M, ...]`` are in the units of the data;
    :meth:`initialize` sets them to data drawn without replacement plus ``noise`` times the data's spread.
    Raises ValueError for more pseudo-inputs than data, or an encoder whose latent has another size. Cost: the
    encoder on M inputs for each batch, and O(M · dims) a draw.

    Source: Tomczak and Welling (2018), equation 9.
    """

    def __init__(
        self,
        dims: int,
        encode: Callable[[Tensor], Any],
        pseudo_inputs: Tensor,
        noise: float = 0.01,
    ) -> None:
        super().__init__(dims)
        if not callable(encode):
            raise TypeError(f"VampPrior: encode takes the pair's encoder, got a {type(encode).__name__}")
        if pseudo_inputs.dim() < 2 or not len(pseudo_inputs):
            raise ValueError(
                f"VampPrior: pseudo_inputs have shape {tuple(pseudo_inputs.shape)}, they take [M, ...] like data"
            )
        # A module would be registered a second time, as a part of the prior.
        self.__dict__["encode"] = encode
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.clone())
        self.noise = noise

    def forward(self) -> Any:
        q = self.__dict__["encode"](self.pseudo_inputs)
        if tuple(q.event_shape) != (self.dims,):
            raise ValueError(
                f"VampPrior of {self.dims} dimensions: the encoder gives a latent of shape {tuple(q.event_shape)}"
            )
        base = getattr(q, "base_dist", None)
        weights = self.pseudo_inputs.new_zeros(len(self.pseudo_inputs))
        if isinstance(base, torch.distributions.Normal):
            return DiagonalMixture(weights, base.loc, base.scale)
        return Mixture(weights, q)

    @torch.no_grad()
    def initialize(self, y: Tensor) -> None:
        u = self.pseudo_inputs
        if len(u) > len(y):
            raise ValueError(
                f"VampPrior has {len(u)} pseudo-inputs and the data {len(y)} rows: it takes at most one for each"
            )
        if u.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"VampPrior has pseudo-inputs of shape {tuple(u.shape[1:])}, the data rows of {tuple(y.shape[1:])}"
            )
        y = y.to(u)
        drawn = y[torch.randperm(len(y), device=y.device)[: len(u)]]
        u.copy_(drawn + self.noise * y.std(correction=0) * torch.randn_like(u))


class _Neural(TorchDistribution):
    """The distribution of a module that has ``log_density(z)`` and ``draw(shape)``."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.real_vector
    has_rsample = False

    def __init__(self, module: Any) -> None:
        self.module = module
        super().__init__(torch.Size(), torch.Size((module.dims,)))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _Neural:
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.module.log_density(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``[*sample, *B, dims]``."""
        return self.module.draw(self._extended_shape(torch.Size(sample_shape))[:-1])


class AutoregressivePrior(Prior):
    """p(z) = Π_d p(z_d | z_1 … z_{d-1}), each a mixture of ``components`` Gaussians given by a masked network.

    Cost: one pass of the network for a density, ``dims`` passes for a draw.

    Source: Germain, Gregor, Murray and Larochelle (2015) for the masks; Uria, Murray and Larochelle (2013)
    for the mixtures.
    """

    def __init__(self, dims: int, components: int = 5, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__(dims)
        _positive(self, "components", components)
        self.network = _masked(self, dims, hidden, 3 * components)
        with torch.no_grad():
            start = self.network.layers[-1].bias.view(3, components, dims)
            start[1] += torch.linspace(-1.0, 1.0, components)[:, None] if components > 1 else 0.0

    def _conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, loc, log_scale = self.network(z).unflatten(-2, (3, -1)).unbind(-3)
        return logits.log_softmax(-2), loc, _soft(log_scale)

    def log_density(self, z: Tensor) -> Tensor:
        logits, loc, log_scale = self._conditionals(z)
        noise = (z.unsqueeze(-2) - loc) * (-log_scale).exp()
        joint = logits - log_scale - 0.5 * noise.square() - 0.5 * math.log(2 * math.pi)
        return logsumexp(joint, -2).sum(-1)

    def draw(self, shape: Sequence[int]) -> Tensor:
        like = self.network.layers[0].weight
        z = like.new_zeros(*shape, self.dims)
        for d in range(self.dims):
            logits, loc, log_scale = (p[..., d] for p in self._conditionals(z))
            which = torch.distributions.Categorical(logits=logits).sample().unsqueeze(-1)
            noise = torch.randn(*shape, 1, dtype=like.dtype, device=like.device)
            z[..., d] = (loc.gather(-1, which) + log_scale.gather(-1, which).exp() * noise).squeeze(-1)
        return z

    def forward(self) -> Any:
        return _Neural(self)


class FlowPrior(Prior):
    """p(z) = N(f(z); 0, I) |det f'(z)|: ``layers`` invertible maps f, each an affine map and a monotone
    rational-quadratic spline of every coordinate, whose parameters a network reads off other coordinates.

    ``kind="coupling"``: the second half of the coordinates given the first, ``"autoregressive"``: each given
    those before it; the order is permuted between layers. Splines have ``bins`` pieces on [-5, 5] and are the
    identity outside. A first affine map has ``loc`` and ``scale`` per coordinate, 0 and 1 at first;
    :meth:`standardize` takes them from samples. Raises ValueError for a coupling of fewer than 2 dimensions.
    Cost: one pass of each network for a density; for a draw as well, autoregressive ``dims`` passes.

    Pyro's spline transforms keep their last input and cannot be copied, pickled or compiled after use, so
    these are maps without state.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), equations 4 to 7 and appendix A; Dinh, Krueger and
    Bengio (2015) for couplings; Papamakarios, Pavlakou and Murray (2017) for masked autoregressive flows.
    """

    def __init__(
        self,
        dims: int,
        kind: str = "coupling",
        layers: int = 4,
        hidden: Sequence[int] = (64, 64),
        bins: int = 8,
    ) -> None:
        super().__init__(dims)
        if kind not in ("coupling", "autoregressive"):
            raise ValueError(f"FlowPrior: kind takes 'coupling' or 'autoregressive', got {kind!r}")
        if kind == "coupling" and dims < 2:
            raise ValueError(f"FlowPrior: a coupling splits the dimensions and takes at least 2, got {dims}")
        _positive(self, "layers", layers)
        if not 2 <= bins < 1 / _LEAST:
            raise ValueError(
                f"FlowPrior: bins takes 2 to {1 / _LEAST - 1:.0f} pieces of a spline, got {bins!r}"
            )
        self.kind, self.bins, self.kept = kind, bins, dims // 2 if kind == "coupling" else 0
        self.loc, self.log_scale = nn.Parameter(torch.zeros(dims)), nn.Parameter(torch.zeros(dims))
        self.networks = nn.ModuleList(self._network(hidden, 3 * bins + 1) for _ in range(layers))
        order = torch.Generator().manual_seed(0)
        for i in range(layers):
            flip = torch.arange(dims).flip(0)
            self.register_buffer(
                f"order_{i}", flip if dims < 4 or i % 2 else torch.randperm(dims, generator=order)
            )

    def _network(self, hidden: Sequence[int], out: int) -> nn.Module:
        if self.kind == "coupling":
            network: Any = MLP((self.kept, *hidden, out * (self.dims - self.kept)))
            last = network[-1]
        else:
            network = _masked(self, self.dims, hidden, out)
            last = network.layers[-1]
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(0.1)  # near the identity, where splines of standard noise belong
        return network

    @torch.no_grad()
    def standardize(self, samples: Tensor) -> None:
        """Set the first affine map to the mean and standard deviation of samples [N, dims]."""
        samples = samples.to(self.loc)
        self.loc.copy_(samples.mean(0))
        spread = samples.std(0, correction=0)
        self.log_scale.copy_(spread.clamp_min(1e-3 * float(samples.std(correction=0)) + 1e-6).log())

    def _read(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Affine maps and splines of the moving coordinates: shift and log scale [*, d], pieces [*, d, bins]."""
        out = network(x[..., : self.kept]) if self.kind == "coupling" else network(x).transpose(-1, -2)
        out = out.reshape(*x.shape[:-1], -1, 3 * self.bins + 1)
        shift, log_scale, *spline = out.split((1, 1, self.bins, self.bins, self.bins - 1), -1)
        return shift.squeeze(-1), _soft(log_scale.squeeze(-1)), spline

    def _to_noise(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale, pieces = self._read(network, x)
        moved = (x[..., self.kept :] - shift) * (-log_scale).exp()
        moved, slope = _spline(moved, pieces)
        return torch.cat([x[..., : self.kept], moved], -1), (slope - log_scale).sum(-1)

    def log_density(self, z: Tensor) -> Tensor:
        x = (z - self.loc) * (-self.log_scale).exp()
        log_det = -self.log_scale.sum()
        for i, network in enumerate(self.networks):
            x, slope = self._to_noise(network, x[..., getattr(self, f"order_{i}")])
            log_det = log_det + slope
        return log_det - 0.5 * (x.square().sum(-1) + self.dims * math.log(2 * math.pi))

    def draw(self, shape: Sequence[int]) -> Tensor:
        x = torch.randn(*shape, self.dims, dtype=self.loc.dtype, device=self.loc.device)
        for i in reversed(range(len(self.networks))):
            x = self._from_noise(self.networks[i], x)[..., getattr(self, f"order_{i}").argsort()]
        return self.loc + self.log_scale.exp() * x

    def _from_noise(self, network: nn.Module, x: Tensor) -> Tensor:
        done = x.clone()
        for _ in range(self.dims if self.kind == "autoregressive" else 1):
            # After d passes the first d coordinates are right, whatever the others are.
            shift, log_scale, pieces = self._read(network, done)
            moved, _ = _spline(x[..., self.kept :], pieces, inverse=True)
            done = torch.cat([x[..., : self.kept], shift + log_scale.exp() * moved], -1)
        return done

    def forward(self) -> Any:
        return _Neural(self)


def _masked(owner: nn.Module, dims: int, hidden: Sequence[int], out: int) -> AutoRegressiveNN:
    if not hidden or any(h < 1 for h in hidden):
        raise ValueError(f"{type(owner).__name__}: hidden takes positive widths, got {tuple(hidden)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*input_dim = 1")  # the first coordinate's own distribution
        return AutoRegressiveNN(
            dims, [max(h, dims) for h in hidden], [out], torch.arange(dims), nonlinearity=nn.SiLU()
        )


def _soft(log_scale: Tensor) -> Tensor:
    """Log scales that cannot leave [-7, 7]."""
    return 7 * torch.tanh(log_scale / 7)


_BOUND, _LEAST = 5.0, 1e-3


def _spline(x: Tensor, pieces: Sequence[Tensor], inverse: bool = False) -> tuple[Tensor, Tensor]:
    """A monotone rational-quadratic spline from [-5, 5] to itself, the identity outside: values and ln of its
    derivative at x [*, d] (of the inverse's, for ``inverse``), from ``pieces``: unnormalized widths and
    heights [*, d, bins] and inner slopes [*, d, bins - 1]."""
    widths, heights, slopes = pieces
    bins = widths.shape[-1]

    def knots(pieces: Tensor) -> tuple[Tensor, Tensor]:
        size = 2 * _BOUND * (_LEAST + (1 - _LEAST * bins) * pieces.softmax(-1))
        return size, pad(size[..., :-1].cumsum(-1), (1, 0)) - _BOUND

    width, left = knots(widths)
    height, low = knots(heights)
    # Zero gives slope one.
    slope = pad(_LEAST + softplus(slopes + math.log(math.expm1(1 - _LEAST))), (1, 1), value=1.0)
    inside = x.abs() < _BOUND
    at = torch.where(inside, x, 0.0)
    starts = low if inverse else left
    index = (starts[..., 1:] <= at.unsqueeze(-1)).sum(-1, keepdim=True)
    w, h, x0, y0, d0 = (t.gather(-1, index).squeeze(-1) for t in (width, height, left, low, slope))
    d1 = slope.gather(-1, index + 1).squeeze(-1)
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        rise = at - y0
        a, b, c = h * (s - d0) + rise * bend, h * d0 - rise * bend, -s * rise
        t = 2 * c / (-b - (b.square() - 4 * a * c).clamp_min(0).sqrt())
        value = x0 + t * w
    else:
        t = (at - x0) / w
        value = y0 + h * (s * t.square() + d0 * t * (1 - t)) / (s + bend * t * (1 - t))
    curve = d1 * t.square() + 2 * s * t * (1 - t) + d0 * (1 - t).square()
    log_slope = 2 * s.log() + curve.log() - 2 * (s + bend * t * (1 - t)).log()
    log_slope = -log_slope if inverse else log_slope
    return torch.where(inside, value, x), torch.where(inside, log_slope, 0.0)


# name: the prior of a latent of so many dimensions, where nothing but them is needed
_PLAIN: dict[str, Callable[[int], Prior]] = {
    "standard": StandardNormal,
    "flow": FlowPrior,
    "autoregressive_flow": lambda dims: FlowPrior(dims, "autoregressive"),
    "autoregressive": AutoregressivePrior,
}
PRIORS: tuple[str, ...] = ("mixture", "vamp", *_PLAIN)


def build(
    prior: str | Prior,
    dims: int,
    components: int,
    encode: Callable[[Tensor], Any],
    shape: Sequence[int],
    site: str = "z",
) -> Prior:
    """The prior of this name for a latent ``site`` of ``dims`` numbers, or ``prior`` itself where it fits.

    ``components`` counts a mixture's Gaussians or a VampPrior's pseudo-inputs, which have ``shape`` and start
    as uniform noise in [0, 1]. ValueError names the site, the sizes, and what there is.
    """
    if isinstance(prior, Prior):
        if prior.dims != dims:
            raise ValueError(
                f"prior: {type(prior).__name__} has {prior.dims} dimensions, the latent {site!r} {dims}"
            )
        return prior
    try:
        if prior in _PLAIN:
            return _PLAIN[prior](dims)
        if prior == "mixture":
            return GaussianMixturePrior(dims, components)
        if prior == "vamp":
            positive_count("VampPrior: components", components, "number of pseudo-inputs")
            return VampPrior(dims, encode, torch.rand(components, *shape))
    except ValueError as error:
        raise ValueError(f"the prior of {site!r}, {prior!r}: {error}") from error
    raise ValueError(f"prior takes one of {PRIORS} or a Prior, got {prior!r}")


def _positive(owner: nn.Module, name: str, value: Any) -> None:
    positive_count(f"{type(owner).__name__}: {name}", value, "whole number")

"""Learnable priors of a latent vector: modules that return the distribution p(z) when called."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.distributions import DiagonalMixture, DiscretizedLogistics, Mixture
from pyroelbo.distributions.corruption import Corrupted, GaussianNoise, Generated, NoisyChain
from pyroelbo.flows import FlowDistribution, SplineFlow, VectorDistribution
from pyroelbo.nn import MLPDenoiser, bounded, masked_mlp
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import Stepwise

__all__ = [
    "PRIORS",
    "AutoregressivePrior",
    "DiffusionPrior",
    "FlowPrior",
    "GaussianMixturePrior",
    "IntegerPrior",
    "OrderedPrior",
    "Prior",
    "StandardNormal",
    "VampPrior",
    "from_integers",
    "integer_unit",
    "logistics",
]

_MOST = 2**20  # values of a latent that can be enumerated


class Prior(nn.Module):
    """p(z) over vectors of ``dims`` numbers (abstract): ``prior()`` is a distribution of event shape [dims].
    One that starts from data [N, ...] has ``initialize(y)``.

    Its batch shape is empty and a plate expands it: ``z = pyro.sample("z", self.prior())``. Its parameters
    are trained by the ELBO like all others. If no closed-form KL to the guide is registered, Pyro's
    ``TraceMeanField_ELBO`` estimates that term by Monte Carlo.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.dims = positive_count("dims", dims, "number of dimensions")

    @property
    def out(self) -> int:
        """``dims``, under the name that links of a chain use."""
        return self.dims

    @abstractmethod
    def forward(self) -> Any:
        """The distribution p(z)."""

    own_site: str | None = None
    """A latent site of the prior's own, above z, that ``prior()`` samples in the model and :meth:`guide` in
    the guide."""

    def guide(self, z: Tensor) -> None:
        """Draw the prior's own site given z, in the guide; most priors have none."""


class StandardNormal(Prior):
    """p(z) = N(0, I): no parameters, closed-form KL to a Gaussian guide."""

    loc: Tensor

    def __init__(self, dims: int) -> None:
        super().__init__(dims)
        self.register_buffer("loc", torch.zeros(dims))

    def forward(self) -> Any:
        return dist.Normal(self.loc, 1.0).to_event(1)


class GaussianMixturePrior(Prior):
    """p(z) = Σ_m softmax(logits)_m N(z; loc_m, diag scale_m²), all parameters learned.

    Initially the M centres are draws from N(0, I), with scale M^(-1/dims), so that neighbours overlap.
    """

    def __init__(self, dims: int, components: int = 50) -> None:
        super().__init__(dims)
        positive_count("components", components, "whole number")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, dims))
        self.log_scale = nn.Parameter(torch.full((components, dims), -math.log(components) / dims))

    def forward(self) -> DiagonalMixture:
        return DiagonalMixture(self.logits, self.loc, self.log_scale.exp())


class VampPrior(Prior):
    """p(z) = (1/M) Σ_m q(z | u_m): the aggregated posterior of M learned pseudo-inputs u_m.

    ``encode`` is the pair's encoder, from inputs [M, ...] to q(z | u) with event shape [dims]; its parameters
    are shared, not copied. ``pseudo_inputs [M, ...]`` are in the units of the data; :meth:`initialize` sets
    them to data drawn without replacement plus Gaussian noise of ``noise`` times the data's standard
    deviation. Raises ValueError for more pseudo-inputs than data, or if the encoder's latent has a different
    size. Cost: the encoder on M inputs per batch, and O(M · dims) per draw.

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
            raise TypeError(f"encode: expected the pair's encoder, a callable, got a {type(encode).__name__}")
        if pseudo_inputs.dim() < 2 or not len(pseudo_inputs):
            raise ValueError(
                f"pseudo_inputs: expected shape [M, ...] like the data, got {tuple(pseudo_inputs.shape)}"
            )
        # not an attribute: a module would be registered again as a part of the prior
        self.__dict__["encode"] = encode
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.clone())
        self.noise = noise

    def forward(self) -> Any:
        q = self.__dict__["encode"](self.pseudo_inputs)
        if tuple(q.event_shape) != (self.dims,):
            raise ValueError(f"encode: expected a latent of shape ({self.dims},), got {tuple(q.event_shape)}")
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
                f"components: expected at most one pseudo-input for each of the {len(y)} data, got {len(u)}"
            )
        if u.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"y: expected rows of shape {tuple(u.shape[1:])}, that of the pseudo-inputs, got "
                f"{tuple(y.shape[1:])}"
            )
        y = y.to(u)
        drawn = y[torch.randperm(len(y), device=y.device)[: len(u)]]
        u.copy_(drawn + self.noise * y.std(correction=0) * torch.randn_like(u))


class OrderedPrior(Prior):
    """p(z) = Π_d p(z_d | z_1 … z_{d-1}), every factor computed by a masked network (abstract).

    Cost: one pass of the network for a density, ``dims`` passes for a draw.

    Source: Germain, Gregor, Murray and Larochelle (2015) for the masks.
    """

    network: Any
    support: constraints.Constraint = constraints.real
    values: int = 0
    """Number of values of a coordinate, an integer 0 … values-1; 0 if it is a real number."""

    @abstractmethod
    def log_probs(self, z: Tensor) -> Tensor:
        """ln p(z_d | z_1 … z_{d-1}) of every coordinate, [*, dims]."""

    @abstractmethod
    def coordinate(self, z: Tensor, d: int) -> Any:
        """p(z_d | z_1 … z_{d-1}), of batch shape [*]; those of z [*, dims] from d on do not matter."""

    def forward(self) -> Any:
        return _Ordered(self)


class AutoregressivePrior(OrderedPrior):
    """p(z) = Π_d p(z_d | z_1 … z_{d-1}), each a mixture of ``components`` Gaussians computed by a masked
    network.

    Source: Uria, Murray and Larochelle (2013).
    """

    def __init__(self, dims: int, components: int = 5, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__(dims)
        positive_count("components", components, "whole number")
        self.network = masked_mlp(dims, hidden, 3 * components)
        with torch.no_grad():
            start: Tensor = self.network.layers[-1].bias.view(3, components, dims)
            start[1] += torch.linspace(-1.0, 1.0, components)[:, None] if components > 1 else 0.0

    def conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights, means and log scales [*, components, dims] of every p(z_d | z_1 … z_{d-1})."""
        logits, loc, log_scale = self.network(z).unflatten(-2, (3, -1)).unbind(-3)
        return logits.log_softmax(-2), loc, bounded(log_scale, 7)

    def log_probs(self, z: Tensor) -> Tensor:
        logits, loc, log_scale = self.conditionals(z)
        noise = (z.unsqueeze(-2) - loc) * (-log_scale).exp()
        return logsumexp(logits - log_scale - 0.5 * noise.square() - 0.5 * math.log(2 * math.pi), -2)

    def coordinate(self, z: Tensor, d: int) -> Any:
        logits, loc, log_scale = (p[..., d] for p in self.conditionals(z))
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(loc, log_scale.exp()))


class IntegerPrior(OrderedPrior):
    """p(z) = Π_d p(z_d | z_1 … z_{d-1}) of integers 0 … values-1, each a mixture of ``components``
    discretized logistics (:class:`~pyroelbo.distributions.DiscretizedLogistics`) computed by a masked
    network.

    ``log_prob`` has derivatives in z, so that an encoder that rounds with straight-through gradients learns
    from it too. With few values in all (up to 2^20) its latent can be enumerated.
    """

    def __init__(
        self, dims: int, values: int = 256, components: int = 5, hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__(dims)
        positive_count("components", components, "number of logistics")
        self.values, self.support = values, constraints.integer_interval(0, values - 1)
        self.network = masked_mlp(dims, hidden, 3 * components)

    def _outputs(self, z: Tensor) -> Tensor:
        """Parameters of all coordinates, [*, dims, 3·components]."""
        return self.network(from_integers(z, self.values)).movedim(-1, -2)

    def log_probs(self, z: Tensor) -> Tensor:
        return logistics(self._outputs(z), self.values).log_prob(z)

    def coordinate(self, z: Tensor, d: int) -> Any:
        return logistics(self._outputs(z)[..., d, :], self.values)


class _Ordered(VectorDistribution):
    """The distribution of an :class:`OrderedPrior`."""

    has_rsample = False

    def __init__(self, prior: OrderedPrior) -> None:
        self.prior = prior
        super().__init__(torch.Size(), torch.Size((prior.dims,)))

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        return constraints.independent(self.prior.support, 1)

    @property
    def num_values(self) -> int | None:
        """How many values there are; None of real numbers."""
        return self.prior.values**self.prior.dims or None

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are at most 2^20 values."""
        return 0 < self.prior.values**self.prior.dims <= _MOST

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every value, [S, 1, …, dims], or [S, *B, dims] with ``expand``."""
        if not self.has_enumerate_support:
            raise NotImplementedError(f"expected at most {_MOST} values to enumerate")
        each = torch.arange(self.prior.values, dtype=self._like.dtype, device=self._like.device)
        every = torch.cartesian_prod(*[each] * self.prior.dims)
        every = every.reshape(-1, *[1] * len(self.batch_shape), self.prior.dims)
        return every.expand(-1, *self.batch_shape, -1) if expand else every

    @property
    def _like(self) -> Tensor:
        return self.prior.network.layers[0].weight

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(value), in nats, of the broadcast shape."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.prior.log_probs(value).sum(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def stepwise(self) -> Stepwise:
        """One coordinate after the other; a pass of the network each."""

        def distribution(state: tuple[int, Tensor]) -> Any:
            return self.prior.coordinate(state[1], state[0])

        def append(state: tuple[int, Tensor], coordinate: Tensor) -> tuple[int, Tensor]:
            place, z = state[0], state[1].clone()
            z[..., place] = coordinate
            return place + 1, z

        return Stepwise(lambda n: (0, self._like.new_zeros(n, self.prior.dims)), distribution, append)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``[*sample, *B, dims]``."""
        z = self._like.new_zeros(self._extended_shape(torch.Size(sample_shape)))
        for d in range(self.prior.dims):
            z[..., d] = self.prior.coordinate(z, d).sample()
        return z


def integer_unit(values: int) -> float:
    """The unit in which networks read and write integers 0 … values-1, max(1, √values / 4): 4 for bytes. One
    step of such an integer has to be visible to a network, and one step of training must not skip many."""
    return max(1.0, math.sqrt(values) / 4)


def from_integers(z: Tensor, values: int) -> Tensor:
    """Integers 0 … values-1, or numbers between them, as a network reads them: from the middle of the range,
    in units of :func:`integer_unit`."""
    return (z - (values - 1) / 2) / integer_unit(values)


def logistics(out: Tensor, values: int) -> DiscretizedLogistics:
    """A mixture of discretized logistics on 0 … values-1, of batch shape [*], from a network's ``out`` [*,
    3·M]: logits, centres and log inverse scales, in units of :func:`integer_unit` from the middle."""
    logits, loc, sharp = out.unflatten(-1, (3, -1)).unbind(-2)
    unit, count = integer_unit(values), loc.shape[-1]
    start = torch.arange(count, dtype=out.dtype, device=out.device) - (count - 1) / 2
    loc = (values - 1) / 2 + unit * (loc + start)
    return DiscretizedLogistics(logits, loc, unit * (-bounded(sharp, 6)).exp(), values, False)


class FlowPrior(Prior):
    """p(z) = N(f(x); 0, I) |det f'(x)| exp(-Σ log_scale), x = (z - loc) / exp(log_scale), f a
    :class:`~pyroelbo.flows.SplineFlow`.

    ``loc`` and ``log_scale`` [dims] start at 0; :meth:`standardize` estimates them from samples. Raises
    ValueError for a coupling of fewer than 2 dimensions. Cost: one pass of each network for a density and for
    a draw; ``autoregressive`` takes ``dims`` passes for a draw.

    Args:
        dims: number of dimensions.
        kind: ``"coupling"`` (half of the coordinates given the others) or ``"autoregressive"`` (each given
            those before it).
        layers: number of maps, between which the coordinates are permuted.
        hidden: widths of each map's network.
        bins: pieces of each spline on [-5, 5], in units of ``exp(log_scale)``.

    Source: Durkan, Bekasov, Murray and Papamakarios (2019), equations 4 to 7 and appendix A.
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
        self.loc, self.log_scale = nn.Parameter(torch.zeros(dims)), nn.Parameter(torch.zeros(dims))
        self.flow = SplineFlow(dims, kind, layers, hidden, bins)

    @torch.no_grad()
    def standardize(self, samples: Tensor) -> None:
        """Set ``loc`` and ``log_scale`` to the mean and log standard deviation of samples [N, dims]."""
        samples = samples.to(self.loc)
        self.loc.copy_(samples.mean(0))
        spread = samples.std(0, correction=0)
        self.log_scale.copy_(spread.clamp_min(1e-3 * float(samples.std(correction=0)) + 1e-6).log())

    def forward(self) -> FlowDistribution:
        return FlowDistribution(self.flow, self.loc, self.log_scale)


class _LatentChain(NoisyChain):
    def __init__(self, dims: int, steps: int, width: int, layers: int) -> None:
        super().__init__()
        self.dims, self.steps = dims, steps
        self.corruption = GaussianNoise(steps, "cosine", "v", "learned", None, dims)
        self.generator = MLPDenoiser(dims, self.corruption.outputs, width, layers)


class DiffusionPrior(Prior):
    """p(z) = ∫ p(z_T) Π_t p(z_{t-1} | z_t) p(z | z_1): a Gaussian diffusion in T steps, with z as its data.

    The chain z_T … z_1 is a latent site of its own, ``prior_chain`` [*, T, dims], that ``prior()`` samples in
    the model, which then returns p(z | z_1); :meth:`guide` adds noise to z. The pair's bound is one with T
    latents more, and its weights are right. Raises ValueError at the top of a top-down chain, whose guide
    needs the density of z. Cost: T passes of the network for each draw of z, at once for given chains.

    Args:
        dims: number of dimensions.
        steps: T.
        width: number of features of the network.
        layers: number of its layers.

    Source: Vahdat, Kreis and Kautz (2021) for diffusion over latents; here in discrete time, without a term
    left out.
    """

    own_site = "prior_chain"

    def __init__(self, dims: int, steps: int = 10, width: int = 64, layers: int = 2) -> None:
        super().__init__(dims)
        self.chain = _LatentChain(dims, steps, width, layers)

    def forward(self) -> Any:
        """p(z | z_1), after a draw of ``prior_chain``; inside the model's plate over the data."""
        chain = pyro.sample(self.own_site, Generated(self.chain))
        return self.chain.observation(chain[..., -1, :]).to_event(1)

    def guide(self, z: Tensor) -> None:
        pyro.sample(self.own_site, Corrupted(self.chain.corruption, self.chain.corruption.encode(z)))


# priors that need nothing but the number of dimensions
_PLAIN: dict[str, Callable[[int], Prior]] = {
    "standard": StandardNormal,
    "flow": FlowPrior,
    "autoregressive_flow": lambda dims: FlowPrior(dims, "autoregressive"),
    "autoregressive": AutoregressivePrior,
}
PRIORS: tuple[str, ...] = ("mixture", "vamp", *_PLAIN)
"""Priors with a density; beside them ``diffusion``, a chain."""


def build(
    prior: str | Prior,
    dims: int,
    components: int,
    encode: Callable[[Tensor], Any],
    shape: Sequence[int],
    site: str = "z",
) -> Prior:
    """The prior of a latent, by name or as it is. Raises ValueError for unknown names and sizes that do not
    fit.

    Args:
        prior: one of :data:`PRIORS`, ``diffusion``, or a :class:`Prior` of ``dims`` dimensions.
        dims: number of dimensions of the latent.
        components: number of Gaussians of a mixture, or of pseudo-inputs of a VampPrior.
        encode: the pair's encoder, from inputs [M, *shape] to q(z | u); used by a VampPrior.
        shape: shape of one pseudo-input; these start as uniform noise in [0, 1].
        site: the latent's site, for messages.
    """
    if isinstance(prior, Prior):
        if prior.dims != dims:
            raise ValueError(
                f"prior: expected {dims} dimensions for the latent {site!r}, got a {type(prior).__name__} "
                f"of {prior.dims}"
            )
        return prior
    try:
        if prior in _PLAIN:
            return _PLAIN[prior](dims)
        if prior == "mixture":
            return GaussianMixturePrior(dims, components)
        if prior == "diffusion":
            return DiffusionPrior(dims)
        if prior == "vamp":
            positive_count("components", components, "number of pseudo-inputs")
            return VampPrior(dims, encode, torch.rand(components, *shape))
    except ValueError as error:
        raise ValueError(f"prior {prior!r} of {site!r}: {error}") from error
    raise ValueError(f"prior: expected one of {(*PRIORS, 'diffusion')} or a Prior, got {prior!r}")

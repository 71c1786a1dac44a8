"""Superpixel colorization: a segmentation of a grey picture as the latent behind its colours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyroelbo.distributions import DiscretizedLogistic, TreeCRF
from pyroelbo.models.kmeans import k_means
from pyroelbo.nn import MLP, join
from pyroelbo.numerics import logsumexp, positive_count
from pyroelbo.pair import PLATE, Pair, Stepwise, Summed

__all__ = ["Palette", "Superpixel", "contrast_tree", "superpixel_features"]

STRUCTURES = ("independent", "tree")
GUIDES = (*STRUCTURES, "contrast")
FEATURES = 7
_TOP = 255  # chroma is in -255 … 255
_UNIT = 32.0  # levels of chroma in a network's unit


class Superpixel(Pair):
    """P(y | x) = Σ_z P(z | x) P(y | z, x): x is a picture's luma, y its chroma, z a segment for each
    superpixel.

    Batches (x, superpixels, parents, y) of :func:`pyroelbo.data.superpixels`: x [B, H, W], superpixels
    [B, H, W] in 0 … N-1, parents [B, N] of a tree of them, y [B, H, W, 2] integers in -255 … 255. The latent
    site ``z`` is a LongTensor [B, N] in 0 … ``segments``-1, 0 for superpixels that a picture lacks. Bounds
    are on ln P(y | x), probabilities of integers: -ln P(y | x) / ln 2 is a number of bits.

    - P(z | x): networks of the superpixels' luma give independent categoricals, or a CRF on the tree
      (:class:`~pyroelbo.distributions.TreeCRF`), with potentials of nodes and edges.
    - P(y | z, x): each segment s has one of C colours of a palette, c_s, drawn from a network that sees the
      features of s and of all other segments. It is summed out:
      Π_s Σ_c P(c_s = c | z, x) Π_{pixels i of s} P(y_i | c, x_i); see :class:`Palette`. It does not depend on
      the order of the labels.
    - q(z | y, x): as P(z | x), from the luma and chroma of the superpixels; or on a tree that connects
      superpixels of unlike chroma (:func:`contrast_tree`), as labels that have to differ depend on each other
      most.

    The parts P(z | x) and P(y | z, x) are easy, their sum is not: it is exact for few superpixels only
    (``evidence.exact``, ``fit_em``). Train with ``fit(objective="rloo", particles=4)``.
    ``coding.compress(pair, y, path, given=(x, superpixels, parents))`` writes lossless colours.

    Parts: ``prior``, ``generator``, ``encoder``. Cost: O(B·H·W·C) for a batch, and O(B·N·(S² + C)) for each
    particle. Raises ValueError for other shapes, and for pictures of fewer superpixels than segments.

    Args:
        segments: number of segments S.
        colours: number of colours C of the palette.
        prior: ``tree`` or ``independent``.
        guide: ``contrast``, ``tree`` or ``independent``.
        width: of the networks' hidden layers.
    """

    def __init__(
        self,
        segments: int = 8,
        colours: int = 16,
        prior: str = "tree",
        guide: str = "contrast",
        width: int = 32,
    ) -> None:
        super().__init__()
        for name, count in (("segments", segments), ("colours", colours), ("width", width)):
            positive_count(name, count)
        for name, structure, known in (("prior", prior, STRUCTURES), ("guide", guide, GUIDES)):
            if structure not in known:
                raise ValueError(f"{name}: expected one of {known}, got {structure!r}")
        self.segments, self.colours, self.contrast = segments, colours, guide == "contrast"
        self.prior = _Labels(FEATURES, segments, prior == "tree", width)
        self.generator = _Generator(colours, width)
        self.encoder = _Anchored(FEATURES + 4, segments, guide != "independent", width)

    def _check(self, x: Tensor, superpixels: Tensor, parents: Tensor, y: Tensor) -> None:
        shapes = [tuple(part.shape) for part in (x, superpixels, parents, y)]
        fits = x.dim() == 3 and x.numel() and superpixels.shape == x.shape and y.shape == (*x.shape, 2)
        if not fits or parents.dim() != 2 or len(parents) != len(x):
            raise ValueError(
                "x, superpixels, parents, y: expected shapes [B, H, W], [B, H, W], [B, N] and [B, H, W, 2], "
                f"got {', '.join(map(str, shapes))}; data.superpixels makes such a batch of colour pictures"
            )
        for name, part, low, high in (
            ("x", x, 0, _TOP),
            ("superpixels", superpixels, 0, parents.shape[1] - 1),
            ("y", y, -_TOP, _TOP),
        ):
            if part.is_floating_point() or int(part.min()) < low or int(part.max()) > high:
                raise ValueError(
                    f"{name}: expected integers in {low} … {high}, got {part.dtype}, {float(part.min()):g} … "
                    f"{float(part.max()):g}"
                )
        found = superpixel_sizes(superpixels, parents.shape[1])
        few = ((found > 0).sum(-1) < self.segments).nonzero()
        if len(few):
            row = int(few[0])
            raise ValueError(
                f"superpixels: expected at least {self.segments} in each picture, one a segment, got "
                f"{int((found[row] > 0).sum())} in row {row}; use fewer segments or more superpixels"
            )

    def model(self, x: Tensor, superpixels: Tensor, parents: Tensor, y: Tensor) -> None:
        self._check(x, superpixels, parents, y)
        seen = _Pieces.of(x, superpixels, parents, self.generator.palette.dtype)
        with pyro.plate(PLATE, len(x)):
            z = pyro.sample("z", self.prior(seen.features, seen))
            pyro.sample("y", Colouring(self.generator, seen, z, self.segments), obs=y)

    def guide(self, x: Tensor, superpixels: Tensor, parents: Tensor, y: Tensor) -> None:
        self._check(x, superpixels, parents, y)
        seen = _Pieces.of(x, superpixels, parents, self.generator.palette.dtype)
        mean, spread = seen.moments(y.to(seen.features.dtype) / _UNIT)
        if self.contrast:
            seen = replace(seen, parents=contrast_tree(mean, seen.real))
        with pyro.plate(PLATE, len(x)):
            pyro.sample("z", self.encoder(torch.cat([seen.features, mean, spread], -1), seen, mean))

    @torch.no_grad()
    def initialize(self, x: Tensor, superpixels: Tensor, parents: Tensor, y: Tensor) -> Superpixel:
        """Start the palette and the guide's anchors from k-means of the superpixels' mean chroma; returns
        self."""
        self._check(x, superpixels, parents, y)
        seen = _Pieces.of(x, superpixels, parents, self.generator.palette.dtype)
        mean, spread = (part[seen.real] for part in seen.moments(y.to(seen.features.dtype) / _UNIT))
        centres, label, used = k_means(mean, self.colours)
        self.generator.palette.start(centres, spread.mean().clamp_min(1 / _UNIT))
        centres, label, used = k_means(mean, self.segments)
        self.encoder.anchors.copy_(centres)
        variance = (used - centres[label]).square().mean().clamp_min(1e-4)
        self.encoder.log_precision.copy_(-(2 * variance).log())
        return self

    def placeholder(self, n: int, *given: Tensor) -> tuple[Tensor, ...]:
        if len(given) != 3:
            raise ValueError(
                f"given: expected x, superpixels and parents, got {len(given)} parts; call simulate(n, x, "
                "superpixels, parents)"
            )
        return *given, given[0].new_zeros(*given[0].shape, 2)


def superpixel_sizes(superpixels: Tensor, count: int) -> Tensor:
    """The number of pixels of each superpixel, [B, N]."""
    flat = superpixels.flatten(1)
    return torch.zeros(len(flat), count, dtype=torch.long, device=flat.device).scatter_add_(
        1, flat, torch.ones_like(flat)
    )


@torch.no_grad()
def contrast_tree(chroma: Tensor, real: Tensor) -> Tensor:
    """The parents [B, N] of a spanning tree of superpixels of mean chroma [B, N, 2] with the largest total
    distance, -1 at its root, the first one, and at those that are not ``real`` [B, N]; as far as possible
    they are connected to ones unlike them.

    Cost: O(B·N²) in N steps. Source: Prim (1957).
    """
    apart, rows = torch.cdist(chroma, chroma), torch.arange(len(chroma), device=chroma.device)
    root = real.int().argmax(-1)
    parents, best = root[:, None].expand_as(real), apart[rows, root]
    left = real.scatter(1, root[:, None], False)
    for _ in range(real.shape[1] - 1):
        # where none is left, an entry is chosen that changes nothing
        added = torch.where(left, best, -1.0).argmax(-1)
        left = left.scatter(1, added[:, None], False)
        nearer = left & (apart[rows, added] > best)
        best = torch.where(nearer, apart[rows, added], best)
        parents = torch.where(nearer, added[:, None], parents)
    return torch.where(real, parents, -1).scatter(1, root[:, None], -1)


def superpixel_features(x: Tensor, superpixels: Tensor, parents: Tensor) -> Tensor:
    """What networks see of each superpixel's luma, [B, N, 7] in torch's default dtype: mean, spread, share of
    the picture, row, column, and mean differences along rows and columns."""
    return _Pieces.of(x, superpixels, parents, torch.get_default_dtype()).features


@dataclass(frozen=True)
class _Pieces:
    """A batch's superpixels: which pixels they have, which are ``real`` [B, N], and their ``features``
    [B, N, 7]."""

    luma: Tensor  # [B, P], LongTensor
    index: Tensor  # [B·P], into B·N
    size: Tensor  # [B, N]
    parents: Tensor
    features: Tensor
    shape: tuple[int, ...]  # H, W

    @classmethod
    @torch.no_grad()
    def of(cls, x: Tensor, superpixels: Tensor, parents: Tensor, dtype: torch.dtype) -> _Pieces:
        rows, count, (height, width) = len(x), parents.shape[1], x.shape[1:]
        first = count * torch.arange(rows, device=x.device)[:, None]
        index = (superpixels.flatten(1) + first).flatten()
        size = superpixel_sizes(superpixels, count).to(dtype)
        grey = x.to(dtype) / _TOP
        across = grey.diff(dim=-1, append=grey[..., -1:]).abs()
        down = grey.diff(dim=-2, append=grey[..., -1:, :]).abs()
        ticks = (torch.linspace(-1, 1, n, dtype=dtype, device=x.device) for n in (height, width))
        place = torch.stack(torch.meshgrid(*ticks, indexing="ij"), -1).expand(rows, -1, -1, -1)
        values = torch.cat([torch.stack([grey, grey.square(), across, down], -1), place], -1)
        found = cls(x.flatten(1).long(), index, size, parents, values, (height, width))
        mean, power, across, down, row, column = found.mean(values).unbind(-1)
        spread = (power - mean.square()).clamp_min(0).sqrt()
        share = (size.clamp_min(1) / (height * width)).log() / 5
        features = torch.stack([2 * mean - 1, 4 * spread, share, row, column, 8 * across, 8 * down], -1)
        return cls(found.luma, index, size, parents, features, (height, width))

    @property
    def real(self) -> Tensor:
        return self.size > 0

    def above(self, values: Tensor) -> Tensor:
        """The values [B, N, F] of each superpixel's parent; its own at a root."""
        own = torch.arange(values.shape[1], device=values.device)
        index = torch.where(self.parents < 0, own, self.parents)
        return values.gather(1, index[..., None].expand_as(values))

    def total(self, values: Tensor) -> Tensor:
        """Sums over the pixels of each superpixel, [B, N, F] of [B, H, W, F] or [B, P, F]."""
        flat = values.reshape(len(self.index), -1)
        sums = flat.new_zeros(self.size.numel(), flat.shape[-1]).index_add(0, self.index, flat)
        return sums.unflatten(0, self.size.shape)

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / self.size.clamp_min(1).to(values)[..., None]

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations over the pixels of each superpixel."""
        mean, power = self.mean(torch.cat([values, values.square()], -1)).chunk(2, -1)
        return mean, (power - mean.square()).clamp_min(0).sqrt()


class _Labels(nn.Module):
    """A distribution of labels [N] of superpixels from features [B, N, F]: independent, or a CRF on the tree.

    Networks see a superpixel's features, its parent's, and their mean over the picture. They start near
    nothing: labels are about uniform.
    """

    def __init__(self, features: int, segments: int, tree: bool, width: int) -> None:
        super().__init__()
        self.segments = segments
        self.node = MLP((3 * features, width, width, segments))
        self.edge = MLP((3 * features, width, segments**2)) if tree else None
        for network in (self.node, *([self.edge] if tree else [])):
            nn.init.normal_(network[-1].weight, std=0.01)
            nn.init.zeros_(network[-1].bias)

    def forward(self, features: Tensor, seen: _Pieces) -> Any:
        return self.labels(features, seen, 0.0, 0.0)

    def labels(
        self, features: Tensor, seen: _Pieces, node_start: Tensor | float, edge_start: Tensor | float
    ) -> Any:
        """The distribution whose log potentials are the networks' plus these [B, N, S], [B, N, S, S]."""
        real, above = seen.real[..., None], seen.above(features)
        picture = (features * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        node = node_start + self.node(torch.cat([features, above, picture.expand_as(features)], -1))
        first = torch.arange(self.segments, device=node.device) == 0
        node = torch.where(real, node, torch.where(first, 0.0, -torch.inf).to(node))
        if self.edge is None:
            return dist.Categorical(logits=node).to_event(1)
        edge = self.edge(torch.cat([features, above, (features - above).abs()], -1))
        edge = edge_start + edge.unflatten(-1, (self.segments, self.segments))
        return TreeCRF(seen.parents, node, edge)


class _Anchored(_Labels):
    """Labels that start from the distances of the superpixels' mean chroma [B, N, 2] to an anchor for each
    label: logits a_n = -precision · |chroma_n - anchors|².

    Nodes have the log potentials ``lean`` · a_n, and the edge from u to v has (1 - ``lean``) · ln P(s_n -
    s_parent = v - u modulo S) of labels s drawn by the logits a. ``lean`` is learned, from 1 on. At 0 labels
    are only given by how neighbours' differ: S orders of the labels at once, where their order is free.
    """

    def __init__(self, features: int, segments: int, tree: bool, width: int) -> None:
        super().__init__(features, segments, tree, width)
        self.anchors = nn.Parameter(torch.randn(segments, 2))
        self.log_precision = nn.Parameter(torch.zeros(()))
        self.lean = nn.Parameter(torch.ones(())) if tree else None

    def forward(self, features: Tensor, seen: _Pieces, chroma: Tensor) -> Any:  # type: ignore[override]
        apart = (chroma.unsqueeze(-2) - self.anchors).square().sum(-1)
        logits = -self.log_precision.exp() * apart
        if self.lean is None:
            return self.labels(features, seen, logits, 0.0)
        p, label = logits.softmax(-1), torch.arange(self.segments, device=logits.device)
        after = p[..., (label + label[:, None]) % self.segments]  # [s, k]: of label s + k
        shift = (seen.above(p).unsqueeze(-2) @ after).squeeze(-2)
        edge = (shift + 1e-6).log()[..., (label - label[:, None]) % self.segments]
        return self.labels(features, seen, self.lean * logits, (1 - self.lean) * edge)


class Palette(nn.Module):
    """C distributions of a pixel's chroma given its luma, P(y_i | c, x_i).

    Co and, given it, Cg are discretized logistics on -255 … 255 whose parameters are a network's, of the
    luma; the centre of Cg moves with Co. :meth:`log_prob` is exact in nats. Cost: O(pixels · C).
    """

    def __init__(self, colours: int, width: int) -> None:
        super().__init__()
        self.colours = colours
        self.network = MLP((1, width, colours * 5))
        self.start(torch.randn(colours, 2), torch.tensor(0.3))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @torch.no_grad()
    def start(self, centres: Tensor, spread: Tensor) -> None:
        """Centres [C, 2] in units of 32 levels, whatever the luma; scales of ``spread`` / 2, twice and four
        times that in turn, as a picture may have colours that no other has."""
        last = list(self.network)[-1]
        nn.init.normal_(last.weight, std=0.01)
        wider = 2.0 ** (torch.arange(self.colours) % 3)
        scales = (float(spread) / 2 * wider).log()[:, None].expand(-1, 2)
        packed = [part.to(last.bias) for part in (centres, scales, torch.zeros(self.colours, 1))]
        last.bias.copy_(torch.cat(packed, -1).flatten())

    def distributions(self, luma: Tensor, orange: Tensor | None = None) -> tuple[Any, Any]:
        """P(Co | c, x) and, given Co ``orange`` [*], P(Cg | Co, c, x), of luma [*] and batch shape [*, C]."""
        levels = torch.linspace(-1, 1, _TOP + 1).to(next(self.network.parameters()))[:, None]
        table = self.network(levels).unflatten(-1, (self.colours, 5))
        place, tilt, scale = table[..., :2] * _UNIT, table[..., 4], _UNIT * table[..., 2:4].exp() + 0.1
        packed = torch.cat([place, scale, tilt.tanh()[..., None]], -1)[luma]
        first, second, width, height, slope = packed.unbind(-1)
        co = _chroma(first, width)
        if orange is not None:
            second = second + slope * (orange.unsqueeze(-1) - first)
        return co, _chroma(second, height)

    def log_prob(self, luma: Tensor, chroma: Tensor) -> Tensor:
        """ln P(y | c, x), [*, C], of luma [*] and chroma [*, 2]."""
        orange, leaf = chroma.to(self.dtype).unbind(-1)
        co, cg = self.distributions(luma, orange)
        return co.log_prob(orange.unsqueeze(-1)) + cg.log_prob(leaf.unsqueeze(-1))

    def chosen(self, luma: Tensor, colour: Tensor, orange: Tensor | None = None) -> Any:
        """P(Co | c, x) or, given Co ``orange`` [*], P(Cg | Co, c, x), of luma [*] and one colour c [*]
        each."""
        d = self.distributions(luma, orange)[orange is not None]
        return _chroma(*(p.gather(-1, colour.unsqueeze(-1)).squeeze(-1) for p in (d.loc, d.scale)))


def _chroma(loc: Tensor, scale: Tensor) -> DiscretizedLogistic:
    return DiscretizedLogistic(loc, scale, 2 * _TOP + 1, False, -_TOP)


class Painted(TorchDistribution):
    """Chroma of pixels of luma [*] and colours [*], Co before Cg; values [*, 2]."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, palette: Palette, luma: Tensor, colour: Tensor) -> None:
        self.palette, self.luma, self.colour = palette, luma, colour
        super().__init__(colour.shape, torch.Size((2,)), validate_args=False)

    def stepwise(self) -> Stepwise:
        luma, colour = self.luma.flatten(), self.colour.flatten()
        return Stepwise(
            lambda n: None,
            lambda orange: self.palette.chosen(luma, colour, orange),
            lambda _, orange: orange,
        )

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        orange = self.palette.chosen(self.luma, self.colour).sample(sample_shape)
        return torch.stack([orange, self.palette.chosen(self.luma, self.colour, orange).sample()], -1)


class _Generator(nn.Module):
    """The palette, and P(c_s | z, x) of each segment from its features and those of all segments."""

    def __init__(self, colours: int, width: int) -> None:
        super().__init__()
        self.palette = Palette(colours, width)
        self.into = nn.Linear(FEATURES + 1, width)
        self.out = MLP((2 * width, width, colours))

    def forward(self, features: Tensor, share: Tensor) -> Tensor:
        """ln P(c_s | z, x) [*, S, C] of the segments' mean features [*, S, 7] and shares of the picture
        [*, S]."""
        share = share.unsqueeze(-1)
        h = nn.functional.silu(self.into(torch.cat([features, share], -1)))
        return self.out(join(h, (share * h).sum(-2, keepdim=True))).log_softmax(-1)


class Colouring(TorchDistribution):
    """P(y | z, x) of labels z [*K, B, N] of superpixels; values [B, H, W, 2].

    ln P = Σ_s ln Σ_c P(c_s = c | z, x) Π_i P(y_i | c, x_i), in nats: the pixels are summed within superpixels
    once, whatever the number of particles.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, generator: _Generator, seen: _Pieces, z: Tensor, segments: int) -> None:
        self.generator, self.seen, self.z, self.segments = generator, seen, z, segments
        batch = torch.broadcast_shapes(z.shape[:-1], seen.size.shape[:1])
        super().__init__(batch, torch.Size((*seen.shape, 2)), validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(-_TOP, _TOP), 3)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Colouring:
        labels = self.z.expand(*batch_shape, -1)
        return Colouring(self.generator, self.seen, labels, self.segments)

    def _segments(self) -> tuple[Tensor, Tensor]:
        """Which superpixels each segment has [*, S, N], and the ln P(c_s | z, x) [*, S, C]."""
        seen = self.seen
        own = nn.functional.one_hot(self.z, self.segments).to(seen.features).mT
        share = own * (seen.size / seen.size.sum(-1, keepdim=True)).unsqueeze(-2)
        total = share.sum(-1)
        mean = share @ seen.features / torch.where(total > 0, total, 1.0).unsqueeze(-1)
        return own, self.generator(mean, total)

    def _joint(self, value: Tensor) -> Tensor:
        """ln P(c_s, y_s | z, x), [*, S, C], y_s the pixels of segment s."""
        own, log_prior = self._segments()
        shape = self.seen.luma.shape
        rows = [
            self.seen.total(self.generator.palette.log_prob(self.seen.luma, v.reshape(*shape, 2)))
            for v in value.reshape(-1, *shape, 2)
        ]
        each = rows[0] if len(rows) == 1 else torch.stack(rows).unflatten(0, value.shape[:-4])
        return log_prior + own @ each

    def log_prob(self, value: Tensor) -> Tensor:
        return logsumexp(self._joint(value), -1).sum(-1)

    def summed(self) -> Summed:
        """The colours of the segments, [*, S], given which the pixels are independent."""
        prior = dist.Categorical(logits=self._segments()[1]).to_event(1)
        return Summed(prior, self._given, lambda y: dist.Categorical(logits=self._joint(y)).to_event(1))

    def _given(self, colour: Tensor) -> Painted:
        labels = self.z.expand(*colour.shape[:-1], -1)
        by_superpixel = colour.gather(-1, labels)
        index = self.seen.index.view(self.seen.luma.shape) % self.seen.size.shape[1]
        pixels = by_superpixel.gather(-1, index.expand(*labels.shape[:-1], -1))
        luma, shape = self.seen.luma.expand(pixels.shape), self.seen.shape
        return Painted(self.generator.palette, luma.unflatten(-1, shape), pixels.unflatten(-1, shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        summed = self.summed()
        return summed.given(summed.prior.sample(sample_shape)).sample().to(torch.int32)

"""What do segments of superpixels save of a picture's colours, and how tight is each guide over them?

- ``leave``: eight photographs of 128x128, each held out in turn; bits per chroma value of the held-out one,
  given its luma (two values a pixel, in a space that is reversible on integers, so that these are bits of
  lossless colours). Rows: pixels alone, from their own luma or also from their superpixel's features;
  one segment; superpixels alone, each with a colour of its own; segments of superpixels (a bound: the latent
  cannot be summed out), with independent labels and on a tree. All have the same palette and the same
  training. Differences are paired over the pictures. JPEG XL, lossless, if its plug-in for Pillow is there:
  (bytes of the colour picture - bytes of its luma) in bits per chroma value.
- ``guides``: the smallest gaps of families of guides under one frozen generator and a uniform prior, on crops
  of 32x32 with 8 … 10 superpixels, where the posterior is known; beside ln S!, as the labels' order is free.
- ``em``: exact EM (3 segments, at most 8 superpixels: 6,561 segmentations), audits at 4^8 and one at 4^10.
- ``speed``: a training step on one full picture of about 200 superpixels.

    python -m benchmarks.colorization [--only leave] [--epochs 25] [--segments 8] [--colours 16]
"""

import argparse
import importlib.util
import io
import itertools
import json
import math
import statistics
import time

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyroelbo import data, evidence, fit, fit_em, models
from pyroelbo.distributions import TreeCRF
from pyroelbo.models.superpixel import GUIDES, Palette, contrast_tree, superpixel_features
from pyroelbo.nn import MLP

FEATURES = 7
SHARP = 12.0  # log potentials that start a guide near a few segmentations
SEGMENTED = ("segments, independent", "segments, tree", "segments, contrast")


def pictures() -> Tensor:
    """The eight scenes, [8, 128, 128, 3]."""
    found = data.load("scenes")
    return torch.cat([found["train"], found["test"]]).unflatten(-1, found.shape)


def rows(batch: tuple, index) -> tuple:
    return tuple(part[index] for part in batch)


def values(batch: tuple) -> float:
    """ln 2 times the chroma values of a picture: what turns nats of a picture into bits per value."""
    return batch[3][0].numel() * math.log(2)


class Alone(nn.Module):
    """ln P(y | x) without a latent: pixels (``by="pixel"``, ``"features"``) or superpixels alone, each with a
    colour of the palette, drawn given features of the luma and summed out."""

    def __init__(self, by: str, colours: int, width: int = 32) -> None:
        super().__init__()
        self.by, self.palette = by, Palette(colours, width)
        inputs = {"pixel": 1, "features": 1 + 2 * FEATURES, "superpixel": 2 * FEATURES}[by]
        self.network = MLP((inputs, width, width, colours))
        nn.init.normal_(self.network[-1].weight, std=0.01)

    def forward(self, x: Tensor, superpixels: Tensor, parents: Tensor, y: Tensor) -> Tensor:
        each = self.palette.log_prob(x.long(), y).flatten(1, 2)
        luma, index = x.flatten(1)[..., None] / 127.5 - 1, superpixels.flatten(1)
        features = superpixel_features(x, superpixels, parents)
        real = torch.zeros(parents.shape).scatter_(1, index, 1.0)
        picture = (features * real[..., None]).sum(1, keepdim=True) / real.sum(1)[:, None, None]
        features = torch.cat([features, picture.expand_as(features)], -1)
        if self.by == "superpixel":
            total = each.new_zeros(*parents.shape, each.shape[-1])
            total = total.scatter_add(1, index[..., None].expand_as(each), each)
            return (torch.logsumexp(self.network(features).log_softmax(-1) + total, -1) * real).sum(-1)
        if self.by == "features":
            own = features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))
            luma = torch.cat([luma, own], -1)
        return torch.logsumexp(self.network(luma).log_softmax(-1) + each, -1).sum(-1)


def trained_alone(by: str, train: tuple, options) -> Alone:
    torch.manual_seed(options.seed)
    start = models.Superpixel(1, options.colours).initialize(*train)
    network = Alone(by, options.colours)
    network.palette.load_state_dict(start.generator.palette.state_dict())
    count, optimizer = len(train[0]), torch.optim.Adam(network.parameters(), options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * count)
    for _ in range(options.epochs):
        for i in torch.randperm(count):
            optimizer.zero_grad()
            (-network(*rows(train, i[None])).sum()).backward()
            optimizer.step()
            schedule.step()
    return network


def trained(guide: str, segments: int, train: tuple, options) -> models.Superpixel:
    torch.manual_seed(options.seed)
    prior = "independent" if guide == "independent" else "tree"
    pair = models.Superpixel(segments, options.colours, prior, guide).initialize(*train)
    fit(
        pair,
        train,
        objective="rloo",
        particles=4,
        epochs=options.epochs,
        batch_size=1,
        learning_rate=options.learning_rate,
        schedule="cosine",
        seed=options.seed,
        progress=False,
    )
    return pair


def held_out_bits(name: str, train: tuple, test: tuple, options) -> float:
    by = {"pixels, own luma": "pixel", "pixels, superpixel's features": "features"}
    by["superpixels alone"] = "superpixel"
    if name in by:
        network = trained_alone(by[name], train, options)
        with torch.no_grad():
            return -float(network(*test)) / values(test)
    if name == "one segment":
        return -float(evidence.exact(trained("independent", 1, train, options), test).value) / values(test)
    pair = trained(name.split(", ")[1], options.segments, train, options)
    return -float(evidence.iwae(pair, test, particles=64).value) / values(test)


def jpeg_xl_bits(rgb: Tensor) -> float:
    import pillow_jxl  # noqa: F401
    from PIL import Image

    def size(array) -> int:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "jxl", lossless=True, effort=9)
        return len(file.getvalue())

    luma = data.to_ycocg(rgb)[0].to(torch.uint8)
    return (size(rgb.numpy()) - size(luma.numpy())) * 8 / (2 * luma.numel())


def leave(options) -> dict:
    rgb = pictures()
    batch = data.superpixels(rgb)
    names = ["pixels, own luma", "pixels, superpixel's features", "one segment", "superpixels alone"]
    names += options.rows
    chosen = [i for i, scene in enumerate(data.SCENES) if scene in options.scenes]
    bits: dict[str, list[float]] = {name: [] for name in names}
    print(f"| held out | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for i in chosen:
        others = torch.tensor([j for j in range(len(rgb)) if j != i])
        train, test = rows(batch, others), rows(batch, torch.tensor([i]))
        for name in names:
            bits[name].append(held_out_bits(name, train, test, options))
        cells = [f"{bits[name][-1]:.3f}" for name in names]
        print(f"| {data.SCENES[i]} | {' | '.join(cells)} |", flush=True)
    print(f"| mean | {' | '.join(f'{statistics.mean(bits[name]):.3f}' for name in names)} |")
    for name, other in itertools.product(options.rows, names[:4]):
        less = [a - b for a, b in zip(bits[name], bits[other], strict=True)]
        error = f" ± {statistics.stdev(less) / math.sqrt(len(less)):.3f}" if len(less) > 1 else ""
        print(f"{name} minus {other}: {statistics.mean(less):+.3f}{error} bits per chroma value")
    if importlib.util.find_spec("pillow_jxl"):
        bits["JPEG XL"] = [jpeg_xl_bits(rgb[i]) for i in chosen]
        print(f"JPEG XL: {statistics.mean(bits['JPEG XL']):.3f}")
    return {"scenes": [data.SCENES[i] for i in chosen], "bits": bits}


def crops(rgb: Tensor, most: int, least: int, count: int | None, limit: int) -> tuple:
    """Crops of 32x32 of ``least`` to ``most`` superpixels."""
    tiles = rgb.unflatten(2, (4, 32)).unflatten(1, (4, 32)).transpose(2, 3).reshape(-1, 32, 32, 3)
    x, superpixels, parents, y = data.superpixels(tiles, count)
    number = superpixels.flatten(1).max(-1).values + 1
    keep = ((number >= least) & (number <= most)).nonzero()[:, 0]
    keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(0))[:limit]]
    return x[keep], superpixels[keep], parents[keep][:, :most], y[keep]


def site(program, batch: tuple, name: str, z: Tensor | None = None):
    """The distribution at a site, given labels."""
    program = program if z is None else poutine.condition(program, data={"z": z})
    return poutine.trace(program).get_trace(*batch).nodes[name]["fn"]


def features(z: Tensor, segments: int, parents: list[int]) -> Tensor:
    """Which labels nodes, and which pairs of them edges have [V, F] in all segmentations [V, N]: the log
    potentials' factors. Without ``parents`` the labels are independent."""
    at = nn.functional.one_hot(z, segments).float()
    pairs = [at[:, a, :, None] * at[:, n, None, :] for n, a in enumerate(parents) if a >= 0]
    return torch.cat([at.flatten(1), *(pair.flatten(1) for pair in pairs)], -1)


def starts(z: Tensor, segments: int, parents: list[int], log_posterior: Tensor) -> list[Tensor]:
    """Potentials to start from: one order of the labels of one of the likeliest segmentations, as nodes, or
    as edges all orders that are shifts of it; and nearly none at all."""
    likely: list[Tensor] = []
    for labels in z[log_posterior.topk(min(len(z), 4 * segments**4)).indices]:
        same = labels[:, None] == labels
        if not any(bool((same == (other[:, None] == other)).all()) for other in likely):
            likely.append(labels)
    label, found = torch.arange(segments), []
    for labels in likely[:3]:
        nodes = SHARP * nn.functional.one_hot(labels, segments).float().flatten()
        shifts = [labels[n] - labels[a] for n, a in enumerate(parents) if a >= 0]
        edges = [((label - label[:, None] - k) % segments == 0).float().flatten() for k in shifts]
        found.append(torch.cat([0 * nodes, *(SHARP * edge for edge in edges)]) if edges else nodes)
    return [*found, 0.01 * torch.randn(len(found[0]), generator=torch.Generator().manual_seed(0))]


def smallest_gap(z: Tensor, segments: int, parents: list[int], log_posterior: Tensor, steps: int) -> float:
    """min KL(q, p(z | x, y)) over q with free potentials, by Adam on the sum over all z [V, N], the best of
    several starts. From the last one the posterior is tempered at first: its differences are of hundreds of
    nats, and a guide that is not sharp yet flees to a single order."""
    factors, gaps = features(z, segments, parents), []
    begins = starts(z, segments, parents, log_posterior)
    for start in begins:
        potentials = start.requires_grad_()
        optimizer = torch.optim.Adam([potentials], 5e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps + 1):
            warm = 10 ** min(0.0, 6 * step / steps - 3) if start is begins[-1] else 1.0
            log_q = (factors @ potentials).log_softmax(0)
            if step < steps:
                optimizer.zero_grad()
                (log_q.exp() * (log_q - warm * log_posterior)).sum().backward()
                optimizer.step()
                schedule.step()
        node, *edges = potentials.detach().split(
            [z.shape[1] * segments, *[segments**2] * sum(a >= 0 for a in parents)]
        )
        q = dist.Categorical(logits=node.unflatten(0, (-1, segments))).to_event(1)
        if edges:
            table = torch.zeros(len(parents), segments, segments)
            table[torch.tensor(parents) >= 0] = torch.stack(edges).unflatten(-1, (segments, segments))
            q = TreeCRF(torch.tensor(parents), node.unflatten(0, (-1, segments)), table)
        log_q = q.log_prob(z).double()
        gaps.append(float((log_q.exp() * (log_q - log_posterior)).sum()))
    return min(gaps)


def informative_tree(z: Tensor, segments: int, posterior: Tensor) -> list[int]:
    """The parents of the tree with the largest mutual informations of neighbours (Chow and Liu, 1968): of all
    trees the one with the smallest KL(p(z | x, y), q)."""
    at = nn.functional.one_hot(z, segments).double()
    joint = torch.einsum("v,vis,vjt->ijst", posterior, at, at)
    apart = torch.einsum("v,vis->is", posterior, at)
    apart = apart[:, None, :, None] * apart[None, :, None, :]
    shared = (joint * (joint.clamp_min(1e-300) / apart.clamp_min(1e-300)).log()).sum((-2, -1))
    parents, inside = [-1] * len(shared), [0]
    while len(inside) < len(shared):
        left = [n for n in range(len(shared)) if n not in inside]
        above, n = max(itertools.product(inside, left), key=lambda edge: float(shared[edge]))
        parents[n] = above
        inside.append(n)
    return parents


def amortized_gaps(
    base: models.Superpixel, guide: str, batch: tuple, posteriors: list, options
) -> list[list[float]]:
    """KL(q(z | x, y), p(z | x, y)) of each crop, in nats, of the model's own guide: one network for all
    crops, trained by ``rloo`` with the generator of ``base`` and its uniform prior held fixed, under a KL
    weight that falls from 300 to 1 in the first three fifths; of the starts the one with the best bound, and
    then the others."""

    def start(seed: int) -> list[float]:
        torch.manual_seed(seed)
        pair = models.Superpixel(base.segments, base.colours, "independent", guide).initialize(*batch)
        pair.generator.load_state_dict(base.generator.state_dict())
        pair.prior.load_state_dict(base.prior.state_dict())
        if pair.encoder.lean is not None:  # all orders of the labels at once
            nn.init.zeros_(pair.encoder.lean)
        epochs = options.amortized_epochs
        fit(
            pair, batch, objective="rloo", particles=16, batch_size=8, epochs=epochs, learning_rate=1e-2,
            schedule="cosine", freeze=("prior", "generator"), seed=seed, progress=False,
            kl_weight=lambda epoch: max(1.0, 300 ** (1 - epoch / (0.6 * epochs))),
        )  # fmt: skip
        return [gap_of(pair, i, *posterior) for i, posterior in enumerate(posteriors)]

    def gap_of(pair: models.Superpixel, i: int, z: Tensor, log_posterior: Tensor) -> float:
        x, superpixels, parents, y = rows(batch, slice(i, i + 1))
        crop = x, superpixels, parents[:, : z.shape[1]], y
        with torch.no_grad():
            log_q = site(pair.guide, crop, "z").log_prob(z[:, None])[:, 0].double()
        return float(torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_posterior), 0.0).sum())

    # under one generator the smallest gap is the best bound
    return sorted((start(options.seed + k) for k in range(options.amortized_starts)), key=sum)


def guides(options) -> dict:
    """The families' smallest gaps crop by crop, without networks and sampling noise, under one frozen
    generator with a uniform prior; and the gaps of the model's own guides, trained on all crops at once."""
    record: dict = {}
    print("| segments S, superpixels | crops | ln S! | guide | gap, nats a crop | largest | closed |")
    print("|---|---|---|---|---|---|---|")
    for segments in options.guide_segments:
        least, most, count, limit = {2: (8, 10, 11, 8), 3: (8, 8, 8, 3)}[segments]
        batch = crops(pictures()[:-1], most, least, count, limit)
        torch.manual_seed(options.seed)
        base = models.Superpixel(segments, 4, "independent", "independent").initialize(*batch)
        for parameter in base.prior.parameters():
            nn.init.zeros_(parameter)
        settings = {"objective": "rloo", "particles": 8, "batch_size": 8, "learning_rate": 5e-3}
        fit(base, batch, epochs=100, freeze=("prior",), seed=options.seed, progress=False, **settings)
        number = batch[1].flatten(1).max(-1).values + 1
        gaps: dict[str, list[float]] = {}
        posteriors = []
        for i in range(len(number)):
            x, superpixels, parents, y = rows(batch, slice(i, i + 1))
            crop = x, superpixels, parents[:, : int(number[i])], y
            z = torch.cartesian_prod(*[torch.arange(segments)] * int(number[i]))
            with torch.no_grad():
                log_joint = site(base.model, crop, "z").log_prob(z[:, None])
                log_joint = log_joint + site(base.model, crop, "y", z[:, None]).log_prob(y)
            log_posterior = log_joint[:, 0].double().log_softmax(0).float()
            posteriors.append((z, log_posterior))
            own = nn.functional.one_hot(superpixels.flatten(1)).float()
            chroma = own.mT @ y.flatten(1, 2).float() / own.sum(1)[..., None]
            families = {
                "independent": [-1] * z.shape[1],
                "tree of neighbours": crop[2][0].tolist(),
                "tree of contrasts": contrast_tree(chroma, own.sum(1) > 0)[0].tolist(),
                "most informative tree": informative_tree(z, segments, log_posterior.double().exp()),
            }
            for name, tree in families.items():
                gap = smallest_gap(z, segments, tree, log_posterior, options.guide_steps)
                if name != "independent":  # which a tree's guides include
                    gap = min(gap, gaps["independent"][-1])
                gaps.setdefault(name, []).append(gap)
        every = {}
        for guide in GUIDES:
            found = amortized_gaps(base, guide, batch, posteriors, options)
            gaps[f"{guide}, amortized"] = found[0]
            every[guide] = [statistics.mean(start) for start in found]
            print(
                f"{segments}, {guide}, amortized: {', '.join(f'{m:.3f}' for m in every[guide])}", flush=True
            )
        closed = {}
        for name, found in gaps.items():
            plain = "independent, amortized" if name.endswith("amortized") else "independent"
            closed[name] = 1 - sum(found) / sum(gaps[plain])
        for name, found in gaps.items():
            cells = f"{segments}, {int(number.min())} … {int(number.max())} | {len(number)}"
            cells += f" | {math.log(math.factorial(segments)):.3f} | {name} | {statistics.mean(found):.3f}"
            print(f"| {cells} | {max(found):.3f} | {closed[name]:.0%} |", flush=True)
        record[str(segments)] = {"gaps": gaps, "closed": closed, "starts": every}
    return record


@torch.no_grad()
def in_pieces(pair: models.Superpixel, crop: tuple) -> Tensor:
    """ln P(y | x) of a crop, [1], summed over a million segmentations in 16 pieces, for want of memory."""
    labels, total = torch.arange(pair.segments), []
    rest = torch.cartesian_prod(*[labels] * (crop[2].shape[1] - 2))
    for first in torch.cartesian_prod(labels, labels):
        z = torch.cat([first.expand(len(rest), 2), rest], 1)[:, None]
        log_joint = site(pair.model, crop, "z").log_prob(z) + site(pair.model, crop, "y", z).log_prob(crop[3])
        total.append(log_joint.double().logsumexp(0))
    return torch.stack(total).logsumexp(0)


def em(options) -> dict:
    rgb, record = pictures(), {}
    train = crops(rgb[:-2], 8, 6, 8, 8)
    torch.manual_seed(options.seed)
    pair = models.Superpixel(3, 4, "tree", "tree", 8).initialize(*train)
    run = fit_em(pair, train, epochs=options.em_epochs, gradient_steps=5, start="current", progress=False)
    losses, per_value = run.losses, values(train)
    rise = max(b - a for a, b in itertools.pairwise(losses))
    first, last = losses[0] / per_value, losses[-1] / per_value
    print(
        f"EM on {len(train[0])} crops, 3^8 segmentations: {first:.4f} to {last:.4f} bits per chroma value in "
        f"{len(losses) - 1} steps, the largest change {rise:.2e} nats; {run.seconds:.0f} s"
    )
    record["em"] = {"losses": losses, "seconds": run.seconds}
    for segments, most, count, limit, steps in ((4, 8, 8, 4, 100), (4, 10, 12, 1, 60)):
        test = crops(rgb, most, most, count, limit)
        torch.manual_seed(options.seed)
        pair = models.Superpixel(segments, 4, "tree", "tree", 8).initialize(*test)
        settings = {"objective": "rloo", "particles": 8, "learning_rate": 5e-3, "progress": False}
        fit(pair, test, epochs=steps, batch_size=limit, seed=options.seed, **settings)
        started = time.perf_counter()
        exact = evidence.exact(pair, test).value if limit > 1 else in_pieces(pair, test)
        seconds = time.perf_counter() - started
        bound = evidence.elbo(pair, test, particles=400)
        gap = exact - bound.value
        record[f"{segments}^{most}"] = {"gap": gap.tolist(), "seconds": seconds}
        orders = math.log(math.factorial(segments))
        print(
            f"{segments}^{most} = {segments**most:,} segmentations, {len(gap)} crops: exact "
            f"{float(exact.mean()):.3f}, ELBO {float(bound.value.mean()):.3f} nats a crop, gap "
            f"{float(gap.mean()):.3f} (ln {segments}! = {orders:.3f}), {seconds:.1f} s"
        )
    return record


def speed(options) -> dict:
    batch = rows(data.superpixels(pictures()), torch.tensor([7]))
    record = {"superpixels": int(batch[1].max()) + 1}
    for guide in GUIDES:
        prior = "independent" if guide == "independent" else "tree"
        pair = models.Superpixel(options.segments, options.colours, prior, guide).initialize(*batch)
        times: list[tuple[float, float]] = []

        def tick(row: dict, times: list = times) -> None:
            times.append((time.perf_counter(), time.process_time()))

        fit(pair, batch, objective="rloo", particles=4, epochs=30, progress=False, callbacks=(tick,))
        steps = [[1000 * (b[k] - a[k]) for a, b in itertools.pairwise(times)] for k in range(2)]
        wall, cpu = (statistics.median(s) for s in steps)
        record[guide] = {"ms": wall, "cpu_ms": cpu}
        count = record["superpixels"]
        print(f"{guide}: {wall:.0f} ms a step, {cpu:.0f} ms of processor time, {count} superpixels")
    return record


PARTS = {"leave": leave, "guides": guides, "em": em, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--scenes", nargs="+", choices=data.SCENES, default=list(data.SCENES))
    parser.add_argument("--rows", nargs="+", choices=SEGMENTED, default=list(SEGMENTED))
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--colours", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--guide-segments", type=int, nargs="+", choices=(2, 3), default=[2, 3])
    parser.add_argument("--guide-steps", type=int, default=300)
    parser.add_argument("--amortized-epochs", type=int, default=1000)
    parser.add_argument("--amortized-starts", type=int, default=4, help="of which the best bound counts")
    parser.add_argument("--em-epochs", type=int, default=4)
    parser.add_argument("-lr", "--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    record: dict[str, object] = {"benchmark": "colorization", **vars(options)}
    for part in options.only:
        print(f"\n{part}")
        record[part] = PARTS[part](options)
    print(json.dumps(record))


if __name__ == "__main__":
    main()

"""Colours of grey photographs, by a segmentation that nobody has drawn.

x is a picture's luma, y its chroma, in integers that give the colours back bit for bit. x is cut into about
200 superpixels; the latent z puts each into one of a few segments, whose pixels share a colour of a palette.
The prior over segmentations is a network's, of x alone; the guide sees y too. Both are trees of superpixels
(conditional random fields), which are easy to draw from and to evaluate; the sum over z is not, so the pair
is trained by its ELBO, with leave-one-out gradients (z is discrete).

One photograph is held out. The figure shows its luma and its true colours, the guide's segmentation given
both with colours drawn for it, and what the generator draws from the luma alone: segmentations, and colours
for each. Seven photographs teach no one the colours of things, so these are guesses; the bound says what they
are worth, in bits per chroma value. --data FOLDER takes pictures of your own.

At the end the same pair on crops of 32x32, with so few superpixels that the evidence is exact: how much does
its guide lose? The labels' order is free, and a guide that settles on one of S! orders loses ln S! nats.

Source: McAllester (2018), lecture on the evidence lower bound; Achanta et al. (2012), SLIC superpixels.
"""

import argparse
import math
from pathlib import Path

import torch
from pyro import poutine

from pyroelbo import audit, data, evidence, fit, models
from pyroelbo.runs import fresh


def rows(batch, index):
    return tuple(part[index] for part in batch)


def crops(pictures, side=32):
    """Crops of 32x32 with 6 … 8 superpixels, as a batch of its own."""
    height, width = pictures.shape[1:3]
    tiles = pictures[:, : height // side * side, : width // side * side]
    tiles = tiles.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3).flatten(0, 2)
    x, superpixels, parents, y = data.superpixels(tiles, 8)
    count = superpixels.flatten(1).max(-1).values + 1
    keep = ((count >= 6) & (count <= 8)).nonzero()[:, 0]
    keep = keep[torch.randperm(len(keep))]
    return x[keep], superpixels[keep], parents[keep][:, :8], y[keep]


def colours_given(pair, batch, z):
    """Chroma drawn from P(y | z, x)."""
    program = poutine.condition(poutine.uncondition(pair.model), data={"z": z})
    return poutine.trace(program).get_trace(*batch).nodes["y"]["value"]


def draw(path, batch, columns):
    """Luma above truth; then labels z above chroma y for each (title, z, y) of ``columns``."""
    from matplotlib.figure import Figure

    x, superpixels, _, y = batch
    figure = Figure(figsize=(2.2 * (1 + len(columns)), 4.6 * len(x)), layout="constrained")
    axes = figure.subplots(2 * len(x), 1 + len(columns), squeeze=False)
    for i in range(len(x)):
        shown = [("luma x, and true colours", x[i], y[i])]
        shown += [(title, z[i][superpixels[i]], chroma[i]) for title, z, chroma in columns]
        for j, (title, above, chroma) in enumerate(shown):
            top, bottom = axes[2 * i, j], axes[2 * i + 1, j]
            top.imshow(above.numpy(), cmap="tab20" if j else "gray", interpolation="nearest")
            bottom.imshow(data.from_ycocg(x[i], chroma).clamp(0, 255).byte().numpy(), interpolation="nearest")
            top.set_title(title, fontsize=9)
            for axis in (top, bottom):
                axis.set_xticks([])
                axis.set_yticks([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="scenes", help="a folder of colour pictures, instead of the scenes")
    parser.add_argument("--hold-out", type=int, default=-1, metavar="I", help="the picture that is held out")
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--colours", type=int, default=32, help="of the palette")
    parser.add_argument("-n", "--num-epochs", type=int, default=100)
    parser.add_argument("-lr", "--learning-rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=None, help="a new directory for the picture")
    options = parser.parse_args(arguments)
    out = options.out or fresh("runs/superpixel")
    found = data.load(options.data)
    pictures = torch.cat(list(found.splits.values())).unflatten(-1, found.shape)
    if options.smoke:
        options.num_epochs, options.colours, options.segments = 2, 4, 3
        pictures = pictures[-3:, ::2, ::2]
    held_out = options.hold_out % len(pictures)
    others = torch.tensor([i for i in range(len(pictures)) if i != held_out])

    batch = data.superpixels(pictures)
    train, test = rows(batch, others), rows(batch, torch.tensor([held_out]))
    settings = {"objective": "rloo", "schedule": "cosine", "seed": options.seed}
    torch.manual_seed(options.seed)
    pair = models.Superpixel(options.segments, options.colours).initialize(*train)
    fit(
        pair,
        train,
        particles=4,
        epochs=options.num_epochs,
        batch_size=1,
        learning_rate=options.learning_rate,
        **settings,
    )
    value = math.log(2) * batch[3][0].numel()  # nats to bits per chroma value
    for name, part in (("train", train), ("held out", test)):
        bits = -evidence.iwae(pair, part, particles=64).value / value
        print(f"{name:<9} at most {float(bits.mean()):.3f} bits per chroma value (IW-64)")
    z = evidence.terms(pair, test, 1).latents["z"][0]
    columns = [("z by the guide, y drawn given it", z, colours_given(pair, test, z))]
    for _ in range(3):
        latents, (_, _, _, chroma) = pair.simulate(1, like=test)
        columns.append(("z, then y, drawn from x alone", latents["z"], chroma))
    print("picture:", draw(out / "colours.png", test, columns), "\n")

    segments = 3
    train, test = crops(pictures[others]), crops(pictures[held_out : held_out + 1])
    torch.manual_seed(options.seed)
    small = models.Superpixel(segments, options.colours).initialize(*train)
    fit(small, train, particles=8, epochs=options.num_epochs, batch_size=16, learning_rate=5e-3, **settings)
    result = audit(small, test, particles=64)
    print(result)
    gap = evidence.exact(small, test).value - evidence.elbo(small, test, particles=64).value
    orders = math.log(math.factorial(segments))
    print(f"the ELBO's gap is {float(gap.mean()):.3f} nats a crop, beside ln {segments}! = {orders:.3f}")
    return result


if __name__ == "__main__":
    main()

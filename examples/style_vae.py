"""A style-based generator and its inverter, trained together by cross-entropy.

A GAN's generator makes sharp images, but no image of a GAN can be scored, and to find the code of a given
image its generator has to be inverted afterwards. Here the generator has the architecture of StyleGAN, and
its inverter is the encoder of a variational autoencoder:

    generator    z → style w (mapping network); a learned constant → convolutions whose weights w scales, each
                 followed by a map of noise, at 2x2, 4x4, 8x8 pixels
    inverter     q(z | y) q(noise at 2x2 | z, y) … q(noise at 8x8 | …, y)
    loss         E_q[ -ln p(z) p(noise) p(y | z, noise) / q(z, noise | y) ] ≥ -ln p(y)

The noise maps are latents like the style, so the bound says how many nats each of them carries: what all
pixels share goes into the style, what is local into the noise.

The figure shows test images, their reconstructions from inverted codes, the styles of the first images with
the noise maps of the last ones, an interpolation between pairs of images, and draws with truncation: styles
moved towards their mean by 1, 0.7 and 0.4 give less variety, in images that are more typical.

    python examples/style_vae.py --num-epochs 60
    PYROELBO_DATA=... python examples/style_vae.py --data freyfaces --num-epochs 200 --channels 24
    python examples/style_vae.py --data patches --num-epochs 20
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, data, fit, models, report
from pyroelbo.runs import fresh

SHOWN = 10


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", help="a data set of images: digits, mnist, freyfaces, patches, …"
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--num-train", type=int, default=0, help="number of training images; 0: all")
    parser.add_argument("--num-audit", type=int, default=200, help="number of test images to audit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="a new directory; runs/style_vae, or the next free name, if left out",
    )
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_epochs, options.num_train, options.num_audit, options.channels = 2, 200, 4, 4
    out = options.out or fresh("runs/style_vae")

    # A discretized logistic gives every grey level a probability, so nats are a code length.
    settings = {"latent": 16, "width": 32, "channels": options.channels}
    images, settings = models.matched("style_vae", data.load(options.data), settings)
    torch.manual_seed(options.seed)
    pair = models.build("style_vae", images, settings)
    train = images["train"][: options.num_train or None]
    fit(
        pair,
        train,
        valid=images["valid"][:500],
        # closed-form KL terms of all latents: top-down, they are terms of the bound
        objective="layered",
        epochs=options.num_epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule="cosine",
        clip_norm=200.0,
        seed=options.seed,
        device="cuda" if options.cuda else None,
        out=out,
        config={"model": "style_vae", "data": images.describe(), "settings": settings},
    )
    torch.manual_seed(options.seed)
    test = images["test"][torch.randperm(len(images["test"]))]
    result = audit(pair, test[: options.num_audit], particles=64)
    print(result)
    (out / "audit.json").write_text(result.to_json())

    y = test[: 2 * SHOWN].to(pair.device)
    first, last = y[:SHOWN], y[SHOWN:]
    with torch.no_grad():
        w, noise = pair.invert(first)
        _, others = pair.invert(last)
        latents, _ = pair.simulate(SHOWN)

        def decoded(w, noise):
            return pair.pixels.mean_image(pair.observation(w, noise))

        rows = {
            "data": first / (images.levels - 1),
            "inverted": decoded(w, noise),
            "style of it, noise of …": decoded(w, others),
            "… these": last / (images.levels - 1),
        }
        for i in range(2):
            rows[f"interpolation {i + 1}"] = pair.interpolate(first[i, None], last[i, None], SHOWN)[:, 0]
        for share in (1.0, 0.7, 0.4):
            # pair.simulate(SHOWN, truncation=share) draws the pixels as well; here are their means
            rows[f"truncated by {share}"] = decoded(*pair.truncated(latents, share))
    figure = report.images(list(rows.values()), images.shape, out / "style.png", list(rows), images.light)
    print("picture:", figure)
    return result


if __name__ == "__main__":
    main()

"""A chain of codes trained layer by layer, without a prior, beside the same network trained at once.

Phase one trains each encoder with the decoder beside it, on what the layers below make of the data: enc_1,
dec_1 minimize E[-ln p(y | z_1)], enc_2, dec_2 minimize E[-ln p(z_1 | z_2)] with z_1 as data. Nobody pays for
codes, so that they must be narrow: here six above pixels, then three, of four values each. Phase two trains
the prior on the top codes. Then prior and decoders generate, from top to bottom: if all parts were universal,
they would be a perfect model of the data for any encoder, because an encoder that knows nothing of them
defines the joint distribution that they learn.

The joint training descends the bound, the sum of the same terms, in all parameters. What is trained alone in
a phase is chosen by the objective, Progressive_ELBO(phase).

The picture shows digits decoded from z_1, from z_2 (z_1 is then drawn), and drawn from the prior.

    python examples/progressive_vae.py
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, coding, data, evidence, fit, models, report
from pyroelbo.objectives import Progressive_ELBO


def layers(pair, y):
    """The terms of the hard ELBO by site, nats per datum, as text."""
    terms = evidence.terms(pair, y, 1).log_model
    return ", ".join(f"{site} {-float(log_p.mean()):.2f}" for site, log_p in sorted(terms.items()))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-n", "--num-epochs", type=int, default=60, help="of phase one, and of joint training"
    )
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/progressive_vae"))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_data = (1, 4) if options.smoke else (options.num_epochs, 300)
    options.out.mkdir(parents=True, exist_ok=True)

    digits = data.load("digits")
    train, test = digits["train"], digits["test"][:num_data]
    settings = {
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "schedule": "cosine",
        "seed": options.seed,
        "device": "cuda" if options.cuda else None,
        "progress": False,
    }
    results, rows, names = {}, [test[:16] / 16], ["data"]
    for name in ("progressive", "joint"):
        torch.manual_seed(options.seed)
        pair = models.ByteVAE((8, 8), (6, 3), values=4, likelihood="categorical", levels=17)
        pair.initialize(train)
        if name == "progressive":
            fit(pair, train, objective=Progressive_ELBO(phase=1), epochs=epochs, **settings)
            print(f"after phase one, nats per datum by layer: {layers(pair, test)}")
            fit(pair, train, objective=Progressive_ELBO(phase=2), epochs=max(1, epochs // 3), **settings)
            print(f"after phase two: {layers(pair, test)}")
        else:
            fit(pair, train, epochs=epochs, **settings)
            print(f"\ntrained jointly, nats per datum by layer: {layers(pair, test)}")
        pair.cpu()
        # every draw of a deterministic encoder is the same; ln p(y) is a sum over 64 times 4,096 codes
        results[name] = audit(pair, test[:50], particles=2)
        print(results[name])
        file = options.out / f"{name}.code"
        file.unlink(missing_ok=True)
        code = coding.compress(pair, test.numpy().astype("uint8"), file)
        print(f"as a file: {code}\n")
        low, top = pair.encode(test[:16])
        rows += [pair.decode(low), pair.decode(top, layer=2), pair.simulate(16)[1] / 16]
        names += [f"{name}: from z_1", "from z_2", "from the prior"]
    print(f"written: {report.images(rows, (8, 8), options.out / 'digits.png', names)}")
    return results


if __name__ == "__main__":
    main()

"""Images as bytes: a chain of codes with a deterministic encoder, whose bound is the size of a file.

Every z_l is a vector of bytes, and z_{l+1} a network's value at z_l, rounded to the nearest byte. The encoder
draws nothing, so that the ELBO is the hard one,

    -ln p(y | z_1) - Σ_l ln p(z_l | z_{l+1}) - ln p(z_N),

the code length of the image and of its codes, as every layer has a probability for each of 256 values. A
file has just that many bytes, layer by layer, and is decoded bit for bit. Chains of one, two and four layers
are trained on digits of 17 grey levels. Nothing makes a second layer pay here: it can only describe z_1 more
briefly, and what it says itself costs, too.

With three codes of eight values there are 512 code words, so ln p(y) is a sum over all of them, and the
last table shows what a point mass wastes, the other code words that would have done as well.

    python examples/byte_vae.py
"""

import argparse
from pathlib import Path

import torch

from pyroelbo import audit, coding, data, fit, models, report

SYSTEMS = {
    "N = 1": {"latent": (8,)},
    "N = 2": {"latent": (8, 4)},
    "N = 4": {"latent": (8, 6, 4, 2)},
    "few codes": {"latent": (3,), "values": 8},
}


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", "--num-epochs", type=int, default=60)
    parser.add_argument("-b", "--batch-size", type=int, default=64)
    parser.add_argument("-lr", "--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/byte_vae"))
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    options = parser.parse_args(arguments)
    epochs, num_data = (1, 20) if options.smoke else (options.num_epochs, 300)
    options.out.mkdir(parents=True, exist_ok=True)

    digits = data.load("digits")
    train, test = digits["train"], digits["test"][:num_data]
    results, rows, names = {}, [test[:16] / 16], ["data"]
    for name, settings in list(SYSTEMS.items())[:: 3 if options.smoke else 1]:
        torch.manual_seed(options.seed)
        pair = models.ByteVAE((8, 8), likelihood="categorical", levels=17, **settings).initialize(train)
        fit(
            pair,
            train,
            epochs=epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            schedule="cosine",
            seed=options.seed,
            device="cuda" if options.cuda else None,
            progress=False,
        )
        pair.cpu()
        print(f"\n{name}, {' and '.join(map(str, settings['latent']))} codes")
        results[name] = audit(pair, test, particles=2)  # every draw is the same
        print(results[name])
        file, y = options.out / f"{name.replace(' ', '')}.code", test.numpy().astype("uint8")
        file.unlink(missing_ok=True)
        code = coding.compress(pair, y, file)
        assert (coding.decompress(pair, file) == y).all()
        print(f"as a file, decoded bit for bit: {code}")
        rows.append(pair.reconstruct(test[:16]))
        names.append(f"{name}, decoded")
        if name != "few codes":
            rows.append(pair.simulate(16)[1] / 16)
            names.append("samples")
    few = results["few codes"]
    print(f"\na point mass wastes {few['exact'].mean - few['elbo'].mean:.3f} nats per datum of the few codes")
    first = pair.encode(test[:1])
    print(f"the codes of the first digit: {', '.join(str(z[0].tolist()) for z in first)}")
    print(f"written: {report.images(rows, (8, 8), options.out / 'digits.png', names)}")
    return results


if __name__ == "__main__":
    main()

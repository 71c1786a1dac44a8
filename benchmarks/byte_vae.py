"""What does each layer of a byte VAE cost, in nats and in bytes, and does it pay to train layer by layer?

    python -m benchmarks.byte_vae                    # all rows
    python -m benchmarks.byte_vae --only "N = 1"     # one of them

Digits of 8x8 pixels in 17 levels; trained on 1,297, measured on the 300 held out (seed 0, no early stop). The
encoder is deterministic, so that the ELBO is the hard one and has no noise. Its terms by site stand beside
the bytes that each site took in a file of the 300 digits, decoded and compared. The rows of narrow codes, six
values of two bits above pixels and three above these, are trained at once and progressively (phase one, then
the prior), the same network from the same start; few enough to sum over, they have the exact evidence too.
So are chains of as many codes from codebooks of four vectors.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import pyro

from benchmarks.codes import histograms
from pyroelbo import coding, data, evidence, fit, models
from pyroelbo.objectives import Progressive_ELBO

NARROW = {"latent": (6, 3), "values": 4}
BOOKS = {"positions": (6, 3), "codes": 4, "width": 4}
# name: (settings of the model, objectives of the phases, summed over all codes)
ROWS = {
    "N = 1": ({"latent": (8,)}, ("elbo",), False),
    "N = 2": ({"latent": (8, 4)}, ("elbo",), False),
    "N = 4": ({"latent": (8, 6, 4, 2)}, ("elbo",), False),
    "N = 1, squared": ({"latent": (8,), "loss": "squared"}, ("elbo",), False),
    "narrow, joint": (NARROW, ("elbo",), True),
    "narrow, progressive": (NARROW, (Progressive_ELBO(1), Progressive_ELBO(2)), True),
    "codebooks, joint": (BOOKS, ("elbo",), True),
    "codebooks, progressive": (BOOKS, (Progressive_ELBO(1), Progressive_ELBO(2)), True),
}


def row(name, digits, epochs, likelihood):
    settings, phases, summed = ROWS[name]
    pyro.set_rng_seed(0)
    make = models.VQChain if settings is BOOKS else models.ByteVAE
    pair = make((8, 8), likelihood=likelihood, levels=17, **settings).initialize(digits["train"])
    for objective in phases:
        chosen = {"learning_rate": 2e-3, "schedule": "cosine", "progress": False}
        fit(pair, digits["train"], objective=objective, epochs=epochs, **chosen)
    y = digits["test"]
    terms = {k: -float(v.mean()) for k, v in sorted(evidence.terms(pair, y, 1).log_model.items())}
    exact = -evidence.exact(pair, y).mean if summed else None
    with tempfile.TemporaryDirectory() as folder:
        array = y.numpy().astype(np.uint8)
        found = coding.compress(pair, array, Path(folder) / "code")
        assert np.array_equal(coding.decompress(pair, Path(folder) / "code"), array)
    hard = sum(terms.values())
    shown = "  ".join(f"{k} {v:.2f} ({found.site_bits[k] / 8:,.0f})" for k, v in terms.items())
    print(
        f"{name:22}{hard:9.2f}{'' if exact is None else f'{exact:.2f}':>9}{found.net:9.3f}"
        f"{100 * (found.net / hard - 1):8.3f} %{found.net_bits / 8:8,.0f}{found.bytes:8,}  {shown}",
        flush=True,
    )
    return {
        "name": name,
        "elbo": -hard,
        "terms": terms,
        "exact": exact and -exact,
        "epochs": epochs,
        **found.to_dict(),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=tuple(ROWS), help="one row")
    parser.add_argument("--epochs", type=int, default=100, help="of each phase")
    parser.add_argument("--likelihood", default="categorical")
    options = parser.parse_args()
    digits = data.load("digits")
    train, y = (digits[k].numpy().astype(np.uint8) for k in ("train", "test"))
    print(f"{len(y)} digits; pixel histograms {histograms(train, y, 17):.2f} nats\n")
    print(
        f"{'':22}{'-ELBO':>9}{'-ln p':>9}{'net':>9}{'over':>10}{'bytes':>8}{'file':>8}  nats (bytes) by site"
    )
    names = ROWS if options.only is None else (options.only,)
    print(json.dumps([row(name, digits, options.epochs, options.likelihood) for name in names]))


if __name__ == "__main__":
    main()

"""What do latent-variable models reach on Omniglot and on Frey's faces, in nats on the test split?

    python -m benchmarks.pictures omniglot-vae --train
    python -m benchmarks.pictures omniglot-vae --evaluate --num-data 200 --num-ais 20 --temperatures 100
    python -m benchmarks.pictures --table

The rows are short runs (20 epochs of Omniglot, 300 of the faces), to compare kinds of models, not to set a
mark. Options, estimators and the way of resuming are those of benchmarks/static_mnist.py. Omniglot is 28x28
by area averaging, each pixel drawn as a coin flip once, by seed 0; 17,352 training characters (background
alphabets), 1,928 for validation, 13,180 for the test (evaluation alphabets). This is not the 28x28 set of
Burda, Grosse and Salakhutdinov (2016): its numbers must not be set beside published ones. The faces are 28x20
in 256 grey levels (1,565, 200 and 200, split at random by seed 0), under a discretized logistic likelihood;
bits/dim are -IW-K of all images over 560 ln 2.
"""

from benchmarks.static_mnist import System, main, started
from pyroelbo import models

LAYERED = {"objective": "layered", "clip_norm": 50.0}


def short(epochs, batch_size):
    """Minutes on a CPU: a rate of 2e-3, from the middle a cosine to a hundredth of it; no compilation."""
    tail = (epochs // 2, epochs - epochs // 2)
    return {
        "epochs": epochs, "tail": tail, "batch_size": batch_size, "learning_rate": 2e-3, "ema": 0.99,
        "warmup": epochs // 6, "compile": False,
    }  # fmt: skip


def omniglot(model, **settings):
    return started(model, (28, 28), **settings)


def faces(model, **settings):
    return started(model, (28, 20), likelihood="discretized_logistic", **settings)


def rows(name, make, data, fit, latent, hidden, ladder, components):
    vae = {"latent": latent, "hidden": hidden, "network": "gated"}
    vamp = {"prior": "vamp", "components": components}
    return {
        f"{name}-vae": System(
            f"{data}: VAE, {latent} latents, N(0, I)", make(models.VAE, **vae), fit, 1000, data
        ),
        f"{name}-vamp": System(
            f"{data}: the same, VampPrior-{components}", make(models.VAE, **vae, **vamp), fit, 1000, data
        ),
        f"{name}-ladder": System(
            f"{data}: ladder {ladder['latent']}", make(models.Ladder, **ladder), fit | LAYERED, 1000, data
        ),
    }


SYSTEMS = rows(
    "omniglot", omniglot, "omniglot", short(20, 100), 40, (300, 300),
    {"latent": (32, 16, 8), "hidden": (256, 128, 64), "dropout": 0.05, "noise": 0.1}, 100,
) | rows(
    "faces", faces, "freyfaces", short(300, 50), 20, (200, 200),
    {"latent": (16, 8), "hidden": (192, 96), "dropout": 0.05, "noise": 0.1}, 50,
)  # fmt: skip

if __name__ == "__main__":
    main(SYSTEMS, "runs/pictures", __doc__)

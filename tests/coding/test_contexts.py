"""The context coder against the estimator written out in plain Python."""

import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")
from pyroelbo.coding import ContextCoder, compress_contexts, decompress_contexts
from pyroelbo.coding import _range_coder as kernels

RNG = np.random.default_rng(0)
# JBIG2's generic template 0
NEIGHBOURS = [
    *((-2, d) for d in range(-2, 3)),
    *((-1, d) for d in range(-3, 4)),
    *((0, d) for d in range(-4, 0)),
]


def ideal_bits(images):
    """-log2 of Krichevsky and Trofimov's probability, pixel by pixel."""
    counts, bits = Counter(), 0.0
    for image in images:
        height, width = image.shape
        for i in range(height):
            for j in range(width):
                around = tuple(
                    int(image[i + a, j + b]) if i + a >= 0 and 0 <= j + b < width else 0
                    for a, b in NEIGHBOURS
                )
                pixel = int(image[i, j])
                seen = counts[around, 0] + counts[around, 1]
                bits -= math.log2((counts[around, pixel] + 0.5) / (seen + 1))
                counts[around, pixel] += 1
    return bits


def blobs(shape):
    """Images whose pixels resemble their neighbours."""
    noise = RNG.random(shape)
    for axis in (1, 2):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, -1, axis)
    return (noise > 9 * 0.55).astype(np.uint8)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 4), (1, 1, 1), (3, 1, 9), (2, 7, 1), (6, 9, 12)])
def test_images_are_restored_at_the_ideal_length(shape):
    for images in (
        blobs(shape),
        np.zeros(shape, np.uint8),
        np.ones(shape, np.uint8),
        RNG.random(shape) < 0.5,
    ):
        code = ContextCoder().encode(images)
        np.testing.assert_array_equal(ContextCoder().decode(code, shape), images)
        # the last byte, and a width of 2^40 or more that is divided by the counts
        assert 8 * len(code) <= ideal_bits(images) * (1 + 1e-6) + 9


def test_calls_continue_the_counts():
    images = blobs((8, 10, 10))
    coder, other = ContextCoder(), ContextCoder()
    codes = [coder.encode(part) for part in (images[:3], images[3:3], images[3:])]
    parts = [other.decode(c, (n, 10, 10)) for c, n in zip(codes, (3, 0, 5), strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), images)
    assert sum(map(len, codes)) <= ideal_bits(images) / 8 + 3
    np.testing.assert_array_equal(coder.counts, other.counts)


def test_a_code_may_need_more_room(monkeypatch):
    images = RNG.random((5, 9, 9)) < 0.5
    code = ContextCoder().encode(images)
    monkeypatch.setattr(ContextCoder, "room", 0)
    assert ContextCoder().encode(images) == code


def test_carries_run_through_many_bytes():
    """Near-certain pixels that come out otherwise put the interval's end just below a byte's border."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        images = (rng.random((40, 30, 30)) < rng.choice([0.001, 0.01, 0.999, 0.3])).astype(np.uint8)
        code = ContextCoder().encode(images)
        np.testing.assert_array_equal(ContextCoder().decode(code, images.shape), images)


def test_what_is_not_binary_is_refused():
    images = np.zeros((3, 4, 4))
    images[1, 2, 3] = 0.5
    with pytest.raises(ValueError, match=r"pixels of 0 and 1, got 0.5 at index \(1, 2, 3\)"):
        ContextCoder().encode(images)
    with pytest.raises(ValueError, match="got -0.0"):
        ContextCoder().encode(-np.zeros((1, 2, 2)))
    with pytest.raises(ValueError, match="expected shape"):
        ContextCoder().encode(images[0])


def test_kernels_refuse_foreign_counts():
    images, code = np.zeros((2, 3, 3), np.uint8), np.zeros(100, np.uint8)
    for counts in (np.zeros((100, 2), np.int64), np.zeros((kernels.CONTEXTS, 1), np.int64)):
        with pytest.raises(ValueError, match="matching shapes"):
            kernels.encode(images, counts, code)
        with pytest.raises(ValueError, match="matching shapes"):
            kernels.decode(code, counts, images)
    assert (
        kernels.encode(RNG.integers(0, 2, (9, 9, 9)).astype(np.uint8), ContextCoder().counts, code[:5]) == -1
    )


@pytest.mark.parametrize("dtype", ["u1", "?", ">f4", "<i8"])
def test_a_file_of_images(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr("pyroelbo.coding.archive._PIXELS", 300)  # so that there are several segments
    images = blobs((11, 8, 10)).astype(dtype)
    path = tmp_path / "images.code"
    found = compress_contexts(images, path)
    assert found.bytes == path.stat().st_size and found.data == 11
    again = decompress_contexts(path)
    assert again.dtype == images.dtype and again.tobytes() == images.tobytes() and again.shape == images.shape
    compress_contexts(images.reshape(11, 80), tmp_path / "flat", shape=(8, 10))
    np.testing.assert_array_equal(decompress_contexts(tmp_path / "flat"), images.reshape(11, 80))
    with pytest.raises(ValueError, match="height and width"):
        compress_contexts(images.reshape(11, 80), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.skipif("PYROELBO_DATA" not in os.environ, reason="needs the static MNIST of $PYROELBO_DATA")
def test_static_mnist():
    packed = np.load(Path(os.environ["PYROELBO_DATA"]) / "binarized_mnist.npz")["test"]
    images = np.unpackbits(packed, axis=1)[:, :784].reshape(-1, 28, 28)
    code = ContextCoder().encode(images)
    assert len(code) == 186_229
    np.testing.assert_array_equal(ContextCoder().decode(code, images.shape), images)

"""Binary images by adaptive contexts and a range coder (needs numba).

    images  [N, H, W]   uint8, 0 or 1; read, or filled by ``decode``
    counts  [65536, 2]  int64, how often 0 and 1 followed each context; updated
    code    [bytes]     uint8, filled by ``encode``; ``decode`` reads zeros beyond its end

The interval is [low, low + width) of [0, 2^48), width above 2^40 after every pixel. A carry out of low is
added to the bytes that are held back: ``held``, -1 if there is none, then ``full`` bytes of 255.
"""

from __future__ import annotations

import numpy as np

from pyroelbo.distributions.kernels.gate import compiled, expect_contiguous, expect_shapes, inlined, kernel

__all__ = ["CONTEXTS", "decode", "encode"]

CONTEXTS = 2**16
_WHOLE, _LEAST, _LAST = 2**48, 2**40, 255 * 2**40


@inlined
def _slide(context, last, above2, above1, x):
    """The context of pixel x from that of the pixel before it and that pixel, ``last``: five pixels two rows
    above (x-2 … x+2), seven in the row above (x-3 … x+3), four to the left. Rows begin with four zeros and
    end with four."""
    five = ((context >> 11) << 1 & 31) | above2[x + 6]
    seven = ((context >> 4 & 127) << 1 & 127) | above1[x + 7]
    return five << 11 | seven << 4 | (context << 1 & 15 | last)


@inlined
def _first(above2, above1):
    """What :func:`_slide` expects before the first pixel of a row."""
    five = above2[4] << 1 | above2[5]
    seven = above1[4] << 2 | above1[5] << 1 | above1[6]
    return five << 11 | seven << 4


@compiled
def _shift(low, held, full, code, size):
    """Move the top byte of ``low`` to the code; returns low, held, full and the new size."""
    if low < _LAST or low >= _WHOLE:
        carry = low >> 48
        if held >= 0:
            code[size] = held + carry
            size += 1
        for _ in range(full):
            code[size] = (255 + carry) & 255
            size += 1
        held, full = (low >> 40) & 255, 0
    else:
        full += 1
    return (low & (_LEAST - 1)) << 8, held, full, size


@kernel(fastmath=False)
def encode(images, counts, code):
    """Fill ``code``; returns its number of bytes, or -1 if they are too few."""
    expect_contiguous(images, counts, code)
    expect_shapes(counts.shape == (CONTEXTS, 2))
    number, height, width = images.shape
    rows = np.zeros((3, width + 8), np.int64)
    low, size, held, full, span = 0, 0, -1, 0, _WHOLE
    for n in range(number):
        rows[:] = 0
        for i in range(height):
            above2, above1, row = rows[i % 3], rows[(i + 1) % 3], rows[(i + 2) % 3]
            context, bit = _first(above2, above1), 0
            for x in range(width):
                context = _slide(context, bit, above2, above1, x)
                bit = np.int64(images[n, i, x] & 1)
                zeros, ones = counts[context]
                one = span // (2 * (zeros + ones) + 2) * (2 * ones + 1)
                if bit:
                    span = one
                else:
                    low += one
                    span -= one
                counts[context, bit] += 1
                row[x + 4] = bit
                while span < _LEAST:
                    if size + full + 16 > code.size:
                        return -1
                    low, held, full, size = _shift(low, held, full, code, size)
                    span <<= 8
    if size + full + 16 > code.size:
        return -1
    # the number of the interval with the most zeros at its end, which need not be written
    dropped = 6
    while True:
        zeros = (1 << (8 * dropped)) - 1
        value = (low + zeros) & ~zeros
        if value < low + span:
            break
        dropped -= 1
    low = value
    for _ in range(7 - dropped):
        low, held, full, size = _shift(low, held, full, code, size)
    while size and code[size - 1] == 0:
        size -= 1
    return size


@kernel(fastmath=False)
def decode(code, counts, images):
    """Fill ``images``, the inverse of :func:`encode`."""
    expect_contiguous(images, counts, code)
    expect_shapes(counts.shape == (CONTEXTS, 2))
    number, height, width = images.shape
    rows = np.zeros((3, width + 8), np.int64)
    at, value, span = 0, 0, _WHOLE
    for _ in range(6):
        value = value << 8 | (np.int64(code[at]) if at < code.size else 0)
        at += 1
    for n in range(number):
        rows[:] = 0
        for i in range(height):
            above2, above1, row = rows[i % 3], rows[(i + 1) % 3], rows[(i + 2) % 3]
            context, bit = _first(above2, above1), 0
            for x in range(width):
                context = _slide(context, bit, above2, above1, x)
                zeros, ones = counts[context]
                one = span // (2 * (zeros + ones) + 2) * (2 * ones + 1)
                bit = 1 if value < one else 0
                if bit:
                    span = one
                else:
                    value -= one
                    span -= one
                counts[context, bit] += 1
                row[x + 4] = bit
                images[n, i, x] = bit
                while span < _LEAST:
                    value = value << 8 | (np.int64(code[at]) if at < code.size else 0)
                    at += 1
                    span <<= 8

"""The one helper for all codecs: what is pushed is popped, and the stack is what it was."""

import numpy as np
import torch

from pyroelbo.coding import Stack

SEED = 0


def random_words(number, seed=SEED):
    """A stack's content of random bits."""
    words = np.random.default_rng(seed).integers(0, 2**32, number, dtype=np.uint32)
    words[-1] |= 1
    return words


def round_trip(codec, *values, words=1000):
    """Push all values, pop them again; returns the number of bits that they took."""
    stack = Stack(random_words(words))
    before, content = stack.bits, stack.words()
    for value in values:
        codec.push(stack, value)
    taken = stack.bits - before
    for value in reversed(values):
        again = codec.pop(stack)
        if isinstance(value, torch.Tensor):
            assert again.dtype == value.dtype and torch.equal(again, value)
        else:
            np.testing.assert_array_equal(again, value)
    np.testing.assert_array_equal(stack.words(), content)
    return taken


def draw(codec, words=1000, seed=SEED):
    """A value popped from random bits; pushing it gives the bits back."""
    stack = Stack(random_words(words, seed))
    content = stack.words()
    value = codec.pop(stack)
    left = stack.words()
    codec.push(stack, value)
    np.testing.assert_array_equal(stack.words(), content)
    return value, left

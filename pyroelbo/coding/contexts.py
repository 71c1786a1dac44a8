"""Binary images without a model: adaptive counts by context, the baseline that a model's code has to beat."""

from __future__ import annotations

import numpy as np

__all__ = ["ContextCoder", "same_bytes"]


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays hold the same bits: -0.0 is not 0.0."""
    return a.tobytes() == b.tobytes()


class ContextCoder:
    """Krichevsky and Trofimov's estimator in contexts of 16 neighbouring pixels:

        P(pixel = 1 | context) = (n_1 + ½) / (n_0 + n_1 + 1),

    n_0 and n_1 the pixels 0 and 1 that followed this context so far, in all images in their order. Contexts
    are those of JBIG2's generic template 0: five pixels two rows above, seven in the row above, four to the
    left, zeros outside. There is nothing to train and no model to transmit; the code length does not depend
    on the images' order.

    Images are uint8 [N, H, W] of 0 and 1. Calls continue one another's counts. Cost: O(1) per pixel. Needs
    numba (ImportError without).

    Sources: Krichevsky and Trofimov (1981); ITU-T T.88 (2000), figure 3; Martin (1979) for the range coder.
    """

    room = 2**18  # bytes of a code beyond 1.3 bits a pixel, tried at first

    def __init__(self) -> None:
        try:
            from pyroelbo.coding import _range_coder
        except ImportError as error:
            raise ImportError("the context coder needs numba: pip install 'pyroelbo[fast]'") from error
        self._kernels = _range_coder
        self.counts = np.zeros((_range_coder.CONTEXTS, 2), np.int64)

    def encode(self, images: np.ndarray, first: int = 0) -> bytes:
        """The code of images [N, H, W]; ValueError for pixels other than 0 and 1, in which the images'
        numbers begin with ``first``."""
        if images.ndim != 3:
            raise ValueError(f"images: expected shape [N, H, W], got {images.shape}")
        wrong = np.argwhere((images != 0) & (images != 1))
        if len(wrong):
            n, i, j = map(int, wrong[0])
            raise ValueError(
                f"images: expected pixels of 0 and 1, got {images[n, i, j]} at index {(first + n, i, j)}"
            )
        pixels = np.ascontiguousarray(images, np.uint8)
        if not same_bytes(pixels.astype(images.dtype), images):
            raise ValueError("images: expected pixels of 0 and 1, got -0.0")
        room = pixels.size // 6 + self.room
        while True:
            counts, code = self.counts.copy(), np.empty(room, np.uint8)
            size = self._kernels.encode(pixels, counts, code)
            if size >= 0:
                self.counts = counts
                return code[:size].tobytes()
            room = 4 * room + 64  # pixels that belie the counts so far

    def decode(self, code: bytes, shape: tuple[int, int, int]) -> np.ndarray:
        """The images of this ``shape`` that :meth:`encode` coded after the same calls."""
        images = np.empty(shape, np.uint8)
        self._kernels.decode(np.frombuffer(code, np.uint8), self.counts, images)
        return images

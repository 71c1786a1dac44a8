"""Superpixels: connected pieces of a picture of similar luma, and a tree of neighbours that spans them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroelbo.data.colour import to_ycocg
from pyroelbo.data.dataset import Dataset
from pyroelbo.numerics import positive_count

__all__ = ["superpixels"]

_MOST = 280  # asked of SLIC, which gives about 200
_PIXELS = 60  # of a superpixel in smaller pictures


def superpixels(
    rgb: Tensor | np.ndarray, count: int | None = None, compactness: float = 0.1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Colour pictures as a conditional batch (x, superpixels, parents, y): what
    :class:`~pyroelbo.models.Superpixel` takes.

    x [B, H, W] is the luma, y [B, H, W, 2] the chroma (:func:`~pyroelbo.data.to_ycocg`), int32. Superpixels
    [B, H, W] are numbered from 0, LongTensor, found by SLIC from the luma alone, so that they say nothing
    about y. ``parents`` [B, N], LongTensor, is a spanning tree of each picture's superpixels: the minimum
    one of their adjacency, weighted by the difference of their mean lumas, with the middle of its longest
    path as root (-1). Pictures with fewer than N superpixels have -1 at the missing ones, which have no
    pixels.

    Args:
        rgb: integers [B, H, W, 3] in 0 … 255.
        count: how many superpixels SLIC is asked for; it gives about as many, mostly fewer. By default one
            for each 60 pixels, 280 at most.
        compactness: of SLIC; a picture is cut into squares from about 1 on.

    Raises ValueError for other shapes, dtypes and values, ImportError without scikit-image. Source: Achanta
    et al. (2012).
    """
    rgb = torch.as_tensor(rgb)
    if rgb.dim() != 4:
        raise ValueError(f"rgb: expected pictures [B, H, W, 3], got shape {tuple(rgb.shape)}")
    x, y = to_ycocg(rgb)
    if count is None:
        count = min(_MOST, max(1, x[0].numel() // _PIXELS))
    positive_count("count", count, "number of superpixels")
    if not compactness > 0:
        raise ValueError(f"compactness: expected a positive number, got {compactness!r}")
    found = [_segmented(luma, count, compactness) for luma in x.numpy()]
    most = max(len(parents) for _, parents in found)
    labels = torch.from_numpy(np.stack([labels for labels, _ in found]))
    parents = [np.pad(tree, (0, most - len(tree)), constant_values=-1) for _, tree in found]
    return x, labels, torch.from_numpy(np.stack(parents)), y


def _segmented(luma: np.ndarray, count: int, compactness: float) -> tuple[np.ndarray, np.ndarray]:
    """Superpixels [H, W] of a picture, and the parent of each, [N]."""
    try:
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError("superpixels need scikit-image: pip install 'pyroelbo[images]'") from error
    # scikit-image scales the values of a picture to [0, 1], to which the compactness refers
    found = slic(luma.astype(np.uint8), count, compactness, channel_axis=None, start_label=0)
    _, labels = np.unique(found, return_inverse=True)
    labels = labels.reshape(luma.shape).astype(np.int64)
    mean = np.bincount(labels.ravel(), luma.ravel()) / np.bincount(labels.ravel())
    sides = [(labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])]
    a, b = (np.concatenate([side[i].ravel() for side in sides]) for i in range(2))
    edges = np.unique(np.stack([np.minimum(a, b), np.maximum(a, b)])[:, a != b], axis=1)
    # The one makes no difference to the tree, but scipy takes a weight of zero for a missing edge.
    weights = 1.0 + np.abs(mean[edges[0]] - mean[edges[1]])
    tree = minimum_spanning_tree(coo_matrix((weights, edges), shape=(len(mean),) * 2).tocsr())

    def from_(root: int) -> tuple[np.ndarray, np.ndarray]:
        order, above = breadth_first_order(tree, root, directed=False)
        return order, np.where(above < 0, -1, above).astype(np.int64)

    end = from_(0)[0][-1]  # of a longest path, as the other end is
    order, above = from_(end)
    path = [order[-1]]
    while above[path[-1]] >= 0:
        path.append(above[path[-1]])
    return labels, from_(path[len(path) // 2])[1]


def segmented(data: Dataset) -> Dataset:
    """Colour pictures as kind ``superpixels``."""
    height, width, _ = data.shape

    def batch(y: Tensor) -> Any:
        return superpixels(y.unflatten(-1, data.shape))

    splits = {split: batch(y) for split, y in data.splits.items()}
    return replace(data, kind="superpixels", shape=(height, width, 2), splits=splits, levels=511)

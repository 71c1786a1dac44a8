"""Batches of diffusion models: data [B, D], after their classes if the pair is conditional."""

from __future__ import annotations

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn

from pyroelbo import batch as batches
from pyroelbo.batch import Batch
from pyroelbo.numerics import positive_count

__all__ = ["Rows", "class_count"]


def class_count(classes: int | None) -> int | None:
    """``classes`` if it is None or a positive number; else raise ValueError."""
    return None if classes is None else positive_count("classes", classes, "number of classes")


class Rows:
    """What pairs of data [B, D] share (a mixin): without ``classes`` a batch is y; with them it is (labels
    [B], y), labels integers 0 … classes-1, and all bounds are on ln p(y | label)."""

    name: str
    dims: int
    classes: int | None
    generator: nn.Module

    def split(self, *batch: Tensor, **named: Tensor) -> tuple[Tensor, Tensor | None]:
        """y [B, D] and the labels [B], or None, of a batch.

        Raises ValueError for other shapes, and for labels that are none of the classes if Pyro's validation
        is on or gradients are off.
        """
        names = ("y",) if self.classes is None else ("labels", "y")
        parts = (*batch, *(named[k] for k in names[len(batch) :] if k in named))
        if len(parts) != len(names) or len(parts) != len(batch) + len(named):
            got = [*(f"shape {tuple(part.shape)}" for part in batch), *named]
            raise ValueError(f"batch: expected {' and '.join(names)} for this {self.name}, got {got}")
        y = parts[-1]
        if y.dim() != 2 or y.shape[-1] != self.dims:
            raise ValueError(f"y: expected shape [B, {self.dims}] for this {self.name}, got {tuple(y.shape)}")
        if self.classes is None:
            return y, None
        return y, self._labels(parts[0], len(y))

    def _labels(self, labels: Tensor, n: int) -> Tensor:
        if labels.shape != (n,):
            raise ValueError(f"labels: expected shape [{n}], one a datum, got {tuple(labels.shape)}")
        if is_validation_enabled() or not torch.is_grad_enabled():
            wrong = (labels != labels.long()) | (labels < 0) | (labels >= self.classes)
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"labels: expected integers in [0, {self.classes - 1}], got "  # type: ignore[operator]
                    f"{float(labels[row]):.6g} at row {row}"
                )
        return labels.long()

    def labels_for(self, n: int, given: tuple[Tensor, ...] = (), like: Batch | None = None) -> Tensor | None:
        """The labels [n] of n draws: those ``given``, or in turn those of the batch ``like``; None for pairs
        without classes. Raises ValueError where there are none."""
        positive_count("n", n, "number of draws")
        if self.classes is None:
            if given:
                raise ValueError(
                    f"given: expected nothing for a {self.name} without classes, got {len(given)}"
                )
            return None
        if like is not None:
            _, labels = batches.call(self.split, batches.as_batch(like, "like"))
            assert labels is not None
            return labels[torch.arange(n, device=labels.device) % len(labels)]
        if len(given) != 1:
            raise ValueError(
                f"given: expected labels [{n}] for a {self.name} of {self.classes} classes, got {len(given)} "
                "parts: simulate(n, labels)"
            )
        with torch.no_grad():
            return self._labels(given[0], n).to(next(self.generator.parameters()).device)

    def joined(self, y: Tensor, labels: Tensor | None) -> Batch:
        """The batch that :meth:`split` takes apart."""
        return y if labels is None else (labels, y)

    def placeholder(self, n: int, *given: Tensor) -> Batch:
        like = next(self.generator.parameters())
        y = torch.zeros(n, self.dims, dtype=like.dtype, device=like.device)
        return self.joined(y, self.labels_for(n, given))

"""Data whose order does not matter: the choice of the next datum holds bits, which bits-back returns."""

from __future__ import annotations

import bisect
from collections.abc import Iterable

import numpy as np

from pyroelbo.coding.stack import Stack
from pyroelbo.coding.symbols import Uniforms

__all__ = ["Multiset"]


class Multiset:
    """A multiset of equally long byte strings, kept sorted.

    :meth:`draw` pops which of the n! / Π m_i! orders the data are coded in (m_i the number of copies of datum
    i), and :meth:`insert` pushes it again: log₂ of that number is what a set's code saves. A datum is popped
    by its rank, log₂ n bits; which of its m copies it is, log₂ m bits, is pushed back.

    Cost: O(n) memory moves per datum.

    Source: Severo, Townsend, Khisti, Makhzani and Ullrich (2022).
    """

    def __init__(self, members: Iterable[bytes] = ()) -> None:
        self.members = sorted(members)

    def __len__(self) -> int:
        return len(self.members)

    def draw(self, stack: Stack, number: int) -> list[bytes]:
        """Take ``number`` members out, in an order popped from the stack."""
        drawn = []
        for _ in range(number):
            rank = int(_one(len(self)).pop(stack)[0])
            member = self.members[rank]
            first, copies = self._place(member)
            _one(copies).push(stack, np.array([rank - first]))
            del self.members[rank]
            drawn.append(member)
        return drawn

    def insert(self, stack: Stack, drawn: list[bytes]) -> None:
        """Undo :meth:`draw`."""
        for member in reversed(drawn):
            bisect.insort(self.members, member)
            first, copies = self._place(member)
            rank = first + int(_one(copies).pop(stack)[0])
            _one(len(self)).push(stack, np.array([rank]))

    def _place(self, member: bytes) -> tuple[int, int]:
        """The rank of the first copy of a member, and the number of copies."""
        first = bisect.bisect_left(self.members, member)
        return first, bisect.bisect_right(self.members, member, lo=first) - first


def _one(size: int) -> Uniforms:
    return Uniforms(np.array([size]))

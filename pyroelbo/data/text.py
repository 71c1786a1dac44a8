"""Texts as rows of symbol numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["strings", "windows"]


def windows(
    text: str | bytes, length: int, alphabet: str | bytes | None = None, name: str = "text"
) -> tuple[Tensor, str | bytes]:
    """Text cut into rows of ``length`` symbols, LongTensor [N, length], and the alphabet that numbers them.

    The alphabet is the sorted symbols of the text, unless given; the rest of the text is left out. ValueError,
    naming the symbol and its place, for one that the alphabet lacks, and for a text shorter than a row.
    """
    alphabet = _alphabet(text) if alphabet is None else alphabet
    codes = _codes(text, alphabet, name)
    if not isinstance(length, int) or length < 1 or len(text) < length:
        raise ValueError(f"length takes 1 to the {len(text)} symbols of {name}, got {length!r}")
    rows = len(codes) // length
    return torch.tensor(codes[: rows * length]).reshape(rows, length), alphabet


def strings(
    texts: Sequence[str | bytes],
    length: int | None = None,
    alphabet: str | bytes | None = None,
    name: str = "texts",
) -> tuple[Tensor, str | bytes]:
    """Texts of varying length as rows, LongTensor [N, length] padded with -1, and the alphabet that numbers their
    symbols: as :class:`~pyroelbo.models.Strings` and grammars take them.

    ``length`` is that of the longest text, and the alphabet the sorted symbols of all, unless given. ValueError, naming
    the text, the symbol and its place, for a symbol that the alphabet lacks, for a text longer than ``length``, and for
    no texts.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"{name} is one {type(texts).__name__}: it takes a list of them (one text is cut by windows)"
        )
    if not len(texts):
        raise ValueError(f"{name} is empty: it takes at least one text")
    kinds = {type(text).__name__ for text in texts}
    if kinds not in ({"str"}, {"bytes"}):
        raise TypeError(f"{name} holds {' and '.join(sorted(kinds))}: it takes all str, or all bytes")
    if alphabet is None:
        alphabet = _alphabet(type(texts[0])().join(texts))  # type: ignore[arg-type]
    codes = [_codes(text, alphabet, f"{name}[{i}]") for i, text in enumerate(texts)]
    longest = max(range(len(codes)), key=lambda i: len(codes[i]))
    length = max(len(codes[longest]), 1) if length is None else length
    if len(codes[longest]) > length:
        raise ValueError(
            f"{name}[{longest}] has {len(codes[longest])} symbols: length={length} is too short for it"
        )
    return torch.tensor([row + [-1] * (length - len(row)) for row in codes]), alphabet


def _alphabet(text: str | bytes) -> str | bytes:
    return bytes(sorted(set(text))) if isinstance(text, bytes) else "".join(sorted(set(text)))


def _codes(text: str | bytes, alphabet: str | bytes, name: str) -> list[int]:
    if isinstance(text, bytes) != isinstance(alphabet, bytes):
        raise TypeError(
            f"{name} is {type(text).__name__} and alphabet {type(alphabet).__name__}: take one kind for both"
        )
    number: dict[Any, int] = {symbol: i for i, symbol in enumerate(alphabet)}
    try:
        return [number[symbol] for symbol in text]
    except KeyError:
        place = next(i for i, symbol in enumerate(text) if symbol not in number)
        raise ValueError(
            f"{name} has {text[place : place + 1]!r} at place {place}, which the alphabet of {len(alphabet)} symbols lacks"
        ) from None

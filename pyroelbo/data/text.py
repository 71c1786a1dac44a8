"""Texts as rows of symbols."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["strings", "windows"]


def windows(
    text: str | bytes, length: int, alphabet: str | bytes | None = None, name: str = "text"
) -> tuple[Tensor, str | bytes]:
    """Text cut into rows of ``length`` symbols, LongTensor [N, length] of positions in the alphabet, and the
    alphabet.

    The alphabet defaults to the sorted symbols of the text; symbols after the last full row are dropped.
    Raises ValueError, naming symbol and place, for a symbol that is not in the alphabet, and for a text
    shorter than a row.
    """
    alphabet = _alphabet(text) if alphabet is None else alphabet
    codes = _codes(text, alphabet, name)
    if not isinstance(length, int) or length < 1 or len(text) < length:
        raise ValueError(f"length: expected 1 to {len(text)}, the symbols of {name}, got {length!r}")
    rows = len(codes) // length
    return torch.tensor(codes[: rows * length]).reshape(rows, length), alphabet


def strings(
    texts: Sequence[str | bytes],
    length: int | None = None,
    alphabet: str | bytes | None = None,
    name: str = "texts",
) -> tuple[Tensor, str | bytes]:
    """Texts of varying length as rows, LongTensor [N, length] padded with -1, and the alphabet: data for
    :class:`~pyroelbo.models.Strings` and grammars.

    ``length`` defaults to that of the longest text, the alphabet to the sorted symbols of all. Raises
    ValueError, naming text, symbol and place, for a symbol that is not in the alphabet, for a text longer
    than ``length``, and for no texts.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(
            f"{name}: expected a list of texts, got one {type(texts).__name__}; windows() cuts one text "
            "into rows"
        )
    if not len(texts):
        raise ValueError(f"{name}: expected at least one text, got none")
    kinds = {type(text).__name__ for text in texts}
    if kinds not in ({"str"}, {"bytes"}):
        raise TypeError(f"{name}: expected all str or all bytes, got {' and '.join(sorted(kinds))}")
    if alphabet is None:
        alphabet = _alphabet(type(texts[0])().join(texts))  # type: ignore[arg-type]
    codes = [_codes(text, alphabet, f"{name}[{i}]") for i, text in enumerate(texts)]
    longest = max(range(len(codes)), key=lambda i: len(codes[i]))
    length = max(len(codes[longest]), 1) if length is None else length
    if len(codes[longest]) > length:
        raise ValueError(
            f"length: expected at least {len(codes[longest])}, the symbols of {name}[{longest}], got {length}"
        )
    return torch.tensor([row + [-1] * (length - len(row)) for row in codes]), alphabet


def _alphabet(text: str | bytes) -> str | bytes:
    return bytes(sorted(set(text))) if isinstance(text, bytes) else "".join(sorted(set(text)))


def _codes(text: str | bytes, alphabet: str | bytes, name: str) -> list[int]:
    if isinstance(text, bytes) != isinstance(alphabet, bytes):
        raise TypeError(f"alphabet: expected {type(text).__name__} as {name}, got {type(alphabet).__name__}")
    number: dict[Any, int] = {symbol: i for i, symbol in enumerate(alphabet)}
    try:
        return [number[symbol] for symbol in text]
    except KeyError:
        place = next(i for i, symbol in enumerate(text) if symbol not in number)
        raise ValueError(
            f"{name}: expected symbols of the alphabet of {len(alphabet)}, got {text[place : place + 1]!r} "
            f"at place {place}"
        ) from None

"""Fields of stored records: which there are, and of which types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["AUDIT", "BOUND", "DIVERGENCE", "checked", "numbers"]

Check = tuple[str, Callable[[Any], bool]]


def _is_number(x: Any) -> bool:
    if isinstance(x, int):
        return not isinstance(x, bool) and abs(x) < 2**1000
    return isinstance(x, float) or x in ("nan", "inf", "-inf")


def _list_of(item: Check, what: str, least: int = 0) -> Check:
    return f"a list of {what}", lambda x: isinstance(x, list) and len(x) >= least and all(map(item[1], x))


def _or_null(item: Check) -> Check:
    return f"{item[0]} or null", lambda x: x is None or item[1](x)


_TEXT: Check = ("a string", lambda x: isinstance(x, str))
_COUNT: Check = (
    "a count",
    lambda x: isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63,
)
_RECORD: Check = ("a record", lambda x: isinstance(x, dict))
_NUMBERS = _list_of(("a number", _is_number), "numbers")

BOUND: dict[str, Check] = {
    **dict.fromkeys(("method", "kind", "scope"), _TEXT),
    **dict.fromkeys(("draws", "cost"), _COUNT),
    **dict.fromkeys(("value", "stderr"), _NUMBERS),
    **dict.fromkeys(("ess", "k_hat", "resolution"), _or_null(_NUMBERS)),
    "by_draw": _or_null(_list_of(_NUMBERS, "lists of numbers", least=1)),
    "notes": _list_of(_TEXT, "strings"),
}
DIVERGENCE: dict[str, Check] = {"by_draw": _NUMBERS, **dict.fromkeys(("num_data", "size"), _COUNT)}
AUDIT: dict[str, Check] = {
    "name": _TEXT,
    "reference": _or_null(_TEXT),
    "notes": _list_of(_TEXT, "strings"),
    "bounds": _list_of(_RECORD, "at least one record", least=1),
    "divergence": _or_null(_RECORD),
}


def checked(owner: str, row: Any, fields: dict[str, Check]) -> dict[str, Any]:
    """The fields of a stored record, None where one is missing that may be; ValueError names a field that is
    missing or of another type."""
    if not isinstance(row, dict):
        raise ValueError(f"{owner}: expected a JSON object, got {type(row).__name__}")
    for name, (what, good) in fields.items():
        if not good(row.get(name)):
            got = repr(row[name])[:80] if name in row else "a record without it"
            raise ValueError(f"{owner}.{name}: expected {what}, got {got}")
    return {name: row.get(name) for name in fields}


def numbers(values: list | None) -> Tensor | None:
    """Stored numbers, or lists of as many numbers each, as a float64 tensor."""
    if values is None:
        return None
    rows = [[float(x) for x in v] if isinstance(v, list) else float(v) for v in values]
    return torch.tensor(rows, dtype=torch.float64)

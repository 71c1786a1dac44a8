"""One reader for each kind of file: whatever is wrong with a file becomes one ValueError that names it.
Nothing unpickles.
"""

from __future__ import annotations

import csv
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

__all__ = [
    "PICTURES",
    "read_arrays",
    "read_json",
    "read_jsonl",
    "read_lines",
    "read_npy",
    "read_npz",
    "read_picture",
    "read_table",
    "read_tensors",
    "replacing",
    "write",
    "write_tensors",
]

_KEY = "pyroelbo"  # of the metadata of a safetensors file
_LARGEST = 2**31  # bytes of one array in an npz file


def _damaged(path: Path, error: object) -> ValueError:
    text = str(error).splitlines()
    return ValueError(f"{path} is damaged: {text[0] if text else type(error).__name__}")


def _parsed(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError for a damaged one, OSError for one that cannot be read."""
    content = _parsed(_text(path), path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_jsonl(path: Path, rows: int | None = None) -> list[dict[str, Any]]:
    """The first ``rows`` objects (None: all) of a file with one a line; ValueError where there are fewer."""
    lines = _text(path).splitlines()[:rows]
    if rows is not None and len(lines) < rows:
        raise ValueError(f"{path}: expected at least {rows} rows, got {len(lines)}")
    content = [_parsed(line, path) for line in lines]
    if not all(isinstance(row, dict) for row in content):
        raise ValueError(f"{path}: expected a JSON object in each row")
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a safetensors file written by :func:`write_tensors`; ValueError for any other
    file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            meta = opened.metadata() or {}
            tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # the reader's own errors are of many types
        raise _damaged(path, error) from error
    if _KEY not in meta:
        raise ValueError(f"{path} was not written by pyroelbo")
    content = _parsed(meta[_KEY], path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object in its metadata, got {type(content).__name__}")
    return tensors, content


def read_npy(path: Path) -> np.ndarray:
    """The array of an npy file, memory-mapped; ValueError, naming the file, for any other content."""
    try:
        with open(path, "rb") as file:
            shape, _, dtype = _header(file)
        # an empty file cannot be mapped
        return (
            np.load(path, mmap_mode="r", allow_pickle=False) if math.prod(shape) else np.empty(shape, dtype)
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # EOFError, SyntaxError, struct.error, ...
        raise _damaged(path, error) from error


def read_npz(path: Path, arrays: Mapping[str, tuple[str, tuple[int | None, ...]]]) -> dict[str, np.ndarray]:
    """Arrays of an npz file by name; ``arrays`` gives the dtype kinds (such as ``"u"``) and the shape that
    each must have, None for any length.

    Headers are checked before anything is unpacked. ValueError, naming file and array, for what is missing,
    of another dtype or shape, larger than 2 GiB, or damaged.
    """
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name, (kinds, shape) in arrays.items():
                if f"{name}.npy" not in archive.namelist():
                    raise ValueError(f"expected an array {name!r}, got {sorted(archive.namelist())}")
                with archive.open(f"{name}.npy") as member:
                    _check_header(member, name, kinds, shape)
                with archive.open(f"{name}.npy") as member:
                    found[name] = np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # zlib.error, BadZipFile, EOFError, struct.error, SyntaxError, ...
        raise _damaged(path, error) from error
    return found


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name, or that of an npy file as "train".

    ValueError, naming file and array, for what is no array of numbers (nothing is unpickled), in an npz file
    larger than 2 GiB, or damaged.
    """
    single, shapes = path.suffix.lower() == ".npy", {}
    try:
        if single:
            with open(path, "rb") as file:
                shapes["train"] = _header(file)
        else:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    with archive.open(member) as file:
                        shapes[member.removesuffix(".npy")] = _header(file, f"array {member!r}")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    for name, (_, _, dtype) in shapes.items():
        if dtype.kind not in "fiub":
            what = "objects, which are never unpickled" if dtype.hasobject else str(dtype)
            raise ValueError(f"{path}: array {name!r}: expected numbers, got an array of {what}")
    if single:
        return {"train": np.array(read_npy(path))}
    return read_npz(path, {name: ("fiub", shape) for name, (shape, _, _) in shapes.items()})


def _header(file: Any, name: str = "it") -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, memory order and dtype of an npy file."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name} has npy version {version}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _check_header(member: Any, name: str, kinds: str, shape: tuple[int | None, ...]) -> None:
    got, _, dtype = _header(member, f"array {name!r}")
    fits = len(got) == len(shape) and all(b is None or a == b for a, b in zip(got, shape, strict=True))
    if dtype.kind not in kinds or not fits:
        raise ValueError(f"array {name!r}: expected kind {kinds!r} and shape {shape}, got {dtype} {got}")
    if math.prod(got) * dtype.itemsize > _LARGEST:
        raise ValueError(f"array {name!r}: expected at most {_LARGEST} bytes, got shape {got} of {dtype}")


def read_table(path: Path, columns: Sequence[str] = ()) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the ``columns`` (none: all) of a CSV file with a header, and their numbers [N, D].

    ValueError, naming file, row (1 is the first below the header) and column, for cells that are missing or
    no finite numbers, rows of other lengths, and a header that is missing or lacks a column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header, *rows = [row for row in csv.reader(file) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, error) from error
    header = [name.strip() for name in header]
    if not rows or len(set(header)) < len(header) or any(_number(name) is not None for name in header):
        raise ValueError(
            f"{path}: expected a header of different names and rows of numbers, got {len(rows)} rows under "
            f"{', '.join(header)[:80]!r}"
        )
    unknown = [name for name in columns if name not in header]
    if unknown:
        raise ValueError(f"{path}: columns: expected some of {', '.join(header)}, got {unknown[0]!r}")
    chosen = tuple(columns) or tuple(header)
    places, values = [header.index(name) for name in chosen], []
    for i, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(f"{path}: row {i}: expected {len(header)} cells, as the header, got {len(row)}")
        cells = [_number(row[place]) for place in places]
        if None in cells:
            name, cell = chosen[cells.index(None)], row[places[cells.index(None)]].strip()
            found = f"got {cell!r}" if cell else "got none"
            others = [n for n, text in zip(header, row, strict=True) if _number(text) is not None]
            raise ValueError(
                f"{path}: row {i}, column {name!r}: expected a finite number, {found}; fill it, drop the row,"
                f" or choose columns (--columns {','.join(others)})"
            )
        values.append(cells)
    return chosen, np.array(values, float)


def _number(text: str) -> float | None:
    """A finite number; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without the space around them; ValueError for none."""
    lines = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path}: expected lines of text, got none")
    return lines


PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff", ".webp")


def read_picture(path: Path) -> np.ndarray:
    """The picture in a file as bytes [H, W, 3] of red, green and blue, its transparency dropped.

    ValueError, naming the file, for a grey one, for what is no picture, and for damaged ones.
    """
    from PIL import Image  # which matplotlib needs

    try:
        with Image.open(path) as opened:
            mode = opened.mode
            found = np.array(opened.convert("RGB"))
    except FileNotFoundError:
        raise
    except Exception as error:  # the readers' own errors are of many types
        raise _damaged(path, error) from error
    if mode.startswith(("L", "1", "I", "F")):
        raise ValueError(f"{path}: expected a colour picture, got a grey one (mode {mode})")
    return found


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Context manager for a file written piece by piece: beside its place, synced and renamed at the end, so
    that a kill or an error leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, partial, str(partial)):
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error
        raise


def write(path: Path, content: bytes) -> None:
    """Write a whole file as :func:`replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a safetensors file with JSON metadata, as :func:`write` does."""
    # Copies: safetensors refuses tensors that share memory, as tied parameters do.
    plain = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    write(path, save(plain, {_KEY: json.dumps(dict(meta))}))

"""The file of a code: segments of bytes, then a description of them and of the array that they hold."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from pyroelbo import files
from pyroelbo._version import __version__

__all__ = ["Reader", "Writer", "writing"]

# MAGIC | segments … | description, deflated JSON | its length, CRC-32 of it, MAGIC
MAGIC = b"pyroelbo"
FORMAT = 1
_END = struct.Struct("<II8s")
_LARGEST = 2**26  # bytes of a description


class Writer:
    """Appends segments to a file; :meth:`finish` closes it with its description."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._segments: list[tuple[int, int]] = []
        self.size = file.write(MAGIC)

    def segment(self, content: bytes) -> None:
        self._segments.append((len(content), zlib.crc32(content)))
        self.size += self._file.write(content)

    def finish(self, description: dict[str, Any]) -> None:
        """Write the index of the segments and the ``description``, a JSON object."""
        whole = {"format": FORMAT, "pyroelbo": __version__, **description, "segments": self._segments}
        content = zlib.compress(json.dumps(whole, separators=(",", ":")).encode(), 9)
        self.size += self._file.write(content)
        self.size += self._file.write(_END.pack(len(content), zlib.crc32(content), MAGIC))


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Context manager for a new file, which appears complete or not at all; FileExistsError where there is
    one of this name."""
    if path.exists():
        raise FileExistsError(f"{path} exists: choose another name, or remove it")
    with files.replacing(path) as file:
        yield Writer(file)


class Reader:
    """A code's description, and its segments on demand.

    Raises ValueError, naming the file, for anything that is damaged, is no code, or has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size < len(MAGIC) + _END.size:
                raise self.damaged("it is too short")
            file.seek(0)
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path}: expected a code of `pyroelbo compress`, got another kind of file")
            file.seek(size - _END.size)
            length, checksum, magic = _END.unpack(file.read(_END.size))
            start = size - _END.size - length
            if magic != MAGIC or start < len(MAGIC):
                raise self.damaged("its end is missing")
            file.seek(start)
            content = file.read(length)
        if zlib.crc32(content) != checksum:
            raise self.damaged("its description has another checksum")
        self.description = self._parsed(content)
        segments = self.description["segments"]
        self._places = []
        place = len(MAGIC)
        for length, checksum in segments:
            self._places.append((place, length, checksum))
            place += length
        if place != start:
            raise self.damaged("its segments do not add up to its size")

    def _parsed(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(zlib.decompressobj().decompress(content, _LARGEST))
            version, segments = found["format"], found["segments"]
        except (ValueError, RecursionError, KeyError, TypeError, zlib.error) as error:
            raise self.damaged(error) from error
        if version != FORMAT:
            raise ValueError(
                f"{self.path}: expected format {FORMAT}, got {version!r}: it was written by pyroelbo "
                f"{found.get('pyroelbo')}"
            )
        numbers = [n for s in segments for n in s] if all(len(s) == 2 for s in segments) else [None]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise self.damaged("its index holds no numbers")
        return found

    def damaged(self, why: object) -> ValueError:
        return ValueError(f"{self.path} is damaged: {why}")

    def __len__(self) -> int:
        return len(self._places)

    def segment(self, number: int) -> bytes:
        """The content of one segment; ValueError where its checksum differs."""
        place, length, checksum = self._places[number]
        with open(self.path, "rb") as file:
            file.seek(place)
            content = file.read(length)
        if zlib.crc32(content) != checksum:
            raise self.damaged(f"segment {number} has another checksum")
        return content

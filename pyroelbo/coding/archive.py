"""Arrays as files: by a pair, or by adaptive contexts."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyroelbo import batch as batches
from pyroelbo import files
from pyroelbo.coding import weights
from pyroelbo.coding.container import Reader, Writer, writing
from pyroelbo.coding.contexts import ContextCoder, same_bytes
from pyroelbo.coding.multiset import Multiset
from pyroelbo.coding.pairs import PairCodec, grids_of, pair_codec
from pyroelbo.coding.sites import Grid
from pyroelbo.coding.stack import Impossible, Stack, Underflow
from pyroelbo.numerics import positive_count
from pyroelbo.pair import Pair
from pyroelbo.results import CodeLength

__all__ = ["compress", "compress_contexts", "decompress", "decompress_contexts"]

_LARGE = 2**18  # words of a stack, of which all but the topmost are written
_KEPT = 2**14  # words that stay, for the next chunk to pop
_TYPICAL = 512  # data whose posteriors choose the grids
_PIXELS = 2**24  # of a segment of the context coder
_NUMBERS = 2**16  # of a chunk, which has a table of probabilities for each


# ------------------------------------------------------------------------------------------- by a pair


def compress(
    pair: Pair,
    y: Any,
    path: str | Path,
    *,
    given: Sequence[Any] = (),
    chunk: int | None = None,
    method: str | None = None,
    as_set: bool = False,
    precision: str | None = None,
    threads: int | None = None,
) -> CodeLength:
    """Write a file from which :func:`decompress` restores ``y`` bit for bit, given the same pair.

    ``y`` is an array or tensor [N, ...] of discrete data; a memory-mapped array is read in chunks, from the
    last to the first, so that decoding runs forwards. The file holds minus the ELBO in bits (of an exact
    model, -log₂ p(y)), a few hundred bytes that describe it, and the data that fill the stack at first,
    which are coded by contexts (binary images) or zlib. The model is not in it, nor is what a conditional
    pair is ``given``: whoever decodes has both.

    Raises ValueError, naming the site, for pairs that cannot be coded (latents whose coordinates depend on
    one another, densities of data, masks, data that are coupled) and for data of probability zero, naming the
    datum; FileExistsError where the file exists; OSError, leaving no file, if it cannot be written;
    ImportError without ``constriction``.

    Args:
        pair: a trained pair; it is run on the CPU, in evaluation mode.
        y: the data.
        path: the new file.
        given: the parts of the batches of a conditional pair before ``y``, arrays or tensors of N rows; then
            the file holds minus the bound on ln p(y | given).
        chunk: number of data that the networks see at once, by default 128 with ``direct``, else 16, fewer of
            more than 4,096 numbers. The bits that the first chunk pops are what the data coded without the
            model have to provide.
        method: ``direct`` (exact models), ``swap`` (bottom-up chains) or ``bits-back``; by default the first
            that the pair offers.
        as_set: whether the order of the data may be lost; saves log₂ N! bits, needs all data in memory.
        precision: ``float16`` or ``int8``, to which the weights that code are rounded, as they would be
            transmitted; decoding rounds the pair's in the same way.
        threads: number of torch's threads, by default the present one; decoding sets the same.

    Sources: Townsend, Bird and Barber (2019); Kingma, Abbeel and Ho (2019); Severo et al. (2022).
    """
    start = time.perf_counter()
    path, array = Path(path), _array(y)
    identity = _identity(array, as_set)
    if as_set and len(given):
        raise ValueError("as_set: expected False with `given`, whose rows belong to those of `y`")
    known = _given(given, len(array))
    _check_takes(pair, len(given))
    pair = _placed(pair, precision)
    threads = torch.get_num_threads() if threads is None else threads
    with _threads(threads):
        direct = method in (None, "direct") and pair.stepwise(*_rows_of(known, slice(1))) is not None
        if chunk is None:
            chunk = 128 if direct else max(1, min(16, _NUMBERS // max(1, math.prod(array.shape[1:]))))
        positive_count("chunk", chunk, "number of data")
        template = _template(pair, array, known, chunk)
        codec, description = _prepared(pair, array, known, template, "direct" if direct else method)
        description |= {
            "kind": "pair",
            **identity,
            "template": [list(template.shape), str(template.dtype).removeprefix("torch.")],
            "threads": threads,
            "precision": precision,
            "model": weights.fingerprint(pair),
            "given": _checksum(known),
        }
        job, size = _written(path, array, known, codec, template, _image(pair, array), description)
    return CodeLength(
        data=len(array),
        coded=job.coded,
        bytes=size,
        net_bits=job.net_bits,
        starter_data=job.starter.rows,
        starter_bytes=job.starter.size,
        frame_bytes=size - job.starter.size - math.ceil(job.net_bits / 8),
        initial_bits=job.initial_bits,
        model_bytes=weights.size(pair, precision),
        seconds=time.perf_counter() - start,
        coder_seconds=job.seconds,
        site_bits=dict(sorted(job.site_bits.items())),
    )


def _written(
    path: Path,
    array: np.ndarray,
    given: tuple[Tensor, ...],
    codec: PairCodec | None,
    template: Tensor,
    image: tuple[int, int],
    description: dict[str, Any],
) -> tuple[_Encoding, int]:
    """The finished encoding and the size of its file: with the smallest starter that the first chunk can pop
    from, and which leaves whole chunks to a codec that has no others."""
    starter = len(array)
    if codec is not None:
        starter = 0 if codec.part(1) is not None else len(array) % len(template)
    while True:
        job = _Encoding(array, given, codec, template, starter, image, description["as_set"])
        try:
            with writing(path) as file:
                job.run(file)
                file.finish({**description, **job.description()})
            return job, file.size
        except Underflow:
            if starter == len(array):
                raise
            starter = min(len(array), starter + len(template))


def decompress(
    pair: Pair, path: str | Path, out: str | Path | None = None, *, given: Sequence[Any] = ()
) -> np.ndarray | None:
    """The array in a file of :func:`compress`, with the dtype and shape it had; of a set, its data sorted.

    ``given`` is what :func:`compress` was given. With ``out`` it is written to that .npy file chunk by chunk,
    and None returned.

    Raises ValueError, naming the file, where it is damaged, or was written with other parameters or given
    something else, or by a machine or version of torch whose networks compute other numbers (which a probe
    shows before anything is decoded).
    """
    reader = Reader(Path(path))
    with _understood(reader, "pair") as found:
        pair = _placed(pair, found["precision"])
        if found["model"] != weights.fingerprint(pair):
            raise ValueError(f"{reader.path}: expected the pair that wrote it, got one of other parameters")
        known = _given(given, found["shape"][0])
        if found.get("given") != _checksum(known):
            what = "another `given`" if known else "nothing"
            raise ValueError(
                f"{reader.path}: expected the `given` that it was written with, got {what}"
                if found.get("given")
                else f"{reader.path}: expected nothing `given`, as it was written, got {len(known)} parts"
            )
        with _threads(found["threads"]):
            return _restore(reader, _decoded(pair, reader, known), out)


def _prepared(
    pair: Pair, array: np.ndarray, given: tuple[Tensor, ...], template: Tensor, method: str | None
) -> tuple[PairCodec | None, dict[str, Any]]:
    """The codec and its part of the description; no codec where there is no whole chunk to code."""
    size = len(template)
    if len(array) < (1 if method == "direct" else size):
        return None, {"codec": None}
    grids: dict[str, Grid] = {}
    if method != "direct":
        most = min(len(array), max(size, _TYPICAL))
        typical = np.linspace(0, len(array) - 1, most // size * size).astype(np.int64)
        chunks = [
            (*_rows_of(given, rows), _to_tensor(array[rows], template))
            for rows in np.split(typical, most // size)
        ]
        grids = grids_of(pair, chunks)
    codec = pair_codec(pair, template, grids, method, _rows_of(given, slice(size)))
    codes = {k: [g.exponents.tolist(), g.low, g.high] for k, g in grids.items()}
    described = {"method": codec.method, "grids": codes, "torch": torch.__version__}
    return codec, {"codec": {**described, "probe": _probe(codec)}}


def _placed(pair: Pair, precision: str | None) -> Pair:
    """The pair on the CPU, with weights of this precision."""
    pair = pair if pair.device.type == "cpu" else copy.deepcopy(pair).to("cpu")
    return pair if precision is None else weights.quantized(pair, precision)


def _codec_in(pair: Pair, reader: Reader, template: Tensor, given: tuple[Tensor, ...]) -> PairCodec | None:
    """The codec that the description names, if this machine computes what the writer's did."""
    found = reader.description["codec"]
    if found is None:
        return None
    grids = {k: Grid(np.array(e, np.int64), low, high) for k, (e, low, high) in found["grids"].items()}
    codec = pair_codec(pair, template, grids, found["method"], _rows_of(given, slice(len(template))))
    if _probe(codec) != found["probe"]:
        raise ValueError(
            f"{reader.path}: expected networks that compute the same numbers as those that wrote it (torch "
            f"{found['torch']}), got others (torch {torch.__version__}): decode it where it was written, or "
            "with the same version on the same kind of processor"
        )
    return codec


def _probe(codec: PairCodec) -> str:
    """A checksum of what the codec makes of data drawn from the pair itself: every network takes part, and a
    change of 2^-24 in any probability changes the stack. RuntimeError where decoding does not give the data
    back."""
    number = 2**16
    while True:
        noise = hashlib.shake_256(b"pyroelbo").digest(8 * number)
        words = np.frombuffer(noise, "<u4").astype(np.uint32) | np.uint32(1)
        try:
            y, stack = codec.draw(Stack(words[:number])), Stack(words[number:])
            codec.push(stack, y)
            found = hashlib.sha256(stack.words().astype("<u4").tobytes() + y.numpy().tobytes()).hexdigest()
            if not torch.equal(codec.pop(stack), y) or not np.array_equal(stack.words(), words[number:]):
                raise RuntimeError(
                    "pair: expected the same numbers in both directions, got others: its networks differ "
                    "from pass to pass, or its model feeds its observations forward"
                )
            return found[:16]
        except Underflow:
            number *= 4


def _of_chunk(codec: PairCodec | None, number: int, given: tuple[Tensor, ...], start: int) -> PairCodec:
    """The codec of a chunk of so many data from ``start`` on."""
    whole = codec is not None and number == len(codec.template)
    found = codec if whole or codec is None else codec.part(number)
    if found is None or not number:
        raise ValueError(f"no codec for a chunk of {number} data")
    return found.conditioned(_rows_of(given, slice(start, start + number))) if given else found


class _Encoding:
    """Chunks of an array, coded from the last to the first on top of a starter of so many data."""

    def __init__(
        self,
        array: np.ndarray,
        given: tuple[Tensor, ...],
        codec: PairCodec | None,
        template: Tensor,
        starter: int,
        image: tuple[int, int],
        as_set: bool,
    ) -> None:
        if as_set:  # sorted data would be an untypical start
            array = array[np.random.default_rng(0).permutation(len(array))]
        self.codec, self.template, self.as_set = codec, template, as_set
        self.site_bits: Counter[str] = Counter() if codec is None else codec.bits
        self.site_bits.clear()  # of the probe, or of an attempt with a smaller starter
        self.array, self.given, self.coded = array, given, len(array) - starter
        self.starter = _Starter.of(array[self.coded :], image)
        self.net_bits = self.initial_bits = self.seconds = 0.0
        self._parts: list[int] = []
        self._kept = _KEPT

    def run(self, file: Writer) -> None:
        size = len(self.template)
        members = Multiset(_rows(self.array[: self.coded])) if self.as_set else None
        stack, chunks = Stack(self.starter.words), 0
        before = stack.bits
        starts = range(0, self.coded, size)
        for start in reversed(starts):
            rows = self.array[start : min(start + size, self.coded)]
            if members is not None:
                ordered = stack.bits
                drawn = b"".join(members.draw(stack, len(rows)))
                self.site_bits["order"] += stack.bits - ordered
                rows = np.frombuffer(drawn, rows.dtype).reshape(rows.shape)
            self._push(stack, rows, start)
            chunks += 1
            if start == starts[-1]:
                self.initial_bits = before - stack.lowest
                self._kept = max(_KEPT, int(self.initial_bits) // 8)
            if len(stack) > max(_LARGE, 2 * self._kept):
                words = stack.words()
                self._close(file, words[: -self._kept], chunks, stack, before)
                stack, chunks = Stack(words[-self._kept :]), 0
                before = stack.bits
        self._close(file, stack.words(), chunks, stack, before)

    def _close(self, file: Writer, words: np.ndarray, chunks: int, stack: Stack, before: int) -> None:
        file.segment(words.astype("<u4").tobytes())
        self._parts.append(chunks)
        self.net_bits += stack.bits - before
        self.seconds += stack.seconds

    def _push(self, stack: Stack, rows: np.ndarray, start: int) -> None:
        y = _to_tensor(rows, self.template)
        if not same_bytes(_to_array(y, rows), rows):
            raise ValueError(
                f"y: expected numbers that the pair's {y.dtype} holds exactly, got others in data {start} to "
                f"{start + len(rows) - 1} (of {rows.dtype})"
            )
        try:
            _of_chunk(self.codec, len(y), self.given, start).push(stack, y)
        except Impossible as error:
            datum = "a datum" if self.as_set else f"datum {start + error.row}"
            raise ValueError(
                f"site {error.site!r}: expected values of positive probability, got {error.value:.6g} in "
                f"{datum}"
            ) from error

    def description(self) -> dict[str, Any]:
        return {"starter": self.starter.description(), "parts": self._parts, "kept": self._kept}


@dataclass(frozen=True)
class _Starter:
    """Data coded without the pair, whose code is what the first chunk pops from: by contexts if they are
    binary images, else by zlib. ``code`` has ``size`` bytes; decoding knows the size first."""

    by: str
    rows: int
    size: int
    image: tuple[int, int]
    code: bytes = b""

    @classmethod
    def of(cls, rows: np.ndarray, image: tuple[int, int]) -> _Starter:
        binary = same_bytes((rows == 1).astype(rows.dtype), rows)
        if binary and find_spec("numba") is not None:
            by, code = "contexts", ContextCoder().encode(rows.reshape(-1, *image))
        else:
            by, code = "zlib", zlib.compress(rows.tobytes(), 9)
        code = code if len(rows) else b""
        return cls(by, len(rows), len(code), image, code)

    @property
    def words(self) -> np.ndarray:
        """The code as the content of a stack, closed by a 1."""
        padded = self.code + bytes(-len(self.code) % 4)
        return np.append(np.frombuffer(padded or bytes(4), "<u4"), 1).astype(np.uint32)

    def description(self) -> list[Any]:
        return [self.by, self.rows, self.size, self.image]

    def decode(self, words: np.ndarray, like: np.ndarray) -> np.ndarray:
        """The rows, from what is left of the stack; ValueError where that is anything else."""
        code = words[:-1].astype("<u4").tobytes()[: self.size]
        if not np.array_equal(words, replace(self, code=code).words):
            raise ValueError("a chunk ended elsewhere than it began")
        shape = (self.rows, *like.shape[1:])
        if not self.rows:
            return np.empty(shape, like.dtype)
        if self.by == "contexts":
            return ContextCoder().decode(code, (self.rows, *self.image)).reshape(shape).astype(like.dtype)
        return np.frombuffer(zlib.decompress(code), like.dtype).reshape(shape)


def _decoded(pair: Pair, reader: Reader, given: tuple[Tensor, ...]) -> Iterator[np.ndarray]:
    """The rows of a code in their order, chunk by chunk; of a set, sorted and all at once."""
    found = reader.description
    shape, dtype = found["shape"], np.dtype(found["dtype"])
    like = np.empty((0, *shape[1:]), dtype)
    template = torch.zeros(found["template"][0], dtype=getattr(torch, found["template"][1]))
    codec, starter = _codec_in(pair, reader, template, given), _Starter(*found["starter"])
    members = Multiset() if found["as_set"] else None
    coded, words = shape[0] - starter.rows, np.zeros(0, np.uint32)
    start = 0
    for part in reversed(range(len(reader))):
        stack = Stack(np.concatenate([np.frombuffer(reader.segment(part), "<u4"), words]))
        for _ in range(found["parts"][part]):
            number = min(len(template), coded - start)
            rows = _to_array(_of_chunk(codec, number, given, start).pop(stack), like)
            start += number
            if members is None:
                yield rows
            else:
                members.insert(stack, _rows(rows))
        words = stack.words()
        if part and len(words) != found["kept"]:
            raise ValueError("a chunk ended elsewhere than it began")
    last = starter.decode(words, like)
    yield last if members is None else _from_rows([*members.members, *_rows(last)], like)


# -------------------------------------------------------------------------------------- by contexts


def compress_contexts(y: Any, path: str | Path, *, shape: tuple[int, int] | None = None) -> CodeLength:
    """Write binary images by adaptive contexts, the code without a model that a pair's has to beat; see
    :class:`ContextCoder`.

    ``y`` is an array or tensor [N, H, W] of 0 and 1, read in blocks if it is memory-mapped; ``shape`` = (H,
    W) for other shapes [N, ...]. Raises ValueError for other values, naming the first, FileExistsError,
    OSError and ImportError as :func:`compress`.
    """
    start = time.perf_counter()
    path, array = Path(path), _array(y)
    image = tuple(array.shape[1:]) if shape is None else tuple(shape)
    if len(image) != 2 or math.prod(image) != math.prod(array.shape[1:]):
        raise ValueError(
            f"y: expected shape [N, H, W], got {array.shape} with shape={shape}: give its images' height and "
            "width"
        )
    coder, size = ContextCoder(), 0
    rows = max(1, _PIXELS // max(1, math.prod(image)))
    with writing(path) as file:
        for block in range(0, len(array), rows):
            code = coder.encode(array[block : block + rows].reshape(-1, *image), first=block)
            file.segment(code)
            size += len(code)
        file.finish({"kind": "contexts", **_identity(array, False), "image": image, "rows": rows})
    seconds = time.perf_counter() - start
    return CodeLength(
        len(array), len(array), file.size, 8 * size, 0, 0, file.size - size, 0, 0, seconds, seconds
    )


def decompress_contexts(path: str | Path, out: str | Path | None = None) -> np.ndarray | None:
    """The array in a file of :func:`compress_contexts`; ``out`` and errors as for :func:`decompress`."""
    reader = Reader(Path(path))
    with _understood(reader, "contexts") as found:
        return _restore(reader, _images(reader, found), out)


def _images(reader: Reader, found: dict[str, Any]) -> Iterator[np.ndarray]:
    coder, left = ContextCoder(), found["shape"][0]
    for block in range(len(reader)):
        number = min(found["rows"], left)
        left -= number
        images = coder.decode(reader.segment(block), (number, *found["image"]))
        yield images.reshape(number, *found["shape"][1:]).astype(found["dtype"])


# ------------------------------------------------------------------------------------------- arrays


def _array(y: Any) -> np.ndarray:
    array = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asanyarray(y)
    if array.dtype.kind not in "biuf" or not array.ndim:
        raise ValueError(f"y: expected numbers of shape [N, ...], got {array.dtype} of shape {array.shape}")
    return array


def _given(given: Sequence[Any], number: int) -> tuple[Tensor, ...]:
    """The parts of a batch before the data, tensors on the CPU of so many rows."""
    if not len(given) or not number:
        return ()
    parts = tuple(batches.parts(batches.as_batch(tuple(given), "given"), "given").values())
    if batches.size(parts) != number:
        raise ValueError(f"given: expected {number} rows, as y has, got {batches.size(parts)}")
    return tuple(part.detach().cpu().contiguous() for part in parts)


def _check_takes(pair: Pair, number: int) -> None:
    """Raise ValueError unless data of the pair are coded given so many parts."""
    try:
        inspect.signature(pair.stepwise).bind(*[None] * number)
        pair.model.check((torch.zeros(1),) * (number + 1))  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(
            f"given: expected the parts that {pair.name}.model takes before the data that are coded, got "
            f"{number}"
        ) from None


def _rows_of(given: tuple[Tensor, ...], rows: Any) -> tuple[Tensor, ...]:
    return tuple(part[rows] for part in given)


def _checksum(given: tuple[Tensor, ...]) -> str | None:
    found = hashlib.sha256()
    for part in given:
        found.update(f"{part.dtype}{tuple(part.shape)}".encode() + part.numpy().tobytes())
    return found.hexdigest() if given else None


def _template(pair: Pair, array: np.ndarray, given: tuple[Tensor, ...], chunk: int) -> Tensor:
    """A chunk of zeros in the shape and dtype that the pair takes: its placeholder's, or the data's."""
    one: Any = None
    with suppress(TypeError, ValueError):
        one = pair.placeholder(1, *_rows_of(given, slice(1)))
    if given and isinstance(one, tuple):
        one = one[-1]
    if not isinstance(one, Tensor):
        one = batches.as_batch(np.zeros((1, *array.shape[1:]), array.dtype.newbyteorder("=")))  # type: ignore
    assert isinstance(one, Tensor)
    size = math.prod(array.shape[1:])
    event = one.shape[1:] if one[0].numel() == size else array.shape[1:]
    return torch.zeros(chunk, *event, dtype=one.dtype)


def _image(pair: Pair, array: np.ndarray) -> tuple[int, int]:
    """Height and width of a datum: its own, or those of the pair's ``shape``, or a single row."""
    size = math.prod(array.shape[1:])
    for shape in (array.shape[1:], getattr(pair, "shape", ())):
        if len(shape) == 2 and math.prod(shape) == size:
            return tuple(shape)
    return 1, size


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _understood(reader: Reader, kind: str) -> Iterator[dict[str, Any]]:
    """The description of a code of this ``kind``; what does not fit it is damage."""
    found = reader.description
    if found.get("kind") != kind:
        raise ValueError(
            f"{reader.path}: expected a code of kind {kind!r}, got {found.get('kind')!r}: 'contexts' are "
            "decoded without a run, 'pair' with the run that wrote it"
        )
    try:
        yield found
    except (KeyError, TypeError, IndexError, AttributeError, Underflow, Impossible, zlib.error) as error:
        raise reader.damaged(f"{type(error).__name__}: {error}") from error
    except ValueError as error:
        if str(reader.path) in str(error):
            raise
        raise reader.damaged(error) from error


def _to_tensor(rows: np.ndarray, template: Tensor) -> Tensor:
    """Rows as the pair takes them."""
    with np.errstate(invalid="ignore"):
        values = np.ascontiguousarray(rows).astype(template.numpy().dtype)
    return torch.from_numpy(values.reshape(len(rows), *template.shape[1:]))


def _to_array(y: Tensor, like: np.ndarray) -> np.ndarray:
    """Rows as the array holds them."""
    with np.errstate(invalid="ignore"):
        return y.numpy().astype(like.dtype).reshape(len(y), *like.shape[1:])


def _rows(array: np.ndarray) -> list[bytes]:
    return [row.tobytes() for row in array]


def _from_rows(rows: list[bytes], like: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"".join(sorted(rows)), like.dtype).reshape(len(rows), *like.shape[1:])


def _identity(array: np.ndarray, as_set: bool) -> dict[str, Any]:
    """What makes an array the same: dtype, shape, and a checksum of its values. ValueError for NaN."""
    found = hashlib.sha256()
    step = max(1, _PIXELS // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        block = array[start : start + step]
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            row = start + int(np.argwhere(~np.isfinite(block))[0][0])
            raise ValueError(f"y: expected finite numbers, got NaN or infinite ones in datum {row}")
        if not as_set:
            found.update(block.tobytes())
    if as_set:
        found.update(_from_rows(_rows(array), array).tobytes())
    return {
        "dtype": array.dtype.str,
        "shape": array.shape,
        "as_set": as_set,
        "sha256": found.hexdigest(),
    }


def _restore(reader: Reader, blocks: Iterator[np.ndarray], out: str | Path | None) -> np.ndarray | None:
    """The array of its blocks, in memory or in a .npy file; ValueError where its checksum differs."""
    found = reader.description
    header = {"descr": found["dtype"], "fortran_order": False, "shape": tuple(found["shape"])}

    def checked() -> Iterator[np.ndarray]:
        checksum = hashlib.sha256()
        for block in blocks:
            checksum.update(block.tobytes())
            yield block
        if checksum.hexdigest() != found["sha256"]:
            raise ValueError("what it holds has another checksum")

    if out is None:
        array, start = np.empty(found["shape"], found["dtype"]), 0
        for block in checked():
            array[start : start + len(block)] = block
            start += len(block)
        return array
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name, or remove it")
    with files.replacing(out) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in checked():
            file.write(block.tobytes())
    return None

"""The dataset's objects on the local disk, and their lines: plain, gzip or zstd, recognised by their first bytes."""

import codecs
import io
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO

import zstandard

from job.core.errors import DataError
from job.core.visible import one_line
from job.edge.foreign_formats import Packing, foreign
from job.edge.store.lanes import Lanes
from job.edge.store.objects import PART_BYTES, ObjectStore, StoredObject, StoreSettings
from job.edge.store.opening import open_store, store_and_key

_CHUNK_BYTES = 2**20
"""Of a file's content, taken apart into lines at once."""
_PACKED_BYTES = 2**10
"""Of a compressed file, unpacked at once: 4 bytes of zstd give up to 128 KiB, so that these give 32 MiB at most."""
_WINDOW_BYTES = 2**27
"""Longest look back of a zstd frame, which is kept in memory: that of `zstd --ultra -22`."""
_UNPACKED_BYTES, _UNPACKED_TIMES = 2**24, 100
"""A compressed file may unpack to so many bytes, and to so many times its size more. Text shrinks to a tenth; what
shrinks to a thousandth was made to fill a disk."""
_MARK_BYTES = len(codecs.BOM_UTF8)
"""May stand before the first record of a file, and are none of it."""
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""Begins a zstd frame that holds no content; pzstd writes one before each frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFile:
    """One object of the dataset, as it was read."""

    name: str
    """What messages call it."""
    path: Path
    source: StoredObject
    sha256: str


def fetch_files(
    objects: Sequence[StoredObject],
    folder: Path,
    settings: StoreSettings,
    *,
    beside: Sequence[str] = (),
    should_stop: Callable[[], bool],
    on_progress: Callable[[int], None],
) -> list[DataFile]:
    """Bring each object, pinned to its ETag, into the folder.

    Args:
        objects: what `expand` found, or what run.json froze.
        folder: where they go; it belongs to this side of the dataset.
        settings: how the store is spoken to.
        beside: URIs of the dataset's other objects, which messages must distinguish from these.
        should_stop: polled while reading.
        on_progress: called with the bytes that have arrived, of all files together.

    Raises:
        DataError: an object changed since it was listed.
    """
    names = names_of([*(o.uri for o in objects), *beside])
    stores: dict[str, ObjectStore] = {}
    arrived = _Arrived(on_progress)

    def bring(number: int) -> DataFile:
        source = objects[number]
        root, key = store_and_key(source.uri)
        path = folder / f"{number:05d}-{PurePosixPath(key).name}"
        follow = arrived.follow()
        got = stores[root].download(
            key, path, etag=source.etag, should_stop=should_stop, on_progress=lambda part, _all: follow(part)
        )
        follow(got.size)
        return DataFile(name=names[number], path=path, source=source, sha256=got.sha256)

    for source in objects:
        root = store_and_key(source.uri)[0]
        if root not in stores:
            stores[root] = open_store(root, settings)
    # A large file is brought in parallel parts; small ones are brought several at a time.
    small = [number for number, source in enumerate(objects) if source.size <= PART_BYTES]
    with Lanes("reading the data", should_stop) as lanes:
        files = dict(zip(small, lanes.in_order(partial(bring, number) for number in small), strict=True))
    return [files[number] if number in files else bring(number) for number in range(len(objects))]


class _Arrived:
    """Adds up the bytes of files that arrive at the same time."""

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._bytes = 0
        self._lock = threading.Lock()

    def follow(self) -> Callable[[int], None]:
        """For one file: takes how much of it is there."""
        before = 0

        def arrived(part: int) -> None:
            nonlocal before
            with self._lock:
                self._bytes += part - before
                before = part
                self._on_progress(self._bytes)

        return arrived


def breaks_off(parts: Iterable[bytes], packing: Packing, *, size: int) -> str | None:
    """Why a compressed file is not whole, as its end shows; None: it is, or something else is wrong with it.

    What else is wrong is for whoever reads it: that is refused with the line that it begins at.

    Args:
        parts: of the file, in order.
        packing: as its first bytes say.
        size: of the file, in bytes.
    """
    raw = (part[start : start + _PACKED_BYTES] for part in parts for start in range(0, len(part), _PACKED_BYTES))
    left, last = _most_unpacked(size), b"\n"
    try:
        for content in _decompressed(raw, *_UNPACKERS[packing]):
            left, last = left - len(content), content[-1:] or last
            if left < 0:
                return None
    except EOFError:
        return "the compressed file breaks off"
    except (zlib.error, zstandard.ZstdError):
        return None
    return None if last == b"\n" else "what it unpacks to does not end with a line end"


def names_of(uris: Sequence[str]) -> list[str]:
    """What messages call the dataset's files, by their URIs: the last part of each, unless two share it."""
    short = [PurePosixPath(uri).name for uri in uris]
    return [one_line(name) for name in (short if len(set(short)) == len(short) else uris)]


def read_lines(
    files: Iterable[DataFile], *, max_record: int, on_read: Callable[[int], None] = lambda _count: None
) -> Iterator[tuple[str, int, bytes]]:
    """File name, line number (from 1) and bytes of each line, without its end: LF or CRLF, nothing else.

    Args:
        files: one after the other.
        max_record: bytes; of a longer line no more than just beyond them is kept.
        on_read: called with the bytes that were just read of a file.

    Raises:
        DataError: a compressed file is damaged, ends early, or unpacks to far more than its size; or a file holds
            something else than lines.
    """
    for file in files:
        number = 0
        try:
            for number, line in enumerate(_split(_own(file, on_read), max_record), start=1):
                yield file.name, number, line
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise DataError(
                f"{file.name}:{number + 1}: the compressed file is damaged from here on ({error}); write it again"
            ) from error


def _split(chunks: Iterable[bytes], max_record: int) -> Iterator[bytes]:
    """Lines of a stream; one that is too long is cut just beyond the limit, so that its length still shows."""
    rest, skipping = b"", False
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not skipping:
                yield line.removesuffix(b"\r")
            skipping = False
        if len(rest) > max_record + _MARK_BYTES:
            if not skipping:
                yield rest[: max_record + _MARK_BYTES + 1]
            rest, skipping = b"", True
    if rest and not skipping:
        yield rest.removesuffix(b"\r")


def _own(file: DataFile, on_read: Callable[[int], None]) -> Iterator[bytes]:
    """The content in chunks, of a file in our format."""
    packing = _packing(file)
    chunks = _chunks(file, packing, on_read)
    for first in chunks:
        other = foreign(first, file.source.uri, packing)
        if other is not None:
            scheme, _, path = file.source.uri.partition("://")
            here = path if scheme == "file" else PurePosixPath(path).name
            raise DataError(f"{file.name}: {other.message(here)}")
        yield first
        break
    yield from chunks


class _Followed(io.FileIO):
    """A file that says how much was read of it."""

    def __init__(self, path: Path, on_read: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_read = on_read

    def readinto(self, buffer: Any) -> int:
        """As FileIO."""
        count: int = super().readinto(buffer) or 0
        self._on_read(count)
        return count


def _packing(file: DataFile) -> Packing:
    with file.path.open("rb") as stream:
        return packing_of(stream.read(4))


def packing_of(head: bytes) -> Packing:
    """How a file is compressed, by its first four bytes."""
    if head.startswith(_GZIP):
        return "gzip"
    return "zstd" if head.startswith(_ZSTD) or _SKIPPABLE.match(head) else "plain"


def _chunks(file: DataFile, packing: Packing, on_read: Callable[[int], None]) -> Iterator[bytes]:
    with io.BufferedReader(_Followed(file.path, on_read)) as stream:
        if packing == "plain":
            yield from iter(partial(stream.read, _CHUNK_BYTES), b"")
        else:
            yield from _unpacked(stream, *_UNPACKERS[packing], name=file.name)


def _unpacked(stream: BinaryIO, new: Callable[[], Any], padding: bytes, *, name: str) -> Iterator[bytes]:
    """The content of a compressed file in chunks, no more of it than its size allows."""
    size = os.fstat(stream.fileno()).st_size
    left = _most_unpacked(size)
    for content in _decompressed(iter(partial(stream.read, _PACKED_BYTES), b""), new, padding):
        left -= len(content)
        if left < 0:
            raise DataError(
                f"{name}: unpacks to more than {_most_unpacked(size):,} bytes, from {size:,}; "
                "if that is what it shall hold, write it again without compression"
            )
        for start in range(0, len(content), _CHUNK_BYTES):
            yield content[start : start + _CHUNK_BYTES]


def _most_unpacked(size: int) -> int:
    return _UNPACKED_BYTES + _UNPACKED_TIMES * size


def _new_zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()


_UNPACKERS: Mapping[Packing, tuple[Callable[[], Any], bytes]] = MappingProxyType(
    {"gzip": (lambda: zlib.decompressobj(wbits=31), b"\0"), "zstd": (_new_zstd, b"")}
)
"""What unpacks a frame, and what may fill up the file behind the last one."""


def _decompressed(raw: Iterable[bytes], new: Callable[[], Any], padding: bytes) -> Iterator[bytes]:
    """The content of one or more compressed frames in a row, whatever padding stands behind them."""
    frame, any_frame = None, False
    for chunk in raw:
        left = chunk
        while left:
            if frame is None and any_frame:
                left = left.lstrip(padding)  # tapes and block devices fill up with zeros
                if not left:
                    break
            frame, any_frame = frame or new(), True
            yield frame.decompress(left)
            if not frame.eof:
                break
            left, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends in the middle")

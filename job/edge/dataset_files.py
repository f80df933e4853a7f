"""The dataset's objects on the local disk, and their lines: plain, gzip or zstd, recognised by their first bytes."""

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import zstandard

from job.core.errors import DataError
from job.core.records import MAX_LINE_BYTES
from job.edge.store.lanes import Lanes
from job.edge.store.objects import PART_BYTES, ObjectStore, StoredObject, StoreSettings
from job.edge.store.opening import open_store, store_and_key

_CHUNK_BYTES = 2**20
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


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
    names = _names([*(o.uri for o in objects), *beside])
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


def _names(uris: Sequence[str]) -> list[str]:
    """The last part of each URI, unless two share it."""
    short = [PurePosixPath(uri).name for uri in uris]
    return short if len(set(short)) == len(short) else list(uris)


def read_lines(files: Iterable[DataFile]) -> Iterator[tuple[str, int, bytes]]:
    """File name, line number (from 1) and bytes of each line, without its end: LF or CRLF, nothing else.

    Raises:
        DataError: a compressed file is damaged or ends early.
    """
    for file in files:
        number = 0
        try:
            for number, line in enumerate(_split(_chunks(file.path)), start=1):
                yield file.name, number, line
        except (zlib.error, zstandard.ZstdError, EOFError) as error:
            raise DataError(
                f"{file.name}:{number + 1}: the compressed file is damaged from here on ({error}); write it again"
            ) from error


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a stream; one that is too long is cut just beyond the limit, so that its length still shows."""
    rest, skipping = b"", False
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not skipping:
                yield line.removesuffix(b"\r")
            skipping = False
        if len(rest) > MAX_LINE_BYTES:
            if not skipping:
                yield rest[: MAX_LINE_BYTES + 1]
            rest, skipping = b"", True
    if rest and not skipping:
        yield rest.removesuffix(b"\r")


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        head = stream.read(4)
        stream.seek(0)
        raw = iter(lambda: stream.read(_CHUNK_BYTES), b"")
        if head.startswith(_GZIP):
            yield from _decompressed(raw, lambda: zlib.decompressobj(wbits=31))
        elif head == _ZSTD:
            yield from _decompressed(raw, lambda: zstandard.ZstdDecompressor().decompressobj())
        else:
            yield from raw


def _decompressed(raw: Iterable[bytes], new: Callable[[], Any]) -> Iterator[bytes]:
    """The content of one or more compressed frames in a row."""
    frame = None
    for chunk in raw:
        left = chunk
        while left:
            frame = frame or new()
            yield frame.decompress(left)
            if not frame.eof:
                break
            left, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("it ends in the middle")

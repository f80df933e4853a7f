"""Large objects to and from S3: parts in parallel, in bounded memory, hashed in order while they pass."""

import contextlib
import hashlib
import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from job.core.errors import DataError, JobError, NotFoundError
from job.edge.store.lanes import Lanes
from job.edge.store.objects import Downloaded, PreconditionError, StoredObject, Uploaded
from job.edge.store.s3.answers import refuse_without
from job.edge.store.s3.bucket import Bucket, quoted
from job.edge.store.s3.etags import new_md5
from job.edge.store.whole_files import local_trouble, whole_file

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

T = TypeVar("T")
_MOST_PARTS = 10_000
"""S3's own limit; larger files get larger parts."""
_LARGEST_PUT_BYTES = 5 * 1024**3
"""S3's own limit for one request."""
_COPIES = 3
"""So often a copy may differ from what was promised before the object itself is blamed."""
_SILENCE_SECONDS = 300.0
"""A download that trickles this slowly ends as unavailable instead of holding a GPU for ever."""
_SETTLE_SECONDS = 5.0
"""How long parts under way may take to end before a failed upload is aborted: a part that ends later stays behind."""


class _MismatchError(Exception):
    """This copy is not what it should be: fetch it again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Download:
    """One object on its way to a local file."""

    bucket: Bucket
    found: StoredObject
    key: str
    """In the bucket."""
    part_bytes: int
    should_stop: Callable[[], bool]
    on_progress: Callable[[int, int], None] | None

    def to(self, path: Path, *, sha256: str | None) -> Downloaded:
        """Fetch it to `path`; a copy with a wrong hash is fetched again before it counts."""
        for copies_left in reversed(range(_COPIES)):
            with (
                contextlib.suppress(_MismatchError),
                whole_file(path) as file,
                contextlib.closing(self._parts()) as parts,
            ):
                md5 = new_md5()
                for part in parts:
                    file.write(part)
                    if sha256 is None:  # with one there is nothing more to find out
                        md5.update(part)
                    if self.on_progress is not None:
                        self.on_progress(file.size, self.found.size)
                wrong = self._wrong(file.sha256, sha256, md5.hexdigest())
                if wrong and copies_left:
                    raise _MismatchError
                if wrong:
                    raise DataError(
                        f"{self.found.uri}: {wrong}, {_COPIES} times: the object was changed or is damaged; start a "
                        "new run with it, or put the old one back"
                    )
                return Downloaded(size=file.size, sha256=file.sha256, etag=self.found.etag)
        raise AssertionError("unreachable: the last round returns or raises")

    def _wrong(self, sha256: str, expected: str | None, md5: str) -> str | None:
        """What is wrong with a copy."""
        if expected is not None:
            return None if sha256 == expected else f"sha256 is {sha256}, expected {expected}"
        if self.found.md5 is None or not self.bucket.etags.is_wrong(expected=self.found.md5, found=md5):
            return None
        return f"MD5 is {md5}, expected {self.found.md5}"

    def _parts(self) -> Generator[bytearray, None, None]:
        what = f"reading {self.found.uri}"
        with Lanes(what, self.should_stop, silence_seconds=_SILENCE_SECONDS) as lanes:
            offsets = range(0, max(1, self.found.size), self.part_bytes)
            yield from lanes.in_order(partial(self._part, offset, lanes) for offset in offsets)

    def _part(self, offset: int, lanes: Lanes) -> bytearray:
        """One part, pinned to the ETag: parts of two versions never meet in one file."""
        length = min(self.part_bytes, self.found.size - offset)
        # Without a range the store's own checksum covers the answer, and an empty object has no range.
        whole = length == self.found.size
        window = {} if whole else {"Range": f"bytes={offset}-{offset + length - 1}"}

        def fetch() -> tuple[bytearray, str]:
            return self.bucket.get(
                self.key,
                limit=length,
                least=length,
                on_piece=lanes.moved,
                cancelled=lanes.cancelled,
                IfMatch=quoted(self.found.etag),
                **window,
            )

        try:
            data, etag = self.bucket.ask(fetch, key=self.key, cancelled=lanes.cancelled)
        except PreconditionError as error:
            raise changed(self.found.uri) from error
        if etag != self.found.etag or len(data) > length:  # a store that ignores If-Match, or the range
            raise changed(self.found.uri)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One local file on its way to a fresh key."""

    bucket: Bucket
    path: Path
    key: str
    """In the bucket."""
    part_bytes: int
    conditions: Mapping[str, str]
    """IfNoneMatch or IfMatch of the request that makes the object appear."""
    should_stop: Callable[[], bool]

    def run(self) -> Uploaded:
        """Send it: small files in one request, others in parts.

        On a condition it is one request as long as that can be: of parts Ceph RGW 16 forgets every condition, and other
        stores forget If-Match.
        """
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise local_trouble(error, self.path) from error
        pieces = _Pieces(self.path, max(self.part_bytes, math.ceil(size / _MOST_PARTS)))
        if size <= self.part_bytes:
            data = b"".join(pieces)
            with self._lanes() as lanes:
                put = partial(self.bucket.put, self.key, data, **self.conditions)
                lanes.run(partial(self._ask, put, lanes))
        elif self.conditions and size <= _LARGEST_PUT_BYTES:
            self._in_one_request(pieces)
        else:
            self._in_parts(pieces, size)
        if pieces.size != size:
            raise DataError(f"{self.path}: changed while it was sent to {self.bucket.uri(self.key)}; send it again")
        return Uploaded(size=size, sha256=pieces.sha256.hexdigest())

    def _lanes(self) -> Lanes:
        what = f"writing {self.bucket.uri(self.key)}"
        return Lanes(what, self.should_stop, settle_seconds=_SETTLE_SECONDS)

    def _ask(self, call: Callable[[], T], lanes: Lanes) -> T:
        return self.bucket.ask(call, key=self.key, cancelled=lanes.cancelled)

    def _in_one_request(self, pieces: "_Pieces") -> None:
        crc32 = 0
        for piece in pieces:
            crc32 = zlib.crc32(piece, crc32)

        def put() -> None:
            try:
                file = self.path.open("rb")
            except OSError as error:
                raise local_trouble(error, self.path) from error
            with file:
                self.bucket.put_file(self.key, file, crc32=crc32, conditions=self.conditions)

        with self._lanes() as lanes:
            lanes.run(partial(self._ask, put, lanes))

    def _in_parts(self, pieces: "_Pieces", size: int) -> None:
        upload_id = self.bucket.ask(self._begin, key=self.key)
        try:
            with self._lanes() as lanes:
                parts = [*lanes.in_order(self._senders(pieces, upload_id, lanes))]
                lanes.run(partial(self._complete, upload_id, parts, size, lanes))
        except BaseException:
            # Parts that are never completed are paid for, invisibly. A store that is away keeps them: its lifecycle
            # rule for incomplete uploads has to remove them then, and the first error is the one to raise.
            with contextlib.suppress(JobError):
                self.bucket.ask(partial(self.bucket.abort, self.key, upload_id), key=self.key)
            raise

    def _senders(
        self, pieces: Iterable[bytes], upload_id: str, lanes: Lanes
    ) -> Iterator[Callable[[], "CompletedPartTypeDef"]]:
        for number, data in enumerate(pieces, start=1):
            yield partial(self._ask, partial(self._send, upload_id, number, data), lanes)

    def _begin(self) -> str:
        extra = {**self.bucket.encryption}
        if self.bucket.checksums:
            extra["ChecksumAlgorithm"] = "CRC32"
        answer = self.bucket.client.create_multipart_upload(Bucket=self.bucket.name, Key=self.key, **extra)
        refuse_without(answer, "UploadId")
        return answer["UploadId"]

    def _send(self, upload_id: str, number: int, data: bytes) -> "CompletedPartTypeDef":
        answer = self.bucket.client.upload_part(
            Bucket=self.bucket.name,
            Key=self.key,
            UploadId=upload_id,
            PartNumber=number,
            Body=data,
            **self.bucket.checksum(zlib.crc32(data)),
        )
        refuse_without(answer, "ETag")
        part: CompletedPartTypeDef = {"PartNumber": number, "ETag": answer["ETag"]}
        if "ChecksumCRC32" in answer:
            part["ChecksumCRC32"] = answer["ChecksumCRC32"]
        return part

    def _complete(self, upload_id: str, parts: list["CompletedPartTypeDef"], size: int, lanes: Lanes) -> None:
        tries = 0

        def complete() -> None:
            nonlocal tries
            tries += 1
            self.bucket.client.complete_multipart_upload(
                Bucket=self.bucket.name,
                Key=self.key,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
                **self.conditions,  # type: ignore[arg-type] # the stubs type each condition by itself
            )

        try:
            self._ask(complete, lanes)
        except NotFoundError:
            # The upload is gone because an earlier attempt completed it and its answer was lost: nobody else writes
            # this key.
            if tries == 1 or self._ask(partial(self.bucket.head, self.key), lanes)["ContentLength"] != size:
                raise


class _Pieces:
    """A file read once, front to back, with its size and sha256 so far."""

    def __init__(self, path: Path, piece_bytes: int) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._path = path
        self._piece_bytes = piece_bytes

    def __iter__(self) -> Iterator[bytes]:
        try:
            with self._path.open("rb") as file:
                while piece := file.read(self._piece_bytes):
                    self.sha256.update(piece)
                    self.size += len(piece)
                    yield piece
        except OSError as error:
            raise local_trouble(error, self._path) from error


def changed(uri: str, how: str = "another ETag came with a later part") -> DataError:
    """The object is no longer the one that was found first."""
    return DataError(f"{uri}: the object changed while it was being read ({how}); start again when nobody writes it")

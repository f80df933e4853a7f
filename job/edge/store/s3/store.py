"""A prefix of an S3 bucket as a store: listing, small conditional writes, and the door to large transfers."""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.parsers import ResponseParserError

from job.core.errors import DataError, NotFoundError
from job.edge.store.lanes import Lanes
from job.edge.store.objects import (
    CONTROL_BYTES,
    PART_BYTES,
    Downloaded,
    Entry,
    PreconditionError,
    StoredObject,
    StoreSettings,
    Uploaded,
    check_key,
)
from job.edge.store.patience import Patience
from job.edge.store.s3.answers import refuse_without
from job.edge.store.s3.bucket import Bucket, bare, quoted
from job.edge.store.s3.errors import key_refused
from job.edge.store.s3.etags import content_md5
from job.edge.store.s3.transfer import Download, Upload, changed

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef, ObjectIdentifierTypeDef

_BATCH_KEYS = 1000
"""Keys in one DeleteObjects request: S3's own limit."""


class S3Store:
    """An ObjectStore below s3://bucket/prefix."""

    def __init__(
        self, bucket: str, prefix: str, settings: StoreSettings, *, patience: Patience, part_bytes: int = PART_BYTES
    ) -> None:
        self._bucket = Bucket(bucket, settings, patience)
        self._prefix = f"{prefix}/" if prefix else ""
        self._part_bytes = part_bytes

    @property
    def uri(self) -> str:
        """The root, as s3://bucket/prefix."""
        return self._bucket.uri(self._prefix).rstrip("/")

    def list(self, prefix: str = "", *, without: str | None = None) -> Iterator[Entry]:
        """Every object whose key begins with `prefix`, sorted; markers of empty folders are left out."""
        start, left_out = self._prefix + prefix, f"/{without}/"
        where: dict[str, str] = {}
        while True:
            page = self._bucket.ask(partial(self._page, start, where), key=start)
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                if not key.endswith("/") and (without is None or left_out not in f"/{key}"):
                    yield Entry(key=key, size=found["Size"], modified=found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            where = {"ContinuationToken": page["NextContinuationToken"]}
            last = page["Contents"][-1]["Key"] if page.get("Contents") else ""
            above, within, _ = f"/{last.removeprefix(self._prefix)}".partition(left_out)
            if within and without is not None:  # the rest of it is not asked for: "0" comes right after "/"
                where = {"StartAfter": f"{self._prefix}{above[1:]}{'/' if above else ''}{without}0"}

    def folders(self, prefix: str = "") -> Iterator[str]:
        """The names of the folders that begin with `prefix`: pages of their names, not of what is in them."""
        start = self._prefix + prefix
        where = {"Delimiter": "/"}
        while True:
            page = self._bucket.ask(partial(self._page, start, where), key=start)
            for found in page.get("CommonPrefixes", []):
                yield found["Prefix"].removeprefix(self._prefix).removesuffix("/").rpartition("/")[2]
            if not page.get("IsTruncated"):
                return
            where |= {"ContinuationToken": page["NextContinuationToken"]}

    def stat(self, key: str, *, cancelled: threading.Event | None = None) -> StoredObject:
        """Size, ETag and version of one object."""
        name = self._name(key)
        found = self._bucket.ask(partial(self._bucket.head, name), key=name, cancelled=cancelled)
        version = found.get("VersionId")
        return StoredObject(
            uri=self._bucket.uri(name),
            key=key,
            size=found["ContentLength"],
            etag=bare(found["ETag"]),
            version=None if version == "null" else version,
            md5=content_md5(found),
        )

    def read(self, key: str, *, max_bytes: int = CONTROL_BYTES) -> tuple[bytes, str]:
        """The content of a small object, and its ETag."""
        name = self._name(key)
        data, etag = self._bucket.ask(partial(self._bucket.get, name, limit=max_bytes), key=name)
        if len(data) > max_bytes:
            raise DataError(
                f"{self._bucket.uri(name)}: larger than the {max_bytes:,} bytes expected of it, so not of this job"
            )
        return bytes(data), etag

    def read_part(self, key: str, *, start: int, length: int, etag: str) -> bytes:
        """A piece of an object, pinned to its ETag."""
        name = self._name(key)
        get = partial(
            self._bucket.get,
            name,
            limit=length,
            least=length,
            Range=f"bytes={start}-{start + length - 1}",
            IfMatch=quoted(etag),
        )
        try:
            data, found = self._bucket.ask(get, key=name)
        except PreconditionError as error:
            raise changed(self._bucket.uri(name)) from error
        if found != etag or len(data) > length:  # a store that ignores If-Match, or the range
            raise changed(self._bucket.uri(name))
        return bytes(data)

    def write(self, key: str, data: bytes, *, create_only: bool = False, if_match: str | None = None) -> str:
        """Write a small object whole, on a condition if asked."""
        name = self._name(key)
        if create_only:
            return self._put(name, data, IfNoneMatch="*")
        if if_match is None:
            return self._put(name, data)
        try:
            return self._put(name, data, IfMatch=quoted(if_match))
        except PreconditionError:
            # Ceph RGW 16 compares the header with its ETag letter by letter, and keeps ETags without quotes.
            if self._etag(key) != if_match:
                raise
            return self._put(name, data, IfMatch=if_match)

    def download(
        self,
        key: str,
        path: Path,
        *,
        etag: str | None = None,
        sha256: str | None = None,
        should_stop: Callable[[], bool],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Downloaded:
        """Fetch one object to `path`, pinned to its ETag."""
        with Lanes(f"looking for {self._bucket.uri(self._name(key))}", should_stop) as lanes:
            found = lanes.run(partial(self.stat, key, cancelled=lanes.cancelled))
        if etag is not None and etag != found.etag:
            raise changed(found.uri, f"its ETag is {found.etag}, expected {etag}")
        download = Download(
            bucket=self._bucket,
            found=found,
            key=self._name(key),
            part_bytes=self._part_bytes,
            should_stop=should_stop,
            on_progress=on_progress,
        )
        return download.to(path, sha256=sha256)

    def upload(
        self,
        path: Path,
        key: str,
        *,
        create_only: bool = False,
        if_match: str | None = None,
        should_stop: Callable[[], bool],
    ) -> Uploaded:
        """Send one file, in parts where it is large and nothing is asked of the object that it replaces."""

        def send(**conditions: str) -> Uploaded:
            upload = Upload(
                bucket=self._bucket,
                path=path,
                key=self._name(key),
                part_bytes=self._part_bytes,
                conditions=conditions,
                should_stop=should_stop,
            )
            return upload.run()

        if create_only:
            return send(IfNoneMatch="*")
        if if_match is None:
            return send()
        try:
            return send(IfMatch=quoted(if_match))
        except PreconditionError:
            if self._etag(key) != if_match:
                raise
            return send(IfMatch=if_match)  # as in `write`

    def clear_unfinished(self, prefix: str) -> int:
        """Abort the multipart uploads below a prefix: their parts are paid for, and no listing shows them."""
        start = self._prefix + prefix
        found = self._bucket.ask(partial(self._unfinished, start), key=start)
        for name, upload_id in found:
            with contextlib.suppress(NotFoundError):
                self._bucket.ask(partial(self._bucket.abort, name, upload_id), key=name)
        return len(found)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, a thousand with each request."""
        names = (self._name(key) for key in keys)
        while batch := [*islice(names, _BATCH_KEYS)]:
            self._bucket.ask(partial(self._delete, batch), key=batch[0])

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _page(self, start: str, where: Mapping[str, str]) -> "ListObjectsV2OutputTypeDef":
        """One page of a listing; `where` are ListObjectsV2's own parameters."""
        try:
            page = self._bucket.client.list_objects_v2(Bucket=self._bucket.name, Prefix=start, **where)  # type: ignore[arg-type] # the stubs type each one by itself
        except (KeyError, ValueError) as error:  # botocore's parser: no key; a size or a date that is none
            raise ResponseParserError(f"a list that cannot be read ({error})") from error
        refuse_without(page, "IsTruncated", *(["NextContinuationToken"] if page.get("IsTruncated") else []))
        for found in page.get("Contents", []):
            refuse_without(found, "Key", "Size", "ETag", "LastModified")
            if found["Key"] <= where.get("StartAfter", ""):
                raise ResponseParserError("a list that does not begin where it was asked to")
        for folder in page.get("CommonPrefixes", []):
            refuse_without(folder, "Prefix")
        return page

    def _unfinished(self, start: str) -> Sequence[tuple[str, str]]:
        """Key and id of each unfinished upload; a thousand in one page are more than a run can leave."""
        answer = self._bucket.client.list_multipart_uploads(Bucket=self._bucket.name, Prefix=start)
        # Some stores take the prefix for an exact key or leave it out: what is not ours is not touched.
        return [(u["Key"], u["UploadId"]) for u in answer.get("Uploads", []) if u["Key"].startswith(start)]

    def _put(self, name: str, data: bytes, **conditions: str) -> str:
        tries = 0

        def put() -> str:
            nonlocal tries
            tries += 1
            return self._bucket.put(name, data, **conditions)

        try:
            return self._bucket.ask(put, key=name)
        except PreconditionError:
            # The answer to an earlier attempt was lost: what now stands in the way may be our own bytes.
            if tries > 1:
                found, etag = self._read_back(name, len(data))
                if found == data:
                    return etag
            raise

    def _read_back(self, name: str, size: int) -> tuple[bytes | None, str]:
        try:
            found, etag = self._bucket.ask(partial(self._bucket.get, name, limit=size), key=name)
        except NotFoundError:
            return None, ""
        return bytes(found), etag

    def _etag(self, key: str) -> str | None:
        try:
            return self.stat(key).etag
        except NotFoundError:
            return None

    def _delete(self, names: Sequence[str]) -> None:
        """One batch in one attempt; a refusal of a single key becomes the failure of the request."""
        objects: Sequence[ObjectIdentifierTypeDef] = [{"Key": name} for name in names]
        answer = self._bucket.client.delete_objects(
            Bucket=self._bucket.name, Delete={"Objects": objects, "Quiet": True}
        )
        for refused in answer.get("Errors", []):
            if refused.get("Code") != "NoSuchKey":
                raise key_refused(refused.get("Code", ""), f"{refused.get('Key')}: {refused.get('Message')}")

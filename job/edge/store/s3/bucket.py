"""One bucket through one shared client: settings, single requests, and the only place that retries them."""

import base64
import itertools
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ChecksumError, ClientError, HTTPClientError, IncompleteReadError
from botocore.parsers import ResponseParserError

from job.core.errors import DataError, DeniedError, JobError, StopRequestedError, UnavailableError, UsageError
from job.edge.store.objects import PARALLEL, PreconditionError, StoreSettings
from job.edge.store.patience import Patience
from job.edge.store.s3.answers import bound_answers, follow_no_endless_redirects, refuse_without
from job.edge.store.s3.errors import (
    S3_FAILURES,
    is_about_clocks,
    is_about_content,
    is_about_credentials,
    is_expired,
    is_passing,
    status_and_code,
    summary,
    understood,
)
from job.edge.store.s3.etags import Etags, content_md5, new_md5

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

T = TypeVar("T")
_CONNECT_SECONDS = 5.0
"""Nothing that is up takes longer to accept a connection."""
_READ_SECONDS = 20.0
"""Without a byte for so long the request is dead; botocore's 60 s would eat the whole grace period of a stop."""
_LONGEST_TRY_SECONDS = 60.0
"""More than this is not counted for one request: connecting and each silence have their own limits, above."""
_PIECE_BYTES = 256 * 1024
"""Read at once from an answer: between two pieces a cancelled transfer ends."""


class Bucket:
    """A bucket; `ask` wraps every request."""

    def __init__(self, name: str, settings: StoreSettings, patience: Patience) -> None:
        self.name = name
        self._settings = settings
        self._renewing = threading.Lock()
        self.client = _client(settings)
        """Look at it for each request: it is another one once the credentials had to be renewed."""
        self.endpoint: str = self.client.meta.endpoint_url
        if "@" in urlsplit(self.endpoint).netloc:
            raise UsageError(  # it is not repeated
                "AWS_ENDPOINT_URL: credentials do not belong into an endpoint; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        mode = self.client.meta.config.request_checksum_calculation  # type: ignore[attr-defined] # missing in the stubs
        self.checksums: bool = mode == "when_supported"
        self.encryption: dict[str, Any] = {}
        if settings.sse_kms_key is not None:
            self.encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": settings.sse_kms_key}
        self.etags = Etags()
        self._patience = patience

    def uri(self, key: str) -> str:
        """The object's name for messages and manifests."""
        return f"s3://{self.name}/{key}"

    def ask(self, call: Callable[[], T], *, key: str, cancelled: threading.Event | None = None) -> T:
        """The result of a request, sent again while its failure may pass; every failure comes out as one of ours."""
        cancelled, seconds = cancelled or threading.Event(), 0.0
        for attempt in itertools.count(1):
            client, began = self.client, time.monotonic()
            try:
                return call()
            except S3_FAILURES as error:
                # A process that was frozen in a request has not waited for the store meanwhile.
                seconds += min(time.monotonic() - began, _LONGEST_TRY_SECONDS)
                pause = self._patience.pause_seconds(attempt)
                if not is_passing(error):
                    raise understood(error, uri=self.uri(key), endpoint=self.endpoint) from error
                if attempt == self._patience.attempts or seconds + pause > self._patience.budget_seconds:
                    raise self._given_up(error, key, f"failed {attempt} times in {seconds:.0f} s") from error
                if cancelled.wait(pause):
                    raise StopRequestedError(f"{self.uri(key)}: the transfer was cancelled") from error
                seconds += pause
                if is_expired(error):
                    self._renew_credentials(client)
        raise AssertionError("unreachable: the loop has no end")

    def _given_up(self, error: Exception, key: str, how: str) -> JobError | PreconditionError:
        """Our error for a failure that asking again did not heal."""
        if is_expired(error) or is_about_credentials(error) or is_about_clocks(error):
            return understood(error, uri=self.uri(key), endpoint=self.endpoint)
        if is_about_content(error):
            return DataError(f"{self.uri(key)}: came damaged each time ({summary(error)})")
        return UnavailableError(
            f"{self.uri(key)}: {self.endpoint} {how}, at last with {summary(error)}; look at the endpoint, the network "
            "and the proxy, then start the same job again"
        )

    def _renew_credentials(self, old: "S3Client") -> None:
        """Go through the chain anew: boto3 renews a role's credentials by itself, but reads a file only once."""
        with self._renewing:
            if self.client is old:
                self.client = _client(self._settings)

    def head(self, key: str) -> "HeadObjectOutputTypeDef":
        """Size and ETag of an object."""
        try:
            found = self.client.head_object(Bucket=self.name, Key=key)
        except ClientError as error:
            status = status_and_code(error)[0]
            if status not in {400, 403}:
                raise
            # An answer to HEAD has no body: only a GET says whether it is the token, the clock, the key or a policy.
            try:
                self.client.get_object(Bucket=self.name, Key=key, Range="bytes=0-0")["Body"].close()
            except ClientError as reason:
                if status_and_code(reason)[0] not in {404, 416}:
                    raise reason from error
            if status == 400:  # noqa: PLR2004 - HTTP's own number
                raise HTTPClientError(error=error) from error  # it has passed: with a GET all is well
            raise
        refuse_without(found, "ContentLength", "ETag")
        return found

    def get(
        self,
        key: str,
        *,
        limit: int,
        least: int = 0,
        on_piece: Callable[[], None] = lambda: None,
        cancelled: threading.Event | None = None,
        **conditions: str,
    ) -> tuple[bytearray, str]:
        """From `least` to `limit` + 1 bytes of an object and its ETag, in one attempt, on GetObject's `conditions`."""
        answer = self.client.get_object(Bucket=self.name, Key=key, **conditions)  # type: ignore[arg-type] # the stubs type each condition by itself
        refuse_without(answer, "ContentLength", "ETag")
        data, body = bytearray(), answer["Body"]
        try:
            while piece := body.read(min(_PIECE_BYTES, limit + 1 - len(data))):
                data += piece
                on_piece()
                if len(data) > limit or (cancelled is not None and cancelled.is_set()):
                    break
        finally:
            if len(data) != answer["ContentLength"]:
                body.close()  # the connection still carries the rest: it cannot be used again
        if len(data) < least and not (cancelled is not None and cancelled.is_set()):
            raise IncompleteReadError(actual_bytes=len(data), expected_bytes=least)
        if len(data) == answer["ContentLength"] and "Range" not in conditions:
            self._refuse_wrong(data, content_md5(answer))
        return data, bare(answer["ETag"])

    def _refuse_wrong(self, data: bytearray, expected: str | None) -> None:
        if expected is not None:
            md5 = new_md5()
            md5.update(data)
            if self.etags.is_wrong(expected=expected, found=md5.hexdigest()):
                raise ChecksumError(checksum_type="MD5", expected_checksum=expected, actual_checksum=md5.hexdigest())

    def put(self, key: str, data: bytes, **conditions: str) -> str:
        """Write an object in one attempt and return its ETag; `conditions` are PutObject's own."""
        return self._put(key, data, zlib.crc32(data), conditions)

    def put_file(self, key: str, file: BinaryIO, *, crc32: int, conditions: Mapping[str, str]) -> str:
        """As `put`, piece by piece; the file's CRC32 is given, for it stands before the first of them."""
        return self._put(key, file, crc32, conditions)

    def _put(self, key: str, body: bytes | BinaryIO, crc32: int, conditions: Mapping[str, Any]) -> str:
        extra = {**self.encryption, **self.checksum(crc32), **conditions}
        answer = self.client.put_object(Bucket=self.name, Key=key, Body=body, **extra)
        # Swift gives none to the older of two writes at once: what stands there is already the other's.
        return bare(answer.get("ETag") or self.head(key)["ETag"])

    def abort(self, key: str, upload_id: str) -> None:
        """Give up a multipart upload, in one attempt."""
        self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)

    def checksum(self, crc32: int) -> dict[str, Any]:
        """The CRC32 as a header of the request.

        Left to itself boto3 sends it over https as a trailer, which many stores (Ceph RGW 16 with 411) refuse.
        """
        if not self.checksums:
            return {}
        return {"ChecksumCRC32": base64.b64encode(crc32.to_bytes(4, "big")).decode()}


def bare(etag: str) -> str:
    """An ETag without its quotes."""
    return etag.strip('"')


def quoted(etag: str) -> str:
    """An ETag as HTTP writes it."""
    return f'"{etag}"'


def credentials_source() -> str:
    """Where boto3's default chain finds credentials, by the chain's own name for it.

    Raises:
        DeniedError: nowhere.
    """
    bound_answers()
    try:
        found = boto3.session.Session().get_credentials()
    except ResponseParserError as error:
        raise _strange_source(error) from error
    if found is None:
        raise DeniedError(
            "no AWS credentials: the default chain (environment, profile, role) finds none; "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give the job a role"
        )
    return str(found.method)


def _strange_source(error: ResponseParserError) -> UnavailableError:
    return UnavailableError(
        f"AWS credentials: what gives them (STS, or this node's metadata) sent {summary(error)}; look at it, then "
        "start the same job again"
    )


def _client(settings: StoreSettings) -> "S3Client":
    """A client on boto3's own chains: credentials that refresh, endpoint, region, path style, certificates, proxies.

    With an endpoint of one's own boto3 addresses buckets by path, unless the AWS configuration says `virtual`.
    """
    checksums: dict[str, Any] = {}
    if not settings.checksums:
        checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=2 * PARALLEL,  # a background upload beside a download, and the lock's heartbeat
        tcp_keepalive=True,
        user_agent_extra="qlora-job",
        **checksums,
    )
    bound_answers()
    try:
        client = boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"S3 client: {summary(error)}; correct the AWS settings") from error
    except ResponseParserError as error:
        raise _strange_source(error) from error
    follow_no_endless_redirects(client)
    return client

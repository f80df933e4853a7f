"""What a failed S3 request means: try it again, or which error of ours it is. botocore's types end here."""

import time
from email.utils import parsedate_to_datetime

from botocore.exceptions import (
    BotoCoreError,
    ChecksumError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    LoginError,
    MetadataRetrievalError,
    NoAuthTokenError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
    SSOError,
    TokenRetrievalError,
)
from botocore.exceptions import ConnectionError as NoConnectionError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from job.core.errors import DeniedError, JobError, LocalDiskError, NotFoundError, SickDeviceError, UsageError
from job.edge.store.objects import PreconditionError

S3_FAILURES = (ClientError, BotoCoreError, ResponseParserError, HTTPError)
"""Everything that a request, or reading its answer, raises."""
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    MetadataRetrievalError,
    NoAuthTokenError,
    TokenRetrievalError,
    SSOError,
    LoginError,
)
_PASSING = (
    NoConnectionError,
    HTTPClientError,
    HTTPError,
    IncompleteReadError,
    ResponseParserError,  # half an answer, or a proxy's page instead of one
    ChecksumError,
    FlexibleChecksumError,
    # The service that hands out credentials is away; when it stays away that becomes a DeniedError.
    CredentialRetrievalError,
    MetadataRetrievalError,
)
_BUSY_STATUSES = {408, 425, 429, 500, 502, 503, 504, 509}
_NO_ROOM_STATUS = 507
_NO_ROOM_CODES = {"InsufficientStorage", "QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull"}
"""Of Ceph, Swift and MinIO; AWS has no such thing."""
_LONGEST_MESSAGE = 300
_BUSY_CODES = {
    "BandwidthLimitExceeded",
    "IDPCommunicationError",
    "InternalError",
    "InternalFailure",
    "PriorRequestNotComplete",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    # The body was damaged on its way: sent again it may arrive whole.
    "BadDigest",
    "IncompleteBody",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
    # Two conditional writes at once: one of them has to try again.
    "ConditionalRequestConflict",
    "OperationAborted",
}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
_CLOCK_CODES = {"RequestExpired", "RequestTimeTooSkewed"}
_REDIRECTS = {301, 302, 307, 308}
_DENIED_HINTS = {
    "ExpiredToken": "the session token has expired: renew the credentials",
    "ExpiredTokenException": "the session token has expired: renew the credentials",
    "InvalidAccessKeyId": "the store does not know this access key: correct AWS_ACCESS_KEY_ID or AWS_ENDPOINT_URL",
    "InvalidToken": "the session token is not valid: renew the credentials",
    "KMS.DisabledException": "the encryption key is disabled: enable it, or correct store.sse_kms_key",
    "KMS.NotFoundException": "the encryption key does not exist: correct store.sse_kms_key",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: correct AWS_SECRET_ACCESS_KEY",
    "TokenRefreshRequired": "the session token has expired: renew the credentials",
}
_DENIED_HINT = "allow it for these credentials (a store may also answer so for a key or bucket that does not exist)"
_WRONG_REGION = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, ClientError):
        status, code = status_and_code(error)
        if code in _BUSY_CODES | _EXPIRED_CODES | _CLOCK_CODES or _is_redirect_to_nowhere(error):
            return True
        return code not in _NO_ROOM_CODES and status in _BUSY_STATUSES and code != "NotImplemented"
    return isinstance(error, _PASSING) and not _is_certificate(error)


def is_about_credentials(error: Exception) -> bool:
    """Whether no usable credentials were found, so that no request was sent."""
    return isinstance(error, _NO_CREDENTIALS)


def is_about_content(error: Exception) -> bool:
    """Whether the bytes that came are not those that the store has a checksum of."""
    return isinstance(error, ChecksumError | FlexibleChecksumError)


def is_about_clocks(error: Exception) -> bool:
    """Whether the store's clock and this machine's are too far apart; what sets clocks may be at it."""
    return isinstance(error, ClientError) and status_and_code(error)[1] in _CLOCK_CODES


def is_expired(error: Exception) -> bool:
    """Whether the store calls the credentials expired; whoever hands them out may have newer ones."""
    return isinstance(error, ClientError) and status_and_code(error)[1] in _EXPIRED_CODES


def understood(error: Exception, *, uri: str, endpoint: str) -> JobError | PreconditionError:
    """Our error for a failure that trying again does not heal."""
    if isinstance(error, ClientError):
        return _refusal(error, uri, endpoint)
    if is_about_credentials(error):
        return DeniedError(
            f"{uri}: no usable credentials ({summary(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE, or give this machine or pod a role"
        )
    if _is_certificate(error):
        return UsageError(
            f"{uri}: the certificate of {endpoint} is not trusted ({summary(error)}); "
            "name the file of its authority in AWS_CA_BUNDLE"
        )
    return UsageError(f"{uri}: {summary(error)}; correct the AWS settings")


def _refusal(error: ClientError, uri: str, endpoint: str) -> JobError | PreconditionError:  # noqa: PLR0911 - a table
    status, code = status_and_code(error)
    refusal = f"{uri}: {endpoint} answered {summary(error)}"
    if status in {412, 416}:
        return PreconditionError(refusal)
    if status == _NO_ROOM_STATUS or code in _NO_ROOM_CODES:
        advice = "raise the store's quota, or delete what is not needed there"
        return LocalDiskError(f"{refusal}: the store has no room; {advice}", action=advice)
    if code in _CLOCK_CODES:
        return SickDeviceError(
            f"{refusal}: this machine's clock is {_clock_difference(error)}; set it, or use another machine"
        )
    if status in {401, 403} or code in _DENIED_HINTS or code.startswith("KMS."):
        return DeniedError(f"{refusal}; {_DENIED_HINTS.get(code, _DENIED_HINT)}")
    if status == 404:  # noqa: PLR2004 - HTTP's own number
        if error.operation_name == "PutObject" and code != "NoSuchBucket":
            return PreconditionError(refusal)  # If-Match on a key that does not exist
        return NotFoundError(f"{refusal}; correct the URI")
    if code in _WRONG_REGION or status in _REDIRECTS:
        return UsageError(f"{refusal}; set AWS_REGION to the bucket's region")
    if status in {411, 501}:
        return UsageError(f"{refusal}; if the store cannot take checksums, set store.checksums: false")
    return UsageError(f"{refusal}; correct the URI or the AWS settings")


def key_refused(code: str, message: str) -> ClientError:
    """The failure of one key in a batch, which S3 reports inside an answer of 200, as the request's own."""
    status = 403 if code == "AccessDenied" else 400
    refusal = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(refusal, "DeleteObjects")  # type: ignore[arg-type] # the stubs want every header of an answer


def status_and_code(error: ClientError) -> tuple[int, str]:
    """The HTTP status and the store's own code for the failure ("404" and so on when the answer had no body)."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, str(error.response.get("Error", {}).get("Code", ""))


def summary(error: Exception) -> str:
    """One line about a failure, for the operator."""
    if isinstance(error, ClientError):
        status, code = status_and_code(error)
        message = " ".join(str(error.response.get("Error", {}).get("Message") or "").split())[:_LONGEST_MESSAGE]
        parts = [str(status), code if code != str(status) else "", f"({message})" if message else ""]
        said = " ".join([*filter(None, parts), "to", error.operation_name])
        return f"{said}: a redirect that names no region" if _is_redirect_to_nowhere(error) else said
    return (str(error).splitlines() or [type(error).__name__])[0][:_LONGEST_MESSAGE]


def _is_redirect_to_nowhere(error: ClientError) -> bool:
    """Whether the store sends us on and does not say to which region: a new bucket, a proxy, no S3 store at all."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    named = "x-amz-bucket-region" in headers or "Region" in error.response.get("Error", {})
    return status_and_code(error)[0] in _REDIRECTS and not named


def _clock_difference(error: ClientError) -> str:
    """How far this machine's clock is from the store's, which stands in each of its answers."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    try:
        theirs = parsedate_to_datetime(str(headers.get("date"))).timestamp()
    except ValueError:
        return "not the store's"
    ahead = round(time.time() - theirs)
    return f"{abs(ahead):,} s {'ahead of' if ahead > 0 else 'behind'} the store's"


def _is_certificate(error: Exception) -> bool:
    return isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error)

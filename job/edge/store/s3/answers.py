"""What is taken from an answer to an AWS request: so many bytes of it, no redirect in a circle, no gaps."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from botocore.httpsession import URLLib3Session
from botocore.parsers import ResponseParserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ERROR_BYTES = 64 * 1024
"""Of the body of a refusal, which is half a kilobyte of XML. One that is cut is told by its HTTP status."""
ANSWER_BYTES = 32 * 1024 * 1024
"""Of any other body that is no object's content: a thousand keys of the longest kind, escaped, are ten megabytes."""
_REFUSAL = 300
"""The HTTP status from which on a body is not what was asked for."""
_send = URLLib3Session.send


def bound_answers() -> None:
    """Have botocore take no more than that; the content of objects is read piece by piece, by who asked for it.

    Not of S3 alone: a role's credentials come from STS or a node's metadata, by sessions that botocore makes itself.
    """
    URLLib3Session.send = _bounded_send  # type: ignore[assignment,method-assign] # botocore has no door to them


def _bounded_send(session: Any, request: Any) -> Any:
    is_content, request.stream_output = request.stream_output, True
    answer: Any = _send(session, request)
    if answer.status_code >= _REFUSAL:
        answer._content = _first_bytes(answer.raw, ERROR_BYTES)  # noqa: SLF001 - where `content` keeps it
    elif not is_content:
        answer._content = _first_bytes(answer.raw, ANSWER_BYTES + 1)  # noqa: SLF001 - same
        if len(answer._content) > ANSWER_BYTES:  # noqa: SLF001 - same
            raise ResponseParserError(f"an answer of more than {ANSWER_BYTES:,} bytes")
    return answer


def follow_no_endless_redirects(client: "S3Client") -> None:
    """Have a client ask for a bucket's region once where it is redirected: botocore asks, is redirected, asks, ..."""

    def mark_as_redirected(context: dict[str, Any], **_: object) -> None:
        context.setdefault("s3_redirect", {})["redirected"] = True

    client.meta.events.register("before-call.s3.HeadBucket", mark_as_redirected)


def refuse_without(answer: Mapping[str, Any], *fields: str) -> None:
    """See that an answer says what every S3 store says.

    Raises:
        ResponseParserError: it does not.
    """
    missing = [field for field in fields if answer.get(field) is None]
    if missing:
        raise ResponseParserError(f"an answer without {' and '.join(missing)}, as no S3 store gives it")


def _first_bytes(body: Any, most: int) -> bytes:
    data = bytearray()
    for piece in body.stream():
        data += piece
        if len(data) >= most:
            body.close()  # the connection still carries the rest: it cannot be used again
            break
    return bytes(data[:most])

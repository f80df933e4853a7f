"""How much of an answer to an S3 request is taken into memory: botocore would read any body to its end."""

from typing import TYPE_CHECKING, Any

from botocore.parsers import ResponseParserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ERROR_BYTES = 64 * 1024
"""Of the body of a refusal, which is half a kilobyte of XML. One that is cut is told by its HTTP status."""
ANSWER_BYTES = 32 * 1024 * 1024
"""Of any other body that is no object's content: a thousand keys of the longest kind, escaped, are ten megabytes."""
_REFUSAL = 300
"""The HTTP status from which on a body is not what was asked for."""


def bound_answers(client: "S3Client") -> None:
    """Have a client take no more than that; the content of objects is read piece by piece, by who asked for it."""
    session = client._endpoint.http_session  # type: ignore[attr-defined] # noqa: SLF001 - botocore has no door to it
    send = session.send

    def bounded_send(request: Any) -> Any:
        is_content, request.stream_output = request.stream_output, True
        answer = send(request)
        if answer.status_code >= _REFUSAL:
            answer._content = _first_bytes(answer.raw, ERROR_BYTES)  # noqa: SLF001 - where `content` keeps it
        elif not is_content:
            answer._content = _first_bytes(answer.raw, ANSWER_BYTES + 1)  # noqa: SLF001 - same
            if len(answer._content) > ANSWER_BYTES:  # noqa: SLF001 - same
                raise ResponseParserError(f"an answer of more than {ANSWER_BYTES:,} bytes")
        return answer

    session.send = bounded_send


def _first_bytes(body: Any, most: int) -> bytes:
    data = bytearray()
    for piece in body.stream():
        data += piece
        if len(data) >= most:
            body.close()  # the connection still carries the rest: it cannot be used again
            break
    return bytes(data[:most])

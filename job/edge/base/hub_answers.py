"""What an answer of the hub means: may another try help, is it the disk, how much of it is taken into memory."""

import errno
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG})
_REFUSAL_BYTES = 64 * 1024
_ANSWER_BYTES = 32 * 1024 * 1024
"""Of an answer of the hub's API, unpacked: a list of a hundred thousand files."""


class TryLaterError(Exception):
    """The hub answered 429 or 5xx; raised before the library sleeps on it, where no stop request would be seen.

    Or it refused with a body that is no sentence, which the library would read to its end: the headers say all.
    """

    def __init__(self, response: Any) -> None:
        super().__init__(f"the hub answered {response.status_code}")
        self.response = response


def is_large(response: Any) -> bool:
    """Whether an answer's body is larger than a refusal takes, or does not say how large it is."""
    length = response.headers.get("Content-Length", "")
    return response.request.method != "HEAD" and not (length.isdecimal() and int(length) <= _REFUSAL_BYTES)


def read_whole(response: Any) -> None:
    """Take an answer into memory as the library would, but only so much of it, however small it came packed."""
    pieces, size = [], 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > _ANSWER_BYTES:
            response.close()
            raise ConnectionError(f"an answer of more than {_ANSWER_BYTES:,} bytes")
    response._content = b"".join(pieces)  # noqa: SLF001 - where `read` keeps it


def first_bytes(response: Any, count: int) -> bytes:
    """So many bytes of an answer, whose rest stays where it is.

    Raises:
        ConnectionError: it ends before.
    """
    data = bytearray()
    for piece in response.iter_bytes():
        data += piece
        if len(data) >= count:
            return bytes(data[:count])
    raise ConnectionError(f"an answer of {len(data):,} bytes where {count:,} were asked for")


def is_passing(status: int) -> bool:
    """Whether an HTTP status may be another one at the next try."""
    # 416: the library asked to resume beyond the end of a file; the next try starts afresh.
    return status in {408, 416, 429} or status >= 500  # noqa: PLR2004 the HTTP class of server errors


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: asked only after `_final`."""
    from huggingface_hub.errors import HTTPError  # httpx's in 1.x, httpx2's in 2.x

    if isinstance(error, TryLaterError | HTTPError | json.JSONDecodeError):
        return True
    # The library's own (wrong size, no metadata) carry no errno; the transfer extension raises RuntimeError.
    return isinstance(error, RuntimeError | ConnectionError | TimeoutError) or (
        isinstance(error, OSError) and error.errno is None
    )


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """A failure and what caused it, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def answer_behind(error: Exception) -> Any | None:
    """The hub's response behind a failure, if it answered at all."""
    responses = (getattr(each, "response", None) for each in chain(error))
    return next((response for response in responses if response is not None), None)


def disk_errno(error: Exception) -> int | None:
    """The local disk's error behind a failure, if there is one."""
    for each in chain(error):
        if isinstance(each, OSError) and each.errno in _DISK_ERRORS:
            return each.errno
        if "No space left on device" in str(each):  # the transfer extension has no number for it
            return errno.ENOSPC
    return None


def answer_message(response: Any) -> str:
    """What the hub says about it, to be put behind a status."""
    message = response.headers.get("X-Error-Message")
    return f": {message}" if message else ""


def reason_of(error: Exception) -> str:
    """A failure in a word or two."""
    # Never the library's text: it quotes URLs, and a CDN's URL is a signed one.
    response = answer_behind(error)
    if response is not None:
        return f"HTTP {response.status_code}"
    return type(list(chain(error))[-1]).__name__


def retry_after_seconds(error: Exception) -> float | None:
    """How long the hub asks to wait."""
    response = answer_behind(error)
    if response is None:
        return None
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d+", value):
        return float(value)
    with suppress(ValueError, TypeError):
        # A moment on the hub's clock, which need not be ours.
        now = parsedate_to_datetime(response.headers.get("Date", ""))
        return max(0.0, (parsedate_to_datetime(value) - now).total_seconds())
    if (match := re.search(r";\s*t=(\d+)", response.headers.get("RateLimit", ""))) and response.status_code == 429:  # noqa: PLR2004 Too Many Requests
        return float(match[1])
    return None

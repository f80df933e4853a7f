"""One JSON by POST to whoever asked to be notified that an attempt has ended; it never costs the attempt anything."""

import ipaddress
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

import structlog

from job.core.errors import UsageError

log = structlog.get_logger(__name__)
_TRIES = 3
_PAUSE_SECONDS = 0.5
"""Before the second try; before the third twice as long."""
_LEAST_SECONDS = 0.1
"""With less time than this left no further try is worth beginning."""
_PASSING = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS})


class Notice:
    """Where to send it. The URL may hold a token: no message names more of it than its host."""

    def __init__(self, url: str) -> None:
        """Nothing is sent yet.

        Raises:
            UsageError: it is neither https nor on this machine, or holds credentials.
        """
        self._url = url
        self._host, self._local = _checked(url)

    def send(self, content: Mapping[str, Any], *, seconds: float) -> None:
        """Post the content, within the time; what goes wrong is logged, and that is all."""
        body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
        until = time.monotonic() + seconds
        reason = "there was no time left"
        for number in range(_TRIES):
            left = until - time.monotonic()
            if left < _LEAST_SECONDS:
                break
            try:
                self._post(body, timeout=left)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"it answered {error.code}"
                if error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in _PASSING:
                    break
            except Exception as error:  # noqa: BLE001 - names, certificates, proxies, protocols: none may cost a run
                reason = f"it was not reached ({_cause(error)})"
            else:
                log.info("notified", host=self._host)
                return
            time.sleep(max(0.0, min(_PAUSE_SECONDS * 2**number, until - time.monotonic())))
        log.warning("not_notified", host=self._host, reason=reason)

    def _post(self, body: bytes, *, timeout: float) -> None:
        # Built anew: proxies are for what is not on this machine, and nothing is sent on to where an answer points.
        proxies = [urllib.request.ProxyHandler({})] if self._local else []
        opener = urllib.request.build_opener(_NoRedirects, *proxies)
        request = urllib.request.Request(  # noqa: S310 - https, or this machine
            self._url, data=body, method="POST", headers={"Content-Type": "application/json", "User-Agent": "qlora-job"}
        )
        opener.open(request, timeout=timeout).close()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An answer that points elsewhere is a failure."""

    def redirect_request(self, *_: object, **__: object) -> None:
        """Nowhere."""


def _checked(url: str) -> tuple[str, bool]:
    """Host, and whether it is this machine; the URL is not repeated in messages, for it may hold a token."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
        parts.port  # noqa: B018 - raises where it is no number
    except ValueError:
        host = None
    if not host or not url.isascii() or not url.isprintable() or " " in url:
        raise UsageError("--notify-url: not a URL; write https://host/path")
    if parts.username is not None or parts.password is not None:
        raise UsageError("--notify-url: holds credentials; let the receiver know the job by a token in the path")
    local = _is_local(parts)
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise UsageError(f"--notify-url: {parts.scheme}://{host} is not safe; use https, or http on this machine alone")
    return host, local


def _is_local(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _cause(error: Exception) -> str:
    """What failed, without the library's message: it may repeat the URL."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    strerror = getattr(inner, "strerror", None)
    return strerror if isinstance(strerror, str) and strerror else type(inner).__name__

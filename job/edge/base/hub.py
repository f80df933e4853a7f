"""Lists and downloads the files of one commit on the model hub, and translates what the hub refuses."""

import errno
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import structlog

from job.core.errors import (
    DeniedError,
    JobError,
    LocalDiskError,
    NotFoundError,
    StopRequestedError,
    UnavailableError,
    UsageError,
)
from job.edge.base.hub_answers import (
    TryLaterError,
    answer_behind,
    answer_message,
    chain,
    disk_errno,
    first_bytes,
    is_large,
    is_passing,
    is_transient,
    read_whole,
    reason_of,
    retry_after_seconds,
)
from job.edge.store.patience import Patience

_SPARE_BYTES = 16 * 1024 * 1024
"""Beyond a file's size: of one that is fetched again from its beginning a piece may count twice."""
_POLL_SECONDS = 0.2
_WORKERS = 4
_HOOKS = threading.Lock()
"""Held while hooks are put into the library's session or taken out: all threads have the same one."""
_Result = TypeVar("_Result")
log = structlog.get_logger(__name__)
HUB_PATIENCE = Patience(attempts=20, budget_seconds=300.0, first_pause_seconds=1.0, longest_pause_seconds=60.0)
"""The hub counts requests in windows of five minutes, and counts all pods behind one address together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubRepo:
    """One model repository at one commit."""

    repo_id: str
    revision: str
    should_stop: Callable[[], bool]
    patience: Patience

    def files(self) -> Mapping[str, int]:
        """Name -> bytes of every file at the commit.

        Raises:
            JobError: not found, denied, unavailable or stopped.
        """

        def ask() -> Mapping[str, int]:
            from huggingface_hub import HfApi

            info = HfApi().model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=self.patience.answer_seconds
            )
            return {each.rfilename: each.size or 0 for each in info.siblings or ()}

        with _Watch(self.should_stop) as watch:
            return self._persist(ask, what="its list of files", stopped=self.should_stop, watch=watch)

    def bring(self, sizes: Mapping[str, int], *, cache: Path, on_bytes: Callable[[int], None]) -> None:
        """Download files into a cache folder in the hub's own layout; what is there already is not asked for again.

        Args:
            sizes: files of the commit, and the bytes that each has by the hub's list.
            cache: the cache folder.
            on_bytes: called with the number of new bytes, from several threads.

        Raises:
            JobError: not found, denied, unavailable, no room, or stopped; no file is ever left half under its name.
        """
        giving_up = threading.Event()

        def stopped() -> bool:
            return giving_up.is_set() or self.should_stop()

        with _Watch(stopped) as watch, ThreadPoolExecutor(_WORKERS, thread_name_prefix="hub") as pool:

            def bring_one(name: str) -> None:
                bar = _bar_class(on_bytes, stopped, most=sizes[name])
                self._persist(lambda: self._download(name, cache, bar), what=name, stopped=stopped, watch=watch)

            futures = [pool.submit(bring_one, name) for name in sizes]
            try:
                _await(futures, self.should_stop)
            except BaseException:
                giving_up.set()
                pool.shutdown(wait=False, cancel_futures=True)
                _abort_xet()
                raise

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of a file from `start` on.

        Raises:
            JobError: as `bring`.
        """

        def ask() -> bytes:
            from huggingface_hub import get_session, hf_hub_url
            from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

            url = hf_hub_url(self.repo_id, name, revision=self.revision)
            headers = build_hf_headers() | {"Range": f"bytes={start}-{start + length - 1}"}
            with get_session().stream("GET", url, headers=headers, timeout=self.patience.answer_seconds) as response:
                if response.status_code >= 400:  # noqa: PLR2004 the HTTP class of refusals
                    response.read()
                    hf_raise_for_status(response)
                skipped = 0 if response.status_code == 206 else start  # noqa: PLR2004 Partial Content
                return first_bytes(response, skipped + length)[skipped:]

        with _Watch(self.should_stop) as watch:
            return self._persist(ask, what=name, stopped=self.should_stop, watch=watch)

    def _download(self, name: str, cache: Path, bar: type) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(self.repo_id, name, revision=self.revision, cache_dir=cache, tqdm_class=bar)

    def _persist(
        self, attempt: Callable[[], _Result], *, what: str, stopped: Callable[[], bool], watch: "_Watch"
    ) -> _Result:
        """The attempt's result; transient failures are tried again until the patience ends."""
        gives_up_at: float | None = None
        failures = 0
        while True:
            _raise_if(stopped)
            try:
                watch.attach()
                return attempt()
            except JobError:
                raise
            except Exception as error:
                if (final := self._final(error, what)) is not None:
                    raise final from error
                if not is_transient(error):
                    raise
                failures += 1
                now = time.monotonic()
                gives_up_at = now + self.patience.budget_seconds if gives_up_at is None else gives_up_at
                pause = self._pause_seconds(error, failures)
                if failures >= self.patience.attempts or now + pause > gives_up_at:
                    raise UnavailableError(
                        f"{self._place}: {what} could not be read ({reason_of(error)}), tried {failures} times; "
                        "look at the network and at the hub's status, then start the same job again"
                    ) from error
                log.warning("hub_retry", model=self.repo_id, what=what, reason=reason_of(error), wait_seconds=pause)
                _sleep(pause, stopped)

    def _pause_seconds(self, error: Exception, failures: int) -> float:
        # Not for as long as the hub asks, whatever that is: a job that sleeps for an hour holds a GPU for nothing.
        asked = retry_after_seconds(error)
        if asked is not None and asked <= self.patience.longest_pause_seconds:
            return asked
        return max(self.patience.pause_seconds(failures), min(asked or 0.0, self.patience.longest_pause_seconds))

    @property
    def _place(self) -> str:
        return f"{self.repo_id} at {self.revision[:12]}"

    def _page(self) -> str:
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repo_id}"

    def _final(self, error: Exception, what: str) -> JobError | None:
        """What to raise for a failure that another try would not mend, None for every other."""
        from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

        if isinstance(error, HFValidationError):
            return UsageError(f"model.base: {self.repo_id} is no hub id ({error})")
        if any(isinstance(each, OfflineModeIsEnabled) for each in chain(error)):
            return NotFoundError(
                f"{self._place}: {what} is not in the local cache, and HF_HUB_OFFLINE is set; "
                "run `entrypoint.py fetch RECIPE --to FOLDER` beforehand, where there is a network, "
                "and FOLDER/recipe.yaml here"
            )
        response = answer_behind(error)
        if response is not None:
            return self._refusal(response, what)
        if (number := disk_errno(error)) is not None:
            return LocalDiskError(
                f"{self._place}: {what} could not be written ({errno.errorcode[number]}); "
                "give the work folder more room, or name another one with --workdir"
            )
        return None

    def _refusal(self, response: Any, what: str) -> JobError | None:
        code, status = response.headers.get("X-Error-Code"), response.status_code
        # The code decides first: the hub answers 401 for an unknown repository too, so as not to name the private ones.
        missing = {
            "RepoNotFound": "no such repository, or a private one that HF_TOKEN may not read; correct model.base",
            "RevisionNotFound": "no such commit; correct model.revision",
            "EntryNotFound": f"no file {what}; correct model.base or model.revision",
        }
        if code in missing:
            return NotFoundError(f"{self._place}: {missing[code]}")
        answer = f"HTTP {status}{answer_message(response)}"
        if code == "GatedRepo" or status in {401, 403}:
            return DeniedError(
                f"{self._place}: the hub refuses {what} ({answer}); if the model is gated, accept its licence at "
                f"{self._page()} and set HF_TOKEN to a token of the account that accepted it"
            )
        if status in {404, 410}:
            return NotFoundError(f"{self._place}: {what} not found ({answer}); correct model.base or model.revision")
        if status >= 400 and not is_passing(status):  # noqa: PLR2004 the HTTP class of refusals
            return UnavailableError(f"{self._place}: {what}: unexpected answer ({answer}); look at HF_ENDPOINT")
        return None


def _sleep(seconds: float, stopped: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        _raise_if(stopped)
        time.sleep(min(_POLL_SECONDS, left))


def _raise_if(stopped: Callable[[], bool]) -> None:
    if stopped():
        raise StopRequestedError("stopped while the base model was fetched; files that are complete are kept")


def _await(futures: Collection[Future[None]], should_stop: Callable[[], bool]) -> None:
    """Wait for all; the first failure is raised as soon as it happens."""
    pending: Collection[Future[None]] = futures
    while pending:
        _raise_if(should_stop)
        done, pending = wait(pending, timeout=_POLL_SECONDS, return_when="FIRST_EXCEPTION")
        for future in done:
            future.result()


def _bar_class(on_bytes: Callable[[int], None], stopped: Callable[[], bool], *, most: int) -> type:
    """A progress bar that draws nothing: the one place where the library calls back inside a large file.

    Beyond the bytes that the file has it ends the download; the library would look only at its end, if it has one.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # the library is not typed here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._bytes = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            _raise_if(stopped)
            self._bytes += int(n or 0)
            if self._bytes > most + _SPARE_BYTES:
                raise ConnectionError(f"more than the {most:,} bytes of the hub's list")
            on_bytes(int(n or 0))

        # Their presence keeps newer versions from opening a second bar for the same bytes.
        def update_transfer(self, n: float) -> None:
            pass

        def set_transfer_postfix_str(self, *_args: Any, **_kwargs: Any) -> None:
            pass

    return Bar


class _Watch:
    """Sees each request before it is sent and each answer before the library does.

    Left alone, the library would sleep on a 429 for as long as the hub asks, and go on after a broken connection, deaf
    to a stop request.
    """

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def attach(self) -> None:
        """Look at the library's session; asked for again before each try, since it opens a new one after a failure."""
        from huggingface_hub import get_session

        with _HOOKS:
            session = get_session()
            hooks = session.event_hooks
            if self._on_request not in hooks["request"]:
                session.event_hooks = {
                    "request": [*hooks["request"], self._on_request],
                    "response": [*hooks["response"], self._on_response],
                }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import get_session

        ours = (self._on_request, self._on_response)
        with _HOOKS:
            session = get_session()
            session.event_hooks = {
                kind: [hook for hook in hooks if hook not in ours] for kind, hooks in session.event_hooks.items()
            }

    def _on_request(self, _request: Any) -> None:
        _raise_if(self._stopped)

    def _on_response(self, response: Any) -> None:
        if response.status_code == 429 or response.status_code >= 500:  # noqa: PLR2004 Too Many Requests, server errors
            raise TryLaterError(response)
        if response.status_code >= 400 and is_large(response):  # noqa: PLR2004 the HTTP class of refusals
            raise TryLaterError(response)
        if response.request.method == "GET" and response.request.url.path.startswith("/api/"):
            read_whole(response)


def _abort_xet() -> None:
    # Its transfers run outside Python and look at no flag; without this a stop would wait for the whole file.
    with suppress(ImportError):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()

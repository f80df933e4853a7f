"""The lock of a run: one live attempt, held by conditional writes to one small object.

Who finds it held watches it for one lease on its own monotonic clock, because clocks of machines differ: it changed, so
its owner lives; it did not, so the owner is dead or frozen, and the lock is taken over with the next fence. An owner
that was frozen finds another's entry in the lock before it changes anything that counts.
"""

import contextvars
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import structlog

from job.core.crash_points import crash_point
from job.core.errors import DataError, JobError, LockedError, NotFoundError, StopRequestedError
from job.edge.store.json_objects import json_bytes, json_object
from job.edge.store.objects import SMALL_BYTES, ObjectStore, PreconditionError

log = structlog.get_logger(__name__)
_RENEWALS = 4
"""In one lease: three may fail before the owner is taken for dead."""
_LONGEST_HELD_SECONDS = 2**31
"""More is nonsense: what stands there comes from a bucket."""
_LOOKS = 20
"""In one lease, by who waits."""
_LONGEST_LEASE_SECONDS = 900.0
"""A lock from a bucket may ask for no longer wait than this."""
_POLL_SECONDS = 0.2
"""How late a stop request may be seen while waiting."""
_SETTLE_SECONDS = 2.0
"""Without conditional writes: how long a rival's write may take to show after ours."""
Found = tuple[dict[str, Any], str]
"""What stands in the lock, and its ETag."""


class Lock:
    """One attempt's hold on a run."""

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        lease_seconds: float,
        owner: Mapping[str, Any],
        conditional: bool,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is asked of the store yet.

        Args:
            store: where the lock stands.
            key: its name there.
            lease_seconds: how long we may be silent before others take us for dead.
            owner: what others see of us.
            conditional: the store keeps conditions on writes; without them the lock is a lease with read-back.
            on_lost: called, on another thread, when another attempt has taken the lock over.
        """
        self._store = store
        self._key = key
        self._lease_seconds = lease_seconds
        self._token = secrets.token_hex(16)
        self._owner = {**owner, "since": _now()}
        self._conditional = conditional
        self._on_lost = on_lost
        self._etag = ""
        self._renewals = 0
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._writing = threading.Lock()
        """Held by that one of our two threads that asks the store."""
        self._renewer: threading.Thread | None = None
        self.fence = 0
        """Counts the owners; higher is later. 0 before `acquire`."""
        self.conditional = conditional
        self.taken_from: str | None = None
        """Who held it and fell silent, if it was taken over."""
        self.held_at_least: tuple[int, int] | None = None
        """The fence of that owner, and for how many seconds it had renewed the lock, by its own clock."""

    @property
    def lost(self) -> bool:
        """Another attempt holds the run now."""
        return self._lost.is_set()

    def acquire(self, *, above: int, should_stop: Callable[[], bool]) -> None:
        """Take the lock, if need be after watching a silent owner for its lease; then renew it in the background.

        Args:
            above: the fence will be higher, also when the lock itself was deleted by hand.
            should_stop: polled while waiting.

        Raises:
            LockedError: another attempt lives.
            StopRequestedError: asked to stop while waiting.
        """
        found = self._look()
        if found is not None and not found[0].get("free"):
            found = self._watch(found, should_stop)
        self.fence = 1 + max(above, _number(found[0].get("fence")) if found else 0)
        try:
            self._etag = self._write(found)
        except PreconditionError:
            raise self._locked(self._look()) from None
        if not self._conditional and self._ended.wait(_SETTLE_SECONDS):
            raise StopRequestedError("the lock was given back while it was taken")
        self.confirm()
        log.info("lock", fence=self.fence, taken_from=self.taken_from)
        context = contextvars.copy_context()  # its events carry the run and the attempt too
        self._renewer = threading.Thread(target=context.run, args=(self._renew,), name="lock", daemon=True)
        self._renewer.start()

    def confirm(self) -> None:
        """Look whether the lock is still ours: before each write that counts.

        Raises:
            LockedError: it is not.
        """
        with self._writing:
            found = self._look()
        if not self._is_ours(found):
            self._lose()
            raise self._locked(found)

    def release(self) -> None:
        """Give the lock back; where the store is away it is not, and the lease runs out by itself."""
        self._end()
        if not self.fence or self.lost:
            return
        try:
            with self._writing:
                found = self._look()
                if self._is_ours(found):
                    self._write(found, free=True)
        except (JobError, PreconditionError) as trouble:
            log.warning("lock_not_released", reason=str(trouble), then=f"it runs out in {self._lease_seconds:g} s")

    def remove(self) -> None:
        """Take the lock itself away: the run never began, and leaves nothing."""
        self._end()
        if not self.fence or self.lost:
            return
        try:
            with self._writing:
                if self._is_ours(self._look()):
                    self._store.delete([self._key])
        except JobError as trouble:
            log.warning("lock_not_released", reason=str(trouble), then=f"it runs out in {self._lease_seconds:g} s")

    def abandon(self) -> None:
        """Stop renewing it: the lease runs out by itself."""
        self._end()

    def _end(self) -> None:
        self._ended.set()
        if self._renewer is not None:
            self._renewer.join(timeout=5.0)

    def _watch(self, found: Found, should_stop: Callable[[], bool]) -> Found:
        """Wait for one lease of the owner; return what stands there unchanged, or free.

        Raises:
            LockedError: the owner renewed it, or another one took it.
        """
        content, etag = found
        lease = min(_LONGEST_LEASE_SECONDS, max(1.0, _number(content.get("lease_seconds")) or self._lease_seconds))
        log.info("lock_watched", owner=_described(content), seconds=lease)
        began = time.monotonic()
        for look in range(1, _LOOKS + 1):
            while time.monotonic() - began < lease * look / _LOOKS:
                if should_stop():
                    raise StopRequestedError("asked to stop while another attempt's lock was watched")
                time.sleep(min(_POLL_SECONDS, lease / _LOOKS))
            now = self._look()
            if now is None or now[0].get("free"):
                return now or ({"fence": content.get("fence")}, "")
            if now[1] != etag:
                raise self._locked(now)
        self.taken_from = _described(content)
        renewed = _number(content.get("renewals")) * lease / _RENEWALS
        self.held_at_least = _number(content.get("fence")), int(min(renewed, _LONGEST_HELD_SECONDS))
        return found

    def _renew(self) -> None:
        while not self._ended.wait(self._lease_seconds / _RENEWALS):
            try:
                with self._writing:
                    if self._ended.is_set():
                        return
                    self._renewals += 1
                    self._renew_once()
                crash_point("lock.renewed")
            except (LockedError, NotFoundError):
                self._lose()
                return
            except (JobError, PreconditionError) as trouble:
                # Whoever watches takes us for dead after a lease; if nobody does, we go on when the store is back.
                log.warning("lock_not_renewed", reason=str(trouble))
            except BaseException as trouble:  # noqa: BLE001 - of a thread nobody hears, and without it the run is lost
                log.warning("lock_not_renewed", reason=f"{type(trouble).__name__}: {trouble}")

    def _renew_once(self) -> None:
        found: Found = ({}, self._etag)
        if not self._conditional:
            self._require(self._look())
        try:
            self._etag = self._write(found)
        except PreconditionError:
            # The answer to an earlier renewal may have been lost: then the lock is ours under another ETag.
            self._etag = self._write(self._require(self._look()))

    def _require(self, found: Found | None) -> Found:
        if found is None or not self._is_ours(found):
            raise self._locked(found)
        return found

    def _lose(self) -> None:
        if not self._lost.is_set():
            self._lost.set()
            log.error("lock_lost", message="another attempt took the run over while this one was silent")
            self._on_lost()

    def _is_ours(self, found: Found | None) -> bool:
        return found is not None and found[0].get("token") == self._token

    def _look(self) -> Found | None:
        try:
            data, etag = self._store.read(self._key, max_bytes=SMALL_BYTES)
        except NotFoundError:
            return None
        except DataError:  # no attempt writes one so large: it is watched, and then replaced, like any other nonsense
            return {}, self._store.stat(self._key).etag
        try:
            return json_object(data), etag
        except ValueError:
            return {}, etag

    def _write(self, over: Found | None, *, free: bool = False) -> str:
        content = {
            **self._owner,
            "token": self._token,
            "fence": self.fence,
            "lease_seconds": self._lease_seconds,
            "renewals": self._renewals,
            "free": free,
        }
        data = json_bytes(content)
        if not self._conditional:
            return self._store.write(self._key, data)
        if over is None or not over[1]:
            return self._store.write(self._key, data, create_only=True)
        try:
            return self._store.write(self._key, data, if_match=over[1])
        except NotFoundError as error:
            raise PreconditionError(f"{self._key} is gone") from error

    def _locked(self, found: Found | None) -> LockedError:
        who = "another attempt" if found is None else _described(found[0])
        return LockedError(
            f"{self._store.uri}/{self._key}: {who} holds this run; let it work, or stop it first "
            f"(an owner that died is replaced after {self._lease_seconds:g} s of silence)"
        )


def _described(content: Mapping[str, Any]) -> str:
    """The owner, rendered; what stands there comes from a bucket, so it is shortened."""
    host, pid, since = (str(content.get(name, "?"))[:100] for name in ("host", "pid", "since"))
    return f"process {pid} on {host} (since {since})"


def _number(value: object) -> int:
    return int(value) if isinstance(value, int | float) and 0 <= value < 2**53 else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

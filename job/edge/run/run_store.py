"""One run's part of a store, and what each write that counts begins with: a look whether the lock is still ours."""

from typing import Any

from job.core.errors import DataError, NotFoundError
from job.edge.run.lock import Lock
from job.edge.store.folder import StoredFolder
from job.edge.store.json_objects import json_object
from job.edge.store.objects import CONTROL_BYTES, ObjectStore

ROUNDS = 5
"""How often a conditional write is tried anew against leftovers of attempts that died."""


class RunStore:
    """The keys below runs/{run_id}/, and the lock that they are written under."""

    def __init__(self, store: ObjectStore, run_id: str, *, lock: Lock | None) -> None:
        """Without a lock it is for reading only."""
        self.store = store
        self.run_id = run_id
        self.root = f"runs/{run_id}/"
        self._lock = lock

    @property
    def uri(self) -> str:
        """Where a person finds the run."""
        return f"{self.store.uri.rstrip('/')}/{self.root.rstrip('/')}"

    @property
    def fence(self) -> int:
        """Which owner of the run's lock we are; 0 without one."""
        return self._lock.fence if self._lock is not None else 0

    @property
    def conditional(self) -> bool:
        """Whether writes can be made on conditions."""
        return self._lock is not None and self._lock.conditional

    def confirm(self) -> None:
        """Look whether the lock is still ours: before each write that counts.

        Raises:
            LockedError: it is not.
        """
        if self._lock is not None:
            self._lock.confirm()

    def folder(self, name: str) -> StoredFolder:
        """A folder of the run."""
        return StoredFolder(self.store, self.root + name)

    def etag(self, key: str) -> str | None:
        """An object's ETag; None: there is no such object."""
        try:
            return self.store.stat(key).etag
        except NotFoundError:
            return None

    def read_json(self, name: str, *, max_bytes: int = CONTROL_BYTES) -> dict[str, Any] | None:
        """A record of the run; None: it does not exist.

        Raises:
            DataError: it is no JSON object, or larger than `max_bytes`.
        """
        try:
            return json_object(self.store.read(self.root + name, max_bytes=max_bytes)[0])
        except NotFoundError:
            return None
        except ValueError as error:
            raise DataError(
                f"{self.uri}/{name}: not a JSON object ({error}); it was not written by this job, or is damaged"
            ) from error


def never() -> bool:
    """For uploads that are not broken off on request: the step in them would be lost."""
    return False

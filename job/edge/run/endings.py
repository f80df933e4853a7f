"""How the last jobs on an output ended, kept in the store: machines, containers and their logs go.

endings/20261128T210528Z-65-9f3c1a2b.json      one ended process; create-only
endings/20261128T210528Z-none-4d1e0c77.json    one that ended without a word, as the next attempt found it

They stand beside the runs and are none: what ended before it had a run is here as well. The names sort by time.
"""

import re
import secrets
from collections.abc import Sequence
from contextlib import suppress

from pydantic import ValidationError

from job.core.attempt.ended import Ended
from job.core.errors import DataError, JobError, NotFoundError
from job.edge.store.json_objects import json_bytes
from job.edge.store.objects import SMALL_BYTES, ObjectStore

KEPT = 50
"""Newest endings that stay: a nightly job's last weeks."""
_KEY = re.compile(r"endings/\d{8}T\d{6}Z-(\d+|none)-[0-9a-f]{8}\.json")


def leave(store: ObjectStore, ended: Ended) -> str:
    """Write an ending down, and delete those that are too old where that is allowed; returns its key.

    Raises:
        JobError: the store forbids it, is away or has no room.
    """
    stamp = re.sub(r"[-:]|\+.*", "", ended.time) + "Z"
    code = "none" if ended.code is None else ended.code
    key = f"endings/{stamp}-{code}-{secrets.token_hex(4)}.json"
    store.write(
        key, json_bytes(ended.model_dump(mode="json", exclude_none=True) | {"code": ended.code}), create_only=True
    )
    with suppress(JobError):  # who may write but not delete keeps more of them
        if old := _keys(store)[:-KEPT]:
            store.delete(old)
    return key


def last(store: ObjectStore, *, at_most: int) -> Sequence[Ended]:
    """The newest endings, newest first; what is not as we write it is passed over."""
    found: list[Ended] = []
    for key in reversed(_keys(store)):
        if len(found) == at_most:
            break
        with suppress(NotFoundError, DataError, ValidationError):  # deleted meanwhile, or not of this job
            found.append(Ended.model_validate_json(store.read(key, max_bytes=SMALL_BYTES)[0]))
    return found


def _keys(store: ObjectStore) -> list[str]:
    """Oldest first."""
    return sorted(entry.key for entry in store.list("endings/") if _KEY.fullmatch(entry.key))

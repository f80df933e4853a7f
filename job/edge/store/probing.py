"""What a store lets us do, found out by trying: conditional writes that hold, and deletion."""

import contextlib
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from job.core.errors import DeniedError, NotFoundError, UsageError
from job.edge.store.objects import ObjectStore, PreconditionError

_KEY = ".probe"
_LEFTOVER_SECONDS = 24 * 3600.0
"""No probe takes so long, also where clocks differ."""
_RACES = 3
"""Rounds of the probe: a store that is only sometimes atomic shows it in most of them."""
_RACERS = 8
"""Writers at once in each round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a store let us do under a root. That it let us write and delete needs no field: else there is no probe."""

    conditional: bool
    """Create-only and If-Match hold, and of many at once one wins: a lock and a swap can be trusted."""
    reason: str
    """What is missing, for the report; empty when nothing is."""


def probe(store: ObjectStore) -> Probe:
    """Write, write on conditions, and delete a scratch object under the root.

    Raises:
        DeniedError: the credentials may not write or delete there.
    """
    _refuse_without_deleting(store)
    key = f"{_KEY}-{secrets.token_hex(8)}"  # of its own: another attempt may try the same store in this moment
    races = [f"{key}-{number}" for number in range(_RACES)]
    reason = _missing_conditions(store, key) or _lost_races(store, races)
    store.delete([key, *races, *_left_behind(store)])
    return Probe(conditional=not reason, reason=reason)


def _refuse_without_deleting(store: ObjectStore) -> None:
    """By one key that is always the same: where it cannot be deleted, each start would leave some more."""
    with contextlib.suppress(NotFoundError):  # another attempt has deleted it before its ETag could be asked for
        store.write(_KEY, b"1")
    try:
        store.delete([_KEY])
    except DeniedError as error:
        raise DeniedError(f"{error}; without deleting, old checkpoints would stay for ever") from error


def _left_behind(store: ObjectStore) -> list[str]:
    """Keys of probes whose process was killed in their midst."""
    with contextlib.suppress(DeniedError):  # who may list only runs/ does not find them
        return [each.key for each in store.list(f"{_KEY}-") if time.time() - each.modified > _LEFTOVER_SECONDS]
    return []


def _missing_conditions(store: ObjectStore, key: str) -> str:
    """What of conditional writes a store lacks; empty when it has both kinds."""
    try:
        store.write(key, b"1", create_only=True)
    except UsageError as error:
        store.write(key, b"1")
        return f"{store.uri}: no create-only writes ({error})"
    with contextlib.suppress(PreconditionError):
        store.write(key, b"2", create_only=True)
        return f"{store.uri}: create-only is ignored, a second write replaced the first"
    try:
        etag = store.write(key, b"3", if_match=store.stat(key).etag)
    except (PreconditionError, UsageError) as error:
        return f"{store.uri}: no writes with If-Match ({error})"
    with contextlib.suppress(PreconditionError):
        store.write(key, b"4", if_match="0" * len(etag))
        return f"{store.uri}: If-Match is ignored, a write with a wrong ETag went through"
    return ""


def _lost_races(store: ObjectStore, keys: Sequence[str]) -> str:
    """What goes wrong when several create the same object at once; empty when one of them wins each time."""

    def wins(key: str, number: int) -> bool:
        try:
            store.write(key, b"%d" % number, create_only=True)
        except PreconditionError:
            return False
        return True

    with ThreadPoolExecutor(_RACERS, thread_name_prefix="probe") as pool:
        for key in keys:
            winners = sum(pool.map(partial(wins, key), range(_RACERS)))
            if winners > 1:
                return (
                    f"{store.uri}: create-only is not atomic, {winners} of {_RACERS} writers at once were let through"
                )
    return ""

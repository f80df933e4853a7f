"""Files that are not whole yet: whoever writes them is late, or was cut off. A night leaves them out, by name."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from job.core.data.fields import record_of
from job.core.errors import DataError, NotFoundError
from job.core.visible import one_line
from job.edge.foreign_formats import foreign
from job.edge.store.lanes import Lanes
from job.edge.store.objects import ObjectStore, StoredObject, StoreSettings
from job.edge.store.opening import open_store, store_and_key

log = structlog.get_logger(__name__)
_TAIL_BYTES = 2**16
"""Read of a file's end at first; a longer last line is read whole."""
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18")
"""A compressed file shows only when it is unpacked whether it is whole; then it is refused by name (65), as is one of
another format, with what converts it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LateFile:
    """A file that is left out."""

    uri: str
    reason: str

    def __str__(self) -> str:
        """`uri: reason`."""
        return f"{one_line(self.uri)}: {self.reason}"


def without_late(
    sources: Sequence[Sequence[StoredObject]],
    settings: StoreSettings,
    *,
    max_record: int,
    known: Collection[tuple[str, str]],
    should_stop: Callable[[], bool],
) -> tuple[tuple[tuple[StoredObject, ...], ...], tuple[LateFile, ...]]:
    """The objects of each source that are whole, and those that are not.

    Args:
        sources: as they are listed now.
        settings: of the stores.
        max_record: longest line, in bytes.
        known: URI and ETag of objects that a run was trained on: they were whole.
        should_stop: polled meanwhile.

    Raises:
        DataError: of a source no file is whole.
    """
    stores: dict[str, ObjectStore] = {}
    looked_at = list(dict.fromkeys(o for objects in sources for o in objects if (o.uri, o.etag) not in known))
    for o in looked_at:
        root = store_and_key(o.uri)[0]
        stores[root] = stores.get(root) or open_store(root, settings)
    with Lanes("looking at the ends of new files", should_stop) as lanes:
        jobs = (partial(_reason, stores[store_and_key(o.uri)[0]], o, max_record) for o in looked_at)
        reasons = dict(zip(looked_at, lanes.in_order(jobs), strict=True))
    late = tuple(LateFile(uri=o.uri, reason=reason) for o, reason in reasons.items() if reason is not None)
    whole = tuple(tuple(o for o in objects if reasons.get(o) is None) for objects in sources)
    for each in late:
        log.warning("late_file", file=each.uri, reason=each.reason, then="it is left out until it is whole")
    if not all(whole):
        named = "; ".join(map(str, late[:10])) + (f"; and {len(late) - 10} more" if len(late) > 10 else "")  # noqa: PLR2004 - as many as a message shows
        raise DataError(f"data.train: no file of a source is whole yet ({named}); start the same job again later")
    return whole, late


def _reason(store: ObjectStore, o: StoredObject, max_record: int) -> str | None:
    """Why a file is not whole; None: it seems to be."""
    if not o.size:
        return "it is empty"
    try:
        tail = _tail(store, o, min(o.size, _TAIL_BYTES))
        if b"\n" not in tail[:-1] and len(tail) < o.size:
            tail = _tail(store, o, min(o.size, max_record + _TAIL_BYTES))
        head = _part(store, o, 0, min(o.size, _TAIL_BYTES))
    except (DataError, NotFoundError):
        return "it was changed while it was looked at"
    if head.startswith(_PACKED[:2]) or head[1:4] == _PACKED[2] or foreign(head, o.uri, "plain") is not None:
        return None
    if not tail.endswith(b"\n"):
        return "it does not end with a line end"
    last = tail.rstrip(b"\r\n\t ").rpartition(b"\n")[2]
    wrong = record_of(last.removeprefix(b"\xef\xbb\xbf")) if 0 < len(last) <= max_record else None
    return f"its last line: {wrong}" if isinstance(wrong, str) else None


def _tail(store: ObjectStore, o: StoredObject, length: int) -> bytes:
    return _part(store, o, o.size - length, length)


def _part(store: ObjectStore, o: StoredObject, start: int, length: int) -> bytes:
    return store.read_part(store_and_key(o.uri)[1], start=start, length=length, etag=o.etag)

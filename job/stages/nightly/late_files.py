"""Files that are not whole yet: whoever writes them is late, or was cut off. A night is not made of them, by name.

To train on the others is a night as any other. What models are judged on is another matter: without one of its files
it would be another set, and tonight's numbers no neighbours of yesterday's. So there the night waits.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event

import structlog

from job.core.data.fields import record_of
from job.core.errors import DataError, NotFoundError
from job.core.visible import one_line
from job.edge.dataset_files import breaks_off, packing_of
from job.edge.foreign_formats import foreign
from job.edge.store.lanes import Lanes
from job.edge.store.objects import ObjectStore, StoredObject, StoreSettings
from job.edge.store.opening import open_store, store_and_key

log = structlog.get_logger(__name__)
_TAIL_BYTES = 2**16
"""Read of a file's end at first; a longer last line is read whole."""
_UNPACKED_BYTES = 2**31
"""A larger compressed file is not unpacked to see whether it is whole: where it breaks off the night ends with 65."""
_PART_BYTES = 2**23
"""Of a compressed file, asked of the store at once."""
_NAMED = 10
"""As many as a message names."""


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
    """The objects of each source to train on that are whole, and those that are not.

    Args:
        sources: as they are listed now.
        settings: of the stores.
        max_record: longest line, in bytes.
        known: URI and ETag of objects that a run has read: they were whole.
        should_stop: polled meanwhile.

    Raises:
        DataError: of a source no file is whole.
    """
    reasons = _reasons(sources, settings, max_record=max_record, known=known, should_stop=should_stop)
    late = tuple(LateFile(uri=o.uri, reason=reason) for o, reason in reasons.items())
    whole = tuple(tuple(o for o in objects if o not in reasons) for objects in sources)
    for each in late:
        log.warning("late_file", file=each.uri, reason=each.reason, then="it is left out until it is whole")
    if not all(whole):
        named = "; ".join(named_late(late))
        raise DataError(f"data.train: no file of a source is whole yet ({named}); start the same job again later")
    return whole, late


def refuse_late(
    what: str,
    sources: Sequence[Sequence[StoredObject]],
    settings: StoreSettings,
    *,
    max_record: int,
    known: Collection[tuple[str, str]],
    should_stop: Callable[[], bool],
) -> None:
    """Look at what models are judged on.

    Args:
        what: the recipe's key.
        sources: as they are listed now.
        settings: of the stores.
        max_record: longest line, in bytes.
        known: as for `without_late`.
        should_stop: polled meanwhile.

    Raises:
        DataError: a file is not whole.
    """
    reasons = _reasons(sources, settings, max_record=max_record, known=known, should_stop=should_stop)
    if reasons:
        named = "; ".join(named_late([LateFile(uri=o.uri, reason=reason) for o, reason in reasons.items()]))
        raise DataError(
            f"{what}: not whole yet, and models are judged on all of it ({named}); start the same job again once it is"
        )


def named_late(late: Sequence[LateFile]) -> tuple[str, ...]:
    """As many as a message names, and how many more there are."""
    named = tuple(map(str, late[:_NAMED]))
    return (*named, f"and {len(late) - _NAMED} more") if len(late) > _NAMED else named


def _reasons(
    sources: Sequence[Sequence[StoredObject]],
    settings: StoreSettings,
    *,
    max_record: int,
    known: Collection[tuple[str, str]],
    should_stop: Callable[[], bool],
) -> dict[StoredObject, str]:
    """Why a file is not whole, of those that are not."""
    stores: dict[str, ObjectStore] = {}
    looked_at = list(dict.fromkeys(o for objects in sources for o in objects if (o.uri, o.etag) not in known))
    for o in looked_at:
        root = store_and_key(o.uri)[0]
        stores[root] = stores.get(root) or open_store(root, settings)
    with Lanes("looking at the ends of new files", should_stop) as lanes:
        jobs = (partial(_reason, stores[store_and_key(o.uri)[0]], o, max_record, lanes.cancelled) for o in looked_at)
        found = dict(zip(looked_at, lanes.in_order(jobs), strict=True))
    return {o: reason for o, reason in found.items() if reason is not None}


def _reason(store: ObjectStore, o: StoredObject, max_record: int, cancelled: Event) -> str | None:
    """Why a file is not whole; None: it seems to be."""
    if not o.size:
        return "it is empty"
    try:
        tail = _tail(store, o, min(o.size, _TAIL_BYTES))
        if b"\n" not in tail[:-1] and len(tail) < o.size:
            tail = _tail(store, o, min(o.size, max_record + _TAIL_BYTES))
        head = _part(store, o, 0, min(o.size, _TAIL_BYTES))
        if (packing := packing_of(head)) != "plain":
            return breaks_off(_parts(store, o, cancelled), packing, size=o.size) if o.size <= _UNPACKED_BYTES else None
    except (DataError, NotFoundError):
        return "it was changed while it was looked at"
    if foreign(head, o.uri, "plain") is not None:
        return None  # what reads it refuses it, with what converts it
    if not tail.endswith(b"\n"):
        return "it does not end with a line end"
    last = tail.rstrip(b"\r\n\t ").rpartition(b"\n")[2]
    wrong = record_of(last.removeprefix(b"\xef\xbb\xbf")) if 0 < len(last) <= max_record else None
    return f"its last line: {wrong}" if isinstance(wrong, str) else None


def _parts(store: ObjectStore, o: StoredObject, cancelled: Event) -> Iterator[bytes]:
    for start in range(0, o.size, _PART_BYTES):
        if cancelled.is_set():
            return  # nobody waits for what it says
        yield _part(store, o, start, min(_PART_BYTES, o.size - start))


def _tail(store: ObjectStore, o: StoredObject, length: int) -> bytes:
    return _part(store, o, o.size - length, length)


def _part(store: ObjectStore, o: StoredObject, start: int, length: int) -> bytes:
    return store.read_part(store_and_key(o.uri)[1], start=start, length=length, etag=o.etag)

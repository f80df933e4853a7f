"""Which model was in use when, by the changes of a channel: rollbacks take back what came in between."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from job.core.nightly.channel import Promoted


def not_taken_back(changes: Iterable[Promoted]) -> Iterator[Promoted]:
    """The changes, newest first, without what was taken back since: what a later model may still be held to.

    Going back to a run takes back all that was put in use after it, and what stood before it stands. Going to the base
    says less, for it may only switch adapters off: it takes back the one model that it was made from.
    """
    back: Promoted | None = None
    gone: set[str | None] = set()
    for change in changes:
        if back is not None and (change.kind, change.run_id) != ("promotion", back.run_id):
            continue
        back = change if change.kind == "rollback" and change.run_id is not None else None
        if change.run_id is None:
            gone.add(change.replaced)
        if back is None and (change.run_id is None or change.run_id not in gone):
            yield change
    if back is not None:  # the entry by which it was first put in use is damaged or gone
        yield back


def in_use_at(changes: Iterable[Promoted], moment: datetime) -> tuple[Promoted, bool] | None:
    """What was in use at a moment, of the changes newest first, and True; what was first in use after it, and False.

    None: nothing was ever promoted.
    """
    change = None
    for change in changes:
        if _moment(change.since) <= moment:
            return change, True
    return None if change is None else (change, False)


def _moment(since: str) -> datetime:
    moment = datetime.fromisoformat(since)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

"""What a run's earlier attempts say of the next one: is it stopped in vain, does it fail in the same way again?"""

from collections.abc import Mapping, Sequence
from typing import Any

from job.core.errors import Again, JobError, LocalDiskError, StalledError, StopRequestedError, ending

_LOOKED_AT = 2
"""Earlier attempts that decide: with this one they make three stops, and alone they make two failures."""
FINAL_WHEN_REPEATED = (JobError.code, LocalDiskError.code, StalledError.code)
"""Codes that are tried again once. A store that is away and a sick node are other troubles each time."""
Attempt = Mapping[str, Any]
"""An attempt as the store records it: its number, and its `end` with exit_code, reason, from_step, ..."""


_TEXTS = ("started", "host", "ended", "kind", "reason", "device", "phase", "version")
_NUMBERS = ("fence", "ranks", "exit_code", "step", "from_step", "last_committed_step", "lasted_at_least")


def wrong_value(record: Mapping[str, Any]) -> str | None:
    """What in a record of an attempt is of another type than is written there; None: nothing is."""
    for names, kind in ((_TEXTS, str), (_NUMBERS, int)):
        for name in names:
            if record.get(name) is not None and type(record[name]) is not kind:
                return f"{name} is a {type(record[name]).__name__}"
    return None


def stopped_in_vain(earlier: Sequence[Attempt]) -> bool:
    """Whether the last two attempts were stopped on request before they had committed a new step."""
    ends = [attempt.get("end") or {} for attempt in earlier[-_LOOKED_AT:]]
    return len(ends) == _LOOKED_AT and all(
        end.get("exit_code") == StopRequestedError.code and not gained(end.get("from_step"), end) for end in ends
    )


def gained(from_step: int | None, end: Mapping[str, Any]) -> bool:
    """Whether an attempt committed a step that was not there when it began, of the run or of one that it needs."""
    committed = end.get("last_committed_step")
    return end.get("gained_elsewhere") is True or (committed is not None and committed > (from_step or 0))


def same_failure(earlier: Mapping[str, Any] | None, later: Mapping[str, Any] | None) -> bool:
    """Whether two attempts' ends are the same failure at the same step, by the same version of the job."""
    if earlier is None or later is None or later.get("exit_code") not in FINAL_WHEN_REPEATED:
        return False
    return all(earlier.get(name) == later.get(name) for name in ("exit_code", "kind", "phase", "step", "version"))


def final_end(earlier: Sequence[Attempt]) -> Mapping[str, Any] | None:
    """The last attempt's end, if the same input ends the same way again."""
    end = earlier[-1].get("end") if earlier else None
    if end is None:
        return None
    try:
        is_final = ending(end.get("exit_code")).again is Again.NEVER
    except KeyError:  # of another version of the job
        is_final = False
    return end if is_final else repeated_failure(earlier)


def repeated_failure(earlier: Sequence[Attempt]) -> Mapping[str, Any] | None:
    """The end that the last two attempts share, if it is final."""
    ends = [attempt.get("end") for attempt in earlier[-_LOOKED_AT:]]
    if len(ends) == _LOOKED_AT and same_failure(ends[0], ends[1]):
        return ends[1]
    return None

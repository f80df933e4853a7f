"""Named places where a test can end or freeze the process: `crash_point("checkpoint.before_manifest")`.

A crash point does nothing unless one is armed, and what then happens is not decided here.
"""

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from job.core.errors import UsageError

POINTS = MappingProxyType(
    {
        "lock.acquired": "the lock is ours; nothing else was written",
        "lock.renewed": "the lock's new expiry stands in the store",
        "run.before_record": "run.json is about to be created",
        "run.after_record": "run.json stands; no attempt is recorded",
        "attempt.after_record": "the attempt has its number; nothing was done under it",
        "fetch_base.before": "the base model is about to be fetched",
        "download.before": "the dataset is about to be fetched",
        "download.middle": "a part of the dataset's bytes has arrived",
        "encode.middle": "some examples are encoded",
        "encode.after": "the encoded dataset stands on the local disk, whole",
        "model.loaded": "base and adapter stand on the device; nothing is resumed yet",
        "resume.middle": "a part of the checkpoint to resume from has arrived",
        "resume.after": "the state of a checkpoint is restored; no step was made since",
        "step.middle": "some micro-batches of a step have given their gradients",
        "step.before_update": "all gradients of a step are there; the weights are the old ones",
        "step.after_update": "the optimizer has stepped; the step is not counted yet",
        "evaluate.middle": "a part of the held-out examples is judged",
        "save.middle": "some files of a checkpoint stand on the local disk",
        "save.after": "a checkpoint stands on the local disk; nothing of it is in the store",
        "checkpoint.before_file": "a file of a checkpoint is about to be uploaded",
        "checkpoint.after_file": "a file of a checkpoint is uploaded",
        "checkpoint.before_manifest": "all files of a checkpoint are uploaded; it does not exist yet",
        "checkpoint.after_manifest": "a checkpoint is committed",
        "checkpoint.before_latest": "latest.json names the checkpoint before",
        "checkpoint.after_latest": "latest.json names the new checkpoint",
        "retain.before_delete": "a checkpoint that is no longer needed is about to be deleted",
        "retain.after_manifest": "the manifest of such a checkpoint is deleted, its files are not",
        "adapter.before_file": "a file of the chosen adapter is about to be uploaded",
        "adapter.after_file": "a file of the chosen adapter is uploaded",
        "prove.before": "the adapter is published; it was not yet read back",
        "fresh_records.before": "a night's new records are scored; the channel's state does not count them yet",
        "fresh_records.after": "the channel's state counts them; nobody was promoted by them, and nothing is trained",
        "verdict.before": "a nightly run is judged; nothing of it is written",
        "verdict.after": "its verdict stands; what is in use is the old model",
        "promoted.after_swap": "the new model is in use; the history does not have it yet",
        "channel_adapter.before_file": "a file of the channel's copy of the adapter is about to be replaced",
        "channel_adapter.after_file": "a file of the channel's copy is the new one",
        "channel_adapter.after_manifest": "the channel's copy is the new adapter, whole",
        "channel_state.before": "what is in use is decided; the channel's state does not have the night yet",
        "channel_state.after": "the channel's state has the night; there is no report yet",
        "pictures.before": "the pictures are about to be written",
        "report.before": "report.json is about to be created",
        "report.after": "report.json stands: the run is done; nobody knows yet",
    }
)
"""Each place, and what holds there."""
Deed = Literal["kill", "freeze", "exit", "error", "memory", "panic"]
_SPEC = re.compile(r"(?P<name>[a-z_.]+)(:(?P<passage>[1-9]\d*))?(=(?P<deed>[a-z]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashOrder:
    """What is to happen, where, and at which passage."""

    name: str
    passage: int = 1
    deed: Deed = "kill"


def parse_order(spec: str) -> CrashOrder:
    """Read `name[:n][=kill|freeze|exit|error|memory|panic]`; without them the first passage, and kill.

    Raises:
        UsageError: the name or the deed is unknown, or it is written in another way.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise UsageError(f"crash point {spec!r}: write it as name[:n][=deed], e.g. step.middle:3=kill")
    name, deed = match["name"], match["deed"] or "kill"
    if name not in POINTS:
        raise UsageError(f"crash point {name!r} is unknown; there are {', '.join(POINTS)}")
    if deed not in get_args(Deed):
        raise UsageError(f"crash point {spec!r}: {deed!r} is unknown; there are {', '.join(get_args(Deed))}")
    return CrashOrder(name=name, passage=int(match["passage"] or 1), deed=cast("Deed", deed))


class _Armed:
    """Calls once, when the ordered passage comes."""

    def __init__(self, order: CrashOrder, do: Callable[[CrashOrder], None]) -> None:
        self._order = order
        self._do = do
        self._passages = itertools.count(1)  # its `next` is one step of the interpreter: no two threads get the same

    def __call__(self, name: str) -> None:
        if name == self._order.name and next(self._passages) == self._order.passage:
            self._do(self._order)


# The one global of the rooms: handing it down as a callable would put a parameter for tests into every signature
# between the front door and the innermost loop. It is set once, before anything runs, and only by a test's wish.
_armed: Callable[[str], None] | None = None


def set_order(order: CrashOrder | None, do: Callable[[CrashOrder], None]) -> None:
    """Let `do` be called where and when the order says; None disarms."""
    global _armed  # noqa: PLW0603 - see above
    _armed = None if order is None else _Armed(order, do)


def crash_point(name: str) -> None:
    """A place where the process may end. Costs one look when nothing is armed, so it may stand in any loop."""
    if _armed is not None:
        _armed(name)

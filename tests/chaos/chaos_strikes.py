"""When a process is struck: in a phase, at a moment drawn from the seed; and in which phase it stood."""

import contextlib
import json
import random
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from chaos_attempts import Attempt
from chaos_runs import FILES, STEPS, Run

COLD_PHASES = ("start", "load_libraries")
"""Only the real command spends time there; a warm image has the libraries loaded."""
EMPTY_DISK_PHASES = ("fetch_base", "download", "encode", "fetch_weights")
"""What is on the disk already is used again."""
SAVE, UPLOAD = "save", "upload"
"""Told by no event: a checkpoint lies half written on the disk, or a part of it in the store."""
NEEDED = ("download", "encode", "load_model", "train", "evaluate", SAVE, UPLOAD, "publish", "prove", "report")
"""Every phase that takes part in a run from its data to its report; the others are hit as well."""
_SAVE_SECONDS, _UPLOAD_SECONDS = 0.02, 0.15
"""About as long as they take here; whether they were hit is looked at afterwards."""


class Durations:
    """How long the phases of an undisturbed attempt take, from its events."""

    def __init__(self, attempt: Attempt) -> None:
        self.seconds: dict[str, float] = {}
        marks = [(e["name"], _moment(e)) for e in attempt.named("phase")]
        marks += [("after evaluate", _moment(e)) for e in attempt.named("evaluation")]
        marks = sorted([*marks, ("end", _moment(attempt.events()[-1]))], key=lambda mark: mark[1])
        for at, (name, began) in enumerate(marks[:-1]):
            # Its evaluations and uploads are within it.
            ends = ("upload",) if name == "train" else (marks[at + 1][0],)
            ended = next(moment for other, moment in marks[at + 1 :] if other in ends)
            self.seconds[name] = max(self.seconds.get(name, 0.0), (ended - began).total_seconds())
        del self.seconds["after evaluate"]
        self.seconds |= {SAVE: _SAVE_SECONDS, UPLOAD: max(_UPLOAD_SECONDS, self.seconds["upload"])}

    @property
    def phases(self) -> list[str]:
        """In the order of a run."""
        return [*self.seconds]


def reach(run: Run, attempt: Attempt, phase: str, draw: random.Random, seconds: Mapping[str, float]) -> bool:
    """Wait for a moment in a phase, any one as likely as another; False: the attempt ended before."""
    steps_left = STEPS - max(0, run.newest())
    pause = draw.random() * seconds[phase]
    if phase == "train" and steps_left:
        passage = draw.randrange(steps_left)
        reached = attempt.until_event("step", passage=passage) if passage else attempt.until_event("phase", name=phase)
        pause /= STEPS
    elif phase in (SAVE, UPLOAD) and steps_left > 2:
        passage = draw.randint(1, min(3, steps_left // 2))
        reached = attempt.until(_Parcels(run, attempt, passage, whole=phase == UPLOAD))
    else:
        passage = draw.randint(1, 2) if phase == "evaluate" and steps_left > 4 else 1
        reached = attempt.until_event("phase", passage=passage, name=phase)
    time.sleep(pause)
    return reached and not attempt.ended


class _Parcels:
    """Whether so many checkpoints were seen on the attempt's disk so far."""

    def __init__(self, run: Run, attempt: Attempt, count: int, *, whole: bool) -> None:
        self._run, self._attempt, self._count, self._whole = run, attempt, count, whole
        self._seen: set[str] = set()

    def __call__(self) -> bool:
        self._seen.update(p.name for p in self._run.parcels(self._attempt) if not self._whole or _is_whole(p))
        return len(self._seen) >= self._count


def where(run: Run, attempt: Attempt) -> str:
    """The phase in which an attempt stands, or stood when it ended: by what is half done, else by its last word."""
    begun, committed = run.begun(), run.committed()
    for parcel in run.parcels(attempt):
        if not _is_whole(parcel):
            return SAVE
        if begun.get(parcel.name) and parcel.name not in committed:
            return UPLOAD
    phase = "start"
    for event in attempt.events():
        if event["event"] == "phase":
            phase = event["name"]
        elif event["event"] in ("step", "evaluation"):
            phase = "train"
    return phase


def _is_whole(parcel: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, ValueError):
        json.loads((parcel / "state.json").read_text())
        return {path.name for path in parcel.iterdir()} >= FILES
    return False


def _moment(event: dict) -> datetime:
    return datetime.fromisoformat(event["timestamp"])

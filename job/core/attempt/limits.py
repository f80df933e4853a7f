"""What a stop costs, whether it fits into the time given, and how often to commit: decided from measured seconds."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from job.core.errors import UsageError

ENDING_SECONDS = 2.0
"""What follows the last upload: manifest, the attempt's end record, and the end of an interpreter that holds a GPU."""
MARGIN = 2.0
"""What is measured on a good day doubles on a bad one. A stop that needs more than grace / MARGIN is warned of."""
LONGEST_INTERVAL_SECONDS = 600.0
"""Kills without notice happen too (a lost node, SIGKILL): this is the most that one of them costs. A save that blocks
for a second and a kill every two days give the same by Young's rule, sqrt(2 * 1 s * 50 h)."""
SAVING_SHARE = 0.02
"""At most this share of the training time goes into checkpoints that only the clock asks for."""
UNMEASURED_STOP_SECONDS = 60.0
"""What a stop is taken to need before one was measured; never more than the grace, which the operator chose for it."""
SLOW_LINK_BYTES_A_SECOND = 100e6
RECENT_STEPS = 100
RECENT_COMMITS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class StopFigures:
    """What a stop costs, for the report; None: it was not measured, for there was no such step or upload."""

    grace_seconds: float
    step_seconds_p95: float | None
    step_seconds_max: float | None
    save_seconds_p95: float | None
    save_seconds_max: float | None
    upload_seconds_p95: float | None
    upload_seconds_max: float | None
    checkpoint_bytes: int | None
    """The largest checkpoint."""
    needed_seconds: float | None
    """A step, a save, an upload, and the ENDING_SECONDS."""
    fits: bool | None
    """Whether that is within the grace."""
    at_100_mb_s_seconds: float | None
    """The save, and the checkpoint over a link of 100 MB/s."""


@dataclass(slots=True)
class StopCost:
    """Seconds of each step, save and upload of this attempt.

    Appending is safe from any thread, so the thread that uploads records too.
    """

    steps: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    uploads: list[float] = field(default_factory=list)
    checkpoint_bytes: int | None = None

    def add_step(self, seconds: float) -> None:
        """One optimizer step, all its micro-batches included."""
        self.steps.append(seconds)

    def add_save(self, seconds: float, size_bytes: int) -> None:
        """The part of a checkpoint that training waits for, and the size of its files."""
        self.saves.append(seconds)
        self.checkpoint_bytes = max(size_bytes, self.checkpoint_bytes or 0)

    def add_upload(self, seconds: float) -> None:
        """From the first byte of a checkpoint to its manifest."""
        self.uploads.append(seconds)

    @property
    def step_seconds(self) -> float | None:
        """95 in 100 of the recent steps are no longer: the rare longer one is cut short by `must_cut_step`.

        The first step stands apart while it is not alone: kernels compile in it, and no later step is like it.
        """
        return _p95(self.steps[1:][-RECENT_STEPS:] or self.steps)

    @property
    def save_seconds(self) -> float | None:
        """The longest of the recent saves: there are few, and none can be cut short."""
        return max(self.saves[-RECENT_COMMITS:], default=None)

    @property
    def upload_seconds(self) -> float | None:
        """The longest of the recent uploads: there are few, and none can be cut short."""
        return max(self.uploads[-RECENT_COMMITS:], default=None)

    @property
    def commit_seconds(self) -> float | None:
        """From a step's end to the process's: save, upload, ending."""
        save, upload = self.save_seconds, self.upload_seconds
        return None if save is None or upload is None else save + upload + ENDING_SECONDS

    @property
    def needed_seconds(self) -> float | None:
        """From a request to the process's end, when it comes at the beginning of a step."""
        step, commit = self.step_seconds, self.commit_seconds
        return None if step is None or commit is None else step + commit


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The time that this attempt is given. All moments are seconds on one clock of the caller's."""

    grace_seconds: float
    """From a request to stop to the kill."""
    deadline: float | None = None
    """The moment of the kill, if it is known."""
    cost: StopCost = field(default_factory=StopCost)

    @property
    def fits(self) -> bool | None:
        """Whether a whole step, its save and its upload are within the grace; None before they are measured."""
        needed = self.cost.needed_seconds
        return None if needed is None else needed <= self.grace_seconds

    def warning(self) -> str | None:
        """What a stop will do when it does not fit well, and what to do; None: it fits twice, or nothing is known."""
        cost = self.cost
        step, save, upload = cost.step_seconds, cost.save_seconds, cost.upload_seconds
        if step is None or save is None or upload is None or cost.commit_seconds is None:
            return None
        needed = step + cost.commit_seconds
        if needed * MARGIN <= self.grace_seconds:
            return None
        if cost.commit_seconds > self.grace_seconds:
            so = (
                "a stop loses the steps since the last commit, which is now committed about every "
                f"{_shown(self.interval_seconds)}"
            )
        elif needed > self.grace_seconds:
            so = "a stop drops the step under way"
        else:
            so = "that is more than half of it, and a slow day of the store loses the steps since the last commit"
        advice = {
            step: "a smaller train.batch_size makes steps shorter",
            save: "a faster disk under --workdir makes saves shorter",
            upload: "a smaller lora.r, or a faster way to the store, makes uploads shorter",
        }[max(step, save, upload)]
        return (
            f"a stop needs {_shown(needed)} (step {_shown(step)}, save {_shown(save)}, upload {_shown(upload)}, ending "
            f"{_shown(ENDING_SECONDS)}) and the grace is {_shown(self.grace_seconds)}: {so}. Give the scheduler's "
            f"grace and --grace-seconds at least {math.ceil(needed * MARGIN)} s; {advice}"
        )

    @property
    def interval_seconds(self) -> float:
        """The longest time between two commits.

        Where a stop's own checkpoint fits into the grace, only kills without notice lose work, and
        LONGEST_INTERVAL_SECONDS is enough. Where it does not, each stop loses what is not committed: then as often as
        SAVING_SHARE allows. Either way not more often than an upload takes.
        """
        save, upload, commit = self.cost.save_seconds, self.cost.upload_seconds, self.cost.commit_seconds
        shortest = max((save or 0.0) / SAVING_SHARE, upload or 0.0)
        if commit is not None and commit > self.grace_seconds:
            return shortest
        return max(LONGEST_INTERVAL_SECONDS, shortest)

    def checkpoint_due(
        self, *, steps_since: int, seconds_since: float, every_steps: int, uploads_under_way: int = 0
    ) -> bool:
        """Whether to commit now: after `every_steps` at the latest, earlier when the clock asks for it.

        Args:
            steps_since: steps since the last commit.
            seconds_since: seconds since the last commit was handed over.
            every_steps: the recipe's.
            uploads_under_way: one that the clock asks for would only wait behind them.
        """
        if steps_since >= every_steps:
            return True
        return steps_since > 0 and uploads_under_way == 0 and seconds_since >= self.interval_seconds

    def must_stop(self, now: float) -> bool:
        """Whether the deadline leaves no more than a stop needs, with its MARGIN."""
        return self.deadline is not None and self.deadline - now <= self._stop_seconds

    def enough_time(self, now: float) -> bool:
        """Whether an attempt is worth beginning: the time of a stop for reaching the first step, and once more."""
        return self.deadline is None or self.deadline - now > 2 * self._stop_seconds

    @property
    def _stop_seconds(self) -> float:
        needed = self.cost.needed_seconds
        return min(self.grace_seconds, UNMEASURED_STOP_SECONDS) if needed is None else needed * MARGIN

    def must_cut_step(
        self, now: float, asked_at: float | None, *, uploads_under_way: int = 0, next_look_seconds: float = 0.0
    ) -> bool:
        """Whether the step under way must be dropped, so that the state before it can still be saved and uploaded.

        Args:
            now: the moment.
            asked_at: when the stop was asked for; None: only the deadline counts.
            uploads_under_way: checkpoints that go before this one.
            next_look_seconds: until this is asked again: the longest micro-batch.
        """
        kills = [] if asked_at is None else [asked_at + self.grace_seconds]
        kills += [] if self.deadline is None else [self.deadline]
        if not kills:
            return False
        commit = self.cost.commit_seconds
        # Before the first checkpoint: half of the grace for the step, half for saving.
        reserve = self.grace_seconds / 2 if commit is None else commit
        reserve += uploads_under_way * (self.cost.upload_seconds or 0.0)
        return now + next_look_seconds + reserve > min(kills)

    def figures(self) -> StopFigures:
        """The numbers for the report, over all of this attempt."""
        cost = self.cost
        save, size = cost.save_seconds, cost.checkpoint_bytes
        return StopFigures(
            grace_seconds=self.grace_seconds,
            step_seconds_p95=_p95(cost.steps),
            step_seconds_max=max(cost.steps, default=None),
            save_seconds_p95=_p95(cost.saves),
            save_seconds_max=max(cost.saves, default=None),
            upload_seconds_p95=_p95(cost.uploads),
            upload_seconds_max=max(cost.uploads, default=None),
            checkpoint_bytes=size,
            needed_seconds=cost.needed_seconds,
            fits=self.fits,
            at_100_mb_s_seconds=None if save is None or size is None else save + size / SLOW_LINK_BYTES_A_SECOND,
        )


_UNIX_SECONDS = re.compile(r"\d{10}(\.\d+)?")
"""Ten digits: years 2001 to 2286. Fewer are a duration or a date, more are milliseconds."""


def parse_deadline(text: str) -> float:
    """A moment in Unix seconds, from them or from ISO 8601 with its zone.

    Raises:
        UsageError: neither of both. A time without a zone is refused as well: a guess may be hours off.
    """
    said = text.strip()
    if _UNIX_SECONDS.fullmatch(said):
        return float(said)
    try:
        moment = datetime.fromisoformat(said)
    except ValueError:
        moment = None
    if moment is not None and moment.tzinfo is not None:
        return moment.timestamp()
    what = "no moment" if moment is None else "a time without a zone"
    raise UsageError(
        f"deadline {text!r}: {what}; write it as 2031-05-28T04:00:00Z, as 2031-05-28T04:00:00+02:00, "
        "or in Unix seconds (`date +%s` prints those of now)"
    )


def _p95(seconds: Sequence[float]) -> float | None:
    """Nearest rank: of fewer than 20 the largest; None of none."""
    return sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1] if seconds else None


def _shown(seconds: float) -> str:
    if seconds >= 120:  # noqa: PLR2004 - two minutes and more are read in minutes
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"  # noqa: PLR2004 - two digits are enough

"""What can go wrong, its exit code, and whether trying again helps: the one table.

JobError
├── UsageError          64  the command line or the recipe is wrong
├── DataError           65  the dataset's content is wrong
├── NotFoundError       66  dataset, base model or revision does not exist
├── UnavailableError    69  store or hub down after our own retries
├── LocalDiskError      74  local disk full or read-only, or the store has no room
├── StopRequestedError  75  someone asked us to stop
├── DeniedError         77  no permission; a gated model
├── RunConflictError    78  the run id belongs to another recipe or other data
├── DivergedError       80  loss or gradient not finite
├── CannotFitError      81  this kind of GPU cannot run it
├── SickDeviceError     82  this GPU or node is sick, or no GPU is visible
├── StalledError        83  no progress for the time allowed
├── LockedError         84  another live attempt holds the run
└── PeerLostError       70  another process of the run went without a word
"""

import enum
import errno
from dataclasses import dataclass
from typing import ClassVar


class Again(enum.Enum):
    """Whether a scheduler should start the same job again."""

    NEVER = "no"
    """The same input ends the same way."""
    COUNTED = "yes, counted"
    """Against the scheduler's own retry limit."""
    ELSEWHERE = "yes, elsewhere, counted"
    """As COUNTED, but not on the same node."""
    ALWAYS = "yes, not counted"
    """Not a failure: the job was asked to stop and goes on where it stood."""
    DONE = "-"
    """Nothing is left to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """One row of the table of exit codes."""

    code: int
    meaning: str
    again: Again
    action: str
    """What a person does about it, in one sentence."""


class JobError(Exception):
    """A failure that is understood: its message says where, what, and what to do."""

    code: ClassVar[int] = 70

    def __init__(self, *said: object, action: str | None = None) -> None:
        """With the message; `action`: what a person does, where the table's word for the code does not fit."""
        super().__init__(*said)
        self.action = action


class UsageError(JobError):
    """The command line or the recipe is wrong."""

    code = 64


class DataError(JobError):
    """The dataset's content is wrong."""

    code = 65


class NotFoundError(JobError):
    """A dataset, base model or revision does not exist."""

    code = 66


class UnavailableError(JobError):
    """The store or the hub did not answer after our own retries."""

    code = 69


class LocalDiskError(JobError):
    """The local disk is full or read-only, or the store has no room."""

    code = 74


class StopRequestedError(JobError):
    """Someone asked the job to stop; what is committed stays committed."""

    code = 75


class DeniedError(JobError):
    """Permission denied, or a gated model whose licence was not accepted."""

    code = 77


class RunConflictError(JobError):
    """The run id belongs to another recipe or to other data."""

    code = 78


class DivergedError(JobError):
    """The loss or a gradient is not finite."""

    code = 80


class CannotFitError(JobError):
    """This kind of GPU cannot run the recipe: too small for one example, or no bf16."""

    code = 81


class SickDeviceError(JobError):
    """This GPU or node is sick, or no GPU is visible."""

    code = 82


class StalledError(JobError):
    """No progress for the time allowed."""

    code = 83


class LockedError(JobError):
    """Another live attempt holds the run."""

    code = 84


class PeerLostError(JobError):
    """Another of the processes that work on the run is gone; where it left word, that is the cause, and not this."""


ENDINGS: tuple[Ending, ...] = (
    Ending(
        code=0,
        meaning="the report is committed; or it was already; or evaluated and not promoted (the report says so)",
        again=Again.DONE,
        action="read the report",
    ),
    Ending(
        code=64,
        meaning="usage or recipe is wrong",
        again=Again.NEVER,
        action="correct the command line or the recipe",
    ),
    Ending(
        code=65,
        meaning='data is wrong: `train.jsonl:17: "output" is missing`',
        again=Again.NEVER,
        action="do what the message says",
    ),
    Ending(
        code=66,
        meaning="dataset, base model or revision not found",
        again=Again.NEVER,
        action="correct the URI, the model id or the revision",
    ),
    Ending(
        code=69,
        meaning="store or hub unavailable after our own retries",
        again=Again.COUNTED,
        action="look at the endpoint and the network, then start the same job again",
    ),
    Ending(
        code=70,
        meaning="a bug: full traceback (final when the same failure comes at the same step twice)",
        again=Again.COUNTED,
        action="report it with the log",
    ),
    Ending(
        code=74,
        meaning="local disk full or read-only, or the store has no room",
        again=Again.COUNTED,
        action="give the work folder more room, or name another one with --workdir",
    ),
    Ending(
        code=75,
        meaning=(
            "stopped on request; the newest checkpoint is committed "
            "(the third in a row without a new committed step ends 83)"
        ),
        again=Again.ALWAYS,
        action="start the same job again; it goes on from the last committed step",
    ),
    Ending(
        code=77,
        meaning='permission denied, gated model (says where its licence is accepted); never reported as "not found"',
        again=Again.NEVER,
        action="correct the credentials or accept the model's licence",
    ),
    Ending(
        code=78,
        meaning="the run id belongs to another recipe or other data",
        again=Again.NEVER,
        action="leave --run-id out, or choose another one",
    ),
    Ending(
        code=80,
        meaning="diverged: loss or gradient not finite",
        again=Again.NEVER,
        action="lower train.learning_rate, or look at the examples of the named step",
    ),
    Ending(
        code=81,
        meaning="cannot run on this GPU: too small for one example, or no bf16 (says which knob)",
        again=Again.NEVER,
        action="use a larger GPU, or lower the named setting",
    ),
    Ending(
        code=82,
        meaning="this GPU or node is sick, or no GPU is visible",
        again=Again.ELSEWHERE,
        action="start the same job on another node and have this one looked at",
    ),
    Ending(
        code=83,
        meaning="stalled: no progress for the time allowed",
        again=Again.COUNTED,
        action="look at the stacks in the log, then start the same job again",
    ),
    Ending(
        code=84,
        meaning="another live attempt holds the run",
        again=Again.NEVER,
        action="let the other attempt work, or stop it first",
    ),
)


def ending(code: int) -> Ending:
    """The row of the table for an exit code.

    Raises:
        KeyError: the job never ends with this code.
    """
    return {row.code: row for row in ENDINGS}[code]


def exit_code(error: BaseException) -> int:
    """The code that a process ends with after this error."""
    if isinstance(error, JobError):
        return error.code
    if isinstance(error, OSError) and error.errno in _DISK_TROUBLE:
        return LocalDiskError.code
    return JobError.code


def is_effect(error: BaseException | None) -> bool:
    """Whether it is only what another process's end has done to this one."""
    while error is not None:
        if isinstance(error, PeerLostError):
            return True
        error = error.__cause__
    return False


def error_of(code: int, said: str, *, action: str | None = None) -> JobError:
    """The error that another process has ended with, by its code."""
    kinds = {kind.code: kind for kind in JobError.__subclasses__() if "code" in vars(kind)}
    return kinds.get(code, JobError)(said, action=action)


def action_for(error: BaseException | None) -> str:
    """What a person does about this ending, in one sentence; None: nothing failed."""
    own = error.action if isinstance(error, JobError) else None
    return own or ending(0 if error is None else exit_code(error)).action


_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)


def table_markdown() -> str:
    """The table as the README shows it."""
    rows = [f"| {row.code} | {row.meaning} | {row.again.value} | {row.action} |" for row in ENDINGS]
    return "\n".join(["| code | meaning | again? | what to do |", "|--:|---|---|---|", *rows])

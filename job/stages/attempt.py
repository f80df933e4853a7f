"""What the stages share: what every worker needs, what the owner of the run needs, and a clock by phase."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from job.core.attempt.ended import EndedPromotion
from job.core.attempt.history import gained
from job.core.attempt.limits import Limits
from job.core.errors import DeniedError, LocalDiskError, UnavailableError, UsageError
from job.core.given import Given
from job.core.plan.memory import Placement, WantedEngine
from job.core.recipe.schema import Recipe
from job.edge.host.outcome import Outcome
from job.edge.store.objects import StoreSettings

log = structlog.get_logger(__name__)
_PROGRESS_SECONDS = 10.0
"""A long phase says how far it is this often."""
BEFORE, BETWEEN = "start", "other"
"""What the time before the first phase is counted as, and the time outside of all phases after it."""


class Phases:
    """Where the attempt's time goes, from its process's start on: each moment counts for the innermost phase alone."""

    def __init__(self, outcome: Outcome, *, began: float) -> None:
        """Count from `began`, on the monotonic clock."""
        self.began = began
        self.seconds: dict[str, float] = {}
        """By phase; what the phase under way took is added when it changes."""
        self.current: str | None = None
        """The phase under way; after a failure the one that it came in."""
        self._counted_as, self._counted_from = BEFORE, began
        self._outcome = outcome
        self._reported_at = 0.0
        self.on_phase: Callable[[str], str] = lambda name: name
        """Gets each phase; who watches over the attempt sets it."""
        self.on_beat: Callable[[], None] = lambda: None
        """Called when something moves."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase; a name that comes again adds up."""
        log.info("phase", name=name)
        self._outcome.progress(phase=name)
        outer, self.current = self.current, name
        watched = self.on_phase(name)
        counted_as = self._count_as(name)
        self._reported_at = time.monotonic()
        try:
            yield
            self.current = outer
        finally:
            self.on_phase(watched)
            self._count_as(BETWEEN if counted_as == BEFORE else counted_as)

    def so_far(self) -> dict[str, float]:
        """Seconds by phase up to this moment, the phase under way included: together the age of the process."""
        self._count_as(self._counted_as)
        return dict(self.seconds)

    def _count_as(self, name: str) -> str:
        """The time that follows counts as this; returns what it counted as until now."""
        now, before = time.monotonic(), self._counted_as
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._counted_from
        self._counted_as, self._counted_from = name, now
        return before

    def progress(self, **facts: float | str) -> None:
        """Something moved: say how far the phase is, but not too often."""
        self.on_beat()
        now = time.monotonic()
        if now - self._reported_at >= _PROGRESS_SECONDS:
            self._reported_at = now
            log.info("progress", **facts)

    def fetched(self, done: int, of: int) -> None:
        """Bytes moved: `progress` in the form that downloads report it."""
        self.progress(bytes=done, of=of)


@dataclass(slots=True, kw_only=True)
class Standing:
    """Where the run stands, for the records and the outcome of how the attempt ended."""

    run_uri: str | None = None
    number: int | None = None
    """Which attempt at the run this is, from 1; None: it has no number yet."""
    device: str | None = None
    ranks: int = 1
    """Processes that work on it, a GPU each."""
    from_step: int = 0
    """The step this attempt began with."""
    step: int = 0
    """The last step whose numbers are known."""
    last_committed_step: int | None = None
    gained_elsewhere: bool = False
    """This attempt has committed a new step of another training that the run needs."""
    asked_at: float | None = None
    """When a stop was asked for, on the monotonic clock."""
    late: tuple[str, ...] = ()
    """Files that are left out as they are not whole yet, and why."""
    promotion: EndedPromotion | None = None
    """What came of the run on its channel, once that is decided."""
    final: bool = False
    """It failed as the attempt before it did: starting it again helps nothing, whatever its exit code says."""

    @property
    def gained(self) -> bool:
        """Whether a step was committed that was not there when the attempt began."""
        facts = {"last_committed_step": self.last_committed_step, "gained_elsewhere": self.gained_elsewhere}
        return gained(self.from_step, facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What every process that computes for a run needs."""

    recipe: Recipe
    workdir: Path
    device: str
    """`auto`, `cuda` or `cpu`."""
    engine: WantedEngine
    placement: Placement | None = None
    """Of the base, as asked for; None: nothing is."""
    should_stop: Callable[[], bool]
    hub_token: str | None = field(default=None, repr=False)
    """What HF_TOKEN is, for what is pushed."""

    @property
    def settings(self) -> StoreSettings:
        """How the store is spoken to."""
        store = self.recipe.store
        return StoreSettings(sse_kms_key=store.sse_kms_key, checksums=store.checksums)

    @property
    def models_folder(self) -> Path:
        """Where base models are kept for later runs."""
        return self.workdir / "models"

    def run_folder(self, run_id: str) -> Path:
        """What a run needs on this disk until it is done."""
        return self.workdir / "runs" / run_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What the one process that owns the run needs besides: its limits, whom it reports to, where it stands."""

    worker: Worker
    run_id: str | None
    """The one that was asked for; None: the run's identity gives it."""
    overrides: Sequence[Given]
    """What was set over the recipe's keys, later ones winning."""
    ask_to_stop: Callable[[str], None]
    """Asks for it from within, with the reason."""
    is_kill_near: Callable[[], bool]
    """Whether it was asked for from outside, so that the kill follows after the grace."""
    report_end: Callable[[BaseException], int]
    """Log and outcome file of an end that does not come back to the front door; returns the exit code."""
    leave_word: Callable[[BaseException], None]
    """Its ending in the store, and the notice of it: what outlives this machine."""
    grace_seconds: float | None
    """From a request to stop to the kill; None: not known."""
    limits: Limits
    """What a stop costs, and the deadline on the monotonic clock."""
    stall_seconds: float | None
    """How long any phase may be silent; None: each has its own time."""
    lease_seconds: float
    """How long a silent owner of the run's lock is taken for alive."""
    force: bool
    """Work on the run although its last attempts failed in the same way."""
    started: str
    """When the process began."""
    hide: Callable[[str], str]
    """Takes secrets out of a text that is kept."""
    outcome: Outcome
    phases: Phases
    step_events_seconds: float
    """Least time between two step events: 0 logs every step."""
    hear_stop: Callable[[], None] = lambda: None
    """Another process of the run got a signal to stop: it is ours too."""
    standing: Standing = field(default_factory=Standing)
    notes: list[str] = field(default_factory=list)
    """What the report's reader should know."""

    def runs_at(self, uri: str) -> None:
        """The run is known, and stands in the store."""
        self.standing.run_uri = uri
        self.outcome.safe(run_uri=uri, last_committed_step=self.standing.last_committed_step)

    def committed(self, step: int) -> None:
        """The state after this step is safe."""
        self.standing.last_committed_step = step
        self.outcome.safe(run_uri=self.standing.run_uri, last_committed_step=step)

    @contextmanager
    def not_at_the_cost_of_the_run(self, what: str) -> Iterator[None]:
        """Write something for people alone: where the store refuses it, log and report say so, and the run goes on."""
        try:
            yield
        except (DeniedError, LocalDiskError, UnavailableError, UsageError) as error:
            log.warning("not_written", what=what, reason=str(error))
            self.notes.append(f"not written: {what} ({self.hide(str(error))})")

    def moves_on(self) -> bool:
        """For loops in which each question is a bit of progress: count it as such, and say whether to stop."""
        self.phases.on_beat()
        return self.worker.should_stop()

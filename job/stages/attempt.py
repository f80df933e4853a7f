"""What every stage of an attempt shares: the recipe, where to work, whom to tell, and a clock by phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from job.core.recipe import Recipe
from job.edge.outcome import Outcome
from job.edge.storage import StoreSettings

log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 10.0
"""A long phase says how far it is this often."""


class Phases:
    """Seconds by phase; a phase within another is counted once, as itself."""

    def __init__(self, outcome: Outcome) -> None:
        self.seconds: dict[str, float] = {}
        self._counted = 0.0
        self._outcome = outcome
        self._told_at = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase; a name that comes again adds up."""
        log.info("phase", name=name)
        self._outcome.progress(phase=name)
        began = self._told_at = time.monotonic()
        counted_before = self._counted
        try:
            yield
        finally:
            elapsed, inner = time.monotonic() - began, self._counted - counted_before
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - inner
            self._counted = counted_before + elapsed

    def progress(self, **facts: float | str) -> None:
        """Say how far the phase is, but not too often."""
        now = time.monotonic()
        if now - self._told_at >= _PROGRESS_SECONDS:
            self._told_at = now
            log.info("progress", **facts)


@dataclass(slots=True, kw_only=True)
class Standing:
    """Where the run stands, for whoever is told how the attempt ended."""

    run_uri: str | None = None
    device: str | None = None
    from_step: int = 0
    """The step this attempt began with."""
    last_committed_step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One process that works on a run."""

    recipe: Recipe
    workdir: Path
    device: str
    """`auto`, `cuda` or `cpu`."""
    run_id: str | None
    """As asked for; None: the run's identity gives it."""
    should_stop: Callable[[], bool]
    hide: Callable[[str], str]
    """Takes secrets out of a text that is kept."""
    outcome: Outcome
    phases: Phases
    step_events_seconds: float
    """Least time between two step events: 0 tells every step."""
    standing: Standing = field(default_factory=Standing)
    notes: list[str] = field(default_factory=list)
    """What the report's reader should know."""

    @property
    def settings(self) -> StoreSettings:
        """How the store is spoken to."""
        store = self.recipe.store
        return StoreSettings(sse_kms_key=store.sse_kms_key, checksums=store.checksums)

    @property
    def models_folder(self) -> Path:
        """Where base models are kept for later runs."""
        return self.workdir / "models"

"""Which objects the data is made of: as a recipe's URIs name them now, or as a run's record holds them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from job.core.attempt.run_record import RecordedObject, RunRecord
from job.core.errors import NotFoundError
from job.core.recipe.data_section import DataSection, DataSource
from job.edge.relative_paths import relative_note
from job.edge.store.listing import expand, may_name
from job.edge.store.objects import StoredObject, StoreSettings
from job.stages.nightly.late_files import LateFile

Objects = tuple[StoredObject, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """What the data is, source by source."""

    train: tuple[Objects, ...]
    """Of each source to train on: one as a rule."""
    validation: tuple[Objects, ...]
    """Of each held-out source; empty when validation is a fraction of the training files."""
    late: tuple[LateFile, ...] = ()
    """Files to train on that are left out, as they are not whole yet."""

    @property
    def every(self) -> Objects:
        """All objects."""
        return tuple(chain.from_iterable((*self.train, *self.validation)))

    def recorded(self) -> dict[str, Any]:
        """As run.json holds them."""
        return {"train": _records(self.train), "validation": _records(self.validation)}


def list_data(data: DataSection, settings: StoreSettings, *, should_stop: Callable[[], bool]) -> Sides:
    """What the recipe's URIs name now, by side and source; none held out when that is a fraction of the training files.

    Raises:
        NotFoundError: a URI names nothing.
    """

    def listed(sources: Sequence[DataSource]) -> tuple[Objects, ...]:
        return tuple(_expanded(source.uris, settings, should_stop=should_stop) for source in sources)

    return Sides(train=listed(data.sources), validation=listed(data.held_out_sources))


def _expanded(
    uris: Sequence[str], settings: StoreSettings, *, should_stop: Callable[[], bool]
) -> tuple[StoredObject, ...]:
    try:
        return tuple(expand(uris, settings, should_stop=should_stop))
    except NotFoundError as error:
        raise NotFoundError(f"{error}{relative_note(uris)}") from error


def recorded_sides(record: RunRecord, run_id: str, data: DataSection) -> Sides:
    """The record's objects by side, if it is that of this run, and they are within what the recipe names."""
    if record.run_id != run_id:
        raise ValueError(f"run_id: it is the record of {record.run_id!a:.80}")
    if bool(record.data.validation) != bool(data.held_out_sources):
        raise ValueError("data.validation: the recipe holds out examples in another way")
    return Sides(
        train=_recorded(record.data.train, data.sources, side="train"),
        validation=_recorded(record.data.validation, data.held_out_sources, side="validation"),
    )


def _recorded(objects: Sequence[RecordedObject], sources: Sequence[DataSource], *, side: str) -> tuple[Objects, ...]:
    """The objects of one side, each one that its source's own URIs can mean: who chooses the data is the recipe."""
    found: list[list[StoredObject]] = [[] for _ in sources]
    may = [may_name(source.uris) for source in sources]
    for o in objects:
        if o.source >= len(sources):
            raise ValueError(f"data.{side}: the recipe has no source {o.source}")
        if not may[o.source](o.uri):
            raise ValueError(f"data.{side}: {o.uri!a:.200} is not within what the recipe's data.{side} names")
        found[o.source].append(StoredObject(uri=o.uri, key=o.uri, etag=o.etag, version=o.version, size=o.size))
    if not all(found):
        raise ValueError(f"data.{side}: no object of source {found.index([])}")
    return tuple(map(tuple, found))


def _records(sources: Sequence[Objects]) -> list[dict[str, Any]]:
    """The objects of one side; those of the second source on name its place."""
    return [
        {"uri": o.uri, "etag": o.etag, "version": o.version, "size": o.size} | ({"source": place} if place else {})
        for place, objects in enumerate(sources)
        for o in objects
    ]

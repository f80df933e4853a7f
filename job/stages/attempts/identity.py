"""Which run is this? One that is done, one to resume, or a new one."""

import glob
import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

import structlog

from job.core.attempt.history import final_end
from job.core.attempt.run_record import RECORD_VERSION, RecordedParent, read_run_record
from job.core.errors import DataError, NotFoundError, RunConflictError
from job.core.recipe.schema import Recipe, identity_of
from job.edge.base import fetching
from job.edge.base.fetching import BaseModelIdentity
from job.edge.run.artifacts import Artifacts, unfinished_runs
from job.edge.run.channels import Channel
from job.edge.store.listing import expand
from job.edge.store.objects import ObjectStore, StoreSettings
from job.edge.store.opening import open_store
from job.edge.store.probing import Probe, probe
from job.stages.data.data_objects import Objects, Sides, list_data, recorded_sides
from job.stages.nightly.late_files import refuse_late, without_late

log = structlog.get_logger(__name__)


WEIGHTS = "adapter_model.safetensors"
"""The file of an adapter that decides what the model is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is frozen at a run's first attempt."""

    artifacts: Artifacts
    base: BaseModelIdentity
    sides: Sides
    record: Mapping[str, Any]
    """What run.json says, or will say."""
    begun: bool
    """run.json stands. It is written once base and data have proved usable: bad input leaves nothing in the store."""
    done: bool
    """Its report is committed: there is nothing left to do."""
    parent: RecordedParent | None = None
    """The adapter that it starts from; None: none, the base alone."""

    @property
    def train(self) -> Objects:
        """Of all sources."""
        return tuple(chain.from_iterable(self.sides.train))

    @property
    def validation(self) -> Objects:
        """Of all held-out sources."""
        return tuple(chain.from_iterable(self.sides.validation))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What a recipe names now."""

    recipe: Recipe
    base: BaseModelIdentity
    settings: StoreSettings
    store: ObjectStore
    should_stop: Callable[[], bool]

    def identity(self) -> dict[str, Any]:
        """What run.json says of recipe and base, the data apart."""
        return {"recipe": identity_of(self.recipe), "base": _base(self.base)}

    def is_recorded_in(self, record: Mapping[str, Any]) -> bool:
        """Whether a run.json is one of this recipe and base."""
        return {name: record.get(name) for name in ("recipe", "base")} == self.identity()

    def list_data(self) -> Sides:
        """See `list_data`; on a channel without files that are not whole yet."""
        listed = list_data(self.recipe.data, self.settings, should_stop=self.should_stop)
        channel = self.channel()
        if channel is None:
            return listed
        known = _read_before(self.store, channel)
        longest = self.recipe.data.max_record
        train, late = without_late(
            listed.train, self.settings, max_record=longest, known=known, should_stop=self.should_stop
        )
        refuse_late(
            "data.validation",
            listed.validation,
            self.settings,
            max_record=longest,
            known=known,
            should_stop=self.should_stop,
        )
        return Sides(train=train, validation=listed.validation, late=late)

    def channel(self) -> Channel | None:
        """What the run competes on, to be looked at; None: on nothing."""
        name = self.recipe.promote.channel
        return None if name is None else Channel(self.store, name, conditional=False)

    def parent(self) -> RecordedParent | None:
        """The adapter that a run which begins now starts from."""
        channel = self.channel()
        if channel is None or self.recipe.promote.start_from == "base":
            return None
        now, _ = channel.promoted()
        if now is None or now.run_id is None or now.adapter is None:
            return None
        weights = now.adapter.files[WEIGHTS].sha256
        return RecordedParent(run_id=now.run_id, sequence=now.sequence, weights=weights)


def find_run(
    recipe: Recipe,
    *,
    run_id: str | None,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
    complete: bool = True,
) -> Run:
    """Look the run up; nothing is written.

    An unfinished run of the same recipe and base is resumed with the objects it was begun with, also when new files
    have come under the glob since: a retry is the same run.

    Args:
        recipe: what is to be run.
        run_id: the one that was asked for; None: the recipe's and the data's identity give it.
        settings: of the stores.
        should_stop: polled while a base folder is read and data is listed.
        complete: False where the base needs no weights, since none will be loaded.

    Raises:
        RunConflictError: the given run id belongs to another recipe or other data.
        NotFoundError: no such data or base model.
    """
    store = open_store(recipe.output, settings)
    model = recipe.model
    base = fetching.identify(model.base, model.revision, settings=settings, complete=complete, should_stop=should_stop)
    wanted = _Wanted(recipe=recipe, base=base, settings=settings, store=store, should_stop=should_stop)
    if run_id is not None:
        return _named(wanted, Artifacts(store, run_id))
    recipe_part = _hash(identity_of(recipe))  # first: runs of the same recipe stand side by side, whatever their data
    for artifacts in unfinished_runs(store, recipe_part + "-"):
        run = _unfinished(wanted, artifacts)
        if run is not None:
            return run
    listed = wanted.list_data()
    return _new(wanted, Artifacts(store, f"{recipe_part}-{_data_part(base, listed)}"), listed)


def frozen_run(
    recipe: Recipe,
    artifacts: Artifacts,
    base: BaseModelIdentity,
    *,
    settings: StoreSettings,
    should_stop: Callable[[], bool],
) -> Run:
    """A run with the objects that it was begun with, whatever its recipe names now.

    Args:
        recipe: the run's own.
        artifacts: its place in the store.
        base: that it was trained on.
        settings: of the stores.
        should_stop: polled while data is listed.

    Raises:
        NotFoundError: its data is no longer there as it was.
        DataError: run.json is another run's, or damaged.
    """
    store = open_store(recipe.output, settings)
    wanted = _Wanted(recipe=recipe, base=base, settings=settings, store=store, should_stop=should_stop)
    record = artifacts.run_record()
    if record is None or not wanted.is_recorded_in(record):
        raise DataError(f"{artifacts.uri}: run.json is not there, or not of the run that report.json is of")
    run = _from_record(wanted, artifacts, record)
    if not _stands(wanted, run):
        raise NotFoundError(
            f"{artifacts.uri}: the data of this run is no longer there as it was, and its held-out examples are needed",
            action="put the objects that run.json names back",
        )
    return run


def probe_output(uri: str, settings: StoreSettings) -> Probe:
    """Try the output out now: what fails there must not fail only once there is something to lose.

    Raises:
        DeniedError: we may not write or delete there.
    """
    return probe(open_store(uri, settings))


def _named(wanted: _Wanted, artifacts: Artifacts) -> Run:
    """The run with a given id, which may be new."""
    record = artifacts.run_record()
    if record is None:
        return _new(wanted, artifacts, wanted.list_data())
    if not wanted.is_recorded_in(record):
        raise RunConflictError(
            f"{artifacts.uri}: this run was begun with another recipe (different: "
            f"{_differences(record, wanted.identity())}); leave --run-id out, or choose another one"
        )
    run = _from_record(wanted, artifacts, record)
    same = _is_listed(wanted, run) if run.done else _stands(wanted, run)
    if not same:
        raise RunConflictError(
            f"{artifacts.uri}: this run was begun with other data, which is no longer there as it was; "
            "leave --run-id out, or choose another one"
        )
    return run


def _unfinished(wanted: _Wanted, artifacts: Artifacts) -> Run | None:
    """The run, if it is one of this recipe and base that can be resumed."""
    record = artifacts.run_record()
    if record is None or not wanted.is_recorded_in(record):
        return None
    run = _from_record(wanted, artifacts, record)
    if run.done:
        return None
    reason = None
    if not _stands(wanted, run):
        reason = "its data is no longer there as it was"
    elif _is_past_helping(wanted, run):
        reason = "it would end again as it ended, and there is other data by now"
    if reason is not None:
        log.warning("unfinished_run_left", run_id=artifacts.run_id, reason=reason)
        return None
    return run


def _is_past_helping(wanted: _Wanted, run: Run) -> bool:
    """Whether a night has failed for good, and what there is now to train on is not what it failed on.

    On a channel nobody looks each morning: one night's bad data must not stand in the way of the nights after it.
    """
    if wanted.channel() is None or final_end(run.artifacts.attempts(newest=2)) is None:
        return False
    return not _is_listed(wanted, run)


def _new(wanted: _Wanted, artifacts: Artifacts, listed: Sides) -> Run:
    parent = wanted.parent()
    record = {
        "version": RECORD_VERSION,
        "run_id": artifacts.run_id,
        **wanted.identity(),
        "data": listed.recorded(),
        **({} if parent is None else {"parent": parent.model_dump(mode="json")}),
    }
    return Run(
        artifacts=artifacts,
        base=wanted.base,
        sides=listed,
        parent=parent,
        record=record,
        begun=artifacts.run_record() is not None,
        done=artifacts.report() is not None,
    )


def same_data(recipe: Recipe, run: Run) -> Run:
    """The run of another recipe on the very objects of a run."""
    identity = identity_of(recipe)
    run_id = f"{_hash(identity)}-{_data_part(run.base, run.sides)}"
    record = {"version": RECORD_VERSION, "recipe": identity, "base": _base(run.base)}
    artifacts = run.artifacts.other_run(run_id)
    return Run(
        artifacts=artifacts,
        base=run.base,
        sides=run.sides,
        record={**record, "run_id": run_id, "data": run.sides.recorded()},
        begun=artifacts.run_record() is not None,
        done=artifacts.report() is not None,
    )


def _read_before(store: ObjectStore, channel: Channel) -> set[tuple[str, str]]:
    """URI and ETag of the objects of the run in use and of the last night's; without those that are not known."""
    now, _ = channel.promoted()
    state, _ = channel.state()
    runs = {night.run_id for night in (() if state is None else state.nights[-1:])}
    if now is not None and now.run_id is not None:
        runs.add(now.run_id)
    known: set[tuple[str, str]] = set()
    for run_id in runs:
        record = Artifacts(store, run_id).run_record()
        with suppress(ValueError):
            data = None if record is None else read_run_record(record).data
            known |= set() if data is None else {(o.uri, o.etag) for o in (*data.train, *data.validation)}
    return known


def _stands(wanted: _Wanted, run: Run) -> bool:
    """Whether every object of the run is still there, unchanged."""
    objects = run.sides.every
    try:
        names = [glob.escape(o.uri) for o in objects]  # a name may hold what a pattern would
        found = expand(names, wanted.settings, should_stop=wanted.should_stop)
    except NotFoundError:
        return False
    return {(o.uri, o.etag, o.size) for o in found} == {(o.uri, o.etag, o.size) for o in objects}


def _is_listed(wanted: _Wanted, run: Run) -> bool:
    """Whether the recipe's URIs name exactly the run's objects now."""
    try:
        return wanted.list_data().recorded() == run.sides.recorded()
    except NotFoundError:
        return False


def _from_record(wanted: _Wanted, artifacts: Artifacts, record: Mapping[str, Any]) -> Run:
    """The run that a run.json of this recipe and base freezes.

    Raises:
        DataError: it is not what this job writes there, or names data that the recipe does not.
    """
    try:
        read = read_run_record({**record})
        sides = recorded_sides(read, artifacts.run_id, wanted.recipe.data)
    except ValueError as error:
        raise DataError(
            f"{artifacts.uri}/run.json: damaged, or changed by somebody ({error}); look at who can write there, and "
            "start again with another --run-id"
        ) from error
    return Run(
        artifacts=artifacts,
        base=wanted.base,
        sides=sides,
        parent=read.parent,
        record=record,
        begun=True,
        done=artifacts.report() is not None,
    )


def _base(base: BaseModelIdentity) -> dict[str, str]:
    return {"source": base.source, "revision": base.revision}


def _data_part(base: BaseModelIdentity, listed: Sides) -> str:
    return _hash({"base": _base(base), **listed.recorded()})


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def _differences(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys in which a record differs, for a message."""
    parts = {name: part for name, part in record.items() if isinstance(part, Mapping)}
    pairs = [(name, parts.get(name, {}), wanted[name]) for name in ("base", "recipe")]
    keys = [f"{name}.{key}" for name, old, new in pairs for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(keys) or "its format"

"""Which run is this? One that is done, one to go on with, or a new one."""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from job.core.errors import DeniedError, NotFoundError, RunConflictError
from job.core.recipe import Fraction, identity_of
from job.edge.base import fetching as base_model
from job.edge.base.fetching import BaseModelIdentity
from job.edge.run.artifacts import Artifacts, runs_of
from job.edge.store.listing import expand
from job.edge.store.objects import StoredObject
from job.edge.store.opening import open_store
from job.edge.store.probing import Probe, probe
from job.stages.attempt import Attempt

log = structlog.get_logger(__name__)

RECORD_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What is frozen at a run's first attempt."""

    artifacts: Artifacts
    base: BaseModelIdentity
    train: tuple[StoredObject, ...]
    validation: tuple[StoredObject, ...]
    """Empty when validation is a fraction of the training files."""
    record: Mapping[str, Any]
    """What run.json says, or will say."""
    begun: bool
    """run.json stands. It is written once base and data have proved usable: bad input leaves nothing in the store."""
    done: bool
    """Its report is committed: there is nothing left to do."""


def find_run(attempt: Attempt, *, complete: bool = True) -> Run:
    """Look the run up; nothing is written.

    An unfinished run of the same recipe and base goes on with the objects it was begun with, also when new files have
    come under the glob since: a retry is the same run.

    Args:
        attempt: whose recipe it is.
        complete: False where the base needs no weights, since none will be loaded.

    Raises:
        RunConflictError: the given run id belongs to another recipe or other data.
        NotFoundError: no such data or base model.
    """
    recipe = attempt.recipe
    store = open_store(recipe.output, attempt.settings)
    base = base_model.identify(
        recipe.model.base,
        recipe.model.revision,
        settings=attempt.settings,
        complete=complete,
        should_stop=attempt.should_stop,
    )
    if attempt.run_id is not None:
        return _named(attempt, Artifacts(store, attempt.run_id), base)
    for artifacts in runs_of(store, _recipe_part(attempt) + "-"):
        run = _unfinished(attempt, artifacts, base)
        if run is not None:
            return run
    listed = list_data(attempt)
    return _new(attempt, Artifacts(store, f"{_recipe_part(attempt)}-{_data_part(base, listed)}"), base, listed)


def probe_output(attempt: Attempt) -> Probe:
    """Try the output out now: what fails there must not fail only once there is something to lose.

    Raises:
        DeniedError: we may not write or delete there.
    """
    uri = attempt.recipe.output
    found = probe(open_store(uri, attempt.settings))
    if not found.deletes:
        raise DeniedError(f"{uri}: {found.reason}; allow deleting, or old checkpoints stay for ever")
    return found


def _named(attempt: Attempt, artifacts: Artifacts, base: BaseModelIdentity) -> Run:
    """The run with a given id, which may be new."""
    record = artifacts.run_record()
    if record is None:
        return _new(attempt, artifacts, base, list_data(attempt))
    if record.get("recipe") != identity_of(attempt.recipe) or record.get("base") != _base(base):
        different = _differences(record, {"recipe": identity_of(attempt.recipe), "base": _base(base)})
        raise RunConflictError(
            f"{artifacts.uri}: this run was begun with another recipe (different: {different}); "
            "leave --run-id out, or choose another one"
        )
    run = _from_record(artifacts, record, base)
    same = _is_listed(attempt, run) if run.done else _stands(attempt, run)
    if not same:
        raise RunConflictError(
            f"{artifacts.uri}: this run was begun with other data, which is no longer there as it was; "
            "leave --run-id out, or choose another one"
        )
    return run


def _unfinished(attempt: Attempt, artifacts: Artifacts, base: BaseModelIdentity) -> Run | None:
    """The run, if it is one of this recipe and base that can be gone on with."""
    record = artifacts.run_record()
    if record is None or record.get("recipe") != identity_of(attempt.recipe) or record.get("base") != _base(base):
        return None
    run = _from_record(artifacts, record, base)
    if run.done:
        return None
    if not _stands(attempt, run):
        log.warning("unfinished_run_left", run_id=artifacts.run_id, reason="its data is no longer there as it was")
        return None
    return run


def _new(
    attempt: Attempt,
    artifacts: Artifacts,
    base: BaseModelIdentity,
    listed: tuple[tuple[StoredObject, ...], tuple[StoredObject, ...]],
) -> Run:
    train, validation = listed
    record = {
        "version": RECORD_VERSION,
        "run_id": artifacts.run_id,
        "recipe": identity_of(attempt.recipe),
        "base": _base(base),
        "data": {"train": _objects(train), "validation": _objects(validation)},
    }
    return Run(
        artifacts=artifacts,
        base=base,
        train=train,
        validation=validation,
        record=record,
        begun=artifacts.run_record() is not None,
        done=artifacts.report() is not None,
    )


def list_data(attempt: Attempt) -> tuple[tuple[StoredObject, ...], tuple[StoredObject, ...]]:
    """What the recipe's URIs name now, by side; no validation when that is a fraction of the training files.

    Raises:
        NotFoundError: a URI names nothing.
    """
    data = attempt.recipe.data
    train = expand(data.train, attempt.settings, should_stop=attempt.should_stop)
    if isinstance(data.validation, Fraction):
        return tuple(train), ()
    return tuple(train), tuple(expand(data.validation, attempt.settings, should_stop=attempt.should_stop))


def _stands(attempt: Attempt, run: Run) -> bool:
    """Whether every object of the run is still there, unchanged."""
    wanted = [*run.train, *run.validation]
    try:
        names = [glob.escape(o.uri) for o in wanted]  # a name may hold what a pattern would
        found = expand(names, attempt.settings, should_stop=attempt.should_stop)
    except NotFoundError:
        return False
    return {(o.uri, o.etag) for o in found} == {(o.uri, o.etag) for o in wanted}


def _is_listed(attempt: Attempt, run: Run) -> bool:
    """Whether the recipe's URIs name exactly the run's objects now."""
    try:
        train, validation = list_data(attempt)
    except NotFoundError:
        return False
    return _objects(train) == _objects(run.train) and _objects(validation) == _objects(run.validation)


def _from_record(artifacts: Artifacts, record: Mapping[str, Any], base: BaseModelIdentity) -> Run:
    sides = {
        side: tuple(StoredObject(key=o["uri"], **o) for o in record["data"][side]) for side in ("train", "validation")
    }
    return Run(
        artifacts=artifacts,
        base=base,
        train=sides["train"],
        validation=sides["validation"],
        record=record,
        begun=True,
        done=artifacts.report() is not None,
    )


def _objects(objects: Sequence[StoredObject]) -> list[dict[str, Any]]:
    return [{"uri": o.uri, "etag": o.etag, "version": o.version, "size": o.size} for o in objects]


def _base(base: BaseModelIdentity) -> dict[str, str]:
    return {"source": base.source, "revision": base.revision}


def _recipe_part(attempt: Attempt) -> str:
    """First half of a run id: runs of the same recipe stand side by side, whatever their data."""
    return _hash(identity_of(attempt.recipe))


def _data_part(base: BaseModelIdentity, listed: tuple[Sequence[StoredObject], Sequence[StoredObject]]) -> str:
    return _hash({"base": _base(base), "train": _objects(listed[0]), "validation": _objects(listed[1])})


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def _differences(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The keys in which a record differs, for a message."""
    pairs = [(name, record.get(name) or {}, wanted[name]) for name in ("base", "recipe")]
    keys = [f"{name}.{key}" for name, old, new in pairs for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return ", ".join(keys) or "its format"

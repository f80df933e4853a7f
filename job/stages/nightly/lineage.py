"""What a run's adapter begins as: nothing, or that of the model in use on its channel when the run was begun."""

import json
import shutil
from typing import Any

import structlog

from job.core.attempt.run_record import RecordedParent
from job.core.errors import DataError, NotFoundError, UsageError
from job.core.nightly.channel import AdapterInUse
from job.edge.store.folder import FileEntry
from job.stages.attempt import Attempt
from job.stages.attempts.identity import WEIGHTS
from job.stages.base.loading import Inputs
from job.tune.engines.packed_model import PackedModel
from job.tune.loop.checkpoint import ADAPTER_FILES, load_adapter
from job.tune.loop.saved_state import DamagedStateError
from job.tune.model.config import read_wrapper

log = structlog.get_logger(__name__)
_SCALE = ("r", "lora_alpha", "use_rslora", "use_dora")
"""What of an adapter's configuration decides what its weights do."""


def start_from_parent(attempt: Attempt, inputs: Inputs, model: PackedModel) -> None:
    """Put the adapter that the run starts from into the model; nothing where it starts from the base.

    Raises:
        UsageError: it is an adapter of another form than the recipe's.
        NotFoundError: it is gone from the store.
        DataError: it is not the one that the run was begun with.
    """
    parent = inputs.parent
    if parent is None:
        return
    adapter = _adapter_of(attempt, inputs, parent)
    folder = attempt.worker.run_folder(inputs.artifacts.run_id) / "parent"
    shutil.rmtree(folder, ignore_errors=True)
    files = {
        name: FileEntry(size=f.size, sha256=f.sha256) for name, f in adapter.files.items() if name in ADAPTER_FILES
    }
    run = inputs.artifacts.other_run(parent.run_id)
    run.fetch_adapter(folder, files, should_stop=attempt.worker.should_stop)
    theirs = json.loads((folder / ADAPTER_FILES[1]).read_bytes())
    ours: Any = model.model.peft_config["default"].to_dict()
    other = [name for name in _SCALE if theirs.get(name) != ours.get(name)]
    if other:
        found = ", ".join(
            f"{name} {_shown(theirs.get(name))} there and {_shown(ours.get(name))} here" for name in other
        )
        raise UsageError(_other_form(parent, found))
    try:
        load_adapter(model.model, folder, read_wrapper(inputs.base.folder))
    except DamagedStateError as error:
        raise UsageError(_other_form(parent, str(error))) from error
    shutil.rmtree(folder, ignore_errors=True)
    log.info("started_from", run_id=parent.run_id, sequence=parent.sequence)
    attempt.notes.append(
        f"the adapter started from that of {parent.run_id}, which was in use: step 0 is that model, not the base"
    )


def _adapter_of(attempt: Attempt, inputs: Inputs, parent: RecordedParent) -> AdapterInUse:
    """By the channel's history: its own report may not stand yet."""
    name = attempt.worker.recipe.promote.channel
    assert name is not None, "a run with a parent has a channel"
    channel = inputs.artifacts.channel(name, conditional=False)
    for change in channel.changes():
        if change.sequence == parent.sequence and change.adapter is not None:
            if change.adapter.files[WEIGHTS].sha256 != parent.weights:
                raise DataError(
                    f"{channel.uri}/history: entry {parent.sequence} has another adapter than the run was begun with; "
                    "look at who can write there"
                )
            return change.adapter
    raise NotFoundError(
        f"{channel.uri}/history: entry {parent.sequence}, whose adapter the run was begun with, is gone; start again "
        "with another --run-id"
    )


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _other_form(parent: RecordedParent, found: str) -> str:
    return (
        f"promote.start_from: the adapter of {parent.run_id} is of another form than the recipe's ({found}); give "
        "`lora` the same r, alpha and targets, or leave start_from out"
    )

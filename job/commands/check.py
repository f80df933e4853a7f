"""Everything that can be refused without a GPU, as a table: what was looked at, and what came of it."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from job.core.errors import JobError
from job.core.recipe import Fraction, Recipe
from job.core.records import Tally, examples
from job.edge.base import fetching
from job.edge.base.fetching import BaseModel
from job.edge.dataset_files import fetch_files, read_lines
from job.edge.host.logs import quiet_libraries
from job.edge.host.planted import refuse_planted
from job.edge.store.objects import StoredObject
from job.edge.store.opening import credentials_source
from job.render.report_text import histogram_lines
from job.stages.attempt import Phases, Worker
from job.stages.identity import Run, Sides, find_run, list_data, probe_output

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    name: str
    found: str
    error: JobError | None = None


def check(worker: Worker, *, run_id: str | None, phases: Phases, on_row: Callable[[Row], None]) -> JobError | None:
    """Look at the output, the base model, the inputs and the data; a failure does not hide the ones after it.

    Args:
        worker: with a recipe that was read already.
        run_id: as asked for; None: the run's identity gives it.
        phases: the clock.
        on_row: gets each row as it comes.

    Returns:
        The first failure, if there was one.

    Raises:
        DeniedError: the work folder holds what others put there.
    """
    refuse_planted(worker.workdir)
    rows: list[Row] = []

    def look(name: str, action: Callable[[], tuple[str, T]]) -> T | None:
        try:
            found, value = action()
        except JobError as error:
            rows.append(Row(name=name, found=str(error), error=error))
            value = None
        else:
            rows.append(Row(name=name, found=found))
        on_row(rows[-1])
        return value

    look("credentials", lambda: _credentials(worker.recipe))
    look("output", lambda: _output(worker))
    base = look("base model", lambda: _base(worker))
    run = look("input", lambda: _inputs(worker, run_id, base))
    if run is not None and base is not None:
        look("data", lambda: _data(worker, phases, run, base))
    elif base is None:
        look("data", lambda: _lines(worker, phases))
    return next((row.error for row in rows if row.error is not None), None)


def _credentials(recipe: Recipe) -> tuple[str, None]:
    data = recipe.data
    held_out = () if isinstance(data.validation, Fraction) else data.validation
    return credentials_source([recipe.output, recipe.model.base, *data.train, *held_out]), None


def _output(worker: Worker) -> tuple[str, None]:
    found = probe_output(worker.recipe.output, worker.settings)
    return f"{worker.recipe.output}: write" + (
        " and conditional write work" if found.conditional else f" works, but {found.reason}"
    ), None


def _inputs(worker: Worker, run_id: str | None, base: BaseModel | None) -> tuple[str, Run | None]:
    if base is None:  # which run it is depends on the base; the data can be looked at all the same
        return _size([o for side in _listed(worker) for o in side]), None
    run = find_run(worker.recipe, run_id=run_id, settings=worker.settings, should_stop=worker.should_stop)
    state = "already done" if run.done else "unfinished, would be resumed" if run.begun else "new"
    return f"{_size([*run.train, *run.validation])}; run {run.artifacts.run_id} is {state}", run


def _listed(worker: Worker) -> Sides:
    return list_data(worker.recipe.data, worker.settings, should_stop=worker.should_stop)


def _size(objects: Sequence[StoredObject]) -> str:
    return f"{len(objects)} objects, {sum(o.size for o in objects):,} bytes"


def _base(worker: Worker) -> tuple[str, BaseModel]:
    model = worker.recipe.model
    identity = fetching.identify(model.base, model.revision, settings=worker.settings)
    base = fetching.fetch(
        identity,
        models_folder=worker.models_folder,
        settings=worker.settings,
        should_stop=worker.should_stop,
        weights=False,
    )
    return f"{identity.source} ({identity.revision[:12]}), licence {base.licence or 'not known'}", base


def _data(worker: Worker, phases: Phases, run: Run, base: BaseModel) -> tuple[str, None]:
    from job.stages.dataset import prepare_dataset
    from job.tune.loop.track import refuse_trackers
    from job.tune.model.adapter import refuse_targets
    from job.tune.model.config import load_tokenizer, read_config, shape_of

    quiet_libraries()
    config = read_config(base.folder)
    refuse_targets(config, worker.recipe.lora)
    refuse_trackers(worker.recipe.track)
    with tempfile.TemporaryDirectory(dir=_made(worker.workdir), prefix="check-") as scratch:
        dataset = prepare_dataset(
            worker,
            run,
            load_tokenizer(base.folder),
            positions=shape_of(config).positions,
            folder=Path(scratch),
            phases=phases,
        )
        report = dataset.report
        train = report.train
        counted = (
            f"{train.used} training and {report.validation.used} held-out examples; max_length {report.max_length} "
            f"({report.max_length_reason}); {report.bad_lines} wrong lines, {train.duplicates} duplicates, "
            f"{report.overlap} held out and trained on, {train.truncated} truncated, {train.dropped} dropped, "
            f"{train.without_target} with nothing to learn from"
        )
        bars = histogram_lines(train.histogram.edges, train.histogram.counts, mark=report.max_length)
    return "\n".join([counted, "tokens of a training example:", *bars]), None


def _lines(worker: Worker, phases: Phases) -> tuple[str, None]:
    """Without a base there is no tokenizer; each line can be checked all the same."""
    train, validation = _listed(worker)
    with tempfile.TemporaryDirectory(dir=_made(worker.workdir), prefix="check-") as scratch:
        files = fetch_files(
            [*train, *validation],
            Path(scratch),
            worker.settings,
            should_stop=worker.should_stop,
            on_progress=lambda done: phases.progress(bytes=done),
        )
        tally, data = Tally(), worker.recipe.data
        for _example in examples(read_lines(files, max_record=data.max_record), data, tally=tally):
            pass
    return f"{tally.good} right lines, {tally.bad} wrong ones; lengths need the base model", None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

"""What training starts from, in the order of what it costs: the device, the small files, the data, the weights."""

from collections.abc import Callable, Iterator

import structlog

from job.core.base.servers import refusals
from job.core.crash_points import crash_point
from job.core.errors import StopRequestedError
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run
from job.stages.base.base_source import BaseSource
from job.stages.base.hardware import look_at_hardware
from job.stages.base.loading import Inputs
from job.stages.data.dataset import Dataset, prepare_dataset
from job.stages.data.stops import stops_elsewhere
from job.tune.engines.families import refuse_family, words_on
from job.tune.loop.track import refuse_trackers
from job.tune.model.adapter import refuse_targets
from job.tune.model.config import load_tokenizer, read_config, read_wrapper, shape_of

log = structlog.get_logger(__name__)


def gather(attempt: Attempt, run: Run, begin: Callable[[], int]) -> Inputs:
    """Refuse what can be refused before gigabytes move, then bring the weights, and begin the attempt.

    Args:
        attempt: this process.
        run: the one that is worked on.
        begin: takes the attempt's number.

    Raises:
        JobError: as the stages do.
        StopRequestedError: asked to stop.
    """
    worker, phases = attempt.worker, attempt.phases
    _stop_if_asked(attempt)
    device = look_at_hardware(attempt)
    _stop_if_asked(attempt)
    source = BaseSource(
        run.base,
        worker.recipe.model,
        device=device,
        models_folder=worker.models_folder,
        settings=worker.settings,
        should_stop=worker.should_stop,
    )
    crash_point("fetch_base.before")
    with phases.phase("fetch_base"):
        small = source.fetch_small(phases.fetched)
    config, tokenizer = read_config(small), load_tokenizer(small)
    refuse_family(config)
    refuse_targets(config, worker.recipe.lora)
    refuse_trackers(worker.recipe.track)
    with phases.phase("fetch_base"):
        source.refuse_broken_promises(small)
    shape = shape_of(config)
    dataset = prepare_dataset(
        worker,
        run,
        tokenizer,
        positions=shape.positions,
        rows=shape.vocabulary,
        folder=worker.run_folder(run.artifacts.run_id),
        phases=phases,
    )
    attempt.notes.extend(words_on(config, read_wrapper(small)))
    for refusal in refusals(worker.recipe.lora, rows=shape.vocabulary):
        log.warning("not_served", reason=refusal)  # the report names it with the adapter
    for note in (*_notes_on(dataset), *stops_elsewhere(small, tokenizer, dataset.train)):
        log.warning("data_note", reason=note)
        attempt.notes.append(note)
    _stop_if_asked(attempt)
    # After the data, which is small beside them: a wrong line is reported before gigabytes move.
    with phases.phase("fetch_weights"):
        base = source.fetch(phases.fetched)
    return Inputs(
        base=base,
        source=source,
        tokenizer=tokenizer,
        dataset=dataset,
        artifacts=run.artifacts,
        attempt_number=begin(),
        device=device,
        parent=run.parent,
    )


def _notes_on(dataset: Dataset) -> Iterator[str]:
    """What a reader of the report should know of the data."""
    if dataset.report.overlap:
        yield f"{dataset.report.overlap} held-out examples are also trained on: the validation loss flatters"
    yield from dataset.notes
    for source in dataset.report.validation.sources:
        if not source.used:
            yield f"no held-out example is from the source {source.name}: how well it is learned is not measured"


def _stop_if_asked(attempt: Attempt) -> None:
    if attempt.worker.should_stop():
        raise StopRequestedError("asked to stop before the first step")

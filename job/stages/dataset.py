"""The dataset from the store to documents: fetched, checked, split, encoded, measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from job.core.advice import refuse_endless_warm_up
from job.core.course import course_of
from job.core.errors import DataError
from job.core.lengths import choose_max_length, length_statistics
from job.core.report import DataObject, DataReport, Histogram, SideReport
from job.core.same_content import count_repeated, count_shared
from job.edge.store.objects import StoredObject
from job.stages.attempt import Phases, Worker
from job.stages.encoding import Encoded, encoded_data
from job.stages.identity import Run
from job.tune.data.documents import Documents, select_documents

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Both sides, ready to be trained and judged on."""

    train: Documents
    validation: Documents
    report: DataReport


def prepare_dataset(
    worker: Worker, run: Run, tokenizer: Any, *, positions: int, folder: Path, phases: Phases
) -> Dataset:
    """Bring the dataset to the local disk as token ids; what an earlier attempt left there is used again.

    Args:
        worker: with the recipe.
        run: names the objects.
        tokenizer: the base model's.
        positions: how many the base model has.
        folder: where it goes; it belongs to this run.
        phases: the clock.

    Raises:
        DataError: wrong lines, or nothing left to train or judge on.
        UsageError: data.max_length or the warm-up does not go with the base or the data.
    """
    found = encoded_data(worker, phases, run, tokenizer, folder)
    encoded = found.sides
    data, evaluation = worker.recipe.data, worker.recipe.evaluate
    if not len(encoded["train"]):
        raise DataError(
            f"data.train: no example is left to train on in {_listed(run.train)} ({len(encoded['validation'])} were "
            "read as held-out ones); give more examples, or hold out a smaller share with data.validation"
        )
    limit = choose_max_length(encoded["train"].lengths, wanted=data.max_length, positions=positions)
    train = select_documents(encoded["train"], max_length=limit.tokens, too_long=data.too_long)
    validation = select_documents(
        encoded["validation"], max_length=limit.tokens, too_long=data.too_long, most=evaluation.max_examples
    )
    for side, documents in (("train", train), ("validation", validation)):
        if not len(documents):
            raise DataError(
                f"data.{side}: no example is left ({len(documents.encoded)} were read, {documents.dropped} are longer "
                f"than max_length {limit.tokens}, {documents.without_target} have nothing to learn from); give more "
                "examples, raise data.max_length, or hold out another share with data.validation"
            )
    course = course_of(worker.recipe.train, examples=len(train))
    refuse_endless_warm_up(course, warmup_steps=worker.recipe.train.warmup_steps)
    report = _report(found, train, validation, (limit.tokens, limit.reason))
    log.info(
        "dataset",
        train=len(train),
        validation=len(validation),
        max_length=limit.tokens,
        reason=limit.reason,
        percentiles=report.train.percentiles,
        duplicates=report.train.duplicates,
        overlap=report.overlap,
        truncated=train.truncated,
        dropped=train.dropped,
        without_target=train.without_target,
        bad_lines=report.bad_lines,
    )
    return Dataset(train=train, validation=validation, report=report)


def _listed(objects: Sequence[StoredObject], most: int = 3) -> str:
    names = [o.uri for o in objects[:most]]
    return ", ".join(names) + (f" and {len(objects) - most} more" if len(objects) > most else "")


def _report(found: Encoded, train: Documents, validation: Documents, limit: tuple[int, str]) -> DataReport:
    overlap = count_shared(
        validation.encoded.part,
        train.encoded.part,
        used=validation.rows,
        others_used=train.rows,
        examples=len(train.encoded) + len(validation.encoded),
    )
    return DataReport(
        train=_side(train, found.objects["train"]),
        validation=_side(validation, found.objects["validation"]),
        bad_lines=found.bad,
        first_bad_lines=found.first_bad,
        overlap=overlap,
        max_length=limit[0],
        max_length_reason=limit[1],
    )


def _side(documents: Documents, objects: tuple[DataObject, ...]) -> SideReport:
    statistics = length_statistics(documents.encoded.lengths)
    return SideReport(
        objects=objects,
        rows=len(documents.encoded),
        used=len(documents),
        duplicates=count_repeated(documents.encoded.part, examples=len(documents.encoded)),
        truncated=documents.truncated,
        dropped=documents.dropped,
        without_target=documents.without_target,
        tokens=int(documents.lengths.sum()),
        targets=int(documents.targets.sum()),
        percentiles=statistics.percentiles,
        histogram=Histogram(edges=statistics.edges, counts=statistics.counts),
    )

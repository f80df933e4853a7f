"""The dataset from the store to documents: fetched, checked, split, encoded, measured."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from job.core.advice import refuse_endless_warm_up
from job.core.course import course_of
from job.core.crash_points import crash_point
from job.core.errors import DataError
from job.core.lengths import choose_max_length, length_statistics
from job.core.recipe import DataSection, Fraction
from job.core.records import Example, Tally, checked_lines, is_held_out, judge_lines
from job.core.report import BadLine, DataObject, DataReport, Histogram, SideReport
from job.edge.dataset_files import DataFile, fetch_files, read_lines
from job.edge.store.objects import StoredObject
from job.edge.store.whole_files import whole_file
from job.stages.attempt import Phases, Worker
from job.stages.identity import Run
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import FORMAT, EncodedSet, Side, encode, open_encoded
from job.tune.data.frame import token_rules
from job.tune.data.vocabulary import refuse_unknown_ids

log = structlog.get_logger(__name__)
_AUDIT = "audit.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Both sides, ready to be trained and judged on."""

    train: Documents
    validation: Documents
    report: DataReport


def prepare_dataset(
    worker: Worker, run: Run, tokenizer: Any, *, positions: int, rows: int, folder: Path, phases: Phases
) -> Dataset:
    """Bring the dataset to the local disk as token ids; what an earlier attempt left there is used again.

    Args:
        worker: with the recipe.
        run: names the objects.
        tokenizer: the base model's.
        positions: how many the base model has.
        rows: of the base model's embeddings.
        folder: where it goes; it belongs to this run.
        phases: the clock.

    Raises:
        DataError: wrong lines, a token that the base has no embedding for, or nothing left to train or judge on.
        UsageError: data.max_length or the warm-up does not go with the base or the data.
    """
    encoded, audit = _encoded(worker, phases, run, tokenizer, folder)
    data, evaluation = worker.recipe.data, worker.recipe.evaluate
    refuse_unknown_ids(encoded.values(), evaluation.prompts, tokenizer, token_rules(tokenizer, data), rows=rows)
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
    report = _report(encoded, audit, train, validation, (limit.tokens, limit.reason))
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


def _encoded(
    worker: Worker, phases: Phases, run: Run, tokenizer: Any, folder: Path
) -> tuple[dict[Side, EncodedSet], dict[str, Any]]:
    place = folder / "encoded"
    if (place / _AUDIT).is_file():
        audit = json.loads((place / _AUDIT).read_text(encoding="utf-8"))
        # A run id that was given may have stood for other data or templates before, and the image may be newer.
        if audit["run"] == run.record and audit.get("format") == FORMAT:
            return open_encoded(place), audit
    crash_point("download.before")
    with phases.phase("download"):
        train = _fetch(worker, phases, run, folder, "train")
        validation = _fetch(worker, phases, run, folder, "validation")
    (place / _AUDIT).unlink(missing_ok=True)  # first: what it says is whole is being written anew
    with phases.phase("encode"):
        tally = Tally()
        encoded = encode(
            _routed(worker.recipe.data, train, validation, tally),
            tokenizer,
            token_rules(tokenizer, worker.recipe.data),
            folder=place,
            should_stop=worker.should_stop,
            on_progress=lambda done: _encoding(phases, done),
        )
    crash_point("encode.after")
    audit = {
        "run": run.record,
        "format": FORMAT,
        "train": [_object(file) for file in train],
        "validation": [_object(file) for file in validation],
        "bad": tally.bad,
        "first_bad": [asdict(record) for record in tally.first_bad],
    }
    with whole_file(place / _AUDIT) as file:  # last: with it the folder is whole
        file.write(json.dumps(audit).encode())
    shutil.rmtree(folder / "data", ignore_errors=True)
    return encoded, audit


def _listed(objects: Sequence[StoredObject], most: int = 3) -> str:
    names = [o.uri for o in objects[:most]]
    return ", ".join(names) + (f" and {len(objects) - most} more" if len(objects) > most else "")


def _fetch(worker: Worker, phases: Phases, run: Run, folder: Path, side: Side) -> list[DataFile]:
    objects = run.train if side == "train" else run.validation
    size = sum(o.size for o in objects)  # once: each piece that arrives is reported
    return fetch_files(
        objects,
        folder / "data" / side,
        worker.settings,
        beside=[o.uri for o in (run.validation if side == "train" else run.train)],
        should_stop=worker.should_stop,
        on_progress=lambda done: _downloading(phases, side, done, of=size),
    )


def _downloading(phases: Phases, side: Side, done: int, *, of: int) -> None:
    phases.progress(side=side, bytes=done, of=of)
    crash_point("download.middle")


def _encoding(phases: Phases, done: int) -> None:
    phases.progress(examples=done)
    crash_point("encode.middle")


def _routed(
    data: DataSection, train: Sequence[DataFile], validation: Sequence[DataFile], tally: Tally
) -> Iterator[tuple[Side, Example]]:
    """Each checked example with its side."""
    own = Tally()
    for example in checked_lines(read_lines(train, max_record=data.max_record), data, tally=tally):
        held_out = isinstance(data.validation, Fraction) and is_held_out(example.digest, data.validation.fraction)
        yield ("validation" if held_out else "train"), example
    for example in checked_lines(read_lines(validation, max_record=data.max_record), data, tally=own):
        yield "validation", example
    judge_lines([tally, own], data)
    tally.merge(own)


def _object(file: DataFile) -> dict[str, Any]:
    source = file.source
    return {
        "uri": source.uri,
        "etag": source.etag,
        "version": source.version,
        "size": source.size,
        "sha256": file.sha256,
    }


def _report(
    encoded: dict[Side, EncodedSet],
    audit: dict[str, Any],
    train: Documents,
    validation: Documents,
    limit: tuple[int, str],
) -> DataReport:
    seen = {side: encoded[side].digests() for side in encoded}
    trained_on = {seen["train"][row] for row in train.rows}
    return DataReport(
        train=_side(train, audit["train"], seen["train"]),
        validation=_side(validation, audit["validation"], seen["validation"]),
        bad_lines=audit["bad"],
        first_bad_lines=tuple(BadLine(**record) for record in audit["first_bad"]),
        overlap=sum(seen["validation"][row] in trained_on for row in validation.rows),
        max_length=limit[0],
        max_length_reason=limit[1],
    )


def _side(documents: Documents, objects: list[dict[str, Any]], digests: list[bytes]) -> SideReport:
    statistics = length_statistics(documents.encoded.lengths)
    return SideReport(
        objects=tuple(DataObject(**o) for o in objects),
        rows=len(documents.encoded),
        used=len(documents),
        duplicates=len(digests) - len(set(digests)),
        truncated=documents.truncated,
        dropped=documents.dropped,
        without_target=documents.without_target,
        tokens=int(documents.lengths.sum()),
        targets=int(documents.targets.sum()),
        percentiles=statistics.percentiles,
        histogram=Histogram(edges=statistics.edges, counts=statistics.counts),
    )

"""The dataset from the store to documents: fetched, checked, split, encoded, measured."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import structlog
from pydantic import TypeAdapter

from job.core.advice import refuse_endless_warm_up
from job.core.course import Course, course_of
from job.core.crash_points import crash_point
from job.core.data_section import DataSection, Fraction
from job.core.errors import DataError, UsageError
from job.core.lengths import choose_max_length
from job.core.mixture import portions
from job.core.preview import ExamplePreview
from job.core.records import Example, Tally, is_held_out
from job.core.report import DataObject, DataReport, SourceLoss
from job.core.unused import judge_unused
from job.core.verdict import Evaluation
from job.edge.dataset_files import DataFile
from job.edge.store.objects import StoredObject
from job.edge.store.whole_files import whole_file
from job.stages.attempt import Phases, Worker
from job.stages.data_report import Audit, counted, data_report
from job.stages.identity import Run
from job.stages.sources import fetch_sources, judge_sources, new_tallies, read_sources
from job.tune.data.chat import ChatTemplates
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import FORMAT, SIDES, EncodedSet, Side, encode, open_encoded
from job.tune.data.frame import TokenRules, token_rules
from job.tune.data.picture import by_source, pictures

log = structlog.get_logger(__name__)
_AUDIT = "audit.json"
_AS_JSON = TypeAdapter(Audit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Both sides, ready to be trained and judged on."""

    train: Documents
    validation: Documents
    report: DataReport
    notes: Sequence[str]
    """What a reader should know of it."""

    def losses_by_source(self, evaluation: Evaluation) -> tuple[SourceLoss, ...]:
        """What an evaluation of the held-out documents says of each source; empty where there is but one."""
        found = []
        for place, source in enumerate(self.report.validation.sources):
            mine = self.validation.sources == place
            tokens, loss = int(evaluation.tokens[mine].sum()), evaluation.loss_of(mine)
            found.append(SourceLoss(name=source.name, examples=source.used, tokens=tokens, loss=loss))
        return tuple(found)


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
    encoded, audit = _encoded(worker, phases, run, tokenizer, folder)
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
    notes = audit.named_lines() + judge_unused(
        audit.left_out(data, "train", train),
        audit.left_out(data, "validation", validation),
        max_length=limit.tokens,
        longest=int(encoded["train"].lengths.max()),
        positions=positions,
    )
    for side, documents in (("train", train), ("validation", validation)):
        if not len(documents):
            raise DataError(
                f"data.{side}: no example is left ({len(documents.encoded)} were read, {documents.dropped} are longer "
                f"than max_length {limit.tokens}, {documents.without_target} have nothing to learn from); give more "
                "examples, raise data.max_length, or hold out another share with data.validation"
            )
    report = data_report(data, audit, train, validation, (limit.tokens, limit.reason))
    _refuse_unused_sources(report)
    course = course_of(worker.recipe.train, examples=portions(data, report.train.used_by_source))
    refuse_endless_warm_up(course, warmup_steps=worker.recipe.train.warmup_steps)
    _refuse_undrawn_source(course, report)
    report = report.model_copy(update={"preview": _pictured(train, data, tokenizer)})
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
        empty=report.train.empty,
        bad_lines=report.bad_lines,
        **({"sources": counted(report, course)} if report.train.sources else {}),
    )
    return Dataset(train=train, validation=validation, report=report, notes=notes)


def _encoded(
    worker: Worker, phases: Phases, run: Run, tokenizer: Any, folder: Path
) -> tuple[dict[Side, EncodedSet], Audit]:
    place = folder / "encoded"
    if (place / _AUDIT).is_file():
        kept = json.loads((place / _AUDIT).read_text(encoding="utf-8"))
        # A run id that was given may have stood for other data or templates before, and the image may be newer.
        if kept["run"] == run.record and kept.get("format") == FORMAT:
            return open_encoded(place), _AS_JSON.validate_python(kept["audit"])
    crash_point("download.before")
    with phases.phase("download"):
        fetched = {side: _fetch(worker, phases, run, folder, side) for side in SIDES}
    (place / _AUDIT).unlink(missing_ok=True)  # first: what it says is whole is being written anew
    with phases.phase("encode"), ChatTemplates(tokenizer, should_stop=worker.should_stop) as chats:
        data = worker.recipe.data
        template = chats.asked(data)
        for prompt in worker.recipe.evaluate.prompts:
            if template is not None:
                template.prompt(prompt)  # it may refuse it: better now than once the base is loaded
        tallies = new_tallies(data)
        encoded = encode(
            _routed(data, fetched, tallies, chats),
            _rules(tokenizer, data),
            folder=place,
            should_stop=worker.should_stop,
            on_progress=lambda done: _encoding(phases, done),
        )
    crash_point("encode.after")
    objects = {side: [_object(file) for file in chain(*files)] for side, files in fetched.items()}
    audit = Audit(objects=objects, tallies=tallies)
    kept = {"run": run.record, "format": FORMAT, "audit": _AS_JSON.dump_python(audit, mode="json")}
    with whole_file(place / _AUDIT) as file:  # last: with it the folder is whole
        file.write(json.dumps(kept).encode())
    shutil.rmtree(folder / "data", ignore_errors=True)
    return encoded, audit


def _listed(objects: Sequence[StoredObject], most: int = 3) -> str:
    names = [o.uri for o in objects[:most]]
    return ", ".join(names) + (f" and {len(objects) - most} more" if len(objects) > most else "")


def _fetch(worker: Worker, phases: Phases, run: Run, folder: Path, side: Side) -> list[list[DataFile]]:
    sources, beside = (run.sides.train, run.validation) if side == "train" else (run.sides.validation, run.train)
    arriving = partial(_downloading, phases, side)
    return fetch_sources(worker, sources, folder / "data" / side, beside=beside, on_progress=arriving)


def _downloading(phases: Phases, side: Side, done: int, of: int) -> None:
    phases.progress(side=side, bytes=done, of=of)
    crash_point("download.middle")


def _encoding(phases: Phases, done: int) -> None:
    phases.progress(examples=done)
    crash_point("encode.middle")


def _rules(tokenizer: Any, data: DataSection) -> dict[Side, list[TokenRules]]:
    """How the examples of each source are framed."""
    train = [token_rules(tokenizer, source.data) for source in data.sources]
    held_out = [token_rules(tokenizer, source.data) for source in data.held_out_sources]
    return {"train": train, "validation": held_out or train}


def _routed(
    data: DataSection,
    files: Mapping[Side, Sequence[Sequence[DataFile]]],
    tallies: Mapping[Side, list[Tally]],
    chats: ChatTemplates,
) -> Iterator[tuple[Side, Example]]:
    """Each checked example with its side, source after source."""
    for example in read_sources(data.sources, files["train"], tallies["train"], chats.rendering):
        held_out = isinstance(data.validation, Fraction) and is_held_out(example.digest, data.validation.fraction)
        yield ("validation" if held_out else "train"), example
    for example in read_sources(data.held_out_sources, files["validation"], tallies["validation"], chats.rendering):
        yield "validation", example
    judge_sources((*data.sources, *data.held_out_sources), [*chain(*tallies.values())])


def _object(file: DataFile) -> DataObject:
    source = file.source
    return DataObject(uri=source.uri, etag=source.etag, version=source.version, size=source.size, sha256=file.sha256)


def _pictured(train: Documents, data: DataSection, tokenizer: Any) -> tuple[ExamplePreview, ...]:
    """Some examples of each source as they are learned."""
    own = by_source(train, [source.name for source in data.sources])
    return tuple(each for name, rows in own for each in pictures(train, tokenizer, source=name, rows=rows))


def _refuse_unused_sources(report: DataReport) -> None:
    for source in report.train.sources:
        if not source.used:
            raise DataError(
                f"data.train: no example of the source {source.name} is left to train on ({source.rows} were read to "
                f"train on, {source.dropped} are longer than max_length {report.max_length}, {source.without_target} "
                "have nothing to learn from); give it more examples, or leave it out"
            )


def _refuse_undrawn_source(course: Course, report: DataReport) -> None:
    source = course.mixture.never_drawn(course.total)
    if source is not None:
        raise UsageError(
            f"data.train: in {course.steps} steps of {course.batch_size} examples the source "
            f"{report.train.sources[source].name}, whose share is {course.mixture.share(source):.3g}, is never drawn; "
            "raise its weight, or train longer"
        )

"""What a channel's models are judged on: the frozen examples and the regression set, with clusters and slices."""

import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.core.data.chunks import in_chunks
from job.core.data.fields import Unusable, fields_of
from job.core.errors import DataError, UsageError
from job.core.nightly.exam_results import MOST_VALUES, Exam
from job.core.recipe.promote_section import PromoteSection
from job.edge.dataset_files import fetch_files, names_of, read_lines
from job.edge.store.listing import expand
from job.edge.store.objects import StoredObject
from job.edge.store.whole_files import whole_file
from job.stages.attempt import Worker
from job.stages.attempts.identity import Run
from job.stages.base.loading import Inputs
from job.stages.data.sources import judge_sources, new_tallies
from job.stages.nightly.answering import Asked, asked_of
from job.stages.nightly.late_files import refuse_late
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import STREAM_END, EncodedSet, stream_start
from job.tune.data.encoder import Encoder, rules_of

Fields = Mapping[str, str | None]
"""Of one record, by name; None: it has no such field."""
_NAME = 32
"""Letters of a hash that name an exam."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamSet:
    """Examples, and what is kept of them."""

    exam: Exam
    documents: Documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Exams:
    """What tonight's models are judged on."""

    frozen: ExamSet
    regression: ExamSet | None
    """None: the recipe names none."""
    asked: Asked | None = None
    """What champion and challenger answer of the frozen examples; None: nothing."""

    @property
    def every(self) -> tuple[ExamSet, ...]:
        """Both, or the one there is."""
        return (self.frozen, *([self.regression] if self.regression is not None else []))


def prepare_exams(worker: Worker, run: Run, inputs: Inputs, *, folder: Path) -> Exams:
    """Both sets, before anything is trained: a field that is missing must not be found in the morning.

    Args:
        worker: with the recipe.
        run: names the objects.
        inputs: with what the run is judged on.
        folder: for files on their way; it belongs to this run.

    Raises:
        DataError: a record has no value for the cluster, or the regression set has wrong lines.
        UsageError: a field divides the examples into too many slices.
        NotFoundError: there is no such regression set.
    """
    promote, validation = worker.recipe.promote, inputs.dataset.validation
    fields: list[Fields] = [{}] * len(validation)
    if promote.fields:
        fields = fields_of_documents(
            worker, run.validation, validation, promote.fields, beside=run.train, folder=folder / "fields"
        )
        _refuse_missing_cluster(promote, fields, validation)
    exam = _exam(validation, fields, cluster_by=promote.cluster, slice_by=promote.slices)
    frozen = ExamSet(exam=exam, documents=validation)
    regression = None
    if promote.regression is not None:
        regression = _read_regression(worker, inputs.tokenizer, validation, promote.regression, folder / "regression")
    return Exams(frozen=frozen, regression=regression, asked=asked_of(inputs, worker.recipe))


def fields_of_documents(
    worker: Worker,
    objects: Sequence[StoredObject],
    documents: Documents,
    names: Collection[str],
    *,
    beside: Sequence[StoredObject],
    folder: Path,
) -> list[Fields]:
    """Fields of the records that documents were made of, read again from their files.

    Args:
        worker: with the stores' settings.
        objects: of the documents' side.
        documents: of that side.
        names: of the fields.
        beside: the dataset's other objects, by which files are called in messages.
        folder: for the files on their way.

    Raises:
        DataError: an object changed since it was listed.
    """
    places = {documents.where(document): document for document in range(len(documents))}
    files_named = {where.rpartition(":")[0] for where in places}
    called = names_of([*(o.uri for o in objects), *(o.uri for o in beside)])[: len(objects)]
    needed = [o for o, name in zip(objects, called, strict=True) if name in files_named]
    others = [o.uri for o in (*objects, *beside) if o not in needed]
    files = fetch_files(
        list(dict.fromkeys(needed)),
        folder,
        worker.settings,
        beside=others,
        should_stop=worker.should_stop,
        on_progress=lambda _bytes: None,
    )
    found: list[Fields] = [{}] * len(places)
    for name, number, raw in read_lines(files, max_record=worker.recipe.data.max_record):
        place = places.get(f"{name}:{number}")
        if place is not None:
            read = fields_of(raw.removeprefix(b"\xef\xbb\xbf"), names, required=(), strict_types=False)
            found[place] = {} if isinstance(read, Unusable) else read
    shutil.rmtree(folder, ignore_errors=True)
    return found


def numbers_of(values: Sequence[str | None]) -> list[int]:
    """A number for each value, the same for the same one; those that are missing count as one."""
    known: dict[str | None, int] = {}
    return [known.setdefault(value, len(known)) for value in values]


def _refuse_missing_cluster(promote: PromoteSection, fields: Sequence[Fields], documents: Documents) -> None:
    if promote.cluster is None:
        return
    missing = [document for document, each in enumerate(fields) if each.get(promote.cluster) is None]
    if missing:
        raise DataError(
            f'{documents.where(missing[0])}: "{promote.cluster}" is missing, by which promote.cluster tells which '
            f"examples belong together ({len(missing)} of {len(fields)} held-out records lack it); give them one, or "
            "leave promote.cluster out"
        )


def _clusters(values: Sequence[str | None]) -> tuple[int, ...] | None:
    """A number for each example; one without a value depends on no other, and None: all are such."""
    if all(value is None for value in values):
        return None
    known: dict[str | int, int] = {}
    return tuple(known.setdefault(place if value is None else value, len(known)) for place, value in enumerate(values))


def _exam(documents: Documents, fields: Sequence[Fields], *, cluster_by: str | None, slice_by: Sequence[str]) -> Exam:
    cluster = None if cluster_by is None else _clusters([each.get(cluster_by) for each in fields])
    slices: dict[str, tuple[int, ...]] = {}
    for name in slice_by:
        slices |= _slices(name, [each.get(name) for each in fields])
    content = Exam(name="-", tokens=tuple(map(int, documents.targets)), cluster=cluster, slices=slices)
    where = tuple(map(documents.where, range(len(documents))))
    return content.model_copy(update={"name": _hash(documents, content), "where": where})


def _slices(name: str, values: Sequence[str | None]) -> dict[str, tuple[int, ...]]:
    """The places of each value of a field."""
    found: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        if value is not None:
            found.setdefault(f"{name}={value:.80}", []).append(place)
    if not found:
        raise UsageError(f"promote.slices: no held-out record has the field {name}; correct its name")
    if len(found) > MOST_VALUES:
        raise UsageError(
            f"promote.slices: {name} has {len(found)} values in the held-out records, and at most {MOST_VALUES} slices "
            "of one field can be guarded; name a coarser field"
        )
    return {slice_name: tuple(places) for slice_name, places in sorted(found.items())}


def _hash(documents: Documents, content: Exam) -> str:
    """Names the examples as a model sees them, and what is known of them."""
    sha256 = hashlib.sha256(content.model_dump_json(exclude={"name", "where"}).encode())
    for document in range(len(documents)):
        for part in (documents.token_ids(document), documents.spans(document)):
            sha256.update(f"{part.shape};".encode() + part.astype("<i4").tobytes())
    return sha256.hexdigest()[:_NAME]


def _read_regression(
    worker: Worker, tokenizer: Any, validation: Documents, uris: Sequence[str], folder: Path
) -> ExamSet:
    """The regression set by the templates of `data`, cut as the held-out examples are, with its own clusters."""
    recipe = worker.recipe
    data = recipe.data.model_copy(update={"validation": tuple(uris)})
    objects = expand(uris, worker.settings, should_stop=worker.should_stop)
    refuse_late(
        "promote.regression",
        [objects],
        worker.settings,
        max_record=data.max_record,
        known=(),
        should_stop=worker.should_stop,
    )
    files = fetch_files(
        objects,
        folder / "files",
        worker.settings,
        should_stop=worker.should_stop,
        on_progress=lambda _bytes: None,
    )
    tallies = new_tallies(data)["validation"]
    path = folder / "regression.arrow"
    with Encoder(rules_of(tokenizer, data), should_stop=worker.should_stop) as encoder, whole_file(path) as out:
        out.write(stream_start())
        for chunk in in_chunks(read_lines(files, max_record=data.max_record), side="validation"):
            encoded = encoder(chunk)
            tallies[0].merge(encoded.tally)
            for rows in encoded.rows.values():
                out.write(rows)
        out.write(STREAM_END)
    judge_sources(data.held_out_sources, tallies)
    documents = select_documents(
        EncodedSet(path),
        max_length=validation.max_length,
        too_long=data.too_long,
        most=recipe.evaluate.max_examples,
    )
    if not len(documents):
        raise DataError(f"promote.regression: no example is left in {', '.join(uris)}; give it some, or leave it out")
    shutil.rmtree(folder / "files", ignore_errors=True)
    cluster, fields = recipe.promote.cluster, list[Fields]()
    if cluster is not None:
        fields = fields_of_documents(worker, objects, documents, [cluster], beside=(), folder=folder / "fields")
    return ExamSet(exam=_exam(documents, fields, cluster_by=cluster, slice_by=()), documents=documents)

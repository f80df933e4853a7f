"""The dataset from the store to documents: fetched, checked, split, encoded, measured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from job.core.data.chunks import Side
from job.core.data.lengths import candidates, choose_max_length
from job.core.data.mixture import portions
from job.core.data.preview import ExamplePreview
from job.core.data.report_data import DataReport
from job.core.data.unused import judge_unused
from job.core.data.vocabulary import refuse_beyond
from job.core.errors import DataError, UsageError
from job.core.judging.held_out import plus_minus
from job.core.judging.slices import Slice, SliceLoss
from job.core.judging.verdict import Evaluation
from job.core.plan.advice import refuse_endless_warm_up
from job.core.plan.course import Course, course_of
from job.core.recipe.data_section import DataSection
from job.core.reports.report import SourceLoss
from job.edge.store.objects import StoredObject
from job.stages.attempt import Phases, Worker
from job.stages.attempts.identity import Run
from job.stages.data.data_report import counted, data_report
from job.stages.data.encoding import encoded_data
from job.stages.data.judging import Judging, judging_of
from job.tune.data.chats.chat import ChatTemplates, asked_rules
from job.tune.data.chats.picture import by_source, pictures
from job.tune.data.documents import Documents, select_documents
from job.tune.data.encoded import EncodedSet
from job.tune.data.frame import encode_given, encode_prompt, token_rules

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Both sides, ready to be trained and judged on."""

    train: Documents
    validation: Documents
    report: DataReport
    notes: Sequence[str]
    """What a reader should know of it."""
    judging: Judging
    """What answers are compared with, and slices of the held-out side."""

    def losses_by_source(self, evaluation: Evaluation) -> tuple[SourceLoss, ...]:
        """What an evaluation of the held-out documents says of each source; empty where there is but one."""
        found = []
        for place, source in enumerate(self.report.validation.sources):
            mine = self.validation.sources == place
            nll, tokens = evaluation.nll[mine], evaluation.tokens[mine]
            found.append(
                SourceLoss(
                    name=source.name,
                    examples=source.used,
                    tokens=int(tokens.sum()),
                    loss=evaluation.loss_of(mine),
                    plus_minus=plus_minus(nll, tokens),
                )
            )
        return tuple(found)

    def losses_by_slice(self, evaluation: Evaluation) -> tuple[SliceLoss, ...]:
        """The same of each slice that the recipe asks for."""
        return tuple(_slice_loss(each, evaluation) for each in self.judging.slices)


def _slice_loss(each: Slice, evaluation: Evaluation) -> SliceLoss:
    nll, tokens = evaluation.nll[each.members], evaluation.tokens[each.members]
    return SliceLoss(
        slice=each.name,
        examples=len(tokens),
        tokens=int(tokens.sum()),
        loss=float(nll.sum() / tokens.sum()),
        plus_minus=plus_minus(nll, tokens),
    )


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
    asked = _asked(worker, tokenizer)
    found = encoded_data(worker, phases, run, tokenizer, folder)
    encoded, audit = found.sides, found.audit
    data, evaluation = worker.recipe.data, worker.recipe.evaluate
    _refuse_unknown_ids(encoded.values(), asked, tokenizer, rows=rows)
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
    _refuse_none_left("train", train)
    _refuse_none_left("validation", validation)
    report = data_report(data, audit, train, validation, (limit.tokens, limit.reason))
    _refuse_unused_sources(report)
    course = course_of(worker.recipe.train, examples=portions(data, report.train.used_by_source))
    refuse_endless_warm_up(course, warmup_steps=worker.recipe.train.warmup_steps)
    _refuse_undrawn_source(course, report)
    others = candidates(
        encoded["train"].lengths,
        chosen=limit.tokens,
        positions=positions,
        targets=lambda tokens: int(encoded["train"].target_counts(tokens).sum()),
    )
    report = report.model_copy(update={"preview": _pictured(train, data, tokenizer), "candidates": tuple(others)})
    judging = judging_of(worker.recipe, validation, tokenizer)
    _log(report, course)
    notes = [*notes, *judging.notes]
    return Dataset(train=train, validation=validation, report=report, notes=notes, judging=judging)


def _log(report: DataReport, course: Course) -> None:
    train = report.train
    log.info(
        "dataset",
        train=train.used,
        validation=report.validation.used,
        max_length=report.max_length,
        reason=report.max_length_reason,
        percentiles=train.percentiles,
        duplicates=train.duplicates,
        overlap=report.overlap,
        truncated=train.truncated,
        dropped=train.dropped,
        without_target=train.without_target,
        empty=train.empty,
        bad_lines=report.bad_lines,
        **({"sources": counted(report, course)} if train.sources else {}),
    )


def _refuse_none_left(side: Side, documents: Documents) -> None:
    if not len(documents):
        raise DataError(
            f"data.{side}: no example is left ({len(documents.encoded)} were read, {documents.dropped} are longer than "
            f"max_length {documents.max_length}, {documents.without_target} have nothing to learn from); give more "
            "examples, raise data.max_length, or hold out another share with data.validation"
        )


def _listed(objects: Sequence[StoredObject], most: int = 3) -> str:
    names = [o.uri for o in objects[:most]]
    return ", ".join(names) + (f" and {len(objects) - most} more" if len(objects) > most else "")


def _asked(worker: Worker, tokenizer: Any) -> list[tuple[str, list[int]]]:
    """The recipe's prompts with their ids: a chat template may refuse one, and better now than with the base loaded."""
    prompts = worker.recipe.evaluate.prompts
    rules, chat = token_rules(tokenizer, worker.recipe.data), asked_rules(tokenizer, worker.recipe.data)
    if chat is None:
        return [(prompt, encode_prompt(prompt, rules)) for prompt in prompts]
    with ChatTemplates(should_stop=worker.should_stop) as chats:
        turns = [chats.of(chat).prompt(prompt).parts for prompt in prompts]
    return [(p, encode_given(parts, rules, is_chat=True)) for p, parts in zip(prompts, turns, strict=True)]


def _refuse_unknown_ids(
    encoded: Iterable[EncodedSet], asked: Iterable[tuple[str, Sequence[int]]], tokenizer: Any, *, rows: int
) -> None:
    """The largest id of each side and of each prompt must have a row in the base's embeddings."""
    largest = [(*found, side) for side in encoded if (found := side.largest_id()) is not None]
    places = [(token, side.where(index)) for token, index, side in largest]
    prompts = [(max(ids), f"evaluate.prompts: {prompt:.80}") for prompt, ids in asked if ids]
    for token, where in [*places, *prompts]:
        refuse_beyond(token, tokenizer.convert_ids_to_tokens(token), rows=rows, where=where)


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

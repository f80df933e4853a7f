"""A channel before a night trains: is its place in order, what is new, and how did older models do on that."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from job.core.attempt.run_record import RecordedParent, read_run_record
from job.core.errors import DataError, NotFoundError
from job.core.nightly.channel import Promoted
from job.core.nightly.promotion_report import NAMED_FILES, CarriedOut, NewData
from job.core.reports.report import Report
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import SETTLE_SECONDS, Channel
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run
from job.stages.base.loading import Inputs
from job.stages.nightly.channel_changes import carry_out, copy_of, judge_again, lost_verdict, refuse_other_base
from job.stages.nightly.comparing import again, judge_loaded
from job.stages.nightly.contenders import Examiner
from job.stages.nightly.exams import Exams, prepare_exams
from job.stages.nightly.fresh_records import FreshRecords
from job.stages.ranks.company import Company
from job.tune.device.device import begin_peak_anew, release_memory

if TYPE_CHECKING:
    from job.stages.data.data_objects import Objects

log = structlog.get_logger(__name__)
_TOKENS_AT_ONCE = 8192
"""Of a forward before the plan is made."""


@dataclass(slots=True, kw_only=True)
class Night:
    """What a run on a channel knows of it."""

    channel: Channel
    copy: ChannelAdapter
    exams: Exams
    new: NewData
    late: tuple[str, ...]
    parent: RecordedParent | None
    """What the run started from."""
    fresh_promotion: str | None
    """A run that waited, and that tonight's new records put in use."""
    also: tuple[str, ...]
    """What came of others that waited or had lost their swap, in a sentence each."""
    other: Report | None = None
    """Of the training with another seed, where the recipe wants two."""


def prepare_night(attempt: Attempt, run: Run, inputs: Inputs, company: Company) -> Night | None:
    """Look at the channel, and judge older models on tonight's new records; None: the recipe names no channel.

    Args:
        attempt: this process.
        run: with its objects.
        inputs: what training starts from.
        company: the other processes, who come to nothing here but to a base that is sharded: this one alone judges.

    Raises:
        UsageError: what is in use is on another base.
        JobError: as exams and stores.
    """
    recipe = attempt.worker.recipe
    if recipe.promote.channel is None:
        return None
    conditional = inputs.artifacts.conditional
    channel = inputs.artifacts.channel(recipe.promote.channel, conditional=conditional)
    if not conditional:
        note = (
            f"{channel.uri}: without conditions on writes, two runs that end in the same two seconds may both promote; "
            f"and one that stands still for more than {SETTLE_SECONDS:.0f} seconds while it writes state.json may undo "
            "what another has paid or decided meanwhile"
        )
        log.warning("swap_without_conditions", reason=note)
        attempt.notes.append(note)
    with attempt.phases.phase("channel"):
        promoted, _ = channel.promoted()
        if promoted is not None:
            refuse_other_base(promoted, inputs.base.identity, recipe)
        copy = copy_of(attempt.worker, channel, inputs.artifacts.run_id)
        copy.follow()
        folder = attempt.worker.run_folder(inputs.artifacts.run_id) / "exams"
        exams = prepare_exams(attempt.worker, run, inputs, folder=folder)
        carried_out = judge_again(channel, recipe, copy)
        promoted, _ = channel.promoted()  # one of them may be in use by now
    late = tuple(map(str, run.sides.late))
    attempt.notes.extend(f"left out, not whole yet: {each}" for each in late)
    world = company.world
    if inputs.placement == "sharded":
        with attempt.phases.phase("join"):
            world = company.join(inputs.device)
    with attempt.phases.phase("test_before_training"):
        examiner = Examiner(
            attempt,
            inputs,
            channel,
            exams,
            left_to_peft=True,  # which layers agree with PEFT's is not known yet
            rows=None,
            tokens_at_once=max(_TOKENS_AT_ONCE, inputs.dataset.train.max_length),
            world=world,
        )
        fresh = FreshRecords(attempt, run, inputs, channel, examiner)
        # Only of the first attempt: after it its records are seen, and the run itself may be in use.
        found = _new_data(run, channel, promoted, records=fresh.since(promoted), unseen=fresh.unseen(promoted))
        new = channel.record_new(run.artifacts.run_id, found)
        fresh.keep_own(promoted)
        log.info("new_data", since=None if promoted is None else promoted.run_id, **new.model_dump(mode="json"))
        # First, since who loses its swap to new records waits for the next night.
        carried_out += _judge_again_loaded(attempt, channel, examiner, copy)
        by_fresh = fresh.test(copy)
        carried_out += by_fresh
        release_memory(inputs.device)  # what was loaded is gone, and the plan is made for what is free
        begin_peak_anew(inputs.device)  # and its peak is compared with what is used for it
    return Night(
        channel=channel,
        copy=copy,
        exams=exams,
        new=new,
        late=late,
        parent=run.parent,
        fresh_promotion=next((done.judged.run_id for done in by_fresh if done.outcome == "promoted"), None),
        also=tuple(each.said for each in carried_out),
    )


def _judge_again_loaded(
    attempt: Attempt, channel: Channel, examiner: Examiner, copy: ChannelAdapter
) -> list[CarriedOut]:
    """Judge the runs that lost their swap and of which too little was kept to do it without loading them."""
    carried_out = []
    state, _ = channel.state()
    for run_id in state.again if state is not None else ():
        last = lost_verdict(channel, attempt.worker.recipe, run_id, copy)
        if last is None:
            continue
        try:
            judged = judge_loaded(attempt, channel, examiner, again(last, last.round + 1), against=channel.promoted())
        except (NotFoundError, DataError) as error:
            log.warning("not_judged_again", run_id=run_id, reason=str(error))
            attempt.notes.append(f"{run_id} could not be judged again: {attempt.hide(str(error))}")
        else:
            carried_out.append(carry_out(channel, attempt.worker.recipe, judged, copy))
    return carried_out


def _new_data(
    run: Run, channel: Channel, promoted: Promoted | None, *, records: int | None, unseen: int | None
) -> NewData:
    """What the model in use was not trained on, by file and by record."""
    before: set[tuple[str, str]] = set()
    now: Objects = run.train
    if promoted is not None and promoted.run_id is not None:
        record = run.artifacts.other_run(promoted.run_id).run_record()
        try:
            before = {(o.uri, o.etag) for o in read_run_record(record).data.train} if record is not None else set()
        except ValueError as error:
            log.warning("run_record_passed_over", run_id=promoted.run_id, reason=str(error), channel=channel.name)
    new = [o for o in now if (o.uri, o.etag) not in before]
    named = {o.uri for o in now}
    return NewData(
        files=tuple(o.uri for o in new[:NAMED_FILES]),
        file_count=len(new),
        bytes=sum(o.size for o in new),
        gone=len({uri for uri, _ in before} - named),
        records=records,
        unseen=unseen,
    )

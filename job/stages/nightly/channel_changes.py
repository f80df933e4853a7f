"""What is done to a channel: a test is paid, a verdict carried out, a run that lost its swap judged again. No GPU."""

import platform
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import structlog

from job.core.crash_points import crash_point
from job.core.errors import UsageError
from job.core.nightly.changes import in_use_at, not_taken_back
from job.core.nightly.channel import (
    THE_BASE,
    AdapterInUse,
    ChannelState,
    Compared,
    Judged,
    NightWork,
    Outcome,
    Promoted,
    after_verdict,
    name_in_use,
    next_round,
    open_state,
    promotion_of,
    saves_tonight,
    without_again,
)
from job.core.nightly.error_budget import YEAR_DAYS, spend
from job.core.nightly.exam_results import ExampleResults, asked_alike
from job.core.nightly.judgement import Answered, Candidate, Standards, Terms, evidence_to_gather, judge_run
from job.core.nightly.promotion_report import BudgetReport, CarriedOut, ended_with
from job.core.recipe.schema import Recipe
from job.edge.base.fetching import BaseModelIdentity
from job.edge.run.artifacts import Artifacts
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import Channel
from job.stages.attempt import Attempt, Worker
from job.stages.attempts.identity import WEIGHTS, Run, probe_output

log = structlog.get_logger(__name__)
DRIFT_DAYS = 30
"""How far back the drift guard looks."""
MONTH_AGO = f"the champion of {DRIFT_DAYS} days ago"
FIRST = "the channel's first champion"
"""What the drift guard looks back to on a younger channel."""
BASE = "base"
"""What results of the base are kept under."""


def model_name(adapter: AdapterInUse | None) -> str:
    """What results of a model are kept by: its weights, or the base."""
    return BASE if adapter is None else adapter.files[WEIGHTS].sha256[:32]


def now_text() -> str:
    """The time as records hold it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def today() -> int:
    """The day as the error budget counts it."""
    return datetime.now(UTC).date().toordinal()


def first_state(recipe: Recipe) -> Callable[[], ChannelState]:
    """Makes the state of a channel that begins today."""
    return lambda: open_state(today(), per_year=recipe.promote.wrong_per_year)


def standards_of(recipe: Recipe) -> Standards:
    """What the recipe asks of a challenger."""
    return Standards(min_improvement=recipe.promote.min_improvement, max_drift=recipe.promote.max_drift)


def compared_with(promoted: Promoted | None, etag: str | None) -> Compared:
    """The entry that a verdict compares with."""
    if promoted is None:
        return Compared(run_id=None, sequence=0, etag=None)
    return Compared(run_id=promoted.run_id, sequence=promoted.sequence, etag=etag)


def refuse_other_base(promoted: Promoted, base: BaseModelIdentity, recipe: Recipe) -> None:
    """A channel's adapters take each other's place, and so are of one base.

    Raises:
        UsageError: what is in use is on another one.
    """
    if promoted.revision != base.revision:
        raise UsageError(
            f"promote.channel: {recipe.promote.channel} has {name_in_use(promoted)} in use, on {promoted.base} "
            f"({promoted.revision[:12]}), and this recipe trains {base.source} ({base.revision[:12]}); adapters of two "
            "bases cannot take each other's place: give this one a channel of its own"
        )


def earlier_models(channel: Channel, promoted: Promoted | None) -> dict[str, Promoted | None]:
    """Models that no challenger may lie below, beside the one in use, by what sentences call them; None: the base."""
    if promoted is None:
        return {}
    earlier: dict[str, Promoted | None] = {} if promoted.run_id is None else {THE_BASE: None}
    standing = not_taken_back(channel.changes())
    found = in_use_at(standing, datetime.now(UTC) - timedelta(days=DRIFT_DAYS))
    if found is not None and found[0].run_id not in {None, promoted.run_id}:
        before, was_in_use = found
        earlier[MONTH_AGO if was_in_use else FIRST] = before
    return earlier


def pay(channel: Channel, recipe: Recipe, key: str) -> float:
    """Pay a test out of the error budget, before it is looked at; one that was paid for keeps its level."""
    day, per_year = today(), recipe.promote.wrong_per_year

    def paid(state: ChannelState) -> ChannelState:
        budget, _ = spend(state.budget, key, day, per_year=per_year, saves=saves_tonight(state))
        return state.model_copy(update={"budget": budget})

    level = channel.change_state(paid, first=first_state(recipe)).budget.level_of(key)
    assert level is not None, "it was just paid"
    return level


def payment_key(run_id: str, number: int) -> str:
    """What the budget knows the test of a run by."""
    return run_id if number == 1 else f"{run_id}/{number}"


def carry_out(
    channel: Channel, recipe: Recipe, judged: Judged, adapter: ChannelAdapter, *, work: NightWork | None = None
) -> CarriedOut:
    """Do what a verdict says, also when an attempt before did a part of it; a second call changes nothing.

    Args:
        channel: the channel.
        recipe: what is asked of a challenger.
        judged: the verdict, which stands in the store.
        adapter: the channel's copy.
        work: what the night's training took; None: nothing was trained for this verdict.
    """
    outcome: Outcome = "refused"
    if judged.decision.promoted:
        new = promotion_of(judged, channel=channel.name, time=now_text(), by=platform.node())
        outcome = "promoted" if channel.swap(new, etag=judged.compared.etag) else "lost"
        adapter.follow()
    now, _ = channel.promoted()
    champion = name_in_use(now)
    # Also where an attempt before has put it in use, and was killed before its report.
    is_replaced = outcome == "promoted" and (now is None or now.adapter != judged.adapter)
    waits = None
    if judged.fresh is None and outcome == "refused":
        waits = evidence_to_gather(judged, standards_of(recipe), level=judged.level)
    crash_point("channel_state.before")
    channel.change_state(
        lambda state: after_verdict(state, judged, outcome, champion=champion, waits=waits, work=work),
        first=first_state(recipe),
    )
    crash_point("channel_state.after")
    log.info(
        "judged",
        channel=channel.name,
        run_id=judged.run_id,
        outcome=outcome,
        verdict=judged.decision.verdict,
        champion=judged.decision.champion,
        why=judged.decision.reasons[0],
        in_use=champion,
    )
    return CarriedOut(judged=judged, outcome=outcome, replaced_by=champion if is_replaced else None)


def copy_of(worker: Worker, channel: Channel, run_id: str) -> ChannelAdapter:
    """The channel's copy of the adapter in use; files on their way lie in a run's folder."""
    scratch = worker.run_folder(run_id) / "channel-adapter"
    return ChannelAdapter(channel, scratch=scratch, should_stop=worker.should_stop)


def left_undone(worker: Worker, artifacts: Artifacts) -> str | None:
    """What is to be done on the recipe's channel although its run is finished; None: nothing. It only looks."""
    name = worker.recipe.promote.channel
    if name is None:
        return None
    channel = artifacts.channel(name, conditional=False)
    state, _ = channel.state()
    if state is not None and state.again:
        return f"{', '.join(state.again)} lost the swap on {channel.uri}, and waits to be judged again"
    if not copy_of(worker, channel, artifacts.run_id).is_current():
        return f"{channel.uri}/adapter is not the adapter in use"
    return None


def budget_report(state: ChannelState) -> BudgetReport:
    """The budget, for the report."""
    budget = state.budget
    return BudgetReport(
        per_year=budget.per_year,
        spent_in_a_year=budget.spent_since(today() - YEAR_DAYS + 1),
        left=budget.left,
        tests=budget.tests,
    )


def keep_in_order(attempt: Attempt, found: Run) -> None:
    """On a night without new data: what was left undone on the channel is done, if it needs no GPU."""
    recipe, name = attempt.worker.recipe, attempt.worker.recipe.promote.channel
    if name is None:
        return
    if left_undone(attempt.worker, found.artifacts) is None:
        return
    conditional = probe_output(recipe.output, attempt.worker.settings).conditional
    channel = found.artifacts.channel(name, conditional=conditional)
    copy = copy_of(attempt.worker, channel, found.artifacts.run_id)
    copy.follow()
    carried_out = judge_again(channel, recipe, copy)
    if carried_out:
        others = [other.said for other in carried_out[:-1]]
        attempt.standing.promotion = ended_with(carried_out[-1], channel=name, also=others)


def judge_again(channel: Channel, recipe: Recipe, copy: ChannelAdapter) -> list[CarriedOut]:
    """Judge the runs that lost their swap, by what is kept of them; where that is not enough they wait on.

    Returns:
        Each verdict, and what came of it.
    """
    carried_out = []
    state, _ = channel.state()
    for run_id in state.again if state is not None else ():
        last = lost_verdict(channel, recipe, run_id, copy)
        if last is not None:
            is_carried_out = last.round < next_round(state, run_id)
            judged = judge_by_kept(channel, recipe, last, number=last.round + 1) if is_carried_out else last
            if judged is not None:
                carried_out.append(carry_out(channel, recipe, judged, copy))
        state, _ = channel.state()
    return carried_out


def lost_verdict(channel: Channel, recipe: Recipe, run_id: str, copy: ChannelAdapter) -> Judged | None:
    """The last verdict on a run that lost its swap; None: its adapter was deleted, and it is judged no more."""
    last = channel.last_judged(run_id)
    if last is not None and copy.can_follow(last):
        return last
    log.warning("not_judged_again", run_id=run_id, reason="its verdict or its adapter is no longer in the store")
    channel.change_state(lambda state: without_again(state, run_id), first=first_state(recipe))
    return None


def judge_by_kept(channel: Channel, recipe: Recipe, before: Judged, *, number: int) -> Judged | None:
    """A verdict on a run against what is in use now, by results that are kept; None: some that it needs are not.

    Args:
        channel: the channel.
        recipe: what is asked of a challenger.
        before: the run's last verdict.
        number: the new one's.
    """
    promoted, etag = channel.promoted()
    sets = {
        name: _kept_answers(channel, before, promoted, exam, asks=recipe.evaluate.answers > 0)
        for name, exam in (("frozen", before.exam), ("regression", before.regression_exam))
        if exam is not None
    }
    if any(each is None for each in sets.values()):
        log.info("waits_on", run_id=before.run_id, reason="results that are needed to judge it again are not kept")
        return None
    level = pay(channel, recipe, payment_key(before.run_id, number))
    frozen = sets["frozen"]
    assert frozen is not None, "looked at above"
    judged = judge_run(
        Candidate(
            run_id=before.run_id,
            run_uri=before.run_uri,
            round=number,
            adapter=before.adapter,
            base=before.base,
            revision=before.revision,
            others=before.others,
            checkpoints=before.checkpoints,
        ),
        frozen,
        sets.get("regression"),
        Terms(
            champion=name_in_use(promoted),
            compared=compared_with(promoted, etag),
            standards=standards_of(recipe),
            level=level,
            time=now_text(),
            day=today(),
        ),
    )
    return channel.record_judged(judged)


def _kept_answers(
    channel: Channel, before: Judged, promoted: Promoted | None, exam_name: str, *, asks: bool
) -> Answered | None:
    exam = channel.exam(exam_name)

    def kept(run: str, adapter: AdapterInUse | None) -> ExampleResults | None:
        return channel.results(run, exam=exam_name, how=before.how, model=model_name(adapter))

    def of(entry: Promoted | None) -> ExampleResults | None:
        if entry is None or entry.run_id is None:
            return kept(BASE, None)
        return kept(entry.run_id, entry.adapter)

    challenger, champion = kept(before.run_id, before.adapter), of(promoted)
    earlier = {called: of(entry) for called, entry in earlier_models(channel, promoted).items()}
    seeds = [kept(other.run_id, other.adapter) for other in before.others if exam_name == before.exam]
    known = {called: results for called, results in earlier.items() if results is not None}
    by_seed = tuple(results for results in seeds if results is not None)
    if exam is None or challenger is None or champion is None or len(known) + len(by_seed) < len(earlier) + len(seeds):
        return None
    if not asked_alike(challenger, champion) or (asks and exam_name == before.exam and challenger.answers is None):
        return None
    return Answered(exam=exam, challenger=challenger, champion=champion, seeds=by_seed, earlier=known)

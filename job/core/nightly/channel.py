"""What a channel holds: the model in use, what was decided of each night's model and why, and what later nights need.

`Promoted` is the pointer that servers follow, and an entry of the history; `Judged` a verdict, written down before
anything is done by it; `ChannelState` the budget, the challengers that wait for fresh records, and the last nights.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from job.core.attempt.run_record import first_mistake
from job.core.judging.paired import Gap, Pairs
from job.core.nightly.error_budget import Day, ErrorBudget, open_budget
from job.core.nightly.fresh_evidence import MOST_NIGHTS, WAITING, FreshEvidence, with_night, worth_keeping
from job.core.nightly.gate import Decision
from job.core.section import Count, NotNegative, Section, Text, Whole

CHANNEL_VERSION: Literal[1] = 1
THE_BASE = "the base"
"""What the model in use is called where no run was promoted yet."""
KEPT_NIGHTS = 400
"""Nights that the state holds: a year, and some more."""
MOST_AGAIN = 20
"""Runs that wait to be judged again."""

Outcome = Literal["promoted", "refused", "lost"]
"""`lost`: better than what it was compared with, but that was no longer in use; it is judged again."""
Level = Annotated[float, Field(strict=True, ge=0, le=1)]


class AdapterFileInUse(Section):
    """One file of an adapter."""

    size: Whole
    """Bytes."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class AdapterInUse(Section):
    """Where an adapter stands, and what it is."""

    uri: Text
    """The run's own: written once, never changed."""
    files: Annotated[dict[Text, AdapterFileInUse], Field(min_length=1)]


class Promoted(Section):
    """`promoted.json`: what is in use, since when and why. Each change is also an entry of the history."""

    version: Literal[1] = CHANNEL_VERSION
    channel: Text
    sequence: Count
    """How many times what is in use has changed, this change included."""
    kind: Literal["promotion", "rollback"]
    run_id: Text | None
    """None: the base itself, without an adapter."""
    run_uri: Text | None
    adapter: AdapterInUse | None
    base: Text
    revision: Text
    since: Text
    """UTC, ISO 8601."""
    why: Text
    """One sentence."""
    replaced: Text | None
    """The run that was in use before; None: the base."""
    by: Text
    """The machine that made the change."""

    @model_validator(mode="after")
    def _has_an_adapter_where_it_has_a_run(self) -> Self:
        if not (self.run_id is None) == (self.run_uri is None) == (self.adapter is None):
            raise ValueError("run_id, run_uri and adapter stand together, or none of them does")
        return self


class Compared(Section):
    """What a run was compared with."""

    run_id: Text | None
    """None: the base."""
    sequence: Whole
    """Of its entry; 0: nothing was promoted yet."""
    etag: Text | None
    """Of `promoted.json` as it stood; None: there was none."""


class OtherTraining(Section):
    """Another training of a run's recipe, with another seed, which is judged beside it."""

    run_id: Text
    adapter: AdapterInUse


class Judged(Section):
    """A verdict on a run, with all its numbers. It is written down before the swap, and decides what a retry does."""

    version: Literal[1] = CHANNEL_VERSION
    run_id: Text
    run_uri: Text
    round: Count
    """1; more for a run that is judged again."""
    time: Text
    day: Day
    compared: Compared
    decision: Decision
    level: Level
    """What the error budget gave for the run: for the frozen examples and for later fresh records together."""
    challenger_loss: float
    """On the frozen examples, nats a token."""
    champion_loss: float
    gap: Gap
    slices: dict[str, Gap] = Field(default_factory=dict)
    answers: Gap | None = None
    regression: Gap | None = None
    drift: dict[str, Gap] = Field(default_factory=dict)
    fresh: FreshEvidence | None = None
    """Where fresh records were what decided."""
    seeds: Annotated[tuple[Gap, ...], Field(max_length=2)] = ()
    """Of each training on the frozen examples, where there were two; the worse one decided."""
    others: Annotated[tuple[OtherTraining, ...], Field(max_length=1)] = ()
    """The other one of the two; where the run is judged again, both are."""
    checkpoints: Count = 1
    """Planned in the training, of which the frozen examples chose the one that was judged."""
    exam: Text
    """Names the frozen examples."""
    regression_exam: Text | None = None
    how: Text
    """Names device, libraries, base, the job's code, and what layers and rows were."""
    adapter: AdapterInUse
    base: Text
    revision: Text


class NightWork(Section):
    """What a night's run took until its verdict, over all its attempts: for goodput and cost."""

    device: Text | None
    attempts: Count
    held_seconds: NotNegative
    """From the start of each attempt to its end; of one that left no word of its end, none."""
    train_seconds: NotNegative
    """Of these, those in which it trained."""
    tokens: Whole
    """Real tokens trained on."""
    ranks: Count = 1
    """Processes of the last attempt, a GPU each: what is held is held by so many."""


class Night(Section):
    """What a night came to, for the trend."""

    run_id: Text
    run_uri: Text
    round: Count
    time: Text
    champion: Text
    outcome: Outcome
    verdict: Literal["better", "not better", "cannot tell"]
    why: Text
    level: Level
    challenger_loss: float
    champion_loss: float
    mean: float
    low: float | None
    high: float | None
    work: NightWork | None = None
    """None: of a run that was judged again, or by fresh records, and was not trained for it."""


class FreshNight(Section):
    """A night's new records, as models that had seen none of them did on them."""

    night: Text
    time: Text
    records: Whole
    """That were scored."""
    losses: dict[Text, float]
    """Nats a token, by run."""


class Seen(Section):
    """The records that any run of the channel was trained on, or that were counted as fresh ones."""

    name: Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
    """Of the object that holds their hashes."""
    records: Whole
    templates: Text
    """Hash of what makes text of a record: by other templates each would look new."""
    since: Text | None = None
    """When the list was begun anew, UTC, because what was seen before could not be known: it was gone, or by other
    templates. What a model was trained or judged on before is not in it. None: it goes back to the first night."""


class ChannelState(Section):
    """What a channel's next night starts from."""

    version: Literal[1] = CHANNEL_VERSION
    budget: ErrorBudget
    waiting: tuple[FreshEvidence, ...] = ()
    """Challengers that the next fresh records are to judge, newest last."""
    again: Annotated[tuple[Text, ...], Field(max_length=MOST_AGAIN)] = ()
    """Runs that are to be judged again."""
    rounds: Annotated[dict[Text, Count], Field(max_length=WAITING + MOST_AGAIN)] = Field(default_factory=dict)
    """How many verdicts on a run were carried out, of those that wait or are to be judged again: they may do so for
    longer than `nights` goes back."""
    seen: Seen | None = None
    nights: Annotated[tuple[Night, ...], Field(max_length=KEPT_NIGHTS)] = ()
    fresh: Annotated[tuple[FreshNight, ...], Field(max_length=KEPT_NIGHTS)] = ()


def open_state(day: int, *, per_year: float) -> ChannelState:
    """The state of a channel that begins on this day."""
    return ChannelState(budget=open_budget(day, per_year=per_year))


def name_in_use(promoted: Promoted | None) -> str:
    """What sentences call the model in use."""
    return THE_BASE if promoted is None or promoted.run_id is None else promoted.run_id


def promotion_of(judged: Judged, *, channel: str, time: str, by: str) -> Promoted:
    """What `promoted.json` says once this verdict is carried out."""
    return Promoted(
        channel=channel,
        sequence=judged.compared.sequence + 1,
        kind="promotion",
        run_id=judged.run_id,
        run_uri=judged.run_uri,
        adapter=judged.adapter,
        base=judged.base,
        revision=judged.revision,
        since=time,
        why=judged.decision.reasons[0],
        replaced=judged.compared.run_id,
        by=by,
    )


def rollback_to(target: Promoted | None, now: Promoted, *, time: str, by: str) -> Promoted:
    """What `promoted.json` says after going back to what an earlier entry put in use; None: to the base itself."""
    return Promoted(
        channel=now.channel,
        sequence=now.sequence + 1,
        kind="rollback",
        run_id=None if target is None else target.run_id,
        run_uri=None if target is None else target.run_uri,
        adapter=None if target is None else target.adapter,
        base=now.base if target is None else target.base,
        revision=now.revision if target is None else target.revision,
        since=time,
        why=f"Rolled back by hand from {name_in_use(now)} to {name_in_use(target)}.",
        replaced=now.run_id,
        by=by,
    )


def waiting_for(state: ChannelState, champion: str) -> tuple[FreshEvidence, ...]:
    """The challengers whose evidence is against the model in use: another one begins anew."""
    return tuple(each for each in state.waiting if each.champion == champion)


def saves_tonight(state: ChannelState) -> bool:
    """Whether tonight's test is to be paid with little: fresh records judge challengers, and speak for none."""
    return bool(state.fresh) and not any(each.speaks for each in state.waiting)


def next_round(state: ChannelState | None, run_id: str) -> int:
    """Which time a run is judged: verdicts that were not carried out yet do not count."""
    if state is None:
        return 1
    known = (night.round for night in state.nights if night.run_id == run_id)
    return 1 + max(state.rounds.get(run_id, 0), *known, 0)


def after_verdict(
    state: ChannelState,
    judged: Judged,
    outcome: Outcome,
    *,
    champion: str,
    waits: FreshEvidence | None,
    work: NightWork | None = None,
) -> ChannelState:
    """The state once a verdict was carried out; a verdict that is known changes nothing.

    Args:
        state: before.
        judged: the verdict.
        outcome: what came of it.
        champion: what is in use now.
        waits: evidence of a challenger that was not promoted, to be gathered by later nights; None: it does not wait.
        work: what the night's training took; None: nothing was trained for this verdict.
    """
    if judged.round < next_round(state, judged.run_id):
        return state
    night = Night(
        run_id=judged.run_id,
        run_uri=judged.run_uri,
        round=judged.round,
        time=judged.time,
        champion=judged.decision.champion,
        outcome=outcome,
        verdict=judged.decision.verdict,
        why=judged.decision.reasons[0],
        level=judged.decision.level,
        challenger_loss=judged.challenger_loss,
        champion_loss=judged.champion_loss,
        mean=judged.gap.mean,
        low=judged.gap.low,
        high=judged.gap.high,
        work=work,
    )
    others = [each for each in waiting_for(state, champion) if each.challenger != judged.run_id]
    if waits is not None and waits.champion == champion:
        others.append(waits)
    again = [run_id for run_id in state.again if run_id != judged.run_id]
    if outcome == "lost":
        again.append(judged.run_id)
    # As `worth_keeping` has them: what gathered most evidence first.
    waiting, again = tuple(reversed(worth_keeping(others))), again[-MOST_AGAIN:]
    known = state.rounds | {judged.run_id: judged.round}
    stay = dict.fromkeys([*(each.challenger for each in waiting), *again])
    update = {
        "nights": (*state.nights, night)[-KEPT_NIGHTS:],
        "waiting": waiting,
        "again": tuple(again),
        "rounds": {run_id: known.get(run_id) or max(1, next_round(state, run_id) - 1) for run_id in stay},
    }
    return state.model_copy(update=update)


def without_again(state: ChannelState, run_id: str) -> ChannelState:
    """The state in which a run is not to be judged again."""
    return state.model_copy(update={"again": tuple(other for other in state.again if other != run_id)})


def after_fresh(
    state: ChannelState, scored: Mapping[str, Pairs], *, champion: str, seen: Seen, night: FreshNight
) -> ChannelState:
    """The state once a night's new records were scored, or found to be none.

    Args:
        state: before.
        scored: challengers that wait, beside the model in use, on the new records.
        champion: the model in use.
        seen: the records that no later night counts as fresh.
        night: how all of them did.
    """

    def after(evidence: FreshEvidence) -> FreshEvidence:
        pairs = scored.get(evidence.challenger) if evidence.champion == champion else None
        is_full = len(evidence.nights) == MOST_NIGHTS
        return evidence if pairs is None or is_full else with_night(evidence, night.night, pairs)

    update: dict[str, Any] = {"waiting": tuple(map(after, state.waiting)), "seen": seen}
    if night.losses and all(known.night != night.night for known in state.fresh):
        update["fresh"] = (*state.fresh, night)[-KEPT_NIGHTS:]
    return state.model_copy(update=update)


T = TypeVar("T", bound=Section)


def read_as(kind: type[T], content: Mapping[str, Any]) -> T:
    """What a JSON object of a channel is.

    Raises:
        ValueError: it is none, with the first value that is wrong.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from error

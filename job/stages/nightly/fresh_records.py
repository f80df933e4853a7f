"""Test, then train: tonight's new records by the model in use and the challengers that wait, before any is trained on.

New is a record that no run of the channel was trained on and no earlier night has counted. Which those are is kept as
hashes of their text. By other templates every record would look new, and a list that is gone says nothing: then no
record counts that night, and the list is begun anew. From then on it cannot say what a model was trained or judged on
before, so that models are judged on new records only where that is known from elsewhere: the one in use where the
hashes of what it was trained on are kept as text of these templates, and one that waits where it began to wait later
and its own are kept as well. A record counted twice would be bet on twice, and one that a model was trained on flatters
it: the evidence would hold neither.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import structlog
from numpy.typing import NDArray

from job.core.crash_points import crash_point
from job.core.errors import DataError, NotFoundError, UnavailableError
from job.core.judging.paired import Pairs, pairs_of
from job.core.nightly.channel import (
    ChannelState,
    FreshNight,
    Judged,
    Promoted,
    Seen,
    after_fresh,
    name_in_use,
    next_round,
    waiting_for,
)
from job.core.nightly.exam_results import name_of
from job.core.nightly.fresh_evidence import FreshEvidence
from job.core.nightly.promotion_report import CarriedOut
from job.core.recipe.data_section import Templates
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import Channel
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run
from job.stages.base.loading import Inputs
from job.stages.nightly.channel_changes import (
    carry_out,
    first_state,
    now_text,
)
from job.stages.nightly.comparing import again, judge_loaded
from job.stages.nightly.contenders import Contender, Examiner, in_use
from job.tune.data.documents import Documents

log = structlog.get_logger(__name__)
_MOST = 2000
"""New records that are scored, chosen by a hash of each: that is what a night's test before training may cost."""
_ROUNDS = 5
_NAME = 32
_HASH_BYTES = 8
Hashes = NDArray[np.uint64]
_NONE: Hashes = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """The records that were seen before."""

    hashes: Hashes
    since: str | None = None
    """As in `Seen`."""
    lost: str | None = None
    """Why it is begun anew tonight."""


class FreshRecords:
    """Tonight's new records of one channel."""

    def __init__(self, attempt: Attempt, run: Run, inputs: Inputs, channel: Channel, examiner: Examiner) -> None:
        """Read which records were seen before."""
        self._attempt, self._run, self._channel = attempt, run, channel
        self._examiner = examiner
        self._train = inputs.dataset.train
        self._hashes: Hashes = self._train.encoded.digests()[:, 0]
        self._held_out: Hashes = inputs.dataset.validation.encoded.digests()[:, 0]
        self._templates = _templates_of(attempt)
        self._scores: dict[tuple[str, str], NDArray[np.float64]] = {}
        """By model and by what the records are known by."""

    def unseen(self, promoted: Promoted | None) -> int | None:
        """Training examples that are new to the channel; None: it does not know all that it has seen."""
        known = self._known(self._channel.state()[0], promoted)
        return None if known.since is not None else int((~np.isin(np.unique(self._hashes), known.hashes)).sum())

    def since(self, promoted: Promoted | None) -> int | None:
        """Training examples that the model in use was not trained on; None: that is not known."""
        every = np.unique(self._hashes)
        run_id = None if promoted is None else promoted.run_id
        theirs = self._trained(run_id)
        return None if theirs is None else int((~np.isin(every, theirs)).sum())

    def keep_own(self, promoted: Promoted | None) -> None:
        """Keep what tonight's run is trained on, for the nights on which it is in use or waits."""
        state, _ = self._channel.state()
        wait = () if state is None else (*(each.challenger for each in state.waiting), *state.again)
        in_use_now = None if promoted is None else promoted.run_id
        self._channel.keep_trained(
            self._run.artifacts.run_id,
            self._templates,
            np.unique(self._hashes).astype("<u8").tobytes(),
            needed=[*wait, *([in_use_now] if in_use_now is not None else [])],
        )

    def test(self, copy: ChannelAdapter) -> list[CarriedOut]:
        """Score them, write down what that says, and promote whom it shows to be better.

        Returns:
            Each run that it shows to be better, up to the one that is promoted, and what came of it.
        """
        begun = self._gone_on_with(copy)
        for _ in range(_ROUNDS):
            against = self._channel.promoted()
            promoted, _ = against
            after = self._tested(promoted)
            if after is None:
                continue
            carried_out = [*begun]
            for evidence in sorted(waiting_for(after, name_in_use(promoted)), key=lambda each: -each.e_better):
                found = self._carried_out(evidence, after, against, copy) if evidence.is_better else None
                carried_out += [found] if found is not None else []
                if found is not None and found.outcome == "promoted":
                    break
            return carried_out
        raise UnavailableError(
            f"{self._channel.uri}/state.json: others change it all the time; start the same job again"
        )

    def _gone_on_with(self, copy: ChannelAdapter) -> list[CarriedOut]:
        """A promotion by new records in which an attempt before was killed: it is in use, and the state lacks it."""
        (state, _), (promoted, _) = self._channel.state(), self._channel.promoted()
        if promoted is None or promoted.run_id is None:
            return []
        judged = self._channel.judged(promoted.run_id, next_round(state, promoted.run_id))
        if judged is None or judged.fresh is None:
            return []
        return [carry_out(self._channel, self._attempt.worker.recipe, judged, copy)]

    def _tested(self, promoted: Promoted | None) -> ChannelState | None:
        """The state with what was found; None: another night has counted records meanwhile, and fewer are new.

        Scoring takes minutes, in which others pay, decide and promote: what was found is written into the state as it
        stands then.
        """
        state, _ = self._channel.state()
        first = first_state(self._attempt.worker.recipe)
        before = state or first()
        known = self._known(state, promoted)
        if known.lost is not None:
            self._note(f"no record counts as new tonight, because {known.lost}: which were seen before is not known")
        contenders, excluded = self._to_judge(before, promoted, known)
        rows = self._new_rows(excluded) if contenders else []
        known_by = hashlib.sha256(np.sort(self._hashes_of(rows)).tobytes()).hexdigest()[:_NAME]
        scored, losses = self._score(contenders, rows, known_by) if len(rows) else ({}, {})
        night = FreshNight(night=known_by, time=now_text(), records=len(rows), losses=losses)
        seen, hashes = self._all_seen(known)

        def counted(now: ChannelState) -> ChannelState:
            if now.seen != before.seen:
                return now  # also where that is ours: it was counted
            return after_fresh(now, scored, champion=name_in_use(promoted), seen=seen, night=night)

        if seen != before.seen:
            self._channel.keep_seen(seen.name, hashes.astype("<u8").tobytes())
            crash_point("fresh_records.before")
        after = self._channel.change_state(counted, first=first)
        if after.seen != seen:
            return None
        if seen != before.seen:
            crash_point("fresh_records.after")
            self._channel.forget_seen(but=[seen.name])
        return after

    def _to_judge(
        self, state: ChannelState, promoted: Promoted | None, known: _Known
    ) -> tuple[list[Contender], list[Hashes]]:
        """Who is judged on new records, the model in use first, and which records are not new to all of them."""
        champion = in_use(promoted)
        waiting = waiting_for(state, champion.called)
        if known.lost is not None or (not waiting and champion.run_id is None):
            return [], []
        theirs = self._trained_or_seen(champion.run_id, known)
        if theirs is None:
            self._note(
                f"no record counts as new: which ones {champion.called} was trained on is not known, since the list of "
                f"those that were seen begins on {known.since}; with the next model in use they count again"
            )
            return [], []
        contenders, excluded = [champion], [known.hashes, self._held_out, theirs]
        for each in waiting:
            verdict = self._last_verdict(state, each.challenger)
            theirs = self._trained_or_seen(each.challenger, known)
            if verdict is None:
                continue
            if theirs is None or (known.since is not None and verdict.time < known.since):
                self._note(
                    f"{each.challenger} is judged by new records no more: which ones it was trained or judged on is "
                    f"not known, since the list of those that were seen begins on {known.since}"
                )
                continue
            contenders.append(Contender(run_id=verdict.run_id, adapter=verdict.adapter))
            excluded.append(theirs)
        return contenders, excluded

    def _score(
        self, contenders: Sequence[Contender], rows: Sequence[int], known_by: str
    ) -> tuple[dict[str, Pairs], dict[str, float]]:
        """Those that wait beside the model in use, which is the first, and each one's loss."""
        documents = _some(self._train, rows)
        nll = {}
        for each in contenders:
            try:
                nll[each.called] = self._nll(each, documents, known_by)
            except (NotFoundError, DataError) as error:  # a run that somebody has deleted must not hold up the nights
                log.warning("not_scored", run_id=each.run_id, reason=str(error))
                self._note(f"not judged on new records: {self._attempt.hide(str(error))}")
        tokens = int(documents.targets.sum())
        losses = {name: float(each.sum() / tokens) for name, each in nll.items()}
        log.info("fresh_records", records=len(rows), losses=losses)
        theirs = nll.get(contenders[0].called)
        if theirs is None:
            return {}, losses
        names = [each.called for each in contenders[1:] if each.called in nll]
        return {name: pairs_of(nll[name], theirs, documents.targets) for name in names}, losses

    def _nll(self, contender: Contender, documents: Documents, known_by: str) -> NDArray[np.float64]:
        key = contender.model, known_by
        if key not in self._scores:
            with self._examiner.loaded(contender) as model:
                self._scores[key] = self._examiner.nll(contender, model, documents)
        return self._scores[key]

    def _carried_out(
        self,
        evidence: FreshEvidence,
        state: ChannelState,
        against: tuple[Promoted | None, str | None],
        copy: ChannelAdapter,
    ) -> CarriedOut | None:
        """Judge a challenger by what fresh records say, and do what comes of it; None: nothing is known of it.

        It is compared with what it was scored beside, whatever is in use by now: where that was replaced meanwhile,
        by a rival, by hand, or by whom the one before it lost its swap to, it loses its own and is judged again.
        """
        channel, recipe = self._channel, self._attempt.worker.recipe
        number, before = next_round(state, evidence.challenger), self._last_verdict(state, evidence.challenger)
        judged = channel.judged(evidence.challenger, number)
        if judged is None and before is not None:
            candidate = again(before, number)
            judged = judge_loaded(self._attempt, channel, self._examiner, candidate, against=against, fresh=evidence)
        return None if judged is None else carry_out(channel, recipe, judged, copy)

    def _last_verdict(self, state: ChannelState, run_id: str) -> Judged | None:
        return self._channel.judged(run_id, max(1, next_round(state, run_id) - 1))

    # --- which are new ------------------------------------------------------------------------------------------------

    def _known(self, state: ChannelState | None, promoted: Promoted | None) -> _Known:
        """The records that were seen, as the channel knows them."""
        seen = None if state is None else state.seen
        if seen is None:
            if promoted is None and (state is None or not state.nights):
                return _Known(hashes=_NONE)  # the first night
            lost = "the channel's state does not name them"
        elif seen.templates != self._templates:
            lost = "the templates have changed"
        else:
            try:
                data = self._channel.seen(seen.name, size=_HASH_BYTES * seen.records)
                return _Known(hashes=np.frombuffer(data, dtype="<u8").astype(np.uint64), since=seen.since)
            except (NotFoundError, DataError) as error:
                lost = f"their list is gone or damaged ({self._attempt.hide(str(error))})"
        return _Known(hashes=_NONE, since=now_text(), lost=lost)

    def _trained(self, run_id: str | None) -> Hashes | None:
        """Hashes of what a run was trained on, as text of tonight's templates; None: they are not kept."""
        if run_id is None:
            return _NONE
        kept = self._channel.trained(run_id, self._templates)
        return None if kept is None or len(kept) % _HASH_BYTES else np.frombuffer(kept, dtype="<u8").astype(np.uint64)

    def _trained_or_seen(self, run_id: str | None, known: _Known) -> Hashes | None:
        """The same; none beside those that were seen, where that list goes back to the first night."""
        theirs = self._trained(run_id)
        return _NONE if theirs is None and known.since is None else theirs

    def _note(self, said: str) -> None:
        """For log and report; once, however often it is found."""
        if said not in self._attempt.notes:
            log.warning("fresh_records_not_counted", reason=said)
            self._attempt.notes.append(said)

    def _new_rows(self, excluded: Sequence[Hashes]) -> list[int]:
        """Documents to score, ascending."""
        hashes = self._hashes[self._train.rows]
        _, first = np.unique(hashes, return_index=True)
        new = first[~np.isin(hashes[first], np.concatenate(excluded))]
        chosen = new[np.argsort(hashes[new])][:_MOST]
        return sorted(map(int, chosen))

    def _all_seen(self, known: _Known) -> tuple[Seen, Hashes]:
        every = np.unique(np.concatenate([known.hashes, self._hashes]))
        name = hashlib.sha256(every.astype("<u8").tobytes()).hexdigest()[:_NAME]
        return Seen(name=name, records=len(every), templates=self._templates, since=known.since), every

    def _hashes_of(self, rows: Sequence[int]) -> Hashes:
        return self._hashes[self._train.rows[list(rows)]]


def _some(documents: Documents, rows: Sequence[int]) -> Documents:
    chosen = np.array(rows, dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    return replace(
        documents,
        rows=documents.rows[chosen],
        lengths=documents.lengths[chosen],
        targets=documents.targets[chosen],
        dropped_rows=nothing,
        rows_without_target=nothing,
    )


def _templates_of(attempt: Attempt) -> str:
    """Names what makes text of a record."""
    sources = attempt.worker.recipe.data.sources
    return name_of(
        {"sources": [each.data.model_dump(mode="json", include={*Templates.model_fields}) for each in sources]}
    )

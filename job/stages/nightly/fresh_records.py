"""Test, then train: tonight's new records by the model in use and the challengers that wait, before any is trained on.

New is a record that no run of the channel was trained on and no earlier night has counted. Which those are is kept as
hashes of their text; by other templates every record would look new, and then none is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import structlog
from numpy.typing import NDArray

from job.core.errors import DataError, NotFoundError, UnavailableError
from job.core.judging.paired import Pairs, pairs_of
from job.core.nightly.channel import (
    ChannelState,
    FreshNight,
    Judged,
    Outcome,
    Promoted,
    Seen,
    after_fresh,
    name_in_use,
    waiting_for,
)
from job.core.nightly.exam_results import name_of
from job.core.nightly.fresh_evidence import FreshEvidence
from job.core.recipe.data_section import Templates
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import Channel
from job.edge.store.objects import PreconditionError
from job.stages.attempt import Attempt
from job.stages.attempts.identity import Run
from job.stages.base.loading import Inputs
from job.stages.nightly.channel_changes import (
    carry_out,
    first_state,
    next_round,
    now_text,
)
from job.stages.nightly.comparing import again, judge_loaded
from job.stages.nightly.contenders import Contender, Examiner, in_use
from job.stages.nightly.exams import fields_of_documents, numbers_of
from job.tune.data.documents import Documents

log = structlog.get_logger(__name__)
_MOST = 2000
"""New records that are scored, chosen by a hash of each: that is what a night's test before training may cost."""
_ROUNDS = 5
_NAME = 32
_HASH_BYTES = 8
Hashes = NDArray[np.uint64]


class FreshRecords:
    """Tonight's new records of one channel."""

    def __init__(self, attempt: Attempt, run: Run, inputs: Inputs, channel: Channel, examiner: Examiner) -> None:
        """Read which records were seen before."""
        self._attempt, self._run, self._inputs, self._channel = attempt, run, inputs, channel
        self._examiner = examiner
        self._train = inputs.dataset.train
        self._hashes: Hashes = self._train.encoded.digests()[:, 0]
        self._held_out: Hashes = inputs.dataset.validation.encoded.digests()[:, 0]
        self._templates = _templates_of(attempt)
        self._scores: dict[tuple[str, str], NDArray[np.float64]] = {}
        """By model and by what the records are known by."""

    def unseen(self) -> int | None:
        """Training examples that are new to the channel; None: it does not know which it has seen."""
        state, _ = self._channel.state()
        seen, every = self._seen(state), np.unique(self._hashes)
        if state is None or state.seen is None:
            return len(every)
        return None if seen is None else int((~np.isin(every, seen)).sum())

    def since(self, promoted: Promoted | None) -> int | None:
        """Training examples that the model in use was not trained on; None: that is not known."""
        every = np.unique(self._hashes)
        run_id = None if promoted is None else promoted.run_id
        if run_id is None:
            return len(every)
        theirs = self._channel.trained(run_id, self._templates)
        if theirs is None or len(theirs) % _HASH_BYTES:
            return None
        return int((~np.isin(every, np.frombuffer(theirs, dtype="<u8"))).sum())

    def keep_own(self, promoted: Promoted | None) -> None:
        """Keep what tonight's run is trained on, for the nights on which it is in use."""
        self._channel.keep_trained(
            self._run.artifacts.run_id,
            self._templates,
            np.unique(self._hashes).astype("<u8").tobytes(),
            in_use=None if promoted is None else promoted.run_id,
        )

    def test(self, copy: ChannelAdapter) -> list[tuple[Judged, Outcome]]:
        """Score them, write down what that says, and promote whom it shows to be better.

        Returns:
            Each run that it shows to be better, up to the one that is promoted, and what came of it.
        """
        for _ in range(_ROUNDS):
            state, etag = self._channel.state()
            promoted, _ = self._channel.promoted()
            try:
                after = self._tested(state, etag, promoted)
            except PreconditionError:
                continue  # another night wrote in between: what is new may be less by now
            carried_out = []
            for evidence in sorted(waiting_for(after, name_in_use(promoted)), key=lambda each: -each.e_better):
                found = self._carried_out(evidence, after, copy) if evidence.is_better else None
                carried_out += [found] if found is not None else []
                if found is not None and found[1] == "promoted":
                    break
            return carried_out
        raise UnavailableError(
            f"{self._channel.uri}/state.json: others change it all the time; start the same job again"
        )

    def _tested(self, state: ChannelState | None, etag: str | None, promoted: Promoted | None) -> ChannelState:
        before = state or first_state(self._attempt.worker.recipe)()
        rows = self._new_rows(self._seen(state))
        known_by = hashlib.sha256(np.sort(self._hashes_of(rows)).tobytes()).hexdigest()[:_NAME]
        scored, losses = self._score(before, promoted, rows, known_by) if len(rows) else ({}, {})
        night = FreshNight(night=known_by, time=now_text(), records=len(rows), losses=losses)
        seen, hashes = self._all_seen(state)
        after = after_fresh(before, scored, champion=name_in_use(promoted), seen=seen, night=night)
        if after != before:
            self._channel.keep_seen(seen.name, hashes.astype("<u8").tobytes())
            self._channel.write_state(after, etag=etag)
            self._channel.forget_seen(but=[seen.name])
        return after

    def _score(
        self, state: ChannelState, promoted: Promoted | None, rows: Sequence[int], known_by: str
    ) -> tuple[dict[str, Pairs], dict[str, float]]:
        """Those that wait beside the model in use, and each one's loss."""
        champion = in_use(promoted)
        waiting = [each.challenger for each in waiting_for(state, champion.called)]
        if not waiting and champion.run_id is None:
            return {}, {}
        documents, clusters = _some(self._train, rows), self._clusters(rows)
        verdicts = [self._last_verdict(run_id) for run_id in waiting]
        contenders = [Contender(run_id=each.run_id, adapter=each.adapter) for each in verdicts if each is not None]
        nll = {}
        for each in (champion, *contenders):
            try:
                nll[each.called] = self._nll(each, documents, known_by)
            except (NotFoundError, DataError) as error:  # a run that somebody has deleted must not hold up the nights
                log.warning("not_scored", run_id=each.run_id, reason=str(error))
                self._attempt.notes.append(f"not judged on new records: {self._attempt.hide(str(error))}")
        tokens = int(documents.targets.sum())
        losses = {name: float(each.sum() / tokens) for name, each in nll.items()}
        log.info("fresh_records", records=len(rows), losses=losses)
        theirs = nll.get(champion.called)
        if theirs is None:
            return {}, losses
        names = [each.called for each in contenders if each.called in nll]
        return {name: pairs_of(nll[name], theirs, documents.targets, clusters) for name in names}, losses

    def _nll(self, contender: Contender, documents: Documents, known_by: str) -> NDArray[np.float64]:
        key = contender.model, known_by
        if key not in self._scores:
            with self._examiner.loaded(contender) as model:
                self._scores[key] = self._examiner.nll(contender, model, documents)
        return self._scores[key]

    def _carried_out(
        self, evidence: FreshEvidence, state: ChannelState, copy: ChannelAdapter
    ) -> tuple[Judged, Outcome] | None:
        """Judge a challenger by what fresh records say, and do what comes of it; None: nothing is known of it."""
        channel, recipe = self._channel, self._attempt.worker.recipe
        number, before = next_round(state, evidence.challenger), self._last_verdict(evidence.challenger)
        judged = channel.judged(evidence.challenger, number)
        if judged is None and before is not None:
            candidate = again(before, number)
            judged = judge_loaded(self._attempt, channel, self._examiner, candidate, fresh=evidence)
        return None if judged is None else (judged, carry_out(channel, recipe, judged, copy))

    def _last_verdict(self, run_id: str) -> Judged | None:
        state, _ = self._channel.state()
        return self._channel.judged(run_id, max(1, next_round(state, run_id) - 1))

    # --- which are new ------------------------------------------------------------------------------------------------

    def _seen(self, state: ChannelState | None) -> Hashes | None:
        """Hashes of the records that were seen; None: that is not known, and nothing counts as new tonight."""
        if state is None or state.seen is None or state.seen.templates != self._templates:
            return None
        try:
            hashes = self._channel.seen(state.seen.name, size=_HASH_BYTES * state.seen.records)
            return np.frombuffer(hashes, dtype="<u8").astype(np.uint64)
        except (NotFoundError, DataError) as error:
            log.warning("seen_records_gone", reason=str(error), then="nothing counts as new tonight")
            return None

    def _new_rows(self, seen: Hashes | None) -> list[int]:
        """Documents to score, ascending."""
        if seen is None:
            return []
        hashes = self._hashes[self._train.rows]
        _, first = np.unique(hashes, return_index=True)
        new = first[~np.isin(hashes[first], seen) & ~np.isin(hashes[first], self._held_out)]
        chosen = new[np.argsort(hashes[new])][:_MOST]
        return sorted(map(int, chosen))

    def _all_seen(self, state: ChannelState | None) -> tuple[Seen, Hashes]:
        seen = self._seen(state)
        every = np.unique(self._hashes if seen is None else np.concatenate([seen, self._hashes]))
        name = hashlib.sha256(every.astype("<u8").tobytes()).hexdigest()[:_NAME]
        return Seen(name=name, records=len(every), templates=self._templates), every

    def _hashes_of(self, rows: Sequence[int]) -> Hashes:
        return self._hashes[self._train.rows[list(rows)]]

    def _clusters(self, rows: Sequence[int]) -> NDArray[np.int64] | None:
        cluster = self._attempt.worker.recipe.promote.cluster
        if cluster is None:
            return None
        folder = self._attempt.worker.run_folder(self._inputs.artifacts.run_id) / "fresh"
        fields = fields_of_documents(
            self._attempt.worker,
            self._run.train,
            self._train,
            [cluster],
            beside=self._run.validation,
            folder=folder,
            only=rows,
        )
        return np.array(numbers_of([each.get(cluster) for each in fields]))


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

"""Test, then train: tonight's new records by the model in use and the challengers that wait, before any is trained on.

New is a record that no run of the channel was trained on and no earlier night has counted. Which those are is kept as
hashes of their text; by other templates every record would look new, and then none is.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import structlog
from numpy.typing import NDArray

from job.core.channel import (
    ChannelState,
    FreshNight,
    Judged,
    Promoted,
    Seen,
    after_fresh,
    name_in_use,
    waiting_for,
)
from job.core.data_section import Templates
from job.core.errors import NotFoundError, UnavailableError
from job.core.example_results import ExampleResults, name_of
from job.core.fresh_evidence import FreshEvidence
from job.core.judgement import Answered, Candidate, Terms, judge_run
from job.core.paired import Pairs, pairs_of
from job.edge.run.channel_adapter import ChannelAdapter
from job.edge.run.channels import Channel
from job.edge.store.objects import PreconditionError
from job.stages.attempt import Attempt
from job.stages.channel_changes import (
    carry_out,
    compared_with,
    earlier_models,
    first_state,
    next_round,
    now_text,
    standards_of,
    today,
)
from job.stages.contenders import Contender, Examiner, in_use
from job.stages.exams import fields_of_documents, numbers_of
from job.stages.identity import Run
from job.stages.loading import Inputs
from job.tune.data.documents import Documents

log = structlog.get_logger(__name__)
_MOST = 2000
"""New records that are scored, chosen by a hash of each: that is what a night's test before training may cost."""
_ROUNDS = 5
_NAME = 32
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

    def count(self) -> int | None:
        """Training examples that are new to the channel; None: it does not know which it has seen."""
        state, _ = self._channel.state()
        seen, every = self._seen(state), np.unique(self._hashes)
        if state is None or state.seen is None:
            return len(every)
        return None if seen is None else int((~np.isin(every, seen)).sum())

    def test(self, copy: ChannelAdapter) -> str | None:
        """Score them, write down what that says, and promote whom it shows to be better.

        Returns:
            The run that is in use by it; None: it shows that of nobody.
        """
        for _ in range(_ROUNDS):
            state, etag = self._channel.state()
            promoted, _ = self._channel.promoted()
            try:
                after = self._tested(state, etag, promoted)
            except PreconditionError:
                continue  # another night wrote in between: what is new may be less by now
            for evidence in sorted(waiting_for(after, name_in_use(promoted)), key=lambda each: -each.e_better):
                if evidence.is_better and self._promoted_by(evidence, after, copy):
                    return evidence.challenger
            return None
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
        waiting = [self._contender(each) for each in waiting_for(state, champion.called)]
        if not waiting and champion.run_id is None:
            return {}, {}
        documents = _some(self._train, rows)
        clusters = self._clusters(rows)
        nll = {}
        for each in (champion, *waiting):
            if (each.model, known_by) not in self._scores:
                with self._examiner.loaded(each) as model:
                    self._scores[each.model, known_by] = self._examiner.nll(model, documents)
            nll[each.called] = self._scores[each.model, known_by]
        pairs = {
            each.called: pairs_of(nll[each.called], nll[champion.called], documents.targets, clusters)
            for each in waiting
        }
        tokens = int(documents.targets.sum())
        losses = {name: float(each.sum() / tokens) for name, each in nll.items()}
        log.info("fresh_records", records=len(rows), losses=losses)
        return pairs, losses

    def _promoted_by(self, evidence: FreshEvidence, state: ChannelState, copy: ChannelAdapter) -> bool:
        """Judge a challenger by what fresh records say; whether it is in use now."""
        channel, recipe = self._channel, self._attempt.worker.recipe
        number = next_round(state, evidence.challenger)
        judged = channel.judged(evidence.challenger, number) or self._judge(evidence, number)
        return carry_out(channel, recipe, judged, copy) == "promoted"

    def _judge(self, evidence: FreshEvidence, number: int) -> Judged:
        channel, recipe = self._channel, self._attempt.worker.recipe
        promoted, etag = channel.promoted()
        contender, champion = self._contender(evidence), in_use(promoted)
        earlier = {called: in_use(entry) for called, entry in earlier_models(channel, promoted).items()}
        before = self._last_verdict(evidence.challenger)
        frozen, regression = answers(self._examiner, contender, champion, earlier)
        judged = judge_run(
            Candidate(
                run_id=evidence.challenger,
                run_uri=before.run_uri,
                round=number,
                adapter=before.adapter,
                base=before.base,
                revision=before.revision,
            ),
            frozen,
            regression,
            Terms(
                champion=champion.called,
                compared=compared_with(promoted, etag),
                standards=standards_of(recipe),
                level=evidence.level,
                fresh=evidence,
                time=now_text(),
                day=today(),
            ),
        )
        return channel.record_judged(judged)

    def _contender(self, evidence: FreshEvidence) -> Contender:
        judged = self._last_verdict(evidence.challenger)
        return Contender(run_id=judged.run_id, adapter=judged.adapter)

    def _last_verdict(self, run_id: str) -> Judged:
        state, _ = self._channel.state()
        judged = self._channel.judged(run_id, max(1, next_round(state, run_id) - 1))
        if judged is None:
            raise NotFoundError(f"{self._channel.uri}/verdicts: the verdict on {run_id}, which waits, is gone")
        return judged

    # --- which are new ------------------------------------------------------------------------------------------------

    def _seen(self, state: ChannelState | None) -> Hashes | None:
        """Hashes of the records that were seen; None: that is not known, and nothing counts as new tonight."""
        if state is None or state.seen is None or state.seen.templates != self._templates:
            return None
        try:
            return np.frombuffer(self._channel.seen(state.seen.name), dtype="<u8").astype(np.uint64)
        except NotFoundError:
            log.warning("seen_records_gone", channel=self._channel.name, then="nothing counts as new tonight")
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


def answers(
    examiner: Examiner,
    contender: Contender,
    champion: Contender,
    earlier: Mapping[str, Contender],
    *,
    seeds: tuple[ExampleResults, ...] = (),
) -> tuple[Answered, Answered | None]:
    """What models made of the frozen examples, and of the regression set if there is one.

    Args:
        examiner: asks them.
        contender: the one that is judged.
        champion: the one in use.
        earlier: that the first must not lie below, by what sentences call them.
        seeds: results on the frozen examples of other trainings of the first one's recipe.
    """
    mine, theirs = examiner.results(contender), examiner.results(champion)
    others = {called: examiner.results(each) for called, each in earlier.items()}

    def on(exam_name: str) -> Answered:
        exam = next(each.exam for each in examiner.exams.every if each.exam.name == exam_name)
        return Answered(
            exam=exam,
            challenger=mine[exam_name],
            champion=theirs[exam_name],
            seeds=seeds if exam_name == examiner.exams.frozen.exam.name else (),
            earlier={called: each[exam_name] for called, each in others.items()},
        )

    exams = examiner.exams
    return on(exams.frozen.exam.name), None if exams.regression is None else on(exams.regression.exam.name)


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

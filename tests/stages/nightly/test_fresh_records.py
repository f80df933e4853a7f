"""New records before training: on which ones who is judged, and what holds when the channel changes meanwhile."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from channel_material import STANDARDS, adapter, exam, judged, results
from tiny import stages_attempt

from job.core.nightly.channel import Compared, Promoted, after_verdict, name_in_use, open_state, rollback_to
from job.core.nightly.error_budget import quiet_level
from job.core.nightly.fresh_evidence import BETS
from job.core.nightly.judgement import evidence_to_gather
from job.core.recipe.schema import Recipe
from job.edge.run import channels as channels_module
from job.edge.run.channels import Channel
from job.edge.store.objects import StoreSettings
from job.edge.store.opening import open_store
from job.stages.nightly.channel_changes import first_state, pay, today
from job.stages.nightly.fresh_records import FreshRecords

LOSSES = {"the base": 2.0, "run-1": 1.0, "run-2": 0.5, "run-3": 0.6, "run-4": 1.0}
OLD, NEW = range(1, 41), range(101, 501)
"""Hashes of records."""


def recipe_of(prompt="{q}"):
    return Recipe.model_validate(
        {
            "model": {"base": "owner/base", "revision": "c" * 40},
            "data": {"train": "s3://b/t.jsonl", "validation": "s3://b/v.jsonl", "prompt": prompt, "completion": "{a}"},
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
            "output": "s3://b/models",
            "promote": {"channel": "notes"},
        }
    )


@pytest.fixture
def channel(tmp_path):
    return Channel(open_store(f"file://{tmp_path}/store", StoreSettings()), "notes", conditional=True)


class Asked:
    """In an examiner's place: models of a known loss, and something that happens while one is loaded."""

    def __init__(self):
        frozen = SimpleNamespace(exam=exam())
        self.exams = SimpleNamespace(frozen=frozen, regression=None, every=[frozen])
        self.scored = []
        self.meanwhile = []

    @contextmanager
    def loaded(self, contender):
        self.scored.append(contender.called)
        if self.meanwhile:
            self.meanwhile.pop()()
        yield None

    def nll(self, contender, _model, documents):
        return LOSSES[contender.called] * documents.targets.astype(np.float64)

    def results(self, contender, *, with_answers=False):
        return {"exam": results(1.0, model=contender.model, noise=0.3, seed=ord(contender.called[-1]))}


def own(run_id):
    """The adapter of a run: another one than any other run's."""
    return adapter(run_id, run_id[-1])


class Nights:
    """A channel with run-1 in use, whose nights train on these records."""

    def __init__(self, channel, documents, folder):
        self.channel, self.recipe, self.folder, self.documents = channel, recipe_of(), folder, documents
        self.examiner = Asked()
        self.copy = SimpleNamespace(follow=lambda: None)
        assert self.night(OLD, run_id="run-1") == []
        self.put_in_use("run-1")

    def fresh(self, *hashes, run_id="run-9"):
        """Tonight's records, as they stand before the training."""
        content = np.array([each for some in hashes for each in some], dtype=np.uint64)
        every = np.stack([content, content], axis=1)
        train = replace(
            self.documents,
            encoded=SimpleNamespace(digests=lambda: every),
            rows=np.arange(len(content)),
            lengths=np.full(len(content), 12),
            targets=np.full(len(content), 10),
        )
        held_out = SimpleNamespace(encoded=SimpleNamespace(digests=lambda: np.zeros((0, 2), dtype=np.uint64)))
        artifacts = SimpleNamespace(run_id=run_id)
        inputs = SimpleNamespace(dataset=SimpleNamespace(train=train, validation=held_out), artifacts=artifacts)
        run = SimpleNamespace(artifacts=artifacts, train=(), validation=())
        return FreshRecords(self.attempt, run, inputs, self.channel, self.examiner)

    def put_in_use(self, run_id):
        now, etag = self.channel.promoted()
        change = Promoted(
            channel="notes",
            sequence=1 if now is None else now.sequence + 1,
            kind="promotion",
            run_id=run_id,
            run_uri=f"s3://b/runs/{run_id}",
            adapter=own(run_id),
            base="owner/base",
            revision="c" * 40,
            since="2026-11-01T00:00:00+00:00",
            why="Promoted.",
            replaced=None if now is None else now.run_id,
            by="node",
        )
        assert self.channel.swap(change, etag=etag)

    def roll_back(self):
        now, etag = self.channel.promoted()
        assert self.channel.swap(rollback_to(None, now, time="2026-11-30T00:00:00+00:00", by="node"), etag=etag)

    def night(self, *hashes, run_id="run-9"):
        """What a night does before it trains on these; its notes."""
        self.attempt = stages_attempt(self.recipe, self.folder)
        fresh = self.fresh(*hashes, run_id=run_id)
        fresh.keep_own(self.channel.promoted()[0])
        fresh.test(self.copy)
        return self.attempt.notes

    def waits(self, run_id, *, level=0.02, time="2026-11-29T02:17:00+00:00"):
        """A run that could not be told from the one in use, and waits for new records: one good night is enough."""
        now, etag = self.channel.promoted()
        compared = Compared(run_id=now.run_id, sequence=now.sequence, etag=etag)
        found = judged(run_id, gain=0.0, level=level, compared=compared)
        verdict = self.channel.record_judged(found.model_copy(update={"adapter": own(run_id), "time": time}))
        evidence = evidence_to_gather(verdict, STANDARDS, level=level)
        evidence = evidence.model_copy(update={"champion": name_in_use(now), "better": (9.0,) * len(BETS)})
        self.channel.change_state(
            lambda state: after_verdict(state, verdict, "refused", champion=name_in_use(now), waits=evidence),
            first=lambda: open_state(today(), per_year=1.0),
        )

    @property
    def state(self):
        return self.channel.state()[0]


@pytest.fixture
def nights(channel, documents, tmp_path):
    return Nights(channel, documents, tmp_path / "work")


def test_new_records_promote_who_waited(nights):
    nights.waits("run-2")
    (done,) = nights.fresh(OLD, NEW).test(nights.copy)

    assert (done.judged.run_id, done.judged.fresh.records, done.outcome) == ("run-2", len(NEW), "promoted")
    assert nights.channel.promoted()[0].run_id == "run-2"


def test_a_night_whose_new_records_speak_for_no_one_pays_little_and_one_whose_do_what_was_saved(nights):
    nights.waits("run-2", level=0.0)
    nights.fresh(OLD, NEW).test(nights.copy)
    quiet = pay(nights.channel, nights.recipe, "run-9")
    (silent,) = nights.state.waiting
    speaks = silent.model_copy(update={"last": -3.0})
    nights.channel.change_state(
        lambda state: state.model_copy(update={"waiting": (speaks,)}), first=first_state(nights.recipe)
    )

    assert quiet == pytest.approx(quiet_level(1.0))
    left = nights.state.budget.left
    assert pay(nights.channel, nights.recipe, "run-10") == pytest.approx(left / 2)
    assert left / 2 > 2 * quiet


# --- what is in use changes meanwhile ---------------------------------------------------------------------------------


def test_a_rollback_while_new_records_are_scored_holds_and_who_was_better_is_judged_again(nights):
    nights.waits("run-2")
    nights.examiner.meanwhile = [nights.roll_back]
    (done,) = nights.fresh(OLD, NEW).test(nights.copy)

    assert (done.judged.decision.champion, done.judged.decision.promoted, done.outcome) == ("run-1", True, "lost")
    assert nights.channel.promoted()[0].run_id is None
    assert nights.state.again == ("run-2",)
    assert nights.state.waiting == ()
    assert nights.fresh(OLD, NEW).test(nights.copy) == [], "the night that tries again has nothing left to do here"


def test_of_two_that_are_better_the_second_loses_its_swap_too_where_the_first_lost_to_a_rival(nights):
    for run_id in ("run-2", "run-3"):
        nights.waits(run_id)
    nights.examiner.meanwhile = [lambda: nights.put_in_use("run-8")]
    found = nights.fresh(OLD, NEW).test(nights.copy)

    assert [(done.judged.run_id, done.outcome) for done in found] == [("run-2", "lost"), ("run-3", "lost")]
    assert nights.channel.promoted()[0].run_id == "run-8"
    assert nights.state.again == ("run-2", "run-3")


# --- what others write meanwhile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [True, False])
def test_what_others_pay_and_decide_while_new_records_are_scored_stays(nights, monkeypatch, conditional):
    monkeypatch.setattr(channels_module, "SETTLE_SECONDS", 0.0)
    nights.channel.conditional = conditional
    nights.waits("run-2", level=0.0)

    def rival():
        pay(nights.channel, nights.recipe, "run-7")
        nights.waits("run-3", level=0.0)
        nights.channel.change_state(
            lambda state: state.model_copy(update={"again": ("run-6",)}), first=first_state(nights.recipe)
        )

    nights.examiner.meanwhile = [rival]
    nights.fresh(OLD, NEW).test(nights.copy)

    state = nights.state
    assert state.budget.level_of("run-7") is not None
    assert state.again == ("run-6",)
    assert [night.run_id for night in state.nights] == ["run-2", "run-3"]
    assert {each.challenger: each.records for each in state.waiting} == {"run-2": len(NEW), "run-3": 0}
    assert nights.examiner.scored == ["run-1", "run-2"], "nobody is scored a second time"


@pytest.mark.parametrize("conditional", [True, False])
def test_records_that_a_rival_has_counted_meanwhile_are_not_counted_again(nights, monkeypatch, conditional):
    monkeypatch.setattr(channels_module, "SETTLE_SECONDS", 0.0)
    nights.channel.conditional = conditional
    nights.waits("run-2", level=0.0)
    nights.examiner.meanwhile = [lambda: nights.fresh(OLD, NEW[:60], run_id="run-8").test(nights.copy)]
    nights.fresh(OLD, NEW[:90]).test(nights.copy)

    (evidence,) = nights.state.waiting
    assert (evidence.records, len(evidence.nights)) == (90, 2)


# --- what was seen is not known ---------------------------------------------------------------------------------------

LATER = "2999-01-01T00:00:00+00:00"


def counted(nights):
    """How many new records each that waits was judged on."""
    return {each.challenger: each.records for each in nights.state.waiting}


def lose_seen(nights):
    for entry in nights.channel.store.list("channels/notes/seen/"):
        nights.channel.store.delete([entry.key])


def damage_seen(nights):
    for entry in nights.channel.store.list("channels/notes/seen/"):
        nights.channel.store.write(entry.key, b"\0" * len(nights.channel.store.read(entry.key)[0]))


def lose_state(nights):
    nights.channel.change_state(lambda state: state.model_copy(update={"seen": None}), first=first_state(nights.recipe))


@pytest.mark.parametrize("lose", [lose_seen, damage_seen, lose_state])
def test_when_the_list_of_seen_records_is_gone_none_counts_and_old_ones_never_look_new(nights, lose):
    """The model in use was trained on OLD, which are in the data no longer when the list is begun anew."""
    nights.night(NEW[:50], run_id="run-2")
    nights.waits("run-2", level=0.0)
    lose(nights)
    nights.examiner.scored.clear()

    (note,) = nights.night(NEW[:100])
    assert note.startswith("no record counts as new tonight, because ")
    assert (counted(nights), nights.examiner.scored) == ({"run-2": 0}, [])
    assert nights.state.seen.since is not None

    (note,) = nights.night(NEW[:100], NEW[100:200], OLD)
    assert note.startswith("run-2 is judged by new records no more: which ones it was trained or judged on")
    assert counted(nights) == {"run-2": 0}
    assert nights.state.fresh[-1].records == 100, "OLD is not new to the model in use"

    nights.night(NEW[:200], NEW[200:220], run_id="run-3")
    nights.waits("run-3", level=0.0, time=LATER)
    nights.night(OLD, NEW[:230])
    assert counted(nights) == {"run-2": 0, "run-3": 10}, "it began to wait after the list was begun anew"


def test_by_other_templates_none_counts_until_the_model_in_use_was_trained_by_them(nights):
    nights.waits("run-2", level=0.0)
    nights.recipe = recipe_of("Q: {q}")

    first, *_ = nights.night(NEW[:50], run_id="run-3")
    assert "because the templates have changed" in first
    (note,) = nights.night(NEW[:80], OLD)
    assert note.startswith("no record counts as new: which ones run-1 was trained on is not known")
    assert (nights.examiner.scored, nights.state.fresh) == ([], ())
    assert nights.fresh(NEW).unseen(nights.channel.promoted()[0]) is None

    nights.put_in_use("run-3")
    nights.waits("run-4", level=0.0, time=LATER)
    nights.night(NEW[:90], run_id="run-4")
    nights.night(NEW[:100])
    assert counted(nights)["run-4"] == 10
    assert nights.examiner.scored[:2] == ["run-3", "run-4"]


def test_a_channel_that_never_lost_its_list_needs_no_other_one(nights):
    """As after going back to a run of long ago, of which no hashes are kept."""
    nights.waits("run-2", level=0.0)
    nights.channel.store.delete([entry.key for entry in nights.channel.store.list("channels/notes/trained/")])
    fresh = nights.fresh(OLD, NEW[:50])
    assert fresh.unseen(nights.channel.promoted()[0]) == 50
    fresh.test(nights.copy)
    assert counted(nights) == {"run-2": 50}
